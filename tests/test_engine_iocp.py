"""The engine contract on Windows' completion ports."""
import sys

import pytest

pytest.register_assert_rewrite("engine_contract")

from engine_contract import EngineContract      # noqa: E402

if sys.platform != "win32":
    pytest.skip("needs Windows", allow_module_level=True)

import leviathan_win                            # noqa: E402


class TestIocp(EngineContract):
    module = leviathan_win
    pinned = False
