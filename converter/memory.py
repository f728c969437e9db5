"""How much memory a conversion takes at its peak, from shapes alone, and how many matrices may be clustered at once.

The terms are what the stages hold at the same time; docs/performance.md has them beside measured peaks.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from pyggml_bridge.errors import CQError

from .checkpoint import Checkpoint
from .gradients import output_moments_bytes
from .moments import WIDE
from .sensitivity import HEAD_ROWS
from .settings import Settings
from .stream import BATCH_TOKENS

FLOAT = 4
PROGRAM = 700 << 20  # Python, torch and transformers
COPIES = 4  # of a float weight between reading it and its codebooks: read, transformed, in the file's order, fitted
SQUARES = 4  # float32 [cols, cols] of a linear: sums, moments, damped, factor
FACTORING = 4  # the same in the precision in which the factor is computed
TUNED = 40  # bytes per weight that fine-tuning of all experts together holds: originals, module, indices, gradients
STATES = 7  # hidden states of all tokens: a layer's input and output, what its experts get, gradients of these
LOGITS = 5  # of a batch at the head: logits, probabilities, their running sums, the gradient
BATCH_ROWS = 6  # a batch's activations inside a layer, in units of its widest


def task_bytes(shapes: list[tuple[int, ...]], calibrated: bool) -> int:
    """Clustering matrices [rows, cols] one after another."""
    weights = COPIES * FLOAT * sum(rows * cols for rows, cols in shapes)
    cols = max(cols for _, cols in shapes)
    squares = SQUARES + FACTORING * (1 if cols > WIDE else 2)
    return weights + (squares * FLOAT * cols * cols if calibrated else 0)


def peak_bytes(checkpoint: Checkpoint, settings: Settings, n_tokens: int) -> int:
    """The whole conversion's, with as many tasks side by side as there are threads and memory for."""
    config = checkpoint.config
    states = STATES * FLOAT * n_tokens * config.hidden_size
    head = FLOAT * config.vocab_size * config.hidden_size
    outside = max(COPIES * head, 2 * head + (LOGITS * FLOAT * HEAD_ROWS * config.vocab_size if n_tokens else 0))
    layers = {checkpoint.arch_of(i): i for i in range(config.num_hidden_layers)}
    largest = max(_layer_bytes(checkpoint, settings, i, n_tokens) for i in layers.values())
    return PROGRAM + states + max(outside, largest)


def _layer_bytes(checkpoint: Checkpoint, settings: Settings, index: int, n_tokens: int) -> int:
    """Clustering a layer: its float weights but the experts', indices of all, and the tasks."""
    arch = checkpoint.arch_of(index)
    shapes = {linear: checkpoint.expected_shape(linear, index) for linear in arch.linears}
    dense = [shape for linear, shape in shapes.items() if not linear.experts]
    experts = [shape for linear, shape in shapes.items() if linear.experts]
    kept = COPIES * FLOAT * sum(map(prod, dense))
    kept += sum(map(prod, experts)) + max(map(prod, experts), default=0)  # indices, and packed what is being written
    if n_tokens:
        widest = max(shape[-1] for shape in shapes.values() if len(shape) == 2)
        kept += FLOAT * BATCH_ROWS * min(n_tokens, BATCH_TOKENS) * widest
        if settings.tunes_centroids:
            kept += TUNED * sum(map(prod, shapes.values()))
        if settings.measures_sensitivity:
            kept += sum(output_moments_bytes(*each) for each in shapes.items() if each[0].measured)
    own = [task_bytes([shape[-2:]], n_tokens > 0) for shape in dense]
    if experts:
        own += [task_bytes([shape[-2:] for shape in experts], n_tokens > 0)] * experts[0][0]
    side_by_side = workers(settings, max(own), len(own))
    return kept + sum(sorted(own)[-side_by_side:])


def workers(settings: Settings, nbytes: int, n_tasks: int) -> int:
    """Tasks of so many bytes that may run side by side: at most half of the memory is theirs."""
    fit = settings.max_memory // 2 // max(1, nbytes)
    return max(1, min(settings.threads, n_tasks, fit))


def require_memory(needed: int, settings: Settings) -> None:
    """CQError if a conversion would need more than it may have."""
    if needed > settings.max_memory:
        raise CQError(
            f"the conversion needs about {needed / 1e9:.1f} GB of memory, {settings.max_memory / 1e9:.1f} GB are free"
            " (--max-memory; fewer --calibration-tokens or --threads need less)"
        )


def free_memory() -> int:
    """Bytes that the system can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return 1 << 62
