"""The contract of an engine (docs/architecture.md), as tests. Subclass EngineContract, name the engine's module, run.

The core is the real one, watched: every completion is recorded, with its thread, and every verb knows that it is
running. After each test all queues are stopped, the pools must be empty, and each session's record must be in order.
"""
from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import leviathan        # noqa: E402
from conftest import WINE, read_exactly     # noqa: E402

DEADLINE = 20.0         # seconds that anything here may take: long, since only a failing test waits so long
VERBS = ("listen", "accept", "connect", "attach", "receive", "pause", "send", "close", "shutdown", "unlisten",
         "run_on_owner", "post", "call_later", "cancel", "statistics")
RESET = struct.pack("ii", 1, 0)         # SO_LINGER: close() sends a reset


class Record:
    """What happened, in order; `wait` waits for something to be so."""

    def __init__(self):
        self.changed = threading.Condition(threading.RLock())
        self.entries = []           # (name, session or listener, thread, what)
        self.wrong = []             # violations of the contract
        self.local = threading.local()

    def add(self, name, target=None, what=None):
        with self.changed:
            self.entries.append((name, target, threading.get_ident(), what))
            self.changed.notify_all()

    def of(self, name, target=None):
        """What was recorded under *name*."""
        with self.changed:
            return [entry for entry in self.entries if entry[0] == name and (target is None or entry[1] is target)]

    def count(self, name, target=None):
        return len(self.of(name, target))

    def packets(self, session=None):
        return [what for _, _, _, what in self.of("packet", session)]

    def wait(self, condition, what="what the test waits for"):
        with self.changed:
            end = time.monotonic() + DEADLINE
            met = condition()
            while not met and time.monotonic() < end:
                self.changed.wait(0.002)    # not every condition is about what is recorded
                met = condition()           # asked once a time: some are true for a moment only
            assert met, \
                "%s did not happen in %s s; recorded: %s" % (what, DEADLINE, [entry[0] for entry in self.entries][-30:])

    def wait_for(self, name, count=1, target=None):
        self.wait(lambda: self.count(name, target) >= count, "%d * %s" % (count, name))

    def complain(self, text):
        with self.changed:
            self.wrong.append(text)
            self.changed.notify_all()

    # A verb, or a completion, is running on this thread:

    def enter(self, stack, name):
        running = self.local.__dict__.setdefault(stack, [])
        if stack == "completions":
            for other in self.local.__dict__.get("verbs", []) + running:
                if (name, other) != ("on_packet", "on_resumed"):        # which hands on what had been received
                    self.complain("the completion %s ran inside of %s" % (name, other))
        running.append(name)

    def leave(self, stack):
        getattr(self.local, stack).pop()


def recording_core(record):
    """leviathan._Core, every completion recorded."""

    class Core(leviathan._Core):
        pass

    def completion(name):
        original = getattr(leviathan._Core, name)

        def reported(target, *args):
            record.enter("completions", name)
            closing = name == "on_closed"
            if closing and target.sending is not None:
                record.complain("on_closed while a send is outstanding")
            if not closing:
                record.add(name, target, args)
            try:
                original(target, *args)
            finally:
                record.leave("completions")
                if closing:             # after the slot went back, so that who waits for this sees it
                    if target.partial is not None:
                        record.complain("on_closed has left a RecvBuf")
                    record.add(name, target, args)

        return staticmethod(reported)

    for name in ("on_accepted", "on_connected", "on_eof", "on_resumed", "on_closed", "on_listener_failed", "on_failed"):
        setattr(Core, name, completion(name))
    return Core


def watched_engine(module, record, name, threads):
    """An engine whose verbs are known to be running."""

    class Watched(module.Engine):
        pass

    def verb(name):
        original = getattr(module.Engine, name)

        def called(self, *args):
            record.enter("verbs", name)
            try:
                return original(self, *args)
            finally:
                record.leave("verbs")

        return called

    for each in VERBS:
        setattr(Watched, each, verb(each))
    return Watched(recording_core(record), name, threads)


def stop_in_time(queue):
    """Stop *queue*; a thread that never ends is an error, not a test that never ends."""
    problems = []

    def stop():
        try:
            queue.stop()
        except BaseException as error:
            problems.append(error)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    stopper.join(DEADLINE)
    assert not stopper.is_alive(), "the engine does not stop"
    if problems:
        raise problems[0]


class EngineContract:
    """The suite. A subclass sets `module`, the engine's, and `pinned`: a session stays on one thread for its life.

    `settings`: {name in the module: its value during each test}.
    """

    module = None
    pinned = True
    settings = {}

    # -- the house ----------------------------------------------------------------------------------------------------

    def setup_method(self, method):
        self.settings_before = {name: getattr(self.module, name) for name in self.settings}
        for name, value in self.settings.items():
            setattr(self.module, name, value)
        self.record = Record()
        self.manager = leviathan.SessionManager(max_sessions=200)
        self.queues, self.sockets, self.communicators = [], [], []
        self.threads_before = set(threading.enumerate())

    def teardown_method(self, method):
        try:
            self.check_that_nothing_is_left()
        finally:
            for name, value in self.settings_before.items():
                setattr(self.module, name, value)

    def check_that_nothing_is_left(self):
        for sock in self.sockets:
            sock.close()
        for queue in self.queues:
            stop_in_time(queue)
        # The pools are checked whatever the test did, and after the last session was closed.
        counts = self.manager.statistics()
        assert {key: counts[key] for key in ("leased", "operations", "sessions", "memory", "waiting")} == dict.fromkeys(
            ("leased", "operations", "sessions", "memory", "waiting"), 0)
        assert self.record.wrong == []
        lives = defaultdict(list)
        for name, target, thread, _ in self.record.entries:
            if isinstance(target, leviathan.Session):
                lives[target].append((name, thread))
        for session, life in lives.items():
            names = [name for name, _ in life]
            assert names.count("on_closed") == 1 and names[-1] == "on_closed", names
            assert names.count("on_connected") <= 1
            assert names.count("connect") == names.count("disconnect") <= 1, names
            if "packet" in names:
                assert names[0] == "on_connected", names
            assert len({thread for _, thread in life}) == 1 or not self.pinned, "one session on several threads"
            assert session.worker is None or session.sending is None and not session.out and not session.unsent
        assert {thread for thread in threading.enumerate() if thread.name.startswith("contract")} \
            <= self.threads_before

    def queue(self, threads=1, start=True):
        """A queue on the engine that is tested."""
        queue = leviathan.EventQueue(threads=threads, name="contract")
        queue._made = watched_engine(self.module, self.record, "contract", threads)
        self.queues.append(queue)
        if start:
            queue.start()
        return queue

    def communicator(self, on_packet=None, framing=None, queue=None, **options):
        """A Communicator whose callbacks are recorded, and called on if there are any."""
        record = self.record
        running = set()
        eof = options.pop("on_eof", None)
        on_connect, on_disconnect = options.pop("on_connect", None), options.pop("on_disconnect", None)

        def packet_came(session, packet):
            if session in running:
                record.complain("two packets of one session at the same time")
            running.add(session)
            record.enter("completions", "on_packet")
            record.add("packet", session, packet)
            try:
                if on_packet is not None:
                    on_packet(session, packet)
            finally:
                record.leave("completions")
                running.discard(session)

        def connected(session):
            record.add("connect", session)
            if on_connect is not None:
                on_connect(session)

        def disconnected(session, reason, error):
            record.add("disconnect", session, (reason, error))
            if on_disconnect is not None:
                on_disconnect(session, reason, error)

        options.setdefault("manager", self.manager)
        communicator = leviathan.Communicator(
            framing or leviathan.LengthPrefix(4), packet_came, on_connect=connected, on_disconnect=disconnected,
            on_eof=eof, queue=queue or self.queue(), **options)
        self.communicators.append(communicator)
        return communicator

    def serve(self, on_packet=None, **options):
        """A listening Communicator and its Listener."""
        communicator = self.communicator(on_packet, **options)
        return communicator, communicator.listen(0)

    def client(self, listener, family=socket.AF_INET):
        """A plain, blocking socket that is connected to *listener*."""
        sock = socket.socket(family)
        self.sockets.append(sock)
        sock.settimeout(DEADLINE)
        sock.connect(listener.address)
        return sock

    def pair(self, on_packet=None, **options):
        """A communicator, its only session, and the socket at the other end."""
        communicator, listener = self.serve(on_packet, **options)
        before = self.record.count("connect")
        client = self.client(listener)
        self.record.wait_for("connect", before + 1)
        return communicator, self.record.of("connect")[-1][1], client

    def on_thread(self, session, function, *args):
        """Call *function* on the session's thread, wait, and return what it returned."""
        done, box = threading.Event(), []

        def call():
            try:
                box.append(function(*args))
            finally:
                done.set()

        assert session.communicator.queue.engine.run_on_owner(session, call)
        assert done.wait(DEADLINE)
        return box[0]

    def hold(self, session):
        """Keep the session's thread busy until the returned Event is set."""
        held, go = threading.Event(), threading.Event()

        def wait():
            held.set()
            go.wait(DEADLINE)

        session.communicator.queue.engine.run_on_owner(session, wait)
        assert held.wait(DEADLINE)
        return go

    def elapse(self, queue, seconds):
        """Let the engine's own clock advance by *seconds*."""
        done = threading.Event()
        queue.call_later(seconds, done.set)
        assert done.wait(DEADLINE + seconds)

    read = staticmethod(read_exactly)

    @staticmethod
    def read_to_end(sock):
        pieces = []
        while True:
            piece = sock.recv(1 << 16)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)

    @staticmethod
    def packed(*packets):
        return b"".join(struct.pack(">I", len(packet)) + packet for packet in packets)

    # -- a session's life ---------------------------------------------------------------------------------------------

    def test_echo(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        client.sendall(self.packed(b"one", b"", b"three" * 1000))
        assert self.read(client, 5015) == self.packed(b"one", b"", b"three" * 1000)
        client.close()
        self.record.wait_for("on_closed")
        assert self.record.of("disconnect")[0][3] == (leviathan.Reason.NORMAL, None)

    def test_connected_comes_before_the_first_receive_and_closed_last(self):
        _, listener = self.serve()
        client = self.client(listener)
        client.sendall(self.packed(b"early"))       # is there before the session is
        client.close()
        self.record.wait_for("on_closed")
        names = [name for name, target, _, _ in self.record.entries if isinstance(target, leviathan.Session)]
        assert names == ["on_connected", "connect", "packet", "on_eof", "disconnect", "on_closed"]

    def test_what_on_connect_sends_arrives(self):
        _, listener = self.serve(on_connect=lambda session: session.send(b"hello"))
        assert self.read(self.client(listener), 9) == self.packed(b"hello")

    def test_a_session_may_be_closed_or_aborted_in_on_connect(self):
        for ending in (leviathan.Session.close, leviathan.Session.abort):
            _, listener = self.serve(on_connect=ending)
            before = self.record.count("on_closed")
            try:
                self.client(listener)
            except ConnectionResetError:
                pass                    # aborted before connect() had returned
            self.record.wait_for("on_closed", before + 1)
        assert self.record.packets() == []

    def test_no_completion_runs_inside_a_verb(self):
        # Every verb in a handler; Record.enter complains of a completion that begins before the handler has returned.
        timers = []

        def handler(session, packet):
            engine = session.communicator.queue.engine
            session.send(b"x" * 200000, lambda session, ok: self.record.add("sent", session, ok))
            session.pause()
            session.resume()
            timers.append(engine.call_later(0, 0, self.record.add, "timer"))
            engine.post(self.record.add, "event")
            listener = session.communicator.listen(0)
            session.communicator.connect(*listener.address)
            listener.close()
            session.close()
            assert self.record.count("disconnect", session) == 0
            assert self.record.count("sent") == self.record.count("event") == self.record.count("timer") == 0
            self.record.add("returned")

        _, session, client = self.pair(handler)
        client.sendall(self.packed(b"go"))
        assert len(self.read_to_end(client)) == 200004
        client.close()
        for name in ("returned", "sent", "timer", "event"):
            self.record.wait_for(name)
        self.record.wait_for("on_closed", target=session)

    def test_abort_in_a_handler_ends_the_packets(self):
        _, session, client = self.pair(lambda session, packet: session.abort())
        client.sendall(self.packed(b"1", b"2", b"3"))
        self.record.wait_for("on_closed")
        assert self.record.packets() == [b"1"]
        assert not session.connected and not session.send(b"late") and not session.write(b"late")
        assert not session.close() and not session.abort()

    def test_close_in_a_handler_ends_the_packets_and_sends_the_rest(self):
        def handler(session, packet):
            session.send(b"bye")
            assert session.close()
            assert not session.send(b"too late")

        _, session, client = self.pair(handler)
        client.sendall(self.packed(b"1", b"2"))
        assert self.read_to_end(client) == self.packed(b"bye")
        client.close()
        self.record.wait_for("on_closed")
        assert self.record.packets() == [b"1"]

    def test_every_ending_ends_in_closed(self):
        # Each way in which a connection can end, and both sides at once.
        def reset(session, client):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.close()

        def both(session, client):
            session.close()
            client.close()

        def inside_a_packet(session, client):
            client.sendall(b"\0\0\0\7abc")
            client.close()

        def nonsense(session, client):
            client.sendall(b"\xff" * 8)

        def twice(session, client):
            session.close()
            session.abort()
            session.close()

        def reset_while_congested(session, client):
            session.send(b"x" * 5000000)
            self.read(client, 100)
            reset(session, client)

        endings = [(reset, "ERROR"), (both, "NORMAL"), (inside_a_packet, "ERROR"), (nonsense, "PROTOCOL"),
                   (twice, "NORMAL"), (reset_while_congested, "ERROR"),
                   (lambda session, client: client.close(), "NORMAL"),
                   (lambda session, client: client.shutdown(socket.SHUT_WR), "NORMAL"),
                   (lambda session, client: session.close(), "NORMAL"),
                   (lambda session, client: session.abort(), "NORMAL")]
        _, listener = self.serve()
        for number, (ending, reason) in enumerate(endings, 1):
            client = self.client(listener)
            self.record.wait_for("connect", number)
            session = self.record.of("connect")[-1][1]
            ending(session, client)
            if reason != "ERROR":
                try:
                    self.read_to_end(client)
                except OSError:
                    pass                # reset, or closed here
            client.close()
            self.record.wait_for("on_closed", target=session)
            told = self.record.of("disconnect", session)[0][3][0]
            # Wine's server asks for a socket's error when it sees a hang-up, and the receive that is armed behind that
            # gets an end instead of it.
            assert told is leviathan.Reason[reason] or WINE and reason == "ERROR" and told is leviathan.Reason.NORMAL, ending
            assert self.manager.statistics()["leased"] == self.manager.statistics()["operations"] == 0

    def test_a_raising_handler_costs_its_session_only(self):
        def handler(session, packet):
            if packet == b"bad":
                raise RuntimeError("on purpose")
            session.send(packet)

        _, listener = self.serve(handler)
        good, bad = self.client(listener), self.client(listener)
        self.record.wait_for("connect", 2)
        bad.sendall(self.packed(b"bad"))
        self.record.wait_for("on_closed")
        assert self.record.of("disconnect")[0][3][0] is leviathan.Reason.ERROR
        good.sendall(self.packed(b"good"))
        assert self.read(good, 8) == self.packed(b"good")

    def test_a_framing_whose_receiver_raises_costs_its_session_only(self):
        """It must not, but a program may bring its own. Where the stream is then nobody knows: so it ends there."""
        class Raising(leviathan.LengthPrefix):
            def receiver(self, on_packet, rest, fail):
                receive = super().receiver(on_packet, rest, fail)

                def received(session, buffer, end):
                    if session.tag == "raise":
                        raise OverflowError("on purpose")
                    receive(session, buffer, end)

                return received

        def handler(session, packet):
            session.send(packet)
            if packet == b"wait":
                session.pause()

        communicator, listener = self.serve(handler, framing=Raising(4))
        good = self.client(listener)
        self.record.wait_for("connect")
        for first, then in ((b"", b"x"), (b"\0\0", b"\0"), (self.packed(b"wait", b"more"), b"")):
            # At once, behind an incomplete packet, and in what is looked at after a pause.
            before = self.record.count("connect")
            client = self.client(listener)
            self.record.wait_for("connect", before + 1)
            session = self.record.of("connect")[-1][1]
            received = communicator.queue.statistics()["bytes_received"]
            client.sendall(first)
            self.record.wait(lambda: communicator.queue.statistics()["bytes_received"] == received + len(first))
            self.on_thread(session, setattr, session, "tag", "raise")
            client.sendall(then)
            session.resume()
            self.record.wait_for("on_closed", target=session)
            reason, error = self.record.of("disconnect", session)[0][3]
            assert reason is leviathan.Reason.ERROR and type(error) is OverflowError
        good.sendall(self.packed(b"good"))
        assert self.read(good, 8) == self.packed(b"good")
        assert self.record.count("on_failed") == 3

    def test_a_raising_on_disconnect_loses_nothing(self):
        def raising(session, reason, error):
            raise RuntimeError("on purpose")

        _, session, client = self.pair(on_disconnect=raising)
        client.close()
        self.record.wait_for("on_closed")
        self.record.wait(lambda: self.manager.statistics()["sessions"] == 0)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def test_packets_come_in_order_and_one_at_a_time_on_three_threads(self):
        sessions, count = 6, 300
        _, listener = self.serve(lambda session, packet: session.send(packet), queue=self.queue(3))
        clients = [self.client(listener) for _ in range(sessions)]
        whole = self.packed(*(b"%d" % number for number in range(count)))

        def feed(client, step):
            for at in range(0, len(whole), step):
                client.sendall(whole[at:at + step])

        feeders = [threading.Thread(target=feed, args=(client, 7 + 13 * number))
                   for number, client in enumerate(clients)]
        for feeder in feeders:
            feeder.start()
        for client in clients:
            assert self.read(client, len(whole)) == whole
        for feeder in feeders:
            feeder.join()
        for _, session, _, _ in self.record.of("connect"):
            assert self.record.packets(session) == [b"%d" % number for number in range(count)]
        assert len({thread for _, _, thread, _ in self.record.of("packet")}) == 3 or not self.pinned

    def test_one_receive_is_outstanding_at_most(self):
        # While a handler runs its session receives nothing, whatever the other threads do.
        inside, go = threading.Event(), threading.Event()

        def handler(session, packet):
            if packet == b"first":
                inside.set()
                assert go.wait(DEADLINE)

        _, session, client = self.pair(handler, queue=self.queue(3))
        client.sendall(self.packed(b"first"))
        assert inside.wait(DEADLINE)
        client.sendall(self.packed(b"second"))
        self.elapse(self.queue(), 0.05)
        assert self.record.packets() == [b"first"]
        go.set()
        self.record.wait_for("packet", 2)

    def test_one_send_is_outstanding_at_most(self):
        # What is queued behind an outstanding send waits for it: order is kept, and one operation is leased.
        _, session, client = self.pair(high_water=1 << 24)
        for number in range(40):
            assert session.send(bytes([number]) * 300000)
        assert self.on_thread(session, self.manager.statistics)["operations"] == 1
        for number in range(40):
            assert self.read(client, 300004)[4:] == bytes([number]) * 300000
        client.close()
        self.record.wait_for("on_closed")

    def test_pause_and_receive(self):
        _, session, client = self.pair(lambda session, packet: session.pause() if packet == b"stop" else None)
        client.sendall(self.packed(b"stop", b"behind it"))
        self.record.wait_for("packet")
        client.sendall(self.packed(b"later"))
        self.elapse(session.communicator.queue, 0.05)
        assert self.record.packets() == [b"stop"]
        session.resume()
        self.record.wait_for("packet", 3)
        assert self.record.packets() == [b"stop", b"behind it", b"later"]
        assert self.record.count("on_resumed") == 1

    def test_a_paused_session_can_send_and_be_closed(self):
        _, session, client = self.pair()
        session.pause()
        session.send(b"out")
        assert self.read(client, 7) == self.packed(b"out")
        session.close()
        assert self.read_to_end(client) == b""
        client.close()
        self.record.wait_for("on_closed")

    def test_pausing_at_every_packet_loses_none(self):
        def handler(session, packet):
            session.pause()
            session.communicator.queue.post(session.resume)

        _, session, client = self.pair(handler, queue=self.queue(3))
        packets = [b"%d" % number * 50 for number in range(100)]
        client.sendall(self.packed(*packets))
        self.record.wait_for("packet", 100)
        assert self.record.packets() == packets

    def test_a_large_packet_is_whole_and_its_buffer_goes_back(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        body = os.urandom(1 << 20)
        client.sendall(self.packed(body))
        assert self.read(client, len(body) + 4) == self.packed(body)
        client.close()
        self.record.wait_for("on_closed")
        assert self.manager.statistics()["leased"] == 0

    def test_a_packet_byte_by_byte(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in self.packed(b"slow", b"and slower"):
            client.send(bytes([byte]))
        assert self.read(client, 22) == self.packed(b"slow", b"and slower")

    def test_half_closed_by_the_peer_can_still_be_answered(self):
        def ended(session):
            session.send(b"the answer")
            session.close()

        _, session, client = self.pair(on_eof=ended)
        client.sendall(self.packed(b"the question"))
        client.shutdown(socket.SHUT_WR)
        assert self.read_to_end(client) == self.packed(b"the answer")
        self.record.wait_for("on_closed")
        assert self.record.count("on_eof") == 1

    # -- sending ------------------------------------------------------------------------------------------------------

    def test_sends_of_several_threads_are_whole_and_each_in_order(self):
        _, session, client = self.pair(queue=self.queue(3), high_water=1 << 24)
        count, body = 200, b"." * 500

        def sender(number):
            for serial in range(count):
                assert session.send(struct.pack(">HH", number, serial) + body)

        senders = [threading.Thread(target=sender, args=(number,)) for number in range(4)]
        for each in senders:
            each.start()
        seen = defaultdict(list)
        for _ in range(4 * count):
            number, serial = struct.unpack(">HH", self.read(client, 508)[4:8])
            seen[number].append(serial)
        for each in senders:
            each.join()
        assert all(seen[number] == list(range(count)) for number in range(4))

    def test_on_sent_is_called_once_for_each_and_in_order(self):
        _, session, client = self.pair(high_water=1 << 24)
        for number in range(30):
            assert session.write(b"%02d" % number * 40000,
                                 lambda session, ok, number=number: self.record.add("sent", session, (number, ok)))
        client_data = self.read(client, 30 * 80000)
        assert client_data == b"".join(b"%02d" % number * 40000 for number in range(30))
        self.record.wait_for("sent", 30)
        assert [what for _, _, _, what in self.record.of("sent")] == [(number, True) for number in range(30)]

    def test_on_sent_says_false_when_the_session_is_aborted_and_comes_before_closed(self):
        _, session, client = self.pair(high_water=1 << 26, send_limit=1 << 26)
        for _ in range(4):
            session.write(bytes(1 << 23), lambda session, ok: self.record.add("sent", session, ok))
        session.abort()
        self.record.wait_for("on_closed")
        assert [what for _, _, _, what in self.record.of("sent")] == [False] * 4

    def test_an_on_sent_that_writes_again_keeps_no_other_session_waiting(self):
        # On epoll each of them was in the mail before the sockets were looked at: the others waited till the last.
        turns, answered = [], threading.Event()

        def again(session, ok):
            turns.append(ok)
            if ok and not answered.is_set() and len(turns) < 10000:
                session.write(b"", again)

        communicator, session, _ = self.pair(lambda session, packet: answered.set())
        client = self.client(communicator.listeners[0])
        self.record.wait_for("connect", 2)
        go = self.hold(session)
        client.sendall(self.packed(b"here"))
        session.communicator.queue.engine.run_on_owner(session, session.write, b"", again)
        go.set()
        self.record.wait(answered.is_set)
        assert len(turns) < 10000

    def test_nothing_is_sent_after_closing(self):
        _, session, client = self.pair()
        session.close()
        self.read_to_end(client)
        client.close()
        self.record.wait_for("on_closed")
        assert not session.send(b"x") and not session.write(b"x", lambda *unused: self.record.add("sent"))
        assert not self.record.count("sent")

    def test_close_delivers_what_is_queued(self):
        _, session, client = self.pair(high_water=1 << 24)
        data = os.urandom(3000000)
        for at in range(0, len(data), 100000):
            session.write(data[at:at + 100000])
        session.close()
        assert self.read_to_end(client)[:len(data)] == data
        client.close()
        self.record.wait_for("on_closed")

    def test_a_reply_that_has_left_is_counted_no_more(self):
        """A packet over SEND_INLINE is queued with its bytes counted; then nothing is left, and closing waits for nothing."""
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        packet = bytes(leviathan.SEND_INLINE + 4000)
        client.sendall(self.packed(packet))
        assert self.read(client, len(packet) + 4) == self.packed(packet)
        self.record.wait(lambda: session.backlog == 0, "an empty backlog")
        began = time.monotonic()
        client.shutdown(socket.SHUT_WR)
        assert self.read_to_end(client) == b""
        client.close()
        self.record.wait_for("on_closed")
        assert time.monotonic() - began < DEADLINE / 2

    def test_closing_while_clients_come_leaves_none(self):
        for _ in range(10):
            communicator, listener = self.serve(queue=self.queue(3))

            def knock():
                try:
                    for _ in range(60):
                        self.sockets.append(socket.create_connection(listener.address, DEADLINE))
                except OSError:
                    pass

            knocker = threading.Thread(target=knock)
            before = self.record.count("on_accepted")
            knocker.start()
            self.record.wait_for("on_accepted", before + 3)
            communicator.close()
            self.record.wait(lambda: not len(communicator.sessions), "the end of every session")
            knocker.join(DEADLINE)

    def test_start_and_stop_at_once(self):
        for _ in range(20):
            queue = self.queue(2, start=False)
            starter = threading.Thread(target=queue.engine.start)
            starter.start()
            queue.engine.stop()
            starter.join(DEADLINE)

    def test_close_in_a_handler_delivers_what_other_threads_have_queued(self):
        entered, go = threading.Event(), threading.Event()

        def handler(session, packet):
            session.send(b"mine")
            entered.set()
            assert go.wait(DEADLINE)
            session.close()

        _, session, client = self.pair(handler)
        client.sendall(self.packed(b"go"))
        assert entered.wait(DEADLINE)
        big = os.urandom(1000000)
        assert session.write(b"theirs") and session.write(big)      # True: it has to arrive
        assert session.backlog >= 1000006
        go.set()
        assert self.read_to_end(client) == self.packed(b"mine") + b"theirs" + big
        client.close()
        self.record.wait_for("on_closed")

    def test_every_true_of_racing_sends_is_delivered(self):
        # Threads send while another closes: what was answered with True arrives, what was answered with False does not.
        _, session, client = self.pair(high_water=1 << 24)
        counted = [0] * 3

        def sender(number):
            # The limit is for the sake of slow twins.
            while counted[number] < 20000 and session.write(struct.pack(">II", number, counted[number])):
                counted[number] += 1

        senders = [threading.Thread(target=sender, args=(number,)) for number in range(3)]
        for each in senders:
            each.start()
        seen = defaultdict(list)
        for _ in range(100):
            number, serial = struct.unpack(">II", self.read(client, 8))
            seen[number].append(serial)
        session.close()
        rest = self.read_to_end(client)
        for each in senders:
            each.join()
        assert len(rest) % 8 == 0
        for number, serial in struct.iter_unpack(">II", rest):
            seen[number].append(serial)
        assert [seen[number] for number in range(3)] == [list(range(count)) for count in counted]
        client.close()
        self.record.wait_for("on_closed")

    def test_finish_sends_what_is_queued_then_the_end_and_goes_on_receiving(self):
        _, session, client = self.pair(high_water=1 << 24)
        session.write(b"x" * 2000000)
        session.finish()
        assert len(self.read_to_end(client)) == 2000000
        client.sendall(self.packed(b"still there"))
        self.record.wait_for("packet")
        assert session.connected
        client.close()
        self.record.wait_for("on_closed")
        assert self.record.of("disconnect")[0][3][0] is leviathan.Reason.NORMAL

    def test_a_send_after_finish_is_refused_and_costs_nothing(self):
        _, session, client = self.pair()
        session.finish()
        assert self.read_to_end(client) == b""
        assert session.write(b"foreign") is False
        assert self.on_thread(session, session.write, b"own") is False
        assert self.on_thread(session, session.send, b"own") is False
        client.sendall(self.packed(b"still there"))
        self.record.wait_for("packet")
        assert session.connected

    def test_a_send_is_refused_as_soon_as_finish_was_called(self):
        # By another thread too, while the owner is busy: what was sent before arrives, what was sent after is refused.
        _, session, client = self.pair()
        go = self.hold(session)
        assert session.write(b"before") is True
        session.finish()
        session.finish()
        assert session.write(b"after") is False
        assert session.send(b"after") is False
        go.set()
        assert self.read_to_end(client) == b"before"
        assert session.connected

    def test_what_is_posted_and_raises_is_logged_as_it_is(self, caplog):
        # Not as if it came of something that the engine itself had caught.
        queue = self.queue()
        queue.start()
        seen, done = [], threading.Event()

        def job():
            seen.append(sys.exc_info()[0])
            raise ValueError("the job's own")

        queue.post(job)
        queue.post(done.set)
        assert done.wait(DEADLINE)
        assert seen == [None]
        assert [record.exc_info[1].__context__ for record in caplog.records if record.exc_info] == [None]

    def test_the_deadline_of_a_half_close_ends_when_all_is_sent(self, monkeypatch):
        monkeypatch.setattr(self.module, "DRAIN", 0.1)
        _, session, client = self.pair(high_water=1 << 25, send_limit=1 << 25)
        session.write(b"x" * 8000000)
        session.finish()
        for _ in range(3):
            self.on_thread(session, int)        # the thread has seen that it cannot send all of it now
        assert len(self.read_to_end(client)) == 8000000
        self.elapse(session.communicator.queue, 0.2)
        client.sendall(self.packed(b"still there"))
        self.record.wait_for("packet")

    def test_a_drain_has_a_deadline(self, monkeypatch):
        monkeypatch.setattr(self.module, "DRAIN", 0.1)
        _, session, client = self.pair(high_water=1 << 25, send_limit=1 << 25)
        session.write(b"x" * 8000000)
        session.close()                 # and nobody reads
        self.record.wait_for("on_closed")

    # -- foreign threads ----------------------------------------------------------------------------------------------

    def test_verbs_of_foreign_threads_are_done_by_the_owner(self):
        _, session, client = self.pair(lambda session, packet: None, queue=self.queue(3))
        go = self.hold(session)
        assert session.send(b"posted")
        session.pause()
        session.resume()
        assert session.close()
        assert session.connected            # nothing has been done yet ...
        assert session.backlog == 10 or not self.pinned     # ... but on a completion port sending goes on (I4)
        assert self.record.count("on_closed") == 0
        go.set()
        assert self.read_to_end(client) == self.packed(b"posted")
        client.close()
        self.record.wait_for("on_closed")
        owners = [session.worker] if self.pinned else session.communicator.queue.engine.workers
        assert {thread for name, target, thread, _ in self.record.entries if target is session} <= \
            {worker.thread.ident for worker in owners}

    def test_a_session_is_pinned_to_the_thread_asked_for(self):
        queue = self.queue(3)
        communicator = self.communicator(queue=queue)
        for thread in (2, 0, 1):
            listener = communicator.listen(0, thread=thread)
            before = self.record.count("connect")
            self.client(listener)
            self.record.wait_for("connect", before + 1)
            session = self.record.of("connect")[-1][1]
            assert session.worker is queue.engine.workers[thread]

    # -- accept, attach, listen, unlisten -----------------------------------------------------------------------------

    def test_accept_in_one_engine_and_attach_in_another(self):
        serving = self.communicator(lambda session, packet: session.send(packet), queue=self.queue(2))
        accepting = self.communicator()
        listener = accepting.listen(0, serve=serving)
        for number in range(4):
            client = self.client(listener)
            client.sendall(self.packed(b"%d" % number))
            assert self.read(client, 5) == self.packed(b"%d" % number)
        idents = {worker.thread.ident for worker in serving.queue.engine.workers}
        seen = {thread for _, _, thread, _ in self.record.of("on_connected")}
        assert seen == idents if self.pinned else seen <= idents
        assert len(serving.sessions) == 4 and len(accepting.sessions) == 0
        assert accepting.queue.statistics()["accepted"] == 4 and serving.queue.statistics()["connected"] == 4

    def test_attach_to_an_engine_that_has_stopped_gives_everything_back(self):
        serving = self.communicator()
        accepting = self.communicator()
        listener = accepting.listen(0, serve=serving)
        serving.queue.stop()
        client = self.client(listener)
        assert self.closed_by_peer(client)
        self.record.wait_for("on_closed")
        # Not at once: accepting takes a slot before it knows whether another connection is there.
        self.record.wait(lambda: self.manager.statistics()["sessions"] == 0 and len(serving.sessions) == 0)

    def test_accepting_waits_for_room(self):
        _, listener = self.serve(lambda session, packet: session.send(packet), max_clients=2)
        clients = [self.client(listener) for _ in range(5)]
        for number, client in enumerate(clients):
            client.sendall(self.packed(b"%d" % number))
        served = 0
        while served < 5:                       # each time one goes the next comes in
            self.record.wait_for("packet", min(5, served + 2))
            assert self.record.count("connect") - self.record.count("disconnect") <= 2
            clients[served].close()
            served += 1
            self.record.wait_for("on_closed", served)
        assert sorted(self.record.packets()) == [b"0", b"1", b"2", b"3", b"4"]

    def test_accepting_waits_for_a_slot_of_the_manager(self):
        self.manager = leviathan.SessionManager(max_sessions=1)
        _, one = self.serve(lambda session, packet: session.send(packet))
        _, two = self.serve(lambda session, packet: session.send(packet))
        for listener in (one, two, one, two):
            first, second = self.client(listener), self.client(listener)
            for client in (first, second):
                client.sendall(self.packed(b"x"))
                assert self.read(client, 5) == self.packed(b"x")
                client.close()

    def test_unlisten_gives_the_port_back_and_keeps_the_sessions(self):
        communicator, listener = self.serve(lambda session, packet: session.send(packet))
        client = self.client(listener)
        self.record.wait_for("connect")
        session = self.record.of("connect")[0][1]
        listener.close()
        listener.close()
        self.on_thread(session, int)
        end = time.monotonic() + DEADLINE       # Windows lets go of the port when the accepts it had armed have ended
        while True:
            try:
                self.client(listener)
            except ConnectionRefusedError:
                break
            except ConnectionResetError:
                pass                            # somebody was there to close it
            assert not self.pinned and time.monotonic() < end, "it still listens"
        client.sendall(self.packed(b"still served"))
        assert self.read(client, 16) == self.packed(b"still served")
        if sys.platform == "win32" and not WINE:
            # "Using SO_EXCLUSIVEADDRUSE": the port is not free before the last connection accepted at it has ended.
            session.abort()
            self.record.wait_for("on_closed", target=session)
        again = communicator.listen(listener.address[1])
        assert again.address == listener.address
        self.client(again)
        self.record.wait_for("connect", 2)

    def test_listen_reports_what_is_wrong_at_once(self):
        _, listener = self.serve()
        try:
            self.communicator().listen(listener.address[1])
        except OSError:
            pass
        else:
            raise AssertionError("two listen on one port")

    def test_a_listener_may_be_made_and_closed_before_the_start(self):
        queue = self.queue(start=False)
        communicator = self.communicator(queue=queue)
        kept, closed = communicator.listen(0), communicator.listen(0)
        closed.close()
        client = self.client(kept)
        queue.start()
        client.sendall(self.packed(b"x"))
        self.record.wait_for("packet")

    def test_many_connections_at_once(self):
        _, listener = self.serve(lambda session, packet: session.send(packet), queue=self.queue(2))
        clients = [self.client(listener) for _ in range(150)]       # more than one readiness accepts
        for client in clients:
            client.sendall(self.packed(b"hello"))
        for client in clients:
            assert self.read(client, 9) == self.packed(b"hello")
            client.close()
        self.record.wait_for("on_closed", 150)

    # -- connect ------------------------------------------------------------------------------------------------------

    def test_connect(self):
        _, listener = self.serve(lambda session, packet: session.send(packet))
        ours = self.communicator(on_connect=lambda session: session.send(b"ping"))
        connector = ours.connect(*listener.address)
        session = connector.wait(DEADLINE)
        self.record.wait_for("packet", 2)
        assert self.record.packets(session) == [b"ping"]
        connector.close()
        self.record.wait_for("on_closed", 2)

    def test_a_connection_that_was_given_up_while_it_was_made_is_never_established(self):
        """Its end and the system's word that it is there may meet in one turn of its thread."""
        class GivenUp(leviathan.Session):
            __slots__ = ()

            def move(self, event):
                if event == "established":
                    self.worker.close_session(self, False, None, None)
                return super().move(event)

        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            ours = self.communicator()
            ours._session = GivenUp
            ours.connect(*listening.getsockname())
            self.record.wait_for("on_closed")
        assert self.record.count("connect") == self.record.count("disconnect") == 0

    def test_connection_refused(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = free.getsockname()
        ours = self.communicator()
        failures = []
        ours.connect(*address, on_failure=lambda connector, error: (failures.append(error), self.record.add("failed")))
        self.record.wait_for("failed")
        assert isinstance(failures[0], ConnectionRefusedError)
        self.record.wait_for("on_closed")       # which has told of the failure, and is noted when it returns
        assert self.record.count("connect") == self.record.count("disconnect") == 0
        assert ours.queue.statistics()["sessions"] == 0

    def test_a_connect_verb_that_cannot_begin_ends_in_closed(self):
        # A family that does not fit, and an address of no known form: no exception, on_closed.
        ours = self.communicator()
        for address in (("127.0.0.1", 99999), ("::::", 1), None, "nonsense"):
            session = self.new_session(ours)
            before = self.record.count("on_closed")
            ours.queue.engine.connect(session, socket.AF_INET, address, None)
            self.record.wait_for("on_closed", before + 1)
            assert self.record.of("on_closed")[-1][1] is session and session.error is not None

    def test_a_connect_verb_on_a_stopped_engine_ends_in_closed(self):
        ours = self.communicator()
        ours.queue.stop()
        session = self.new_session(ours)
        ours.queue._made.connect(session, socket.AF_INET, ("127.0.0.1", 9), None)
        self.record.wait_for("on_closed", target=session)       # else it is forgotten, and its slot is lost
        self.record.wait(lambda: self.manager.statistics()["sessions"] == 0)

    def test_a_session_that_is_aborted_while_it_connects(self):
        _, listener = self.serve()
        ours = self.communicator()
        for _ in range(20):
            session = self.new_session(ours)
            ours.queue.engine.connect(session, socket.AF_INET, listener.address, None)
            session.abort()
            self.record.wait_for("on_closed", target=session)

    def new_session(self, communicator):
        """A session for the verb `connect`, with its slot, as a Connector would make it."""
        session = leviathan.Session(communicator, communicator._take_slot(None), leviathan.Kind.SERVER, None)
        communicator.sessions._add(session)
        return session

    # -- events and timers --------------------------------------------------------------------------------------------

    def test_posted_events_run_once_each_on_the_engines_threads(self):
        queue = self.queue(3)
        ran = []
        for number in range(1000):
            assert queue.engine.post(lambda number=number: ran.append((number, threading.get_ident())))
        self.record.wait(lambda: len(ran) == 1000, "1000 events")
        assert sorted(number for number, _ in ran) == list(range(1000))
        assert {ident for _, ident in ran} <= {worker.thread.ident for worker in queue.engine.workers}

    def test_posted_events_use_every_idle_thread(self):
        queue = self.queue(3)
        barrier = threading.Barrier(4)
        for _ in range(3):
            queue.engine.post(barrier.wait, DEADLINE)
        barrier.wait(DEADLINE)              # only passes if three threads run events at the same time

    def test_events_of_one_thread_run_in_order_and_a_raising_one_costs_nothing(self):
        queue = self.queue(1)

        def wrong():
            raise RuntimeError("on purpose")

        for number in range(200):
            queue.engine.post(self.record.add, "event", None, number)
            if number == 100:
                queue.engine.post(wrong)
        self.record.wait_for("event", 200)
        assert [what for _, _, _, what in self.record.of("event")] == list(range(200))
        assert self.record.count("on_failed") == 1

    def test_events_that_post_events(self):
        queue = self.queue(2)

        def step(left):
            self.record.add("event")
            if left:
                queue.engine.post(step, left - 1)

        queue.engine.post(step, 300)
        self.record.wait_for("event", 301)

    def test_timers_come_in_their_order_and_not_too_early(self):
        queue = self.queue(1)
        began = time.monotonic()
        timers = {delay: queue.engine.call_later(delay, 0, lambda delay=delay: self.record.add(
            "timer", None, (delay, time.monotonic() - began))) for delay in (0.09, 0.03, 0.0, 0.06)}
        self.record.wait_for("timer", 4)
        fired = [what for _, _, _, what in self.record.of("timer")]
        assert [delay for delay, _ in fired] == sorted(timers, key=lambda delay: timers[delay].when)
        assert all(took >= delay - 1e-6 for delay, took in fired)       # a clock of whole ticks, and floats

    def test_timers_that_are_due_together_do_not_wait_for_each_other(self):
        """One that waits costs its own thread and nobody else."""
        queue = self.queue(2)
        both = threading.Barrier(2, action=lambda: self.record.add("both"))
        for _ in range(2):
            queue.engine.call_later(0.02, 0, both.wait, DEADLINE)
        self.record.wait_for("both")

    def test_a_repeated_timer_and_its_cancel(self):
        queue = self.queue(2)
        timer = queue.engine.call_later(0.005, 0.005, self.record.add, "tick")
        self.record.wait_for("tick", 5)
        timer.cancel()
        timer.cancel()
        ticks = self.record.count("tick")
        self.elapse(queue, 0.05)
        assert self.record.count("tick") <= ticks + 1       # one may have been running
        assert queue.engine.statistics()["timers"] == 0

    def test_a_cancelled_timer_never_comes(self):
        queue = self.queue(1)

        def make():                         # on the only thread, so that none comes before it is cancelled
            timers = [queue.engine.call_later(0.01, 0, self.record.add, "timer", None, number) for number in range(200)]
            for timer in timers[::2] + timers[1:150:2]:
                timer.cancel()
            self.record.add("made")

        queue.post(make)
        self.record.wait_for("made")
        self.elapse(queue, 0.1)
        assert [what for _, _, _, what in self.record.of("timer")] == list(range(151, 200, 2))
        assert queue.engine.statistics()["timers"] == 0

    def test_a_repeated_timer_that_cancels_itself(self):
        queue = self.queue(1)
        timers = []

        def tick():
            self.record.add("tick")
            timers[0].cancel()

        queue.post(lambda: timers.append(queue.engine.call_later(0.01, 0.01, tick)))
        self.record.wait_for("tick")
        self.elapse(queue, 0.05)
        assert self.record.count("tick") == 1
        assert queue.engine.statistics()["timers"] == 0

    def test_a_timer_that_cancels_another_one_that_is_due(self):
        queue = self.queue(1)
        timers = []
        held, go = threading.Event(), threading.Event()
        queue.engine.post(lambda: (held.set(), go.wait(DEADLINE)))
        assert held.wait(DEADLINE)
        timers.append(queue.engine.call_later(0.0, 0, lambda: timers[1].cancel()))
        timers.append(queue.engine.call_later(0.001, 0, self.record.add, "never"))
        while time.monotonic() < timers[1].when:
            pass                            # both are due when the thread looks
        go.set()
        self.elapse(queue, 0.02)
        assert self.record.count("never") == 0
        assert queue.engine.statistics()["timers"] == 0

    def test_a_raising_timer_goes_on(self):
        def wrong():
            self.record.add("tick")
            raise RuntimeError("on purpose")

        queue = self.queue(1)
        timer = queue.engine.call_later(0.002, 0.002, wrong)
        self.record.wait_for("tick", 3)
        timer.cancel()

    def test_timers_are_not_late_while_sockets_are_busy(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        timer = session.communicator.queue.engine.call_later(0.01, 0.01, self.record.add, "tick")
        while self.record.count("tick") < 5:
            client.sendall(self.packed(b"busy"))
            self.read(client, 8)
        timer.cancel()

    def test_sockets_do_not_wait_for_all_timers_that_are_due_at_once(self):
        ran, seen = [], threading.Event()

        def tick():
            if not ran:
                client.sendall(self.packed(b"here"))        # not there yet when the timers were taken
            seen.wait(0.002)                # time for it to arrive
            if not seen.is_set():
                ran.append(None)

        _, session, client = self.pair(lambda session, packet: seen.set())
        go = self.hold(session)
        for _ in range(1000):
            session.communicator.queue.engine.call_later(0, 0, tick)
        go.set()
        self.record.wait(seen.is_set)
        assert len(ran) < 1000

    # -- stop ---------------------------------------------------------------------------------------------------------

    def test_stop_with_open_sessions_closes_them_with_shutdown(self):
        communicator, listener = self.serve(queue=self.queue(3))
        clients = [self.client(listener) for _ in range(9)]
        self.record.wait_for("connect", 9)
        for client in clients[:3]:
            client.sendall(b"\0\0\0\7abc")                      # holds a RecvBuf
        for _, session, _, _ in self.record.of("connect")[:3]:
            session.send(b"x" * 3000000)                        # holds an operation
        communicator.queue.stop()
        assert self.record.count("on_closed") == 9
        assert {what[0] for _, _, _, what in self.record.of("disconnect")} == {leviathan.Reason.SHUTDOWN}
        for client in clients:
            assert self.closed_by_peer(client)
        assert communicator.queue.engine.statistics()["sessions"] == 0
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("contract")]

    @staticmethod
    def closed_by_peer(client):
        try:
            while client.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True

    def test_stop_runs_what_was_posted(self):
        queue = self.queue(1)
        held, go = threading.Event(), threading.Event()
        queue.engine.post(lambda: (held.set(), go.wait(DEADLINE)))
        assert held.wait(DEADLINE)
        for number in range(300):
            assert queue.engine.post(self.record.add, "event", None, number)
        stopper = threading.Thread(target=queue.engine.stop)
        stopper.start()
        go.set()
        stopper.join(DEADLINE)
        assert not stopper.is_alive()
        assert [what for _, _, _, what in self.record.of("event")] == list(range(300))
        assert not queue.engine.post(self.record.add, "late")

    def test_an_event_that_was_taken_is_run_though_the_engine_is_stopping(self):
        # post answers True: it will be called. A thread posts until it hears False.
        for _ in range(20):
            queue = self.queue(2)
            ran, taken = [], []

            def hammer():
                while queue.engine.post(ran.append, 1):
                    taken.append(1)

            thread = threading.Thread(target=hammer)
            thread.start()
            self.record.wait(lambda: len(taken) > 50, "posts")
            queue.engine.stop()
            thread.join(DEADLINE)
            assert len(ran) == len(taken)

    def test_stop_on_a_thread_of_its_own_is_refused(self):
        queue = self.queue(2)
        box = []

        def wrong():
            try:
                queue.engine.stop()
            except RuntimeError as error:
                box.append(error)
            self.record.add("tried")

        queue.engine.post(wrong)
        self.record.wait_for("tried")
        assert len(box) == 1

    def test_stop_before_the_start_and_twice(self):
        for start in (False, True):
            queue = self.queue(2, start=start)
            engine = queue.engine
            engine.post(self.record.add, "event")
            engine.stop()
            engine.stop()
            assert not engine.post(self.record.add, "late")
            assert self.record.count("event") == 1 + start
        assert self.record.count("late") == 0

    def test_a_start_that_gets_too_few_threads_ends_those_it_got(self, monkeypatch):
        for few in (0, 2):
            queue = self.queue(4, start=False)
            communicator = self.communicator(queue=queue)
            listeners = [communicator.listen(0, thread=number) for number in range(4)]
            queue.post(self.record.add, "event %d" % few)
            start, started = threading.Thread.start, []

            def fail(thread):
                if thread.name.startswith("contract-"):
                    if len(started) == few:
                        raise RuntimeError("can't start new thread")
                    started.append(thread)
                start(thread)

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", fail)
                try:
                    queue.start()
                except RuntimeError as error:
                    assert str(error) == "can't start new thread"
                else:
                    raise AssertionError("it has started")
            assert len(started) == few and not any(thread.is_alive() for thread in started)
            assert queue.stop(DEADLINE)
            assert self.record.count("event %d" % few) == 1
            assert [listener.socket.fileno() for listener in listeners] == [-1] * 4

    def test_stop_closes_listeners_too(self):
        for accepting in (True, False):
            queue = self.queue()
            communicator = self.communicator(queue=queue)
            listener = leviathan.Listener(communicator, communicator, None, "")
            queue.engine.listen(listener, socket.AF_INET, ("127.0.0.1", 0), 5, None)
            listener.address = listener.socket.getsockname()
            if accepting:
                queue.engine.accept(listener)
                self.client(listener)
                self.record.wait_for("connect")
            queue.stop()
            assert listener.socket.fileno() == -1, "the port is still taken (accepting: %s)" % accepting

    def test_stop_while_connecting_and_accepting(self):
        for round_ in range(10):
            communicator, listener = self.serve(queue=self.queue(3))
            ours = self.communicator(queue=self.queue(2))
            for _ in range(10):
                ours.connect(*listener.address)
            if round_ % 2:
                communicator.queue.stop()
            ours.queue.stop()
            communicator.queue.stop()
            assert self.manager.statistics()["sessions"] == 0

    def test_a_communicator_that_closes_drains_its_sessions(self):
        communicator, listener = self.serve(high_water=1 << 24)
        clients = [self.client(listener) for _ in range(3)]
        self.record.wait_for("connect", 3)
        for session in communicator.sessions:
            session.write(b"x" * 1000000)
        communicator.close()
        for client in clients:
            assert len(self.read_to_end(client)) == 1000000
            client.close()
        self.record.wait_for("on_closed", 3)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def test_statistics(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        for _ in range(10):
            client.sendall(self.packed(b"x" * 96))
            self.read(client, 100)
        queue = session.communicator.queue
        queue.engine.post(self.record.add, "event")
        self.record.wait_for("event")
        self.on_thread(session, int)
        counts = queue.statistics()
        assert counts["bytes_received"] == counts["bytes_sent"] == 1000
        assert counts["threads"] == 1 and counts["sessions"] == 1
        assert counts["accepted"] == counts["connected"] == 1 and counts["closed"] == 0
        assert counts["sends"] == 10 and counts["events"] == 1
        assert counts["receives"] == 10
        client.close()
        self.record.wait_for("on_closed")
        counts = queue.statistics()
        assert counts["sessions"] == 0 and counts["closed"] == 1

    def test_who_is_told_of_a_sessions_end_finds_it_counted(self):
        counts = []
        _, session, client = self.pair(on_disconnect=lambda session, *why: counts.append(
            session.communicator.queue.statistics()))
        client.close()
        self.record.wait_for("on_closed")
        assert [(each["sessions"], each["closed"]) for each in counts] == [(0, 1)]

    def test_statistics_count_what_a_timer_sends(self):
        # On epoll such a reply leaves by the short way, which counts by the turn.
        _, session, client = self.pair(lambda session, packet: None)
        client.sendall(self.packed(b"no answer"))
        self.record.wait_for("packet")
        queue = session.communicator.queue
        for verb in (lambda: queue.call_later(0.01, session.send, b"later"),
                     lambda: queue.engine.run_on_owner(session, session.send, b"later")):
            before = queue.statistics()["bytes_sent"]
            verb()
            assert self.read(client, 9) == self.packed(b"later")
            self.record.wait(lambda before=before: queue.statistics()["bytes_sent"] == before + 9)

    def test_statistics_count_each_byte_of_large_packets(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        body = b"x" * 700000
        client.sendall(self.packed(body, body))
        self.read(client, 2 * 700004)
        client.close()
        self.record.wait_for("on_closed")
        counts = session.communicator.queue.statistics()
        assert counts["bytes_received"] == counts["bytes_sent"] == 2 * 700004

    def test_the_backlog_is_what_a_handler_has_queued(self):
        seen = []

        def handler(session, packet):
            session.write(b"")                  # what comes next is not the first answer, which may leave at once
            for _ in range(packet[0]):
                session.send(b"x" * 96)
            seen.append(session.backlog)
            session.write(b"y" * 50)
            seen.append(session.backlog)
            session.send(b"z" * 6)
            seen.append(session.backlog)

        for number in (1, 10):
            _, _, client = self.pair(handler)
            client.sendall(self.packed(bytes([number])))
            self.read(client, 100 * number + 60)
            assert seen == [100 * number, 100 * number + 50, 100 * number + 60]
            seen.clear()

    def test_replies_of_one_receive_leave_in_one_send(self):
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        go = self.hold(session)
        client.sendall(self.packed(*[b"p"] * 50))
        go.set()
        self.read(client, 250)
        self.on_thread(session, int)
        assert session.communicator.queue.statistics()["sends"] <= 2

    # -- descriptors --------------------------------------------------------------------------------------------------

    def test_a_descriptor_used_again_in_one_batch_does_not_reach_the_wrong_session(self):
        for _ in range(5):
            old, new = [], []

            def handler(session, packet, old=old):
                for other in old:
                    if other is not session:
                        other.abort()

            communicator, listener = self.serve(handler, framing=leviathan.Raw())
            clients = [self.client(listener) for _ in range(8)]
            self.record.wait(lambda: len(communicator.sessions) == 8 and
                             all(session.connected for session in communicator.sessions))
            old.extend(communicator.sessions)
            go = self.hold(old[0])
            for client in clients:
                client.sendall(b"old")
            new.extend(self.client(listener) for _ in range(8))
            for number, client in enumerate(new):
                client.sendall(b"new%d" % number)
            go.set()
            self.record.wait(lambda: sum(1 for what in self.record.packets() if what.startswith(b"new")) == 8)
            of_new = [session for _, session, _, what in self.record.of("packet") if what.startswith(b"new")]
            assert len(set(of_new)) == 8 and not set(of_new) & set(old)
            assert all(self.record.packets(session)[0].startswith(b"new") for session in of_new)
            communicator.queue.stop()
            self.record.entries = [entry for entry in self.record.entries if entry[0] != "packet"]

    def test_a_handle_that_outlives_its_connection_reaches_nobody(self):
        _, listener = self.serve()
        first = self.client(listener)
        self.record.wait_for("connect")
        stale = self.record.of("connect")[0][1]
        first.close()
        self.record.wait_for("on_closed")
        second = self.client(listener)
        self.record.wait_for("connect", 2)
        session = self.record.of("connect")[1][1]
        assert session.id == stale.id and session is not stale
        assert not stale.send(b"ghost") and not stale.abort() and not stale.close()
        stale.pause()
        stale.resume()
        stale.finish()
        session.send(b"real")
        assert self.read(second, 8) == self.packed(b"real")
        second.sendall(self.packed(b"x"))
        self.record.wait_for("packet")
