"""Stage 0: fold every norm's scale into the linears that read it."""

from __future__ import annotations

import torch
from torch import Tensor

from .architecture import Architecture, Layer


def fold_norms(arch: Architecture, layer: Layer) -> Layer:
    """The same layer with all norm scales 1: W diag(scale) takes the place of each W that reads the norm."""
    folded = dict(layer)
    for linear in arch.linears:
        if linear.norm:
            folded[linear.name] = layer[linear.name] * layer[linear.norm]
    return folded | {norm.name: torch.ones_like(layer[norm.name]) for norm in arch.norms}


def fold_final_norm(head: Tensor, norm: Tensor) -> Tensor:
    """Head [vocab, hidden] that reads the final norm without its scale [hidden]."""
    return head * norm
