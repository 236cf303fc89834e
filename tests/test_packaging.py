"""Copied flat, vendored in a package, bundled into one file; imported without effect; the command line."""
import ast
import os
import shutil
import socket
import subprocess
import sys

import pytest

from conftest import STOPS, WINDOWS, WINE, connect, frame, read_frame
from test_examples import PATIENCE, ROOT, Program

ENGINE = "leviathan_win" if WINDOWS else "leviathan_linux"
MODULES = ["leviathan.py", "leviathan_linux.py", "leviathan_win.py"]
NEEDED = ["leviathan.py", ENGINE + ".py"]
ECHO = """
    import sys
    def handler(session, packet):
        session.send(packet)
    server = leviathan.Communicator(leviathan.LengthPrefix(4), handler)
    print("%s:%d" % server.listen(0).address, flush=True)
    leviathan.run(server)
""".replace("\n    ", "\n")


def run(*arguments, cwd, **options):
    """(exit status, stdout, stderr) of a Python program that ends by itself."""
    done = subprocess.run([sys.executable] + [str(argument) for argument in arguments], cwd=str(cwd),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=PATIENCE,
                          **options)
    return done.returncode, done.stdout, done.stderr


def copy_to(folder, names=NEEDED):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(os.path.join(ROOT, name), str(folder / name))
    return folder


def assert_it_echoes(program):
    client = program.client()
    with client:
        client.sendall(frame(b"hello"))
        assert read_frame(client) == b"hello"
    assert program.end() == (0, "", "")


@pytest.fixture
def bundle(tmp_path):
    """The path of a bundle, alone in its directory."""
    (tmp_path / "bundled").mkdir()
    path = tmp_path / "bundled" / "leviathan.py"
    status, _, err = run(os.path.join(ROOT, "leviathan.py"), "bundle", path, cwd=tmp_path)
    assert (status, err) == (0, "")
    return path


# -- copies -----------------------------------------------------------------------------------------------------------

def test_flat_copy(tmp_path):
    copy_to(tmp_path)
    (tmp_path / "server.py").write_text("import leviathan\n" + ECHO)
    with Program(tmp_path / "server.py", cwd="/") as server:
        assert_it_echoes(server)


def test_vendored_in_a_package(tmp_path):
    copy_to(tmp_path / "myapp" / "_vendor")
    for folder in (tmp_path / "myapp", tmp_path / "myapp" / "_vendor"):
        (folder / "__init__.py").write_text("")
    (tmp_path / "server.py").write_text("from myapp._vendor import leviathan\n"
                                        "assert leviathan._engine.__name__ == 'myapp._vendor.%s'\n" % ENGINE + ECHO)
    with Program(tmp_path / "server.py", cwd="/") as server:
        assert_it_echoes(server)


def test_two_copies_in_one_process(tmp_path):
    """A program's own copy and that of a package it uses do not meet."""
    copy_to(tmp_path)
    copy_to(tmp_path / "other")
    (tmp_path / "other" / "__init__.py").write_text("")
    (tmp_path / "both.py").write_text("import leviathan\nfrom other import leviathan as second\n"
                                      "assert leviathan._engine is not second._engine\n" + ECHO)
    with Program(tmp_path / "both.py", cwd="/") as server:
        assert_it_echoes(server)


@pytest.mark.parametrize("package", [False, True])
def test_a_missing_engine_is_named(tmp_path, package):
    copy_to(tmp_path / "vendored", ["leviathan.py"])
    (tmp_path / "vendored" / "__init__.py").write_text("")
    flat = "import sys; sys.path.insert(0, 'vendored'); import leviathan"
    code = "from vendored import leviathan" if package else flat
    status, _, err = run("-S", "-E", "-c", code, cwd=tmp_path)      # without what may be installed here
    last = err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("ImportError: ")
    assert "copy it next to" in last and ENGINE + ".py" in last and "bundle" in last
    assert str(tmp_path / "vendored" / "leviathan.py") in last


def test_a_missing_engine_is_one_line_and_status_2_for_a_program(tmp_path):
    copy_to(tmp_path, ["leviathan.py"])
    status, out, err = run("-S", "-E", tmp_path / "leviathan.py", "--version", cwd=tmp_path)
    assert (status, out) == (2, "") and err.startswith("leviathan: ") and err.count("\n") == 1 and ENGINE in err


@pytest.mark.parametrize("package", ["", "from . import leviathan"], ids=["empty", "imports it"])
@pytest.mark.parametrize("command", [["-m", "myapp._vendor.leviathan"], [os.path.join("myapp", "_vendor", "leviathan.py")]],
                         ids=["module", "script"])
def test_a_vendored_copy_that_runs_as_a_program_is_not_loaded_again(tmp_path, command, package):
    copy_to(tmp_path / "myapp" / "_vendor")
    (tmp_path / "myapp" / "__init__.py").write_text("")
    (tmp_path / "myapp" / "_vendor" / "__init__.py").write_text(package)
    (tmp_path / "handlers.py").write_text(
        "import leviathan as flat\nimport myapp._vendor.leviathan\nfrom myapp._vendor import leviathan\n"
        "assert flat is leviathan is myapp._vendor.leviathan\n"
        "def parse(view):\n    raise leviathan.FramingError('no')\n"
        "def gone(session, reason, error):\n    print(reason is leviathan.Reason.PROTOCOL, flush=True)\n")
    (tmp_path / "v.ini").write_text("[HEADER]\nTYPE = function\nFUNCTION = handlers:parse\n[COMUNICATOR_0]\nLISTEN = 0\n"
                                    "HANDLER = leviathan:echo\nON_DISCONNECT = handlers:gone\n")
    with Program(*command, "serve", "v.ini", cwd=tmp_path) as server:
        with server.client() as client:
            client.sendall(b"x")
            assert server.process.stdout.readline() == "True\n"
        status, out, err = server.end()
        assert (status, out) == (0, "") and "Traceback" not in err


# -- bundle -----------------------------------------------------------------------------------------------------------

def test_bundle_flat(bundle, tmp_path):
    (bundle.parent / "server.py").write_text("import leviathan\n" + ECHO)
    with Program("-S", bundle.parent / "server.py", cwd=tmp_path) as server:
        assert_it_echoes(server)


def test_bundle_in_a_package(bundle, tmp_path):
    (bundle.parent / "__init__.py").write_text("")
    (tmp_path / "server.py").write_text("from bundled import leviathan\n" + ECHO)
    with Program("-S", tmp_path / "server.py", cwd="/") as server:
        assert_it_echoes(server)


def test_bundle_as_a_script(bundle):
    with Program("-S", bundle, "--port", 0, cwd="/") as server:
        with server.client() as client:
            client.sendall(frame(b"hello"))
            assert read_frame(client) == b"hello"
        status, _, err = server.end()
        assert (status, err) == (0, "")


def test_bundle_of_a_bundle(bundle, tmp_path):
    """It says what to do instead, or makes the same file again."""
    status, _, err = run(bundle, "bundle", tmp_path / "again.py", cwd=tmp_path)
    if status:
        assert status == 2 and len(err.splitlines()) == 1
    else:
        assert (tmp_path / "again.py").read_bytes() == bundle.read_bytes()


def test_a_traceback_in_a_bundle_names_its_file_and_line(bundle):
    (bundle.parent / "raise.py").write_text("import leviathan\nleviathan._engine.Engine(leviathan._Core, 'x', 'two')\n")
    status, _, err = run("-S", bundle.parent / "raise.py", cwd="/")
    assert status == 1
    source = bundle.read_text(encoding="utf-8").split("\n")
    place = [line for line in err.splitlines() if line.strip().startswith('File "%s", line ' % bundle)][-1]
    number = int(place.split(", line ")[1].split(",")[0])
    assert "range(threads)" in source[number - 1]
    assert "range(threads)" in err                      # and the traceback shows that line


def test_the_bundle_has_the_sources_as_they_are(bundle):
    text = bundle.read_text(encoding="utf-8")
    for module in MODULES[1:]:
        with open(os.path.join(ROOT, module), encoding="utf-8") as file:
            assert file.read().rstrip("\n") in text
    assert ROOT not in text


# -- import -----------------------------------------------------------------------------------------------------------

def test_importing_changes_nothing(tmp_path):
    code = """
import ctypes, os, signal, socket, sys, threading
sys.path.insert(0, %r)
OPEN = "" if os.name == "nt" else "/proc/self/fd"     # under Wine that is the list of the server of all its processes
def state():
    return (threading.active_count(), sorted(os.listdir(OPEN)) if os.path.exists(OPEN) else 0,
            [signal.getsignal(number) for number in range(1, signal.NSIG)], signal.set_wakeup_fd(-1),
            socket.getdefaulttimeout(), sys.getswitchinterval(), sys.excepthook, threading.excepthook,
            dict(os.environ), os.getcwd(), sys.getrecursionlimit(), os.umask(0o22), sys.path[:])
os.umask(0o22)
before = state()
import leviathan
assert state() == before, (before, state())
for name in ("asyncio", "logging", "configparser", "argparse", "ssl"):
    assert name not in sys.modules, name
""" % ROOT
    assert run("-S", "-c", code, cwd=tmp_path) == (0, "", "")


def test_only_the_standard_library_is_imported():
    names = getattr(sys, "stdlib_module_names", None)
    if names is None:
        pytest.skip("this Python has no list of its modules (3.10 has)")
    for module in MODULES:
        with open(os.path.join(ROOT, module), encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, "%s: a relative import does not work flat" % module
                found = [node.module]
            else:
                continue
            for name in found:
                assert name.split(".")[0] in names, "%s imports %s" % (module, name)


@pytest.mark.parametrize("module", MODULES[1:])
def test_the_engine_does_not_import_the_core(module):
    with open(os.path.join(ROOT, module), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)
                and any(alias.name.startswith("leviathan") for alias in node.names)]


# -- command line -----------------------------------------------------------------------------------------------------

def leviathan_program(tmp_path, *arguments, ready=True):
    return Program(os.path.join(ROOT, "leviathan.py"), *arguments, cwd=tmp_path, ready=ready)


def outcome(tmp_path, *arguments):
    """Of the command line, as a module: a script is compiled anew each time, and there are many of these."""
    return run("-m", "leviathan", *arguments, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=ROOT))


@pytest.mark.parametrize("number", STOPS)
def test_the_main_job(tmp_path, number):
    """`python leviathan.py` answers a client, and ends with 0."""
    with leviathan_program(tmp_path, "--port", 0) as server:
        with server.client() as client:
            client.sendall(frame(b"hello") * 3)
            assert [read_frame(client) for _ in range(3)] == [b"hello"] * 3
        status, _, err = server.end(number)
        assert (status, err) == (0, "")


def test_the_line_to_try_works(tmp_path):
    """The hint that `python leviathan.py` prints, taken by its word."""
    with leviathan_program(tmp_path, "--port", 0) as server:
        hint = server.process.stdout.readline()
        assert hint.startswith("try: python -c ")
        status, out, err = run("-c", hint.split('"')[1], cwd=tmp_path)
        assert (status, err) == (0, "") and "hello" in out
        assert server.end()[0] == 0


def test_the_default_address_is_7878_on_localhost(tmp_path):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 7878))
        except OSError:
            pytest.skip("port 7878 is in use here")
    with leviathan_program(tmp_path) as server:
        assert server.address == ("127.0.0.1", 7878)
        assert server.end()[0] == 0


def test_version(tmp_path):
    status, out, _ = outcome(tmp_path, "--version")
    assert status == 0 and "0.1.0" in out


def test_serve(tmp_path):
    (tmp_path / "handlers.py").write_text("def shout(session, packet):\n    session.send(packet.upper())\n")
    (tmp_path / "my.ini").write_text("[HEADER]\nSIZE_END_CHAR=,\n[COMUNICATOR]\nCOUNT=1\n[COMUNICATOR_1]\n"
                                     "LISTEN=127.0.0.1:0\nHANDLER=handlers:shout\n")
    other = tmp_path / "elsewhere"
    other.mkdir()
    with leviathan_program(other, "serve", tmp_path / "my.ini") as server:
        with server.client() as client:
            client.sendall(b"5,hello")
            assert client.recv(100) == b"5,HELLO"
        assert server.end() == (0, "", "")


def test_serve_check(tmp_path):
    """A right file is said to be right, also while a server holds its port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "my.ini").write_text("[COMUNICATOR]\nCOUNT=1\n[COMUNICATOR_1]\nHANDLER=leviathan:echo\n"
                                         "LISTEN=127.0.0.1:%d\n" % taken.getsockname()[1])
        status, out, err = outcome(tmp_path, "serve", "my.ini", "--check")
    assert (status, err) == (0, "") and "my.ini" in out


def test_the_default_ini_is_right(tmp_path):
    status, out, err = outcome(tmp_path, "config")
    assert (status, err) == (0, "")
    (tmp_path / "default.ini").write_text(out)
    assert outcome(tmp_path, "serve", "default.ini", "--check")[0] == 0


@pytest.mark.parametrize("text, words", [
    ("[COMUNICATOR_1]\nIDLE_TIMEOUT=soon\n", ["[COMUNICATOR_1]", "IDLE_TIMEOUT", "soon", "seconds"]),
    ("[SESSION]\nSESSION_MAX=many\n", ["[SESSION]", "SESSION_MAX", "many", "number"]),
    ("[SESSION]\nSESION_MAX=5\n", ["[SESSION]", "SESION_MAX", "did you mean SESSION_MAX"]),
    ("[HEADER]\nTYPE=nonsense\n", ["[HEADER]", "TYPE", "nonsense", "delimiter"]),
    ("[COMUNICATOR_1]\nHANDLER=nowhere:nothing\n", ["HANDLER", "nowhere:nothing"]),
    ("this is no INI file\n", ["my.ini"]),
])
def test_a_wrong_ini_is_one_line_and_status_2(tmp_path, text, words):
    (tmp_path / "my.ini").write_text(text)
    for arguments in (["serve", "my.ini"], ["serve", "my.ini", "--check"]):
        status, out, err = outcome(tmp_path, *arguments)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1, err
        for word in words + ["my.ini"]:
            assert word in err, err


def test_a_missing_ini_is_one_line_and_status_2(tmp_path):
    status, _, err = outcome(tmp_path, "serve", "nowhere.ini")
    assert status == 2 and len(err.splitlines()) == 1 and "nowhere.ini" in err


def test_a_port_in_use_is_one_line_and_status_2(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = outcome(tmp_path, "--port", port)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1 and "127.0.0.1:%d" % port in err, err
        assert WINE or "in use" in err or "normally permitted" in err, err      # Wine has no text for that
        connect(taken.getsockname()).close()            # and the other's server is as it was


@pytest.mark.parametrize("text, word", [
    ("", "nothing to serve"), ("[COMMUNICATR_0]\nLISTEN = 0\n", "nothing to serve"),
    ("[COMUNICATOR_0]\nHANDLER = leviathan:echo\n", "nothing to serve"), ("[COMUNICATOR_0]\nLISTEN = 0\n", "HANDLER")])
def test_an_ini_that_would_serve_nobody_is_status_2(tmp_path, text, word):
    (tmp_path / "my.ini").write_text(text)
    for arguments in (["serve", "my.ini"], ["serve", "my.ini", "--check"]):
        status, out, err = outcome(tmp_path, *arguments)
        assert (status, out) == (2, "") and word in err.splitlines()[-1], err


def test_a_section_beyond_count_may_be_anything(tmp_path):
    (tmp_path / "my.ini").write_text("[COMUNICATOR]\nCOUNT = 1\n[COMUNICATOR_0]\nLISTEN = 0\nHANDLER = leviathan:echo\n"
                                     "[COMUNICATOR_1]\nLISTEN = 0\n")
    status, out, err = outcome(tmp_path, "serve", "my.ini", "--check")
    assert (status, out) == (0, "my.ini is right\n") and "not used: [COMUNICATOR_1]" in err


def test_what_happens_to_a_server_is_told_on_stderr(tmp_path):
    """A program that only runs an INI file has no other place to configure logging."""
    (tmp_path / "mine.py").write_text("def bad(session, packet):\n    raise RuntimeError('on purpose')\n")
    (tmp_path / "my.ini").write_text("[COMUNICATOR_0]\nLISTEN = 0\nHANDLER = mine:bad\n")
    with leviathan_program(tmp_path, "serve", "my.ini") as server:
        with server.client() as client:
            client.sendall(frame(b"x"))
            assert client.recv(1) == b""
        status, _, err = server.end()
    assert status == 0 and " ERROR a callback failed for 127.0.0.1:" in err and "RuntimeError: on purpose" in err


def test_a_stop_that_had_to_abort_is_status_1(tmp_path):
    (tmp_path / "mine.py").write_text("import leviathan\nleviathan.STOP_TIMEOUT = 0.2\n"
                                      "leviathan.CommunicatorList.run.__defaults__ = (0.2, None)\n"
                                      "def big(session, packet):\n    session.send(bytes(12 << 20))\n    session.send(b'x')\n")
    (tmp_path / "my.ini").write_text("[COMUNICATOR_0]\nLISTEN = 0\nHANDLER = mine:big\n")
    with leviathan_program(tmp_path, "serve", "my.ini") as server:
        with server.client() as client:
            client.sendall(frame(b"x"))
            assert client.recv(4) == b"\0\xc0\0\0"
            assert server.end()[0] == 1


def test_the_echo_servers_options_are_not_for_commands(tmp_path):
    status, _, err = outcome(tmp_path, "--port", 9, "serve", "my.ini")
    assert status == 2 and "--host and --port" in err


@pytest.mark.parametrize("name", MODULES)
def test_a_bundle_does_not_overwrite_what_it_is_made_of(tmp_path, name):
    copy_to(tmp_path, MODULES)
    before = (tmp_path / name).read_bytes()
    status, _, err = run("leviathan.py", "bundle", name, cwd=tmp_path)
    assert status == 2 and name in err and (tmp_path / name).read_bytes() == before
    assert run("leviathan.py", "bundle", tmp_path, cwd=tmp_path)[0] == 2            # a directory
    there = {each.name for each in tmp_path.iterdir()} - {"__pycache__"}
    assert there == set(MODULES), "nothing is left of the attempt"


def test_a_bundle_replaces_a_file_with_its_mode_and_touches_no_other_one(tmp_path):
    (tmp_path / "one.py").write_text("old")
    (tmp_path / "one.py.part").write_text("mine")
    (tmp_path / "one.py").chmod(0o700)
    mode = (tmp_path / "one.py").stat().st_mode
    assert run(os.path.join(ROOT, "leviathan.py"), "bundle", "one.py", cwd=tmp_path)[0] == 0
    assert (tmp_path / "one.py").stat().st_mode == mode and len((tmp_path / "one.py").read_bytes()) > 100000
    assert (tmp_path / "one.py.part").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_bundle_replaces_no_pipe(tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    status, _, err = run(os.path.join(ROOT, "leviathan.py"), "bundle", "pipe", cwd=tmp_path)
    assert status == 2 and "pipe is no regular file" in err and (tmp_path / "pipe").is_fifo()


def test_a_core_and_an_engine_of_two_versions_say_so(tmp_path):
    copy_to(tmp_path)
    core = tmp_path / "leviathan.py"
    core.write_text(core.read_text(encoding="utf-8").replace('__version__ = "', '__version__ = "9.', 1), encoding="utf-8")
    status, _, err = run("-c", "import leviathan", cwd=tmp_path)
    assert status == 1 and ENGINE + ".py is of leviathan " in err.splitlines()[-1] and "copy both" in err.splitlines()[-1]


def test_a_host_is_a_host_whatever_it_is_called(tmp_path):
    status, out, err = outcome(tmp_path, "--host", "unix", "--port", 7)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "unix:7" in err


def test_a_system_without_threads_is_one_line_and_status_2(tmp_path):
    code = ("import sys, threading; sys.path.insert(0, %r); import leviathan\n"
            "def start(thread):\n    raise RuntimeError(\"can't start new thread\")\n"
            "threading.Thread.start = start\nsys.exit(leviathan.main(['--port', '0']))" % ROOT)
    assert run("-c", code, cwd=tmp_path) == (2, "", "leviathan: can't start new thread\n")


def test_a_path_that_stdout_cannot_encode_is_printed_all_the_same(tmp_path):
    folder = tmp_path / "\u0416\u043e\u0440\u0430"
    folder.mkdir()
    (folder / "my.ini").write_text("[COMUNICATOR_0]\nHANDLER=leviathan:echo\nLISTEN=0\n")
    program, encoding = os.path.join(ROOT, "leviathan.py"), dict(os.environ, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    for arguments, word in ((["serve", "--check", folder / "my.ini"], "my.ini is right"),
                            (["bundle", folder / "leviathan.py"], "wrote")):
        status, out, err = run(program, *arguments, cwd=tmp_path, env=encoding)
        assert (status, err) == (0, "") and word in out and "\\u0416\\u043e" in out, out


@pytest.mark.parametrize("arguments", [["config"], ["config", "--markdown"]])
def test_a_configuration_without_a_stdout_is_one_line_and_status_2(tmp_path, arguments):
    code = "import sys; sys.path.insert(0, %r); import leviathan; sys.stdout = None; sys.exit(leviathan.main(%r))"
    assert run("-c", code % (ROOT, arguments), cwd=tmp_path) == (2, "", "leviathan: there is no stdout to print to\n")


def test_a_stop_that_is_interrupted_once_more_is_one_line_and_status_1(tmp_path):
    code = ("import sys; sys.path.insert(0, %r); import leviathan\n"
            "def stop(servers, timeout):\n    raise KeyboardInterrupt\n"
            "leviathan.CommunicatorList.stop = stop\nsys.exit(leviathan.main(['--port', '0']))" % ROOT)
    with Program("-c", code, cwd=tmp_path) as server:
        status, _, err = server.end()
        assert (status, err) == (1, "leviathan: interrupted\n")


def test_bad_usage_is_status_2(tmp_path):
    assert outcome(tmp_path, "nonsense")[0] == 2
    assert outcome(tmp_path, "serve")[0] == 2
    assert outcome(tmp_path, "bundle", tmp_path / "no" / "such" / "directory.py")[0] == 2


def test_debug_mode_names_a_slow_handler_and_poisons_returned_buffers(tmp_path):
    # LEVIATHAN_DEBUG=1 is read when a Communicator or a SessionManager is made.
    script = tmp_path / "debug.py"
    script.write_text("""
import logging, socket, sys, time
sys.path.insert(0, %r)
import leviathan
leviathan.SLOW_HANDLER = 0.001
logging.basicConfig(stream=sys.stdout, format="%%(message)s")
def slow_one(session, packet):
    time.sleep(0.01)
    session.send(packet)
server = leviathan.Communicator(leviathan.LengthPrefix(4), slow_one)
address = server.listen(0).address
servers = leviathan.CommunicatorList(server)
servers.start()
client = socket.create_connection(address)
client.sendall(bytes([0, 0, 0, 2]) + b"ab")
assert client.makefile("rb").read(6)[4:] == b"ab"
servers.stop()
buffer = server.manager.lease(4)
view = buffer.view
server.manager.give_back(buffer)
assert bytes(view) == b"\\xdd" * 4, bytes(view)
""" % os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, str(script)], env=dict(os.environ, LEVIATHAN_DEBUG="1"), timeout=30,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert "slow_one took" in done.stdout
