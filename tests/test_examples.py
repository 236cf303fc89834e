"""The examples, run as a user runs them: a process of their own, from some other directory, ended by a signal."""
import glob
import os
import re
import socket
import struct
import subprocess
import threading

import pytest

from conftest import STOPS, WINE, Child, connect, frame, read_exactly, read_frame, read_to_end
from test_sessions import has_ipv6

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = os.path.join(ROOT, "examples")
PATIENCE = 30.0         # seconds after which a program that hangs is killed, and its test fails


class Program:
    """A running Python program; `address` is in its ready line. Killed at the end, if it is still there."""

    def __init__(self, *arguments, cwd, ready=True):
        self.process = Child(*arguments, cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True)
        self.watchdog = threading.Timer(PATIENCE, self.process.kill)
        self.watchdog.daemon = True
        self.watchdog.start()
        self.line = self.process.stdout.readline() if ready else ""
        self.address = self.addresses_in(self.line)

    @staticmethod
    def addresses_in(line):
        found = re.search(r"(\d+\.\d+\.\d+\.\d+):(\d+)", line)
        return (found.group(1), int(found.group(2))) if found else None

    def next_address(self):
        """The address in the next line."""
        return self.addresses_in(self.process.stdout.readline())

    def client(self):
        assert self.address, "no ready line: %r %s" % (self.line, self.process.communicate()[1])
        return connect(self.address)

    def end(self, number=STOPS[-1]):
        """Send a signal; (exit status, rest of stdout, stderr)."""
        self.process.interrupt(number)
        return self.result()

    def result(self):
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.watchdog.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def example(tmp_path, name, *arguments, ready=True):
    return Program(os.path.join(EXAMPLES, name), *arguments, cwd=tmp_path, ready=ready)


def in_pieces(tmp_path, name, *arguments, ready=True):
    """An example whose stdout gets each piece that is written as a line: what print() writes apart is seen, every time."""
    program = tmp_path / "in_pieces.py"
    program.write_text("""import runpy, sys
class Pieces:
    def __init__(self, out):
        self.out = out
    def write(self, text):
        if text:
            self.out.write(repr(text) + "\\n")
    def flush(self):
        self.out.flush()
sys.stdout = Pieces(sys.stdout)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    return Program(program, os.path.join(EXAMPLES, name), *arguments, cwd=tmp_path, ready=ready)


def line_of(client):
    line = b""
    while not line.endswith(b"\n"):
        line += read_exactly(client, 1)                 # and nothing of the next line
    return line.strip()


def lines_of(client, count):
    return [line_of(client) for _ in range(count)]


def test_every_example_is_tested_and_says_what_it_shows():
    tests = ""
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "test_*examples*.py"))):
        with open(path, encoding="utf-8") as file:
            tests += file.read()
    names = [name for name in os.listdir(EXAMPLES) if name.endswith(".py")]
    assert len(names) >= 8
    for name in names:
        with open(os.path.join(EXAMPLES, name), encoding="utf-8") as file:
            text = file.read()
        assert '"%s"' % name in tests, name
        assert text.startswith('"""'), name
        assert text.rstrip().endswith('if __name__ == "__main__":\n    main()'), name


@pytest.mark.parametrize("number", STOPS)
def test_echo_server(tmp_path, number):
    with example(tmp_path, "echo_server.py", "--port", 0) as server:
        client = server.client()
        with client:
            client.sendall(frame(b"hello") + frame(b"") + frame(b"x" * 100000))
            assert [read_frame(client) for _ in range(3)] == [b"hello", b"", b"x" * 100000]
        assert server.end(number) == (0, "", "")


def test_echo_server_on_another_host(tmp_path):
    with example(tmp_path, "echo_server.py", "--host", "127.0.0.2", "--port", 0) as server:
        assert server.address[0] == "127.0.0.2"
        with server.client() as client:
            client.sendall(frame(b"hello"))
            assert read_frame(client) == b"hello"
        assert server.end()[0] == 0


def test_echo_client(tmp_path):
    with example(tmp_path, "echo_server.py", "--port", 0) as server:
        with example(tmp_path, "echo_client.py", "--port", server.address[1], "one", "two", ready=False) as client:
            assert client.result() == (0, "127.0.0.1 answers one\n127.0.0.1 answers two\n", "")
        assert server.end()[0] == 0
        with example(tmp_path, "echo_client.py", "--port", server.address[1], ready=False) as client:
            status, out, err = client.result()
            assert (status, out) == (1, "") and err.startswith("cannot connect to 127.0.0.1:"), err


def test_chat_server(tmp_path):
    with example(tmp_path, "chat_server.py", "--port", 0) as server:
        with server.client() as ann, server.client() as bob:
            assert lines_of(bob, 1) == [b"your name?"]      # he is in, so he will hear of her
            ann.sendall(b"ann\r\n")
            assert lines_of(ann, 2)[0] == b"your name?"
            assert lines_of(bob, 1)[0].startswith(b"* ann is here")
            bob.sendall(b"bob\nhello\n")
            assert lines_of(ann, 2) == [b"* bob is here, 2 in the room", b"<bob> hello"]
            bob.sendall(b"/quit\n")
            assert read_to_end(bob).endswith(b"bye\n")
            assert lines_of(ann, 1) == [b"* bob left (normal)"]
            with server.client() as eve:
                eve.sendall(b"eve\n")
                assert lines_of(ann, 1)[0].startswith(b"* eve is here")
                eve.sendall(b"x" * 2000)                # more than a line may have
                assert lines_of(ann, 1) == [b"* eve left (protocol)"]
            assert server.end() == (0, "", "")


def upstream_is_there(server):
    """Wait for roles.py's second line."""
    assert server.process.stdout.readline() == "the upstream is there\n"


def test_roles(tmp_path):
    with example(tmp_path, "roles.py", "--port", 0) as server:
        upstream_is_there(server)
        with server.client() as one, server.client() as two:
            for number in range(20):
                one.sendall(b"one %d\n" % number)
                two.sendall(b"two %d\n" % number)
            # Several threads serve the upstream's answers, but one connection's only in order.
            assert lines_of(one, 20) == [b"ONE %d" % number for number in range(20)]
            assert lines_of(two, 20) == [b"TWO %d" % number for number in range(20)]
        assert server.end() == (0, "", "")


def test_roles_when_the_upstream_goes_and_comes_back(tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))                # bound, not listening: connections are refused
        listening.settimeout(PATIENCE)
        there = threading.Timer(0.3, listening.listen)
        there.start()
        where = "127.0.0.1:%d" % listening.getsockname()[1]
        with example(tmp_path, "roles.py", "--port", 0, "--upstream", where) as server:
            there.join()
            upstream, _ = listening.accept()
            upstream_is_there(server)
            with server.client() as client:
                client.sendall(b"hello\n")
                upstream.settimeout(PATIENCE)
                assert lines_of(upstream, 1) == [b"1 hello"]
                upstream.sendall(b"9 nobody's\n1 answer\n")
                assert lines_of(client, 1) == [b"answer"]
                client.sendall(b"unanswered\n")
                assert lines_of(upstream, 1) == [b"2 unanswered"]
                upstream.close()
                assert lines_of(client, 1) == [b"the upstream is down"]
                upstream, _ = listening.accept()
                with upstream:
                    upstream.settimeout(PATIENCE)
                    upstream_is_there(server)
                    client.sendall(b"again\n")
                    assert lines_of(upstream, 1) == [b"3 again"]
                    upstream.sendall(b"3 yes\n")
                    assert lines_of(client, 1) == [b"yes"]
                status, _, err = server.end()       # it may have come up once more meanwhile, and said so
                assert (status, err) == (0, "")


def test_roles_listens_without_its_upstream(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        where = "127.0.0.1:%d" % nobody.getsockname()[1]
        with example(tmp_path, "roles.py", "--port", 0, "--upstream", where) as server, server.client() as client:
            client.sendall(b"hello\n")
            assert lines_of(client, 1) == [b"the upstream is down"]
            assert server.end() == (0, "", "")


def test_roles_refuses_a_line_that_would_cost_all_the_upstream(tmp_path):
    with example(tmp_path, "roles.py", "--port", 0) as server:
        upstream_is_there(server)
        with server.client() as one, server.client() as two:
            one.sendall(b"x" * 65534 + b"\n")           # with its ticket it is longer than a line may be
            assert lines_of(one, 1) == [b"this line is too long"]
            for client in one, two:
                client.sendall(b"hello\n")
                assert lines_of(client, 1) == [b"HELLO"]
        assert server.end() == (0, "", "")


def test_events(tmp_path):
    with example(tmp_path, "events.py", "--seconds", 0.5, ready=False) as program:
        status, out, err = program.result()
        assert (status, err) == (0, "")
        assert sorted(re.findall(r"job (\d) done by worker-[01]", out)) == ["0", "1", "2", "3"]
        assert out.count("tick") >= 3
        assert out.splitlines()[-1].endswith("events on 2 threads")
        assert "nobody" not in out


def test_events_writes_its_lines_in_one_piece_each(tmp_path):
    """Its two threads write at once, and print() writes the end of a line apart: the other's line would come between."""
    with in_pieces(tmp_path, "events.py", "--seconds", 0.3, ready=False) as program:
        status, out, err = program.result()
        pieces = out.splitlines()[:-2]                  # the last line is the main thread's alone
        assert (status, err) == (0, "")
        assert len(pieces) >= 5 and all(re.fullmatch(r"'(job \d done by worker-\d|tick)\\n'", piece) for piece in pieces), out


def test_events_ends_when_told(tmp_path):
    with example(tmp_path, "events.py", "--seconds", 60) as program:
        assert program.end()[0] == 0


def test_custom_header(tmp_path):
    with example(tmp_path, "custom_header.py", "--port", 0) as server:
        with server.client() as client:
            request = b"LV\1\1\0\x08" + struct.pack(">2I", 3, 4) + b"LV\1\2\0\x0c" + struct.pack(">3I", 7, 9, 8)
            for byte in request:
                client.sendall(bytes([byte]))
            assert read_exactly(client, 20) == b"LV\1\1\0\x04\0\0\0\x07LV\1\2\0\x04\0\0\0\x09"
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert read_to_end(client) == b""
        with server.client() as client:                 # the others lose nothing
            client.sendall(b"LV\1\1\0\0")
            assert read_exactly(client, 10) == b"LV\1\1\0\x04\0\0\0\0"
        assert server.end()[0] == 0


def proxy(tmp_path, target):
    return example(tmp_path, "proxy.py", "--port", 0, "--target", "%s:%d" % target)


def test_proxy_both_ways_with_backpressure_and_half_close(tmp_path):
    """30 MB through the proxy to a client that begins to read late, and ends its own side first."""
    packet = frame(bytes(range(256)) * 4000)
    with example(tmp_path, "echo_server.py", "--port", 0) as server, proxy(tmp_path, server.address) as middle:
        with middle.client() as client:

            def fill():
                for _ in range(30):
                    client.sendall(packet)
                client.shutdown(socket.SHUT_WR)

            writer = threading.Thread(target=fill)
            writer.start()
            writer.join(0.3)
            assert writer.is_alive()                    # it is held back: nobody reads
            data = read_to_end(client)
            writer.join()
            assert data == packet * 30
        assert middle.end() == (0, "", "")
        assert server.end() == (0, "", "")


def test_proxy_half_close_lets_the_answer_come(tmp_path):
    """A client that says FIN before the target has answered still gets the answer."""
    with socket.socket() as target:
        target.bind(("127.0.0.1", 0))
        target.listen()
        target.settimeout(PATIENCE)
        with proxy(tmp_path, target.getsockname()) as middle, middle.client() as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            upstream, _ = target.accept()
            with upstream:
                upstream.settimeout(PATIENCE)
                assert read_to_end(upstream) == b"question"
                upstream.sendall(b"answer")
            assert read_to_end(client) == b"answer"
            assert middle.end()[0] == 0


def test_proxy_with_a_target_that_is_down(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with proxy(tmp_path, nobody.getsockname()) as middle:
            try:
                with middle.client() as client:
                    assert read_to_end(client) == b""
            except ConnectionResetError:
                pass                                    # the reset was there before connect() had returned
            assert middle.end()[0] == 0


def test_ini_server(tmp_path):
    with example(tmp_path, "ini_server.py", "--port", 0) as server:
        second = server.next_address()
        with server.client() as client:
            client.sendall(b"5,hello3,you")
            assert read_exactly(client, 12) == b"5,HELLO3,YOU"
        with connect(second) as client:
            client.sendall(b"\0\5hello")
            assert read_exactly(client, 7) == b"\0\5hello"
        assert server.end() == (0, "", "")


def test_ini_server_with_a_wrong_file(tmp_path):
    ini = tmp_path / "wrong.ini"
    ini.write_text("[COMUNICATOR_1]\nIDLE_TIMEOUT = soon\n")
    with example(tmp_path, "ini_server.py", "--ini", ini, ready=False) as program:      # "ini_server.py"
        status, out, err = program.result()
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1 and "IDLE_TIMEOUT" in err, err


@pytest.mark.parametrize("name", ["chat_server.py", "cluster_chat.py", "custom_header.py", "echo_server.py", "http_server.py",
                                  "ini_server.py", "proxy.py", "redis_server.py", "roles.py"])
def test_a_port_in_use_is_one_line_and_status_2(tmp_path, name):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with example(tmp_path, name, "--port", taken.getsockname()[1], ready=False) as program:
            status, out, err = program.result()
            assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
            assert WINE or "in use" in err or "10048" in err, err


@pytest.mark.parametrize("name, arguments", [
    ("ini_server.py", ["--port", 70000]), ("echo_client.py", ["--port", 70000]), ("echo_client.py", ["--port", 0]),
    ("http_client.py", ["--port", 70000]), ("http_client.py", ["--port", 0]), ("redis_client.py", ["--port", 70000]),
    ("redis_client.py", ["--port", 0]), ("redis_client.py", ["--every", 0]), ("roles.py", ["--upstream", "foo"]),
    ("roles.py", ["--upstream", "127.0.0.1:0"]), ("cluster_chat.py", ["--redis", "foo"]), ("proxy.py", ["--target", "foo"]),
    ("events.py", ["--seconds", 0]), ("events.py", ["--seconds", -1]), ("events.py", ["--seconds", "nan"]),
    ("chat_server.py", ["--port", 0, "--idle", -1]), ("chat_server.py", ["--port", 0, "--idle", "nan"])])
def test_a_wrong_argument_is_told_of_and_status_2(tmp_path, name, arguments):
    with example(tmp_path, name, *arguments, ready=False) as program:
        status, out, err = program.result()
        assert (status, out) == (2, "") and "Traceback" not in err, err
        assert err.count("\n") == 1 or err.startswith("usage: "), err      # argparse has its own way


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_ready_line_has_an_ipv6_address_in_brackets(tmp_path):
    with example(tmp_path, "echo_server.py", "--host", "::1", "--port", 0) as server:
        assert re.search(r" \[::1\]:\d+\n$", server.line), server.line
        assert server.end()[0] == 0


def test_the_client_misses_answers_that_do_not_come(tmp_path):
    """A server that hangs up without a word is told of, and the status is not 0."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with example(tmp_path, "echo_client.py", "--port", listener.getsockname()[1], "hello", ready=False) as program:
            server, _ = listener.accept()
            server.settimeout(10)
            assert server.recv(9) == b"\0\0\0\5hello"
            server.close()
            status, out, err = program.result()
            assert (status, out) == (1, "") and "1 answers are missing" in err


def python_blocks(path):
    """The ```python blocks of a document."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return re.findall(r"```python\n(.*?)```", file.read(), re.S)


def test_the_framing_guide_is_code_that_works(tmp_path):
    """docs/framing.md, its blocks one after the other in one module, its own assertions in it."""
    program = tmp_path / "guide.py"
    program.write_text("import sys\nsys.path.insert(0, %r)\n" % ROOT + "\n".join(python_blocks("docs/framing.md"))
                       + "\nprint('done')\n")
    with Program(program, cwd=tmp_path, ready=False) as guide:
        assert guide.result() == (0, "done\n", "")


def test_the_readme_server(tmp_path):
    """README.md's first server, as it stands there, but for its port."""
    text = python_blocks("README.md")[0]
    assert len(text.strip().splitlines()) <= 10
    assert "server.listen(7878)" in text
    text = text.replace("server.listen(7878)", "print('%s:%d' % server.listen(0).address, flush=True)")
    program = tmp_path / "server.py"
    program.write_text("import sys\nsys.path.insert(0, %r)\n" % ROOT + text)
    with Program(program, cwd=tmp_path) as server:
        with server.client() as client:
            client.sendall(frame(b"hello"))
            assert read_frame(client) == b"hello"
        assert server.end() == (0, "", "")
