"""Limits: connections, descriptors, time, unsent bytes, memory (A2, B4; RULES: epoll 4, servers 1 to 3)."""
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import leviathan
from conftest import (DEADLINE, INBOX, PATIENT, Log, connect, echo, eventually, frame, only_pinned, read_exactly, read_frame,
                      read_to_end, silence)
from leviathan import Delimited, LengthPrefix, Reason, TextLength

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "leviathan"]


def peer_text(client):
    return "%s:%d" % client.getsockname()


def serves(client, packet=b"alive"):
    """One echo."""
    client.sendall(frame(packet))
    return read_frame(client) == packet


# -- connections ------------------------------------------------------------------------------------------------------

def limited_by(name, serve, harness):
    if name == "max_clients":
        return serve(max_clients=2, name="leviathan-limited")
    return serve(manager=harness.manager(max_sessions=2), name="leviathan-limited")


def test_a_client_that_came_not_to_be_leaves_its_room_to_the_next_listener(serve, harness):
    """One listener counts a client and then meets SESSION_MAX; another has met CLIENT_SESSION_MAX by that client."""
    server = serve(max_clients=1, manager=harness.manager(max_sessions=1), start=False)
    first, second = server.listener, server.communicator.listen(0)
    woken = []
    second.rearm = lambda: woken.append(second)
    take_slot = server.manager.take_slot

    def meanwhile(listener):
        assert server.communicator._take_slot(second) is None
        return take_slot(listener)

    held = take_slot(None)                          # of another Communicator
    server.manager.take_slot = meanwhile
    assert server.communicator._take_slot(first) is None
    assert woken == [second]
    server.manager.give_slot(held)


@pytest.mark.parametrize("limit", ["max_clients", "max_sessions"])
def test_at_the_connection_limit_accepting_pauses_and_resumes(serve, harness, caplog, limit):
    """CLIENT_SESSION_MAX and SESSION_MAX: who comes later waits in the kernel's queue and is served when one leaves."""
    server = limited_by(limit, serve, harness)
    clients = [server.client() for _ in range(6)]
    for client in clients:
        client.sendall(frame(b"x"))                 # those that wait have sent already
    for number in range(6):
        assert read_frame(clients[number]) == b"x"
        assert len(server.communicator.sessions) <= 2
        assert server.manager.statistics()["sessions"] <= 2
        clients[number].close()
    server.ended.wait(6)
    assert server.manager.statistics()["sessions_high"] == 2
    full = [line for line in lines_of(caplog) if "limit (2)" in line]
    assert len(full) == 1 and "leviathan-limited" in full[0] and "no longer accepting" in full[0]


def test_a_limit_that_is_still_met_later_is_told_again(serve, caplog, monkeypatch):
    """Once in REPORT_PAUSE, however many come and go meanwhile: one line for each of them would be a flood."""
    monkeypatch.setattr(leviathan, "REPORT_PAUSE", 0.0)
    server = serve(max_clients=1)
    for _ in range(3):
        first, second = server.client(), server.client()
        assert serves(first)
        first.close()
        assert serves(second)
        second.close()
    server.ended.wait(6)
    assert len(lines_of(caplog)) >= 3


def test_the_limit_is_logged_once_while_it_stands(serve, caplog):
    server = serve(max_clients=1)
    first = server.client()
    others = [server.client() for _ in range(10)]
    assert serves(first)
    assert serves(first)
    eventually(lambda: lines_of(caplog))
    assert len(lines_of(caplog)) == 1
    assert others


class Telling(logging.Handler):
    """A log handler that uses leviathan, to send lines to somebody for example: no lock may be held when it is called."""

    def __init__(self, function):
        super().__init__()
        self.function, self.told = function, Log()

    def emit(self, record):
        self.function()
        self.told.add(record.getMessage())

    def __enter__(self):
        logging.getLogger("leviathan").addHandler(self)
        return self

    def __exit__(self, *unused):
        logging.getLogger("leviathan").removeHandler(self)


def test_a_log_handler_may_look_at_the_connections_when_it_is_told_of_the_limit(serve):
    server = serve(max_clients=1)
    with Telling(lambda: list(server.communicator.sessions)) as handler:
        first, second = server.client(), server.client()
        assert "limit" in handler.told.wait()[0]
        assert serves(first)
        first.close()
        assert serves(second)


def test_two_communicators_share_one_session_limit(serve, harness):
    """A4: the SessionManager is shared; a slot that one gives back is used by the other."""
    manager = harness.manager(max_sessions=1)
    first, second = serve(manager=manager), serve(manager=manager)
    one = first.client()
    assert serves(one)
    two = second.client()
    two.sendall(frame(b"waits"))
    assert len(second.connected) == 0
    one.close()
    assert read_frame(two) == b"waits"


def test_a_listener_closed_while_it_waits_for_room(serve, harness):
    server = serve(max_clients=1)
    first = server.client()
    assert serves(first)
    waiting = server.client()
    server.listener.close()
    first.close()
    server.ended.wait()
    assert read_to_end(waiting) == b""
    assert len(server.connected) == 1


def test_an_outgoing_connection_without_a_free_session_fails_with_pool_exhausted(serve, harness):
    target = serve()
    server = serve(manager=harness.manager(max_sessions=1))
    client = server.client()
    assert serves(client)
    failures = Log()
    server.communicator.connect(*target.address, on_failure=lambda connector, error: failures.add(error))
    assert isinstance(failures.wait()[0], leviathan.PoolExhausted)
    assert serves(client)


EMFILE = """
import logging, resource, socket, struct, sys, threading
sys.path[:0] = [%r, %r]
import leviathan
from conftest import Log, connect, frame, read_frame, eventually
lines = Log()
class Handler(logging.Handler):
    def emit(self, record):
        lines.add(record.getMessage())
logging.getLogger("leviathan").addHandler(Handler())
server = leviathan.Communicator(leviathan.LengthPrefix(4), leviathan.echo)
listener = server.listen(0)
members = leviathan.CommunicatorList(server)
members.start()
def check(client):
    client.sendall(frame(b"alive"))
    assert read_frame(client) == b"alive"
first = connect(listener)
check(first)
pending = [socket.socket() for _ in range(5)]
fillers = []
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (pending[-1].fileno() + 8, hard))
try:
    while True:
        fillers.append(socket.socket())
except OSError:
    pass
for client in pending:
    client.settimeout(10)
    client.connect(listener.address)
    client.sendall(frame(b"waits"))
lines.wait()
for _ in range(50):
    check(first)
threading.Event().wait(0.35)                # the pause is tried again twice: still one line
check(first)
assert len(lines) == 1, lines.items
assert "cannot accept" in lines.items[0], lines.items
used = members[0].queue.statistics()["turns"]
assert used < 300, "it spins: %%d turns" %% used
for filler in fillers:
    filler.close()
for client in pending:
    assert read_frame(client) == b"waits"
    check(client)
assert len(lines) == 1, lines.items
for client in pending + [first]:
    client.close()
assert members.stop()
assert leviathan.default_manager().statistics()["sessions"] == 0
print("fine")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_NOFILE")
def test_out_of_descriptors_it_goes_on_serving_and_accepts_later():
    """RULES, epoll 4: EMFILE is logged once, accepting pauses 0.1 s and longer, no spinning."""
    done = subprocess.run([sys.executable, "-c", EMFILE % (HERE, os.path.join(HERE, "tests"))], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=30)
    assert (done.stdout, done.returncode) == (b"fine\n", 0), done.stderr.decode()


QUIET_EMFILE = """
import sys
sys.path.insert(0, %r)
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
import leviathan
server = leviathan.Communicator(leviathan.LengthPrefix(4), leviathan.echo)
port = server.listen(0).address[1]
leviathan.run(server, on_ready=lambda: print(port, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_NOFILE")
def test_out_of_descriptors_a_program_that_never_logged_goes_on_too():
    """The line that says so is its first one, and a module that is imported only then cannot be opened."""
    with subprocess.Popen([sys.executable, "-c", QUIET_EMFILE % HERE], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as server:
        try:
            address = "127.0.0.1", int(server.stdout.readline())
            clients = [connect(address) for _ in range(30)]
            assert serves(clients[0])
            for client in clients[1:]:
                client.close()
            assert serves(clients[0])
            with connect(address) as late:
                assert serves(late)
            clients[0].close()
            server.terminate()
            assert server.wait(DEADLINE) == 0 and server.stderr.read() == b""
        finally:
            server.kill()


# -- time -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("framing, head, drip", [
    (LengthPrefix(4), b"\0\0\1\0", b"x"), (LengthPrefix(4), b"\0", b""), (TextLength(), b"200000,", b"x"),
    (Delimited(b"\n"), b"GET", b"x"), (LengthPrefix(4), struct.pack(">I", 1 << 20), b"x"),
], ids=["body", "inside of the header", "text", "line", "large"])
def test_a_slow_sender_is_ended_though_bytes_trickle(serve, framing, head, drip):
    """RULES, servers 2: a packet's deadline runs from its first byte; the idle timer would never fire."""
    server = serve(framing, packet_timeout=0.15, idle_timeout=30)
    client, session = server.pair()
    client.sendall(head)
    began = time.monotonic()
    client.settimeout(0.01)
    ended = False
    while not ended and time.monotonic() - began < DEADLINE:
        try:
            client.sendall(drip)
            ended = not client.recv(100)
        except socket.timeout:
            pass
        except OSError:
            ended = True
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.TIMEOUT
    assert isinstance(error, TimeoutError) and "packet" in str(error)
    assert 0.14 < time.monotonic() - began < 5.0


@only_pinned
def test_what_came_while_a_thread_was_busy_is_received_before_its_session_is_late(serve):
    """It is the thread that is late, held up by another session's handler; another thread looks for who is."""
    inside, release = Log(), threading.Event()

    def on_packet(session, packet):
        if packet == b"hold":
            inside.add(session)
            release.wait(DEADLINE)
        session.send(packet)

    server = serve(on_packet=on_packet, listen=False, threads=2, **PATIENT)
    server.listener = server.communicator.listen(0, thread=0, client_thread=0)
    (slow, session), (other, _) = server.pair(), server.pair()
    slow.sendall(frame(b"whole")[:5])
    eventually(lambda: session.since)
    other.sendall(frame(b"hold"))
    inside.wait()
    slow.sendall(frame(b"whole")[5:])
    session.since -= 2000                   # its thread is held
    server.communicator._sweep()
    release.set()
    assert read_frame(slow) == b"whole"
    assert serves(slow, b"again")
    assert len(server.ended) == 0


def test_a_deadline_that_is_taken_away_meanwhile_is_not_over(serve):
    """A session's own thread sets `since` to 0 when its packet is whole, also between two looks of the sweep."""
    class Flickering:
        last, paused, partial = time.monotonic(), 0, None
        times = [time.monotonic() - 1000.0, 0.0]
        since = property(lambda self: self.times.pop(0))

    server = serve(packet_timeout=500)
    assert server.communicator._late(Flickering(), time.monotonic()) is not None         # as of its first look it is
    Flickering.times = [0.0, time.monotonic() - 1000.0]
    assert server.communicator._late(Flickering(), time.monotonic()) is None


def test_a_session_is_not_idle_by_what_came_before_it_in_its_threads_turn(serve):
    begun, release = Log(), threading.Event()

    def on_connect(session):
        begun.add(session)
        release.wait(DEADLINE)

    server = serve(on_connect=on_connect, start=False)
    clients = [server.client() for _ in range(2)]
    server.list.start()
    begun.wait(1)
    released = time.monotonic()
    release.set()
    begun.wait(2)
    assert server.connected.items[1].last >= released
    assert all(map(serves, clients))


def test_who_sends_no_more_is_not_idle_while_he_is_answered(serve):
    """With on_eof a session stays open until the program closes it; nothing can be received any more."""
    ended = Log()
    server = serve(on_eof=ended.add, **PATIENT)
    client, session = server.pair()
    client.shutdown(socket.SHUT_WR)
    ended.wait()
    silence(server, session)
    assert session.send(b"still here")
    assert read_frame(client) == b"still here"
    session.close()
    server.ended.wait()


def test_the_packet_deadline_begins_anew_with_each_packet(serve):
    """A peer that always has an incomplete packet but goes on from packet to packet is none of the slow ones."""
    server = serve(packet_timeout=0.3)
    client = server.client()
    client.sendall(b"\0\0\0")
    end = time.monotonic() + 0.9
    count = 0
    while time.monotonic() < end:
        client.sendall(b"\1x\0\0\0")                # the end of one and the beginning of the next
        assert read_frame(client) == b"x"
        count += 1
        threading.Event().wait(0.01)
    assert count > 10
    assert len(server.ended) == 0


def test_idle_timeout_ends_only_the_idle(serve):
    """A2: time out the idle ones."""
    server = serve(idle_timeout=0.4)
    idle, busy = server.client(), server.client()
    idle.settimeout(0.01)
    while True:
        assert serves(busy)
        try:
            if idle.recv(10) == b"":
                break
        except socket.timeout:
            pass
    assert len(server.communicator.sessions) >= 1
    assert serves(busy)
    assert server.ended.wait()[0][1] is Reason.TIMEOUT
    assert len(server.ended) == 1


def test_no_timeout_means_for_ever(serve):
    server = serve(idle_timeout=0, packet_timeout=0)
    assert server.queue.statistics()["timers"] == 0
    client = server.client()
    client.sendall(b"\0")
    eventually(lambda: server.manager.statistics()["leased"] == 1)
    assert len(server.ended) == 0


def test_an_outgoing_connection_idles_too(serve):
    server = serve()
    client = serve(listen=False, idle_timeout=0.1)
    client.communicator.connect(*server.address)
    assert client.ended.wait()[0][1] is Reason.TIMEOUT


# -- unsent bytes -----------------------------------------------------------------------------------------------------

def test_a_client_that_does_not_read_is_not_read_from_and_then_gets_everything(serve):
    """RULES, servers 1: above the high-water mark receiving pauses, below the low one it resumes; nothing is lost."""
    pressure = Log()
    server = serve(on_backpressure=lambda session, congested: pressure.add(congested))
    client, session = server.pair(SO_RCVBUF=1 << 16, SO_SNDBUF=1 << 16)
    packets = 1500
    size = 20000
    sender = threading.Thread(target=client.sendall, daemon=True,
                              args=(b"".join(frame(b"%08d" % number + b"x" * (size - 8)) for number in range(packets)),))
    sender.start()
    assert pressure.wait()[0] is True
    assert session.paused & leviathan.PAUSED_UNSENT or len(pressure) > 1
    other = server.client()
    for _ in range(20):
        assert serves(other)
        assert session.backlog < session.high_water + 1 + (1 << 18) + 2 * size     # SCRATCH
    for number in range(packets):
        assert read_frame(client)[:8] == b"%08d" % number
    sender.join(DEADLINE)
    eventually(lambda: pressure.items[-1] is False)
    assert pressure.items == [True, False] * (len(pressure) // 2)
    assert serves(client)
    assert len(server.ended) == 0


def test_marks_can_be_set(serve):
    pressure = Log()
    server = serve(high_water=1000, low_water=0, on_backpressure=lambda session, congested: pressure.add(congested))
    client, session = server.pair()
    session.send(b"x" * (6 << 20))
    assert pressure.wait() == [True]
    assert len(read_frame(client)) == 6 << 20
    assert pressure.wait(2) == [True, False]
    with pytest.raises(ValueError):
        serve(high_water=10, low_water=11)
    with pytest.raises(ValueError):
        serve(high_water=10, low_water=1, send_limit=9)


@pytest.mark.parametrize("where", ["foreign", "timer", "handler"])
def test_hard_limit_ends_with_overflow(serve, caplog, where):
    """RULES, servers 1: a peer that never reads costs a bounded amount; one line says so; others are unaffected."""
    limit = 1 << 20
    worst = [0]
    stopped = Log()

    def flood(session):
        for _ in range(10000):
            worst[0] = max(worst[0], session.backlog)
            if not session.send(b"x" * 10000):
                stopped.add("refused")
                break

    def on_packet(session, packet):
        if packet == b"flood":
            flood(session)
        else:
            session.send(packet)

    server = serve(on_packet=on_packet, send_limit=limit)
    client, session = server.pair()
    if where == "foreign":
        flood(session)
    elif where == "timer":
        server.queue.post(flood, session)
    else:
        client.sendall(frame(b"flood"))
    stopped.wait()
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.OVERFLOW
    assert session.send(b"one more") is False
    assert worst[0] <= limit + 10004
    assert serves(server.client())
    lines = [line for line in lines_of(caplog) if peer_text(client) in line]
    assert len(lines) == 1 and "does not read" in lines[0]


@pytest.mark.parametrize("framing", [LengthPrefix(4), leviathan.Resp("client")], ids=["stateless", "stateful"])
def test_a_log_handler_may_send_to_the_very_session_that_overflows(serve, framing):
    """It is told when nothing is locked and the session refuses: no deadlock, and no line about the line."""
    packet = [b"SET", b"key", b"x" * 10000] if isinstance(framing, leviathan.Resp) else b"x" * 10000
    server = serve(framing, send_limit=1 << 18)
    _, session = server.pair()

    def flood():
        while session.send(packet):
            pass

    with Telling(flood) as handler:
        server.queue.post(flood)
        server.ended.wait()
        assert len([line for line in handler.told.items if "does not read" in line]) == 1


def test_one_packet_over_the_hard_limit_is_let_through(serve):
    server = serve(send_limit=1 << 17)
    client, session = server.pair()
    assert session.send(b"x" * (4 << 20)) is True
    assert len(read_frame(client)) == 4 << 20
    server.queue.post(session.send, b"y" * (4 << 20))
    assert len(read_frame(client)) == 4 << 20
    assert len(server.ended) == 0


@pytest.mark.parametrize("foreign", [False, True])
def test_a_packet_of_any_size_is_let_through_behind_a_small_one(serve, foreign):
    """The peer takes all that it gets. What little is queued before a large packet does not make it one that does not read."""
    big = b"y" * (8 << 20)

    def answer(session):
        for packet in (b"small", big, b"small", big):
            session.send(packet)
            if packet is big:
                next_one.acquire(timeout=DEADLINE)

    def on_packet(session, packet):
        session.send(packet)
        session.send(big)

    next_one = threading.Semaphore(0)
    server = serve(on_packet=echo if foreign else on_packet, high_water=1 << 16, low_water=1 << 15, send_limit=1 << 18)
    client, session = server.pair()
    if foreign:
        thread = threading.Thread(target=answer, args=(session,), daemon=True)
        thread.start()
    else:
        client.sendall(frame(b"small") * 2)
    for number in range(2):
        assert read_frame(client) == b"small"
        assert read_frame(client) == big
        if foreign:
            eventually(lambda: not session.backlog)     # its thread may not know yet that all has left
            next_one.release()
    if foreign:
        thread.join(DEADLINE)
    assert len(server.ended) == 0


# -- memory -----------------------------------------------------------------------------------------------------------

def test_at_the_memory_limit_receiving_waits_and_nothing_is_dropped(serve, harness):
    """DESIGN 4: eight packets of 100 kB (a class of 128 kB) with 300 kB of pool: two at a time, all arrive."""
    server = serve(manager=harness.manager(memory_limit=300000))
    clients = [server.client() for _ in range(8)]
    packets = [os.urandom(100000) for _ in clients]
    got = Log()

    def receive(client, packet):
        got.add(read_frame(client) == packet)

    for client, packet in zip(clients, packets):
        threading.Thread(target=receive, args=(client, packet), daemon=True).start()
        client.sendall(frame(packet)[:5000])
    eventually(lambda: server.manager.statistics()["waiting"])
    assert server.manager.statistics()["memory"] <= 300000
    for client, packet in zip(clients, packets):
        threading.Thread(target=client.sendall, args=(frame(packet)[5000:],), daemon=True).start()
    assert got.wait(8) == [True] * 8
    assert len(server.ended) == 0
    classes = server.manager.statistics()["classes"]
    assert classes[1 << 17]["high"] <= 2


def test_a_session_that_waits_for_memory_can_end(serve, harness):
    server = serve(manager=harness.manager(memory_limit=(1 << 17) + INBOX))
    holder, waiter = server.client(), server.client()
    holder.sendall(frame(b"x" * 100000)[:50000])
    eventually(lambda: server.manager.statistics()["memory"])
    waiter.sendall(frame(b"y" * 100000)[:50000])
    eventually(lambda: server.manager.statistics()["waiting"])
    for session in server.communicator.sessions:
        if session.peer == waiter.getsockname():
            session.abort()
    server.ended.wait()
    assert server.manager.statistics()["waiting"] == 0          # while there is no memory still
    holder.sendall(frame(b"x" * 100000)[50000:])
    assert read_frame(holder) == b"x" * 100000


def test_who_waits_for_memory_does_not_try_for_every_buffer_that_comes_back(serve, harness):
    """If all that wait were told of each, their attempts would be the square of them: 2000 sessions, 2 s."""
    count = 60
    server = serve(manager=harness.manager(memory_limit=2 * 8192 + count * INBOX))
    clients = [server.client() for _ in range(count)]
    attempts, lease = [], server.manager.lease
    server.manager.lease = lambda size, *others: attempts.append(size) or lease(size, *others)
    packet = frame(b"x" * 8000)
    for client in clients:
        client.sendall(packet[:4000])
    eventually(lambda: server.manager.statistics()["waiting"] >= count - 2 - count * INBOX // 8192)
    for client in clients:
        client.sendall(packet[4000:])
    for client in clients:
        assert read_exactly(client, len(packet)) == packet
    assert sum(size > 8000 for size in attempts) < 5 * count


@pytest.mark.parametrize("ended", [False, True])
def test_who_has_no_use_for_the_memory_any_more_leaves_it_to_the_next(serve, harness, ended):
    server = serve(manager=harness.manager(memory_limit=(1 << 17) + 3 * INBOX))
    packet = frame(b"x" * 100000)
    holder, first = server.pair()
    waiters = [server.pair() for _ in range(2)]
    holder.sendall(packet[:50000])
    eventually(lambda: server.manager.statistics()["memory"] >= 1 << 17)
    for number, (client, _) in enumerate(waiters, 1):
        client.sendall(packet[:50000])
        eventually(lambda: server.manager.statistics()["waiting"] == number)
    session = waiters[0][1]
    if ended:
        session.communicator.queue.engine.run_on_owner(first, lambda: (first.abort(), session.abort()))
    else:
        session.pause()                     # it is woken, and stays as it is
        holder.sendall(packet[50000:])
        assert read_exactly(holder, len(packet)) == packet
    waiters[1][0].sendall(packet[50000:])
    assert read_exactly(waiters[1][0], len(packet)) == packet
    session.resume()
    if not ended:
        waiters[0][0].sendall(packet[50000:])
        assert read_exactly(waiters[0][0], len(packet)) == packet


@pytest.mark.parametrize("size", range(1, 9))
def test_a_length_that_comes_byte_by_byte_fits_the_smallest_buffer(serve, harness, size):
    """LengthPrefix reads the whole length from the RecvBuf, however many bytes of it have come."""
    server = serve(LengthPrefix(size), manager=harness.manager(recv_buffer=8))
    client = server.client()
    packet = (5).to_bytes(size, "big") + b"hello"
    for at, byte in enumerate(packet, 1):
        client.sendall(bytes([byte]))
        eventually(lambda: server.queue.statistics()["bytes_received"] == at)
    assert read_exactly(client, len(packet)) == packet


def test_a_length_that_is_cut_while_there_is_no_memory_is_kept(serve, harness):
    """What waits outside of the pool has room for the whole length too."""
    server = serve(LengthPrefix(8), manager=harness.manager(memory_limit=(1 << 17) + INBOX))
    packet = struct.pack(">Q", 100000) + b"x" * 100000
    holder, waiter = server.client(), server.client()
    holder.sendall(packet[:50000])
    eventually(lambda: server.manager.statistics()["classes"].get(1 << 17, {}).get("leased"))
    waiter.sendall(packet[:3])
    eventually(lambda: server.queue.statistics()["bytes_received"] == 50003)
    holder.sendall(packet[50000:])
    assert read_exactly(holder, len(packet)) == packet
    holder.close()                          # on Windows even an idle session holds a buffer
    waiter.sendall(packet[3:])
    assert read_exactly(waiter, len(packet)) == packet


@pytest.fixture
def stuck(serve, harness):
    """Function: six clients whose lines are so long that none of them could go on if it had all that is left of the memory."""
    def make(**options):
        server = serve(Delimited(b"\n", max_packet=1 << 18), manager=harness.manager(memory_limit=1 << 18), **options)
        clients = [server.client() for _ in range(6)]
        for size in (5000, 60000, 60000):
            for client in clients:
                client.sendall(b"x" * size)
            if size == 5000:
                eventually(lambda: server.queue.statistics()["bytes_received"] == 6 * 5000)
        eventually(lambda: server.manager.statistics()["waiting"] >= 4)
        return server, clients
    return make


def test_packets_that_cannot_grow_are_counted_and_end_in_time(stuck):
    """Each holds its RecvBuf while it waits for a larger one, and one of them has its own beyond the limit."""
    server, _ = stuck(packet_timeout=0.5)
    assert sum(session.partial.size for session in server.communicator.sessions if session.partial) <= 2 << 18
    server.ended.wait(6)
    assert {reason for _, reason, _ in server.ended.items} == {Reason.TIMEOUT}
    assert serves_lines(server.client())


def test_packets_that_only_wait_for_each_other_go_on(stuck):
    """One at a time gets its buffer beyond the limit; else all would wait for packet_timeout, and then end."""
    server, clients = stuck()
    lines = Log()

    def finish(client):
        client.sendall(b"x" * 60000 + b"\n")
        lines.add(len(read_exactly(client, 185001)))

    for client in clients:
        threading.Thread(target=finish, args=(client,), daemon=True).start()
    lines.wait(6)
    assert len(server.ended) == 0
    classes = server.manager.statistics()["classes"]
    assert classes[1 << 18]["high"] <= 2, "one by the limit, one beyond it"


def hold(server, clients, sent):
    """Have each of the sessions hold a RecvBuf of 32 KiB with a packet of 20000 bytes, which is not complete yet."""
    for number, client in enumerate(clients, 1):
        client.sendall(sent[:10000])
        eventually(lambda: server.manager.statistics()["memory"] == (number << 15) + (len(clients) - number) * INBOX)


def test_what_is_lent_beyond_the_limit_goes_back_when_its_packet_is_complete(serve, harness):
    """Though the next one has begun in it: who sends for ever, or stops sending, must not keep it from the others."""
    server = serve(manager=harness.manager(memory_limit=1 << 17))
    first, second = os.urandom(20000), os.urandom(40000)
    sent = frame(first) + frame(second)
    clients = [server.client() for _ in range(4)]
    hold(server, clients, sent)
    for number, client in enumerate(clients):
        client.sendall(sent[10000:1 << 15])         # to the end of its RecvBuf; the next packet wants twice as much
        assert read_frame(client) == first
        eventually(lambda: server.manager.statistics()["waiting"] == number)
        eventually(lambda: server.manager.statistics()["memory"] == 5 << 15)
    clients[0].sendall(sent[1 << 15:] + frame(second)[:20000])
    assert read_frame(clients[0]) == second
    for client in clients[1:]:
        client.sendall(sent[1 << 15:])
        assert read_frame(client) == second
    clients[0].sendall(frame(second)[20000:])
    assert read_frame(clients[0]) == second
    assert len(server.ended) == 0


@pytest.mark.parametrize("paused", [False, True])
def test_one_at_a_time_gets_memory_beyond_the_limit(serve, harness, paused):
    """In the order in which they have begun to wait; who is paused leaves it to the next."""
    server = serve(manager=harness.manager(memory_limit=1 << 17))
    first, second = os.urandom(20000), os.urandom(80000)
    sent = frame(first) + frame(second)
    pairs = [server.pair() for _ in range(4)]
    clients = [client for client, _ in pairs]
    hold(server, clients, sent)
    for number, client in enumerate(clients):
        client.sendall(sent[10000:1 << 15])
        assert read_frame(client) == first
        eventually(lambda: server.manager.statistics()["waiting"] == number)
        eventually(lambda: server.manager.statistics()["memory"] == (3 << 15) + (1 << 17))
    session = pairs[1][1]
    if paused:
        session.pause()
        eventually(lambda: session.paused == leviathan.PAUSED_MEMORY | leviathan.PAUSED_USER)
    for client in (clients[0], clients[2], clients[3]) if paused else clients:
        client.sendall(sent[1 << 15:])
        assert read_frame(client) == second
    if paused:
        session.resume()
        clients[1].sendall(sent[1 << 15:])
        assert read_frame(clients[1]) == second
    assert len(server.ended) == 0


def test_one_receive_of_a_packet_of_unknown_length_is_bounded(serve):
    """What a framing has to look at comes in pieces, however large the RecvBuf has become: others wait meanwhile."""
    pieces = []

    class Watched(Delimited):
        def parse(self, buffer, start, end, seen=0):
            pieces.append(end - start - seen)
            return super().parse(buffer, start, end, seen)

    server = serve(Watched(b"\n", max_packet=1 << 23), lambda session, packet: session.send(b"%d" % len(packet)))
    client = server.client()
    client.sendall(b"x" * (6 << 20) + b"\n")
    assert read_exactly(client, 8) == b"6291456\n"
    assert max(pieces) <= leviathan.RECEIVE_MAX


def serves_lines(client):
    client.sendall(b"alive\n")
    return read_exactly(client, 6) == b"alive\n"


def test_a_packet_of_unknown_length_may_fill_all_memory(serve, harness):
    """Its buffer is made twice as large as what is there, but never larger than there is memory."""
    server = serve(Delimited(b"\n", max_packet=1 << 20), manager=harness.manager(memory_limit=(1 << 17) + 1000))
    client = server.client()
    line = b"x" * 130000
    client.sendall(line)
    client.sendall(b"\n")
    assert read_exactly(client, len(line) + 1) == line + b"\n"


def test_packets_that_wait_for_the_end_of_a_pause_may_be_more_than_all_memory(serve, harness):
    """What one receive has brought is there, and each of its packets is small: nothing has to be waited for."""
    got = Log()

    def on_packet(session, packet):
        got.add(packet)
        if len(got) == 1:
            session.pause()

    server = serve(on_packet=on_packet, manager=harness.manager(memory_limit=1 << 13), start=False)
    client = server.client()
    packets = [b"%60d" % number for number in range(2000)]
    client.sendall(b"".join(map(frame, packets)))
    server.list.start()
    got.wait(1)
    server.connected.wait()[0].resume()
    assert got.wait(2000) == packets
    assert len(server.ended) == 0


def test_a_packet_larger_than_all_memory_ends_with_pool_exhausted(serve, harness, caplog):
    """Waiting cannot help: ERROR, and the others go on."""
    server = serve(manager=harness.manager(memory_limit=1 << 16))
    good, bad = server.client(), server.client()
    bad.sendall(struct.pack(">I", 1 << 20) + b"x")
    assert read_to_end(bad) == b""
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.ERROR
    assert isinstance(error, leviathan.PoolExhausted)
    assert serves(good)
    assert server.manager.statistics()["sessions"] == 1
    assert len([line for line in lines_of(caplog) if peer_text(bad) in line]) == 1


class Says(leviathan.Framing):
    """A framing whose author did not think of what a peer may send: packets begin with their length as text."""

    def parse(self, buffer, start, end, seen=0):
        head = buffer[start:end].partition(b",")[0]
        return int(head) if head.lstrip(b"-").isdigit() and head != buffer[start:end] else 0


@pytest.mark.parametrize("framing, data", [
    (LengthPrefix(4), b"\xff\xff\xff\xff" + b"x" * 100), (LengthPrefix(8), b"\x7f" + b"\xff" * 7),
    (TextLength(), b"9999999999,x"), (LengthPrefix(2, adjust=-2), b"\0\1"),
    (lambda view: -5, b"x"), (lambda view: 1 << 40, b"x"), (Says(), b"-5,"), (Says(), b"1099511627776,"),
], ids=["4 GiB", "8 EiB", "text", "impossible", "negative", "function 1 TiB", "class negative", "class 1 TiB"])
def test_a_bad_length_allocates_nothing(serve, framing, data):
    """DESIGN 4: a length is checked before any buffer is taken."""
    server = serve(framing)
    client = server.client()
    client.sendall(data)
    assert read_to_end(client) == b""
    assert server.ended.wait()[0][1] is Reason.PROTOCOL
    assert list(server.manager.statistics()["classes"]) == ([INBOX] if INBOX else [])


def test_a_framing_that_never_knows_a_length_costs_no_more_than_max_packet(serve):
    """A peer that never ends its packet is refused, though the framing itself never says no."""
    server = serve(Says())
    good, bad = server.client(), server.client()
    with pytest.raises(OSError):
        for _ in range(64):
            bad.sendall(b"x" * (1 << 20))
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.PROTOCOL and "max_packet" in str(error)
    assert max(server.manager.statistics()["classes"]) <= 2 * leviathan.MAX_PACKET
    good.sendall(b"7,alive")
    assert read_exactly(good, 7) == b"7,alive"


def test_a_bad_length_behind_a_packet_that_pauses_allocates_nothing_for_it(serve):
    """What is left of a receive then waits for `resume` in a buffer of its own size, not of the one that it asks for."""
    server = serve(Says(), on_packet=lambda session, packet: session.pause())
    server.client().sendall(b"3,x536870912,")
    assert server.ended.wait()[0][1] is Reason.PROTOCOL
    assert max(server.manager.statistics()["classes"], default=0) <= INBOX


def test_a_bad_length_that_comes_in_pieces_allocates_only_the_first_buffer(serve, harness):
    server = serve()
    client = server.client()
    client.sendall(b"\xff\xff")
    eventually(lambda: server.manager.statistics()["leased"])
    client.sendall(b"\xff\xff")
    assert read_to_end(client) == b""
    server.ended.wait()
    assert list(server.manager.statistics()["classes"]) == [leviathan.RECV_BUFFER]


def test_a_broken_protocol_is_one_log_line_with_peer_and_cause(serve, caplog):
    server = serve(TextLength(), on_packet=lambda session, packet: session.send(packet))
    others = [server.client() for _ in range(3)]
    bad = server.client()
    bad.sendall(b"2,ok1_0,helloworld" + b"more, and more, and more" * 100)
    assert read_to_end(bad) == b"2,ok"
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.PROTOCOL
    line, = lines_of(caplog)
    assert peer_text(bad) in line and "1_0" in line and "clos" in line
    for other in others:
        other.sendall(b"5,hello")
        assert read_exactly(other, 7) == b"5,hello"
    assert len(server.ended) == 1


def test_many_bad_peers_leave_nothing_behind(serve):
    server = serve(threads=2)
    good = server.client()
    for number in range(40):
        bad = server.client()
        bad.sendall(frame(b"fine")[:number % 9] + b"\xff" * 8)
        bad.shutdown(socket.SHUT_WR)
        read_to_end(bad)
        bad.close()
    server.ended.wait(40)
    assert serves(good)
    eventually(lambda: server.manager.statistics()["sessions"] == 1)
    eventually(lambda: server.manager.statistics()["memory"] == INBOX)


# -- the pool itself --------------------------------------------------------------------------------------------------

def test_buffers_by_class_are_used_again(harness):
    """B4: powers of two from 4 bytes to 2 MiB; the larger ones are not kept."""
    manager = harness.manager(classes={4: 2, 4096: 1, 1 << 21: 1})
    assert {size: counts["made"] for size, counts in manager.statistics()["classes"].items()} == {
        4: 2, 4096: 1, 1 << 21: 1}
    first = manager.lease(4000)
    assert first.size == 4096
    manager.give_back(first)
    assert manager.lease(2049) is first
    second = manager.lease(4096)
    assert second is not first
    assert manager.statistics()["classes"][4096] == {"made": 2, "leased": 2, "high": 2, "free": 0}
    large = manager.lease((1 << 21) + 1)
    assert large.size == 1 << 22
    for buffer in (first, second, large):
        manager.give_back(buffer)
    assert manager.statistics()["classes"][1 << 22]["made"] == 0
    for size, expected in ((1, 4), (4, 4), (5, 8), (1 << 20, 1 << 20)):
        buffer = manager.lease(size)
        assert buffer.size == expected
        manager.give_back(buffer)


def test_a_buffer_given_back_twice_is_noticed(harness):
    manager = harness.manager()
    buffer = manager.lease(100)
    manager.give_back(buffer)
    with pytest.raises(leviathan.LeviathanError):
        manager.give_back(buffer)


def test_lease_at_and_over_the_limit(harness):
    manager = harness.manager(memory_limit=8192)
    first = manager.lease(8192)
    assert manager.lease(1) is None
    with pytest.raises(leviathan.PoolExhausted):
        manager.lease(8193)
    manager.give_back(first)


class Waiter:
    """A session as a SessionManager sees it, for which nothing is done when it is told that there is memory."""

    def __init__(self):
        self.communicator = self.queue = self.engine = self

    def run_on_owner(self, session, function, *args):
        return True


def test_what_was_lent_and_fits_the_limit_by_now_leaves_the_loan_to_others(harness):
    manager = harness.manager(memory_limit=1 << 15)
    first, second = Waiter(), Waiter()
    leased = [manager.lease(1 << power) for power in (14, 13, 12, 12)]
    assert manager.lease(1 << 13, leased[2], first) is None
    manager.wait_for_memory(first, 1 << 13, leased[2])
    lent = manager.lease(1 << 13, leased[2], first)
    assert manager.statistics()["memory"] == (1 << 15) + (1 << 13)
    for buffer in (leased[2], leased[0]):
        manager.give_back(buffer)
    larger = manager.lease(1 << 14, lent, first)            # of the limit
    manager.give_back(lent)
    assert manager.lease(1 << 14, leased[3], second) is None
    manager.wait_for_memory(second, 1 << 14, leased[3])
    lent = manager.lease(1 << 14, leased[3], second)
    assert lent is not None
    for buffer in (leased[1], leased[3], larger, lent):
        manager.give_back(buffer)
    assert manager.statistics()["memory"] == 0


class Growing(Waiter):
    """One that needs a larger buffer twice within one attempt; its mail is run by the test."""

    def __init__(self, manager, held, *sizes):
        super().__init__()
        self.manager, self.held, self.sizes, self.mail = manager, held, list(sizes), []

    def run_on_owner(self, session, function, *args):
        self.mail.append((function, args))
        return True

    def _resume_for(self, bit):
        self.mail.append((self.attempt, ()))

    def attempt(self):
        while self.sizes:
            larger = self.manager.lease(self.sizes[0], self.held, self)
            if larger is None:
                self.manager.wait_for_memory(self, self.sizes[0], self.held)
                return
            self.manager.give_back(self.held)
            self.held = larger
            del self.sizes[0]


def test_who_takes_memory_and_waits_for_more_at_once_keeps_what_it_is_promised_then(harness):
    """Else each attempt's end took away what the next was promised: its thread was busy with it until packet_timeout."""
    manager = harness.manager(memory_limit=1 << 15)
    other = Waiter()
    leased = [manager.lease(1 << power) for power in (14, 13, 12)]
    session = Growing(manager, manager.lease(1 << 12), 1 << 13, 1 << 14)
    assert manager.lease(1 << 13, leased[2], other) is None
    manager.wait_for_memory(other, 1 << 13, leased[2])      # the loan is his
    session.attempt()
    assert not session.mail
    manager.give_back(leased.pop(1))                        # of which the session is promised what it waits for
    leased.append(manager.lease(1 << 13, leased[1], other))
    manager.give_back(leased.pop(1))
    for _ in range(20):
        if session.mail:
            function, args = session.mail.pop(0)
            function(*args)
    assert not session.sizes and not session.mail
    for buffer in leased + [session.held]:
        manager.give_back(buffer)
    assert manager.statistics()["memory"] == 0


def test_buffers_of_all_classes_together_stay_within_the_limit(harness):
    """Also those that nobody uses now: else who has many of each size made, one size after the other, gets 20 limits."""
    limit = 1 << 20
    manager = harness.manager(memory_limit=limit, classes={512: 8})
    for power in list(range(12, 21)) + [12]:
        leased = [manager.lease(1 << power) for _ in range(limit >> power)]
        assert None not in leased and manager.lease(1) is None
        for buffer in leased:
            manager.give_back(buffer)
        counts = manager.statistics()
        made = {size: row["made"] for size, row in counts["classes"].items() if row["made"]}
        assert made == {1 << power: limit >> power}
        assert (counts["memory"], counts["kept"]) == (0, limit)
    first = manager.lease(1 << 19)
    assert manager.statistics()["kept"] == limit - (1 << 19)
    assert manager.statistics()["classes"][1 << 12]["free"] == 128, "no more is given up than must be"
    manager.give_back(first)


@pytest.mark.parametrize("settings", [
    {"memory_limit": 4095}, {"memory_limit": 1 << 20, "classes": {1 << 19: 3}},
    {"max_sessions": 0}, {"recv_buffer": 7}, {"recv_buffer": 1 << 22}, {"classes": {5: 1}}, {"classes": {1 << 22: 1}},
    {"classes": {2: 1}}, {"send_operations": 0}], ids=str)
def test_senseless_pool_settings_raise_value_error(settings):
    with pytest.raises(ValueError):
        leviathan.SessionManager(**settings)
