"""What hooks on a layer gather while it runs: Hessians of its linears' inputs, rows of its norms' outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..source.architecture import Architecture
from .hessian import Hessian


@contextmanager
def capture(
    arch: Architecture, module: nn.Module, token_weights: dict[str, Tensor] | None = None
) -> Iterator[dict[str, Hessian]]:
    """While active, running the decoder layer module fills the Hessians: one per linear input, without the experts'.

    token_weights: linear input -> [tokens], how much each token of the run counts; all the same without.
    """
    found: dict[str, Hessian] = {}
    handles = []
    for linear in arch.linears:
        if not linear.measured or linear.experts or linear.input in found:
            continue
        cols = linear.rows_of(module.get_parameter(linear.parameter)).shape[-1]
        found[linear.input] = Hessian(cols, sampled=True)
        weights = token_weights[linear.input] if token_weights else None
        hook = _linear_hook(found[linear.input], weights)
        handles.append(module.get_submodule(linear.input).register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(hessian: Hessian, weights: Tensor | None) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2)
        hessian.add(x, None if weights is None else weights[hessian.tokens : hessian.tokens + len(x)])

    return hook


@contextmanager
def capture_norms(arch: Architecture, module: nn.Module, rows: int) -> Iterator[list[Tensor]]:
    """While active, collects up to `rows` evenly spaced rows [rows, hidden] of each norm's output."""
    found: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        flat = output.flatten(0, -2)
        found.append(flat[torch.linspace(0, len(flat) - 1, rows).long()].clone())

    names = [norm.parameter.removesuffix(".weight") for norm in arch.norms]
    handles = [module.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
