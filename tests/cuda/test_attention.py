"""Attention over the F16 cache: prefill, decoding split over keys, windows, grouped heads."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_bridge import cuda_kernels as ck
from tests.cuda.arrays import Memory
from tests.cuda.emulate import run

EPS = 2.0**-24


@pytest.mark.parametrize("head_dim", [48, 81, 512])
@pytest.mark.parametrize(
    ("position", "n_tokens", "window", "splits"),
    [(0, 1, 0, 1), (0, 40, 0, 1), (130, 1, 0, 3), (61, 17, 0, 1), (90, 20, 33, 1), (200, 1, 33, 2), (3, 1, 0, 5)],
)
def test_attention(head_dim: int, position: int, n_tokens: int, window: int, splits: int) -> None:
    rng, memory = np.random.default_rng(position), Memory()
    n_heads, n_kv_heads, n_ctx = 6, 2, position + n_tokens
    q = rng.normal(size=(n_tokens, n_heads, head_dim)).astype(np.float32)
    k, v = (rng.normal(size=(n_tokens, n_kv_heads, head_dim)).astype(np.float32) for _ in range(2))
    caches = [memory.put(rng.normal(size=(n_kv_heads, n_ctx, head_dim)).astype(np.float16)) for _ in range(2)]
    scale, at = np.float32(head_dim**-0.5), memory.at(np.array([position], np.int32))
    for cache, new in zip(caches, (k, v), strict=True):
        run(ck.append(memory.at(new), cache.ctypes.data, at, (n_kv_heads, head_dim), n_ctx, n_tokens))
        np.testing.assert_array_equal(cache[:, position:], new.astype(np.float16).transpose(1, 0, 2))
    keys, values = (np.repeat(c.astype(np.float64), n_heads // n_kv_heads, axis=0) for c in caches)
    scores = np.einsum("thd,hkd->htk", q.astype(np.float64), keys) * np.float64(scale)
    distance = position + np.arange(n_tokens)[:, None] - np.arange(n_ctx)
    scores[:, (distance < 0) | (distance >= (window or n_ctx))] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("htk,hkd->thd", p / p.sum(-1, keepdims=True), values)
    # a score of head_dim terms is off by (head_dim + 6) roundings of its magnitude, a probability by twice that and the
    # exponential's 4; summing n_ctx values adds n_ctx
    magnitude = np.einsum("thd,hkd->htk", np.abs(q), np.abs(keys)).max() * scale
    bound = 2 * ((head_dim + 6) * magnitude + 4 + 2 * n_ctx) * EPS * np.abs(values).max()
    shape = ck.AttentionShape(n_heads, n_kv_heads, head_dim, n_ctx, window, float(scale))
    results = []
    for seed in (0, 1):
        out = memory.full(q.shape, np.nan, np.float32)
        partial = memory.full(shape.partial_floats(n_tokens, splits), np.nan, np.float32)
        addresses = (memory.at(q), *(cache.ctypes.data for cache in caches), out.ctypes.data, partial.ctypes.data, at)
        for launch in ck.attention(shape, addresses, n_tokens, splits):
            run(launch, seed)
        assert np.abs(out - want).max() <= bound
        results.append(out)
    np.testing.assert_array_equal(*results)
