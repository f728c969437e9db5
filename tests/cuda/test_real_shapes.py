"""On a GPU: layers of real models' sizes equal the CPU backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyggml_bridge.cuda.backend import require_device
from pyggml_bridge.errors import CQError
from pyggml_bridge.measure.synthetic import SHAPES, write_synthetic
from pyggml_bridge.models import load_model

N_LAYERS, N_TOKENS, N_OUTPUTS = 2, 300, 8
MAX_KLD = 1e-3  # nats, of half of the tokens: activations beside int8's rounding edges fall on either side
ROUTED_ALIKE = 0.85  # of all choices: of 128 experts with random weights some all but tie


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_and_a_token_equal_the_cpu(name: str, tmp_path: Path) -> None:
    try:
        require_device()
    except CQError as error:
        pytest.skip(str(error))
    path = tmp_path / "synthetic.gguf"
    write_synthetic(path, SHAPES[name], N_LAYERS)
    tokens = np.random.default_rng(0).integers(0, SHAPES[name].vocab, N_TOKENS + 1, dtype=np.int32)
    ours, cpu = (load_model(path, n_ctx=N_TOKENS + 1, cuda=cuda) for cuda in (True, False))
    for first, last, n_outputs in ((0, N_TOKENS, N_OUTPUTS), (N_TOKENS, N_TOKENS + 1, 1)):
        logits, want = (model.forward(tokens[first:last], first, n_outputs) for model in (ours, cpu))
        assert np.median(divergence(want, logits)) <= MAX_KLD
        if last - first > 1:
            routings = zip(ours.routing_ids, cpu.routing_ids, strict=True)
            assert np.mean([(a[: last - first] == b[: last - first]).mean() for a, b in routings]) >= ROUTED_ALIKE


def divergence(base: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL per row [rows, vocab], nats."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (base, ours))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)
