"""The Windows engine on the fake of fake_windows.py: the contract, faults at every call, and the rules of RULES IOCP."""
import contextlib
import ctypes
import errno
import logging
import random
import socket
import struct
import sys
import threading

import pytest

pytest.register_assert_rewrite("engine_contract", "fake_windows")

import leviathan                                            # noqa: E402
import leviathan_win                                        # noqa: E402

if sys.platform == "win32":
    pytest.skip("the fake is made for systems that are not Windows", allow_module_level=True)

from engine_contract import DEADLINE, EngineContract, Record, stop_in_time      # noqa: E402
from fake_windows import Plan, installed                    # noqa: E402

GONE = (64, 121, 995, 1236, 10053, 10054)       # the peer is gone (RULES: IOCP 7)
SHORT = (10024, 10055, 8, 1450)                 # something is short: wait, go on
CODES = GONE + (1225, 10024, 10055)
PACKETS = [bytes([number]) * size for number, size in enumerate((1, 0, 30, 300, 5, 70, 2, 900))]
LAST = 12               # the k-th call, at most, that is made to fail


# ---------------------------------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------------------------------

class OnFake(EngineContract):
    """The contract on a fake that looks after the rules."""

    module = leviathan_win
    pinned = False
    plan = {}

    def setup_method(self, method):
        self.fake = contextlib.ExitStack()
        self.api = self.fake.enter_context(installed(Plan(**self.plan)))
        super().setup_method(method)

    def teardown_method(self, method):
        with self.fake:
            super().teardown_method(method)


class TestIocpFake(OnFake):
    """As Windows behaves most of the time."""


class TestIocpLate(OnFake):
    """Completions are late, in another order, on any thread; sends are short; what is cancelled may have succeeded."""

    plan = {"late": 0.4, "short": 50000, "carry": 0.5, "at_once": 0.3}

    # Short sends are more sends: these two count them.
    test_replies_of_one_receive_leave_in_one_send = None
    test_statistics = None


# ---------------------------------------------------------------------------------------------------------------------
# Faults at every call
# ---------------------------------------------------------------------------------------------------------------------

class Scenario:
    """One engine: a client connects to an echo server, sends PACKETS, gets them back, closes; then another is served."""

    def __init__(self, plan, threads=1, bulk=1):
        self.record = Record()
        self.plan = plan
        self.packets = PACKETS * bulk
        self.manager = leviathan.SessionManager()
        self.failures = []
        self.raised = None
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
                session.close()

        with installed(plan) as self.api:
            queue = leviathan.EventQueue(threads, name="fake")
            queue._made = leviathan_win.Engine(leviathan._Core, "fake", threads)
            self.server = leviathan.Communicator(
                leviathan.LengthPrefix(4), serve, on_connect=lambda session: add("connect", session),
                on_disconnect=disconnected, queue=queue, manager=self.manager)
            self.client = leviathan.Communicator(
                leviathan.LengthPrefix(4), receive, on_connect=sending, on_disconnect=disconnected, queue=queue,
                manager=self.manager)
            try:
                self.begin(queue)
            finally:
                self.counts = queue.statistics()
                stop_in_time(queue)

    def begin(self, queue):
        record, plan = self.record, self.plan
        try:
            listener = self.server.listen(0)
        except OSError as error:
            self.raised = error             # told to who asked
            return
        queue.start()
        try:
            self.client.connect(*listener.address, on_failure=lambda connector, error: (
                self.failures.append(error), record.add("failed", None, error)))
        except OSError as error:
            self.raised = error
            return
        what = "%s at %s, %s, %s" % (plan.call, plan.at, plan.code, plan.stage)
        record.wait(self.ended, "the end of the scenario (%s)" % what)
        plan.call = ""                      # from here on nothing fails
        assert not listener.closed, "the listener was closed: " + what
        with socket.create_connection(listener.address, DEADLINE) as another:
            another.settimeout(DEADLINE)
            another.sendall(b"\0\0\0\4more")
            assert EngineContract.read(another, 8) == b"\0\0\0\4more", what
        record.wait(self.ended)
        assert queue.post(record.add, "alive")
        record.wait_for("alive")

    def ended(self):
        """The client's session is over, or never was, and the server's too."""
        over = self.record.count("failed") or any(
            session.kind is leviathan.Kind.SERVER for _, session, _, _ in self.record.of("disconnect"))
        return over and not len(self.server.sessions) and not len(self.client.sessions) and \
            not self.manager.statistics()["sessions"]

    def check(self, complete):
        """The order and number of everything; *complete*: nothing may be missing."""
        record = self.record
        counts = self.manager.statistics()
        assert [counts[key] for key in ("leased", "operations", "sessions", "memory")] == [0, 0, 0, 0]
        if self.raised is not None:
            return
        sessions = [session for _, session, _, _ in record.of("connect")]
        assert len(sessions) == len(set(sessions)) == record.count("disconnect")
        for session in sessions:
            assert record.count("disconnect", session) == 1
            life = [name for name, target, _, _ in record.entries if target is session]
            assert life[0] == "connect" and life[-1] == "disconnect", life
        ours = [session for session in sessions if session.kind is leviathan.Kind.SERVER]
        theirs = [session for session in sessions if session.kind is leviathan.Kind.CLIENT]
        assert len(ours) <= 1 and len(theirs) >= 1
        for session in ours + theirs[:-1]:
            packets = record.packets(session)
            assert packets == self.packets[:len(packets)]
            assert not complete or packets == self.packets
        assert record.packets(theirs[-1]) == [b"more"]
        if complete:
            assert not self.failures and len(ours) == 1 and len(theirs) == 2
            assert all(what for _, _, _, what in record.of("sent"))


def sweep(call, code, stage, complete=False, last=LAST, **options):
    """Let the first, second, ... *call* fail, until the scenario has no such call any more."""
    for at in range(1, last + 1):
        plan = Plan(call, at, code, stage=stage, seed=at, **options)
        scenario = Scenario(plan)
        scenario.check(complete)
        if not plan.fired:
            assert at > 1, "%s was never called" % call
            return


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leviathan_win, "ACCEPT_PAUSE", 0.002)
    monkeypatch.setattr(leviathan_win, "ACCEPT_PAUSE_MAX", 0.004)
    monkeypatch.setattr(leviathan_win, "LINGER", 0.02)
    begin = leviathan.Listener.__init__

    def made(listener, *args):
        begin(listener, *args)
        listener.pause = 0.002

    monkeypatch.setattr(leviathan.Listener, "__init__", made)


@pytest.mark.parametrize("stage", ["start", "end"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["WSARecv", "WSASend", "ConnectEx"])
def test_a_failure_at_any_call_ends_in_closed(call, code, stage):
    sweep(call, code, stage, short=97 * (code % 2))


@pytest.mark.parametrize("stage", ["start", "end"])
@pytest.mark.parametrize("code", GONE + SHORT)
def test_no_failure_of_accept_loses_a_connection(code, stage):
    sweep("AcceptEx", code, stage, complete=True)


@pytest.mark.parametrize("code", [10024, 10054])
@pytest.mark.parametrize("stage", ["start", "end"])
@pytest.mark.parametrize("at", [1, 8, 9])
def test_failures_of_accept_in_a_row_lose_nothing(at, stage, code):
    Scenario(Plan("AcceptEx", at, code, 20, stage)).check(complete=True)


@pytest.mark.parametrize("call, error", [("socket", "EMFILE"), ("socket", "ENOBUFS"), ("socket", "ENOMEM")] + [
    (call, error) for call in ("bind", "setsockopt", "getpeername", "shutdown")
    for error in ("ENOBUFS", "ECONNRESET", "ENOTCONN")])
def test_a_failure_of_a_sockets_method_ends_in_closed(call, error):
    sweep(call, getattr(errno, error), "start")


@pytest.mark.parametrize("code", [8, 87, 1450])
def test_a_socket_that_cannot_join_the_port_ends_in_closed(code):
    for at in range(2, 6):                  # the first is the port itself
        Scenario(Plan("CreateIoCompletionPort", at, code)).check(complete=False)


def test_a_port_that_cannot_be_made_is_told_to_who_asked():
    with installed(Plan("CreateIoCompletionPort", 1, 1450)):
        with pytest.raises(OSError, match=r"^\[Errno \d+\] CreateIoCompletionPort failed: text of 1450\. "
                                          r"\(Windows error 1450\)$"):
            leviathan_win.Engine(leviathan._Core, "fake", 1)


@pytest.mark.parametrize("stage_of_cancel", [1, 2, 3])
def test_cancelling_what_has_just_been_completed(stage_of_cancel):
    Scenario(Plan("CancelIoEx", stage_of_cancel, 1168)).check(complete=True)


def test_a_post_that_fails_once_costs_nothing():
    """Without it a session would stand still for ever, and `stop` wait for it."""
    sweep("PostQueuedCompletionStatus", 1450, "start", complete=True)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_wait_at_the_port_that_fails_costs_nothing(at):
    Scenario(Plan("GetQueuedCompletionStatusEx", at, 1450)).check(complete=True)


@pytest.mark.parametrize("code", [10022, 10045])
def test_a_system_that_tells_no_tcp_info_only_waits_longer(code):
    Scenario(Plan("WSAIoctl", 1, code, 1000)).check(complete=True)


@pytest.mark.parametrize("stage", ["start", "end"])
def test_what_is_queued_behind_a_send_that_failed_is_not_sent(stage):
    """The stream must not go on without it while the session's end is in the mail."""
    inside, release, told, ended = Record(), threading.Event(), [], []

    def hold(session, packet):
        inside.add("held", session)
        release.wait(DEADLINE)

    with installed(Plan("WSASend", 2, 10055, stage=stage, at_once=1.0)) as api:
        queue = leviathan.EventQueue(2, name="fake")
        queue._made = leviathan_win.Engine(leviathan._Core, "fake", 2)
        server = leviathan.Communicator(leviathan.FixedSize(1), hold, queue=queue, manager=leviathan.SessionManager(),
                                        on_disconnect=lambda session, reason, error: ended.append(reason))
        listener = server.listen(0)
        queue.start()
        try:
            with socket.create_connection(listener.address, DEADLINE) as client:
                client.sendall(b"x")
                inside.wait_for("held")
                session = inside.of("held")[0][1]
                for number in range(50):
                    session.send(b"x", lambda session, ok, number=number: told.append((number, ok)))
                    inside.wait(lambda: not (api.pending("WSASend") or api.queued), "the end of the send")
                    if not number:
                        inside.wait(lambda: session.sending is None)
                calls = api.plan.counts["WSASend"]
                release.set()
                inside.wait(lambda: ended, "the session's end")
        finally:
            release.set()
            stop_in_time(queue)
    assert calls == 2 and ended == [leviathan.Reason.ERROR]
    assert told == [(0, True)] + [(number, False) for number in range(1, 50)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threads", [1, 3])
def test_late_and_shuffled_completions_and_short_sends(threads, seed):
    plan = Plan(short=(29, 61, 1000)[seed % 3], late=0.5, carry=0.5, at_once=seed / 3, seed=seed)
    Scenario(plan, threads).check(complete=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_much_in_short_sends(threads):
    Scenario(Plan(short=5000, late=0.2), threads, bulk=60).check(complete=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("call", ["WSARecv", "WSASend"])
def test_failures_among_late_completions_on_three_threads(call, seed):
    for at in range(1, 5):
        Scenario(Plan(call, at, 64, stage="end", late=0.5, carry=0.5, short=200, seed=seed), 3).check(complete=False)


# ---------------------------------------------------------------------------------------------------------------------
# RULES IOCP, one by one
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {
    64: ConnectionResetError, 10054: ConnectionResetError, 1225: ConnectionRefusedError, 10061: ConnectionRefusedError,
    121: TimeoutError, 10060: TimeoutError, 1236: ConnectionAbortedError, 10053: ConnectionAbortedError,
    995: ConnectionAbortedError, 1235: ConnectionAbortedError, 1234: ConnectionRefusedError, 10058: BrokenPipeError,
    5: PermissionError, 32: PermissionError, 10013: PermissionError, 10004: InterruptedError}
NUMBERS = {
    8: errno.ENOMEM, 1450: errno.ENOBUFS, 10024: errno.EMFILE, 10055: errno.ENOBUFS, 10048: errno.EADDRINUSE,
    10049: errno.EADDRNOTAVAIL, 1231: errno.ENETUNREACH, 1232: errno.EHOSTUNREACH, 10051: errno.ENETUNREACH,
    10065: errno.EHOSTUNREACH, 10057: errno.ENOTCONN, 1229: errno.ENOTCONN, 52: errno.EADDRINUSE, 6: errno.EBADF,
    10009: errno.EBADF, 87: errno.EINVAL, 10022: errno.EINVAL, 10014: errno.EFAULT, 1214: errno.EADDRNOTAVAIL, 4242: 4242}


class House(OnFake):
    """What the contract has to make sessions with, without its tests."""

    def fail_next(self, call, code, stage="start", times=1):
        """The next *times* of *call* fail."""
        plan = self.api.plan
        with plan.lock:
            plan.call, plan.code, plan.stage, plan.at, plan.times = call, code, stage, plan.counts[call] + 1, times

    def hold_back(self, *calls):
        """What is begun from now on stays pending until it is released."""
        self.api.plan.held.update(calls)

    def statistics(self, *names):
        counts = self.manager.statistics()
        return [counts[name] for name in names]

    def ended(self, session):
        """Wait for *session*'s end; (reason, error)."""
        self.record.wait_for("on_closed", target=session)
        return self.record.of("disconnect", session)[0][3]


for _name in dir(EngineContract):
    if _name.startswith("test_"):
        setattr(House, _name, None)


class TestRules(House):
    # -- 1: records and buffers are kept ------------------------------------------------------------------------------

    def test_a_record_is_kept_until_its_packet_is_taken(self):
        _, session, client = self.pair()
        engine = session.communicator.queue.engine
        self.record.wait(lambda: self.api.pending("WSARecv") == 1)
        go = self.hold(session)                     # the only thread: packets stay in the port
        client.sendall(self.packed(b"x"))
        self.record.wait(lambda: self.api.pending("WSARecv") == 0, "the completion")
        (address,) = [address for address, each in self.api.queued.items() if each.call == "WSARecv"]
        kept = engine.pending[address]
        assert kept.target is session and kept.keep is not None and ctypes.addressof(kept.record) == address
        go.set()
        self.record.wait_for("packet")
        client.close()
        self.ended(session)
        self.record.wait(lambda: len(engine.pending) == leviathan_win.ACCEPTS)
        assert all(each.target is None and each.keep is None for each in engine.spare)

    def test_after_success_in_the_call_the_packet_is_waited_for_all_the_same(self):
        self.api.plan.at_once = 1.0
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        for number in range(50):
            client.sendall(self.packed(b"%d" % number) * 3)
            assert self.read(client, 3 * (4 + len(b"%d" % number))) == self.packed(b"%d" % number) * 3

    def test_sent_bytes_stay_where_they_are_until_the_completion(self):
        for size in (10, 1 << 16, (1 << 16) + 1, 1 << 20):      # copied into a SendBuf, and kept as they are
            self.hold_back("WSASend")
            _, session, client = self.pair()
            data = bytes(range(256)) * (size // 256 + 1)
            session.write(data[:size])
            del data
            junk = [bytearray(size) for _ in range(20)]         # would be where it was, if it had been freed
            self.api.release("WSASend")
            assert self.read(client, size) == (bytes(range(256)) * (size // 256 + 1))[:size]
            del junk

    # -- 2, 6, 7: errors ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("code", sorted(KINDS))
    def test_each_code_becomes_the_right_oserror(self, code):
        error = leviathan_win.failure("WSARecv", code)
        assert type(error) is KINDS[code]
        assert str(error).endswith("WSARecv failed: text of %d. (Windows error %d)" % (code, code))

    @pytest.mark.parametrize("code", sorted(NUMBERS))
    def test_codes_without_a_class_of_their_own_have_their_errno(self, code):
        assert leviathan_win.failure("bind", code).errno == NUMBERS[code]

    @pytest.mark.parametrize("stage", ["start", "end"])
    @pytest.mark.parametrize("code", [64, 121, 995, 1236, 10053, 10054])
    def test_a_failed_receive_ends_its_session_with_the_systems_words(self, code, stage):
        _, session, client = self.pair()
        engine = session.communicator.queue.engine
        self.record.wait(lambda: self.api.pending("WSARecv") == 1)
        self.fail_next("WSARecv", code, stage)
        client.sendall(self.packed(b"x"))           # after this one the next is armed, and fails
        reason, error = self.ended(session)
        assert reason is leviathan.Reason.ERROR and type(error) is KINDS[code]
        assert str(error).endswith("WSARecv failed: text of %d. (Windows error %d)" % (code, code))
        assert self.record.packets() == [b"x"] and self.statistics("leased", "operations", "memory") == [0, 0, 0]
        self.record.wait(lambda: len(engine.pending) == leviathan_win.ACCEPTS)      # the listener's, nothing else

    @pytest.mark.parametrize("foreign", [True, False])
    @pytest.mark.parametrize("stage", ["start", "end"])
    @pytest.mark.parametrize("code", [64, 1236, 10054, 10055])
    def test_a_failed_send_ends_its_session_and_gives_all_back(self, code, stage, foreign):
        _, session, client = self.pair(queue=self.queue(2))
        self.fail_next("WSASend", code, stage)

        def send():
            return session.write(b"lost", lambda session, ok: self.record.add("sent", session, ok))

        assert send() if foreign else self.on_thread(session, send)
        reason, error = self.ended(session)
        assert reason is leviathan.Reason.ERROR and error.errno == leviathan_win.failure("WSASend", code).errno
        assert "WSASend failed: text of %d. (Windows error %d)" % (code, code) in str(error)
        assert [what for _, _, _, what in self.record.of("sent")] == [False]
        self.record.wait(lambda: self.statistics("leased", "operations", "memory") == [0, 0, 0])
        with contextlib.suppress(ConnectionResetError):
            assert self.read_to_end(client) == b""

    @pytest.mark.parametrize("code", [1225, 10061, 121, 10060, 1231, 10055])
    @pytest.mark.parametrize("stage", ["start", "end"])
    def test_a_failed_connect_is_told_with_the_systems_words(self, stage, code):
        _, listener = self.serve()
        self.fail_next("ConnectEx", code, stage)
        failures = []
        ours = self.communicator()
        ours.connect(*listener.address,
                     on_failure=lambda connector, error: (failures.append(error), self.record.add("failed")))
        self.record.wait_for("failed")
        assert type(failures[0]) is KINDS.get(code, OSError)
        assert "ConnectEx failed: text of %d. (Windows error %d)" % (code, code) in str(failures[0])

    def test_one_failed_packet_of_many_costs_only_its_session(self):
        _, listener = self.serve(lambda session, packet: session.send(packet))
        clients = [self.client(listener) for _ in range(5)]
        self.record.wait_for("connect", 5)
        sessions = [entry[1] for entry in self.record.of("connect")]
        self.record.wait(lambda: self.api.pending("WSARecv") == 5)
        go = self.hold(sessions[0])                 # all five completions are taken in one batch
        for number, client in enumerate(clients):
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
            else:
                client.sendall(self.packed(b"well"))
        self.record.wait(lambda: self.api.pending("WSARecv") == 0)
        go.set()
        for client in clients[::2]:
            assert self.read(client, 8) == self.packed(b"well")
        self.record.wait_for("on_closed", 2)
        assert all(type(what[1]) is ConnectionResetError for _, _, _, what in self.record.of("disconnect"))

    def test_a_post_that_fails_again_and_again_is_told_and_leaves_nothing(self):
        queue = self.queue(2)
        ran = []
        self.fail_next("PostQueuedCompletionStatus", 1450, times=5)
        with pytest.raises(OSError, match="PostQueuedCompletionStatus failed: text of 1450"):
            queue.engine.post(ran.append, "refused")
        for number in range(3):
            assert queue.engine.post(ran.append, number)
        self.record.wait(lambda: 2 in ran, "the last event that was taken")
        assert sorted(ran, key=str) == [0, 1, 2]

    # -- timers -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("threads", [1, 2, 3, 4, 8])
    def test_a_timer_that_is_far_away_wakes_nobody_over_and_over(self, threads):
        """One worker sleeps until it is due. The port gives a packet to who slept last, so none reaches all of them."""
        queue = self.queue(threads)
        before = self.api.plan.counts["PostQueuedCompletionStatus"]
        queue.call_later(1000, int)
        self.elapse(queue, 0.05)
        assert self.api.plan.counts["PostQueuedCompletionStatus"] - before < 4 * threads

    @pytest.mark.parametrize("threads", [2, 3, 8])
    def test_timers_are_called_in_time_while_all_threads_but_one_are_busy(self, threads):
        """Whoever keeps the time hands that on before it does anything else."""
        queue = self.queue(threads)
        go, ticks = threading.Event(), []
        queue.every(0.01, ticks.append, None)
        try:
            for blocked in range(1, threads):
                assert queue.post(lambda: (self.record.add("blocked"), go.wait(DEADLINE)))
                self.record.wait_for("blocked", blocked)
                seen = len(ticks)
                self.record.wait(lambda: len(ticks) >= seen + 5, "five ticks with %d threads blocked" % blocked)
        finally:
            go.set()

    # -- 3: cancelling only asks --------------------------------------------------------------------------------------

    def test_a_session_is_closed_when_what_was_cancelled_has_been_answered(self):
        self.api.plan.late = 1.0                    # the answer never comes at once
        _, session, client = self.pair()
        self.record.wait(lambda: self.api.pending("WSARecv") == 1)
        session.abort()
        assert self.ended(session) == (leviathan.Reason.NORMAL, None)       # 995 after our own cancel is no error
        assert self.api.plan.counts["CancelIoEx"] == 1

    def test_a_cancelled_receive_that_has_data_does_no_harm(self):
        self.api.plan.carry = 1.0
        _, listener = self.serve()
        self.hold_back("WSARecv")
        client = self.client(listener)
        client.sendall(self.packed(b"late"))
        self.record.wait_for("connect")
        session = self.record.of("connect")[0][1]
        self.record.wait(lambda: self.api.pending("WSARecv") == 1)
        session.abort()
        self.ended(session)
        assert self.record.packets() == [] and self.statistics("leased", "memory") == [0, 0]

    @pytest.mark.parametrize("size", [1, 5000, 300000])
    def test_a_pause_cancels_nothing_and_loses_nothing(self, size):
        _, session, client = self.pair()
        self.record.wait(lambda: self.api.pending("WSARecv") == 1)
        self.on_thread(session, session.pause)
        feeder = threading.Thread(target=client.sendall, args=(self.packed(b"x" * size, b"y"),))
        feeder.start()
        self.record.wait(lambda: self.api.pending("WSARecv") == 0, "the receive that was armed before the pause")
        self.on_thread(session, int)
        assert not self.record.count("packet") and self.api.pending("WSARecv") == 0
        session.resume()
        self.record.wait_for("packet", 2)
        feeder.join(DEADLINE)
        assert self.record.packets() == [b"x" * size, b"y"]
        assert not self.api.plan.counts["CancelIoEx"]

    @pytest.mark.parametrize("way", ["a streamed answer that closes", "a stop"])
    def test_a_buffer_that_is_received_into_stays_leased_after_a_pause(self, way):
        """RULES IOCP 1. Http that parses no more gives back what it holds; the receive was armed before the pause."""
        requests = []
        server, _ = self.serve(lambda session, request: (requests.append(request), self.record.add("request")),
                               framing=leviathan.Http())
        client = self.client(server.listeners[0])
        client.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HT")
        self.record.wait_for("request")
        session = self.record.of("connect")[0][1]
        self.record.wait(lambda: session.partial is not None and session.link.receiving)
        if way == "a stop":
            server.close()
            self.record.wait(lambda: session.protocol.done)
            session.pause()
            session.resume()
            self.on_thread(session, int)
            client.sendall(b"what comes then")
            self.record.wait(lambda: server.queue.statistics()["receives"] == 2)
            assert requests[0].reply(b"answered")
        else:
            self.hold_back("WSASend")
            stream = requests[0].stream(200, {"Connection": "close"})
            stream.write(b"x" * 10)
            stream.write(b"x" * 200000)
            self.record.wait(lambda: session.paused & leviathan.PAUSED_UNSENT)
            self.api.release("WSASend")
            assert self.read(client, 200000)
            self.record.wait(lambda: not session.paused & leviathan.PAUSED_UNSENT)
            client.sendall(b"what comes then")
            self.record.wait(lambda: server.queue.statistics()["receives"] == 2)
            stream.close()
        assert not self.api.wrong

    def test_the_end_that_comes_in_a_pause_is_told_after_it(self):
        _, session, client = self.pair()
        self.record.wait(lambda: self.api.pending("WSARecv") == 1)
        self.on_thread(session, session.pause)
        client.close()
        self.record.wait(lambda: self.api.pending("WSARecv") == 0)
        self.on_thread(session, int)
        assert not self.record.count("on_eof")
        session.resume()
        assert self.ended(session) == (leviathan.Reason.NORMAL, None)

    def test_completions_of_a_closed_listener_come_late(self):
        for _ in range(5):
            communicator, listener = self.serve()
            engine = communicator.queue.engine
            self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
            self.api.plan.late = 1.0
            listener.close()
            self.record.wait(lambda: not engine.pending, "the last packet")
            assert listener.socket.fileno() == -1
            self.api.plan.late = 0.0
        assert not self.api.sockets                 # those of the accepts are closed too

    def test_stop_waits_for_every_packet(self):
        communicator, listener = self.serve(queue=self.queue(3))
        clients = [self.client(listener) for _ in range(6)]
        self.record.wait_for("connect", 6)
        for _, session, _, _ in self.record.of("connect"):
            session.write(bytes(4000000))
        self.api.plan.late = 1.0
        communicator.queue.stop()
        assert not communicator.queue.engine.pending and not self.api.operations and not self.api.queued
        assert len(clients) == self.record.count("on_closed")

    # -- 4, 5: accepting ----------------------------------------------------------------------------------------------

    def test_several_accepts_are_armed(self):
        assert leviathan_win.ACCEPTS >= 4
        communicator, listener = self.serve()
        for _ in range(3):
            self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
            self.client(listener)
        self.record.wait_for("connect", 3)
        self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)

    def test_a_silent_client_holds_nothing(self):
        _, listener = self.serve(lambda session, packet: session.send(packet))
        for _ in range(2 * leviathan_win.ACCEPTS):
            self.client(listener)
        client = self.client(listener)
        client.sendall(self.packed(b"heard"))
        assert self.read(client, 9) == self.packed(b"heard")

    @pytest.mark.parametrize("code", [64, 121, 995, 10054])
    def test_a_failed_accept_closes_one_socket_and_arms_another(self, code, caplog):
        _, listener = self.serve()
        self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
        before = self.api.plan.counts["AcceptEx"]
        self.fail_next("AcceptEx", code, "end")
        self.client(listener)                       # the accept that takes its place fails, and is replaced
        self.record.wait(lambda: self.api.plan.counts["AcceptEx"] == before + 2)
        self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
        self.record.wait(lambda: len(self.api.sockets) == 2 + leviathan_win.ACCEPTS)     # the listener, the session
        self.client(listener)
        self.record.wait_for("connect", 2)
        assert self.record.count("on_accepted") == 2 and not self.record.count("on_listener_failed")
        assert not [each for each in caplog.records if each.levelno >= logging.ERROR]

    def test_a_shortage_pauses_accepting_and_is_told_once(self, caplog):
        _, listener = self.serve()
        self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
        self.fail_next("socket", errno.EMFILE)
        self.api.plan.times = 5
        self.client(listener)
        self.record.wait_for("connect")
        self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
        assert self.record.count("on_listener_failed") == 5
        assert len([each for each in caplog.records if each.levelno >= logging.ERROR]) == 1

    @pytest.mark.parametrize("code", [10022, 10038])
    def test_a_listener_that_cannot_accept_any_more_is_closed_and_told(self, code):
        _, listener = self.serve(lambda session, packet: session.send(packet))
        first = self.client(listener)
        self.record.wait_for("connect")
        self.record.wait(lambda: self.api.pending("AcceptEx") == leviathan_win.ACCEPTS)
        self.fail_next("AcceptEx", code)
        self.client(listener)
        self.record.wait_for("on_listener_failed")
        (error, pause), = [what for _, _, _, what in self.record.of("on_listener_failed")]
        assert "AcceptEx failed: text of %d" % code in str(error) and pause == 0.0
        self.record.wait(lambda: listener.socket.fileno() == -1)
        first.sendall(self.packed(b"still served"))
        assert self.read(first, 16) == self.packed(b"still served")

    def test_ipv6(self):
        try:
            communicator, listener = self.serve(lambda session, packet: session.send(packet))
            six = communicator.listen(0, "::1")
        except OSError:
            pytest.skip("this system has no IPv6")
        ours = self.communicator(on_connect=lambda session: session.send(b"six"))
        ours.connect(*six.address[:2]).wait(DEADLINE)
        self.record.wait_for("packet", 2)
        assert self.record.packets() == [b"six"] * 2
        client = self.client(six, socket.AF_INET6)
        client.sendall(self.packed(b"x"))
        assert self.read(client, 5) == self.packed(b"x")

    # -- 8: one send and one receive, and I3, I4 ----------------------------------------------------------------------

    def test_sends_queued_meanwhile_leave_in_one(self):
        self.hold_back("WSASend")
        _, session, client = self.pair()
        for number in range(21):
            assert session.write(b"%02d" % number * 50)
            assert self.api.pending("WSASend") == 1
        assert self.api.sizes("WSASend") == [100]
        self.api.release("WSASend")
        assert self.read(client, 2100) == b"".join(b"%02d" % number * 50 for number in range(21))
        assert self.api.sizes("WSASend") == [100, 2000]

    def test_sends_are_joined_up_to_a_size_and_large_ones_go_alone(self):
        limit = leviathan_win.JOIN_MAX
        self.hold_back("WSASend")
        _, session, client = self.pair(high_water=1 << 24)
        chunks = [b"0", b"1" * (limit - 10), b"2" * 10, b"3", b"4" * 2 * limit, b"5", b"6" * (limit - 1), b"7"]
        for chunk in chunks:
            assert session.write(chunk)
        self.api.release("WSASend")
        assert self.read(client, sum(map(len, chunks))) == b"".join(chunks)
        assert self.api.sizes("WSASend") == [1, limit, 1, 2 * limit, limit, 1]

    def test_what_a_handler_sends_leaves_in_one_when_it_returns(self):
        def handler(session, packet):
            for _ in range(10):
                session.send(packet)
            self.record.add("begun", None, self.api.sizes("WSASend"))

        _, session, client = self.pair(handler)
        client.sendall(self.packed(b"six---"))
        assert self.read(client, 100) == self.packed(b"six---") * 10
        assert self.record.of("begun")[0][3] == [] and self.api.sizes("WSASend") == [100]

    def test_packets_of_one_session_are_never_handled_twice_at_once(self):
        # I3. Completions on any of four threads, and three more that send, pause and resume.
        self.api.plan.late = 0.3
        inside, clashes = [], []

        def handler(session, packet):
            inside.append(threading.get_ident())
            session.send(packet)
            if len(inside) != 1:
                clashes.append(list(inside))
            inside.pop()

        _, session, client = self.pair(handler, queue=self.queue(4))
        numbers = [b"%d" % number for number in range(400)]
        over = threading.Event()

        def disturb():
            engine = session.communicator.queue.engine
            while not over.is_set():
                session.pause()
                session.resume()
                self.on_thread(session, int)
                engine.post(int)

        disturbers = [threading.Thread(target=disturb) for _ in range(3)]
        for each in disturbers:
            each.start()
        try:
            whole = self.packed(*numbers)
            for at in range(0, len(whole), 41):
                client.sendall(whole[at:at + 41])
            assert self.read(client, len(whole)) == whole
        finally:
            over.set()
            for each in disturbers:
                each.join()
        assert not clashes and self.record.packets() == numbers
        assert self.record.count("on_failed") == 0

    def test_while_a_handler_blocks_sends_of_others_go_out_and_complete(self):
        # I4. The second can only go when the first's completion was handled: one is outstanding at most.
        inside, go = threading.Event(), threading.Event()

        def handler(session, packet):
            inside.set()
            assert go.wait(DEADLINE)

        _, session, client = self.pair(handler, queue=self.queue(2))
        client.sendall(self.packed(b"block"))
        assert inside.wait(DEADLINE)
        for number in range(5):
            assert session.send(b"%d" % number * 1000)
            assert self.read(client, 1004) == self.packed(b"%d" % number * 1000)
            self.record.wait(lambda: session.sending is None and not session.backlog)
        assert self.statistics("operations") == [0]
        assert not go.is_set() and self.record.count("packet") == 1
        go.set()

    def test_a_session_may_be_aborted_while_its_handler_blocks(self):
        inside, go = threading.Event(), threading.Event()

        def handler(session, packet):
            inside.set()
            assert go.wait(DEADLINE)

        _, session, client = self.pair(handler, queue=self.queue(2))
        client.sendall(self.packed(b"block"))
        assert inside.wait(DEADLINE)
        session.abort()
        self.elapse(session.communicator.queue, 0.01)
        assert not self.record.count("on_closed")       # the handler's session is still there
        go.set()
        assert self.ended(session) == (leviathan.Reason.NORMAL, None)

    # -- buffers ------------------------------------------------------------------------------------------------------

    def test_a_receive_grows_with_the_parsed_length_and_its_buffer_goes_back(self):
        _, session, client = self.pair()
        size = 300000
        client.sendall(self.packed(b"x" * size)[:10])
        self.record.wait(lambda: self.api.sizes("WSARecv")[-1:] == [size + 4 - 10], "a receive of just the rest")
        classes = self.manager.statistics()["classes"]
        assert {name: each["leased"] for name, each in classes.items() if each["leased"]} == {1 << 19: 1}
        client.sendall(self.packed(b"x" * size)[10:])
        self.record.wait_for("packet")
        self.record.wait(lambda: self.api.sizes("WSARecv")[-1:] == [leviathan.RECV_BUFFER])
        self.record.wait(lambda: self.statistics("leased", "memory") == [1, leviathan.RECV_BUFFER])
        client.close()
        self.ended(session)
        assert self.statistics("leased", "memory") == [0, 0]

    def test_a_paused_session_holds_no_receive_buffer_without_bytes(self):
        _, session, client = self.pair(lambda session, packet: session.pause())
        client.sendall(self.packed(b"x"))
        self.record.wait_for("packet")
        self.on_thread(session, int)
        self.record.wait(lambda: self.statistics("leased") == [0])
        session.resume()
        client.sendall(self.packed(b"y"))
        self.record.wait_for("packet", 2)

    def test_a_chunk_longer_than_a_wsabuf_can_say_goes_in_parts(self, monkeypatch):
        monkeypatch.setattr(leviathan_win, "SEND_MAX", 100000)
        _, session, client = self.pair()
        data = bytes(range(256)) * 1000
        session.write(data)
        assert self.read(client, len(data)) == data
        assert self.api.sizes("WSASend") == [100000, 100000, 56000]

    def test_no_pressure_is_told_of_behind_the_end(self):
        """Two workers: one finds that less is unsent, another one closes the session before that is told."""
        _, session, client = self.pair(queue=self.queue(2), on_backpressure=lambda session, congested:
                                       self.record.add("pressure", session, congested))
        session.abort()
        self.ended(session)
        session.link.pressed = False
        session.paused |= leviathan.PAUSED_UNSENT
        session.worker._press(session)
        self.elapse(session.communicator.queue, 0.01)
        assert not self.record.count("pressure")

    def test_a_sendbuf_goes_back_at_the_completion(self):
        self.hold_back("WSASend")
        _, session, client = self.pair()
        self.record.wait(lambda: self.statistics("leased", "operations") == [1, 0])      # that of the receive
        session.write(b"x" * 1000)
        assert self.statistics("leased", "operations") == [2, 1]
        self.api.release("WSASend")
        self.record.wait(lambda: self.statistics("leased", "operations") == [1, 0])
        self.read(client, 1000)

    def test_at_the_memory_limit_receiving_waits_and_goes_on(self):
        self.manager = leviathan.SessionManager(memory_limit=2 * leviathan.RECV_BUFFER)
        _, listener = self.serve(lambda session, packet: session.send(packet))
        clients = {}
        for _ in range(5):
            client = self.client(listener)
            client.sendall(self.packed(b"mine"))
            clients[client.getsockname()] = client
        served = 0
        while clients:                              # each that goes makes room for the next
            served += 1
            self.record.wait_for("packet", served)
            assert self.statistics("memory")[0] <= 2 * leviathan.RECV_BUFFER
            client = clients.pop(self.record.of("packet")[served - 1][1].peer)
            assert self.read(client, 8) == self.packed(b"mine")
            client.close()
        self.record.wait_for("on_closed", 5)

    def test_a_peer_that_does_not_read_is_closed_at_the_limit(self):
        self.hold_back("WSASend")
        _, session, client = self.pair(send_limit=10000, high_water=5000, low_water=1000)
        assert session.write(b"x" * 9000) and not session.write(b"x" * 2000)
        assert self.ended(session)[0] is leviathan.Reason.OVERFLOW
        assert self.statistics("leased", "operations", "memory") == [0, 0, 0]

    # -- 9: how a connection ends -------------------------------------------------------------------------------------

    def test_a_peer_that_has_gone_before_the_fin(self):
        _, session, client = self.pair()
        self.fail_next("shutdown", errno.ENOTCONN)
        session.close()
        assert self.ended(session) == (leviathan.Reason.NORMAL, None)

    @pytest.mark.parametrize("first", ["ours", "the peer's"])
    def test_both_ends_half_closed(self, first):
        def ended(session):
            session.send(b"the answer")
            session.finish()

        def handler(session, packet):
            session.finish()

        _, session, client = self.pair(handler, on_eof=ended)
        if first == "ours":
            client.sendall(self.packed(b"the question"))
            assert self.read_to_end(client) == b""
            client.shutdown(socket.SHUT_WR)
        else:
            client.shutdown(socket.SHUT_WR)
            assert self.read_to_end(client) == self.packed(b"the answer")
        assert self.ended(session) == (leviathan.Reason.NORMAL, None)

    def test_closing_sends_the_rest_then_fin_and_no_reset(self):
        _, session, client = self.pair(high_water=1 << 24)
        session.write(b"x" * 3000000)
        session.close()
        assert len(self.read_to_end(client)) == 3000000         # raises if it was reset
        client.sendall(b"nobody reads this")
        client.close()
        self.ended(session)

    def test_aborting_resets(self):
        _, session, client = self.pair(high_water=1 << 24)
        session.write(b"x" * 3000000)
        session.abort()
        with pytest.raises(ConnectionResetError):
            self.read_to_end(client)
        self.ended(session)

    def test_a_session_may_be_aborted_as_soon_as_it_has_a_worker(self, monkeypatch):
        # By whom finds it in the Communicator's list, while attach or connect is still about to give it to the engine.
        slot, record = leviathan.Channel.worker, self.record

        class Hasty(leviathan.Session):
            __slots__ = ()

            @property
            def worker(self):
                return slot.__get__(self, type(self))

            @worker.setter
            def worker(self, worker):
                slot.__set__(self, worker)
                if worker is not None:
                    aborter = threading.Thread(target=self.abort)
                    aborter.start()
                    aborter.join(0.05)          # it may have to wait for us
                    with record.changed:
                        record.changed.wait_for(lambda: record.count("on_closed", self), 0.05)

        monkeypatch.setattr(leviathan, "Session", Hasty)
        queue = self.queue(2)
        communicator, listener = self.serve(queue=queue)
        with contextlib.suppress(ConnectionResetError):
            self.client(listener)
        self.record.wait_for("on_closed")
        ours = self.communicator(queue=queue)
        ours.connect(*listener.address)
        self.record.wait_for("on_closed", 2)
        self.record.wait(lambda: not len(communicator.sessions) and not len(ours.sessions))
        self.record.wait(lambda: not queue.engine.owned, "the engine's forgetting them")


class TestEverythingAtOnce(House):
    """Random verbs of three threads, and random clients, on four workers with late completions."""

    plan = {"late": 0.3, "short": 3000, "carry": 0.5, "at_once": 0.5}

    @pytest.mark.parametrize("seed", range(8))
    def test_every_session_ends_once_and_leaves_nothing(self, seed, monkeypatch):
        monkeypatch.setattr(leviathan_win, "DRAIN", 0.3)
        plan, queue = self.api.plan, self.queue(1 + seed % 4)
        plan.random.seed(seed)
        if seed % 2:
            plan.call = ("WSARecv", "WSASend", "AcceptEx", "ConnectEx")[seed // 2]
            plan.at, plan.times, plan.code, plan.stage = 3, 3, 64, "end"

        def sent(session, ok):
            self.record.add("sent", None, session)

        def handler(session, packet):
            taken.append(session.send(packet, sent))
            if packet == b"abort":
                session.abort()
            elif packet == b"close":
                session.close()

        taken = []
        communicator, listener = self.serve(handler, queue=queue, high_water=20000, low_water=5000)
        ours = self.communicator(queue=queue)
        over = threading.Event()

        def disturb(number):
            choose = random.Random(seed * 10 + number)
            while not over.wait(0.0003):
                sessions = list(communicator.sessions) + list(ours.sessions)
                if not sessions:
                    continue
                session = choose.choice(sessions)
                action = choose.random()
                if action < 0.5:
                    taken.append(session.write(bytes(choose.choice((1, 500, 30000))), sent))
                elif action < 0.7:
                    session.pause()
                elif action < 0.9:
                    session.resume()
                else:
                    choose.choice((session.close, session.abort, session.finish))()

        def visit(number):
            choose = random.Random(seed * 100 + number)
            for _ in range(25):
                with contextlib.suppress(OSError), socket.create_connection(listener.address, DEADLINE) as client:
                    client.settimeout(0.02)
                    for _ in range(choose.randint(0, 5)):
                        client.sendall(self.packed(choose.choice((b"x", b"y" * 9000, b"abort", b"close"))))
                        with contextlib.suppress(socket.timeout):
                            client.recv(1 << 16)
                    if choose.random() < 0.3:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        for _ in range(4):
            ours.connect(*listener.address)
        disturbers = [threading.Thread(target=disturb, args=(number,)) for number in range(3)]
        visitors = [threading.Thread(target=visit, args=(number,)) for number in range(3)]
        for each in disturbers + visitors:
            each.start()
        for each in visitors:
            each.join()
        over.set()
        for each in disturbers:
            each.join()
        for session in list(communicator.sessions) + list(ours.sessions):
            session.resume()
            session.close()
        self.record.wait(lambda: not len(communicator.sessions) and not len(ours.sessions), "the end of all sessions")
        self.record.wait(lambda: self.record.count("sent") >= taken.count(True), "on_sent of each send that was taken")
        queue.stop()
        assert self.record.count("sent") == taken.count(True)
        assert not self.record.count("on_failed") and not listener.socket.fileno() >= 0
