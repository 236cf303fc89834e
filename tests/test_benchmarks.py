"""The benchmarks run: HTTP and Redis, leviathan alone, a fraction of a second each. The figures are not looked at."""
import os
import subprocess
import sys

import pytest

from real_redis import needed
from test_examples import PATIENCE, ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmarks measure by /proc")


@pytest.mark.parametrize("case, program", [("http-hello", "wrk"), ("redis-get-16", "redis-benchmark")])
def test_protocols(case, program):
    needed(program)
    done = subprocess.run([sys.executable, os.path.join(ROOT, "benchmarks", "run.py"), "--protocols", case, "--servers",
                           "leviathan", "--rounds", "1", "--seconds", "0.1"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=10 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "## %s: " % case in done.stdout and "\n| leviathan " in done.stdout, done.stdout
