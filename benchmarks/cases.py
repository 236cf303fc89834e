"""What is measured: the table of cases, and the table of targets that leviathan has set itself.

A case names contenders and a function ``measure(contender, case, settings)`` that measures one of them once and returns
{name of a figure: number}. All else, rounds, ratios and tables, is alike for all and lives in run.py and report.py.
What is here runs on Linux; windows.py has the tables for Windows' API, under Wine, protocols.py those for HTTP and Redis.
"""
from collections import namedtuple

from harness import IdleClients, Server, import_seconds

# peers: the folder of the programs that protocols.py compares with
Settings = namedtuple("Settings", "rounds seconds warmup quick peers")

MIB = 1 << 20
SUBJECT = "leviathan"
PROTOCOLS = ["leviathan", "uvloop-natural", "uvloop-joined", "asyncio-natural"]
EVERYONE = PROTOCOLS + ["asyncio-natural+malloc", "uvloop-streams", "asyncio-streams", "gevent", "twisted",
                        "socketserver", "c"]


# What one run of run.py is about. document: the name of its files in docs/. cases, targets: the tables. reference: the
# contender that is 1.0 in the picture, None if each case names its own. title, subtitle: the picture's. introduction: of
# the document. prepare(say): makes what the servers need, raises Unavailable. machine(), versions(settings): what the
# figures depend on, {what: text}.
Suite = namedtuple("Suite", "document cases targets reference title subtitle introduction prepare machine versions")


class Unavailable(Exception):
    """A suite cannot run on this machine; the message says what is missing and what to do about it."""


RELATIVE = "relative"       # a Case's picture: its figure relative to the reference, under its own name and title
Bars = namedtuple("Bars", "heading subheading form")    # or: its figure as it is; form None: by its size


class Case:
    """One line of the table.

    name, title: the word on the command line; what is measured.
    measure: the function. parameters: what it reads from here.
    contenders: who takes part, in the order in which they take turns.
    figure: the name of the figure that is compared.
    columns: (name of the figure, heading, format) of the columns shown.
    versus: the contender each is divided by; None: leviathan is divided by each.
    rounds, quick_rounds: fixed numbers of rounds, for what varies little or a lot; None: as on the command line.
    also: (figure, what its ratio is called) of further figures that are compared.
    picture: its panel in the picture, RELATIVE or Bars; None: it has none. reference: what is 1.0 there; None: the suite's.
    """

    def __init__(self, name, title, measure, contenders, figure, columns, parameters, versus=None, rounds=None,
                 quick_rounds=None, also=(), picture=None, reference=None):
        self.name, self.title, self.measure, self.contenders = name, title, measure, contenders
        self.figure, self.columns, self.parameters = figure, columns, parameters
        self.versus, self.rounds, self.quick_rounds = versus, rounds, quick_rounds
        self.also, self.picture, self.reference = also, picture, reference

    def rounds_for(self, settings):
        """How many rounds are run."""
        return (self.quick_rounds if settings.quick else self.rounds) or settings.rounds

    def number(self, name, settings):
        """A parameter; in a quick run the one called quick_NAME, if there is one."""
        quick = self.parameters.get("quick_" + name) if settings.quick else None
        return self.parameters[name] if quick is None else quick


# ---- how each is measured ----------------------------------------------------------------------------------------


ECHO_FIGURES = ("msgs_per_s", "p50_us", "p90_us", "p99_us", "p999_us", "max_us", "busy", "wineserver_busy")


def measure_echo(contender, case, settings, start=Server):
    """Messages per second and round-trip times."""
    with start(contender, pinned=case.parameters.get("pinned", True)) as server:
        result = server.load("echo", conns=case.parameters["conns"], size=case.parameters["size"],
                             window=case.parameters["window"], seconds=settings.seconds,
                             warmup=case.parameters.get("warmup", settings.warmup))
    return {key: result[key] for key in ECHO_FIGURES if key in result}


def measure_idle(contender, case, settings):
    """Memory per idle connection, those that never sent anything and those that have had one reply."""
    count = case.number("conns", settings)
    with Server(contender) as server:
        server.load("echo", messages=10, conns=2)    # so that what is loaded on first use is there before
        before = server.memory()
        with IdleClients(server, count, touch=False):
            silent = server.memory()
    with Server(contender) as server:
        server.load("echo", messages=10, conns=2)
        before_used = server.memory()
        with IdleClients(server, count, touch=True):
            used = server.memory()
    return {"before": before["pss"], "with": silent["pss"], "per_connection": (silent["pss"] - before["pss"]) / count,
            "rss_per_connection": (silent["rss"] - before["rss"]) / count,
            "used_per_connection": (used["pss"] - before_used["pss"]) / count}


def measure_import(contender, case, settings):
    """Milliseconds of an import in a fresh interpreter; the import before it sees to the compiled modules."""
    import_seconds(contender)
    return {"import_ms": import_seconds(contender) * 1e3}


def measure_broadcast(contender, case, settings):
    """Packets sent to all per second."""
    with Server(contender, ["--broadcast"]) as server:
        result = server.load("broadcast", conns=case.number("conns", settings), size=case.parameters["size"],
                             seconds=settings.seconds, warmup=settings.warmup)
    return {"rounds_per_s": result["rounds_per_s"], "deliveries_per_s": result["msgs_per_s"],
            "p50_us": result["p50_us"], "p99_us": result["p99_us"], "busy": result["busy"]}


def measure_huge(contender, case, settings):
    """Memory before, while and after very large packets are echoed, and the time one takes."""
    with Server(contender, ["--max-packet", str(case.parameters["size"])]) as server:
        server.load("echo", messages=10, conns=2)
        before = server.memory()["rss"]
        result = server.load("echo", conns=1, size=case.parameters["size"], messages=case.parameters["messages"])
        return {"before": before, "peak": server.peak(), "after": server.memory()["rss"],
                "growth": (server.peak() - before) / case.parameters["size"],
                "packet_ms": result["seconds"] / result["messages"] * 1e3}


# ---- the cases ---------------------------------------------------------------------------------------------------

ECHO_COLUMNS = [("msgs_per_s", "messages/s", "count"), ("p50_us", "p50 µs", "number"), ("p99_us", "p99 µs", "number"),
                ("busy", "server busy", "percent")]
ECHO_ALSO = [("p99_us", "p99")]


def echo_case(name, title, more=(), **parameters):
    """A case in which a number of connections each keep a window of messages in flight."""
    contenders = EVERYONE[:2] + list(more) + EVERYONE[2:]
    return Case(name, title, measure_echo, contenders, "msgs_per_s", ECHO_COLUMNS, parameters, also=ECHO_ALSO,
                picture=RELATIVE)


CASES = [
    echo_case("echo-1", "50 connections, 64 bytes, 1 in flight", conns=50, size=64, window=1),
    echo_case("echo-16", "50 connections, 64 bytes, 16 in flight", conns=50, size=64, window=16),
    echo_case("echo-4k", "50 connections, 4 KiB, 1 in flight", conns=50, size=4096, window=1),
    echo_case("echo-1000", "1000 connections, 64 bytes, 1 in flight", conns=1000, size=64, window=1),
    echo_case("echo-1m", "8 connections, 1 MiB, 1 in flight", ["uvloop-natural+malloc"], conns=8, size=MIB, window=1),
    Case("idle", "memory of 8000 idle connections (quick: 2000)", measure_idle,
         ["leviathan", "uvloop-natural", "asyncio-natural", "asyncio-streams", "gevent", "twisted"],
         "per_connection",
         [("before", "before", "bytes"), ("with", "with them", "bytes"),
          ("per_connection", "bytes each (PSS)", "number"), ("rss_per_connection", "bytes each (RSS)", "number"),
          ("used_per_connection", "bytes each after one packet", "number")],
         {"conns": 8000, "quick_conns": 2000}, rounds=3, quick_rounds=1,
         picture=Bars("memory", "bytes per idle connection; less is better", None)),
    Case("import", "time of an import in a fresh interpreter", measure_import,
         ["leviathan", "asyncio", "uvloop", "socketserver"], "import_ms", [("import_ms", "ms", "number")],
         {}, rounds=21, quick_rounds=5,
         picture=Bars("import", "milliseconds of a first import; less is better", None)),
    Case("broadcast", "one packet of 64 bytes to 5000 connections (quick: 1000)", measure_broadcast,
         ["leviathan", "uvloop-natural", "asyncio-natural", "twisted"], "deliveries_per_s",
         [("deliveries_per_s", "deliveries/s", "count"), ("rounds_per_s", "broadcasts/s", "number"),
          ("p50_us", "p50 µs", "count"), ("p99_us", "p99 µs", "count"), ("busy", "server busy", "percent")],
         {"conns": 5000, "size": 64, "quick_conns": 1000}),
    Case("threads", "echo-1 on 1, 2 and 4 threads, no process pinned", measure_echo,
         ["leviathan:1", "leviathan:2", "leviathan:4"], "msgs_per_s", ECHO_COLUMNS,
         {"conns": 50, "size": 64, "window": 1, "pinned": False}, versus="leviathan:1"),
    Case("64m", "one packet of 64 MiB at a time", measure_huge,
         # without Twisted, whose Int32StringReceiver takes 14 seconds for one such packet
         ["leviathan", "uvloop-natural", "asyncio-natural", "asyncio-streams", "gevent", "socketserver"],
         "packet_ms",
         [("packet_ms", "ms to and fro", "number"), ("before", "memory before", "bytes"), ("peak", "peak", "bytes"),
          ("growth", "peak growth in packets", "ratio"), ("after", "after", "bytes")],
         {"size": 64 * MIB, "messages": 3}, rounds=3, quick_rounds=1),
]


# ---- the targets -------------------------------------------------------------------------------------------------

# figure of leviathan divided by the peer's (peer None: the figure itself) is to be at least / at most the limit
Target = namedtuple("Target", "case figure peer sense limit")

TARGETS = [
    Target("echo-1", "msgs_per_s", "uvloop-natural", "at least", 1.0),
    Target("echo-1", "p99_us", "uvloop-natural", "at most", 1.1),
    Target("echo-4k", "msgs_per_s", "uvloop-natural", "at least", 1.0),
    Target("echo-1000", "msgs_per_s", "uvloop-natural", "at least", 1.0),
    Target("echo-16", "msgs_per_s", "uvloop-natural", "at least", 4.0),
    Target("echo-16", "msgs_per_s", "uvloop-joined", "at least", 1.0),
    Target("echo-1m", "msgs_per_s", "uvloop-natural", "at least", 2.0),
    Target("idle", "per_connection", None, "at most", 1024),
    Target("import", "import_ms", "asyncio", "at most", 0.5),
]
