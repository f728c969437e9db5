"""Stage 2: what an error in a linear's output does to the model's next-token distribution.

For a small error e of a linear's output, the mean KL divergence of the distributions is e^T F e / 2, where F is the
Fisher information: the second moments of g, the gradient of -log p(y) by that output, y drawn from the model's own
distribution. Over all outputs and tokens of a linear, F is taken as a Kronecker product of two matrices (K-FAC,
arXiv 1503.05671; for quantization YAQA, arXiv 2505.22988): the Hessian of the inputs, in which a token counts |g|, and
the output Hessian, the sum of g g^T / |g| over tokens. Each side takes one of the two powers of |g|, as the gradients
have heavy tails.

One forward pass keeps every layer's input on disk; then the layers go backwards, one in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Advance, progress
from ..resume.work_folder import WorkFolder
from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint
from ..transform.transformed_model import TransformedModel
from .gradients import (
    GradientCapture,
    LayerSensitivity,
    capture_gradients,
    experts_backward,
    output_hessian_bytes,
)
from .layer_stream import LayerStream
from .streamed_experts import streamed_experts

HEAD_ROWS = 512  # tokens whose logits are in memory at a time
FLOAT_BYTES = 4
BACKWARD = "backward"  # name of the backward pass's state in the work folder
STATES = 4  # hidden states in the folder between two layers: two, each beside the one that it replaces

PredictedKL = list[dict[str, list[float]]]  # per layer, linear -> one value, or one per expert


@dataclass(frozen=True)
class Sensitivity:
    """Every layer's sensitivity, in a work folder.

    predicted_kl: divergence in nats per token if a linear's weights are quantized with a squared error of 1 relative to
    their row's energy and error feedback does what it can.
    """

    work: WorkFolder
    predicted_kl: PredictedKL

    def layer(self, index: int) -> LayerSensitivity:
        """Read one layer's."""
        return LayerSensitivity.from_state_dict(self.work.load(f"sensitivity-{index}"))

    def save(self, index: int, layer: LayerSensitivity) -> None:
        """Write one layer's."""
        self.work.save(f"sensitivity-{index}", layer.state_dict())


@dataclass
class _BackwardState:
    """How far the backward pass has come, as the work folder keeps it.

    n_left: layers that it has not reached; gradient [sequences, n, hidden]: by the output of the last of these;
    generator: state of the draws.
    """

    n_left: int
    gradient: Tensor
    predicted_kl: PredictedKL
    generator: Tensor

    @classmethod
    def load(cls, work: WorkFolder) -> _BackwardState | None:
        """What the folder holds; None before the first layer."""
        saved = work.load(BACKWARD)
        return None if saved is None else cls(**saved)

    def save(self, work: WorkFolder) -> None:
        """Replace what the folder holds."""
        work.save(BACKWARD, dict(vars(self)))  # not asdict, which would copy the gradient


def folder_bytes(checkpoint: Checkpoint, n_tokens: int, measured: bool) -> int:
    """Bytes in the work folder at most beside the output: hidden states, and what `measure` leaves if measured."""
    config = checkpoint.config
    hidden_bytes = FLOAT_BYTES * n_tokens * config.hidden_size
    if not measured:
        return STATES * hidden_bytes
    outputs = 0
    for i in range(config.num_hidden_layers):
        for linear in checkpoint.arch_of(i).linears:
            if linear.measured:
                outputs += output_hessian_bytes(linear, checkpoint.expected_shape(linear, i))
    return outputs + (config.num_hidden_layers + STATES) * hidden_bytes


def measure(
    model: TransformedModel, stream: LayerStream, tokens: Tensor, work: WorkFolder, seed: int, router_weight: float
) -> Sensitivity:
    """Run tokens [sequences, n] forwards and backwards through the float model, on from where the folder's files end.

    Besides the next token's Fisher information, router_weight times that of each router's choice is added.
    """
    n_layers = model.checkpoint.config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    backward = _BackwardPass(model, stream, router_weight, generator)
    with progress("sensitivity", 2 * n_layers) as advance:
        state = _BackwardState.load(work)
        if state is None:
            hidden = _forward(model, stream, tokens, work, advance)
            gradient = _head_gradient(stream, hidden, model.head(), generator, model.head_bias())
            state = _BackwardState(n_layers, gradient, [{}] * n_layers, generator.get_state())
        else:
            generator.set_state(state.generator)
            advance(step=2 * n_layers - state.n_left)
        found = Sensitivity(work, state.predicted_kl)
        for i in reversed(range(state.n_left)):
            capture = backward.layer(i, work.load(f"hidden-{i}"), state.gradient)
            found.save(i, capture.result())
            found.predicted_kl[i] = capture.predicted_kl(tokens.numel())
            state.n_left, state.generator = i, generator.get_state()
            state.save(work)
            work.remove(f"hidden-{i}")
            advance("backward")
    return found


@dataclass(frozen=True)
class _BackwardPass:
    """What the backward pass through every layer needs. generator: draws the routers' choices."""

    model: TransformedModel
    stream: LayerStream
    router_weight: float
    generator: torch.Generator

    def layer(self, index: int, hidden: Tensor, gradient: Tensor) -> GradientCapture:
        """Turn the gradient by one layer's output into that by its input hidden [sequences, n, hidden], in place."""
        stream, arch = self.stream, self.model.checkpoint.arch_of(index)
        module = stream.load(self.model, index)
        capture, by_routed = GradientCapture(arch, module, self.model.n_experts(index)), None
        experts = streamed_experts(module)
        routed = stream.without_experts(module, hidden.clone()) if experts else None
        if experts and routed:
            by_routed = experts_backward(capture, experts, routed, gradient.flatten(0, 1))
        with capture_gradients(capture, module), self._router_losses(arch, module):
            stream.backward(module, hidden, gradient, by_routed)
        return capture

    @contextmanager
    def _router_losses(self, arch: Architecture, module: nn.Module) -> Iterator[None]:
        """While active, the gradients of router_weight times each router's -log p(expert) are added."""

        def hook(_: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> None:
            logits = output[0]  # transformers' routers give their logits first
            # The Fisher information goes with the gradient's square, so here the square root of the weight.
            own = _gradient_of_draw(logits.detach(), self.generator) * self.router_weight**0.5
            logits.register_hook(lambda gradient: gradient + own)

        routers = [linear.parameter.removesuffix(".weight") for linear in arch.linears if linear.router]
        handles = [module.get_submodule(name).register_forward_hook(hook) for name in routers if self.router_weight]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _forward(
    model: TransformedModel, stream: LayerStream, tokens: Tensor, work: WorkFolder, advance: Advance
) -> Tensor:
    """The last layer's output; every layer's input goes into the folder."""
    n_layers = model.checkpoint.config.num_hidden_layers
    saved = [i for i in range(n_layers) if work.has(f"hidden-{i}")]
    first = max(saved, default=0)
    hidden: Tensor = work.load(f"hidden-{first}") if saved else model.embedding()[tokens]
    advance(step=first)
    for i in range(first, n_layers):
        work.save(f"hidden-{i}", hidden)
        stream.forward(stream.load(model, i), hidden)
        advance("forward")
    return hidden


def _head_gradient(
    stream: LayerStream, hidden: Tensor, head: Tensor, generator: torch.Generator, bias: Tensor | None = None
) -> Tensor:
    """Gradient of the sum of -log p(y) by hidden [sequences, n, hidden], y drawn from p."""
    gradient = torch.empty_like(hidden)
    shift = 0.0 if bias is None else bias
    for rows, out in zip(hidden.flatten(0, 1).split(HEAD_ROWS), gradient.flatten(0, 1).split(HEAD_ROWS), strict=True):
        x = rows.clone().requires_grad_()
        normed = stream.final_norm(x)
        normed.backward(_gradient_of_draw(normed.detach() @ head.T + shift, generator) @ head)
        out.copy_(x.grad)
    return gradient


def _gradient_of_draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of -log p(y) by logits [tokens, n], y drawn from p = softmax(logits)."""
    p = logits.softmax(dim=-1)
    cumulative = p.cumsum(dim=-1)
    drawn = torch.rand(len(p), 1, generator=generator) * cumulative[:, -1:]
    y = torch.searchsorted(cumulative, drawn).clamp_max(p.shape[-1] - 1)
    return p.scatter_add_(1, y, torch.full(y.shape, -1.0))
