"""Norm, quantizer, rope, SwiGLU, sums and copies: equal to the oracle, or within bounds counted in roundings."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pyggml_bridge.cuda import kernels as ck
from pyggml_bridge.cuda import linear as cl
from pyggml_bridge.format import hadamard, quantize_activations
from tests.cuda.arrays import Memory
from tests.cuda.emulate import run

EPS = 2.0**-24
SEEDS = (0, 1, 2)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0])
def test_embed(kind: GGMLQuantizationType) -> None:
    rng, memory = np.random.default_rng(1), Memory()
    blocks = np.zeros((9, 3), np.dtype([("scale", "<f2"), ("q", "i1", 32)]))
    blocks["scale"], blocks["q"] = rng.uniform(1e-3, 2, blocks.shape), rng.integers(-128, 128, blocks["q"].shape)
    want = (blocks["scale"].astype(np.float32)[..., None] * blocks["q"]).reshape(9, 96)
    halves = want.astype(np.float16)
    data = {GGMLQuantizationType.F32: want, GGMLQuantizationType.F16: halves, GGMLQuantizationType.Q8_0: blocks}[kind]
    want = halves.astype(np.float32) if kind == GGMLQuantizationType.F16 else want
    tokens, out = np.array([8, 0, 3], np.int32), memory.full((3, 96), np.nan, np.float32)
    table = cl.DeviceMatrix(int(kind), 1, 9, 96, memory.at(data.view(np.uint8)))
    run(cl.embed(table, memory.at(tokens), out.ctypes.data, 3))
    np.testing.assert_array_equal(out, want[tokens])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n", [1, 33, 576, 2048, 4097, 9220])
def test_rms_norm(n: int, biased: bool) -> None:
    rng, memory = np.random.default_rng(n), Memory()
    x, weight, bias = floats(rng, 3, n), floats(rng, n), floats(rng, n) if biased else None
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float64(np.float32(1e-5))) * weight
    for seed in SEEDS:
        out = memory.full((3, n), np.nan, np.float32)
        to = ck.norm(memory.at(weight), out.ctypes.data, n, 1e-5, memory.at(bias))
        run(ck.rms_norm(memory.at(x), to, 3), seed)
        added = np.zeros(n) if bias is None else bias
        # half of what n / 256 sums, a tree of 256, and the squares themselves round; root, quotient, two products; bias
        bound = EPS * (((n // 256 + 10) / 2 + 6) * np.abs(want) + np.abs(want + added))
        assert (np.abs(out - (want + added)) <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [32, 64, 576, 8224])
def test_quantize_is_the_formats_quantizer(bits: int, n: int) -> None:
    rng, memory = np.random.default_rng(n), Memory()
    x = floats(rng, 6, n)
    x[1] = 0
    x[2] = rng.integers(-254, 255, n) / np.float32(2)  # ties
    x[2, 0] = 127
    x[3] *= np.float32(1e-42)  # subnormal scale
    x[4] *= np.float32(1e30)
    finite = np.arange(6) != 3  # 1 / scale overflows: NumPy casts NaN to int8, which no standard defines
    for group in (0, 32) if bits == 8 else (0,):
        grouped = x.reshape(-1, group or n)
        with np.errstate(all="ignore"):
            want_q, want_scales = quantize_activations(grouped, bits)
        q, scales = memory.full((6, n), 77, np.int8), memory.full(len(grouped), np.nan, np.float32)
        at, to = memory.at(x), ck.Quantized(q.ctypes.data, scales.ctypes.data, bits)
        run(ck.quantize_blocks(at, to.q, to.scales, n, 6) if group else ck.quantize(at, to, n, 6), seed=n)
        np.testing.assert_array_equal(scales, want_scales)
        np.testing.assert_array_equal(q[finite], want_q.reshape(6, n)[finite])
        assert np.abs(q).max() == (1 << bits - 1) - 1


def test_quantizing_nan_does_not_look_finite() -> None:
    memory, x = Memory(), np.ones((1, 64), np.float32)
    x[0, 5] = np.nan
    q, scales = memory.full((1, 64), 77, np.int8), memory.full(1, 0, np.float32)
    run(ck.quantize(memory.at(x), ck.Quantized(q.ctypes.data, scales.ctypes.data, 8), 64, 1))
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(q.astype(np.float32) * scales).any()


@pytest.mark.parametrize("start", [0, 3])  # of the rotated columns
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved: bool, start: int) -> None:
    rng, memory = np.random.default_rng(2), Memory()
    n_tokens, n_heads, head_dim, n_rot, position = 5, 3, 12, 8, 4
    rotated = slice(start, start + n_rot)
    x, angles = floats(rng, n_tokens, n_heads, head_dim), rng.uniform(-3, 3, (9, n_rot // 2))
    cos_sin = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    first, second = (slice(0, n_rot, 2), slice(1, n_rot, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    c, s = (cos_sin[position:, :, i].astype(np.float64)[:, None] for i in (0, 1))
    want, part = x.astype(np.float64), x[..., rotated]
    want[..., rotated][..., first] = part[..., first] * c - part[..., second] * s
    want[..., rotated][..., second] = part[..., second] * c + part[..., first] * s
    out = memory.put(x)
    at = (out.ctypes.data + 4 * start, memory.at(cos_sin), memory.at(np.array([position], np.int32)))
    run(ck.rope(*at, (n_heads, head_dim), n_rot, n_tokens, interleaved=interleaved))
    assert np.abs(out - want).max() <= 3 * EPS * 2 * np.abs(x).max()
    np.testing.assert_array_equal(np.delete(out, rotated, -1), np.delete(x, rotated, -1))


@pytest.mark.parametrize(
    ("n", "block"),
    [(1, 0), (1500, 0), (192, 32), (1536, 512), (64, 2), (22, 2), (2048, 1024), (4096, 2048), (8192, 8192)],
)
def test_swiglu(n: int, block: int) -> None:
    rng, memory = np.random.default_rng(n), Memory()
    gate, up = floats(rng, 2, n) * 5, floats(rng, 2, n)
    gate[0, 0], gate[1, 0] = -1e4, 86
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        want = wide / (1 + np.exp(-wide)) * up
    bound = 8 * EPS * np.abs(want) + 1e-35
    if block:  # each of log2 steps rounds sums of at most the block's absolute values; the scale at the end
        magnitude = np.repeat(np.abs(want).reshape(-1, block).sum(-1), block).reshape(2, n) / np.sqrt(block)
        want, bound = hadamard(want, block), (8 + 2 + np.log2(block)) * EPS * magnitude + 1e-35
    for seed in SEEDS:
        out = memory.put(gate)
        run(ck.swiglu(out.ctypes.data, memory.at(up), n, block, 2), seed)
        assert (np.abs(out - want) <= bound).all()


def quantized_after(memory: Memory, out: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """q and scales of rows, by the kernel that does nothing else."""
    q, scales = memory.full(out.shape, 77, np.int8), memory.full(len(out), np.nan, np.float32)
    run(ck.quantize(memory.at(out), ck.Quantized(q.ctypes.data, scales.ctypes.data, bits), out.shape[1], len(out)))
    return q, scales


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [64, 2048, 5184])
def test_norm_with_its_quantized_form(n: int, bits: int) -> None:
    """The same bits as norm, then quantizer."""
    rng, memory = np.random.default_rng(n), Memory()
    x, weight, bias = floats(rng, 3, n), floats(rng, n), floats(rng, n) if bits == 4 else None
    x[1, 5] = np.nan
    alone, out = (memory.full((3, n), np.nan, np.float32) for _ in range(2))
    q, scales = memory.full((3, n), 77, np.int8), memory.full(3, np.nan, np.float32)
    sizes, to = (n, 1e-5, memory.at(bias)), ck.Quantized(q.ctypes.data, scales.ctypes.data, bits)
    run(ck.rms_norm(memory.at(x), ck.norm(memory.at(weight), alone.ctypes.data, *sizes), 3))
    run(ck.rms_norm(memory.at(x), ck.norm(memory.at(weight), out.ctypes.data, *sizes, to), 3), 1)
    np.testing.assert_array_equal(out, alone)
    for got, want in zip((q, scales), quantized_after(memory, alone, bits), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("n", "top_k"), [(64, 1), (2048, 8), (5184, 3)])
def test_norm_of_the_sum_of_experts(n: int, top_k: int, quantized: bool) -> None:
    """The same bits as sum, norm, quantizer."""
    rng, memory = np.random.default_rng(n), Memory()
    y, weights, before = floats(rng, 3 * top_k, n), rng.uniform(0, 1, (3, top_k)).astype(np.float32), floats(rng, 3, n)
    routing, weight = cl.DeviceRouting(4, top_k, 0, memory.at(weights), 0, 0, 0), memory.at(floats(rng, n))
    summed, want = memory.put(before), memory.full((3, n), np.nan, np.float32)
    run(cl.combine(memory.at(y), routing, summed.ctypes.data, n, 3))
    run(ck.rms_norm(summed.ctypes.data, ck.norm(weight, want.ctypes.data, n, 1e-5), 3))
    x, out = memory.put(before), memory.full((3, n), np.nan, np.float32)
    q, scales = memory.full((3, n), 77, np.int8), memory.full(3, np.nan, np.float32)
    to = ck.Quantized(q.ctypes.data, scales.ctypes.data, 8) if quantized else None
    run(cl.combine_norm(memory.at(y), routing, x.ctypes.data, ck.norm(weight, out.ctypes.data, n, 1e-5, 0, to), 3), 1)
    np.testing.assert_array_equal(x, summed)
    np.testing.assert_array_equal(out, want)
    if quantized:
        for got, wanted in zip((q, scales), quantized_after(memory, want, 8), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "block"), [(64, 0), (768, 64), (2048, 512), (4096, 1024), (3072, 256), (4, 2)])
def test_swiglu_with_its_quantized_form(n: int, block: int, bits: int) -> None:
    """The same bits as SwiGLU, then quantizer."""
    rng, memory = np.random.default_rng(n), Memory()
    gate, up = floats(rng, 3, n) * 5, floats(rng, 3, n)
    assert ck.fits_swiglu_quantize(n, block)
    alone, out = memory.put(gate), memory.put(gate)
    q, scales = memory.full((3, n), 77, np.int8), memory.full(3, np.nan, np.float32)
    run(ck.swiglu(alone.ctypes.data, memory.at(up), n, block, 3))
    to = ck.Quantized(q.ctypes.data, scales.ctypes.data, bits)
    run(ck.swiglu_quantize(out.ctypes.data, memory.at(up), to, n, block, 3), 1)
    np.testing.assert_array_equal(out, alone)
    for got, want in zip((q, scales), quantized_after(memory, alone, bits), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "dim", "n_rot"), [(7, 2, 64, 64), (2, 2, 33, 20), (4, 1, 128, 64)])
def test_heads_on_their_way_to_attention(
    n_heads: int, n_kv_heads: int, dim: int, n_rot: int, interleaved: bool, normed: bool
) -> None:
    """The same bits as norm, rope and append, one after the other; what lies beside the new rows stays."""
    rng, memory, position, n_tokens, n_ctx, eps = np.random.default_rng(dim), Memory(), 3, 5, 9, 1e-5
    angles = rng.uniform(-3, 3, (n_ctx, n_rot // 2))
    cos_sin = memory.at(np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32))
    at = memory.at(np.array([position], np.int32))
    q, k, v = (floats(rng, n_tokens, n, dim) for n in (n_heads, n_kv_heads, n_kv_heads))
    weights = [memory.at(floats(rng, dim)) if normed else 0 for _ in "qk"]
    want, before = [], floats(rng, n_kv_heads, n_ctx, dim).astype(np.float16)
    for x, weight in zip((q, k), weights, strict=True):
        out = memory.put(x)
        if normed:
            run(ck.rms_norm(memory.at(x), ck.norm(weight, out.ctypes.data, dim, eps), n_tokens * x.shape[1]))
        run(ck.rope(out.ctypes.data, cos_sin, at, (x.shape[1], dim), n_rot, n_tokens, interleaved=interleaved))
        want.append(out)
    caches, wanted = ([memory.put(before) for _ in "kv"] for _ in range(2))
    for x, cache in zip((want[1], v), wanted, strict=True):
        run(ck.append(memory.at(x), cache.ctypes.data, at, (n_kv_heads, dim), n_ctx, n_tokens))
    for in_place in (True, False):
        x = memory.put(q)
        out = x if in_place else memory.full(q.shape, np.nan, np.float32)
        fields = {"q": x.ctypes.data, "k": memory.at(k), "v": memory.at(v), "q_out": out.ctypes.data}
        fields |= {"q_weight": weights[0], "k_weight": weights[1], "cos_sin": cos_sin, "position": at}
        fields |= {f"{name}_cache": cache.ctypes.data for name, cache in zip("kv", caches, strict=True)}
        fields |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": dim, "n_rot": n_rot, "n_ctx": n_ctx}
        run(ck.prepare_heads(n_tokens, **fields, interleaved=interleaved, q_eps=eps, k_eps=eps), seed=in_place)
        np.testing.assert_array_equal(out, want[0])
        for got, cache in zip(caches, wanted, strict=True):
            np.testing.assert_array_equal(got, cache)


def test_combine_and_select() -> None:
    rng, memory = np.random.default_rng(4), Memory()
    y, weights, before = floats(rng, 10, 300), rng.uniform(0, 1, (5, 2)).astype(np.float32), floats(rng, 5, 300)
    out, selected = memory.put(before), memory.full((2, 300), np.nan, np.float32)
    run(cl.combine(memory.at(y), cl.DeviceRouting(4, 2, 0, memory.at(weights), 0, 0, 0), out.ctypes.data, 300, 5))
    terms = y.reshape(5, 2, 300).astype(np.float64) * weights[..., None]
    bound = 4 * EPS * (np.abs(terms).sum(1) + np.abs(before))
    assert (np.abs(out - (before + terms.sum(1))) <= bound).all()
    run(ck.select_rows(memory.at(y), selected.ctypes.data, 300, 7, 2))
    np.testing.assert_array_equal(selected, y[7:9])


@pytest.mark.parametrize(("parts", "n"), [(1, 300), (7, 5), (3, 1)])
def test_copy_columns(parts: int, n: int) -> None:
    """From the middle of every part of a row to the middle of another's; what is not copied stays."""
    rng, memory = np.random.default_rng(n), Memory()
    x, before = floats(rng, 4, parts, n + 3), floats(rng, 4, parts, n + 2)
    out, from_column = memory.put(before), memory.put(x).ctypes.data + 4 * 2
    run(ck.copy_columns(from_column, out.ctypes.data + 4, (n + 3, n + 2), n, 4 * parts))
    want = before.copy()
    want[..., 1 : n + 1] = x[..., 2 : n + 2]
    np.testing.assert_array_equal(out, want)
