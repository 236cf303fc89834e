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
import sys
import time

from build import compiled
from cases import CASES, Settings
from harness import HERE, ROOT, Failed, Missing, cores, machine_to_itself
import chart
import report

DOCS = os.path.join(ROOT, "docs")
KEPT = os.path.join(DOCS, "benchmarks.json")


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


# ---- where and with what -----------------------------------------------------------------------------------------


def processor():
    """The model name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def machine():
    """What the figures depend on besides the programs."""
    pinned = "server and load generator on a core each" if cores() else "not pinned, less than two cores"
    return {"processor": processor(), "cores": "%d (%s)" % (os.cpu_count(), pinned),
            "kernel": "%s %s" % (platform.system(), platform.release())}


def versions():
    """Python's version and those of the peers that are installed."""
    from importlib import metadata
    found = {platform.python_implementation(): platform.python_version()}
    for package in ("uvloop", "gevent", "twisted"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def kept_results():
    """What the last run with --write kept, or None."""
    try:
        with open(KEPT, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def merged(results):
    """These results, and the kept ones of cases not run now, if they are from the same machine and versions."""
    kept = kept_results()
    if kept is None or any(kept[key] != results[key] for key in ("machine", "versions")):
        return results
    return dict(results, cases=dict(kept["cases"], **results["cases"]))


def write_documents(results):
    """Write docs/benchmarks.json, .md and .svg."""
    os.makedirs(DOCS, exist_ok=True)
    texts = {"json": json.dumps(results, indent=1) + "\n", "md": report.document(results), "svg": chart.draw(results)}
    for suffix, text in texts.items():
        with open(os.path.join(DOCS, "benchmarks." + suffix), "w", encoding="utf-8") as file:
            file.write(text)
        progress("written: docs/benchmarks." + suffix)


# ---- command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments=None):
    """Read the command line."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="cases: " + ", ".join(names))
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all, if none is named")
    parser.add_argument("--rounds", type=int, default=0, help="turns each server has (default 5, with --quick 2)")
    parser.add_argument("--seconds", type=float, default=0, help="measured each time (default 1, with --quick 0.5)")
    parser.add_argument("--servers", default="", metavar="A,B", help="only these take part")
    parser.add_argument("--quick", action="store_true", help="a short run that shows the order of things")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, .svg and .json")
    parser.add_argument("--remake", action="store_true", help="only write the .md and .svg of the kept .json anew")
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(names)
    if unknown:
        parser.error("no such case: %s; there are %s" % (", ".join(sorted(unknown)), ", ".join(names)))
    return options


def measure(options):
    """Run the cases that were asked for, reporting each when it is done; return all results."""
    settings = Settings(options.rounds or (2 if options.quick else 5), options.seconds or (.5 if options.quick else 1),
                        .2 if options.quick else .3, options.quick)
    compiled("load.c")      # now, not while something is measured
    servers = [name for name in options.servers.split(",") if name]
    results = {"machine": machine(), "versions": versions(), "cases": {}}
    for case in CASES:
        if not options.cases or case.name in options.cases:
            result = measure_case(case, chosen_contenders(case, servers), settings)
            results["cases"][case.name] = result
            print(report.case_report(case, result), end="\n\n", flush=True)
    return results


def command():
    """The command line as one would type it in the folder of the project."""
    return " ".join(["python", os.path.relpath(os.path.join(HERE, "run.py"), ROOT)] + sys.argv[1:])


def main():
    """Measure and report."""
    options = parse_arguments()
    if options.remake:
        results = kept_results()
        if results is None:
            sys.exit("there is no docs/benchmarks.json to remake the report from: run with --write")
        write_documents(results)
        return
    results = measure(options)
    targets = report.target_table(results, results["cases"])
    if targets:
        print("## Targets\n\n" + targets)
    if options.write:
        write_documents(merged(results))
    if any(result["failed"] for result in results["cases"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
