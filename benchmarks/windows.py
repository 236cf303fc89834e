"""The benchmarks on Windows' API: the servers run under Wine, with the real CPython for Windows (tests/wine.py).

Speed under Wine says nothing about Windows. What can be said is how leviathan stands to asyncio's proactor and to winloop
(uvloop for Windows) in the same run, and what does not depend on Wine's cost: how many calls each makes per message.

Wine's wineserver is to a program what the kernel is on Windows: several times per message it asks that process for
something and waits for the answer. So it is pinned to the server's core. As on Windows, what the server's calls cost is
spent on its core; one of the two always waits for the other, so nothing is lost; and the load generator keeps the other
core for itself. Tried with echo-1, three rounds: so leviathan has 11,100 to 11,300 messages a second and 1.34 to 1.37
times the proactor's; with the wineserver on the load's core 2,600 to 2,700 (a wake-up on the other core costs more than
the work) and 1.18 to 1.24 times; with nothing pinned anything from 1,400 to 11,000, and the ratios say nothing.
"""
import contextlib
import functools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque

from build import compiled
from cases import MIB, RELATIVE, Bars, Case, ECHO_ALSO, ECHO_COLUMNS, Suite, Target, Unavailable, measure_echo
from harness import READY_WITHIN, ROOT, Failed, Server, cores, cpu_seconds, machine, pinning

sys.path.append(os.path.join(ROOT, "tests"))

import wine     # noqa: E402

ATTEMPTS = 5            # perf may miss a thread that begins or ends while it attaches, and says so

INTRODUCTION = """# Benchmarks on Windows' API, under Wine

Made by `python benchmarks/run.py --wine --write`; do not edit. What is measured and how to read it is told in
[benchmarks/README.md](../benchmarks/README.md).

**Speed under Wine says nothing about speed on Windows.** A call costs several requests to another process there, so
that neither these figures nor their ratios are to be expected of Windows. What they compare is leviathan with asyncio's
proactor and with winloop in the same run. The counts of Windows calls per message (`calls-1`, `calls-16`, `calls-4k`) do
not depend on what a call costs; how many completions one call of GetQueuedCompletionStatusEx takes does, for it takes as
many as are there.

![Throughput relative to asyncio's proactor](benchmarks-windows.svg)"""


# ---- a server under Wine -----------------------------------------------------------------------------------------


def wineserver():
    """The process id of the wineserver of our prefix. It has no other sign than the folder it runs in."""
    prefix = os.stat(os.path.join(wine.cache(), "prefix"))
    folder = "server-%x-%x" % (prefix.st_dev, prefix.st_ino)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):      # it is gone, or not ours
            with open("/proc/%s/comm" % pid) as file:
                name = file.read()
            if name.startswith("wineserver") and os.path.basename(os.readlink("/proc/%s/cwd" % pid)) == folder:
                return int(pid)
    raise Failed("Wine's wineserver does not run")


class WineServer(Server):
    """A server process of CPython for Windows; the wineserver shares its core while it runs."""

    def __init__(self, name, arguments=(), pinned=True):
        super().__init__(name, arguments, pinned)
        self.command, self.environment = wine.command(self.command[1:])     # without Linux' Python
        self.wineserver = None          # its process id, while this server runs

    def __enter__(self):
        try:
            wine.warm()
        except wine.WineError as error:
            raise Failed(str(error))
        super().__enter__()
        try:
            self.wineserver = wineserver()
            self._pin_wineserver({cores()[0]} if self.pinned and cores() else None)
        except BaseException:
            self.stop()
            raise
        return self

    def _pin_wineserver(self, where):
        with contextlib.suppress(OSError):      # it has ended
            os.sched_setaffinity(self.wineserver, where or os.sched_getaffinity(0))

    def spawn(self):
        """Start the process. Its standard handles must be pipes; what it says at last is kept for a message."""
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=pinning(0 if self.pinned else None), env=self.environment)
        self.errors = deque(maxlen=20)
        self.reader = threading.Thread(target=self.errors.extend, args=(process.stderr,), daemon=True)
        self.reader.start()
        return process

    def error_text(self):
        """What it wrote to stderr, the last lines."""
        self.reader.join(1)
        return b"".join(self.errors)

    def stop(self):
        """Kill it, and whatever Wine started for it."""
        try:
            super().stop()
        finally:
            wine.end(self.environment)
            if self.wineserver:
                self._pin_wineserver(None)
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.reader.join(5)
            if not self.reader.is_alive():
                self.process.stderr.close()

    def load(self, mode, **options):
        """The same, and the wineserver's share of its time (of the same core)."""
        try:
            before, begun = cpu_seconds(self.wineserver), time.perf_counter()
            result = super().load(mode, **options)
            result["wineserver_busy"] = (cpu_seconds(self.wineserver) - before) / (time.perf_counter() - begun)
        except FileNotFoundError:
            raise Failed("Wine's wineserver has ended meanwhile" + self.last_words())
        return result

    def calls(self):
        """{name: Windows calls so far}; the server must be --counted."""
        with contextlib.suppress(OSError):      # it has ended, and does not answer
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        line = b""
        if select.select([self.process.stdout], [], [], READY_WITHIN)[0]:
            line = self.process.stdout.readline()
        if not line:
            raise Failed("does not tell its calls" + self.last_words())
        return json.loads(line.decode())


# ---- how each is measured ----------------------------------------------------------------------------------------

# {figure: what perf counts}, of the server and of the wineserver. A request to the wineserver is one write (writev if
# it carries data) by the server, which writes nothing else: what goes to sockets is sent by sendmsg.
SERVER_EVENTS = {"raw_syscalls:sys_enter": "linux", "syscalls:sys_enter_write": "requests",
                 "syscalls:sys_enter_writev": "requests"}
WINESERVER_EVENTS = {"raw_syscalls:sys_enter": "wineserver"}


@functools.lru_cache()
def perf_works():
    """True if perf is installed and may count system calls."""
    if not shutil.which("perf"):
        return False
    return not subprocess.run(["perf", "stat", "-x,", "-e", ",".join(SERVER_EVENTS), "--", "true"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def perf(pid, events, output):
    """The beginning of a command line: the rest of it is run, and what that process does meanwhile is counted."""
    return ["perf", "stat", "-x,", "-o", output, "-e", ",".join(events), "-p", str(pid), "--"]


def read_perf(path, events):
    """{figure: count} as perf wrote it; Failed if it missed some."""
    figures = dict.fromkeys(events.values(), 0)
    with open(path) as file:
        rows = [line.split(",") for line in file if re.match("[0-9<]", line)]
    if len(rows) != len(events) or not all(row[0].isdigit() for row in rows):
        raise Failed("perf could not count")
    for row in rows:
        figures[events[row[2]]] += int(row[0])
    return figures


def count_once(server, options):
    """Run one load; return the calls made meanwhile, of Windows and of Linux, and the messages."""
    with tempfile.TemporaryDirectory() as folder:
        watched = [(server.process.pid, SERVER_EVENTS, os.path.join(folder, "server")),
                   (server.wineserver, WINESERVER_EVENTS, os.path.join(folder, "wineserver"))] if perf_works() else []
        server.watch = [word for watch in watched for word in perf(watch[0], watch[1], watch[2])]
        before = server.calls()
        counts = {"messages": server.load("echo", **options)["messages"]}
        after = server.calls()
        for _, events, path in watched:
            counts.update(read_perf(path, events))
    counts.update({name: after[name] - before[name] for name in after}, api=sum(after.values()) - sum(before.values()))
    return counts


def count_calls(server, options):
    """The same, tried again while perf misses something."""
    for attempt in range(ATTEMPTS):
        try:
            return count_once(server, options)
        except Failed:
            if attempt == ATTEMPTS - 1 or server.process.poll() is not None:
                raise


def measure_calls(contender, case, settings):
    """Calls per message: what a long load makes more than a short one, so that connecting and closing cancel out."""
    options = {key: case.parameters[key] for key in ("conns", "size", "window")}
    in_flight = options["conns"] * options["window"]
    with WineServer(contender, ["--counted"]) as server:
        server.load("echo", messages=in_flight, **options)
        short = count_calls(server, dict(options, messages=in_flight))
        long = count_calls(server, dict(options, messages=in_flight * case.number("turns", settings)))
    messages = long.pop("messages") - short.pop("messages")
    return {name: (long[name] - short[name]) / messages for name in long}


# ---- the cases ---------------------------------------------------------------------------------------------------

CONTENDERS = ["leviathan", "proactor-natural", "proactor-joined", "winloop-natural", "winloop-joined"]
COLUMNS = ECHO_COLUMNS + [("wineserver_busy", "wineserver busy", "percent")]
CALL_COLUMNS = [("api", "Windows calls", "ratio"), ("WSARecv", "WSARecv", "ratio"), ("WSASend", "WSASend", "ratio"),
                ("GetQueuedCompletionStatus[Ex]", "GetQueued...[Ex]", "ratio"),
                ("PostQueuedCompletionStatus", "PostQueued...", "ratio"), ("CancelIoEx", "CancelIoEx", "ratio"),
                ("linux", "Linux calls", "ratio"), ("requests", "wineserver requests", "ratio"),
                ("wineserver", "wineserver's Linux calls", "ratio")]


def echo_case(name, title, **parameters):
    """Throughput."""
    return Case(name, title, functools.partial(measure_echo, start=WineServer), CONTENDERS, "msgs_per_s", COLUMNS,
                parameters, also=ECHO_ALSO, picture=RELATIVE)


def calls_case(name, title, **parameters):
    """Calls per message."""
    return Case(name, title, measure_calls, CONTENDERS, "api", CALL_COLUMNS, parameters, rounds=3, quick_rounds=1,
                picture=Bars(name, "Windows calls per message; less is better", "ratio"))


CASES = [
    echo_case("echo-1", "50 connections, 64 bytes, 1 in flight", conns=50, size=64, window=1),
    echo_case("echo-16", "50 connections, 64 bytes, 16 in flight", conns=50, size=64, window=16),
    echo_case("echo-4k", "50 connections, 4 KiB, 1 in flight", conns=50, size=4096, window=1),
    echo_case("echo-200", "200 connections, 64 bytes, 1 in flight", conns=200, size=64, window=1,
              warmup=2),        # the proactor takes a second to let them all in
    echo_case("echo-1m", "8 connections, 1 MiB, 1 in flight", conns=8, size=MIB, window=1),
    calls_case("calls-1", "calls per message, 50 connections, 64 bytes, 1 in flight", conns=50, size=64, window=1,
               turns=200, quick_turns=50),
    calls_case("calls-16", "calls per message, 50 connections, 64 bytes, 16 in flight", conns=50, size=64, window=16,
               turns=200, quick_turns=50),
    calls_case("calls-4k", "calls per message, 50 connections, 4 KiB, 1 in flight", conns=50, size=4096, window=1,
               turns=200, quick_turns=50),
]

TARGETS = [Target(case, "msgs_per_s", peer, "at least", 1.0) for case in ("echo-1", "echo-16")
           for peer in ("proactor-natural", "proactor-joined")]
TARGETS += [Target(case, figure, "proactor-" + style, "at most", 1.0)
            for case, style in (("calls-1", "natural"), ("calls-16", "joined"))
            for figure in ("api", "linux", "requests")]


# ---- where and with what -----------------------------------------------------------------------------------------


def prepare(say):
    """Make the load generator, and a CPython for Windows with winloop."""
    compiled("load.c")
    try:
        wine.prepare()
        wine.warm()
    except wine.WineError as error:
        raise Unavailable("wine: %s\nAll of it is done by: python tests/wine.py --install --prepare" % error)
    try:
        wine.add(["winloop"])
    except wine.WineError as error:
        say("winloop cannot be installed and will be missing: %s" % error)
    if not perf_works():
        say("perf cannot count system calls here: those of Linux will be missing")


def versions(settings):
    """Of Wine, and of what runs under it."""
    script = ("import importlib.metadata as m, platform\n"
              "print('CPython for Windows', platform.python_version())\n"
              "for d in m.distributions(): print(d.metadata['name'], d.version)")
    argv, environment = wine.command(["-c", script])
    try:
        lines = [subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, timeout=60).stdout.decode().splitlines()
                 for command in ([argv[0], "--version"], argv)]
    finally:
        wine.end(environment)
    found = {"Wine": lines[0][0].replace("wine-", "", 1)}
    found.update(line.rsplit(" ", 1) for line in lines[1] if line.startswith(("CPython", "winloop")))
    return found


WINE = Suite("benchmarks-windows", CASES, TARGETS, "proactor-natural", "leviathan on Windows' API, under Wine",
             "Echo of length-prefixed packets: messages per second, a natural program on asyncio's proactor being 1.0. "
             "Says nothing about speed on Windows.", INTRODUCTION, prepare,
             functools.partial(machine, "server and wineserver on one core, load generator on the other"), versions)
