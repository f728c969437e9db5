"""One pass over the float model: rows of every norm's output for the rotation, and the logits the result must keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..console import progress
from ..transform.transformed_model import TransformedModel
from .capture import capture_norms
from .layer_stream import LayerStream

ROWS_PER_NORM = 256


@dataclass(frozen=True)
class Observation:
    """norm_rows [norms, rows, hidden] in the unrotated basis; logits [tokens, vocab] of the first sequence."""

    norm_rows: Tensor
    logits: Tensor


def observe(model: TransformedModel, stream: LayerStream, tokens: Tensor) -> Observation:
    """Run tokens [sequences, n] through the folded, unrotated model, one layer at a time."""
    n_layers = model.checkpoint.config.num_hidden_layers
    hidden = model.embedding()[tokens]
    rows: list[Tensor] = []
    with progress("observing", n_layers) as advance:
        for i in range(n_layers):
            module = stream.load(model, i)
            with capture_norms(model.checkpoint.arch_of(i), module, ROWS_PER_NORM) as found:
                stream.forward(module, hidden)
            rows += found
            advance()
    logits = model.logits(stream.final_norm(hidden[0]))
    return Observation(torch.stack(rows), logits)
