"""One decoder layer run twice: with its original weights and with others, each on hidden states of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate.layer_stream import LayerStream
from ...source.architecture import Architecture, Layer

ATTENTION, FFN, ROUTER = "attention", "ffn", "router"


class LayerPair:
    """transformers' layer `module` holds the original weights; others take their place for one run at a time.

    arch: of this layer; fixed: GGUF stem -> weight that takes the original's place in every run with other weights.
    """

    def __init__(self, stream: LayerStream, arch: Architecture, module: nn.Module, fixed: Layer) -> None:
        """Gradients go to the other weights, not to the module's own."""
        self.stream, self.arch, self.module, self.fixed = stream, arch, module.requires_grad_(False), fixed

    def outputs(self, hidden: Tensor, weights: Layer | None = None) -> dict[str, Tensor]:
        """What attention and FFN write, and the router's logits, for hidden [sequences, n, hidden].

        weights: GGUF stem -> those that take the original's place; None for the original layer.
        """
        found: dict[str, Tensor] = {}
        with _hooks(_output_hooks(self.arch, self.module, found)):
            self._run(hidden, weights)
        return found

    def input_products(self, hidden: Tensor, other_hidden: Tensor, weights: Layer) -> dict[str, Tensor]:
        """Per linear input the diagonals of X~^T X~ and of X~^T X, [2, experts or 1, cols].

        X~: the inputs in the layer with other weights and hidden states; X: those in the original layer, for the same
        tokens and, where there are experts, for the experts that the other layer chose.
        """
        other: dict[str, list[Tensor]] = {}
        own: dict[str, list[Tensor]] = {}
        routing: list[Tensor] = []
        with _hooks(_input_hooks(self.arch, self.module, other, routing)):
            self._run(other_hidden, weights)
        with _hooks(_input_hooks(self.arch, self.module, own, routing)):
            self._run(hidden, None)
        return {name: torch.stack([_products(other[name], x) for x in (other[name], own[name])]) for name in own}

    def _run(self, hidden: Tensor, weights: Layer | None) -> None:
        parameters: dict[str, Tensor] = {}
        if weights is not None:
            replaced = self.fixed | weights
            for linear in self.arch.linears:
                if linear.name in replaced:
                    own = self.module.get_parameter(linear.parameter).detach()
                    linear.rows_of(parameters.setdefault(linear.parameter, own.clone())).copy_(replaced[linear.name])
        self.stream.call(self.module, hidden, parameters)


def _products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum(dim=0) for x, y in zip(a, b, strict=True)])


Hook = tuple[nn.Module, bool, Callable[..., None]]  # before the module runs, or after it


@contextmanager
def _hooks(hooks: list[Hook]) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(h) if before else m.register_forward_hook(h) for m, before, h in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hooks(arch: Architecture, module: nn.Module, found: dict[str, Tensor]) -> list[Hook]:
    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output  # a router gives its logits first

        return hook

    linears = {linear.name: linear for linear in arch.linears}
    modules = {
        ATTENTION: _module_of(linears[arch.heads.output].parameter),
        FFN: "mlp",
    }  # transformers' name everywhere
    for linear in arch.linears:
        if linear.router:
            modules[ROUTER] = _module_of(linear.parameter)
    return [(module.get_submodule(path), False, keep(name)) for name, path in modules.items()]


def _module_of(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _input_hooks(
    arch: Architecture, module: nn.Module, found: dict[str, list[Tensor]], routing: list[Tensor]
) -> list[Hook]:
    """Put the rows of every linear input into found: of the experts' inputs, one entry per expert.

    routing: the chosen experts [tokens, top_k], which the first run puts into the list and later runs follow.
    """

    def dense(input_name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[input_name] = [arguments[0].flatten(0, -2)]

        return hook

    def experts(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        states = arguments[0].flatten(0, -2)
        if not routing:
            routing.append(arguments[1])
        rows = [states[(routing[0] == e).any(dim=-1)] for e in range(len(layer.gate_up_proj))]
        gate_and_up = [(x @ w.T).chunk(2, dim=-1) for x, w in zip(rows, layer.gate_up_proj, strict=True)]
        found[arch.experts_module or ""] = rows
        found[f"{arch.experts_module}.hidden"] = [layer.act_fn(gate) * up for gate, up in gate_and_up]

    inputs = {linear.input for linear in arch.linears if linear.measured and not linear.experts}
    hooks: list[Hook] = [(module.get_submodule(input_name), True, dense(input_name)) for input_name in sorted(inputs)]
    if arch.experts_module:
        hooks.append((module.get_submodule(arch.experts_module), True, experts))
    return hooks
