"""Turns results into tables, into the verdict on each target, and into docs/benchmarks.md.

Results are plain data, as they are kept in docs/benchmarks.json (and -windows.json, -protocols.json):

    {"machine": {what: text}, "versions": {what: text},
     "cases": {case: {"measured": date, "command": text, "seconds": number, "quick": bool,
                      "samples": {contender: [{figure: number} or None if that round failed, ...]},
                      "missing": {contender: why}, "failed": [text, ...]}}}

All is worked out from the samples here; nothing derived is kept.
"""
from statistics import median

from cases import SUBJECT

HEAD = """%s

Figures are medians over the rounds, with the least and the greatest in brackets. A ratio is taken within each round,
between measurements a few seconds apart, and then summed up the same way: it holds where absolute figures drift.

%s"""


# ---- numbers -----------------------------------------------------------------------------------------------------


def figures(result, contender, figure):
    """The figure in every round of a case; None where there is none."""
    return [sample.get(figure) if sample else None for sample in result["samples"].get(contender, [])]


def known(values):
    """Those that are there."""
    return [value for value in values if value is not None]


def ratios(result, above, below, figure):
    """`above` divided by `below`, round by round."""
    pairs = zip(figures(result, above, figure), figures(result, below, figure))
    return [a / b for a, b in pairs if a is not None and b]


def in_units(value):
    """A number of bytes for people: 1536000 -> '1.5 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024 or unit == "MiB":
            return "%.*f %s" % (0 if unit == "B" else 1, value, unit)
        value /= 1024


FORMATS = {
    "count": lambda value: format(round(value), ",d"),
    "number": lambda value: "%.*f" % (0 if value >= 1000 else 1, value),
    "ratio": lambda value: "%.*f" % (1 if value >= 10 else 2, value),
    "percent": lambda value: "%.0f %%" % (value * 100),
    "bytes": in_units,
}


def spread(values, form):
    """'median (least .. greatest)'."""
    values = known(values)
    if not values:
        return "-"
    text = [FORMATS[form](value) for value in (median(values), min(values), max(values))]
    return text[0] if len(values) == 1 else "%s (%s .. %s)" % tuple(text)


# ---- tables ------------------------------------------------------------------------------------------------------


def table(headings, rows):
    """A Markdown table whose columns line up, so that it reads as well on a terminal."""
    widths = [max(len(row[i]) for row in [headings] + rows) for i in range(len(headings))]

    def line(cells):
        aligned = [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "| %s |" % " | ".join(aligned)

    rule = "|%s|" % "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]])
    return "\n".join([line(headings), rule] + [line(row) for row in rows])


def ratio_heading(case, what):
    """What the column of ratios is called."""
    return "this / %s" % case.versus if case.versus else " ".join(filter(None, [SUBJECT, what, "/ this"]))


def ratio_cell(case, result, contender, figure):
    """One contender's ratio to the one the case compares with."""
    above, below = (contender, case.versus) if case.versus else (SUBJECT, contender)
    return "" if above == below else spread(ratios(result, above, below, figure), "ratio")


def column_cell(case, result, contender, column):
    """One figure of one contender: with its spread if it is what the case compares, else the median alone."""
    figure, _, form = column
    values = known(figures(result, contender, figure))
    if values and figure != case.figure:
        values = [median(values)]
    return spread(values, form)


def case_table(case, result):
    """The table of one case: a row per contender that took part."""
    compared = [(case.figure, "")] + list(case.also)
    headings = ["server"] + [heading for _, heading, _ in case.columns]
    headings += [ratio_heading(case, what) for _, what in compared]
    rows = []
    for contender in case.contenders:
        if known(result["samples"].get(contender, [])):
            cells = [column_cell(case, result, contender, column) for column in case.columns]
            rows.append([contender] + cells + [ratio_cell(case, result, contender, figure) for figure, _ in compared])
    return table(headings, rows)


def notes(result):
    """What did not take part and what went wrong, a line each."""
    lines = ["- %s is missing: %s" % pair for pair in sorted(result["missing"].items())]
    return lines + ["- " + failure for failure in result["failed"]]


def case_report(case, result):
    """Heading, table and notes of one case."""
    rounds = max([len(samples) for samples in result["samples"].values()] or [0])
    many = "%d round%s" % (rounds, "" if rounds == 1 else "s")
    head = "## %s: %s\n\n%s, %s, by `%s`." % (case.name, case.title, result["measured"], many, result["command"])
    return "\n\n".join([head, case_table(case, result)] + ["\n".join(notes(result))] * bool(notes(result)))


# ---- targets -----------------------------------------------------------------------------------------------------


def verdict(target, values):
    """'reached' or by how much not; the median counts."""
    if not values:
        return "not measured"
    value = median(values)
    if value >= target.limit if target.sense == "at least" else value <= target.limit:
        return "reached"
    return "missed by %.1f %%" % (abs(value / target.limit - 1) * 100)


def target_values(target, results):
    """The figure a target is about, round by round."""
    result = results["cases"].get(target.case)
    if result is None:
        return []
    if target.peer is None:
        return known(figures(result, SUBJECT, target.figure))
    return ratios(result, SUBJECT, target.peer, target.figure)


def target_table(suite, results, only=None):
    """All targets, or those of some cases, with what was measured and the verdict."""
    rows = []
    for target in suite.targets:
        if only is None or target.case in only:
            values = target_values(target, results)
            form = "ratio" if target.peer else "number"
            rows.append([target.case, target.figure + (" / %s" % target.peer if target.peer else ""),
                         "%s %g" % (target.sense, target.limit), spread(values, form), verdict(target, values)])
    return table(["case", "figure of leviathan", "target", "measured", "verdict"], rows) if rows else ""


# ---- the document ------------------------------------------------------------------------------------------------


def document(suite, results):
    """The text of docs/benchmarks.md, or that of another suite."""
    facts = ["- %s: %s" % pair for pair in list(results["machine"].items()) + list(results["versions"].items())]
    parts = [HEAD % (suite.introduction, "\n".join(facts)), "## Targets\n\n" + target_table(suite, results)]
    parts += [case_report(case, results["cases"][case.name]) for case in suite.cases if case.name in results["cases"]]
    return "\n\n".join(parts) + "\n"
