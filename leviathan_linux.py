"""leviathan's engine for Linux: N threads, each of which owns one select.epoll.

How epoll behaves
-----------------
epoll tells which sockets *could* be read or written now; the program then makes the call itself. Level-triggered, it
says so at every poll until all is read; edge-triggered, once for what has arrived, and that costs the kernel less: it
looks at a socket once for a message, not twice.

The tempting mistakes
---------------------
* To believe that an edge must be read until EAGAIN. That starves the others while one peer sends without end, and in
  Python costs the 750 ns of a raised BlockingIOError for each message. epoll(7) allows to stop at a read that was
  short, for the socket was empty then. Here a read is one bounded read; where it filled its buffer, the poller is told
  to look again, and the next poll reports what is left.
* To believe that a short read always means so. It may have stopped at the peer's end of stream, which is no news any
  more if it came with the bytes, or at TCP's urgent mark. Both are watched for (EPOLLRDHUP, EPOLLPRI), and where they
  show, the poller is told to look again after each read. On a unix socket a read also stops at passed descriptors: those
  sockets are level-triggered, as is everything else but open sessions with nothing unsent.
* EPOLLOUT while nothing is unsent: level-triggered, every poll would return at once.
* Closing a descriptor while events of the same batch are still to be handled: accept() may give its number to a new
  socket at once, and the old socket's event then hits the new one. Here a closed socket is taken out of the tables
  at once, but its descriptor is given back only at the batch's end.
* Masking EPOLLHUP and EPOLLERR: the kernel reports them regardless, for ever. Here a socket in which nothing is of
  interest is not registered at all.
* Touching the epoll, the tables or a session's queue from a foreign thread. Here only the owner does. Everyone else
  puts a call into the owner's mail and wakes it.
* Two flags and no lock for "is it awake already?". Here the flag, the mail and the wakeup are behind one lock.

Our solution
------------
A Worker is a thread, its epoll and what belongs to it: `streams` has the open sessions that may be read (the hot path
looks only there), `others` has everything else that has a descriptor. A socket is given to a worker once and stays
there, so a session's receive buffer and its queue of unsent bytes need no lock: only their worker touches them.
What handlers send while one receive is handled is collected and leaves in one system call afterwards.

Events without a session (`post`) and timers belong to the Engine; whichever worker is idle takes the next one. They
wake by one descriptor that all epolls watch with EPOLLEXCLUSIVE: the kernel picks an idle thread, as an IOCP would.

The engine knows nothing of leviathan. It gets `core`, an object with the completions (on_accepted, on_connected,
on_eof, on_sent, on_resumed, on_closed, on_failed) and two questions (reserve, release), and it works on the attributes
of a session that leviathan.Channel lists. leviathan_win.py is this module's twin.
"""
from __future__ import annotations

import errno
import fcntl
import functools
import heapq
import os
import select
import socket
import stat
import struct
import sys
import termios
import threading
from collections import deque
from ctypes import addressof, memmove
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

# LEVIATHAN_POLL=1 forces select.poll, so that what macOS and the BSDs run is tested on Linux too.
USE_EPOLL = hasattr(select, "epoll") and not os.environ.get("LEVIATHAN_POLL")
NAME = "epoll" if USE_EPOLL else "poll"
VERSION = "0.1.0"       # of leviathan.py, which looks: half of an update is none

READ = 0x001            # EPOLLIN and POLLIN
WRITE = 0x004           # EPOLLOUT and POLLOUT
EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)
# What an open session is watched with beside READ: report each arrival once, and an end or urgent data as such.
EDGE = 0x80000000 | 0x2000 | 0x002      # EPOLLET, EPOLLRDHUP (which PyPy does not name), EPOLLPRI

SCRATCH = 1 << 18       # bytes read at once; libuv's figure is 64 KiB, uvloop's 256 KiB
MAX_EVENTS = 512        # per poll
ACCEPT_BUDGET = 100     # accepts per readiness, so that one listener starves nobody (RULES: epoll 1)
EVENT_BUDGET = 64       # posted events per turn, for the same reason
MAIL_BUDGET = 16        # times that the mail is read per turn; a poll for each would cost another thread that sends the GIL
TIMER_BUDGET = 64       # timers per turn: thousands may be due at once, and the sockets would wait for all of them
JOIN_MAX = 1 << 17      # more unsent bytes than this are sent by sendmsg: joining them would copy them
JOIN_MEAN = 4096        # unless its chunks are smaller than this on average: 64 of those would be a short send
GATHER_MAX = 64         # chunks per sendmsg; IOV_MAX is 1024 on Linux, 16 by POSIX
DISCARD_BUDGET = 16     # reads of a closing session's input per readiness
FAULT_PAUSE = 0.05      # seconds behind a turn that failed, so that one that fails again and again fills no log
DRAIN = 60.0            # seconds that a closing session may take to send what is queued
LINGER = 2.0            # seconds a closed session waits for its peer to take the last bytes and close too
ACCEPT_PAUSE = 0.1      # seconds without accepting after EMFILE, doubled each time ...
ACCEPT_PAUSE_MAX = 1.0  # ... up to this (libuv and asyncio wait 1 s at once)

# accept(2): errors of the new connection, not of the listener. Try the next one.
ACCEPT_AGAIN = frozenset(getattr(errno, name) for name in (
    "ECONNABORTED", "EINTR", "EPROTO", "ENETDOWN", "ENOPROTOOPT", "EHOSTDOWN", "ENONET", "EHOSTUNREACH", "EOPNOTSUPP",
    "ENETUNREACH", "EPERM") if hasattr(errno, name))
# accept(2): the process or the machine is short of something. Go on serving, accept later.
ACCEPT_LATER = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC))

# PyPy's recv_into takes a ctypes array, and its memoryview, but no slice of that: there it is received and then copied.
SLICES = sys.implementation.name != "pypy"

FOREVER = float("inf")
LONGEST = 1e6           # seconds of one wait: poll and epoll_wait take 2**31 ms, 24 days


# ---------------------------------------------------------------------------------------------------------------------
# System calls: what waits, and what wakes
# ---------------------------------------------------------------------------------------------------------------------

class _Poll:
    """select.poll with select.epoll's interface, for systems without epoll (and to test that on Linux)."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self._poll.unregister

    def poll(self, timeout: float = -1, maxevents: int = -1) -> List[Tuple[int, int]]:
        """Wait up to *timeout* seconds (-1: for ever), as select.epoll.poll does."""
        return self._poll.poll(None if timeout < 0 else timeout * 1000)

    def close(self) -> None:
        """Nothing: a poll object has no descriptor."""


def _make_poller() -> Any:
    return select.epoll() if USE_EPOLL else _Poll()


class Wakeup:
    """A descriptor that becomes readable when signalled: an eventfd, or a socketpair where Python has none (3.8, 3.9)."""

    def __init__(self) -> None:
        self._pair: Tuple[socket.socket, ...] = ()
        if hasattr(os, "eventfd"):
            self._read = self._write = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
            self._read, self._write = (end.fileno() for end in self._pair)

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._read

    def signal(self) -> None:
        """Make the descriptor readable. Signalling twice is the same as once."""
        try:
            os.write(self._write, b"\1\0\0\0\0\0\0\0")
        except BlockingIOError:
            pass            # full of unread signals: it is readable, which is all that was asked

    def drain(self) -> None:
        """Make the descriptor unreadable again."""
        try:
            os.read(self._read, 4096)
        except BlockingIOError:
            pass            # another worker was faster

    def close(self) -> None:
        """Give the descriptors back."""
        if self._pair:
            for end in self._pair:
                end.close()
        else:
            os.close(self._read)


class Console:
    """Tells when the program is to end because its console is closed: not here, where that is a signal, SIGHUP."""

    def __init__(self, closing: Callable[[], None]) -> None:
        pass

    def close(self) -> None:
        """Tell no more."""


def _tune(sock: socket.socket, family: int) -> None:
    """Set what every stream has: no Nagle delay, and keepalive, so that a dead peer is noticed after two minutes.

    Accepted sockets inherit all of it from their listener, so this costs an accept nothing.
    """
    if family == getattr(socket, "AF_UNIX", None):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes the peer's kernel has not confirmed yet (SIOCOUTQ, tcp(7)), a FIN being one; 2 where the system cannot tell."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    except (OSError, AttributeError):
        return 2


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
        # Guards events, signalled, timers, cancelled, due, turn, started, stopped and ended.
        self.lock = threading.Lock()
        self.events: Deque[Tuple[Callable[..., Any], Tuple[Any, ...]]] = deque()    # (function, args) for any worker
        self.signalled = False              # wakeup is readable already
        self.timers: List[Timer] = []       # a heap by time
        self.cancelled = 0                  # how many of the timers are cancelled
        self.due = FOREVER                  # when the first timer is due (read without the lock: see Worker._turn)
        self.turn = 0                       # round robin over the workers; also numbers the timers
        self.started = False
        self.stopped = False
        self.ended = False                  # nothing is left
        self.late: List[threading.Thread] = []      # they run on_closed for sessions that came too late for a worker
        self.wakeup = Wakeup()              # watched by every worker: an event is there
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
        for worker in self.workers if first else ():
            worker.post(worker.shut)
            if worker.thread.ident is None:
                worker.run()                # never had a thread: this one does what was queued, and closes
        left = self._join([worker.thread for worker in self.workers if worker.thread.ident is not None], end)
        with self.lock:
            late = [thread for thread in self.late if thread.ident != threading.get_ident()]
        left += self._join(late, end)       # what the workers have refused while they ended
        with self.lock:
            last, self.ended = not (left or self.ended), self.ended or not left
        if last:
            self.wakeup.close()
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
            total = {"threads": len(self.workers), "sessions": 0, "timers": len(self.timers) - self.cancelled}
        for worker in self.workers:
            total["sessions"] += worker.sessions
            for key, value in worker.counters().items():
                total[key] = total.get(key, 0) + value
        return total

    # -- any thread: sockets ------------------------------------------------------------------------------------------

    def listen(self, listener: Any, family: int, address: Any, backlog: int, thread: Optional[int]) -> None:
        """Bind and listen at once, so that the caller gets the OSError; `accept` then lets connections in.

        Sets listener.socket and listener.worker. *thread* pins the listener to one worker (E2).
        """
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == getattr(socket, "AF_UNIX", None):
                _remove_stale(address)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _tune(sock, family)
            sock.setblocking(False)
            sock.bind(address)
            if family == getattr(socket, "AF_UNIX", None):
                listener.file = _file_at(address)
            sock.listen(backlog)
        except OSError:
            _remove_own(listener.file)
            sock.close()
            raise
        listener.socket = sock
        listener.worker = worker = self.choose(thread)
        if not worker.post(worker.listeners.append, listener):
            _remove_own(listener.file)
            sock.close()
            raise OSError(errno.ESHUTDOWN, "the queue has stopped")

    def accept(self, listener: Any) -> None:
        """Let connections in, until core.reserve(listener) says that there is no room. Each is given to on_accepted."""
        listener.worker.post(listener.worker.arm_listener, listener)

    def connect(self, session: Any, family: int, address: Any, thread: Optional[int]) -> None:
        """Connect out. Ends in on_connected(session), or in on_closed(session, error)."""
        session.worker = worker = self.choose(thread)
        if not worker.post(worker.dial, session, family, address):
            self._refuse(session)

    def attach(self, session: Any, sock: socket.socket, thread: Optional[int]) -> None:
        """Take an accepted socket: on_connected(session) on the worker that now owns it, then its first receive."""
        session.socket = sock
        session.worker = worker = self.choose(thread)
        if not worker.post(worker.adopt, session):
            sock.close()
            self._refuse(session)

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
        session.worker.post(session.worker.resume, session)

    def pause(self, session: Any) -> None:
        """Arm no receive until `receive` is called. On the owner thread, session.paused has been set."""
        session.worker.pause(session)

    def send(self, session: Any, chunks: Tuple[bytes, ...], on_sent: Optional[Callable[..., Any]] = None) -> bool:
        """Queue *chunks*, in order with all else that was queued. False, and nothing done, if the session is closed.

        *on_sent* ends in core.on_sent(session, on_sent, ok), once.
        """
        worker = session.worker
        if worker.mine._is_owned() and not session.posted:
            return bool(worker.enqueue(session, chunks, on_sent))
        return bool(worker.enqueue_foreign(session, chunks, on_sent))

    def close(self, target: Any, drain: bool, reason: Any = None, error: Optional[BaseException] = None) -> None:
        """Close a session: after what is queued was sent (*drain*), or at once. Ends in on_closed, exactly once."""
        worker = target.worker
        if self.owns(target):
            worker.close_session(target, drain, reason, error)
        else:
            worker.post(worker.close_session, target, drain, reason, error)

    def shutdown(self, session: Any) -> None:
        """Half-close: after what is queued was sent, tell the peer that no more will come; receiving goes on."""
        session.worker.half_close(session)

    def unlisten(self, listener: Any) -> None:
        """Close a listener. Connections it let in go on."""
        worker = listener.worker
        if not worker.post(worker.close_listener, listener):
            worker.close_listener(listener)

    def on_worker(self) -> bool:
        """True on one of its threads, which cannot wait for themselves."""
        return any(worker.mine._is_owned() for worker in self.workers)

    def heard(self, session: Any) -> bool:
        """True when something has come for *session* that was not received yet. On its own thread."""
        try:
            session.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return False                    # nothing; or an error, which receiving will meet as well
        return True

    def owns(self, session: Any) -> bool:
        """True on the thread that owns *session*."""
        return bool(session.worker.mine._is_owned())

    def run_on_owner(self, session: Any, function: Callable[..., Any], *args: Any) -> bool:
        """Call function(*args) on the thread that owns *session*. False when that thread has ended."""
        return bool(session.worker.post(function, *args))

    # -- any thread: events and timers --------------------------------------------------------------------------------

    def post(self, function: Callable[..., Any], *args: Any) -> bool:
        """Call function(*args) on whichever worker is idle. False when the engine has stopped."""
        with self.lock:
            if self.stopped:
                return False
            self.events.append((function, args))
            if not self.signalled:
                self.signalled = True
                self.wakeup.signal()
        return True

    def call_later(self, delay: float, interval: float, function: Callable[..., Any], *args: Any) -> Timer:
        """Call function(*args) in *delay* seconds, and every *interval* seconds after that unless it is 0."""
        timer = Timer(self, monotonic() + delay, interval, function, args)
        self.schedule(timer)
        return timer

    def schedule(self, timer: Timer) -> None:
        """Put a timer on the heap. A new first one wakes every worker, since any of them may be the idle one then."""
        with self.lock:
            if timer.function is None:
                return                      # cancelled by its own call
            timer.queued = True
            self.turn += 1
            timer.number = self.turn
            heapq.heappush(self.timers, timer)
            first = timer.when < self.due
            if first:
                self.due = timer.when
        if first:
            for worker in self.workers:
                worker.wake()

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
        """The worker a new socket goes to: the one asked for, else the next in turn (E2)."""
        if thread is not None:
            return self.workers[thread % len(self.workers)]
        with self.lock:
            self.turn += 1
            return self.workers[self.turn % len(self.workers)]


def _remove_stale(path: str) -> None:
    """Remove the socket file of a server that is gone; leave one alone that still answers, and any other file."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def _file_at(path: str) -> Tuple[str, int, int]:
    """(absolute path, device, inode): which file it is, whatever becomes of the path and of the current directory."""
    found = os.stat(path)
    return os.path.abspath(path), found.st_dev, found.st_ino


def _remove_own(file: Optional[Tuple[str, int, int]]) -> None:
    """Remove a unix socket's file, unless another one is there: somebody has removed ours and listens himself."""
    try:
        if file is not None and _file_at(file[0]) == file:
            os.unlink(file[0])
    except OSError:
        pass                                # it is gone already


# ---------------------------------------------------------------------------------------------------------------------
# Worker
# ---------------------------------------------------------------------------------------------------------------------

class Worker:
    """One thread, its epoll, and everything that only this thread may touch."""

    __slots__ = ("engine", "core", "poller", "edge", "wakeup", "lock", "mail", "signalled", "stopped", "stopping", "streams",
                 "others", "listeners", "sessions", "owned", "dirty", "tally", "doomed", "scratch", "now", "mine", "thread",
                 "receives", "received", "sends", "sent", "accepted", "connected", "closed", "events", "turns")

    def __init__(self, engine: Engine, index: int) -> None:
        self.engine = engine
        self.core = engine.core
        self.poller = _make_poller()
        self.edge = EDGE if USE_EPOLL else 0
        self.wakeup = Wakeup()
        self.lock = threading.Lock()        # guards mail, signalled, stopped, and each session's `posted`, `state` and `fin`
        self.mail: List[Tuple[Callable[..., Any], Tuple[Any, ...]]] = []     # (function, args) for this thread
        self.signalled = False              # wakeup is readable already, or the mail is about to be read
        self.stopped = False                # no mail is taken any more
        self.stopping = False
        # By descriptor: the open session that may be read, or None. The hot path; a list is twice as fast as a dict.
        self.streams: List[Any] = []
        self.others: Dict[int, Callable[[int], None]] = {}      # {descriptor: what handles its events}
        self.listeners: List[Any] = []
        self.sessions = 0                   # sessions this worker owns, in whatever state
        self.owned: Dict[int, Any] = {}     # {descriptor: session}, every one of them
        self.dirty: List[Any] = []          # sessions that a handler has queued something for
        self.tally: List[int] = []          # bytes of each send since the last turn: ours and those of Session.send
        self.doomed: List[socket.socket] = []       # sockets to be closed when the batch of events is done
        self.scratch = self.core.scratch(SCRATCH)   # a ctypes array: what sessions without a RecvBuf are read into
        self.now = monotonic()              # one clock read per batch
        self.mine: Any = threading.RLock()  # held by this worker's thread while it runs, which tells it from all others
        self.thread = threading.Thread(target=self.run, name="%s-%d" % (engine.name, index), daemon=True)
        self.receives = self.received = self.sends = self.sent = 0
        self.accepted = self.connected = self.closed = self.events = self.turns = 0
        for wakeup, handle in (self.wakeup, self._mail_ready), (engine.wakeup, self._events_ready):
            self._reach(wakeup.fileno())
            self.others[wakeup.fileno()] = handle
        self.poller.register(self.wakeup.fileno(), READ)
        self.poller.register(engine.wakeup.fileno(), READ | EXCLUSIVE if USE_EPOLL else READ)

    # -- any thread ---------------------------------------------------------------------------------------------------

    def post(self, function: Callable[..., Any], *args: Any) -> bool:
        """Call function(*args) on this worker's thread, in the order of the posts. False once the thread has ended."""
        with self.lock:
            if self.stopped:
                return False
            self.mail.append((function, args))
            self._signal()
        return True

    def wake(self) -> None:
        """Let the worker look at its timers and its mail."""
        with self.lock:
            if not self.stopped:
                self._signal()

    def _signal(self) -> None:
        # Called with the lock held, so that the descriptor cannot be closed meanwhile.
        if not self.signalled:
            self.signalled = True
            if not self.mine._is_owned():
                self.wakeup.signal()        # the owner itself looks at the flag before it sleeps

    def enqueue_foreign(self, session: Any, chunks: Tuple[bytes, ...], on_sent: Optional[Callable[..., Any]]) -> bool:
        """Queue bytes from a thread that is not the owner; `posted` counts what waits in the mail (hard limit)."""
        size = sum(map(len, chunks))
        with self.lock:
            if self.stopped or session.fin or not session.is_open():
                return False
            waiting = session.posted + session.unsent
            if waiting > session.low_water and waiting + size > session.send_limit:      # as in _check_limits
                self.mail.append((self.overflow, (session,)))
                self._signal()
                return False
            session.posted += size
            session.owner = session.NOBODY      # what the owner sends from now on must not overtake this
            self.mail.append((self._enqueue_posted, (session, chunks, size, on_sent)))
            self._signal()
        return True

    def _reach(self, fd: int) -> None:
        """Make `streams` long enough for a descriptor that is going to be watched."""
        if fd >= len(self.streams):
            self.streams += [None] * (fd + 1 - len(self.streams))

    def counters(self) -> Dict[str, int]:
        """What was counted since the start."""
        return {"receives": self.receives, "bytes_received": self.received, "sends": self.sends, "bytes_sent": self.sent,
                "accepted": self.accepted, "connected": self.connected, "closed": self.closed, "events": self.events,
                "turns": self.turns}

    # -- owner thread: the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread: until `shut` was posted and the last session is closed."""
        self.mine.acquire()
        try:
            while not self._finished():
                try:
                    self._turn()
                except BaseException as error:
                    self.core.on_failed(self._turn, error)      # it must not end the thread and with it all sessions
                    threading.Event().wait(FAULT_PAUSE)
                    for session in self.streams:
                        if session is not None:
                            self._look_again(session)           # nor lose the batch's other events
                    self._run_timers(monotonic())               # nor hold up the timers, which come last in a turn
        finally:
            self._end()

    def _turn(self) -> None:
        """One poll and its events; many of them, in fact: the loop is left only for what is rare."""
        # The hot loop. Everything it uses is a local, because it runs for every message.
        # It polls once, without waiting, even if there is mail left: where each leads to the next (an on_sent that writes
        # again), the sockets and timers of all others would not be looked at before that ends.
        # `engine.due` is read without its lock: who sets an earlier one wakes this worker afterwards, so a stale value
        # costs one turn. The clock is read once per batch (45 ns), the counters are added up per batch.
        poll = self.poller.poll
        streams = self.streams
        scratch = self.scratch
        dirty = self.dirty
        tally = self.tally
        counts: List[int] = []      # adding each up at once would take twice as long
        engine = self.engine
        read = READ
        mine = self.mine
        full = len(scratch)
        due = 0.0 if self.signalled or self.doomed else engine.due
        while not self.stopping:
            if due == FOREVER:
                events = poll(-1, MAX_EVENTS)
            else:
                events = poll(min(max(0.0, due - monotonic()), LONGEST), MAX_EVENTS)
            self.now = now = monotonic()
            for fd, mask in events:
                session = streams[fd]
                if session is None:
                    self._dispatch(fd, mask)
                    continue
                if mask != read or session.partial is not None:
                    self.session_ready(session, mask)
                    continue
                try:
                    count = session.socket.recv_into(scratch)
                except OSError as error:
                    self._receive_failed(session, error)
                    continue
                if count:
                    counts.append(count)
                    session.last = now
                    handle = session.received       # a call of `session.received` looks for a method first: 15 ns
                    try:
                        handle(session, scratch, count)
                    except BaseException as error:
                        self._spoiled(session, error)
                else:
                    self.core.on_eof(session)
                if dirty:
                    # What _flush does; to do it here saves two calls, and one for each session of a broadcast. What is
                    # large has left already (see _append), so joining copies little.
                    for session in dirty:
                        out = session.out
                        if not out or session.owner is not mine:
                            self._send_now(session)
                            continue
                        data = out[0] if len(out) == 1 else session.separator.join(out)
                        out.clear()
                        try:
                            count = session.socket.send(data)
                        except OSError as error:
                            self.send_failed(session, data, error)
                            continue
                        tally.append(count)
                        if count == len(data):
                            session.unsent = 0          # `_append` may have counted: a large packet, or raw bytes
                        else:
                            self.outstanding(session, data, count)
                    dirty.clear()
            self.turns += 1
            self.receives += len(events)
            received = sum(counts)
            self.received += received
            if received >= full and full in counts:     # somebody has filled the buffer: asked once a turn, not once a message
                for fd, mask in events:
                    session = streams[fd]
                    if session is not None:
                        self._look_again(session)
            counts.clear()
            if now >= engine.due:
                self._run_timers(now)
            if tally:
                self._add_up()
            if self.signalled or self.doomed:
                break
            due = engine.due
        self._tidy()

    def _tidy(self) -> None:
        """Between batches: close what is doomed, do what was posted, and what that has posted, MAIL_BUDGET times."""
        for _ in range(MAIL_BUDGET):
            for sock in self.doomed:
                sock.close()
            self.doomed.clear()
            with self.lock:
                mail, self.mail = self.mail, []
                self.signalled = False
            for function, args in mail:
                if self.dirty and function != self._enqueue_posted:
                    self._flush()           # what other threads have queued in a row leaves together
                self._attempt(function, args)
            if self.dirty:
                self._flush()
            if self.stopping:
                self._turn_stopping()
            if self.tally:
                self._add_up()
            if not (self.signalled or self.doomed):
                return

    def _add_up(self) -> None:
        """Count the sends since the last turn; all at once, which spares a message 2 % of its instructions."""
        self.sends += len(self.tally)
        self.sent += sum(self.tally)
        self.tally.clear()

    def _turn_stopping(self) -> None:
        """While the thread is ending: events as they come. It waits only for peers that are still to answer."""
        waits = self.sessions and not self.mail and not self.doomed
        events = self.poller.poll(0.01 if waits else 0.0, MAX_EVENTS)
        self.receives += len(events)
        for fd, mask in events:
            session = self.streams[fd]
            if session is not None:
                self.session_ready(session, mask)
            else:
                self._dispatch(fd, mask)
            if self.dirty:
                self._flush()

    def _finished(self) -> bool:
        """True when the thread may end; from then on no mail is taken."""
        if not self.stopping or self.sessions or self.doomed:
            return False
        with self.engine.lock:
            events, self.engine.events = self.engine.events, deque()
        for function, args in events:
            self._call(function, args)
        with self.lock:
            self.stopped = not self.mail and not self.sessions and not self.doomed
        return self.stopped

    def _end(self) -> None:
        for listener in list(self.listeners):
            self.close_listener(listener)
        for sock in self.doomed:
            sock.close()
        self.poller.close()
        with self.lock:
            self.stopped = True
            self.wakeup.close()
        self.mine.release()

    def _dispatch(self, fd: int, mask: int) -> None:
        """An event that is not an open session's. None is there when it was closed earlier in this batch."""
        self.receives -= 1                  # the loops count every event as one
        handle = self.others.get(fd)
        if handle is not None:
            handle(mask)
            if self.dirty:
                self._flush()

    def _call(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> None:
        """Call what was posted. Whatever it raises is reported and costs nothing else."""
        self._attempt(function, args)
        if self.dirty:
            self._flush()

    def _attempt(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> None:
        """The same, and what it has queued stays queued."""
        try:
            function(*args)
        except BaseException as error:
            self.core.on_failed(function, error)

    def _mail_ready(self, mask: int) -> None:
        self.wakeup.drain()
        self.signalled = True               # makes the loop end its batch and read the mail

    def _events_ready(self, mask: int) -> None:
        """Take posted events, one at a time; before each is run, another worker is woken if more are waiting."""
        engine = self.engine
        with engine.lock:
            engine.wakeup.drain()
            engine.signalled = False
        for _ in range(EVENT_BUDGET):
            with engine.lock:
                if not engine.events:
                    return
                function, args = engine.events.popleft()
                if engine.events and not engine.signalled and len(engine.workers) > 1:
                    engine.signalled = True
                    engine.wakeup.signal()
            self.events += 1
            self._call(function, args)
        with engine.lock:
            if engine.events and not engine.signalled:
                engine.signalled = True
                engine.wakeup.signal()

    def _run_timers(self, now: float) -> None:
        for _ in range(TIMER_BUDGET):
            due = self.engine.take_due(now)
            if due is None:
                return
            timer, function, args = due
            self.events += 1
            self._call(function, args)
            if timer.interval:
                # From when it was due, not from now, so that it does not drift; missed calls are not made up for.
                timer.when = max(timer.when + timer.interval, monotonic())
                self.engine.schedule(timer)

    # -- owner thread: listeners --------------------------------------------------------------------------------------

    def arm_listener(self, listener: Any) -> None:
        """Accept from now on."""
        if listener.closed or self.stopping:
            return
        fd = listener.socket.fileno()
        if fd not in self.others:
            try:
                self.poller.register(fd, READ)
            except OSError as error:
                self._accept_failed(listener, error)
                return
            self._reach(fd)
            self.others[fd] = functools.partial(self._accept, listener)

    def _disarm_listener(self, listener: Any) -> None:
        fd = listener.socket.fileno()
        if self.others.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def _accept(self, listener: Any, mask: int) -> None:
        """Accept what waits, as far as there is room; the room is taken before the connection is."""
        for _ in range(ACCEPT_BUDGET):
            if not self.core.reserve(listener):
                self._disarm_listener(listener)     # core calls the verb `accept` again when there is room
                return
            try:
                sock, address = listener.socket.accept()
            except OSError as error:
                self.core.release(listener)
                if isinstance(error, BlockingIOError):
                    return                  # nobody is waiting
                if error.errno in ACCEPT_AGAIN:
                    continue
                self._accept_failed(listener, error)
                return
            listener.pause = ACCEPT_PAUSE
            sock.setblocking(False)
            self.accepted += 1
            self.core.on_accepted(listener, sock, address)

    def _accept_failed(self, listener: Any, error: OSError) -> None:
        """Out of descriptors or memory: pause, with the pause doubling, and go on serving those who are in."""
        if error.errno not in ACCEPT_LATER:
            self.core.on_listener_failed(listener, error, 0.0)
            self.close_listener(listener)
            return
        self._disarm_listener(listener)
        pause = listener.pause
        listener.pause = min(pause * 2, ACCEPT_PAUSE_MAX)
        self.core.on_listener_failed(listener, error, pause)
        self.engine.call_later(pause, 0, self.engine.accept, listener)

    def close_listener(self, listener: Any) -> None:
        """Stop listening and give the port back."""
        if listener in self.listeners:
            self.listeners.remove(listener)
            self._disarm_listener(listener)
        if listener.socket.fileno() >= 0:
            _remove_own(listener.file)      # first: while the socket is there, nobody else's file has its inode
            listener.socket.close()
        listener.closed = True

    # -- owner thread: a session's beginning --------------------------------------------------------------------------

    def adopt(self, session: Any) -> None:
        """An accepted socket has come to its thread."""
        if self.stopping:
            session.move("abort")
        fd = session.socket.fileno()
        self.sessions += 1
        self._reach(fd)
        self.owned[fd] = session
        if session.is_ended():
            self._closed(session)
            return
        self._established(session)

    def dial(self, session: Any, family: int, address: Any) -> None:
        """Begin to connect; never waits."""
        self.sessions += 1
        if session.is_ended() or self.stopping:
            self._closed(session)
            return
        try:
            session.socket = sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            _tune(sock, family)
            code = sock.connect_ex(address)
        except (OSError, OverflowError, ValueError, TypeError) as error:
            session.fail(error)
            self._closed(session)
            return
        if code not in (0, errno.EINPROGRESS):
            session.fail(OSError(code, os.strerror(code)))
            self._closed(session)
            return
        fd = sock.fileno()
        self._reach(fd)
        self.owned[fd] = session
        self.others[fd] = functools.partial(self._dialled, session)
        self._watch(session, WRITE)

    def _dialled(self, session: Any, mask: int) -> None:
        try:
            code = session.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            code = error.errno
        if code:
            session.fail(OSError(code, os.strerror(code)))
            self._closed(session)
            return
        self.others.pop(session.socket.fileno())
        self._established(session)

    def _established(self, session: Any) -> None:
        """Connected and on its own thread: on_connected comes first, then the first receive is armed."""
        if not session.move("established"):
            return                          # it was given up meanwhile; its end is in the mail
        session.last = monotonic()          # what came before it in this batch may have taken long
        session.owner = self.mine
        session.dirty, session.tally = self.dirty, self.tally
        self.connected += 1
        self.streams[session.socket.fileno()] = session
        self.core.on_connected(session)
        if session.is_open():
            self._rearm(session)

    # -- owner thread: receiving --------------------------------------------------------------------------------------

    def _rearm(self, session: Any) -> None:
        """Watch for what the session's state asks for now, and put it into the table its events belong to."""
        fd = session.socket.fileno()
        if fd < 0 or fd not in self.owned:
            return
        interest = 0 if session.paused else READ
        if session.sending is not None:
            interest |= WRITE
        if session.paused:
            self.streams[fd] = None
            self.others[fd] = functools.partial(self.session_ready, session)
        else:
            self.others.pop(fd, None)
            self.streams[fd] = session
            if interest == READ and isinstance(session.peer, tuple):    # a unix socket's peer is a path
                interest |= self.edge
        self._watch(session, interest)

    def _watch(self, session: Any, interest: int) -> None:
        """Have the poller watch for *interest*; a session that cannot be watched is closed."""
        if interest == session.interest:
            return
        fd = session.socket.fileno()
        try:
            if not interest:
                self.poller.unregister(fd)  # with an interest of 0 the kernel would still report HUP, for ever
            elif not session.interest:
                self.poller.register(fd, interest)
            else:
                self.poller.modify(fd, interest)
        except OSError as error:            # ENOSPC: the user's limit of watches; ENOMEM
            self.close_session(session, False, None, error)
        else:
            session.interest = interest

    def _look_again(self, session: Any) -> None:
        """Have the next poll tell whether there is more to read; who is watched level-triggered needs no such call."""
        if session.interest & self.edge:
            try:
                self.poller.modify(session.socket.fileno(), session.interest)
            except OSError as error:
                self.close_session(session, False, None, error)

    def session_ready(self, session: Any, mask: int) -> None:
        """The general form of what the hot loop does for the common case."""
        if session.aborted:
            self.receives -= 1
            return                          # its end is in the mail
        if mask & ~READ and session.sending is not None:
            self._send_more(session)
        if session.paused or session.is_ended():
            self.receives -= 1
            if not session.is_open() and mask & ~WRITE:
                self._discard(session)
        elif mask & ~WRITE:
            self._receive(session, mask)
        else:
            self.receives -= 1

    def _receive(self, session: Any, mask: int) -> None:
        """One receive: into the session's RecvBuf behind what is there, or into the scratch buffer."""
        partial = session.partial
        space = len(self.scratch)
        try:
            if partial is None:
                count = session.socket.recv_into(self.scratch)
            elif SLICES:
                space = len(session.room)
                count = session.socket.recv_into(session.room)
            else:
                space = min(len(session.room), space)
                count = session.socket.recv_into(self.scratch, space)
                memmove(addressof(partial.array) + session.filled, addressof(self.scratch), count)
        except OSError as error:
            self._receive_failed(session, error)
            return
        if not count:
            self.core.on_eof(session)
        else:
            session.last = self.now
            self.received += count
            try:
                if partial is None:
                    session.received(session, self.scratch, count)
                else:
                    session.filled += count
                    if session.filled < session.need:
                        session.room = session.room[count:]     # the packet's length is known, and more of it is to come
                    else:
                        session.received(session, partial.array, session.filled)
            except BaseException as error:
                self._spoiled(session, error)
            if count == space or mask != READ:
                self._look_again(session)
        if self.dirty:
            self._flush()

    def _spoiled(self, session: Any, error: BaseException) -> None:
        """A framing's receiver has raised, which it must not: where its stream is now nobody knows."""
        self.core.on_failed(session.received, error)
        self.close_session(session, False, None, error)

    def _receive_failed(self, session: Any, error: OSError) -> None:
        if isinstance(error, (BlockingIOError, InterruptedError)):
            self._look_again(session)
        else:
            self.close_session(session, False, None, error)

    def pause(self, session: Any) -> None:
        """session.paused was set: read no more."""
        if session.is_open():
            self._rearm(session)

    def resume(self, session: Any) -> None:
        """session.paused may be 0 again: first what has been received already, then what comes."""
        session.paused &= ~session.RESUMING
        if not session.is_open() or session.paused:
            return
        try:
            self.core.on_resumed(session)
        except BaseException as error:
            self._spoiled(session, error)
        if session.is_open():
            self._rearm(session)

    # -- owner thread: sending ----------------------------------------------------------------------------------------

    def enqueue(self, session: Any, chunks: Tuple[bytes, ...], on_sent: Optional[Callable[..., Any]]) -> bool:
        """Queue bytes on the owner thread; they leave when the handler that runs now has returned."""
        if not session.is_open() or session.fin:
            return False
        self._append(session, chunks, sum(map(len, chunks)), on_sent)
        return True

    def _enqueue_posted(self, session: Any, chunks: Tuple[bytes, ...], size: int,
                        on_sent: Optional[Callable[..., Any]]) -> None:
        with self.lock:
            session.posted -= size
        if session.is_ended():
            if on_sent is not None:
                session.mark(on_sent)       # told False, behind those whose bytes have left
            return
        self._append(session, chunks, size, on_sent)
        self.restore(session)

    def restore(self, session: Any) -> None:
        """Let handlers send by the fast path of Session.send again, if nothing stands against it any more."""
        with self.lock:
            if session.is_open() and not session.fin and not session.posted and session.sending is None and \
                    session.marks is None:
                session.owner = self.mine

    def _append(self, session: Any, chunks: Tuple[bytes, ...], size: int,
                on_sent: Optional[Callable[..., Any]]) -> None:
        if session.separator:
            session.part()
        out = session.out
        if session.sending is None:
            if not out:
                self.dirty.append(session)
            # The fast path of Session.send does not count: what it has queued since is counted now, and only that.
            session.unsent += sum(map(len, out[session.counted:] if session.unsent else out))
        session.direct = False              # this comes first
        if size or not out:
            out.extend(chunks)
        session.unsent += size
        session.counted = len(out)
        if on_sent is not None:
            session.mark(on_sent)
        if session.unsent > session.high_water:
            self._send_now(session)         # perhaps the kernel takes it all
            self._check_limits(session, size)

    def flush_early(self, session: Any) -> None:
        """A handler has queued so much that the first part of it should leave."""
        self._send_now(session)

    def _check_limits(self, session: Any, size: int) -> None:
        """The kernel does not take what is queued, the last *size* bytes of it now: pause, or give up at the hard limit."""
        if not session.is_open():
            return
        # One packet of any size is let through, behind what a handler that was resumed may find unsent.
        if session.unsent > session.send_limit and session.unsent - size > session.low_water:
            self.overflow(session)
        elif session.unsent > session.high_water:
            session.congested()

    def overflow(self, session: Any) -> None:
        """The peer does not read and the hard limit is reached."""
        session.overflow()

    def _flush(self) -> None:
        """Send what handlers have queued: for each session all of it in one system call."""
        for session in self.dirty:
            self._send_now(session)
        self.dirty.clear()

    def _send_now(self, session: Any) -> None:
        """One send of everything that is queued, unless one is outstanding."""
        out = session.out
        if session.aborted:
            out.clear()
        if not out or session.sending is not None:
            return
        if session.unsent > JOIN_MAX and session.unsent > JOIN_MEAN * len(out):
            self._send_gather(session)
            return
        data = out[0] if len(out) == 1 else session.separator.join(out)
        out.clear()
        try:
            sent = session.socket.send(data)
        except OSError as error:
            self.send_failed(session, data, error)
            return
        self.tally.append(sent)
        if sent == len(data):
            session.unsent = 0
            if session.marks is not None:
                self._progress(session, sent)
        else:
            self.outstanding(session, data, sent)

    def send_failed(self, session: Any, data: bytes, error: OSError) -> None:
        """Nothing of *data* was taken: the socket's buffer is full, or the peer is gone."""
        if isinstance(error, (BlockingIOError, InterruptedError)):
            self.outstanding(session, data, 0)
        else:
            self.close_session(session, False, None, error)

    def _progress(self, session: Any, sent: int) -> None:
        """There are callbacks that wait for *sent* to grow; when the last is due, the fast path opens again."""
        session.progress(sent)
        if session.marks is None:
            self.restore(session)

    def _send_gather(self, session: Any) -> None:
        """The same for large amounts: chunk by chunk, without a copy."""
        out = session.out
        try:
            sent = session.socket.sendmsg(out[:GATHER_MAX])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.close_session(session, False, None, error)
            return
        self.tally.append(sent)
        session.unsent += sum(map(len, out[session.counted:])) - sent       # as _append counts
        done = 0
        left = sent
        for chunk in out:
            if len(chunk) > left:
                break
            left -= len(chunk)
            done += 1
        first = out[done] if done < len(out) else None
        del out[:done + 1]
        if sent and session.marks is not None:
            self._progress(session, sent)
        if first is not None:
            self._begin_send(session, first, left)

    def outstanding(self, session: Any, data: bytes, sent: int) -> None:
        """The kernel took *sent* bytes of *data*, which was all that was queued."""
        session.unsent = len(data) - sent
        if sent and session.marks is not None:
            self._progress(session, sent)
        self._begin_send(session, data, sent)
        self._check_limits(session, session.unsent)

    def _begin_send(self, session: Any, data: bytes, sent: int) -> None:
        """The rest of *data* becomes the session's outstanding send; from here on every queued byte is counted."""
        session.sending = self.core.begin_send(session, data, sent)
        session.owner = session.NOBODY
        self._rearm_sending(session)

    def _rearm_sending(self, session: Any) -> None:
        if session.is_open():
            self._rearm(session)
        else:
            self._watch_closing(session)

    def _send_more(self, session: Any) -> None:
        """The socket is writable again: go on with the outstanding send, then with what was queued behind it."""
        operation = session.sending
        try:
            sent = session.socket.send(operation.rest())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close_session(session, False, None, error)
            return
        self.tally.append(sent)
        session.last = self.now             # a peer that takes what it is sent is not idle
        operation.done += sent
        session.unsent -= sent
        if session.marks is not None:
            self._progress(session, sent)
        if operation.done < operation.wanted:
            return
        session.sending = None
        self.core.end_send(operation)
        self._send_now(session)
        if session.sending is None:
            self._rearm_sending(session)
            if not session.is_open() or session.fin:
                self.post(self._drained, session)
            else:
                self.restore(session)
        if session.unsent <= session.low_water:
            session.relieved()

    # -- owner thread: a session's end --------------------------------------------------------------------------------

    def half_close(self, session: Any) -> None:
        """The user has nothing more to send: FIN goes out behind what is queued. Any thread."""
        with self.lock:
            if not session.is_open() or session.fin:
                return
            session.fin = True
            session.owner = session.NOBODY
        self.post(self._drained, session)

    def close_session(self, session: Any, drain: bool, reason: Any, error: Optional[BaseException]) -> None:
        """Begin to close. The first cause is the one reported; an abort overtakes a drain that is under way."""
        with self.lock:
            moved = session.move("drain" if drain else "abort")
        if not moved:
            return
        session.because(reason, error)
        session.owner = session.NOBODY      # the fast path of Session.send is shut from here on
        session.paused |= session.ENDED
        if session.socket is None or session.socket.fileno() not in self.owned:
            return                          # not here yet: `adopt` or `dial` will see that it has ended
        self.streams[session.socket.fileno()] = None
        if session.aborted:
            self.post(self._closed, session)
        else:
            self._watch_closing(session)
            self.post(self._drained, session)       # behind what other threads have queued before

    def _overdue(self, session: Any) -> None:
        """The peer has not taken the last bytes in all that time."""
        if not session.is_gone():
            self.close_session(session, False, None, None)

    def _watch_closing(self, session: Any) -> None:
        """A closing session's input is read and thrown away, else close() would answer it with a reset."""
        fd = session.socket.fileno()
        if fd not in self.owned:
            return
        self.others[fd] = functools.partial(self.session_ready, session)
        self._watch(session, (0 if session.eof else READ) | (WRITE if session.sending is not None else 0))

    def _drained(self, session: Any) -> None:
        """If all is with the kernel: say so to the peer, and close when it has taken it, has closed too, or LINGER is over."""
        if session.is_gone():
            return
        if session.unsent or session.posted:
            if session.deadline is None and not session.is_open():
                session.deadline = self.engine.call_later(DRAIN, 0, self.post, self._overdue, session)
            return
        if session.is_open():               # a half-close asked for by the user
            self._send_fin(session)
            if session.eof:
                self.close_session(session, True, None, None)
            return
        if not session.move("sent"):
            return
        waits = _unacknowledged(session.socket) > session.fin       # a FIN counts as a byte
        if self._send_fin(session) and not session.eof and self._discard(session) and waits:
            self._linger(session, 0.01, LINGER)
        elif not session.is_gone():
            self.post(self._closed, session)        # behind the on_sent that are in the mail

    def _linger(self, session: Any, pause: float, left: float) -> None:
        """Look again, after 10, 20, 40 ... ms, whether the peer's system has all; a delayed ACK takes 40 ms."""
        if session.is_gone():
            return
        if left <= 0 or _unacknowledged(session.socket) <= 1:
            self.post(self._closed, session)
            return
        if session.deadline is not None:
            session.deadline.cancel()
        session.deadline = self.engine.call_later(pause, 0, self.post, self._linger, session, 2 * pause, left - pause)

    def _send_fin(self, session: Any) -> bool:
        try:
            session.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return False                    # the peer is gone already
        return True

    def _discard(self, session: Any) -> bool:
        """Throw away what still comes. False when nothing will come any more; then a drained session is closed."""
        for _ in range(DISCARD_BUDGET):
            try:
                if session.socket.recv_into(self.scratch):
                    continue
            except (BlockingIOError, InterruptedError):
                return True
            except OSError as error:
                self.post(self._closed, session, error)
                return False
            session.eof = True
            if session.unsent:
                self._watch_closing(session)
            else:
                self.post(self._drained_to_end, session)
            return False
        return True

    def _drained_to_end(self, session: Any) -> None:
        """The peer has closed too: nothing is left to wait for, unless something is still to be sent."""
        if session.is_gone() or session.unsent or session.posted:
            return
        if session.is_ended():
            self.post(self._closed, session)

    def _closed(self, session: Any, error: Optional[OSError] = None) -> None:
        """The end: out of the tables, out of the epoll, buffers back, then on_closed; each session once."""
        with self.lock:
            if not session.move("closed"):
                return
        sock = session.socket
        fd = -1 if sock is None else sock.fileno()
        if fd in self.owned and self.owned[fd] is session:
            del self.owned[fd]
            self.streams[fd] = None
            self.others.pop(fd, None)
            if session.interest:
                self.poller.unregister(fd)
                session.interest = 0
        if sock is not None:
            if session.aborted and sock.family != getattr(socket, "AF_UNIX", None):
                try:                        # a reset: the kernel keeps nothing for a peer that does not read
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                except OSError:
                    pass                    # not connected any more
            self.doomed.append(sock)
        if session.deadline is not None:
            session.deadline.cancel()
            session.deadline = None
        self.sessions -= 1
        self.closed += 1
        session.owner = session.NOBODY
        session.out.clear()
        session.unsent = 0
        if session.sending is not None:
            self.core.end_send(session.sending)
            session.sending = None
        if error is not None:
            session.because(None, error)
        self.core.on_closed(session, session.error)

    def shut(self) -> None:
        """Posted by Engine.stop: abort what is open, close the listeners; the loop ends when all of it is gone."""
        self.stopping = True
        for listener in list(self.listeners):
            self.close_listener(listener)
        for session in list(self.owned.values()):
            self.close_session(session, False, session.SHUTDOWN, None)
            if session.is_ended() and not session.is_gone():
                self.post(self._closed, session)
