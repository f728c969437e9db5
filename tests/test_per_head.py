"""A weight of one matrix per attention head: every part of a row is quantized and multiplied by itself."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pyggml_bridge.cpu.backend import CPUBackend
from pyggml_bridge.format import Clustered, CQType, quantize_activations
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Matrix
from tests.oracle import random_clustered
from tests.test_kernels import EPS

N_HEADS, ROWS, COLS, VOCAB = 3, 45, 128, 11


def per_head(rng: np.random.Generator, cq: CQType) -> Clustered:
    """[heads, rows, cols] with group scales, codebooks shared by two rows."""
    heads = [random_clustered(rng, cq, ROWS, COLS, scale_cols=64, codebook_rows=2) for _ in range(N_HEADS)]
    names = ("packed", "centroids", "scales", "group_scales")
    packed, centroids, scales, groups = (np.stack([getattr(head, name) for head in heads]) for name in names)
    return Clustered(cq, packed, centroids, scales, groups, COLS, 64, 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cq", [CQType.CQ4, CQType.CQ3T])
def test_every_head_multiplies_its_own_part(cq: CQType, bits: int) -> None:
    rng = np.random.default_rng(bits)
    w, table = per_head(rng, cq), rng.normal(size=(VOCAB, N_HEADS * COLS)).astype(np.float32)
    table[:, :COLS] *= 50  # one scale for the whole row would leave little of the other heads
    p = Program(64, 0, 1, 1, N_HEADS * ROWS, bits)
    x = p.embed(Matrix("table", GGMLQuantizationType.F32, 1, VOCAB, N_HEADS * COLS, table.view(np.uint8)))
    matrix = Matrix("w", GGMLQuantizationType(cq), N_HEADS, ROWS, COLS, w.packed.reshape(-1), w)
    p.logits = p.linear(x, matrix)
    for n in (1, 4, 5, 50):
        tokens = rng.integers(0, VOCAB, n).astype(np.int32)
        got = [CPUBackend(p, 64, t).run(tokens, 0, n).reshape(n, N_HEADS, ROWS).copy() for t in (1, 2, 3)]
        q, scales = quantize_activations(table[tokens].reshape(n * N_HEADS, COLS), bits)
        q = q.reshape(n, N_HEADS, COLS).astype(np.float64)
        want = np.einsum("thc,hrc->thr", q, w.weights_i8()) * w.scales * scales.reshape(n, N_HEADS, 1)
        assert (np.abs(got[0] - want) <= 4 * EPS * np.abs(want)).all()  # the sum is exact, then two products
        assert all(np.array_equal(got[0], other) for other in got[1:])
