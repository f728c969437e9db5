"""The router: choices and weights of every scoring, groups of experts, and slots sorted by expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyggml_bridge.cuda import linear as cl
from pyggml_bridge.native import lib
from pyggml_bridge.operations import Scoring
from tests.cuda.arrays import Memory
from tests.cuda.emulate import run
from tests.cuda.test_rows import EPS, SEEDS, floats
from tests.routing_oracle import drawn_logits, softmax, sparsemixer
from tests.routing_oracle import route as cpu_route


def route(logits: np.ndarray, top_k: int, choice: cl.Choice, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 and weights float32 [tokens, top_k]."""
    memory, shape = Memory(), (len(logits), top_k)
    ids, weights = memory.full(shape, -7, np.int32), memory.full(shape, np.nan, np.float32)
    routing = cl.DeviceRouting(logits.shape[1], top_k, ids.ctypes.data, weights.ctypes.data, 0, 0, 0)
    run(cl.route(memory.at(logits), routing, len(logits), choice)[0], seed)
    return ids, weights


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"),
    [(1, 4, 2), (5, 3, 3), (70, 40, 4), (33, 128, 8), (9, 1, 1), (3, 300, 40), (5, 2048, 3)],
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", [Scoring.SOFTMAX, Scoring.SIGMOID])
def test_routing(n_tokens: int, n_experts: int, top_k: int, normalize: bool, scoring: Scoring) -> None:
    rng = np.random.default_rng(n_experts)
    logits = floats(rng, n_tokens, n_experts)
    logits[0] = 1  # ties go to the lower index
    want_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    p = np.exp(logits.astype(np.float64))
    scores = p / (1 + p) if scoring is Scoring.SIGMOID else p / p.sum(-1, keepdims=True)
    want = np.take_along_axis(scores, want_ids, -1)
    want = want / want.sum(-1, keepdims=True) if normalize else want
    for seed in SEEDS:
        memory = Memory()
        ids, weights = memory.full((n_tokens, top_k), -7, np.int32), memory.full((n_tokens, top_k), np.nan, np.float32)
        order, offsets = memory.full(ids.size, -7, np.int32), memory.full(n_experts + 1, -7, np.int32)
        tiles = memory.full((n_tokens * top_k // 64 + min(n_experts, n_tokens * top_k), 2), -7, np.int32)
        addresses = [array.ctypes.data for array in (ids, weights, order, offsets, tiles)]
        routing = cl.DeviceRouting(n_experts, top_k, *addresses)
        assert len(tiles) == routing.max_tiles(n_tokens)
        choice = cl.Choice(scoring.value, normalize)
        run(cl.route(memory.at(logits), routing, n_tokens, choice)[0], seed)
        run(cl.group(routing, n_tokens), seed)
        np.testing.assert_array_equal(ids, want_ids)
        assert (np.abs(weights - want) <= EPS * (n_experts + 16) * want).all()
        np.testing.assert_array_equal(order, np.argsort(want_ids.reshape(-1), kind="stable"))
        np.testing.assert_array_equal(
            np.diff(offsets, prepend=0), [0, *np.bincount(ids.reshape(-1), minlength=n_experts)]
        )
        found = [(e, f) for e in range(n_experts) for f in range(offsets[e], offsets[e + 1], 64)]
        assert [tuple(tile) for tile in tiles[: len(found)]] == found and (tiles[len(found) :, 0] == -1).all()


@pytest.mark.parametrize("n_slots", [1, 255, 700])
@pytest.mark.parametrize("case", ["one has all", "first and last", "none before the last", "random"])
def test_grouping_of_uneven_slots(case: str, n_slots: int) -> None:
    """Experts without slots, one with all of them, and slots that do not fill a warp's eighth."""
    n_experts, rng = 300, np.random.default_rng(n_slots)
    ids = {
        "one has all": np.full(n_slots, 17),
        "first and last": np.where(np.arange(n_slots) % 3, 0, n_experts - 1),
        "none before the last": np.full(n_slots, n_experts - 1),
        "random": rng.integers(0, n_experts, n_slots),
    }[case].astype(np.int32)
    n_tiles = n_slots // 64 + min(n_experts, n_slots)
    for seed in SEEDS:
        memory = Memory()
        order, offsets = memory.full(n_slots, -7, np.int32), memory.full(n_experts + 1, -7, np.int32)
        tiles = memory.full((n_tiles, 2), -7, np.int32)
        addresses = (memory.at(ids), 0, *(array.ctypes.data for array in (order, offsets, tiles)))
        run(cl.group(cl.DeviceRouting(n_experts, 1, *addresses), n_slots), seed)
        np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
        np.testing.assert_array_equal(offsets, [0, *np.cumsum(np.bincount(ids, minlength=n_experts))])
        found = [(e, f) for e in range(n_experts) for f in range(offsets[e], offsets[e + 1], 64)]
        assert [tuple(tile) for tile in tiles[: len(found)]] == found and (tiles[len(found) :, 0] == -1).all()


def test_nan_logits_choose_experts_that_exist() -> None:
    memory, logits = Memory(), np.full((3, 6), np.nan, np.float32)
    logits[1, 2] = 1
    ids, weights = memory.full((3, 4), -7, np.int32), memory.full((3, 4), 0, np.float32)
    routing = cl.DeviceRouting(6, 4, ids.ctypes.data, weights.ctypes.data, 0, 0, 0)
    for scoring in Scoring:
        run(cl.route(memory.at(logits), routing, 3, cl.Choice(scoring.value, True))[0])
        assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 6 for row in ids.tolist())
        assert np.isnan(weights).any(), "what is not a number must show in the logits"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n_groups", "top_groups", "top_k"), [(4, 2, 5), (8, 8, 4), (64, 1, 1), (40, 33, 6)])
def test_only_experts_of_the_best_groups(n_groups: int, top_groups: int, top_k: int, normalize: bool) -> None:
    """DeepSeek-V2's choice: groups by their best expert; weights divided by their sum and times a constant at last."""
    logits = drawn_logits(320 if n_groups == 40 else 64)
    logits[5] = 0.5  # ties go to the lower index
    best = logits.reshape(len(logits), n_groups, -1).max(-1)
    chosen = np.argsort(-best, axis=-1, kind="stable")[:, :top_groups]
    allowed = np.zeros((len(logits), n_groups), bool)
    np.put_along_axis(allowed, chosen, True, axis=-1)
    masked = np.where(np.repeat(allowed, logits.shape[1] // n_groups, axis=-1), logits, -np.inf)
    want_ids = np.argsort(-masked, axis=-1, kind="stable")[:, :top_k]
    want = np.take_along_axis(softmax(logits), want_ids, -1)  # over all experts
    want = 2.5 * (want / want.sum(-1, keepdims=True) if normalize else want)
    for seed in SEEDS:
        choice = cl.Choice(Scoring.SOFTMAX.value, normalize, n_groups, top_groups, scale=2.5)
        ids, weights = route(logits, top_k, choice, seed)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want, rtol=2 * (40 + logits.shape[1] + top_k + 8) * EPS)


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 2.0])
@pytest.mark.parametrize(("n_experts", "top_k"), [(2, 2), (16, 2), (40, 4)])
def test_sparsemixer_chooses_one_after_the_other(n_experts: int, top_k: int, jitter: float) -> None:
    logits = drawn_logits(n_experts)
    logits[3], logits[4] = 1.0, 0.0  # ties; 0 / 0
    logits[5] = -np.abs(logits[5])  # relative to each logit's own magnitude
    want_ids, want_weights = sparsemixer(logits, top_k, jitter)
    for seed in SEEDS:
        ids, weights = route(logits, top_k, cl.Choice(Scoring.SPARSEMIXER.value, False, jitter=jitter), seed)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=2 * (40 + n_experts + 6) * EPS)


@pytest.mark.parametrize("jitter", [0.01, 0.013, 0.3])
@pytest.mark.parametrize("before", [[], [4.0]])  # the choice that is looked at
def test_sparsemixer_at_its_thresholds_is_the_cpus(before: list[float], jitter: float) -> None:
    """Logits a few units in the last place around the threshold below 1.5: all fall on the CPU's side."""
    near = np.full(37, 1.5 * (1 - 2 * jitter), np.float32).view(np.int32)
    near = (near + np.arange(37, dtype=np.int32) - 18).view(np.float32)
    logits = np.stack([*(np.full(37, x, np.float32) for x in (*before, 1.5, -2.0, 0.3)), near], axis=-1)
    choice = cl.Choice(Scoring.SPARSEMIXER.value, False, jitter=jitter)
    ids, weights = route(logits, 2, choice)
    want_ids, want, _, _ = cpu_route(logits, 2, scoring=lib.CQ_SPARSEMIXER, jitter=jitter)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    looked_at = weights[:, len(before)]
    assert looked_at.max() - looked_at.min() > 0.2  # both sides of it
    farther, _ = route(logits, 2, replace(choice, jitter=2 * jitter))
    np.testing.assert_array_equal(farther, ids)
