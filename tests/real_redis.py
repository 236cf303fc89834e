"""A real redis-server for the tests; where there is none they are skipped, but with LEVIATHAN_REAL=1 they fail."""
import importlib
import os
import shutil
import socket
import subprocess

import pytest

from conftest import eventually


def needed(name):
    """The path of a program, else skip, or fail where all of them must be there."""
    path = shutil.which(name)
    if path is None:
        missing("%s is not installed (Debian: redis-server, redis-tools)" % name)
    return path


def package(name):
    """A Python package, else the same."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return missing("the package %s is not installed" % name)


def missing(why):
    if os.environ.get("LEVIATHAN_REAL"):
        pytest.fail(why)
    pytest.skip(why)


def run(*command, timeout=30, **options):
    """A program's output; it must end well."""
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            timeout=timeout, universal_newlines=True, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


class RealRedis:
    """redis-server on a free port; it can be stopped and started again there."""

    def __init__(self, folder):
        self.program, self.folder, self.process = needed("redis-server"), folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = probe.getsockname()
        self.start()

    def start(self):
        self.process = subprocess.Popen([self.program, "--port", str(self.address[1]), "--bind", "127.0.0.1", "--save", "",
                                         "--appendonly", "no"], cwd=str(self.folder), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        eventually(self.answers)

    def answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(self.address) == 0

    def stop(self):
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def real(tmp_path):
    made = RealRedis(tmp_path)
    yield made
    made.stop()
