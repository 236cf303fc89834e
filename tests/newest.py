"""Run Python code on the newest CPython there is to test on: 3.14, free-threaded ("3.14t") or ordinary.

    python tests/newest.py -m pytest                 # on the free-threaded CPython 3.14
    python tests/newest.py --gil -m pytest           # on the ordinary CPython 3.14
    python tests/newest.py --prepare                 # prints the path of the free-threaded one
    python tests/newest.py --gil --prepare           # prints the path of the ordinary one

Everything after the options above is the new interpreter's own command line.

Why: races that the global interpreter lock hides show only without it, and what a new Python changes shows only on
a new Python. Where one is installed, or can be downloaded from python.org, use that one. This script is for machines
that reach nothing but PyPI and npm, where no such interpreter is to be had as such. Its parts are, though:

* PyPI's wheels of Panda3D, a game engine, have a program for bundling games: the whole interpreter of CPython 3.14.0,
  as built by the manylinux project, linked into one executable that exports the C API; and beside it the standard
  library's extension modules. That makes it genuine CPython, with or without the lock, and not a look-alike.
* npm's package pyodide has the half of the standard library that is written in Python, as source (that of 3.14.2).

The executable's own main() only runs a game packed into it. Ours replaces it without changing a byte: its search path
for libraries starts with its own folder, and the first library it asks for is libutil.so.1. In today's glibc that one
is empty. A few dozen lines of C, compiled here under this name, define __libc_start_main(), and so come between the
executable's start and its main(): they do what CPython's main() does, through the C API. So sys.executable is an
ordinary executable in the usual tree (bin/, lib/python3.14/), and subprocesses need no variables nor wrappers.

What differs from a true installation: ssl, venv, ensurepip, tkinter, curses, dbm, webbrowser and subinterpreters are
missing; there is no prompt to speak of; `-i`, `-x` and PYTHONSTARTUP do nothing; and tracebacks don't show the lines of
`-c` code.

It is built in $LEVIATHAN_NEWEST, or $XDG_CACHE_HOME/leviathan-newest, or ~/.cache/leviathan-newest, once: 60 MB are
downloaded, 50 MB stay (for each of the two). Needed are Linux with glibc 2.34 or newer on x86-64, pip, npm, and a
C compiler (cc or $CC). The exit status is 3 if it could not be had; otherwise what the new interpreter exits with.
"""
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

# What is downloaded, all of it pinned. A change here makes for a new folder in the cache.
RUNTIME = "panda3d==1.10.16"
RUNTIME_SHA256 = {
    "cp314t": "90712b13bdcbec4222af8573d8f20f4ded3928368b8fe2110dc9bd42c3d59067",
    "cp314": "16cb0feb8b4d97d2e1a7620650b8c1f9b1e561eb738cb4b69646e773ea942693",
}
LIBRARY = "pyodide@314.0.0"
LIBRARY_SHA256 = "a12d8d03a61b5cb52e3575184f298c91ffa29a470cfa4b87308824a52f5f212c"
LIBRARY_WITHOUT = ("_pyodide/", "pyodide/", "_sysconfigdata_", "_ssl.py", "ssl.py", "webbrowser.py")    # its own
PACKAGES = ["pytest==9.0.3", "pluggy==1.6.0", "iniconfig==2.3.0", "packaging==26.2", "pygments==2.20.0"]

# The C API is declared by hand, as there are no headers of 3.14 to be had: nothing here knows how a struct is laid out,
# but for PyStatus, which has been the same since 3.8.
START_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct object PyObject;
typedef struct { int type; const char *function, *message; int exitcode; } PyStatus;
typedef union { char room[16384]; long long aligned; } PyConfig;        /* far larger than the real one */

extern PyObject *PyExc_KeyboardInterrupt;
void PyConfig_InitPythonConfig(PyConfig *);
PyStatus PyConfig_SetBytesArgv(PyConfig *, long, char *const *);
void PyConfig_Clear(PyConfig *);
PyObject *PyConfig_Get(const char *);
PyStatus Py_InitializeFromConfig(const PyConfig *);
int PyStatus_Exception(PyStatus);
void Py_ExitStatusException(PyStatus) __attribute__((noreturn));
int Py_FinalizeEx(void);
PyObject *PyImport_AddModuleRef(const char *);
PyObject *PyImport_ImportModuleAttrString(const char *, const char *);
PyObject *PyModule_GetDict(PyObject *);
PyObject *PyDict_New(void);
PyObject *PyDict_GetItemString(PyObject *, const char *);
int PyDict_SetItemString(PyObject *, const char *, PyObject *);
PyObject *PyRun_StringFlags(const char *, int, PyObject *, PyObject *, void *);
PyObject *PyRun_FileExFlags(FILE *, const char *, int, PyObject *, PyObject *, int, void *);
int PyRun_AnyFileExFlags(FILE *, const char *, int, void *);
PyObject *PyObject_CallFunction(PyObject *, const char *, ...);
PyObject *PyUnicode_EncodeFSDefault(PyObject *);
char *PyBytes_AsString(PyObject *);
PyObject *PyErr_Occurred(void);
void PyErr_Print(void);
void Py_DecRef(PyObject *);

enum { FILE_INPUT = 257 };

/* What there is to do before the program can run: the first entry of sys.path, and __main__'s attributes. Run apart
   from it, so that no frame of ours is in its tracebacks. */
static const char PREPARE[] =
    "def prepare():\n"
    "    import sys\n"
    "    def first(path):\n"
    "        if not sys.flags.safe_path:\n"
    "            sys.path.insert(0, path)\n"
    "    if run_command is not None:\n"
    "        first('')\n"
    "        if run_command.lstrip('\\r\\n')[:1] in (' ', '\\t'):\n"
    "            import textwrap\n"
    "            return 'command', textwrap.dedent(run_command)\n"
    "        return 'command', run_command\n"
    "    import os\n"
    "    if run_module is not None:\n"
    "        first(os.getcwd())\n"
    "        return 'module', run_module\n"
    "    if run_filename is None:\n"
    "        first('')\n"
    "        return 'stdin', ''\n"
    "    for hook in sys.path_hooks:\n"             /* a folder or a zip file with a __main__.py */
    "        try:\n"
    "            hook(run_filename)\n"
    "        except ImportError:\n"
    "            continue\n"
    "        sys.path.insert(0, run_filename)\n"
    "        return 'bundle', run_filename\n"
    "    first(os.path.dirname(os.path.realpath(run_filename)))\n"
    "    from importlib.machinery import SourceFileLoader\n"
    "    main = sys.modules['__main__']\n"
    "    main.__file__, main.__cached__ = run_filename, None\n"
    "    main.__loader__ = SourceFileLoader('__main__', run_filename)\n"
    "    return 'file', run_filename\n"
    "how, what = prepare()\n";

static PyObject *named(PyObject *dict, const char *name)
{
    PyObject *item = PyDict_GetItemString(dict, name);
    return item ? PyUnicode_EncodeFSDefault(item) : NULL;
}

static int run(const char *program)
{
    static const char *const options[] = {"run_command", "run_module", "run_filename"};
    PyObject *space = PyDict_New(), *globals = PyModule_GetDict(PyImport_AddModuleRef("__main__"));
    PyObject *how = NULL, *what = NULL, *runner, *done = NULL;
    const char *kind, *text;

    for (int i = 0; i < 3; i++) {
        PyObject *value = PyConfig_Get(options[i]);
        if (!value || PyDict_SetItemString(space, options[i], value))
            goto over;
        Py_DecRef(value);
    }
    if (!PyRun_StringFlags(PREPARE, FILE_INPUT, space, space, NULL))
        goto over;
    if (!(how = named(space, "how")) || !(what = named(space, "what")))
        goto over;
    Py_DecRef(space);
    kind = PyBytes_AsString(how);
    text = PyBytes_AsString(what);

    if (!strcmp(kind, "command")) {
        done = PyRun_StringFlags(text, FILE_INPUT, globals, globals, NULL);
    } else if (!strcmp(kind, "stdin")) {
        return PyRun_AnyFileExFlags(stdin, "<stdin>", 0, NULL) != 0;
    } else if (!strcmp(kind, "file")) {
        FILE *file = fopen(text, "rb");
        if (!file) {
            fprintf(stderr, "%s: can't open file '%s': [Errno %d] %s\n", program, text, errno, strerror(errno));
            return 2;
        }
        done = PyRun_FileExFlags(file, text, FILE_INPUT, globals, globals, 1, NULL);
    } else if ((runner = PyImport_ImportModuleAttrString("runpy", "_run_module_as_main"))) {
        int module = !strcmp(kind, "module");
        done = PyObject_CallFunction(runner, "si", module ? text : "__main__", module);
    }
over:
    if (done)
        return 0;
    /* An unhandled Ctrl-C ends the process by the signal itself, for shells to see, once Python is finalized. */
    int interrupted = PyErr_Occurred() == PyExc_KeyboardInterrupt;
    PyErr_Print();                              /* exits, on SystemExit */
    return interrupted ? -SIGINT : 1;
}

static int python(int argc, char **argv, char **environment)
{
    static PyConfig config;
    PyStatus status;
    int result;

    (void)environment;
    PyConfig_InitPythonConfig(&config);
    status = PyConfig_SetBytesArgv(&config, argc, argv);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))             /* an error, or an exit as that of --version */
        Py_ExitStatusException(status);
    result = run(argv[0]);
    if (Py_FinalizeEx() < 0)
        return 120;
    if (result == -SIGINT) {
        signal(SIGINT, SIG_DFL);
        kill(getpid(), SIGINT);
        return 128 + SIGINT;
    }
    return result;
}

typedef int main_function(int, char **, char **);

int __libc_start_main(main_function *theirs, int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*loader_fini)(void), void *stack_end)
{
    int (*real)(main_function *, int, char **, void (*)(void), void (*)(void), void (*)(void), void *);

    (void)theirs;
    real = dlvsym(RTLD_NEXT, "__libc_start_main", "GLIBC_2.2.5");
    return real(python, argc, argv, init, fini, loader_fini, stack_end);
}
"""

# The executable asks for libutil's symbols in this version; ours too, or the loader warns.
START_MAP = "GLIBC_2.2.5 { global: __libc_start_main; local: *; };\n"

CHECK = """
import _thread, asyncio, ctypes, json, multiprocessing, select, socket, sqlite3, subprocess, sys, threading, zlib
import pytest
assert sys.version_info[:2] == (3, 14), sys.version
assert sys._is_gil_enabled() is (sys.argv[1] == "cp314"), "the global interpreter lock"
assert subprocess.check_output([sys.executable, "-I", "-c", "print(6 * 7)"]) == b"42\\n"
"""


class CannotPrepare(Exception):
    """The interpreter can't be had here; the text says why."""


def cache():
    """The folder that the interpreters are kept in."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.abspath(os.environ.get("LEVIATHAN_NEWEST") or os.path.join(base, "leviathan-newest"))


def command(arguments, cwd, why):
    """Run a program that says nothing unless it fails; CannotPrepare if it does."""
    try:
        done = subprocess.run(arguments, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotPrepare("%s: %s" % (why, error))
    if done.returncode:
        raise CannotPrepare("%s: `%s` failed with status %d:\n%s" % (
            why, " ".join(shlex.quote(argument) for argument in arguments), done.returncode,
            done.stdout.decode(errors="replace").rstrip()))


def downloaded(folder, suffix, sha256):
    """The path of the one file of this kind in *folder*, if it is what it should be."""
    names = [name for name in os.listdir(folder) if name.endswith(suffix)]
    if len(names) != 1:
        raise CannotPrepare("one *%s was expected, got %s" % (suffix, names))
    path = os.path.join(folder, names[0])
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != sha256:
        raise CannotPrepare("%s is not the file it was: its SHA-256 is %s" % (names[0], digest.hexdigest()))
    return path


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def build(abi, work, tree, final):
    """Make the interpreter's tree in the folder *tree*, which will be renamed to *final*; *work* is for files on the way."""
    name = "python3.14t" if abi == "cp314t" else "python3.14"
    lib = os.path.join(tree, "lib", name)
    executable = os.path.join(tree, "bin", name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

    # The compiler first: of what can be missing it is the likeliest, and it needs no downloads to see that.
    write(os.path.join(work, "start.c"), START_C.encode())
    write(os.path.join(work, "start.map"), START_MAP.encode())
    os.makedirs(os.path.dirname(executable))
    command(shlex.split(os.environ.get("CC", "cc")) + [
        "-O2", "-Wall", "-shared", "-fPIC", "-Wl,-soname,libutil.so.1", "-Wl,--version-script,start.map",
        "-o", os.path.join(tree, "bin", "libutil.so.1"), "start.c", "-ldl"], work, "a C compiler is needed")

    command(["npm", "pack", "--silent", LIBRARY], work, "the standard library comes from npm")
    with tarfile.open(downloaded(work, ".tgz", LIBRARY_SHA256)) as package:
        with zipfile.ZipFile(package.extractfile("package/python_stdlib.zip")) as library:
            for item in library.namelist():
                if not item.endswith("/") and not item.startswith(LIBRARY_WITHOUT):
                    write(os.path.join(lib, item), library.read(item))

    command(pip + ["download", "--no-deps", "--only-binary", ":all:", "--platform", "manylinux2014_x86_64",
                   "--implementation", "cp", "--python-version", "3.14", "--abi", abi, "--dest", ".", RUNTIME],
            work, "the interpreter comes from PyPI")
    with zipfile.ZipFile(downloaded(work, ".whl", RUNTIME_SHA256[abi])) as wheel:
        for item in wheel.namelist():
            folder, _, file = item.rpartition("/")
            if item == "panda3d_tools/deploy-stub":
                write(executable, wheel.read(item))
            elif folder == "deploy_libs" and file.startswith("_sysconfigdata_"):
                write(os.path.join(lib, file), wheel.read(item))
            elif folder == "deploy_libs" and file.split(".")[0] not in ("_decimal", "_ssl", "_tkinter"):
                write(os.path.join(lib, "lib-dynload", file), wheel.read(item))
    # The extension module behind `decimal` wants a library that is in neither; what stands in for it is in every Python.
    shutil.copyfile(importlib.util.find_spec("_pydecimal").origin, os.path.join(lib, "_pydecimal.py"))
    os.chmod(executable, 0o755)
    os.symlink(name, os.path.join(tree, "bin", "python"))

    # Old versions of pip compare what a package requires with the Python that pip runs on, whatever they are told.
    command(pip + ["install", "--no-deps", "--only-binary", ":all:", "--python-version", "3.14", "--no-compile",
                   "--ignore-requires-python", "--target", os.path.join(lib, "site-packages")] + PACKAGES,
            work, "pytest comes from PyPI")
    command([executable, "-I", "-c", CHECK, abi], work, "the interpreter that was made doesn't work")
    command([executable, "-I", "-m", "compileall", "-q", "-s", tree, "-p", final, lib], work, "compileall")


@contextlib.contextmanager
def alone(folder):
    """Only one process at a time prepares."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # gone with the process, however it ends
        yield


def prepare(abi):
    """The path of the interpreter's executable, which is made first if need be. *abi*: "cp314t" or "cp314"."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2 ** 32:
        raise CannotPrepare("it exists for Linux on x86-64 only, and this is %s on %s" % (sys.platform, platform.machine()))
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 34):
        found = " ".join((libc, version)).strip() or "another libc"
        raise CannotPrepare("it needs glibc 2.34 or newer, and this is %s" % found)
    recipe = repr((RUNTIME, RUNTIME_SHA256, LIBRARY, LIBRARY_SHA256, LIBRARY_WITHOUT, PACKAGES, START_C, START_MAP))
    folder = cache()
    final = os.path.join(folder, "%s-%s" % (abi, hashlib.sha256(recipe.encode()).hexdigest()[:12]))
    executable = os.path.join(final, "bin", "python3.14t" if abi == "cp314t" else "python3.14")
    if os.path.isdir(final):                    # it gets this name when it is finished, never before
        return executable
    try:
        with alone(folder):
            if not os.path.isdir(final):
                for name in os.listdir(folder):
                    if name.startswith("making-"):          # what a process left that was killed at it
                        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
                print("newest.py: preparing %s in %s; this takes a minute or two, once" % (abi, folder), file=sys.stderr)
                making = tempfile.mkdtemp(prefix="making-", dir=folder)
                try:
                    tree = os.path.join(making, "tree")
                    os.mkdir(tree)
                    build(abi, making, tree, final)
                    os.rename(tree, final)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
    except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise CannotPrepare("%s: %s" % (type(error).__name__, error))
    return executable


def main(arguments):
    abi = "cp314t"
    only = False
    while arguments and arguments[0] in ("--gil", "--prepare", "--help"):
        option = arguments.pop(0)
        if option == "--help":
            print(__doc__.strip())
            return 0
        if option == "--gil":
            abi = "cp314"
        else:
            only = True
    try:
        executable = prepare(abi)
    except CannotPrepare as error:
        what = "CPython 3.14" if abi == "cp314" else "free-threaded CPython 3.14"
        print("newest.py: no %s: %s" % (what, error), file=sys.stderr)
        return 3
    if only:
        print(executable)
        return 0
    os.environ.pop("PYTHONHOME", None)          # another Python's
    sys.stdout.flush()
    os.execv(executable, [executable] + arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
