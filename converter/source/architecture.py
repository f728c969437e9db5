"""How a checkpoint's architecture is described: its tensors, their names in both worlds, and what feeds what.

A decoder layer is handled as a dict {name of the spec: float32 tensor}: norms [n], linears [out, in], all in
transformers' row order. Experts are handled one by one, as a dict of the linears of one. Everything the stages need to
know is in the specs below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Layer = dict[str, Tensor]
HParams = dict[str, int | float | str]  # GGUF metadata below `<architecture>.`


@dataclass(frozen=True)
class Norm:
    """An RMS norm whose scale folds into the linears that read it."""

    name: str  # GGUF stem: blk.N.<name>.weight
    parameter: str  # inside transformers' decoder layer
    bias: str | None = None  # vector with its bias, if it is a LayerNorm: the stream's mean is folded away (fold.py)

    def in_file(self, layer: int) -> str:
        """Name of the GGUF tensor."""
        return f"blk.{layer}.{self.name}.weight"


@dataclass(frozen=True)
class Vector:
    """A bias, or a norm whose scale stays: kept as it is, in float32."""

    name: str  # in GGUF: blk.N.<name>
    parameter: str  # inside transformers' decoder layer
    switch: str | None = None  # config field: where it is false, checkpoints hold no such vector and it is zero
    residual: bool = False  # in the residual stream's basis

    def in_file(self, layer: int) -> str:
        """Name of the GGUF tensor."""
        return f"blk.{layer}.{self.name}"


@dataclass(frozen=True)
class Linear:
    """A linear layer, or the copies of it that all experts hold."""

    name: str  # GGUF stem: blk.N.<name>.weight
    parameter: str  # inside transformers' decoder layer
    input: str  # module whose input it reads; `<experts>.hidden`: what an expert's down projection reads
    norm: str | None = None  # the norm that feeds it: its columns are in the residual basis
    writes_residual: bool = False  # its rows are in the residual basis
    row_block: tuple[int, int] = (0, 1)  # (index, count): which of so many equal row blocks of the parameter it is
    rope_heads: str | None = None  # config field with its number of heads, if its rows go through rope
    experts: bool = False  # one matrix per expert
    on_disk: str | None = None  # another name in checkpoints; `{}` stands for the expert
    float32: bool = False  # tiny and decisive: stays F32
    router: bool = False  # its outputs choose experts
    hadamard: bool = False  # the runner can transform its input, which no norm feeds (docs/format.md)
    sensitive: bool = False  # worth more bits than others where the budget allows
    bias: str | None = None  # vector with its bias, where it can take that of the LayerNorm before it
    view: Callable[[Tensor], Tensor] | None = None  # of the parameter, where it is not a row block of it
    q8_0: bool = False  # small, and not what transformers multiplies as it is: Q8_0 unless --tensor-type says otherwise

    @property
    def measured(self) -> bool:
        """Whether its inputs and the gradients of its outputs are looked at."""
        return not (self.float32 or self.q8_0)

    def in_file(self, layer: int) -> str:
        """Name of the GGUF tensor."""
        return f"blk.{layer}.{self.name}.weight"

    def rows_of(self, parameter: Tensor) -> Tensor:
        """The view of this linear [..., out, in] in the parameter [..., n * out, in]."""
        if self.view:
            return self.view(parameter)
        index, count = self.row_block
        return parameter.unflatten(-2, (count, -1)).select(-3, index)


@dataclass(frozen=True)
class ChannelGroup:
    """Intermediate FFN channels: rows of `producers` and columns of `consumer`, free to permute together."""

    producers: tuple[str, ...]
    consumer: str


@dataclass(frozen=True)
class HeadGroup:
    """Rows of the value projection inside each KV head, with the columns of the output projection that read them.

    value: [kv_heads * head_dim, in], or [kv_heads, head_dim, in]; bias: of it, [kv_heads * head_dim], where it has one.
    """

    value: str
    output: str
    bias: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One model_type. `check` raises CQError for a config field that is not supported, naming it and its value.

    by_layer: the description of one layer, from the configuration and its index, where layers or configurations differ
    in their tensors.
    """

    model_type: str
    gguf_name: str
    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]
    channels: tuple[ChannelGroup, ...]
    heads: HeadGroup
    check: Callable[[Any], None]
    hparams: Callable[[Any], HParams]  # GGUF keys below `<gguf_name>.`
    n_experts: Callable[[Any], int] = lambda config: 0
    gguf_input: bool = False  # a GGUF file of this architecture can be converted
    vectors: tuple[Vector, ...] = ()
    by_layer: Callable[[Any, int], Architecture] | None = None
    head_bias: str | None = None  # config field: whether the head has a bias; None: there is no output.bias
    window: Callable[[Any], int] = lambda config: 0  # keys that attention sees, 0 for all
    correct_rope: Callable[[torch.nn.Module], None] = lambda rotary: None  # what transformers' own computes otherwise

    def at(self, config: Any, layer: int) -> Architecture:
        """The description of one layer."""
        return self.by_layer(config, layer) if self.by_layer else self

    @property
    def has_layer_norms(self) -> bool:
        """Whether its norms subtract the mean and add a bias, the final one too."""
        return any(norm.bias for norm in self.norms)

    @property
    def norm_biases(self) -> list[Vector]:
        """The vectors that are biases of norms."""
        names = {norm.bias for norm in self.norms}
        return [vector for vector in self.vectors if vector.name in names]

    @property
    def unquantized(self) -> list[Norm | Vector]:
        """A layer's tensors that are never quantized, in file order."""
        return [*self.norms, *self.vectors]

    @property
    def specs(self) -> list[Norm | Vector | Linear]:
        """All tensors of a layer, in file order."""
        return [*self.unquantized, *self.linears]

    @property
    def experts_module(self) -> str | None:
        """The module that holds all experts, None in a dense model."""
        return next((linear.input for linear in self.linears if linear.experts), None)

    def install(self, module: torch.nn.Module, layer: Layer) -> None:
        """Copy a layer's tensors into transformers' decoder layer module."""
        with torch.no_grad():
            for spec in self.unquantized:
                module.get_parameter(spec.parameter).copy_(layer[spec.name])
            for linear in self.linears:
                if linear.experts and linear.name not in layer:
                    continue
                linear.rows_of(module.get_parameter(linear.parameter)).copy_(layer[linear.name])


def head_dim_of(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def value_dim_of(config: Any) -> int:
    """Width of a head's values."""
    return getattr(config, "v_head_dim", None) or head_dim_of(config)


def interleave_rope(weight: Tensor, n_heads: int) -> Tensor:
    """Rows [n_heads * head_dim, in] from transformers' halves (i, i + d/2) to llama.cpp's pairs (2i, 2i + 1)."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def split_rope(weight: Tensor, n_heads: int) -> Tensor:
    """Inverse of interleave_rope."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
