"""Measures leviathan against its peers: ``python benchmarks/run.py [CASE ...]``; README.md beside this tells the rest.

Server and load generator each have a core of their own. The servers take turns, round after round (A B C A B C ...),
each time as a fresh process, so that whatever drifts on the machine drifts for all of them, and ratios are taken within
a round. Targets are reported, never enforced; only a wrong answer, or none, makes the exit status 1.
"""
import argparse
import json
import os
import platform
import re
import signal
import sys
import time

from build import compiled
from cases import CASES, TARGETS, Settings, Suite, Unavailable
from harness import HERE, ROOT, Failed, Missing, machine, machine_to_itself
from protocols import PROTOCOLS
from windows import WINE
import chart
import report

DOCS = os.path.join(ROOT, "docs")
UNAVAILABLE = 3         # the exit status if the suite cannot run here

INTRODUCTION = """# Benchmarks

Made by `python benchmarks/run.py --write`; do not edit. What is measured and how to read it is told in
[benchmarks/README.md](../benchmarks/README.md).

![Throughput relative to uvloop](benchmarks.svg)"""


# ---- measuring ---------------------------------------------------------------------------------------------------


def progress(text):
    """Say on stderr what is being done, so that stdout holds the report alone."""
    print(text, file=sys.stderr, flush=True)


def measure_once(case, contender, settings, result):
    """Add one sample, or note why there is none."""
    try:
        with machine_to_itself():
            sample = case.measure(contender, case, settings)
    except Missing as missing:
        result["missing"][contender] = str(missing)
        progress("%s %s: missing, %s" % (case.name, contender, missing))
        return
    except Failed as failed:
        sample = None
        result["failed"].append("%s failed: %s" % (contender, failed))
        progress("%s %s: failed, %s" % (case.name, contender, failed))
    else:
        progress("%s %s: %s" % (case.name, contender, " ".join("%s=%.6g" % pair for pair in sample.items())))
    result["samples"].setdefault(contender, []).append(sample)


def measure_case(case, contenders, settings):
    """Run all rounds of one case; return its part of the results."""
    result = {"measured": time.strftime("%Y-%m-%d %H:%M"), "command": command(), "seconds": settings.seconds,
              "quick": settings.quick, "samples": {}, "missing": {}, "failed": []}
    for _ in range(case.rounds_for(settings)):
        for contender in contenders:
            if contender not in result["missing"]:
                measure_once(case, contender, settings, result)
    return result


def chosen_contenders(case, names):
    """The contenders of this case that were asked for; a name stands for its variants ("gevent+malloc") too."""
    return [name for name in case.contenders if not names or name in names or re.split("[:+]", name)[0] in names]


# ---- the suite, and with what it runs ----------------------------------------------------------------------------


def versions(settings):
    """Python's version and those of the peers that are installed."""
    from importlib import metadata
    found = {platform.python_implementation(): platform.python_version()}
    for package in ("uvloop", "gevent", "twisted"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


LINUX = Suite("benchmarks", CASES, TARGETS, "uvloop-natural", "leviathan and its peers",
              "Echo of length-prefixed packets on one core: messages per second, a natural uvloop program being 1.0. "
              "More is better.", INTRODUCTION, lambda say: compiled("load.c"), machine, versions)


# ---- what is kept ------------------------------------------------------------------------------------------------


def kept_results(suite):
    """What the last run with --write kept, or None."""
    try:
        with open(os.path.join(DOCS, suite.document + ".json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def merged(suite, results):
    """These results, and the kept ones of cases not run now, if they are from the same machine and versions."""
    kept = kept_results(suite)
    if kept is None or any(kept[key] != results[key] for key in ("machine", "versions")):
        return results
    return dict(results, cases=dict(kept["cases"], **results["cases"]))


def write_documents(suite, results):
    """Write docs/benchmarks.json, .md and .svg, or those of another suite."""
    os.makedirs(DOCS, exist_ok=True)
    texts = {"json": json.dumps(results, indent=1) + "\n", "md": report.document(suite, results),
             "svg": chart.draw(suite, results)}
    for suffix, text in texts.items():
        name = "%s.%s" % (suite.document, suffix)
        with open(os.path.join(DOCS, name), "w", encoding="utf-8") as file:
            file.write(text)
        progress("written: docs/" + name)


# ---- command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     epilog="cases: %s; with --wine: %s; with --protocols: %s"
                                     % tuple(map(case_names, (LINUX, WINE, PROTOCOLS))))
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all, if none is named")
    parser.add_argument("--rounds", type=int, default=0, help="turns each server has (default 5, with --quick 2)")
    parser.add_argument("--seconds", type=float, default=0, help="measured each time (default 1, with --quick 0.5)")
    parser.add_argument("--servers", default="", metavar="A,B", help="only these take part")
    parser.add_argument("--quick", action="store_true", help="a short run that shows the order of things")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, .svg and .json")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--wine", action="store_true", help="measure on Windows' API under Wine, and --write, --remake "
                       "docs/benchmarks-windows.md, .svg and .json")
    other.add_argument("--protocols", action="store_true", help="measure HTTP and Redis, and --write, --remake "
                       "docs/benchmarks-protocols.md, .svg and .json")
    parser.add_argument("--peers", metavar="VENV/bin", default=os.path.dirname(sys.executable),
                        help="the programs of a virtualenv that has the Python peers of --protocols (default: Python's own)")
    parser.add_argument("--remake", action="store_true", help="only write the .md and .svg of the kept .json anew")
    options = parser.parse_args(arguments)
    options.suite = WINE if options.wine else PROTOCOLS if options.protocols else LINUX
    unknown = set(options.cases) - {case.name for case in options.suite.cases}
    if unknown:
        parser.error("no such case: %s; there are %s" % (", ".join(sorted(unknown)), case_names(options.suite)))
    there = {name for case in options.suite.cases for name in case.contenders}
    asked = {name for name in options.servers.split(",") if name}
    if asked - there - {re.split("[:+]", name)[0] for name in there}:
        parser.error("no such server: %s; there are %s" % (", ".join(sorted(asked - there)), ", ".join(sorted(there))))
    return options


def case_names(suite):
    """The names of a suite's cases in one line."""
    return ", ".join(case.name for case in suite.cases)


def measure(options):
    """Run the cases that were asked for, reporting each when it is done; return all results."""
    settings = Settings(options.rounds or (2 if options.quick else 5), options.seconds or (.5 if options.quick else 1),
                        .2 if options.quick else .3, options.quick, os.path.abspath(options.peers))
    servers = [name for name in options.servers.split(",") if name]
    suite = options.suite
    suite.prepare(progress)         # now, not while something is measured
    results = {"machine": suite.machine(), "versions": suite.versions(settings), "cases": {}}
    for case in suite.cases:
        if not options.cases or case.name in options.cases:
            result = measure_case(case, chosen_contenders(case, servers), settings)
            results["cases"][case.name] = result
            print(report.case_report(case, result), end="\n\n", flush=True)
    return results


def command():
    """The command line as one would type it in the folder of the project; where the peers are is everybody's own affair."""
    line = " ".join(["python", os.path.relpath(os.path.join(HERE, "run.py"), ROOT)] + sys.argv[1:])
    return re.sub(r"(--pe\w*[ =])\S+", r"\1v/bin", line)


def main():
    """Measure and report."""
    options = parse_arguments()
    suite = options.suite
    if options.remake:
        results = kept_results(suite)
        if results is None:
            sys.exit("there is no docs/%s.json to remake the report from: run with --write" % suite.document)
        write_documents(suite, results)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))     # so that the server ends too
    try:
        results = measure(options)
    except Unavailable as unavailable:
        progress(unavailable)
        sys.exit(UNAVAILABLE)
    targets = report.target_table(suite, results, results["cases"])
    if targets:
        print("## Targets\n\n" + targets)
    if options.write:
        write_documents(suite, merged(suite, results))
    if any(result["failed"] for result in results["cases"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
