"""The emulator needs glibc's contexts, and NVIDIA's compiler has no wheels for macOS."""

from __future__ import annotations

import sys

import pytest

from pyggml_bridge.cuda import nvrtc
from tests.cuda.stand_in import StandIn

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A GPU with CuPy, where there is neither."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(nvrtc, "compiled", stand_in.compile)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return stand_in
