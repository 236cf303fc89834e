"""The HTTP examples are run as a user runs them, and docs/http.md is code that works."""
import http.client
import json
import socket

import pytest

from conftest import STOPS
from test_examples import PATIENCE, ROOT, Program, example, python_blocks


def ask(connection, method, target, body=None, headers=None):
    connection.request(method, target, body, headers or {})
    response = connection.getresponse()
    return response.status, response.getheader("Content-Type"), response.read()


@pytest.mark.parametrize("number", STOPS)
def test_http_server(tmp_path, number):
    with example(tmp_path, "http_server.py", "--port", 0) as server:
        assert server.line.strip() == "http_server listens on http://%s:%d/" % server.address
        connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE)
        text = "text/plain; charset=utf-8"
        assert ask(connection, "GET", "/") == (200, text, b"Hello from leviathan\n")
        assert ask(connection, "POST", "/echo", b"x" * 100000, {"Content-Type": "a/b"}) == (200, "a/b", b"x" * 100000)
        assert ask(connection, "POST", "/echo", iter([b"one", b"two"])) == (200, "text/plain", b"onetwo")
        status, kind, body = ask(connection, "GET", "/json?a=b", None, {"X-One": "1"})
        assert (status, kind) == (200, "application/json")
        facts = json.loads(body)
        assert facts["query"] == "a=b" and facts["method"] == "GET" and facts["headers"]["X-One"] == "1"
        assert ask(connection, "GET", "/stream") == (200, "text/plain", b"1\n2\n3\n4\n5\n")
        assert ask(connection, "GET", "/slow") == (200, text, b"that took a while\n")
        assert ask(connection, "GET", "/other") == (404, text, b"there is no /other here\n")
        assert ask(connection, "HEAD", "/") == (200, text, b"")
        connection.close()
        assert server.end(number) == (0, "", "")


def test_http_client(tmp_path):
    with example(tmp_path, "http_server.py", "--port", 0) as server:
        port = server.address[1]
        with example(tmp_path, "http_client.py", "--port", port, "/slow", "/stream", "/", "/nothing", ready=False) as client:
            assert client.result() == (0, "/slow: 200 that took a while\n/stream: 200 1\n2\n3\n4\n5\n"
                                          "/: 200 Hello from leviathan\n/nothing: 404 there is no /nothing here\n", "")
        with example(tmp_path, "http_client.py", "--port", port, "--post", "hello", "/echo", ready=False) as client:
            assert client.result() == (0, "/echo: 200 hello\n", "")
        assert server.end()[0] == 0


def test_http_client_without_a_server(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with example(tmp_path, "http_client.py", "--port", nobody.getsockname()[1], ready=False) as client:
            status, out, err = client.result()
            assert (status, out) == (1, "") and err.startswith("cannot connect to 127.0.0.1:"), err


def test_the_http_guide_is_code_that_works(tmp_path):
    """docs/http.md, its blocks one after the other in one module, its own assertions in it."""
    program = tmp_path / "guide.py"
    program.write_text("import sys\nsys.path.insert(0, %r)\n" % ROOT + "\n".join(python_blocks("docs/http.md"))
                       + "\nprint('done')\n")
    with Program(program, cwd=tmp_path, ready=False) as guide:
        assert guide.result() == (0, "done\n", "")
