"""The choice of experts against NumPy: every scoring, ties, normalization, and the slots sorted by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer as transformers_sparsemixer

from pyggml_bridge.operations import Scoring
from tests.routing_oracle import N_TOKENS, drawn_logits, route, softmax, sparsemixer
from tests.test_kernels import EPS


@pytest.mark.parametrize("scoring", [Scoring.SOFTMAX, Scoring.SIGMOID])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (6, 2), (64, 8), (5, 5)])
def test_scores_of_the_best(scoring: Scoring, normalize: bool, n_experts: int, top_k: int) -> None:
    logits = drawn_logits(n_experts)
    logits[3] = 1.0  # ties go to the lower index
    ids, weights, _, _ = route(logits, top_k, scoring=scoring.value, normalize=normalize)
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(ids, want)
    scores = softmax(logits) if scoring is Scoring.SOFTMAX else 1 / (1 + np.exp(-logits.astype(np.float64)))
    chosen = np.take_along_axis(scores, want, -1)
    if normalize:
        chosen /= chosen.sum(-1, keepdims=True)
    # each exponential: its argument rounded (magnitude below 40) and itself; their sum; the quotients
    np.testing.assert_allclose(weights, chosen, rtol=2 * (40 + n_experts + 6) * EPS)


@pytest.mark.parametrize(("n_groups", "top_groups", "top_k"), [(4, 2, 5), (8, 3, 6), (8, 8, 4), (64, 1, 1), (2, 1, 32)])
def test_only_experts_of_the_best_groups(n_groups: int, top_groups: int, top_k: int) -> None:
    """DeepSeek-V2's choice: groups by their best expert; then the weights times a constant."""
    logits = drawn_logits(64)
    logits[5] = 0.5  # ties go to the lower index
    ids, weights, _, _ = route(
        logits, top_k, scoring=Scoring.SOFTMAX.value, n_groups=n_groups, top_groups=top_groups, scale=2.5
    )
    best = logits.reshape(N_TOKENS, n_groups, -1).max(-1)
    chosen = np.argsort(-best, axis=-1, kind="stable")[:, :top_groups]
    allowed = np.zeros((N_TOKENS, n_groups), bool)
    np.put_along_axis(allowed, chosen, True, axis=-1)
    masked = np.where(np.repeat(allowed, 64 // n_groups, axis=-1), logits, -np.inf)
    np.testing.assert_array_equal(ids, np.argsort(-masked, axis=-1, kind="stable")[:, :top_k])
    scores = np.take_along_axis(softmax(logits), ids, -1)  # over all experts
    np.testing.assert_allclose(weights, 2.5 * scores, rtol=2 * (40 + 64 + 7) * EPS)


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 2.0])
@pytest.mark.parametrize(("n_experts", "top_k"), [(2, 2), (6, 2), (16, 2), (5, 4)])
def test_sparsemixer_chooses_one_after_the_other(n_experts: int, top_k: int, jitter: float) -> None:
    logits = drawn_logits(n_experts)
    logits[3] = 1.0
    logits[4] = 0.0  # 0 / 0
    logits[5] = -np.abs(logits[5])  # relative to each logit's own magnitude
    ids, weights, _, _ = route(logits, top_k, scoring=Scoring.SPARSEMIXER.value, jitter=jitter)
    want_ids, want_weights = sparsemixer(logits, top_k, jitter)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=2 * (40 + n_experts + 6) * EPS)


@pytest.mark.parametrize("best", [[], [4.0]])  # before the choice that is looked at
def test_sparsemixer_at_its_thresholds_is_transformers_own(best: list[float]) -> None:
    """Logits a few units in the last place around the threshold below 1.5."""
    jitter = 0.01
    near = np.full(N_TOKENS, 1.5 * (1 - 2 * jitter), np.float32).view(np.int32)
    near = (near + np.arange(N_TOKENS, dtype=np.int32) - N_TOKENS // 2).view(np.float32)
    logits = np.stack([*(np.full(N_TOKENS, x, np.float32) for x in (*best, 1.5, -2.0, 0.3)), near], axis=-1)
    ids, weights, _, _ = route(logits, 2, scoring=Scoring.SPARSEMIXER.value, jitter=jitter)
    want_weights, want_ids = transformers_sparsemixer(torch.from_numpy(logits), jitter_eps=jitter, training=False)
    np.testing.assert_array_equal(ids, want_ids.numpy())
    np.testing.assert_allclose(weights, want_weights.numpy(), rtol=1e-6)
    looked_at = weights[:, len(best)]
    assert looked_at.max() == 1 and looked_at.min() < 0.6  # both sides of it


def test_slots_are_sorted_by_expert_then_by_token() -> None:
    ids, _, order, offsets = route(drawn_logits(7), 3)
    np.testing.assert_array_equal(order, np.argsort(ids.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(np.diff(offsets), np.bincount(ids.reshape(-1), minlength=7))
