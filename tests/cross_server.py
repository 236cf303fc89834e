"""The server of test_cross.py: one process, a port for each setting, and an account of itself on request.

    python tests/cross_server.py [SECONDS]      on Linux, or by wine.command([...]) under Wine; that long it drains

The first line on stdout is JSON: the ports, and what this is. Then each line on stdin is a command, a JSON list; `Control`
has them all, and says which are answered by a line of JSON. When it has stopped, by the command or by a signal, it prints a
last report. The end of stdin stops it too, so that it does not outlive its test. Errors are logged to stderr and are in every
report.
"""
import ctypes
import faulthandler
import gc
import json
import logging
import os
import queue
import signal
import socket
import struct
import sys
import threading
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import leviathan        # noqa: E402

BIG = (64 << 20) + 4            # a packet of 64 MiB with its header
SENDERS = 4                     # threads that send what handlers give them
PATTERN = bytes(range(251)) * (-(-(8 << 20) // 251))        # what a "source" sends: a prefix of it
PUSHED = 1 << 15                # bytes of each packet that "push" sends unasked ...
PUSH_EVERY = 0.005              # ... and how often, in seconds
LAST_WORD = 20.0                # seconds until a process that was left alone and does not stop is ended


# --- ports -----------------------------------------------------------------------------------------------------------

class Port:
    """A Communicator and what happened to it: counts of its callbacks, which every test compares with its own."""

    def __init__(self, framing, on_packet, **settings):
        self.lock = threading.Lock()        # guards the counts
        self.connects = self.disconnects = self.packets = self.congested = self.relieved = self.peak = 0
        self.reasons = {}
        self.handler = on_packet
        self.communicator = leviathan.Communicator(framing, self.on_packet, on_connect=self.on_connect,
                                                   on_disconnect=self.on_disconnect,
                                                   on_backpressure=self.on_backpressure, **settings)

    def on_connect(self, session):
        with self.lock:
            self.connects += 1
            self.peak = max(self.peak, self.connects - self.disconnects)

    def on_packet(self, session, packet):
        self.packets += 1                   # a hint for who waits until something has come, hence without the lock
        self.handler(session, packet)

    def on_disconnect(self, session, reason, error):
        with self.lock:
            self.disconnects += 1
            self.reasons[reason.value] = self.reasons.get(reason.value, 0) + 1

    def on_backpressure(self, session, congested):
        with self.lock:
            if congested:
                self.congested += 1
            else:
                self.relieved += 1

    def report(self):
        with self.lock:
            return {"connects": self.connects, "disconnects": self.disconnects, "packets": self.packets,
                    "congested": self.congested, "relieved": self.relieved, "peak": self.peak,
                    "reasons": dict(self.reasons), "sessions": len(self.communicator.sessions),
                    "backlog": sum(session.backlog for session in self.communicator.sessions)}


def source(session, packet):
    """(count, size, close): send so many packets of that size, then perhaps close."""
    count, size, close = struct.unpack(">IIB", packet)
    reply = PATTERN[:size]
    for _ in range(count):
        if not session.send(reply):
            return
    if close:
        session.close()


def count_bytes(session, packet):
    session.data = (session.data or 0) + len(packet)


def tell_count(session):
    """The peer has half-closed: tell it how much came, and close."""
    session.send(b"%d" % (session.data or 0))
    session.close()


class Stress:
    """Checks numbered packets and sends them back three ways: by the handler itself, and by two of the sender threads.

    A packet is connection, number, CRC of the rest, the rest (all integers big-endian, 4 bytes). Each of the three ways
    must keep the order; between them there is none.
    """

    def __init__(self):
        self.wrong = []
        self.todo = [queue.Queue() for _ in range(SENDERS)]
        for each in self.todo:
            threading.Thread(target=self.send, args=(each,), name="sender", daemon=True).start()

    def send(self, todo):
        while True:
            session, packet = todo.get()
            session.send(packet)
            session = packet = None         # keep nothing alive while waiting

    def complain(self, session, text):
        if len(self.wrong) < 10:
            self.wrong.append("%r: %s" % (session, text))

    def on_packet(self, session, packet):
        if session.data is None:
            session.data = [None, 0, threading.Lock()]          # its connection, the next number, held by a handler
        state = session.data
        if not state[2].acquire(False):
            self.complain(session, "two packets are handled at once")
            return
        try:
            connection, number, crc = struct.unpack_from(">III", packet)
            if state[0] is None:
                state[0] = connection
            if (connection, number) != (state[0], state[1]):
                self.complain(session, "%d/%d came instead of %d/%d" % (connection, number, state[0], state[1]))
            if zlib.crc32(packet[12:]) != crc:
                self.complain(session, "%d/%d is damaged" % (connection, number))
            state[1] += 1
            if number % 3:
                self.todo[(session.id + number % 3) % SENDERS].put((session, packet))
            else:
                session.send(packet)
        finally:
            state[2].release()


def make(manager):
    """{name: Port}, the queues they are on, and the Stress."""
    one, four = leviathan.EventQueue(1, "one"), leviathan.EventQueue(4, "four")
    stress = Stress()
    prefix = leviathan.LengthPrefix
    ports = {}

    def port(name, framing, on_packet, on, **settings):
        ports[name] = Port(framing, on_packet, queue=on, manager=manager, name=name, **settings)

    for on, number in ((one, "1"), (four, "4")):
        port("echo-" + number, prefix(4), leviathan.echo, on)
        # The timeout is for a race of Wine 8: a send that begins just when the peer resets may never be completed (asyncio's
        # proactor keeps 5 of 1293 for ever). Without a receive, because of backpressure, nothing else tells of the reset.
        port("source-" + number, prefix(4), source, on, send_limit=1 << 26, idle_timeout=6.0)
    port("big", prefix(4, max_packet=BIG), leviathan.echo, four, send_limit=1 << 28)
    port("overflow", prefix(4), source, one, send_limit=1 << 20)
    port("push", prefix(4), leviathan.echo, four, send_limit=1 << 20)
    port("idle", prefix(4), leviathan.echo, one, idle_timeout=0.4)
    port("packet", prefix(4), leviathan.echo, four, packet_timeout=0.4)
    port("full", prefix(4), leviathan.echo, four, max_clients=4)
    port("eof", prefix(4), count_bytes, four, on_eof=tell_count)
    port("stress", prefix(4), stress.on_packet, four)
    port("out", prefix(4), leviathan.echo, four)
    numbers = iter(range(1 << 30))
    one.engine                      # made now: until 3.12 each lock of Python has a handle on Windows, and these stay
    push = ports["push"].communicator
    four.every(PUSH_EVERY, lambda: len(push.sessions) and push.broadcast(
        struct.pack(">I", next(numbers)) + PATTERN[:PUSHED - 4]))
    return ports, (one, four), stress


# --- what this process holds -----------------------------------------------------------------------------------------

def _windows_handles():
    """(handles of this process, those among them that are files, pipes and sockets).

    Not by GetProcessHandleCount, which says 0 in Wine 8 and does not tell sockets from the rest.
    """
    query = ctypes.WinDLL("ntdll").NtQuerySystemInformation
    query.argtypes, query.restype = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p], ctypes.c_uint32
    size, wanted, status = 1 << 16, ctypes.c_uint32(), 0xC0000004
    with socket.socket() as known:
        while status == 0xC0000004:         # STATUS_INFO_LENGTH_MISMATCH
            size *= 2
            table = ctypes.create_string_buffer(size)
            status = query(64, ctypes.addressof(table), size, ctypes.addressof(wanted))
        if status:
            raise OSError("NtQuerySystemInformation failed: 0x%X" % status)
        # SYSTEM_HANDLE_INFORMATION_EX: count, reserved; then for each object, process, handle, access, creator, type, ...
        found, = struct.unpack_from("=Q", table)
        entries = struct.iter_unpack("=8xQQ6xH8x", table[16:16 + 40 * found])
        types = {handle: kind for process, handle, kind in entries if process == os.getpid()}
        kind = types.pop(known.fileno())
    return len(types), sum(each == kind for each in types.values())


def handles():
    """(all handles, sockets and files) on Windows, (descriptors, sockets) on Linux."""
    if sys.platform == "win32":
        return _windows_handles()
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink("/proc/self/fd/" + number))
        except OSError:
            pass                            # of listdir itself
    return len(names), sum(name.startswith("socket:") for name in names)


class Errors(logging.Handler):
    """Keeps what was logged as an error: a callback, an event or the loop itself raised."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        if len(self.lines) < 20:
            self.lines.append(self.format(record))


class Account:
    """Everything a report says."""

    def __init__(self, ports, queues, stress, manager, errors):
        self.ports, self.queues, self.stress, self.manager, self.errors = ports, queues, stress, manager, errors
        self.attempts_failed = 0

    def report(self):
        gc.collect()
        held, sockets = handles()
        pending = [getattr(operation.complete, "__name__", "free") for each in self.queues
                   for operation in list(getattr(each.engine, "pending", {}).values())]
        pool = self.manager.statistics()
        largest = max(pool["classes"], default=0)
        return {
            "ports": {name: port.report() for name, port in self.ports.items()},
            "pool": {name: pool[name] for name in ("leased", "operations", "sessions", "memory", "waiting")},
            "large": pool["classes"][largest]["made"] if largest > 1 << 21 else 0,
            "accepts": pending.count("_accepted"),
            "pending": sorted(name for name in pending if name != "_accepted"),
            "owned": sum(len(each.engine.owned) for each in self.queues if hasattr(each.engine, "owned")),
            "timers": sum(each.statistics().get("timers", 0) for each in self.queues),
            "live": sum(type(each) is leviathan.Session for each in gc.get_objects()),
            "handles": held, "sockets": sockets,
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "errors": list(self.errors.lines), "wrong": list(self.stress.wrong), "failed": self.attempts_failed,
        }


# --- control ---------------------------------------------------------------------------------------------------------

_saying = threading.Lock()      # one line at a time


def say(**what):
    with _saying:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


class Control:
    """The commands, each a method: ["connect", "127.0.0.1", 80] calls connect("127.0.0.1", 80). What it returns is the answer.

    None is no answer: what these commands cause is printed by another thread, or on stderr.
    """

    def __init__(self, account):
        self.account = account
        self.connectors = []

    def read(self):
        """The thread: os.read, since a thread that is blocked in sys.stdin would hold its lock when Python ends."""
        rest = b""
        while True:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                name, *arguments = json.loads(line.decode())
                faulthandler.dump_traceback_later(LAST_WORD)        # if it takes so long, it hangs: where?
                try:
                    answer = getattr(self, name)(*arguments)
                except Exception as error:
                    answer = {"exception": repr(error)}
                faulthandler.cancel_dump_traceback_later()
                if answer is not None:
                    say(**answer)
        faulthandler.dump_traceback_later(LAST_WORD, exit=True)
        self.stop()

    def report(self):
        return self.account.report()

    def connect(self, host, port):
        """Connect out, and again whenever the connection ends."""
        def failed(connector, error):
            self.account.attempts_failed += 1

        self.connectors.append(self.account.ports["out"].communicator.connect(host, port, reconnect=(0.02, 0.1),
                                                                              on_failure=failed))
        return {}

    def disconnect(self):
        while self.connectors:
            self.connectors.pop().close()
        return {}

    def stop(self):
        """Close everything: leviathan.run returns when it is done."""
        for port in self.account.ports.values():
            port.communicator.close()

    def interrupt(self, name):
        """Raise a signal here: what the C runtime does when the console has an event."""
        signal.raise_signal(getattr(signal, name))

    def dump(self):
        """Where every thread is, on stderr."""
        faulthandler.dump_traceback(all_threads=True)


def warm_up():
    """What the system opens once and keeps is opened now, not counted as a leak later."""
    queue = leviathan.EventQueue(1, "warm")
    server = leviathan.Communicator(leviathan.LengthPrefix(4), leviathan.echo, queue=queue,
                                    manager=leviathan.SessionManager(max_sessions=10))
    address = server.listen(0).address
    server.connect(*address)
    members = leviathan.CommunicatorList(server)
    members.start()
    with socket.create_connection(address, LAST_WORD) as client:
        client.sendall(b"\0\0\0\1x")
        client.recv(5)
    members.stop(LAST_WORD)


def main(timeout=LAST_WORD):
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    errors = Errors()
    logging.getLogger().addHandler(errors)
    manager = leviathan.SessionManager(max_sessions=5000)
    warm_up()
    ports, queues, stress = make(manager)
    held, sockets = handles()
    account = Account(ports, queues, stress, manager, errors)
    addresses = {name: port.communicator.listen(0).address for name, port in ports.items() if name != "out"}

    def ready():
        threading.Thread(target=Control(account).read, name="control", daemon=True).start()
        say(ports=addresses, engine=leviathan._engine.NAME, python=sys.version, pid=os.getpid(),
            handles=held, sockets=sockets, gil=getattr(sys, "_is_gil_enabled", lambda: True)())

    drained = leviathan.run(*(port.communicator for port in ports.values()), timeout=timeout, on_ready=ready)
    say(final=True, drained=drained, **account.report())


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
