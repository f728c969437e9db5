"""The experts of a layer, one in memory at a time: what all tokens send to it, what it computes, what flows back.

What experts write is only ever added to the residual stream. So a layer runs without them first, batch after batch,
and each expert follows once for all of its tokens: its weights are read, transformed and forgotten again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..source.architecture import Architecture, Layer
from .hessian import Hessian

ROWS = 512  # tokens that go through an expert at a time


@dataclass(frozen=True)
class Expert:
    """down(act(gate x) * up x): gate and up float32 [intermediate, hidden], down [hidden, intermediate]."""

    gate: Tensor
    up: Tensor
    down: Tensor
    act: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, arch: Architecture, layer: Layer, act: Callable[[Tensor], Tensor]) -> Expert:
        """From the linears of one expert."""
        up_and_gate = {x.row_block[0]: layer[x.name] for x in arch.linears if x.experts and not x.writes_residual}
        (down,) = (layer[x.name] for x in arch.linears if x.experts and x.writes_residual)
        return cls(up_and_gate[0], up_and_gate[1], down, act)

    def hidden(self, x: Tensor) -> Tensor:
        """What the down projection reads [tokens, intermediate], for x [tokens, hidden]."""
        return self.act(x @ self.gate.T) * (x @ self.up.T)

    def gradients(self, x: Tensor, by_output: Tensor) -> Gradients:
        """From the gradient by the output [tokens, hidden] back to everything before it."""
        gate, up = ((x @ weight.T).requires_grad_() for weight in (self.gate, self.up))
        with torch.enable_grad():
            hidden = self.act(gate) * up
        by_gate, by_up = torch.autograd.grad(hidden, (gate, up), by_output @ self.down)
        return Gradients(hidden.detach(), by_gate, by_up, by_gate @ self.gate + by_up @ self.up)


@dataclass(frozen=True)
class Gradients:
    """hidden [tokens, intermediate], and gradients by the outputs of gate and up and by x [tokens, hidden]."""

    hidden: Tensor
    by_gate: Tensor
    by_up: Tensor
    by_x: Tensor


@dataclass(frozen=True)
class Routed:
    """What the experts get: states [tokens, hidden], chosen experts [tokens, top_k] and their weights."""

    states: Tensor
    index: Tensor
    weights: Tensor

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that chose an expert, and where among their choices."""
        token, slot = torch.where(self.index == expert)
        return token, slot

    def hessians(self, number: int, expert: Expert, token_weights: Tensor | None) -> tuple[Hessian, Hessian]:
        """Hessians of one expert's inputs, and of what its down projection reads.

        token_weights [tokens]: how much each token counts. An expert's error reaches the output times its routing
        weight: with token_weights that counts too.
        """
        token, slot = self.rows(number)
        x = self.states[token]
        weight = None if token_weights is None else token_weights[token] * self.weights[token, slot]
        found = Hessian(x.shape[1], sampled=True), Hessian(expert.down.shape[1], sampled=True)
        for begin in range(0, len(x), ROWS):
            rows = slice(begin, begin + ROWS)
            for hessian, inputs in zip(found, (x[rows], expert.hidden(x[rows])), strict=True):
                hessian.add(inputs, None if weight is None else weight[rows])
        return found


class StreamedExperts(nn.Module):
    """In the place of transformers' experts: keeps what they would get, adds nothing.

    expert: gives one expert's weights; the attribute may be replaced.
    """

    def __init__(self, n_experts: int, expert: Callable[[int], Expert]) -> None:
        """No tokens yet."""
        super().__init__()
        self.n_experts, self.expert = n_experts, expert
        self._calls: list[Routed] = []

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Zeros like states [..., hidden]."""
        self._calls.append(Routed(states.flatten(0, -2), index.flatten(0, -2), weights.flatten(0, -2)))
        return torch.zeros_like(states)

    def take(self) -> Routed:
        """All tokens since the last call, in order."""
        calls, self._calls = self._calls, []
        return Routed(*(torch.cat([getattr(call, name) for call in calls]) for name in ("states", "index", "weights")))

    def add_outputs(self, routed: Routed, out: Tensor) -> None:
        """out [tokens, hidden] += each token's experts, weighted."""
        for number in range(self.n_experts):
            token, slot = routed.rows(number)
            if len(token):
                expert = self.expert(number)
                for some, rank in zip(token.split(ROWS), slot.split(ROWS), strict=True):
                    y = expert.hidden(routed.states[some]) @ expert.down.T
                    out.index_add_(0, some, y * routed.weights[some, rank, None])
                del expert  # before the next one is read


def streamed_experts(module: nn.Module) -> StreamedExperts | None:
    """Of a decoder layer module; None if it is dense or holds transformers' own."""
    return next((found for found in module.modules() if isinstance(found, StreamedExperts)), None)
