"""Stage 1, activation outlier smoothing: one orthogonal basis of the residual stream that quantizes well.

Every norm's output is x R instead of x. An RMS norm without a scale commutes with R, so folding R into what reads the
residual stream (W R) and R^T into what writes it (R^T W) changes no logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .architecture import Architecture, Layer

LEARNING_RATE = 2e-3
MAX_STEPS = 100
STEP_FLOPS = 60  # of one step, times hidden^3: solve, its gradient, and the products around it
MAX_FLOPS = 4e12  # bounds the time for wide models; independent of the machine, so that a seed gives one result


def random_rotation(n: int, seed: int) -> Tensor:
    """Orthogonal [n, n]: Hadamard of n's power-of-two part, (Kronecker) times random of the odd part, times random signs.

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
    """rotation [hidden, hidden] with the loss of the random start and of the result, summed over the norms."""

    rotation: Tensor
    loss_start: float
    loss_end: float
    steps: int


def learn_rotation(rows: Tensor, start: Tensor, bits: int) -> LearnedRotation:
    """Descend from `start` on the quantization loss of rows [norms, tokens, hidden], inputs of the linears.

    Adam on the Cayley parameter; the best rotation seen is returned, so the loss never rises.
    """
    n = start.shape[0]
    steps = max(1, min(MAX_STEPS, int(MAX_FLOPS / (STEP_FLOPS * n**3))))
    x = rows @ start
    m = torch.zeros(n, n, requires_grad=True)
    optimizer = torch.optim.Adam([m], lr=LEARNING_RATE)
    losses: list[float] = []
    best = m.detach().clone()
    for step in range(steps + 1):
        loss = quantization_loss(x @ cayley(m), bits) * len(rows)
        losses.append(float(loss))
        if losses[-1] <= min(losses):
            best = m.detach().clone()
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rotation = orthogonalize(start.double() @ cayley(best.double()))
    return LearnedRotation(rotation, losses[0], min(losses), steps)


def orthogonalize(rotation: Tensor) -> Tensor:
    """The nearest orthogonal matrix, float32: removes what rounding has left over."""
    u, _, v = torch.linalg.svd(rotation.double())
    return (u @ v).float()


def rotate_layer(arch: Architecture, layer: Layer, rotation: Tensor) -> Layer:
    """The layer in the rotated basis: W R for what a norm feeds, R^T W for what writes the residual stream."""
    rotated = dict(layer)
    for linear in arch.linears:
        if linear.norm:
            rotated[linear.name] = rotated[linear.name] @ rotation
        if linear.writes_residual:
            rotated[linear.name] = rotation.T @ rotated[linear.name]
    return rotated
