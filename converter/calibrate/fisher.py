"""Stage 2: what an error in a linear's output does to the model's next-token distribution.

For a small error e of one output, the mean KL divergence of the distributions is e^T F e / 2, where F is the second
moment of g, the gradient of -log p(y) by that output, y drawn from the model's own distribution (Fisher information).
With many outputs and tokens F is taken as a product (K-FAC, arXiv 1503.05671; for quantization YAQA,
arXiv 2505.22988): tokens count with |g| where the inputs' second moments are summed, and g g^T / |g|, summed over
tokens, is the second moment of the outputs. Half the gradient's square on either side: it has heavy tails.

One forward pass keeps every layer's input on disk; then layers go backwards, one in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..console import progress
from ..resume.work_folder import WorkFolder
from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint
from ..transform.transformed_model import TransformedModel
from .gradients import (
    GradientCapture,
    LayerSensitivity,
    PackedHessian,
    capture_gradients,
    experts_backward,
    output_hessian_bytes,
)
from .layer_stream import LayerStream
from .streamed_experts import streamed_experts

HEAD_ROWS = 512  # tokens whose logits are in memory at a time
FLOAT_BYTES = 4
BACKWARD = "backward"  # the state between two layers of the backward pass
STATES = 4  # hidden states between two layers: two, each beside the one that it replaces


@dataclass(frozen=True)
class Sensitivity:
    """Every layer's, in a work folder.

    predicted_kl: per layer, linear -> divergence in nats per token if its weights are quantized with a squared error of
    1 relative to their row's energy and error feedback does what it can: one value, or one per expert.
    """

    work: WorkFolder
    predicted_kl: list[dict[str, list[float]]]

    def layer(self, index: int) -> LayerSensitivity:
        """Read one layer's."""
        saved = self.work.load(f"sensitivity-{index}")
        outputs = {name: [PackedHessian(*entry) for entry in entries] for name, entries in saved["outputs"].items()}
        return LayerSensitivity(saved["token_weights"], outputs)

    def save(self, index: int, layer: LayerSensitivity) -> None:
        """Write one layer's."""
        outputs = {name: [(x.matrix, x.tokens) for x in entries] for name, entries in layer.outputs.items()}
        self.work.save(f"sensitivity-{index}", {"token_weights": layer.token_weights, "outputs": outputs})


def folder_bytes(checkpoint: Checkpoint, n_tokens: int, measured: bool) -> int:
    """What lies in the work folder at most beside the output: hidden states, and what measure leaves."""
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

    Besides the next token, each router's choice counts router_weight times: its Fisher information is added.
    """
    n_layers = model.checkpoint.config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    with progress("sensitivity", 2 * n_layers) as advance:
        state = work.load(BACKWARD)
        if state is None:
            hidden = _forward(model, stream, tokens, work, advance)
            gradient = _head_gradient(stream, hidden, model.head(), generator, model.head_bias())
            state = {"layers": n_layers, "gradient": gradient, "predicted_kl": [{}] * n_layers}
        else:
            generator.set_state(state["generator"])
            advance(step=2 * n_layers - state["layers"])
        found = Sensitivity(work, state["predicted_kl"])
        for i in reversed(range(state["layers"])):
            capture = _backward(model, stream, i, work.load(f"hidden-{i}"), state["gradient"], router_weight, generator)
            found.save(i, capture.result())
            found.predicted_kl[i] = capture.predicted_kl(tokens.numel())
            work.save(BACKWARD, state | {"layers": i, "generator": generator.get_state()})
            work.remove(f"hidden-{i}")
            advance("backward")
    return found


def _backward(
    model: TransformedModel,
    stream: LayerStream,
    index: int,
    hidden: Tensor,
    gradient: Tensor,
    router_weight: float,
    generator: torch.Generator,
) -> GradientCapture:
    """One layer, from the gradient by its output to that by its input hidden [sequences, n, hidden], in place."""
    module, arch = stream.load(model, index), model.checkpoint.arch_of(index)
    capture, by_routed = GradientCapture(arch, module, model.n_experts(index)), None
    experts = streamed_experts(module)
    routed = stream.without_experts(module, hidden.clone()) if experts else None
    if experts and routed:
        by_routed = experts_backward(capture, experts, routed, gradient.flatten(0, 1))
    with capture_gradients(capture, module), _router_losses(arch, module, router_weight, generator):
        stream.backward(module, hidden, gradient, by_routed)
    return capture


def _forward(model: TransformedModel, stream: LayerStream, tokens: Tensor, work: WorkFolder, advance: Any) -> Tensor:
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


@contextmanager
def _router_losses(arch: Architecture, module: nn.Module, weight: float, generator: torch.Generator) -> Iterator[None]:
    """While active, a backward pass through the layer also descends from weight times its router's -log p(expert)."""

    def hook(_: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> None:
        logits = output[0]  # transformers' routers give their logits first
        # Squared gradients add up, so the square root of the weight.
        own = _gradient_of_draw(logits.detach(), generator) * weight**0.5
        logits.register_hook(lambda gradient: gradient + own)

    routers = [linear.parameter.removesuffix(".weight") for linear in arch.linears if linear.router]
    handles = [module.get_submodule(name).register_forward_hook(hook) for name in routers if weight]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
