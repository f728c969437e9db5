"""Every instruction set of this host: integers equal to the NumPy oracle, floats within bounds counted in roundings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CODEBOOK_ROWS, MAX_COLS, Clustered, CQType, quantize_activations
from pyggml_bridge.native import aligned_empty, available_isas, choose_isa, current_isa, ffi, known_isas, lib, pointer
from tests.oracle import NativeMatrix, guarded, random_clustered

EPS = 2.0**-24  # half a unit in the last place: what one float32 rounding may add, relative
CANARY = 123456789


@pytest.fixture(autouse=True, params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = current_isa()
    choose_isa(request.param)
    yield request.param
    choose_isa(before)


def integers(w: Clustered, x: np.ndarray, n_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Accumulators [tokens, rows] of the GEMV and of the GEMM."""
    native, activations = NativeMatrix(w), guarded(x)
    shape = (len(x), w.shape[0])
    gemv, gemm = (np.full(shape[0] * shape[1] + 1, CANARY, np.int32) for _ in range(2))
    scratch_bytes = n_threads * lib.cq_gemm_scratch_bytes(native.struct)
    scratch = aligned_empty(scratch_bytes + 64)
    scratch[scratch_bytes:] = 77
    sums = x.sum(axis=1, dtype=np.int32)
    arguments = (native.struct, pointer(activations, "const int8_t *"), pointer(sums, "const int32_t *"), len(x))
    assert lib.cq_gemv_i32(*arguments, pointer(gemv, "int32_t *"), n_threads) == lib.CQ_OK
    at = pointer(scratch, "uint8_t *")
    assert lib.cq_gemm_i32(*arguments, pointer(gemm, "int32_t *"), n_threads, at) == lib.CQ_OK
    assert gemv[-1] == CANARY and gemm[-1] == CANARY and (scratch[scratch_bytes:] == 77).all(), "written past the end"
    return gemv[:-1].reshape(shape), gemm[:-1].reshape(shape)


def check(w: Clustered, x: np.ndarray, n_threads: int = 1) -> None:
    # float64 holds every partial sum of int8 products exactly, and its matrix product is fast
    want = (x.astype(np.float64) @ w.weights_i8().astype(np.float64).T).astype(np.int32)
    for name, got in zip(("gemv", "gemm"), integers(w, x, n_threads), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"{name} of {w.cq.name} {w.shape}")


def activations(rng: np.random.Generator, tokens: int, cols: int) -> np.ndarray:
    return rng.integers(-127, 128, (tokens, cols), dtype=np.int8)


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("cols", [64, 128, 192, 576, 1088])
def test_integers_of_every_grouping(cq: CQType, cols: int) -> None:
    rng = np.random.default_rng(cols)
    for codebook_cols in (None, 64, 128, 1024):
        for scale_cols in (0, 64, 128, 1024):
            rows = int(rng.choice([1, 2, 3, 31, 33]))
            codebook_rows = int(rng.choice(CODEBOOK_ROWS))
            w = random_clustered(rng, cq, rows, cols, codebook_cols, scale_cols, codebook_rows=codebook_rows)
            check(w, activations(rng, int(rng.integers(1, 6)), cols))


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("tokens", [*range(1, 14), 50])
def test_integers_of_every_token_count(cq: CQType, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for rows in (1, 33, 70):
        check(random_clustered(rng, cq, rows, 192, scale_cols=64), activations(rng, tokens, 192))


@pytest.mark.parametrize("cq", CQType)
def test_integers_of_random_shapes(cq: CQType) -> None:
    rng = np.random.default_rng(7)
    for _ in range(16):
        cols = 64 * int(rng.integers(1, 28))
        codebook_cols, scale_cols = 64 * int(rng.integers(1, 20)), 64 * int(rng.integers(0, 8))
        w = random_clustered(rng, cq, int(rng.integers(1, 70)), cols, codebook_cols, scale_cols)
        check(w, activations(rng, int(rng.integers(1, 30)), cols), n_threads=int(rng.integers(1, 3)))


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("centroid", [-128, -127, 127])
@pytest.mark.parametrize("group_scale", [None, 0, 127])
def test_extremes_fit_the_accumulator(cq: CQType, centroid: int, group_scale: int | None) -> None:
    rng = np.random.default_rng(0)
    for cols in (320, MAX_COLS):
        scale_cols = 0 if group_scale is None else 64
        fill = (cq.n_centroids - 1, centroid, group_scale or 0)
        w = random_clustered(rng, cq, 1, cols, scale_cols=scale_cols, fill=fill)
        x = np.full((2, cols), 127, np.int8)
        x[1] = -127
        check(w, x)


@pytest.mark.parametrize("cq", CQType)
def test_each_column_reads_its_own_index(cq: CQType) -> None:
    """An identity as activations returns the weights themselves, one by one."""
    w = random_clustered(np.random.default_rng(1), cq, 5, 192, 128, 64, codebook_rows=2)
    for got in integers(w, np.eye(192, dtype=np.int8)):
        np.testing.assert_array_equal(got, w.weights_i8().T)


def test_rings_of_more_rows_are_refused() -> None:
    w = random_clustered(np.random.default_rng(1), CQType.CQ4, 16, 64, codebook_rows=8)
    native, x, sums, acc = NativeMatrix(w), np.zeros((1, 64), np.int8), np.zeros(1, np.int32), np.zeros(16, np.int32)
    arguments = (pointer(x, "const int8_t *"), pointer(sums, "const int32_t *"), 1, pointer(acc, "int32_t *"), 1)
    assert lib.cq_gemv_i32(native.struct, *arguments) == lib.CQ_OK
    native.struct.codebook_rows = 16
    assert lib.cq_gemv_i32(native.struct, *arguments) == lib.CQ_ERR_ARGUMENT


def run(code: int, field: str, arguments: dict[str, Any], n_tokens: int, position: int = 0) -> None:
    """One operation on n_tokens rows."""
    op = ffi.new("cq_op[1]", [{"code": code, "rows": lib.CQ_ROWS_TOKENS, "top_k": 1, "u": {field: arguments}}])
    scratch = aligned_empty(lib.cq_scratch_bytes(op, 1, 2))
    step = {"n_tokens": n_tokens, "position": position, "n_outputs": n_tokens, "n_threads": 2}
    at = ffi.new("cq_step *", {**step, "scratch": pointer(scratch, "uint8_t *")})
    assert lib.cq_run(op, 1, at) == lib.CQ_OK


def floats(array: np.ndarray) -> Any:
    return pointer(array, "float *")


@pytest.mark.parametrize("n", [1, 15, 33, 576, 2048])
def test_rms_norm(n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight = guarded(rng.normal(size=(3, n)).astype(np.float32)), guarded(rng.normal(size=n).astype(np.float32))
    out = np.empty_like(x)
    arguments = {"x": floats(x), "weight": floats(weight), "out": floats(out), "n": n, "eps": 1e-5}
    run(lib.CQ_OP_RMS_NORM, "rms_norm", arguments, 3)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float64(np.float32(1e-5))) * weight
    assert (np.abs(out - want) <= 4 * EPS * np.abs(want)).all()  # the scale, two products, one to spare
    bias, shifted = guarded(rng.normal(size=n).astype(np.float32)), np.empty_like(x)
    run(lib.CQ_OP_RMS_NORM, "rms_norm", arguments | {"bias": floats(bias), "out": floats(shifted)}, 3)
    np.testing.assert_array_equal(shifted, out + bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [32, 64, 576, 1088])
def test_quantize_is_the_formats_quantizer(bits: int, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(6, n)).astype(np.float32)
    x[1] = 0
    x[2] = rng.integers(-254, 255, n) / np.float32(2)  # ties
    x[2, 0] = 127
    x[3] *= np.float32(1e-42)  # subnormal scale
    x[4] *= np.float32(1e30)
    x = guarded(x)
    for group in (0, 32):
        grouped = x if group == 0 else x.reshape(-1, group)
        with np.errstate(all="ignore"):
            want_q, want_scales = quantize_activations(grouped, bits)
        q, scales = np.empty((6, n), np.int8), np.empty(len(grouped), np.float32)
        sums = np.empty(len(grouped), np.int32)
        act = ffi.new("cq_activation *", {"bits": bits, "group": group, "q": pointer(q, "int8_t *")})
        act.scales, act.sums = floats(scales), pointer(sums, "int32_t *")
        run(lib.CQ_OP_QUANTIZE, "quantize", {"x": floats(x), "out": act, "n": n}, 6)
        np.testing.assert_array_equal(scales, want_scales)
        finite = np.ones(6, bool)
        finite[3] = False  # 1 / scale overflows: NumPy casts NaN to int8, which no standard defines
        np.testing.assert_array_equal(q[finite], want_q.reshape(6, n)[finite])
        np.testing.assert_array_equal(sums, q.reshape(grouped.shape).astype(np.int32).sum(-1))
        assert np.abs(q).max() == (1 << (bits - 1)) - 1


@pytest.mark.parametrize("tokens", [1, 4, 5, 49, 100])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (33, 96), (70, 576)])
def test_q8_0_multiplies_any_number_of_tokens(tokens: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(tokens + rows)
    n_blocks = cols // 32
    blocks = np.zeros((rows, n_blocks), np.dtype([("scale", "<f2"), ("q", "i1", 32)]))
    blocks["scale"], blocks["q"] = rng.uniform(1e-3, 2, blocks.shape), rng.integers(-128, 128, (rows, n_blocks, 32))
    q = guarded(activations(rng, tokens, cols))
    scales = guarded(rng.uniform(1e-3, 2, (tokens, n_blocks)).astype(np.float32))
    sums = guarded(q.reshape(tokens, n_blocks, 32).sum(-1, dtype=np.int32))
    data, bias = guarded(blocks.view(np.uint8).reshape(-1)), guarded(rng.normal(size=rows).astype(np.float32))
    before = rng.normal(size=(tokens, rows)).astype(np.float32)
    out = before.copy()
    matrix = ffi.new("cq_matrix *", {"type": lib.CQ_Q8_0, "n_experts": 1, "n_rows": rows, "n_cols": cols})
    matrix.data = pointer(data, "const uint8_t *")
    act = ffi.new("cq_activation *", {"bits": 8, "group": 32, "q": pointer(q, "int8_t *"), "scales": floats(scales)})
    act.sums = pointer(sums, "int32_t *")
    arguments = {"w": matrix, "act": act, "out": floats(out), "bias": floats(bias), "accumulate": 1}
    run(lib.CQ_OP_LINEAR, "linear", arguments, tokens)
    x, weights = q.reshape(tokens, n_blocks, 32).astype(np.float64), blocks["q"].astype(np.float64)
    terms = np.einsum("tbi,rbi->trb", x, weights) * scales[:, None] * blocks["scale"].astype(np.float64)
    bound = EPS * (n_blocks + 11) * (np.abs(terms).sum(-1) + np.abs(before) + np.abs(bias))
    assert (np.abs(out - (before + terms.sum(-1) + bias)) <= bound).all()


def test_swiglu() -> None:
    rng = np.random.default_rng(3)
    gate = np.concatenate([rng.normal(size=500) * 5, rng.uniform(-86, 86, 500), [0, 1e4, -1e4, 1e30, -1e30]])
    gate, up = guarded(gate.astype(np.float32)), guarded(rng.normal(size=len(gate)).astype(np.float32))
    out = np.empty_like(gate)
    arguments = {"gate": floats(gate), "up": floats(up), "out": floats(out), "n": len(gate)}
    run(lib.CQ_OP_SWIGLU, "swiglu", arguments, 1)
    with np.errstate(over="ignore"):
        want = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    assert (np.abs(out - want) <= 1e-6 * np.abs(want) + 1e-35).all()


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "n_kv_heads"),
    [(64, 64, 2), (80, 80, 2), (128, 128, 2), (96, 64, 2), (64, 80, 6), (72, None, 1), (192, None, 2), (576, None, 1)],
)
@pytest.mark.parametrize(
    ("position", "n_tokens", "window"), [(0, 1, 0), (0, 40, 0), (130, 1, 0), (61, 17, 0), (90, 20, 33), (200, 1, 33)]
)
def test_attention(
    head_dim: int, value_dim: int | None, n_kv_heads: int, position: int, n_tokens: int, window: int
) -> None:
    """value_dim None: the values are the first 64 columns of the keys."""
    rng = np.random.default_rng(position)
    n_heads, n_ctx, width = 6, position + n_tokens, value_dim or 64
    q = guarded(rng.normal(size=(n_tokens, n_heads, head_dim)).astype(np.float32))
    k, v = (guarded(rng.normal(size=(n_tokens, n_kv_heads, n)).astype(np.float32)) for n in (head_dim, width))
    k_cache, v_cache = (guarded(rng.normal(size=(n_kv_heads, n_ctx, n)).astype(np.float16)) for n in (head_dim, width))
    out, scale = np.full((n_tokens, n_heads, width), np.nan, np.float32), np.float32(head_dim**-0.5)
    arguments = {"q": floats(q), "k": floats(k), "out": floats(out), "n_heads": n_heads}
    arguments |= {"k_cache": pointer(k_cache, "uint16_t *"), "value_dim": width}
    if value_dim:
        arguments |= {"v": floats(v), "v_cache": pointer(v_cache, "uint16_t *")}
    arguments |= {"n_kv_heads": n_kv_heads, "head_dim": head_dim, "n_ctx": n_ctx, "window": window, "scale": scale}
    run(lib.CQ_OP_ATTENTION, "attention", arguments, n_tokens, position)
    for cache, new in ((k_cache, k), (v_cache, v))[: 2 if value_dim else 1]:
        np.testing.assert_array_equal(cache[:, position:], new.astype(np.float16).transpose(1, 0, 2))
    v_cache = v_cache if value_dim else k_cache[..., :width]
    keys, values = (np.repeat(c.astype(np.float64), n_heads // n_kv_heads, axis=0) for c in (k_cache, v_cache))
    scores = np.einsum("thd,hkd->htk", q.astype(np.float64), keys) * np.float64(scale)
    distance = position + np.arange(n_tokens)[:, None] - np.arange(n_ctx)
    scores[:, (distance < 0) | (distance >= (window or n_ctx))] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("htk,hkd->thd", p / p.sum(-1, keepdims=True), values)
    # a score of head_dim terms is off by (head_dim + 6) roundings of its magnitude, a probability by twice that and the
    # exponential's 4; summing n_ctx values adds n_ctx
    magnitude = np.einsum("thd,hkd->htk", np.abs(q), np.abs(keys)).max() * scale
    bound = 2 * ((head_dim + 6) * magnitude + 4 + 2 * n_ctx) * EPS * np.abs(values).max()
    assert np.abs(out - want).max() <= bound


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_each_head_has_a_matrix_of_its_own(tokens: int) -> None:
    """Without a routing row r is multiplied by matrix r % n_experts."""
    rng = np.random.default_rng(tokens)
    n_heads, rows, cols = 3, 37, 64
    w = guarded(rng.normal(size=(n_heads, rows, cols)).astype(np.float32))
    x = guarded(rng.normal(size=(tokens, n_heads, cols)).astype(np.float32))
    out = np.full((tokens, n_heads, rows), np.nan, np.float32)
    matrix = ffi.new("cq_matrix *", {"type": lib.CQ_F32, "n_experts": n_heads, "n_rows": rows, "n_cols": cols})
    matrix.data = pointer(w, "uint8_t *")
    run(lib.CQ_OP_LINEAR, "linear", {"w": matrix, "x": floats(x), "out": floats(out)}, tokens * n_heads)
    want = np.einsum("thc,hrc->thr", x.astype(np.float64), w)
    assert np.abs(out - want).max() <= (cols + 1) * EPS * np.einsum("thc,hrc->thr", np.abs(x), np.abs(w)).max()


def test_columns_are_copied_between_rows_of_any_width() -> None:
    x, out = np.arange(35, dtype=np.float32).reshape(5, 7), np.full((5, 4), np.nan, np.float32)
    arguments = {"x": floats(x) + 2, "out": floats(out) + 1, "x_width": 7, "out_width": 4, "n": 3}
    run(lib.CQ_OP_COPY, "copy", arguments, 5)
    np.testing.assert_array_equal(out[:, 1:], x[:, 2:5])
    assert np.isnan(out[:, 0]).all()


def test_measured_limits_are_finite() -> None:
    buffer = np.ones(1 << 20, np.uint8)
    assert 1e7 < lib.cq_measure_bandwidth(pointer(buffer, "const uint8_t *"), buffer.size, 2) < 1e13
    assert 1e7 < lib.cq_measure_peak(2) < 1e14


def test_choice_of_instruction_set() -> None:
    assert available_isas()[-1] == "scalar"
    assert [name for name in known_isas() if name in available_isas()] == available_isas()
    for name in known_isas():
        if name in available_isas():
            choose_isa(name)
            assert current_isa() == name
        else:
            with pytest.raises(CQError, match="this machine supports"):
                choose_isa(name)
    with pytest.raises(CQError, match="unknown"):
        choose_isa("sse9")


@pytest.mark.parametrize(("limit", "status", "names"), [("scalar", 0, ["scalar"]), ("", 0, None), ("sse9", 1, None)])
def test_environment_only_lowers(limit: str, status: int, names: list[str] | None) -> None:
    code = (
        "from pyggml_bridge._native import ffi, lib; print(lib.cq_isa_choose(ffi.NULL));"
        "print(*(ffi.string(n).decode() for n in iter(lambda i=iter(range(9)): lib.cq_isa_name(next(i)), ffi.NULL)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CQ_ISA": limit}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert int(lines[0]) == status
    if status == 0:
        assert lines[1].split() == (names or available_isas())
