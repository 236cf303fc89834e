"""leviathan_win's structures, prototypes and constants against Microsoft's documentation. Runs on any system.

The tables here were written from the documentation (learn.microsoft.com: minwinbase.h, ws2def.h, guiddef.h, the pages of
the calls) and not from leviathan_win.
"""
import ctypes
import os
import struct
import subprocess
import sys
import uuid

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import leviathan_win            # noqa: E402

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WIDTH = ctypes.sizeof(ctypes.c_void_p)

# C types of the documentation: (width in bytes; 0: as wide as a pointer, signed).
TYPES = {
    "BOOL": (4, True), "int": (4, True), "DWORD": (4, False), "ULONG": (4, False), "NTSTATUS": (4, None), "u_long": (4, False),
    "WORD": (2, False), "BYTE[8]": (8, None), "HANDLE": (0, None), "SOCKET": (0, False), "ULONG_PTR": (0, False),
    "pointer": (0, None)}

# {structure: (its name in leviathan_win, fields of the documentation)}
STRUCTURES = {
    # typedef struct _OVERLAPPED {ULONG_PTR Internal, InternalHigh; union {struct {DWORD Offset, OffsetHigh;}; PVOID Pointer;};
    # HANDLE hEvent;}
    "OVERLAPPED": [("Internal", "ULONG_PTR"), ("InternalHigh", "ULONG_PTR"), ("Offset", "DWORD"), ("OffsetHigh", "DWORD"),
                   ("hEvent", "HANDLE")],
    # typedef struct _OVERLAPPED_ENTRY {ULONG_PTR lpCompletionKey; LPOVERLAPPED lpOverlapped; ULONG_PTR Internal;
    # DWORD dwNumberOfBytesTransferred;}
    "OVERLAPPED_ENTRY": [("lpCompletionKey", "ULONG_PTR"), ("lpOverlapped", "pointer"), ("Internal", "ULONG_PTR"),
                         ("dwNumberOfBytesTransferred", "DWORD")],
    # typedef struct _WSABUF {ULONG len; CHAR *buf;}
    "WSABUF": [("len", "ULONG"), ("buf", "pointer")],
    # typedef struct _GUID {unsigned long Data1; unsigned short Data2, Data3; unsigned char Data4[8];}
    "GUID": [("Data1", "u_long"), ("Data2", "WORD"), ("Data3", "WORD"), ("Data4", "BYTE[8]")]}

SIZES = {"OVERLAPPED": (32, 20), "OVERLAPPED_ENTRY": (32, 16), "WSABUF": (16, 8), "GUID": (16, 16)}      # 64 and 32-bit
OFFSETS = {                                 # on 64-bit
    "OVERLAPPED": [0, 8, 16, 20, 24], "OVERLAPPED_ENTRY": [0, 8, 16, 24], "WSABUF": [0, 8], "GUID": [0, 4, 6, 8]}

PROTOTYPES = {
    "CreateIoCompletionPort": ("kernel32", "HANDLE", "HANDLE HANDLE ULONG_PTR DWORD"),
    "GetQueuedCompletionStatusEx": ("kernel32", "BOOL", "HANDLE pointer ULONG pointer DWORD BOOL"),
    "PostQueuedCompletionStatus": ("kernel32", "BOOL", "HANDLE DWORD ULONG_PTR pointer"),
    "CancelIoEx": ("kernel32", "BOOL", "HANDLE pointer"),
    "CloseHandle": ("kernel32", "BOOL", "HANDLE"),
    "SetConsoleCtrlHandler": ("kernel32", "BOOL", "pointer BOOL"),
    "RtlNtStatusToDosError": ("ntdll", "ULONG", "NTSTATUS"),
    # socket, buffers, their count, bytes (NULL), flags (received: a pointer; sent: a value), overlapped, routine
    "WSARecv": ("ws2_32", "int", "SOCKET pointer DWORD pointer pointer pointer pointer"),
    "WSASend": ("ws2_32", "int", "SOCKET pointer DWORD pointer DWORD pointer pointer"),
    "WSAIoctl": ("ws2_32", "int", "SOCKET DWORD pointer DWORD pointer DWORD pointer pointer pointer"),
    # Not used yet, or not any more: here so that a prototype added later is looked at too.
    "GetQueuedCompletionStatus": ("kernel32", "BOOL", "HANDLE pointer pointer pointer DWORD"),
    "SetFileCompletionNotificationModes": ("kernel32", "BOOL", "HANDLE BYTE"),
    "WSAGetLastError": ("ws2_32", "int", ""),
    "shutdown": ("ws2_32", "int", "SOCKET int"),
    "closesocket": ("ws2_32", "int", "SOCKET"),
    "setsockopt": ("ws2_32", "int", "SOCKET int int pointer int"),
    "GetStdHandle": ("kernel32", "HANDLE", "DWORD"),
    "SetEvent": ("kernel32", "BOOL", "HANDLE"),
    "WaitForSingleObject": ("kernel32", "DWORD", "HANDLE DWORD")}
EXTENSIONS = {
    "ACCEPTEX": ("BOOL", "SOCKET SOCKET pointer DWORD DWORD DWORD pointer pointer"),
    "CONNECTEX": ("BOOL", "SOCKET pointer int pointer DWORD pointer pointer")}


def fits(ctype, name):
    """True if *ctype* is as wide as the documented type *name*, and as signed where that matters."""
    width, signed = TYPES[name]
    if ctypes.sizeof(ctype) != (width or WIDTH):
        return False
    if name in ("pointer", "HANDLE"):
        return ctype in (ctypes.c_void_p, ctypes.c_size_t) or hasattr(ctype, "contents")
    if signed is None or not hasattr(ctype, "_type_") or not isinstance(ctype._type_, str):
        return True
    return (ctype(-1).value == -1) is signed


def arithmetic(fields, pointer):
    """(size, offsets) of *fields* by C's rules, pointers being *pointer* bytes wide."""
    position, largest, offsets = 0, 1, []
    for _, name in fields:
        width = TYPES[name][0] or pointer
        alignment = 1 if name.startswith("BYTE") else width
        position = -(-position // alignment) * alignment
        offsets.append(position)
        position += width
        largest = max(largest, alignment)
    return -(-position // largest) * largest, offsets


# -- structures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_fields_are_those_of_the_documentation(name):
    fields = getattr(leviathan_win, name)._fields_
    assert [field[0] for field in fields] == [field for field, _ in STRUCTURES[name]]
    for (field, ctype), (_, documented) in zip(fields, STRUCTURES[name]):
        assert fits(ctype, documented), "%s.%s" % (name, field)


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_sizes_and_offsets(name):
    structure = getattr(leviathan_win, name)
    size, offsets = arithmetic(STRUCTURES[name], WIDTH)
    assert ctypes.sizeof(structure) == size == SIZES[name][WIDTH == 4]
    assert [getattr(structure, field).offset for field, _ in STRUCTURES[name]] == offsets
    assert arithmetic(STRUCTURES[name], 8) == (SIZES[name][0], OFFSETS[name])
    assert arithmetic(STRUCTURES[name], 4)[0] == SIZES[name][1]
    assert not getattr(structure, "_pack_", 0)


def test_types_are_of_a_fixed_width_or_a_pointers():
    widths = {"BOOL": 4, "DWORD": 4, "POINTER": WIDTH, "HANDLE": WIDTH, "SOCKET": WIDTH, "ULONG_PTR": WIDTH}
    for name, width in widths.items():
        assert ctypes.sizeof(getattr(leviathan_win, name)) == width, name
    # Not c_ulong, which wintypes has: it is 8 bytes on Linux.
    assert leviathan_win.DWORD is ctypes.c_uint32 and leviathan_win.BOOL is ctypes.c_int32


def test_an_entry_is_unpacked_as_it_is_laid_out():
    entry = leviathan_win.OVERLAPPED_ENTRY(11, 0x1122334455667788 & (1 << 8 * WIDTH) - 1, 0xC0000120, 4000000000)
    assert leviathan_win._ENTRY.size == ctypes.sizeof(entry)
    assert leviathan_win._ENTRY.unpack(bytes(entry)) == (
        entry.lpCompletionKey, entry.lpOverlapped, entry.Internal, entry.dwNumberOfBytesTransferred)


def test_many_entries_are_unpacked_at_once():
    count = leviathan_win.MAX_EVENTS
    array = (leviathan_win.OVERLAPPED_ENTRY * count)(*((0, index, 0, 2 * index) for index in range(count)))
    buffer = leviathan_win._ENTRIES[count].from_buffer_copy(array)
    assert [entry[1::2] for entry in leviathan_win._ENTRY.iter_unpack(memoryview(buffer).cast("B"))] == \
        [(index, 2 * index) for index in range(count)]
    assert ctypes.sizeof(leviathan_win._ENTRIES[1]) == ctypes.sizeof(leviathan_win.OVERLAPPED_ENTRY)


def test_a_record_begins_with_its_overlapped():
    record = leviathan_win.RECORD
    assert record.overlapped.offset == 0 and record.overlapped.size == ctypes.sizeof(leviathan_win.OVERLAPPED)
    assert record.buffer.offset >= ctypes.sizeof(leviathan_win.OVERLAPPED) and record.buffer.offset % WIDTH == 0
    ends = sorted((getattr(record, name).offset, getattr(record, name).offset + getattr(record, name).size)
                  for name, _ in record._fields_)
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:])) and ends[-1][1] <= ctypes.sizeof(record)


def test_an_overlapped_knows_the_addresses_of_its_parts():
    made = leviathan_win.Overlapped()
    assert made.address == ctypes.addressof(made.record) == ctypes.addressof(made.record.overlapped)
    assert made.buffer == ctypes.addressof(made.record.buffer)
    made.record.flags, made.record.count = 7, 9
    assert ctypes.c_uint32.from_address(made.flags).value == 7 and ctypes.c_uint32.from_address(made.count).value == 9
    assert not any(bytes(made.record.overlapped))           # Offset 0, hEvent NULL
    assert made.address % 8 == 0


@pytest.mark.parametrize("name, text", [
    ("WSAID_ACCEPTEX", "b5367df1-cbac-11cf-95ca-00805f48a192"), ("WSAID_CONNECTEX", "25a207b9-ddf3-4660-8ee9-76e58c74063e")])
def test_guids_of_the_extensions(name, text):
    # mswsock.h
    assert bytes(getattr(leviathan_win, name)) == uuid.UUID(text).bytes_le


# -- prototypes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(leviathan_win.PROTOTYPES))
def test_prototypes_are_those_of_the_documentation(name):
    assert name in PROTOTYPES, "write down here what the documentation says of %s" % name
    library, result, *arguments = leviathan_win.PROTOTYPES[name]
    documented = PROTOTYPES[name]
    assert library == documented[0]
    assert fits(result, documented[1])
    names = documented[2].split()
    assert len(arguments) == len(names)
    for index, (argument, documented_name) in enumerate(zip(arguments, names)):
        assert fits(argument, documented_name), "argument %d of %s" % (index + 1, name)


@pytest.mark.parametrize("name", sorted(EXTENSIONS))
def test_prototypes_of_the_extensions(name):
    prototype = getattr(leviathan_win, name)
    result, arguments = EXTENSIONS[name]
    assert fits(prototype._restype_, result)
    assert len(prototype._argtypes_) == len(arguments.split())
    for argument, documented in zip(prototype._argtypes_, arguments.split()):
        assert ctypes.sizeof(argument) == (TYPES[documented][0] or WIDTH)


def test_a_console_handler():
    # BOOL WINAPI HandlerRoutine(DWORD dwCtrlType)
    assert fits(leviathan_win.CONSOLE_HANDLER._restype_, "BOOL")
    assert [fits(argument, "DWORD") for argument in leviathan_win.CONSOLE_HANDLER._argtypes_] == [True]


def test_extensions_keep_the_last_error():
    # FUNCFLAG_USE_LASTERROR (16): without it api.last_error() after AcceptEx would be that of another call.
    for name in EXTENSIONS:
        assert getattr(leviathan_win, name)._flags_ & 16, name


class FakeLibrary:
    """What ctypes.WinDLL gives."""

    def __init__(self, name, use_last_error):
        self.name, self.use_last_error, self.functions = name, use_last_error, {}

    def __getitem__(self, name):
        return self.functions.setdefault(name, type("Function", (), {"library": self, "restype": None, "argtypes": None})())


def test_every_call_is_looked_up_with_its_types(monkeypatch):
    monkeypatch.setattr(ctypes, "WinDLL", FakeLibrary, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", int, raising=False)
    monkeypatch.setattr(ctypes, "FormatError", str, raising=False)
    made = leviathan_win.Api()
    for name, (library, result, *arguments) in leviathan_win.PROTOTYPES.items():
        function = getattr(made, name)
        assert (function.library.name, function.library.use_last_error) == (library, True)
        assert function.restype is result and list(function.argtypes) == arguments


@pytest.mark.parametrize("fails", [False, True])
def test_where_the_extensions_are(monkeypatch, fails):
    asked = []

    def wsa_ioctl(handle, control, given, given_size, answer, answer_size, returned, overlapped, routine):
        assert control == 0xC8000006 and (given_size, answer_size) == (16, WIDTH) and not overlapped and not routine
        asked.append(ctypes.string_at(given, 16))
        ctypes.c_void_p.from_address(answer).value = 0x1000 * len(asked)
        return -1 if fails else 0

    made = object.__new__(leviathan_win.Api)
    made.AcceptEx = made.ConnectEx = None
    made.WSAIoctl, made.last_error, made.text = wsa_ioctl, lambda: 10022, "text of {}".format
    monkeypatch.setattr(leviathan_win, "api", made)
    if fails:
        with pytest.raises(OSError, match=r"WSAIoctl failed: text of 10022 \(Windows error 10022\)"):
            made.load_extensions()
        return
    made.load_extensions()
    made.load_extensions()                      # the second does nothing
    assert asked == [bytes(leviathan_win.WSAID_ACCEPTEX), bytes(leviathan_win.WSAID_CONNECTEX)]
    for number, (function, prototype) in enumerate(((made.AcceptEx, leviathan_win.ACCEPTEX),
                                                    (made.ConnectEx, leviathan_win.CONNECTEX)), 1):
        assert isinstance(function, prototype) and ctypes.cast(function, ctypes.c_void_p).value == 0x1000 * number


# -- constants --------------------------------------------------------------------------------------------------------

def test_constants():
    # winsock2.h and mswsock.h: _WSAIORW(IOC_WS2, 6), SO_UPDATE_..., winerror.h, winbase.h
    assert leviathan_win.SIO_GET_EXTENSION_FUNCTION_POINTER == 0x80000000 | 0x40000000 | 0x08000000 | 6
    assert (leviathan_win.SO_UPDATE_ACCEPT_CONTEXT, leviathan_win.SO_UPDATE_CONNECT_CONTEXT) == (0x700B, 0x7010)
    assert (leviathan_win.IO_PENDING, leviathan_win.OPERATION_ABORTED, leviathan_win.INFINITE) == (997, 995, 0xFFFFFFFF)
    # mstcpip.h: _WSAIORW(IOC_VENDOR, 39)
    assert leviathan_win.SIO_TCP_INFO == 0x80000000 | 0x40000000 | 0x18000000 | 39
    # AcceptEx: "at least 16 bytes more than the maximum address length"; sockaddr_storage has 128 bytes
    assert leviathan_win.ADDRESS_SIZE == 128 + 16
    assert ctypes.sizeof(leviathan_win._ADDRESSES) == 2 * leviathan_win.ADDRESS_SIZE


@pytest.mark.parametrize("host, port", [("127.0.0.1", 80), ("255.254.253.1", 65535)])
def test_sockaddr_in(host, port):
    # short sin_family; u_short sin_port; struct in_addr sin_addr; char sin_zero[8]
    packed = leviathan_win._sockaddr(leviathan_win.socket.AF_INET, (host, port))
    assert len(packed) == 16 and packed[8:] == bytes(8)
    assert struct.unpack("=H", packed[:2]) == (leviathan_win.socket.AF_INET,)
    assert packed[2:4] == port.to_bytes(2, "big") and packed[4:8] == bytes(map(int, host.split(".")))


@pytest.mark.parametrize("address, flow, scope", [
    (("fe80::1%eth0", 443, 5, 7), 5, 7), (("::1", 443, 0, 0), 0, 0), (("::1", 443), 0, 0)])
def test_sockaddr_in6(address, flow, scope):
    # short sin6_family; u_short sin6_port; u_long sin6_flowinfo; struct in6_addr sin6_addr; u_long sin6_scope_id
    packed = leviathan_win._sockaddr(leviathan_win.socket.AF_INET6, address)
    assert len(packed) == 28 and struct.unpack("=H", packed[:2]) == (leviathan_win.socket.AF_INET6,)
    assert packed[2:4] == b"\x01\xbb" and packed[4:8] == flow.to_bytes(4, "big")
    assert packed[8:24].hex() == ("fe80" if "fe80" in address[0] else "0000") + "0" * 27 + "1"
    assert struct.unpack("=I", packed[24:]) == (scope,)


# -- importing --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform == "win32", reason="there the system's calls are looked up")
def test_importing_it_elsewhere_does_nothing():
    code = """
import ctypes, os, socket, sys, threading
def refuse(*arguments, **options):
    raise AssertionError("importing it has effects")
socket.socket = threading.Thread.start = ctypes.CDLL.__init__ = refuse
def files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
before = files(), threading.active_count()
import leviathan_win
assert leviathan_win.api is None
assert before == (files(), threading.active_count())
assert "ctypes.wintypes" not in sys.modules and "leviathan" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout.decode()
