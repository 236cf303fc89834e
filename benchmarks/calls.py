"""Counts the Windows calls of a server, in its own process: what a library calls, not how long it takes.

Three ways lead from Python to the system, and all are counted by the same means. Before the function's address a few
instructions are put that add one to a counter and go on to the function: they change no register that matters, need no
lock of Python's, and cost a nanosecond. A compiled module (asyncio's `_overlapped`, winloop's `loop`) finds the address
in its import table, leviathan by ctypes; each is given the counter's instead. x86-64 only, as all of tests/wine.py.
"""
import ctypes
import json
import struct
import sys
import threading

# The name in the system and what it is counted as. What only reads the memory of its own process, as GetOverlappedResult
# of something that is done, is no system call and is left out.
COUNTED = {
    "WSARecv": "WSARecv",
    "WSASend": "WSASend",
    "GetQueuedCompletionStatus": "GetQueuedCompletionStatus[Ex]",
    "GetQueuedCompletionStatusEx": "GetQueuedCompletionStatus[Ex]",
    "PostQueuedCompletionStatus": "PostQueuedCompletionStatus",
    "CancelIoEx": "CancelIoEx",
}
# mov rax, counter; lock inc qword [rax]; mov rax, function; jmp rax -- rax carries no argument in Windows' convention
THUNK = struct.Struct("<2sQ4s2sQ2s")
EXECUTABLE = 0x40                       # PAGE_EXECUTE_READWRITE
COMMIT = 0x3000                         # MEM_COMMIT | MEM_RESERVE
IMPORTS = 0x90                          # from the start of the PE32+ header to the import directory's address
BY_ORDINAL = 1 << 63


class Counters:
    """A counter and its instructions for each name of COUNTED."""

    def __init__(self):
        self.kernel32 = ctypes.WinDLL("kernel32")
        self.kernel32.VirtualAlloc.restype = ctypes.c_size_t
        self.kernel32.VirtualAlloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint32]
        self.kernel32.VirtualProtect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_void_p]
        self.counts = (ctypes.c_uint64 * len(COUNTED))()
        self.page = self.kernel32.VirtualAlloc(0, 4096, COMMIT, EXECUTABLE)
        self.used = 0

    def counted(self, name, function):
        """The address of instructions that count and go on to the function at that address."""
        counter = ctypes.addressof(self.counts) + 8 * list(COUNTED).index(name)
        code = THUNK.pack(b"\x48\xb8", counter, b"\xf0\x48\xff\x00", b"\x48\xb8", function, b"\xff\xe0")
        address = self.page + self.used
        ctypes.memmove(address, code, len(code))
        self.used += 32
        return address

    def in_module(self, path):
        """Put counters into the import table of a loaded DLL."""
        base = ctypes.WinDLL(path)._handle
        header = base + _read(base + 0x3C, "<I")
        descriptor = base + _read(header + IMPORTS, "<I")
        while _read(descriptor + 12, "<I"):             # a library: its names at [0], the addresses at [16]
            names, slots = (base + _read(descriptor + offset, "<I") for offset in (0, 16))
            while _read(names, "<Q"):
                entry = _read(names, "<Q")
                name = "" if entry & BY_ORDINAL else ctypes.string_at(base + entry + 2).decode()
                if name in COUNTED:
                    self._write(slots, self.counted(name, _read(slots, "<Q")))
                names, slots = names + 8, slots + 8
            descriptor += 20

    def _write(self, slot, address):
        before = ctypes.c_uint32()
        self.kernel32.VirtualProtect(slot, 8, EXECUTABLE, ctypes.byref(before))
        ctypes.memmove(slot, struct.pack("<Q", address), 8)
        self.kernel32.VirtualProtect(slot, 8, before, ctypes.byref(before))

    def in_leviathan(self, engine):
        """Put counters before the functions of leviathan_win.api."""
        for name in COUNTED:
            function = getattr(engine.api, name, None)
            if function is not None:
                kind = ctypes.WINFUNCTYPE(function.restype, *function.argtypes, use_last_error=True)
                address = ctypes.cast(function, ctypes.c_void_p).value
                setattr(engine.api, name, kind(self.counted(name, address)))

    def report(self):
        """{what it is counted as: calls so far}"""
        counts = dict.fromkeys(COUNTED.values(), 0)
        for what, count in zip(COUNTED.values(), self.counts):
            counts[what] += count
        return counts


def _read(address, form):
    return struct.unpack(form, ctypes.string_at(address, struct.calcsize(form)))[0]


def count(server):
    """Count from now on the calls of this server of servers.py. Each line on stdin is answered by the counts, as JSON."""
    counters = Counters()
    if server == "leviathan":
        import leviathan_win
        counters.in_leviathan(leviathan_win)
    elif server.startswith("winloop"):
        import winloop.loop
        counters.in_module(winloop.loop.__file__)
    else:
        import _overlapped
        counters.in_module(_overlapped.__file__)

    def answer():
        for _ in sys.stdin:
            print(json.dumps(counters.report()), flush=True)

    threading.Thread(target=answer, daemon=True).start()
