"""Many threads at once on one and on three event threads (A7, I3, I4, E2): nothing lost or twice, all in order."""
import random
import socket
import struct
import sys
import threading

import pytest

import leviathan
from conftest import DEADLINE, Log, eventually, frame, read_exactly, read_frame, read_to_end
from leviathan import Raw, Reason

SENDERS = 6
EACH = 300

threads_of_the_queue = pytest.mark.parametrize("threads", [1, 3])


@pytest.fixture(autouse=True)
def switch_often():
    """Threads change places a hundred times as often as usual, so that races show."""
    before = sys.getswitchinterval() if hasattr(sys, "getswitchinterval") else None
    if before is not None:
        sys.setswitchinterval(5e-5)
    yield
    if before is not None:
        sys.setswitchinterval(before)


class Crowd:
    """Threads that begin at the same moment; what any of them raises fails the test."""

    def __init__(self):
        self.functions, self.problems = [], []
        self.threads = []

    def add(self, function, *args):
        self.functions.append((function, args))

    def start(self):
        gate = threading.Barrier(len(self.functions))

        def begin(function, args):
            try:
                gate.wait(DEADLINE)
                function(*args)
            except BaseException as error:
                self.problems.append(error)

        self.threads = [threading.Thread(target=begin, args=entry, daemon=True) for entry in self.functions]
        for thread in self.threads:
            thread.start()
        return self

    def join(self):
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a thread hangs"
        if self.problems:
            raise self.problems[0]


def packet_of(sender, number):
    """Says who sent it as the how-manieth; sizes from 8 bytes to more than a SendBuf."""
    size = (0, 5, 300, 5000, 20000)[(sender * 7 + number) % 5] if number % 50 else 70000
    return struct.pack(">II", sender, number) + bytes([number % 251]) * size


def check_streams(packets, senders, each):
    """Every sender's packets are there, whole and in its order."""
    following = [0] * senders
    for packet in packets:
        sender, number = struct.unpack(">II", packet[:8])
        assert number == following[sender]
        assert packet == packet_of(sender, number)
        following[sender] += 1
    assert following == [each] * senders


@threads_of_the_queue
def test_sends_of_many_threads_to_one_session(serve, threads):
    """A7, I4: in order per sender, none lost, each on_sent once; replies of the handler go in between."""
    calls = [0] * (SENDERS * EACH)
    answers = Log()

    def on_sent(session, ok, index):
        calls[index] += 1
        assert ok

    server = serve(threads=threads, send_limit=1 << 28, high_water=1 << 28)
    client, session = server.pair()

    def send(sender):
        for number in range(EACH):
            index = sender * EACH + number
            callback = None if number % 3 else lambda session, ok, index=index: on_sent(session, ok, index)
            if not session.send(packet_of(sender, number), on_sent=callback):
                answers.add((sender, number))

    def chat():
        for number in range(EACH):
            client.sendall(frame(packet_of(SENDERS, number)))

    crowd = Crowd()
    for sender in range(SENDERS):
        crowd.add(send, sender)
    crowd.add(chat)
    crowd.start()
    packets = [read_frame(client) for _ in range((SENDERS + 1) * EACH)]
    crowd.join()
    check_streams(packets, SENDERS + 1, EACH)
    assert answers.items == []
    expected = [0 if number % 3 else 1 for _ in range(SENDERS) for number in range(EACH)]
    eventually(lambda: sum(calls) >= sum(expected))
    server.stop()
    assert calls == expected
    assert not [entry for entry in server.ended.items if entry[1] is not Reason.SHUTDOWN]


@threads_of_the_queue
def test_sends_from_event_threads_and_foreign_ones(serve, threads):
    """A post runs on any worker, also on one that does not own the session."""
    server = serve(threads=threads, send_limit=1 << 28, high_water=1 << 28)
    client, session = server.pair()
    chains = 3

    def chain(sender, number):
        if number < EACH:
            assert session.send(packet_of(sender, number))
            server.queue.post(chain, sender, number + 1)

    def send(sender):
        for number in range(EACH):
            assert session.send(packet_of(sender, number))

    crowd = Crowd()
    for sender in range(chains):
        crowd.add(server.queue.post, chain, sender, 0)
        crowd.add(send, chains + sender)
    crowd.start()
    check_streams([read_frame(client) for _ in range(2 * chains * EACH)], 2 * chains, EACH)
    crowd.join()


@threads_of_the_queue
def test_broadcasts_of_many_threads(serve, threads):
    """A7: each of the clients gets each thread's packets in order."""
    server = serve(threads=threads, send_limit=1 << 28, high_water=1 << 28)
    clients = [server.client() for _ in range(5)]
    server.connected.wait(5)
    senders, each = 4, 60
    crowd = Crowd()

    def broadcast(sender):
        for number in range(each):
            assert server.communicator.broadcast(packet_of(sender, number)) == len(clients)

    def read(client):
        check_streams([read_frame(client) for _ in range(senders * each)], senders, each)

    for sender in range(senders):
        crowd.add(broadcast, sender)
    for client in clients:
        crowd.add(read, client)
    crowd.start().join()


@threads_of_the_queue
def test_posts_of_many_threads_run_once_each(harness, threads):
    """On one event thread in each poster's order."""
    queue = harness.queue(threads)
    queue.start()
    ran = Log()
    crowd = Crowd()

    def post(sender):
        for number in range(1000):
            assert queue.post(ran.add, sender, number)

    for sender in range(SENDERS):
        crowd.add(post, sender)
    crowd.start()
    items = ran.wait(SENDERS * 1000)
    crowd.join()
    assert sorted(items) == [(sender, number) for sender in range(SENDERS) for number in range(1000)]
    if threads == 1:
        for sender in range(SENDERS):
            assert [number for of, number in items if of == sender] == list(range(1000))


@threads_of_the_queue
def test_timers_of_many_threads(harness, threads):
    """Set and cancelled from everywhere: each runs once, the cancelled ones never."""
    queue = harness.queue(threads)
    queue.start()
    ran = Log()
    crowd = Crowd()

    def schedule(sender):
        dice = random.Random(sender)
        for number in range(200):
            queue.call_later(dice.random() * 0.05, ran.add, sender, number)
            queue.call_later(5 + dice.random(), ran.add, "never").cancel()

    for sender in range(SENDERS):
        crowd.add(schedule, sender)
    crowd.start()
    assert sorted(ran.wait(SENDERS * 200)) == [(sender, number) for sender in range(SENDERS) for number in range(200)]
    crowd.join()
    assert queue.statistics()["timers"] == 0


@threads_of_the_queue
@pytest.mark.parametrize("end", ["close", "abort"])
def test_ends_of_many_threads_against_sends(serve, threads, end):
    """Each on_sent once after a True, none after a False, True before False, then on_disconnect, once."""
    rounds = 25
    server = serve(threads=threads, send_limit=1 << 28,
                   on_disconnect=lambda session, reason, error: session.data.add("disconnect"))
    for _ in range(rounds):
        client, session = server.pair()
        queued, called = Log(), Log()
        session.data = called
        crowd = Crowd()

        def send(sender, session=session, queued=queued, called=called):
            for number in range(100):
                key = (sender, number)
                if session.send(b"x" * 3000, on_sent=lambda session, ok, key=key: called.add(key, ok)):
                    queued.add(key)

        def finish(session=session):
            getattr(session, end)()

        def read(client=client):
            try:
                while client.recv(1 << 16):
                    pass
            except ConnectionError:
                pass
            client.close()

        for sender in range(3):
            crowd.add(send, sender)
        crowd.add(finish)
        crowd.add(finish)
        crowd.add(read)
        crowd.start().join()
        called.wait(len(queued) + 1)
        eventually(lambda: session not in server.communicator.sessions)
        assert called.items.pop() == "disconnect"
        assert sorted(key for key, _ in called.items) == sorted(queued.items)
        results = [ok for _, ok in called.items]
        assert results == sorted(results, reverse=True)
        if end == "close":
            assert all(results)
    server.ended.wait(rounds)
    assert len(server.ended) == rounds
    assert len({session for session, _, _ in server.ended.items}) == rounds
    assert {reason for _, reason, _ in server.ended.items} <= {Reason.NORMAL, Reason.ERROR}


@threads_of_the_queue
def test_connections_come_and_go_while_all_is_used(serve, threads):
    """Stale handles, broadcasts, closes and posts at once: no echo goes to the wrong client, no slot is lost."""
    server = serve(threads=threads, max_clients=8)
    done = threading.Event()
    lock = threading.Lock()

    def come_and_go(number):
        dice = random.Random(number)
        try:
            for turn in range(25):
                client = server.client()
                for packet in range(dice.randrange(1, 5)):
                    own = b"own %d %d %d" % (number, turn, packet)
                    client.sendall(frame(own))
                    while True:
                        got = read_frame(client)
                        if got != b"broadcast":
                            break
                    assert got == own
                client.close()
        finally:
            with lock:
                finished.append(number)
                if len(finished) == 6:
                    done.set()

    def annoy():
        while not done.is_set():
            for session, _, _ in server.ended.items[-20:]:
                assert session.send(b"stale") is False
                session.close()
                session.abort()
                session.resume()
            server.communicator.broadcast(b"broadcast")
            server.queue.post(len, ())
            done.wait(0.0005)

    finished = []
    crowd = Crowd()
    for number in range(6):
        crowd.add(come_and_go, number)
    for _ in range(2):
        crowd.add(annoy)
    crowd.start().join()
    server.ended.wait(150)
    assert len(server.ended) == len(server.connected) == 150
    eventually(lambda: server.manager.statistics()["sessions"] == 0)


@threads_of_the_queue
def test_pause_and_resume_of_many_threads_loses_nothing(serve, threads):
    """I3: packets of one session never at the same time, in order, whatever is asked meanwhile."""
    inside = []
    got = []
    done = threading.Event()
    total = 3000

    def on_packet(session, packet):
        assert not inside
        inside.append(1)
        got.append(packet)
        inside.pop()
        if len(got) == total:
            done.set()

    server = serve(on_packet=on_packet, threads=threads)
    client, session = server.pair()

    def toggle():
        while not done.is_set():
            session.pause()
            session.resume()
            done.wait(0.0002)

    def send():
        for number in range(total):
            client.sendall(frame(b"%d" % number))

    crowd = Crowd()
    crowd.add(send)
    crowd.add(toggle)
    crowd.add(toggle)
    crowd.start()
    assert done.wait(20)
    crowd.join()
    assert got == [b"%d" % number for number in range(total)]
    assert not server.ended.items


@threads_of_the_queue
def test_write_of_raw_bytes_is_never_torn(serve, threads):
    """A write is one piece of the stream, whichever threads write."""
    server = serve(Raw(), threads=threads, send_limit=1 << 28)
    client, session = server.pair()
    size, each = 3001, 200
    crowd = Crowd()

    def write(sender):
        for _ in range(each):
            assert session.write(bytes([sender]) * size)

    for sender in range(SENDERS):
        crowd.add(write, sender)
    crowd.start()
    counts = [0] * SENDERS
    rest = b""
    while sum(counts) < SENDERS * each:
        rest += client.recv(1 << 18)
        while len(rest) >= size:
            piece, rest = rest[:size], rest[size:]
            assert piece == piece[:1] * size
            counts[piece[0]] += 1
    crowd.join()
    assert counts == [each] * SENDERS


@threads_of_the_queue
def test_stop_while_everybody_sends_and_connects(serve, threads):
    """A stop in the middle of it ends, and sends answer False from then on."""
    for _ in range(3):
        server = serve(threads=threads)
        target = serve(threads=1)
        clients = [server.client() for _ in range(4)]
        sessions = server.connected.wait(4)
        stopped = threading.Event()
        queued, called = Log(), Log()
        crowd = Crowd()

        def send(session, queued=queued, called=called, stopped=stopped):
            while not stopped.is_set():
                if session.send(b"x" * 100, on_sent=lambda session, ok: called.add(ok)):
                    queued.add(1)
                else:
                    stopped.wait(0.001)

        def read(client):
            try:
                while client.recv(1 << 16):
                    pass
            except OSError:
                pass
            client.close()

        def dial(server=server, target=target, stopped=stopped):
            while not stopped.is_set():
                try:
                    server.communicator.connect(*target.address, reconnect=(0.001, 0.001))
                except RuntimeError:
                    return
                stopped.wait(0.002)

        def stop(server=server, stopped=stopped):
            server.queue.post(len, ())
            server.stop(5.0)
            stopped.set()

        for session, client in zip(sessions, clients):
            crowd.add(send, session)
            crowd.add(read, client)
        crowd.add(dial)
        crowd.add(stop)
        crowd.start().join()
        assert [session.send(b"late") for session in sessions] == [False] * 4
        assert len(called) == len(queued)
        assert not server.queue.post(len, ())
        target.stop()
        assert leviathan.Reason.SHUTDOWN in {reason for _, reason, _ in server.ended.items}
        assert len(server.connected) == len(server.ended)


@threads_of_the_queue
def test_a_later_send_of_the_owner_does_not_overtake_a_foreign_one(serve, threads):
    """A7: in order, whichever threads queued; here the foreign send has returned before the handler sends."""
    inside, sent = threading.Event(), threading.Event()

    def on_packet(session, packet):
        inside.set()
        assert sent.wait(DEADLINE)
        session.send(b"second")
        session.send(b"third", on_sent=lambda session, ok: None)

    server = serve(on_packet=on_packet, threads=threads)
    client, session = server.pair()
    client.sendall(frame(b"x"))
    assert inside.wait(DEADLINE)
    assert session.send(b"first")
    sent.set()
    assert [read_frame(client) for _ in range(3)] == [b"first", b"second", b"third"]


def pieces(rng, size):
    """Cut *size* bytes into pieces as networks do: single bytes, parts of a header, more than a read takes."""
    at = 0
    while at < size:
        step = rng.choice((1, 3, 4, 5, 500, 4096, 70000, 300000))
        yield at, min(size, at + step)
        at += step


@threads_of_the_queue
def test_clients_and_handlers_that_do_anything(serve, harness, threads):
    """Whatever is drawn, each client gets its own bytes back, all and in order, and each on_sent is called once."""
    helper = harness.queue(1)
    helper.start()
    asked, told = Log(), Log()

    def on_packet(session, packet):
        way = random.randrange(6)
        if way == 0:
            session.send(packet, on_sent=told.add)
            asked.add(session)
        elif way == 1:                      # in pieces, past the framing
            session.write(struct.pack(">I", len(packet)))
            session.write(packet)
        else:
            session.send(packet)
        if way == 2:
            session.pause()
            session.resume()
        elif way == 3:
            session.pause()
            helper.call_later(0.001, session.resume)
        elif way == 4:
            session.pause()
            server.queue.post(session.resume)

    # So little memory that receiving waits for some, too.
    server = serve(on_packet=on_packet, threads=threads, send_limit=1 << 26, on_eof=lambda session: session.close(),
                   manager=harness.manager(memory_limit=1 << 18))

    def visit(seed):
        rng = random.Random(seed)
        for _ in range(12):
            sizes = [rng.choice((0, 1, 64, 64, 64, 64, 4092, 16384, 65533, 100000))
                     for _ in range(rng.randint(1, 20))]
            sent = b"".join(frame(bytes([rng.randrange(256)]) * size) for size in sizes)
            client = harness.connect(server.listener)
            halves = rng.random() < 0.5

            def feed():
                for start, stop in pieces(rng, len(sent)):
                    client.sendall(sent[start:stop])
                if halves:                  # its end must not overtake what it is owed
                    client.shutdown(socket.SHUT_WR)

            feeder = Crowd()
            feeder.add(feed)
            feeder.start()
            try:
                assert read_exactly(client, len(sent)) == sent
            except (AssertionError, OSError) as error:      # how the server sees it: what ended early was ended by somebody
                peer = client.getsockname()
                raise AssertionError(halves, sizes, server.manager.statistics(),
                                     [ended for ended in server.ended.items if ended[0].peer == peer],
                                     [(session, session.filled, session.need, session.paused, session.backlog)
                                      for session in server.communicator.sessions]) from error
            feeder.join()
            assert not halves or read_to_end(client) == b""
            client.close()

    crowd = Crowd()
    for seed in range(6):
        crowd.add(visit, 10 * seed + threads)
    crowd.start().join()
    told.wait(len(asked))
    eventually(lambda: server.manager.statistics()["sessions"] == 0)
    assert all(ok for _, ok in told.items) and len(told) == len(asked)
