"""Stage 2, permutation-invariant outlier grouping: which columns share a codebook, for codebooks smaller than the row.

As published: sort columns by their sum of |w|, cut them into sub-groups of ratio * block columns, take each sub-group's
mean row-wise standard deviation, then deal one high-variance sub-group with (1 / ratio - 1) low-variance ones into each
block. Only channels whose order is free are permuted: FFN intermediate channels (per expert), and the value channels
inside each KV head, in the same order for all query heads that read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..source.architecture import Architecture, Layer

RATIO = 0.25


def outlier_order(columns: Tensor, block: int, ratio: float = RATIO) -> Tensor:
    """Permutation [n] of the columns of `columns` [rows, n]; the identity if one block holds them all."""
    n = columns.shape[1]
    if n <= block:
        return torch.arange(n)
    sub_groups = torch.argsort(columns.abs().sum(dim=0), stable=True).split(max(1, int(block * ratio)))
    spread = torch.stack([columns[:, group].std(dim=1, correction=0).mean() for group in sub_groups])
    by_spread = torch.argsort(spread, descending=True, stable=True).tolist()
    n_blocks = -(-n // block)
    high, low = by_spread[:n_blocks], by_spread[n_blocks:]
    per_block = round(1 / ratio) - 1
    dealt: list[int] = []
    for i, group in enumerate(high):
        dealt += [group, *low[i * per_block : (i + 1) * per_block]]
    return torch.cat([sub_groups[group] for group in dealt + low[len(high) * per_block :]])


def permute_channels(arch: Architecture, layer: Layer, block: int) -> Layer:
    """The layer, or one expert, with FFN channels reordered for codebooks of `block` columns; logits are unchanged."""
    permuted = dict(layer)
    for group in arch.channels:
        if group.consumer in layer:
            order = outlier_order(layer[group.consumer], block)
            permuted |= {name: layer[name][order] for name in group.producers}
            permuted[group.consumer] = layer[group.consumer][:, order]
    return permuted


def permute_heads(arch: Architecture, layer: Layer, block: int, head_dim: int) -> Layer:
    """The layer with value rows (as HeadGroup says) and output columns [out, heads * head_dim] reordered per KV head.

    For codebooks of `block` columns; logits are unchanged.
    """
    value, output = layer[arch.heads.value], layer[arch.heads.output]
    v = value.reshape(-1, head_dim, value.shape[-1])  # [kv_heads, head_dim, in]
    o = output.unflatten(1, (v.shape[0], -1, head_dim))  # [out, kv_heads, queries per KV head, head_dim]
    orders = [outlier_order(o[:, head].flatten(0, 1), block) for head in range(v.shape[0])]
    v = torch.stack([v[head, order] for head, order in enumerate(orders)])
    o = torch.stack([o[:, head, :, order] for head, order in enumerate(orders)], dim=1)
    permuted = layer | {arch.heads.value: v.reshape(value.shape), arch.heads.output: o.reshape(output.shape)}
    if arch.heads.bias:
        rows = layer[arch.heads.bias].unflatten(0, (-1, head_dim))
        permuted[arch.heads.bias] = torch.cat([row[order] for row, order in zip(rows, orders, strict=True)])
    return permuted
