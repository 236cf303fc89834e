"""The engine contract on Windows' completion ports."""
import socket
import sys
import threading

import pytest

pytest.register_assert_rewrite("engine_contract")

import leviathan                                # noqa: E402
from engine_contract import EngineContract      # noqa: E402

if sys.platform != "win32":
    pytest.skip("needs Windows", allow_module_level=True)

import leviathan_win                            # noqa: E402


class TestIocp(EngineContract):
    module = leviathan_win
    pinned = False


def test_a_closed_console_ends_run_in_order(monkeypatch):
    """The issue: Ctrl-C, Ctrl-Break and console close. Windows calls the handler that was set, on a thread of its own."""
    handlers = []
    monkeypatch.setattr(leviathan_win.api, "SetConsoleCtrlHandler", lambda handler, add: handlers.append((handler, add)))
    monkeypatch.setattr(leviathan_win, "CONSOLE_PATIENCE", 0.0)
    server = leviathan.Communicator(leviathan.LengthPrefix(4), leviathan.echo, manager=leviathan.SessionManager())
    listener = server.listen(0)
    answers = []

    def close_the_console():
        with socket.create_connection(listener.address, 5) as client:
            client.sendall(b"\0\0\0\1x")
            answers.append(client.recv(5))
        answers.extend(handlers[0][0](event) for event in (0, 1, leviathan_win.CTRL_LOGOFF_EVENT))
        answers.append(listener.closed)     # somebody has logged off, which services are told; this one goes on
        answers.append(handlers[0][0](leviathan_win.CTRL_CLOSE_EVENT))

    closer = threading.Thread(target=close_the_console)
    assert leviathan.run(server, on_ready=closer.start) is True
    closer.join(5)
    assert answers == [b"\0\0\0\1x", 0, 0, 1, False, 1] and len(handlers) == 1 and handlers[0][1] is True
