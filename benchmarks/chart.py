"""Draws docs/benchmarks.svg: a panel of bars per case, leviathan's among them in its own colour.

Throughput is relative to the reference, a natural program, whose 1.0 is a line through each panel; each panel
has its own scale, and each bar its number. The file stands alone (no script, no font, no reference) and has its own
ground, light or dark as the reader's system is set.
"""
import textwrap
from statistics import median
from xml.sax.saxutils import escape

import report
from cases import RELATIVE, SUBJECT

COLUMNS = 2
WIDTH, PANEL, MARGIN, GAP = 880, 412, 18, 20    # of the picture, of a panel, around and between panels; pixels
TOP, LINE = 92, 17                      # what the picture's own heading takes, and each line more
FACTS = 130                             # characters of such a line
HEAD, BAR, PITCH = 52, 13, 20           # a panel's heading, a bar's height, from one bar to the next
NAMES, VALUES = 162, 64                 # room left of the bars for names, right of them for numbers
FONT = "font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

STYLE = """
  text { %s; font-size: 12px; fill: #24292f }
  .title { font-size: 20px; font-weight: 600 }
  .case { font-size: 13px; font-weight: 600 }
  .soft { fill: #57606a; font-size: 11.5px }
  .ours { font-weight: 600 }
  .right { text-anchor: end }
  .ground { fill: #ffffff }
  .panel { fill: #f6f8fa }
  .bar { fill: #a3b1c2 }
  .bar.reference { fill: #6e7f94 }
  .bar.ours { fill: #0a7ea4 }
  .line { stroke: #6e7f94; stroke-width: 1; stroke-dasharray: 3 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .soft { fill: #9198a1 }
    .ground { fill: #0d1117 }
    .panel { fill: #161b22 }
    .bar { fill: #3d4b5c }
    .bar.reference { fill: #66788e }
    .bar.ours { fill: #2fa8d0 }
    .line { stroke: #8b98a8 }
  }
""" % FONT


class Panel:
    """What one panel shows: bars = [(name, value)], a value to draw a line through or None, how values are written.

    `reference` is the name of the bar that stands out beside leviathan's.
    """

    def __init__(self, heading, subheading, bars, mark, form, reference):
        self.heading, self.subheading, self.bars, self.mark, self.form = heading, subheading, bars, mark, form
        self.kinds = {SUBJECT: "ours", reference: "reference"}
        self.height = HEAD + PITCH * len(bars) + 8


def throughput_panel(case, result, reference):
    """Throughput relative to the reference, without the C server, the ceiling, which would dwarf the rest."""
    bars = []
    for contender in case.contenders:
        values = report.ratios(result, contender, reference, case.figure)
        if values and contender != "c":
            bars.append((contender, median(values)))
    return Panel(case.name, case.title, bars, 1.0, "ratio", reference)


def plain_panel(case, result, reference):
    """The figure of a case as it is."""
    bars = [(name, median(report.known(report.figures(result, name, case.figure)))) for name in case.contenders
            if report.known(report.figures(result, name, case.figure))]
    heading, subheading, form = case.picture
    form = form or ("count" if max([value for _, value in bars], default=0) >= 100 else "number")
    return Panel(heading, subheading, bars, None, form, reference)


def panels(suite, results):
    """The panels of the cases there are results for."""
    made = []
    for case in suite.cases:
        result, reference = results["cases"].get(case.name), case.reference or suite.reference
        if result is not None and case.picture is not None:
            panel = throughput_panel if case.picture == RELATIVE else plain_panel
            made.append(panel(case, result, reference))
    return [panel for panel in made if panel.bars]


def text(x, y, content, classes=""):
    """One line of text."""
    return '<text x="%.1f" y="%.1f" class="%s">%s</text>' % (x, y, classes, escape(content))


def draw_bar(panel, x, y, scale, name, value, kind):
    """A name, its bar and its number; leviathan and the reference stand out."""
    length = max(1.0, value * scale)
    return [text(x + NAMES - 8, y + BAR - 2, name, "right " + kind),
            '<rect x="%.1f" y="%.1f" width="%.1f" height="%d" rx="2" class="bar %s"/>'
            % (x + NAMES, y, length, BAR, kind),
            text(x + PANEL - 16, y + BAR - 2, report.FORMATS[panel.form](value), "right " + kind)]


def draw_panel(panel, x, y):
    """One panel with its upper left corner at (x, y)."""
    scale = (PANEL - NAMES - VALUES) / max(max(value for _, value in panel.bars), panel.mark or 0)
    parts = ['<rect x="%.1f" y="%.1f" width="%d" height="%d" rx="6" class="panel"/>' % (x, y, PANEL, panel.height),
             text(x + 14, y + 22, panel.heading, "case"), text(x + 14, y + 39, panel.subheading, "soft")]
    for i, (name, value) in enumerate(panel.bars):
        parts += draw_bar(panel, x, y + HEAD + PITCH * i, scale, name, value, panel.kinds.get(name, ""))
    if panel.mark:
        at = x + NAMES + panel.mark * scale
        parts.append('<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" class="line"/>'
                     % (at, at, y + HEAD - 5, y + panel.height - 8))
    return parts


def draw(suite, results):
    """Return the picture as the text of an SVG file."""
    versions = ["%s %s" % pair for pair in results["versions"].items()]
    facts = textwrap.wrap(", ".join([results["machine"]["processor"]] + versions), FACTS, break_on_hyphens=False)
    parts, ends = [], [TOP + LINE * (len(facts) - 1)] * COLUMNS
    for panel in panels(suite, results):
        column = ends.index(min(ends))
        parts += draw_panel(panel, MARGIN + column * (PANEL + GAP), ends[column])
        ends[column] += panel.height + GAP
    height = max(ends)
    heading = [text(MARGIN, 38, suite.title, "title"), text(MARGIN, 60, suite.subtitle, "soft")]
    heading += [text(MARGIN, 77 + LINE * i, line, "soft") for i, line in enumerate(facts)]
    frame = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">'
             % (WIDTH, height, WIDTH, height),
             "<title>%s: throughput relative to %s</title>"
             % (suite.title, suite.reference.partition("-")[0] if suite.reference else "its peers"),
             "<style>%s</style>" % STYLE, '<rect width="100%" height="100%" rx="8" class="ground"/>']
    return "\n".join(frame + heading + parts + ["</svg>"]) + "\n"
