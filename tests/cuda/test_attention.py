"""Attention over the F16 cache: prefill, decoding split over keys, windows, grouped heads, and a cache of latents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyggml_bridge.cuda import kernels as ck
from tests.cuda.arrays import Memory
from tests.cuda.emulate import run

EPS = 2.0**-24
WHERE = [(0, 1, 0, 1), (0, 40, 0, 1), (130, 1, 0, 3), (61, 17, 0, 1), (90, 20, 33, 1), (200, 1, 33, 2), (3, 1, 0, 5)]


def check(shape: ck.AttentionShape, position: int, n_tokens: int, splits: int) -> None:
    """Random queries and caches against float64, in two orders of the threads."""
    rng, memory = np.random.default_rng(position), Memory()
    n_heads, n_kv_heads, n_ctx, head_dim = shape.n_heads, shape.n_kv_heads, shape.n_ctx, shape.head_dim
    q = rng.normal(size=(n_tokens, n_heads, head_dim)).astype(np.float32)
    at, caches = memory.at(np.array([position], np.int32)), []
    for dim in (head_dim,) if shape.latent else (head_dim, shape.value_dim):
        new = rng.normal(size=(n_tokens, n_kv_heads, dim)).astype(np.float32)
        caches.append(memory.put(rng.normal(size=(n_kv_heads, n_ctx, dim)).astype(np.float16)))
        run(ck.append(memory.at(new), caches[-1].ctypes.data, at, (n_kv_heads, dim), n_ctx, n_tokens))
        np.testing.assert_array_equal(caches[-1][:, position:], new.astype(np.float16).transpose(1, 0, 2))
    keys, values = (np.repeat(c.astype(np.float64), n_heads // n_kv_heads, axis=0) for c in (caches[0], caches[-1]))
    values = values[..., : shape.value_dim]
    scores = np.einsum("thd,hkd->htk", q.astype(np.float64), keys) * np.float64(np.float32(shape.scale))
    distance = position + np.arange(n_tokens)[:, None] - np.arange(n_ctx)
    scores[:, (distance < 0) | (distance >= (shape.window or n_ctx))] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("htk,hkd->thd", p / p.sum(-1, keepdims=True), values)
    # a score of head_dim terms is off by (head_dim + 6) roundings of its magnitude, a probability by twice that and the
    # exponential's 4; summing n_ctx values adds n_ctx
    magnitude = np.einsum("thd,hkd->htk", np.abs(q), np.abs(keys)).max() * shape.scale
    bound = 2 * ((head_dim + 6) * magnitude + 4 + 2 * n_ctx) * EPS * np.abs(values).max()
    results = []
    for seed in (0, 1):
        out = memory.full(want.shape, np.nan, np.float32)
        partial = memory.full(shape.partial_floats(n_tokens, splits), np.nan, np.float32)
        k, v = caches[0].ctypes.data, 0 if shape.latent else caches[1].ctypes.data
        addresses = (memory.at(q), k, v, out.ctypes.data, partial.ctypes.data, at)
        for launch in ck.attention(shape, addresses, n_tokens, splits):
            run(launch, seed)
        assert np.abs(out - want).max() <= bound
        results.append(out)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("head_dim", [48, 81, 160, 512])
@pytest.mark.parametrize(("position", "n_tokens", "window", "splits"), WHERE)
def test_attention(head_dim: int, position: int, n_tokens: int, window: int, splits: int) -> None:
    scale = float(np.float32(head_dim**-0.5))
    check(ck.AttentionShape(6, 2, head_dim, position + n_tokens, window, scale, head_dim), position, n_tokens, splits)


@pytest.mark.parametrize("heads", [(8, 1), (9, 1), (4, 4), (32, 2), (7, 1)])
@pytest.mark.parametrize(
    ("position", "window", "splits"), [(511, 0, 17), (511, 0, 40), (31, 0, 2), (300, 65, 12), (700, 0, 5)]
)
def test_decoding(heads: tuple[int, int], position: int, window: int, splits: int) -> None:
    """A token's heads in blocks that they fill or not; a tile a split, splits without keys, several tiles a split."""
    check(ck.AttentionShape(*heads, 64, position + 1, window, 0.125, 64), position, 1, splits)


def test_splits_are_as_many_as_fill_the_processors() -> None:
    qwen = ck.AttentionShape(32, 4, 128, 4096, 0, 1.0, 128)
    assert [qwen.splits(1, n) for n in (1, 132, 1000)] == [1, 128, 128] and qwen.splits(2, 132) == 1
    assert replace(qwen, n_ctx=70).splits(1, 132) == 3 and replace(qwen, n_kv_heads=32).splits(1, 132) == 16


# DeepSeek-V2's widths; narrow ones, odd ones, which are not copied by 16 bytes, and those that take one row a warp.
# Heads fill blocks of 16 or leave rows over.
@pytest.mark.parametrize(
    ("heads", "widths"), [((16, 1), (576, 512)), ((21, 1), (80, 64)), ((6, 2), (53, 37)), ((3, 1), (776, 712))]
)
@pytest.mark.parametrize(("position", "n_tokens", "window", "splits"), [*WHERE[:4], WHERE[5], WHERE[6]])
def test_latent_attention(
    heads: tuple[int, int], widths: tuple[int, int], position: int, n_tokens: int, window: int, splits: int
) -> None:
    n_tokens = min(n_tokens, 5) if widths[0] > 500 else n_tokens  # the emulator takes its time
    scale = float(np.float32(widths[0] ** -0.5))
    shape = ck.AttentionShape(*heads, widths[0], position + n_tokens, window, scale, widths[1], latent=True)
    check(shape, position, n_tokens, splits)
