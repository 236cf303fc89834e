"""RESP: the rules of RULES.md by name, both parsers driven with bytes, and both sides against Redis' own programs."""
import itertools
import math
import random
import socket
import threading

import pytest

import leviathan
from conftest import Log, eventually, read_exactly, read_to_end
from leviathan import FramingError, Pipeline, Push, Reason, Resp, RespError, Verbatim
from real_redis import needed, package, real, run  # noqa: F401


# ---- driving the parsers with bytes

class Pool:
    memory_limit = 1 << 30


class Wire:
    """What a framing sees of a session, with a RecvBuf that simply grows."""

    def __init__(self, framing):
        self.framing, self.communicator, self.manager = framing, self, Pool
        self.protocol = leviathan._RespState()
        self.paused, self.partial, self.direct, self.filled, self.reason, self.error = 0, None, False, 0, None, None
        self.left, self.packets, self.failure, self.looked = b"", [], None, 0
        self.receive = framing.receiver(self.noted, self.rest, self.fail)

    @staticmethod
    def noted(session, packet):
        session.packets.append(packet)

    @staticmethod
    def rest(session, buffer, start, end):
        session.left = bytes(buffer[start:end])
        session.wanted = session.framing.need(session, buffer, start, end, 0)

    @staticmethod
    def fail(session, error):
        session.failure, session.paused = error, 8

    def feed(self, *pieces):
        """Packets so far; FramingError as the session would meet it."""
        for piece in pieces:
            data, self.left = self.left + piece, b""
            self.receive(self, data, len(data))
            if self.failure is not None:
                raise self.failure
        return self.packets


def commands(*pieces, **settings):
    return Wire(Resp(**settings)).feed(*pieces)


def replies(*pieces, **settings):
    return Wire(Resp("client", **settings)).feed(*pieces)


def refused(role, stream, **settings):
    """The error's text; it is the same when the bytes come one by one, and no packet comes of it either way."""
    texts = []
    for pieces in ([stream], [stream[at:at + 1] for at in range(len(stream))]):
        wire = Wire(Resp(role, **settings))
        with pytest.raises(FramingError) as caught:
            wire.feed(*pieces)
        assert wire.packets == []
        texts.append(str(caught.value))
    return texts[0]


def words(*items):
    return b"*%d\r\n" % len(items) + b"".join(b"$%d\r\n%b\r\n" % (len(item), item) for item in items)


COMMANDS = [
    (b"*1\r\n$4\r\nPING\r\n", [b"PING"]), (b"PING\r\n", [b"PING"]), (b"ping\n", [b"ping"]),
    (words(b"SET", b"k", b"v"), [b"SET", b"k", b"v"]),
    (words(b"SET", b"\r\n$1\r\n", b"\r\n"), [b"SET", b"\r\n$1\r\n", b"\r\n"]),
    (words(b"GET", b""), [b"GET", b""]),
    (b'"\\x6e\\x72\\x74\\x62\\x61\\x5C\\xZZ" "\\n\\x0a"\r\n', [b"nrtba\\xZZ", b"\n\n"]),      # \x6e is n, and not \n
    (b"  set  \"a b\\x41\\n\" 'it\\'s' x\"y z\"\r\n", [b"set", b"a bA\n", b"it's", b"xy z"]),
    (words(*[b"%d" % number for number in range(300)]), [b"%d" % number for number in range(300)]),
    (words(b"SET", b"k", b"x" * 5000), [b"SET", b"k", b"x" * 5000]),
]
NOTHING = [b"\r\n", b"\n", b"  \r\n", b"*0\r\n", b"*-1\r\n"]
VALUES = [
    "OK", "status", "", 0, -1, 1023, 1024, 5000, (1 << 63) - 1, -1 << 63, b"", b"bulk", b"\r\n\r\n", b"x" * 5000, None,
    True, False,
    1.5, -0.25, 1e300, 1e-7, float("inf"), float("-inf"), 1 << 70, -1 << 70, [], [[], [[1, b"a"], None]],
    {b"a": [1], b"b": {}},
    {1, b"2", "3"}, RespError("ERR no"), [RespError("WRONGTYPE no"), b"ok"], Verbatim(b"text"),
    Push([b"message", b"c", b"\r\n"]),
]


def encoded(*values, version=3):
    return b"".join(Resp().encode(value, version) for value in values)


def test_commands_however_they_are_cut():
    stream = b"".join(itertools.chain(*zip([data for data, _ in COMMANDS], itertools.cycle(NOTHING))))
    expected = [command for _, command in COMMANDS]
    assert commands(stream) == commands(*[stream[at:at + 1] for at in range(len(stream))]) == expected
    for data, command in COMMANDS:
        between = b"\r\n*0\r\n" + data + b"PING\r\n"
        for at in range(0, len(between), 1 if len(between) < 200 else 7):
            assert commands(between[:at], between[at:]) == [command, [b"PING"]]
        assert commands(data) == [command] and Resp().parse(data, 0, len(data)) == len(data)
        assert Resp().decode(data, 0, len(data)) == command


def test_every_resp3_type_however_it_is_cut():
    stream = encoded(*VALUES)
    for found in (replies(stream), replies(*[stream[at:at + 1] for at in range(len(stream))])):
        assert found == VALUES
        assert list(map(type, found)) == list(map(type, VALUES))
    for at in range(0, len(stream), 3):
        assert replies(stream[:at], stream[at:]) == VALUES
    assert math.isnan(replies(b",nan\r\n")[0])
    assert replies(b"!5\r\nERR x\r\n(12\r\n:+7\r\n,1e3\r\n") == [RespError("ERR x"), 12, 7, 1000.0]
    assert replies(b"=7\r\nmkd:# a\r\n")[0].format == "mkd"
    # What cannot be a key is made into what can.
    assert replies(b"%1\r\n*1\r\n*1\r\n:1\r\n:2\r\n~1\r\n%1\r\n:1\r\n*0\r\n") == [{((1,),): 2}, {((1, ()),)}]


def test_resp2_has_other_forms_of_the_same():
    assert encoded(None, True, False, 1.5, 3.0, 1 << 64, version=2) == \
        b"$-1\r\n:1\r\n:0\r\n$3\r\n1.5\r\n$1\r\n3\r\n$20\r\n18446744073709551616\r\n"
    assert encoded({b"k": {1}}, Push([b"a"]), Verbatim(b"x"), (1, "a\r\nb"), version=2) == \
        b"*2\r\n$1\r\nk\r\n*1\r\n:1\r\n*1\r\n$1\r\na\r\n$1\r\nx\r\n*2\r\n:1\r\n$4\r\na\r\nb\r\n"
    assert encoded(RespError("ERR a\r\nb"), bytearray(b"x"), memoryview(b"y"),
                   version=2) == b"-ERR a  b\r\n$1\r\nx\r\n$1\r\ny\r\n"
    assert replies(b"*-1\r\n$-1\r\n*0\r\n") == [None, None, []]
    with pytest.raises(TypeError):
        Resp().encode(object())


def test_attributes_stand_beside_the_reply():
    found = []
    wire = Wire(Resp("client"))
    wire.receive = wire.framing.receiver(lambda session, reply: found.append((reply, Resp.attributes(session))), wire.rest,
                                         wire.fail)
    stream = b"+a\r\n|1\r\n$3\r\nttl\r\n:9\r\n*2\r\n|0\r\n:1\r\n|1\r\n+x\r\n+y\r\n:2\r\n+b\r\n"
    for at in range(len(stream)):
        wire.feed(stream[at:at + 1])
    wire.feed(stream)
    assert found == [("a", None), ([1, 2], {b"ttl": 9}), ("b", None)] * 2


def test_what_a_client_may_send():
    assert Resp("client").encode(["SET", b"k", 1, 2.5, "é", bytearray(b"x")]) == words(b"SET", b"k", b"1", b"2.5",
                                                                                       "é".encode(), b"x")
    assert Resp("client").encode(list("abcdefghijkl")) == words(*[letter.encode() for letter in "abcdefghijkl"])
    assert Resp("client").encode(Pipeline([["A"], ("B", 1)])) == words(b"A") + words(b"B", b"1")
    for wrong in ("PING", None, 5, ["SET", "k", None], ["SET", "k", True], ["a", ["b"]]):
        with pytest.raises(TypeError):
            Resp("client").encode(wrong)
    with pytest.raises(ValueError):
        Resp("client").encode([])


def test_wrong_settings():
    for settings in ({"role": "both"}, {"max_packet": 1 << 40}, {"max_line": 1 << 17}, {"max_depth": 0}):
        with pytest.raises(ValueError):
            Resp(**settings)
    with pytest.raises(ValueError):
        Verbatim(b"", "text")


# ---- the rules of RULES.md

def test_numbers_with_the_same_hash_are_no_way_to_quadratic_time():
    """As items of a set, as keys of a map or of attributes, and within lists: 8000 took 0.35 s, 32,000 5 s."""
    def alike(count):
        return [b"(%d\r\n" % (number * ((1 << 61) - 1)) for number in range(16, 16 + count)]

    few, many = alike(leviathan.ALIKE_MAX), alike(leviathan.ALIKE_MAX + 1)
    assert len(replies(b"~%d\r\n" % len(few) + b"".join(few))[0]) == len(few)
    for stream in (b"~257\r\n" + b"".join(many), b"%257\r\n" + b":1\r\n".join(many) + b":1\r\n",
                   b"|257\r\n" + b":1\r\n".join(many) + b":1\r\n", b"~257\r\n*1\r\n" + b"*1\r\n".join(many)):
        assert refused("client", stream) == "257 keys have the same hash"
    for more in (list(range(-1000, 1000)), [b"%d" % number for number in range(1000)]):
        assert replies(encoded(set(more), dict.fromkeys(more, 1))) == [set(more), dict.fromkeys(more, 1)]


def test_numbers_whose_places_meet_are_no_way_to_quadratic_time():
    """Their hashes differ, but where a set looks for room is as well known: 165,149 took 26 s."""
    few = list(range(leviathan.NUMBERS_MAX))
    many = few + [len(few)]
    assert replies(encoded(set(few), dict.fromkeys(few, 1))) == [set(few), dict.fromkeys(few, 1)]
    for value in set(many), dict.fromkeys(many, 1), set(few) | {True, None, 2.5}:
        with pytest.raises(FramingError, match="keys are no strings"):
            replies(encoded(value))
    strings = {b"%d" % number for number in many} | {"%d" % number for number in many}
    assert replies(encoded(strings)) == [strings]


@pytest.mark.parametrize("channel", [b":1\r\n", b"(%d\r\n" % (1 << 70), b",1.5\r\n", b"*1\r\n:1\r\n", b"#t\r\n"])
def test_a_channel_is_a_string(channel):
    """Confirmed channels are kept in a set: 16,000 big numbers with one hash took seconds."""
    for kind in b"subscribe", b"unsubscribe":
        with pytest.raises(FramingError, match="a channel is "):
            replies(b">3\r\n$%d\r\n%b\r\n" % (len(kind), kind) + channel + b":1\r\n")
    wire = Wire(Resp("client"))
    for right in b"$1\r\nc\r\n", b"+c\r\n", b"_\r\n":
        wire.feed(b">3\r\n$9\r\nsubscribe\r\n" + right + b":1\r\n")
    assert wire.protocol.subscribed == {(b"", b"c"), (b"", "c"), (b"", None)}


@pytest.mark.parametrize("role, data", [("server", b"a" * 16 + b"\r\n"), ("server", b"a" * 16 + b"\n"),
                                        ("client", b"+" + b"a" * 15 + b"\r\n")])
def test_rule_a_line_has_up_to_max_line_however_it_is_cut(role, data):
    longer = data[:1] + data
    for cut in range(len(data)):
        assert len(Wire(Resp(role, max_line=16)).feed(data[:cut], data[cut:])) == 1
        with pytest.raises(FramingError, match="too big"):
            Wire(Resp(role, max_line=16)).feed(longer[:cut], longer[cut:])


def test_rule_an_inline_command_has_up_to_64_kib():
    assert commands(b"x" * 65534 + b"\r\n") == [[b"x" * 65534]]
    wire = Wire(Resp())
    wire.feed(b"x" * 65536)                             # may still be one: LF comes next
    with pytest.raises(FramingError, match="too big inline request"):
        wire.feed(b"x")
    assert refused("server", b"x" * 20 + b"\r\n", max_line=16) == "too big inline request"


def test_rule_count_lines_have_up_to_64_kib():
    assert refused("server", b"*" + b"1" * 20, max_line=16) == "too big mbulk count string"
    assert refused("server", b"*1\r\n$" + b"1" * 20, max_line=16) == "too big bulk count string"
    assert refused("client", b"*" + b"1" * 20, max_line=16) == refused("client", b"+" + b"x" * 20, max_line=16) == \
        refused("client", b"+" + b"x" * 20 + b"\r\n", max_line=16) == "too big count or status line"
    for role, start in (("server", b"*"), ("server", b"*1\r\n$"), ("client", b"$"), ("client", b"-")):
        with pytest.raises(FramingError, match="too big"):
            Wire(Resp(role)).feed(start + b"1" * 65600)


def test_rule_a_bulk_has_up_to_512_mb_and_max_packet():
    assert refused("server", b"*1\r\n$536870913\r\n") == "invalid bulk length"
    assert refused("server", b"*1\r\n$536870912\r\n").startswith("invalid bulk length: the command is over max_packet")
    assert refused("client", b"$536870913\r\n") == "invalid bulk length"
    for role in ("server", "client"):
        start = b"*1\r\n" if role == "server" else b""
        wire = Wire(Resp(role, max_packet=len(start) + 113))
        assert len(wire.feed(start + b"$105\r\n" + b"x" * 105 + b"\r\n")) == 1
        with pytest.raises(FramingError, match="max_packet"):
            wire.feed(start + b"$106\r\n")
        with pytest.raises(FramingError, match="max_packet"):          # all of it there at once
            Wire(Resp(role, max_packet=64)).feed(start + b"$60\r\n" + b"x" * 60 + b"\r\n")
        with pytest.raises(FramingError, match="max_packet"):          # many small ones
            Wire(Resp(role, max_packet=64)).feed(b"*8\r\n", *[b"$3\r\nabc\r\n"] * 8)
    assert "max_packet" in refused("client", b"*2\r\n+" + b"x" * 100, max_packet=64)


def test_rule_nesting_is_capped():
    assert replies(b"*1\r\n" * 32 + b":1\r\n") and replies(b"*1\r\n" * 4 + b":1\r\n", max_depth=4) == [[[[[1]]]]]
    assert "deeper than 4" in refused("client", b"*1\r\n" * 5, max_depth=4)
    assert "deeper than 32" in refused("client", b"%1\r\n:1\r\n" * 33)
    assert "deeper than 32" in refused("client", b"|1\r\n" * 33)
    assert replies(b"*1\r\n" * 256 + b":1\r\n", max_depth=256)
    assert replies(b"~1\r\n" * 256 + b":1\r\n", max_depth=256)         # made hashable without deep recursion
    assert replies(b"%1\r\n" * 256 + b":1\r\n" + b":1\r\n" * 256, max_depth=256)
    # A command is an array of bulks, nothing deeper.
    assert refused("server", b"*1\r\n*1\r\n") == "expected '$', got '*'"


@pytest.mark.parametrize("end", [b"\n\r", b"\r\r", b"xx", b"\n\n", b"\r\0", b"$1"])
def test_rule_a_bulk_ends_with_exactly_crlf(end):
    assert "expected CRLF" in refused("server", b"*1\r\n$4\r\nPING" + end + b"*")
    assert "expected CRLF" in refused("client", b"$4\r\nPING" + end + b"$")
    assert "expected CRLF" in refused("client", b"!4\r\nPING" + end)


def test_rule_bad_input_to_a_server_in_redis_words():
    cases = [
        (b"*1\r\nPING\r\n", "expected '$', got 'P'"), (b"*1\r\n\x00", "expected '$', got '\\x00'"),
        (b"*x\r\n", "invalid multibulk length"), (b"*1048577\r\n", "invalid multibulk length"),
        (b"*+1\r\n", "invalid multibulk length"), (b"*01\r\n", "invalid multibulk length"),
        (b"*\r\n", "invalid multibulk length"), (b"*1\n", "invalid multibulk length"),
        (b"*-x\r\n", "invalid multibulk length"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"), (b"*1\r\n$4x\r\n", "invalid bulk length"),
        (b"*1\r\n$1_0\r\n", "invalid bulk length"),
        (b"*1\r\n$ 1\r\n", "invalid bulk length"), (b"*1\r\n$4\n", "invalid bulk length"),
        (b"*1\r\n$?\r\n", "invalid bulk length"),
        (b"*1\r\n$99999999999\r\n", "invalid bulk length"),
        (b'set "a\r\n', "unbalanced quotes in request"), (b'set "a"b\r\n', "unbalanced quotes in request"),
        (b"set 'a\r\n", "unbalanced quotes in request")]
    for stream, text in cases:
        assert refused("server", stream) == text


def test_rule_bad_input_to_a_client():
    for stream in (b"HTTP/1.1", b"\0", b";4\r\n", b".\r\n", b"$?\r\n", b"*?\r\n", b"%?\r\n", b"#x\r\n", b"_x\r\n", b":\r\n",
                   b":1_0\r\n",
                   b": 1\r\n", b":1.0\r\n", b":9223372036854775808\r\n", b"::1\r\n", b"(x\r\n",
                   b"(" + b"1" * 5000 + b"\r\n", b",\r\n",
                   b",1_0.0\r\n", b",infinity\r\n", b", 1\r\n", b",1e\r\n", b",e5\r\n", b",.5\r\n", b"$-2\r\n", b"$01\r\n",
                   b"*-2\r\n",
                   b"%-1\r\n", b"+a\nb\r\n", b"-a\rb\r\n", b"=3\r\nabc\r\n", b"=4\r\n\r\n::\r\n", b"*1\r\n>1\r\n",
                   b"*999999999\r\n"):
        refused("client", stream)


# ---- no quadratic rescans

@pytest.mark.parametrize("role", ["server", "client"])
def test_a_large_array_in_small_pieces_is_read_once(role):
    """The parser is given no byte twice but those of a line that has not ended."""
    framing = Resp(role)
    looked = []
    advance = framing._advance

    def counting(state, data, pos, first, item):
        looked.append(len(data) - pos)
        return advance(state, data, pos, first, item)

    framing._advance = counting
    wire = Wire(framing)
    body = b"$3\r\nabc\r\n" * 3000
    stream = memoryview(b"*3000\r\n" + body)
    buffer = bytearray()
    for at in range(0, len(stream), 5):
        buffer += stream[at:at + 5]
        wire.receive(wire, buffer_of(buffer), len(buffer))
        assert wire.failure is None
    assert wire.packets == [[b"abc"] * 3000]
    assert sum(looked) < 4 * len(stream)


@pytest.mark.parametrize("command", [b"*1\r\n$4\r\nPING\r\n", b"PING\r\n", b'"PING"\r\n'], ids=["array", "inline", "quoted"])
def test_who_pauses_at_each_command_has_each_line_split_once(command):
    """What is left behind a pause is not split again for each command that is in it."""
    lines = []

    class Received(bytes):
        def __getitem__(self, key):
            part = bytes.__getitem__(self, key)
            return Received(part) if isinstance(part, bytes) else part

        def split(self, *separator):
            found = bytes.split(self, *separator)
            lines.append(len(found))
            return found

    wire = Wire(Resp())
    handled = []

    def pausing(session, packet):
        handled.append(packet)
        session.paused = leviathan.PAUSED_USER

    wire.receive = wire.framing.receiver(pausing, wire.rest, wire.fail)
    wire.left = command * 1000
    while wire.left:
        wire.paused, data, wire.left = 0, Received(wire.left), b""
        wire.receive(wire, data, len(data))
        assert wire.failure is None
    assert handled == [[b"PING"]] * 1000
    assert sum(lines) < 8 * 1000                        # 3 of a command at most; split at each pause, a million
    wire.receive = wire.framing.receiver(wire.noted, wire.rest, wire.fail)
    wire.paused = 0
    lines.clear()
    wire.receive(wire, Received(command * 3), len(command * 3))
    assert wire.packets == [[b"PING"]] * 3 and lines    # who pauses no more has the fast form again


def buffer_of(data):
    return data if isinstance(data, bytes) else _Slices(data)


class _Slices:
    """Slices that are bytes, as a ctypes array has them, without copying all of it."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, key):
        return bytes(memoryview(self.data)[key])


def test_a_large_bulk_takes_its_buffer_once(harness):
    server = harness.serve(Resp(), lambda session, command: session.send(len(command[2])))
    client = server.client()
    body = b"x" * (5 << 20)
    client.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % len(body))
    eventually(lambda: server.manager.statistics()["classes"].get(1 << 23, {}).get("leased"))
    client.sendall(body + b"\r\n*3\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n")
    assert read_exactly(client, 14) == b":5242880\r\n:1\r\n"
    made = {size: row["made"] for size, row in server.manager.statistics()["classes"].items()}
    assert not any(1 << 13 <= size <= 1 << 22 for size in made), made          # it did not grow through the classes
    eventually(lambda: not server.manager.statistics()["leased"] or leviathan.sys.platform == "win32")


def test_a_bulk_over_the_memory_limit_is_refused_in_words(harness):
    server = harness.serve(Resp(), manager=harness.manager(memory_limit=1 << 20))
    client = server.client()
    client.sendall(b"*1\r\n$2000000\r\n")
    assert read_to_end(client).startswith(b"-ERR Protocol error: invalid bulk length")
    assert server.ended.wait()[0][1] is Reason.PROTOCOL


def test_a_command_that_outgrows_the_pool_is_refused_in_words(harness):
    """Of many small bulks, none of which is too large."""
    server = harness.serve(Resp(), manager=harness.manager(memory_limit=1 << 16))
    client = server.client()
    client.sendall(b"*1000\r\n" + b"$100\r\n%b\r\n" % (b"x" * 100) * 900)
    answer = read_to_end(client)            # of a bulk's length, or of a buffer, as the bytes happen to come
    assert answer.startswith(b"-ERR Protocol error: ") and b" over the memory limit" in answer
    assert len(server.ended.wait()) == 1


# ---- mutations

def outcome(role, pieces):
    """(packets, error's type); anything but a FramingError is a bug."""
    wire = Wire(Resp(role, max_packet=1 << 20))
    try:
        wire.feed(*pieces)
    except FramingError:
        pass
    assert wire.failure is None or type(wire.failure) is FramingError
    return repr(wire.packets), type(wire.failure)


def samples(role):
    if role == "server":
        return [data for data, _ in COMMANDS if len(data) < 100]
    return [encoded(value) for value in VALUES if len(encoded(value)) < 100] + [b"|1\r\n+a\r\n:1\r\n*1\r\n:2\r\n"]


@pytest.mark.parametrize("role", ["server", "client"])
def test_every_prefix_is_incomplete_and_no_error(role):
    for data in samples(role):
        for at in range(len(data)):
            wire = Wire(Resp(role))
            assert wire.feed(data[:at]) == [] and wire.left == data[:at]


@pytest.mark.parametrize("role", ["server", "client"])
def test_every_single_byte_mutation(role):
    """Cut or whole, the outcome is the same, and never a traceback."""
    letters = b"\0\r\n *$+-:_#,(!=%~>|?0129\"'\\xaPi\xff"
    count = 0
    for data in samples(role):
        for at, letter in itertools.product(range(len(data)), letters):
            changed = data[:at] + bytes([letter]) + data[at + 1:] + data
            middle = count % len(changed)
            assert outcome(role, [changed]) == outcome(role, [changed[:middle], changed[middle:]]), changed
            count += 2
    assert count > 8000


@pytest.mark.parametrize("role", ["server", "client"])
def test_random_bytes(role):
    chance = random.Random(4)
    pieces = samples(role) + [b"\r\n", b"*", b"$", b"1", b"3", b"\n", b"\0", b"*2\r\n", b"$3\r\n", b">2\r\n", b"%1\r\n",
                              b"|1\r\n", b"-1"]
    for case in range(12000):
        if case % 2:
            stream = bytes(chance.choices(b"\r\n*$+-:%~>|_#(,!=0123ab \"'\\\0\xff", k=chance.randrange(1, 40)))
        else:
            stream = b"".join(chance.choices(pieces, k=chance.randrange(1, 6)))
        middle = chance.randrange(len(stream))
        assert outcome(role, [stream]) == outcome(role, [stream[:middle], stream[middle:]]), stream


# ---- a server over a real connection

def ping(session, command):
    name = command[0].upper()
    if name == b"HELLO":
        Resp.version(session, int(command[1]))
    if name == b"BOOM":
        raise RuntimeError("boom")
    session.send({b"PING": "PONG", b"HELLO": {b"proto": Resp.version(session)}, b"NULL": None, b"LATE": b"late"}.get(
        name, command[-1]))


def test_bad_input_ends_its_own_session_alone(harness):
    server = harness.serve(Resp(), ping)
    good = server.client()
    for stream, text in ((b"*1\r\n$4\r\nPINGxx", b"expected CRLF behind a bulk of 4 bytes"),
                         (b"*1\r\n:", b"expected '$', got ':'"),
                         (b'PING\r\nget "a\r\nPING\r\n', b"unbalanced quotes in request")):
        bad = server.client()
        bad.sendall(stream)
        before = b"+PONG\r\n" if stream.startswith(b"PING") else b""
        assert read_to_end(bad) == before + b"-ERR Protocol error: " + text + b"\r\n"
        good.sendall(b"PING\r\n*1\r\n$4\r\nNULL\r\n")
        assert read_exactly(good, 12) == b"+PONG\r\n$-1\r\n"
    assert [reason for _, reason, _ in server.ended.wait(3)] == [Reason.PROTOCOL] * 3


def test_the_version_is_the_sessions_own(harness):
    server = harness.serve(Resp(), ping)
    old, new = server.client(), server.client()
    new.sendall(b"HELLO 3\r\nNULL\r\n")
    assert read_exactly(new, 22) == b"%1\r\n$5\r\nproto\r\n:3\r\n_\r\n"
    old.sendall(b"NULL\r\n")
    assert read_exactly(old, 5) == b"$-1\r\n"
    with pytest.raises(ValueError):
        Resp.version(server.connected.wait(2)[0], 4)


def test_a_slow_command_is_told_and_an_idle_client_is_not(harness):
    server = harness.serve(Resp(), ping, packet_timeout=0.2)
    client = server.client()
    client.sendall(b"*2\r\n$3\r\nGET\r\n")
    assert read_to_end(client) == b"-ERR Protocol error: timeout\r\n"
    assert server.ended.wait()[0][1] is Reason.TIMEOUT
    idle = harness.serve(Resp(), ping, idle_timeout=0.1).client()
    assert read_to_end(idle) == b""


def test_pausing_in_the_middle_of_a_pipeline(harness):
    """What was received stays, in both the common form and the others."""
    for last in (b"PING\r\n", b"*1\r\n$4\r\nPING\r\n", b'"PING"\r\n'):
        seen = Log()

        def once(session, command):
            seen.add(command)
            session.pause()
            session.communicator.queue.call_later(0.005, session.resume)
            session.send(command[0])

        server = harness.serve(Resp(), once)
        client = server.client()
        client.sendall(words(b"a\r\n") + words(b"b") + b"c\r\n\r\n'd'\r\n" + last)
        assert read_exactly(client, 9 + 7 * 3 + 10) == b"$3\r\na\r\n\r\n$1\r\nb\r\n$1\r\nc\r\n$1\r\nd\r\n$4\r\nPING\r\n"
        assert len(seen) == 5


def test_a_handler_that_raises_costs_its_session(harness):
    server = harness.serve(Resp(), ping)
    client = server.client()
    client.sendall(b"PING\r\nBOOM\r\nPING\r\n")
    assert read_to_end(client) == b"+PONG\r\n"
    assert server.ended.wait()[0][1] is Reason.ERROR


def test_replies_from_other_threads_and_large_ones(harness):
    big = b"x" * 300000

    def handler(session, command):
        session.send(big)
        threading.Thread(target=session.send, args=(b"late",), name="late").start()

    server = harness.serve(Resp(), handler)
    client = server.client()
    client.sendall(b"GO\r\n")
    expected = encoded(big, b"late")
    assert read_exactly(client, len(expected)) == expected


# ---- a client

class Link:
    """A Resp client, connected; `unasked` has what no callback took."""

    def __init__(self, harness, address, **settings):
        self.unasked, self.pushes, self.ended = Log(), Log(), Log()
        settings.setdefault("on_push", lambda session, push: self.pushes.add(push))
        self.resp = Resp("client", **settings)
        self.communicator = leviathan.Communicator(
            self.resp, lambda session, reply: self.unasked.add(reply), queue=harness.queue(), manager=harness.manager(),
            on_disconnect=lambda session, reason, error: self.ended.add(reason))
        self.connector = self.communicator.connect(*address)
        harness.add(leviathan.CommunicatorList(self.communicator)).start()
        self.session = self.connector.wait(10)

    def call(self, *command):
        """A Log that gets the reply."""
        log = Log()
        assert self.resp.call(self.session, command[0] if isinstance(command[0], Pipeline) else command,
                              lambda session, reply: log.add([reply]))
        return log

    def ask(self, *command):
        return self.resp.ask(self.session, command[0] if isinstance(command[0], Pipeline) else command)


class Scripted:
    """A server that sends what the test says."""

    def __init__(self, harness, **settings):
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            listening.settimeout(10)
            self.link = Link(harness, listening.getsockname(), **settings)
            self.socket = harness.keep(listening.accept()[0])
            self.socket.settimeout(10)

    def sends(self, data, bytewise=False):
        for piece in [data[at:at + 1] for at in range(len(data))] if bytewise else [data]:
            self.socket.sendall(piece)


@pytest.mark.parametrize("bytewise", [False, True])
def test_replies_are_matched_in_order(harness, bytewise):
    server = Scripted(harness)
    link = server.link
    link.session.send(["A"])
    first, both, last = link.call("B"), link.call(Pipeline([["C"], ["D"], ["E"]])), link.call("F")
    link.session.send(Pipeline([["G"], ["H"]]))
    assert read_exactly(server.socket, 11 * 8) == b"".join(words(letter.encode()) for letter in "ABCDEFGH")
    server.sends(b"+a\r\n$1\r\nb\r\n:3\r\n*1\r\n:4\r\n-ERR e\r\n_\r\n+g\r\n$2\r\n\r\n\r\n+unasked\r\n", bytewise)
    assert link.unasked.wait(3) == ["a", ["g", b"\r\n"], "unasked"]
    assert first.items == [[b"b"]] and both.items == [[[3, [4], RespError("ERR e")]]] and last.items == [[None]]


def test_all_who_wait_are_told_when_the_connection_ends(harness):
    server = Scripted(harness)
    link = server.link
    asked = Log()

    def ask():
        try:
            link.ask("SLOW")
        except ConnectionError as error:
            asked.add(error)

    waiting = [link.call("A"), link.call(Pipeline([["B"], ["C"]])), link.call("SUBSCRIBE", "x")]
    link.session.send(["D"])
    thread = threading.Thread(target=ask)
    thread.start()
    read_exactly(server.socket, len(words(b"SLOW")) + 33 + len(words(b"SUBSCRIBE", b"x")) + 11)
    server.sends(b"+a\r\n+half\r\n")
    eventually(lambda: waiting[0].items == [["a"]])
    server.socket.close()
    for log in waiting[1:]:
        (error,), = log.wait()
        assert type(error) is ConnectionError and "before the reply" in str(error)
    assert "before the reply" in str(asked.wait()[0])
    thread.join()
    link.ended.wait()
    assert not link.resp.call(link.session, ["LATE"], print) and not link.session.send(["LATE"])
    with pytest.raises(ConnectionError):
        link.ask("LATE")
    assert link.unasked.items == []


def test_a_callback_that_raises_at_the_end_keeps_none_from_being_told(harness):
    server = Scripted(harness)
    server.link.resp.call(server.link.session, ["A"], lambda session, reply: 1 / 0)
    other = server.link.call("B")
    server.socket.close()
    assert type(other.wait()[0][0]) is ConnectionError
    server.link.ended.wait()


def test_ask_waits_not_on_the_queues_own_thread(harness):
    server = Scripted(harness)
    log = Log()

    def inside():
        try:
            server.link.ask("A")
        except RuntimeError as error:
            log.add(error)

    server.link.communicator.queue.post(inside)
    assert "own thread" in str(log.wait()[0])
    with pytest.raises(TimeoutError):
        server.link.resp.ask(server.link.session, ["A"], timeout=0.05)
    with pytest.raises(TypeError):
        Resp().call(server.link.session, ["A"])
    with pytest.raises(ValueError):
        server.link.call(Pipeline([]))
    with pytest.raises(ValueError):
        server.link.call(Pipeline([["SUBSCRIBE", "x"]]))


def test_nonsense_from_a_server_ends_the_session(harness):
    server = Scripted(harness)
    waiting = server.link.call("A")
    server.sends(b"HTTP/1.1 200 OK\r\n")
    assert server.link.ended.wait() == [Reason.PROTOCOL]
    assert type(waiting.wait()[0][0]) is ConnectionError


def test_many_threads_on_one_connection_get_their_own_replies(harness):
    server = harness.serve(Resp(), lambda session, command: session.send(command[1]))
    link = Link(harness, server.address)
    wrong = Log()

    def work(name):
        for number in range(50):
            word = b"%d %d" % (name, number)
            if link.ask("ECHO", word) != word or link.ask(Pipeline([["ECHO", word], ["ECHO", name]])) != [word, b"%d" % name]:
                wrong.add(word)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not len(wrong)


def test_a_client_that_pauses_loses_no_reply(harness):
    server = Scripted(harness)
    link = server.link
    found = Log()

    def slow(session, reply):
        found.add([reply])
        session.pause()
        session.communicator.queue.call_later(0.005, session.resume)

    for number in range(6):
        link.resp.call(link.session, ["A"], slow)
    server.sends(b"+OK\r\n$1\r\na\r\n:5000\r\n*1\r\n:1\r\n$2\r\n\r\n\r\n+b\r\n")
    assert found.wait(6) == [["OK"], [b"a"], [5000], [[1]], [b"\r\n"], ["b"]]


def test_a_client_reads_on_though_much_is_unsent(harness):
    """Else a server that does not read before its replies are taken, and the client, wait for each other for ever."""
    pressure, got = Log(), Log()
    server = harness.serve(Resp(), lambda session, command: session.send(command[1]), send_limit=1 << 27)
    link = Link(harness, server.address)
    link.communicator.on_backpressure = lambda session, congested: pressure.add(congested)
    value = b"v" * (1 << 16)
    pipeline = Pipeline([["ECHO", value]] * 500)
    assert link.resp.call(link.session, pipeline, lambda session, reply: got.add(reply))
    assert got.wait() == [[value] * 500]
    assert pressure.wait(2) == [True, False]


def test_subscriber_mode_of_resp2(harness):
    server = Scripted(harness)
    link = server.link
    before, subscribed, after = link.call("LRANGE"), link.call("SUBSCRIBE", "a", "b"), link.call("PING")
    server.sends(b"*3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$1\r\ny\r\n")                  # LRANGE's, and looks like one
    assert before.wait() == [[[b"message", b"x", b"y"]]] and not len(link.pushes)
    server.sends(b"".join(encoded([b"subscribe", name, count], version=2) for name, count in ((b"a", 1), (b"b", 2))))
    assert subscribed.wait() == [[[b"subscribe", b"b", 2]]]
    server.sends(encoded([b"message", b"a", b"hi"], [b"pong", b""], version=2))
    assert after.wait() == [[[b"pong", b""]]]
    gone, pong = link.call("UNSUBSCRIBE"), link.call("LRANGE")
    server.sends(encoded([b"unsubscribe", b"a", 1], [b"unsubscribe", b"b", 0], [b"message", b"x"], version=2))
    assert gone.wait() == [[[b"unsubscribe", b"b", 0]]] and pong.wait() == [[[b"message", b"x"]]]
    assert [type(push) for push in link.pushes.items] == [Push] * 5
    assert [push.kind for push in link.pushes.items] == [b"subscribe", b"subscribe", b"message", b"unsubscribe",
                                                         b"unsubscribe"]
    refused_ = link.call("SUBSCRIBE", "c")
    none = link.call("UNSUBSCRIBE")
    server.sends(b"-NOPERM no\r\n" + encoded([b"unsubscribe", None, 0], version=2))
    assert refused_.wait() == [[RespError("NOPERM no")]] and none.wait() == [[[b"unsubscribe", None, 0]]]


def test_a_server_that_confirms_what_nobody_asked_for_fills_no_memory(harness, monkeypatch):
    monkeypatch.setattr(leviathan, "SUBSCRIBED_MAX", 50)
    server = Scripted(harness)
    server.sends(b"".join(encoded(Push([b"subscribe", b"%d" % number, number])) for number in range(51)))
    assert server.link.ended.wait() == [Reason.PROTOCOL]


FORGED = [b"message", b"a", b"forged"]          # a list that somebody has pushed, as LRANGE gives it


def test_reset_ends_the_subscriptions(harness):
    """A list that looks like a message is a reply again; and before RESET is answered it is none."""
    server = Scripted(harness)
    link = server.link
    subscribed, reset, after = link.call("SUBSCRIBE", "a"), link.call("RESET"), link.call("LRANGE")
    server.sends(encoded([b"subscribe", b"a", 1], FORGED, "RESET", FORGED, version=2))
    assert subscribed.wait() == [[[b"subscribe", b"a", 1]]] and reset.wait() == [["RESET"]] and after.wait() == [[FORGED]]
    assert link.pushes.items == [[b"subscribe", b"a", 1], FORGED] and link.unasked.items == []
    # It ends the version 3, too: messages are arrays from then on.
    link.call("HELLO", 3), link.call("RESET")
    again = link.call("SUBSCRIBE", "a")
    server.sends(encoded({b"proto": 3}, Push([b"message", b"b", b"x"])))
    server.sends(encoded("RESET", [b"subscribe", b"a", 1], version=2))
    assert again.wait() == [[[b"subscribe", b"a", 1]]]
    pong = link.call("PING")
    server.sends(encoded(FORGED, [b"pong", b""], version=2))
    assert pong.wait() == [[[b"pong", b""]]] and link.pushes.items[-1] == FORGED


def test_a_reset_that_is_refused_ends_nothing(harness):
    server = Scripted(harness)
    link = server.link
    link.call("SUBSCRIBE", "a"), link.call("RESET")
    pong = link.call("PING")
    server.sends(encoded([b"subscribe", b"a", 1], RespError("NOPERM no"), FORGED, [b"pong", b""], version=2))
    assert pong.wait() == [[[b"pong", b""]]] and link.pushes.items == [[b"subscribe", b"a", 1], FORGED]


def test_hello_says_how_messages_come_from_then_on(harness):
    """As RESP2's arrays or as pushes; the subscriptions stay."""
    server = Scripted(harness)
    link = server.link
    for command in (["HELLO", 3], ["SUBSCRIBE", "a"], ["hello", b"2"]):
        link.call(*command)
    pong = link.call("PING")
    server.sends(encoded({b"proto": 3}, Push([b"subscribe", b"a", 1])))
    server.sends(encoded({b"proto": 2}, FORGED, [b"pong", b""], version=2))
    assert pong.wait() == [[[b"pong", b""]]] and link.pushes.items[1:] == [FORGED]
    other = Scripted(harness)
    other.link.call("SUBSCRIBE", "a"), other.link.call("HELLO", 3)
    listed = other.link.call("LRANGE")
    other.sends(encoded([b"subscribe", b"a", 1], version=2) + encoded({b"proto": 3}, FORGED))
    assert listed.wait() == [[FORGED]]                  # no push: in RESP3 it is what was asked for
    refused_, listed = other.link.call("HELLO", 4), other.link.call("LRANGE")
    other.sends(encoded(RespError("NOPROTO unsupported protocol version"), FORGED))
    assert refused_.wait()[0][0].code == "NOPROTO" and listed.wait() == [[FORGED]]
    batch = other.link.call(Pipeline([["HELLO", 3], ["PING"]]))
    other.sends(encoded({b"proto": 3}, "PONG"))
    assert batch.wait() == [[[{b"proto": 3}, "PONG"]]]
    # Within a Pipeline it is not looked at; then the next confirmation says the same.
    other.link.call("HELLO", 3), other.link.call(Pipeline([["HELLO", 2], ["PING"]]))
    subscribed, pong = other.link.call("SUBSCRIBE", "b"), other.link.call("PING")
    other.sends(encoded({b"proto": 3}, Push([b"message", b"a", b"x"])))
    other.sends(encoded({b"proto": 2}, "PONG", [b"subscribe", b"b", 2], FORGED, [b"pong", b""], version=2))
    assert subscribed.wait() == [[[b"subscribe", b"b", 2]]] and pong.wait() == [[[b"pong", b""]]]
    with pytest.raises(ValueError):
        other.link.call(Pipeline([["RESET"]]))


def test_after_a_false_no_callback_is_called():
    """Not even when the connection ends a moment later, which tells all others."""
    class Full:
        """A session that takes one command, and then no more."""
        protocol, reason, error, taken = None, None, None, 0

        def put(self, data, on_sent=None):
            self.taken += 1
            return self.taken == 1

    session, told = Full(), Log()
    resp = Resp("client")
    resp.begin(session)
    assert resp.call(session, ["A"], lambda session, reply: told.add("taken"))
    for command in (["B"], Pipeline([["C"], ["D"]]), ["SUBSCRIBE", "x"]):
        assert resp.call(session, command, lambda session, reply: told.add("refused")) is False
    resp.closed(session)
    assert told.items == ["taken"]


def test_pushes_of_resp3_go_between_the_replies(harness):
    server = Scripted(harness)
    link = server.link
    first, batch = link.call("A"), link.call(Pipeline([["B"], ["C"]]))
    server.sends(b">2\r\n+invalidate\r\n*0\r\n+a\r\n:1\r\n>1\r\n$1\r\nx\r\n:2\r\n")
    assert first.wait() == [["a"]] and batch.wait() == [[[1, 2]]]
    assert link.pushes.items == [["invalidate", []], [b"x"]]
    other = Scripted(harness, on_push=None)
    other.sends(b">1\r\n+x\r\n")
    assert type(other.link.unasked.wait()[0]) is Push


# ---- INI

def test_ini(tmp_path, harness):
    path = tmp_path / "resp.ini"
    path.write_text("[HEADER_1]\nTYPE=resp\nMAX_PACKET=1m\n[HEADER_2]\nTYPE=RESP\nROLE=client\n"
                    "[COMUNICATOR_1]\nHEADER=HEADER_1\n[COMUNICATOR_2]\nHEADER=HEADER_2\n")
    members = harness.add(leviathan.CommunicatorList.from_ini(str(path), {1: ping, 2: ping}))
    first, second = (communicator.framing for communicator in members)
    assert (first.role, first.max_packet, second.role) == ("server", 1 << 20, "client")
    path.write_text("[HEADER]\nTYPE=resp\nMAX_PACKET=2\n[COMUNICATOR_1]\n")
    with pytest.raises(leviathan.ConfigError, match="MAX_PACKET"):
        leviathan.CommunicatorList.from_ini(str(path), {1: ping})


# ---- Redis' own programs

def test_client_with_a_real_redis(harness, real):  # noqa: F811
    link = Link(harness, real.address)
    assert link.ask("SET", "k", b"\r\n\0") == "OK" and link.ask("GET", "k") == b"\r\n\0"
    assert link.ask("GET", "none") is None and link.ask("INCRBY", "n", 5000) == 5000
    assert link.ask("INCR", "k").code == "ERR" and link.ask("LPUSH", "k", 1).code == "WRONGTYPE"
    assert link.ask(Pipeline([["SET", "n", i] for i in range(1000)] + [["GET", "n"]])) == ["OK"] * 1000 + [b"999"]
    assert link.ask("RPUSH", "l", *range(5000)) == 5000
    assert link.ask("LRANGE", "l", 0, -1) == [b"%d" % i for i in range(5000)]
    big = bytes(range(256)) * 20000
    assert link.ask("SET", "big", big) == "OK" and link.ask("GET", "big") == big
    assert link.ask(Pipeline([["MULTI"], ["INCR", "c"], ["GET", "k"], ["EXEC"]])) == ["OK", "QUEUED", "QUEUED", [1, b"\r\n\0"]]
    assert link.ask("HSET", "h", "a", 1.5) == 1 and link.ask("HGETALL", "h") == [b"a", b"1.5"]
    assert link.ask("HELLO", 3)[b"proto"] == 3
    assert link.ask("HGETALL", "h") == {b"a": b"1.5"} and link.ask("GET", "none") is None
    assert link.ask("ZADD", "z", 1.25, "a") == 1 and link.ask("ZSCORE", "z", "a") == 1.25
    assert link.ask("SADD", "s", 1, 2) == 2 and link.ask("SMEMBERS", "s") == {b"1", b"2"}
    assert len(link.ask("COMMAND")) > 100 and type(link.ask("COMMAND", "DOCS", "GET")) is dict
    expected = [("string", '"x"'), ("integer", 12345), ("double", 3.141), ("null", None), ("true", True), ("false", False),
                ("bignum", 1234567999999999999999999999999999999), ("map", {0: False, 1: True, 2: False}), ("set", {0, 1, 2})]
    for name, value in expected[1:]:
        assert link.ask("DEBUG", "PROTOCOL", name) == value or link.ask("DEBUG", "PROTOCOL", name).code == "ERR", name


def test_subscriptions_with_a_real_redis(harness, real):  # noqa: F811
    for protocol in (2, 3):
        link, other = Link(harness, real.address), Link(harness, real.address)
        link.ask("HELLO", protocol)
        assert link.ask("SUBSCRIBE", "a", "b") == [b"subscribe", b"b", 2]
        assert link.ask("PSUBSCRIBE", "a*") == [b"psubscribe", b"a*", 3]
        assert other.ask("PUBLISH", "a", "hi") == 2
        assert link.pushes.wait(5)[3:] == [[b"message", b"a", b"hi"], [b"pmessage", b"a*", b"a", b"hi"]]
        assert link.ask("UNSUBSCRIBE")[2] == 1 and link.ask("PUNSUBSCRIBE", "a*") == [b"punsubscribe", b"a*", 0]
        assert link.ask("GET", "none") is None and link.unasked.items == []
        # Subscriptions outlive HELLO, and RESET ends them.
        link.ask("SUBSCRIBE", "a")
        if protocol == 3:
            link.ask("HELLO", 2)
        heard = len(link.pushes) + 1
        assert other.ask("PUBLISH", "a", "again") == 1
        assert link.pushes.wait(heard)[-1] == [b"message", b"a", b"again"] and link.ask("PING") == [b"pong", b""]
        assert link.ask("RESET") == "RESET" and other.ask("PUBLISH", "a", "nobody") == 0
        other.ask("DEL", "l"), other.ask("RPUSH", "l", *FORGED)
        assert link.ask("LRANGE", "l", 0, -1) == FORGED and len(link.pushes) == heard and link.unasked.items == []


def test_pending_requests_when_a_real_redis_stops(harness, real):  # noqa: F811
    link = Link(harness, real.address)
    waiting = link.call("BLPOP", "nothing", 0)
    assert link.session.send(["PING"])
    real.stop()
    assert type(waiting.wait()[0][0]) in (ConnectionError, RespError)
    link.ended.wait()


def test_redis_cli_and_benchmark_with_a_server(harness):
    server = harness.serve(Resp(), ping)
    assert run(needed("redis-cli"), "-p", server.address[1], "echo", "a b").strip() == "a b"
    out = run(needed("redis-benchmark"), "-p", server.address[1], "-c", 20, "-n", 2000, "-P", 16, "-q", "-t", "ping,set,get")
    assert out.count("requests per second") == 4, out


def test_the_redis_package_with_a_server(harness):
    redis = package("redis")
    server = harness.serve(Resp(), lambda session, command: session.send(
        "OK" if command[0] in (b"CLIENT", b"SET") else {b"proto": Resp.version(session, int(command[1]))}
        if command[0] == b"HELLO" else b"x" * 100000 if command[0] == b"GET" else "PONG"))
    with redis.Redis(port=server.address[1], protocol=3) as client:
        assert client.ping() and client.set("k", "v") and client.get("k") == b"x" * 100000
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(100):
                pipeline.set("k", "v" * 1000)
            assert pipeline.execute() == [True] * 100
