"""Sessions over real sockets: life, sending, outgoing connections, event queues, stopping (A1 to A8, I3, I6, E2)."""
import errno
import json
import os
import socket
import struct
import subprocess
import threading
import time

import pytest

import leviathan
from conftest import (DEADLINE, INBOX, STOPS, WINDOWS, WINE, Child, Log, eventually, frame, only_pinned, read_exactly,
                      read_frame, read_to_end)
from leviathan import Communicator, CommunicatorList, Delimited, FixedSize, Kind, LengthPrefix, Raw, Reason

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_IPV6 = not socket.has_ipv6


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


def reset(client):
    """Close with a reset instead of a FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def free_port():
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- packets ----------------------------------------------------------------------------------------------------------

def test_echo_of_packets_of_many_sizes(serve):
    """A1: one function says how long a packet is, the other is handed each."""
    client = serve().client()
    for size in (0, 1, 3, 4, 5, 4095, 4096, 16379, 16384, 65536, 300000, 2097148):
        packet = os.urandom(size)
        threading.Thread(target=client.sendall, args=(frame(packet),), daemon=True).start()
        assert read_frame(client) == packet


def test_echo_of_a_thousand_pipelined_packets_in_order(serve):
    client = serve().client()
    packets = [b"%d" % number for number in range(1000)]
    client.sendall(b"".join(map(frame, packets)))
    assert [read_frame(client) for _ in packets] == packets


def test_packets_that_come_byte_by_byte(serve):
    client = serve().client()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in frame(b"hello") + frame(b"") + frame(b"world"):
        client.sendall(bytes([byte]))
    assert [read_frame(client) for _ in range(3)] == [b"hello", b"", b"world"]


class Json(Delimited):
    """Lines that carry any value; *encode* takes what has no len(), too."""

    def split(self, buffer, start, end, seen=0):
        return leviathan.Framing.split(self, buffer, start, end, seen)

    def decode(self, buffer, start, stop):
        return json.loads(super().decode(buffer, start, stop).decode())

    def encode(self, packet):
        text = json.dumps(packet)
        return text + "\r\n" if packet == "forgotten" else super().encode(text.encode())


@pytest.mark.parametrize("where", ["handler", "other thread"])
def test_a_framing_of_ones_own_may_carry_any_object(serve, where):
    """A7: what is sent is the framing's to know; send asks no more of it."""
    server = serve(Json(), on_packet=lambda session, packet: session.send(packet))
    client, session = server.pair()
    for value in (b"7", b"null", b"1.5", b"[1, 2]", b'"text"', b"true"):
        if where == "handler":
            client.sendall(value + b"\r\n")
        else:
            assert session.send(json.loads(value.decode()))
        assert read_exactly(client, len(value) + 2) == value + b"\r\n"


def test_a_framing_that_encodes_to_no_bytes_is_told_where_it_sends(serve):
    """Who has forgotten .encode() gets the TypeError at his send, and the queue's other sessions notice nothing."""
    server = serve(Json(), on_packet=lambda session, packet: [session.send(packet) for _ in range(2)])
    good, bad = server.client(), server.client()
    bad.sendall(b'1\r\n"forgotten"\r\n')
    assert read_to_end(bad) == b"1\r\n1\r\n"
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.ERROR and isinstance(error, TypeError)
    with pytest.raises(TypeError):
        server.communicator.broadcast("forgotten")
    good.sendall(b"2\r\n")
    assert read_exactly(good, 6) == b"2\r\n2\r\n"
    session, = server.communicator.sessions
    with pytest.raises(TypeError):
        session.send("forgotten")


@pytest.mark.parametrize("framing, sent, got", [
    (Delimited(b"\n"), b"one\ntwo\n", b"one\ntwo\n"),
    (leviathan.TextLength(), b"5,hello2,hi", b"5,hello2,hi"),
    (FixedSize(3), b"abcdef", b"abcdef"),
    (Raw(), b"anything", b"anything"),
    (lambda view: view[0] if len(view) else 0, b"\3ab\1", b"\3ab\1"),
], ids=["lines", "text", "fixed", "raw", "function"])
def test_echo_with_each_framing(serve, framing, sent, got):
    """A1, H2, H4."""
    client = serve(framing).client()
    client.sendall(sent)
    assert read_exactly(client, len(got)) == got


def test_an_idle_session_holds_no_buffer(serve):
    """DESIGN 4: only an incomplete packet has a RecvBuf (B2); on a completion port the armed receive has the one."""
    server = serve()
    client = server.client()
    client.sendall(frame(b"x") + b"\0\0")
    assert read_frame(client) == b"x"
    eventually(lambda: server.manager.statistics()["leased"] == 1)
    client.sendall(b"\0\1y")
    assert read_frame(client) == b"y"
    eventually(lambda: server.manager.statistics()["memory"] == INBOX)
    assert server.manager.statistics()["sessions"] == 1


def test_big_packets_and_their_memory_comes_back(serve):
    """8 MiB with max_packet raised: over the largest kept class, so nothing of it stays (B2)."""
    server = serve(LengthPrefix(4, max_packet=16 << 20))
    client = server.client()
    packet = os.urandom(1 << 20) * 8
    for _ in range(2):
        sender = threading.Thread(target=client.sendall, args=(frame(packet),), daemon=True)
        sender.start()
        assert read_frame(client) == packet
        sender.join(DEADLINE)
    eventually(lambda: server.manager.statistics()["memory"] == INBOX)
    classes = server.manager.statistics()["classes"]
    assert classes[16 << 20]["high"] == 1
    assert classes[16 << 20]["made"] == classes[16 << 20]["free"] == 0


def test_write_goes_past_the_framing(serve):
    client, session = serve().pair()
    assert session.write(b"raw bytes") is True
    assert session.write(bytearray(b"!")) is True
    assert read_exactly(client, 10) == b"raw bytes!"


def test_send_takes_any_kind_of_bytes(serve):
    def on_packet(session, packet):
        for form in (bytes, bytearray, memoryview):
            session.send(form(packet))
            session.send(form(packet), on_sent=lambda session, ok: None)

    client = serve(on_packet=on_packet).client()
    for size in (5, 20000):
        client.sendall(frame(b"x" * size))
        assert [read_frame(client) for _ in range(6)] == [b"x" * size] * 6


@pytest.mark.parametrize("sizes", [
    [5], [5, 5], [5, 5, 5], [5, 5, 6], [5, 6, 6, 6], [6, 5, 6, 5], [0, 0, 0], [0, 1, 0, 0], [5, 5, 0, 0], [300, 300, 300],
    [5000, 5000, 5000], [5000, 5, 5], [5, 5, 5000, 5000], [20000, 20000, 5], [5, 5, 20000, 5, 5], [5] * 200,
    [5] * 63 + [6, 5, 5], [5] * 64 + [6, 6], [5] * 65 + [6] * 65 + [70000]])
@pytest.mark.parametrize("packets", [1, 3])
def test_replies_of_like_and_unlike_sizes_arrive_in_order(serve, sizes, packets):
    """Replies of one size are joined by their header, others are not; in any mixture each has its own."""
    replies = [bytes([65 + number % 26]) * size for number, size in enumerate(sizes)]

    def on_packet(session, packet):
        for reply in replies:
            assert session.send(reply) is True

    client = serve(on_packet=on_packet).client()
    for _ in range(2):
        client.sendall(frame(b"go") * packets)
        for _ in range(packets):
            assert [read_frame(client) for _ in replies] == replies


@pytest.mark.skipif(WINDOWS, reason="there all of a handler's packets are counted, and bounded by their bytes")
@pytest.mark.parametrize("sizes", [(5, 5), (5, 6)])
def test_the_first_of_many_replies_leave_before_the_handler_returns(serve, sizes):
    """What one handler queues is bounded by CORK_MAX packets."""
    go = threading.Event()

    def on_packet(session, packet):
        for number in range(leviathan.CORK_MAX + 4):
            session.send(b"x" * sizes[number % 2])
        assert go.wait(DEADLINE)

    client = serve(on_packet=on_packet).client()
    client.sendall(frame(b"go"))
    try:
        for number in range(leviathan.CORK_MAX):
            assert len(read_frame(client)) == sizes[number % 2]
    finally:
        go.set()


@pytest.mark.parametrize("between", ["write", "on_sent", "thread", "bytearray", "another size"])
def test_what_comes_between_replies_of_one_size_keeps_its_place(serve, between):
    """Raw bytes, a send with a callback, one from another thread, one of a mutable buffer: each between like replies."""
    log = Log()

    def on_packet(session, packet):
        assert session.send(b"first") and session.send(b"again")
        if between == "write":
            session.write(frame(b"other"))
        elif between == "on_sent":
            session.send(b"other", lambda session, ok: log.add(ok))
        elif between == "thread":
            thread = threading.Thread(target=session.send, args=(b"other",))
            thread.start()
            thread.join()
        elif between == "bytearray":
            buffer = bytearray(b"other")
            session.send(buffer)
            buffer[:] = b"WRONG"
        else:
            session.send(b"a reply of another size")
        assert session.send(b"third") and session.send(b"fifth")

    client = serve(on_packet=on_packet).client()
    other = b"a reply of another size" if between == "another size" else b"other"
    for _ in range(3):
        client.sendall(frame(b"go") * 2)
        for _ in range(2):
            replies = [read_frame(client) for _ in range(5)]
            assert sorted(replies) == sorted([b"first", b"again", other, b"third", b"fifth"])
            assert [reply for reply in replies if reply != other] == [b"first", b"again", b"third", b"fifth"]
            assert between == "thread" or replies[2] == other
    if between == "on_sent":
        log.wait(6)
        assert log.items == [True] * 6


# -- callbacks --------------------------------------------------------------------------------------------------------

def test_on_connect_is_first_and_on_disconnect_last_and_once(serve):
    """A6."""
    server = serve()
    clients = [server.client() for _ in range(20)]
    for client in clients:
        client.sendall(frame(b"a") + frame(b"b"))
    for client in clients:
        assert read_frame(client) == b"a"
        assert read_frame(client) == b"b"
        client.close()
    server.ended.wait(20)
    server.stop()
    for session in {session for _, session in server.log.items}:
        assert [name for name, of in server.log.items if of is session] == ["connect", "packet", "packet", "disconnect"]
    assert len(server.ended) == 20


def test_on_connect_may_send_first(serve):
    server = serve(on_connect=lambda session: session.send(b"welcome"))
    assert read_frame(server.client()) == b"welcome"


def test_session_facts(serve):
    """A6: index, peer, kind, tag, user object, connected."""
    seen = Log()
    server = serve(tag="chat", on_disconnect=lambda session, reason, error: seen.add(
        (session.id, session.kind, session.tag, session.data, session.connected, reason)))
    client, session = server.pair()
    assert session.peer == client.getsockname()
    assert (session.kind, session.tag, session.data) == (Kind.CLIENT, "chat", None)
    assert session.connected
    assert session.communicator is server.communicator
    assert 0 <= session.id < server.manager.max_sessions
    session.tag, session.data = 7, ["user"]
    client.close()
    assert seen.wait() == [(session.id, Kind.CLIENT, 7, ["user"], False, Reason.NORMAL)]
    assert str(client) and repr(session).startswith("<Session")


def test_reason_normal_when_the_peer_closes(serve):
    server = serve()
    client, session = server.pair()
    client.close()
    assert server.ended.wait() == [(session, Reason.NORMAL, None)]


def test_reason_normal_when_the_server_closes(serve):
    server = serve()
    client, session = server.pair()
    assert session.close() is True
    assert read_to_end(client) == b""
    assert server.ended.wait() == [(session, Reason.NORMAL, None)]
    assert session.close() is False


def test_reason_normal_when_aborted(serve):
    server = serve()
    client, session = server.pair()
    assert session.abort() is True
    assert server.ended.wait()[0][1] is Reason.NORMAL
    assert read_to_end(client) == b""
    assert session.abort() is False


def test_reason_error_when_the_connection_breaks(serve):
    server = serve()
    client, session = server.pair()
    reset(client)
    (ended, reason, error), = server.ended.wait()
    assert ended is session
    assert reason is Reason.ERROR
    assert isinstance(error, ConnectionResetError)


def test_reason_error_when_the_connection_ends_inside_of_a_packet(serve):
    server = serve()
    client = server.client()
    client.sendall(b"\0\0\0\5hel")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == b""
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.ERROR
    assert "inside" in str(error)


def test_reason_protocol(serve):
    server = serve(leviathan.TextLength())
    client = server.client()
    client.sendall(b"2,ok+5,hello")
    assert read_to_end(client) == b"2,ok"           # what was good is answered
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.PROTOCOL
    assert isinstance(error, leviathan.FramingError)


def test_reason_timeout(serve):
    server = serve(idle_timeout=0.1)
    client = server.client()
    assert read_to_end(client) == b""
    (_, reason, error), = server.ended.wait()
    assert reason is Reason.TIMEOUT
    assert isinstance(error, TimeoutError)


def test_reason_overflow(serve):
    server = serve(send_limit=1 << 17)
    client, session = server.pair()
    with pytest.raises(AssertionError):             # send answers False at the limit
        while True:
            assert session.send(b"x" * 50000)
    assert server.ended.wait()[0][1] is Reason.OVERFLOW


def test_reason_shutdown(serve):
    server = serve()
    client, session = server.pair()
    assert server.stop() is True
    assert server.ended.items == [(session, Reason.SHUTDOWN, None)]
    assert read_to_end(client) == b""


def test_the_first_reason_is_the_one_reported(serve):
    def on_packet(session, packet):
        session.close()
        raise ValueError("after the close")

    server = serve(on_packet=on_packet)
    server.client().sendall(frame(b"x"))
    assert server.ended.wait()[0][1] is Reason.NORMAL


@pytest.mark.parametrize("problem", [ValueError("handler"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()],
                         ids=lambda problem: type(problem).__name__)
def test_a_raising_handler_costs_only_its_session(serve, caplog, problem):
    """RULES, servers 4: logged once, reason ERROR."""
    def on_packet(session, packet):
        if packet == b"raise":
            raise problem
        session.send(packet)

    server = serve(on_packet=on_packet)
    good, bad = server.client(), server.client()
    with caplog.at_level("WARNING", "leviathan"):
        bad.sendall(frame(b"raise") + frame(b"never seen"))
        assert read_to_end(bad) == b""
        (_, reason, error), = server.ended.wait()
    assert (reason, error) == (Reason.ERROR, problem)
    good.sendall(frame(b"go on"))
    assert read_frame(good) == b"go on"
    assert len([record for record in caplog.records if record.name == "leviathan"]) == 1
    assert [name for name, _ in server.log.items].count("packet") == 2


def test_a_raising_on_connect_costs_only_its_session(serve):
    """RULES, servers 3: its slot comes back."""
    calls = []

    def on_connect(session):
        calls.append(session)
        if len(calls) == 1:
            raise ValueError("on_connect")

    server = serve(on_connect=on_connect, max_clients=1)
    try:
        assert read_to_end(server.client()) == b""
    except ConnectionResetError:
        pass                        # the reset came before connect() had returned
    assert server.ended.wait()[0][1] is Reason.ERROR
    client = server.client()
    client.sendall(frame(b"x"))
    assert read_frame(client) == b"x"


@pytest.mark.parametrize("what", ["handler", "on_sent"])
def test_what_a_callback_raises_is_logged_though_its_session_is_ending(serve, caplog, what):
    """RULES, servers 4: logged once. It cannot end the session any more, but is an error of the program all the same."""
    def wrong(*args):
        raise ZeroDivisionError("a mistake")

    def on_packet(session, packet):
        if what == "on_sent":
            session.communicator.queue.engine.run_on_owner(session, session.abort)
            session.send(b"x" * (8 << 20), wrong)
        else:
            session.close()
            wrong()

    server = serve(on_packet=on_packet, send_limit=1 << 24)
    client = server.client()
    client.sendall(frame(b"x"))
    (_, reason, error), = server.ended.wait()
    assert (reason, error) == (Reason.NORMAL, None)
    line, = [record for record in caplog.records if record.name == "leviathan"]
    assert "a callback failed" in line.getMessage() and line.exc_info[0] is ZeroDivisionError


def test_a_raising_on_disconnect_costs_nothing(serve, caplog):
    """RULES, servers 3."""
    def on_disconnect(session, reason, error):
        raise ValueError("on_disconnect")

    server = serve(on_disconnect=on_disconnect, max_clients=1)
    for number in range(3):
        client = server.client()
        client.sendall(frame(b"x"))
        assert read_frame(client) == b"x"
        client.close()
        server.ended.wait(number + 1)
    eventually(lambda: server.manager.statistics()["sessions"] == 0)
    assert "on_disconnect" in caplog.text


def test_a_raising_on_sent_costs_only_its_session(serve):
    def on_sent(session, ok):
        raise ValueError("on_sent")

    server = serve()
    client, session = server.pair()
    session.send(b"x", on_sent=on_sent)
    assert server.ended.wait()[0][1] is Reason.ERROR
    other = server.client()
    other.sendall(frame(b"y"))
    assert read_frame(other) == b"y"


# -- sending ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 20000, 4 << 20])
@pytest.mark.parametrize("where", ["handler", "foreign"])
def test_on_sent_is_called_once_with_true(serve, size, where):
    """A7: send with a completion callback."""
    sent = Log()

    def on_packet(session, packet):
        assert session.send(b"r" * size, on_sent=lambda session, ok: sent.add(session, ok))

    server = serve(on_packet=on_packet)
    client, session = server.pair()
    if where == "handler":
        client.sendall(frame(b"go"))
    else:
        assert session.send(b"r" * size, on_sent=lambda session, ok: sent.add(session, ok)) is True
    assert read_frame(client) == b"r" * size
    assert sent.wait() == [(session, True)]
    client.close()
    server.ended.wait()
    server.stop()
    assert sent.items == [(session, True)]


def test_on_sent_comes_in_order_of_the_sends(serve):
    sent = Log()
    server = serve()
    client, session = server.pair()
    for number in range(50):
        assert session.send(b"x" * 10000, on_sent=lambda session, ok, number=number: sent.add(number, ok))
    for _ in range(50):
        read_frame(client)
    assert sent.wait(50) == [(number, True) for number in range(50)]


def test_on_sent_is_called_once_with_false_when_aborted(serve):
    """Before on_disconnect, which is last."""
    order = Log()
    server = serve(on_disconnect=lambda session, reason, error: order.add("disconnect"))
    client, session = server.pair()
    assert session.send(b"x" * (8 << 20), on_sent=lambda session, ok: order.add("large", ok))
    assert session.send(b"y", on_sent=lambda session, ok: order.add("small", ok))
    eventually(lambda: session.sending is not None)
    session.abort()
    server.ended.wait()
    server.stop()
    assert order.items == [("large", False), ("small", False), "disconnect"]


@pytest.mark.parametrize("end", ["abort", "close"])
def test_on_disconnect_is_last_when_a_handler_sends_and_ends(serve, end):
    """on_sent is called exactly once, and before on_disconnect; what an abort finds queued is thrown away."""
    order = Log()

    def on_packet(session, packet):
        assert session.send(b"bye", on_sent=lambda session, ok: order.add("sent", ok))
        getattr(session, end)()

    server = serve(on_packet=on_packet, on_disconnect=lambda session, reason, error: order.add("disconnect"))
    client = server.client()
    client.sendall(frame(b"x"))
    data = read_to_end(client)
    server.ended.wait()
    server.stop()
    if end == "close":
        assert data == frame(b"bye")
        assert order.items == [("sent", True), "disconnect"]
    else:
        assert order.items == [("sent", False), "disconnect"]
        assert data == b""


def test_on_sent_false_when_the_peer_resets(serve):
    sent = Log()
    server = serve()
    client, session = server.pair()
    assert session.send(b"x" * (8 << 20), on_sent=lambda session, ok: sent.add(ok))
    eventually(lambda: session.sending is not None)
    reset(client)
    server.ended.wait()
    assert sent.wait() == [False]


def test_on_sent_may_send_again(serve):
    """A stream of any length without a queue: each send begins when the one before is done."""
    done = threading.Event()

    def more(session, ok, left=200):
        if left:
            session.send(b"%d" % left, on_sent=lambda session, ok: more(session, ok, left - 1))
        else:
            done.set()

    server = serve(on_connect=lambda session: more(session, True))
    client = server.client()
    assert [read_frame(client) for _ in range(200)] == [b"%d" % left for left in range(200, 0, -1)]
    assert done.wait(DEADLINE)


def test_send_after_close_answers_false(serve):
    answers = Log()

    def on_packet(session, packet):
        answers.add(session.send(b"before"))
        session.close()
        answers.add(session.send(b"after"))
        answers.add(session.write(b"after"))
        answers.add(session.send(b"after", on_sent=lambda session, ok: answers.add("never")))

    server = serve(on_packet=on_packet)
    client, session = server.pair()
    client.sendall(frame(b"x"))
    assert read_to_end(client) == frame(b"before")
    server.ended.wait()
    assert session.send(b"late") is False
    assert session.write(b"late") is False
    assert answers.items == [True, False, False, False]
    server.stop()
    assert session.send(b"later") is False


def test_close_sends_what_is_queued_first(serve):
    server = serve()
    client, session = server.pair()
    assert session.send(b"x" * (4 << 20))
    assert session.close()
    data = read_to_end(client)
    assert len(data) == 4 + (4 << 20)
    assert server.ended.wait()[0][1] is Reason.NORMAL


def test_a_close_behind_a_reply_does_not_wait_for_the_peer(serve):
    """Once the peer has acknowledged everything (after 40 ms at most) its slot is free, though it stays connected.

    Windows tells that from version 10 on; Wine does not.
    """
    def on_packet(session, packet):
        session.send(packet * 30000)
        session.close()

    server = serve(on_packet=on_packet)
    client = server.client()
    client.sendall(frame(b"x"))
    assert read_to_end(client) == frame(b"x" * 30000)
    began = time.monotonic()
    server.ended.wait()
    assert time.monotonic() - began < (1.0 + leviathan._engine.LINGER if WINE else 1.0)


def test_close_is_not_undone_by_input_that_nobody_reads(serve):
    """The peer keeps sending after the server's close: it still gets everything, and no reset in its stead."""
    def on_packet(session, packet):
        session.send(b"y" * (2 << 20))
        session.close()

    client = serve(on_packet=on_packet).client()
    client.sendall(frame(b"x"))
    assert read_exactly(client, 4) == struct.pack(">I", 2 << 20)
    client.sendall(frame(b"z") * 2000)
    assert len(read_exactly(client, 2 << 20)) == 2 << 20


def test_a_stale_handle_reaches_nobody(serve):
    """A Session that outlives its connection is inert, also when its slot is used again."""
    server = serve()
    old_client, old = server.pair()
    old_client.close()
    server.ended.wait()
    eventually(lambda: server.manager.statistics()["sessions"] == 0)
    client, new = server.pair()
    assert new.id == old.id
    assert new is not old
    assert old not in server.communicator.sessions
    assert new in server.communicator.sessions
    for answer in (old.send(b"stale"), old.write(b"stale"), old.close(), old.abort(), old.connected):
        assert answer is False
    old.pause()
    old.finish()
    old.resume()
    old.tag = old.data = "stale"
    client.sendall(frame(b"mine"))
    assert read_frame(client) == b"mine"
    assert (new.tag, new.data, new.connected) == (None, None, True)
    assert len(server.ended) == 1


def test_broadcast_counts_who_got_it(serve):
    """A7, A2: len, iteration."""
    server = serve()
    clients = [server.client() for _ in range(10)]
    sessions = server.connected.wait(10)
    assert len(server.communicator.sessions) == 10
    assert set(server.communicator.sessions) == set(sessions)
    assert server.communicator.broadcast(b"all") == 10
    for client in clients:
        assert read_frame(client) == b"all"
    for client in clients[:4]:
        client.close()
    server.ended.wait(4)
    assert server.communicator.broadcast(b"rest") == 6
    for client in clients[4:]:
        assert read_frame(client) == b"rest"


def test_broadcast_from_a_handler(serve):
    server = serve(on_packet=lambda session, packet: session.communicator.broadcast(packet))
    clients = [server.client() for _ in range(5)]
    server.connected.wait(5)
    clients[0].sendall(frame(b"news"))
    assert [read_frame(client) for client in clients] == [b"news"] * 5


def test_of_resume_and_pause_in_one_handler_the_last_counts(serve):
    def on_packet(session, packet):
        session.send(packet)
        session.pause()
        session.resume()
        session.pause()

    server = serve(on_packet=on_packet)
    client, session = server.pair()
    client.sendall(frame(b"1") + frame(b"2"))
    assert read_frame(client) == b"1"
    fence = Log()
    for turn in range(3):
        session.communicator.queue.engine.run_on_owner(session, fence.add, turn)
        fence.wait(turn + 1)
    assert [name for name, _ in server.log.items].count("packet") == 1
    session.resume()
    assert read_frame(client) == b"2"


def test_pause_and_resume(serve):
    """Nothing is handed on while paused, nothing is lost."""
    got = Log()

    def on_packet(session, packet):
        got.add(packet)
        if packet == b"3":
            session.pause()

    server = serve(on_packet=on_packet)
    client, session = server.pair()
    client.sendall(b"".join(frame(b"%d" % number) for number in range(1000)))
    got.wait(4)
    other, _ = server.pair()
    other.sendall(frame(b"other"))
    got.wait(5)
    assert got.items == [b"0", b"1", b"2", b"3", b"other"]
    session.resume()
    assert got.wait(1001)[5:] == [b"%d" % number for number in range(4, 1000)]


# -- half-close -------------------------------------------------------------------------------------------------------

def test_a_half_closed_client_gets_all_its_replies(serve):
    """RULES, epoll 3: HUP is not the end of what was sent."""
    server = serve()
    client = server.client()
    client.sendall(b"".join(frame(b"%d" % number) for number in range(100)))
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == b"".join(frame(b"%d" % number) for number in range(100))
    assert server.ended.wait()[0][1] is Reason.NORMAL


def test_a_half_closed_client_gets_large_replies(serve):
    server = serve(on_packet=lambda session, packet: session.send(packet * 40000))
    client = server.client()
    client.sendall(b"".join(frame(b"%02d" % number) for number in range(100)))
    client.shutdown(socket.SHUT_WR)
    for number in range(100):
        assert read_frame(client) == b"%02d" % number * 40000
    assert read_to_end(client) == b""
    assert server.ended.wait()[0][1] is Reason.NORMAL


def test_on_eof_keeps_the_session_open_for_sending(serve):
    eof = Log()
    server = serve(on_eof=eof.add)
    client, session = server.pair()
    client.sendall(frame(b"last"))
    client.shutdown(socket.SHUT_WR)
    assert eof.wait() == [session]
    assert read_frame(client) == b"last"
    assert session.send(b"still here") is True
    assert read_frame(client) == b"still here"
    assert len(server.ended) == 0
    session.close()
    assert read_to_end(client) == b""
    assert server.ended.wait() == [(session, Reason.NORMAL, None)]
    assert eof.items == [session]


def test_finish_half_closes_and_receiving_goes_on(serve):
    got = Log()
    server = serve(on_packet=lambda session, packet: got.add(packet))
    client, session = server.pair()
    assert session.send(b"x" * (2 << 20)) is True
    session.finish()
    assert len(read_to_end(client)) == 4 + (2 << 20)
    assert session.send(b"late") is False
    client.sendall(frame(b"one") + frame(b"two"))
    assert got.wait(2) == [b"one", b"two"]
    assert session.connected
    client.close()
    assert server.ended.wait() == [(session, Reason.NORMAL, None)]


def test_finish_in_a_handler(serve):
    """send answers False from then on; what was queued before still leaves."""
    answers = Log()

    def on_packet(session, packet):
        session.send(b"last")
        session.finish()
        answers.add(session.send(b"late"))
        answers.add(session.write(b"late", on_sent=lambda session, ok: answers.add("never")))

    server = serve(on_packet=on_packet)
    client = server.client()
    client.sendall(frame(b"x"))
    assert read_to_end(client) == frame(b"last")
    assert answers.items == [False, False]
    client.close()
    assert server.ended.wait()[0][1] is Reason.NORMAL


def test_finish_then_close(serve):
    server = serve()
    client, session = server.pair()
    session.finish()
    assert read_to_end(client) == b""
    session.close()
    assert server.ended.wait() == [(session, Reason.NORMAL, None)]


# -- listeners --------------------------------------------------------------------------------------------------------

def test_a_closed_listener_is_forgotten(serve):
    server = serve()
    for _ in range(3):
        server.communicator.listen(0).close()
    assert server.communicator.listeners == [server.listener]


def test_several_listeners_of_one_communicator(serve, harness):
    """A5: several ports per Communicator; closing one leaves the others and its sessions."""
    server = serve()
    second, third = server.communicator.listen(0), server.communicator.listen(0, "127.0.0.1")
    assert len({server.address[1], second.address[1], third.address[1]}) == 3
    clients = [harness.connect(listener) for listener in (server.listener, second, third)]
    for client in clients:
        client.sendall(frame(b"x"))
        assert read_frame(client) == b"x"
    assert second.kind is Kind.LISTEN
    second.close()

    def refused():
        try:
            harness.connect(second).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass                    # it was let in and thrown out by the very close
        return False

    eventually(refused)
    clients[1].sendall(frame(b"still"))
    assert read_frame(clients[1]) == b"still"
    clients.append(harness.connect(third))
    clients[-1].sendall(frame(b"y"))
    assert read_frame(clients[-1]) == b"y"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6(serve, harness):
    server = serve(listen=False)
    listener = server.communicator.listen(0, "::1")
    client = harness.connect(listener)
    client.sendall(frame(b"six"))
    assert read_frame(client) == b"six"
    assert server.connected.wait()[0].peer == client.getsockname()[:2]
    assert str(listener) == "[::1]:%d" % listener.address[1] and str(listener) in repr(listener)
    got = Log()
    other = serve(on_packet=lambda session, packet: got.add(packet), listen=False,
                  on_connect=lambda session: session.send(b"out"))
    other.communicator.connect("::1", listener.address[1])
    assert got.wait() == [b"out"]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets")
def test_unix_socket(serve, harness, tmp_path):
    path = str(tmp_path / "server")
    server = serve(listen=False)
    listener = server.communicator.listen(unix=tmp_path / "server")
    assert listener.address == path
    client = harness.connect(listener)
    client.sendall(frame(b"unix"))
    assert read_frame(client) == b"unix"
    got = Log()
    other = serve(on_packet=lambda session, packet: got.add(packet), listen=False,
                  on_connect=lambda session: session.send(b"out"))
    connector = other.communicator.connect("", unix=tmp_path / "server")
    assert got.wait() == [b"out"]
    assert connector.session.peer == path
    client.close()
    other.stop()
    server.stop()
    assert not os.path.exists(path)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets")
def test_unix_socket_stale_file_is_removed_and_others_are_not(serve, harness, tmp_path):
    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    server = serve(listen=False)
    listener = server.communicator.listen(unix=path)
    client = harness.connect(listener)
    client.sendall(frame(b"x"))
    assert read_frame(client) == b"x"
    with pytest.raises(OSError):
        serve(listen=False).communicator.listen(unix=path)      # this one is alive
    client.sendall(frame(b"y"))
    assert read_frame(client) == b"y"
    precious = tmp_path / "file"
    precious.write_bytes(b"precious")
    with pytest.raises(OSError):
        serve(listen=False).communicator.listen(unix=str(precious))
    assert precious.read_bytes() == b"precious"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets")
def test_a_unix_sockets_file_is_removed_wherever_one_is_and_only_if_it_is_ones_own(serve, harness, tmp_path, monkeypatch):
    path = tmp_path / "server"
    monkeypatch.chdir(tmp_path)
    first = serve(listen=False)
    first.communicator.listen(unix="server")
    path.unlink()
    second = serve(listen=False)
    listener = second.communicator.listen(unix="server")
    first.stop()
    client = harness.connect(listener)
    client.sendall(frame(b"x"))
    assert read_frame(client) == b"x"
    monkeypatch.chdir("/")
    client.close()
    second.stop()
    assert not path.exists()


def test_a_port_in_use_raises_oserror_at_once(serve):
    server = serve()
    with pytest.raises(OSError) as caught:
        serve(listen=False).communicator.listen(server.address[1])
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("settings, name", [
    ({"max_clients": "5"}, "max_clients"), ({"max_clients": -1}, "max_clients"), ({"idle_timeout": -1}, "idle_timeout"),
    ({"idle_timeout": float("nan")}, "idle_timeout"), ({"packet_timeout": "5"}, "packet_timeout"),
    ({"queue": 5}, "queue .*EventQueue"), ({"manager": 5}, "manager .*SessionManager"), ({"on_connect": 5}, "on_connect"),
    ({"high_water": "5"}, "high_water"), ({"low_water": 1.5}, "low_water"), ({"send_limit": None}, "send_limit"),
    ({"on_disconnect": "x"}, "on_disconnect"), ({"on_eof": 1}, "on_eof"), ({"on_backpressure": 1}, "on_backpressure")])
def test_a_wrong_argument_is_refused_by_its_name_when_it_is_given(settings, name):
    with pytest.raises((TypeError, ValueError), match=name):
        leviathan.Communicator(LengthPrefix(4), leviathan.echo, **settings)


@pytest.mark.parametrize("call, name", [
    (lambda server: leviathan.Communicator(leviathan.Raw, leviathan.echo), "framing"),
    (lambda server: server.listen(serve=5), "serve"), (lambda server: server.listen(backlog="x"), "backlog"),
    (lambda server: server.listen(0, 5), "host"), (lambda server: server.listen(thread="1"), "thread"),
    (lambda server: server.listen(client_thread=-1), "client_thread"), (lambda server: server.listen(True), "port"),
    (lambda server: server.listen(backlog=1 << 40), "backlog"), (lambda server: server.listen(unix=5), "unix"),
    (lambda server: server.listen(unix="\0x"), "unix"), (lambda server: server.connect("", unix=5), "unix"),
    (lambda server: server.connect(5, 1), "host"), (lambda server: server.connect("x", 1, thread="1"), "thread"),
    (lambda server: server.connect("x", 1, timeout="5"), "timeout"),
    (lambda server: server.connect("x", 1, timeout=0), "timeout"),
    (lambda server: server.connect("x", 1, timeout=float("nan")), "timeout"),
    (lambda server: server.connect("x", 1, reconnect=5), "reconnect"),
    (lambda server: server.connect("x", 1, reconnect=(1, 2, 3)), "reconnect"),
    (lambda server: server.connect("x", 1, reconnect=("1", 2)), "reconnect"),
    (lambda server: server.queue.call_later("1", len), "seconds"), (lambda server: server.queue.every("1", len), "seconds"),
    (lambda server: server.queue.every(0, len), "seconds"),
    (lambda server: server.queue.call_later(float("nan"), len), "seconds"),
    (lambda server: leviathan.SessionManager(classes=5), "classes")])
def test_a_wrong_argument_of_a_verb_is_refused_by_its_name(serve, call, name):
    with pytest.raises((TypeError, ValueError), match=name):
        call(serve(listen=False, start=False).communicator)


@pytest.mark.parametrize("port", [-1, 65536, 70000, "7878", None, 7878.0])
def test_a_port_is_0_to_65535(serve, port):
    """getaddrinfo takes 65537 for 1."""
    server = serve(listen=False, start=False)
    for verb in (server.communicator.listen, lambda port: server.communicator.connect("127.0.0.1", port)):
        with pytest.raises((TypeError, ValueError), match="port"):
            verb(port)
    with pytest.raises(ValueError, match="port"):
        server.communicator.connect("127.0.0.1", 0)


def test_a_listen_that_fails_names_the_address(serve):
    server = serve()
    host, port = server.address
    with pytest.raises(OSError, match="cannot listen on %s:%d: " % (host, port)) as raised:
        server.communicator.listen(port, host)
    assert raised.value.errno == errno.EADDRINUSE
    for name in ("nowhere.invalid", "a..b"):
        with pytest.raises(OSError, match="cannot listen on %s:1: " % name):
            server.communicator.listen(1, name)


def test_a_closed_communicator_serves_no_listener(serve):
    gate, closed = serve(listen=False), serve(listen=False)
    closed.communicator.close()
    for listening, serving in ((closed, closed), (gate, closed), (closed, gate)):
        with pytest.raises(RuntimeError, match="closed"):
            listening.communicator.listen(0, serve=serving.communicator)


def test_only_functions_are_posted_and_planned(harness):
    queue = harness.queue(1)
    for call in (queue.post, lambda function: queue.call_later(1, function), lambda function: queue.every(1, function)):
        with pytest.raises(TypeError, match="function"):
            call(5)


def test_to_run_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to run"):
        leviathan.run()


def test_what_they_print_names_them(serve, harness):
    server = serve(name="orders")
    assert "orders" in repr(server.communicator) and ":%d" % server.address[1] in repr(server.communicator)
    assert repr(harness.queue(2, name="work")) == "<EventQueue work, 2 threads>"


def test_a_closed_communicator_listens_and_connects_no_more(serve):
    server = serve()
    server.communicator.close()
    with pytest.raises(RuntimeError):
        server.communicator.listen(0)
    with pytest.raises(RuntimeError):
        server.communicator.connect("127.0.0.1", 1)


def test_no_clients_no_listener(serve):
    """CLIENT_SESSION_MAX=0: no clients."""
    with pytest.raises(ValueError):
        serve(max_clients=0)


# -- outgoing connections ---------------------------------------------------------------------------------------------

def test_connect_success(serve):
    """A5, A8: a ServerSocket shares framing and handler; connected is told by on_connect."""
    server = serve()
    got = Log()
    client = serve(on_packet=lambda session, packet: got.add(session, packet), listen=False,
                   on_connect=lambda session: session.send(b"hello"))
    connector = client.communicator.connect(*server.address, tag="A")
    session = connector.wait(DEADLINE)
    assert got.wait() == [(session, b"hello")]
    assert connector.session is session
    assert connector.connected
    assert (session.kind, session.tag, session.peer) == (Kind.SERVER, "A", server.address)
    connector.close()
    assert client.ended.wait() == [(session, Reason.NORMAL, None)]
    eventually(lambda: connector.session is None)
    assert not connector.connected
    assert server.ended.wait()[0][1] is Reason.NORMAL


def test_connect_refused_tells_on_failure(serve, caplog):
    failures = Log()
    client = serve(listen=False)
    connector = client.communicator.connect("127.0.0.1", free_port(),
                                            on_failure=lambda connector, error: failures.add(connector, error))
    with pytest.raises(ConnectionError):
        connector.wait(DEADLINE)
    (told, error), = failures.wait()
    assert told is connector
    assert isinstance(error, ConnectionRefusedError)
    assert connector.session is None and not connector.connected
    assert len(client.connected) == len(client.ended) == 0
    eventually(lambda: client.manager.statistics()["sessions"] == 0)
    assert "cannot connect" in caplog.text


def test_connect_timeout(serve, harness):
    """To a listener whose queue is full, the kernel drops the SYN."""
    full = harness.keep(socket.socket())
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    for _ in range(4):
        filler = harness.keep(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    failures = Log()
    client = serve(listen=False)
    connector = client.communicator.connect(*full.getsockname(), timeout=0.15,
                                            on_failure=lambda connector, error: failures.add(error))
    with pytest.raises(ConnectionError):
        connector.wait(DEADLINE)
    assert [type(error) for error in failures.wait()] == [TimeoutError]
    assert len(client.connected) == len(client.ended) == 0
    eventually(lambda: client.manager.statistics()["sessions"] == 0)


def test_a_connect_timeout_that_comes_before_the_engine_has_the_session(serve, monkeypatch):
    """There is nothing yet that it could end; whoever hands the session over looks again."""
    server, client = serve(), serve(listen=False)
    engine, failures = client.queue.engine, Log()
    connect = engine.connect

    def late(session, *args):
        session.connector._timed_out(session.connector._attempts)
        connect(session, *args)

    monkeypatch.setattr(engine, "connect", late)
    client.communicator.connect(*server.address, on_failure=lambda connector, error: failures.add(error))
    assert [type(error) for error in failures.wait()] == [TimeoutError]
    eventually(lambda: client.manager.statistics()["sessions"] == 0)


def test_an_attempt_that_was_given_up_says_nothing_about_the_next(serve, monkeypatch):
    """Its time is over between the resolver's answer and the engine; its session ends while the next attempt is made."""
    server = serve()
    ours = serve(listen=False)
    failures = Log()
    take_slot = ours.communicator._take_slot

    def late(listener):
        index = take_slot(listener)
        if connector._attempts == 1:
            connector._timed_out(1)
        return index

    ours.communicator._take_slot = late
    held = threading.Event()
    ours.queue.post(held.wait, DEADLINE)            # until `connector` has its name
    connector = ours.communicator.connect(*server.address, timeout=DEADLINE, reconnect=(0.01, 0.01),
                                          on_failure=lambda connector, error: failures.add(error))
    held.set()
    session = connector.wait(DEADLINE)
    assert session.connected and connector.session is session
    fence = Log()
    ours.queue.call_later(0.05, fence.add, 1)       # longer than the next attempt would take
    fence.wait()
    assert [type(error) for error in failures.wait(1)] == [TimeoutError]
    assert connector.session is session
    connector.close()


def test_who_waits_for_a_connector_that_was_closed_is_told_so(serve):
    server = serve()
    connector = server.communicator.connect(*server.address)
    connector.wait(DEADLINE)
    connector.close()
    eventually(lambda: connector.session is None)
    with pytest.raises(ConnectionError, match="it was given up"):
        connector.wait(DEADLINE)


def test_connect_wait_timeout(serve, harness, monkeypatch):
    client = serve(listen=False, start=False)           # its thread does not run: nothing happens
    connector = client.communicator.connect("127.0.0.1", free_port())
    with pytest.raises(TimeoutError):
        connector.wait(0.02)
    connector.close()


def test_a_name_is_resolved_off_the_event_threads(serve, monkeypatch):
    """getaddrinfo waits for a name server; the queue goes on meanwhile."""
    real, release, threads = socket.getaddrinfo, threading.Event(), Log()

    def slow(host, port, family=0, type=0, proto=0, flags=0):
        if flags & socket.AI_NUMERICHOST:
            return real(host, port, family, type, proto, flags)
        threads.add(threading.current_thread().name)
        release.wait(DEADLINE)
        return real("127.0.0.1", port, family, type, proto, flags)

    server = serve()
    client = serve(listen=False)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    connector = client.communicator.connect("localhost", server.address[1])
    threads.wait()
    ran = threading.Event()
    client.queue.post(ran.set)
    assert ran.wait(DEADLINE)
    assert not connector.connected
    release.set()
    assert connector.wait(DEADLINE).connected
    assert threads.items == ["leviathan-resolver"]


def test_localhost_is_found(serve):
    server = serve()
    assert serve(listen=False).communicator.connect("localhost", server.address[1]).wait(DEADLINE).connected


def test_a_resolver_that_never_answers_is_a_timeout(serve, monkeypatch):
    real, release = socket.getaddrinfo, threading.Event()

    def slow(host, port, family=0, type=0, proto=0, flags=0):
        if not flags & socket.AI_NUMERICHOST:
            release.wait(DEADLINE)
        return real(host, port, family, type, proto, flags)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    failures = Log()
    client = serve(listen=False)
    client.communicator.connect("localhost", 1, timeout=0.1, on_failure=lambda connector, error: failures.add(error))
    assert [type(error) for error in failures.wait()] == [TimeoutError]
    release.set()


def test_an_unknown_name_is_a_failure(serve, monkeypatch):
    def fail(host, port, family=0, type=0, proto=0, flags=0):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    failures = Log()
    client = serve(listen=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    connector = client.communicator.connect("no.such.host", 1, on_failure=lambda connector, error: failures.add(error))
    assert isinstance(failures.wait()[0], socket.gaierror)
    with pytest.raises(ConnectionError):
        connector.wait(DEADLINE)


def test_every_address_of_a_name_is_tried(serve, monkeypatch):
    real = socket.getaddrinfo
    bad = free_port()

    def two(host, port, family=0, type=0, proto=0, flags=0):
        good = real("127.0.0.1", port, family, type, proto, flags)
        return real("127.0.0.1", bad, family, type, proto, flags) + good

    server = serve()
    client = serve(listen=False)
    failures = Log()
    monkeypatch.setattr(socket, "getaddrinfo", two)
    connector = client.communicator.connect("two.addresses", server.address[1],
                                            on_failure=lambda connector, error: failures.add(error))
    assert connector.wait(DEADLINE).peer == server.address
    assert len(failures) == 0


def test_reconnect_after_the_server_restarts(serve, harness):
    """A8: each connection is a new Session given to on_connect."""
    first = serve()
    client = serve(listen=False, on_connect=lambda session: session.send(b"hello"))
    connector = client.communicator.connect(*first.address, reconnect=(0.01, 0.05))
    old = connector.wait(DEADLINE)
    first.connected.wait()
    port = first.address[1]
    first.stop()
    client.ended.wait()
    second = serve(listen=False)
    second.communicator.listen(port)
    second.connected.wait()
    new = eventually(lambda: connector.session)
    assert new is not old
    assert client.connected.wait(2) == [old, new]
    assert old.send(b"stale") is False
    connector.close()
    client.ended.wait(2)
    assert client.ended.items[1][:2] == (new, Reason.NORMAL)


def test_reconnect_pauses_double_up_to_the_longest_and_start_again(serve, monkeypatch):
    """With the jitter taken out: 1, 2, 4, 4, 4 hundredths; after a success, 1 again."""
    import random
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    client = serve(listen=False)
    pauses = Log()
    call_later = client.queue.call_later

    def noted(seconds, function, *args):
        if function.__name__ == "_attempt":
            pauses.add(seconds)
        return call_later(seconds, function, *args)

    monkeypatch.setattr(client.queue, "call_later", noted)
    port = free_port()
    failures = Log()
    connector = client.communicator.connect("127.0.0.1", port, reconnect=(0.01, 0.04),
                                            on_failure=lambda connector, error: failures.add(error))
    failures.wait(5)
    assert pauses.wait(5)[:5] == [0.01, 0.02, 0.04, 0.04, 0.04]
    server = serve(listen=False)
    server.communicator.listen(port)
    session = connector.wait(DEADLINE)
    before = len(pauses)
    session.abort()
    assert pauses.wait(before + 1)[before] == 0.01
    client.connected.wait(2)


def test_a_connector_that_reaches_itself_has_reached_nobody(serve, monkeypatch):
    """The system may give a client the very port that it wants to reach; the server that is to come has need of it."""
    port = free_port()
    plain = socket.socket

    class OfThatPort(plain):
        """What comes by chance once in some 28,000 attempts."""

        def bind(self, address):
            monkeypatch.setattr(socket, "socket", plain)    # only the first is like that
            super().bind(("127.0.0.1", port))               # ConnectEx needs a socket that is bound

        def connect_ex(self, address):
            self.bind(address)                              # epoll's engine would not do it
            return super().connect_ex(address)

    monkeypatch.setattr(socket, "socket", OfThatPort)
    client = serve(listen=False)
    failures = Log()
    connector = client.communicator.connect("127.0.0.1", port, reconnect=(0.01, 0.04),
                                            on_failure=lambda connector, error: failures.add(error))
    error = failures.wait()[0]
    assert isinstance(error, ConnectionRefusedError) and "itself" in str(error)
    server = serve(listen=False)

    def listens():
        try:
            return server.communicator.listen(port)
        except OSError:                                     # told of it before the socket is closed
            return None

    eventually(listens)
    assert connector.wait(DEADLINE).peer == ("127.0.0.1", port)
    assert client.connected.wait() == [connector.session] and not client.ended


def test_connector_closed_while_it_waits_or_connects(serve):
    client = serve(listen=False)
    failures = Log()
    connector = client.communicator.connect("127.0.0.1", free_port(), reconnect=(5.0, 5.0),
                                            on_failure=lambda connector, error: failures.add(error))
    failures.wait()
    connector.close()
    with pytest.raises(ConnectionError):
        connector.wait(DEADLINE)
    server = serve()
    for _ in range(20):
        client.communicator.connect(*server.address, reconnect=True).close()
    eventually(lambda: client.manager.statistics()["sessions"] == 0)
    eventually(lambda: server.manager.statistics()["sessions"] == 0)
    assert len(failures) == 1
    assert len(client.connected) == len(client.ended)


def test_a_raising_on_failure_costs_nothing(serve):
    calls = Log()

    def on_failure(connector, error):
        calls.add(error)
        raise ValueError("on_failure")

    client = serve(listen=False)
    client.communicator.connect("127.0.0.1", free_port(), reconnect=(0.01, 0.01), on_failure=on_failure)
    calls.wait(3)


def test_outgoing_connections_that_are_over_are_forgotten(serve):
    """A proxy makes one for each of its clients: kept for ever, they would fill the memory."""
    server = serve()
    client = serve(listen=False)
    kept = client.communicator.connect(*server.address, reconnect=True)
    kept.wait(DEADLINE)
    for _ in range(3):
        client.communicator.connect(*server.address).wait(DEADLINE).close()         # ends
        client.communicator.connect(*server.address, reconnect=True).close()        # is given up
        with pytest.raises(ConnectionError):
            client.communicator.connect("127.0.0.1", free_port()).wait(DEADLINE)    # fails
    eventually(lambda: client.communicator.connectors == [kept])
    client.communicator.close()
    assert client.communicator.connectors == []


def test_connections_from_one_host_share_its_name_and_few_names_are_kept(serve):
    """An idle session is small; and a peer with more addresses than there is memory fills none."""
    server = serve()
    sessions = [server.pair()[1] for _ in range(2)]
    assert sessions[0].peer[0] is sessions[1].peer[0]
    for number in range(3 * leviathan.HOSTS_KEPT):
        assert leviathan._one_string("2001:db8::%x" % number) == "2001:db8::%x" % number
    assert len(leviathan._hosts) <= leviathan.HOSTS_KEPT


# -- roles and threads ------------------------------------------------------------------------------------------------

def test_serve_hands_accepted_sessions_to_another_communicator(serve, harness):
    """I6: one queue accepts, another serves."""
    names = Log()

    def on_packet(session, packet):
        names.add(threading.current_thread().name)
        session.send(packet)

    worker = serve(on_packet=on_packet, listen=False, queue=harness.queue(2, name="leviathan-clients"))
    acceptor = serve(listen=False, queue=harness.queue(1, name="leviathan-accept"))
    listener = acceptor.communicator.listen(0, serve=worker.communicator)
    clients = [harness.connect(listener) for _ in range(4)]
    for client in clients:
        client.sendall(frame(b"x"))
        assert read_frame(client) == b"x"
    assert len(worker.communicator.sessions) == 4
    assert len(acceptor.communicator.sessions) == 0
    both = {"leviathan-clients-0", "leviathan-clients-1"}
    assert set(names.items) == both or WINDOWS and set(names.items) < both      # there the system picks the thread
    assert all(session.communicator is worker.communicator for session in worker.connected.items)
    assert acceptor.queue.statistics()["accepted"] == 4


@only_pinned
def test_thread_pins_listeners_clients_and_connections(serve, harness):
    """E2: with EventQueue(threads=3), each where it was put, and it stays there (I3)."""
    where = Log()

    def on_packet(session, packet):
        where.add(session.tag, threading.current_thread().name)
        if session.kind is Kind.CLIENT:
            session.send(packet)

    server = serve(on_packet=on_packet, listen=False, queue=harness.queue(3, name="leviathan-pin"))
    for number in range(3):
        listener = server.communicator.listen(0, thread=number)
        client = harness.connect(listener)
        for _ in range(3):
            client.sendall(frame(b"x"))
            assert read_frame(client) == b"x"
    assert [name for _, name in where.items] == ["leviathan-pin-%d" % (number // 3) for number in range(9)]
    del where.items[:]
    plain = serve()
    for number in (2, 0, 1):
        connector = server.communicator.connect(*plain.address, thread=number, tag=number)
        connector.wait(DEADLINE).send(b"y")
    where.wait(3)
    assert sorted(where.items) == [(number, "leviathan-pin-%d" % number) for number in range(3)]


@only_pinned
def test_clients_are_spread_over_all_threads(serve):
    """E1: a pool of N threads is N epolls."""
    names = Log()

    def on_packet(session, packet):
        names.add(threading.current_thread().name)
        session.send(packet)

    server = serve(on_packet=on_packet, threads=3)
    clients = [server.client() for _ in range(9)]
    for client in clients:
        client.sendall(frame(b"x"))
    for client in clients:
        assert read_frame(client) == b"x"
    assert sorted(names.items) == sorted("leviathan-%d" % (number % 3) for number in range(9))


# -- event queues -----------------------------------------------------------------------------------------------------

def test_post_runs_in_order_on_one_thread(harness):
    """I6: a queue used purely for events."""
    queue = harness.queue(1)
    ran = Log()
    for number in range(5):
        assert queue.post(ran.add, number) is True      # before the start: kept
    queue.start()
    for number in range(5, 1000):
        assert queue.post(ran.add, number) is True
    assert ran.wait(1000) == list(range(1000))
    queue.stop()
    assert queue.post(ran.add, "late") is False
    assert len(ran) == 1000


def test_what_is_posted_before_the_stop_runs(harness):
    queue = harness.queue(2)
    ran = Log()
    for number in range(500):
        queue.post(ran.add, number)
    queue.start()
    queue.stop()
    assert sorted(ran.items) == list(range(500))


def test_a_handler_posts_to_its_own_queue(harness):
    queue = harness.queue(1)
    ran = Log()
    queue.post(lambda: queue.post(lambda: queue.post(ran.add, "deep")))
    queue.start()
    assert ran.wait() == ["deep"]


def test_a_raising_event_costs_nothing(harness, caplog):
    queue = harness.queue(1)
    ran = Log()
    queue.start()
    for problem in (ValueError, SystemExit, KeyboardInterrupt):
        def fail(problem=problem):
            raise problem("event")
        queue.post(fail)
        queue.call_later(0, fail)
    queue.post(ran.add, 1)
    assert ran.wait() == [1]
    again = Log()

    def fail_again():
        again.add(1)
        raise ValueError("timer")

    queue.every(0.01, fail_again)
    again.wait(3)
    assert "fail" in caplog.text


def test_call_later_in_order_of_time(harness):
    queue = harness.queue(1)
    queue.start()
    ran = Log()
    began = time.monotonic()
    for seconds in (0.06, 0.02, 0.04, 0, -1):
        queue.call_later(seconds, ran.add, seconds)
    items = ran.wait(5)
    assert time.monotonic() - began >= 0.06 - 1e-6      # a clock of whole ticks, and floats
    assert items[2:] == [0.02, 0.04, 0.06]
    assert set(items[:2]) == {0, -1}


def test_a_timer_set_by_another_thread_wakes_the_sleeper(harness):
    queue = harness.queue(2)
    queue.start()
    ran = Log()
    queue.call_later(3600, ran.add, "hour")
    queue.call_later(0.01, ran.add, "soon")
    assert ran.wait() == ["soon"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seconds", [30 * 86400, 1e12, float("inf")])
def test_a_timer_may_be_as_far_away_as_one_likes(harness, caplog, seconds, threads):
    """Longer than one wait of the system can be, which is 24 days for epoll."""
    queue = harness.queue(threads)
    queue.start()
    ran = Log()
    never = queue.call_later(seconds, ran.add, "never")
    queue.post(ran.add, "posted")
    ran.wait(1)
    queue.call_later(0.01, ran.add, "soon")
    ran.wait(2)
    queue.call_later(0.01, ran.add, "later")            # meanwhile that one was the first again
    assert ran.wait(3) == ["posted", "soon", "later"]
    never.cancel()
    assert not caplog.records


def test_not_a_number_is_no_time(harness):
    queue = harness.queue(1)
    for when in (queue.call_later, queue.every):
        with pytest.raises(ValueError):
            when(float("nan"), print)


def test_every_repeats_until_cancelled(harness):
    queue = harness.queue(2)
    queue.start()
    ran, stopped = Log(), Log()

    def tick():
        ran.add(threading.get_ident())
        if len(ran) == 5:
            timer.cancel()
            stopped.add(True)

    timer = queue.every(0.01, tick)
    stopped.wait()
    queue.call_later(0.05, stopped.add, "later")
    stopped.wait(2)
    assert len(ran) == 5
    timer.cancel()
    with pytest.raises(ValueError):
        queue.every(0, tick)


def test_every_never_runs_twice_at_once(harness):
    queue = harness.queue(3)
    queue.start()
    inside, worst, ran = [], [], Log()

    def slow():
        inside.append(1)
        worst.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()
        ran.add(1)

    queue.every(0.005, slow)
    ran.wait(8)
    assert max(worst) == 1


def test_cancelled_timers_are_not_called(harness):
    queue = harness.queue(1)
    ran = Log()
    timers = [queue.call_later(0.01, ran.add, number) for number in range(300)]
    for timer in timers[::2]:
        timer.cancel()
        timer.cancel()
    queue.start()
    queue.call_later(0.03, ran.add, "end")
    assert sorted(map(str, ran.wait(151))) == sorted([str(number) for number in range(1, 300, 2)] + ["end"])
    assert queue.statistics()["timers"] == 0


def test_an_idle_worker_takes_events_while_others_are_blocked(harness):
    """I6, A2: with three threads, two blocked ones delay nothing."""
    queue = harness.queue(3)
    queue.start()
    release, blocked, ran = threading.Event(), Log(), Log()

    def block():
        blocked.add(threading.get_ident())
        release.wait(DEADLINE)

    queue.post(block)
    queue.post(block)
    assert len(set(blocked.wait(2))) == 2
    for number in range(100):
        queue.post(ran.add, number, threading.get_ident)
    assert [number for number, _ in ran.wait(100)] == list(range(100))
    timed = Log()
    queue.call_later(0.01, timed.add, 1)
    timed.wait()
    release.set()


def test_posts_in_one_burst_reach_several_workers(harness):
    """Each worker wakes the next while more is waiting: three events that wait for each other all run."""
    queue = harness.queue(3)
    barrier = threading.Barrier(3)
    met = Log()

    def meet():
        barrier.wait(DEADLINE)
        met.add(threading.get_ident())

    for _ in range(3):
        queue.post(meet)
    queue.start()
    assert len(set(met.wait(3))) == 3


def test_a_queue_is_started_once_and_stopped_from_outside(harness):
    queue = harness.queue(1)
    queue.start()
    queue.start()
    problems = Log()

    def stop_inside():
        try:
            queue.stop()
        except RuntimeError as error:
            problems.add(error)

    queue.post(stop_inside)
    problems.wait()
    ran = Log()
    queue.post(ran.add, 1)
    ran.wait()
    queue.stop()
    queue.stop()
    with pytest.raises(RuntimeError):
        queue.start()
    with pytest.raises(ValueError):
        leviathan.EventQueue(0)


@pytest.mark.parametrize("used", [True, False])
def test_a_stopped_queue_refuses_everything(harness, used):
    """Nothing that it cannot do any more is answered with a yes, whether it has ever done anything or not."""
    queue = harness.queue(1)
    if used:
        queue.start()
    queue.stop()
    assert queue.post(print) is False
    queue.call_later(0, print).cancel()
    server = Communicator(LengthPrefix(4), lambda session, packet: None, queue=queue, manager=harness.manager())
    with pytest.raises(OSError):
        server.listen(0)
    with pytest.raises(RuntimeError):
        server.connect("127.0.0.1", 1)
    with pytest.raises(RuntimeError):
        queue.start()
    assert (server.listeners, server.connectors) == ([], [])


def test_who_waits_for_a_connection_is_told_when_the_queue_stops(serve):
    client = serve(listen=False)
    failures, told = Log(), Log()
    connector = client.communicator.connect("127.0.0.1", free_port(), reconnect=(60.0, 60.0),
                                            on_failure=lambda connector, error: failures.add(error))
    failures.wait()

    def wait():
        try:
            connector.wait()
        except ConnectionError as error:
            told.add(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    client.queue.stop()
    told.wait()
    waiting.join(DEADLINE)


# -- stopping ---------------------------------------------------------------------------------------------------------

def test_stop_drains_eight_mebibytes_to_a_slow_reader(serve):
    """RULES, servers 5."""
    server = serve()
    client, session = server.pair(SO_RCVBUF=1 << 16)
    packet = os.urandom(1 << 20) * 8
    assert session.send(packet) is True
    stopped = Log()
    thread = threading.Thread(target=lambda: stopped.add(server.stop(30.0)), daemon=True)
    thread.start()
    data = bytearray()
    while True:
        part = client.recv(1 << 16)
        if not part:
            break
        data += part
        if len(data) % 3 == 0:
            threading.Event().wait(0.001)
    assert bytes(data) == frame(packet)
    assert stopped.wait() == [True]
    assert server.ended.items == [(session, Reason.SHUTDOWN, None)]


def test_stop_aborts_what_does_not_leave_in_time(serve):
    sent = Log()
    server = serve()
    client, session = server.pair()
    assert session.send(b"x" * (8 << 20), on_sent=lambda session, ok: sent.add(ok))
    began = time.monotonic()
    assert server.stop(0.2) is False
    assert time.monotonic() - began < 4.0
    assert sent.items == [False]
    assert server.ended.items[0][1] is Reason.SHUTDOWN


def test_idle_clients_do_not_hold_a_stop(serve):
    """cpython#104344."""
    server = serve(threads=2)
    clients = [server.client() for _ in range(30)]
    server.connected.wait(30)
    for client in clients[:10]:
        client.sendall(b"\0\0\0\5hel")              # and these are inside of a packet
    began = time.monotonic()
    assert server.stop() is True
    assert time.monotonic() - began < 4.0
    assert len(server.ended) == 30
    assert {reason for _, reason, _ in server.ended.items} == {Reason.SHUTDOWN}


def test_a_paused_session_does_not_hold_a_stop(serve):
    server = serve(on_packet=lambda session, packet: session.pause())
    client = server.client()
    client.sendall(frame(b"x") * 1000)
    eventually(lambda: "packet" in [name for name, _ in server.log.items])
    began = time.monotonic()
    assert server.stop() is True
    assert time.monotonic() - began < 4.0


def test_a_stop_waits_for_callbacks_that_return(harness):
    """Longer than its timeout: each of them does return, and what was posted before the stop is run."""
    queue = harness.queue(1)
    queue.start()
    ran = Log()

    def slow(number):
        threading.Event().wait(0.4)
        ran.add(number)

    for number in range(4):
        queue.post(slow, number)
    assert queue.stop(0.01) is True
    assert ran.items == [0, 1, 2, 3]


def test_a_handler_that_does_not_return_holds_a_stop_no_longer_than_its_timeout(serve, caplog):
    inside, release = Log(), threading.Event()

    def stuck(session, packet):
        inside.add(packet)
        release.wait(DEADLINE)

    server = serve(on_packet=stuck, threads=2)
    client = server.client()
    client.sendall(frame(b"x"))
    inside.wait()
    began = time.monotonic()
    try:
        assert server.stop(0.05) is False
        assert 0.9 < time.monotonic() - began < 5
        line, = [record.getMessage() for record in caplog.records if record.name == "leviathan"]
        assert line.startswith("on_packet_noted (") and "does not return" in line and "stays behind" in line
    finally:
        release.set()
    assert server.queue.stop() is True          # now it has
    assert server.queue.stop() is True


@pytest.mark.parametrize("kind", ["function", "in C", "of threading"])
def test_a_call_that_does_not_return_holds_a_stop_no_longer_than_its_timeout(harness, caplog, monkeypatch, kind):
    """Also what has no frame of its own, or a frame of a module that leviathan uses itself."""
    monkeypatch.setattr(leviathan, "STUCK_AFTER", 0.1)
    lock, event = threading.Lock(), threading.Event()
    lock.acquire()
    call = {"function": lambda: event.wait(DEADLINE), "in C": lock.acquire, "of threading": event.wait}[kind]
    queue = harness.queue(1)
    queue.start()
    began = Log()
    queue.post(began.add, 1)
    queue.post(call, *[] if kind == "function" else [True, DEADLINE] if kind == "in C" else [DEADLINE])
    began.wait()
    try:
        assert queue.stop(0.05) is False
        line, = [record.getMessage() for record in caplog.records if record.name == "leviathan"]
        assert {"function": "<lambda> (", "in C": "acquire (", "of threading": "wait ("}[kind] in line
    finally:
        monkeypatch.undo()
        lock.release()
        event.set()
    assert queue.stop() is True


def test_a_handler_that_closes_the_server_ends_run(harness):
    """run() also returns when every Communicator was closed."""
    def on_packet(session, packet):
        session.send(b"goodbye")
        server.close()

    server = Communicator(LengthPrefix(4), on_packet, manager=harness.manager())
    other = Communicator(LengthPrefix(4), on_packet, manager=server.manager)
    listener = server.listen(0)
    other.listen(0)
    other.close()
    ended = Log()
    thread = threading.Thread(target=lambda: ended.add(leviathan.run(server, other)), daemon=True)
    thread.start()
    client = harness.connect(listener)
    idle = harness.connect(listener)
    client.sendall(frame(b"x"))
    assert read_to_end(client) == frame(b"goodbye")
    assert read_to_end(idle) == b""
    assert ended.wait() == [True]
    thread.join(DEADLINE)


def test_stop_without_a_start(harness):
    server = Communicator(LengthPrefix(4), lambda session, packet: None, manager=harness.manager())
    server.listen(0)
    assert CommunicatorList(server).stop() is True


def test_stop_on_a_threads_own_queue_is_refused(serve):
    problems = Log()

    def on_packet(session, packet):
        try:
            server.list.stop()
        except RuntimeError as error:
            problems.add(error)
        session.send(b"alive")

    server = serve(on_packet=on_packet)
    client = server.client()
    client.sendall(frame(b"x"))
    assert read_frame(client) == b"alive"
    assert len(problems) == 1


def test_a_stop_may_come_from_a_thread_that_is_named_like_a_queue(serve, harness):
    """Whose thread it is says the thread, not its name."""
    server = serve(queue=harness.queue(1, name="leviathan-named"))
    stopped = Log()
    thread = threading.Thread(target=lambda: stopped.add(server.stop()), name="leviathan-named-0")
    thread.start()
    assert stopped.wait() == [True]
    thread.join(DEADLINE)


def test_several_protocols_in_one_process(harness):
    """A3."""
    manager = harness.manager()
    lines = Communicator(Delimited(b"\n"), lambda session, line: session.send(line[::-1]), manager=manager)
    frames = Communicator(LengthPrefix(2), lambda session, packet: session.send(packet), manager=manager)
    members = harness.add(CommunicatorList(lines, frames))
    first, second = harness.connect(lines.listen(0)), harness.connect(frames.listen(0))
    members.start()
    first.sendall(b"abc\n")
    second.sendall(b"\0\3abc")
    assert read_exactly(first, 4) == b"cba\n"
    assert read_exactly(second, 5) == b"\0\3abc"
    assert (len(members), list(members), members[1]) == (2, [lines, frames], frames)
    eventually(lambda: manager.statistics()["sessions"] == 2)


RUN = """
import sys
sys.path.insert(0, %r)
import leviathan, signal
before = signal.getsignal(signal.SIGTERM)
server = leviathan.Communicator(leviathan.LengthPrefix(4), leviathan.echo)
listener = server.listen(0)
print(listener.address[1], flush=True)
print(leviathan.run(server), signal.getsignal(signal.SIGTERM) == before,
      leviathan.default_manager().statistics()["sessions"], flush=True)
"""


def test_a_default_timeout_of_sockets_ends_nothing(harness):
    """Programs set it for urllib and its like; `run` waits for as long as it takes."""
    server = leviathan.Communicator(LengthPrefix(4), leviathan.echo, queue=harness.queue(1), manager=harness.manager())
    socket.setdefaulttimeout(0.05)
    try:
        address = server.listen(0).address
        server.queue.call_later(0.2, server.close)
        client = harness.connect(address)
        client.sendall(frame(b"x"))
        began = time.monotonic()
        assert leviathan.run(server) and time.monotonic() - began > 0.15
        assert read_frame(client) == b"x"
    finally:
        socket.setdefaulttimeout(None)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_run_and_handlers_are_restored(harness, number):
    """RULES, epoll 7."""
    with Child("-c", RUN % HERE, stdout=subprocess.PIPE) as process:
        try:
            client = harness.connect(("127.0.0.1", int(process.stdout.readline())))
            client.sendall(frame(b"x"))
            assert read_frame(client) == b"x"
            process.interrupt(number)
            assert process.stdout.readline().split() == [b"True", b"True", b"0"]
            assert process.wait(DEADLINE) == 0
            assert read_to_end(client) == b""
        finally:
            if process.poll() is None:
                process.kill()


@only_pinned
def test_listener_and_clients_on_threads_of_their_own_choice(serve):
    """E2: the listener on one epoll, its clients on another."""
    names = []
    server = serve(on_packet=lambda session, packet: session.send(threading.current_thread().name.encode()),
                   queue=leviathan.EventQueue(threads=3, name="leviathan-pinned"))
    listener = server.communicator.listen(0, thread=2, client_thread=1)
    for _ in range(4):
        with socket.create_connection(listener.address, DEADLINE) as client:
            client.sendall(frame(b"who?"))
            names.append(read_frame(client))
    assert names == [b"leviathan-pinned-1"] * 4
    assert listener.worker.thread.name == "leviathan-pinned-2"


def test_replies_to_earlier_packets_leave_though_a_later_one_makes_the_handler_raise(serve):
    """Servers 4: a raising handler costs its session, not the answers that were given before."""
    def on_packet(session, packet):
        if packet == b"boom":
            raise ValueError("on purpose")
        session.send(packet)

    server = serve(on_packet=on_packet)
    with socket.create_connection(server.address, DEADLINE) as client:
        client.sendall(frame(b"one") + frame(b"two") + frame(b"boom") + frame(b"three"))
        assert read_to_end(client) == frame(b"one") + frame(b"two")
