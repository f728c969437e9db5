"""One weight on its way into the file: what refinement does to it, and what is kept of it."""

import numpy as np
import pytest
import torch
from codequant_converter.calibrate.hessian import Hessian
from codequant_converter.quantize.fitting import DESCENT_ROWS, FittedWeight, Hessians, quantize, start_fit
from codequant_converter.quantize.plan import PlannedTensor
from codequant_converter.quantize.stored import store_unclustered
from codequant_converter.settings import F16, F32, Q8_0, Grouping, Refinement

from pyggml_bridge.format import CQType

SHAPE = (24, 128)


def weight_and_inputs(tokens: int) -> tuple[torch.Tensor, Hessian]:
    """A random weight, and the Hessian of so many random tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    x = torch.randn(tokens, SHAPE[1], generator=generator) @ torch.randn(SHAPE[1], SHAPE[1], generator=generator)
    return weight, Hessian.of_rows(x)


def fitted(tokens: int, rounds: int, kind: CQType = CQType.CQ4T) -> FittedWeight:
    """A random weight, clustered under the Hessian of so many random tokens."""
    weight, inputs = weight_and_inputs(tokens)
    planned = PlannedTensor("blk.0.ffn_up.weight", SHAPE, (kind,), Grouping(-1, 64, 8))
    found, tasks = start_fit(planned, weight, Hessians(inputs), Refinement(descent_rounds=rounds))
    for task in tasks:
        task.run(1)
    return found


@pytest.mark.parametrize(("tokens", "descends"), [(DESCENT_ROWS * 128 - 1, False), (DESCENT_ROWS * 128, True)])
def test_descent_needs_tokens_for_each_column(tokens, descends):
    without, with_descent = (fitted(tokens, rounds).fits[0] for rounds in (0, 1))
    assert np.array_equal(without.indices, with_descent.indices) != descends


def test_a_stored_weight_is_what_was_fitted():
    fit = fitted(2000, 1)
    stored, clustered = fit.store(1), fit.fits[0].clustered()
    expected = [clustered.packed, clustered.centroids, clustered.scales, clustered.group_scales]
    for array, own in zip(stored.arrays(), expected, strict=True):
        np.testing.assert_array_equal(array, own)
    assert torch.equal(fit.weight(1), stored.weight(1))
    difference, original = (fit.inputs.output_norm(m) for m in (fit.original - fit.weight(1), fit.original))
    assert stored.rel_error == pytest.approx((difference / original) ** 0.5)


def test_a_weight_by_itself_is_fitted_and_stored_at_once():
    weight, inputs = weight_and_inputs(2000)
    step_by_step = fitted(2000, 1).store(1)
    at_once = quantize(step_by_step.planned, weight, inputs, Refinement(descent_rounds=1), 2)
    for array, own in zip(at_once.arrays(), step_by_step.arrays(), strict=True):
        np.testing.assert_array_equal(array, own)


def test_errors_add_up_over_pieces_of_rows(monkeypatch):
    whole = fitted(2000, 0).store(1).rel_error
    monkeypatch.setattr("codequant_converter.quantize.fitting.PIECE_ROWS", 8)
    assert fitted(2000, 0).store(1).rel_error == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", [Q8_0, F16, F32])
def test_some_rows_of_an_embedding(kind):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    embedding = store_unclustered(PlannedTensor("token_embd.weight", SHAPE, (kind,), Grouping()), weight)
    ids = torch.tensor([[3, 3, 0], [23, 1, 7]])
    assert torch.equal(embedding.rows(ids, 1), embedding.weight(1)[ids])


def test_some_rows_of_a_clustered_embedding():
    embedding, ids = fitted(1000, 0).store(1), torch.tensor([[5, 20]])
    assert torch.equal(embedding.rows(ids, 1), embedding.weight(1)[ids])
