"""The choice of experts in NumPy, and the CPU's as a function."""

from __future__ import annotations

import numpy as np

from pyggml_bridge.native import ffi, lib, pointer
from tests.oracle import guarded
from tests.test_kernels import floats, run

N_TOKENS = 37


def route(logits: np.ndarray, top_k: int, **options: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids and weights [tokens, top_k], order [tokens * top_k] and offsets [n_experts + 1]."""
    n_tokens, n_experts = logits.shape
    logits = guarded(logits)
    ids, weights = np.full((n_tokens, top_k), -1, np.int32), np.full((n_tokens, top_k), np.nan, np.float32)
    order, offsets = np.full(n_tokens * top_k, -1, np.int32), np.full(n_experts + 1, -1, np.int32)
    routing = ffi.new("cq_routing *", {"n_experts": n_experts, "top_k": top_k, "weights": floats(weights)})
    routing.ids, routing.order = pointer(ids, "int32_t *"), pointer(order, "int32_t *")
    routing.offsets = pointer(offsets, "int32_t *")
    run(lib.CQ_OP_ROUTE, "route", {"logits": floats(logits), "routing": routing, **options}, n_tokens)
    return ids, weights, order, offsets


def drawn_logits(n_experts: int) -> np.ndarray:
    return (np.random.default_rng(n_experts).normal(size=(N_TOKENS, n_experts)) * 3).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def sparsemixer(logits: np.ndarray, top_k: int, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """ids and weights [tokens, top_k]; thresholds in float32, weights in float64."""
    ids, weights = [], []
    left = np.ones(logits.shape, bool)
    for _ in range(top_k):
        best = np.where(left, logits, -np.inf).argmax(-1)[:, None]
        top = np.take_along_axis(logits, best, -1)
        with np.errstate(invalid="ignore"):
            below = (top - logits) / np.maximum(np.abs(logits), top)
        kept = left & ~(below > 2 * np.float32(jitter))
        p = np.where(kept, np.exp(logits.astype(np.float64) - top), 0)
        ids.append(best)
        weights.append(1 / p.sum(-1, keepdims=True))
        np.put_along_axis(left, best, False, -1)
    return np.concatenate(ids, -1), np.concatenate(weights, -1)
