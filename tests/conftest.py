"""What the tests share: servers on free ports, sockets with timeouts, and a proof after each that nothing leaked."""
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import leviathan  # noqa: E402

DEADLINE = 10.0         # seconds until a test gives up waiting: long, since only a failing test waits so long
_TICK = threading.Event()       # never set: its wait() is a short pause between two looks
WINDOWS = sys.platform == "win32"
WINE = WINDOWS and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")
# Bytes that an idle session holds: on a completion port its next receive is armed, and that needs a RecvBuf.
INBOX = leviathan.RECV_BUFFER if WINDOWS else 0
# The signals that end a program: what a user types, and what a service manager sends. Wine has no Ctrl-Break.
STOPS = [signal.SIGINT] + ([] if WINE else [signal.SIGBREAK if WINDOWS else signal.SIGTERM])
only_pinned = pytest.mark.skipif(WINDOWS, reason="on a completion port the system picks the thread (I1), so none can be "
                                                 "chosen: E2 is about epolls")


def eventually(predicate, deadline=DEADLINE):
    """Look until predicate() is true and return what it said; AssertionError after *deadline* seconds."""
    end = time.monotonic() + deadline
    while True:
        result = predicate()
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError("not within %s s: %s" % (deadline, predicate))
        _TICK.wait(0.003)


class Child(subprocess.Popen):
    """A Python program as a process that can be interrupted, on Windows and under Wine too."""

    def __init__(self, *arguments, **options):
        self.mark = "leviathan-test-" + uuid.uuid4().hex            # to find it among Linux' processes
        if WINDOWS:
            options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP if not WINE else 0
        command = [sys.executable] + (["-X", self.mark] if WINE else []) + [str(argument) for argument in arguments]
        super().__init__(command, **options)

    def interrupt(self, number=STOPS[-1]):
        """Send the signal, as Ctrl-C or Ctrl-Break on Windows."""
        if not WINDOWS:
            self.send_signal(number)
        elif not WINE:                      # a process group of its own does not hear Ctrl-C
            self.send_signal(signal.CTRL_BREAK_EVENT)
        else:                               # Wine makes a Ctrl-C of SIGINT, and has no other way to send one
            for pid in filter(str.isdigit, os.listdir("Z:/proc")):
                try:
                    with open("Z:/proc/%s/cmdline" % pid, "rb") as file:
                        found = self.mark.encode() in file.read()
                except OSError:
                    continue                # it has ended meanwhile
                if found:
                    subprocess.run(["start", "/unix", "/bin/kill", "-INT", pid], check=True)
                    return
            raise AssertionError("it is not among the processes")


class Log:
    """A list that several threads append to, and that can be waited for."""

    def __init__(self):
        self.items = []
        self.changed = threading.Condition()

    def add(self, *item):
        """Append; a single argument as it is, several as a tuple."""
        with self.changed:
            self.items.append(item[0] if len(item) == 1 else item)
            self.changed.notify_all()

    def wait(self, count=1, deadline=DEADLINE):
        """The items, once there are *count* of them."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.items) >= count, deadline), \
                "%d of %d items within %s s: %r" % (len(self.items), count, deadline, self.items[-5:])
            return list(self.items)

    def __len__(self):
        return len(self.items)


def connect(listener, timeout=DEADLINE, **options):
    """A client's socket, connected to a Listener or an address."""
    address = getattr(listener, "address", listener)
    if isinstance(address, str):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        client = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(timeout)
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    try:
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def read_exactly(client, size):
    """*size* bytes; AssertionError when the connection ends before."""
    data = bytearray()
    while len(data) < size:
        part = client.recv(min(1 << 18, size - len(data)))
        assert part, "the connection ended after %d of %d bytes" % (len(data), size)
        data += part
    return bytes(data)


def read_to_end(client):
    """Everything until the connection ends, by FIN or by reset."""
    data = bytearray()
    while True:
        try:
            part = client.recv(1 << 18)
        except ConnectionError:
            part = b""
        if not part:
            return bytes(data)
        data += part


def frame(packet):
    """*packet* behind a 4-byte big-endian length."""
    return struct.pack(">I", len(packet)) + packet


def read_frame(client):
    """The content of one such packet."""
    return read_exactly(client, struct.unpack(">I", read_exactly(client, 4))[0])


def echo(session, packet):
    session.send(packet)


PATIENT = {"idle_timeout": 1000, "packet_timeout": 1000}        # timeouts that no test waits for: see `silence`


def silence(server, session, look=True, clocks=("last", "since")):
    """As if nothing had been heard of a session for longer than its timeouts; then *look* for such, as the timer does."""
    done = Log()

    def silent():
        for clock in clocks:
            if getattr(session, clock):
                setattr(session, clock, getattr(session, clock) - 2000)
        if look:
            server.communicator._sweep()
        server.queue.post(done.add, True)               # behind what that has begun

    server.queue.post(silent)
    done.wait()


class Server:
    """A Communicator that listens and runs, its callbacks noted in `log` as (name, session, ...)."""

    def __init__(self, harness, framing=None, on_packet=echo, *, listen=True, start=True, threads=1, **settings):
        self.log = Log()
        self.connected = Log()
        self.ended = Log()          # (session, reason, error)
        self.harness = harness
        self.manager = settings.setdefault("manager", None) or harness.manager()
        settings["manager"] = self.manager
        if settings.get("queue") is None:
            settings["queue"] = harness.queue(threads)
        user_connect, user_disconnect = settings.get("on_connect"), settings.get("on_disconnect")

        def on_connect(session):
            self.log.add("connect", session)
            self.connected.add(session)
            if user_connect is not None:
                user_connect(session)

        def on_packet_noted(session, packet):
            self.log.add("packet", session)
            on_packet(session, packet)

        def on_disconnect(session, reason, error):
            self.log.add("disconnect", session)
            self.ended.add(session, reason, error)
            if user_disconnect is not None:
                user_disconnect(session, reason, error)

        settings["on_connect"], settings["on_disconnect"] = on_connect, on_disconnect
        self.communicator = leviathan.Communicator(framing or leviathan.LengthPrefix(4), on_packet_noted, **settings)
        self.queue = self.communicator.queue
        self.list = harness.add(leviathan.CommunicatorList(self.communicator))
        self.listener = self.communicator.listen(0) if listen else None
        if start:
            self.list.start()

    @property
    def address(self):
        return self.listener.address

    def client(self, **options):
        """A socket connected to the server; closed after the test."""
        return self.harness.connect(self.listener, **options)

    def pair(self, **options):
        """(client's socket, the server's session for it)."""
        before = len(self.connected)        # among these may be one of the same port: the system gives it again
        client = self.client(**options)
        name = client.getsockname()[:2]
        return client, eventually(lambda: next((session for session in self.connected.wait(before + 1)[before:]
                                                if session.peer == name), None))

    def stop(self, timeout=leviathan.STOP_TIMEOUT):
        return self.list.stop(timeout)


class Harness:
    """Makes what a test needs and takes it down afterwards."""

    def __init__(self):
        self.managers, self.lists, self.queues, self.sockets = [], [], [], []

    def manager(self, **settings):
        manager = leviathan.SessionManager(**settings)
        self.managers.append(manager)
        return manager

    def queue(self, threads=1, **settings):
        queue = leviathan.EventQueue(threads, **settings)
        self.queues.append(queue)
        return queue

    def add(self, members):
        self.lists.append(members)
        return members

    def keep(self, sock):
        """Have a socket closed after the test."""
        self.sockets.append(sock)
        return sock

    def connect(self, listener, **options):
        return self.keep(connect(listener, **options))

    def serve(self, framing=None, on_packet=echo, **settings):
        return Server(self, framing, on_packet, **settings)

    def close(self):
        for sock in self.sockets:
            sock.close()
        for members in self.lists:
            members.stop(2.0)
        for queue in self.queues:
            queue.stop()
        for manager in self.managers + list(leviathan._default_manager):
            statistics = manager.statistics()
            left = {name: statistics[name] for name in ("leased", "operations", "sessions", "memory", "waiting")}
            assert not any(left.values()), left


@pytest.fixture(autouse=True)
def harness():
    """Everything a test starts ends with it, and no pool has anything leased then (DESIGN 4)."""
    made = Harness()
    yield made
    made.close()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("leviathan")])


@pytest.fixture
def serve(harness):
    """serve(framing, on_packet, **settings of Communicator): a running Server."""
    return harness.serve
