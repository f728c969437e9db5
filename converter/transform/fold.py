"""Stage 0: fold every norm's scale into the linears that read it; LayerNorms become RMS norms.

A LayerNorm subtracts the mean of the residual stream before it does what an RMS norm does. If nothing that writes the
stream writes a mean, there is none to subtract, and the norm commutes with rotations. Its bias goes into the biases of
the linears that read it. Where they have none (experts, routers), it takes the direction of the mean, which the stream
does not use any more: the norm adds a constant along it, and each linear reads that with W bias / constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..source.architecture import Architecture, Layer, Norm


def fold_norms(arch: Architecture, layer: Layer) -> Layer:
    """The same layer, or expert, with all norm scales 1: each W that reads the norm becomes W diag(scale)."""
    folded = dict(layer)
    for linear in arch.linears:
        if linear.norm and linear.name in layer:
            folded[linear.name] = layer[linear.name] * layer[linear.norm]
    for norm in arch.norms:
        if norm.bias:
            folded |= _fold_bias(arch, norm, layer, folded)
    if arch.has_layer_norms:
        folded |= _without_mean(arch, folded)
    return folded | {norm.name: torch.ones_like(layer[norm.name]) for norm in arch.norms}


def _fold_bias(arch: Architecture, norm: Norm, layer: Layer, folded: Layer) -> Layer:
    """What changes in the folded layer; the constant is such that the new column is about as large as the others."""
    assert norm.bias is not None
    bias, readers = layer[norm.bias], [x for x in arch.linears if x.norm == norm.name and x.name in layer]
    if all(linear.bias for linear in readers):
        own = {linear.bias: layer[linear.bias] + layer[linear.name] @ bias for linear in readers if linear.bias}
        return own | {norm.bias: torch.zeros_like(bias)}
    scale = layer[norm.name].norm()
    constant = bias.norm() / (scale if scale > 0 else 1.0)
    found = {norm.bias: constant.expand_as(bias).clone()}
    for linear in readers:
        weight = folded[linear.name]
        column = layer[linear.name] @ bias / (len(bias) * constant) if constant > 0 else torch.zeros(weight.shape[:-1])
        found[linear.name] = weight.sub_(weight.mean(dim=-1, keepdim=True)).add_(column[..., None])  # a copy: scaled
    return found


def _without_mean(arch: Architecture, layer: Layer) -> Layer:
    """Everything that writes the residual stream, without the mean of what it writes."""
    writers = [x.name for x in arch.linears if x.writes_residual and x.name in layer]
    linears = {name: layer[name] - layer[name].mean(-2, keepdim=True) for name in writers}
    vectors = [x.name for x in arch.vectors if x.residual and x.name in layer and x not in arch.norm_biases]
    return linears | {name: layer[name] - layer[name].mean() for name in vectors}


def fold_embedding(arch: Architecture, embedding: Tensor) -> Tensor:
    """Embedding [vocab, hidden], without the mean of each row where there are LayerNorms."""
    return embedding - embedding.mean(dim=-1, keepdim=True) if arch.has_layer_norms else embedding


def fold_final_norm(head: Tensor, norm: Tensor) -> Tensor:
    """Head [vocab, hidden] that reads the final norm without its scale [hidden]."""
    return head * norm
