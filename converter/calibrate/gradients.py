"""Gradients of a decoder layer's outputs, gathered while it runs backwards: what its linears' errors would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..source.architecture import Architecture, Linear
from .hessian import INPUT_DAMPING, OUTPUT_DAMPING, Hessian
from .streamed_experts import ROWS, Expert, Gradients, Routed, StreamedExperts

INPUT_STRIDE = 4  # every fourth token's inputs are enough to predict what feedback gains
FLOAT16_BYTES = 2
MAX_OUTPUTS = 8192  # of a linear whose output Hessian is kept; the rows of wider ones are taken as independent
EXPERTS_IN_COMMON = 0.1  # share of an expert's predicted_kl that is the mean of all: another text chooses others


@dataclass(frozen=True)
class PackedHessian:
    """A linear's output Hessian as it is kept on disk: float16 [out, out], relative to the diagonal's mean."""

    matrix: Tensor
    tokens: int

    @classmethod
    def of(cls, hessian: Hessian) -> PackedHessian:
        """Rounded to float16."""
        mean = hessian.matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return cls((hessian.matrix / mean).half(), hessian.tokens)

    def hessian(self) -> Hessian:
        """In float32 again, to be damped by all of the columns per row."""
        return Hessian.of(self.matrix.float(), self.tokens, OUTPUT_DAMPING)


def output_hessian_bytes(linear: Linear, shape: tuple[int, ...]) -> int:
    """Bytes of the packed output Hessians of a linear [..., out, in]: those of all experts where each has its own."""
    *n_experts, out, _ = shape
    own = n_experts[0] if n_experts and not linear.writes_residual else 1
    return FLOAT16_BYTES * out * out * own if out <= MAX_OUTPUTS else 0


@dataclass(frozen=True)
class LayerSensitivity:
    """What gradients say of a layer.

    token_weights: linear input -> [tokens], mean 1; outputs: linear -> its output Hessian, one or one per expert.
    """

    token_weights: dict[str, Tensor]
    outputs: dict[str, list[PackedHessian]]

    def state_dict(self) -> dict[str, Any]:
        """Dicts, lists and tensors, as a work folder can keep them."""
        outputs = {name: [(x.matrix, x.tokens) for x in entries] for name, entries in self.outputs.items()}
        return {"token_weights": self.token_weights, "outputs": outputs}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> LayerSensitivity:
        """Inverse of state_dict."""
        outputs = {name: [PackedHessian(*entry) for entry in entries] for name, entries in saved["outputs"].items()}
        return cls(saved["token_weights"], outputs)


class GradientCapture:
    """Gathers the gradients of one decoder layer's outputs."""

    def __init__(self, arch: Architecture, module: nn.Module, n_experts: int) -> None:
        """Nothing seen yet."""
        self.norms: dict[tuple[str, str], list[Tensor]] = {}  # linear input, linear -> gradient norms of each batch
        self.inputs: dict[str, Hessian] = {}  # linear -> of some of its inputs, weighted by |g|^2, all experts together
        self.outputs: dict[str, Hessian] = {}  # linear -> output Hessian; experts' own are packed one by one
        self.packed: dict[str, list[PackedHessian]] = {}  # linear -> finished output Hessians
        self.gains: dict[
            str, list[float]
        ] = {}  # linear -> what feedback from row to row leaves, of each output Hessian
        self.energy: dict[str, Tensor] = {}  # linear -> sum of (g e)^2 over tokens, [1] or [n_experts]
        self.linears = [linear for linear in arch.linears if linear.measured]
        self.expert_linears = [linear for linear in self.linears if linear.experts]
        for linear in self.linears:
            self.energy[linear.name] = torch.zeros(n_experts if linear.experts else 1, dtype=torch.float64)

    def add(self, linear: Linear, gradient: Tensor, x: Tensor, weight: Tensor, expert: int = 0) -> Tensor:
        """Add gradients [tokens, out] by the outputs of weight [out, in] for inputs x [tokens, in].

        Returns the gradients' norms [tokens].
        """
        norms = gradient.norm(dim=-1)
        row_energy = weight.square().mean(dim=1)  # of independent errors of the weights, relative to their row
        self.energy[linear.name][expert] += float((gradient.square() @ row_energy) @ x.square().sum(dim=-1))
        inputs = self.inputs.setdefault(linear.name, Hessian(x.shape[1], damping=INPUT_DAMPING.of_every(INPUT_STRIDE)))
        inputs.add(x[::INPUT_STRIDE], norms[::INPUT_STRIDE].square())
        if gradient.shape[1] <= MAX_OUTPUTS:
            n_outputs = gradient.shape[1]
            outputs = self.outputs.setdefault(linear.name, Hessian(n_outputs, width=n_outputs, damping=OUTPUT_DAMPING))
            outputs.add(gradient, 1 / norms.clamp_min(torch.finfo(torch.float32).tiny))
        return norms

    def pack(self, linear: Linear) -> None:
        """Finish the output Hessian that `add` has gathered for a linear: the next gradients are another expert's."""
        outputs = self.outputs.pop(linear.name, None)
        if outputs is None:  # an expert that no token chose, or too many outputs
            self.packed.setdefault(linear.name, []).append(PackedHessian(torch.zeros(0, 0).half(), 0))
            return
        self.gains.setdefault(linear.name, []).append(outputs.feedback_gain)
        self.packed.setdefault(linear.name, []).append(PackedHessian.of(outputs))

    def result(self) -> LayerSensitivity:
        """A linear input's token weights: gradient norms with mean 1, averaged over the linears that read the input."""
        weights: dict[str, list[Tensor]] = {}
        for (input_name, _), batches in self.norms.items():
            norms = torch.cat(batches)
            mean = norms.mean().clamp_min(torch.finfo(torch.float32).tiny)
            weights.setdefault(input_name, []).append(norms / mean)
        for linear in self.linears:
            if linear.name in self.outputs:
                self.pack(linear)
        return LayerSensitivity(
            {input_name: torch.stack(w).mean(dim=0) for input_name, w in weights.items()}, self.packed
        )

    def predicted_kl(self, n_tokens: int) -> dict[str, list[float]]:
        """Per linear half the mean square of g e for independent errors of the weights, less what feedback gains.

        To be called after `result`, once; nats per token.
        """
        return {linear.name: (self._predicted_kl(linear) / n_tokens).tolist() for linear in self.linears}

    def _predicted_kl(self, linear: Linear) -> Tensor:
        """[1], or [n_experts]: an expert that few tokens chose counts a tenth of the mean one at least."""
        gains = self.gains.get(linear.name, [])
        gain = sum(gains) / len(gains) if gains else 1.0
        energy = self.energy[linear.name]
        shrunk = (1 - EXPERTS_IN_COMMON) * energy + EXPERTS_IN_COMMON * energy.mean()
        inputs = self.inputs.pop(linear.name, None)
        return 0.5 * gain * (inputs.feedback_gain if inputs else 1.0) * shrunk


@contextmanager
def capture_gradients(capture: GradientCapture, module: nn.Module) -> Iterator[None]:
    """While active, running the layer backwards fills the capture with all linears but the experts'."""
    handles = []
    for linear in capture.linears:
        if not linear.experts:
            layer = module.get_submodule(linear.parameter.removesuffix(".weight"))
            handles.append(layer.register_forward_hook(_linear_hook(capture, linear)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(capture: GradientCapture, linear: Linear) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        index, count = linear.row_block
        x = arguments[0].detach().flatten(0, -2)

        def receive(gradient: Tensor) -> None:
            mine = gradient.flatten(0, -2).chunk(count, dim=-1)[index]
            norms = capture.add(linear, mine, x, linear.rows_of(module.get_parameter("weight")))
            capture.norms.setdefault((linear.input, linear.name), []).append(norms)

        output.register_hook(receive)

    return hook


def experts_backward(
    capture: GradientCapture, experts: StreamedExperts, routed: Routed, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradient by the experts' weighted sum [tokens, hidden] to those by what they get, states and weights.

    Fills the capture on the way. All experts' down projections write the same residual stream: they share one output
    Hessian.
    """
    linears = capture.expert_linears
    capture.norms[linears[0].input, linears[0].name] = [gradient.norm(dim=-1)]
    by_states, by_weights = torch.zeros_like(routed.states), torch.zeros_like(routed.weights)
    for number in range(experts.n_experts):
        tokens, slots = routed.rows(number)
        if len(tokens):
            expert = experts.expert(number)
            for token, slot in zip(tokens.split(ROWS), slots.split(ROWS), strict=True):
                by_down = gradient[token] * routed.weights[token, slot, None]
                found = _expert_backward(capture, number, expert, routed.states[token], by_down)
                by_states.index_add_(0, token, found.by_x)
                by_weights[token, slot] = ((found.hidden @ expert.down.T) * gradient[token]).sum(dim=-1)
            del expert, found  # before the next one is read
        for linear in linears:
            if not linear.writes_residual:
                capture.pack(linear)
    return by_states, by_weights


def _expert_backward(capture: GradientCapture, number: int, expert: Expert, x: Tensor, by_down: Tensor) -> Gradients:
    """Of some tokens x [tokens, hidden] of one expert, from the gradient by its output; fills the capture."""
    found = expert.gradients(x, by_down)
    sides = ((found.by_gate, x, expert.gate), (found.by_up, x, expert.up), (by_down, found.hidden, expert.down))
    for linear in capture.expert_linears:
        capture.add(linear, *sides[2 if linear.writes_residual else linear.row_block[0]], number)
    return found
