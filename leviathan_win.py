"""leviathan's engine for Windows: one completion port with N threads, the raw calls made by ctypes.

How a completion port behaves
-----------------------------
A port does not tell what could be done; it tells what has been done. The program hands the system a buffer and an
OVERLAPPED record (WSARecv, WSASend, AcceptEx, ConnectEx), goes on, and later any thread that waits at the port is given
the result: the record's address, the count of bytes, the status. From the call to that moment both the record and the
buffer belong to the system. The port wakes no more threads than there is work for, and picks the one that slept last.

The tempting mistakes
---------------------
* Giving a record or a buffer away because the call has failed, was cancelled or has succeeded at once: the system
  writes into it all the same until the packet is taken from the port. Here every record is in a table from the call
  until its packet is dequeued; CancelIoEx only asks, and the completion that answers it is waited for.
* Believing that an error of the call will complete too: any but ERROR_IO_PENDING (997) means that nothing will come.
* Two WSASend at once on one socket: they may interleave, and their completions come in any order.
* Holding a session's state "by its thread". There is none: two threads may have two of its completions at once.
* Taking many packets at once on several threads: what waits behind a slow handler waits though a thread is idle.

Our solution
------------
A session has an owner for as long as something of it is handled: the worker that took its completion. Who comes
meanwhile, a completion or a call from a foreign thread, puts what is to be done into the session's mail, and the owner
does that too before it lets go. So packets are handled in order and never two at once (I3), and everything but sending
needs no lock. What is queued for sending is guarded by the session's lock alone: whichever thread queues first starts
the WSASend, whichever takes its completion starts the next with all that was queued meanwhile, even while a handler of
the same session runs (I4). When the owner lets go, `_settle` looks at the state and does what it asks for: it arms the
next receive, goes on with closing, or nothing.

The engine knows nothing of leviathan. It gets `core`, an object with the completions (on_accepted, on_connected,
on_eof, on_sent, on_resumed, on_closed, on_failed) and some questions (reserve, release, lease, give_back), and it works
on the attributes of a session that leviathan.Channel lists. leviathan_linux.py is this module's twin.
"""
from __future__ import annotations

import ctypes
import errno
import heapq
import select
import socket
import struct
import sys
import threading
from collections import deque
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, Optional, Set, Tuple

# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

NAME = "iocp"
VERSION = "0.1.0"       # of leviathan.py, which looks: half of an update is none

MAX_EVENTS = 512        # packets taken from the port at once by the only thread; several threads take them one by one
TIMER_BUDGET = 64       # timers per turn: thousands may be due at once, and the sockets would wait for all of them
ACCEPTS = 8             # accepts armed for each listener (RULES: IOCP 5)
INBOX_MAX = 1 << 14     # a session whose receives fill its RecvBuf gets one twice as large, up to this ...
INBOX_CALM = 32         # ... until so many in a row would have fitted a quarter of it
JOIN_MAX = 1 << 17      # what is queued is joined into one send up to this size; a larger chunk goes alone, uncopied
SEND_MAX = 1 << 20      # bytes of one WSASend: who takes that much in idle_timeout is not idle, and its length has 32 bits
FAULT_PAUSE = 0.05      # seconds behind a turn that failed, so that one that fails again and again fills no log
DRAIN = 60.0            # seconds that a closing session may take to send what is queued
LINGER = 2.0            # seconds a closed session waits for its peer to take the last bytes and close too
ACCEPT_PAUSE = 0.1      # seconds without accepting after WSAEMFILE, doubled each time ...
ACCEPT_PAUSE_MAX = 1.0  # ... up to this (libuv and asyncio wait 1 s at once)

# The process or the machine is short of something: WSAEMFILE, WSAENOBUFS, ERROR_NOT_ENOUGH_MEMORY,
# ERROR_NO_SYSTEM_RESOURCES; or who had come was gone before AcceptEx was called. Go on serving, accept later.
ACCEPT_LATER = frozenset((errno.EMFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNRESET, errno.ECONNABORTED,
                          errno.ETIMEDOUT))

FOREVER = float("inf")

INFINITE = 0xFFFFFFFF
PENDING = 0x103                         # STATUS_PENDING (ntstatus.h): an operation has not ended
IO_PENDING = 997                        # ERROR_IO_PENDING: the only error that means "it will complete"
OPERATION_ABORTED = 995                 # ERROR_OPERATION_ABORTED: cancelled
CTRL_CLOSE_EVENT = 2                    # wincon.h; 6: shutdown
CTRL_LOGOFF_EVENT = 5
CONSOLE_PATIENCE = 30.0                 # seconds; longer than Windows waits
SO_UPDATE_ACCEPT_CONTEXT = 0x700B       # mswsock.h
SO_UPDATE_CONNECT_CONTEXT = 0x7010
SIO_GET_EXTENSION_FUNCTION_POINTER = 0xC8000006
SIO_TCP_INFO = 0xD8000027
ADDRESS_SIZE = 128 + 16                 # sockaddr_storage, and the 16 bytes more that AcceptEx asks for

# What Windows says, as errno: OSError makes the subclass from that (ConnectionResetError, ...). What is not here keeps its
# number, which is an errno of Windows' Python for most of winsock's codes (10035 and up). Source: "System Error Codes" and
# "Windows Sockets Error Codes" of Microsoft's documentation.
_ERRNO = {
    5: errno.EACCES,                    # ERROR_ACCESS_DENIED
    6: errno.EBADF,                     # ERROR_INVALID_HANDLE
    8: errno.ENOMEM,                    # ERROR_NOT_ENOUGH_MEMORY
    32: errno.EACCES,                   # ERROR_SHARING_VIOLATION
    52: errno.EADDRINUSE,               # ERROR_DUP_NAME
    64: errno.ECONNRESET,               # ERROR_NETNAME_DELETED
    87: errno.EINVAL,                   # ERROR_INVALID_PARAMETER
    121: errno.ETIMEDOUT,               # ERROR_SEM_TIMEOUT
    995: errno.ECONNABORTED,            # ERROR_OPERATION_ABORTED
    1214: errno.EADDRNOTAVAIL,          # ERROR_INVALID_NETNAME
    1225: errno.ECONNREFUSED,           # ERROR_CONNECTION_REFUSED
    1229: errno.ENOTCONN,               # ERROR_CONNECTION_INVALID
    1231: errno.ENETUNREACH,            # ERROR_NETWORK_UNREACHABLE
    1232: errno.EHOSTUNREACH,           # ERROR_HOST_UNREACHABLE
    1234: errno.ECONNREFUSED,           # ERROR_PORT_UNREACHABLE
    1235: errno.ECONNABORTED,           # ERROR_REQUEST_ABORTED
    1236: errno.ECONNABORTED,           # ERROR_CONNECTION_ABORTED
    1450: errno.ENOBUFS,                # ERROR_NO_SYSTEM_RESOURCES
    10004: errno.EINTR,                 # WSAEINTR
    10009: errno.EBADF,                 # WSAEBADF
    10013: errno.EACCES,                # WSAEACCES
    10014: errno.EFAULT,                # WSAEFAULT
    10022: errno.EINVAL,                # WSAEINVAL
    10024: errno.EMFILE,                # WSAEMFILE
    10048: errno.EADDRINUSE,            # WSAEADDRINUSE
    10049: errno.EADDRNOTAVAIL,         # WSAEADDRNOTAVAIL
    10051: errno.ENETUNREACH,           # WSAENETUNREACH
    10053: errno.ECONNABORTED,          # WSAECONNABORTED
    10054: errno.ECONNRESET,            # WSAECONNRESET
    10055: errno.ENOBUFS,               # WSAENOBUFS
    10057: errno.ENOTCONN,              # WSAENOTCONN
    10058: errno.EPIPE,                 # WSAESHUTDOWN
    10060: errno.ETIMEDOUT,             # WSAETIMEDOUT
    10061: errno.ECONNREFUSED,          # WSAECONNREFUSED
    10065: errno.EHOSTUNREACH,          # WSAEHOSTUNREACH
}


# ---------------------------------------------------------------------------------------------------------------------
# System calls: what waits, and what wakes
# ---------------------------------------------------------------------------------------------------------------------

# Types of a fixed width instead of wintypes': those are as wide as C's on the system that runs the tests, and layouts
# are to be tested anywhere. HANDLE, SOCKET and ULONG_PTR are as wide as a pointer.
BOOL = ctypes.c_int32
DWORD = ctypes.c_uint32
POINTER = ctypes.c_void_p
HANDLE = ctypes.c_void_p
SOCKET = ctypes.c_size_t
ULONG_PTR = ctypes.c_size_t


class OVERLAPPED(ctypes.Structure):
    """minwinbase.h: 32 bytes on 64-bit Windows, 20 on 32-bit. `Internal` is the NTSTATUS of the operation."""

    _fields_ = [("Internal", ULONG_PTR), ("InternalHigh", ULONG_PTR), ("Offset", DWORD), ("OffsetHigh", DWORD),
                ("hEvent", HANDLE)]


class OVERLAPPED_ENTRY(ctypes.Structure):
    """minwinbase.h: what GetQueuedCompletionStatusEx gives for each packet; 32 bytes (16 on 32-bit)."""

    _fields_ = [("lpCompletionKey", ULONG_PTR), ("lpOverlapped", POINTER), ("Internal", ULONG_PTR),
                ("dwNumberOfBytesTransferred", DWORD)]


class WSABUF(ctypes.Structure):
    """ws2def.h: a length and an address; 16 bytes (8 on 32-bit)."""

    _fields_ = [("len", DWORD), ("buf", POINTER)]


class GUID(ctypes.Structure):
    """guiddef.h."""

    _fields_ = [("Data1", ctypes.c_uint32), ("Data2", ctypes.c_uint16), ("Data3", ctypes.c_uint16),
                ("Data4", ctypes.c_uint8 * 8)]


# One record of a call that is outstanding: what the system writes into, in one piece of memory.
class RECORD(ctypes.Structure):
    """An OVERLAPPED, and the WSABUF, flags and byte count that must live as long as it does."""

    _fields_ = [("overlapped", OVERLAPPED), ("buffer", WSABUF), ("flags", DWORD), ("count", DWORD)]


_ENTRY = struct.Struct("@PPPI0P")               # an OVERLAPPED_ENTRY: unpacked at once, 10 times faster than by its fields
_ENTRIES = {count: ctypes.c_char * (count * ctypes.sizeof(OVERLAPPED_ENTRY)) for count in (1, MAX_EVENTS)}
_ADDRESSES = ctypes.c_char * (2 * ADDRESS_SIZE)
_NAMES = {size: ctypes.c_char * size for size in (16, 28)}      # sockaddr_in, sockaddr_in6
_TCP_INFO = ctypes.c_uint32 * 64                # room for any version of TCP_INFO

WSAID_ACCEPTEX = GUID(0xB5367DF1, 0xCBAC, 0x11CF, (0x95, 0xCA, 0x00, 0x80, 0x5F, 0x48, 0xA1, 0x92))
WSAID_CONNECTEX = GUID(0x25A207B9, 0xDDF3, 0x4660, (0x8E, 0xE9, 0x76, 0xE5, 0x8C, 0x74, 0x06, 0x3E))

# {name: (library, result, arguments)}; the byte count of WSARecv and WSASend is NULL, as it must be for overlapped calls.
PROTOTYPES: Dict[str, Tuple[Any, ...]] = {
    "CreateIoCompletionPort": ("kernel32", HANDLE, HANDLE, HANDLE, ULONG_PTR, DWORD),
    "GetQueuedCompletionStatusEx": ("kernel32", BOOL, HANDLE, POINTER, DWORD, POINTER, DWORD, BOOL),
    "PostQueuedCompletionStatus": ("kernel32", BOOL, HANDLE, DWORD, ULONG_PTR, POINTER),
    "CancelIoEx": ("kernel32", BOOL, HANDLE, POINTER),
    "CloseHandle": ("kernel32", BOOL, HANDLE),
    "SetConsoleCtrlHandler": ("kernel32", BOOL, POINTER, BOOL),
    "RtlNtStatusToDosError": ("ntdll", DWORD, DWORD),
    "WSARecv": ("ws2_32", BOOL, SOCKET, POINTER, DWORD, POINTER, POINTER, POINTER, POINTER),
    "WSASend": ("ws2_32", BOOL, SOCKET, POINTER, DWORD, POINTER, DWORD, POINTER, POINTER),
    "WSAIoctl": ("ws2_32", BOOL, SOCKET, DWORD, POINTER, DWORD, POINTER, DWORD, POINTER, POINTER, POINTER),
}

_FUNCTION = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)            # CFUNCTYPE where the layouts are only tested
ACCEPTEX = _FUNCTION(BOOL, SOCKET, SOCKET, POINTER, DWORD, DWORD, DWORD, POINTER, POINTER, use_last_error=True)
CONNECTEX = _FUNCTION(BOOL, SOCKET, POINTER, DWORD, POINTER, DWORD, POINTER, POINTER, use_last_error=True)
CONSOLE_HANDLER = _FUNCTION(BOOL, DWORD)


class Api:
    """The system's calls, by their names; `last_error()` is the code of the one that failed last on this thread."""

    def __init__(self) -> None:
        libraries = {name: getattr(ctypes, "WinDLL")(name, use_last_error=True) for name in ("kernel32", "ntdll", "ws2_32")}
        for name, (library, result, *arguments) in PROTOTYPES.items():
            function = libraries[library][name]
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.last_error: Callable[[], int] = getattr(ctypes, "get_last_error")
        self.text: Callable[[int], str] = getattr(ctypes, "FormatError")
        self.AcceptEx: Any = None
        self.ConnectEx: Any = None

    def load_extensions(self) -> None:
        """AcceptEx and ConnectEx have no export to rely on: WSAIoctl tells where they are. Done once; needs a socket."""
        if self.ConnectEx is not None:
            return
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            self.AcceptEx = ACCEPTEX(self._extension(probe.fileno(), WSAID_ACCEPTEX))
            self.ConnectEx = CONNECTEX(self._extension(probe.fileno(), WSAID_CONNECTEX))

    def _extension(self, handle: int, identifier: GUID) -> int:
        found, size = POINTER(), DWORD()
        wsa_ioctl: Any = getattr(self, "WSAIoctl")
        if wsa_ioctl(handle, SIO_GET_EXTENSION_FUNCTION_POINTER, ctypes.addressof(identifier), ctypes.sizeof(identifier),
                     ctypes.addressof(found), ctypes.sizeof(found), ctypes.addressof(size), None, None):
            raise failure("WSAIoctl", self.last_error())
        return found.value or 0


api: Any = Api() if sys.platform == "win32" else None           # the tests put another one here, on any system


def failure(call: str, code: int) -> OSError:
    """What the system says about a call that failed: the call, the code, and Windows' text."""
    return OSError(_ERRNO.get(code, code), "%s failed: %s (Windows error %d)" % (call, api.text(code).strip(), code))


class Console:
    """Tells when the program is to end because its console is closed or the system shuts down.

    Ctrl-C and Ctrl-Break are signals, SIGINT and SIGBREAK. For these here Windows calls a handler, on a thread of its own,
    and ends the process when that returns, or after 5 seconds ("HandlerRoutine callback function").
    """

    def __init__(self, closing: Callable[[], None]) -> None:
        self._closing = closing
        self._called = False
        self._handler = CONSOLE_HANDLER(self._handle)
        api.SetConsoleCtrlHandler(self._handler, True)      # without a console, in a service, it is never called

    def _handle(self, event: int) -> int:
        if event < CTRL_CLOSE_EVENT:
            return 0
        if event == CTRL_LOGOFF_EVENT:
            # Only services get it, whoever logs off. True: else the C runtime's handler, which is asked next, makes SIGBREAK
            # of it (KB Q149901).
            return 1
        self._called = True
        _HANDLERS.append(self._handler)
        self._closing()
        threading.Event().wait(CONSOLE_PATIENCE)            # the program ends by itself meanwhile
        return 1

    def close(self) -> None:
        """Tell no more."""
        if not self._called:
            api.SetConsoleCtrlHandler(self._handler, False)


_HANDLERS: List[Any] = []               # those that Windows is calling: they must live as long as the process


def _tune(sock: socket.socket, family: int) -> None:
    """Set what every stream has: no Nagle delay, and keepalive, so that a dead peer is noticed after two minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(sock, "ioctl"):          # milliseconds until the first probe and between two; Windows sends ten
        getattr(sock, "ioctl")(getattr(socket, "SIO_KEEPALIVE_VALS"), (1, 60000, 6000))


def _acknowledged(sock: socket.socket) -> bool:
    """True if the peer's system has confirmed all bytes and our FIN; False also where the system cannot tell.

    SIO_TCP_INFO is there from Windows 10 version 1703 on. The state, the first field of TCP_INFO_v0 (mstcpip.h), is
    FIN_WAIT_2 (6) or TIME_WAIT (10) when the FIN is acknowledged, and what went before it with it.
    """
    version, size, answer = DWORD(0), DWORD(), _TCP_INFO()
    if api.WSAIoctl(sock.fileno(), SIO_TCP_INFO, ctypes.addressof(version), ctypes.sizeof(version),
                    ctypes.addressof(answer), ctypes.sizeof(answer), ctypes.addressof(size), None, None):
        return False
    return answer[0] in (6, 10)


def _sockaddr(family: int, address: Any) -> bytes:
    """*address*, as getaddrinfo gives it, as a sockaddr_in or sockaddr_in6 (ws2def.h, ws2ipdef.h)."""
    host, port = address[:2]
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_pton(family, host) + bytes(8)
    flow, scope = (tuple(address[2:4]) + (0, 0))[:2]
    return struct.pack("=H", family) + struct.pack("!HI", port, flow) + \
        socket.inet_pton(family, host.partition("%")[0]) + struct.pack("=I", scope)


class Overlapped:
    """A call that may be outstanding: its RECORD, whose it is, and what its completion is handed to.

    `keep` is what must live as long: the buffer, or the socket of an accept.
    """

    __slots__ = ("record", "address", "buffer", "flags", "count", "target", "complete", "keep")

    def __init__(self) -> None:
        self.record = RECORD()
        self.address = ctypes.addressof(self.record)                    # of its first field, the OVERLAPPED
        self.buffer = self.address + RECORD.buffer.offset
        self.flags = self.address + RECORD.flags.offset
        self.count = self.address + RECORD.count.offset
        self.target: Any = None
        self.complete: Any = None
        self.keep: Any = None

    def code(self) -> int:
        """How it ended: 0, or Windows' error code (RULES: IOCP 6: each entry has a status of its own)."""
        status = self.record.overlapped.Internal & 0xFFFFFFFF
        return int(api.RtlNtStatusToDosError(status)) if status & 0x80000000 else 0     # NT_SUCCESS, ntdef.h


class Port:
    """A completion port."""

    def __init__(self) -> None:
        self.handle = api.CreateIoCompletionPort(-1 & ctypes.c_size_t(-1).value, None, 0, 0)
        if not self.handle:
            raise failure("CreateIoCompletionPort", api.last_error())

    def join(self, sock: socket.socket) -> None:
        """Have the completions of *sock* delivered here. Raises OSError."""
        if not api.CreateIoCompletionPort(sock.fileno(), self.handle, 0, 0):
            raise failure("CreateIoCompletionPort", api.last_error())

    def wake(self) -> None:
        """One packet that means nothing, for one thread. It is tried for a second: without it a session may stand still."""
        for pause in (0.001, 0.01, 0.1, 0.9, 0.0):
            if api.PostQueuedCompletionStatus(self.handle, 0, 0, None):
                return
            error = failure("PostQueuedCompletionStatus", api.last_error())         # the system is short of memory
            threading.Event().wait(pause)
        raise error

    def close(self) -> None:
        """Give the handle back."""
        api.CloseHandle(self.handle)


class Link:
    """What the engine keeps for a session or a listener: who owns it now, what waits for it, what is outstanding."""

    __slots__ = ("lock", "owner", "mail", "called", "receiving", "inbox", "size", "calm", "receive", "send", "pressed",
                 "sent_at", "live", "ended", "fin", "late", "cancelled", "armed", "parked")

    def __init__(self) -> None:
        # Guards owner, mail and called, and of a session: state, fin, out, unsent, sending, marks, pressed, sent_at.
        self.lock = threading.RLock()
        self.owner = 0                              # ident of the worker's thread that handles it now, or 0
        self.mail: List[Tuple[Callable[..., Any], Tuple[Any, ...]]] = []        # (function, args) for its owner
        self.called = False                         # a packet is at the port that makes a worker read the mail
        self.receive: Optional[Overlapped] = None   # of the receive, or the connect, whether outstanding or not
        self.receiving = False                      # it is outstanding
        self.inbox: Any = None                      # the RecvBuf of receives that no incomplete packet waits for
        self.size = 0                               # of the inbox that is wanted; 0: as large as the core gives
        self.calm = 0                               # how many receives in a row a smaller one would have held
        self.send: Optional[Overlapped] = None      # of the send; outstanding while session.sending is not None
        self.pressed = False                        # more than the high-water mark was unsent
        self.sent_at = 0.0                          # when the last send was completed
        self.live = False                           # connected
        self.ended = False                          # the peer's end came during a pause, and is to be told after it
        self.fin = False                            # our end was sent
        self.late = False                           # waited long enough for the peer's end
        self.cancelled = False                      # what is outstanding was told to end
        self.armed: Optional[Set[Overlapped]] = None        # a listener's accepts that are outstanding; None: a session
        self.parked: List[Tuple[socket.socket, Any]] = []   # accepted, but there was no room


# ---------------------------------------------------------------------------------------------------------------------
# Timers
# ---------------------------------------------------------------------------------------------------------------------

class Timer:
    """A call to be made later, once or again and again. `cancel()` may be called from any thread, any number of times."""

    __slots__ = ("when", "interval", "function", "args", "engine", "queued", "number")

    def __init__(self, engine: Engine, when: float, interval: float, function: Callable[..., Any],
                 args: Tuple[Any, ...]) -> None:
        self.engine = engine
        self.when = when
        self.interval = interval            # 0: once
        self.function: Optional[Callable[..., Any]] = function      # None: cancelled, or done
        self.args = args
        self.queued = False                 # on the heap (the engine's lock guards it, as it does `function`)
        self.number = 0                     # those that are due at the same time come in the order they were made

    def __lt__(self, other: Timer) -> bool:
        return (self.when, self.number) < (other.when, other.number)

    def cancel(self) -> None:
        """Do not call any more. A call that is running now is not interrupted."""
        self.engine.cancel(self)


# ---------------------------------------------------------------------------------------------------------------------
# Engine
# ---------------------------------------------------------------------------------------------------------------------

class Engine:
    """N workers behind one set of verbs. Every verb may be called from any thread; none calls a completion itself.

    *core* has the completions, *name* begins the threads' names, *threads* is how many workers there are.
    """

    def __init__(self, core: Any, name: str, threads: int) -> None:
        self.core = core
        self.name = name
        # Guards events, timers, cancelled, turn, due, owned, leaving, listeners, accepted, connected, closed, started,
        # stopped, stopping, ended and port_closed.
        self.lock = threading.Lock()
        self.events: Deque[Tuple[Any, Any]] = deque()       # (function, args), or (None, target): read its mail
        self.timers: List[Timer] = []       # a heap by time
        self.cancelled = 0                  # how many of the timers are cancelled
        self.turn = 0                       # numbers the timers
        self.due = FOREVER                  # when the first timer is due
        self.owned: Set[Any] = set()        # sessions, in whatever state
        self.leaving = 0                    # how many of them are in their on_closed, and counted as closed
        self.listeners: Set[Any] = set()
        self.late: List[threading.Thread] = []      # they run on_closed for sessions that came too late for a worker
        self.accepted = self.connected = self.closed = 0
        self.started = False
        self.stopped = False                # no more events are taken from outside
        self.stopping = False               # everything is being closed
        self.ended = False                  # nothing is left: the threads end
        self.port_closed = False            # they have
        api.load_extensions()
        self.port = Port()
        self.pending: Dict[int, Overlapped] = {}            # {address: every record that the system may write into}
        self.spare: Deque[Overlapped] = deque(maxlen=256)   # free ones
        self.workers = [Worker(self, index) for index in range(threads)]

    # -- any thread: life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads. What was asked for before is done now.

        Raises RuntimeError when the system has no thread left; then `stop` ends those that were started.
        """
        with self.lock:
            if self.started or self.stopped:
                return
            self.started = True
            for worker in self.workers:     # with the lock held: a `stop` must not join what is not started
                worker.thread.start()

    def stop(self, timeout: Optional[float] = None) -> List[threading.Thread]:
        """Abort every session, close every listener, run the events that are queued, end the threads and join them.

        Returns the threads that have not ended after *timeout* seconds (None: no limit), because what they call does not
        return; they end when it does. Raises RuntimeError when called from a worker, which cannot wait for itself.
        """
        if self.on_worker():
            raise RuntimeError("a queue cannot be stopped from one of its own threads")
        end = FOREVER if timeout is None else monotonic() + timeout
        with self.lock:
            first, self.stopped = not self.stopped, True        # from here on `post` answers False
        if first:
            self.submit(self.workers[0].shut, ())
            if self.workers[0].thread.ident is None:
                self.workers[0].run()       # never had a thread: this one does what was queued, and closes
        left = self._join([worker.thread for worker in self.workers if worker.thread.ident is not None], end)
        with self.lock:
            late = [thread for thread in self.late if thread.ident != threading.get_ident()]
        left += self._join(late, end)       # what the workers have refused while they ended
        with self.lock:
            last, self.port_closed = not (left or self.port_closed), self.port_closed or not left
        if last:
            self.port.close()
        return left

    @staticmethod
    def _join(threads: List[threading.Thread], end: float) -> List[threading.Thread]:
        """Wait for threads until *end*; those that are still there."""
        for thread in threads:
            thread.join(None if end == FOREVER else max(0.0, end - monotonic()))
        return [thread for thread in threads if thread.is_alive()]

    def statistics(self) -> Dict[str, int]:
        """Sums over the workers since the start; `threads`, `sessions` and `timers` are as of now."""
        with self.lock:
            total = {"threads": len(self.workers), "sessions": len(self.owned) - self.leaving,
                     "timers": len(self.timers) - self.cancelled,
                     "accepted": self.accepted, "connected": self.connected, "closed": self.closed}
        for worker in self.workers:
            for key, value in worker.counters().items():
                total[key] = total.get(key, 0) + value
        return total

    # -- any thread: sockets ------------------------------------------------------------------------------------------

    def listen(self, listener: Any, family: int, address: Any, backlog: int, thread: Optional[int]) -> None:
        """Bind and listen at once, so that the caller gets the OSError; `accept` then lets connections in.

        Sets listener.socket and listener.worker. *thread* pins the listener to one worker (E2).
        """
        if self.stopped:                    # looked at again below, with the lock; the port may be closed already
            raise OSError(errno.ESHUTDOWN, "the queue has stopped")
        sock = socket.socket(family, socket.SOCK_STREAM)
        call = "setsockopt"
        try:
            # SO_REUSEADDR would let another process take the port over (RULES: IOCP 11).
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE"), 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            call = "bind"
            sock.bind(address)
            call = "listen"
            # Above 200 Windows takes the word SOMAXCONN only, for "as many as is reasonable" (listen, winsock2.h).
            sock.listen(backlog if backlog <= 200 else socket.SOMAXCONN)
        except OSError as error:
            sock.close()
            raise failure(call, getattr(error, "winerror", None) or error.errno or 0) from None
        try:
            self.port.join(sock)
        except OSError:
            sock.close()
            raise
        listener.socket = sock
        listener.link = Link()
        listener.link.armed = set()
        listener.worker = self.choose(thread)
        with self.lock:
            stopped = self.stopped
            if not stopped:
                self.listeners.add(listener)
        if stopped:
            sock.close()
            raise OSError(errno.ESHUTDOWN, "the queue has stopped")

    def accept(self, listener: Any) -> None:
        """Let connections in, until core.reserve(listener) says that there is no room. Each is given to on_accepted."""
        self.run_on_owner(listener, listener.worker.arm_listener, listener)

    def connect(self, session: Any, family: int, address: Any, thread: Optional[int]) -> None:
        """Connect out. Ends in on_connected(session), or in on_closed(session, error)."""
        if self._own(session, thread):
            self.run_on_owner(session, session.worker.dial, session, family, address)
        else:
            self._refuse(session)

    def attach(self, session: Any, sock: socket.socket, thread: Optional[int]) -> None:
        """Take an accepted socket: on_connected(session) on the worker that now owns it, then its first receive."""
        session.socket = sock
        if self._own(session, thread):
            self.run_on_owner(session, session.worker.adopt, session)
        else:
            sock.close()
            self._refuse(session)

    def _own(self, session: Any, thread: Optional[int]) -> bool:
        with self.lock:
            if self.stopped:
                return False
            self.owned.add(session)
            session.link = Link()
            session.worker = self.choose(thread)            # last: from here on other threads may close it
            return True

    def _refuse(self, session: Any) -> None:
        # The threads have ended, and a completion must not run inside of a verb: it gets a thread for itself.
        session.move("closed")
        late = threading.Thread(target=self.core.on_closed, args=(session, None), name=self.name + "-late")
        with self.lock:
            self.late = [thread for thread in self.late if thread.is_alive()]
            self.late.append(late)
            late.start()

    def receive(self, session: Any) -> None:
        """Arm receiving again after a pause: core.on_resumed(session) on the owner thread, then what arrives."""
        self.run_on_owner(session, session.worker.resume, session)

    def pause(self, session: Any) -> None:
        """Arm no receive until `receive` is called. On the owner thread, session.paused has been set."""
        session.worker.pause(session)

    def send(self, session: Any, chunks: Tuple[bytes, ...], on_sent: Optional[Callable[..., Any]] = None) -> bool:
        """Queue *chunks*, in order with all else that was queued. False, and nothing done, if the session is closed.

        *on_sent* ends in core.on_sent(session, on_sent, ok), once.
        """
        return bool(session.worker.enqueue(session, chunks, on_sent))

    def close(self, target: Any, drain: bool, reason: Any = None, error: Optional[BaseException] = None) -> None:
        """Close a session: after what is queued was sent (*drain*), or at once. Ends in on_closed, exactly once."""
        worker = target.worker
        if self.owns(target):
            worker.close_session(target, drain, reason, error)
        else:
            self.run_on_owner(target, worker.close_session, target, drain, reason, error)

    def shutdown(self, session: Any) -> None:
        """Half-close: after what is queued was sent, tell the peer that no more will come; receiving goes on."""
        session.worker.half_close(session)

    def unlisten(self, listener: Any) -> None:
        """Close a listener. Connections it let in go on."""
        worker = listener.worker
        if not self.run_on_owner(listener, worker.close_listener, listener):
            worker.close_listener(listener)

    def on_worker(self) -> bool:
        """True on one of its threads, which cannot wait for themselves."""
        return any(worker.ident == threading.get_ident() for worker in self.workers)

    def heard(self, session: Any) -> bool:
        """True when something has come for *session* that was not received yet. On its own thread."""
        link = session.link
        if link.receiving:                  # it has ended, and its packet is on the way
            return bool(link.receive.record.overlapped.Internal != PENDING)
        return bool(select.select([session.socket], [], [], 0)[0])

    def owns(self, session: Any) -> bool:
        """True on the thread that owns *session*."""
        return bool(threading.get_ident() == session.link.owner)

    def run_on_owner(self, session: Any, function: Callable[..., Any], *args: Any) -> bool:
        """Call function(*args) on the thread that owns *session*. False when that thread has ended."""
        link = session.link
        with link.lock:
            if not (link.owner or link.called):
                if not self.submit(None, session):
                    return False
                link.called = True
            link.mail.append((function, args))
        return True

    # -- any thread: events and timers --------------------------------------------------------------------------------

    def post(self, function: Callable[..., Any], *args: Any) -> bool:
        """Call function(*args) on whichever worker is idle. False when the engine has stopped."""
        with self.lock:
            if self.stopped:
                return False
            self.port.wake()                # a packet for each event: the system picks an idle thread
            self.events.append((function, args))
        return True

    def submit(self, function: Any, args: Any) -> bool:
        """The same until the very end, for the engine itself; (None, target): read the target's mail."""
        with self.lock:
            if self.ended:
                return False
            self.port.wake()
            self.events.append((function, args))
        return True

    def call_later(self, delay: float, interval: float, function: Callable[..., Any], *args: Any) -> Timer:
        """Call function(*args) in *delay* seconds, and every *interval* seconds after that unless it is 0."""
        timer = Timer(self, monotonic() + delay, interval, function, args)
        self.schedule(timer)
        return timer

    def schedule(self, timer: Timer) -> None:
        """Put a timer on the heap. A new first one wakes a worker (see Worker._patience)."""
        with self.lock:
            if timer.function is None:
                return                      # cancelled by its own call
            timer.queued = True
            self.turn += 1
            timer.number = self.turn
            heapq.heappush(self.timers, timer)
            if timer.when < self.due:
                self.due = timer.when
                if not self.ended:
                    self.port.wake()

    def cancel(self, timer: Timer) -> None:
        """Forget a timer. Its place on the heap goes when it is due, or when half of the heap is such places."""
        with self.lock:
            if timer.function is None:
                return
            timer.function = None
            timer.args = ()
            self.cancelled += timer.queued
            if self.cancelled > 64 and self.cancelled * 2 > len(self.timers):
                self.timers = [timer for timer in self.timers if timer.function is not None]
                heapq.heapify(self.timers)
                self.cancelled = 0

    def take_due(self, now: float) -> Optional[Tuple[Timer, Callable[..., Any], Tuple[Any, ...]]]:
        """The first timer that is due, for one worker only, its function and arguments. None: there is none.

        One at a time: if this one's function waits, the next is taken by another worker.
        """
        found = None
        with self.lock:
            while not found and self.timers and self.timers[0].when <= now:
                timer = heapq.heappop(self.timers)
                timer.queued = False
                if timer.function is None:
                    self.cancelled -= 1
                    continue
                found = timer, timer.function, timer.args
                if not timer.interval:
                    timer.function = None
            self.due = self.timers[0].when if self.timers else FOREVER
        return found

    def choose(self, thread: Optional[int]) -> Worker:
        """A worker to begin with; on a completion port any of them serves any socket, so *thread* pins nothing."""
        return self.workers[(thread or 0) % len(self.workers)]


# ---------------------------------------------------------------------------------------------------------------------
# Worker
# ---------------------------------------------------------------------------------------------------------------------

class Worker:
    """One thread that takes packets from the port. What it handles, it owns until that is done."""

    def __init__(self, engine: Engine, index: int) -> None:
        self.engine = engine
        self.core = engine.core
        self.now = monotonic()              # one clock read per batch
        self.ident = 0
        self.until = 0.0                    # when it will wake by itself; 0: it is awake (the engine's lock guards it)
        self.thread = threading.Thread(target=self.run, name="%s-%d" % (engine.name, index), daemon=True)
        self.receives = self.received = self.sends = self.sent = self.events = self.turns = 0

    # -- any thread ---------------------------------------------------------------------------------------------------

    def counters(self) -> Dict[str, int]:
        """What was counted since the start."""
        return {"receives": self.receives, "bytes_received": self.received, "sends": self.sends, "bytes_sent": self.sent,
                "events": self.events, "turns": self.turns}

    # -- owner thread: the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread: until `shut` was posted and the last session is closed."""
        self.ident = threading.get_ident()
        try:
            while not self._finished():
                try:
                    self._turn()
                except BaseException as error:
                    self.core.on_failed(self._turn, error)      # it must not end the thread and with it all sessions
                    threading.Event().wait(FAULT_PAUSE)
        finally:
            self.ident = 0

    def _turn(self) -> None:
        """Take packets and hand them to what they complete; the loop is left only when everything is to end."""
        engine = self.engine
        pending = engine.pending
        # Several threads take one packet each, or what waits behind a slow handler would wait though a thread is idle.
        count = MAX_EVENTS if len(engine.workers) == 1 else 1
        entries = _ENTRIES[count]()
        packets = memoryview(entries).cast("B")
        size = _ENTRY.size
        where, removed = ctypes.addressof(entries), DWORD()
        take, handle, found = api.GetQueuedCompletionStatusEx, engine.port.handle, ctypes.addressof(removed)
        while not engine.stopping:
            done = take(handle, where, count, found, self._patience(), False)
            if not done:
                self._timed_out(api.last_error())
            # Without the lock: who reads it too late sleeps, and is woken by `_keep_time`.
            keeper, self.until = 0.0 < self.until < FOREVER, 0.0
            self.now = monotonic()
            for _, address, _, transferred in _ENTRY.iter_unpack(packets[:removed.value * size if done else 0]):
                try:
                    if keeper and (address or engine.events):
                        self._call(self._keep_time, ())
                    if address:
                        operation = pending.pop(address)
                        operation.complete(self, operation, transferred)
                    else:
                        self._event()
                except BaseException as error:
                    self.core.on_failed(self._turn, error)      # it must not cost the packets behind it
            self.turns += 1
            if self.now >= engine.due:
                self._run_timers(self.now)

    def _patience(self) -> int:
        """Milliseconds until the first timer is due; for ever if another worker sleeps that long already."""
        engine = self.engine
        if len(engine.workers) == 1:
            due = engine.due                # who sets an earlier one wakes this worker afterwards
        else:
            with engine.lock:
                due = self.until = FOREVER if self._is_kept() else engine.due
        if due == FOREVER:                  # not `is`: a timer's own "never" is another object
            return INFINITE
        return max(0, min(int((due - monotonic()) * 1000) + 1, 1 << 30))

    def _is_kept(self) -> bool:
        """A worker sleeps that will wake when the first timer is due. The engine's lock is held."""
        return any(0.0 < worker.until <= self.engine.due for worker in self.engine.workers)

    def _keep_time(self) -> None:
        """This worker has something to do: if it was the one that sleeps until the first timer is due, another one is to.

        One packet, and not one for each that sleeps: the port gives it to who slept last, so the others would never see it.
        """
        engine = self.engine
        with engine.lock:
            if engine.due < FOREVER and not self._is_kept() and any(worker.until for worker in engine.workers):
                engine.port.wake()

    def _event(self) -> None:
        """A packet that was posted: an event, a target's mail, or, if there is neither, a new first timer to look at."""
        engine = self.engine
        with engine.lock:
            if not engine.events:
                return                      # a new first timer: `_patience` looks at it
            function, args = engine.events.popleft()
        if function is None:
            self._attend(args)
        else:
            self.events += 1
            self._call(function, args)

    def _timed_out(self, code: int) -> None:
        """No packet: it is time for a timer, or the wait ended early, as it may (RULES: IOCP 6)."""
        if code != 258:                     # WAIT_TIMEOUT
            raise failure("GetQueuedCompletionStatusEx", code)

    def _turn_stopping(self) -> None:
        """While everything is ending: one packet at a time."""
        engine = self.engine
        entry, removed = _ENTRIES[1](), DWORD()
        if api.GetQueuedCompletionStatusEx(engine.port.handle, ctypes.addressof(entry), 1, ctypes.addressof(removed),
                                           10, False):
            self.now = monotonic()
            _, address, _, transferred = _ENTRY.unpack(entry)
            if address:
                operation = engine.pending.pop(address)
                operation.complete(self, operation, transferred)
            else:
                self._event()
        if monotonic() >= engine.due:
            self._run_timers(monotonic())

    def _finished(self) -> bool:
        """True when the thread may end; from then on nothing is taken any more."""
        engine = self.engine
        if not engine.stopping:
            return False
        with engine.lock:
            if not (engine.ended or engine.owned or engine.listeners or engine.pending or engine.events):
                engine.ended = True
                for _ in engine.workers:
                    engine.port.wake()
        if not engine.ended:
            self._turn_stopping()
        return engine.ended

    def _call(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> None:
        """Call what was posted. Whatever it raises is reported and costs nothing else."""
        try:
            function(*args)
        except BaseException as error:
            self.core.on_failed(function, error)

    def _run_timers(self, now: float) -> None:
        for _ in range(TIMER_BUDGET):
            due = self.engine.take_due(now)
            if due is None:
                return
            if len(self.engine.workers) > 1:
                self._call(self._keep_time, ())         # for the next one, while this runs
            timer, function, args = due
            self.events += 1
            self._call(function, args)
            if timer.interval:
                # From when it was due, not from now, so that it does not drift; missed calls are not made up for.
                timer.when = max(timer.when + timer.interval, monotonic())
                self.engine.schedule(timer)

    # -- owner thread: owning -----------------------------------------------------------------------------------------

    def _attend(self, target: Any) -> None:
        """A packet says that *target* has mail. If another worker owns it, that one reads it before it lets go."""
        link = target.link
        with link.lock:
            link.called = False
            if link.owner:
                return
            link.owner = self.ident
        self._let_go(target)

    def _serve(self, target: Any, function: Callable[..., Any], *args: Any) -> None:
        """Call function(*args) as the owner of *target*, or leave it to the worker that owns it now."""
        link = target.link
        with link.lock:
            if link.owner:
                link.mail.append((function, args))
                return
            link.owner = self.ident
        try:
            function(*args)
        except BaseException as error:
            self.core.on_failed(function, error)
        self._let_go(target)

    def _let_go(self, target: Any) -> None:
        """Do what came meanwhile, then what the target's state asks for; nothing may be left when it has no owner."""
        link = target.link
        while True:
            while link.mail:                # without the lock: what is overlooked here is seen below
                with link.lock:
                    mail, link.mail = link.mail, []
                for function, args in mail:
                    self._call(function, args)
            self._call(self._settle, (target,))
            with link.lock:
                if not link.mail:
                    link.owner = 0
                    return

    # -- owner thread: listeners --------------------------------------------------------------------------------------

    def arm_listener(self, listener: Any) -> None:
        """Accept from now on."""
        link = listener.link
        if listener.closed or self.engine.stopping or link.ended:
            return
        while link.parked:
            if not self.core.reserve(listener):
                return                      # core calls the verb `accept` again when there is room
            self._let_in(listener, *link.parked.pop(0))
        while len(link.armed) < ACCEPTS:
            try:
                self._arm_accept(listener)
            except OSError as error:
                self._accept_failed(listener, error)
                return

    def _arm_accept(self, listener: Any) -> None:
        sock = socket.socket(listener.socket.family, socket.SOCK_STREAM)
        operation = self._operation(listener, Worker._accepted)
        addresses = _ADDRESSES()
        operation.keep = (sock, addresses)
        self.engine.pending[operation.address] = operation
        # A receive length of 0, or a silent client would hold the accept (RULES: IOCP 4).
        if not api.AcceptEx(listener.socket.fileno(), sock.fileno(), ctypes.addressof(addresses), 0, ADDRESS_SIZE,
                            ADDRESS_SIZE, operation.count, operation.address):
            code = api.last_error()
            if code != IO_PENDING:
                del self.engine.pending[operation.address]
                self._free(operation)
                sock.close()
                raise failure("AcceptEx", code)
        listener.link.armed.add(operation)

    def _accepted(self, operation: Overlapped, transferred: int) -> None:
        """A completion: somebody has come, or went before he was let in."""
        self._serve(operation.target, self._accept, operation.target, operation)

    def _accept(self, listener: Any, operation: Overlapped) -> None:
        """Let one in, if there is room; else it waits here, as it would in the backlog."""
        link = listener.link
        link.armed.discard(operation)
        sock = operation.keep[0]
        code = operation.code()
        self._free(operation)
        if link.ended or self.engine.stopping:
            sock.close()
            return
        try:
            if code:
                raise failure("AcceptEx", code)
            sock.setsockopt(socket.SOL_SOCKET, SO_UPDATE_ACCEPT_CONTEXT, struct.pack("@P", listener.socket.fileno()))
            address = sock.getpeername()
            _tune(sock, sock.family)
        except OSError:
            sock.close()                    # of this connection, not of the listener: a reset before it was let in
        else:
            listener.pause = ACCEPT_PAUSE
            if link.parked or not self.core.reserve(listener):
                link.parked.append((sock, address))
                return
            self._let_in(listener, sock, address)
        self.arm_listener(listener)

    def _let_in(self, listener: Any, sock: socket.socket, address: Any) -> None:
        with self.engine.lock:
            self.engine.accepted += 1
        self.core.on_accepted(listener, sock, address)

    def _accept_failed(self, listener: Any, error: OSError) -> None:
        """Out of descriptors or memory: pause, with the pause doubling, and go on serving those who are in."""
        if error.errno not in ACCEPT_LATER:
            self.core.on_listener_failed(listener, error, 0.0)
            self.close_listener(listener)
            return
        pause = listener.pause
        listener.pause = min(pause * 2, ACCEPT_PAUSE_MAX)
        self.core.on_listener_failed(listener, error, pause)
        self.engine.call_later(pause, 0, self.engine.accept, listener)

    def close_listener(self, listener: Any) -> None:
        """Stop listening and give the port back."""
        link = listener.link
        listener.closed = True
        if link.ended:
            return
        link.ended = True
        if link.armed:
            api.CancelIoEx(listener.socket.fileno(), None)
        listener.socket.close()
        while link.parked:
            link.parked.pop()[0].close()
        with self.engine.lock:
            self.engine.listeners.discard(listener)

    # -- owner thread: a session's beginning --------------------------------------------------------------------------

    def adopt(self, session: Any) -> None:
        """An accepted socket has come to its thread."""
        if self.engine.stopping:
            session.move("abort")
        if session.is_ended():
            return                          # `_settle` closes it
        try:
            self.engine.port.join(session.socket)
        except OSError as error:
            self._fail(session, error)
            return
        self._established(session)

    def dial(self, session: Any, family: int, address: Any) -> None:
        """Begin to connect; never waits."""
        if session.is_ended() or self.engine.stopping:
            self._fail(session, None)
            return
        link = session.link
        operation = link.receive = self._operation(session, Worker._dialled)
        try:
            session.socket = sock = socket.socket(family, socket.SOCK_STREAM)
            _tune(sock, family)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))        # ConnectEx needs it
            packed = _sockaddr(family, address)
            self.engine.port.join(sock)
            operation.keep = name = _NAMES[len(packed)].from_buffer_copy(packed)
            self.engine.pending[operation.address] = operation
            link.receiving = True
            if not api.ConnectEx(sock.fileno(), ctypes.addressof(name), len(name), None, 0, operation.count,
                                 operation.address):
                code = api.last_error()
                if code != IO_PENDING:
                    link.receiving = False
                    del self.engine.pending[operation.address]
                    raise failure("ConnectEx", code)
        except (OSError, OverflowError, ValueError, TypeError, struct.error) as error:
            self._fail(session, error)

    def _dialled(self, operation: Overlapped, transferred: int) -> None:
        """A completion: connected, or not."""
        self._serve(operation.target, self._connected, operation.target, operation)

    def _connected(self, session: Any, operation: Overlapped) -> None:
        session.link.receiving = False
        code = operation.code()
        if session.is_ended():
            return
        try:
            if code:
                raise failure("ConnectEx", code)
            session.socket.setsockopt(socket.SOL_SOCKET, SO_UPDATE_CONNECT_CONTEXT, None, 0)
        except OSError as error:
            self._fail(session, error)
            return
        self._established(session)

    def _fail(self, session: Any, error: Optional[BaseException]) -> None:
        """It never came to be; `_settle` closes it."""
        if error is not None:
            session.fail(error)
        with session.link.lock:
            session.move("abort")

    def _established(self, session: Any) -> None:
        """Connected: on_connected comes first, then `_settle` arms the first receive."""
        with session.link.lock:
            if not session.move("established"):
                return                      # it was given up meanwhile; `_settle` closes it
            session.link.live = True
        session.last = monotonic()          # what came before it in this batch may have taken long
        with self.engine.lock:
            self.engine.connected += 1
        self.core.on_connected(session)

    # -- owner thread: receiving --------------------------------------------------------------------------------------

    def _arm_unless_paused(self, session: Any) -> None:
        link = session.link
        if not (session.paused or session.eof or link.receiving or link.ended):
            self._arm(session)
        elif link.inbox is not None and not link.receiving:
            self.core.give_back(session, link.inbox)        # a pause needs none; who waits for memory may be this one
            link.inbox = None

    def _arm(self, session: Any) -> None:
        """Have the next bytes received: behind those of an incomplete packet, else into the session's inbox."""
        link = session.link
        partial = session.partial
        if partial is not None and not session.is_open():
            address, size = ctypes.addressof(partial.array), partial.size           # it is thrown away
        elif partial is not None:
            if link.inbox is not None:
                self.core.give_back(session, link.inbox)
                link.inbox = None
            address, size = ctypes.addressof(partial.array) + session.filled, len(session.room)
        else:
            if link.inbox is not None and link.inbox.size < link.size:
                self.core.give_back(session, link.inbox)
                link.inbox = None
            if link.inbox is None:
                link.inbox = self.core.lease(session, link.size)
                if link.inbox is None:
                    return                  # at the memory limit: it waits
            address, size = ctypes.addressof(link.inbox.array), link.inbox.size
        operation = link.receive
        if operation is None:
            operation = link.receive = self._operation(session, Worker._receive)
        operation.complete = Worker._receive
        buffer = operation.record.buffer
        buffer.len, buffer.buf = size, address
        operation.keep = partial or link.inbox
        self.engine.pending[operation.address] = operation
        operation.record.overlapped.Internal = PENDING          # the system writes the same; see Engine.heard
        link.receiving = True
        if api.WSARecv(session.socket.fileno(), operation.buffer, 1, None, operation.flags, operation.address, None):
            code = api.last_error()
            if code != IO_PENDING:
                link.receiving = False
                del self.engine.pending[operation.address]
                # By the mail, behind which the owner settles again: this is called by `_settle`.
                self.engine.run_on_owner(session, self._receive_failed, session, failure("WSARecv", code))

    def _receive(self, operation: Overlapped, transferred: int) -> None:
        """A completion: bytes have come, or the end, or an error."""
        self.receives += 1
        self.received += transferred
        session = operation.target
        self._serve(session, self._take_in, session, operation.code(), transferred, self.now)

    def _take_in(self, session: Any, code: int, count: int, now: float) -> None:
        """Hand on what was received."""
        link = session.link
        link.receiving = False
        if not session.is_open():
            if code and not link.cancelled:
                self._receive_failed(session, failure("WSARecv", code))     # nobody is there for what is queued
            session.eof = session.eof or bool(code) or not count        # what came is thrown away
        elif code:
            self._receive_failed(session, failure("WSARecv", code))
        elif not count:
            if session.paused:
                link.ended = True           # told when the pause is over
            else:
                self.core.on_eof(session)
        else:
            session.last = now
            try:
                partial = session.partial
                if partial is not None:
                    session.filled += count
                    if session.paused or session.filled < session.need:
                        session.room = session.room[count:]
                    else:
                        session.received(session, partial.array, session.filled)
                elif not session.paused:
                    size = link.inbox.size
                    session.received(session, link.inbox.array, count)
                    if count == size:
                        # A packet just over the inbox would cost two receives each time: 1.3 instead of 0.85 of what
                        # asyncio's proactor does with packets of 4 KiB (under Wine). What is much larger has a RecvBuf.
                        link.calm = 0
                        if size < INBOX_MAX and session.need <= INBOX_MAX:
                            link.size = 2 * size
                    elif link.size and 4 * count <= size:
                        link.calm += 1
                        if link.calm == INBOX_CALM:
                            self.core.give_back(session, link.inbox)
                            link.inbox, link.size, link.calm = None, 0, 0
                    else:
                        link.calm = 0
                else:                           # it was armed before the pause: kept as an incomplete packet
                    session.partial, link.inbox = link.inbox, None
                    session.filled, session.need, session.seen, session.since = count, 0, 0, now
                    session.room = session.partial.view[count:]
            except BaseException as error:
                self._spoiled(session, error)

    def _spoiled(self, session: Any, error: BaseException) -> None:
        """A framing's receiver has raised, which it must not: where its stream is now nobody knows."""
        self.core.on_failed(session.received, error)
        self.close_session(session, False, None, error)

    def _receive_failed(self, session: Any, error: OSError) -> None:
        self.close_session(session, False, None, error)

    def pause(self, session: Any) -> None:
        """session.paused was set: read no more."""
        # `_settle` arms no receive. One that is outstanding is not cancelled: it may carry data (RULES: IOCP 3).

    def resume(self, session: Any) -> None:
        """session.paused may be 0 again: first what has been received already, then what comes."""
        session.paused &= ~session.RESUMING
        if not session.is_open() or session.paused:
            return
        if session.link.receiving:
            # Armed before the pause: the RecvBuf is the system's until that completes, and what is in it has been looked
            # at. Whoever parsed it again might give it back (an Http that reads no more does).
            session.since = session.since and max(session.since, monotonic())
            return
        try:
            self.core.on_resumed(session)
        except BaseException as error:
            self._spoiled(session, error)
        if session.link.ended and session.is_open() and not session.paused:
            session.link.ended = False
            self.core.on_eof(session)
        if session.is_open():
            self._arm_unless_paused(session)        # not put off to `_settle`: memory may be promised to it until it returns

    # -- any thread: sending ------------------------------------------------------------------------------------------

    def enqueue(self, session: Any, chunks: Tuple[bytes, ...], on_sent: Optional[Callable[..., Any]]) -> bool:
        """Queue bytes. A handler's leave when it has returned, another thread's at once, unless a send is outstanding."""
        size = sum(map(len, chunks))
        link = session.link
        with link.lock:
            if not session.is_open() or session.fin:
                return False
            before = session.unsent
            # One packet of any size is let through, behind what a handler that was resumed may find unsent.
            if before > session.low_water and before + size > session.send_limit:
                self.engine.run_on_owner(session, self.overflow, session)
                return False
            session.out.extend(chunks)
            session.unsent = before + size
            if on_sent is not None:
                session.mark(on_sent)
            own = link.owner == threading.get_ident()
            if session.sending is None and (not own or session.unsent > session.high_water):
                self._send_now(session)
            if session.unsent > session.high_water and not link.pressed:
                link.pressed = True
                if own:                     # at once: the next packet of this receive may ask for as much
                    self._press(session)
                else:
                    self.engine.run_on_owner(session, self._press, session)
        return True

    def _press(self, session: Any) -> None:
        """More is unsent than the high-water mark, or less than the low one; as of now, not as of when it was noticed."""
        if session.is_gone():
            return                          # `_sent` noticed it, and another worker has closed it before this came here
        with session.link.lock:
            pressed = session.link.pressed
        if not pressed:
            session.relieved()
        elif session.is_open():
            session.congested()

    def overflow(self, session: Any) -> None:
        """The peer does not read and the hard limit is reached."""
        session.overflow()

    def _send_now(self, session: Any) -> None:
        """One send of what is queued. Nothing is outstanding; the session's lock is held."""
        out = session.out
        count, size = 1, len(out[0])
        while count < len(out) and size + len(out[count]) <= JOIN_MAX:
            size += len(out[count])
            count += 1
        data = out[0] if count == 1 else b"".join(out[:count])
        del out[:count]
        session.sending = self.core.begin_send(session, data, 0)
        self._transmit(session)

    def _transmit(self, session: Any, pointer: Any = None) -> None:
        """Start the outstanding send, or go on with it. The session's lock is held."""
        sending = session.sending
        operation = session.link.send
        if operation is None:
            operation = session.link.send = self._operation(session, Worker._sent)
        buffer = operation.record.buffer
        if sending.buffer is not None:
            buffer.buf = ctypes.addressof(sending.buffer.array) + sending.done
        else:                               # CPython's bytes do not move; PyPy makes a copy that lives as long as this
            pointer = pointer or ctypes.c_char_p(sending.view.obj)
            buffer.buf = ctypes.cast(pointer, POINTER).value + sending.done
        operation.keep = sending, pointer
        buffer.len = min(sending.wanted - sending.done, SEND_MAX)       # the rest follows its completion
        self.engine.pending[operation.address] = operation
        if api.WSASend(session.socket.fileno(), operation.buffer, 1, None, 0, operation.address, None):
            code = api.last_error()
            if code != IO_PENDING:
                del self.engine.pending[operation.address]
                # It stays outstanding until the session has ended: what others queue meanwhile must not be sent without it.
                self.engine.run_on_owner(session, self._send_failed, session, sending, failure("WSASend", code))

    def _send_failed(self, session: Any, sending: Any, error: OSError) -> None:
        self.close_session(session, False, None, error)
        self.core.end_send(sending)         # before anybody may see that nothing is outstanding
        with session.link.lock:
            session.sending = None

    def _sent(self, operation: Overlapped, transferred: int) -> None:
        """A completion, on any thread: count it, and start the next send with all that was queued meanwhile (I4)."""
        session = operation.target
        link = session.link
        code = operation.code()
        self.sends += 1
        self.sent += transferred
        with link.lock:
            sending = session.sending
            sending.done += transferred
            session.unsent -= transferred
            link.sent_at = session.last = self.now          # a peer that takes what it is sent is not idle
            if session.marks is not None:
                session.progress(transferred)
            if not code and sending.done < sending.wanted and not session.aborted:
                self._transmit(session, operation.keep[1])          # WSASend takes all of it as a rule
                return
        if code:
            self._serve(session, self._send_failed, session, sending, failure("WSASend", code))
            return
        self.core.end_send(sending)         # before anybody may see that nothing is outstanding
        with link.lock:
            session.sending = None
            if session.out and not session.aborted:
                self._send_now(session)
            idle = session.sending is None
            relieved = link.pressed and session.unsent <= session.low_water
            if relieved:
                link.pressed = False
        if relieved:
            self._serve(session, self._press, session)
        elif idle and (session.fin or not session.is_open()):
            self._serve(session, self._settle, session)

    # -- owner thread: a session's end --------------------------------------------------------------------------------

    def half_close(self, session: Any) -> None:
        """The user has nothing more to send: FIN goes out behind what is queued. Any thread."""
        with session.link.lock:
            if not session.is_open() or session.fin:
                return
            session.fin = True
        self.engine.run_on_owner(session, self._settle, session)

    def close_session(self, session: Any, drain: bool, reason: Any, error: Optional[BaseException]) -> None:
        """Begin to close. The first cause is the one reported; an abort overtakes a drain that is under way."""
        with session.link.lock:
            if not session.move("drain" if drain else "abort"):
                return
            if session.aborted:
                session.out.clear()
        session.because(reason, error)
        session.paused |= session.ENDED

    def _overdue(self, session: Any) -> None:
        """The peer has not taken the last bytes in all that time."""
        if not session.is_gone():
            self.close_session(session, False, None, None)

    def _settle(self, target: Any) -> None:
        """Do what the state asks for now. The owner calls this whenever nothing is in the mail."""
        link = target.link
        if link.armed is not None or target.is_gone():
            return                          # a listener asks for nothing
        with link.lock:
            if target.out and target.sending is None and not target.aborted:
                self._send_now(target)
            unsent = target.unsent
        if target.is_open():
            if target.fin and not unsent:
                self._send_fin(target)
                if target.eof:
                    self.close_session(target, True, None, None)
                    self._settle(target)
                    return
            self._arm_unless_paused(target)
        elif link.live or target.aborted:
            self._settle_closing(target, unsent)

    def _settle_closing(self, session: Any, unsent: int) -> None:
        """Closing: send what is queued, say so, wait for the peer to take it; then, or when aborted, wait for the system."""
        link = session.link
        if not session.is_ended():
            if unsent:
                if session.deadline is None:
                    self._plan(session, DRAIN, self._overdue, session)
                self._discard(session)
                return
            with link.lock:
                session.move("sent")
            if self._send_fin(session) and not session.eof and self.now - link.sent_at < LINGER:
                self._linger(session, 0.01, LINGER)
            else:
                link.late = True
        if not (session.aborted or session.eof or link.late):
            self._discard(session)
            return
        if link.receiving or session.sending is not None:
            if not link.cancelled:
                link.cancelled = True
                api.CancelIoEx(session.socket.fileno(), None)       # only asks: the completions come, and lead here again
            return
        self._closed(session)

    def _plan(self, session: Any, delay: float, function: Callable[..., Any], *args: Any) -> None:
        """Call function(*args) in *delay* seconds, and not what was planned before."""
        if session.deadline is not None:
            session.deadline.cancel()
        session.deadline = self.engine.call_later(delay, 0, self.engine.run_on_owner, session, function, *args)

    def _linger(self, session: Any, pause: float, left: float) -> None:
        """Look again, after 10, 20, 40 ... ms, whether the peer's system has all; a delayed ACK takes 40 ms."""
        if session.is_gone():
            return
        if left <= 0 or _acknowledged(session.socket):
            session.link.late = True
        else:
            self._plan(session, pause, self._linger, session, 2 * pause, left - pause)

    def _send_fin(self, session: Any) -> bool:
        if session.link.fin:
            return True
        session.link.fin = True
        try:
            session.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return False                    # the peer is gone already
        return True

    def _discard(self, session: Any) -> None:
        """A closing session's input is read and thrown away, else closing would answer it with a reset."""
        if not (session.eof or session.link.receiving):
            self._arm(session)

    def _closed(self, session: Any) -> None:
        """The end: nothing is outstanding any more. Buffers and operations go back, then on_closed; each session once."""
        link = session.link
        with link.lock:
            if link.mail or not session.move("closed"):
                return                      # on_sent comes before on_closed; `_let_go` settles again behind the mail
            session.out.clear()
            session.unsent = 0
        sock = session.socket
        if sock is not None:
            if session.aborted:
                try:                        # a reset: the system keeps nothing for a peer that does not read
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("HH", 1, 0))
                except OSError:
                    pass                    # not connected any more
            sock.close()
        if session.deadline is not None:
            session.deadline.cancel()
            session.deadline = None
        for operation in (link.receive, link.send):
            if operation is not None:
                self._free(operation)
        link.receive = link.send = None
        if link.inbox is not None:
            self.core.give_back(session, link.inbox)
            link.inbox = None
        engine = self.engine
        with engine.lock:
            engine.closed += 1
            engine.leaving += 1
        self.core.on_closed(session, session.error)
        with engine.lock:
            engine.leaving -= 1
            engine.owned.discard(session)   # not before: the threads may end when the last is gone

    def _operation(self, target: Any, complete: Any) -> Overlapped:
        """A free record, for a call on *target*."""
        try:
            operation = self.engine.spare.pop()
        except IndexError:
            operation = Overlapped()
        operation.target, operation.complete = target, complete
        return operation

    def _free(self, operation: Overlapped) -> None:
        """Its packet was dequeued, or there will be none."""
        operation.target = operation.keep = operation.complete = None
        self.engine.spare.append(operation)

    def shut(self) -> None:
        """Posted by Engine.stop: abort what is open, close the listeners; the loop ends when all of it is gone."""
        engine = self.engine
        with engine.lock:
            engine.stopping = True
            listeners, sessions = list(engine.listeners), list(engine.owned)
            for _ in engine.workers:
                engine.port.wake()
        for listener in listeners:
            engine.run_on_owner(listener, self.close_listener, listener)
        for session in sessions:
            engine.run_on_owner(session, self.close_session, session, False, session.SHUTDOWN, None)
