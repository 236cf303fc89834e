"""The benchmarks of HTTP and Redis' protocol: leviathan against servers and clients that people use for these.

The load comes from programs that nobody here wrote, wrk and redis-benchmark, each on one core, as the server is. A server
may be several processes (uvicorn and granian start some): all of a contender's are on its one core, and their processor
time is counted together. The Python peers are looked for in a virtualenv: README.md beside this says how to make it.
"""
import contextlib
import csv
import functools
import http.client
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from cases import RELATIVE, Case, Suite, Target
from harness import HERE, READY_WITHIN, ROOT, Failed, Missing, Server, cpu_seconds, machine, pinning
from hello import TEXT

HOST = "127.0.0.1"
PACKAGES = ("uvicorn", "uvloop", "httptools", "granian", "waitress", "redis")

INTRODUCTION = """# Benchmarks of HTTP and Redis' protocol

Made by `python benchmarks/run.py --protocols --write`; do not edit. What is measured and how to read it is told in
[benchmarks/README.md](../benchmarks/README.md).

Servers answer `wrk` and `redis-benchmark` on 50 connections, all of a server on one core, the load on another; the client
of Redis talks to the real redis-server. Two things must be known to read the figures:

- leviathan keeps the header blocks that it has seen last and does not parse the same bytes again. wrk sends the same bytes
  each time, as keep-alive clients often do: `http-hello` is the best that this can do. `leviathan-nothing-kept` is without
  it. In `http-headers` no two requests are alike: there it cannot help, and looking for them and keeping them costs something.
- wrk and redis-benchmark have one core too. Where *server busy* is much below 100 % they, or another program on the machine,
  were the limit, and requests per second do not show what the server could do; *per CPU second* does, roughly. So a ratio
  of 1 does not mean "as fast" there. With one command in flight on each connection redis-benchmark has as much to do as the
  server; with 16 (`-P 16`) it is the servers that differ.

![Throughput relative to uvicorn, redis-server and redis-py](benchmarks-protocols.svg)"""


# ---- programs ----------------------------------------------------------------------------------------------------


def installed(program, package):
    """The path of a program of the system."""
    path = shutil.which(program)
    if path is None:
        raise Missing("%s is not installed (Debian: %s)" % (program, package))
    return path


def peer_python(folder):
    """The Python of the virtualenv with the peers."""
    ours = os.path.dirname(sys.executable) == folder
    return sys.executable if ours else os.path.join(folder, "python")


@functools.lru_cache(maxsize=None)
def peer_versions(folder):
    """{package: version} of the peers installed there, and of Python itself, named as versions() names it."""
    script = ("import json, platform, sys\n"
              "from importlib import metadata\n"
              "found = {platform.python_implementation(): platform.python_version()}\n"
              "for name in sys.argv[1:]:\n"
              "    try:\n"
              "        found[name] = metadata.version(name)\n"
              "    except metadata.PackageNotFoundError:\n"
              "        pass\n"
              "print(json.dumps(found))")
    try:
        return json.loads(subprocess.run([peer_python(folder), "-c", script] + list(PACKAGES), stdin=subprocess.DEVNULL,
                                         stdout=subprocess.PIPE, check=True).stdout.decode())
    except (OSError, subprocess.CalledProcessError):
        return {}


def peer(program, folder, *packages):
    """The path of a program of that virtualenv that needs these packages."""
    for package in packages:
        if package not in peer_versions(folder):
            raise Missing("the package %s is not installed" % package)
    return peer_python(folder) if program == "python" else os.path.join(folder, program)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Program(Server):
    """A server that is told its port and prints no ready line: it is ready when the port answers.

    `core` is its own (0 or 1), what puts load on it has the other. It runs in a session and a temporary folder of its own.
    """

    def __init__(self, name, command, port, core=0):
        super().__init__(name)
        self.command, self.port, self.core = command, port, core
        self.environment = dict(os.environ, PYTHONPATH=HERE)        # there is hello.py

    def spawn(self):
        """Start it."""
        self.errors = tempfile.TemporaryFile()
        self.folder = tempfile.TemporaryDirectory()
        return subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors,
                                cwd=self.folder.name, env=self.environment, start_new_session=True,
                                preexec_fn=pinning(self.core))

    def _wait_ready(self):
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, self.port), 1).close()
                return self.port
            time.sleep(.02)
        raise Failed("did not get ready" + self.last_words())

    def processes(self):
        """The ids of all its processes."""
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):      # it has ended meanwhile
                if os.getsid(pid) == self.process.pid:
                    found.append(pid)
        return found

    def cpu_seconds(self):
        """Processor time used so far, by all processes."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                total += cpu_seconds(pid)
        return total

    def stop(self):
        """Ask it to stop; kill what is left of it then."""
        try:
            super().stop()
        finally:
            for pid in self.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()         # once more, if a signal came while it was asked
            self.folder.cleanup()

    def under(self, command, patience):
        """Run a program that puts load on it; return what that printed, its seconds and the server's processor seconds."""
        before, begun = self.cpu_seconds(), time.perf_counter()
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  preexec_fn=pinning(1 - self.core), timeout=patience)
        except subprocess.TimeoutExpired:
            raise Failed("the load does not end" + self.last_words())
        took, used = time.perf_counter() - begun, self.cpu_seconds() - before
        if self.process.poll() is not None:
            raise Failed("the server has ended" + self.last_words())
        if done.returncode:
            raise Failed("the load failed: %s" % done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        return done.stdout.decode(), took, used


def patience(settings):
    """Seconds until a load that does not end has failed."""
    return 60 + 10 * settings.seconds


def rates(name, count, seconds, took, used):
    """How many of something a second, and a second of processor time (`used`, of `took`)."""
    figures = {name: count / seconds, "busy": used / took}
    if used:            # a very short run may be less than a clock tick
        figures["per_cpu_s"] = count / used
    return figures


# ---- HTTP --------------------------------------------------------------------------------------------------------


def http_command(contender, port, peers):
    """What starts this server. One process does the work in each; none writes a log of what was asked."""
    port = str(port)
    if contender.startswith("leviathan"):
        return [sys.executable, os.path.join(HERE, "hello.py"), port] + ["0"] * (contender == "leviathan-nothing-kept")
    if contender == "uvicorn":
        return [peer("uvicorn", peers, "uvicorn", "uvloop", "httptools"), "hello:asgi", "--host", HOST, "--port", port,
                "--loop", "uvloop", "--http", "httptools", "--lifespan", "off", "--no-access-log", "--log-level", "warning"]
    if contender == "granian":
        return [peer("granian", peers, "granian"), "hello:asgi", "--interface", "asgi", "--host", HOST, "--port", port,
                "--workers", "1", "--no-access-log", "--log-level", "warning"]
    return [peer("waitress-serve", peers, "waitress"), "--listen", "%s:%s" % (HOST, port), "hello:wsgi"]


def check_hello(port, requests=100):
    """Look at the first answers closely; they also warm the server up."""
    connection = http.client.HTTPConnection(HOST, port, timeout=READY_WITHIN)
    try:
        for _ in range(requests):
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            if (answer.status, answer.getheader("Content-Type"), body) != (200, "text/plain", TEXT):
                raise Failed("answers %d %r" % (answer.status, body[:100]))
    except (OSError, http.client.HTTPException) as error:
        raise Failed("does not answer: %r" % error)
    finally:
        connection.close()


def measure_http(contender, case, settings):
    """Requests per second and round-trip times under wrk, which counts whole seconds."""
    port = free_port()
    command = [installed("wrk", "wrk"), "-t1", "-c50", "-d%d" % max(1, math.ceil(settings.seconds)),
               "-s", os.path.join(HERE, "wrk.lua")]
    for line in case.parameters["headers"]:
        command += ["-H", line]
    command += ["http://%s:%d/" % (HOST, port), "--"] + ["numbered"] * case.parameters["numbered"]
    with Program(contender, http_command(contender, port, settings.peers), port) as server:
        check_hello(port)
        printed, took, used = server.under(command, patience(settings))
        result = json.loads(printed.splitlines()[-1])
        if result["errors"] or not result["requests"]:
            raise Failed("%d of %d requests failed; %s" % (result["errors"], result["requests"], server.last_words()))
    return dict(rates("requests_per_s", result["requests"], result["seconds"], took, used),
                p50_us=result["p50_us"], p99_us=result["p99_us"])


# ---- Redis, the server -------------------------------------------------------------------------------------------


def redis_server(contender, core=0):
    """leviathan's example, or the real one, which keeps nothing on disk."""
    port = free_port()
    if contender == "leviathan":
        command = [sys.executable, os.path.join(ROOT, "examples", "redis_server.py"), "--port", str(port)]
    else:
        command = [installed("redis-server", "redis-server"), "--port", str(port), "--bind", HOST, "--save", "",
                   "--appendonly", "no", "--protected-mode", "no", "--loglevel", "warning"]
    return Program(contender, command, port, core)


def redis_benchmark(server, test, count, pipeline, settings):
    """Run it once; return its line of figures, its seconds and the server's processor seconds."""
    printed, took, used = server.under([installed("redis-benchmark", "redis-tools"), "-h", HOST, "-p", str(server.port),
                                        "-c", "50", "-P", str(pipeline), "-n", str(count), "-r", "10000", "-t", test,
                                        "--csv"], patience(settings))
    rows = list(csv.DictReader(printed.splitlines()))
    if len(rows) != 1 or "p99_latency_ms" not in rows[0]:
        raise Failed("redis-benchmark (of Redis 7?) says: %.200s" % printed)
    return rows[0], took, used


def measure_redis(contender, case, settings):
    """Commands per second and round-trip times under redis-benchmark; a first run says how many commands take the time."""
    test, pipeline = case.parameters["test"], case.parameters["pipeline"]
    count = case.parameters["first"]
    with redis_server(contender) as server:
        if test == "get":       # what is not there is no value to get
            redis_benchmark(server, "set", count, pipeline, settings)
        first, _, _ = redis_benchmark(server, test, count, pipeline, settings)
        count = max(count // 10, int(float(first["rps"]) * settings.seconds))
        row, took, used = redis_benchmark(server, test, count, pipeline, settings)
    return dict(rates("requests_per_s", count, count / float(row["rps"]), took, used),
                p50_us=float(row["p50_latency_ms"]) * 1e3, p99_us=float(row["p99_latency_ms"]) * 1e3)


# ---- Redis, the client -------------------------------------------------------------------------------------------


def measure_client(contender, case, settings):
    """Commands per second of a client, in batches; redis-server has the load's core, the client the server's."""
    python = peer("python", settings.peers, "redis") if contender == "redis-py" else sys.executable
    with redis_server("redis-server", core=1) as server:
        printed, _, _ = server.under([python, os.path.join(HERE, "batches.py"), contender, str(server.port),
                                      str(settings.seconds), str(settings.warmup)], patience(settings))
    result = json.loads(printed)
    return dict(rates("commands_per_s", result["commands"], result["seconds"], result["seconds"], result["cpu"]),
                p50_us=result["p50_us"], p99_us=result["p99_us"])


# ---- the cases ---------------------------------------------------------------------------------------------------

HTTP = ["leviathan", "leviathan-nothing-kept", "uvicorn", "granian", "waitress"]
REDIS = ["leviathan", "redis-server"]
TIMES = [("p50_us", "p50 µs", "number"), ("p99_us", "p99 µs", "number")]
PER_CPU = [("per_cpu_s", "per CPU second", "count")]
COLUMNS = [("requests_per_s", "requests/s", "count")] + TIMES + PER_CPU + [("busy", "server busy", "percent")]
CLIENT_COLUMNS = [("commands_per_s", "commands/s", "count"), ("p50_us", "batch p50 µs", "number"),
                  ("p99_us", "p99 µs", "number")] + PER_CPU + [("busy", "client busy", "percent")]
ALSO = [("per_cpu_s", "per CPU second")]

BROWSER = ["User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
           "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
           "Accept-Language: en-GB,en;q=0.7,de;q=0.3", "Accept-Encoding: gzip, deflate, br, zstd",
           "Connection: keep-alive", "Cookie: session=6f1c2a9be04d4d5f9a7e3b1c0d8e2f47; theme=dark; seen=1732370000",
           "Upgrade-Insecure-Requests: 1", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Site: same-origin",
           "Cache-Control: max-age=0"]


def http_case(name, title, **parameters):
    """A web server under wrk."""
    return Case(name, title, measure_http, HTTP, "requests_per_s", COLUMNS, parameters, also=ALSO, picture=RELATIVE,
                reference="uvicorn")


def redis_case(test, pipeline):
    """A Redis server under redis-benchmark."""
    name, title = "redis-" + test, "%s, 50 connections, %d in flight" % (test.upper(), pipeline)
    if pipeline > 1:
        name += "-%d" % pipeline
    return Case(name, title, measure_redis, REDIS, "requests_per_s", COLUMNS,
                {"test": "ping_mbulk" if test == "ping" else test, "pipeline": pipeline,
                 "first": 20000 if pipeline == 1 else 100000}, also=ALSO, picture=RELATIVE, reference="redis-server")


CASES = [
    http_case("http-hello", '"Hello, World!", 50 connections, wrk\'s one header', headers=[], numbered=False),
    http_case("http-headers", "the same, 550 bytes in 12 header lines, no two requests alike", headers=BROWSER, numbered=True),
] + [redis_case(test, pipeline) for pipeline in (1, 16) for test in ("ping", "set", "get")] + [
    Case("redis-client", "SET and GET in batches of 100 to redis-server", measure_client,
         ["leviathan", "leviathan-ask", "redis-py"], "commands_per_s", CLIENT_COLUMNS, {}, also=ALSO, picture=RELATIVE,
         reference="redis-py"),
]

TARGETS = [Target("http-hello", "requests_per_s", "uvicorn", "at least", 2.5),
           Target("http-hello", "requests_per_s", "granian", "at least", 2.0)]
TARGETS += [Target("redis-%s%s" % (test, suffix), "requests_per_s", "redis-server", "at least", limit)
            for suffix, limit in (("", .95), ("-16", .2)) for test in ("ping", "set", "get")]
TARGETS += [Target("redis-client", "commands_per_s", "redis-py", "at least", 3.0)]


# ---- where and with what -----------------------------------------------------------------------------------------


def versions(settings):
    """Of Python, of the peers that are installed, and of the programs that make the load."""
    found = {platform.python_implementation(): platform.python_version()}
    for name, version in peer_versions(settings.peers).items():
        known = found.setdefault(name, version)
        if known != version:
            found[name + " of the peers"] = version
    for program, option, pattern in (("wrk", "-v", r"wrk \D*([\d.]+)"), ("redis-server", "--version", r"v=([\d.]+)")):
        if shutil.which(program):
            said = subprocess.run([program, option], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT).stdout.decode()
            match = re.search(pattern, said)
            if match:
                found[program] = match.group(1)
    return found


PROTOCOLS = Suite("benchmarks-protocols", CASES, TARGETS, None, "leviathan as a web server, as a Redis and as its client",
                  "Requests or commands per second on one core; a usual program for the same is 1.0. More is better.",
                  INTRODUCTION, lambda say: None,
                  functools.partial(machine, "all of a server on one core, what puts load on it on the other"), versions)
