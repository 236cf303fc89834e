"""The examples that speak RESP, against Redis' own programs and the redis package."""
import re
import shlex

import pytest

import leviathan
from conftest import connect, eventually, read_exactly
from real_redis import needed, package, real, run  # noqa: F401
from test_examples import ROOT, Program, example, in_pieces, line_of, lines_of, python_blocks


@pytest.fixture
def server(tmp_path):
    with example(tmp_path, "redis_server.py", "--port", 0) as program:
        yield program
        status, out, err = program.end()
        assert (status, out) == (0, "") and not err, err


def ask(client, command, reply):
    client.sendall(command)
    assert read_exactly(client, len(reply)) == reply


def test_redis_server_by_hand(server):
    with server.client() as client, server.client() as other:
        ask(client, b"PING\r\n", b"+PONG\r\n")
        ask(client, b"set k v EX 100 NX\r\nset k w NX\r\nget k\r\nttl k\r\n", b"+OK\r\n$-1\r\n$1\r\nv\r\n:100\r\n")
        ask(client, b"set k w XX GET\r\nincr k\r\n", b"$1\r\nv\r\n-ERR value is not an integer or out of range\r\n")
        ask(client, b"set n 41 PX 50000\r\nincr n\r\ndecrby n 2\r\nttl n\r\n", b"+OK\r\n:42\r\n:40\r\n:50\r\n")
        ask(client, b"set gone x PX 1\r\n", b"+OK\r\n")
        eventually(lambda: client.sendall(b"exists gone gone\r\n") or line_of(client) == b":0")
        ask(client, b"rpush l a b c\r\nlpush l z y\r\nlrange l 0 -1\r\n",
            b":3\r\n:5\r\n*5\r\n$1\r\ny\r\n$1\r\nz\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n")
        ask(client, b"get l\r\n", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n")
        ask(client, b"multi\r\nset a 1\r\nincr a\r\nexec\r\n", b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n+OK\r\n:2\r\n")
        ask(client, b"multi\r\nnothing\r\nexec\r\n", b"+OK\r\n-ERR unknown command 'nothing'\r\n"
            b"-EXECABORT Transaction discarded because of previous errors.\r\n")
        ask(client, b"multi\r\nsubscribe c\r\nexec\r\nping\r\n", b"+OK\r\n-ERR Command not allowed inside a transaction\r\n"
            b"-EXECABORT Transaction discarded because of previous errors.\r\n+PONG\r\n")
        ask(client, b"lpop none 1\r\nlpop none\r\nreset\r\n", b"*-1\r\n$-1\r\n+RESET\r\n")
        ask(client, b"hset h f 1\r\nhgetall h\r\n", b":1\r\n*2\r\n$1\r\nf\r\n$1\r\n1\r\n")
        client.sendall(b"hello 3\r\n")
        while line_of(client) != b"modules":
            pass
        assert line_of(client) == b"*0"
        ask(client, b"hgetall h\r\nget none\r\n", b"%1\r\n$1\r\nf\r\n$1\r\n1\r\n_\r\n")
        ask(client, b"subscribe c\r\n", b">3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n")
        ask(other, b"publish c hi\r\n", b":1\r\n")
        ask(client, b"", b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n")
        ask(client, b"get none\r\n", b"_\r\n")                  # RESP3 may
        ask(other, b"subscribe c\r\nget k\r\n", b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"
            b"-ERR Can't execute 'get': only")
        client.sendall(b"quit\r\n")
        assert read_exactly(client, 5) == b"+OK\r\n" and client.recv(1) == b""


# Commands that the example and Redis 7 must answer with the same bytes, each list on an empty database and a connection of
# its own. What the example does otherwise on purpose is not here: one database, nothing but PING, QUIT, RESET and
# (P)(UN)SUBSCRIBE when subscribed, no subscribing within MULTI, and an error that names an unknown command but not its words.
ALIKE = {
    "lrange": """RPUSH l a b c d e; LRANGE l 0 -7; LRANGE l 0 -6; LRANGE l -100 -7; LRANGE l 1 -9; LRANGE l 3 1;
        LRANGE l -3 -2; LRANGE l 0 99; LRANGE none 0 -1; LINDEX l -6; LINDEX l -5""",
    "patterns": r"""MSET hello 1 hallo 2 hxllo 3 h*llo 4; KEYS h[^e]llo; KEYS h\*llo; KEYS h[a-e]llo; KEYS h?llo;
        KEYS *l*; KEYS x""",
    "a transaction": """MULTI; SET a 1; INCR a; LRANGE none 0 -1; LPOP a; EXEC; EXEC; DISCARD; MULTI; SET a; EXEC;
        MULTI; DISCARD""",
    "multi in multi": "MULTI; MULTI; SET a 1; EXEC; GET a",
    "the options of SET": """SET k v EX 10 PX 10; SET k v EX 10 KEEPTTL; SET k v KEEPTTL PX 10; SET k v NX XX;
        SET k v EX 0; SET k v PX -1; SET k v EX; SET k v EX abc; SET k v FOO; SET k v NX GET; GET k; SET k v2 NX GET;
        SET k v3 XX GET; TTL k; SET k v EX 100; SET k w KEEPTTL; TTL k; SET k x; TTL k; SET k v EX 99999999999999999;
        SET k v EX 9223372036854775807; SET k v PX 9223372036854775807; GET k; SETEX k 0 v; SETEX k -1 v; SETEX k abc v;
        SETEX k 9223372036854775807 v""",
    "KEEPTTL of what is over": """SET k v PX 1; GONE k; SET k w KEEPTTL; GET k; TTL k; SET k v PX 1; GONE k; PERSIST k;
        TTL k""",
    "integers": """SET n 10; INCRBY n 007; INCRBY n -0; INCRBY n +1; INCRBY n " 1"; INCRBY n 9223372036854775808;
        INCRBY n 1_0; INCRBY n 9223372036854775807; DECRBY n 9223372036854775807; DECRBY n 100; GET n; SET n ""; INCR n;
        SET n " 5"; INCR n; SET n 012; INCR n; SET n -0; INCR n; SET n -9223372036854775808; DECR n; GET n;
        INCRBY new 5""",
    "popping": """RPUSH l a b c; LPOP l -1; RPOP l -1; LPOP l x; LPOP l 0; LPOP l 2; LPOP l 5; LPOP l; LPOP l 1;
        RPOP l 0; LPOP none -1; LLEN l; EXISTS l; RPUSH l a b c; RPOP l 2; RPOP l; TYPE l""",
    "times": """SET k v; EXPIRE k 9999999999999999999; EXPIRE k 9223372036854775807; EXPIRE k -9223372036854775807;
        TTL k; PEXPIRE k 9223372036854775807; EXPIRE none 9223372036854775807; EXPIRE k abc; EXPIRE k 100; TTL k;
        PERSIST k; PERSIST k; TTL k; EXPIRE k -1; EXISTS k; EXPIRE k 10; TTL none; PTTL none""",
    "hashes": """HSET h a; HSET h a 1 b; EXISTS h; HSET h a 1 b 2; HINCRBY h a 9223372036854775807; HINCRBY h c x;
        HSET h s abc; HINCRBY h s 1; HINCRBY h c -5; HINCRBY h c -9223372036854775808; HGET h c; HDEL h a b c s zz;
        EXISTS h; HINCRBY h q 5; HGETALL h; HDEL h q; TYPE h; HMGET h a b""",
    "wrong types": """RPUSH l a; GET l; APPEND l x; INCR l; SETNX l v; MGET l s; STRLEN l; HGET l a; SET l v GET;
        TYPE l; SET l v; TYPE l; LPUSH l a; HSET l a b; LPOP l""",
    "HELLO": """HELLO 4; HELLO abc; HELLO 3x; HELLO 3 AUTH; HELLO 3 AUTH default; HELLO 3 FOO; HELLO 3 SETNAME;
        GET none; HELLO 3 SETNAME me; GET none; LPOP none 2; HGETALL none; HELLO 2; GET none; LPOP none 2""",
    "SCAN": """SET abc 1; RPUSH l a; SCAN 0 MATCH a*; SCAN 0 COUNT; SCAN 0 COUNT 0; SCAN 0 COUNT x; SCAN abc;
        SCAN 0 TYPE list; SCAN 0 TYPE zset; SCAN 0 FOO 1; SCAN 0 match l count 10 type LIST""",
    "subscribing": """SUBSCRIBE a b; PSUBSCRIBE p*; PING; PING hi; UNSUBSCRIBE a; UNSUBSCRIBE; PUNSUBSCRIBE;
        UNSUBSCRIBE; GET none; SUBSCRIBE a; GET none; RESET; GET none; UNSUBSCRIBE""",
    "RESET": "HELLO 3; SUBSCRIBE a; RESET; GET none; PUBLISH a nobody; MULTI; SET a 1; RESET; EXEC; RESET x",
    "the rest": """SELECT 0; SELECT x; FLUSHALL foo; FLUSHALL ASYNC; GET; MSET a 1 b; MSET a 1 a 2; GET a; DEL a a none;
        APPEND k abc; APPEND k def; STRLEN k; STRLEN none; ECHO ""; EXISTS k k none; UNLINK k""",
}


def reply_of(client):
    """The bytes of one reply."""
    line = b""
    while not line.endswith(b"\r\n"):
        line += read_exactly(client, 1)
    if line[:1] == b"$":
        return line + (read_exactly(client, int(line[1:]) + 2) if line != b"$-1\r\n" else b"")
    count = int(line[1:]) * (1 + (line[:1] == b"%")) if line[:1] in b"*%>~" else 0
    return line + b"".join([reply_of(client) for _ in range(count)])


def talk(address, script):
    """[(command, what it was answered)], as far as that can be the same twice."""
    talked = []
    with connect(address) as client:
        for command in ["FLUSHALL"] + script.split(";"):
            words = shlex.split(command)

            def send(*words):
                client.sendall(leviathan.Resp("client").encode(words))
                return reply_of(client)

            if words[0] == "GONE":
                eventually(lambda: send("EXISTS", words[1]) == b":0\r\n")
                continue
            reply = send(*words)
            if words[0] in ("SUBSCRIBE", "PSUBSCRIBE"):
                reply += b"".join([reply_of(client) for _ in words[2:]])
            if words[0] == "KEYS":                      # in any order
                reply = sorted(reply.split(b"\r\n"))
            elif words[0] == "HELLO" and reply[:1] != b"-":
                reply = reply[:1]                       # it has their names in it
            talked.append((command.strip(), reply))
    return talked


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_server_answers_as_redis_does(server, real, protocol):  # noqa: F811
    differ = []
    for name, script in ALIKE.items():
        script = "HELLO %d; %s" % (protocol, script)
        for (command, wanted), (_, found) in zip(talk(real.address, script), talk(server.address, script)):
            if wanted != found:
                differ.append((name, command, wanted, found))
    assert differ == []


def test_redis_server_with_redis_cli(server):
    cli = needed("redis-cli"), "-p", server.address[1]
    assert run(*cli, "set", "a key", "a\nvalue").strip() == "OK"
    assert run(*cli, "get", "a key").strip() == "a\nvalue"
    assert run(*cli, "-3", "hset", "h", "f", "1").strip() == "1"
    assert run(*cli, "-3", "--no-raw", "hgetall", "h").strip() == '1# "f" => "1"'
    assert "redis_version" in run(*cli, "info")
    assert run(*cli, "--no-raw", "config", "get", "save").split() == ["1)", '"save"', "2)", '""']
    assert "ERR unknown command 'nothing'" in run(*cli, "nothing")


def test_redis_server_with_redis_benchmark(server):
    out = run(needed("redis-benchmark"), "-p", server.address[1], "-c", 50, "-n", 2000, "-q", "-t",
              "ping,set,get,incr,lpush,rpush,lpop,rpop,hset,lrange_100,mset")
    assert out.count("requests per second") >= 11 and "rror" not in out, out
    out = run(needed("redis-benchmark"), "-p", server.address[1], "-c", 50, "-n", 5000, "-P", 16, "-q", "-r", 1000, "-t",
              "ping,set,get")
    assert out.count("requests per second") == 4 and "rror" not in out, out


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_server_with_the_redis_package(server, protocol):
    redis = package("redis")
    client = redis.Redis(port=server.address[1], protocol=protocol)
    with client:
        assert client.ping() and client.set("k", b"\r\n\0", ex=100) and client.get("k") == b"\r\n\0"
        assert client.set("k", "no", nx=True) is None and client.ttl("k") == 100
        assert client.incr("n", 5) == 5 and client.exists("k", "n", "none") == 2
        assert sorted(client.keys("*")) == [b"k", b"n"] and client.delete("k", "n") == 2
        assert client.rpush("l", 1, 2, 3) == 3 and client.lrange("l", 0, -1) == [b"1", b"2", b"3"]
        assert client.lpop("l") == b"1" and client.rpop("l", 5) == [b"3", b"2"] and client.llen("l") == 0
        assert client.hset("h", mapping={"a": 1, "b": "x"}) == 2 and client.hgetall("h") == {b"a": b"1", b"b": b"x"}
        with client.pipeline(transaction=True) as pipeline:
            assert pipeline.set("t", 1).incr("t").execute() == [True, 2]
        with pytest.raises(redis.ResponseError):
            client.incr("h")
        with client.pubsub() as listener:
            listener.subscribe("news")
            listener.psubscribe("n*")
            assert [listener.get_message(timeout=5)["type"] for _ in range(2)] == ["subscribe", "psubscribe"]
            assert client.publish("news", "hello") == 2
            found = [listener.get_message(timeout=5) for _ in range(2)]
            assert sorted((one["type"], one["data"]) for one in found) == [("message", b"hello"), ("pmessage", b"hello")]
            listener.unsubscribe()
            assert listener.get_message(timeout=5)["type"] == "unsubscribe"
        assert client.config_get("save") == {"save": ""} and client.info()["redis_version"] == "7.0.0"


def test_redis_client_survives_a_restart(tmp_path, real):  # noqa: F811
    with example(tmp_path, "redis_client.py", "--port", real.address[1], "--every", 0.05) as program:
        out = program.process.stdout
        assert program.line == "connected to 127.0.0.1:%d\n" % real.address[1]
        assert [out.readline() for _ in range(2)] == ["visit 1, OK now, WRONGTYPE\n", "visit 2, OK now, WRONGTYPE\n"]
        real.stop()
        while out.readline() != "disconnected from 127.0.0.1:%d\n" % real.address[1]:
            pass
        real.start()
        assert out.readline() == program.line
        assert out.readline() == "visit 1, OK now, WRONGTYPE\n"             # nothing was saved
        status, _, err = program.end()
        assert status == 0 and "Traceback" not in err
    with example(tmp_path, "redis_client.py", "--port", real.address[1], "--count", 1, ready=False) as program:
        status, out, err = program.result()
        assert (status, err) == (0, "") and out.splitlines()[-1].startswith("disconnected")


def test_redis_client_says_what_redis_refuses(tmp_path, real):  # noqa: F811
    with connect(real.address) as admin:
        ask(admin, b"config set requirepass secret\r\n", b"+OK\r\n")
    with example(tmp_path, "redis_client.py", "--port", real.address[1], "--every", 0.05) as program:
        for _ in range(2):                              # and goes on
            assert program.process.stdout.readline() == "refused: NOAUTH Authentication required.\n"
        status, _, err = program.end()
        assert status == 0 and "Traceback" not in err


def chat(tmp_path, real):  # noqa: F811
    return example(tmp_path, "cluster_chat.py", "--port", 0, "--redis", "127.0.0.1:%d" % real.address[1])


def test_cluster_chat_writes_its_lines_in_one_piece_each(tmp_path, real):  # noqa: F811
    """Two threads write them, and print() writes the end of a line apart: one line came in the middle of the other."""
    with in_pieces(tmp_path, "cluster_chat.py", "--port", 0, "--redis", "127.0.0.1:%d" % real.address[1]) as node:
        read = node.process.stdout.readline
        started = [node.line, read()]
        real.stop()
        pieces = "".join(sorted(started) + [read()])
        assert re.sub(r"[\d.]+:\d+", "ADDRESS", pieces) == \
            "'cluster_chat listens on ADDRESS\\n'\n'joined at ADDRESS\\n'\n'lost ADDRESS\\n'\n"


def test_cluster_chat_outlives_redis(tmp_path, real):  # noqa: F811
    joined = "joined at 127.0.0.1:%d\n" % real.address[1]
    with chat(tmp_path, real) as one, chat(tmp_path, real) as two:
        for node in (one, two):             # two threads say so: either line may be the first
            lines = sorted([node.line, node.process.stdout.readline()])
            assert lines[0].startswith("cluster_chat listens on ") and lines[1] == joined, lines
            node.address = node.addresses_in(lines[0])
        with one.client() as ann, two.client() as bob:
            assert lines_of(ann, 1) == lines_of(bob, 1) == [b"your name?"]
            ann.sendall(b"ann\nhello\n")
            for client in (ann, bob):
                assert lines_of(client, 2) == [b"* ann is here", b"<ann> hello"]
            real.stop()
            for client in (ann, bob):
                assert lines_of(client, 1) == [b"* the other machines cannot hear us"]
            ann.sendall(b"anybody?\n")
            assert lines_of(ann, 1) == [b"<ann> anybody?"]
            real.start()
            for node, client in ((one, ann), (two, bob)):
                while node.process.stdout.readline() != joined:
                    pass
                assert lines_of(client, 1) == [b"* the room is whole"]
            bob.sendall(b"bob\nback\n")
            for client in (ann, bob):
                assert lines_of(client, 2) == [b"* bob is here", b"<bob> back"]
        for node in (one, two):
            status, _, err = node.end()
            assert status == 0 and "Traceback" not in err, err


def test_cluster_chat_takes_a_message_of_several_lines(tmp_path, real):  # noqa: F811
    """Whoever else publishes there may send what is no line of a chat; the link stays."""
    with chat(tmp_path, real) as node:
        lines = [node.line, node.process.stdout.readline()]
        node.address = [node.addresses_in(line) for line in lines if "listens" in line][0]
        with node.client() as ann, connect(real.address) as other:
            assert lines_of(ann, 1) == [b"your name?"]
            for message, line in ((b"two\nlines", b"two lines"), (b"one", b"one")):
                other.sendall(b"*3\r\n$7\r\nPUBLISH\r\n$14\r\nleviathan:chat\r\n$%d\r\n%b\r\n" % (len(message), message))
                assert read_exactly(other, 4) == b":1\r\n" and lines_of(ann, 1) == [line]
        status, out, err = node.end()
        assert status == 0 and "joined" not in out and "Traceback" not in err, err


def test_the_resp_guide_is_code_that_works(tmp_path):
    program = tmp_path / "guide.py"
    program.write_text("import sys\nsys.path.insert(0, %r)\n" % ROOT + "\n".join(python_blocks("docs/resp.md"))
                       + "\nprint('done')\n")
    with Program(program, cwd=tmp_path, ready=False) as guide:
        assert guide.result() == (0, "done\n", "")
