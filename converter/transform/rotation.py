"""Stage 1, activation outlier smoothing: an orthogonal basis in which the residual stream quantizes well.

Every norm's output is x R instead of x. An RMS norm without a scale commutes with R, so folding R into what reads the
residual stream (W R) and R^T into what writes it (R^T W) changes no logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..source.architecture import Architecture, Layer

LEARNING_RATE = 2e-3  # decays linearly to 0
MAX_STEPS = 100
ROWS_PER_STEP = 64  # of each norm
HELD_OUT = 4  # every fourth row only measures
MAX_FLOPS = 2e13  # bounds the time for wide models; not a clock, so that a seed gives one result


def random_rotation(n: int, seed: int) -> Tensor:
    """Orthogonal [n, n]: Hadamard of n's power-of-two part (Kronecker) random of the odd part, with random signs.

    Every entry is of the order of 1 / sqrt(n), so outliers spread over all channels.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = n // (n & -n)
    gaussian = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rotation = (q * torch.sign(torch.diagonal(r))).contiguous()
    while rotation.shape[0] < n:
        rotation = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5, rotation)
    signs = torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
    return (signs * rotation).float()


def cayley(m: Tensor) -> Tensor:
    """Orthogonal (I - S)(I + S)^-1 with S = (m - m^T) / 2; the identity for m = 0."""
    skew = (m - m.T) / 2
    eye = torch.eye(m.shape[0], dtype=m.dtype)
    return torch.linalg.solve(eye + skew, eye - skew)


def quantization_loss(y: Tensor, bits: int) -> Tensor:
    """Mean squared error of the run-time quantizer on y [..., tokens, hidden].

    The integer codes are constants for the gradient; each token's scale, its largest magnitude, is not.
    """
    top = (1 << (bits - 1)) - 1
    scale = y.abs().amax(dim=-1, keepdim=True) / top
    codes = torch.round(y.detach() / scale.detach().clamp_min(torch.finfo(y.dtype).tiny)).clamp(-top, top)
    return (y - scale * codes).square().mean()


@dataclass(frozen=True)
class LearnedRotation:
    """A rotation [hidden, hidden], and the losses before and after on held-out rows, summed over the norms."""

    rotation: Tensor
    loss_start: float
    loss_end: float
    steps: int


def learn_rotation(rows: Tensor, start: Tensor, bits: int, seed: int) -> LearnedRotation:
    """Descend from `start` on the quantization loss of rows [norms, tokens, hidden], inputs of the linears.

    Adam on the Cayley parameter, a batch of rows of every norm per step. Every fourth row is held out; if the loss on
    those does not fall, the start is returned.
    """
    held = torch.arange(rows.shape[1]) % HELD_OUT == 0
    learned = _descend(rows[:, ~held] @ start, bits, steps := _step_count(rows), torch.Generator().manual_seed(seed))
    rotation = orthogonalize(start.double() @ learned.double())
    losses = [float(quantization_loss(rows[:, held] @ r, bits)) * len(rows) for r in (start, rotation)]
    if losses[1] < losses[0]:
        return LearnedRotation(rotation, losses[0], losses[1], steps)
    return LearnedRotation(start, losses[0], losses[0], steps)


def _step_count(rows: Tensor) -> int:
    n = rows.shape[-1]
    per_step = 6 * len(rows) * ROWS_PER_STEP * n**2 + 10 * n**3  # products; solve with its gradient
    return max(1, min(MAX_STEPS, int(MAX_FLOPS / per_step)))


def _descend(x: Tensor, bits: int, steps: int, generator: torch.Generator) -> Tensor:
    n = x.shape[-1]
    m = torch.zeros(n, n, requires_grad=True)
    optimizer = torch.optim.Adam([m], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = torch.randint(0, x.shape[1], (ROWS_PER_STEP,), generator=generator)
        loss = quantization_loss(x[:, batch] @ cayley(m), bits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return cayley(m.detach())


def orthogonalize(rotation: Tensor) -> Tensor:
    """The nearest orthogonal matrix, float32, of one that only rounding has moved away.

    By Newton and Schulz's iteration (Björck and Bowie 1971), which squares the distance each time. A singular value
    decomposition would work in unaligned memory, where its last bits may differ between processes.
    """
    nearest = rotation.double()
    for _ in range(3):
        nearest = 1.5 * nearest - 0.5 * nearest @ (nearest.T @ nearest)
    return nearest.float()


def rotate_heads(arch: Architecture, layer: Layer, rotation: Tensor) -> Layer:
    """The layer with every value head in the basis of rotation [head_dim, head_dim]: R^T V, and O R to undo it.

    Attention sums value rows of one head with scalar weights, so logits are unchanged.
    """
    value, output = arch.heads.value, arch.heads.output
    heads = layer[value].reshape(-1, len(rotation), layer[value].shape[-1])
    columns = layer[output].unflatten(1, (-1, len(rotation)))
    rotated = layer | {value: (rotation.T @ heads).reshape(layer[value].shape), output: (columns @ rotation).flatten(1)}
    if arch.heads.bias:
        rotated[arch.heads.bias] = (layer[arch.heads.bias].unflatten(0, (-1, len(rotation))) @ rotation).flatten()
    return rotated


def rotate_layer(arch: Architecture, layer: Layer, rotation: Tensor) -> Layer:
    """The layer, or one expert, in the rotated basis: W R for what a norm feeds, R^T W for what writes the stream."""
    rotated = dict(layer)
    for linear in arch.linears:
        if linear.name not in layer:
            continue
        if linear.norm:
            rotated[linear.name] = rotated[linear.name] @ rotation
        if linear.writes_residual:
            rotated[linear.name] = rotation.T @ rotated[linear.name]
    for vector in arch.vectors:
        if vector.residual and vector.name in layer:
            rotated[vector.name] = rotated[vector.name] @ rotation
    return rotated
