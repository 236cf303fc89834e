"""Framings on bytes alone (H1, H2, H4): no socket, no thread."""
import ctypes
import random
import socket
import struct

import pytest

import leviathan
from conftest import read_exactly, read_to_end
from leviathan import Delimited, FixedSize, FramingError, Function, LengthPrefix, Raw, TextLength

CONTENTS = [b"hello", b"", b"x", b"a" * 40, b"\0\xff,:\n", b"12,34", b"", b"last"]


def plain_parse(view):
    """A function of the user's: one byte of length, counting itself."""
    return view[0] if len(view) else 0


def build(framing, content):
    """The stream's bytes for *content*, made without the framing's own encode."""
    if isinstance(framing, LengthPrefix):
        head = b"HEADERHEADER"[:framing.offset]
        return head + (len(content) - framing.adjust).to_bytes(framing.size, framing.byteorder) + content
    if isinstance(framing, TextLength):
        return str(len(content)).encode() + framing.end + content + framing.trailer
    if isinstance(framing, Delimited):
        return content + framing.delimiter
    if isinstance(framing, FixedSize):
        return content
    return bytes([len(content) + 1]) + content          # plain_parse


def contents_for(framing):
    if isinstance(framing, Delimited):
        odd = b"a\rb" if framing.delimiter == b"\r\n" else b"ab"
        return [content.replace(b"\n", b"").replace(b"\r", b"") for content in CONTENTS] + [odd]
    if isinstance(framing, FixedSize):
        return [bytes([65 + index]) * framing.size for index in range(6)]
    if isinstance(framing, LengthPrefix) and framing.adjust > 0:
        return [content for content in CONTENTS if len(content) >= framing.adjust]
    return CONTENTS


def expected(framing, content):
    """What the handler is to get."""
    stripped = getattr(framing, "strip", False) or isinstance(framing, FixedSize)
    return content if stripped else build(framing, content)


FRAMINGS = {}
for _size in range(1, 9):
    for _order in ("big", "little"):
        for _strip in (True, False):
            FRAMINGS["prefix%d-%s-%s" % (_size, _order, "strip" if _strip else "whole")] = LengthPrefix(
                _size, byteorder=_order, strip=_strip)
for _adjust in (-4, -1, 1):
    for _strip in (True, False):
        FRAMINGS["prefix4-adjust%d-%s" % (_adjust, "strip" if _strip else "whole")] = LengthPrefix(
            4, adjust=_adjust, strip=_strip)
FRAMINGS["prefix2-offset3-whole"] = LengthPrefix(2, offset=3, strip=False)
FRAMINGS["prefix2-little-offset5-adjust-7-whole"] = LengthPrefix(
    2, byteorder="little", offset=5, adjust=-7, strip=False)
for _strip in (True, False):
    _name = "strip" if _strip else "whole"
    FRAMINGS["text-comma-" + _name] = TextLength(b",", strip=_strip)
    FRAMINGS["text-newline-" + _name] = TextLength(b"\n", strip=_strip)
    FRAMINGS["netstring-" + _name] = TextLength(b":", trailer=b",", strip=_strip)
    FRAMINGS["text-crlf-trailer-" + _name] = TextLength(b";", trailer=b"\r\n", strip=_strip)
    FRAMINGS["lines-" + _name] = Delimited(b"\n", strip=_strip)
    FRAMINGS["crlf-" + _name] = Delimited(b"\r\n", strip=_strip)
    FRAMINGS["end-marker-" + _name] = Delimited(b"--END--", strip=_strip)
FRAMINGS["fixed1"] = FixedSize(1)
FRAMINGS["fixed7"] = FixedSize(7)
FRAMINGS["function"] = Function(plain_parse)

every_framing = pytest.mark.parametrize("framing", list(FRAMINGS.values()), ids=list(FRAMINGS))


def by_split(framing, parts):
    """Drive framing.split as the core does: keep the rest, and say how much of it was seen."""
    packets = []
    rest = b""
    seen = 0
    for part in parts:
        rest += part
        start = 0
        for packet, start in framing.split(rest, 0, len(rest), seen):
            packets.append(packet)
        rest = rest[start:]
        if rest:
            need = framing.parse(rest, 0, len(rest), seen if not start else 0)
            assert need == 0 or need > len(rest)
        seen = len(rest)
    return packets, rest


class FakeSession:
    """What framing.receiver asks of a session."""

    def __init__(self):
        self.seen = 0
        self.paused = 0
        self.partial = None


class Receiving:
    """Drive framing.receiver: `rest` and `fail` noted, the rest kept in a ctypes-like buffer in front of what comes."""

    def __init__(self, framing, on_packet=None):
        self.session = FakeSession()
        self.packets = []
        self.errors = []
        self.kept = b""
        self.on_packet = on_packet or (lambda session, packet: self.packets.append(packet))
        self.receive = framing.receiver(lambda session, packet: self.on_packet(session, packet), self._rest, self._fail)

    def _rest(self, session, buffer, start, end):
        assert start <= end
        self.kept = bytes(buffer[start:end])
        session.seen = len(self.kept)
        session.partial = self.kept or None

    def _fail(self, session, error):
        self.errors.append(error)
        session.paused |= leviathan.PAUSED_ENDED

    def feed(self, part):
        data = self.kept + part
        # As in a server: a ctypes array that is larger than what it holds, with old bytes behind the end.
        array = leviathan._ARRAYS[leviathan._power(len(data) + 8)]()
        array[:len(data)] = data
        array[len(data):len(data) + 8] = b"\n,9;\r\n1,"
        whole = not self.kept
        self.kept = b""
        self.receive(self.session, array, len(data))
        if not self.kept and whole:
            assert self.session.partial is None
        return self


def by_receiver(framing, parts):
    driven = Receiving(framing)
    for part in parts:
        driven.feed(part)
    assert driven.errors == []
    return driven.packets, driven.kept


def cuts(stream):
    """Ways to cut a stream: whole, in two at every position, byte by byte, at random."""
    yield [stream]
    for at in range(1, len(stream)):
        yield [stream[:at], stream[at:]]
    yield [stream[at:at + 1] for at in range(len(stream))]
    dice = random.Random(7878)
    for _ in range(20):
        places = sorted({0, len(stream)} | {dice.randrange(len(stream) + 1) for _ in range(dice.randrange(1, 12))})
        yield [stream[a:b] for a, b in zip(places, places[1:])]


@every_framing
@pytest.mark.parametrize("drive", [by_split, by_receiver])
def test_same_packets_however_the_stream_is_cut(framing, drive):
    """A1, H1, H2, H4."""
    contents = contents_for(framing)
    stream = b"".join(build(framing, content) for content in contents)
    wanted = [expected(framing, content) for content in contents]
    for parts in cuts(stream):
        packets, rest = drive(framing, parts)
        assert packets == wanted
        assert rest == b""
        assert all(type(packet) is bytes for packet in packets)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_size_that_came_alone_before_says_nothing_of_what_comes_now(size):
    """The receiver unpacks a packet that comes alone at once, by its size: as many bytes may be something else."""
    framing = LengthPrefix(size)
    for content in range(100):
        alone = framing.encode(b"a" * content)
        two = framing.encode(b"b") + framing.encode(b"c" * (content - size - 1)) if content > size else alone
        beginning = framing.encode(b"d" * (content + 1))[:-1]
        driven = Receiving(framing)
        for stream in alone, alone, two, alone, beginning:
            driven.feed(stream)
        between = [b"b", b"c" * (content - size - 1)] if content > size else [b"a" * content]
        assert driven.packets == [b"a" * content] * 2 + between + [b"a" * content] and driven.kept == beginning
        driven.feed(b"d")
        assert driven.packets[-1] == b"d" * (content + 1) and not driven.errors


def test_the_sizes_that_are_unpacked_at_once_are_bounded(monkeypatch):
    made = []

    def watched(code, make=struct.Struct):
        made.append(code)
        return make(code)

    driven = Receiving(LengthPrefix(4))
    monkeypatch.setattr(leviathan.struct, "Struct", watched)
    for content in range(4 * leviathan.LONE_SIZES):
        for _ in range(2):
            driven.feed(struct.pack("!I", content) + bytes(content))
    assert [len(packet) for packet in driven.packets[::2]] == list(range(4 * leviathan.LONE_SIZES))
    assert len(made) == leviathan.LONE_SIZES


@every_framing
def test_incomplete_last_packet_is_kept(framing):
    contents = contents_for(framing)
    content = max(contents, key=len)
    packet = build(framing, content)
    for length in range(len(packet)):
        for drive in (by_split, by_receiver):
            packets, rest = drive(framing, [packet + packet[:length]] if length else [packet])
            assert packets == [expected(framing, content)]
            assert rest == packet[:length]


@every_framing
def test_encode_is_the_inverse_of_decode(framing):
    for content in contents_for(framing):
        given = expected(framing, content)
        encoded = framing.encode(given)
        assert encoded == build(framing, content)
        assert type(encoded) is bytes
        assert by_split(framing, [encoded]) == ([given], b"")
        for form in (bytearray, memoryview):
            assert framing.encode(form(given)) == encoded


@every_framing
def test_parse_says_the_same_at_any_offset_of_a_buffer(framing):
    content = max(contents_for(framing), key=len)
    packet = build(framing, content)
    for shift in (0, 1, 5):
        buffer = b"~" * shift + packet + packet
        assert framing.parse(buffer, shift, len(buffer)) == len(packet)
        assert framing.decode(buffer, shift, shift + len(packet)) == expected(framing, content)


@every_framing
def test_a_view_of_memory_will_do_as_buffer(framing):
    """Function gets a memoryview; the others take any buffer whose slices are bytes."""
    stream = b"".join(build(framing, content) for content in contents_for(framing))
    array = (leviathan._ARRAYS[leviathan._power(len(stream))])()
    array[:len(stream)] = stream
    packets = [packet for packet, _ in framing.split(array, 0, len(stream))]
    assert packets == [expected(framing, content) for content in contents_for(framing)]


def test_slices_of_a_buffer_are_those_of_bytes():
    """PyPy's buffers take their slices in a way of their own; it is tried on every Python."""
    data = bytes(range(16))
    array = type("Sliced", (leviathan._Sliced, ctypes.c_char * 16), {}).from_buffer_copy(data)
    bounds = [None, *range(-18, 19)]
    for start in bounds:
        for stop in bounds:
            assert array[start:stop] == data[start:stop]
    assert array[::2] == data[::2] and array[10:2:-1] == data[10:2:-1] and array[15] == data[15:]
    with pytest.raises(IndexError):
        array[16]
    assert type(leviathan._ARRAYS[4]()[0:4]) is bytes and memoryview(array).nbytes == 16


@every_framing
@pytest.mark.parametrize("bit", [leviathan.PAUSED_USER, leviathan.PAUSED_ENDED])
def test_receiver_stops_after_the_packet_that_paused_it(framing, bit):
    """What follows is given to `rest`, whole, and comes first after the pause."""
    contents = contents_for(framing)[:3]
    stream = b"".join(build(framing, content) for content in contents)
    driven = Receiving(framing)

    def on_packet(session, packet):
        driven.packets.append(packet)
        session.paused = bit

    driven.on_packet = on_packet
    driven.feed(stream)
    assert driven.packets == [expected(framing, contents[0])]
    assert driven.kept == b"".join(build(framing, content) for content in contents[1:])
    for number in (2, 3):
        driven.session.paused = driven.session.seen = 0
        driven.feed(b"")
        assert driven.packets == [expected(framing, content) for content in contents[:number]]


@every_framing
def test_a_raising_handler_is_reported_and_nothing_more_handed_on(framing):
    contents = contents_for(framing)[:3]
    problem = KeyError("handler")
    driven = Receiving(framing)

    def on_packet(session, packet):
        driven.packets.append(packet)
        raise problem

    driven.on_packet = on_packet
    driven.feed(b"".join(build(framing, content) for content in contents))
    assert driven.errors == [problem]
    assert len(driven.packets) == 1


def test_raw_hands_on_whatever_came():
    framing = Raw()
    for drive in (by_split, by_receiver):
        assert drive(framing, [b"ab", b"c", b"defg"]) == ([b"ab", b"c", b"defg"], b"")
    assert framing.encode(b"xyz") == b"xyz"


# -- what is no packet ------------------------------------------------------------------------------------------------

BAD = {
    "prefix over max_packet": (LengthPrefix(4, max_packet=100), struct.pack(">I", 97)),
    "prefix1 over max_packet": (LengthPrefix(1, max_packet=100), b"\xff"),
    "prefix3 over max_packet": (LengthPrefix(3, max_packet=100), b"\0\0\x62"),
    "prefix little over max_packet": (LengthPrefix(2, byteorder="little", max_packet=100), b"\x00\x01"),
    "prefix8 of all ones": (LengthPrefix(8), b"\xff" * 8),
    "prefix whole over max_packet": (LengthPrefix(4, strip=False, max_packet=100), struct.pack(">I", 97)),
    "prefix with offset over max_packet": (LengthPrefix(2, offset=2, strip=False, max_packet=100), b"ab\0\x61"),
    "prefix does not cover itself": (LengthPrefix(4, adjust=-4), struct.pack(">I", 3)),
    "prefix of zero does not cover itself": (LengthPrefix(2, adjust=-2, strip=False), b"\0\0"),
    "prefix plus adjust over max_packet": (LengthPrefix(1, adjust=2, max_packet=100), bytes([98])),
    "text over max_packet": (TextLength(max_packet=100), b"98,"),
    "text with trailer over max_packet": (TextLength(b":", trailer=b",", max_packet=100), b"97:"),
    "text endless digits": (TextLength(), b"0" * 40),
    "text endless digits then end": (TextLength(), b"0" * 40 + b"5,hello"),
    "text more digits than the limit": (TextLength(max_packet=100), b"1000"),
    "text plus sign": (TextLength(), b"+5,hello"),
    "text minus sign": (TextLength(), b"-5,hello"),
    "text underscore": (TextLength(), b"1_0,helloworld"),
    "text leading space": (TextLength(), b" 5,hello"),
    "text trailing space": (TextLength(), b"5 ,hello"),
    "text newline": (TextLength(), b"5\n,hello"),
    "text empty length": (TextLength(), b",hello"),
    "text hexadecimal": (TextLength(), b"0x5,hello"),
    "text other digits": (TextLength(), "\u0665,hello".encode()),
    "text superscript": (TextLength(), b"\xb2,hi"),
    "text wrong end": (TextLength(), b"5:hello"),
    "text no digit at all": (TextLength(), b"GET / HTTP/1.1\r\n"),
    "netstring wrong trailer": (TextLength(b":", trailer=b","), b"5:hello;"),
    "trailer of two bytes wrong": (TextLength(b":", trailer=b"\r\n"), b"5:hello\r,"),
    "no delimiter": (Delimited(b"\n", max_packet=16), b"x" * 16),
    "delimiter one too late": (Delimited(b"\n", max_packet=16), b"x" * 16 + b"\n"),
    "wide delimiter too late": (Delimited(b"\r\n", max_packet=16), b"x" * 15 + b"\r\n"),
    "half a delimiter at the limit": (Delimited(b"\r\n", max_packet=16), b"x" * 15 + b"\r"),
    "function negative": (Function(lambda view: -1), b"x"),
    "function over max_packet": (Function(lambda view: 101, max_packet=100), b"x"),
    "function never knows": (Function(lambda view: 0, max_packet=100), b"x" * 100),
}


class Says(leviathan.Framing):
    """Whose parse says the same of whatever comes, and does not look at max_packet itself."""

    max_packet = 100

    def __init__(self, size):
        self.size = size

    def parse(self, buffer, start, end, seen=0):
        return self.size


BAD["function of a class, negative"] = (Says(-1), b"x")
BAD["function of a class, over max_packet"] = (Says(101), b"x")
BAD["function of a class, over max_packet and all there"] = (Says(101), b"x" * 101)
BAD["function of a class, never knows"] = (Says(0), b"x" * 100)


def refuse(view):
    raise FramingError("nonsense")


BAD["function raises FramingError"] = (Function(refuse), b"x")


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_raises_framing_error(name):
    """Also behind a good packet, and however it is cut."""
    framing, data = BAD[name]
    with pytest.raises(FramingError):
        by_split(framing, [data])
    with pytest.raises(FramingError):
        by_split(framing, [data[at:at + 1] for at in range(len(data))])
    driven = Receiving(framing)
    driven.feed(data)
    if not driven.errors:           # what is incomplete is judged by parse, which `rest` of the core calls
        assert driven.packets == []
        with pytest.raises(FramingError):
            framing.parse(driven.kept, 0, len(driven.kept))
    else:
        assert [type(error) for error in driven.errors] == [FramingError]


@pytest.mark.parametrize("name", [name for name in BAD if not name.startswith("function")])
def test_good_packets_before_the_bad_one_are_handed_on(name):
    framing, data = BAD[name]
    least = b"ab"
    good = build(framing, least if not getattr(framing, "adjust", 0) > 0 else b"abcd")
    driven = Receiving(framing)
    driven.feed(good + data)
    assert len(driven.packets) == 1
    if not driven.errors:
        with pytest.raises(FramingError):
            framing.parse(driven.kept, 0, len(driven.kept))


@pytest.mark.parametrize("framing, packet", [
    (LengthPrefix(4, max_packet=100), struct.pack(">I", 96) + b"x" * 96),
    (LengthPrefix(1, adjust=2, max_packet=100), bytes([97]) + b"x" * 99),
    (TextLength(max_packet=100), b"97," + b"x" * 97),
    (TextLength(b":", trailer=b",", max_packet=100), b"96:" + b"x" * 96 + b","),
    (Delimited(b"\n", max_packet=16), b"x" * 15 + b"\n"),
    (Delimited(b"\r\n", max_packet=16), b"x" * 14 + b"\r\n"),
    (Function(lambda view: 100, max_packet=100), b"x" * 100),
    (Says(100), b"x" * 100),
], ids=["prefix", "adjust", "text", "netstring", "line", "crlf", "function", "class"])
def test_a_packet_of_exactly_max_packet_is_allowed(framing, packet):
    assert len(packet) == framing.max_packet
    for drive in (by_split, by_receiver):
        for parts in ([packet], [packet, packet], [packet[at:at + 1] for at in range(len(packet))]):
            packets, rest = drive(framing, parts)
            assert len(packets) == len(b"".join(parts)) // len(packet)
            assert rest == b""


def test_a_length_may_have_leading_zeros_within_the_limits_digits():
    assert by_split(TextLength(), [b"0005,hello"]) == ([b"hello"], b"")
    with pytest.raises(leviathan.FramingError, match="more than 7 digits, as many as"):     # it is not said to be too long
        by_split(TextLength(), [b"00000005,hello"])


def test_a_length_is_not_taken_from_bytes_behind_the_end():
    """What stands in the buffer behind *end* is old and means nothing."""
    assert LengthPrefix(2).parse(b"\0\5hello", 0, 1) == 0
    assert TextLength().parse(b"5,hello", 0, 1) == 0
    assert Delimited(b"\n").parse(b"ab\n", 0, 2) == 0
    assert list(Delimited(b"\n").split(b"ab\n", 0, 2)) == []
    lengths = []
    Function(lambda view: lengths.append(len(view)) or 0).parse(b"abcdef", 1, 4)
    assert lengths == [3]


# -- encode -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("framing, packet", [
    (LengthPrefix(1), b"x" * 256),
    (LengthPrefix(2), b"x" * 65536),
    (LengthPrefix(1, adjust=4), b"abc"),
    (LengthPrefix(4, strip=False), b"\0\0\0\5four"),
    (LengthPrefix(4, strip=False), b"\0\0"),
    (LengthPrefix(4, strip=False), b"\0\0\0\1four"),
    (LengthPrefix(4, strip=False, max_packet=100), struct.pack(">I", 200) + b"x" * 200),
    (LengthPrefix(4, strip=False, adjust=-4), struct.pack(">I", 3)),
    (FixedSize(4), b"abc"),
    (FixedSize(4), b"abcde"),
    (Delimited(b"\r\n"), b"one\r\ntwo"),
    (Delimited(b"\n\n"), b"one\n"),
    (Delimited(b"\r\n\r\n"), b"one\r\n"),
    (Delimited(b"aa"), b"xa"),
], ids=["256 in 1", "65536 in 2", "under adjust", "header says more", "header cut", "header says less",
        "over max_packet", "impossible", "too short", "too long", "delimiter inside",
        "an end of half a delimiter", "an end of half a delimiter of four", "an end of half a delimiter of letters"])
def test_what_cannot_be_carried_raises_value_error(framing, packet):
    with pytest.raises(ValueError):
        framing.encode(packet)


@pytest.mark.parametrize("make", [
    lambda: LengthPrefix(0), lambda: LengthPrefix(9), lambda: LengthPrefix(4, byteorder="middle"),
    lambda: LengthPrefix(4, offset=-1), lambda: LengthPrefix(4, offset=1), lambda: LengthPrefix(4, max_packet=3),
    lambda: TextLength(b""), lambda: TextLength(b"ab"), lambda: TextLength(b"5"), lambda: TextLength(max_packet=1),
    lambda: TextLength(trailer=b"12345678", max_packet=9),
    lambda: Delimited(b""), lambda: Delimited(b"\n", max_packet=0), lambda: FixedSize(0), lambda: FixedSize(-1),
    lambda: Function(plain_parse, max_packet=0)])
def test_senseless_settings_raise_value_error(make):
    with pytest.raises(ValueError):
        make()


# -- cost -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: TextLength(","), lambda: TextLength(b",", trailer=";"), lambda: Delimited("\n"), lambda: FixedSize(1.5),
    lambda: LengthPrefix(4.0), lambda: LengthPrefix(4, adjust="x"), lambda: LengthPrefix(4, offset=1.5),
    lambda: LengthPrefix(max_packet="1k"), lambda: leviathan.Function(5)])
def test_settings_of_a_wrong_type_raise_type_error(make):
    with pytest.raises(TypeError):
        make()


class Counted:
    """A buffer that counts how many bytes were taken out of it."""

    def __init__(self, data):
        self.data = data
        self.taken = 0

    def __getitem__(self, key):
        part = self.data[key]
        self.taken += len(part)
        return part


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"--END--"])
@pytest.mark.parametrize("way", ["parse", "split"])
def test_a_line_that_comes_byte_by_byte_is_not_searched_again_and_again(delimiter, way):
    """Delimited: what was seen is neither searched nor copied again, so a slow line costs no more than a fast one."""
    framing = Delimited(delimiter)
    length = 4000
    buffer = Counted(b"x" * length + delimiter)
    whole = len(buffer.data)
    for end in range(1, whole):
        if way == "parse":
            assert framing.parse(buffer, 0, end, end - 1) == 0
        else:
            assert list(framing.split(buffer, 0, end, end - 1)) == []
    assert buffer.taken <= whole * (len(delimiter) + 1)
    assert list(framing.split(buffer, 0, whole, whole - 1)) == [(b"x" * length, whole)]


def test_text_length_looks_at_no_more_than_its_digits():
    framing = TextLength()
    buffer = Counted(b"1000000," + b"x" * 100000)
    assert framing.parse(buffer, 0, 100008) == 1000008
    assert buffer.taken <= 10


class Numbered(leviathan.StatefulFraming):
    """Lines, answered with their number; for the seam alone."""

    def __init__(self):
        self.lines = Delimited(b"\n")
        self.told = []

    def parse(self, buffer, start, end, seen=0):
        return self.lines.parse(buffer, start, end, seen)

    def decode(self, buffer, start, stop):
        return self.lines.decode(buffer, start, stop)

    def begin(self, session):
        session.protocol = [0]

    def send(self, session, packet, on_sent):
        session.protocol[0] += 1
        return session.write(b"%d %s\n" % (session.protocol[0], packet), on_sent)

    def refuse(self, session, error):
        session.write(b"refused: %s\n" % type(error).__name__.encode())

    def ended(self, session):
        self.told.append("ended")

    def closed(self, session):
        self.told.append("closed")


def test_a_stateful_framing_has_its_own_of_each_session(harness):
    framing = Numbered()
    server = harness.serve(framing, packet_timeout=0.2)
    first, second = server.client(), server.client()
    first.sendall(b"a\nb\n")
    second.sendall(b"c\n")
    assert read_exactly(first, 8) == b"1 a\n2 b\n" and read_exactly(second, 4) == b"1 c\n"
    first.sendall(b"x" * 70000)
    assert read_to_end(first) == b"refused: FramingError\n"
    second.sendall(b"never ends")
    assert read_to_end(second) == b"refused: TimeoutError\n"
    first.close()
    second.close()
    server.ended.wait(2)
    third = server.client()
    third.sendall(b"d\n")
    third.shutdown(socket.SHUT_WR)
    assert read_to_end(third) == b"1 d\n"
    server.ended.wait(3)
    assert framing.told == ["closed", "closed", "ended", "closed"]
