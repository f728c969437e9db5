"""Which type every tensor of the output gets, and what that takes on disk: known before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from gguf import GGML_QUANT_SIZES

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import (
    BLOCK,
    EMBEDDINGS_AND_HEAD,
    MAX_COLS,
    CQType,
    FileTensor,
    Grouping,
    TensorType,
    section_name,
    type_name,
    weight_tensors,
)

from ..settings import F16, F32, Q8_0, TENSOR_TYPES, Settings
from ..source.checkpoint import (
    EMBEDDING,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    GGUF_BIASES,
    GGUF_NAMES,
    HEAD,
    HEAD_BIAS,
    Checkpoint,
)
from ..source.rope import rope_tensors

Q8_0_BLOCK, _ = GGML_QUANT_SIZES[Q8_0]


@dataclass(frozen=True)
class PlannedTensor:
    """A weight [..., cols] of the output.

    types: the type of all of it, or one per expert where they differ. note: why it has another type than asked for (""
    if it has not). linear: the name of the linear in the architecture's description ("" for all other tensors).
    """

    name: str
    shape: tuple[int, ...]
    types: tuple[TensorType, ...]
    grouping: Grouping
    note: str = ""
    linear: str = ""

    def of_types(self, types: Sequence[TensorType]) -> PlannedTensor:
        """The same of another type, or of one type per expert."""
        return replace(self, types=tuple(types) if len(set(types)) > 1 else (types[0],))

    @property
    def type(self) -> TensorType:
        """The type of all of it; ValueError if experts differ."""
        (own,) = self.types
        return own

    @property
    def expert_types(self) -> tuple[TensorType, ...]:
        """Each expert's type where they differ, else ()."""
        return self.types if len(self.types) > 1 else ()

    @property
    def type_name(self) -> str:
        """As reports show it: all types that occur, such as `cq3t+cq4`."""
        return "+".join(map(type_name, self._distinct_types))

    @property
    def _distinct_types(self) -> list[TensorType]:
        return sorted(set(self.types), key=type_name)

    def sections(self) -> list[tuple[list[int], PlannedTensor]]:
        """Per type of a weight whose experts have several: whose matrices, and the part of the file that holds them."""
        found = []
        for i, kind in enumerate(self._distinct_types):
            ids = [expert for expert, own in enumerate(self.expert_types) if own == kind]
            name, shape = section_name(self.name, i), (len(ids), *self.shape[1:])
            found.append((ids, replace(self, name=name, shape=shape, types=(kind,))))
        return found

    def of_expert(self, number: int) -> PlannedTensor:
        """One expert's matrix."""
        own = self.types[number] if self.expert_types else self.type
        return replace(self, shape=self.shape[1:], types=(own,))

    @property
    def cq(self) -> CQType | None:
        """The clustered type, None for an ordinary one; ValueError if experts differ."""
        return self.type if isinstance(self.type, CQType) else None

    @property
    def n_weights(self) -> int:
        """Elements."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file, companions included."""
        return sum(tensor.nbytes for tensor in self.file_tensors())

    @property
    def bpw(self) -> float:
        """Bits per weight, companions included."""
        return 8 * self.nbytes / self.n_weights

    def file_tensors(self) -> list[FileTensor]:
        """The GGUF tensors of this weight: itself, and its companions if it is clustered; those of all its sections."""
        if not self.expert_types:
            return weight_tensors(self.name, self.shape, self.type, self.grouping)
        sections = [section for _, section in self.sections()]
        return [
            tensor for s in sections for tensor in weight_tensors(s.name, s.shape, s.type, s.grouping, is_section=True)
        ]


@dataclass(frozen=True)
class Plan:
    """All tensors in file order: rope factors and embedding, the layers, the final norm and the head with biases."""

    first: tuple[PlannedTensor, ...]
    layers: tuple[tuple[PlannedTensor, ...], ...]
    last: tuple[PlannedTensor, ...]
    hadamard: int  # columns per block of the transform before the FFN's last linear, 0: none

    @property
    def tensors(self) -> list[PlannedTensor]:
        """Every tensor in file order."""
        return [*self.first, *(tensor for layer in self.layers for tensor in layer), *self.last]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without metadata and alignment."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight of every tensor except embeddings and head, companions counted."""
        return 8 * self.body_bytes / sum(t.n_weights for t in self._body)

    @property
    def bits(self) -> int:
        """Bits per index of most clustered weights; 0 without any."""
        weights: dict[int, int] = {}
        for tensor in self.tensors:
            for section in [part for _, part in tensor.sections()] if tensor.expert_types else [tensor]:
                if section.cq:
                    weights[section.cq.bits] = weights.get(section.cq.bits, 0) + section.n_weights
        return max(weights, key=lambda bits: weights[bits], default=0)

    @property
    def body_bytes(self) -> int:
        """Bytes of every tensor except embeddings and head."""
        return sum(t.nbytes for t in self._body)

    @property
    def _body(self) -> list[PlannedTensor]:
        return [t for t in self.tensors if t.name not in EMBEDDINGS_AND_HEAD]


def make_plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Choose all types; CQError if --tensor-type asks for something impossible or matches nothing.

    Sensitive linears become Q8_0 where that leaves the whole below half a bit more than --bits.
    """
    if settings.method == "paper" or settings.float_type:
        return _plan_with(checkpoint, settings, settings.cq)
    plan = _plan_with(checkpoint, settings, Q8_0)
    return plan if plan.bpw <= settings.cq.bits + 0.5 else _plan_with(checkpoint, settings, settings.cq)


def _hadamard_block(checkpoint: Checkpoint, settings: Settings) -> int:
    layers = range(checkpoint.config.num_hidden_layers)
    linears = [(linear, i) for i in layers for linear in checkpoint.arch_of(i).linears if linear.hadamard]
    shapes = [checkpoint.expected_shape(linear, i) for linear, i in linears]
    return BLOCK if settings.hadamard and all(shape[-1] % BLOCK == 0 for shape in shapes) else 0


def _plan_with(checkpoint: Checkpoint, settings: Settings, sensitive: TensorType) -> Plan:
    planner = _Planner(settings)
    config = checkpoint.config
    head_shape = (config.vocab_size, config.hidden_size)
    first = [planner.float32(name, factors.shape) for name, factors in rope_tensors(config).items()]
    first.append(planner.matrix(GGUF_NAMES[EMBEDDING], head_shape, Q8_0))
    layers = []
    for i in range(config.num_hidden_layers):
        arch = checkpoint.arch_of(i)
        tensors = [planner.float32(spec.in_file(i), checkpoint.expected_shape(spec, i)) for spec in arch.unquantized]
        for linear in arch.linears:
            kind = F32 if linear.float32 else sensitive if linear.sensitive else settings.cq
            kind = Q8_0 if linear.q8_0 else kind
            planned = planner.matrix(linear.in_file(i), checkpoint.expected_shape(linear, i), kind)
            tensors.append(replace(planned, linear=linear.name))
        layers.append(tuple(tensors))
    last = [planner.float32(GGUF_NAMES[FINAL_NORM], (config.hidden_size,))]
    if checkpoint.arch.has_layer_norms:
        last.append(planner.float32(GGUF_BIASES[FINAL_NORM_BIAS], (config.hidden_size,)))
    if checkpoint.arch.head_bias is not None:
        last.append(planner.float32(GGUF_BIASES[HEAD_BIAS], (config.vocab_size,)))
    last.append(planner.matrix(GGUF_NAMES[HEAD], head_shape, settings.head_type))
    planner.require_all_used()
    return Plan(tuple(first), tuple(layers), tuple(last), _hadamard_block(checkpoint, settings))


class _Planner:
    def __init__(self, settings: Settings) -> None:
        self.grouping, self.overrides = settings.grouping, settings.overrides
        self.float_type = None if settings.float_type is None else TENSOR_TYPES[settings.float_type]
        self.unused = list(settings.overrides)

    def float32(self, name: str, shape: tuple[int, ...]) -> PlannedTensor:
        return PlannedTensor(name, tuple(shape), (F32,), self.grouping)

    def matrix(self, name: str, shape: tuple[int, ...], kind: TensorType) -> PlannedTensor:
        if self.float_type is not None and kind != F32:
            kind = self.float_type
        matches = [override for override in self.overrides if override.pattern.search(name)]
        if not matches:
            return self._fit(name, shape, kind)
        self.unused = [override for override in self.unused if override not in matches]
        planned = self._fit(name, shape, matches[-1].type)
        if planned.note:
            raise CQError(f"--tensor-type {matches[-1]}: {name}: {planned.note}")
        return planned

    def _fit(self, name: str, shape: tuple[int, ...], kind: TensorType) -> PlannedTensor:
        """The nearest larger type that the input width allows."""
        cols, note = shape[-1], ""
        if isinstance(kind, CQType) and (cols % BLOCK or cols > MAX_COLS):
            kind, note = Q8_0, f"{cols} columns: not a multiple of {BLOCK} up to {MAX_COLS}"
        if kind == Q8_0 and cols % Q8_0_BLOCK:
            kind, note = F16, f"{cols} columns: not a multiple of {Q8_0_BLOCK}"
        return PlannedTensor(name, shape, (kind,), self.grouping, note)

    def require_all_used(self) -> None:
        for override in self.unused:
            raise CQError(f"--tensor-type {override}: no matrix has such a name")
