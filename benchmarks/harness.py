"""Starts servers and load, each on its own core, and looks at the server's memory and processor time.

Nothing here knows a case or prints a result: see cases.py and run.py. Servers under Wine: windows.py.
"""
import fcntl
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

from build import cache_folder, compiled

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
READY_WITHIN = 20.0     # seconds; the slowest peer takes half a second to import
STOP_WITHIN = 5.0       # seconds until a server that was asked to stop is killed

# mallopt(3): keep freed memory instead of mapping and faulting in each large block anew. By default glibc maps what is
# larger than 128 KiB, until the program happens to free such a block. asyncio takes a block of 256 KiB for each recv
# and shrinks it, which never counts as one: 43 thousand messages a second, 184 thousand with this (echo-1).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class Missing(Exception):
    """This server cannot run here: its library is not installed."""


class Failed(Exception):
    """A server or the load generator did not do its job; the message says how."""


@contextmanager
def machine_to_itself():
    """While this is held no other run of these benchmarks (of the same user) measures: two at once would halve both."""
    with open(os.path.join(cache_folder(), "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cores():
    """The two cores to measure on, (server's, load generator's), or None where processes cannot be pinned to two."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else None


def pinning(which):
    """A function to be called in a child before its program: keeps it on the server's core (0) or the load's (1)."""
    both = cores()
    if which is None or both is None:
        return None
    return lambda: os.sched_setaffinity(0, {both[which]})


def processor():
    """The model name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def machine(pinned="server and load generator on a core each"):
    """What the figures depend on besides the programs."""
    where = pinned if cores() else "not pinned, less than two cores"
    return {"processor": processor(), "cores": "%d (%s)" % (os.cpu_count(), where),
            "kernel": "%s %s" % (platform.system(), platform.release())}


def load_arguments(server, mode, options):
    """The command line of the load generator."""
    arguments = [compiled("load.c"), mode, "127.0.0.1", str(server.port)]
    for name, value in options.items():
        arguments += ["--" + name, str(value)]
    return arguments


class Server:
    """A server process, from ready to stopped: ``with Server("gevent") as server: ...``

    `name` is one of servers.py, and may say a number of threads, "leviathan:2", or that MALLOC is set in its
    environment, "gevent+malloc". `pinned` keeps it on one core; other arguments go to servers.py as they are.
    """

    def __init__(self, name, arguments=(), pinned=True):
        self.name = name
        self.pinned = pinned
        base, _, malloc = name.partition("+")
        server, _, threads = base.partition(":")
        self.environment = dict(os.environ, **MALLOC) if malloc else None
        self.command = [sys.executable, os.path.join(HERE, "servers.py"), server] + list(arguments)
        if threads:
            self.command += ["--threads", threads]
        self.port = None
        self.watch = []         # a command that runs the load generator and observes something meanwhile

    def __enter__(self):
        self.process = self.spawn()
        try:
            self.port = self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def spawn(self):
        """Start the process."""
        self.errors = tempfile.TemporaryFile()
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.errors, stdin=subprocess.DEVNULL,
                                preexec_fn=pinning(0 if self.pinned else None), env=self.environment)

    def _wait_ready(self):
        """Return the port of the ready line; raise what came instead of it."""
        line = ""
        if select.select([self.process.stdout], [], [], READY_WITHIN)[0]:
            line = self.process.stdout.readline().decode().rstrip()
        found = re.match(r"ready \S+ 127\.0\.0\.1:(\d+)$", line)
        if found:
            return int(found.group(1))
        if line.startswith("missing"):
            raise Missing(line.partition(": ")[2])
        self.stop()
        raise Failed("did not get ready" + self.last_words())

    def last_words(self):
        """The last line the process wrote to stderr, to be added to a message."""
        lines = self.error_text().decode(errors="replace").strip().splitlines()
        return ": " + lines[-1] if lines else ""

    def error_text(self):
        """What it wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read()

    def stop(self):
        """Ask it to stop, kill it if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def load(self, mode, **options):
        """Run the load generator against this server; return what it measured, with the server's own share of time.

        A reply that is wrong or missing is a failure, not a slow server.
        "busy" is the part of the run in which the server had a processor: well below 1 on one core means that the
        load generator, or another program, was what limited it.
        """
        before, begun = self.cpu_seconds(), time.perf_counter()
        done = subprocess.run(self.watch + load_arguments(self, mode, options), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=pinning(1 if self.pinned else None))
        took = time.perf_counter() - begun
        if done.returncode or self.process.poll() is not None:
            raise Failed(done.stderr.decode().strip() + self.last_words())
        result = json.loads(done.stdout.decode())
        if result["errors"]:
            raise Failed("%d connections lost or answered wrongly; %s"
                         % (result["errors"], done.stderr.decode().strip().replace("\n", "; ")))
        result["busy"] = (self.cpu_seconds() - before) / took
        return result

    def cpu_seconds(self):
        """Processor time used so far, by all threads."""
        return cpu_seconds(self.process.pid)

    def memory(self):
        """Bytes of memory held now: {"rss": resident, "pss": the same, shared pages counted in part}."""
        sizes = read_sizes("/proc/%d/smaps_rollup" % self.process.pid)
        return {"rss": sizes["Rss"], "pss": sizes["Pss"]}

    def peak(self):
        """The most bytes that were ever resident."""
        return read_sizes("/proc/%d/status" % self.process.pid)["VmHWM"]


class IdleClients:
    """Connections that are held open and do nothing: ``with IdleClients(server, 8000): ...``

    With `touch` each sends one packet and has its reply before it falls idle.
    """

    def __init__(self, server, count, touch):
        self.arguments = load_arguments(server, "idle", {"conns": count, "touch": int(touch)})
        self.pinned = server.pinned

    def __enter__(self):
        self.process = subprocess.Popen(self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, preexec_fn=pinning(1 if self.pinned else None))
        line = self.process.stdout.readline().decode()
        if not line:
            raise Failed(self.process.communicate()[1].decode().strip())
        self.result = json.loads(line)
        return self

    def __exit__(self, *exc_info):
        self.process.communicate()


def cpu_seconds(pid):
    """Processor time that a process has used so far (proc(5): fields 14 and 15 of stat, in clock ticks)."""
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_sizes(path):
    """Read the lines `Name:   123 kB` of a file in /proc: {name: bytes}."""
    with open(path) as file:
        return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", file.read(), re.M)}


def import_seconds(module):
    """Import a module in a fresh interpreter, on the server's core; return the seconds the import took there."""
    environment = dict(os.environ, PYTHONPYCACHEPREFIX=os.path.join(cache_folder(), "pycache"))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)    # what is imported is compiled once, not each time
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); begun = time.perf_counter(); import %s; "
            "print(time.perf_counter() - begun)" % module)
    done = subprocess.run([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=pinning(0), env=environment)
    if done.returncode:
        raise Missing(done.stderr.decode().strip().splitlines()[-1])
    return float(done.stdout)
