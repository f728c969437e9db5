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

from .architecture import Architecture, Linear
from .moments import DAMPING, Moments
from .report import progress
from .stream import LayerStream
from .transform import TransformedModel
from .work import WorkFolder

INPUT_STRIDE = 4  # every fourth token's inputs are enough to predict what feedback gains
EXPERTS_IN_COMMON = 0.1  # share of an expert's damage that is the mean of all: another text chooses others
HEAD_ROWS = 512  # tokens whose logits are in memory at a time
HALF_BYTES, FLOAT_BYTES = 2, 4
BACKWARD = "backward"  # the state between two layers of the backward pass
STATES = 4  # hidden states between two layers: two, each beside the one that it replaces


@dataclass(frozen=True)
class LayerSensitivity:
    """token_weights: site -> [tokens], mean 1; outputs: linear -> its moments [out, out], one or one per expert."""

    token_weights: dict[str, Tensor]
    outputs: dict[str, list[Moments]]


@dataclass(frozen=True)
class Sensitivity:
    """Every layer's, in a work folder.

    damage: per layer, linear -> predicted divergence, in nats per token, if its weights are quantized with a squared
    error of 1 relative to their row's energy and error feedback does what it can: one value, or one per expert.
    """

    work: WorkFolder
    damage: list[dict[str, list[float]]]

    def layer(self, index: int) -> LayerSensitivity:
        """Read one layer's."""
        saved = self.work.load(f"sensitivity-{index}")
        outputs = {name: [_unpacked(*packed) for packed in entries] for name, entries in saved["outputs"].items()}
        return LayerSensitivity(saved["token_weights"], outputs)

    def save(self, index: int, layer: LayerSensitivity) -> None:
        """Write one layer's."""
        outputs = {name: [_packed(entry) for entry in entries] for name, entries in layer.outputs.items()}
        self.work.save(f"sensitivity-{index}", {"token_weights": layer.token_weights, "outputs": outputs})


def _packed(moments: Moments) -> tuple[Tensor, int]:
    matrix = moments.matrix
    mean = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (matrix / mean).half(), moments.tokens


def _unpacked(matrix: Tensor, tokens: int) -> Moments:
    """A covariance of few rows is noise to the share of cols / tokens: damped by as much."""
    return Moments.of(matrix.float(), tokens, DAMPING + len(matrix) / max(1, tokens))


def folder_bytes(model: TransformedModel, n_tokens: int, measured: bool) -> int:
    """What lies in the work folder at most beside the output: hidden states, and what measure leaves."""
    checkpoint = model.checkpoint
    config = checkpoint.config
    hidden_bytes = FLOAT_BYTES * n_tokens * config.hidden_size
    if not measured:
        return STATES * hidden_bytes
    outputs = 0
    for i in range(config.num_hidden_layers):
        for linear in checkpoint.arch_of(i).linears:
            if linear.measured:
                *n_experts, out, _ = checkpoint.expected_shape(linear, i)
                outputs += out * out * (n_experts[0] if n_experts and not linear.writes_residual else 1)
    return HALF_BYTES * outputs + (config.num_hidden_layers + STATES) * hidden_bytes


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
            state = {"layers": n_layers, "gradient": gradient, "damage": [{}] * n_layers}
        else:
            generator.set_state(state["generator"])
            advance(step=2 * n_layers - state["layers"])
        found = Sensitivity(work, state["damage"])
        for i in reversed(range(state["layers"])):
            module = stream.module(i, model.layer(i))
            arch = model.checkpoint.arch_of(i)
            with _capture_gradients(arch, module) as capture, _router_losses(arch, module, router_weight, generator):
                stream.backward(module, work.load(f"hidden-{i}"), state["gradient"])
            found.save(i, capture.result())
            found.damage[i] = capture.damage(tokens.numel())
            work.save(BACKWARD, state | {"layers": i, "generator": generator.get_state()})
            work.remove(f"hidden-{i}")
            advance("backward")
    return found


def _forward(model: TransformedModel, stream: LayerStream, tokens: Tensor, work: WorkFolder, advance: Any) -> Tensor:
    """The last layer's output; every layer's input goes into the folder."""
    n_layers = model.checkpoint.config.num_hidden_layers
    saved = [i for i in range(n_layers) if work.has(f"hidden-{i}")]
    first = max(saved, default=0)
    hidden: Tensor = work.load(f"hidden-{first}") if saved else model.embedding()[tokens]
    advance(step=first)
    for i in range(first, n_layers):
        work.save(f"hidden-{i}", hidden)
        stream.forward(stream.module(i, model.layer(i)), hidden)
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


class _GradientCapture:
    """Gathers the gradients of one decoder layer's outputs."""

    def __init__(self, arch: Architecture, module: nn.Module) -> None:
        self.norms: dict[tuple[str, str], list[Tensor]] = {}  # site and linear -> gradient norms of each batch
        self.inputs: dict[str, Moments] = {}  # linear -> of some of its inputs, weighted by |g|^2, of all experts alike
        self.outputs: dict[str, list[Moments]] = {}
        self.energy: dict[str, Tensor] = {}  # linear -> [1] or [n_experts]
        self.linears = [linear for linear in arch.linears if linear.measured]
        for linear in self.linears:
            *n_experts, out, cols = linear.rows_of(module.get_parameter(linear.parameter)).shape
            entries = n_experts[0] if n_experts and not linear.writes_residual else 1
            self.outputs[linear.name] = [Moments(out) for _ in range(entries)]
            self.inputs[linear.name] = Moments(cols)
            self.energy[linear.name] = torch.zeros(n_experts[0] if n_experts else 1, dtype=torch.float64)

    def add(self, linear: Linear, gradient: Tensor, x: Tensor, weight: Tensor, expert: int = 0) -> Tensor:
        """Gradients [tokens, out] of the outputs of weight [out, in] for inputs x; returns the gradients' norms.

        What writes the residual is shared by all experts.
        """
        norms = gradient.norm(dim=-1)
        row_energy = weight.square().mean(dim=1)  # errors of the weights relative to their row, independent
        self.energy[linear.name][expert] += float((gradient.square() @ row_energy) @ x.square().sum(dim=-1))
        self.inputs[linear.name].add(x[::INPUT_STRIDE], norms[::INPUT_STRIDE].square())
        entries = self.outputs[linear.name]
        entries[expert if len(entries) > 1 else 0].add(gradient, 1 / norms.clamp_min(torch.finfo(torch.float32).tiny))
        return norms

    def result(self) -> LayerSensitivity:
        """Token weights: the mean over a site's linears of the gradients' norms, each linear's of mean 1."""
        weights: dict[str, list[Tensor]] = {}
        for (site, _), batches in self.norms.items():
            norms = torch.cat(batches)
            mean = norms.mean().clamp_min(torch.finfo(torch.float32).tiny)
            weights.setdefault(site, []).append(norms / mean)
        return LayerSensitivity({site: torch.stack(w).mean(dim=0) for site, w in weights.items()}, self.outputs)

    def damage(self, n_tokens: int) -> dict[str, list[float]]:
        """Per linear half the mean square of g e for independent errors of the weights, less what feedback gains."""
        return {linear.name: (self._damage(linear) / n_tokens).tolist() for linear in self.linears}

    def _damage(self, linear: Linear) -> Tensor:
        """[1], or [n_experts]: an expert that few tokens chose counts a tenth of the mean one at least."""
        entries = [entry for entry in self.outputs[linear.name] if entry.tokens]
        gain = sum(entry.feedback_gain for entry in entries) / max(1, len(entries))
        energy = self.energy[linear.name]
        shrunk = (1 - EXPERTS_IN_COMMON) * energy + EXPERTS_IN_COMMON * energy.mean()
        return 0.5 * gain * self.inputs[linear.name].feedback_gain * shrunk


@contextmanager
def _capture_gradients(arch: Architecture, module: nn.Module) -> Iterator[_GradientCapture]:
    capture = _GradientCapture(arch, module)
    handles = []
    for linear in arch.linears:
        if linear.measured and not linear.experts:
            layer = module.get_submodule(linear.parameter.removesuffix(".weight"))
            handles.append(layer.register_forward_hook(_linear_hook(capture, linear)))
    if arch.experts_site:
        experts = module.get_submodule(arch.experts_site)
        handles.append(experts.register_forward_hook(_experts_hook(capture, arch)))
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(capture: _GradientCapture, linear: Linear) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        index, count = linear.part
        x = arguments[0].detach().flatten(0, -2)

        def receive(gradient: Tensor) -> None:
            mine = gradient.flatten(0, -2).chunk(count, dim=-1)[index]
            norms = capture.add(linear, mine, x, linear.rows_of(module.get_parameter("weight")))
            capture.norms.setdefault((linear.site, linear.name), []).append(norms)

        output.register_hook(receive)

    return hook


def _experts_hook(capture: _GradientCapture, arch: Architecture) -> Any:
    """From the gradient of the experts' weighted sum back to each expert's own outputs, recomputed."""
    linears = [linear for linear in arch.linears if linear.experts]

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        states, index, routing = (argument.detach() for argument in arguments)
        states = states.flatten(0, -2)

        def receive(gradient: Tensor) -> None:
            gradient = gradient.flatten(0, -2)
            capture.norms.setdefault((linears[0].site, linears[0].name), []).append(gradient.norm(dim=-1))
            for expert in range(len(module.gate_up_proj)):
                token, slot = torch.where(index == expert)
                if not len(token):
                    continue
                by_down = gradient[token] * routing[token, slot, None]
                x = states[token]
                by_gate_up, hidden = _swiglu_gradient(module, expert, x, by_down)
                for linear in linears:
                    part, count = linear.part
                    if linear.writes_residual:
                        capture.add(linear, by_down, hidden, module.down_proj[expert], expert)
                    else:
                        weight = module.gate_up_proj[expert].chunk(count)[part]
                        capture.add(linear, by_gate_up.chunk(count, dim=-1)[part], x, weight, expert)

        output.register_hook(receive)

    return hook


def _swiglu_gradient(module: nn.Module, expert: int, x: Tensor, by_down: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by one expert's gate and up [tokens, 2 * intermediate], and what its down projection reads.

    by_down: the gradient by the expert's output [tokens, hidden].
    """
    experts: Any = module
    gate_up = (x @ experts.gate_up_proj[expert].T).requires_grad_()
    with torch.enable_grad():
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = experts.act_fn(gate) * up
    (gradient,) = torch.autograd.grad(hidden, gate_up, by_down @ experts.down_proj[expert])
    return gradient, hidden.detach()
