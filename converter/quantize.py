"""One weight -> the arrays that the file holds for it, with the weights they stand for."""

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
    Grouping,
    Refinement,
    descend,
    error_feedback,
    fit_codebooks,
)
from .plan import PlannedTensor

F16_MAX = 65504.0


@dataclass(frozen=True)
class Quantized:
    """arrays in the order of the plan's parts; weight: float32, what a kernel effectively multiplies.

    rel_error: ||XW - XW'|| / ||XW|| on the calibration inputs, ||W - W'|| / ||W|| without any.
    """

    arrays: list[NDArray[Any]]
    weight: Tensor
    rel_error: float


def quantize(
    planned: PlannedTensor, weight: Tensor, moments: list[Moments] | None, refinement: Refinement, n_threads: int
) -> Quantized:
    """Quantize weight [out, in] or [n_experts, out, in] to its planned type.

    moments: statistics of its inputs, one entry or one per expert; an entry that has seen no token counts as none.
    """
    if planned.cq is None:
        arrays, effective = _plain(planned, weight)
        return Quantized(arrays, effective, relative_error(weight, effective, moments))
    matrices = weight if weight.dim() == 3 else weight[None]
    entries: Sequence[Moments | None] = moments or [None] * len(matrices)
    parts = [
        _cluster(matrix, planned.cq, planned.grouping, entry, refinement, n_threads)
        for matrix, entry in zip(matrices, entries, strict=True)
    ]
    stacked = [np.stack(arrays) for arrays in zip(*(arrays for arrays, _ in parts), strict=True)]
    effective = torch.stack([matrix for _, matrix in parts])
    if weight.dim() == 2:
        stacked, effective = [array[0] for array in stacked], effective[0]
    return Quantized(stacked, effective, relative_error(weight, effective, moments))


def _plain(planned: PlannedTensor, weight: Tensor) -> tuple[list[NDArray[Any]], Tensor]:
    values = np.ascontiguousarray(weight.numpy(), np.float32)
    if planned.type == "f32":
        return [values], weight
    if planned.type == "f16":
        if float(weight.abs().max()) > F16_MAX:
            raise CQError(f"{planned.name}: values beyond the range of F16: use --tensor-type")
        return [values.astype(np.float16)], weight.half().float()
    packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
    return [packed], torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q8_0)).reshape(weight.shape)


def _cluster(
    weight: Tensor, cq: CQType, grouping: Grouping, moments: Moments | None, refinement: Refinement, n_threads: int
) -> tuple[list[NDArray[Any]], Tensor]:
    seen = moments is not None and moments.tokens > 0
    importance = moments.damped.diagonal().numpy() if moments and seen else np.ones(weight.shape[1], np.float32)
    feedback = moments if seen and refinement.feedback else None
    iterations = ITERATIONS if feedback is None else ITERATIONS_BEFORE_FEEDBACK
    fit = fit_codebooks(weight.numpy(), importance, cq, grouping, n_threads, iterations)
    if feedback:
        error_feedback(fit, feedback.feedback_factor.numpy(), n_threads)
        if refinement.descent_rounds:
            descend(fit, feedback.damped.numpy(), n_threads, refinement.descent_rounds)
    clustered = fit.clustered()
    arrays: list[NDArray[Any]] = [clustered.packed, clustered.centroids, clustered.scales]
    if clustered.group_scales is not None:
        arrays.append(clustered.group_scales)
    return arrays, torch.from_numpy(clustered.dequantize())


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
