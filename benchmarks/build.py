"""Compiles the C programs of this folder when they are needed, into a cache outside the tree."""
import hashlib
import os
import shutil
import subprocess
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
FLAGS = ["-O2", "-Wall", "-Wextra"]


def cache_folder():
    """Where the programs are kept: one folder per user, so that nobody runs what another one put there."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = os.path.join(tempfile.gettempdir(), "leviathan-benchmarks-" + user)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and os.stat(folder).st_uid != os.getuid():
        raise RuntimeError("%s belongs to somebody else; set TMPDIR to a folder of your own" % folder)
    return folder


def compiled(source):
    """Return the path of the program made of this C file, compiling it if that exact text was not compiled before."""
    path = os.path.join(HERE, source)
    with open(path, "rb") as file:
        text = file.read()
    key = hashlib.sha256(text + " ".join(FLAGS).encode()).hexdigest()[:16]
    program = os.path.join(cache_folder(), "%s-%s" % (os.path.splitext(source)[0], key))
    if not os.path.exists(program):
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("a C compiler (cc, gcc or clang) is needed for " + source)
        unfinished = "%s.%d" % (program, os.getpid())
        subprocess.run([compiler] + FLAGS + ["-o", unfinished, path], check=True)
        os.rename(unfinished, program)
    return program
