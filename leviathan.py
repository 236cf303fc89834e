"""leviathan: TCP servers in ten lines of pure Python, on Linux' epoll and Windows' IOCP, with nothing to install.

    import leviathan

    def echo(session, packet):
        session.send(packet)

    server = leviathan.Communicator(leviathan.LengthPrefix(4), echo)
    server.listen(7878)
    leviathan.run(server)

A Communicator takes two things: a framing, which says how long the next packet is, and a function that is handed each
packet. It listens, connects out and keeps the list of its connections; an EventQueue gives it threads. A
CommunicatorList runs several protocols in one process, from an INI file if you like.

This module is the portable core. Beside it stands one engine per system, leviathan_linux.py and leviathan_win.py,
which knows sockets and nothing else. Copy the core and the engine you need next to your program, or make one file of
all: `python leviathan.py bundle myserver/leviathan.py`.

Sections: errors and kinds, framings, HTTP, RESP, buffers and the SessionManager, Session, completions, EventQueue,
Communicator, CommunicatorList, configuration, command line. MIT licence.
"""
from __future__ import annotations

import ctypes
import enum
import errno
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from operator import length_hint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union
    BytesLike = Union[bytes, bytearray, memoryview]
    OnPacket = Callable[["Session", Any], Any]
    OnConnect = Callable[["Session"], Any]
    OnDisconnect = Callable[["Session", "Reason", Optional[BaseException]], Any]
    OnSent = Callable[["Session", bool], Any]

__version__ = "0.1.0"
__all__ = [
    "LeviathanError", "ConfigError", "FramingError", "PoolExhausted", "Reason", "Kind", "Framing", "LengthPrefix",
    "TextLength", "Delimited", "FixedSize", "Raw", "Function", "StatefulFraming", "Http", "Request", "Response", "Headers",
    "Resp", "RespError", "Push", "Pipeline", "Verbatim",
    "SessionManager", "Session", "ConnectionList", "EventQueue", "Communicator", "CommunicatorList", "Listener",
    "Connector", "run"]

PYPY = sys.implementation.name == "pypy"

# Sources of the numbers below: MISSION B4 for the buffer classes, DESIGN section 4 for the water marks; the others
# say where they come from.
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7878
RECV_BUFFER = 4096              # the first RecvBuf of a packet whose length is not known yet
RECV_LEAST = 8                  # no RecvBuf is smaller: LengthPrefix reads a length before it looks how many bytes came
SMALLEST_CLASS = 2              # 2**2 = 4 bytes ...
LARGEST_POOLED = 21             # ... to 2**21 = 2 MiB are kept for use again
LARGEST_CLASS = 30              # up to 2**30 = 1 GiB is made when needed and given back to the system
MAX_PACKET = 1 << LARGEST_POOLED        # a framing's default limit: what fits the largest kept class
MEMORY_LIMIT = 1 << 30          # bytes of all RecvBufs and SendBufs together
HIGH_WATER = 1 << 16            # unsent bytes above which a session's receiving pauses
LOW_WATER = 1 << 14             # and below which it resumes
SEND_LIMIT = 1 << 24            # unsent bytes at which a peer that does not read is closed
COPY_MAX = 1 << 16              # an unsent rest up to this is copied into a SendBuf, a larger one kept as it is
GROW_MAX = 1 << 16              # a peer that fills its RecvBuf gets one twice as large, up to this
RECEIVE_MAX = 1 << 18           # bytes of one receive, unless it is known that one packet has more: others wait meanwhile
CORK_MAX = 64                   # packets that one handler queues before the first of them leave
HOSTS_KEPT = 1024               # peers' addresses of which all connections share one string
RUN_MAX = 1024                  # runs of packets of one length are looked for up to this length
LONE_SIZES = 256                # so many sizes of packets that come alone have a Struct of their own ...
LONE_MAX = 512 if PYPY else MAX_PACKET      # ... up to this one; above it PyPy is faster with a slice
SEND_INLINE = 1 << 14           # a larger packet is queued beside its header instead of being copied behind it
PACKET_TIMEOUT = 60.0           # seconds from a packet's first byte to its last
REPORT_PAUSE = 60.0             # seconds in which a limit that is reached again and again is one line in the log
STOP_TIMEOUT = 10.0             # seconds that a stop lets queued bytes leave
STUCK_AFTER = 1.0               # seconds more, in which a callback that does not return is given up
FOREVER = float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and kinds
# ---------------------------------------------------------------------------------------------------------------------

class LeviathanError(Exception):
    """The root of what leviathan raises itself. System calls raise OSError, wrong arguments ValueError or TypeError."""


class ConfigError(LeviathanError):
    """A configuration that cannot be used: says file, section, key, value and what is allowed."""

    def __init__(self, message: str, *, file: str = "", section: str = "", key: str = "", value: str = "",
                 allowed: str = "") -> None:
        self.file, self.section, self.key, self.value, self.allowed = file, section, key, value, allowed
        where = "%s[%s] %s" % (file + ": " if file else "", section, key) if section else file
        if value:
            where += "=%s" % value
        if allowed:
            message += "; allowed: " + allowed
        super().__init__("%s: %s" % (where.strip(), message) if where else message)


class FramingError(LeviathanError):
    """The peer sent what is no packet: its session is closed with Reason.PROTOCOL. Framings raise it."""


class PoolExhausted(LeviathanError):
    """A session or a buffer is needed at once, and the limit is reached."""


class Reason(enum.Enum):
    """Why a session ended (A6)."""

    NORMAL = "normal"           # either side closed it
    TIMEOUT = "timeout"         # idle too long, a packet took too long, or connecting did
    ERROR = "error"             # the connection broke, or a callback raised
    PROTOCOL = "protocol"       # the peer broke the framing's rules
    OVERFLOW = "overflow"       # the peer did not read, and the hard limit of unsent bytes was reached
    SHUTDOWN = "shutdown"       # the server is stopping


class Kind(enum.Enum):
    """The three kinds of socket (A5)."""

    LISTEN = "listen"
    CLIENT = "client"           # accepted
    SERVER = "server"           # an outgoing connection to another server


class State(enum.Enum):
    """Where a session is in its life; `_LIFE` says what leads where."""

    CONNECTING = "connecting"   # also: accepted, and not yet on its thread
    OPEN = "open"
    CLOSING = "closing"         # what is queued is being sent
    LINGERING = "lingering"     # all is sent; the peer is to take it and close too
    ABORTED = "aborted"         # what is queued is thrown away
    CLOSED = "closed"


# {(state, event): next state}. What is not here does not happen: `move` answers False and changes nothing.
_LIFE = {
    (State.CONNECTING, "established"): State.OPEN,
    (State.CONNECTING, "drain"): State.ABORTED,
    (State.CONNECTING, "abort"): State.ABORTED,
    (State.CONNECTING, "closed"): State.CLOSED,
    (State.OPEN, "drain"): State.CLOSING,
    (State.OPEN, "abort"): State.ABORTED,
    (State.OPEN, "closed"): State.CLOSED,
    (State.CLOSING, "sent"): State.LINGERING,
    (State.CLOSING, "abort"): State.ABORTED,
    (State.CLOSING, "closed"): State.CLOSED,
    (State.LINGERING, "abort"): State.ABORTED,
    (State.LINGERING, "closed"): State.CLOSED,
    (State.ABORTED, "closed"): State.CLOSED,
}


def _log() -> Any:
    """The logger "leviathan"; logging is imported when the first line is written, not at import: it takes 6 ms."""
    import logging
    logger = logging.getLogger("leviathan")
    if not logger.handlers and not logger.level:
        logger.addHandler(logging.NullHandler())        # quiet unless the program configures logging
    return logger


def _name_of(function: Any) -> str:
    """A callable's name for a log line."""
    return str(getattr(function, "__qualname__", None) or repr(function))


# ---------------------------------------------------------------------------------------------------------------------
# Framings: bytes in, packet boundaries out. No socket, no thread, no state of a connection.
# ---------------------------------------------------------------------------------------------------------------------

class Framing:
    """How a stream is cut into packets and packets are made into a stream. Subclass it, or use one of those below.

    A framing has no state of a connection; one object serves any number of sessions on any number of threads.
    `buffer` is anything whose slices are bytes (a ctypes char array, or bytes); positions are offsets into it.
    """

    max_packet = MAX_PACKET     # bytes of the longest packet allowed, with all that the framing adds to it
    # For Session.send, where to encode is to put a header before a packet: makes it of a length up to SEND_INLINE.
    pack: Optional[Callable[[int], bytes]] = None

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """The whole length in bytes of the packet that begins at *start*; 0 when that is not known yet.

        Bytes from *start* to *end* are there. The first *seen* of them were there at an earlier call that returned 0,
        so they need not be searched again. Raises FramingError when this can be no packet. What it returns is checked:
        a length that is negative or over max_packet is refused, and so are max_packet bytes of which it knows no length.
        """
        raise NotImplementedError

    def decode(self, buffer: Any, start: int, stop: int) -> Any:
        """What the handler gets of the packet from *start* to *stop*."""
        return buffer[start:stop]

    def encode(self, packet: Any) -> bytes:
        """The bytes that carry *packet*. Raises ValueError when they cannot."""
        return _octets(packet)

    def header_of(self, size: int) -> bytes:
        """What stands before a content of *size* bytes, of any size; asked only of a framing that has `pack`."""
        raise NotImplementedError

    def split(self, buffer: Any, start: int, end: int, seen: int = 0) -> Iterator[Tuple[Any, int]]:
        """Yield (packet, where it ends) for each whole packet. Raises FramingError like `parse`."""
        limit = self.max_packet
        while start < end:
            size = self.parse(buffer, start, end, seen)
            if not 0 < size <= limit:
                self._check_length(size, end - start)
                return
            stop = start + size
            if stop > end:
                return
            yield self.decode(buffer, start, stop), stop
            start = stop
            seen = 0

    def receiver(self, on_packet: OnPacket, rest: Callable[[Session, Any, int, int], None],
                 fail: Callable[[Session, BaseException], None]) -> Callable[[Session, Any, int], None]:
        """The function an engine calls with what it received: hands on each packet, then calls *rest*.

        It stops early when the session pauses or ends. One frame per receive and one per packet, on purpose.
        """
        split = self.split

        def received(session: Session, buffer: Any, end: int) -> None:
            start = 0
            try:
                for packet, start in split(buffer, 0, end, session.seen):
                    on_packet(session, packet)
                    if session.paused:
                        break
            except BaseException as error:
                fail(session, error)
            if start != end or session.partial is not None:
                rest(session, buffer, start, end)

        return received

    def need(self, session: Session, buffer: Any, start: int, end: int, seen: int) -> int:
        """What `parse` says, for a session that keeps an incomplete packet; a StatefulFraming may know more."""
        size = self.parse(buffer, start, end, seen)
        if not 0 < size <= self.max_packet:
            self._check_length(size, end - start)
        return size

    def _check_length(self, size: int, have: int) -> None:
        """FramingError for a length that no packet may have, *have* bytes of which are there; 0: not known yet."""
        if size < 0:
            raise FramingError("%s.parse() returned the length %d" % (type(self).__name__, size))
        if size > self.max_packet:
            raise self.too_long(size)
        if have >= self.max_packet:
            raise FramingError("no length or end of a packet within max_packet (%d bytes)" % self.max_packet)

    def too_long(self, size: int) -> FramingError:
        """The error for a packet of *size* bytes."""
        return FramingError("a packet of %d bytes is over max_packet (%d)" % (size, self.max_packet))


class StatefulFraming(Framing):
    """A framing that remembers something of each connection, in `session.protocol`, and takes part in its life.

    All but `send` are called on the session's own thread. A subclass overrides what it needs; `receiver` as well, where
    what is received has to be read with the session's state.
    """

    # More than high_water bytes unsent pause receiving: who does not read his answers may ask for no more. False for who asks
    # himself: the peer may wait for him to read the answers before it reads on, and then both would wait for ever.
    pauses_when_congested = True

    def begin(self, session: Session) -> None:
        """The connection is there; on_connect comes next."""

    def send(self, session: Session, packet: Any, on_sent: Optional[OnSent]) -> bool:
        """What Session.send does; any thread. What it queues it queues by `session.write`."""
        return session.write(self.encode(packet), on_sent)

    def refuse(self, session: Session, error: BaseException) -> Optional[bool]:
        """The peer broke the protocol or was too slow, and is closed behind what is queued now: tell it why.

        True: not yet. The framing still owes it something, and ends the session itself.
        """
        return False

    def owes(self, session: Session) -> bool:
        """The peer waits for us, so that its silence is neither idle nor slow. Asked when its time is over, all is sent."""
        return False

    def ended(self, session: Session) -> Optional[bool]:
        """The peer sends no more; what was received of an incomplete packet is still in the RecvBuf.

        True: the session stays open for sending, and the framing ends it itself.
        """
        return False

    def leaving(self, session: Session, reason: Reason) -> Optional[bool]:
        """The Communicator closes for *reason*; what is queued still leaves.

        True: the framing owes the peer more than that, and ends the session itself when it has given it.
        """
        return False

    def unfinished(self, session: Session) -> bool:
        """What is queued must not reach the peer with a clean end: it would take a part for the whole."""
        return False

    def closed(self, session: Session) -> None:
        """The connection is gone; on_disconnect comes next."""


def _check_max(max_packet: int, least: int = 1) -> int:
    _check_whole("max_packet", max_packet, least, 1 << LARGEST_CLASS)
    return max_packet


def _check_whole(name: str, value: Any, least: int, most: Optional[int] = None) -> None:
    """TypeError for what is no whole number (True is none), ValueError for one that is out of range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("%s must be a whole number, not %r" % (name, value))
    if value < least or most is not None and value > most:
        raise ValueError("%s is %d; it must be %d %s" % (name, value, least, "or more" if most is None else "to %d" % most))


def _check_seconds(name: str, value: Any) -> None:
    """TypeError for what is no number, ValueError for a negative one and for NaN."""
    if not isinstance(value, (int, float)):
        raise TypeError("%s must be a number of seconds, not %r" % (name, value))
    if not value >= 0:
        raise ValueError("%s is %r; it must be 0 or more seconds" % (name, value))


def _check_callable(name: str, value: Any) -> None:
    """TypeError for what is no function."""
    if not callable(value):
        raise TypeError("%s must be a function, not %r" % (name, value))


def _check_kind(name: str, value: Any, kind: type) -> None:
    """TypeError for what is of another class."""
    if not isinstance(value, kind):
        raise TypeError("%s must be of class %s, not %r" % (name, kind.__name__, value))


def _check_bytes(name: str, value: Any) -> None:
    """TypeError for what is not bytes: a str above all."""
    if not isinstance(value, (bytes, bytearray)):
        raise TypeError("%s must be bytes, like b\"\\n\", not %r" % (name, value))


def _octets(packet: BytesLike) -> bytes:
    """*packet* as bytes. Raises TypeError for what is none; of a number, bytes() alone would make that many zeros."""
    return packet if type(packet) is bytes else memoryview(packet).tobytes()


class LengthPrefix(Framing):
    """A binary length before each packet (H1).

    *size*: bytes of the length, 1 to 8. *byteorder*: "big" or "little". *offset*: bytes of the header before the
    length. *adjust*: what must be added to the length to get the number of bytes after the header (a length that counts
    its own four bytes: -4). *strip*: the handler gets the packet without its header, and `send` puts one before
    it; with strip=False both deal in whole packets. *max_packet*: limit of header and content in bytes.
    Raises ValueError for what makes no sense.
    """

    def __init__(self, size: int = 4, *, byteorder: str = "big", offset: int = 0, adjust: int = 0, strip: bool = True,
                 max_packet: int = MAX_PACKET) -> None:
        _check_whole("size", size, 1, 8)
        _check_whole("offset", offset, 0)
        _check_whole("adjust", adjust, -1 << 64)
        if byteorder not in ("big", "little"):
            raise ValueError("byteorder is %r; it must be 'big' or 'little'" % (byteorder,))
        if strip and offset:
            raise ValueError("with an offset the header has more in it than the length: use strip=False")
        self.size, self.byteorder, self.offset, self.adjust, self.strip = size, byteorder, offset, adjust, strip
        self.header = offset + size
        self.max_packet = _check_max(max_packet, self.header)
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}.get(size)
        self._struct = struct.Struct((">" if byteorder == "big" else "<") + code) if code else None
        if strip:                           # two bytes carry every length that Session.send asks for
            self.pack = self._struct.pack if self._struct is not None and size > 1 and not adjust else self.header_of

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """See Framing.parse."""
        if end - start < self.header:
            return 0
        at = start + self.offset
        body = int.from_bytes(buffer[at:at + self.size], self.byteorder) + self.adjust      # type: ignore[arg-type]
        if body < 0:
            raise FramingError("the length %d is impossible: it does not cover its own header" % (body - self.adjust))
        if self.header + body > self.max_packet:
            raise self.too_long(self.header + body)
        return self.header + body

    def decode(self, buffer: Any, start: int, stop: int) -> bytes:
        """The content, or the whole packet with strip=False."""
        return bytes(buffer[start + self.header if self.strip else start:stop])

    def header_of(self, size: int) -> bytes:
        """The header of a content of *size* bytes. Raises ValueError when it does not fit."""
        length = size - self.adjust
        if not 0 <= length < 1 << 8 * self.size:
            raise ValueError("a packet of %d bytes does not fit a length of %d bytes" % (size, self.size))
        return length.to_bytes(self.size, self.byteorder)       # type: ignore[arg-type]

    def encode(self, packet: BytesLike) -> bytes:
        """Header and content; with strip=False the packet as it is, after a look at its length."""
        data = _octets(packet)
        if self.strip:
            return self.header_of(len(data)) + data
        try:
            size = self.parse(data, 0, len(data))
        except FramingError as error:
            raise ValueError(str(error)) from None      # not the peer's fault
        if size != len(data):
            raise ValueError("the packet's header does not say the packet's length (%d bytes)" % len(data))
        return data

    def receiver(self, on_packet: OnPacket, rest: Callable[[Session, Any, int, int], None],
                 fail: Callable[[Session, BaseException], None]) -> Callable[[Session, Any, int], None]:
        """The hot loop of leviathan: the same as Framing.receiver, without its generator and calls."""
        if not self.strip or self.adjust or self._struct is None:
            return super().receiver(on_packet, rest, fail)
        unpack_from = self._struct.unpack_from
        header = self.header
        limit = self.max_packet - header
        too_long = self.too_long
        runs: Dict[int, Any] = {}           # {length: (iter_unpack of header and content, the header)}; RUN_MAX at most
        lone: Dict[int, Any] = {}           # {bytes received: unpack_from of the header and the content that fills them}
        code = self._struct.format

        def run(session: Session, buffer: bytes, length: int, width: int) -> int:
            """Hand on packets of *length* bytes as long as there are such; returns where the first other one begins."""
            unpack = runs[length][0]
            whole = len(buffer) // width * width
            packets = unpack(buffer[:whole])
            try:
                for found, packet in packets:
                    if found != length:
                        return whole - (length_hint(packets) + 1) * width
                    on_packet(session, packet)
                    if session.paused:
                        break
            except BaseException as error:
                fail(session, error)
            # The iterator knows how far it is: adding it up here would take 10 of 210 ns for each packet.
            return whole - length_hint(packets) * width

        def received(session: Session, buffer: Any, end: int) -> None:
            unpack = lone.get(end)
            if unpack is not None:
                # As many bytes were one packet before. If they are now, as from every peer that waits for its reply, header
                # and content are unpacked at once (100 ns instead of 170), and the loop's bookkeeping is spared.
                length, packet = unpack(buffer)
                if length == end - header:
                    session.direct = True
                    try:
                        on_packet(session, packet)
                    except BaseException as error:
                        fail(session, error)
                    if session.partial is not None:
                        rest(session, buffer, end, end)
                    return
            session.direct = False
            start = 0
            try:
                while True:
                    body = start + header
                    if body > end:
                        break
                    length, = unpack_from(buffer, start)
                    if length > limit:
                        raise too_long(header + length)
                    stop = body + length
                    if stop > end:
                        break
                    if not start:
                        if stop == end:
                            session.direct = True
                            if len(lone) < LONE_SIZES and end <= LONE_MAX:
                                lone[end] = struct.Struct("%s%ds" % (code, length)).unpack_from
                        elif length < RUN_MAX:
                            # Several short packets. If the next is as long as this, as telegrams of one kind are,
                            # perhaps all are: then one iterator makes length and content in 40 ns a packet, where
                            # unpack_from and a slice take 100 (with handler and send 300 instead of 365).
                            buffer = buffer[:end]
                            if length not in runs:
                                runs[length] = struct.Struct("%s%ds" % (code, length)).iter_unpack, buffer[:header]
                            if buffer.startswith(runs[length][1], stop):
                                start = run(session, buffer, length, stop)
                                if start == end or session.paused:
                                    break
                                continue
                    start = stop
                    on_packet(session, buffer[body:stop])
                    if stop == end or session.paused:
                        break
            except BaseException as error:
                fail(session, error)
            if start != end or session.partial is not None:
                rest(session, buffer, start, end)

        return received


class TextLength(Framing):
    """The length as digits, closed by an end character (H2): `5,hello`. With b":" and trailer=b"," it is a netstring.

    *end*: the byte after the digits. *trailer*: bytes that follow the content and are checked. *max_packet*: limit of
    everything together in bytes. *strip*: the handler gets the content alone, and `send` adds the rest.
    """

    def __init__(self, end: bytes = b",", *, trailer: bytes = b"", strip: bool = True,
                 max_packet: int = MAX_PACKET) -> None:
        _check_bytes("end", end)
        _check_bytes("trailer", trailer)
        if len(end) != 1 or end.isdigit():
            raise ValueError("end is %r; it must be one byte that is no digit" % (end,))
        self.end, self.trailer, self.strip = end, trailer, strip
        self.max_packet = _check_max(max_packet, 2 + len(trailer))      # b"0,", and what follows it
        self._digits = len(str(self.max_packet))        # more than the limit has are over it, or zeros for nothing

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """See Framing.parse."""
        head = bytes(buffer[start:min(end, start + self._digits + 1)])
        at = head.find(self.end)
        digits = head[:at] if at >= 0 else head
        # isdigit() of bytes is ASCII only; int() alone would take +5, 1_0 and spaces.
        if digits and not digits.isdigit() or at == 0:
            raise FramingError("%r is no length" % (head,))
        if at < 0:
            if len(head) > self._digits:
                raise FramingError("a length of more than %d digits, as many as max_packet (%d) has"
                                   % (self._digits, self.max_packet))
            return 0
        stop = at + 1 + int(digits) + len(self.trailer)
        if stop > self.max_packet:
            raise self.too_long(stop)
        if self.trailer and start + stop <= end and buffer[start + stop - len(self.trailer):start + stop] != self.trailer:
            raise FramingError("a packet of %s bytes does not end with %r" % (digits.decode(), self.trailer))
        return stop

    def decode(self, buffer: Any, start: int, stop: int) -> bytes:
        """The content, or the whole packet with strip=False."""
        if not self.strip:
            return bytes(buffer[start:stop])
        head = bytes(buffer[start:start + self._digits + 1]).find(self.end)
        return bytes(buffer[start + head + 1:stop - len(self.trailer)])

    def encode(self, packet: BytesLike) -> bytes:
        """Digits, end character, content, trailer."""
        data = _octets(packet)
        return b"%d%b%b%b" % (len(data), self.end, data, self.trailer) if self.strip else data


class Delimited(Framing):
    """Packets closed by a delimiter, lines for example. *strip*: the handler gets them without it, `send` adds it.

    *max_packet*: limit in bytes with the delimiter; a peer that sends more without one is closed.
    """

    def __init__(self, delimiter: bytes = b"\r\n", *, strip: bool = True, max_packet: int = 1 << 16) -> None:
        _check_bytes("the delimiter", delimiter)
        if not delimiter:
            raise ValueError("the delimiter must not be empty")
        self.delimiter, self.strip = bytes(delimiter), strip
        self.max_packet = _check_max(max_packet, len(delimiter))

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """See Framing.parse. Only what *seen* does not cover is searched, so a slow line costs no more than a fast one."""
        skip = max(0, seen - len(self.delimiter) + 1)
        at = bytes(buffer[start + skip:min(end, start + self.max_packet)]).find(self.delimiter)
        if at >= 0:
            return skip + at + len(self.delimiter)
        if end - start >= self.max_packet:
            raise FramingError("no delimiter %r within max_packet (%d bytes)" % (self.delimiter, self.max_packet))
        return 0

    def decode(self, buffer: Any, start: int, stop: int) -> bytes:
        """The packet without its delimiter, or with it with strip=False."""
        return bytes(buffer[start:stop - len(self.delimiter) if self.strip else stop])

    def encode(self, packet: BytesLike) -> bytes:
        """The packet and its delimiter. Raises ValueError when the peer would find a delimiter before that one."""
        data = _octets(packet)
        if not self.strip:
            return data
        whole = data + self.delimiter
        at = whole.find(self.delimiter)
        if at != len(data):                 # in the packet, or begun by its end: b"\n" before b"\n\n"
            raise ValueError("the packet contains the delimiter %r%s" % (
                self.delimiter, "" if self.delimiter in data else ", together with the one behind it"))
        return whole

    def split(self, buffer: Any, start: int, end: int, seen: int = 0) -> Iterator[Tuple[bytes, int]]:
        """As Framing.split, but the buffer is copied once and not once for every line in it."""
        if seen:                            # the rest of a slow packet: look at the new bytes alone
            size = self.parse(buffer, start, end, seen)
            if not size:
                return
            yield self.decode(buffer, start, start + size), start + size
            start += size
        data = bytes(buffer[start:end])
        delimiter, width, find = self.delimiter, len(self.delimiter), data.find
        begin = 0
        at = find(delimiter)
        while at >= 0:
            stop = at + width
            if stop - begin > self.max_packet:
                raise FramingError("no delimiter %r within max_packet (%d bytes)" % (delimiter, self.max_packet))
            yield data[begin:at if self.strip else stop], start + stop
            begin = stop
            at = find(delimiter, begin)
        if len(data) - begin >= self.max_packet:
            raise FramingError("no delimiter %r within max_packet (%d bytes)" % (delimiter, self.max_packet))


class FixedSize(Framing):
    """Packets of *size* bytes each."""

    def __init__(self, size: int) -> None:
        _check_whole("size", size, 1)
        self.size = self.max_packet = _check_max(size)

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """Always *size*."""
        return self.size

    def encode(self, packet: BytesLike) -> bytes:
        """The packet, which must have the right size, else ValueError."""
        data = _octets(packet)
        if len(data) != self.size:
            raise ValueError("the packet has %d bytes; all have %d here" % (len(data), self.size))
        return data


class Raw(Framing):
    """No packets: the handler gets whatever has arrived."""

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """All that is there."""
        return end - start


class Function(Framing):
    """A function of your own (A1, H4): `parse(view) -> int`.

    It gets a memoryview that begins where the packet begins, and returns the packet's whole length in bytes, or 0 when
    that is not known yet. It raises FramingError for nonsense. The handler gets whole packets; `send` sends as it is.
    """

    def __init__(self, function: Callable[[memoryview], int], *, max_packet: int = MAX_PACKET) -> None:
        _check_callable("parse(view) -> int", function)
        self.function = function
        self.max_packet = _check_max(max_packet)

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """What the function says."""
        view = memoryview(buffer)
        size = self.function((view if view.format == "B" else view.cast("B"))[start:end])
        if size < 0:
            raise FramingError("%s() returned the length %d" % (_name_of(self.function), size))
        return size


# ---------------------------------------------------------------------------------------------------------------------
# HTTP/1.1 and 1.0 (RFC 9112, RFC 9110), both sides
# ---------------------------------------------------------------------------------------------------------------------
#
# What goes wrong with HTTP is nearly always that two programs see different boundaries in the same bytes (request
# smuggling). So this parser has one reading of everything, and what the RFC lets a recipient repair it refuses: bare LF
# and CR, folded lines, spaces before a colon, signs and underscores in numbers, two lengths. After the first thing that
# is wrong nothing more of that connection is parsed.
#
# A message stays in the session's RecvBuf from its first byte to its last, chunked ones too. So the deadline counts from
# the first byte, the pool's limit covers it, and a Content-Length sizes the buffer once (B5). How far a chunked body was
# looked at is kept in `session.protocol`; when it is whole, one more pass joins it: two passes, however it is cut.
#
# Every regular expression here can match a text in one way only (what follows a repeated class is never in that class),
# so none can be made to go back and forth: the time is linear in the length, and the length is limited.

MAX_LINE = 8192                 # bytes of a request line; RFC 9112 section 3 wants 8000 at least
MAX_HEADER = 1 << 15            # bytes of all header lines together; nginx allows 32 KiB too
MAX_HEADERS = 100               # header lines, as in Apache
MAX_CHUNK_LINE = 256            # bytes of a chunk's size and its extensions; those of AWS' signatures have 90
# What is around a body's chunks may take max_header, and half of the body: 7000 chunks of any size, and as many as one likes
# of 10 bytes. Without that 2 MiB in chunks of one byte took 12 MiB, and joining them 1.6 s; with it 3 MiB and 0.16 s.
CHUNKED_SHIFT = 1
MAX_PIPELINED = 64              # requests of a connection that are not answered yet, before receiving pauses
HEADS_KEPT = 512                # header blocks that are known again, per Http object ...
HEAD_KEPT_MAX = 1024            # ... if they are no longer than this: 0.5 MB of keys, and about as much of what they mean

_CHUNKED, _TO_END = -1, -2      # lengths of bodies that have none
_BODILESS = (204, 205, 304)     # answers of these statuses are sent without content, whatever a handler gives them

_REASONS = {
    100: "Continue", 102: "Processing", 103: "Early Hints", 200: "OK", 201: "Created", 202: "Accepted",
    203: "Non-Authoritative Information", 204: "No Content", 205: "Reset Content", 206: "Partial Content",
    300: "Multiple Choices", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
    307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request", 401: "Unauthorized",
    402: "Payment Required", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable",
    407: "Proxy Authentication Required", 408: "Request Timeout", 409: "Conflict", 410: "Gone", 411: "Length Required",
    412: "Precondition Failed", 413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type",
    416: "Range Not Satisfiable", 417: "Expectation Failed", 421: "Misdirected Request", 422: "Unprocessable Content",
    425: "Too Early", 426: "Upgrade Required", 428: "Precondition Required", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 451: "Unavailable For Legal Reasons", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
    505: "HTTP Version Not Supported", 507: "Insufficient Storage", 511: "Network Authentication Required"}

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                    # RFC 9110 section 5.6.2
_FIELDS = r"(?:%s:[^\0-\x08\x0a-\x1f\x7f]*\r\n)*" % _TOKEN  # no CR, LF, NUL or other control but tab in a value


class HttpError(FramingError):
    """What the peer sent is not HTTP/1.1 as RFC 9112 has it, or is over a limit. `status` is what a server answers."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Headers:
    """Header lines in their order, repeated ones too; names in any case. Cannot be changed.

    *fields*: a dict, or pairs. `headers["Accept"]` and `get` give one line's value, of several lines their values joined
    by a comma (RFC 9110 section 5.3), `get_all` each of them, for Set-Cookie above all; `items` gives the pairs as they
    were sent. len() and iteration count lines.
    """

    __slots__ = ("_raw", "_pairs", "_index")

    def __init__(self, fields: Any = ()) -> None:
        self._raw = ""                      # lines that are right, and not looked at before somebody asks
        self._pairs: Optional[Tuple[Tuple[str, str], ...]] = tuple(
            (str(name), str(value)) for name, value in (fields.items() if hasattr(fields, "items") else fields))
        self._index: Optional[Dict[str, str]] = None        # {lower-case name: values joined}

    @classmethod
    def _of(cls, raw: str) -> Headers:
        headers = cls.__new__(cls)
        headers._raw, headers._pairs, headers._index = raw, None, None
        return headers

    def items(self) -> Tuple[Tuple[str, str], ...]:
        """The (name, value) pairs."""
        pairs = self._pairs
        if pairs is None:
            found = [line.partition(":") for line in self._raw.split("\r\n")[:-1]]
            pairs = self._pairs = tuple((name, value.strip(" \t")) for name, _, value in found)
        return pairs

    def _by_name(self) -> Dict[str, str]:
        index: Dict[str, str] = {}
        for name, value in self.items():
            name = name.lower()
            index[name] = value if name not in index else "%s, %s" % (index[name], value)
        self._index = index
        return index

    def get(self, name: str, default: Any = None) -> Any:
        """The value of *name*, or *default*."""
        index = self._index
        return (self._by_name() if index is None else index).get(name.lower(), default)

    def get_all(self, name: str) -> List[str]:
        """The values of all lines of that *name*."""
        name = name.lower()
        return [value for key, value in self.items() if key.lower() == name]

    def __getitem__(self, name: str) -> str:
        index = self._index
        return (self._by_name() if index is None else index)[name.lower()]

    def __contains__(self, name: object) -> bool:
        index = self._index
        return isinstance(name, str) and name.lower() in (self._by_name() if index is None else index)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in self.items()])

    def __len__(self) -> int:
        return len(self.items())

    def __eq__(self, other: object) -> bool:
        return self.items() == other.items() if isinstance(other, Headers) else NotImplemented

    __hash__ = None             # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Headers(%r)" % (list(self.items()),)


_NO_HEADERS = Headers()


class _Head:
    """A request's first line and headers, parsed. Requests with the same bytes share one."""

    __slots__ = ("method", "target", "path", "query", "version", "headers", "keep_alive", "length", "expects", "plain")

    def __init__(self, method: str, target: str, version: str, headers: Headers) -> None:
        self.method, self.target, self.version, self.headers = method, target, version, headers
        path = target
        if target[:1] not in ("/", "*") and method != "CONNECT":        # http://host/path
            rest = target.partition("://")[2]
            at = min([at for at in (rest.find("/"), rest.find("?")) if at >= 0] or [len(rest)])
            path = rest[at:] if rest[at:at + 1] == "/" else "/" + rest[at:]
        self.path, _, self.query = path.partition("?")
        self.keep_alive = version != "1.0"
        self.length = 0                     # of the body; or _CHUNKED
        self.expects = False                # "100-continue"
        self.plain = False                  # answered in the ordinary way: 1.1, kept alive, not HEAD


class Request:
    """An HTTP request: what a server's handler gets, and what a client sends.

    `method`, `target` as it was sent, `path` and `query` (its parts, still percent-encoded), `version` ("1.1" or "1.0"),
    `headers` and `trailers` (Headers), `body` (bytes), `keep_alive`, `session`. A client makes one of *method*, *target*,
    *headers* (a dict, pairs or Headers) and *body* (bytes or str).
    """

    __slots__ = ("_head", "session", "body", "trailers", "_state", "_parts", "_closes")

    def __init__(self, method: str = "GET", target: str = "/", headers: Any = None, body: Union[BytesLike, str] = b"") -> None:
        self._head = _Head(method, target, "1.1", headers if isinstance(headers, Headers) else Headers(headers or ()))
        self.session: Any = None
        self.body: bytes = body.encode("utf-8") if isinstance(body, str) else _octets(body)
        self.trailers = _NO_HEADERS
        self._state = _OPEN                 # its connection's lock guards this and the next two
        self._parts: Optional[List[Tuple[Tuple[bytes, ...], Optional[OnSent]]]] = None      # answered before its turn
        self._closes = False                # the connection ends behind its answer

    method = property(lambda self: self._head.method, doc="GET, POST ...")
    target = property(lambda self: self._head.target, doc="What stands between method and version, as it was sent.")
    path = property(lambda self: self._head.path, doc="The target up to its question mark, percent-encoded as it came.")
    query = property(lambda self: self._head.query, doc="The target behind its question mark.")
    version = property(lambda self: self._head.version, doc='"1.1" or "1.0"')
    headers = property(lambda self: self._head.headers, doc="The header lines, as Headers.")
    keep_alive = property(lambda self: self._head.keep_alive, doc="The connection stays open behind the answer.")

    def __repr__(self) -> str:
        return "<Request %s %s>" % (self.method, self.target)

    def reply(self, response: Any, on_sent: Optional[OnSent] = None) -> bool:
        """Answer this request; any thread, never waits. *response*: a Response, or bytes or str (status 200).

        It leaves when the answers of the requests before it have left. True if it is queued, False if the connection
        has ended. Raises ValueError if it is answered already, and for what cannot be sent.
        """
        session = self.session
        http, own = self._http(), session.owner._is_owned()
        if own and session.protocol.current is not self:
            session.last = time.monotonic()             # it was no idle peer that we let wait
        done = http.answer(session, self, response, on_sent, own)
        if done is None:
            raise ValueError("%r is answered already" % self)
        return done

    def stream(self, status: int = 200, headers: Any = None) -> ResponseStream:
        """Begin an answer whose body follows piece by piece; see ResponseStream. Raises ValueError like `reply`."""
        return ResponseStream(self._http(), self, status, headers)

    def _http(self) -> Http:
        if self.session is None:
            raise ValueError("%r was not received by a server" % self)
        return self.session.stateful        # type: ignore[no-any-return]


_OPEN, _STREAMED, _ANSWERED = 0, 1, 2       # Request._state


class Response:
    """An HTTP response: what a server sends, and what a client's handler gets.

    A server makes one of *status*, *headers* (a dict, pairs or Headers) and *body* (bytes or str). Content-Length, Date
    and Connection are added; a str is sent as UTF-8, and as text/plain unless the headers say otherwise. A client finds
    also `reason`, `version`, `trailers`, `keep_alive` and `request`, the one that it answers.
    """

    __slots__ = ("status", "headers", "body", "reason", "version", "trailers", "keep_alive", "request")

    def __init__(self, status: int = 200, headers: Any = None, body: Union[BytesLike, str, None] = b"") -> None:
        self.status = status
        self.headers = headers
        self.body: Any = body
        self.reason = ""
        self.version = "1.1"
        self.trailers = _NO_HEADERS
        self.keep_alive = True
        self.request: Optional[Request] = None

    def __repr__(self) -> str:
        return "<Response %s>" % self.status


class ResponseStream:
    """An answer that is sent piece by piece, from any thread: `write` as often as you like, then `close`.

    It is chunked; with a Content-Length among the headers it is sent as it is, and must have that length. A peer that
    speaks HTTP/1.0 gets it as it is, and the connection closes behind it. As a context manager it closes itself, and
    aborts the connection when the block raises, so that the peer does not take it for whole.
    """

    def __init__(self, http: Http, request: Request, status: int, headers: Any) -> None:
        self.request = request
        self._http = http
        self._lock = threading.Lock()       # guards the rest, and keeps pieces in order
        self._closed = False
        head, self._chunked, self._left, self._silent, closes = http.stream_head(request, status, headers)
        begun = http.emit(request.session, request, (head,), _STREAMED, closes, None)
        if begun is None:
            raise ValueError("%r is answered already" % request)

    def write(self, data: Union[BytesLike, str], on_sent: Optional[OnSent] = None) -> bool:
        """Send a piece; nothing of length 0. False if the connection has ended. ValueError: closed, or too much."""
        data = data.encode("utf-8") if isinstance(data, str) else _octets(data)
        with self._lock:
            if self._closed:
                raise ValueError("the answer to %r is closed" % self.request)
            if self._left is not None:
                if len(data) > self._left:
                    raise ValueError("%d bytes more than its Content-Length" % (len(data) - self._left))
                self._left -= len(data)
            if self._silent or not data:
                chunks: Tuple[bytes, ...] = ()
            elif self._chunked:
                chunks = (b"%x\r\n%b\r\n" % (len(data), data),) if len(data) <= SEND_INLINE else \
                    (b"%x\r\n" % len(data), data, b"\r\n")
            else:
                chunks = (data,)
            return bool(self._http.emit(self.request.session, self.request, chunks, _STREAMED, False, on_sent,
                                        _STREAMED))

    def close(self) -> bool:
        """The answer is whole. False if the connection has ended. A second close does nothing.

        If there is a Content-Length and less was written, the connection is aborted, and ValueError is raised.
        """
        with self._lock:
            if self._closed:
                return True
            self._closed = True
            if self._left and not self._silent:
                self.request.session.abort()
                raise ValueError("%d bytes less than its Content-Length" % self._left)
            last = (b"0\r\n\r\n",) if self._chunked and not self._silent else ()
            return bool(self._http.emit(self.request.session, self.request, last, _ANSWERED, False, None, _STREAMED))

    def __enter__(self) -> ResponseStream:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            with self._lock:
                self._closed = True
            self.request.session.abort()


class _Second:
    """What all answers of one second share. In one object, so that a thread never sees half of the next second."""

    __slots__ = ("begin", "end", "date", "starts", "prefixes")

    def __init__(self, now: float) -> None:
        self.begin = float(int(now))
        self.end = self.begin + 1.0
        at = time.gmtime(now)
        self.date = b"Date: %s, %02d %s %d %02d:%02d:%02d GMT\r\n" % (
            b"MonTueWedThuFriSatSun"[3 * at.tm_wday:3 * at.tm_wday + 3], at.tm_mday,
            b"JanFebMarAprMayJunJulAugSepOctNovDec"[3 * at.tm_mon - 3:3 * at.tm_mon], at.tm_year,
            at.tm_hour, at.tm_min, at.tm_sec)
        self.starts: Dict[int, bytes] = {}          # {status: status line and Date}
        self.prefixes: Dict[Any, bytes] = {}        # {(status, headers as pairs, bytes of the body): all before the body}


class _Exchange:
    """What Http remembers of a connection, in `session.protocol`."""

    __slots__ = ("lock", "pending", "calm", "held", "due", "gone", "waiting", "ending", "current", "done", "eof",
                 "head", "size", "length", "need", "scan", "total", "spare", "tail")

    def __init__(self) -> None:
        self.lock = threading.Lock()        # guards the next seven
        self.pending: Deque[Request] = deque()      # a server's: received, not answered to the end; a client's: sent
        self.calm = True                    # none of the following is so
        self.held = False                   # receiving pauses because so many are pending; a client's: its last is sent
        self.due = False                    # 100 Continue is to be sent when nothing is pending
        self.gone = False                   # the connection has ended
        self.waiting = 0                    # bytes of answers that wait for an earlier one
        self.ending: Optional[Tuple[Reason, Optional[BaseException]]] = None    # why it ends when all is answered
        # Only the session's own thread touches the rest.
        self.current: Optional[Request] = None      # its handler runs now
        self.done = False                   # nothing more is parsed
        self.eof = False
        self.reset()

    def reset(self) -> None:
        """No message has begun."""
        self.head: Any = None               # of the message that is coming in: a _Head, or a Response
        self.size = 0                       # bytes of its head
        self.length = 0                     # of its body; or _CHUNKED, _TO_END
        self.need = 0                       # bytes of all of it, or of as much as is known to come; 0: not known
        self.scan = 0                       # chunked: up to here it was looked at
        self.total = 0                      # chunked: bytes of its body up to there
        self.spare = 0                      # chunked: bytes of size lines, extensions and line ends up to there
        self.tail = 0                       # chunked: where the trailers begin; 0: not there yet


class Http(StatefulFraming):
    """HTTP/1.1 and HTTP/1.0 (H3). As a server, handlers get a Request when it is whole, and `session.send` takes a
    Response, bytes or str. With role="client" it is the other way round.

    `session.send` answers the request whose handler runs on this thread, else the oldest that is not answered;
    `request.reply` answers that very one, `request.stream` piece by piece. Any thread may do so at any time; answers
    leave in the order of the requests. Each request is answered once: a second time is a ValueError.

    What breaks the rules or is over a limit is answered with 400, 408, 413, 414, 417, 431, 501 or 505 behind the answers
    that are owed by then, and the connection closes. Limits: *max_line* bytes of the request line, *max_header* bytes and
    *max_headers* number of header lines, and the same for trailers, *max_body* bytes of a body, *max_pipelined* requests
    that are not answered yet, above which receiving pauses. *heads_kept*: header blocks without a body that are known
    again when the same bytes come, as keep-alive clients send them, instead of being parsed anew, and as many header
    lines without their request line; 0: none.
    """

    def __init__(self, role: str = "server", *, max_line: int = MAX_LINE, max_header: int = MAX_HEADER,
                 max_headers: int = MAX_HEADERS, max_body: int = MAX_PACKET, max_pipelined: int = MAX_PIPELINED,
                 heads_kept: int = HEADS_KEPT) -> None:
        import re                           # here, so that importing leviathan does not compile what is not used
        if role not in ("server", "client"):
            raise ValueError("role is %r; it must be 'server' or 'client'" % (role,))
        for name, value in (("max_line", max_line), ("max_header", max_header), ("max_headers", max_headers),
                            ("max_pipelined", max_pipelined)):
            if not 1 <= value <= 1 << 24:
                raise ValueError("%s is %r; it must be 1 to %d" % (name, value, 1 << 24))
        if not 0 <= max_body <= (1 << LARGEST_CLASS) - max_line - max_header - 4:
            raise ValueError("max_body is %r; header and body must be %d bytes at most" % (max_body, 1 << LARGEST_CLASS))
        self.role, self.client = role, role == "client"
        self.pauses_when_congested = not self.client
        self.max_line, self.max_header, self.max_headers, self.max_body = max_line, max_header, max_headers, max_body
        self.max_pipelined, self.heads_kept = max_pipelined, heads_kept
        # The longest is a chunked one: what is around its chunks may take a max_header and more, its trailers one too.
        self.max_packet = max_line + 3 * max_header + 8 + max_body + (max_body >> CHUNKED_SHIFT) + MAX_CHUNK_LINE + 2
        self._known: Dict[bytes, _Head] = {}            # {header block: what it means}, of requests without a body
        self._ordinary: Dict[bytes, Headers] = {}       # {their header lines: the same}, for requests of another target
        self._blocks: Dict[Any, bytes] = {}             # {a response's ordinary headers, as pairs: its lines}
        self._second = _Second(0.0)         # long over
        self._request_rule = re.compile(r"(%s) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n(%s)" % (_TOKEN, _FIELDS)).fullmatch
        self._status_rule = re.compile(
            r"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: ([^\0-\x08\x0a-\x1f\x7f]*))?\r\n(%s)" % _FIELDS).fullmatch
        self._line_rule = re.compile(r"(%s) ([!-~]+) HTTP/1\.1" % _TOKEN).fullmatch
        self._first_line_rule = re.compile(r"%s [!-~]+ HTTP/[0-9]\.[0-9]" % _TOKEN).fullmatch
        self._special_rule = re.compile(
            r"\n(host|connection|content-length|transfer-encoding|expect):([^\r]*)").findall
        self._fields_rule = re.compile(_FIELDS).fullmatch
        self._token_rule = re.compile(_TOKEN).fullmatch
        self._value_rule = re.compile(r"[^\0-\x08\x0a-\x1f\x7f]*").fullmatch
        self._target_rule = re.compile(r"[!-~]+").fullmatch
        self._host_rule = re.compile(r"[!$%&'()*+,\-.0-9:;=\[\]_~a-z]*").fullmatch      # RFC 3986 section 3.2, in lower case
        self._length_rule = re.compile(r"[0-9]+").fullmatch
        self._bare_rule = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0").search
        token = _TOKEN.encode()
        quoted = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
        self._chunk_rule = re.compile(rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*)"
                                      % (token, token, quoted)).fullmatch

    # -- owner thread: the connection's life --------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        """See StatefulFraming.begin."""
        session.protocol = _Exchange()      # type: ignore[attr-defined]

    def refuse(self, session: Session, error: BaseException) -> Optional[bool]:
        """Answer what was wrong, behind the answers that are owed. True: it is closed when those have left."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if self.client:
            return False
        if exchange.done:
            return bool(exchange.pending)
        status, reason = getattr(error, "status", 400), Reason.PROTOCOL
        if isinstance(error, PoolExhausted):            # of a chunked body, whose length nobody told
            status, reason = 413, Reason.ERROR
        elif isinstance(error, TimeoutError):
            status, reason = 408, Reason.TIMEOUT
            if not session.filled:          # it is only idle, which needs no answer
                return False
        return self._give_up(session, status, reason, error)

    def owes(self, session: Session) -> bool:
        """See StatefulFraming.owes: an answer, or the 100 Continue that comes behind it."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if self.client:
            return False
        with exchange.lock:
            return exchange.due or bool(exchange.pending) and not session.filled

    def _give_up(self, session: Session, status: int, reason: Reason, error: BaseException) -> bool:
        """Queue an error's answer behind all others, and parse no more."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        head = exchange.head
        exchange.done = True
        exchange.reset()
        last = Request(head.method if head is not None else "GET")
        last._head.keep_alive = False
        with exchange.lock:
            exchange.pending.append(last)
            exchange.calm = exchange.due = False
            exchange.ending = reason, error
        text = "%d %s\n" % (status, _REASONS.get(status, ""))
        return self.answer(session, last, Response(status, None, text), None) is not False

    def ended(self, session: Session) -> Optional[bool]:
        """The peer sends no more. It gets the answers that it is owed all the same; see StatefulFraming.ended."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        exchange.eof = True
        if self.client:
            if exchange.length == _TO_END and session.partial is not None:
                session.received(session, session.partial.array, session.filled)        # now it is whole
            return False
        with exchange.lock:
            exchange.calm = exchange.due = False
            exchange.done = True
            return bool(exchange.pending)

    def leaving(self, session: Session, reason: Reason) -> Optional[bool]:
        """Requests that have been handed over are still answered, others are not read; see StatefulFraming.leaving."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if self.client:
            return False
        with exchange.lock:
            exchange.calm = exchange.due = False
            exchange.done = exchange.eof = True
            exchange.ending = exchange.ending or (reason, None)
            return bool(exchange.pending)

    def unfinished(self, session: Session) -> bool:
        """See StatefulFraming.unfinished: an answer in pieces, of which some are still to come."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if self.client or exchange is None:
            return False
        with exchange.lock:
            return bool(exchange.pending) and exchange.pending[0]._state == _STREAMED

    def closed(self, session: Session) -> None:
        """See StatefulFraming.closed."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        with exchange.lock:
            exchange.gone, exchange.calm, exchange.done = True, False, True
            dropped = list(exchange.pending)
            exchange.pending.clear()
        for request in dropped:
            for _, on_sent in request._parts or ():
                if on_sent is not None:
                    _guarded(session, on_sent, False)

    # -- any thread: sending ------------------------------------------------------------------------------------------

    def encode(self, packet: Any) -> bytes:
        """There is no such thing as an answer to nobody: ValueError."""
        raise ValueError("HTTP has no broadcast: each message is an answer, or gets one")

    def send(self, session: Session, packet: Any, on_sent: Optional[OnSent] = None) -> bool:
        """See StatefulFraming.send: a client's request, or a server's answer to the request being handled, or the oldest."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if self.client:
            return self._request(session, packet, on_sent)
        if exchange is None:
            return False                    # not connected yet
        request = exchange.current
        if request is not None:
            own = session.owner._is_owned()
            # On Windows `owner` is always NOBODY: there the engine knows whose the session is just now.
            if own or session.communicator.queue.engine.owns(session):
                done = self.answer(session, request, packet, on_sent, own)
                if done is None:
                    raise ValueError("%r is answered already" % request)
                return done
        while True:
            with exchange.lock:
                if exchange.gone or session.state is not State.OPEN:
                    return False
                oldest = next((request for request in exchange.pending if request._state == _OPEN), None)
            if oldest is None:
                raise ValueError("there is no request to answer")
            done = self.answer(session, oldest, packet, on_sent)
            if done is not None:            # else another thread was faster
                return done

    def answer(self, session: Session, request: Request, packet: Any, on_sent: Optional[OnSent],
               own: bool = False) -> Optional[bool]:
        """Answer *request*. None if that was done before, False if the connection has ended. *own*: on its own thread."""
        head = request._head
        # The fast path: what is sent most, on the thread that owns the session, while nothing else is owed.
        if own and head.plain and on_sent is None:
            data = None
            kind = type(packet)
            second = self._second
            if not second.begin <= time.time() < second.end:        # it is over, or the clock was put back
                second = self._second = _Second(time.time())
            if kind is Response:
                body = packet.body
                if type(body) is bytes:
                    headers = packet.headers
                    try:
                        key = packet.status, (tuple(headers.items()) if type(headers) is dict else
                                              tuple(headers) if type(headers) is list else headers or ()), len(body)
                        # Found, it has been looked at already. With the thread asked for once and no more, this made
                        # 2.68 instead of 2.47 times uvicorn's requests.
                        prefix = second.prefixes.get(key) or self._prefix(second, *key)
                    except TypeError:
                        prefix = b""        # it has a list in it, or what else is not hashable
                    if prefix:
                        data = prefix + body
            elif kind is bytes and len(packet) <= SEND_INLINE:
                data = b"%bContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n%b" % (
                    self._start(200), len(packet), packet)
            if data is not None:
                exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
                with exchange.lock:
                    if request._state:
                        return None
                    pending = exchange.pending
                    alone = exchange.calm and len(pending) == 1 and pending[0] is request
                    if alone:
                        request._state = _ANSWERED
                        pending.clear()
                # Only this thread adds requests, so nobody can come in between. But another thread may have answered the
                # request before this one, and its answer be in the mail: `put` asks whose the session is now.
                if alone:
                    return session.put(data)
                return self.emit(session, request, (data,), _ANSWERED, False, None)
        chunks, state, closes = self._encode_answer(head, packet)
        return self.emit(session, request, chunks, state, closes, on_sent)

    def emit(self, session: Session, request: Request, chunks: Tuple[bytes, ...], state: int, closes: bool,
             on_sent: Optional[OnSent], before: int = _OPEN) -> Optional[bool]:
        """Queue a part of the answer to *request*, when its turn has come; that takes it from state *before* to *state*.

        *closes*: the connection ends behind the whole of it. None if it is in another state, False if nobody is there.
        """
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        with exchange.lock:
            if exchange.gone or session.state is not State.OPEN:
                return False
            if request._state != before:
                return None
            pending = exchange.pending
            request._state = state
            if closes:
                request._closes = exchange.done = True      # what is still received is nobody's
            if pending[0] is not request:
                size = sum(map(len, chunks))
                if exchange.waiting and exchange.waiting + size > session.send_limit:
                    session.overflow()      # it asks for much, and one of the answers before it does not come
                    return False
                exchange.waiting += size
                if request._parts is None:
                    request._parts = []
                request._parts.append((chunks, on_sent))
                return True
            if state != _OPEN:
                session.last = time.monotonic()         # it was no idle peer that we let wait
            done = self._write(session, chunks, on_sent)
            if state == _ANSWERED:
                self._advance(session, exchange)
            return done

    @staticmethod
    def _write(session: Session, chunks: Tuple[bytes, ...], on_sent: Optional[OnSent]) -> bool:
        """Queue bytes; none at all are sent at once."""
        if chunks:
            return session._queue(chunks, on_sent)
        if on_sent is not None:
            session.communicator.queue.engine.run_on_owner(session, _Core.on_sent, session, on_sent, True)
        return True

    def _advance(self, session: Session, exchange: _Exchange) -> None:
        """The oldest request is answered: send what was waiting for that. The lock is held."""
        pending = exchange.pending
        while pending:
            request = pending[0]
            for chunks, on_sent in request._parts or ():
                exchange.waiting -= sum(map(len, chunks))
                if not self._write(session, chunks, on_sent) and on_sent is not None:
                    session.communicator.queue.engine.run_on_owner(session, _Core.on_sent, session, on_sent, False)
            request._parts = None
            if request._state != _ANSWERED:
                break
            pending.popleft()
            if request._closes:
                self._finish(session, exchange)
                return
        if not pending:
            if exchange.due:
                session.communicator.queue.engine.run_on_owner(session, self._ask, session)
            if exchange.eof:
                self._finish(session, exchange)
        if exchange.held and len(pending) <= self.max_pipelined // 2:
            exchange.held = False
            exchange.calm = not (exchange.due or exchange.eof)
            session.resume_for(PAUSED_PIPELINED)

    @staticmethod
    def _ask(session: Session) -> None:
        """All that comes before a body is answered: ask for it. On the session's thread, where its deadline is looked at."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        with exchange.lock:
            if not exchange.due:            # it did not wait; or it will not be read
                return
            exchange.due = False
            exchange.calm = not (exchange.held or exchange.eof)
            if session.since:
                session.since = time.monotonic()
            session._queue((b"HTTP/1.1 100 Continue\r\n\r\n",), None)

    def _finish(self, session: Session, exchange: _Exchange) -> None:
        """The last answer is queued: close behind it. The lock is held."""
        exchange.gone, exchange.calm = True, False
        for request in exchange.pending:    # behind an answer that closes: nobody will read theirs
            for _, on_sent in request._parts or ():
                if on_sent is not None:
                    session.communicator.queue.engine.run_on_owner(session, _Core.on_sent, session, on_sent, False)
        exchange.pending.clear()
        reason, error = exchange.ending or (Reason.NORMAL, None)
        session.end(True, reason, error)

    def _prefix(self, second: _Second, status: int, headers: Any, size: int) -> bytes:
        """All that stands before a body of *size* bytes, and is kept for this second; b"" if it is no ordinary answer."""
        block = self._blocks.get(headers)
        if block is None or size > SEND_INLINE or status < 200 or status in _BODILESS:
            return b""
        prefix = b"%b%bContent-Length: %d\r\n\r\n" % (self._start(status), block, size)
        if len(second.prefixes) < HEADS_KEPT:
            second.prefixes[status, headers, size] = prefix
        return prefix

    def _start(self, status: int) -> bytes:
        """Status line and Date; made once a second for each status."""
        now = time.time()
        second = self._second
        if not second.begin <= now < second.end:
            second = self._second = _Second(now)
        found = second.starts.get(status)
        if found is None:
            found = second.starts[status] = self._status_line(status) + second.date
        return found

    @staticmethod
    def _status_line(status: int) -> bytes:
        if not isinstance(status, int) or not 100 <= status <= 599 or status == 101:
            raise ValueError("status is %r; it must be 100 to 599, and not 101: there is no other protocol" % (status,))
        return b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, "").encode())

    def _lines(self, headers: Any) -> Tuple[bytes, bool, bool, bool, Optional[int]]:
        """Check and encode headers: (lines, has Content-Type, has Date (a client's: Host), says close, Content-Length).

        Content-Length and Connection are not among the lines. Raises ValueError for what would be no header, so that
        nobody can smuggle in lines by a value (CWE-113).
        """
        lines: List[str] = []
        typed = dated = closes = False
        length: Optional[int] = None
        pairs = tuple(headers.items() if hasattr(headers, "items") else headers or ())
        for name, value in pairs:
            name = name.decode("latin-1") if isinstance(name, bytes) else str(name)
            value = value.decode("latin-1") if isinstance(value, bytes) else str(value)
            if not self._token_rule(name):
                raise ValueError("%r is no header's name" % (name,))
            if not self._value_rule(value):
                raise ValueError("the value of %s has a control character in it" % name)
            lower = name.lower()
            if lower == "content-length":
                if not self._length_rule(value) or len(value) > 18 or length not in (None, int(value)):
                    raise ValueError("Content-Length is %r" % (value,))
                length = int(value)
                continue
            if lower == "transfer-encoding":
                raise ValueError("Transfer-Encoding is added where it is needed, and only there")
            if lower == "connection":
                tokens = [token.strip(" \t").lower() for token in value.split(",")]
                closes = closes or "close" in tokens
                if closes or tokens == ["keep-alive"]:
                    continue
            typed = typed or lower == "content-type"
            if lower == ("host" if self.client else "date"):
                if dated and self.client:
                    raise ValueError("a request has one Host, not %r as well (RFC 9112 section 3.2)" % (value,))
                dated = True
            lines.append("%s: %s\r\n" % (name, value))
        try:
            block = "".join(lines).encode("latin-1")
        except UnicodeEncodeError as error:
            raise ValueError("a header's value has characters that are not latin-1: %s" % error) from None
        if not (dated or closes or length is not None) and len(block) <= HEAD_KEPT_MAX and \
                all(type(pair) is tuple and type(pair[0]) is str is type(pair[1]) for pair in pairs):
            if len(self._blocks) >= HEADS_KEPT:
                self._blocks.clear()
            self._blocks[pairs] = block     # the same headers, checked and encoded, are found by the fast path
        return block, typed, dated, closes, length

    def _encode_answer(self, head: _Head, packet: Any) -> Tuple[Tuple[bytes, ...], int, bool]:
        """(bytes, state of the request behind it, whether it closes) of a Response, bytes or str."""
        if not isinstance(packet, Response):
            if not isinstance(packet, (bytes, str, bytearray, memoryview)):
                raise TypeError("an answer is a Response, bytes or str, not %s" % type(packet).__name__)
            kind = None if isinstance(packet, str) else {"Content-Type": "application/octet-stream"}
            packet = Response(200, kind, packet)
        status, body = packet.status, packet.body
        start = self._start(status)
        self._check_tunnel(head, status)
        block, typed, dated, closes, length = self._lines(packet.headers)
        if isinstance(body, str):
            body = body.encode("utf-8")
            if not typed:
                block += b"Content-Type: text/plain; charset=utf-8\r\n"
        body = b"" if body is None else _octets(body)
        if dated:
            start = self._status_line(status)
        if status < 200:                    # interim: the answer is still to come. HTTP/1.0 does not know it.
            return (self._status_line(status) + block + b"\r\n",) if head.version != "1.0" else (), _OPEN, False
        closes = closes or not head.keep_alive
        bodiless = head.method == "HEAD" or status in _BODILESS
        if status == 205:
            body = b""                      # unlike 204 it says so by a length (RFC 9110 section 15.3.6)
        if length is None:
            size = b"" if status == 204 or status == 304 and not body else b"Content-Length: %d\r\n" % len(body)
        elif status == 204:
            raise ValueError("204 has no Content-Length (RFC 9110 section 8.6)")
        elif length != len(body) and (status == 205 or not bodiless):
            raise ValueError("Content-Length is %d, and the body has %d bytes" % (length, len(body)))
        else:
            size = b"Content-Length: %d\r\n" % length
        data = start + block + self._connection(head, closes) + size + b"\r\n"
        if bodiless or not body:
            return (data,), _ANSWERED, closes
        return (data + body,) if len(body) <= SEND_INLINE else (data, body), _ANSWERED, closes

    @staticmethod
    def _check_tunnel(head: _Head, status: int) -> None:
        if head.method == "CONNECT" and 200 <= status < 300:
            raise ValueError("%d to CONNECT begins a tunnel (RFC 9110 section 9.3.6), which Http cannot be" % status)

    @staticmethod
    def _connection(head: _Head, closes: bool) -> bytes:
        return b"Connection: close\r\n" if closes else b"Connection: keep-alive\r\n" if head.version == "1.0" else b""

    def stream_head(self, request: Request, status: int, headers: Any) -> Tuple[bytes, bool, Optional[int], bool, bool]:
        """(head, chunked, Content-Length, no body is sent, whether it closes) of an answer in pieces."""
        head = request._head
        start = self._start(status)
        block, _, dated, closes, length = self._lines(headers)
        self._check_tunnel(head, status)
        if status < 200:
            raise ValueError("an answer in pieces has a final status")
        if dated:
            start = self._status_line(status)
        if status == 205:
            if length:
                raise ValueError("Content-Length is %d, and 205 has no body (RFC 9110 section 15.3.6)" % length)
            block, length = block + b"Content-Length: 0\r\n", None
        silent = head.method == "HEAD" or status in _BODILESS
        chunked = length is None and head.version != "1.0" and status not in _BODILESS
        closes = closes or not head.keep_alive or length is None and head.version == "1.0" and not silent
        if length is not None and status != 204:
            block += b"Content-Length: %d\r\n" % length
        elif chunked:
            block += b"Transfer-Encoding: chunked\r\n"
        return start + block + self._connection(head, closes) + b"\r\n", chunked, length, silent, closes

    def _request(self, session: Session, packet: Any, on_sent: Optional[OnSent]) -> bool:
        """Send a client's request; the responses come in the same order."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if isinstance(packet, str):
            packet = Request("GET", packet)
        if not isinstance(packet, Request):
            raise TypeError("a request is a Request, or a str for a GET, not %s" % type(packet).__name__)
        method, target, body = packet.method, packet.target, packet.body
        if not self._token_rule(method) or method == "CONNECT":
            raise ValueError("%r cannot be a method here" % (method,))
        if not self._target_rule(target):
            raise ValueError("%r cannot be a target: it must be visible ASCII, percent-encoded" % (target,))
        block, _, hosted, closes, length = self._lines(packet.headers.items())
        if length is not None and length != len(body):
            raise ValueError("Content-Length is %d, and the body has %d bytes" % (length, len(body)))
        if hosted:
            host = b""
        else:
            host = b"Host: %b\r\n" % (_address_text(session.peer) if isinstance(session.peer, tuple) else "localhost").encode()
        if body or length is not None or method in ("POST", "PUT", "PATCH"):
            block += b"Content-Length: %d\r\n" % len(body)
        if closes:
            block += b"Connection: close\r\n"
        data = b"%b %b HTTP/1.1\r\n%b%b\r\n" % (method.encode(), target.encode(), host, block)
        chunks = (data + body,) if len(body) <= SEND_INLINE else (data, body)
        if exchange is None:
            return False
        with exchange.lock:
            if exchange.gone or exchange.done or exchange.held:
                return False
            exchange.pending.append(packet)
            if on_sent is None and len(chunks) == 1:
                done = session.put(chunks[0])
            else:
                done = session._queue(chunks, on_sent)
            if not done:
                exchange.pending.pop()
            elif closes:
                exchange.held = True        # RFC 9112 section 9.6: nothing is sent behind it
            return bool(done)

    # -- owner thread: receiving --------------------------------------------------------------------------------------

    def receiver(self, on_packet: OnPacket, rest: Callable[[Session, Any, int, int], None],
                 fail: Callable[[Session, BaseException], None]) -> Callable[[Session, Any, int], None]:
        """See Framing.receiver. A request without a body that is known again is handed on with two look-ups."""
        known = self._known
        limit = self.max_pipelined
        new = Request.__new__
        raised = self._raised
        general = self._received
        if self.client:
            return lambda session, buffer, end: general(session, buffer, end, on_packet, rest, fail)

        def received(session: Session, buffer: Any, end: int) -> None:
            exchange: _Exchange = session.protocol      # type: ignore[attr-defined]
            if session.partial is None and end <= HEAD_KEPT_MAX and not exchange.done:
                # The hot path: one request, and all of it, as nearly every receive of a keep-alive connection is.
                head = known.get(buffer[:end])
                if head is not None:
                    request = new(Request)
                    request._head = head
                    request.session = session
                    request.body = b""
                    request.trailers = _NO_HEADERS
                    request._state = 0
                    request._parts = None
                    request._closes = False
                    pending = exchange.pending
                    with exchange.lock:
                        pending.append(request)
                    exchange.current = request
                    session.direct = True
                    try:
                        on_packet(session, request)
                    except BaseException as error:
                        raised(session, request, error)
                    exchange.current = None
                    if len(pending) >= limit:
                        self._hold(session, exchange)
                    return
            general(session, buffer, end, on_packet, rest, fail)

        return received

    def _received(self, session: Session, buffer: Any, end: int, on_packet: OnPacket,
                  rest: Callable[[Session, Any, int, int], None], fail: Callable[[Session, BaseException], None]) -> None:
        """The general form: any number of messages, whole or not."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        start = 0
        try:
            while start < end and not exchange.done:
                stop = self._scan(session, exchange, buffer, start, end, 0 if start else session.seen)
                if not stop:
                    break
                if self.client:
                    start = self._deliver(session, exchange, buffer, start, stop, end, on_packet)
                else:
                    session.direct = not start and stop == end
                    start = self._dispatch(session, exchange, buffer, start, stop, on_packet)
                if session.paused:
                    break
        except BaseException as error:
            fail(session, error)
            exchange.done = True
        if exchange.done:
            start = end                     # what is behind the last message is nobody's
        if start != end or session.partial is not None:
            rest(session, buffer, start, end)

    def _dispatch(self, session: Session, exchange: _Exchange, buffer: Any, start: int, stop: int,
                  on_packet: OnPacket) -> int:
        """Hand a whole request to the handler. Returns where the next message begins."""
        if exchange.head is None:
            return stop                     # an empty line in front of a request
        request = Request.__new__(Request)
        request._head = head = exchange.head
        request.session = session
        request.body, request.trailers = self._content(exchange, buffer, start, stop)
        request._state, request._parts, request._closes = _OPEN, None, False
        exchange.reset()
        if not head.keep_alive:
            exchange.done = True
        with exchange.lock:
            exchange.pending.append(request)
            if exchange.due:                # it did not wait for the 100
                exchange.due = False
                exchange.calm = not exchange.held
        exchange.current = request
        try:
            on_packet(session, request)
        except BaseException as error:
            self._raised(session, request, error)
        exchange.current = None
        if len(exchange.pending) >= self.max_pipelined:
            self._hold(session, exchange)
        return stop

    def _deliver(self, session: Session, exchange: _Exchange, buffer: Any, start: int, stop: int, end: int,
                 on_packet: OnPacket) -> int:
        """Hand a whole response to the handler. Returns where the next message begins."""
        response = exchange.head
        if response.status < 200:
            exchange.reset()                # interim: the answer is still to come
            return stop
        response.body, response.trailers = self._content(exchange, buffer, start, stop)
        exchange.reset()
        with exchange.lock:
            exchange.pending.popleft()
            extra = stop < end and response.keep_alive and not exchange.pending
            if extra or not response.keep_alive:
                exchange.done = True
        on_packet(session, response)
        if extra:                           # RFC 9112 section 6.3: never an answer to what is sent only now
            raise HttpError(400, "a response that nobody has asked for")
        if exchange.done and not exchange.eof:
            session.close()
        return stop

    def _hold(self, session: Session, exchange: _Exchange) -> None:
        """So many requests are not answered: receive no more before half of them are."""
        with exchange.lock:
            if len(exchange.pending) >= self.max_pipelined and not exchange.done:
                exchange.held, exchange.calm = True, False
                session._pause_for(PAUSED_PIPELINED)

    def _raised(self, session: Session, request: Request, error: BaseException) -> None:
        """A handler raised: 500, unless an answer has begun, behind those that are owed; then it closes."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        exchange.done = True
        if session.reason is not None:
            _callback_failed(session, error)
            return
        _log().error("a callback failed for %s; closing it", _address_text(session.peer), exc_info=error)
        with exchange.lock:
            exchange.ending = Reason.ERROR, error
        answer = Response(500, {"Connection": "close"}, "500 Internal Server Error\n")
        if self.answer(session, request, answer, None) is None:     # its own has begun, perhaps only now on another thread
            session.end(not self.unfinished(session), Reason.ERROR, error)

    # -- parsing: bytes in, boundaries out ----------------------------------------------------------------------------

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """See Framing.parse: known as soon as the header is there if it has a Content-Length, else when it is whole."""
        exchange = _Exchange()
        stop = self._scan(None, exchange, buffer, start, end, 0)
        return stop - start if stop else exchange.need

    def need(self, session: Session, buffer: Any, start: int, end: int, seen: int) -> int:
        """See Framing.need: what the receiver has found out."""
        exchange: _Exchange = session.protocol          # type: ignore[attr-defined]
        if exchange.due:
            session.since = FOREVER         # the body's deadline begins when it is asked for
        return exchange.need

    def _scan(self, session: Optional[Session], exchange: _Exchange, buffer: Any, start: int, end: int, seen: int) -> int:
        """Where the message that begins at *start* ends; 0 if that is not there yet. Raises HttpError.

        *exchange* knows what an earlier call has found of the same message.
        """
        if exchange.head is None:
            if self.client and session is not None and not exchange.pending:
                raise HttpError(400, "a response that nobody has asked for")
            skip = seen - 3 if seen > 3 else 0          # the end may have been cut in four
            first = start + skip
            part = buffer[first:end if end - first < HEAD_KEPT_MAX else first + HEAD_KEPT_MAX]
            at = part.find(b"\r\n\r\n")
            if at < 0 and first + HEAD_KEPT_MAX < end:   # seldom: so much is copied only when it must be
                part = buffer[first:min(end, start + self.max_line + self.max_header + 4)]
                at = part.find(b"\r\n\r\n")
            if not skip and part[:2] == b"\r\n" and not self.client:
                return start + 2            # RFC 9112 section 2.2: an empty line before a request is ignored
            if at < 0:
                self._check_incomplete(part, skip, buffer, start, end)
                return 0
            size = skip + at + 4
            self._begin_message(exchange, buffer[start:start + size] if skip else part[:size])
            exchange.size = exchange.scan = size
            if exchange.length > 0 and session is not None and \
                    1 << _power(size + exchange.length) > session.communicator.manager.memory_limit:
                raise HttpError(413, "a body of %d bytes is over the memory limit" % exchange.length)
            if exchange.length >= 0:
                exchange.need = size + exchange.length
            if exchange.length and session is not None and start + size == end:
                self._continue(session, exchange)
        length = exchange.length
        if length == _CHUNKED:
            return self._scan_chunks(exchange, buffer, start, end)
        if length == _TO_END:
            if end - start - exchange.size > self.max_body:
                raise HttpError(413, "a body of more than max_body (%d bytes)" % self.max_body)
            return end if exchange.eof else 0
        stop = start + exchange.need
        return stop if stop <= end else 0

    def _continue(self, session: Session, exchange: _Exchange) -> None:
        """The peer waits for a 100 before it sends the body, and gets it behind the answers it is owed."""
        if self.client or not exchange.head.expects:
            return
        with exchange.lock:
            if exchange.pending:
                exchange.due, exchange.calm = True, False
            else:
                session._queue((b"HTTP/1.1 100 Continue\r\n\r\n",), None)

    def _check_incomplete(self, part: bytes, skip: int, buffer: Any, start: int, end: int) -> None:
        """Refuse what can become no header any more, without waiting for its end."""
        found = self._bare_rule(part, 1 if skip else 0)
        if found:
            raise HttpError(400, "%r within a header" % found.group())
        have = end - start
        if have > self.max_line + 1:        # the CR of its end may be there, the LF not yet; so below
            line = bytes(buffer[start:start + self.max_line + 2]).find(b"\r\n")
            if line < 0:
                raise HttpError(414, "a first line of more than max_line (%d bytes)" % self.max_line)
            if have - line - 2 > self.max_header + 1:
                raise HttpError(431, "header lines of more than max_header (%d bytes)" % self.max_header)
        if not skip and part:
            first = part.split(b" ", 1)[0].split(b"\r", 1)[0]
            if first and not self._token_rule((first if not self.client else first.replace(b"/", b"")).decode("latin-1")):
                raise HttpError(400, "%r is not how a message begins" % first[:16])

    def _begin_message(self, exchange: _Exchange, data: bytes) -> None:
        """Parse the head of a message, up to its empty line."""
        if self.client:
            self._begin_response(exchange, data)
            return
        head = self._known.get(data)
        if head is None:
            head = self._parse_request(data)
            if head.plain and not head.length and len(data) <= HEAD_KEPT_MAX and self.heads_kept:
                if len(self._known) >= self.heads_kept:
                    self._known.clear()     # simpler than to forget the oldest; who is there soon is in again
                self._known[data] = head
        exchange.head, exchange.length = head, head.length

    def _parse_request(self, data: bytes) -> _Head:
        line = data.find(b"\r\n")
        headers = self._ordinary.get(data[line + 2:])
        if headers is not None and line <= self.max_line:
            found = self._line_rule(data[:line].decode("latin-1"))
            if found is not None:
                method, target = found.groups()
                if target[0] != "/" or method == "CONNECT":
                    self._check_target(method, target)
                head = _Head(method, target, "1.1", headers)
                head.plain = method not in ("HEAD", "CONNECT")
                return head
        text = data[:-2].decode("latin-1")
        found = self._request_rule(text)
        if found is None or line > self.max_line or len(text) - line - 2 > self.max_header:
            raise self._why(text, line)
        method, target, major, minor, fields = found.groups()
        if major != "1":
            raise HttpError(505, "HTTP/%s.%s" % (major, minor))
        if target[0] != "/" or method == "CONNECT":
            self._check_target(method, target)
        if fields.count("\r\n") > self.max_headers:
            raise HttpError(431, "more than max_headers (%d)" % self.max_headers)
        head = _Head(method, target, "1.0" if minor == "0" else "1.1", Headers._of(fields))
        hosts = 0
        lengths: List[str] = []
        codings: List[str] = []
        options: List[str] = []
        expected = ""
        for name, value in self._special_rule(text[line:].lower()):
            value = value.strip(" \t")
            if name == "host":
                hosts += 1
                if not self._host_rule(value):
                    raise HttpError(400, "the Host %r" % value[:64])
            elif name == "content-length":
                lengths.append(value)
            elif name == "transfer-encoding":
                codings += value.split(",")
            elif name == "connection":
                options += [option.strip(" \t") for option in value.split(",")]
            else:
                expected += value
        if hosts > 1 or not hosts and head.version != "1.0":
            raise HttpError(400, "%d Host lines" % hosts)
        head.keep_alive = "close" not in options and (head.version != "1.0" or "keep-alive" in options)
        if codings or lengths:
            head.length = self._length_of(head.version, codings, lengths)
            if head.length > self.max_body:
                raise HttpError(413, "a body of %d bytes is over max_body (%d)" % (head.length, self.max_body))
        if expected and head.version != "1.0":
            if expected != "100-continue":
                raise HttpError(417, "the expectation %r" % expected[:64])
            head.expects = True
        ordinary = head.keep_alive and head.version != "1.0"
        head.plain = ordinary and method not in ("HEAD", "CONNECT")
        if ordinary and not (lengths or codings or expected) and len(fields) <= HEAD_KEPT_MAX and self.heads_kept:
            if len(self._ordinary) >= self.heads_kept:
                self._ordinary.clear()
            self._ordinary[data[line + 2:]] = head.headers
        return head

    def _check_target(self, method: str, target: str) -> None:
        """The forms of a target that are not a path; RFC 9112 section 3.2."""
        if method == "CONNECT":
            right = target[0] != "/" and self._host_rule(target.lower()) is not None
        elif target == "*":
            right = method == "OPTIONS"
        else:
            scheme, _, rest = target.partition("://")
            host = rest.split("/", 1)[0].split("?", 1)[0].lower()
            # RFC 9110 sections 4.2.1 and 4.2.4: no empty host, and no user's name before it, which only deceives.
            right = scheme.lower() in ("http", "https") and host[:1] not in ("", ":") and self._host_rule(host) is not None
        if not right:
            raise HttpError(400, "%s of %r" % (method, target[:64]))

    def _why(self, text: str, line: int) -> HttpError:
        """What is wrong with a head that the rule does not match, or that is too long."""
        if line > self.max_line:
            return HttpError(414, "a request line of %d bytes is over max_line (%d)" % (line, self.max_line))
        if len(text) - line - 2 > self.max_header:
            return HttpError(431, "header lines of more than max_header (%d bytes)" % self.max_header)
        if not self._first_line_rule(text[:line]):
            return HttpError(400, "%r is no request line" % text[:line][:64])
        for field in text[line + 2:].split("\r\n"):
            if field and not self._fields_rule(field + "\r\n"):
                return HttpError(400, "%r is no header line" % field[:64])
        return HttpError(400, "not a header")

    def _length_of(self, version: str, codings: List[str], lengths: List[str]) -> int:
        """What Transfer-Encoding and Content-Length say together; RFC 9112 section 6.3, its strict reading."""
        if codings:
            names = [coding.strip(" \t") for coding in codings]
            if version == "1.0":
                raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
            if lengths:
                raise HttpError(400, "Transfer-Encoding and Content-Length")
            if names == ["chunked"]:
                return _CHUNKED
            if "" in names or "chunked" in names[:-1]:
                raise HttpError(400, "chunked is not last in %r" % ",".join(names)[:64])
            raise HttpError(501, "the transfer coding %r" % ",".join(names)[:64])
        numbers = set()
        for text in lengths:
            if not self._length_rule(text):
                raise HttpError(400, "the Content-Length %r" % text[:64])
            if len(text) > 18:              # int() of very many digits takes quadratic time
                raise HttpError(413, "a Content-Length of %d digits" % len(text))
            numbers.add(int(text))
        if len(numbers) > 1:
            raise HttpError(400, "different Content-Length lines")
        return numbers.pop()

    def _begin_response(self, exchange: _Exchange, data: bytes) -> None:
        text = data[:-2].decode("latin-1")
        found = self._status_rule(text)
        line = text.find("\r\n")
        if found is None or line > self.max_line or len(text) - line - 2 > self.max_header:
            raise HttpError(400, "%r is no response" % text[:64])
        minor, status, reason, fields = found.groups()
        if fields.count("\r\n") > self.max_headers:
            raise HttpError(400, "more than max_headers (%d)" % self.max_headers)
        with exchange.lock:
            request = exchange.pending[0] if exchange.pending else None
        if request is None:
            raise HttpError(400, "a response that nobody has asked for")
        response = Response(int(status), Headers._of(fields))
        response.reason, response.version = reason or "", "1.0" if minor == "0" else "1.1"
        response.request = request
        lengths: List[str] = []
        codings: List[str] = []
        options: List[str] = []
        for name, value in self._special_rule(text[line:].lower()):
            value = value.strip(" \t")
            if name == "content-length":
                lengths.append(value)
            elif name == "transfer-encoding":
                codings += value.split(",")
            elif name == "connection":
                options += [option.strip(" \t") for option in value.split(",")]
        if response.status == 101:
            raise HttpError(400, "101 Switching Protocols, which nobody has asked for")
        response.keep_alive = "close" not in options and (response.version != "1.0" or "keep-alive" in options)
        if response.status < 200 or response.status in (204, 304) or request.method == "HEAD":
            exchange.length = 0
        elif codings or lengths:
            exchange.length = self._length_of(response.version, codings, lengths)
        else:
            exchange.length = _TO_END
            response.keep_alive = False
        if exchange.length > self.max_body:
            raise HttpError(413, "a body of %d bytes is over max_body (%d)" % (exchange.length, self.max_body))
        exchange.head = response

    def _scan_chunks(self, exchange: _Exchange, buffer: Any, start: int, end: int) -> int:
        """Go on where the last call stopped: chunk by chunk, then the trailers. Returns where the message ends, or 0."""
        rule = self._chunk_rule
        exchange.need = 0
        while not exchange.tail:
            at = start + exchange.scan
            line = buffer[at:min(end, at + MAX_CHUNK_LINE + 2)]
            size = line.find(b"\r\n")
            if size < 0:
                if len(line) >= MAX_CHUNK_LINE + 2:
                    raise HttpError(400, "a chunk's size line of more than %d bytes" % MAX_CHUNK_LINE)
                if self._bare_rule(line) or line and not rule(line[:1]):
                    raise HttpError(400, "%r is no chunk's size" % line[:32])
                return 0
            found = rule(line[:size])
            if found is None:
                raise HttpError(400, "%r is no chunk's size" % line[:32])
            length = int(found.group(1), 16)
            if exchange.total + length > self.max_body:
                raise HttpError(413, "a chunked body of more than max_body (%d bytes)" % self.max_body)
            spare = exchange.spare + size + 4
            if spare > self.max_header + (exchange.total >> CHUNKED_SHIFT):
                raise HttpError(400, "%d bytes of sizes and extensions for a chunked body of %d" % (spare, exchange.total))
            if not length:
                exchange.scan += size + 2
                exchange.tail = exchange.scan
                break
            behind = at + size + 2 + length
            close = buffer[behind:min(end, behind + 2)] if behind < end else b""
            if close != b"\r\n"[:len(close)]:
                raise HttpError(400, "a chunk of %d bytes does not end with CRLF" % length)
            if len(close) < 2:
                if length > GROW_MAX:       # the RecvBuf for all of it at once
                    exchange.need = behind + 2 - start
                return 0
            exchange.spare = spare
            exchange.total += length
            exchange.scan = behind + 2 - start
        # The trailers end with an empty line, which may come at once. `scan` is how far they were searched.
        first = start + exchange.tail
        if buffer[first:min(end, first + 2)] == b"\r\n":
            exchange.scan = exchange.tail + 2
            return first + 2
        skip = max(exchange.tail, exchange.scan - 3)
        part = bytes(buffer[start + skip:min(end, first + self.max_header + 4)])
        at = part.find(b"\r\n\r\n")
        if at < 0:
            found_bare = self._bare_rule(part, 1 if skip > exchange.tail else 0)
            if found_bare:
                raise HttpError(400, "%r within the trailers" % found_bare.group())
            if end - first >= self.max_header + 4:
                raise HttpError(431, "trailers of more than max_header (%d bytes)" % self.max_header)
            exchange.scan = end - start
            return 0
        stop = start + skip + at + 4
        fields = bytes(buffer[first:stop - 2]).decode("latin-1")
        if not self._fields_rule(fields):
            raise HttpError(400, "the trailers %r" % fields[:64])
        if fields.count("\r\n") > self.max_headers:
            raise HttpError(431, "more trailers than max_headers (%d)" % self.max_headers)
        return stop

    def _content(self, exchange: _Exchange, buffer: Any, start: int, stop: int) -> Tuple[bytes, Headers]:
        """Body and trailers of a whole message."""
        if exchange.length != _CHUNKED:
            return bytes(buffer[start + exchange.size:stop]) if exchange.length else b"", _NO_HEADERS
        data = bytes(buffer[start + exchange.size:start + exchange.tail])
        parts: List[bytes] = []
        at = 0
        while True:
            line = data.find(b"\r\n", at)
            length = int(data[at:line].split(b";", 1)[0].strip(b" \t"), 16)
            if not length:
                break
            parts.append(data[line + 2:line + 2 + length])
            at = line + 4 + length
        trailers = bytes(buffer[start + exchange.tail:stop - 2]).decode("latin-1")
        return b"".join(parts), Headers._of(trailers) if trailers else _NO_HEADERS


# ---------------------------------------------------------------------------------------------------------------------
# RESP: Redis' protocol, versions 2 and 3, both sides (https://redis.io/docs/latest/develop/reference/protocol-spec/)
# ---------------------------------------------------------------------------------------------------------------------

BULK_MAX = 1 << 29              # proto-max-bulk-len of redis.conf: 512 MB
LINE_MAX = 1 << 16              # PROTO_INLINE_MAX_SIZE in Redis' server.h: 64 KiB
ARGUMENTS_MAX = 1 << 20         # words of a command, as Redis' processMultibulkBuffer had it before 7.0
SUBSCRIBED_MAX = 1 << 20        # subscriptions of a client; a server may confirm what nobody has asked for
ALIKE_MAX = 256                 # keys with the same hash in a set or a map: each is compared with all those before it
NUMBERS_MAX = 1 << 14           # keys of a set or a map that are no strings: 165,149 chosen numbers took 26 s, this many 0.2 s
BIG_DIGITS = 4300               # of a RESP3 big number: what Python's int() takes (sys.int_info); more is slow, too


class RespError(LeviathanError):
    """An error reply. It is a value: handed to handlers and sent like any other, never raised by leviathan.

    `message` is the whole of it, `code` its first word: ERR, WRONGTYPE, NOAUTH. Raise it yourself if you like.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def code(self) -> str:
        """The first word."""
        return self.message.split(" ", 1)[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RespError) and other.message == self.message

    def __hash__(self) -> int:
        return hash(self.message)


class Push(list):               # type: ignore[type-arg]
    """What a server sends unasked: a message of a channel, an invalidation. `kind` is its first item."""

    @property
    def kind(self) -> Any:
        """b"message", b"subscribe", b"invalidate" ..."""
        return self[0] if self else None


class Pipeline(list):           # type: ignore[type-arg]
    """Commands that leave in one write and are answered by one list of replies."""


class Verbatim(bytes):
    """A RESP3 verbatim string: bytes with a `format` of three characters, txt or mkd."""

    format: str

    def __new__(cls, data: bytes, format: str = "txt") -> Verbatim:
        """Raises ValueError for a format that has not three characters."""
        if len(format.encode()) != 3:
            raise ValueError("format is %r; it has three characters" % (format,))
        self = super().__new__(cls, data)
        self.format = format
        return self


class _Heads(dict):             # type: ignore[type-arg]
    """{n: b"$n"}, made for short ones; a bulk's first line is compared with what its length asks for."""

    def __missing__(self, size: int) -> bytes:
        return b"$%d" % size


_MORE: Any = object()           # "it is not all there yet": None is a value
_HEADS = _Heads((size, b"$%d" % size) for size in range(1025))
_WIDTHS = {b"*%d" % count: 1 + 2 * count for count in range(1, 129)}        # {first line: lines of the whole command}
_STATUS = {text: b"+%b\r\n" % text.encode() for text in ("OK", "PONG", "QUEUED")}
_READY: Dict[bytes, Any] = {b"+OK": "OK", b"+PONG": "PONG", b"+QUEUED": "QUEUED", b"$-1": None, b"_": None, b"*-1": None,
                            b"#t": True, b"#f": False}
_READY.update((b":%d" % number, number) for number in range(-1, 1024))
# {first item of a message: (prefix of its kind, does it add to the subscriptions)}; the others carry data.
_CONFIRMS = {b"%b%bsubscribe" % (prefix, way): (prefix, not way) for prefix in (b"", b"p", b"s") for way in (b"", b"un")}
_MESSAGES = frozenset((b"message", b"pmessage", b"smessage", *_CONFIRMS))


class _RespState:
    """What is remembered of a connection: how far the packet that is incomplete was read, and who waits for a reply."""

    __slots__ = ("version", "at", "seen", "bulk", "kind", "left", "items", "stack", "lock", "pending", "subscribed", "pushes",
                 "attributes", "paused")

    def __init__(self) -> None:
        self.version = 2
        self.paused = False                 # a handler paused in the middle of what was received
        self.at = 0                         # bytes of the incomplete packet that need not be read again
        self.seen = 0                       # bytes behind them that hold no end of a line
        self.bulk = -1                      # size of the bulk that comes next, its content not all there; -1: none
        self.kind = b""                     # and its type
        self.left = 0                       # server: words of the command still to come
        self.items: List[bytes] = []        # and those that have come
        self.stack: List[List[Any]] = []    # client: [type, values still to come, values] of each open aggregate
        self.lock = threading.Lock()        # makes "append to pending" and "queue the bytes" one step
        self.pending: Deque[Any] = deque()  # callback, None, _Batch or _Subscribing for each request, in their order
        self.subscribed: Set[Tuple[bytes, Any]] = set()         # (prefix of the kind, channel)
        self.pushes = False                 # the server sends messages as RESP3's own type
        self.attributes: Any = None         # what stood before the reply that is being handled


class _Batch:
    """A Pipeline that is not answered yet."""

    __slots__ = ("callback", "count", "replies")

    def __init__(self, callback: Any, count: int) -> None:
        self.callback, self.count = callback, count
        self.replies: List[Any] = []


class _Subscribing:
    """A command that changes subscriptions: answered by a message for each channel, or by one error."""

    __slots__ = ("callback", "name", "left")

    def __init__(self, callback: Any, name: bytes, left: int) -> None:
        self.callback, self.name, self.left = callback, name, left      # left 0: all channels there are


def _hashable(value: Any) -> Any:
    """A value as a key of a map or an item of a set."""
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    return frozenset(value) if isinstance(value, set) else value


def _keys(values: List[Any]) -> List[Any]:
    """Values as keys of a map or items of a set. Raises FramingError if finding their places would take quadratic time.

    What a number's hash is, and a list's of numbers, anybody can compute; those of bytes and str are secret.
    """
    keys = list(map(_hashable, values))
    if len(keys) > ALIKE_MAX:
        count = sum(not isinstance(key, (bytes, str)) for key in keys)
        if count > NUMBERS_MAX:             # different hashes can be chosen so that they meet, too
            raise FramingError("%d keys are no strings" % count)
        alike = max(Counter(map(hash, keys)).values())
        if alike > ALIKE_MAX:
            raise FramingError("%d keys have the same hash" % alike)
    return keys


def _resp_number(value: float) -> bytes:
    """A double as Redis writes it: 3, 1.5, inf."""
    text = repr(value)
    return (text[:-2] if text.endswith(".0") else text).encode()


def _resp_bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def _resp_line(text: str) -> bytes:
    """A text that must stay on its line."""
    return text.replace("\r", " ").replace("\n", " ").encode("utf-8", "surrogateescape")


def _resp_value(value: Any, version: int, out: List[bytes]) -> None:
    """Append the bytes of a reply to *out*. Raises TypeError for what RESP has no type for."""
    three = version >= 3
    if isinstance(value, bytes):
        if three and isinstance(value, Verbatim):
            out.append(b"=%d\r\n%b:%b\r\n" % (len(value) + 4, value.format.encode(), value))
        else:
            out.append(_resp_bulk(value))
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogateescape")
        out.append(_resp_bulk(data) if b"\r" in data or b"\n" in data else b"+%b\r\n" % data)
    elif value is None:
        out.append(b"_\r\n" if three else b"$-1\r\n")
    elif isinstance(value, bool):
        out.append((b"#t\r\n" if value else b"#f\r\n") if three else b":%d\r\n" % value)
    elif isinstance(value, int):
        if -1 << 63 <= value < 1 << 63:
            out.append(b":%d\r\n" % value)
        else:
            out.append(b"(%d\r\n" % value if three else _resp_bulk(b"%d" % value))
    elif isinstance(value, float):
        out.append(b",%b\r\n" % _resp_number(value) if three else _resp_bulk(_resp_number(value)))
    elif isinstance(value, RespError):
        out.append(b"-%b\r\n" % _resp_line(value.message))
    elif isinstance(value, dict):
        out.append(b"%b%d\r\n" % (b"%" if three else b"*", len(value) if three else 2 * len(value)))
        for pair in value.items():
            _resp_value(pair[0], version, out)
            _resp_value(pair[1], version, out)
    elif isinstance(value, (list, tuple, set, frozenset)):
        mark = b"*" if not three or isinstance(value, tuple) else b">" if isinstance(value, Push) else \
            b"*" if isinstance(value, list) else b"~"
        out.append(b"%b%d\r\n" % (mark, len(value)))
        for item in value:
            _resp_value(item, version, out)
    elif isinstance(value, (bytearray, memoryview)):
        out.append(_resp_bulk(bytes(value)))
    else:
        raise TypeError("a reply cannot carry %s" % type(value).__name__)


def _resp_argument(value: Any) -> bytes:
    """A word of a command. Raises TypeError for None, bool and the like: Redis has no such words."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int) and not isinstance(value, bool):
        return b"%d" % value
    if isinstance(value, float):
        return _resp_number(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError("a command's words are str, bytes, int or float, not %s" % type(value).__name__)


def _resp_commands(commands: Sequence[Any]) -> bytes:
    """The bytes of commands. Raises TypeError and ValueError."""
    # One % for all of them: 0.5 us for a command in a pipeline of 100, instead of 1.1 with one % for each and a join.
    forms: List[bytes] = []
    words: List[Any] = []
    add = words.append
    for command in commands:
        if not isinstance(command, (list, tuple)):
            raise TypeError("a command is a list of words, like ['GET', 'key'], not %s" % type(command).__name__)
        count = len(command)
        if not count:
            raise ValueError("a command has one word or more")
        forms.append(_TEMPLATES[count] if count < len(_TEMPLATES) else _resp_template(count))
        for word in command:
            if type(word) is str:
                word = word.encode()
            elif type(word) is not bytes:
                word = _resp_argument(word)
            add(len(word))
            add(word)
    return b"".join(forms) % tuple(words)


def _resp_template(count: int) -> bytes:
    return b"*%d\r\n" % count + b"$%d\r\n%b\r\n" * count


_TEMPLATES = [_resp_template(count) for count in range(9)]
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}


def _resp_words(line: bytes) -> List[bytes]:
    r"""Split an inline command as Redis does: "with \n and \x0a understood", 'as it is but for \''. Raises FramingError."""
    if b'"' not in line and b"'" not in line:
        return line.split()
    words: List[bytes] = []
    at, end = 0, len(line)
    while True:
        while at < end and line[at:at + 1].isspace():
            at += 1
        if at == end:
            return words
        word = bytearray()
        quote = b""
        while at < end:
            char = line[at:at + 1]
            at += 1
            if quote:
                if char == b"\\" and quote == b'"' and at < end:
                    char = line[at:at + 1]
                    at += 1
                    digits = line[at:at + 2]
                    if char == b"x" and len(digits) == 2 and not digits.strip(b"0123456789abcdefABCDEF"):
                        word.append(int(digits, 16))
                        at += 2
                    else:
                        word += _ESCAPES.get(char, char)
                elif char == b"\\" and line[at:at + 1] == b"'":
                    word += b"'"
                    at += 1
                elif char != quote:
                    word += char
                elif at < end and not line[at:at + 1].isspace():
                    raise FramingError("unbalanced quotes in request")
                else:
                    quote = b""
                    break
            elif char.isspace():
                break
            elif char in (b'"', b"'"):
                quote = char
            else:
                word += char
        if quote:
            raise FramingError("unbalanced quotes in request")
        words.append(bytes(word))


class Resp(StatefulFraming):
    """Redis' protocol: `Resp()` for a server, `Resp("client")` for connections to one.

    A server's handler gets each command as a list of bytes, and `session.send` takes the reply: str is a status, bytes are
    a bulk string; None, bool, int, float, list, tuple, dict, set, RespError and Push are what they are called, in the
    terms of the session's version, which is 2 until `Resp.version(session, 3)`. Replies leave in the order of `send`.

    A client's `session.send` takes a command, a list of words, or a Pipeline of them; its reply goes to on_packet, or to the
    callback of `call`. *on_push(session, push)* gets what the server sends unasked; without it on_packet does.

    *max_packet*: bytes of a command or a reply; *max_line*: of a line or an inline command; *max_depth*: how deep replies may
    be nested. Raises ValueError.
    """

    def __init__(self, role: str = "server", *, max_packet: int = BULK_MAX, max_line: int = LINE_MAX, max_depth: int = 32,
                 on_push: Optional[OnPacket] = None) -> None:
        if role not in ("server", "client"):
            raise ValueError("role is %r; it must be 'server' or 'client'" % (role,))
        if not 16 <= max_line <= LINE_MAX:
            raise ValueError("max_line is %r; it must be 16 to %d bytes" % (max_line, LINE_MAX))
        if not 1 <= max_depth <= 256:       # freezing keys recurses, and Python's own limit is 1000
            raise ValueError("max_depth is %r; it must be 1 to 256" % (max_depth,))
        self.role, self.client = role, role == "client"
        self.pauses_when_congested = not self.client
        self.max_packet, self.max_line, self.max_depth = _check_max(max_packet, 16), max_line, max_depth
        self.on_push = on_push
        self._advance = self._value if self.client else self._command
        self._lock = threading.Lock()       # guards the making of a session's state

    # -- any thread -----------------------------------------------------------------------------------------------

    @staticmethod
    def version(session: Any, number: int = 0) -> int:
        """The version replies are sent in; 2 or 3 sets it. From the handler of HELLO, before its reply is sent."""
        state = session.protocol or session.stateful._state(session)
        if number:
            if number not in (2, 3):
                raise ValueError("there is no RESP%r" % (number,))
            state.version = number
        return int(state.version)

    @staticmethod
    def attributes(session: Any) -> Optional[Dict[Any, Any]]:
        """In a client's handler: the RESP3 attributes that stood before this reply, or None."""
        found: Optional[Dict[Any, Any]] = session.protocol.attributes
        return found

    def encode(self, packet: Any, version: int = 2) -> bytes:
        """The bytes of a server's reply, or of a client's command or Pipeline. Raises TypeError and ValueError."""
        if self.client:
            return _resp_commands(packet if isinstance(packet, Pipeline) else (packet,))
        out: List[bytes] = []
        _resp_value(packet, version, out)
        return b"".join(out)

    def send(self, session: Any, packet: Any, on_sent: Optional[OnSent]) -> bool:
        """What session.send does: a reply, or a command whose reply goes to on_packet."""
        if self.client:
            return self.call(session, packet, None, on_sent)
        kind = type(packet)
        if kind is bytes:
            data = b"$%d\r\n%b\r\n" % (len(packet), packet)
        elif kind is str and packet in _STATUS:
            data = _STATUS[packet]
        else:
            state = session.protocol or self._state(session)
            data = self.encode(packet, state.version)
        return bool(session.put(data, on_sent))

    def call(self, session: Any, command: Any, callback: Optional[OnPacket] = None,
             on_sent: Optional[OnSent] = None) -> bool:
        """Send a command (or a Pipeline); *callback(session, reply)* gets its reply (or their list), on_packet without one.

        Any thread; never waits. False if the session is closed. The callback is called exactly once after a True: when the
        connection ends before the reply, with a ConnectionError as the reply. An error reply is a RespError. After
        SUBSCRIBE and its kin it is called when all channels are confirmed. Raises TypeError and ValueError.
        """
        if not self.client:
            raise TypeError("a server does not call; this Resp has role='server'")
        if isinstance(command, Pipeline):
            data = _resp_commands(command)
            entry: Any = _Batch(callback, len(command))
            if not command or any(_subscription(one) not in (b"", b"hello") for one in command):
                raise ValueError("a Pipeline has one command or more, and none that changes subscriptions")
        else:
            data = _resp_commands((command,))
            name = _subscription(command)
            entry = _Subscribing(callback, name, len(command) - 1) if name else callback
        state = session.protocol or self._state(session)
        pending = state.pending
        with state.lock:
            pending.append(entry)
            if session.put(data, on_sent):
                return True
            if pending and pending[-1] is entry:
                pending.pop()
        return False

    def ask(self, session: Any, command: Any, timeout: float = 10.0) -> Any:
        """`call`, and wait for the reply; for threads that are not the queue's own, else RuntimeError.

        Error replies are returned, as RespError. Raises ConnectionError when the connection is closed or ends meanwhile,
        and TimeoutError after *timeout* seconds.
        """
        if session.communicator.queue._is_here():
            raise RuntimeError("a queue's own thread cannot wait for what it has to receive; use call")
        done = threading.Event()
        replies: List[Any] = []

        def told(_: Session, reply: Any) -> None:
            replies.append(reply)
            done.set()

        if not self.call(session, command, told):
            raise ConnectionError("the connection to %s is closed" % _address_text(session.peer))
        if not done.wait(timeout):
            raise TimeoutError("no reply within %.3g s" % timeout)
        if isinstance(replies[0], ConnectionError):
            raise replies[0]
        return replies[0]

    # -- the session's thread -------------------------------------------------------------------------------------

    def _state(self, session: Any) -> _RespState:
        """The session's state; who has got hold of the session by Connector.wait may be here before `begin`."""
        with self._lock:
            if session.protocol is None:
                session.protocol = _RespState()
            state: _RespState = session.protocol
            return state

    def begin(self, session: Any) -> None:
        """See StatefulFraming."""
        self._state(session)

    def refuse(self, session: Any, error: BaseException) -> None:
        """A server says what was wrong, in Redis' words; who is only idle is closed without a word, as Redis does it."""
        if not self.client and (not isinstance(error, TimeoutError) or session.filled):
            text = "timeout" if isinstance(error, TimeoutError) else str(error)
            session.write(b"-ERR Protocol error: %b\r\n" % _resp_line(text))

    def closed(self, session: Any) -> None:
        """Tell all who wait for a reply."""
        state = session.protocol
        with state.lock:
            pending = list(state.pending)
            state.pending.clear()
        why = session.reason or Reason.NORMAL
        for entry in pending:
            callback = entry.callback if isinstance(entry, (_Batch, _Subscribing)) else entry
            if callback is not None:
                error = ConnectionError("the connection ended before the reply came (%s)" % why.value)
                error.__cause__ = session.error
                try:
                    callback(session, error)
                except BaseException as problem:
                    _Core.on_failed(callback, problem)

    def need(self, session: Any, buffer: Any, start: int, end: int, seen: int) -> int:
        """How far the bulk that is being received reaches, if it is large: the RecvBuf is taken for it at once."""
        state = session.protocol
        if state.bulk < 0:
            return 0
        need = int(state.at + state.bulk + 2)
        if 1 << _power(need) > session.communicator.manager.memory_limit:
            raise FramingError("invalid bulk length: %d bytes are over the memory limit" % need)
        # A small one at the end of much is no reason to receive exactly to its end.
        return need if need <= GROW_MAX or state.bulk > GROW_MAX else 0

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """See Framing.parse. Sessions do not use it: they go on where they were."""
        packet, stop = self._advance(_RespState(), bytes(buffer[start:end]), 0, 0, _MORE)
        return 0 if packet is _MORE else stop

    def decode(self, buffer: Any, start: int, stop: int) -> Any:
        """The command, a list of bytes ([] for an empty line), or the reply."""
        return self._advance(_RespState(), bytes(buffer[start:stop]), 0, 0, _MORE)[0]

    # -- parsing: each function goes on at data[pos] with the packet that begins at data[first] (which may be before the
    # data), with *item*, a bulk that has just been completed, or _MORE. It returns (packet, where it ends), or (_MORE, ...)
    # and the state says where it stands.

    def _line(self, state: _RespState, data: bytes, pos: int, end: bytes, what: str) -> int:
        """Where the line at data[pos] ends, -1 if it does not yet. Only what is new is searched."""
        at = data.find(end, pos + max(0, state.seen - len(end) + 1))
        stop = at if at >= 0 else len(data)
        if stop - pos > self.max_line + data.endswith(b"\r", pos, stop):       # a CR may belong to the line's end
            raise FramingError("too big " + what)
        if at < 0:
            state.seen = stop - pos
            return -1
        state.seen = 0
        return at

    def _size(self, digits: bytes, what: str, limit: int) -> int:
        # isdigit() of bytes is ASCII only; int() alone would take +5, 1_0 and spaces. Redis takes no leading zeros.
        if not digits.isdigit() or len(digits) > 10 or digits[:1] == b"0" != digits or int(digits) > limit:
            raise FramingError("invalid %s length" % what)
        return int(digits)

    def _check_size(self, size: int) -> None:
        if size > self.max_packet:
            raise self.too_long(size)

    def _command(self, state: _RespState, data: bytes, pos: int, first: int, item: Any) -> Tuple[Any, int]:
        """A server's packet: a list of bytes, empty for an empty line and an empty array."""
        end = len(data)
        items, left = state.items, state.left
        if item is not _MORE:
            items.append(item)
            left -= 1
        while left or not items:
            if left:
                if pos < end and data[pos] != 36:
                    raise FramingError("expected '$', got %s" % ascii(data[pos:pos + 1].decode("latin-1")))
                at = self._line(state, data, pos, b"\n", "bulk count string")
            else:
                array = data.startswith(b"*", pos)
                at = self._line(state, data, pos, b"\n", "mbulk count string" if array else "inline request")
            if at < 0:
                self._check_size(end - first)
                state.at, state.left = pos - first, left
                return _MORE, pos
            line = data[pos:at]
            pos = at + 1
            self._check_size(pos - first)
            if left:
                if line[-1:] != b"\r":
                    raise FramingError("invalid bulk length")
                size = self._size(line[1:-1], "bulk", BULK_MAX)
                stop = pos + size
                if stop + 2 - first > self.max_packet:
                    raise FramingError("invalid bulk length: the command is over max_packet (%d bytes)" % self.max_packet)
                if stop + 2 > end:
                    state.at, state.left, state.bulk = pos - first, left, size
                    return _MORE, pos
                if data[stop:stop + 2] != b"\r\n":
                    raise FramingError("expected CRLF behind a bulk of %d bytes" % size)
                items.append(data[pos:stop])
                pos = stop + 2
                left -= 1
            elif array:
                if line[-1:] != b"\r":
                    raise FramingError("invalid multibulk length")
                digits = line[1:-1]
                if digits[:1] == b"-":
                    self._size(digits[1:], "multibulk", 1 << 31)
                else:
                    left = self._size(digits, "multibulk", min(ARGUMENTS_MAX, self.max_packet // 6))
                if not left:
                    break                   # as Redis: nothing, and no reply
            else:
                items = _resp_words(line)
                break
        state.items, state.left, state.at = [], 0, 0
        return items, pos

    def _value(self, state: _RespState, data: bytes, pos: int, first: int, item: Any) -> Tuple[Any, int]:
        """A client's packet: any value of RESP2 or RESP3."""
        end = len(data)
        stack = state.stack
        if not state.at:
            state.attributes = None
        elif item is not _MORE:
            item = self._bulk(state.kind, item)
        while True:
            if item is _MORE:
                kind = data[pos:pos + 1]
                if kind not in _KINDS:      # b"" is in it
                    raise FramingError("%s begins no reply" % ascii(kind.decode("latin-1")))
                at = self._line(state, data, pos, b"\r\n", "count or status line")
                if at < 0:
                    self._check_size(end - first)
                    state.at = pos - first
                    return _MORE, pos
                line = data[pos:at]
                pos = at + 2
                self._check_size(pos - first)
                if kind in b"$=!":
                    if line != b"$-1":
                        size = self._size(line[1:], "bulk", BULK_MAX)
                        stop = pos + size
                        self._check_size(stop + 2 - first)
                        if stop + 2 > end:
                            state.at, state.bulk, state.kind = pos - first, size, kind
                            return _MORE, pos
                        if data[stop:stop + 2] != b"\r\n":
                            raise FramingError("expected CRLF behind a bulk of %d bytes" % size)
                        item = self._bulk(kind, data[pos:stop])
                        pos = stop + 2
                    else:
                        item = None
                elif kind in b"*%~>|":
                    if line != b"*-1":
                        count = self._size(line[1:], "aggregate", self.max_packet // 3) << (kind in b"%|")
                        if len(stack) == self.max_depth:
                            raise FramingError("a reply is nested deeper than %d" % self.max_depth)
                        if kind == b">" and stack:
                            raise FramingError("a push is inside of a reply")
                        stack.append([kind, count, []])
                        if count:
                            continue
                        item = _MORE        # complete already: it has nothing to be waited for
                    else:
                        item = None
                else:
                    item = self._scalar(kind, line)
            # Put it where it belongs; what is complete by that is a value, too.
            while stack:
                frame = stack[-1]
                if item is not _MORE:
                    frame[2].append(item)
                    frame[1] -= 1
                if frame[1]:
                    item = _MORE
                    break
                stack.pop()
                item = self._aggregate(state, frame[0], frame[2], bool(stack))
                if item is _MORE:           # attributes: no value, but a note about the next one
                    break
            if item is not _MORE and not stack:
                state.at = 0
                return item, pos

    @staticmethod
    def _bulk(kind: bytes, data: bytes) -> Any:
        if kind == b"$":
            return data
        if kind == b"!":
            return RespError(data.decode("utf-8", "surrogateescape"))
        if data[3:4] != b":" or not data[:3].isalnum():
            raise FramingError("a verbatim string has no format")
        return Verbatim(data[4:], data[:3].decode())

    @staticmethod
    def _aggregate(state: _RespState, kind: bytes, items: List[Any], inner: bool) -> Any:
        if kind == b"*":
            return items
        if kind == b">":
            return Push(items)
        if kind == b"~":
            return set(_keys(items))
        pairs = dict(zip(_keys(items[::2]), items[1::2]))
        if kind == b"%":
            return pairs
        if not inner:
            state.attributes = pairs
        return _MORE

    @staticmethod
    def _scalar(kind: bytes, line: bytes) -> Any:
        found = _READY.get(line, _MORE)
        if found is not _MORE:
            return found
        text = line[1:]
        if kind == b"+" or kind == b"-":
            if b"\r" in text or b"\n" in text:
                raise FramingError("a line has a bare CR or LF in it")
            return RespError(text.decode("utf-8", "surrogateescape")) if kind == b"-" else \
                text.decode("utf-8", "surrogateescape")
        digits = text[1:] if text[:1] in (b"-", b"+") else text
        if kind == b":" and digits.isdigit() and len(digits) <= 19:
            number = int(text)
            if -1 << 63 <= number < 1 << 63:
                return number
        elif kind == b"(" and digits.isdigit() and len(digits) <= BIG_DIGITS:
            return int(text)
        elif kind == b"," and (digits in (b"inf", b"nan") or _is_double(digits)):
            return float(text)
        raise FramingError("%s is no %s" % (ascii(line[:40].decode("latin-1")), _KINDS[kind]))

    # -- receiving ------------------------------------------------------------------------------------------------

    def receiver(self, on_packet: OnPacket, rest: Callable[[Session, Any, int, int], None],
                 fail: Callable[[Session, BaseException], None]) -> Callable[[Session, Any, int], None]:
        """See Framing.receiver. Whole packets of the common form are cut by one split(); `slowly` sees to the others."""
        advance = self._advance
        deliver = self._deliverer(on_packet) if self.client else on_packet
        fast = self._fast_replies(on_packet, deliver) if self.client else self._fast_commands(on_packet)
        limit = self.max_packet
        client = self.client

        def slowly(session: Any, state: _RespState, buffer: Any, start: int, end: int, once: bool) -> int:
            """Packets of any form, however they are cut; one if *once*. Returns where the first that was not handled is."""
            session.direct = False
            item = _MORE
            at = start + state.at
            if state.bulk >= 0:             # straight from the RecvBuf: a large one is copied once
                stop = at + state.bulk
                if stop + 2 > end:
                    return start
                if buffer[stop:stop + 2] != b"\r\n":
                    raise FramingError("expected CRLF behind a bulk of %d bytes" % state.bulk)
                item = buffer[at:stop]
                state.bulk = -1
                at = stop + 2
            data = buffer[at:end]
            pos = 0
            first = start - at
            while True:
                packet, pos = advance(state, data, pos, first, item)
                if packet is _MORE:
                    return at + first
                item = _MORE
                first = pos
                if packet or client:        # else an empty line
                    deliver(session, packet)
                if once or pos == len(data) or session.paused:
                    return at + pos

        def received(session: Any, buffer: Any, end: int) -> None:
            start = 0
            state = session.protocol
            try:
                if state.at or state.seen:
                    start = slowly(session, state, buffer, 0, end, True)
                if start != end and not (state.at or state.seen or session.paused):
                    # Who pauses at each packet would have all that is left split again for each: quadratic.
                    if end - start <= limit and not state.paused:
                        start = fast(session, buffer[start:end], end)
                    if start != end and not session.paused:
                        start = slowly(session, state, buffer, start, end, False)
                state.paused = start != end and bool(session.paused)
            except BaseException as error:
                fail(session, error)
            if start != end or session.partial is not None:
                rest(session, buffer, start, end)

        return received

    def _fast_commands(self, on_packet: OnPacket) -> Callable[[Any, bytes, int], int]:
        """The hot loop of a server."""
        head_of, widths, max_line = _HEADS.__getitem__, _WIDTHS, self.max_line

        def plain(line: bytes) -> List[bytes]:
            """An inline command without quotes; [] for all else."""
            if line[:1] == b"*" or len(line) > max_line or b"\n" in line or b'"' in line or b"'" in line:
                return []
            return line.split()

        def fast(session: Any, data: bytes, end: int) -> int:
            # All lines at once, in C. If no bulk has a CRLF in it, the lines of a command of n words are 1 + 2 * n, and the
            # first line of each bulk is what the length of the second asks for; if not, that comparison fails.
            lines = data.split(b"\r\n")
            last = len(lines) - 1           # lines[last] is what stands behind the last CRLF
            index = 0
            session.direct = widths.get(lines[0], 1) == last and not lines[last]
            while index < last:
                line = lines[index]
                width = widths.get(line)
                if width is None:
                    packet = plain(line)
                    if not packet:
                        break
                    index += 1
                    on_packet(session, packet)
                    if session.paused:
                        break
                    continue
                stop = index + width
                if stop > last:
                    break
                packet = lines[index + 2:stop:2]
                if lines[index + 1:stop:2] != list(map(head_of, map(len, packet))):
                    break
                index = stop
                on_packet(session, packet)
                if session.paused:
                    break
            if index == last and not lines[last]:
                return end
            return end - sum(map(len, lines[index:])) - 2 * (last - index)

        return fast

    def _fast_replies(self, on_packet: OnPacket, deliver: OnPacket) -> Callable[[Any, bytes, int], int]:
        """The hot loop of a client: first the replies, as far as they are no aggregates, then who waits for them."""
        heads, ready, max_line = _HEADS, _READY, self.max_line

        def hand_on(session: Any, replies: List[Any]) -> int:
            """Returns how many were handled before the session paused."""
            pending = session.protocol.pending
            done, count = 0, len(replies)
            while done < count:
                entry = pending[0] if pending else None
                if type(entry) is _Batch:
                    take = entry.count - len(entry.replies)
                    entry.replies += replies[done:done + take]
                    if done + take > count:
                        return count
                    done += take
                    pending.popleft()
                    (on_packet if entry.callback is None else entry.callback)(session, entry.replies)
                elif type(entry) is _Subscribing:
                    deliver(session, replies[done])
                    done += 1
                else:
                    reply = replies[done]
                    done += 1
                    if pending:
                        pending.popleft()
                    (on_packet if entry is None else entry)(session, reply)
                if session.paused:
                    break
            return done

        def fast(session: Any, data: bytes, end: int) -> int:
            session.protocol.attributes = None
            lines = data.split(b"\r\n")
            last = len(lines) - 1           # lines[last] is what stands behind the last CRLF
            index = 0
            replies: List[Any] = []
            add = replies.append
            while index < last:
                line = lines[index]
                if line in ready:
                    add(ready[line])
                    index += 1
                    continue
                kind = line[:1]
                if kind == b"$":
                    if index + 1 == last:
                        break
                    content = lines[index + 1]
                    if heads[len(content)] != line:
                        break               # there is a CRLF in it, or it is nonsense
                    add(content)
                    index += 2
                elif kind == b":" and line[1:].isdigit() and len(line) < 19:
                    add(int(line[1:]))
                    index += 1
                elif kind == b"+" and len(line) <= max_line and b"\r" not in line and b"\n" not in line:
                    add(line[1:].decode("utf-8", "surrogateescape"))
                    index += 1
                else:
                    break
            done = hand_on(session, replies)
            if done < len(replies):         # paused: look for where the first that was not handled begins
                index = 0
                for _ in range(done):
                    index += 1 if lines[index] in ready or lines[index][:1] != b"$" else 2
            elif index == last and not lines[last]:
                return end
            return end - sum(map(len, lines[index:])) - 2 * (last - index)

        return fast

    def _deliverer(self, on_packet: OnPacket) -> OnPacket:
        """Hands a reply to who waits for it, and a push to on_push."""
        on_push = _watched(self.on_push) or on_packet

        def deliver(session: Any, reply: Any) -> None:
            state = session.protocol
            pending = state.pending
            entry = pending[0] if pending else None
            if type(reply) is list and reply and (state.subscribed and not state.pushes or type(entry) is _Subscribing) \
                    and type(reply[0]) is bytes and reply[0] in _MESSAGES:
                state.pushes = False        # perhaps again: HELLO 2
                reply = Push(reply)         # RESP2 has no type for it: in subscriber mode it is known by its first item
            elif type(reply) is Push:
                state.pushes = True
            if type(reply) is Push:
                on_push(session, reply)
                self._confirm(session, state, reply)
            elif type(entry) is _Batch:
                entry.replies.append(reply)
                if len(entry.replies) == entry.count:
                    pending.popleft()
                    (on_packet if entry.callback is None else entry.callback)(session, entry.replies)
            else:
                if pending:
                    pending.popleft()
                if type(entry) is _Subscribing:         # refused; or it was RESET or HELLO
                    if entry.name == b"reset" and reply == "RESET":
                        state.subscribed.clear()
                        state.pushes = False
                    elif entry.name == b"hello" and type(reply) is not RespError:
                        state.pushes = type(reply) is dict          # RESP3 answers with a map; the subscriptions stay
                    entry = entry.callback
                (on_packet if entry is None else entry)(session, reply)

        return deliver

    @staticmethod
    def _confirm(session: Any, state: _RespState, push: Push) -> None:
        """Keep account of the subscriptions; the command that asked for this one may be answered by now."""
        kind = push.kind
        if type(kind) is not bytes or kind not in _CONFIRMS:
            return
        prefix, adds = _CONFIRMS[kind]
        channel = push[1] if len(push) > 1 else None
        if not isinstance(channel, (bytes, str, type(None))):       # a number's hash anybody can compute
            raise FramingError("a channel is %s" % type(channel).__name__)
        if adds and len(state.subscribed) >= SUBSCRIBED_MAX:
            raise FramingError("over %d subscriptions are confirmed" % SUBSCRIBED_MAX)
        (state.subscribed.add if adds else state.subscribed.discard)((prefix, channel))
        entry = state.pending[0] if state.pending else None
        if type(entry) is not _Subscribing or entry.name != kind:
            return
        if entry.left:
            entry.left -= 1
            if entry.left:
                return
        elif any(one[0] == prefix for one in state.subscribed):
            return
        state.pending.popleft()
        if entry.callback is not None:
            entry.callback(session, push)


_KINDS = {b"": "", b"+": "status", b"-": "error", b":": "integer", b"$": "bulk", b"*": "array", b"_": "null",
          b"#": "boolean", b",": "double", b"(": "big number", b"!": "bulk error", b"=": "verbatim string", b"%": "map",
          b"~": "set", b">": "push", b"|": "attribute"}


def _is_double(digits: bytes) -> bool:
    """Digits, perhaps a fraction, perhaps an exponent; no sign. float() alone takes 1_0, spaces and more."""
    mantissa, _, exponent = digits.lower().partition(b"e")
    whole, _, fraction = mantissa.partition(b".")
    return len(digits) < 400 and whole.isdigit() and (not fraction or fraction.isdigit()) and \
        (exponent[1:] if exponent[:1] in (b"-", b"+") else exponent or (b"0" if b"e" not in digits.lower() else b"")).isdigit()


def _subscription(command: Sequence[Any]) -> bytes:
    """The name in small letters of a command that changes subscriptions, or how their messages look, else b""."""
    name = command[0]
    if (type(name) is str or type(name) is bytes) and len(name) < 9 and len(name) != 5:
        return b""                          # nearly all of them, and a third of the time
    data = _resp_argument(name).lower()
    return data if data in _CONFIRMS or data in (b"reset", b"hello") else b""


# ---------------------------------------------------------------------------------------------------------------------
# Buffers and the SessionManager
# ---------------------------------------------------------------------------------------------------------------------

class _Sliced:
    """Slices of a ctypes array by one copy of memory. PyPy itself takes them byte by byte, 0.1 us for each.

    With that a server there had 6 times the packets of 64 bytes, 16 in flight, and 90 times those of 1 MiB.
    """

    def __getitem__(self: Any, key: Any) -> Any:
        start, stop, step = key.indices(len(self)) if type(key) is slice else (0, 0, 0)
        if step != 1:
            return super().__getitem__(key)             # type: ignore[misc]
        return ctypes.string_at(ctypes.addressof(self) + start, stop - start) if start < stop else b""


def _array_type(power: int) -> Any:
    plain = ctypes.c_char * (1 << power)
    return type("c_char_%d" % (1 << power), (_Sliced, plain), {}) if PYPY else plain


# {exponent: ctypes array type}. Made here and nowhere else: free-threaded builds must not make types at run time.
_ARRAYS = {power: _array_type(power) for power in range(SMALLEST_CLASS, LARGEST_CLASS + 1)}


def _power(size: int) -> int:
    """The exponent of the smallest class that holds *size* bytes."""
    return max(SMALLEST_CLASS, (size - 1).bit_length())


class Buffer:
    """A ctypes char array of 2**power bytes, and a memoryview of it for copying and receiving into parts of it."""

    __slots__ = ("array", "view", "size", "power", "pooled")

    def __init__(self, power: int, pooled: bool) -> None:
        self.array = _ARRAYS[power]()
        self.view = memoryview(self.array).cast("B")
        self.size = 1 << power
        self.power = power
        self.pooled = pooled        # False: outside of the pool and its limit


class Operation:
    """An outstanding send (A4, SOCKETDATA): its session, how many bytes it has, how many are done, and the bytes.

    `buffer` is its SendBuf; it is None when a large packet is referred to instead of being copied.
    """

    __slots__ = ("session", "wanted", "done", "buffer", "view")

    session: Optional[Session]
    view: Any

    def __init__(self) -> None:
        self.session = None
        self.wanted = self.done = 0
        self.buffer: Optional[Buffer] = None

    def rest(self) -> BytesLike:
        """The bytes that are not sent yet."""
        return self.view[self.done:self.wanted]         # type: ignore[no-any-return]


class SessionManager:
    """The memory pool that every queue shares (A4): slots of sessions, buffers by size class, send operations.

    *max_sessions*: how many sessions may exist at once, of all Communicators together. *recv_buffer*: bytes of the first
    RecvBuf of a packet whose length is not known yet. *classes*: {size in bytes: how many to make at once}, sizes being
    powers of two from 4 bytes to 2 MiB. *send_operations*: operations kept for use again, per session.
    *memory_limit*: bytes of all buffers; when so many are leased, receiving waits until some come back. Of those who hold a
    buffer and wait for a larger one, one at a time gets it beyond the limit. Raises ValueError.
    """

    def __init__(self, max_sessions: int = 10000, recv_buffer: int = RECV_BUFFER,
                 classes: Optional[Dict[int, int]] = None, send_operations: int = 1,
                 memory_limit: int = MEMORY_LIMIT) -> None:
        _check_whole("max_sessions", max_sessions, 1)
        _check_whole("send_operations", send_operations, 1)
        _check_whole("recv_buffer", recv_buffer, RECV_LEAST, 1 << LARGEST_POOLED)
        _check_whole("memory_limit", memory_limit, 1)
        if classes is not None:
            _check_kind("classes", classes, dict)
        self.max_sessions, self.recv_buffer, self.memory_limit = max_sessions, recv_buffer, memory_limit
        self._poison = bool(os.environ.get("LEVIATHAN_DEBUG"))
        self._lock = threading.Lock()       # guards all of the following
        self._free: Dict[int, List[Buffer]] = {power: [] for power in range(SMALLEST_CLASS, LARGEST_POOLED + 1)}
        self._made = dict.fromkeys(_ARRAYS, 0)
        self._leased = dict.fromkeys(_ARRAYS, 0)
        self._peak = dict.fromkeys(_ARRAYS, 0)
        self._memory = 0                    # bytes leased or promised
        self._kept = 0                      # bytes of free buffers; both together stay within the limit, but for the loan
        # {(bytes that must be free, whether it holds a buffer): {session that waits: a number that grows with each}}
        self._waiting: Dict[Tuple[int, bool], OrderedDict[Session, int]] = {}
        self._arrivals = 0
        # {session that was woken and has not tried yet: (bytes for it, the number it waited with)}
        self._promised: Dict[Session, Tuple[int, int]] = {}
        self._loan: Any = None              # of these the one that may have a buffer beyond the limit, then that buffer
        self._operations: List[Operation] = []          # free ones
        self._operations_leased = 0
        self._operations_max = max_sessions * send_operations
        self._sessions = self._sessions_peak = 0
        self._indices: List[int] = []       # indices given back
        self._next_index = 0
        self._listeners: Deque[Listener] = deque()      # they wait for a free slot
        for size, count in (classes or {}).items():
            if size != 1 << _power(size) or _power(size) not in self._free:
                raise ValueError("there is no buffer class of %r bytes" % (size,))
            self._kept += size * count
        if memory_limit < max(recv_buffer, self._kept):
            raise ValueError("memory_limit is %d; a RecvBuf has %d bytes, and the buffers to be made at once have %d"
                             % (memory_limit, recv_buffer, self._kept))
        for size, count in (classes or {}).items():
            self._free[_power(size)] += [Buffer(_power(size), True) for _ in range(count)]
            self._made[_power(size)] = count

    def lease(self, size: int, instead: Optional[Buffer] = None, session: Optional[Session] = None) -> Optional[Buffer]:
        """A buffer of at least *size* bytes, or None when the memory limit is reached just now.

        *instead*: a leased one that goes back as soon as it is copied; if it counted, a packet that grows could have a third
        of all memory. *session*: whom it is for. Raises PoolExhausted when *size* is over the whole limit or the largest
        class, so that waiting cannot help.
        """
        power = _power(size)
        if power > LARGEST_CLASS or 1 << power > self.memory_limit:
            raise PoolExhausted("a buffer of %d bytes is over the memory limit of %d bytes" % (size, self.memory_limit))
        with self._lock:
            promised = 0 if session is None else self._promised.pop(session, (0, 0))[0]
            self._memory -= promised
            more = (1 << power) - (instead.size if instead else 0)
            fits = self._memory + more <= self.memory_limit
            lent = instead is not None and self._loan is not None and self._loan in (session, instead)
            if self._loan is session or lent and fits:
                self._loan = None           # it has tried; or it is within the limit after all
            if not (fits or lent or more <= promised):
                return None
            buffer = self._claim(power)
            if lent and not fits:
                buffer = self._loan = buffer or Buffer(power, True)
        return buffer or Buffer(power, True)

    def repay(self, buffer: Buffer) -> bool:
        """The packet in *buffer* is complete; True if that was leased beyond the limit and has to go back now."""
        with self._lock:
            if buffer is not self._loan:
                return False
            self._loan = None
            return True

    def _claim(self, power: int) -> Optional[Buffer]:
        """Count one more of a class and give a free one; None: it is to be made, without the lock, which is held here."""
        self._memory += 1 << power
        leased = self._leased[power] = self._leased[power] + 1
        if leased > self._peak[power]:
            self._peak[power] = leased
        free = self._free.get(power)
        if free:
            self._kept -= 1 << power
            return free.pop()
        self._made[power] += 1
        if self._memory + self._kept > self.memory_limit:
            self._trim()
        return None

    def _trim(self) -> None:
        """Give free buffers back to the system, the largest first, until all together are within the limit again.

        Else a peer that has many of one size made, then many of the next, would have the limit for each. The lock is held.
        """
        for power in reversed(range(SMALLEST_CLASS, LARGEST_POOLED + 1)):
            free = self._free[power]
            while free and self._memory + self._kept > self.memory_limit:
                free.pop()
                self._made[power] -= 1
                self._kept -= 1 << power

    def give_back(self, buffer: Buffer) -> None:
        """Return a leased buffer. Who waits for memory is told."""
        if not buffer.pooled:
            return
        if self._poison:
            buffer.view[:] = b"\xdd" * buffer.size          # who still reads it reads nonsense, every time
        with self._lock:
            if not self._leased[buffer.power]:
                raise LeviathanError("a buffer of %d bytes was given back twice" % buffer.size)
            self._leased[buffer.power] -= 1
            self._memory -= buffer.size
            if buffer is self._loan:
                self._loan = None
            if buffer.power in self._free:
                self._free[buffer.power].append(buffer)
                self._kept += buffer.size
            else:
                self._made[buffer.power] -= 1           # as large as this it goes back to the system
            waits = bool(self._waiting)
        if waits:
            self._wake()

    def wait_for_memory(self, session: Session, size: int, instead: Optional[Buffer] = None) -> None:
        """Have *session* resumed when `lease` can give it a buffer, at once if it can by now. It keeps *instead* meanwhile."""
        key = (1 << _power(size)) - (instead.size if instead else 0), instead is not None
        with self._lock:
            self._arrivals += 1
            self._waiting.setdefault(key, OrderedDict())[session] = self._arrivals
        self._wake()

    def wait_no_more(self, session: Session) -> None:
        """*session* has ended."""
        with self._lock:
            for key, waiting in list(self._waiting.items()):
                if waiting.pop(session, None) and not waiting:
                    del self._waiting[key]

    def _wake(self) -> None:
        """Resume those whose buffers can be had now, in the order in which they have begun to wait.

        What each needs is promised to it. If all were told of each buffer, a thousand that wait would make a thousand attempts
        for each, and who comes too late would wait behind all others again.
        """
        while True:
            with self._lock:
                found = self._next()
            if found is None:
                return
            session, number = found
            if not session.communicator.queue.engine.run_on_owner(session, self._woken, session, number):
                self._forgo(session, number)

    def _next(self) -> Optional[Tuple[Session, int]]:
        """Whose turn it is, and the number it has waited with; it waits no more. The lock is held."""
        first = [(next(iter(waiting.values())), key) for key, waiting in self._waiting.items()]     # of each queue
        found = min([(number, key) for number, key in first if self._memory + key[0] <= self.memory_limit], default=None)
        lent = found is None and self._loan is None
        if lent:
            # Who holds memory and waits may be what the others wait for, who hold some too: all would wait for ever.
            found = min([(number, key) for number, key in first if key[1]], default=None)
        if found is None:
            return None
        waiting = self._waiting[found[1]]
        session, number = waiting.popitem(last=False)
        if not waiting:
            del self._waiting[found[1]]
        self._promised[session] = found[1][0], number
        self._memory += found[1][0]
        if lent:
            self._loan = session
        return session, number

    def _woken(self, session: Session, number: int) -> None:
        """On the session's thread: take the buffer. If it has no use for it any more, others have."""
        session._resume_for(PAUSED_MEMORY)
        session.communicator.queue.engine.run_on_owner(session, self._tried, session, number)

    def _tried(self, session: Session, number: int) -> None:
        self._forgo(session, number)
        self._wake()

    def _forgo(self, session: Session, number: int) -> None:
        """It has tried; what it was promised then and has not taken is free again.

        Not what it was promised since: who took one buffer, and waits for the next within the same attempt, would lose that
        each time, and be woken and try for ever.
        """
        with self._lock:
            promised, of = self._promised.get(session, (0, 0))
            if of == number:
                del self._promised[session]
                self._memory -= promised
                if self._loan is session:
                    self._loan = None

    def begin_send(self, session: Session, data: bytes, sent: int) -> Operation:
        """An operation for what the kernel has not taken of *data*. A small rest is copied into a SendBuf (B1, B3)."""
        size = len(data) - sent
        power = _power(size)
        buffer = None
        with self._lock:
            operation = self._operations.pop() if self._operations else Operation()
            self._operations_leased += 1
            copied = size <= COPY_MAX and self._memory + (1 << power) <= self.memory_limit
            if copied:
                buffer = self._claim(power)
        if copied and buffer is None:
            buffer = Buffer(power, True)
        operation.session, operation.buffer = session, buffer
        if buffer is not None:
            buffer.array.raw = data[sent:]
            # PyPy sends a view of an array byte by byte.
            operation.view, operation.done, operation.wanted = buffer.array if PYPY else buffer.view, 0, size
        else:
            operation.view, operation.done, operation.wanted = memoryview(data), sent, len(data)
        return operation

    def end_send(self, operation: Operation) -> None:
        """Return an operation and its SendBuf."""
        if operation.buffer is not None:
            self.give_back(operation.buffer)
        operation.session = operation.buffer = None
        operation.view = memoryview(b"")
        with self._lock:
            self._operations_leased -= 1
            if len(self._operations) < self._operations_max:
                self._operations.append(operation)

    def take_slot(self, waiting: Optional[Listener] = None) -> Optional[int]:
        """A session's index, or None when all are taken; then *waiting* is told when one is free."""
        with self._lock:
            if self._sessions >= self.max_sessions:
                if waiting is not None and waiting not in self._listeners:
                    self._listeners.append(waiting)
                return None
            self._sessions += 1
            self._sessions_peak = max(self._sessions_peak, self._sessions)
            if self._indices:
                return self._indices.pop()
            self._next_index += 1
            return self._next_index - 1

    def give_slot(self, index: int) -> None:
        """Return a session's index. Listeners that wait for one accept again."""
        with self._lock:
            self._sessions -= 1
            self._indices.append(index)
            listeners, self._listeners = self._listeners, deque()
        for listener in listeners:
            listener.rearm()

    def statistics(self) -> Dict[str, Any]:
        """Counts now: sessions, operations, and by class in bytes what was made, is leased, is free, and the high water.

        `memory` is the bytes that are leased or promised to who waits, `kept` those that are free.
        """
        with self._lock:
            return {
                "sessions": self._sessions, "sessions_high": self._sessions_peak, "max_sessions": self.max_sessions,
                "operations": self._operations_leased, "memory": self._memory, "kept": self._kept,
                "memory_limit": self.memory_limit, "waiting": sum(map(len, self._waiting.values())),
                "leased": sum(self._leased.values()),
                "classes": {1 << power: {"made": made, "leased": self._leased[power], "high": self._peak[power],
                                         "free": len(self._free.get(power, ()))}
                            for power, made in self._made.items() if made or self._peak[power]}}


_default_manager: List[SessionManager] = []
_default_lock = threading.Lock()            # guards _default_manager


def default_manager() -> SessionManager:
    """The SessionManager of everybody who names none; made at its first use."""
    with _default_lock:
        if not _default_manager:
            _default_manager.append(SessionManager())
        return _default_manager[0]


# ---------------------------------------------------------------------------------------------------------------------
# Session
# ---------------------------------------------------------------------------------------------------------------------

# Why receiving is paused: bits of Channel.paused. Receiving is armed while it is 0.
PAUSED_USER = 1
PAUSED_UNSENT = 2
PAUSED_MEMORY = 4
PAUSED_ENDED = 8
PAUSED_PIPELINED = 16           # Http: too many requests are not answered yet
PAUSED_RESUMING = 32            # the pause is over, and what it has kept is still to be handled before anything is read


class _Touched:
    """The slots that every message touches.

    CPython lays a class' slots out by their names, those of its base first: so these lie in two cache lines, where among
    all the others they were in five (1 % more messages with 1000 connections, and with 50).
    """

    __slots__ = ("socket", "worker", "owner", "dirty", "tally", "pack", "direct", "out", "alike", "span", "separator",
                 "partial", "last", "received")


NOBODY = threading.RLock()      # never acquired: see Channel.owner


class Channel(_Touched):
    """The half of a session that its engine works with; only the thread that owns the session touches it.

    `posted` and `state` are the exceptions: the engine's lock guards them. Users need none of this.
    """

    __slots__ = ("unsent", "counted", "posted", "sending", "marks", "filled", "need", "room", "seen", "paused", "interest",
                 "since", "state", "reason", "error", "fin", "eof", "aborted", "high_water", "low_water", "send_limit",
                 "deadline", "link")

    ENDED = PAUSED_ENDED
    RESUMING = PAUSED_RESUMING
    NOBODY = NOBODY
    SHUTDOWN = Reason.SHUTDOWN

    socket: Any
    worker: Any                     # the engine's
    owner: Any                      # an RLock held by the thread whose sends need no lock and no counting, or NOBODY
    pack: Any                       # the framing's, for the fast path of `send`
    dirty: Any                      # where the session notes itself when its first bytes are queued
    tally: Any                      # where a send that is made from here notes how many bytes it took
    direct: bool                    # the next send may go out at once: it answers the only packet that came; `out` is empty
    out: List[bytes]                # queued behind the outstanding send, to be joined by the separator
    alike: int                      # size in bytes of the packets in it, while all have the same; -1
    span: int                       # size in bytes of the first of them, its header included
    separator: bytes                # their header, which then stands in `out` before the first of them alone; else b""
    unsent: int                     # bytes queued and outstanding
    counted: int                    # on epoll: how many chunks of `out` are in it, if it is not 0
    posted: int                     # bytes that other threads have queued and the owner has not seen yet
    sending: Optional[Operation]    # the outstanding send
    marks: Optional[_Marks]         # on_sent callbacks
    partial: Optional[Buffer]       # the RecvBuf, with an incomplete packet
    filled: int                     # bytes in it
    need: int                       # bytes of the packet that begins in it; 0: not known
    room: Optional[memoryview]      # where the next receive goes
    seen: int                       # bytes of it that the framing has searched already
    paused: int                     # PAUSED_ bits
    interest: int                   # what the epoll watches for
    last: float                     # when something was received last
    since: float                    # when the incomplete packet's first byte came; 0: there is none; FOREVER: it is not late
    received: Callable[[Session, Any, int], None]       # the framing's receiver; a TLS layer would go in here
    state: State
    reason: Optional[Reason]
    error: Optional[BaseException]
    fin: bool                       # the user has half-closed
    eof: bool                       # the peer has
    aborted: bool                   # thrown away, not sent to the end
    high_water: int
    low_water: int
    send_limit: int
    deadline: Any                   # the timer of its closing
    link: Any                       # on Windows: its lock, its mail and its operations


class _Marks:
    """on_sent callbacks by position in the stream."""

    __slots__ = ("sent", "queue")

    def __init__(self) -> None:
        self.sent = 0                                       # bytes sent since there are marks
        self.queue: Deque[Tuple[int, OnSent]] = deque()     # (position at which it is due, callback)


class Session(Channel):
    """One connection. A new object for each; one that outlives its connection answers False and reaches nobody.

    `id` is its index in the pool, `peer` its address, `kind` client or server, `tag` and `data` are the user's own,
    `communicator` what it belongs to (A6).
    """

    __slots__ = ("id", "peer", "kind", "tag", "data", "communicator", "connector", "opened", "__weakref__")

    def __init__(self, communicator: Communicator, index: int, kind: Kind, peer: Any) -> None:
        self.id = index
        self.peer = peer
        self.kind = kind
        self.tag: Any = communicator.tag
        self.data: Any = None
        self.communicator = communicator
        self.connector: Optional[Connector] = None
        self.opened = False         # on_connect was called, so on_disconnect will be
        self.socket = self.worker = self.dirty = self.tally = self.sending = self.marks = self.partial = self.room = None
        self.reason = self.error = self.deadline = self.link = None
        self.unsent = self.counted = self.posted = self.filled = self.need = self.seen = 0
        self.paused = self.interest = 0
        self.owner = NOBODY
        self.out = []
        self.alike, self.separator, self.span = -1, b"", 0
        self.pack = communicator.framing.pack
        self.last = self.since = 0.0
        self.received = communicator._received
        self.state = State.CONNECTING
        self.fin = self.eof = self.aborted = self.direct = False
        self.high_water, self.low_water = communicator.high_water, communicator.low_water
        self.send_limit = communicator.send_limit

    def __repr__(self) -> str:
        return "<Session %d %s %s %s>" % (self.id, self.kind.value, _address_text(self.peer), self.state.value)

    # -- any thread: the user's -----------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True from on_connect until the end begins."""
        return self.state is State.OPEN

    @property
    def backlog(self) -> int:
        """Bytes queued and not yet with the kernel. A look from another thread may be older than what the owner queues now."""
        waiting = self.unsent + self.posted
        if self.owner is not NOBODY:        # on epoll: the fast path of `send` does not count
            out = self.out[self.counted:] if self.unsent else self.out[:]
            waiting += sum(map(len, out)) + max(0, len(out) - 1) * len(self.separator)
        return waiting

    def send(self, packet: Any, on_sent: Optional[OnSent] = None) -> bool:
        """Queue *packet*, encoded by the framing (A7). Any thread; never waits.

        True if it is queued, False if the session is closed or closing. *on_sent(session, ok)* is called exactly once
        after a True: ok is True when the last byte is with the kernel, False when the connection ended before.
        Raises what the framing's encode raises: ValueError or TypeError for what it cannot carry.
        """
        # The fast path: on the thread that owns the session, which is where handlers run, and with nothing outstanding:
        # `owner` is NOBODY otherwise, so no state is asked here and no byte is counted before the flush. An RLock says
        # in 13 ns whose it is, get_ident() and a comparison take 34, a lock 150; counting bytes here would be 29,
        # framing.encode 176.
        if self.owner._is_owned() and on_sent is None:
            # What is no bytes is the framing's to know; it may be an object that has no len().
            size = len(packet) if type(packet) is bytes else SEND_INLINE
            if size == self.alike:
                out = self.out
                if out:
                    # A reply as long as those before it: join() puts their header between them.
                    out.append(packet)
                    if len(out) > CORK_MAX:
                        self.worker.flush_early(self)
                    return True
                data = self.separator + packet
            else:
                if size < SEND_INLINE and self.pack is not None:
                    header = self.pack(size)
                    data = header + packet
                else:
                    chunks = self._encode(packet)
                    if len(chunks) > 1 or len(chunks[0]) > SEND_INLINE:
                        return self._queue(chunks, None)
                    data = chunks[0]
                    size, header = -1, b""
                if not self.out:
                    self.alike = size
                    self.separator = header
                    self.span = len(data)
            if self.direct:
                # The first reply to the only packet that came goes out from here, and the peer can go on while this
                # thread tidies up: with one in flight 0.95 of uvloop's messages instead of 0.91. The rest is joined.
                self.direct = False
                try:
                    sent = self.socket.send(data)
                except OSError as error:
                    self.worker.send_failed(self, data, error)
                    return self.state is State.OPEN
                self.tally.append(sent)
                if sent != self.span:
                    self.worker.outstanding(self, data, sent)
                return True
            out = self.out
            if not out:
                self.dirty.append(self)
            elif self.separator:
                self.part()
            out.append(data)
            if len(out) > CORK_MAX:
                self.worker.flush_early(self)
            return True
        return self._queue(self._encode(packet), on_sent)

    def write(self, data: BytesLike, on_sent: Optional[OnSent] = None) -> bool:
        """Queue raw bytes, past the framing. Otherwise like `send`."""
        data = _octets(data)
        if on_sent is None and self.owner._is_owned():
            self.direct = False             # who writes piece by piece wants the pieces joined
            return self.put(data, None, True)
        return self._queue((data,), on_sent)

    def close(self) -> bool:
        """End the session after what is queued was sent. False if it is ending already."""
        return self.end(True, Reason.NORMAL, None)

    def abort(self) -> bool:
        """End the session at once; what is queued is thrown away. False if it has ended already."""
        return self.end(False, Reason.NORMAL, None)

    def finish(self) -> None:
        """Half-close: no more is sent after what is queued; receiving goes on. `send` answers False from now on."""
        if self.worker is not None:
            self.communicator.queue.engine.shutdown(self)

    def pause(self) -> None:
        """Receive no more until `resume`: the peer is slowed down by TCP itself. On the session's thread it is immediate."""
        self._on_owner(self._pause_for, PAUSED_USER)

    def resume(self) -> None:
        """Receive again after `pause`; of the two, the last one counts."""
        self.resume_for(PAUSED_USER)

    # -- any thread: leviathan's ----------------------------------------------------------------------------------

    def put(self, data: bytes, on_sent: Optional[OnSent] = None, own: bool = False) -> bool:
        """Queue raw bytes as `write` does, on the session's own thread (*own*: it is) by the fast path of `send`."""
        # From here on the same as in `send`, where one more call would cost each message 40 ns.
        if (own or self.owner._is_owned()) and on_sent is None and len(data) <= SEND_INLINE + HEAD_KEPT_MAX + 512:
            if self.direct:
                self.direct = False
                try:
                    sent = self.socket.send(data)
                except OSError as error:
                    self.worker.send_failed(self, data, error)
                    return self.state is State.OPEN
                self.tally.append(sent)
                if sent != len(data):
                    self.worker.outstanding(self, data, sent)
                return True
            out = self.out
            if not out:
                self.dirty.append(self)
            elif self.separator:
                self.part()
            out.append(data)
            if len(out) > CORK_MAX:
                self.worker.flush_early(self)
            return True
        return self._queue((data,), on_sent)

    def _encode(self, packet: Any) -> Tuple[bytes, ...]:
        framing = self.communicator.framing
        if framing.pack is not None and type(packet) is bytes and len(packet) >= SEND_INLINE:
            return framing.header_of(len(packet)), packet       # beside it: copying 1 MiB takes 36 us
        data = framing.encode(packet)
        # What is no bytes would be found only at the flush, where nobody knows any more who has sent it.
        return data if type(data) is bytes else _octets(data),

    def _queue(self, chunks: Tuple[bytes, ...], on_sent: Optional[OnSent]) -> bool:
        worker = self.worker
        if worker is None or self.state is not State.OPEN:
            return False
        return bool(self.communicator.queue.engine.send(self, chunks, on_sent))

    def end(self, drain: bool, reason: Optional[Reason], error: Optional[BaseException]) -> bool:
        """Close or abort for *reason*; the first one is the one that is reported."""
        if self.worker is None or self.state in (State.ABORTED, State.CLOSED) or drain and self.state is State.CLOSING:
            return False
        self.communicator.queue.engine.close(self, drain, reason, error)
        return True

    def leave(self, reason: Reason) -> None:
        """The Communicator closes: end behind all that the peer is owed."""
        self.end(True, reason, None)

    def _on_owner(self, function: Callable[..., Any], *args: Any) -> None:
        if self.worker is None:
            return
        engine = self.communicator.queue.engine
        if engine.owns(self):
            function(*args)
        else:
            engine.run_on_owner(self, function, *args)

    def resume_for(self, bit: int) -> None:
        """Take one cause of a pause away. What follows from that comes by the mail, behind the handler that runs now."""
        self._on_owner(self._resume_for, bit)

    # -- owner thread ---------------------------------------------------------------------------------------------

    def _pause_for(self, bit: int) -> None:
        self.paused |= bit
        self.communicator.queue.engine.pause(self)

    def _resume_for(self, bit: int) -> None:
        if self.paused & bit:
            self.paused &= ~bit
            if not self.paused:
                self.paused = PAUSED_RESUMING
                self.communicator.queue.engine.receive(self)

    def part(self) -> None:
        """What is queued becomes one chunk, so that anything may be queued behind it."""
        if self.out:
            self.out[:] = [self.separator.join(self.out)]
        self.alike, self.separator = -1, b""

    def move(self, event: str) -> bool:
        """Take a step in `_LIFE`. False, and nothing changed, where there is none."""
        following = _LIFE.get((self.state, event))
        if following is None:
            return False
        if following is State.ABORTED:
            self.aborted = True
        self.state = following
        return True

    def is_open(self) -> bool:
        """Bytes may be received and queued."""
        return self.state is State.OPEN

    def is_ended(self) -> bool:
        """What is queued is of no use any more."""
        return self.state in (State.LINGERING, State.ABORTED, State.CLOSED)

    def is_gone(self) -> bool:
        """on_closed was called."""
        return self.state is State.CLOSED

    def because(self, reason: Optional[Reason], error: Optional[BaseException]) -> None:
        """Note why the session ends, unless that is known. Without a reason, an error is one."""
        if self.reason is None:
            self.reason = reason or (Reason.NORMAL if error is None else Reason.ERROR)
            self.error = error

    def fail(self, error: BaseException) -> None:
        """Connecting failed."""
        self.because(Reason.ERROR, error)

    def mark(self, on_sent: OnSent) -> None:
        """*on_sent* is due when all that is unsent now is sent."""
        if self.marks is None:
            self.marks = _Marks()
            self.owner = NOBODY             # what is sent from now on is counted
        self.marks.queue.append((self.marks.sent + self.unsent, on_sent))

    def progress(self, sent: int) -> None:
        """*sent* more bytes are with the kernel."""
        marks = self.marks
        if marks is None:
            return
        marks.sent += sent
        while marks.queue and marks.queue[0][0] <= marks.sent:
            # By the mail: a completion never runs inside of a verb.
            self.communicator.queue.engine.run_on_owner(self, _Core.on_sent, self, marks.queue.popleft()[1], True)
        if not marks.queue:
            self.marks = None

    def congested(self) -> None:
        """More is unsent than the high-water mark: receive no more until the peer has taken some of it."""
        if not self.paused & PAUSED_UNSENT:
            self._pause_for(PAUSED_UNSENT)
            self._tell_pressure(True)

    def relieved(self) -> None:
        """Less is unsent than the low-water mark."""
        if self.paused & PAUSED_UNSENT:
            self._resume_for(PAUSED_UNSENT)
            self._tell_pressure(False)

    def _tell_pressure(self, congested: bool) -> None:
        if self.communicator.on_backpressure is not None:
            self.communicator.queue.engine.run_on_owner(self, _guarded, self, self.communicator.on_backpressure, congested)

    def overflow(self) -> None:
        """The hard limit of unsent bytes is reached. `on_closed` logs it: whoever sends may hold a lock here."""
        self.end(False, Reason.OVERFLOW, None)


class StatefulSession(Session):
    """A session of a StatefulFraming; `protocol` is that framing's own."""

    __slots__ = ("protocol", "stateful", "pressed")

    protocol: Any
    stateful: StatefulFraming           # communicator.framing
    pressed: bool                       # on_backpressure was told True, though receiving goes on

    def __init__(self, communicator: Communicator, index: int, kind: Kind, peer: Any) -> None:
        super().__init__(communicator, index, kind, peer)
        self.protocol = None
        self.stateful = communicator.framing            # type: ignore[assignment]
        self.pressed = False

    def send(self, packet: Any, on_sent: Optional[OnSent] = None) -> bool:
        """Send *packet* as the framing does. Any thread; never waits. Otherwise like Session.send."""
        return self.stateful.send(self, packet, on_sent)

    def leave(self, reason: Reason) -> None:
        """See Session.leave; what is owed is the framing's to say."""
        self._on_owner(self._leave, reason)

    def _leave(self, reason: Reason) -> None:
        owes = False
        if self.is_open():
            try:
                owes = bool(self.stateful.leaving(self, reason))
            except BaseException as problem:
                _Core.on_failed(self.stateful.leaving, problem)
        if not owes:
            self.end(True, reason, None)

    def congested(self) -> None:
        """See Session.congested; a framing may have receiving go on."""
        if self.stateful.pauses_when_congested:
            super().congested()
        elif not self.pressed:
            self.pressed = True
            self._tell_pressure(True)

    def relieved(self) -> None:
        """See Session.relieved."""
        if self.pressed:
            self.pressed = False
            self._tell_pressure(False)
        else:
            super().relieved()


def _unix_family() -> int:
    """AF_UNIX. Raises OSError on Windows, whose Python has no unix sockets."""
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "this system's Python has no unix sockets")
    return int(socket.AF_UNIX)


def _path_of(name: str, value: Any) -> str:
    """A path as str; TypeError for what is none."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError("%s must be a path, not %r" % (name, value))
    return os.fsdecode(value)


def _resolve_own(host: str, port: int) -> Tuple[Any, ...]:
    """What getaddrinfo says first of an address to listen on. Raises OSError for any name that is none, `a..b` too."""
    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
    except ValueError as error:             # a label that is empty or too long, a NUL
        raise socket.gaierror(socket.EAI_NONAME, "there is no such name: %s" % error) from None


_hosts: Dict[str, str] = {}         # {address: the same string}


def _one_string(host: str) -> str:
    """One string for all connections from *host*; of many hosts only some are remembered.

    sys.intern would keep each for ever (Python 3.12, free-threaded builds), and a peer with IPv6 has 2**64 of them.
    """
    found = _hosts.get(host)
    if found is None:
        if len(_hosts) >= HOSTS_KEPT:
            _hosts.clear()
        found = _hosts.setdefault(host, host)
    return found


def _address_text(address: Any) -> str:
    """host:port, [host]:port, or a unix socket's path."""
    if isinstance(address, tuple) and len(address) >= 2:
        return ("[%s]:%d" if ":" in str(address[0]) else "%s:%d") % (address[0], address[1])
    return str(address or "unix socket")


# ---------------------------------------------------------------------------------------------------------------------
# Completions: what an engine tells the core. All run on the thread that owns the session, and never inside of a verb.
# ---------------------------------------------------------------------------------------------------------------------

def _guarded(session: Session, function: Callable[..., Any], *args: Any) -> None:
    """Call a user's function about a session. If it raises, that costs the session, not the thread."""
    try:
        function(session, *args)
    except BaseException as error:
        _callback_failed(session, error)


def _failed(session: Session, error: BaseException) -> None:
    """Something raised while a session's input was handled: log one line, end that session."""
    if not isinstance(error, FramingError):
        _callback_failed(session, error)
    elif session.reason is None:            # else what was received is nobody's
        _log().warning("%s broke the protocol: %s; closing it", _address_text(session.peer), error)
        _end_telling(session, Reason.PROTOCOL, error)


def _callback_failed(session: Session, error: BaseException) -> None:
    """A user's function raised, whatever it was: log one line, end that session."""
    ending = session.reason is not None
    _log().error("a callback failed for %s; %s", _address_text(session.peer), "it is ending" if ending else "closing it",
                 exc_info=error)
    if not ending:
        torn = isinstance(session, StatefulSession) and session.stateful.unfinished(session)
        session.end(not torn, Reason.ERROR, error)      # replies to earlier packets still leave


def _end_telling(session: Session, reason: Reason, error: BaseException) -> None:
    """Close for what the peer did, and have its framing tell it why, if it is one that does."""
    if isinstance(session, StatefulSession) and session.is_open():
        try:
            if session.stateful.refuse(session, error):
                return
        except BaseException as problem:
            _Core.on_failed(session.stateful.refuse, problem)
    session.end(True, reason, error)


def _keep(session: Session, buffer: Any, start: int, end: int) -> None:
    """Put what is left of a receive, buffer[start:end], into the session's RecvBuf, or give that one back (B2).

    The RecvBuf is as large as the packet whose length is known; otherwise it doubles as the packet grows. A large packet
    is received exactly to its end, so that nothing of the next one must be moved out from behind it.
    """
    partial = session.partial
    have = end - start
    if not have or session.paused & PAUSED_ENDED:
        _give_back_partial(session)
        return
    manager = session.communicator.manager
    held = partial if partial is not None and partial.pooled else None
    if start or not session.since:
        session.since = time.monotonic()
    try:
        need = session.communicator.framing.need(session, buffer, start, end, 0 if start else session.seen)
        session.need = need
        session.seen = 0 if session.paused else have
        least = manager.recv_buffer
        if partial is not None and end == partial.size:
            least = min(GROW_MAX, 2 * partial.size)
        if not need:
            least = max(least, min(2 * have, session.communicator.framing.max_packet))
            least = min(least, 1 << manager.memory_limit.bit_length() - 1)      # the largest buffer there can be
        size = max(need, have + 1, least)
        whole = False
        repaid = start and held is not None and manager.repay(held)
        if held is not None and not repaid and held.size >= size:
            if start:
                held.array.raw = held.array[start:end]
            larger: Optional[Buffer] = held
        elif session.paused and 1 << _power(size) > manager.memory_limit >= 1 << _power(max(need, RECV_LEAST)):
            larger, whole = None, True      # packets that wait for the end of the pause; all memory would not hold them
        else:
            larger = manager.lease(size, held, session)
    except BaseException as error:
        if isinstance(error, PoolExhausted):
            _log().warning("%s: %s; closing it", _address_text(session.peer), error)
            _end_telling(session, Reason.ERROR, error)
        else:
            _failed(session, error)
        _give_back_partial(session)
        return
    waits = larger is None and not whole
    if repaid:
        held = None
    if larger is None and held is not None:
        larger = held                       # it keeps what it has; see _late
        if start:
            held.array.raw = held.array[start:end]
    elif larger is None:
        larger = Buffer(_power(max(have, RECV_LEAST)), False)       # no more than one receive's worth for each session
    if larger is not partial:
        larger.array.raw = buffer[start:end]
        if partial is not None:
            manager.give_back(partial)
    session.partial, session.filled = larger, have
    session.room = larger.view[have:need if need > GROW_MAX else min(larger.size, have + RECEIVE_MAX)]
    if waits:
        session.seen = session.need = 0
        session._pause_for(PAUSED_MEMORY)
        manager.wait_for_memory(session, size, held)


def _give_back_partial(session: Session) -> None:
    if session.partial is not None:
        session.communicator.manager.give_back(session.partial)
        session.partial = session.room = None
    session.filled = session.need = session.seen = 0
    session.since = 0.0


def _is_to_itself(sock: Any) -> bool:
    """True when both ends of a connection are the same socket.

    TCP allows it (RFC 9293, 3.5, simultaneous open), and the system does it once in some 28,000 attempts to reach a port
    of this machine at which nobody listens, by giving that very port to the client: what waits for a server that is
    being restarted would talk to itself, and hold the port that the server wants.
    """
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:                     # it is broken already; its first receive tells how
        return False


class _Core:
    """What the engines get: the completions of the contract, and what they must ask."""

    begin_send = staticmethod(lambda session, data, sent: session.communicator.manager.begin_send(session, data, sent))
    end_send = staticmethod(lambda operation: operation.session.communicator.manager.end_send(operation))

    @staticmethod
    def scratch(size: int) -> Any:
        """A buffer for an engine's thread."""
        return _ARRAYS[_power(size)]()

    @staticmethod
    def lease(session: Session, size: int) -> Optional[Buffer]:
        """A RecvBuf for a receive that is armed before its bytes are there; None: the session waits for memory.

        *size* in bytes; 0: RECV_BUF_SIZE.
        """
        manager = session.communicator.manager
        size = min(size or manager.recv_buffer, manager.memory_limit)
        buffer = manager.lease(size, None, session)
        if buffer is None:
            session._pause_for(PAUSED_MEMORY)
            manager.wait_for_memory(session, size)
        return buffer

    @staticmethod
    def give_back(session: Session, buffer: Buffer) -> None:
        """Return a RecvBuf that `lease` gave."""
        session.communicator.manager.give_back(buffer)

    @staticmethod
    def reserve(listener: Listener) -> bool:
        """Take the room for one more session before it is accepted. False: none; `accept` is called when there is."""
        index = listener.serve._take_slot(listener)
        if index is None:
            return False
        listener.reserved = index
        return True

    @staticmethod
    def release(listener: Listener) -> None:
        """Nothing was accepted after all."""
        listener.serve._give_slot(listener.reserved, True)

    @staticmethod
    def on_accepted(listener: Listener, sock: Any, address: Any) -> None:
        """A connection came in: it goes to a thread of the queue that serves it (I6)."""
        communicator = listener.serve
        if isinstance(address, tuple):
            address = (_one_string(address[0]),) + address[1:2]
        session = communicator._session(communicator, listener.reserved, Kind.CLIENT, address or listener.address)
        communicator.sessions._add(session)
        communicator.queue.engine.attach(session, sock, listener.client_thread)

    @staticmethod
    def on_connected(session: Session) -> None:
        """A session has come to its thread and begins."""
        if session.connector is not None and _is_to_itself(session.socket):
            session.end(False, Reason.ERROR, ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there; it was "
                                                                    "connected to itself"))
            return
        if isinstance(session, StatefulSession):        # before its connector tells anybody of it, who would send at once
            _guarded(session, session.stateful.begin)
        if session.connector is not None and not session.connector._established(session):
            session.end(False, Reason.NORMAL, None)
            return
        communicator = session.communicator
        if communicator.closing:            # since it was accepted: `_close` may have been past it, or too early for it
            session.end(True, communicator._closed_for, None)
            return
        session.opened = True
        on_connect = communicator.on_connect
        if on_connect is not None:
            _guarded(session, on_connect)

    @staticmethod
    def on_eof(session: Session) -> None:
        """The peer sends no more."""
        session.eof = True
        if isinstance(session, StatefulSession):
            try:
                if session.stateful.ended(session):
                    session._pause_for(PAUSED_ENDED)
                    return
            except BaseException as problem:
                _failed(session, problem)
        if session.filled:
            error = FramingError("the connection ended inside of a packet, after %d bytes of it" % session.filled)
            session.end(True, Reason.ERROR, error)
        elif session.communicator.on_eof is None or session.fin:
            session.end(True, Reason.NORMAL, None)
        else:
            session._pause_for(PAUSED_ENDED)
            _guarded(session, session.communicator.on_eof)

    @staticmethod
    def on_sent(session: Session, callback: OnSent, ok: bool) -> None:
        """The callback of a send is due."""
        _guarded(session, callback, ok)

    @staticmethod
    def on_resumed(session: Session) -> None:
        """A pause is over: handle what has been received before it."""
        if session.since:
            session.since = max(session.since, time.monotonic())
        if session.partial is not None and not session.filled < session.need:
            session.received(session, session.partial.array, session.filled)

    @staticmethod
    def on_closed(session: Session, error: Optional[BaseException]) -> None:
        """The last completion of a session: everything goes back, then its owner is told, once."""
        communicator = session.communicator
        if session.reason is Reason.OVERFLOW:
            _log().warning("%s does not read: over %d bytes unsent; closed it", _address_text(session.peer),
                           session.send_limit)
        if session.paused & PAUSED_MEMORY:
            communicator.manager.wait_no_more(session)
        _give_back_partial(session)
        marks, session.marks = session.marks, None
        if marks is not None:
            for _, callback in marks.queue:
                _guarded(session, callback, False)
        communicator.sessions._remove(session)
        if isinstance(session, StatefulSession) and (session.opened or session.protocol is not None):
            _guarded(session, session.stateful.closed)
        reason = session.reason or Reason.NORMAL
        try:
            if session.opened and communicator.on_disconnect is not None:
                communicator.on_disconnect(session, reason, error)
        except BaseException as problem:
            _Core.on_failed(communicator.on_disconnect, problem)
        finally:
            communicator._give_slot(session.id, session.kind is Kind.CLIENT)
            if session.connector is not None:
                session.connector._closed(session, reason, error)

    @staticmethod
    def on_listener_failed(listener: Listener, error: OSError, pause: float) -> None:
        """accept() failed; with a *pause* in seconds it is tried again, without one the listener is closed."""
        if not pause:
            listener.communicator._forget(listener)
            _log().error("%s failed and is closed: %s", listener, error)
        elif time.monotonic() >= listener.silent:
            listener.silent = time.monotonic() + REPORT_PAUSE       # one line for one shortage, not one for every attempt
            _log().error("%s cannot accept: %s; connections wait, those that are there go on", listener, error)

    @staticmethod
    def on_failed(function: Any, error: BaseException) -> None:
        """An event's or a timer's function raised; its thread goes on."""
        try:
            _log().error("%s failed", _name_of(function), exc_info=error)
        except Exception:                   # a log handler of the program's; this is the last line of defence
            sys.stderr.write("leviathan: %s failed: %r, and so did logging\n" % (_name_of(function), error))


# ---------------------------------------------------------------------------------------------------------------------
# The engine of this system: the only place where the core asks what system this is
# ---------------------------------------------------------------------------------------------------------------------

_BUNDLED: Dict[str, Tuple[int, str]] = {}       # {module name: (line it begins at, source)}, filled in by `bundle`


def _load_engine() -> Any:
    """The engine's module: from this file if it is a bundle, else from beside it, in a package or flat. Raises ImportError."""
    name = "leviathan_win" if sys.platform == "win32" else "leviathan_linux"
    if name in _BUNDLED:
        import types
        line, source = _BUNDLED[name]
        module = types.ModuleType(name)
        sys.modules[__name__ + "." + name] = module
        # As many empty lines in front as make its line numbers those of the bundle, for tracebacks.
        exec(compile("\n" * (line - 1) + source, __file__, "exec", dont_inherit=True), module.__dict__)
        return module
    import importlib
    package = __package__ or ""
    try:
        found = importlib.import_module("." + name if package else name, package or None)
        if found.VERSION != __version__:
            raise ImportError("%s is of leviathan %s, and %s of %s: copy both anew" % (
                found.__file__, found.VERSION, os.path.abspath(__file__), __version__))
        return found
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.endswith(name):
            raise
        raise ImportError("leviathan needs %s.py on this system: copy it next to %s, or make one file of all with "
                          "`python leviathan.py bundle PATH`" % (name, os.path.abspath(__file__))) from None


try:
    _engine = _load_engine()
except ImportError as problem:
    if __name__ != "__main__":
        raise
    print("leviathan: %s" % problem, file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# EventQueue
# ---------------------------------------------------------------------------------------------------------------------

def _default_threads() -> int:
    """1 under a GIL, where more threads are slower (2: 0.78x, 4: 0.52x); the CPU count without."""
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        return 1
    return os.cpu_count() or 1


class EventQueue:
    """A pool of *threads* that serves events, timers and the sockets of the Communicators it is given to (A2, I6).

    On Linux that is one epoll for each thread, on Windows one completion port for all. *name* begins the threads' names.
    Raises ValueError.
    """

    def __init__(self, threads: Optional[int] = None, name: str = "leviathan") -> None:
        self.threads = _default_threads() if threads is None else threads
        _check_whole("threads", self.threads, 1)
        self.name = name
        self._lock = threading.Lock()       # guards the rest
        self._made: Any = None              # set once: who finds it need not ask again with the lock
        self._stopped = False
        self._connectors: Set[Connector] = set()        # those that are not given up

    def __repr__(self) -> str:
        return "<EventQueue %s, %d threads%s>" % (self.name, self.threads, ", stopped" if self._stopped else "")

    @property
    def engine(self) -> Any:
        """The engine; its descriptors are opened at the first use."""
        if self._made is None:
            with self._lock:
                if self._made is None:
                    made = _engine.Engine(_Core, self.name, self.threads)
                    if self._stopped:
                        made.stop()         # it refuses everything, like one that was used before
                    self._made = made
        return self._made

    def start(self) -> None:
        """Start the threads. A second start does nothing; a stopped queue cannot be started: RuntimeError.

        RuntimeError, too, when the system has not so many threads: then the queue is stopped.
        """
        with self._lock:
            self._check()
        _log()                              # imported by now: when descriptors have run out it could not be
        try:
            self.engine.start()
        except BaseException:
            self.stop(1.0)                  # half a queue would leave what is pinned to its other half unserved
            raise

    def stop(self, timeout: Optional[float] = None) -> bool:
        """Run what is queued, abort the sessions that are left, end the threads. RuntimeError on a thread of its own.

        Its Communicators listen and connect no more. Nothing is drained: that is what CommunicatorList.stop is for.
        False, and a line in the log, if after *timeout* seconds (None: no limit) a callback does not return for a second more:
        its thread ends when it does, or with the program. Threads that still have something to do are waited for.
        """
        if self._is_here():
            raise RuntimeError("a queue cannot be stopped from one of its own threads")
        with self._lock:
            self._stopped = True
            made, connectors = self._made, list(self._connectors)
        for connector in connectors:
            connector._give_up()            # who waits for it would wait for ever
        left = [] if made is None else made.stop(timeout)
        before: Dict[Any, Any] = {}         # {thread: what it was in STUCK_AFTER ago}
        while left:
            now = {thread: _callback_of(thread) for thread in left}
            stuck = [thread for thread in left if now[thread] is not None and now[thread] is before.get(thread)]
            for thread in stuck:
                frame = now[thread]
                name = _name_of(frame.f_locals["function"]) if _calls_out(frame) else frame.f_code.co_name
                _log().error("%s (%s:%d) does not return: its thread, %s, stays behind", name,
                             frame.f_code.co_filename, frame.f_lineno, thread.name)
            if stuck:
                return False
            before = now
            left = made.stop(STUCK_AFTER)
        return True

    def post(self, function: Callable[..., Any], *args: Any) -> bool:
        """Call function(*args) on whichever thread is idle, once. Any thread. False when the queue has stopped."""
        _check_callable("function", function)
        return bool(self.engine.post(_watched(function), *args))

    def call_later(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Call function(*args) in *seconds*, unless the queue stops before. Returns a handle with `cancel()`."""
        _check_callable("function", function)
        if not isinstance(seconds, (int, float)):
            raise TypeError("seconds must be a number of seconds, not %r" % (seconds,))
        if seconds != seconds:
            raise ValueError("seconds is %r" % (seconds,))
        return self.engine.call_later(max(0.0, seconds), 0.0, _watched(function), *args)

    def every(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Call function(*args) every *seconds*, never twice at once. Returns a handle with `cancel()`."""
        _check_callable("function", function)
        _check_seconds("seconds", seconds)
        if not seconds:
            raise ValueError("seconds is %r; it must be more than 0" % (seconds,))
        return self.engine.call_later(seconds, seconds, _watched(function), *args)

    def statistics(self) -> Dict[str, int]:
        """What its threads have done since the start: counters by name."""
        return dict(self.engine.statistics())

    def _check(self) -> None:
        """RuntimeError if it has been stopped. The lock is held."""
        if self._stopped:
            raise RuntimeError("the queue has been stopped; make a new one")

    def _is_here(self) -> bool:
        """This is one of its threads."""
        made = self._made
        return made is not None and bool(made.on_worker())

    def _keep(self, connector: Connector) -> None:
        with self._lock:
            self._check()
            self._connectors.add(connector)

    def _forget(self, connector: Connector) -> None:
        with self._lock:
            self._connectors.discard(connector)


def _callback_of(thread: threading.Thread) -> Any:
    """The frame of what a queue's thread has called outside of leviathan; None if it is not in such a call."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack: List[Any] = []
    while frame is not None:
        stack.insert(0, frame)
        frame = frame.f_back
    while stack and stack[0].f_globals.get("__name__") == "threading":
        del stack[0]                        # what every thread begins with
    for frame in stack:
        if frame.f_globals.get("__name__") not in (__name__, _engine.__name__):
            return frame                    # the outermost counts: what leviathan has called itself
    # What is written in C, lock.acquire or time.sleep, has no frame of its own.
    return stack[-1] if stack and _calls_out(stack[-1]) else None


def _calls_out(frame: Any) -> bool:
    """It is one of leviathan's functions that call `function`, which the user gave."""
    return frame.f_code.co_name in ("_attempt", "_call", "_guarded") and \
        frame.f_globals.get("__name__") in (__name__, _engine.__name__)


SLOW_HANDLER = 0.1              # seconds: what LEVIATHAN_DEBUG reports


def _watched(function: Any) -> Any:
    """*function* itself; with LEVIATHAN_DEBUG=1 one that reports calls over SLOW_HANDLER by name."""
    if function is None or not os.environ.get("LEVIATHAN_DEBUG"):
        return function

    def watched(*args: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args)
        finally:
            took = time.monotonic() - began
            if took > SLOW_HANDLER:
                _log().warning("%s took %.3f s; its thread served nobody meanwhile", _name_of(function), took)

    watched.__qualname__ = _name_of(function)
    return watched


def _checked(received: Callable[[Session, Any, int], None]) -> Callable[[Session, Any, int], None]:
    """*received* itself; with LEVIATHAN_DEBUG=1 one that is sure to run on the session's own thread (I3)."""
    if not os.environ.get("LEVIATHAN_DEBUG"):
        return received

    def checked(session: Session, buffer: Any, end: int) -> None:
        if not session.communicator.queue.engine.owns(session):
            raise LeviathanError("%r is handled by a thread that does not own it" % session)
        received(session, buffer, end)

    return checked


# ---------------------------------------------------------------------------------------------------------------------
# Communicator
# ---------------------------------------------------------------------------------------------------------------------

class ConnectionList:
    """The sessions of a Communicator (A2), also those being connected: len(), iteration over a copy, `in`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()       # guards the rest
        self._sessions: Dict[int, Session] = {}         # {index: session}
        self._clients = 0                   # accepted, or about to be
        self._waiting: List[Listener] = []  # they wait for one client less

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        with self._lock:
            sessions = list(self._sessions.values())
        return iter(sessions)

    def __contains__(self, session: object) -> bool:
        return isinstance(session, Session) and self._sessions.get(session.id) is session

    def _add(self, session: Session) -> None:
        with self._lock:
            self._sessions[session.id] = session

    def _remove(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop(session.id, None)


class Listener:
    """A listening socket (A5). `address`: what it is bound to; `close()`: listen no more, keep the sessions."""

    kind = Kind.LISTEN

    def __init__(self, communicator: Communicator, serve: Communicator, client_thread: Optional[int],
                 unix: str) -> None:
        self.communicator, self.serve, self.client_thread, self.unix = communicator, serve, client_thread, unix
        self.socket: Any = None             # the engine's, as are worker, pause and closed
        self.worker: Any = None
        self.file: Any = None               # a unix socket's, the engine's too
        self.pause = 0.1
        self.closed = False
        self.silent = 0.0                   # until then no line says again that there is a shortage
        self.reserved = -1                  # the slot of the session that is being accepted
        self.address: Any = None

    def __repr__(self) -> str:
        return "<Listener %s>" % self

    def __str__(self) -> str:
        """host:port, [host]:port, or a unix socket's path."""
        return _address_text(self.address)

    def rearm(self) -> None:
        """There is room again."""
        if not self.closed:
            self.communicator.queue.engine.accept(self)

    def close(self) -> None:
        """Listen no more. The sessions it accepted go on. The port is free when its thread has come to it, soon after."""
        self.closed = True
        self.communicator._forget(self)
        self.communicator.queue.engine.unlisten(self)


class Communicator:
    """A protocol's server, client or both (A1): joins sockets to a queue, cuts what they receive into packets.

    *framing*: a Framing, or a function `parse(view) -> int`. *on_packet(session, packet)*: gets each packet; a session's
    packets come in order and never two at once. *on_connect(session)*: comes first. *on_disconnect(session, reason,
    error)*: comes last, exactly once for each on_connect. *on_eof(session)*: the peer sends no more; with it the session
    stays open for sending until you close it, without it it is closed when all is sent. *on_backpressure(session,
    congested)*: more than *high_water* bytes are unsent (True), less than *low_water* again (False); meanwhile the session
    receives nothing. *queue*: an EventQueue, its own if none. *manager*: a SessionManager, the shared one if none.
    *max_clients*: accepted sessions at once (None: only the manager's limit; 0: none). *idle_timeout*: seconds without
    anything received; *packet_timeout*: seconds from a packet's first byte to its last; 0: for ever. *send_limit*: unsent
    bytes at which a peer that does not read is closed (one packet of any size is let through). *name* is for log lines,
    *tag* is the sessions' first `tag`. Raises TypeError and ValueError.
    """

    def __init__(self, framing: Union[Framing, Callable[[memoryview], int]], on_packet: OnPacket, *,
                 on_connect: Optional[OnConnect] = None, on_disconnect: Optional[OnDisconnect] = None,
                 on_eof: Optional[OnConnect] = None,
                 on_backpressure: Optional[Callable[[Session, bool], Any]] = None,
                 queue: Optional[EventQueue] = None, manager: Optional[SessionManager] = None,
                 max_clients: Optional[int] = None, idle_timeout: float = 0.0,
                 packet_timeout: float = PACKET_TIMEOUT, high_water: int = HIGH_WATER, low_water: int = LOW_WATER,
                 send_limit: int = SEND_LIMIT, name: str = "leviathan", tag: Any = None) -> None:
        _check_callable("on_packet", on_packet)
        if not isinstance(framing, Framing):
            if not callable(framing) or isinstance(framing, type):
                raise TypeError("framing must be a Framing, like LengthPrefix(4), or a function parse(view) -> int, not %r"
                                % (framing,))
            framing = Function(framing)
        for callback, function in (("on_connect", on_connect), ("on_disconnect", on_disconnect), ("on_eof", on_eof),
                                   ("on_backpressure", on_backpressure)):
            if function is not None:
                _check_callable(callback, function)
        if queue is not None:
            _check_kind("queue", queue, EventQueue)
        if manager is not None:
            _check_kind("manager", manager, SessionManager)
        if max_clients is not None:
            _check_whole("max_clients", max_clients, 0)
        _check_seconds("idle_timeout", idle_timeout)
        _check_seconds("packet_timeout", packet_timeout)
        for what, size in (("high_water", high_water), ("low_water", low_water), ("send_limit", send_limit)):
            _check_whole(what, size, 0)
        if not low_water <= high_water <= send_limit:
            raise ValueError("it must be 0 <= low_water <= high_water <= send_limit")
        self.framing: Framing = framing
        self._session = StatefulSession if isinstance(framing, StatefulFraming) else Session
        self.on_connect = _watched(on_connect)
        self.on_disconnect = _watched(on_disconnect)
        self.on_eof = _watched(on_eof)
        self.on_backpressure = _watched(on_backpressure)
        self.queue = queue or EventQueue(name=name)
        self.manager = manager or default_manager()
        self.max_clients, self.idle_timeout, self.packet_timeout = max_clients, idle_timeout, packet_timeout
        self.high_water, self.low_water, self.send_limit = high_water, low_water, send_limit
        self.name, self.tag = name, tag
        self.sessions = ConnectionList()
        self.listeners: List[Listener] = []     # those that are not closed
        self._received = _checked(framing.receiver(_watched(on_packet), _keep, _failed))
        self._lock = threading.Lock()       # guards listeners, closing, _sweeper and _silent
        self.closing = False
        self._closed_for = Reason.NORMAL    # why it is closing
        self._silent = 0.0                  # until then no line says again that the limit is reached
        self._sweeper: Any = None

    # -- any thread -----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        listens = [_address_text(listener.address) for listener in self.listeners]
        return "<Communicator %s>" % ", ".join([self.name, *listens, "%d sessions" % len(self.sessions)])

    @property
    def connectors(self) -> List[Connector]:
        """The outgoing connections that are there, are being made or will be made again."""
        with self.queue._lock:
            return [connector for connector in self.queue._connectors if connector.communicator is self]

    def listen(self, port: int = 0, host: str = DEFAULT_HOST, *, unix: Union[str, os.PathLike[str]] = "", backlog: int = 1024,
               thread: Optional[int] = None, client_thread: Optional[int] = None,
               serve: Optional[Communicator] = None) -> Listener:
        """Listen on *host*:*port*, at once; call it as often as needed (A5). Port 0: the system chooses.

        *host*: an IPv4 or IPv6 address or a name; "0.0.0.0" (or "") for all of IPv4, "::" of IPv6. *unix*: the path of a
        unix socket instead.
        *thread*: the number of the worker that accepts, *client_thread*: of the one that gets the sessions (E2); without it
        that is *thread*, and without both they go round; a completion port picks threads itself and heeds neither.
        *serve*: another Communicator that gets the sessions (I6).
        Raises OSError when the address cannot be had, RuntimeError when the Communicator or *serve* is closed.
        """
        serve = self if serve is None else serve
        _check_kind("serve", serve, Communicator)
        _check_kind("host", host, str)
        _check_whole("port", port, 0, 65535)            # getaddrinfo would take 65537 for 1
        _check_whole("backlog", backlog, 0, (1 << 31) - 1)          # a C int
        unix = _path_of("unix", unix)
        if "\0" in unix:
            raise ValueError("unix is %r; it must be the path of a file, without NUL" % unix)
        for what, number in (("thread", thread), ("client_thread", client_thread)):
            if number is not None:
                _check_whole(what, number, 0)
        if serve.max_clients == 0:
            raise ValueError("max_clients is 0: this Communicator takes no clients")
        if client_thread is None and serve is self:
            client_thread = thread
        listener = Listener(self, serve, client_thread, unix)
        address: Any = unix
        try:
            if unix:
                family = _unix_family()
            else:
                family, _, _, _, address = _resolve_own(host or "0.0.0.0", port)
            with self._lock:
                if self.closing or serve.closing:
                    raise RuntimeError("the Communicator is closed")
                self.queue.engine.listen(listener, family, address, backlog, thread)
                listener.address = unix or listener.socket.getsockname()[:2]
                self.listeners.append(listener)
        except OSError as error:            # which of the addresses that a program may have
            where = "cannot listen on %s: %s" % (_address_text(unix or (host, port)), error.strerror or error)
            raise type(error)(error.errno, where) from None
        self._watch_time()
        serve._watch_time()
        listener.rearm()
        return listener

    def connect(self, host: str, port: int = 0, *, timeout: float = 10.0,
                reconnect: Union[bool, Tuple[float, float]] = False, unix: Union[str, os.PathLike[str]] = "",
                thread: Optional[int] = None, tag: Any = None,
                on_failure: Optional[Callable[[Connector, BaseException], Any]] = None) -> Connector:
        """Connect out (A8), without waiting for it. Each connection is a new Session given to on_connect.

        *timeout*: seconds for resolving and connecting. *reconnect*: True, or (first, longest) pause in seconds between
        attempts; it doubles each time, with jitter, and starts again after a success. *on_failure(connector, error)* is
        told of each attempt that failed. *unix*: a unix socket's path instead of host and port; OSError where there are none.
        An attempt fails, too, when it was connected to itself, which happens at a local port at which nobody listens.
        Raises RuntimeError when the Communicator is closed or its queue has stopped.
        """
        unix = _path_of("unix", unix)
        if unix:
            _unix_family()
        else:
            _check_kind("host", host, str)
            _check_whole("port", port, 1, 65535)
        connector = Connector(self, unix or (host, port), timeout, reconnect, bool(unix), thread, tag, on_failure)
        with self._lock:
            if self.closing:
                raise RuntimeError("the Communicator is closed")
            self.queue._keep(connector)
        self._watch_time()
        self.queue.post(connector._attempt)
        return connector

    def broadcast(self, packet: Any) -> int:
        """Send *packet* to every session; it is encoded once (A7). Returns how many it was queued for."""
        data = _octets(self.framing.encode(packet))
        return sum([session.put(data) for session in self.sessions])

    def close(self) -> None:
        """Listen and connect no more; every session is closed after what is queued for it was sent."""
        self._close(Reason.NORMAL)

    def start(self) -> None:
        """Start the queue's threads. `run` and CommunicatorList.start do it for you."""
        self.queue.start()

    # -- leviathan's ----------------------------------------------------------------------------------------------

    def _close(self, reason: Reason) -> None:
        with self._lock:
            self._closed_for = reason
            self.closing = True
            listeners, self.listeners = self.listeners, []
            sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.cancel()
        for listener in listeners:
            listener.close()
        for connector in self.connectors:
            connector._give_up()
        for session in self.sessions:
            session.leave(reason)
        _closings.check()

    def _forget(self, listener: Listener) -> None:
        """It listens no more."""
        with self._lock:
            if listener in self.listeners:
                self.listeners.remove(listener)

    def _closed(self) -> bool:
        """True when nothing of it is left."""
        return self.closing and not len(self.sessions)

    def _take_slot(self, listener: Optional[Listener]) -> Optional[int]:
        """A slot for a client (with *listener*) or an outgoing connection, or None at one of the limits."""
        sessions = self.sessions
        limit = self.max_clients
        if listener is not None:
            with sessions._lock:
                full = limit is not None and sessions._clients >= limit or self.closing
                if not full:
                    sessions._clients += 1
                elif listener not in sessions._waiting:
                    sessions._waiting.append(listener)
            if full:
                self._report_full(limit)
                return None
        index = self.manager.take_slot(listener)
        if index is None and listener is not None:
            self._client_less()             # another listener may have met the limit by the one that is not taken
            self._report_full(self.manager.max_sessions)
        return index

    def _client_less(self) -> None:
        """There is room for one client more: listeners that waited for it accept again."""
        sessions = self.sessions
        with sessions._lock:
            sessions._clients -= 1
            waiting, sessions._waiting = sessions._waiting, []
        for listener in waiting:
            listener.rearm()

    def _report_full(self, limit: Optional[int]) -> None:
        now = time.monotonic()
        with self._lock:
            known = self.closing or now < self._silent
            if not known:
                self._silent = now + REPORT_PAUSE       # whoever comes and goes at the limit meets it each time
        if not known:
            _log().warning("%s has reached its connection limit (%s), no longer accepting new connections",
                           self.name, limit)

    def _give_slot(self, index: int, client: bool) -> None:
        """Return a slot; listeners that waited for it accept again."""
        self.manager.give_slot(index)
        if client:
            self._client_less()
        if self.closing:
            _closings.check()

    def _watch_time(self) -> None:
        """Start the timer that looks for idle and slow sessions, if there is a timeout."""
        timeouts = [seconds for seconds in (self.idle_timeout, self.packet_timeout) if seconds]
        with self._lock:
            if timeouts and self._sweeper is None and not self.closing:
                # A quarter of the shortest, so that nobody stays much longer than said; no more than once a second.
                self._sweeper = self.queue.every(max(0.01, min(1.0, min(timeouts) / 4)), self._sweep)

    def _sweep(self) -> None:
        """End the sessions whose time is over."""
        now = time.monotonic()
        for session in self.sessions:
            if session.state is not State.OPEN or not session.last:
                continue
            if session.paused & (PAUSED_USER | PAUSED_PIPELINED | PAUSED_MEMORY | PAUSED_ENDED):
                session.last = now          # it is we who do not read, or there is nothing more to read
            if self._late(session, now) is not None:
                session._on_owner(self._end_late, session)

    def _late(self, session: Session, now: float) -> Optional[TimeoutError]:
        """Why a session's time is over; None: it is not."""
        if self.idle_timeout and now - session.last > self.idle_timeout:
            return TimeoutError("nothing received for %.3g s" % self.idle_timeout)
        since, paused, partial = session.since, session.paused, session.partial     # its thread may change them meanwhile
        if paused == PAUSED_MEMORY and partial is not None and partial.pooled:
            paused = 0                      # it waits for more than it has; what it has may be what others wait for
        if self.packet_timeout and since and not paused and now - since > self.packet_timeout:
            return TimeoutError("a packet is not complete after %.3g s" % self.packet_timeout)
        return None

    def _end_late(self, session: Session) -> None:
        """On the session's thread: end it, unless it is we who are late, or something has happened meanwhile."""
        if not session.is_open() or not session.paused and self.queue.engine.heard(session):
            return                          # what came while its thread was busy is received next
        if isinstance(session, StatefulSession) and not session.backlog and session.stateful.owes(session):
            return
        error = self._late(session, time.monotonic())       # behind `owes`: who answers notes the time before that changes
        if error is None:
            return
        if session.backlog:
            session.end(False, Reason.TIMEOUT, error)
        else:
            _end_telling(session, Reason.TIMEOUT, error)


class Connector:
    """An outgoing connection that is being made, kept up or given up (A8).

    `session`: the Session, None while there is none; `connected`; `error`: why the last attempt failed; `address`.
    """

    def __init__(self, communicator: Communicator, address: Any, timeout: float,
                 reconnect: Union[bool, Tuple[float, float]], unix: bool, thread: Optional[int], tag: Any,
                 on_failure: Optional[Callable[[Connector, BaseException], Any]]) -> None:
        _check_seconds("timeout", timeout)
        if not timeout:
            raise ValueError("timeout is %r; it must be more than 0 seconds" % (timeout,))
        if thread is not None:
            _check_whole("thread", thread, 0)
        if on_failure is not None:
            _check_callable("on_failure", on_failure)
        # From 0.1 s, doubled up to 30 s: soon enough for a restart, seldom enough for an outage.
        if not isinstance(reconnect, bool) and (not isinstance(reconnect, (tuple, list)) or len(reconnect) != 2):
            raise TypeError("reconnect must be True, False or (first, longest) in seconds, not %r" % (reconnect,))
        first, longest = (0.1, 30.0) if isinstance(reconnect, bool) else reconnect
        _check_seconds("reconnect's first", first)
        _check_seconds("reconnect's longest", longest)
        if not 0 < first <= longest:
            raise ValueError("reconnect is %r; it must be 0 < first <= longest" % (reconnect,))
        self.communicator, self.address, self.unix, self.thread = communicator, address, unix, thread
        self.timeout, self.reconnect, self.first, self.longest = timeout, bool(reconnect), first, longest
        self.tag, self.on_failure = tag, _watched(on_failure)
        import random                           # 1 ms, for those who connect out
        self._jitter = random.uniform
        self._changed = threading.Condition()   # guards the rest
        self.session: Optional[Session] = None
        self.error: Optional[BaseException] = None
        self._pause = first
        self._dialling: Optional[Session] = None
        self._left: List[Tuple[int, Any]] = []  # addresses of this attempt that were not tried yet
        self._attempts = 0
        self._late = 0                          # the attempt whose time is over
        self._timer: Any = None
        self._gone = False                      # closed, or failed with no reconnect
        self._reported = False                  # the failure was logged

    def __repr__(self) -> str:
        return "<Connector %s %s>" % (_address_text(self.address), "connected" if self.connected else "down")

    # -- any thread -----------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True while there is an open session."""
        session = self.session
        return session is not None and session.connected

    def wait(self, timeout: Optional[float] = None) -> Session:
        """Wait for the connection and return its session; not on a queue's thread.

        Raises TimeoutError after *timeout* seconds, or ConnectionError when the attempt failed and is not repeated.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.session is not None or self._gone, timeout)
            if self.session is not None:
                return self.session
            if self._gone:
                raise ConnectionError("cannot connect to %s: %s" % (_address_text(self.address),
                                                                    self.error or "it was given up"))
        raise TimeoutError("no connection to %s after %s s" % (_address_text(self.address), timeout))

    def close(self) -> None:
        """Connect no more; an open session is closed after what is queued was sent."""
        self._give_up()
        session = self.session
        if session is not None:
            session.close()

    # -- leviathan's ----------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        with self._changed:
            self._gone = True
            timer, dialling = self._timer, self._dialling
            self._changed.notify_all()
        self.communicator.queue._forget(self)
        if timer is not None:
            timer.cancel()
        if dialling is not None:
            dialling.end(False, Reason.SHUTDOWN, None)

    def _attempt(self) -> None:
        """Begin an attempt; a name is resolved on a thread of its own, because getaddrinfo waits."""
        with self._changed:
            if self._gone:
                return
            self._attempts += 1
            number = self._attempts
            self._timer = self.communicator.queue.call_later(self.timeout, self._timed_out, number)
        if self.unix:
            self._resolved(number, [(_unix_family(), self.address)], None)
            return
        try:
            host, port = self.address
            found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
        except (OSError, UnicodeError, OverflowError):
            threading.Thread(target=self._resolve, args=(number,), name="leviathan-resolver", daemon=True).start()
        else:
            self._resolved(number, [(entry[0], entry[4]) for entry in found], None)

    def _resolve(self, number: int) -> None:
        try:
            host, port = self.address
            found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError, OverflowError) as error:
            self.communicator.queue.post(self._resolved, number, [], error)
        else:
            self.communicator.queue.post(self._resolved, number, [(entry[0], entry[4]) for entry in found], None)

    def _resolved(self, number: int, addresses: List[Tuple[int, Any]], error: Optional[BaseException]) -> None:
        with self._changed:
            if number != self._attempts or self._gone:
                return                      # it took longer than the timeout
            self._left = addresses
        self._dial_next(number, error or OSError("no address"))

    def _dial_next(self, number: int, error: BaseException) -> None:
        """Try the next address, or report *error* as the attempt's when none is left."""
        communicator = self.communicator
        with self._changed:
            if number != self._attempts or self._gone:
                return
            found = self._left.pop(0) if self._left else None
        if found is None:
            self._attempt_failed(number, error)
            return
        index = communicator._take_slot(None)
        if index is None:
            self._attempt_failed(number, PoolExhausted("no session is free (SESSION_MAX %d)"
                                                       % communicator.manager.max_sessions))
            return
        address = found[1][:2] if isinstance(found[1], tuple) else found[1]
        session = communicator._session(communicator, index, Kind.SERVER, address)
        session.connector = self
        if self.tag is not None:
            session.tag = self.tag
        with self._changed:
            if number == self._attempts and not self._gone:     # else its end is nobody's, see `_closed`
                self._dialling = session
        communicator.sessions._add(session)
        communicator.queue.engine.connect(session, found[0], found[1], self.thread)
        with self._changed:
            unwanted = self._gone or number != self._attempts
            late = self._late == number
        # Since `_dialling` was set: who gave up, or found that the time was over, found nothing that could be ended.
        if unwanted:
            session.end(False, Reason.SHUTDOWN, None)
        elif late:
            session.end(False, Reason.TIMEOUT, self._no_answer())

    def _timed_out(self, number: int) -> None:
        with self._changed:
            if number != self._attempts or self._gone or self.session is not None:
                return
            self._left = []
            self._late = number
            dialling = self._dialling
        if dialling is not None:
            dialling.end(False, Reason.TIMEOUT, self._no_answer())      # _closed goes on from there
        else:
            self._attempt_failed(number, self._no_answer())             # the name is not resolved yet

    def _no_answer(self) -> TimeoutError:
        return TimeoutError("no answer within %.3g s" % self.timeout)

    def _established(self, session: Session) -> bool:
        """A completion: connected. False when nobody wants it any more."""
        with self._changed:
            if self._gone or self._dialling is not session:
                return False
            self._dialling = None
            self.session, self.error = session, None
            self._pause, self._reported = self.first, False
            timer, self._timer = self._timer, None
            self._changed.notify_all()
        if timer is not None:
            timer.cancel()
        return True

    def _closed(self, session: Session, reason: Reason, error: Optional[BaseException]) -> None:
        """A completion: its session, or an attempt, has ended."""
        with self._changed:
            was_up = self.session is session
            if not (was_up or self._dialling is session):
                return                      # of an attempt whose failure was told before: the timeout was faster
            self.session = self._dialling = None
            number = self._attempts
        if was_up:
            self._again()
        else:
            self._dial_next(number, error or ConnectionError(reason.value))

    def _attempt_failed(self, number: int, error: BaseException) -> None:
        with self._changed:
            if number != self._attempts or self._gone:
                return
            self._attempts += 1                                 # a late answer of the resolver is nobody's now
            self.error = error
            timer, self._timer = self._timer, None
            reported, self._reported = self._reported, True
        if timer is not None:
            timer.cancel()
        if not reported:
            _log().warning("cannot connect to %s: %s; %s", _address_text(self.address), error,
                           "trying again" if self.reconnect else "giving up")
        self._again()
        if self.on_failure is not None:
            try:
                self.on_failure(self, error)
            except BaseException as problem:
                _Core.on_failed(self.on_failure, problem)

    def _again(self) -> None:
        """Plan the next attempt, if there is to be one."""
        if not self.reconnect:
            self._give_up()
            return
        with self._changed:
            if self._gone:
                return
            pause = self._pause * self._jitter(0.5, 1.0)        # a thousand clients must not come at once
            self._pause = min(self._pause * 2, self.longest)
            self._timer = self.communicator.queue.call_later(pause, self._attempt)


# ---------------------------------------------------------------------------------------------------------------------
# CommunicatorList and run
# ---------------------------------------------------------------------------------------------------------------------

class _Closings:
    """Tells those who wait for Communicators to be closed to look again."""

    def __init__(self) -> None:
        self.changed = threading.Condition()    # guards wakers
        self.wakers: List[Callable[[], None]] = []

    def check(self) -> None:
        """A Communicator that is closing has lost a session, or has begun to close."""
        with self.changed:
            self.changed.notify_all()
            for wake in self.wakers:
                wake()


_closings = _Closings()


class _Interrupt:
    """Waits on the main thread for SIGINT or SIGTERM, or for `wake`; restores afterwards what was there before.

    The handler only notes the signal: set_wakeup_fd makes the system's own handler write to the socket that `wait`
    reads, on Windows too, where a blocked call would not be interrupted.
    """

    def __init__(self) -> None:
        self.signalled = self.stopping = False
        self._when = 0.0
        self._read, self._write = socket.socketpair()
        self._read.setblocking(True)            # whatever socket.setdefaulttimeout says
        self._write.setblocking(False)
        self._before: Dict[int, Any] = {}
        self._wakeup_before: Optional[int] = None
        self._console: Any = None

    def __enter__(self) -> _Interrupt:
        import signal
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        self._console = _engine.Console(self._console_closed)
        with _closings.changed:
            _closings.wakers.append(self.wake)
        return self

    def _console_closed(self) -> None:
        self.signalled = True
        self.wake()

    def _note(self, number: int, frame: Any) -> None:
        if not self.signalled:
            self.signalled = True
            self._when = time.monotonic()
        elif self.stopping and time.monotonic() - self._when > 1.0:     # not the same Ctrl-C, sent to a group as well
            raise KeyboardInterrupt

    def wake(self) -> None:
        """Let `wait` return."""
        try:
            self._write.send(b"\0")
        except BlockingIOError:
            pass                            # full of wakeups

    def wait(self) -> None:
        """Until a signal came or `wake` was called."""
        self._read.recv(64)

    def __exit__(self, *unused: Any) -> None:
        import signal
        with _closings.changed:
            _closings.wakers.remove(self.wake)
        self._console.close()
        if self._wakeup_before is not None:
            signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._read.close()
        self._write.close()


class CommunicatorList:
    """Several Communicators, speaking different protocols, in one process (A3); event-only queues may be among them."""

    def __init__(self, *members: Union[Communicator, EventQueue]) -> None:
        self._communicators: List[Communicator] = []
        self._queues: List[EventQueue] = []
        self.by_number: Dict[int, Communicator] = {}    # {n of [COMUNICATOR_n]: the Communicator}, from an INI file
        for member in members:
            self.add(member)

    def add(self, member: Union[Communicator, EventQueue]) -> None:
        """Add a Communicator with its queue, or a queue that serves events only."""
        if isinstance(member, Communicator):
            self._communicators.append(member)
            member = member.queue
        elif not isinstance(member, EventQueue):
            raise TypeError("%r is neither a Communicator nor an EventQueue" % (member,))
        if member not in self._queues:
            self._queues.append(member)

    @classmethod
    def from_ini(cls, path: Union[str, os.PathLike[str]], handlers: Optional[Dict[int, Any]] = None) -> CommunicatorList:
        """Everything that an INI file describes (docs/ini.md), listening already and not yet started.

        *handlers*: {n of [COMUNICATOR_n]: on_packet function}, for sections without HANDLER. Modules are imported as by the
        program itself; those beside the file are found by `serve` alone. Raises ConfigError, OSError.
        """
        return _build(_read_ini(os.fspath(path)), handlers or {})

    def __len__(self) -> int:
        return len(self._communicators)

    def __iter__(self) -> Iterator[Communicator]:
        return iter(list(self._communicators))

    def __getitem__(self, index: int) -> Communicator:
        return self._communicators[index]

    def start(self) -> None:
        """Start every queue's threads."""
        for queue in self._queues:
            queue.start()

    def stop(self, timeout: float = STOP_TIMEOUT) -> bool:
        """Stop listening, let what is queued leave for up to *timeout* seconds, abort the rest, end the threads.

        Idle clients do not hold it, and a callback that does not return holds it a second longer than *timeout*. True if
        nothing had to be aborted. RuntimeError on a queue's own thread.
        """
        if any(queue._is_here() for queue in self._queues):
            raise RuntimeError("a list cannot be stopped from a thread of its queues; close its Communicators instead")
        for communicator in self._communicators:
            communicator._close(Reason.SHUTDOWN)
        end = time.monotonic() + timeout
        with _closings.changed:
            while not self._closed() and time.monotonic() < end:
                # In slices: Windows runs the handler of a second Ctrl-C only between two waits.
                _closings.changed.wait(min(0.25, max(0.0, end - time.monotonic())))
            drained = self._closed()
        for queue in self._queues:
            drained = queue.stop(max(0.0, end - time.monotonic())) and drained
        return drained

    def _closed(self) -> bool:
        return all(communicator._closed() for communicator in self._communicators)

    def run(self, timeout: float = STOP_TIMEOUT, on_ready: Optional[Callable[[], Any]] = None) -> bool:
        """Start, wait for SIGINT or SIGTERM or until every Communicator was closed, then stop. What `stop` returns.

        *on_ready* is called once all threads run and signals are heeded: the place for a "listening on" line.
        ValueError if there is nothing in the list.
        """
        if not self._queues:
            raise ValueError("there is nothing to run: neither a Communicator nor a queue")
        _raise_file_limit(sum({communicator.manager: communicator.manager.max_sessions
                               for communicator in self._communicators}.values()))
        with _Interrupt() as interrupt:
            try:
                self.start()
                if on_ready is not None:
                    on_ready()
                while not interrupt.signalled and not (self._communicators and self._closed()):
                    interrupt.wait()
            finally:
                interrupt.stopping = True
                try:
                    drained = self.stop(timeout)
                except KeyboardInterrupt:
                    drained = self.stop(0)      # a second Ctrl-C: wait no longer
        return drained


def _raise_file_limit(sessions: int) -> None:
    """Raise the soft limit of open files to what *sessions* need, as far as the hard limit allows."""
    try:
        import resource
    except ImportError:
        return                              # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sessions + 64                  # listeners, epolls, log files and what the program has open itself
    if soft != resource.RLIM_INFINITY and soft < wanted:
        best = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
        except (OSError, ValueError) as error:
            _log().warning("the limit of open files stays at %d: %s", soft, error)


def run(*members: Union[Communicator, CommunicatorList, EventQueue], timeout: float = STOP_TIMEOUT,
        on_ready: Optional[Callable[[], Any]] = None) -> bool:
    """Run Communicators, queues or one CommunicatorList until SIGINT or SIGTERM, or until all of them were closed.

    Then everything drains for up to *timeout* seconds. *on_ready* is called once it all runs. True if nothing had to be
    aborted.
    """
    if len(members) == 1 and isinstance(members[0], CommunicatorList):
        return members[0].run(timeout, on_ready)
    return CommunicatorList(*members).run(timeout, on_ready)        # type: ignore[arg-type]


def echo(session: Session, packet: Any) -> None:
    """A handler that sends each packet back; `HANDLER=leviathan:echo` in an INI file."""
    session.send(packet)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one table, from which the reader, the commented default and docs/ini.md are made
# ---------------------------------------------------------------------------------------------------------------------

class _Wrong(Exception):
    """A cast's complaint: what would have been allowed."""


def _number(least: int, most: int, allowed: str = "") -> Callable[[str], int]:
    def cast(text: str) -> int:
        if not _is_number(text) or not least <= int(text) <= most:
            raise _Wrong(allowed or "a whole number from %d to %d" % (least, most))
        return int(text)
    return cast


def _is_number(text: str) -> bool:
    """Digits, and not so many that int() refuses them."""
    return text.isascii() and text.isdigit() and len(text) < 20


def _size(least: int, most: int) -> Callable[[str], int]:
    """4096, 4k, 2m."""
    def cast(text: str) -> int:
        unit = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}.get(text[-1:].lower(), 1)
        digits = text[:-1] if unit > 1 else text
        if not _is_number(digits) or not least <= int(digits) * unit <= most:
            raise _Wrong("%d to %d bytes, with k, m or g if you like: 4096, 4k, 2m" % (least, most))
        return int(digits) * unit
    return cast


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise _Wrong("seconds, 0 for no limit")
    return value


def _bytes_of(text: str) -> bytes:
    r"""The bytes that stand in the file, with \r \n \t \0 \\ and \xNN understood."""
    import re
    data = text.encode("utf-8", "surrogateescape")
    if not data or not re.fullmatch(rb"(?:[^\\]|\\(?:[rnt0\\]|x[0-9A-Fa-f]{2}))*", data, re.DOTALL):
        raise _Wrong(r"one or more characters; \r \n \t \0 \\ \xNN are understood")
    known = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}
    return re.sub(rb"\\(x..|.)", lambda found: known.get(found[1]) or bytes((int(found[1][1:], 16),)), data)


def _character(text: str) -> bytes:
    data = _bytes_of(text)
    if len(data) != 1 or data.isdigit():
        raise _Wrong("one character that is no digit")
    return data


def _choice(*allowed: str) -> Callable[[str], str]:
    def cast(text: str) -> str:
        if text.lower() not in allowed:
            raise _Wrong(", ".join(allowed))
        return text.lower()
    return cast


def _endpoint(text: str, least: int) -> Tuple[str, Any]:
    """("tcp", (host, port)) or ("unix", path). *least*: the lowest port that may be asked for."""
    if text.startswith("unix:") and len(text) > 5:
        return "unix", text[5:]
    host, colon, port = text.rpartition(":")
    if not colon:
        port = text
    host = host or DEFAULT_HOST             # `:7878` too: all addresses of the machine are asked for by name
    if host[:1] + host[-1:] == "[]":
        host = host[1:-1]
        wrong = not host                    # to the system it would be all addresses of the machine
    else:
        wrong = ":" in host
    if wrong or "[" in host or "]" in host or not _is_number(port) or not least <= int(port) <= 65535:
        raise _Wrong("host:port, [IPv6 address]:port, port or unix:path, several with commas; port %d to 65535" % least)
    try:
        host.encode("idna")                 # as getaddrinfo does
    except UnicodeError as error:
        raise _Wrong("a host of labels of 1 to 63 characters between its dots") from error
    return "tcp", (host, int(port))


def _endpoints(least: int) -> Callable[[str], List[Tuple[str, Any]]]:
    return lambda text: [_endpoint(part.strip(), least) for part in text.split(",") if part.strip()]


def _reference(text: str) -> Any:
    """The object that `module:name` names."""
    import importlib
    module, colon, name = text.partition(":")
    if not colon or not module or not name or module.startswith("."):
        raise _Wrong("module:function")
    try:
        found: Any = sys.modules[__name__] if module == "leviathan" else importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:            # whatever the module does at its import
        why = " ".join(("%s: %s" % (type(error).__name__, error)).split())
        raise _Wrong("module:function that can be imported (%s)" % why) from error
    if not callable(found):
        raise _Wrong("module:function; %s is no function" % text)
    return found


def _section_name(text: str) -> str:
    if text.upper() != "HEADER" and not (text.upper().startswith("HEADER_") and _is_number(text[7:])):
        raise _Wrong("HEADER or HEADER_n")
    return text.upper()


class _Setting:
    """A row of the table."""

    __slots__ = ("section", "key", "cast", "default", "help")

    def __init__(self, section: str, key: str, cast: Callable[[str], Any], default: str, help_text: str) -> None:
        self.section, self.key, self.cast, self.default, self.help = section, key, cast, default, help_text


_CLASS_NAMES = {("%d" % (1 << power) if power < 10 else "%dk" % (1 << power - 10) if power < 20 else
                 "%dm" % (1 << power - 20)): 1 << power for power in range(SMALLEST_CLASS, LARGEST_POOLED + 1)}

_SETTINGS = (
    _Setting("SESSION", "SESSION_MAX", _number(1, 10000000), "10000", "sessions at once, of all Communicators together"),
    _Setting("SESSION", "RECV_BUF_SIZE", _size(RECV_LEAST, 1 << LARGEST_POOLED), "4k",
             "first receive buffer of a packet whose length is not known yet"),
    _Setting("SESSION", "NR_SEND_SOCKETDATA", _number(1, 1024), "1", "send operations kept for use again, per session"),
    _Setting("SESSION", "MEMORY_LIMIT", _size(RECV_LEAST, 1 << 50), "1g",
             "all buffers together; at the limit receiving waits"),
) + tuple(
    _Setting("MPOOL", "IDX_BUF_" + name, _number(0, 1000000), "0", "buffers of %s bytes made at the start" % size)
    for name, size in _CLASS_NAMES.items()
) + (
    _Setting("IOCP", "COUNT", _number(0, 1000), "1",
             "how many queues there are ([QUEUE]: the same), those with the least numbers; without it all, and number 0"),
    _Setting("IOCP_n", "THR_COUNT", _number(1, 1024), "", "threads of queue n; without it 1 under a GIL, else one per CPU"),
    _Setting("HEADER_n", "TYPE", _choice("number", "text", "delimiter", "fixed", "raw", "http", "resp", "function"), "",
             "how packets are framed; without it text if SIZE_END_CHAR is there, else number"),
    _Setting("HEADER_n", "SIZE_BYTES", _number(1, 1 << 20, "number: 1 to 8; fixed: 1 to 1048576"), "4",
             "number: bytes of the length, 1 to 8; fixed: of a packet"),
    _Setting("HEADER_n", "BYTE_ORDER", _choice("big", "little"), "big", "number: byte order of the length"),
    _Setting("HEADER_n", "SIZE_END_CHAR", _character, ",", "text: the character after the digits"),
    _Setting("HEADER_n", "DELIMITER", _bytes_of, r"\r\n", "delimiter: what ends a packet"),
    _Setting("HEADER_n", "MAX_PACKET", _size(1, 1 << LARGEST_CLASS), "2m",
             "longest packet with its header, http: longest body; a longer one closes the session"),
    _Setting("HEADER_n", "ROLE", _choice("server", "client"), "server",
             "http, resp: a server gets requests, a client gets the answers to its own"),
    _Setting("HEADER_n", "FUNCTION", _reference, "", "function: your parse(view) -> int"),
    _Setting("COMUNICATOR", "COUNT", _number(0, 1000), "1",
             "how many Communicators there are (COMMUNICATOR: the same), those with the least numbers; without it all"),
    _Setting("COMUNICATOR_n", "IOCP_IDX", _number(0, 1000), "", "number of its queue; without it a queue of its own"),
    _Setting("COMUNICATOR_n", "CLIENT_SESSION_MAX", _number(0, 10000000), "", "clients at once; 0: takes no clients"),
    _Setting("COMUNICATOR_n", "LISTEN", _endpoints(0), "", "addresses to listen on: 127.0.0.1:7878, [::1]:8999"),
    _Setting("COMUNICATOR_n", "CONNECT", _endpoints(1), "", "servers to connect to, again and again"),
    _Setting("COMUNICATOR_n", "HANDLER", _reference, "", "module:function that gets (session, packet)"),
    _Setting("COMUNICATOR_n", "ON_CONNECT", _reference, "", "module:function that gets (session)"),
    _Setting("COMUNICATOR_n", "ON_DISCONNECT", _reference, "", "module:function that gets (session, reason, error)"),
    _Setting("COMUNICATOR_n", "HEADER", _section_name, "HEADER", "the section that says how packets are framed"),
    _Setting("COMUNICATOR_n", "IDLE_TIMEOUT", _seconds, "0", "seconds without anything received; 0: for ever"),
    _Setting("COMUNICATOR_n", "PACKET_TIMEOUT", _seconds, "60", "seconds from a packet's first byte to its last"),
    _Setting("COMUNICATOR_n", "ACCEPT_IDX", _number(0, 1000), "", "number of the queue that accepts, if another one does"),
)

# {what may be written: the name in the table}
_SECTION_ALIASES = {"QUEUE": "IOCP", "COMMUNICATOR": "COMUNICATOR"}


_BASES = ("SESSION", "MPOOL", "IOCP", "HEADER", "COMUNICATOR")


def _table_section(name: str) -> Tuple[str, Optional[int]]:
    """("COMUNICATOR_n", 3) for [COMMUNICATOR_3]; ("", None) for a section that is not leviathan's."""
    base, _, number = name.strip().upper().partition("_")
    base = _SECTION_ALIASES.get(base, base)
    if number:
        if base in ("IOCP", "HEADER", "COMUNICATOR") and _is_number(number):
            return base + "_n", int(number)
        return "", None
    return (base, None) if base in _BASES else ("", None)


class _Ini:
    """The values of an INI file, cast: {(section, number): {key: value}} for what the file says, defaults apart."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.sections: Dict[Tuple[str, Optional[int]], Dict[str, Any]] = {}
        self.names: Dict[Tuple[str, Optional[int]], str] = {}                       # {(section, number): as written}
        self.texts: Dict[Tuple[str, Optional[int], str], Tuple[str, str]] = {}      # (section's name, text) as written

    def numbers(self, section: str) -> List[int]:
        """Which n there are of a section."""
        return sorted(number for name, number in self.sections if name == section and number is not None)

    def name(self, section: str, number: Optional[int]) -> str:
        """A section's name as the file has it: COMMUNICATOR_0 or COMUNICATOR_0."""
        return self.names.get((section, number), section.replace("_n", "_%s" % number))

    def queues(self) -> List[int]:
        """Which queues there are: all that have a section, and number 0; where COUNT is written, only as many."""
        known = self.numbers("IOCP_n")
        count = self.sections.get(("IOCP", None), {}).get("COUNT")
        if count is None:
            return sorted({0, *known})
        return sorted((known + [number for number in range(count) if number not in known])[:count])

    def communicators(self) -> List[int]:
        """Which of the [COMUNICATOR_n] are used: as many as COUNT says, those with the least numbers."""
        numbers = self.numbers("COMUNICATOR_n")
        return numbers[:self.sections.get(("COMUNICATOR", None), {}).get("COUNT", len(numbers))]

    def get(self, section: str, number: Optional[int], key: str) -> Any:
        """The value, else the default, else None."""
        values = self.sections.get((section, number), {})
        if key in values:
            return values[key]
        setting = next(row for row in _SETTINGS if row.section == _row_section(section) and row.key == key)
        return setting.cast(setting.default) if setting.default else None

    def wrong(self, section: str, number: Optional[int], key: str, message: str, allowed: str = "") -> ConfigError:
        """The error for a value that is there."""
        name, text = self.texts.get((section, number, key), (self.name(section, number), ""))
        return ConfigError(message, file=self.file, section=name, key=key, value=text, allowed=allowed)


def _row_section(section: str) -> str:
    """[HEADER] has the settings of [HEADER_n]."""
    return "HEADER_n" if section == "HEADER" else section


def _plain_lines(text: str, path: str) -> Iterator[str]:
    """The lines as configparser wants them: not indented, which would make them part of the one before; no comment behind a ].

    Of other programs' sections only the names are left, since what is in them need not be what configparser reads. Raises
    ConfigError for what it would take otherwise than it was meant: text behind a section's name, a key that a section of ours
    has twice.
    """
    name: Optional[str] = None
    section: Tuple[str, Optional[int]] = "", None
    lines: Dict[Tuple[str, Optional[int], str], int] = {}       # {(section, number, key): its line}
    for number, line in enumerate(text.split("\n"), 1):         # splitlines() would take U+2028 and a form feed for an end
        line = line.strip()
        if line.startswith("["):
            line = line.split("#")[0].split(";")[0].strip()
            ours = section[0]
            name = line[1:line.rfind("]")]
            section = _table_section(name)
            if not line.endswith("]") and (ours or section[0]):         # within those of other programs it is their affair
                raise ConfigError("line %d is neither a section nor key=value: %s" % (number, line), file=path)
            if not section[0]:
                line = "[%s]" % (name.replace("]", ")").strip() or "-")     # what configparser takes for one as well
        elif name is not None and not section[0]:
            line = ""
        elif name is not None and line[:1] not in ("#", ";", ""):
            key = line.partition("=")[0].strip().upper()
            before = lines.setdefault(section + (key,), number)
            if before != number:
                raise ConfigError("it stands in line %d already, and again in line %d" % (before, number), file=path,
                                  section=name, key=key)
        yield line


def _without_comment(value: str) -> str:
    """A value without a comment behind it. `#` alone is a value: an end character may be that."""
    if value.startswith("# "):
        return ""
    return value.split(" #")[0].split("\t#")[0].strip()


def _report_near(path: str, name: str) -> None:
    """A section that is nearly one of ours is left alone, like any other that is not, but hardly on purpose."""
    import difflib
    name = name.strip()
    base = name.upper().rstrip("_0123456789")
    near = difflib.get_close_matches(base, _BASES + tuple(_SECTION_ALIASES), 1, 0.8)
    if near:
        number = name[len(base):].strip("_")
        meant = near[0]
        if number and _table_section(meant + "_0")[0]:      # the others have no number
            meant += "_" + number
        _log().warning("%s: [%s] is no section of leviathan, and left alone; did you mean [%s]?", path, name, meant)


def _read_ini(path: str, text: Optional[str] = None) -> _Ini:
    """Read and check a file (or *text*). Sections of other programs are left alone. Raises ConfigError, OSError."""
    import configparser
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True, delimiters=("=",), default_section="\0")
    try:
        if text is None:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                text = file.read()
        if "\0" in text:
            raise ConfigError("this is no text in UTF-8", file=path)
        parser.read_string("\n".join(_plain_lines(text, path)), path)
    except configparser.MissingSectionHeaderError as error:
        raise ConfigError("line %d comes before any section: %s" % (error.lineno, error.line.strip()[:60]),
                          file=path) from error
    except configparser.Error as error:
        raise ConfigError(" ".join(str(error).split()), file=path) from error
    ini = _Ini(path)
    for name in parser.sections():
        section, number = _table_section(name)
        if not section:
            _report_near(path, name)
            continue
        rows = {row.key.upper(): row for row in _SETTINGS if row.section == _row_section(section)}
        values = ini.sections.setdefault((section, number), {})
        ini.names.setdefault((section, number), name)
        for key, value in parser.items(name):
            value = _without_comment(value or "")
            row = rows.get(key.upper())
            if row is None:
                import difflib
                near = difflib.get_close_matches(key.upper(), list(rows), 1, 0.5)
                raise ConfigError("there is no such key" + (", did you mean %s?" % rows[near[0]].key if near else ""),
                                  file=path, section=name, key=key.upper(), value=value,
                                  allowed=", ".join(sorted(row.key for row in rows.values())))
            ini.texts[section, number, row.key] = (name, value)
            if not value:
                continue                    # written, and left empty: the default
            try:
                values[row.key] = row.cast(value)
            except _Wrong as error:
                raise ini.wrong(section, number, row.key, "this cannot be used", str(error)) from error
    return ini


# {TYPE: the keys that mean something to it}
_HEADER_KEYS = {
    "number": ("SIZE_BYTES", "BYTE_ORDER", "MAX_PACKET"), "text": ("SIZE_END_CHAR", "MAX_PACKET"),
    "delimiter": ("DELIMITER", "MAX_PACKET"), "fixed": ("SIZE_BYTES",), "raw": (), "http": ("ROLE", "MAX_PACKET"),
    "resp": ("ROLE", "MAX_PACKET"), "function": ("FUNCTION", "MAX_PACKET")}


def _framing_of(ini: _Ini, header: str) -> Framing:
    """The framing that a [HEADER] or [HEADER_n] section describes."""
    section, number = _table_section(header)

    def get(key: str) -> Any:
        return ini.get(section, number, key)

    written = ini.sections.get((section, number), {})
    kind = get("TYPE") or ("text" if "SIZE_END_CHAR" in written else "number")
    used = ("TYPE",) + _HEADER_KEYS[kind]
    for key, value in written.items():
        if key not in used and value != _Ini(ini.file).get(section, number, key):       # above all a limit that would be none
            raise ini.wrong(section, number, key, "TYPE=%s does not use it" % kind, ", ".join(used))
    limit = get("MAX_PACKET")
    try:
        if kind == "number":
            return LengthPrefix(get("SIZE_BYTES"), byteorder=get("BYTE_ORDER"), max_packet=limit)
        if kind == "text":
            return TextLength(get("SIZE_END_CHAR"), max_packet=limit)
        if kind == "delimiter":
            return Delimited(get("DELIMITER"), max_packet=limit)
        if kind == "fixed":
            return FixedSize(get("SIZE_BYTES"))
        if kind == "raw":
            return Raw()
        if kind == "http":
            return Http(get("ROLE"), max_body=limit)
        if kind == "resp":
            return Resp(get("ROLE"), max_packet=limit)
        if get("FUNCTION") is None:
            raise ini.wrong(section, number, "FUNCTION", "TYPE=function needs it", "module:function")
        return Function(get("FUNCTION"), max_packet=limit)
    except ValueError as error:
        key = "SIZE_BYTES" if kind in ("number", "fixed") and "size" in str(error) else "MAX_PACKET"
        raise ini.wrong(section, number, key, str(error)) from error


def _no_handler(session: Session, packet: Any) -> None:
    raise LeviathanError("%s has no HANDLER in the INI file, and none was given to from_ini" % session.communicator.name)


def _manager_of(ini: _Ini) -> SessionManager:
    """The pool that [SESSION] and [MPOOL] describe; each value is right by itself, but they must fit one another."""
    limit, receive = ini.get("SESSION", None, "MEMORY_LIMIT"), ini.get("SESSION", None, "RECV_BUF_SIZE")
    classes = {size: ini.get("MPOOL", None, "IDX_BUF_" + name) for name, size in _CLASS_NAMES.items()}
    if receive > limit:
        raise ini.wrong("SESSION", None, "MEMORY_LIMIT", "a RecvBuf has %d bytes" % receive, "%d bytes or more" % receive)
    total = sum(size * count for size, count in classes.items())
    if total > limit:
        name, size = max(_CLASS_NAMES.items(), key=lambda item: item[1] * classes[item[1]])
        others = total - size * classes[size]
        raise ini.wrong("MPOOL", None, "IDX_BUF_" + name, "all together are %d bytes, over MEMORY_LIMIT" % total,
                        "0 to %d with this MEMORY_LIMIT, %d" % (max(0, limit - others) // size, limit))
    try:
        return SessionManager(ini.get("SESSION", None, "SESSION_MAX"), receive, classes,
                              ini.get("SESSION", None, "NR_SEND_SOCKETDATA"), limit)
    except MemoryError as error:
        raise ConfigError("there is no memory for %d bytes of buffers" % total, file=ini.file,
                          section=ini.name("MPOOL", None)) from error


def _build(ini: _Ini, handlers: Dict[int, Any], bind: bool = True) -> CommunicatorList:
    """Make what the INI describes; listen and connect too, unless *bind* is False."""
    manager = _manager_of(ini)
    queues: Dict[int, EventQueue] = {}
    known = ini.queues()
    unused = [index for index in ini.numbers("IOCP_n") if index not in known]
    if unused:
        _log().warning("%s: [%s] COUNT is %d: not used: %s", ini.file, ini.name("IOCP", None), len(known),
                       ", ".join("[%s]" % ini.name("IOCP_n", index) for index in unused))

    def queue_of(number: int, key: str) -> Optional[EventQueue]:
        index = ini.get("COMUNICATOR_n", number, key)
        if index is None:
            return None
        if index not in known:
            raise ini.wrong("COMUNICATOR_n", number, key, "there is no queue of that number", ", ".join(map(str, known)))
        if index not in queues:
            queues[index] = EventQueue(ini.get("IOCP_n", index, "THR_COUNT"), name="queue%d" % index)
        return queues[index]

    result = CommunicatorList()
    numbers = ini.numbers("COMUNICATOR_n")
    count = ini.sections.get(("COMUNICATOR", None), {}).get("COUNT", len(numbers))
    if count > len(numbers):
        raise ini.wrong("COMUNICATOR", None, "COUNT", "there are not so many sections [COMUNICATOR_n]",
                        "0 to %d" % len(numbers))
    if count < len(numbers):
        _log().warning("%s: [COMUNICATOR] COUNT is %d: not used: %s", ini.file, count,
                       ", ".join("[%s]" % ini.name("COMUNICATOR_n", number) for number in numbers[count:]))
    for number in handlers:
        if number not in numbers:
            raise ConfigError("there is a handler for it, but no section [COMUNICATOR_%s]" % number, file=ini.file)
    try:
        for number in ini.communicators():
            _build_communicator(ini, number, manager, queue_of, handlers, result, bind)
    except BaseException:
        result.stop(0)                      # nothing stays bound
        raise
    for index in ini.numbers("IOCP_n"):     # a queue that no Communicator has serves events
        if index in known and index not in queues:
            queues[index] = EventQueue(ini.get("IOCP_n", index, "THR_COUNT"), name="queue%d" % index)
            result.add(queues[index])
    return result


def _build_communicator(ini: _Ini, number: int, manager: SessionManager,
                        queue_of: Callable[[int, str], Optional[EventQueue]], handlers: Dict[int, Any],
                        result: CommunicatorList, bind: bool) -> None:
    def get(key: str) -> Any:
        return ini.get("COMUNICATOR_n", number, key)

    if get("LISTEN") and get("CLIENT_SESSION_MAX") == 0:
        raise ini.wrong("COMUNICATOR_n", number, "CLIENT_SESSION_MAX", "it has LISTEN, but takes no clients",
                        "1 or more, or no LISTEN")
    section, header_number = _table_section(get("HEADER"))
    if header_number is not None and (section, header_number) not in ini.sections:
        there = [ini.name("HEADER_n", known) for known in ini.numbers("HEADER_n")]
        raise ini.wrong("COMUNICATOR_n", number, "HEADER", "there is no such section", ", ".join(["HEADER"] + there))
    communicator = Communicator(
        _framing_of(ini, get("HEADER")), handlers.get(number) or get("HANDLER") or _no_handler,
        on_connect=get("ON_CONNECT"), on_disconnect=get("ON_DISCONNECT"), queue=queue_of(number, "IOCP_IDX"),
        manager=manager, max_clients=get("CLIENT_SESSION_MAX"), idle_timeout=get("IDLE_TIMEOUT"),
        packet_timeout=get("PACKET_TIMEOUT"), name=ini.name("COMUNICATOR_n", number))
    result.add(communicator)
    result.by_number[number] = communicator
    acceptor = communicator
    accept_queue = queue_of(number, "ACCEPT_IDX")
    if accept_queue is not None and accept_queue is not communicator.queue:
        acceptor = Communicator(communicator.framing, _no_handler, queue=accept_queue, manager=manager,
                                name=ini.name("COMUNICATOR_n", number))
        result.add(acceptor)
    if not bind:
        return
    for family, address in get("LISTEN") or ():
        try:
            if family == "unix":
                acceptor.listen(unix=address, serve=communicator)
            else:
                acceptor.listen(address[1], address[0], serve=communicator)
        except OSError as error:
            where = "%s: [%s] LISTEN" % (ini.file, ini.name("COMUNICATOR_n", number))
            raise OSError(error.errno, "%s: %s" % (where, error.strerror)) from error
    for family, address in get("CONNECT") or ():
        if family == "unix":
            communicator.connect("", unix=address, reconnect=True)
        else:
            communicator.connect(*address, reconnect=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

_EMBEDDED_INI = """\
[HEADER]
TYPE = number
SIZE_BYTES = 4
[COMUNICATOR]
COUNT = 1
[COMUNICATOR_0]
LISTEN = [{host}]:{port}
HANDLER = leviathan:echo
"""


def _default_ini() -> str:
    """Every setting with its default and its meaning, as an INI file that works: an echo server."""
    used = {"LISTEN": "%s:%d" % (DEFAULT_HOST, DEFAULT_PORT), "HANDLER": "leviathan:echo", "TYPE": "number"}
    lines = ["# leviathan %s: every setting with its default. Lines that begin with # are comments." % __version__]
    section = ""
    for row in _SETTINGS:
        if row.section != section:
            section = row.section
            lines += ["", "[%s]" % {"HEADER_n": "HEADER"}.get(section, section.replace("_n", "_0"))]
        value = used.get(row.key, row.default)
        off = "" if row.key in used or row.section in ("SESSION", "MPOOL") or row.key == "COUNT" else "# "
        lines += ["# " + row.help, "%s%s = %s" % (off, row.key, value)]
    return "\n".join(lines) + "\n"


def _ini_reference() -> str:
    """docs/ini.md."""
    lines = ["# INI reference", "", "Made from the table in `leviathan.py` by `python leviathan.py config --markdown`.", "",
             "A size is bytes, or has `k`, `m` or `g` behind it. Keys and sections may be in any case; `[QUEUE]` is "
             "`[IOCP]`, `[COMMUNICATOR]` is `[COMUNICATOR]`. An unknown key in these sections is an error, and so is one that "
             "stands there twice; other sections are left alone. A key with an empty value is one that is not there. `#` "
             "begins a comment, at a line's start or after a space. An address without a host, `7878`, is 127.0.0.1; "
             "`0.0.0.0:7878` and `[::]:7878` are all addresses of the machine."]
    section = ""
    for row in _SETTINGS:
        if row.section != section:
            section = row.section
            title = "[HEADER], [HEADER_n]" if section == "HEADER_n" else "[%s]" % section
            lines += ["", "## " + title, "", "| key | default | meaning |", "|---|---|---|"]
        lines.append("| `%s` | %s | %s |" % (row.key, "`%s`" % row.default if row.default else "", row.help))
    return "\n".join(lines) + "\n"


def _bundle(path: str) -> None:
    """Write core and engines as one file. The engines stand in it as they are, in raw strings, so that tracebacks fit."""
    here = os.path.dirname(os.path.abspath(__file__))
    marker = "_BUNDLED: Dict"
    with open(os.path.abspath(__file__), encoding="utf-8") as file:
        lines = file.read().split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith(marker))
    if lines[at + 1].startswith("_BUNDLED["):
        raise LeviathanError("this is a bundle already: copy %s" % os.path.abspath(__file__))
    for name in ("leviathan", "leviathan_linux", "leviathan_win"):
        source = os.path.join(here, name + ".py")
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise LeviathanError("%s is one of the files that the bundle is made of; give it another path" % path)
    engines: List[str] = []
    for name in ("leviathan_linux", "leviathan_win"):
        source = os.path.join(here, name + ".py")
        if not os.path.exists(source):
            continue
        with open(source, encoding="utf-8") as file:
            text = file.read()
        if "'''" in text:
            raise LeviathanError("%s has three apostrophes in a row, and cannot be bundled" % source)
        line = at + 1 + len(engines) + 1            # the line of the opening quotes, counted from 1
        engines += ["_BUNDLED[%r] = (%d, r'''" % (name, line)] + text.rstrip("\n").split("\n") + ["''')"]
    if not engines:
        raise LeviathanError("there is no engine beside %s to put into the bundle" % os.path.abspath(__file__))
    _replace(path, "\n".join(lines[:at + 1] + engines + lines[at + 1:]))


def _replace(path: str, text: str) -> None:
    """Write a file whole or not at all, with the mode of the one that was there."""
    there = os.path.exists(path)
    if there and not os.path.isfile(path):
        raise LeviathanError("%s is no regular file" % path)
    part = "%s.%d.part" % (path, os.getpid())
    try:
        file = open(part, "x", encoding="utf-8")        # never a file of the user's
        try:
            with file:
                file.write(text)
            if there:
                os.chmod(part, os.stat(path).st_mode & 0o7777)
            os.replace(part, path)
        except BaseException:
            os.remove(part)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _print(text: str) -> None:
    """Print a line, if there is a stdout; what it cannot encode is escaped, as on stderr."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _serve(ini: _Ini, path: str, check: bool, hint: str = "") -> int:
    used = ini.communicators()
    for number in used:
        if ini.get("COMUNICATOR_n", number, "HANDLER") is None:
            raise ini.wrong("COMUNICATOR_n", number, "HANDLER", "it is needed here", "module:function")
    if not any(ini.get("COMUNICATOR_n", number, key) for number in used for key in ("LISTEN", "CONNECT")):
        raise ConfigError("there is nothing to serve: no [COMUNICATOR_n] has LISTEN or CONNECT", file=path)
    servers = _build(ini, {}, not check)
    if check:
        _print("%s is right" % path)
        return 0

    def ready() -> None:
        for communicator in servers:
            for listener in communicator.listeners:
                _print("listening on %s" % _address_text(listener.address))
        if hint:
            address = servers[0].listeners[0].address
            _print(hint % {"host": address[0], "port": address[1]})

    return 0 if servers.run(on_ready=ready) else 1


_HINT = ("try: python -c \"import socket; s = socket.create_connection(('%(host)s', %(port)d)); "
         "s.sendall(b'\\0\\0\\0\\5hello'); print(s.recv(9))\"")


class _Itself:
    """An import hook that finds *module*, which runs as a program, by whatever name a handler's module imports its file.

    A second copy would have classes of its own: its FramingError would be any error here, its Reason another one.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name = os.path.splitext(os.path.basename(__file__))[0]
        self.file = os.path.realpath(__file__)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The import system's question (importlib.abc.MetaPathFinder)."""
        if name.rpartition(".")[2] != self.name:
            return None
        from importlib.machinery import ModuleSpec, PathFinder
        found = PathFinder.find_spec(name, path)
        if found is None or os.path.realpath(found.origin or "") != self.file:
            return None
        return ModuleSpec(name, self, origin=found.origin)      # type: ignore[arg-type]

    def create_module(self, spec: Any) -> None:
        """An empty one will do (importlib.abc.Loader)."""

    def exec_module(self, module: Any) -> None:
        """The import takes what is in sys.modules afterwards (importlib.abc.Loader)."""
        sys.modules[module.__name__] = self.module


def main(arguments: Optional[List[str]] = None) -> int:
    """The command line. Returns the exit status: 0 after a drained stop, 1 after one that was not, 2 for bad usage."""
    import argparse
    parser = argparse.ArgumentParser(prog="leviathan", description="TCP servers in pure Python.",
                                     epilog="Without a command: an echo server with a 4-byte length before each packet.")
    parser.add_argument("--version", action="version", version="leviathan %s (%s)" % (__version__, _engine.NAME))
    parser.add_argument("--host", help="address of the echo server (%s)" % DEFAULT_HOST)
    parser.add_argument("--port", type=int, help="its port; 0: any (%d)" % DEFAULT_PORT)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="run what an INI file describes")
    serve.add_argument("file", metavar="FILE.ini")
    serve.add_argument("--check", action="store_true", help="only say whether the file is right")
    config = commands.add_parser("config", help="print a commented default INI file")
    config.add_argument("--markdown", action="store_true", help="print the reference of all settings instead")
    bundle = commands.add_parser("bundle", help="write leviathan and its engines as one file")
    bundle.add_argument("path", metavar="PATH")
    options = parser.parse_args(arguments)
    if options.command and (options.host, options.port) != (None, None):
        parser.error("--host and --port are those of the echo server, which is what runs without a command")
    if options.command in (None, "serve"):
        import logging
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if options.command == "config":
            if sys.stdout is None:
                raise LeviathanError("there is no stdout to print to")
            sys.stdout.write(_ini_reference() if options.markdown else _default_ini())
        elif options.command == "bundle":
            _bundle(options.path)
            _print("wrote %s" % options.path)
        elif options.command == "serve":
            sys.path.insert(0, os.path.dirname(os.path.abspath(options.file)))      # handlers stand beside their INI
            return _serve(_read_ini(options.file), options.file, options.check)
        else:
            host = options.host or DEFAULT_HOST
            text = _EMBEDDED_INI.format(host=host, port=DEFAULT_PORT if options.port is None else options.port)
            return _serve(_read_ini("the embedded INI", text), "the embedded INI", False, _HINT)
    except (LeviathanError, OSError, RuntimeError) as error:        # RuntimeError: no thread can be had
        message = error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else error
        print("leviathan: %s" % message, file=sys.stderr)
        return 2
    except KeyboardInterrupt:               # at the start, or the third one: the second makes a stop wait no longer
        print("leviathan: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Handlers must get this module, not a second copy of it: also as `leviathan` where it is in a package, and where that
    # package imports it, so that it is there already when `-m` runs it.
    _itself: Any = sys.modules.get(getattr(globals()["__spec__"], "name", "leviathan"), sys.modules["__main__"])
    sys.modules.setdefault("leviathan", _itself)
    sys.meta_path.insert(0, _Itself(_itself))
    sys.exit(_itself.main())
