"""The run-time compiler: kept modules, targets newer than it, and what it says when something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyggml_bridge.cuda import nvrtc
from pyggml_bridge.cuda.kernels import Module
from pyggml_bridge.errors import CQError

SMALL = Module("small.cu", (("VALUE", 3),))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources with a header, and an empty cache."""
    (tmp_path / "small.cu").write_text(
        '#include "value.cuh"\nextern "C" __global__ void small(int *out) { *out = FACTOR * VALUE; }'
    )
    (tmp_path / "value.cuh").write_text("#define FACTOR 2\n")
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_modules_are_compiled_once(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nvrtc.compiled(SMALL, 80)
    assert path.read_bytes().startswith(b"\x7fELF") and path.is_relative_to(sources / "cache")
    others = {nvrtc.compiled(SMALL, 75), nvrtc.compiled(Module("small.cu", (("VALUE", 4),)), 80)}
    (sources / "value.cuh").write_text("#define FACTOR 5\n")
    assert len({path, nvrtc.compiled(SMALL, 80), *others}) == 4
    monkeypatch.setattr(nvrtc, "compile_module", lambda *_: pytest.fail("compiled again"))
    (sources / "value.cuh").write_text("#define FACTOR 2\n")
    assert nvrtc.compiled(SMALL, 80) == path


def test_a_cache_that_cannot_be_written_is_no_error(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(sources / "file"))
    assert nvrtc.compiled(SMALL, 80).read_bytes().startswith(b"\x7fELF")


def test_newer_devices_get_ptx(sources: Path) -> None:
    code, _ = nvrtc.compile_module(SMALL, 999)
    assert b".visible .entry small" in code and f".target sm_{nvrtc.architectures()[-1]}".encode() in code


@pytest.mark.usefixtures("sources")
def test_older_devices_are_refused() -> None:
    with pytest.raises(CQError, match=r"--cuda: NVRTC \d+\.\d+ does not compile for compute capability 3\.5"):
        nvrtc.compile_module(SMALL, 35)


def test_errors_are_one_line(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "small.cu").write_text("__device__ int f() { return nothing; }\n")
    with pytest.raises(
        CQError, match=r'^--cuda: small\.cu does not compile for sm_80: .*identifier "nothing" is undefined$'
    ):
        nvrtc.compile_module(SMALL, 80)
    nvrtc._library.cache_clear()
    monkeypatch.setattr(nvrtc, "_candidates", lambda: ["/nowhere/libnvrtc.so"])
    with pytest.raises(CQError, match="--cuda: the NVRTC library is missing"):
        nvrtc.compile_module(SMALL, 80)
