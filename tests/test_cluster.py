"""Codebook fitting: exact k-means against brute force and a plain dynamic program, and the fit's own invariants."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from codequant_converter.quantize.clustering import (
    ITERATIONS,
    Fit,
    descend,
    descend_noting,
    error_feedback,
    fit_codebooks,
    new_fit,
    weights_of,
)
from codequant_converter.settings import Grouping

from pyggml_bridge.format import CQType

ALL_TYPES = list(CQType)
PLAIN_TYPES = [cq for cq in CQType if not cq.trellis]


def fitted(
    w: np.ndarray, weight: np.ndarray, cq: CQType, grouping: Grouping, n_threads: int, iterations: int = ITERATIONS
) -> Fit:
    fit = new_fit(w, weight, cq, grouping)
    fit_codebooks(fit, n_threads, iterations)
    return fit


def clustering_error(v: np.ndarray, q: np.ndarray, bounds: tuple[int, ...]) -> float:
    """Weighted squared error of sorted values cut at bounds."""
    total = 0.0
    for values, weights in zip(np.split(v, bounds), np.split(q, bounds), strict=True):
        if weights.sum() > 0:
            total += float((weights * (values - (weights * values).sum() / weights.sum()) ** 2).sum())
    return total


def brute_force(v: np.ndarray, q: np.ndarray, k: int) -> float:
    """Smallest error over all ways to cut the sorted values into at most k runs."""
    cuts = range(1, len(v))
    return min(clustering_error(v, q, c) for n in range(min(k, len(v))) for c in combinations(cuts, n))


def dynamic_program(v: np.ndarray, q: np.ndarray, k: int) -> float:
    """The same in O(k n^2), float64."""
    s0, s1, s2 = (np.concatenate([[0], np.cumsum(x)]) for x in (q, q * v, q * v * v))
    n = len(v)
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = (s2[i] - s2[j]) - (s1[i] - s1[j]) ** 2 / (s0[i] - s0[j])
    cost = np.where(j < i, np.maximum(np.nan_to_num(cost), 0), np.inf)
    best = np.where(np.arange(n + 1) == 0, 0.0, np.inf)
    smallest = np.inf
    for _ in range(k):
        best = (best[None] + cost).min(axis=1)
        smallest = min(smallest, best[n])
    return float(smallest)


def exact_error(v: np.ndarray, q: np.ndarray, k: int) -> float:
    order = np.argsort(v, kind="stable")
    v, q = v[order].astype(np.float64), q[order].astype(np.float64)
    return brute_force(v, q, k) if len(v) <= 12 else dynamic_program(v, q, k)


def test_dynamic_program_of_this_test_equals_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(20):
        v, q = np.sort(rng.standard_normal(9)), rng.random(9)
        assert dynamic_program(v, q, 4) == pytest.approx(brute_force(v, q, 4), rel=1e-9)


@pytest.mark.parametrize("cq", PLAIN_TYPES)
@pytest.mark.parametrize("cols", [1, 2, 5, 9, 12, 64, 65, 300])
def test_exact_k_means_up_to_int8_rounding(cq, cols):
    """Rounding a centroid moves it by at most half of scale = max|centroid| / 127, which bounds the extra loss."""
    rng = np.random.default_rng(cols)
    w = rng.standard_t(3, (4, cols)).astype(np.float32)
    weight = rng.random(cols).astype(np.float32) + 0.01
    fit = fitted(w, weight, cq, Grouping(-1, -1), 1)
    for row in range(len(w)):
        exact = exact_error(w[row], weight, cq.n_centroids)
        step = np.abs(w[row]).max() / 127 / 2
        assert exact * (1 - 1e-5) - 1e-9 <= fit.loss[row] <= exact + float(weight.sum()) * step**2 + 1e-9


def by_set(losses: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Sums over the rows that share codebooks."""
    return np.add.reduceat(losses, np.arange(0, len(losses), grouping.codebook_rows))


SHARED = [Grouping(-1, 64, 8), Grouping(128, -1, 2)]


@pytest.mark.parametrize(
    "grouping", [Grouping(), Grouping(-1, -1), Grouping(128, -1), Grouping(128, 64), Grouping(-1, 128), *SHARED]
)
@pytest.mark.parametrize("cq", ALL_TYPES)
def test_loss_is_that_of_the_file_and_never_increases(cq, grouping):
    rng = np.random.default_rng(5)
    w = (rng.standard_normal((21, 320)) * np.repeat(rng.uniform(0.2, 3, (21, 5)), 64, axis=1)).astype(np.float32)
    weight = rng.uniform(0.1, 5, 320).astype(np.float32)
    losses = []
    for iterations in range(6):
        fit = fitted(w, weight, cq, grouping, 2, iterations)
        in_file = ((w - fit.clustered().dequantize().astype(np.float64)) ** 2 * weight).sum(axis=1)
        np.testing.assert_allclose(fit.loss, in_file, rtol=1e-4)
        losses.append(by_set(fit.loss, grouping))
    assert (np.diff(losses, axis=0) <= 0).all()
    if grouping.scale_group > 0 and cq.n_centroids < 32:  # 32 centroids for 128 columns leave little to refit
        assert losses[-1].sum() < 0.99 * losses[0].sum()  # refitting is worth something


@pytest.mark.parametrize("cols", [9, 65, 300])
def test_rows_that_share_a_codebook_are_solved_as_one(cols):
    """Rows of equal norm, so that their amplitudes are equal: k-means of all their values, up to int8 rounding."""
    rng = np.random.default_rng(cols)
    w = rng.standard_t(3, (6, cols)).astype(np.float32)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    fit = fitted(w, np.ones(cols, np.float32), CQType.CQ4, Grouping(-1, -1, 4), 2)
    for rows in (slice(0, 4), slice(4, 6)):
        exact = exact_error(w[rows].ravel(), np.ones(w[rows].size), 16)
        step = np.abs(w[rows]).max() / 127 / 2
        assert fit.loss[rows].sum() <= 1.02 * exact + w[rows].size * step**2
        assert w[rows].size <= 16 or fit.loss[rows].sum() >= 0.8 * exact  # row scales are free beside the codebook
    assert fit.centroids.shape == (2, 16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_trellis_leaves_less_than_a_plain_type_of_as_many_bits(bits):
    """Four states leave .82, .77 and .83 of a scalar quantizer's error of Gaussians (docs/decisions/format.md)."""
    w = np.random.default_rng(15).standard_normal((32, 1024)).astype(np.float32)
    plain, trellis = (
        fitted(w, np.ones(1024, np.float32), CQType[f"CQ{bits}{t}"], Grouping(-1, -1, 8), 2) for t in ("", "T")
    )
    assert 0.7 * plain.loss.sum() < trellis.loss.sum() < 0.86 * plain.loss.sum()


def test_row_weights_decide_between_rows_that_choose_together():
    w = np.random.default_rng(16).standard_normal((16, 512)).astype(np.float32)
    even, uneven = (new_fit(w, np.ones(512, np.float32), CQType.CQ3T, Grouping(-1, -1, 8)) for _ in range(2))
    uneven.row_weight[:8] = [1, 1e-3] * 4
    for fit in (even, uneven):
        fit_codebooks(fit, 2)
    assert uneven.loss[0:8:2].sum() < 0.8 * even.loss[0:8:2].sum()
    assert uneven.loss[1:8:2].sum() > even.loss[1:8:2].sum()
    np.testing.assert_array_equal(uneven.loss[8:], even.loss[8:])


def test_scale_groups_win_where_scales_differ():
    rng = np.random.default_rng(6)
    w = (rng.standard_normal((16, 512)) * np.repeat(10 ** rng.uniform(-1, 0, (16, 8)), 64, axis=1)).astype(np.float32)
    plain, grouped = (fitted(w, np.ones(512, np.float32), CQType.CQ3, Grouping(-1, g), 2) for g in (-1, 64))
    assert grouped.loss.sum() < 0.8 * plain.loss.sum()


@pytest.mark.parametrize("grouping", [Grouping(), Grouping(-1, -1), Grouping(64, 64)])
def test_degenerate_rows(grouping):
    w = np.zeros((6, 128), np.float32)
    w[1] = 0.37
    w[2] = -1e-30
    w[3, ::2], w[3, 1::2] = 1.0, -1.0
    w[4, 5] = 3e38
    w[5, :64] = 1.0  # a group of zeros beside a group of ones
    fit = fitted(w, np.ones(128, np.float32), CQType.CQ4, grouping, 2)
    assert np.isfinite(fit.scales).all() and (fit.scales >= 0).all()
    np.testing.assert_allclose(fit.clustered().dequantize(), w, rtol=1e-5, atol=0)


def test_columns_without_weight_do_not_disturb():
    rng = np.random.default_rng(7)
    w = rng.standard_normal((4, 128)).astype(np.float32)
    w[:, :64] *= 100
    weight = np.repeat(np.float32([0, 1]), 64)
    fit = fitted(w, weight, CQType.CQ4, Grouping(-1, -1), 1)
    alone = fitted(np.ascontiguousarray(w[:, 64:]), weight[64:], CQType.CQ4, Grouping(-1, -1), 1)
    np.testing.assert_allclose(fit.loss, alone.loss, rtol=1e-6)


def test_any_number_of_threads_gives_the_same_bytes():
    rng = np.random.default_rng(8)
    w = rng.standard_normal((50, 192)).astype(np.float32)
    fits = [fitted(w, np.ones(192, np.float32), CQType.CQ4, Grouping(-1, 64, 4), n) for n in (1, 2, 5)]
    for fit in fits[1:]:
        for name in ("indices", "centroids", "group_scales", "scales"):
            np.testing.assert_array_equal(getattr(fit, name), getattr(fits[0], name))


@pytest.mark.parametrize("cq", ALL_TYPES)
def test_error_feedback_lowers_the_output_error(cq):
    rng = np.random.default_rng(9)
    mix = rng.standard_normal((128, 128)) * np.geomspace(1, 0.02, 128)[:, None]
    x = rng.standard_normal((2000, 128)) @ mix
    hessian = x.T @ x / len(x)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(128)
    cholesky = np.ascontiguousarray(np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1], np.float32)
    w = rng.standard_normal((32, 128)).astype(np.float32)
    fit = fitted(w, np.diag(hessian).astype(np.float32), cq, Grouping(), 2)

    def output_error() -> float:
        return float(((x @ (w - fit.clustered().dequantize()).T) ** 2).sum())

    nearest = output_error()
    error_feedback(fit, cholesky, 2)
    assert output_error() < 0.7 * nearest


def test_error_feedback_without_correlation_is_the_nearest_centroid():
    rng = np.random.default_rng(10)
    w = rng.standard_normal((8, 128)).astype(np.float32)
    fit = fitted(w, np.ones(128, np.float32), CQType.CQ3, Grouping(), 1)
    nearest = fit.indices.copy()
    error_feedback(fit, np.eye(128, dtype=np.float32), 1)
    effective = fit.clustered().dequantize()
    fit.indices = nearest
    np.testing.assert_allclose(np.abs(w - effective), np.abs(w - fit.clustered().dequantize()), rtol=1e-5, atol=1e-7)


def correlated(cols: int, seed: int) -> np.ndarray:
    """Damped Hessian of strongly correlated inputs, float32 [cols, cols]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2000, cols)) @ (rng.standard_normal((cols, cols)) * np.geomspace(1, 0.02, cols)[:, None])
    hessian = x.T @ x / len(x)
    return np.ascontiguousarray(hessian + 0.01 * np.diag(hessian).mean() * np.eye(cols), np.float32)


@pytest.mark.parametrize("cq", ALL_TYPES)
@pytest.mark.parametrize("grouping", [Grouping(), Grouping(64, -1), Grouping(128, 64), Grouping(-1, 128), *SHARED])
def test_descent_lowers_the_output_error_round_by_round(cq, grouping):
    hessian = correlated(192, seed=11)
    w = np.random.default_rng(12).standard_normal((21, 192)).astype(np.float32)  # not a multiple of a batch of rows
    losses = []
    for rounds in (0, 1, 2, 4, 8):
        fit = fitted(w, np.diag(hessian).copy(), cq, grouping, 2)
        descend(fit, hessian, 2, rounds)
        residual = (fit.clustered().dequantize() - w).astype(np.float64)
        exact = ((residual @ hessian) * residual).sum(axis=1)
        np.testing.assert_allclose(fit.loss, exact, rtol=2e-3)
        losses.append(by_set(exact, grouping))
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-4)).all()
    assert losses[-1].sum() < 0.8 * losses[0].sum()


def test_descent_does_not_depend_on_threads_and_keeps_zero_rows():
    hessian = correlated(128, seed=13)
    w = np.random.default_rng(14).standard_normal((30, 128)).astype(np.float32)
    w[7] = 0
    fits = [fitted(w, np.diag(hessian).copy(), CQType.CQ4, Grouping(-1, 64, 4), 1) for _ in range(3)]
    for n_threads, fit in zip((1, 2, 5), fits, strict=True):
        descend(fit, hessian, n_threads)
        assert not fit.clustered().dequantize()[7].any() and np.isfinite(fit.scales).all()
        np.testing.assert_array_equal(fit.indices, fits[0].indices)
        np.testing.assert_array_equal(fit.centroids, fits[0].centroids)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("grouping", [Grouping(-1, 64, 8), Grouping(128, 64)])
def test_hessians_in_diagonal_blocks_are_those_with_zeros_between_them(width, grouping):
    """Feedback and descent of 320 columns, the last block being a short one."""
    blocks, whole = np.zeros((320, width), np.float32), np.zeros((320, 320), np.float32)
    for begin in range(0, 320, width):
        end = min(begin + width, 320)
        blocks[begin:end, : end - begin] = whole[begin:end, begin:end] = correlated(end - begin, seed=begin)
    w = np.random.default_rng(15).standard_normal((21, 320)).astype(np.float32)
    in_blocks, as_whole = (fitted(w, np.diag(whole).copy(), CQType.CQ4T, grouping, 2) for _ in range(2))
    for step in (error_feedback, descend):
        for fit, hessian in ((in_blocks, blocks), (as_whole, whole)):
            step(fit, hessian, 2)
        np.testing.assert_array_equal(in_blocks.indices, as_whole.indices)
        np.testing.assert_array_equal(in_blocks.centroids, as_whole.centroids)
        np.testing.assert_array_equal(in_blocks.scales, as_whole.scales)


def test_what_the_file_holds_stands_for_the_same_weights():
    w = np.random.default_rng(16).standard_normal((24, 192)).astype(np.float32)
    for cq in ALL_TYPES:
        fit = fitted(w, np.ones(192, np.float32), cq, Grouping(-1, 64, 8), 1)
        weights = weights_of(fit, 1)
        np.testing.assert_array_equal(weights_of(Fit.of(fit.clustered()), 1), weights)
        assert weights.ctypes.data % 64 == 0  # MKL's last bits follow it


@pytest.mark.parametrize("width", [64, 192])
def test_what_descent_notes_is_the_error_times_the_hessian(width):
    """Of 21 rows: a whole batch and a short set; those of a set that did not improve stay as they were."""
    hessian = np.zeros((192, width), np.float32)
    whole = np.zeros((192, 192), np.float32)
    for begin in range(0, 192, width):
        square = correlated(width, seed=begin)
        hessian[begin : begin + width] = whole[begin : begin + width, begin : begin + width] = square
    w = np.random.default_rng(17).standard_normal((21, 192)).astype(np.float32)
    w[8:16] = np.sign(w[8:16])  # two values: k-means leaves nothing to improve
    fit = fitted(w, np.diag(whole).copy(), CQType.CQ4, Grouping(-1, 64, 8), 2)
    expected = [(weights_of(fit, 2) - w) @ whole]
    errors = descend_noting(fit, hessian, 2, 1)
    expected.append((weights_of(fit, 2) - w) @ whole)
    for found, want in zip((errors.before, errors.after), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3 * np.abs(expected[0]).max())
    assert not np.allclose(errors.before, errors.after)
