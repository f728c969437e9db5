"""The CUDA backend end to end on emulated kernels: equal to the CPU backend; graphs, memory and errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml_bridge.cli import run as cli_run
from pyggml_bridge.cuda.backend import require_device
from pyggml_bridge.cuda.kernels import ATTENTION, HEADS, NORM, DeviceInfo
from pyggml_bridge.cuda.linear import CHOICE, LINEAR, LINEARS, MATRIX
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType
from pyggml_bridge.models import load_model
from pyggml_bridge.native import ffi
from pyggml_bridge.operations import Value
from pyggml_bridge.program import Program
from pyggml_bridge.split import RESERVED_BYTES
from tests.cuda.emulate import struct_layout
from tests.cuda.stand_in import StandIn, allocated_bytes
from tests.test_runner import mean_kld
from tests.tiny_architectures import TinyDeepSeek, TinyPhi, write
from tests.tiny_gguf import Tiny, write_tiny

# What launches pass: (its source in native/cuda, its name there, the dtype).
STRUCTS = (
    ("common.cuh", "cq_matrix", MATRIX),
    ("common.cuh", "cq_linear", LINEAR),
    ("common.cuh", "cq_linears", LINEARS),
    ("attention.cuh", "cq_attention", ATTENTION),
    ("attention.cuh", "cq_heads", HEADS),
    ("route.cu", "cq_route", CHOICE),
    ("rows.cu", "cq_norm", NORM),
)

N_PREFILL, N_DECODE, MAX_MEAN_KLD = 33, 5, 1e-5

# Seeds are such that no activation lies where the CPU's instruction sets round it to different int8: one that does
# moves the logits by a mean KLD of up to 3e-4, between those sets as well, else it is about 1e-12.
VARIANTS = {
    "moe": Tiny(n_experts=6, hadamard=32),
    "qwen2moe": Tiny(arch="qwen2moe", n_experts=4, shared_ffn=64, biases=True),
    "moe-cq3t": Tiny(cq=CQType.CQ3T, n_experts=3, codebook_rows=8, hidden=192, ffn=128, scale_group=-1),
    "moe-types": Tiny(
        n_experts=4, expert_cqs=(CQType.CQ4, CQType.CQ3T, CQType.CQ5, CQType.CQ3T), codebook_rows=8, ffn=128
    ),
    "deepseek2": TinyDeepSeek(),
    "deepseek2-q-lora-groups": TinyDeepSeek(
        n_layers=2,
        n_dense=0,
        n_heads=18,
        q_rank=64,
        nope=64,
        clustered_heads=True,
        tied=True,
        n_experts=8,
        top_k=3,
        groups=(4, 2),
        scale=2.5,
        normalize=True,
        seed=2,
    ),
    "phimoe": TinyPhi(n_layers=2, jitter=0.01, seed=1),
    "phimoe-longrope-window": TinyPhi(window=17, original=N_PREFILL + 2, seed=4),  # the third decoded token crosses it
    "cq4t-biases-int4-tied": Tiny(cq=CQType.CQ4T, codebook_rows=4, biases=True, activation_bits=4, tied=True),
}


def compare_with_the_cpu(path: Path, t: Tiny, gpu_layers: int | None = None) -> None:
    """Prefill, then tokens one by one: the same experts and argmax, logits within MAX_MEAN_KLD."""
    write(path, t)
    tokens = np.random.default_rng(3).integers(0, t.vocab, N_PREFILL + N_DECODE).astype(np.int32)
    ours, cpu = load_model(path, cuda=True, gpu_layers=gpu_layers, n_batch=N_PREFILL), load_model(path)
    for first, last in [(0, N_PREFILL), *((i, i + 1) for i in range(N_PREFILL, len(tokens)))]:
        logits, want = (model.forward(tokens[first:last], first, last - first) for model in (ours, cpu))
        assert mean_kld(want, logits) <= MAX_MEAN_KLD
        np.testing.assert_array_equal(logits.argmax(-1), want.argmax(-1))
        for got_ids, want_ids in zip(ours.routing_ids, cpu.routing_ids, strict=True):
            np.testing.assert_array_equal(got_ids[: last - first], want_ids[: last - first])


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_the_cpu(name: str, tmp_path: Path, device: StandIn) -> None:
    compare_with_the_cpu(tmp_path / "tiny.gguf", VARIANTS[name])
    assert device.graph_launches == N_DECODE
    kernels = {launch.kernel for launch in device.executed}
    assert {"gemm", "stock_gemm", "gemv", "stock_gemv"} <= kernels


def test_longrope_changes_there_and_back(tmp_path: Path, device: StandIn) -> None:
    """A sequence that grows beyond the short factors' length is run anew; a new, short one is as it was."""
    path = tmp_path / "tiny.gguf"
    write(path, TinyPhi(n_layers=1, original=12))
    ours, cpu = (load_model(path, cuda=cuda, n_batch=8) for cuda in (True, False))
    tokens = np.arange(20, dtype=np.int32) * 7
    results = []
    for first, last in ((0, 10), (10, 11), (11, 20), (0, 10), (10, 11)):
        device.uploads.clear()
        logits, want = (model.forward(tokens[first:last], first, last - first) for model in (ours, cpu))
        assert mean_kld(want, logits) <= MAX_MEAN_KLD
        results.append((logits, len([n for n in device.uploads if n > 4 * (1 + 8)])))
    assert [uploads for _, uploads in results] == [0, 0, 1, 1, 0]  # of the table
    np.testing.assert_array_equal(results[0][0], results[3][0])
    np.testing.assert_array_equal(results[1][0], results[4][0])


def test_latent_attention_reads_one_cache_for_all_heads() -> None:
    """DeepSeek-V2's widths: a launch's blocks by heads, keys split so that two blocks a processor have work."""
    for n_heads, n_ctx, grid in ((16, 4096, (1, 1, 32)), (16, 65536, (1, 1, 200)), (128, 65536, (8, 1, 25))):
        program = Program(n_ctx, 1, 1, 576, 512 * n_heads)
        key, query = Value(576), Value(576 * n_heads)
        program.logits = program.latent_attention(0, query, key, 512, scale=0.1)
        planned = CUDAProgram(program, 8, DeviceInfo(n_processors=100))
        append, attend, merge = planned.launches(0, 1, 1)
        assert (append.kernel, append.grid) == ("append", (1, 1, 1))
        assert (attend.kernel, attend.grid, attend.threads) == ("latent_attention", grid, 256)
        assert (merge.kernel, merge.grid) == ("attention_merge", (n_heads, 1, 1))
        [_, attend] = planned.launches(0, 8, 1)
        assert attend.grid == (8 * n_heads // 16, 1, 1)
        of_positions = [buffer.nbytes for buffer in planned.memory.buffers if buffer.nbytes >= 2 * 576 * n_ctx]
        assert of_positions == [2 * 576 * n_ctx]


def test_what_has_no_kernel_is_named() -> None:
    program = Program(64, 1, 1, 640, 640)
    program.logits = program.attention(0, Value(640), Value(640), Value(640), scale=1.0)
    with pytest.raises(CQError, match=r"^--cuda: attention heads wider than 600 columns \(640\) are not supported$"):
        CUDAProgram(program, 8, DeviceInfo(100))
    program = Program(64, 1, 1, 64, 64)
    program.route(Value(2049), 0, 2, normalize=True)
    with pytest.raises(CQError, match=r"^--cuda: more than 2048 experts \(2049\) are not supported$"):
        CUDAProgram(program, 8, DeviceInfo(100))


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_layers", [None, 1])
@pytest.mark.parametrize("name", VARIANTS)
def test_forward_on_a_gpu_equals_the_cpu(name: str, gpu_layers: int | None, tmp_path: Path) -> None:
    try:
        require_device()
    except CQError as error:
        pytest.skip(str(error))
    compare_with_the_cpu(tmp_path / "tiny.gguf", VARIANTS[name], gpu_layers)


def test_long_prompts_run_in_batches_without_logits(tmp_path: Path, device: StandIn) -> None:
    write_tiny(tmp_path / "tiny.gguf", Tiny(n_layers=1))
    tokens = np.arange(20, dtype=np.int32)
    logits = load_model(tmp_path / "tiny.gguf", cuda=True, n_batch=8).forward(tokens, 0, 1)
    assert [launch.kernel for launch in device.executed].count("embed") == 3
    assert [launch.kernel for launch in device.executed].count("select_rows") == 1
    assert mean_kld(load_model(tmp_path / "tiny.gguf").forward(tokens, 0, 1), logits) <= MAX_MEAN_KLD


def test_memory_is_counted_before_anything_is_uploaded(tmp_path: Path, device: StandIn) -> None:
    write_tiny(tmp_path / "tiny.gguf", Tiny(n_experts=3))
    load_model(tmp_path / "tiny.gguf", cuda=True, n_ctx=64)
    needed, uploaded = allocated_bytes(device) + RESERVED_BYTES, sum(device.uploads)
    assert 0.9 * (tmp_path / "tiny.gguf").stat().st_size < uploaded < needed - RESERVED_BYTES
    device.allocated.clear(), device.uploads.clear()
    device.free_bytes = needed - 1
    with pytest.raises(
        CQError, match=r"--cuda: 0\.\d\d GB needed on Stand-in, 0\.\d\d GB free: try --gpu-layers 1 or a"
    ):
        load_model(tmp_path / "tiny.gguf", cuda=True, n_ctx=64)
    assert not device.allocated and not device.uploads
    device.free_bytes = needed
    load_model(tmp_path / "tiny.gguf", cuda=True, n_ctx=64)


@pytest.mark.parametrize(("source", "name", "dtype"), STRUCTS)
def test_structs_are_the_compilers(source: str, name: str, dtype: np.dtype[Any]) -> None:
    """Every field lies where the kernels look for it."""
    assert dtype.fields is not None
    offsets = {field: offset for field, (_, offset, *_) in dtype.fields.items()}
    assert struct_layout(source, name, tuple(offsets)) == {"": dtype.itemsize, **offsets}


def test_a_matrix_is_the_same_on_the_host() -> None:
    """cq_matrix of cq.h begins as that of common.cuh, whose next field is the host's experts."""
    assert MATRIX.fields is not None
    offsets = {name: offset for name, (_, offset, *_) in MATRIX.fields.items() if name != "unused"}
    assert {name: ffi.offsetof("cq_matrix", name) for name in offsets} == offsets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "--cuda: the driver finds no NVIDIA GPU"),
        ({"driver_error": "cudaErrorInsufficientDriver"}, "--cuda: no NVIDIA driver, or none that works: cudaErrorIns"),
        ({"capability": (6, 1)}, "--cuda: Stand-in has compute capability 6.1, at least 7.5 is needed"),
    ],
)
def test_unsuitable_devices(changes: dict[str, object], message: str, device: StandIn) -> None:
    for name, value in changes.items():
        setattr(device, name, value)
    with pytest.raises(CQError) as error:
        require_device()
    assert str(error.value).startswith(message)


def test_no_cupy_is_one_line_and_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys, "argv", ["cq-run", "m.gguf", "-p", "x", "--cuda"])
    with pytest.raises(SystemExit) as stopped:
        cli_run.main()
    assert stopped.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "error: --cuda: CuPy is missing or incomplete (pip install 'codequant-gguf[cuda]')\n"


def test_chips_without_tensor_cores_use_dp4a(tmp_path: Path, device: StandIn) -> None:
    device.name, device.capability = "NVIDIA GeForce GTX 1650", (7, 5)
    write_tiny(tmp_path / "tiny.gguf", Tiny(n_layers=1))
    load_model(tmp_path / "tiny.gguf", cuda=True).forward(np.arange(8, dtype=np.int32), 0, 1)
    modules = {launch.module for launch in device.executed if launch.kernel == "gemm"}
    assert modules and all(("CQ_DP4A", 1) in module.defines for module in modules)
