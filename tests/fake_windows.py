"""Windows' completion ports, faked on real sockets: leviathan_win runs on any system that has select.poll.

`installed(plan)` puts a FakeApi where leviathan_win has its `api`, and a FakeSocketModule where it has `socket`. Handles of
sockets are file descriptors, handles of ports are made up. Everything else is as on Windows: memory is read and written at
the addresses that were given, an operation's NTSTATUS goes into OVERLAPPED.Internal, and a packet goes to the port, also
after immediate success; an initiation error other than 997 queues nothing. One thread carries out what is pending.

A Plan says what goes wrong. And what the engine does wrong is noted, always, and raised at the end: see `FakeApi.complain`.
Sources: Microsoft's pages of the calls, and RULES.md, section IOCP.
"""
import contextlib
import ctypes
import errno
import heapq
import os
import random
import select
import socket
import struct
import threading
from collections import Counter, deque
from time import monotonic

import leviathan_win

OPERATIONS = ("WSARecv", "WSASend", "AcceptEx", "ConnectEx")
INFINITE = 0xFFFFFFFF
FIRST_PORT = 0x70000000         # handles of ports; far from any file descriptor
JUNK = 31337                    # what last_error() is after a call that succeeded: nobody may look
PIECE = 1 << 18                 # bytes that one receive takes at most

# NTSTATUS (ntstatus.h), and what RtlNtStatusToDosError makes of it.
PENDING = 0x103
CANCELLED = 0xC0000120
_STATUS = {
    0xC0000017: 8, 0xC000009A: 1450, 0xC00000B5: 121, 0xC0000120: 995, 0xC000020D: 64, 0xC0000236: 1225,
    0xC000023C: 1231, 0xC000023D: 1232, 0xC0000241: 1236}
_CODES = {code: status for status, code in _STATUS.items()}
# What Linux says, as what Windows says when an operation completes.
_ERRNO = {
    errno.ECONNRESET: 64, errno.EPIPE: 64, errno.ECONNABORTED: 1236, errno.ETIMEDOUT: 121, errno.ECONNREFUSED: 1225,
    errno.ENETUNREACH: 1231, errno.EHOSTUNREACH: 1232}

# TCPSTATE (mstcpip.h) by Linux' number of the same state (tcp_states.h).
_STATES = {1: 4, 2: 2, 3: 3, 4: 5, 5: 6, 6: 10, 7: 0, 8: 7, 9: 9, 10: 1, 11: 8}


def status_of(code):
    """An NTSTATUS that RtlNtStatusToDosError turns into *code*. FACILITY_NTWIN32 carries what has no own one."""
    return _CODES.get(code, 0xC0070000 | code) if code else 0


class Plan:
    """What goes wrong: the *at*-th *call* (from 1; 0: none) and the next *times* - 1 fail with *code*.

    *stage* "start": the call itself fails; "end": it is pending and its completion fails. For sockets' methods (socket,
    bind, setsockopt, getpeername, shutdown) *code* is an errno. *short*: a send completes after one to that many bytes
    (0: when all is sent). *late*: the part of completions that come later and in any order, and of waits that end early.
    *at_once*: the part of operations that may succeed in the call. *carry*: the part of cancelled operations that are
    tried once more, and may succeed. *held*: operations that stay pending until `FakeApi.release`, cancelled or not ready.
    """

    def __init__(self, call="", at=0, code=0, times=1, stage="start", *, short=0, late=0.0, at_once=0.5, carry=0.0,
                 held=(), seed=1):
        self.call, self.at, self.code, self.times, self.stage = call, at, code, times, stage
        self.short, self.late, self.at_once, self.carry, self.held = short, late, at_once, carry, set(held)
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.counts = Counter()
        self.fired = 0

    def strike(self, call):
        """Count *call*: (its code if it fails now, its code if its completion will fail)."""
        with self.lock:
            self.counts[call] += 1
            if call != self.call or not 0 < self.at <= self.counts[call] < self.at + self.times:
                return 0, 0
            self.fired += 1
        return (self.code, 0) if self.stage == "start" else (0, self.code)

    def strike_socket(self, call):
        """Count a method of a socket; raise if it is the one."""
        code = self.strike(call)[0]
        if code:
            raise OSError(code, os.strerror(code))

    def chance(self, part):
        """True in *part* of all cases."""
        if part <= 0.0 or part >= 1.0:
            return part > 0.0
        with self.lock:
            return self.random.random() < part

    def between(self, least, most):
        with self.lock:
            return self.random.randint(least, most)


class Operation:
    """A call that is outstanding: between it and its packet's dequeuing."""

    def __init__(self, call, sock, address, port, key):
        self.call, self.sock, self.address, self.port, self.key = call, sock, address, port, key
        self.buffer = self.size = 0     # the memory that the system reads or writes
        self.data = b""                 # what is sent: it must not change
        self.done = 0                   # bytes sent
        self.limit = 0                  # bytes that a send takes
        self.other = None               # the socket of an accept, the address of a connect
        self.code = 0                   # what connect() said, if it failed at once
        self.status = 0                 # how it has ended
        self.cancelled = False
        self.finished = False           # carried out; the packet may be kept back

    def events(self):
        return select.POLLIN if self.call in ("WSARecv", "AcceptEx") else select.POLLOUT


class Waiter:
    """A thread that waits at a port. The packet that it is woken for is its own: nobody else can take it."""

    def __init__(self):
        self.asleep = threading.Lock()
        self.asleep.acquire()
        self.packet = None


class FakePort:
    """A completion port: its packets, and who waits for one."""

    def __init__(self):
        self.packets = deque()          # (key, address, status, count)
        self.waiters = []               # a Waiter for each thread, the one that slept first before the others
        self.closed = False


class FakeApi:
    """Stands in for leviathan_win.Api."""

    def __init__(self, plan, module):
        self.plan, self.module = plan, module
        self.lock = threading.Lock()    # guards all of the following
        self.left = threading.Condition(self.lock)      # the thread is not in poll() any more
        self.polled = frozenset()       # the descriptors it waits for in poll()
        self.ports = {}                 # {handle: FakePort}
        self.joined = {}                # {socket: (port's handle, key)}
        self.sockets = {}               # {descriptor: the engine's socket}
        self.operations = {}            # {address: Operation} until its packet is queued
        self.queued = {}                # {address: Operation} from then until it is dequeued
        self.later = []                 # a heap of (when, number, operation, status, count)
        self.number = 0
        self.wrong = []
        self.engines = []
        self.calls = []                 # (call, socket, size) of all that have begun
        self.local = threading.local()
        self.thread = None
        self.ending = False
        self.awake, self.waker = socket.socketpair()
        self.awake.setblocking(False)
        self.waker.setblocking(False)

    def complain(self, text):
        """The engine has broken a rule."""
        self.wrong.append(text)

    def _fail(self, code, result):
        self.local.code = code
        return result

    def _succeed(self, result):
        self.local.code = JUNK
        return result

    # -- what leviathan_win.Api has -----------------------------------------------------------------------------------

    def load_extensions(self):
        """AcceptEx and ConnectEx are here already."""

    def last_error(self):
        return getattr(self.local, "code", JUNK)

    @staticmethod
    def text(code):
        return "text of %d.\r\n" % code

    @staticmethod
    def RtlNtStatusToDosError(status):
        if status >> 16 == 0xC007:
            return status & 0xFFFF
        return _STATUS.get(status, 317)         # ERROR_MR_MID_NOT_FOUND

    def CreateIoCompletionPort(self, handle, port, key, threads):
        code = self.plan.strike("CreateIoCompletionPort")[0]
        with self.lock:
            if code:
                return self._fail(code, None)
            if port is None:
                if handle != ctypes.c_size_t(-1).value:
                    self.complain("CreateIoCompletionPort for a new port wants INVALID_HANDLE_VALUE")
                self.number += 1
                made = FIRST_PORT + 4 * self.number
                self.ports[made] = FakePort()
                return self._succeed(made)
            sock = self.sockets.get(handle)
            if sock is None or port not in self.ports or sock in self.joined:
                self.complain("a socket joins a port twice, or one of them is closed")
                return self._fail(87, None)
            self.joined[sock] = port, key
            return self._succeed(port)

    def CloseHandle(self, handle):
        with self.lock:
            port = self.ports.pop(handle, None)
            if port is None:
                self.complain("CloseHandle of what is no port")
                return self._fail(6, 0)
            port.closed = True
            if port.waiters:
                self.complain("a port is closed while threads wait at it")
            for waiter in port.waiters:
                waiter.asleep.release()
            return self._succeed(1)

    def PostQueuedCompletionStatus(self, handle, count, key, address):
        code = self.plan.strike("PostQueuedCompletionStatus")[0]
        with self.lock:
            if code:
                return self._fail(code, 0)
            port = self.ports.get(handle)
            if port is None:
                self.complain("PostQueuedCompletionStatus to a closed port")
                return self._fail(6, 0)
            self._queue(port, (key, address or 0, 0, count))
            return self._succeed(1)

    def GetQueuedCompletionStatusEx(self, handle, entries, count, removed, timeout, alertable):
        code = self.plan.strike("GetQueuedCompletionStatusEx")[0]
        entry = ctypes.sizeof(self.module.OVERLAPPED_ENTRY)
        with self.lock:
            port = self.ports.get(handle)
            ctypes.c_uint32.from_address(removed).value = 0
            if code or port is None:
                return self._fail(code or 735, 0)
            if alertable or not 0 <= timeout <= INFINITE or count < 1:
                self.complain("GetQueuedCompletionStatusEx: an alertable wait, or no time, or no room")
            if timeout and timeout != INFINITE and self.plan.chance(self.plan.late / 4):
                timeout //= 2                   # it may end early
            packets = [port.packets.popleft() for _ in range(min(count, len(port.packets)))]
            if not packets:
                packet = self._wait(port, -1 if timeout == INFINITE else timeout / 1000) if timeout else None
                if packet is None:
                    return self._fail(735 if port.closed else 258, 0)
                packets = [packet]
            for index, (key, address, status, transferred) in enumerate(packets):
                self.queued.pop(address, None)
                made = self.module.OVERLAPPED_ENTRY(key, address, status, transferred)
                ctypes.memmove(entries + index * entry, ctypes.addressof(made), entry)
            ctypes.c_uint32.from_address(removed).value = len(packets)
            return self._succeed(1)

    def WSAIoctl(self, handle, control, given, given_size, answer, answer_size, returned, overlapped, routine):
        code = self.plan.strike("WSAIoctl")[0]
        with self.lock:
            sock = self.sockets.get(handle)
            if control != self.module.SIO_TCP_INFO or given_size != 4 or answer_size < 88 or overlapped or routine:
                self.complain("WSAIoctl: not SIO_TCP_INFO with a version and room for a TCP_INFO_v0")
            if sock is None or code or not hasattr(socket, "TCP_INFO"):
                return self._fail(code or 10045, -1)
            state = _STATES[sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]]
            ctypes.memmove(answer, struct.pack("I84x", state), 88)
            ctypes.c_uint32.from_address(returned).value = 88
            return self._succeed(0)

    def CancelIoEx(self, handle, address):
        code = self.plan.strike("CancelIoEx")[0]
        with self.lock:
            sock = self.sockets.get(handle)
            if sock is None:
                self.complain("CancelIoEx on what is no socket")
                return self._fail(6, 0)
            mine = [each for each in self.operations.values() if each.sock is sock and address in (None, each.address)]
            for operation in mine:
                operation.cancelled = True
                if not (operation.finished or self.plan.chance(self.plan.carry) and self._attempt(operation)):
                    self._finish(operation, CANCELLED, 0)
            # A planned failure is 1168: all of them had been completed just before.
            return self._fail(code or 1168, 0) if code or not mine else self._succeed(1)

    def WSARecv(self, handle, buffers, count, received, flags, address, routine):
        if count != 1 or received is not None or routine is not None or not flags:
            self.complain("WSARecv: a byte count, a routine, no flags, or not one buffer")
        if ctypes.c_uint32.from_address(flags).value:
            self.complain("WSARecv: flags are not 0")
        return self._transfer("WSARecv", handle, buffers, address)

    def WSASend(self, handle, buffers, count, sent, flags, address, routine):
        if count != 1 or sent is not None or routine is not None or flags:
            self.complain("WSASend: a byte count, a routine, flags, or not one buffer")
        return self._transfer("WSASend", handle, buffers, address)

    def _transfer(self, call, handle, buffers, address):
        code, doom = self.plan.strike(call)
        with self.lock:
            operation = self._begin(call, handle, address)
            if operation is None or code:
                return self._fail(code or 10038, -1)
            buffer = self.module.WSABUF.from_address(buffers)
            operation.buffer, operation.size = buffer.buf, buffer.len
            if call == "WSASend":
                operation.data = ctypes.string_at(buffer.buf, buffer.len)
                operation.limit = operation.size
                if self.plan.short and operation.size > 1:
                    operation.limit = self.plan.between(1, min(operation.size, self.plan.short))
            elif not operation.size:
                self.complain("WSARecv into no room: its end would look like the connection's")
            return 0 if self._start(operation, doom) else -1

    def AcceptEx(self, handle, accepted, output, size, local, remote, received, address):
        code, doom = self.plan.strike("AcceptEx")
        with self.lock:
            operation = self._begin("AcceptEx", handle, address)
            other = self.sockets.get(accepted)
            if operation is None or other is None or code:
                return self._fail(code or 10038, 0)
            if size or local < 28 + 16 or remote < 28 + 16:
                self.complain("AcceptEx waits for data, or has no room for addresses")
            if not received or other.listening or other.accepted:
                self.complain("AcceptEx without a byte count, or into a socket that is used already")
            operation.other, operation.buffer, operation.size = other, output, size + local + remote
            return 1 if self._start(operation, doom) else 0

    def ConnectEx(self, handle, name, size, data, data_size, sent, address):
        code, doom = self.plan.strike("ConnectEx")
        with self.lock:
            operation = self._begin("ConnectEx", handle, address)
            if operation is None or code:
                return self._fail(code or 10038, 0)
            if not operation.sock.getsockname()[1]:
                self.complain("ConnectEx before bind")
                return self._fail(10022, 0)
            if data is not None or data_size:
                self.complain("ConnectEx with data")
            operation.buffer, operation.size = name, size
            operation.other = self._address(operation.sock, ctypes.string_at(name, size))
            return 1 if self._start(operation, doom) else 0

    @staticmethod
    def _address(sock, name):
        family, port = struct.unpack("=H", name[:2])[0], struct.unpack("!H", name[2:4])[0]
        if family != sock.family or len(name) != (16 if family == socket.AF_INET else 28):
            raise AssertionError("a sockaddr of a wrong family or length: %r" % name)
        if family == socket.AF_INET:
            return socket.inet_ntop(family, name[4:8]), port
        return (socket.inet_ntop(family, name[8:24]), port, struct.unpack("!I", name[4:8])[0],
                struct.unpack("=I", name[24:])[0])

    # -- operations; the lock is held ---------------------------------------------------------------------------------

    def _begin(self, call, handle, address):
        """The rules of every call. None: it cannot be made."""
        sock = self.sockets.get(handle)
        if sock is None or sock not in self.joined:
            self.complain("%s on what is no socket, or has no port" % call)
            return None
        if address in self.operations or address in self.queued:
            self.complain("%s: its OVERLAPPED is that of an operation that is pending" % call)
            return None
        if call != "AcceptEx" and any(each.sock is sock and each.call == call for table in (self.operations, self.queued)
                                      for each in table.values()):
            self.complain("%s while another one is outstanding on the same socket" % call)
        overlapped = self.module.OVERLAPPED.from_address(address)
        if overlapped.hEvent or overlapped.Offset or overlapped.OffsetHigh:
            self.complain("%s: the OVERLAPPED is not clear" % call)
        return Operation(call, sock, address, *self.joined[sock])

    def _start(self, operation, doom):
        """True: it has succeeded at once, and its packet comes all the same."""
        self.calls.append((operation.call, operation.sock, operation.size))
        self.operations[operation.address] = operation
        if not self._pinned(operation):
            self.complain("%s: its record is not in engine.pending when the call is made" % operation.call)
        self.module.OVERLAPPED.from_address(operation.address).Internal = PENDING
        if doom:
            self._finish(operation, status_of(doom), 0)
            return self._fail(997, False)
        if operation.call == "ConnectEx":
            code = operation.sock.connect_ex(operation.other)
            operation.code = 0 if code in (errno.EINPROGRESS, errno.EWOULDBLOCK) else code
        if operation.call not in self.plan.held and self.plan.chance(self.plan.at_once) and self._attempt(operation):
            return self._fail(997, False) if operation.status else self._succeed(True)
        self._wake()
        return self._fail(997, False)

    def _pinned(self, operation):
        """True while the engine keeps the record, and the memory that it speaks of, for the system."""
        for engine in self.engines:
            record = engine.pending.get(operation.address)
            if record is not None:
                break
        else:
            return False
        keep = record.keep
        if keep is None or record.target is None:
            return False
        if operation.call == "AcceptEx":
            return keep[0] is operation.other and ctypes.addressof(keep[1]) == operation.buffer and \
                ctypes.sizeof(keep[1]) >= operation.size
        if operation.call == "ConnectEx":
            return ctypes.addressof(keep) == operation.buffer and ctypes.sizeof(keep) >= operation.size
        buffer = keep
        if operation.call == "WSASend":
            sending, pointer = keep
            buffer = sending.buffer
            if sending.session is not record.target:
                return False                        # it was given back
            if buffer is None:
                first = ctypes.cast(pointer, ctypes.c_void_p).value
                return first <= operation.buffer and operation.buffer + operation.size <= first + len(sending.view.obj)
        first = ctypes.addressof(buffer.array)
        free = record.target.communicator.manager._free.get(buffer.power, ())
        return first <= operation.buffer and operation.buffer + operation.size <= first + buffer.size and \
            not (buffer.pooled and buffer in free)

    def _attempt(self, operation):
        """Carry it out, if it can be; True if it has ended."""
        if operation.finished:
            return True
        if not self._pinned(operation):
            # The system would write into memory that belongs to nobody, or to somebody else.
            self.complain("%s: its record or its buffer was given back before its end" % operation.call)
            self._finish(operation, CANCELLED, 0)
            return True
        try:
            count = getattr(self, "_do_" + operation.call)(operation)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._finish(operation, status_of(_ERRNO.get(error.errno, 64)), 0)
            return True
        if count is None:
            return False
        self._finish(operation, 0, count)
        return True

    @staticmethod
    def _do_WSARecv(operation):
        data = operation.sock.recv(min(operation.size, PIECE))
        ctypes.memmove(operation.buffer, data, len(data))
        return len(data)

    @staticmethod
    def _do_WSASend(operation):
        while operation.done < operation.limit:
            operation.done += operation.sock.send(memoryview(operation.data)[operation.done:operation.limit])
        return operation.done

    @staticmethod
    def _do_AcceptEx(operation):
        descriptor, _ = operation.sock._accept()
        os.dup2(descriptor, operation.other.fileno(), inheritable=False)
        os.close(descriptor)
        os.set_blocking(operation.other.fileno(), False)
        operation.other.accepted = True
        ctypes.memmove(operation.buffer, b"\xaa" * operation.size, operation.size)
        return 0

    @staticmethod
    def _do_ConnectEx(operation):
        if operation.code:
            raise OSError(operation.code, os.strerror(operation.code))
        poller = select.poll()
        poller.register(operation.sock, select.POLLOUT)
        if not poller.poll(0):
            return None                         # not yet
        code = operation.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        socket.socket.getpeername(operation.sock)       # raises if it was reset already
        operation.sock.dialled = True
        return 0

    def _finish(self, operation, status, count):
        """It is carried out: its packet comes now, or later."""
        operation.finished, operation.status = True, status
        sock = operation.sock
        # Who comes first is let in first: the accepts of one listener do not overtake each other.
        behind = operation.call == "AcceptEx" and sock.delayed
        if not (behind or self.plan.chance(self.plan.late)):
            self._tell(operation, status, count)
            return
        sock.delayed += 1
        sock.until = max(sock.until if behind else 0.0, monotonic() + self.plan.between(0, 1500) / 1e6)
        self.number += 1
        heapq.heappush(self.later, (sock.until, self.number, operation, status, count))
        self._wake()

    def _tell(self, operation, status, count):
        """Write the result and queue the packet."""
        if operation.call == "WSASend" and ctypes.string_at(operation.buffer, operation.size) != operation.data:
            self.complain("WSASend: its bytes were changed before its end")
        del self.operations[operation.address]
        if self._pinned(operation):
            overlapped = self.module.OVERLAPPED.from_address(operation.address)
            overlapped.Internal, overlapped.InternalHigh = status, count
        else:
            self.complain("%s: its record or its buffer was given back before its completion" % operation.call)
        port = self.ports.get(operation.port)
        if port is None:
            self.complain("%s completes at a port that was closed" % operation.call)
            return
        self.queued[operation.address] = operation
        self._queue(port, (operation.key, operation.address, status, count), operation.call == "AcceptEx")

    def _queue(self, port, packet, in_order=False):
        if port.waiters:
            # Windows hands it to the one that slept last: the others never learn of it ("I/O Completion Ports").
            index = self.plan.between(0, len(port.waiters) - 1) if self.plan.late else -1
            waiter = port.waiters.pop(index)
            waiter.packet = packet
            waiter.asleep.release()
        elif port.packets and not in_order and self.plan.chance(self.plan.late):
            port.packets.insert(self.plan.between(0, len(port.packets)), packet)
        else:
            port.packets.append(packet)

    def _wait(self, port, seconds):
        """Let go of the lock until a packet comes, which is returned; None when *seconds* (-1: no limit) are over."""
        waiter = Waiter()
        port.waiters.append(waiter)
        self.lock.release()
        try:
            waiter.asleep.acquire(timeout=seconds)
        finally:
            self.lock.acquire()
            if waiter in port.waiters:
                port.waiters.remove(waiter)
        return waiter.packet

    # -- the thread that carries out what is pending ------------------------------------------------------------------

    def _wake(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="fake-windows", daemon=True)
            self.thread.start()
        try:
            self.waker.send(b"x")
        except BlockingIOError:
            pass                        # enough of them are there

    def _run(self):
        while True:
            with self.lock:
                if self.ending:
                    return
                poller = select.poll()
                poller.register(self.awake, select.POLLIN)
                wanted = {}
                for operation in self.operations.values():
                    if not operation.finished and operation.call not in self.plan.held:
                        number = operation.sock.fileno()
                        wanted[number] = wanted.get(number, 0) | operation.events()
                for number, events in wanted.items():
                    poller.register(number, events)
                self.polled = frozenset(wanted)
                timeout = None
                if self.later:
                    timeout = max(0.0, self.later[0][0] - monotonic()) * 1000
            ready = dict(poller.poll(timeout))
            with self.lock:
                self.polled = frozenset()
                self.left.notify_all()
                if ready.pop(self.awake.fileno(), 0):
                    with contextlib.suppress(BlockingIOError):
                        self.awake.recv(4096)
                self._carry_out(ready)

    def _carry_out(self, ready):
        now = monotonic()
        while self.later and self.later[0][0] <= now:
            _, _, operation, status, count = heapq.heappop(self.later)
            operation.sock.delayed -= 1
            self._tell(operation, status, count)
        for operation in list(self.operations.values()):
            events = 0 if operation.finished else ready.get(operation.sock.fileno(), 0)
            if events & (operation.events() | select.POLLERR | select.POLLHUP) and operation.call not in self.plan.held:
                self._attempt(operation)

    # -- for the sockets and the tests --------------------------------------------------------------------------------

    def closing(self, sock):
        """*sock* is about to be closed; the lock is held."""
        number = sock.fileno()
        for operation in [each for each in self.operations.values() if each.sock is sock or each.other is sock]:
            if not (operation.cancelled or operation.call == "AcceptEx" and operation.other is not sock):
                self.complain("a socket is closed while its %s is pending and was not cancelled" % operation.call)
            if not operation.finished:
                self._finish(operation, CANCELLED, 0)
        while number in self.polled:            # poll() would keep the connection open until it returns
            self._wake()
            self.left.wait(1)
        self.joined.pop(sock, None)
        self.sockets.pop(number, None)

    def release(self, *calls):
        """Let what was held go on."""
        with self.lock:
            self.plan.held.difference_update(calls)
            self._wake()

    def pending(self, call=None):
        """How many operations are pending."""
        with self.lock:
            return sum(1 for each in self.operations.values() if call in (None, each.call))

    def sizes(self, call, sock=None):
        """The sizes of all *call* so far, in their order."""
        with self.lock:
            return [size for name, target, size in self.calls if name == call and sock in (None, target)]

    def end(self):
        """What the engine did wrong, all in all; the thread ends."""
        with self.lock:
            for operation in list(self.operations.values()) + list(self.queued.values()):
                self.complain("%s is left at the end" % operation.call)
            for sock in list(self.sockets.values()):
                self.complain("a socket is left open at the end: %r" % sock)
                self.sockets.pop(sock.fileno(), None)
                socket.socket.close(sock)
            for handle in self.ports:
                self.complain("a port is left at the end")
            for engine in self.engines:
                if engine.pending:
                    self.complain("engine.pending has %d records at the end" % len(engine.pending))
                if not engine.ended and engine.port.handle in self.ports:       # the test has failed: let its threads end
                    engine.stopping = engine.ended = True
            for port in self.ports.values():
                port.closed = True
                for waiter in port.waiters:
                    waiter.asleep.release()
                port.waiters = []
            self.ending = True
            wrong = list(self.wrong)
        if self.thread is not None:
            self._wake()
            self.thread.join()
        self.awake.close()
        self.waker.close()
        return wrong


def _socket_class(api):
    class FakeSocket(socket.socket):
        """A real socket that behaves as one of Windows does where that differs, and counts in the plan."""

        def __init__(self, *args, **options):
            api.plan.strike_socket("socket")
            super().__init__(*args, **options)
            self.setblocking(False)             # it is the fake that reads and writes
            self.listening = self.accepted = self.dialled = self.updated = False
            self.delayed, self.until = 0, 0.0       # its completions that are kept back, and until when
            api.sockets[self.fileno()] = self

        def close(self):
            with api.lock:
                if self.fileno() != -1:
                    api.closing(self)
                super().close()

        def bind(self, address):
            api.plan.strike_socket("bind")
            super().bind(address)

        def listen(self, *args):
            super().listen(*args)
            self.listening = True

        def setsockopt(self, level, name, value, *length):
            if name in (leviathan_win.SO_UPDATE_ACCEPT_CONTEXT, leviathan_win.SO_UPDATE_CONNECT_CONTEXT):
                api.plan.strike_socket("setsockopt")
                self._update(level, name, value, *length)
            elif (level, name) == (socket.SOL_SOCKET, FakeSocketModule.SO_EXCLUSIVEADDRUSE):
                # On Linux the port of connections that are there, or that were, would not be free without this.
                super().setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            elif (level, name) == (socket.SOL_SOCKET, socket.SO_REUSEADDR):
                api.complain("SO_REUSEADDR: another process could take the port over")
            elif (level, name) == (socket.SOL_SOCKET, socket.SO_LINGER):
                super().setsockopt(level, name, struct.pack("ii", *struct.unpack("HH", value)))     # a LINGER of two WORDs
            else:
                super().setsockopt(level, name, value, *length)

        def _update(self, level, name, value, *length):
            if name == leviathan_win.SO_UPDATE_ACCEPT_CONTEXT:
                listener = api.sockets.get(struct.unpack("@P", value)[0])
                right = self.accepted and listener is not None and listener.listening
            else:
                right = self.dialled and value is None and length == (0,)
            if level != socket.SOL_SOCKET or not right:
                api.complain("SO_UPDATE_..._CONTEXT of what is not connected, or with a wrong value")
                raise OSError(errno.EINVAL, "SO_UPDATE_..._CONTEXT")
            self.updated = True

        def ioctl(self, control, value):
            if (control, len(value)) != (FakeSocketModule.SIO_KEEPALIVE_VALS, 3):
                api.complain("an ioctl that is not known")

        def getpeername(self):
            api.plan.strike_socket("getpeername")
            self._connected("getpeername")
            return super().getpeername()

        def shutdown(self, how):
            api.plan.strike_socket("shutdown")
            self._connected("shutdown")
            super().shutdown(how)

        def _connected(self, call):
            if not self.updated:
                api.complain("%s before SO_UPDATE_..._CONTEXT" % call)
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    return FakeSocket


class FakeSocketModule:
    """Stands in for the module `socket`."""

    SO_EXCLUSIVEADDRUSE = ~socket.SO_REUSEADDR
    SIO_KEEPALIVE_VALS = 0x98000004

    def __init__(self, api):
        self.socket = _socket_class(api)

    def __getattr__(self, name):
        return getattr(socket, name)


@contextlib.contextmanager
def installed(plan=None, module=leviathan_win):
    """Within this, engines of *module* run on a FakeApi, which this gives. Raises at the end if a rule was broken."""
    api = FakeApi(plan or Plan(), module)
    begin = module.Engine.__init__
    before = module.api, module.socket

    def made(engine, *args):
        begin(engine, *args)
        api.engines.append(engine)

    module.api, module.socket, module.Engine.__init__ = api, FakeSocketModule(api), made
    try:
        yield api
    except BaseException:
        api.end()
        raise
    else:
        wrong = api.end()
        assert not wrong, "\n".join(["%d rules broken:" % len(wrong)] + wrong[:10])
    finally:
        module.api, module.socket = before
        module.Engine.__init__ = begin
