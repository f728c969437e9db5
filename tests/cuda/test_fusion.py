"""Which steps share a launch: the same computation in another grouping, and only what the kernels can take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyggml_bridge.backend import Quantize, steps
from pyggml_bridge.cuda.fusion import fused
from pyggml_bridge.cuda.kernels import DeviceInfo
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.format import CQType
from pyggml_bridge.models.llama import build
from pyggml_bridge.operations import Value
from pyggml_bridge.program import Program
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Matrix, Weights
from tests.oracle import random_clustered
from tests.tiny_gguf import Tiny, write_tiny


def matrix(rows: int, cols: int, cq: CQType = CQType.CQ4) -> Matrix:
    w = random_clustered(np.random.default_rng(rows), cq, rows, cols)
    return Matrix("w", cq, 1, rows, cols, w.packed.view(np.uint8), w)  # type: ignore[arg-type]


def grouped(program: Program) -> list[list[str]]:
    """Names of the groups' operations."""
    return [[type(step.op).__name__ for step in group] for group in fused(steps(program))]


def ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


@pytest.mark.parametrize(
    "t", [Tiny(n_experts=6, hadamard=32, ffn=64, arch="qwen2moe", shared_ffn=64), Tiny(biases=True)]
)
def test_every_step_runs_once_after_what_it_reads(t: Tiny, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", t)
    program = build(Weights(GGUFFile(tmp_path / "tiny.gguf")), 64)
    before, after = list(steps(program)), [step for group in fused(steps(program)) for step in group]
    assert sorted(map(id, (step.op for step in after if not isinstance(step.op, Quantize)))) == sorted(
        map(id, program.ops)
    )
    assert [step.op for step in after if not isinstance(step.op, Quantize)] == program.ops
    assert len(after) == len(before)
    written: set[object] = set()
    for step in after:
        if isinstance(step.op, Quantize):
            assert step.op.x in written
        written |= {getattr(step.op, name, None) for name in ("out", "gate", "x")}
        if isinstance(step.op, Quantize):
            written.add(step.op)
        assert step.activation is None or step.activation in written


def test_launches_of_a_layer_with_experts(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", Tiny(n_layers=2, n_experts=6, hadamard=32, ffn=64))
    planned = CUDAProgram(build(Weights(GGUFFile(tmp_path / "tiny.gguf")), 64), 8, DeviceInfo(4))
    layer = ["gemv", "prepare_heads", "attention_decode", "attention_merge", "quantize", "gemv"]
    layer += ["rms_norm", "stock_gemv", "route", "gemv", "swiglu_quantize", "gemv"]
    kernels = [launch.kernel for launch in planned.launches(0, 1, 1)]
    last = ["combine", "select_rows", "rms_norm", "stock_gemv"]
    assert kernels == ["embed", "rms_norm", *layer, "combine_norm", *layer, *last]
    few = [launch.kernel for launch in planned.launches(0, 8, 1)]
    assert len(few) == len(kernels) and few.count("group") == few.count("attention") == 2


def test_a_quantizer_follows_its_norm_unless_the_value_changes_in_between() -> None:
    for changed in (False, True):
        program = Program(64, 1, 1, 64, 64)
        x = Value(64)
        normed = program.rms_norm(x, ones(64), 1e-5)
        other = program.rms_norm(x, ones(64), 1e-5)
        if changed:
            program.rope(normed, 64, np.zeros((64, 32, 2), np.float32), interleaved=False)
        program.logits = program.linear(normed, matrix(64, 64))
        program.copy_columns(other, 0, 64)
        first = ["RmsNorm"] if changed else ["RmsNorm", "Quantize"]
        rest = [["Rope"], ["Quantize"]] if changed else []
        assert grouped(program) == [first, ["RmsNorm"], *rest, ["Linear"], ["CopyColumns"]]


def test_layers_that_share_nothing_are_launched_alone() -> None:
    program = Program(64, 1, 1, 64, 64)
    x, y = Value(64), Value(64)
    for of, w in (
        (x, matrix(8, 64)),
        (x, matrix(9, 64)),
        (x, matrix(8, 64, CQType.CQ3)),
        (y, matrix(8, 64, CQType.CQ3)),
    ):
        program.linear(of, w)
    for _ in range(5):
        program.linear(y, matrix(8, 64))
    for _ in range(2):
        program.linear(y, matrix(64, 64), add_to=x)  # one after the other: both add to x
    found = [len(names) for names in grouped(program) if names[0] == "Linear"]
    assert found == [2, 1, 1, 3, 3, 1]


@pytest.mark.parametrize(("width", "hadamard", "together"), [(4096, 1024, True), (4160, 0, False), (2048, 2048, False)])
def test_wide_swiglu_is_quantized_on_its_own(width: int, hadamard: int, together: bool) -> None:
    program = Program(64, 1, 1, 64, 64)
    hidden = program.swiglu(Value(width), Value(width), hadamard)
    program.linear(hidden, matrix(8, width))
    groups = [["SwiGLU", "Quantize"]] if together else [["SwiGLU"], ["Quantize"]]
    assert grouped(program) == [*groups, ["Linear"]]


@pytest.mark.parametrize("why", ["fits", "keys are read again", "bias", "width", "first"])
def test_heads_are_prepared_together_if_they_can_be(why: str) -> None:
    program = Program(64, 1, 2, 64, 64)
    q, k, v = Value(256), Value(128), Value(128)
    table = np.zeros((64, 16, 2), np.float32)
    normed = [
        program.rms_norm(q, ones(256 if why == "width" else 64), 1e-5, ones(64) if why == "bias" else None),
        program.rms_norm(k, ones(64), 1e-5),
    ]
    for x in normed:
        program.rope(x, 64, table, interleaved=False, first=8 if why == "first" else 0)
    program.attention(0, *normed, v, scale=1.0)
    if why == "keys are read again":
        program.copy_columns(normed[1], 0, 64)
    groups = grouped(program)
    together = ["RmsNorm", "RmsNorm", "Rope", "Rope", "Attention"]
    assert (groups[0] == together) == (why == "fits")
    assert (together[1:] in groups) == (why in ("bias", "width"))
