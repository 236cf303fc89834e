"""HTTP "Hello, World!" under wrk: leviathan against uvicorn (uvloop, httptools), granian, waitress, as far as they are there.

    apt-get install wrk; python -m venv v; v/bin/pip install uvicorn uvloop httptools granian waitress
    python benchmarks/http_hello.py --bin v/bin --seconds 5 --rounds 3

Each server is one process (with what it starts itself) on core 0, wrk is on core 1, 50 keep-alive connections. On a machine
that does other things as well, look at the requests per CPU second of the server, which others take nothing from.
"""
import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LEVIATHAN = """
import sys
sys.path.insert(0, %r)
import leviathan
def hello(session, request):
    session.send(leviathan.Response(200, {"Content-Type": "text/plain"}, b"Hello, World!"))
server = leviathan.Communicator(leviathan.Http(heads_kept=int(sys.argv[2])), hello)
server.listen(int(sys.argv[1]))
leviathan.run(server)
""" % ROOT
APPS = """
async def asgi(scope, receive, send):
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-type", b"text/plain"), (b"content-length", b"13")]})
    await send({"type": "http.response.body", "body": b"Hello, World!"})
def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "13")])
    return [b"Hello, World!"]
"""


def commands(folder, port, programs):
    """{name: command}, of what is there."""
    def at(name):
        return os.path.join(os.path.abspath(programs), name)

    script = os.path.join(folder, "hello.py")
    found = {
        "leviathan": [sys.executable, script, port, "512"],
        "leviathan, nothing kept": [sys.executable, script, port, "0"],
        "uvicorn": [at("uvicorn"), "--app-dir", folder, "apps:asgi", "--port", port, "--loop", "uvloop", "--http", "httptools",
                    "--no-access-log", "--log-level", "warning", "--lifespan", "off"],
        "granian": [at("granian"), "--interface", "asgi", "--working-dir", folder, "--port", port, "--workers", "1",
                    "--no-access-log", "--log-level", "warning", "apps:asgi"],
        "waitress": [at("waitress-serve"), "--listen", "127.0.0.1:" + port, "apps:wsgi"]}
    return {name: command for name, command in found.items() if os.path.exists(command[0])}


def cpu_seconds(session):
    """What all processes of a session have used."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % pid) as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:
            continue                        # it has ended meanwhile
        if int(fields[3]) == session:
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def measure(command, port, seconds, folder):
    """(requests per second, requests per CPU second of the server)."""
    server = subprocess.Popen(["taskset", "-c", "0"] + command, cwd=folder, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        before = cpu_seconds(server.pid)
        out = subprocess.run(["taskset", "-c", "1", "wrk", "-t1", "-c50", "-d%ds" % seconds, "http://127.0.0.1:%d/" % port],
                             stdout=subprocess.PIPE, check=True).stdout.decode()
        used = cpu_seconds(server.pid) - before
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    if "Non-2xx" in out or "Socket errors" in out:
        sys.exit(out)
    done, rate = re.search(r"(\d+) requests in", out), re.search(r"Requests/sec:\s+([\d.]+)", out)
    return float(rate.group(1)), int(done.group(1)) / used


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--bin", default=os.path.dirname(sys.executable), help="where uvicorn, granian and waitress are")
    options.add_argument("--seconds", type=int, default=5)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--port", type=int, default=9180)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("hello.py", LEVIATHAN), ("apps.py", APPS)):
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)
        servers = commands(folder, str(args.port), args.bin)
        results = {name: [] for name in servers}
        for _ in range(args.rounds):        # in turn, so that what else goes on hits all of them alike
            for name, command in servers.items():
                results[name].append(measure(command, args.port, args.seconds, folder))
    for name, found in results.items():
        middle = [sorted(column)[len(column) // 2] for column in zip(*found)]
        print("%-24s %8.0f requests/s %8.0f per CPU second of the server" % (name, middle[0], middle[1]))


if __name__ == "__main__":
    main()
