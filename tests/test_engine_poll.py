"""The engine contract on select.poll, which macOS and the BSDs run."""
import pytest

pytest.register_assert_rewrite("engine_contract")

from engine_contract import EngineContract      # noqa: E402

leviathan_linux = pytest.importorskip("leviathan_linux", reason="needs select.poll and fcntl", exc_type=ImportError) \
    if hasattr(pytest, "version_tuple") and pytest.version_tuple >= (8, 2) else pytest.importorskip("leviathan_linux")


class TestPoll(EngineContract):
    module = leviathan_linux

    def setup_method(self, method):
        self.before = leviathan_linux.USE_EPOLL
        leviathan_linux.USE_EPOLL = False
        super().setup_method(method)

    def teardown_method(self, method):
        try:
            super().teardown_method(method)
        finally:
            leviathan_linux.USE_EPOLL = self.before

    def test_it_is_poll_that_is_tested(self):
        assert isinstance(self.queue().engine.workers[0].poller, leviathan_linux._Poll)
