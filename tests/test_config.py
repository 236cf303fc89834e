"""The INI file: MISSION's names unchanged, both spellings, what is allowed, and what a wrong value says."""
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

import leviathan

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")

# As a hand-written file of the original would look: other programs' sections, comments, spaces around =.
ORIGINAL = """\
# made by hand
[LOG]
LEVEL
path = %TEMP%\\x.log
[PROGRAM]
NAME = a = b ; c
[SESSION]
SESSION_MAX = 123      # sessions
RECV_BUF_SIZE=4k
NR_SEND_SOCKETDATA = 2
[MPOOL]
IDX_BUF_4 = 1
IDX_BUF_512=3
IDX_BUF_1k = 2
IDX_BUF_2m = 1
[IOCP]
COUNT = 2
[IOCP_0]
THR_COUNT = 1
[IOCP_1]
THR_COUNT = 2
[HEADER]
SIZE_END_CHAR=,
[COMUNICATOR]
COUNT = 2
[COMUNICATOR_0]
IOCP_IDX = 0
CLIENT_SESSION_MAX = 7
[COMUNICATOR_1]
IOCP_IDX = 1
CLIENT_SESSION_MAX = 0
"""


def build(tmp_path, text, handlers=None):
    path = tmp_path / "x.ini"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return leviathan.CommunicatorList.from_ini(path, handlers)


def wrong(tmp_path, text):
    with pytest.raises(leviathan.ConfigError) as caught:
        build(tmp_path, text)
    return caught.value


def test_an_original_file_works_unchanged(tmp_path):
    # B4, H2 and the configuration section of the mission.
    servers = build(tmp_path, ORIGINAL, {0: leviathan.echo})
    first, second = servers
    counts = first.manager.statistics()
    assert (first.manager.max_sessions, first.manager.recv_buffer) == (123, 4096)
    assert {size: row["free"] for size, row in counts["classes"].items()} == {4: 1, 512: 3, 1024: 2, 2 << 20: 1}
    assert (first.queue.threads, second.queue.threads) == (1, 2)
    assert (first.max_clients, second.max_clients) == (7, 0)
    assert isinstance(first.framing, leviathan.TextLength) and first.framing.end == b","
    assert servers.by_number == {0: first, 1: second}
    with pytest.raises(ValueError):
        second.listen(0)                    # CLIENT_SESSION_MAX=0: no clients
    servers.stop(0)


@pytest.mark.parametrize("ours, same", [("COMUNICATOR", "COMMUNICATOR"), ("[IOCP", "[QUEUE"), ("[SESSION]", "[session]"),
                                        ("SESSION_MAX", "session_max")])
def test_other_spellings_are_the_same(tmp_path, ours, same):
    servers = build(tmp_path, ORIGINAL.replace(ours, same), {0: leviathan.echo})
    assert len(servers) == 2 and servers[1].queue.threads == 2 and servers[0].manager.max_sessions == 123
    servers.stop(0)


def test_a_byte_order_mark_and_foreign_bytes_in_comments_do_no_harm(tmp_path):
    servers = build(tmp_path, b"\xef\xbb\xbf# \xbc\xad\xb9\xf6\n" + ORIGINAL.encode(), {0: leviathan.echo})
    assert len(servers) == 2
    servers.stop(0)


def test_indented_lines_and_comments_behind_a_section_do_no_harm(tmp_path):
    text = ORIGINAL.replace("]\n", "]    # or [that]\n").replace("\n", "\n    ")
    servers = build(tmp_path, text, {0: leviathan.echo})
    assert len(servers) == 2 and servers[1].queue.threads == 2 and servers[0].manager.max_sessions == 123
    servers.stop(0)


@pytest.mark.parametrize("header, kind, check", [
    ("SIZE_BYTES = 2\nBYTE_ORDER = little", leviathan.LengthPrefix, lambda f: (f.size, f.byteorder) == (2, "little")),
    ("TYPE = number\nSIZE_BYTES = 3", leviathan.LengthPrefix, lambda f: f.size == 3),
    ("TYPE = text\nSIZE_END_CHAR = :", leviathan.TextLength, lambda f: f.end == b":"),
    ("TYPE = text\nSIZE_END_CHAR = #", leviathan.TextLength, lambda f: f.end == b"#"),
    ("TYPE = delimiter\nDELIMITER = \\n", leviathan.Delimited, lambda f: f.delimiter == b"\n"),
    ("TYPE = delimiter\nDELIMITER = \\x00\\xff\nMAX_PACKET = 1k", leviathan.Delimited,
     lambda f: (f.delimiter, f.max_packet) == (b"\0\xff", 1024)),
    ("TYPE = fixed\nSIZE_BYTES = 100", leviathan.FixedSize, lambda f: f.size == 100),
    ("TYPE = raw", leviathan.Raw, lambda f: True),
    ("TYPE = function\nFUNCTION = builtins:len", leviathan.Function, lambda f: f.function is len),
])
def test_every_type_of_header(tmp_path, header, kind, check):
    # H1, H2, H4
    servers = build(tmp_path, "[HEADER_3]\n%s\n[COMUNICATOR_0]\nHEADER = header_3\nHANDLER = leviathan:echo\n" % header)
    framing = servers[0].framing
    assert type(framing) is kind and check(framing)
    servers.stop(0)


def test_it_listens_connects_and_calls_the_named_functions(tmp_path):
    unix = ", unix:%s" % (tmp_path / "s") if hasattr(socket, "AF_UNIX") else ""
    servers = build(tmp_path, "[COMUNICATOR_0]\nLISTEN = 127.0.0.1:0, [::1]:0%s\nHANDLER = leviathan:echo\n"
                              "ACCEPT_IDX = 1\nIOCP_IDX = 0\n[IOCP]\nCOUNT = 2\n" % unix)
    listeners = [listener for communicator in servers for listener in communicator.listeners]
    assert len(listeners) == (3 if unix else 2) and len({communicator.queue for communicator in servers}) == 2
    servers.start()
    try:
        for listener in listeners:
            family = socket.AF_UNIX if listener.unix else socket.AF_INET6 if ":" in listener.address[0] else socket.AF_INET
            with socket.socket(family) as client:
                client.settimeout(5)
                client.connect(listener.address)
                client.sendall(b"\0\0\0\2ab")
                assert client.makefile("rb").read(6) == b"\0\0\0\2ab"
    finally:
        assert servers.stop()


@pytest.mark.parametrize("text, words", [
    ("[SESSION]\nSESSION_MAX = many\n", ["x.ini", "[SESSION]", "SESSION_MAX=many", "whole number from 1"]),
    ("[SESSION]\nSESSION_MAX = 0\n", ["SESSION_MAX=0", "from 1"]),
    ("[SESSION]\nSESSION_MAX = 1_0\n", ["SESSION_MAX=1_0"]),
    ("[SESSION]\nRECV_BUF_SIZE = 4q\n", ["RECV_BUF_SIZE=4q", "4k"]),
    ("[SESSION]\nRECV_BUF_SIZE = 3\n", ["RECV_BUF_SIZE=3", "8 to 2097152 bytes"]),
    ("[SESSION]\nRECV_BUF_SIZE = 3m\n", ["RECV_BUF_SIZE=3m", "8 to 2097152 bytes"]),
    ("[SESSION]\nMEMORY_LIMIT = 1k\n", ["MEMORY_LIMIT=1k", "a RecvBuf has 4096"]),
    ("[MPOOL]\nIDX_BUF_2m = 1000\n", ["[MPOOL] IDX_BUF_2m=1000", "1073741824", "2097152000", "0 to 512"]),
    ("[SESSION]\nSESSIN_MAX = 4\n", ["SESSIN_MAX", "did you mean SESSION_MAX"]),
    ("[MPOOL]\nIDX_BUF_3 = 4\n", ["IDX_BUF_3", "IDX_BUF_2m"]),
    ("[IOCP_0]\nTHR_COUNT = -1\n", ["[IOCP_0]", "THR_COUNT=-1"]),
    ("[HEADER]\nTYPE = netstring\n[COMUNICATOR_0]\n", ["TYPE=netstring", "number, text, delimiter"]),
    ("[HEADER]\nSIZE_BYTES = 9\n[COMUNICATOR_0]\n", ["[HEADER]", "SIZE_BYTES=9", "1 to 8"]),
    ("[HEADER]\nSIZE_END_CHAR = 5\n[COMUNICATOR_0]\n", ["SIZE_END_CHAR=5", "no digit"]),
    ("[HEADER]\nTYPE = function\n[COMUNICATOR_0]\n", ["FUNCTION", "module:function"]),
    ("[COMUNICATOR_0]\nHANDLER = nowhere:nothing\n", ["HANDLER=nowhere:nothing", "nowhere"]),
    ("[COMUNICATOR_0]\nHANDLER = ..:nothing\n", ["HANDLER=..:nothing", "module:function"]),
    ("[COMUNICATOR_0]\nHANDLER = leviathan:__version__\n", ["HANDLER", "no function"]),
    ("[COMUNICATOR_0]\nLISTEN = 127.0.0.1:99999\n", ["LISTEN=127.0.0.1:99999", "0 to 65535"]),
    ("[COMUNICATOR_0]\nLISTEN = ::1:5\n", ["LISTEN", "[IPv6 address]:port"]),
    ("[COMUNICATOR_0]\nLISTEN = 1\nCLIENT_SESSION_MAX = 0\n", ["CLIENT_SESSION_MAX=0", "LISTEN"]),
    ("[COMUNICATOR_0]\nIOCP_IDX = 5\n", ["IOCP_IDX=5", "no queue"]),
    ("[COMUNICATOR_0]\nHEADER = HEADER_2\n", ["HEADER=HEADER_2", "no such section"]),
    ("[COMUNICATOR_0]\nIDLE_TIMEOUT = -3\n", ["IDLE_TIMEOUT=-3", "seconds"]),
    ("[COMUNICATOR]\nCOUNT = 2\n[COMUNICATOR_0]\n", ["COUNT=2", "not so many", "0 to 1"]),
    ("[IOCP]\nCOUNT = 3\n[IOCP_5]\n[COMUNICATOR_0]\nIOCP_IDX = 4\n", ["IOCP_IDX=4", "allowed: 0, 1, 5"]),
    ("[COMUNICATOR_0]\nLISTEN = 0\n[COMMUNICATOR_0]\nlisten = 1\n", ["[COMMUNICATOR_0]", "LISTEN", "line 2", "line 4"]),
    ("[IOCP]\nCOUNT = 1\n[IOCP_0]\n[IOCP_1]\n[COMUNICATOR_0]\nIOCP_IDX = 1\n", ["IOCP_IDX=1", "allowed: 0"]),
    ("[COMMUNICATOR_0]\nIOCP_IDX = 4\n", ["[COMMUNICATOR_0] IOCP_IDX=4", "allowed: 0"]),
    ("[HEADER_7]\n[COMUNICATOR_0]\nHEADER = HEADER_2\n", ["HEADER=HEADER_2", "allowed: HEADER, HEADER_7"]),
    ("[HEADER]\nSIZE_BYTES = 0\n[COMUNICATOR_0]\n", ["SIZE_BYTES=0", "number: 1 to 8"]),
    ("[HEADER]\nTYPE = fixed\nSIZE_BYTES = 10\nMAX_PACKET = 2\n[COMUNICATOR_0]\n", ["MAX_PACKET=2", "TYPE=fixed does not"]),
    ("[HEADER]\nDELIMITER = ;\n[COMUNICATOR_0]\n", ["DELIMITER=;", "TYPE=number does not", "SIZE_BYTES"]),
    ("[SESSION]\nMEMORY_LIMIT = 1k\n", ["MEMORY_LIMIT=1k", "4096 bytes or more"]),
    ("[MPOOL]\nIDX_BUF_1m = 500\nIDX_BUF_2m = 300\n", ["IDX_BUF_2m=300", "0 to 262 "]),
    ("[COMUNICATOR_0]\nCONNECT = nohost\n", ["CONNECT=nohost", "port 1 to 65535"]),
    ("[COMUNICATOR_0]\nLISTEN = 1\nCLIENT_SESSION_MAX = 0\n", ["CLIENT_SESSION_MAX=0", "1 or more"]),
    ("[COMUNICATOR_0]\nLISTEN = [::1:0\n", ["LISTEN=[::1:0", "[IPv6 address]:port"]),
    ("[COMUNICATOR_0]\nLISTEN = []:7878\n", ["LISTEN=[]:7878", "[IPv6 address]:port"]),
    ("[COMUNICATOR_0]\nLISTEN = ..:1\n", ["LISTEN=..:1", "labels of 1 to 63"]),
    ("[COMUNICATOR_0]\nCONNECT = 127.0.0.1:0\n", ["CONNECT=127.0.0.1:0", "port 1 to 65535"]),
    ("[HEADER]\nTYPE = delimiter\nDELIMITER = \\q\n[COMUNICATOR_0]\n", ["DELIMITER=\\q", "are understood"]),
    ("[COMUNICATOR_0]\nHANDLER = bad_value:f\n", ["HANDLER=bad_value:f", "ValueError: on purpose"]),
    ("[COMUNICATOR_0]\nHANDLER = bad_exit:f\n", ["HANDLER=bad_exit:f", "SystemExit: 3"]),
    ("[COMUNICATOR_0]\nHANDLER = leviathan:nope\n", ["HANDLER=leviathan:nope", "nope"]),
])
def test_a_wrong_value_says_file_section_key_value_and_what_is_allowed(tmp_path, monkeypatch, text, words):
    (tmp_path / "bad_value.py").write_text("raise ValueError('on\\npurpose')")
    (tmp_path / "bad_exit.py").write_text("import sys\nsys.exit(3)")
    monkeypatch.setattr(sys, "path", [str(tmp_path)] + sys.path)
    error = wrong(tmp_path, text)
    for word in words:
        assert word in str(error), str(error)
    assert "\n" not in str(error) and error.section and error.key


ODD = ("0", "-1", "3", "1000000000", "9" * 30, "9" * 5000, "1.5", "nan", "1_0", "0x10", "\u0665", "3g", "k", "x", "#", "\\x",
       "\\", "\u20ac", "%(x)s", ",", ":", "a:b:80", "[::1:80", "unix:", "HEADER_\u0661", "HEADER_" + "9" * 5000, "leviathan:",
       "..:x")


@pytest.mark.parametrize("row", leviathan._SETTINGS, ids=lambda row: row.section + "-" + row.key)
def test_no_value_of_any_setting_is_a_traceback(row):
    """It can be used, or it is a ConfigError that names the key; of whichever type the framing is."""
    for kind in ("number", "text", "delimiter", "fixed", "http", "resp") if row.section == "HEADER_n" else ("number",):
        for value in ODD:
            sections = {"COMUNICATOR_0": "HEADER = HEADER_0\n" if row.key != "HEADER" else "",
                        "HEADER_0": "TYPE = %s\n" % kind if row.key != "TYPE" else ""}
            name = row.section.replace("_n", "_0")
            sections[name] = sections.get(name, "") + "%s = %s\n" % (row.key, value)
            text = "".join("[%s]\n%s" % pair for pair in sections.items())
            try:
                leviathan._build(leviathan._read_ini("x.ini", text), {}, False)
            except leviathan.ConfigError as error:
                assert error.file == "x.ini" and error.key in (row.key, "MEMORY_LIMIT", "COUNT", "MAX_PACKET"), error


@pytest.mark.parametrize("text, words", [
    ("[COMUNICATOR_0]\nLISTEN = 127.0.0.1:0,\n  [::1]:0\n", ["line 3", "[::1]:0"]),
    ("[LOG]\n[SESSION] more\nSESSION_MAX = 1\n", ["line 2", "[SESSION] more"]),
    ("LISTEN = 1\n", ["line 1", "before any section"]),
    ("\0\1\2", ["no text"])])
def test_what_is_no_ini_file_says_where(tmp_path, text, words):
    error = str(wrong(tmp_path, text))
    assert "x.ini" in error and "\n" not in error
    for word in words:
        assert word in error, error


def test_a_handler_for_no_section_is_an_error(tmp_path):
    with pytest.raises(leviathan.ConfigError, match=r"COMUNICATOR_7"):
        build(tmp_path, "[COMUNICATOR_0]\n", {7: leviathan.echo})


def test_what_another_program_writes_is_left_alone(tmp_path):
    servers = build(tmp_path, "[DEFAULT]\nFOO = 3\n[PROGRAM]\nLIST =\n  [1, 2],\nA = 1\nA = 2\n[COMUNICATOR_0]\n"
                              "HANDLER = leviathan:echo\n")
    assert len(servers) == 1


@pytest.mark.parametrize("foreign", ["a = 1\n  = b", "========", "= x", "a = 1\u2028LISTEN", "a = 1\f[SESSION] x", "a = \x1c[",
                                     "[]", "[", "[HEADER]x]", "[[x]\n]]", "a\n  b\n\n  = c", "=", "\ufeff[x"])
def test_what_configparser_cannot_read_of_another_program_is_left_alone_too(tmp_path, foreign):
    servers = build(tmp_path, "[SESSION]\nSESSION_MAX = 7\n[OTHER]\n%s\n[COMUNICATOR_0]\nIDLE_TIMEOUT = 5\n" % foreign)
    assert [server.idle_timeout for server in servers] == [5] and servers[0].manager.max_sessions == 7


def test_sections_that_are_not_used_are_told_of(tmp_path, caplog):
    """Too small a COUNT, and a name that is nearly one of ours; not that of another program."""
    text = "[COMUNICATOR]\nCOUNT = 1\n[COMUNICATOR_0]\n[COMUNICATOR_4]\n[SESION]\n[IOCP0]\n[LOG]\n[PROGRAM]\n"
    assert len(build(tmp_path, text, {0: leviathan.echo})) == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and all("x.ini" in line for line in told)
    assert "did you mean [SESSION]?" in told[0] and "[IOCP0]" in told[1]
    assert "COUNT is 1: not used: [COMUNICATOR_4]" in told[2]


@pytest.mark.parametrize("name, meant", [("COMUNICATOR1", "COMUNICATOR_1"), ("COMMUNICATR_7", "COMMUNICATOR_7"),
                                         ("IOCP__2", "IOCP_2"), ("SESSION_1", "SESSION"), ("sesion", "SESSION")])
def test_a_section_that_is_nearly_one_of_ours_is_told_of_with_the_right_name(tmp_path, caplog, name, meant):
    build(tmp_path, "[%s]\n" % name)
    assert [line.getMessage().partition("; ")[2] for line in caplog.records] == ["did you mean [%s]?" % meant]


def test_a_delimiter_is_the_bytes_that_stand_in_the_file(tmp_path):
    for encoding in "utf-8", "latin-1":
        text = "[HEADER]\nTYPE = delimiter\nDELIMITER = \u00e9\\\\\\x41\n[COMUNICATOR_0]\n".encode(encoding)
        assert build(tmp_path, text, {0: leviathan.echo})[0].framing.delimiter == "\u00e9\\A".encode(encoding)


def test_no_section_at_all_is_one_line(tmp_path):
    assert "\n" not in str(wrong(tmp_path, "SESSION_MAX = 4\n"))


def test_a_missing_handler_ends_the_session_and_says_so(tmp_path, caplog):
    servers = build(tmp_path, "[COMUNICATOR_0]\nLISTEN = 127.0.0.1:0\n")
    servers.start()
    try:
        with socket.create_connection(servers[0].listeners[0].address, 5) as client:
            client.sendall(b"\0\0\0\1a")
            try:
                assert client.recv(1) == b""
            except ConnectionResetError:
                pass                        # aborted: either is an end
    finally:
        servers.stop()
    assert any("HANDLER" in str(record.exc_info and record.exc_info[1]) for record in caplog.records)


def test_the_printed_default_is_right_and_has_every_setting(tmp_path):
    text = leviathan._default_ini()
    for row in leviathan._SETTINGS:
        assert re.search(r"^(# )?%s = " % row.key, text, re.M), row.key
    # Also with every default written out, instead of left in a comment.
    for variant in (text, re.sub(r"^# (\w+ = .+)$", r"\1", text, flags=re.M)):
        servers = build(tmp_path, variant.replace(":7878", ":0"))
        assert len(servers) == 1
        servers.stop(0)


def test_the_reference_in_docs_is_made_from_the_table():
    with open(os.path.join(ROOT, "docs", "ini.md"), encoding="utf-8") as file:
        assert file.read() == leviathan._ini_reference(), "run: python leviathan.py config --markdown > docs/ini.md"


def test_serve_with_a_wrong_file_is_one_line_and_status_2(tmp_path):
    path = tmp_path / "bad.ini"
    path.write_text("[SESSION]\nSESSION_MAX = no\n")
    for arguments in (["serve", str(path)], ["serve", str(tmp_path / "none.ini")], ["serve", "--check", str(path)]):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "leviathan.py")] + arguments, timeout=30,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        assert done.stderr.startswith("leviathan: ") and ".ini" in done.stderr


def test_a_written_count_of_queues_is_how_many_there_are(tmp_path, caplog):
    """As for Communicators, those with the least numbers; the others are told of and get no threads."""
    servers = build(tmp_path, "[IOCP]\nCOUNT = 2\n[IOCP_1]\nTHR_COUNT = 1\n[IOCP_2]\nTHR_COUNT = 3\n[IOCP_7]\nTHR_COUNT = 9\n"
                              "[COMUNICATOR_0]\nIOCP_IDX = 2\nHANDLER = leviathan:echo\n")
    before = threading.active_count()
    servers.start()
    try:
        assert threading.active_count() - before == 1 + 3
        assert [line.getMessage().partition(": ")[2] for line in caplog.records] == ["[IOCP] COUNT is 2: not used: [IOCP_7]"]
    finally:
        assert servers.stop()


def test_an_address_without_a_host_is_this_machine_alone(tmp_path):
    """`:0` too, which bind() would take for every address of the machine."""
    servers = build(tmp_path, "[COMUNICATOR_0]\nLISTEN = 0, :0, 127.0.0.1:0\nHANDLER = leviathan:echo\n")
    try:
        assert [listener.address[0] for listener in servers[0].listeners] == ["127.0.0.1"] * 3
    finally:
        assert servers.stop()


def test_buffers_for_which_there_is_no_memory_are_a_config_error(tmp_path, monkeypatch):
    def manager(*args):
        raise MemoryError

    monkeypatch.setattr(leviathan, "SessionManager", manager)
    error = wrong(tmp_path, "[MPOOL]\nIDX_BUF_2m = 100\n")
    assert error.section == "MPOOL" and "no memory for 209715200 bytes" in str(error)


def test_messages_have_the_name_that_the_file_has(tmp_path):
    servers = build(tmp_path, "[COMMUNICATOR_3]\nHANDLER = leviathan:echo\n")
    assert servers[0].name == "COMMUNICATOR_3"
    assert servers.stop()
