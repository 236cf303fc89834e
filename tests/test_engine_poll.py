"""The engine contract on select.poll, which macOS and the BSDs run."""
import pytest

pytest.register_assert_rewrite("engine_contract")

from engine_contract import EngineContract      # noqa: E402

leviathan_linux = pytest.importorskip("leviathan_linux", reason="needs select.poll and fcntl", exc_type=ImportError) \
    if hasattr(pytest, "version_tuple") and pytest.version_tuple >= (8, 2) else pytest.importorskip("leviathan_linux")


class TestPoll(EngineContract):
    module = leviathan_linux
    settings = {"USE_EPOLL": False}

    def test_it_is_poll_that_is_tested(self):
        assert isinstance(self.queue().engine.workers[0].poller, leviathan_linux._Poll)
