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

Sections: errors and kinds, framings, buffers and the SessionManager, Session, completions, EventQueue, Communicator,
CommunicatorList, configuration, command line. MIT licence.
"""
from __future__ import annotations

import ctypes
import enum
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from threading import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import (Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type, Union)
    BytesLike = Union[bytes, bytearray, memoryview]
    OnPacket = Callable[["Session", Any], Any]
    OnConnect = Callable[["Session"], Any]
    OnDisconnect = Callable[["Session", "Reason", Optional[BaseException]], Any]
    OnSent = Callable[["Session", bool], Any]

__version__ = "0.1.0"
__all__ = [
    "LeviathanError", "ConfigError", "FramingError", "PoolExhausted", "Reason", "Kind", "Framing", "LengthPrefix",
    "TextLength", "Delimited", "FixedSize", "Raw", "Function", "SessionManager", "Session", "ConnectionList",
    "EventQueue", "Communicator", "CommunicatorList", "Listener", "Connector", "run"]

# Sources of the numbers below: MISSION B4 for the buffer classes, DESIGN section 4 for the water marks; the others
# say where they come from.
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7878
RECV_BUFFER = 4096              # the first RecvBuf of a packet whose length is not known yet
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
SEND_INLINE = 1 << 14           # a larger packet is queued beside its header instead of being copied behind it
PACKET_TIMEOUT = 60.0           # seconds from a packet's first byte to its last
STOP_TIMEOUT = 10.0             # seconds that a stop lets queued bytes leave


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
    """The logger "leviathan"; logging is imported when the first line is written, not at import (6 of 20 ms)."""
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
    pack: Optional[Callable[[int], bytes]] = None       # makes a header of a length: the fast path of Session.send

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """The whole length in bytes of the packet that begins at *start*; 0 when that is not known yet.

        Bytes from *start* to *end* are there. The first *seen* of them were there at an earlier call that returned 0,
        so they need not be searched again. Raises FramingError when this can be no packet, or is over max_packet.
        """
        raise NotImplementedError

    def decode(self, buffer: Any, start: int, stop: int) -> Any:
        """What the handler gets of the packet from *start* to *stop*."""
        return buffer[start:stop]

    def encode(self, packet: Any) -> bytes:
        """The bytes that carry *packet*. Raises ValueError when they cannot."""
        return bytes(packet)

    def split(self, buffer: Any, start: int, end: int, seen: int = 0) -> Iterator[Tuple[Any, int]]:
        """Yield (packet, where it ends) for each whole packet."""
        while start < end:
            size = self.parse(buffer, start, end, seen)
            stop = start + size
            if not size or stop > end:
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

    def too_long(self, size: int) -> FramingError:
        """The error for a packet of *size* bytes."""
        return FramingError("a packet of %d bytes is over max_packet (%d)" % (size, self.max_packet))


def _check_max(max_packet: int, least: int = 1) -> int:
    if not least <= max_packet <= 1 << LARGEST_CLASS:
        raise ValueError("max_packet is %r; it must be %d to %d bytes" % (max_packet, least, 1 << LARGEST_CLASS))
    return max_packet


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
        if size not in range(1, 9):
            raise ValueError("size is %r; a length has 1 to 8 bytes" % (size,))
        if byteorder not in ("big", "little"):
            raise ValueError("byteorder is %r; it must be 'big' or 'little'" % (byteorder,))
        if offset < 0:
            raise ValueError("offset is %r; it must be 0 or more" % (offset,))
        if strip and offset:
            raise ValueError("with an offset the header has more in it than the length: use strip=False")
        self.size, self.byteorder, self.offset, self.adjust, self.strip = size, byteorder, offset, adjust, strip
        self.header = offset + size
        self.max_packet = _check_max(max_packet, self.header)
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}.get(size)
        self._struct = struct.Struct((">" if byteorder == "big" else "<") + code) if code else None
        if strip and not adjust and self._struct is not None:
            self.pack = self._struct.pack

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

    def encode(self, packet: BytesLike) -> bytes:
        """Header and content; with strip=False the packet as it is, after a look at its length."""
        if self.strip:
            length = len(packet) - self.adjust
            if not 0 <= length < 1 << 8 * self.size:
                raise ValueError("a packet of %d bytes does not fit a length of %d bytes" % (len(packet), self.size))
            return length.to_bytes(self.size, self.byteorder) + packet          # type: ignore[arg-type]
        data = bytes(packet)
        if self.parse(data, 0, len(data)) != len(data):
            raise ValueError("the packet's header does not say the packet's length (%d bytes)" % len(data))
        return data

    def receiver(self, on_packet: OnPacket, rest: Callable[[Session, Any, int, int], None],
                 fail: Callable[[Session, BaseException], None]) -> Callable[[Session, Any, int], None]:
        """The hot loop of leviathan: the same as Framing.receiver, without its generator and calls.

        For 16 packets in one receive that is 0.2 microseconds of 0.8 for each of them.
        """
        if self.pack is None or self._struct is None:
            return super().receiver(on_packet, rest, fail)
        unpack_from = self._struct.unpack_from
        header = self.header
        limit = self.max_packet - header
        too_long = self.too_long

        def received(session: Session, buffer: Any, end: int) -> None:
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
        if len(end) != 1 or end.isdigit():
            raise ValueError("end is %r; it must be one byte that is no digit" % (end,))
        self.end, self.trailer, self.strip = end, trailer, strip
        self.max_packet = _check_max(max_packet, 2)
        self._digits = len(str(self.max_packet))        # more digits than the limit has can only be over it

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
                raise FramingError("a length of more than %d digits is over max_packet (%d)"
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
        return b"%d%b%b%b" % (len(packet), self.end, packet, self.trailer) if self.strip else bytes(packet)


class Delimited(Framing):
    """Packets closed by a delimiter, lines for example. *strip*: the handler gets them without it, `send` adds it.

    *max_packet*: limit in bytes with the delimiter; a peer that sends more without one is closed.
    """

    def __init__(self, delimiter: bytes = b"\r\n", *, strip: bool = True, max_packet: int = 1 << 16) -> None:
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
        """The packet and its delimiter. Raises ValueError when the delimiter is in the packet."""
        data = bytes(packet)
        if not self.strip:
            return data
        if self.delimiter in data:
            raise ValueError("the packet contains the delimiter %r" % (self.delimiter,))
        return data + self.delimiter

    def split(self, buffer: Any, start: int, end: int, seen: int = 0) -> Iterator[Tuple[bytes, int]]:
        """As Framing.split, but the buffer is copied once and not once for every line in it."""
        data = bytes(buffer[start:end])
        delimiter, width, find = self.delimiter, len(self.delimiter), data.find
        begin = 0
        at = find(delimiter, max(0, seen - width + 1))
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
        if size < 1:
            raise ValueError("size is %r; it must be 1 byte or more" % (size,))
        self.size = self.max_packet = _check_max(size)

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """Always *size*."""
        return self.size

    def encode(self, packet: BytesLike) -> bytes:
        """The packet, which must have the right size, else ValueError."""
        if len(packet) != self.size:
            raise ValueError("the packet has %d bytes; all have %d here" % (len(packet), self.size))
        return bytes(packet)


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
        self.function = function
        self.max_packet = _check_max(max_packet)

    def parse(self, buffer: Any, start: int, end: int, seen: int = 0) -> int:
        """What the function says, checked."""
        view = memoryview(buffer)
        size = self.function((view if view.format == "B" else view.cast("B"))[start:end])
        if size < 0:
            raise FramingError("%s() returned the length %d" % (_name_of(self.function), size))
        if size > self.max_packet or not size and end - start >= self.max_packet:
            raise self.too_long(size or end - start)
        return size


