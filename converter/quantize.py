"""One weight -> the arrays that the file holds for it, and the weights they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor

from pyggml_bridge.errors import CQError

from .clustering import (
    ITERATIONS_BEFORE_FEEDBACK,
    Fit,
    Refinement,
    descend,
    error_feedback,
    fit_codebooks,
    new_fit,
    weights_of,
)
from .moments import Moments
from .plan import PlannedTensor
from .row_feedback import cluster_in_turn, sweep
from .side_by_side import Task

F16_MAX = 65504.0


@dataclass
class Quantized:
    """A weight [out, in] or [n_experts, out, in] in its planned type.

    fits: of a clustered type, one per matrix; they may still change. plain: the array of any other type.
    moments: statistics of its inputs, one entry per matrix, or none.
    """

    planned: PlannedTensor
    original: Tensor
    moments: list[Moments] | None
    fits: list[Fit]
    plain: NDArray[Any] | None

    def arrays(self) -> list[NDArray[Any]]:
        """What the file holds, in the order of the plan's parts."""
        if self.plain is not None:
            return [self.plain]
        parts = []
        for clustered in (fit.clustered() for fit in self.fits):
            groups = [] if clustered.group_scales is None else [clustered.group_scales]
            parts.append([clustered.packed, clustered.centroids, clustered.scales, *groups])
        stacked = [np.stack(arrays) for arrays in zip(*parts, strict=True)]
        return stacked if self.original.dim() == 3 else [array[0] for array in stacked]

    def weight(self, n_threads: int) -> Tensor:
        """Float32, what a kernel effectively multiplies."""
        if self.plain is None:
            matrices = [torch.from_numpy(weights_of(fit, n_threads)) for fit in self.fits]
            return torch.stack(matrices).reshape(self.original.shape)
        if self.planned.type == "q8_0":
            values = quants.dequantize(self.plain, GGMLQuantizationType.Q8_0)
        else:
            values = self.plain.astype(np.float32)
        return torch.from_numpy(values).reshape(self.original.shape)

    def rel_error(self, n_threads: int) -> float:
        """||XW - XW'|| / ||XW|| on the calibration inputs, ||W - W'|| / ||W|| without any."""
        return relative_error(self.original, self.weight(n_threads), self.moments)


@dataclass
class QuantizedByType(Quantized):
    """Experts of several types: whose matrices, and these, for each section of the plan."""

    sections: list[tuple[list[int], Quantized]]

    def arrays(self) -> list[NDArray[Any]]:
        """What the file holds, in the order of the plan's parts."""
        return [array for ids, part in self.sections for array in [*part.arrays(), np.array(ids, np.int32)]]

    def weight(self, n_threads: int) -> Tensor:
        """Float32, what a kernel effectively multiplies."""
        out = torch.empty_like(self.original)
        for ids, part in self.sections:
            out[ids] = part.weight(n_threads)
        return out


def quantize_plain(planned: PlannedTensor, weight: Tensor) -> Quantized:
    """A weight whose planned type is not clustered."""
    return Quantized(planned, weight, None, [], _plain(planned, weight))


def quantize(
    planned: PlannedTensor,
    weight: Tensor,
    moments: list[Moments] | None,
    outputs: list[Moments] | None,
    refinement: Refinement,
) -> tuple[Quantized, list[Task]]:
    """Weight [out, in] or [n_experts, out, in] in its planned type, once the tasks have run: one per clustered matrix.

    moments, outputs: statistics of its inputs and of its outputs' gradients, one entry or one per expert; an entry
    that has seen no token counts as none. One entry of outputs may serve all experts.
    """
    if planned.expert_types:
        return _quantize_by_type(planned, weight, moments, outputs, refinement)
    if planned.cq is None:
        return Quantized(planned, weight, moments, [], _plain(planned, weight)), []
    matrices = weight if weight.dim() == 3 else weight[None]
    entries: Sequence[Moments | None] = moments or [None] * len(matrices)
    by_output: Sequence[Moments | None] = outputs or [None]
    if len(by_output) == 1:
        by_output = [*by_output] * len(matrices)
    fits, tasks = [], []
    for matrix, entry, output in zip(matrices, entries, by_output, strict=True):
        seen = entry if entry is not None and entry.tokens else None
        importance = seen.damped.diagonal().numpy() if seen else np.ones(matrix.shape[1], np.float32)
        fit = new_fit(matrix.numpy(), importance, planned.cq, planned.grouping)
        tasks.append(_clustering_task(fit, seen, output if output is not None and output.tokens else None, refinement))
        fits.append(fit)
    return Quantized(planned, weight, moments, fits, None), tasks


def _quantize_by_type(
    planned: PlannedTensor,
    weight: Tensor,
    moments: list[Moments] | None,
    outputs: list[Moments] | None,
    refinement: Refinement,
) -> tuple[Quantized, list[Task]]:
    sections, tasks = [], []
    for ids, section in planned.sections():
        own_moments = moments and [moments[expert] for expert in ids]
        own_outputs = [outputs[expert] for expert in ids] if outputs and len(outputs) > 1 else outputs
        quantized, own = quantize(section, weight[ids], own_moments, own_outputs, refinement)
        sections.append((ids, quantized))
        tasks += own
    return QuantizedByType(planned, weight, moments, [], None, sections), tasks


def _clustering_task(fit: Fit, moments: Moments | None, output: Moments | None, refinement: Refinement) -> Task:
    if refinement.feedback:
        for entry in (moments, output):
            if entry is not None:
                _ = entry.feedback_factor  # cached: here all of torch's threads work on it
    rows, cols = fit.w.shape
    return Task(rows * cols * cols, lambda n_threads: _cluster(fit, moments, output, refinement, n_threads))


def _plain(planned: PlannedTensor, weight: Tensor) -> NDArray[Any]:
    values = np.ascontiguousarray(weight.numpy(), np.float32)
    if planned.type == "f32":
        return values
    if planned.type == "f16":
        if float(weight.abs().max()) > F16_MAX:
            raise CQError(f"{planned.name}: values beyond the range of F16: use --tensor-type")
        return values.astype(np.float16)
    packed: NDArray[Any] = quants.quantize(values, GGMLQuantizationType.Q8_0)
    return packed


def _cluster(fit: Fit, moments: Moments | None, output: Moments | None, refine: Refinement, n_threads: int) -> None:
    if moments is None or not refine.feedback:
        fit_codebooks(fit, n_threads)
        return

    def from_scratch(rows: Fit) -> None:
        fit_codebooks(rows, n_threads, ITERATIONS_BEFORE_FEEDBACK)
        error_feedback(rows, moments.feedback_factor.numpy(), n_threads)

    def descent(rows: Fit, rounds: int = 1) -> None:
        descend(rows, moments.damped.numpy(), n_threads, rounds)

    if output is None:
        from_scratch(fit)
        if refine.descent_rounds:
            descent(fit, refine.descent_rounds)
        return
    weight = torch.from_numpy(fit.w.copy())
    cluster_in_turn(fit, output.feedback_factor, from_scratch, n_threads)
    for _ in range(refine.descent_rounds):
        sweep(fit, weight, output.damped, moments.damped, descent, n_threads)


def relative_error(weight: Tensor, effective: Tensor, moments: list[Moments] | None) -> float:
    """See Quantized.rel_error; experts that saw no token are left out where others did."""
    if not moments or not any(entry.tokens for entry in moments):
        return float((weight - effective).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
    pairs = zip(
        weight.reshape(len(moments), -1, weight.shape[-1]),
        effective.reshape(len(moments), -1, weight.shape[-1]),
        strict=True,
    )
    sums = [
        [entry.tokens * value for value in entry.relative_error(w, e)]
        for entry, (w, e) in zip(moments, pairs, strict=True)
        if entry.tokens
    ]
    error, total = (sum(values) for values in zip(*sums, strict=True))
    return float((error / total) ** 0.5) if total > 0 else 0.0
