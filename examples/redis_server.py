"""A Redis in memory: redis-cli, redis-benchmark and the redis packages talk to it, in RESP2 and RESP3.

    python examples/redis_server.py --port 6380        and then:  redis-cli -p 6380 set greeting hello
"""
import argparse
import fnmatch
import os
import re
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import leviathan  # noqa: E402
from leviathan import Push, RespError  # noqa: E402

data = {}               # {key: bytes, deque-like list, or dict}; one thread serves all, so nothing is locked
expires = {}            # {key: time.monotonic() at which it is gone}
channels = {}           # {(b"message" or b"pmessage", channel or pattern): {session: None}}
commands = {}           # {name in small or in capital letters: (function, least words, most words)}
settings = {b"save": b"", b"appendonly": b"no", b"databases": b"1", b"maxmemory": b"0"}

SYNTAX = RespError("ERR syntax error")
NO_INTEGER = RespError("ERR value is not an integer or out of range")
NOT_POSITIVE = RespError("ERR value is out of range, must be positive")
WRONG_TYPE = RespError("WRONGTYPE Operation against a key holding the wrong kind of value")
NO_LIST = object()      # RESP2 has a null of its own for lists, and LPOP with a count gives it


class Client:
    """What is remembered of a connection, in session.data."""

    def __init__(self):
        self.queued = None          # commands since MULTI
        self.wrong = False          # one of them was refused
        self.subscribed = {}        # {(kind, channel): None}


def command(name, least, most=None):
    """A command and how many words it takes, its name included; most=-1: any number."""
    def register(function):
        for spelling in (name.lower(), name.upper()):
            commands[spelling.encode()] = (function, least, least if most is None else sys.maxsize if most < 0 else most)
        return function
    return register


def find(key, kind=bytes):
    """The value, None if there is none or its time is over. Raises WRONGTYPE."""
    if key in expires and expires[key] <= time.monotonic():
        del expires[key], data[key]
    value = data.get(key)
    if value is not None and type(value) is not kind and kind is not None:
        raise WRONG_TYPE
    return value


def make(key, kind):
    """The list or hash of that name, made if there is none."""
    value = find(key, kind)
    if value is None:
        value = data[key] = kind()
    return value


def remove(key):
    expires.pop(key, None)
    return data.pop(key, None)


def whole(word, error=NO_INTEGER):
    if not re.fullmatch(rb"0|-?[1-9][0-9]{0,18}", word) or not -1 << 63 <= int(word) < 1 << 63:
        raise error
    return int(word)


def life(command, word, unit):
    """Milliseconds, of a word that says so many times *unit*. Raises an error that names the command."""
    time_to_live = whole(word) * unit
    if not -1 << 63 <= time_to_live < (1 << 63) - time.time() * 1000:
        raise RespError("ERR invalid expire time in '%s' command" % command.decode().lower())
    return time_to_live


# ---- connection

@command("PING", 1, 2)
def ping(session, words):
    if session.data.subscribed and leviathan.Resp.version(session) == 2:
        return [b"pong", words[1] if len(words) > 1 else b""]
    return words[1] if len(words) > 1 else "PONG"


@command("ECHO", 2)
def echo(session, words):
    return words[1]


@command("HELLO", 1, -1)
def hello(session, words):
    if len(words) > 1:
        version = whole(words[1], RespError("ERR Protocol version is not an integer or out of range"))
        if version not in (2, 3):
            return RespError("NOPROTO unsupported protocol version")
        options = words[2:]
        while options:                              # anybody may come in, under any name
            size = {b"AUTH": 3, b"SETNAME": 2}.get(options[0].upper(), sys.maxsize)
            if len(options) < size:
                return RespError("ERR Syntax error in HELLO option '%s'" % options[0].decode("utf-8", "replace"))
            del options[:size]
        leviathan.Resp.version(session, version)
    return {b"server": b"leviathan", b"version": b"7.0.0", b"proto": leviathan.Resp.version(session), b"id": session.id,
            b"mode": b"standalone", b"role": b"master", b"modules": []}


@command("SELECT", 2)
def select(session, words):
    return "OK" if whole(words[1]) == 0 else RespError("ERR DB index is out of range")


@command("CLIENT", 2, -1)
def client(session, words):
    return session.id if words[1].upper() == b"ID" else "OK"


@command("COMMAND", 1, -1)
def command_(session, words):
    names = sorted(name.lower() for name in commands if name.isupper())
    if len(words) == 1:
        return [[name, commands[name][1], [], 1, 1, 1] for name in names]
    return len(names) if words[1].upper() == b"COUNT" else {} if words[1].upper() == b"DOCS" else []


@command("CONFIG", 2, -1)
def config(session, words):
    if words[1].upper() == b"GET":
        return {name: value for name, value in settings.items()
                if any(matches(pattern.lower(), name) for pattern in words[2:])}
    if words[1].upper() == b"SET":
        settings.update(zip(words[2::2], words[3::2]))
    return "OK"


@command("INFO", 1, -1)
def info(session, words):
    return ("# Server\r\nredis_version:7.0.0\r\nredis_mode:standalone\r\nprocess_id:%d\r\n\r\n# Clients\r\n"
            "connected_clients:%d\r\n\r\n# Keyspace\r\ndb0:keys=%d,expires=%d,avg_ttl=0\r\n"
            % (os.getpid(), len(session.communicator.sessions), len(data), len(expires))).encode()


@command("QUIT", 1)
def quit_(session, words):
    session.send("OK")
    session.close()
    return NotImplemented               # it is answered already


@command("RESET", 1)
def reset(session, words):
    on_disconnect(session, None, None)          # all that is remembered of it, as if it were new
    on_connect(session)
    leviathan.Resp.version(session, 2)
    return "RESET"


# ---- keys and strings

def matches(pattern, name):
    pattern = re.sub(r"\\(.)", r"[\1]", pattern.decode("latin-1").replace("[^", "[!"))      # Redis' spelling of the same
    return fnmatch.fnmatchcase(name.decode("latin-1"), pattern)


@command("GET", 2)
def get(session, words):
    return find(words[1])


@command("SET", 3, -1)
def set_(session, words):
    key = words[1]
    if len(words) == 3:
        data[key] = words[2]
        if expires:
            expires.pop(key, None)
        return "OK"
    options = [word.upper() for word in words[3:]]
    find(key, None)                     # what is over has no time left to keep
    ends = expires.get(key) if b"KEEPTTL" in options else None
    if sum(map(options.count, (b"EX", b"PX", b"KEEPTTL"))) > 1:
        return SYNTAX
    unless, only, old = b"NX" in options, b"XX" in options, b"GET" in options
    while options:
        option = options.pop(0)
        if option in (b"EX", b"PX") and options:
            wanted = life(words[0], options.pop(0), 1000 if option == b"EX" else 1)
            if wanted <= 0:
                return RespError("ERR invalid expire time in '%s' command" % words[0].decode().lower())
            ends = time.monotonic() + wanted / 1000
        elif option not in (b"NX", b"XX", b"GET", b"KEEPTTL"):
            return SYNTAX
    if unless and only:
        return SYNTAX
    before = find(key, bytes if old else None)
    if before is not None if unless else before is None and only:
        return before if old else None
    data[key] = words[2]
    expires.pop(key, None)
    if ends is not None:
        expires[key] = ends
    return before if old else "OK"


@command("SETNX", 3)
def setnx(session, words):
    return int(set_(session, [*words, b"NX"]) is not None)


@command("SETEX", 4)
def setex(session, words):
    return set_(session, [words[0], words[1], words[3], b"EX", words[2]])


@command("MGET", 2, -1)
def mget(session, words):
    return [value if type(value) is bytes else None for value in (find(key, None) for key in words[1:])]


@command("MSET", 3, -1)
def mset(session, words):
    if len(words) % 2 == 0:
        return RespError("ERR wrong number of arguments for 'mset' command")
    for key, value in zip(words[1::2], words[2::2]):
        remove(key)
        data[key] = value
    return "OK"


@command("APPEND", 3)
def append(session, words):
    data[words[1]] = (find(words[1]) or b"") + words[2]
    return len(data[words[1]])


@command("STRLEN", 2)
def strlen(session, words):
    return len(find(words[1]) or b"")


def add(key, amount):
    value = find(key)
    number = (0 if value is None else whole(value)) + amount
    if not -1 << 63 <= number < 1 << 63:
        return RespError("ERR increment or decrement would overflow")
    data[key] = b"%d" % number
    return number


command("INCR", 2)(lambda session, words: add(words[1], 1))
command("DECR", 2)(lambda session, words: add(words[1], -1))
command("INCRBY", 3)(lambda session, words: add(words[1], whole(words[2])))
command("DECRBY", 3)(lambda session, words: add(words[1], -whole(words[2])))


@command("DEL", 2, -1)
def delete(session, words):
    return sum(find(key, None) is not None and remove(key) is not None for key in words[1:])


command("UNLINK", 2, -1)(delete)


@command("EXISTS", 2, -1)
def exists(session, words):
    return sum(find(key, None) is not None for key in words[1:])


@command("KEYS", 2)
def keys(session, words):
    return [key for key in list(data) if matches(words[1], key) and find(key, None) is not None]


@command("SCAN", 2, -1)
def scan(session, words):
    if not words[1].isdigit():
        return RespError("ERR invalid cursor")
    options = dict(zip([word.upper() for word in words[2::2]], words[3::2]))
    if len(words) % 2 or set(options) - {b"MATCH", b"COUNT", b"TYPE"} or whole(options.get(b"COUNT", b"1")) < 1:
        return SYNTAX
    kind = options.get(b"TYPE", b"").decode().lower()
    return [b"0", [key for key in keys(session, [b"", options.get(b"MATCH", b"*")])       # all at once
                   if kind in ("", type_(session, [b"", key]))]]


@command("TYPE", 2)
def type_(session, words):
    return {bytes: "string", list: "list", dict: "hash", type(None): "none"}[type(find(words[1], None))]


@command("DBSIZE", 1)
def dbsize(session, words):
    return len(keys(session, [b"", b"*"]))


@command("FLUSHALL", 1, 2)
def flushall(session, words):
    if len(words) > 1 and words[1].upper() not in (b"ASYNC", b"SYNC"):
        return SYNTAX
    data.clear()
    expires.clear()
    return "OK"


command("FLUSHDB", 1, 2)(flushall)


def expire_in(words, unit):
    key, wanted = words[1], life(words[0], words[2], unit)
    if find(key, None) is None:
        return 0
    if wanted <= 0:
        remove(key)
    else:
        expires[key] = time.monotonic() + wanted / 1000
    return 1


def time_left(key, unit):
    if find(key, None) is None:
        return -2
    return round((expires[key] - time.monotonic()) * unit) if key in expires else -1


command("EXPIRE", 3)(lambda session, words: expire_in(words, 1000))
command("PEXPIRE", 3)(lambda session, words: expire_in(words, 1))
command("TTL", 2)(lambda session, words: time_left(words[1], 1))
command("PTTL", 2)(lambda session, words: time_left(words[1], 1000))


@command("PERSIST", 2)
def persist(session, words):
    return int(find(words[1], None) is not None and expires.pop(words[1], None) is not None)


# ---- lists and hashes: an empty one is none

def kept(key):
    """After something was taken from it."""
    if not data[key]:
        remove(key)


@command("RPUSH", 3, -1)
def rpush(session, words):
    items = make(words[1], list)
    items += words[2:]
    return len(items)


@command("LPUSH", 3, -1)
def lpush(session, words):
    items = make(words[1], list)
    items[:0] = words[:1:-1]
    return len(items)


def pop(words, at):
    items = find(words[1], list)
    count = whole(words[2], NOT_POSITIVE) if len(words) > 2 else 1
    if count < 0:
        return NOT_POSITIVE
    if items is None:
        return NO_LIST if len(words) > 2 else None
    taken = [items.pop(at) for _ in range(min(count, len(items)))]
    kept(words[1])
    return taken if len(words) > 2 else taken[0]


command("LPOP", 2, 3)(lambda session, words: pop(words, 0))
command("RPOP", 2, 3)(lambda session, words: pop(words, -1))
command("LLEN", 2)(lambda session, words: len(find(words[1], list) or ()))


@command("LRANGE", 4)
def lrange(session, words):
    items = find(words[1], list) or []
    first, last = whole(words[2]), whole(words[3])
    return items[max(0, first + len(items)) if first < 0 else first:max(0, (last + len(items) if last < 0 else last) + 1)]


@command("LINDEX", 3)
def lindex(session, words):
    items = find(words[1], list) or []
    at = whole(words[2])
    return items[at] if -len(items) <= at < len(items) else None


@command("HSET", 4, -1)
def hset(session, words):
    if len(words) % 2:
        return RespError("ERR wrong number of arguments for 'hset' command")
    fields = make(words[1], dict)
    before = len(fields)
    fields.update(zip(words[2::2], words[3::2]))
    return len(fields) - before


@command("HDEL", 3, -1)
def hdel(session, words):
    fields = find(words[1], dict)
    if fields is None:
        return 0
    gone = sum(fields.pop(name, None) is not None for name in words[2:])
    kept(words[1])
    return gone


@command("HINCRBY", 4)
def hincrby(session, words):
    fields = find(words[1], dict) or {}
    number = whole(words[3]) + whole(fields.get(words[2], b"0"), RespError("ERR hash value is not an integer"))
    if not -1 << 63 <= number < 1 << 63:
        return RespError("ERR increment or decrement would overflow")
    make(words[1], dict)[words[2]] = b"%d" % number
    return number


command("HGET", 3)(lambda session, words: (find(words[1], dict) or {}).get(words[2]))
command("HMGET", 3, -1)(lambda session, words: list(map((find(words[1], dict) or {}).get, words[2:])))
command("HGETALL", 2)(lambda session, words: find(words[1], dict) or {})
command("HKEYS", 2)(lambda session, words: list(find(words[1], dict) or {}))
command("HVALS", 2)(lambda session, words: list((find(words[1], dict) or {}).values()))
command("HLEN", 2)(lambda session, words: len(find(words[1], dict) or {}))
command("HEXISTS", 3)(lambda session, words: int(words[2] in (find(words[1], dict) or {})))


# ---- publish and subscribe

def subscriptions(name, kind, adds):
    """SUBSCRIBE and the like: a message for each channel is the answer."""
    def change(session, words):
        mine = session.data.subscribed
        names = words[1:] or [channel for one, channel in mine if one == kind] or [None]
        for channel in names:
            if adds:
                mine[kind, channel] = None
                channels.setdefault((kind, channel), {})[session] = None
            elif (kind, channel) in mine:
                leave(session, kind, channel)
            session.send(Push([name.lower().encode(), channel, len(mine)]))
        return NotImplemented
    command(name, 2 if adds else 1, -1)(change)


def leave(session, kind, channel):
    del session.data.subscribed[kind, channel]
    listeners = channels[kind, channel]
    del listeners[session]
    if not listeners:
        del channels[kind, channel]


subscriptions("SUBSCRIBE", b"message", True)
subscriptions("UNSUBSCRIBE", b"message", False)
subscriptions("PSUBSCRIBE", b"pmessage", True)
subscriptions("PUNSUBSCRIBE", b"pmessage", False)


@command("PUBLISH", 3)
def publish(session, words):
    channel, message = words[1:]
    count = 0
    for listener in channels.get((b"message", channel), ()):
        count += listener.send(Push([b"message", channel, message]))
    for (kind, pattern), listeners in channels.items():
        if kind == b"pmessage" and matches(pattern, channel):
            for listener in listeners:
                count += listener.send(Push([b"pmessage", pattern, channel, message]))
    return count


SUBSCRIBING = {b"SUBSCRIBE", b"UNSUBSCRIBE", b"PSUBSCRIBE", b"PUNSUBSCRIBE"}
IN_RESP2 = SUBSCRIBING | {b"PING", b"QUIT", b"RESET"}


# ---- transactions

@command("MULTI", 1)
def multi(session, words):
    if session.data.queued is not None:
        return RespError("ERR MULTI calls can not be nested")
    session.data.queued, session.data.wrong = [], False
    return "OK"


@command("DISCARD", 1)
def discard(session, words):
    if session.data.queued is None:
        return RespError("ERR DISCARD without MULTI")
    session.data.queued = None
    return "OK"


@command("EXEC", 1)
def exec_(session, words):
    queued, session.data.queued = session.data.queued, None
    if queued is None:
        return RespError("ERR EXEC without MULTI")
    if session.data.wrong:
        return RespError("EXECABORT Transaction discarded because of previous errors.")
    replies = [answer(session, function, arguments) for function, arguments in queued]
    return [None if reply is NO_LIST else reply for reply in replies]


AT_ONCE = (multi, discard, exec_, quit_, reset)


# ---- the server

def answer(session, function, words):
    try:
        return function(session, words)
    except RespError as error:
        return error


def on_command(session, words):
    function, least, most = commands.get(words[0]) or commands.get(words[0].upper(), (None, 0, 0))
    me = session.data
    if function is None:
        reply = RespError("ERR unknown command '%s'" % words[0][:128].decode("utf-8", "replace"))
    elif not least <= len(words) <= most:
        reply = RespError("ERR wrong number of arguments for '%s' command" % words[0].decode().lower())
    elif me.queued is not None and words[0].upper() in SUBSCRIBING:
        reply = RespError("ERR Command not allowed inside a transaction")
    elif me.queued is not None and function not in AT_ONCE:
        me.queued.append((function, words))
        reply = "QUEUED"
    elif me.subscribed and leviathan.Resp.version(session) == 2 and words[0].upper() not in IN_RESP2:
        reply = RespError("ERR Can't execute '%s': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are "
                          "allowed in this context" % words[0].decode().lower())
    else:
        reply = answer(session, function, words)
    if type(reply) is RespError and function is not multi:
        me.wrong = True
    if reply is NO_LIST and leviathan.Resp.version(session) == 2:
        session.write(b"*-1\r\n")
    elif reply is not NotImplemented:
        session.send(None if reply is NO_LIST else reply)


def on_connect(session):
    session.data = Client()


def on_disconnect(session, reason, error):
    for kind, channel in list(session.data.subscribed):
        leave(session, kind, channel)


def expire():
    for key in list(expires):
        find(key, None)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=6380, help="0: the system chooses")
    args = options.parse_args()

    queue = leviathan.EventQueue(1)                 # one thread, as in Redis: every command is atomic
    server = leviathan.Communicator(leviathan.Resp(), on_command, on_connect=on_connect, on_disconnect=on_disconnect,
                                    queue=queue)
    try:
        listener = server.listen(args.port, args.host)
    except (OSError, ValueError) as error:      # the port is taken, or there is no such address
        options.exit(2, "%s\n" % error)
    queue.every(1.0, expire)
    leviathan.run(server, on_ready=lambda: print("redis_server listens on %s" % listener, flush=True))


if __name__ == "__main__":
    main()
