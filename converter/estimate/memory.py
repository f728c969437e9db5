"""How much memory a conversion takes at its peak, from shapes alone, and how many tasks may run side by side.

The terms are what the stages hold at the same time; docs/performance.md has them beside measured peaks.
"""

from __future__ import annotations

import ctypes
import sys
from math import prod

from pyggml_bridge.errors import CQError

from ..calibrate.fisher import HEAD_ROWS
from ..calibrate.gradients import output_hessian_bytes
from ..calibrate.hessian import FLOAT32_WIDTH, block_width
from ..calibrate.layer_stream import BATCH_TOKENS
from ..settings import Settings
from ..source.checkpoint import Checkpoint

FLOAT = 4
PROGRAM = 800 << 20  # Python, torch, transformers, and what allocators keep to themselves
FITTED = 1.25  # of a float weight while its codebooks are made: in the file's order, and a byte per index
ROW_FEEDBACK = 3  # more, where rows make up for each other's errors: targets, originals, errors
HESSIANS = 3  # float32 [cols, width] of a linear: the Hessian, damped, its Cholesky factor
FACTORIZING = 3  # [width, width] in the precision in which the Cholesky factor is computed
RUNNING_STATES = 4  # hidden states of all tokens: a layer's input, output, what its experts get, twice
BACKWARD_STATES = 7  # and gradients
CLUSTERING_STATES = 2  # a layer's input, what its experts get
LOGITS = 5  # of a batch at the head: logits, probabilities, their running sums, the gradient
BATCH_ROWS = 6  # a batch's activations inside a layer, in units of its widest
HEAD = 2.5  # float copies of the head, fitted, or of the embedding, dequantized again
M_MMAP_THRESHOLD, MAPPED = -3, 8 << 20  # malloc.h's option, and bytes: above what Qwen3-30B-A3B's experts take
WRITTEN = 2  # times the bits of a linear of all experts: one by one, and as the file holds them together


def task_bytes(shapes: list[tuple[int, ...]], settings: Settings, calibrated: bool) -> int:
    """Of clustering matrices [rows, cols] one after another, each of which is forgotten when it is done."""
    weights = [FLOAT * rows * cols for rows, cols in shapes]
    fitted = FITTED + (ROW_FEEDBACK if calibrated and settings.measures_sensitivity else 0)
    peak = 2 * sum(weights)  # read and transformed
    for i, (_, cols) in enumerate(shapes):
        hessians = 0
        if calibrated:
            width = block_width(cols)
            precision = 1 if width > FLOAT32_WIDTH else 2
            hessians = FLOAT * (HESSIANS * cols + FACTORIZING * width * precision) * width
            hessians += sum(FLOAT * other * block_width(other) for other in {c for _, c in shapes[i:]} - {cols})
        peak = max(peak, int(sum(weights[i:]) + fitted * weights[i] + hessians))
    return peak


def peak_bytes(checkpoint: Checkpoint, settings: Settings, n_tokens: int, tuning_bytes: int = 0) -> int:
    """Of the whole conversion, with as many tasks side by side as there are threads and memory for.

    tuning_bytes: per weight of a layer, what changes its codebooks after they are clustered takes.
    """
    config = checkpoint.config
    head = FLOAT * config.vocab_size * config.hidden_size
    logits = LOGITS * FLOAT * HEAD_ROWS * config.vocab_size if settings.measures_sensitivity else 0
    at_the_ends = max(int(HEAD * head), 2 * head + logits) + CLUSTERING_STATES * _states(checkpoint, n_tokens)
    layers = {checkpoint.arch_of(i): i for i in range(config.num_hidden_layers)}
    largest = max(_layer_bytes(checkpoint, settings, i, n_tokens, tuning_bytes) for i in layers.values())
    return PROGRAM + max(at_the_ends, largest)


def _states(checkpoint: Checkpoint, n_tokens: int) -> int:
    return FLOAT * n_tokens * int(checkpoint.config.hidden_size)


def _layer_bytes(checkpoint: Checkpoint, settings: Settings, index: int, n_tokens: int, tuning_bytes: int) -> int:
    """Running a layer forwards or backwards or clustering it, whichever takes most."""
    arch = checkpoint.arch_of(index)
    shapes = {linear: checkpoint.expected_shape(linear, index) for linear in arch.linears}
    dense = [shape for linear, shape in shapes.items() if not linear.experts]
    experts = [shape for linear, shape in shapes.items() if linear.experts]
    bits = {None: settings.bits or 5, "f16": 16, "f32": 32}[settings.float_type]
    written = int(WRITTEN * bits / 8 * max(map(prod, experts), default=0))
    kept = 2 * FLOAT * sum(map(prod, dense))  # the layer's and its module's
    if not n_tokens:
        return kept + max(written, _tasks_bytes(dense, experts, settings, n_tokens))
    kept += tuning_bytes * sum(map(prod, shapes.values()))
    states = _states(checkpoint, n_tokens)
    expert = 2 * FLOAT * sum(prod(shape[-2:]) for shape in experts)  # as the file holds it, and in transformers' layout
    widest = max(shape[-1] for shape in shapes.values() if len(shape) == 2)
    batch = FLOAT * BATCH_ROWS * min(n_tokens, BATCH_TOKENS) * widest
    forward = RUNNING_STATES * states + batch
    backward = BACKWARD_STATES * states + batch + expert if settings.measures_sensitivity else 0
    clustering = max(expert, written, _tasks_bytes(dense, experts, settings, n_tokens)) + CLUSTERING_STATES * states
    if settings.measures_sensitivity:
        clustering += sum(output_hessian_bytes(*each) for each in shapes.items() if each[0].measured)
    return kept + max(forward, backward, clustering)


def _tasks_bytes(
    dense: list[tuple[int, ...]], experts: list[tuple[int, ...]], settings: Settings, n_tokens: int
) -> int:
    own = [task_bytes([shape[-2:]], settings, n_tokens > 0) for shape in dense]
    if experts:
        own += [task_bytes([shape[-2:] for shape in experts], settings, n_tokens > 0)] * experts[0][0]
    return sum(sorted(own)[-workers(settings, max(own), len(own)) :])


def workers(settings: Settings, nbytes: int, n_tasks: int) -> int:
    """Tasks of so many bytes that may run side by side: at most half of the memory is theirs."""
    fit = settings.max_memory // 2 // max(1, nbytes)
    return max(1, min(settings.threads, n_tasks, fit))


def require_memory(needed: int, settings: Settings) -> None:
    """CQError if a conversion would need more bytes than it may have."""
    if needed > settings.max_memory:
        raise CQError(
            f"the conversion needs about {needed / 1e9:.1f} GB of memory, {settings.max_memory / 1e9:.1f} GB are free"
            " (--max-memory; fewer --calibration-tokens or --threads need less)"
        )


def return_what_is_freed() -> None:
    """Blocks of MAPPED bytes and more go back to the system when they are freed.

    glibc keeps those of up to 32 MB, once it has seen one freed, in a heap per thread: 0.6 GB beside Mixtral's experts.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(M_MMAP_THRESHOLD, MAPPED)
