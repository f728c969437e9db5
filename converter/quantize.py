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
from pyggml_bridge.format import CQType

from .calibration import Moments
from .clustering import (
    ITERATIONS,
    ITERATIONS_BEFORE_FEEDBACK,
    Fit,
    Grouping,
    Refinement,
    descend,
    error_feedback,
    fit_codebooks,
    weights_of,
)
from .plan import PlannedTensor

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


def quantize(
    planned: PlannedTensor, weight: Tensor, moments: list[Moments] | None, refinement: Refinement, n_threads: int
) -> Quantized:
    """Quantize weight [out, in] or [n_experts, out, in] to its planned type.

    moments: statistics of its inputs, one entry or one per expert; an entry that has seen no token counts as none.
    """
    if planned.cq is None:
        return Quantized(planned, weight, moments, [], _plain(planned, weight))
    matrices = weight if weight.dim() == 3 else weight[None]
    entries: Sequence[Moments | None] = moments or [None] * len(matrices)
    fits = [
        _cluster(matrix, planned.cq, planned.grouping, entry, refinement, n_threads)
        for matrix, entry in zip(matrices, entries, strict=True)
    ]
    return Quantized(planned, weight, moments, fits, None)


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


def _cluster(
    weight: Tensor, cq: CQType, grouping: Grouping, moments: Moments | None, refinement: Refinement, n_threads: int
) -> Fit:
    seen = moments is not None and moments.tokens > 0
    importance = moments.damped.diagonal().numpy() if moments and seen else np.ones(weight.shape[1], np.float32)
    feedback = moments if seen and refinement.feedback else None
    iterations = ITERATIONS if feedback is None else ITERATIONS_BEFORE_FEEDBACK
    fit = fit_codebooks(weight.numpy(), importance, cq, grouping, n_threads, iterations)
    if feedback:
        error_feedback(fit, feedback.feedback_factor.numpy(), n_threads)
        if refinement.descent_rounds:
            descend(fit, feedback.damped.numpy(), n_threads, refinement.descent_rounds)
    return fit


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
