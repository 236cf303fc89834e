"""The HTTP and Redis examples under Wine, programs that nobody here wrote on Linux: curl, wrk, redis-cli, redis-benchmark.

LEVIATHAN_CROSS=1 runs them; with it a machine without Wine fails, with LEVIATHAN_REAL=1 one without these programs.
"""
import os
import re
import subprocess
import sys
import threading

import pytest

import wine
from real_redis import needed, run

EXAMPLES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples")
PATIENCE = 60.0             # seconds after which an example that hangs is killed

if sys.platform == "win32":
    pytest.skip("the clients run on Linux, the server under Wine", allow_module_level=True)
if not os.environ.get("LEVIATHAN_CROSS"):
    pytest.skip("these need Wine: set LEVIATHAN_CROSS=1", allow_module_level=True)


class Example:
    """An example that listens, under Wine; ended with all that it has started."""

    def __init__(self, name):
        argv, self.env = wine.command([os.path.join(EXAMPLES, name), "--port", "0"])        # says what is missing
        wine.warm()
        self.process = subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.watchdog = threading.Timer(PATIENCE, self.process.kill)
        self.watchdog.start()
        line = self.process.stdout.readline().decode()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        assert found, line
        self.port = found.group(1)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.watchdog.cancel()
        wine.end(self.env)
        self.process.communicate()


def test_curl_and_wrk_against_http_under_wine(tmp_path):
    curl, wrk = needed("curl"), needed("wrk")
    upload = tmp_path / "upload"
    upload.write_bytes(os.urandom(300000))
    with Example("http_server.py") as server:
        url = "http://127.0.0.1:%s" % server.port
        assert run(curl, "-sS", "--max-time", 20, url + "/").strip()
        assert "HTTP/1.1 200 OK" in run(curl, "-sS", "--max-time", 20, "-I", url + "/json")
        echoed = tmp_path / "echoed"
        for how in ([], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"]):
            run(curl, "-sS", "--max-time", 20, "-o", echoed, "--data-binary", "@%s" % upload, *(how + [url + "/echo"]))
            assert echoed.read_bytes() == upload.read_bytes()
        assert run(curl, "-sS", "--max-time", 20, url + "/slow", url + "/stream")
        report = run(wrk, "-t", 1, "-c", 50, "-d", 1, url + "/")
        assert "Non-2xx" not in report and "Socket errors" not in report, report
        assert int(re.search(r"(\d+) requests in", report).group(1)) > 0


def test_redis_programs_against_resp_under_wine():
    cli, benchmark = needed("redis-cli"), needed("redis-benchmark")
    with Example("redis_server.py") as server:
        def ask(*words):
            return run(cli, "-p", server.port, *words).strip()

        assert ask("PING") == "PONG"
        assert ask("SET", "key", "value", "EX", "100") == "OK"
        assert ask("-3", "GET", "key") == "value"
        assert ask("LPUSH", "list", "a", "b") == "2"
        assert ask("LRANGE", "list", "0", "-1").split() == ["b", "a"]
        for depth in (1, 16):
            report = run(benchmark, "-p", server.port, "-n", 1000, "-c", 20, "-P", depth, "-t", "ping,set,get", "-q")
            assert len(re.findall(r"requests per second", report)) == 4, report
