"""One weight on its way into the file: what refinement does to it, and what is kept of it."""

import numpy as np
import pytest
import torch
from codequant_converter.calibrate.hessian import Hessian
from codequant_converter.quantize.matrix import DESCENT_ROWS, Quantized, quantize, store_unclustered
from codequant_converter.quantize.plan import PlannedTensor
from codequant_converter.settings import F16, F32, Q8_0, Grouping, Refinement

from pyggml_bridge.format import CQType

SHAPE = (24, 128)


def quantized(tokens: int, rounds: int, kind: CQType = CQType.CQ4T) -> Quantized:
    """A random weight, clustered under the hessian of so many random tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    x = torch.randn(tokens, SHAPE[1], generator=generator) @ torch.randn(SHAPE[1], SHAPE[1], generator=generator)
    planned = PlannedTensor("blk.0.ffn_up.weight", SHAPE, (kind,), Grouping(-1, 64, 8))
    found, tasks = quantize(planned, weight, Hessian.of_rows(x), None, Refinement(descent_rounds=rounds))
    for task in tasks:
        task.run(1)
    return found


@pytest.mark.parametrize(("tokens", "descends"), [(DESCENT_ROWS * 128 - 1, False), (DESCENT_ROWS * 128, True)])
def test_descent_needs_tokens_for_each_column(tokens, descends):
    without, with_descent = (quantized(tokens, rounds).fits[0] for rounds in (0, 1))
    assert np.array_equal(without.indices, with_descent.indices) != descends


def test_a_finished_weight_is_what_the_file_holds():
    open_weight, finished = quantized(2000, 1), quantized(2000, 1)
    finished.finish(1)
    assert not finished.fits and finished.original is None and finished.hessian is None
    for before, after in zip(open_weight.arrays(), finished.arrays(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert torch.equal(open_weight.weight(1), finished.weight(1))
    assert open_weight.rel_error(1) == finished.rel_error(1)


def test_errors_add_up_over_pieces_of_rows(monkeypatch):
    whole = quantized(2000, 0).rel_error(1)
    monkeypatch.setattr("codequant_converter.quantize.matrix.PIECE_ROWS", 8)
    assert quantized(2000, 0).rel_error(1) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", [Q8_0, F16, F32])
def test_some_rows_of_an_embedding(kind):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    embedding = store_unclustered(PlannedTensor("token_embd.weight", SHAPE, (kind,), Grouping()), weight)
    ids = torch.tensor([[3, 3, 0], [23, 1, 7]])
    assert torch.equal(embedding.rows(ids, 1), embedding.weight(1)[ids])


def test_some_rows_of_a_clustered_embedding():
    embedding, ids = quantized(1000, 0), torch.tensor([[5, 20]])
    assert torch.equal(embedding.rows(ids, 1), embedding.weight(1)[ids])
