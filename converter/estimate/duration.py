"""About how long a conversion takes, from shapes alone: for --dry-run.

Two rates, measured on two cores of a Xeon of 2023 with AVX-512 (docs/performance.md): clustering is linear in the
weights, running the model forwards and backwards in weights times tokens.
"""

from __future__ import annotations

from math import prod

from ..settings import Settings
from ..source.checkpoint import Checkpoint

# Seconds of one thread per weight: by the weights alone, with error feedback, and with all that sensitivity brings:
# types with a trellis, feedback from row to row, descent where tokens suffice.
NEAREST, FEEDBACK, SENSITIVE = 0.12e-6, 0.22e-6, 0.8e-6
FLOPS = 60e9  # of one thread, per second
PASSES = 2  # over the calibration tokens: for the inputs' Hessians, and through the quantized layer
SENSITIVITY_PASSES = 4  # forwards once, backwards the time of three


def estimated_seconds(checkpoint: Checkpoint, settings: Settings, n_tokens: int) -> float:
    """Of the whole conversion; on that machine the estimate is within a factor of 1.5."""
    config = checkpoint.config
    weights = config.vocab_size * config.hidden_size
    per_token = 0.0  # multiply-adds
    for i in range(config.num_hidden_layers):
        arch = checkpoint.arch_of(i)
        for linear in arch.linears:
            shape = checkpoint.expected_shape(linear, i)
            weights += prod(shape)
            share = config.num_experts_per_tok / shape[0] if linear.experts else 1.0
            per_token += prod(shape) * share
    feedback = settings.refinement.feedback and n_tokens > 0
    rate = NEAREST if not feedback else SENSITIVE if settings.measures_sensitivity else FEEDBACK
    passes = PASSES + (SENSITIVITY_PASSES if settings.measures_sensitivity else 0)
    running = 2 * per_token * n_tokens * passes / FLOPS if n_tokens else 0.0
    return (weights * rate + running) / settings.threads
