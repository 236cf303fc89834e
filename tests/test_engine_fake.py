"""The engine with faults injected: at every call of the scenario, short sends, late and shuffled events."""
import errno
import random

import pytest

pytest.register_assert_rewrite("engine_contract")

import leviathan                                            # noqa: E402
from engine_contract import EngineContract, Record, stop_in_time          # noqa: E402
from fake_engine import CALLS, Plan, faulty                 # noqa: E402

leviathan_linux = pytest.importorskip("leviathan_linux") if leviathan._engine.__name__.endswith("linux") else None
if leviathan_linux is None:
    pytest.skip("the fake twin is made of leviathan_linux, which needs fcntl", allow_module_level=True)

PACKETS = [bytes([number]) * size for number, size in enumerate((1, 0, 30, 300, 5, 70, 2, 900))]
LAST = 40               # the k-th call, at most, that is made to fail
HARMLESS = (errno.EAGAIN, errno.EINTR)


class Scenario:
    """One engine: a client connects to an echo server, sends PACKETS, gets them back, and closes."""

    def __init__(self, plan, threads=1, bulk=1):
        self.record = Record()
        self.plan = plan
        self.packets = PACKETS * bulk
        self.manager = leviathan.SessionManager()
        self.failures = []
        record, add = self.record, self.record.add

        def disconnected(session, reason, error):
            add("disconnect", session, (reason, error))

        def serve(session, packet):
            add("packet", session, packet)
            session.send(packet, lambda session, ok: add("sent", session, ok))

        def sending(session):
            add("connect", session)
            for packet in self.packets:
                session.send(packet, lambda session, ok: add("sent", session, ok))

        def receive(session, packet):
            add("packet", session, packet)
            if record.count("packet", session) == len(self.packets):
                session.write(b"\0\0\0\0", lambda session, ok: add("sent", session, ok))
                session.close()

        with faulty(leviathan_linux, plan):
            queue = leviathan.EventQueue(threads, name="fake")
            self.server = leviathan.Communicator(
                leviathan.LengthPrefix(4), serve, on_connect=lambda session: add("connect", session),
                on_disconnect=disconnected, queue=queue, manager=self.manager)
            self.client = leviathan.Communicator(
                leviathan.LengthPrefix(4), receive, on_connect=sending, on_disconnect=disconnected, queue=queue,
                manager=self.manager)
            self.address = self.server.listen(0).address
            queue.start()
            try:
                self.client.connect(*self.address, on_failure=lambda connector, error: (
                    self.failures.append(error), add("failed", None, error)))
                record.wait(lambda: self.ended(), "the end of the scenario (%s at %s, %s)" % (
                    plan.call, plan.at, errno.errorcode[plan.error]))
                # The engine lives on, whatever has happened: it still runs events.
                assert queue.post(add, "alive")
                record.wait_for("alive")
            finally:
                self.counts = queue.statistics()
                stop_in_time(queue)

    def ended(self):
        """The client's session is over, or never was, and the server's too."""
        record = self.record
        over = record.count("failed") or any(
            session.kind is leviathan.Kind.SERVER for _, session, _, _ in record.of("disconnect"))
        return over and not len(self.server.sessions) and not len(self.client.sessions) and \
            not self.manager.statistics()["sessions"]

    def check(self, complete):
        """The order and number of everything; *complete*: nothing may be missing."""
        record = self.record
        counts = self.manager.statistics()
        assert [counts[key] for key in ("leased", "operations", "sessions", "memory")] == [0, 0, 0, 0]
        sessions = [session for _, session, _, _ in record.of("connect")]
        assert len(sessions) == len(set(sessions)) == record.count("disconnect")
        for session in sessions:
            assert record.count("disconnect", session) == 1
            life = [name for name, target, _, _ in record.entries if target is session]
            assert life[0] == "connect" and life[-1] == "disconnect", life
            packets = record.packets(session)
            wanted = self.packets + [b""]
            assert packets == wanted[:len(packets)]
            if complete:
                wanted = wanted if session.kind is leviathan.Kind.CLIENT else self.packets
                assert packets == wanted
        if complete:
            assert not self.failures and len(sessions) == 2
            assert self.plan.counts["accept"]
            outcomes = [what for _, _, _, what in record.of("sent")]
            assert outcomes[:2 * len(self.packets)] == [True] * 2 * len(self.packets)


def sweep(call, error, short, complete, **options):
    """Let the first, second, ... *call* fail, until the scenario has no such call any more."""
    for at in range(1, LAST + 1):
        plan = Plan(call, at, error, short=short, seed=at, **options)
        Scenario(plan).check(complete)
        if not plan.fired:
            assert at > 1, "%s was never called" % call
            return


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leviathan_linux, "ACCEPT_PAUSE", 0.002)
    monkeypatch.setattr(leviathan_linux, "LINGER", 0.02)
    monkeypatch.setattr(leviathan.Listener, "pause", 0.002, raising=False)


@pytest.mark.parametrize("short", [0, 97])
@pytest.mark.parametrize("error", HARMLESS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["recv_into", "send", "accept"])
def test_what_only_delays_loses_nothing(call, error, short):
    sweep(call, error, short, complete=True)


@pytest.mark.parametrize("times", [3])
@pytest.mark.parametrize("call", ["recv_into", "send", "accept"])
def test_delays_in_a_row_lose_nothing(call, times):
    sweep(call, errno.EAGAIN, 300, complete=True, times=times)


@pytest.mark.parametrize("error", ["ECONNABORTED", "EPROTO", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
def test_errors_of_accept_that_pass_lose_nothing(error):
    sweep("accept", getattr(errno, error), 0, complete=True)


@pytest.mark.parametrize("short", [0, 97])
@pytest.mark.parametrize("error", ["ECONNRESET", "EPIPE"])
@pytest.mark.parametrize("call", CALLS)
def test_a_failure_at_any_call_ends_in_closed(call, error, short):
    sweep(call, getattr(errno, error), short, complete=False)


@pytest.mark.parametrize("at", range(3, 8))
def test_a_poll_that_takes_no_more_descriptors_ends_in_closed(at):
    # epoll_ctl gives ENOSPC at /proc/sys/fs/epoll/max_user_watches. Two registrations are the engine's own.
    Scenario(Plan("register", at, errno.ENOSPC, short=97)).check(complete=False)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threads", [1, 3])
def test_late_and_shuffled_events_and_one_byte_sends(threads, seed):
    Scenario(Plan(short=random.Random(seed).choice((1, 7, 1000)), late=0.5, seed=seed), threads).check(complete=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_much_in_short_sends(threads):
    scenario = Scenario(Plan(short=5000, late=0.2), threads, bulk=100)
    scenario.check(complete=True)


@pytest.mark.parametrize("short", [0, 1, 97])
def test_every_byte_is_counted(short):
    scenario = Scenario(Plan(short=short))
    total = 2 * sum(len(packet) + 4 for packet in PACKETS) + 4
    # The client may be gone before the empty answer to its last packet.
    assert total <= scenario.counts["bytes_sent"] <= total + 4
    assert total <= scenario.counts["bytes_received"] <= total + 4


class TestShort(EngineContract):
    """The whole contract on sockets whose sends are short and whose events come late."""

    module = leviathan_linux

    def setup_method(self, method):
        self.faults = faulty(leviathan_linux, Plan(short=50000, late=0.3))
        self.faults.__enter__()
        super().setup_method(method)

    def teardown_method(self, method):
        try:
            super().teardown_method(method)
        finally:
            self.faults.__exit__(None, None, None)

    # Short sends are more sends: these two count them.
    test_replies_of_one_receive_leave_in_one_send = None
    test_statistics = None
