"""Which type every tensor of the output gets, and what that takes on disk: known before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import BLOCK, MAX_COLS, Companions, CQType, packed_shape, section_name

from ..settings import Grouping, Settings
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

Q8_0_BLOCK, Q8_0_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]


@dataclass(frozen=True)
class Part:
    """One tensor of the GGUF file: array shape and dtype as handed to the writer."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    ggml_type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def _ids_part(section: PlannedTensor, ids: list[int]) -> Part:
    return Part(Companions.of(section.name).experts, (len(ids),), np.int32, GGMLQuantizationType.I32)


@dataclass(frozen=True)
class PlannedTensor:
    """A weight [..., cols] of the output. note: why it has another type than asked for ("" if it has not).

    expert_types: each expert's type where they differ, else (); type then names all that occur.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    grouping: Grouping
    note: str = ""
    expert_types: tuple[str, ...] = ()

    def of_types(self, types: Sequence[str]) -> PlannedTensor:
        """The same of another type, or of one type per expert."""
        kinds = sorted(set(types))
        return replace(self, type="+".join(kinds), expert_types=tuple(types) if len(kinds) > 1 else ())

    def sections(self) -> list[tuple[list[int], PlannedTensor]]:
        """Per type of a weight whose experts have several: whose matrices, and the part of the file that holds them."""
        found = []
        for i, kind in enumerate(self.type.split("+")):
            ids = [expert for expert, own in enumerate(self.expert_types) if own == kind]
            name, shape = section_name(self.name, i), (len(ids), *self.shape[1:])
            found.append((ids, replace(self, name=name, shape=shape, type=kind, expert_types=())))
        return found

    def of_expert(self, number: int) -> PlannedTensor:
        """One expert's matrix."""
        own = self.expert_types[number] if self.expert_types else self.type
        return replace(self, shape=self.shape[1:], type=own, expert_types=())

    @property
    def cq(self) -> CQType | None:
        """The clustered type, None for an ordinary one. Of a section, where there are any."""
        return CQType[self.type.upper()] if self.type.startswith("cq") else None

    @property
    def n_weights(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, companions included."""
        return sum(part.nbytes for part in self.parts())

    @property
    def bpw(self) -> float:
        """Bits per weight, companions included."""
        return 8 * self.nbytes / self.n_weights

    def parts(self) -> list[Part]:
        """The GGUF tensors of this weight: itself, and its companions if it is clustered; those of all its sections."""
        if self.expert_types:
            return [part for ids, section in self.sections() for part in [*section.parts(), _ids_part(section, ids)]]
        if self.cq:
            return self._clustered_parts(self.cq)
        if self.type == "q8_0":
            shape = (*self.shape[:-1], self.shape[-1] // Q8_0_BLOCK * Q8_0_BYTES)
            return [Part(self.name, shape, np.uint8, GGMLQuantizationType.Q8_0)]
        dtype = np.float16 if self.type == "f16" else np.float32
        return [Part(self.name, self.shape, dtype, GGMLQuantizationType[self.type.upper()])]

    def _clustered_parts(self, cq: CQType) -> list[Part]:
        *rows, cols = self.shape
        books = (*rows[:-1], -(-rows[-1] // self.grouping.codebook_rows))
        names, i8 = Companions.of(self.name), GGMLQuantizationType.I8
        codebook_cols = cols if self.grouping.group_size == -1 else self.grouping.group_size
        n_centroids = -(-cols // codebook_cols) * cq.n_centroids
        parts = [
            Part(self.name, packed_shape(self.shape, cq), np.uint8, GGMLQuantizationType(cq)),
            Part(names.centroids, (*books, n_centroids), np.int8, i8),
            Part(names.scales, tuple(rows), np.float32, GGMLQuantizationType.F32),
        ]
        if self.grouping.scale_group > 0:
            parts.append(Part(names.group_scales, (*rows, -(-cols // self.grouping.scale_group)), np.int8, i8))
        return parts


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
        outside = (GGUF_NAMES[EMBEDDING], GGUF_NAMES[HEAD], GGUF_BIASES[HEAD_BIAS])
        return [t for t in self.tensors if t.name not in outside]


def make_plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Choose all types; CQError if --tensor-type asks for something impossible or matches nothing.

    Sensitive linears become Q8_0 where that leaves the whole below half a bit more than --bits.
    """
    if settings.method == "paper" or settings.float_type:
        return _plan_with(checkpoint, settings, settings.cq.name.lower())
    plan = _plan_with(checkpoint, settings, "q8_0")
    return plan if plan.bpw <= settings.cq.bits + 0.5 else _plan_with(checkpoint, settings, settings.cq.name.lower())


def _hadamard_block(checkpoint: Checkpoint, settings: Settings) -> int:
    layers = range(checkpoint.config.num_hidden_layers)
    linears = [(linear, i) for i in layers for linear in checkpoint.arch_of(i).linears if linear.hadamard]
    shapes = [checkpoint.expected_shape(linear, i) for linear, i in linears]
    return BLOCK if settings.hadamard and all(shape[-1] % BLOCK == 0 for shape in shapes) else 0


def _plan_with(checkpoint: Checkpoint, settings: Settings, sensitive: str) -> Plan:
    planner = _Planner(settings)
    config = checkpoint.config
    head_shape = (config.vocab_size, config.hidden_size)
    first = [planner.float32(name, factors.shape) for name, factors in rope_tensors(config).items()]
    first.append(planner.matrix(GGUF_NAMES[EMBEDDING], head_shape, "q8_0"))
    layers = []
    for i in range(config.num_hidden_layers):
        arch = checkpoint.arch_of(i)
        tensors = [planner.float32(spec.in_file(i), checkpoint.expected_shape(spec, i)) for spec in arch.unquantized]
        for linear in arch.linears:
            kind = "f32" if linear.float32 else sensitive if linear.sensitive else settings.cq.name.lower()
            kind = "q8_0" if linear.q8_0 else kind
            tensors.append(planner.matrix(linear.in_file(i), checkpoint.expected_shape(linear, i), kind))
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
        self.grouping, self.overrides, self.float_type = settings.grouping, settings.overrides, settings.float_type
        self.unused = list(settings.overrides)

    def float32(self, name: str, shape: tuple[int, ...]) -> PlannedTensor:
        return PlannedTensor(name, tuple(shape), "f32", self.grouping)

    def matrix(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTensor:
        if self.float_type and kind != "f32":
            kind = self.float_type
        matches = [override for override in self.overrides if override.pattern.search(name)]
        if not matches:
            return self._fit(name, shape, kind)
        self.unused = [override for override in self.unused if override not in matches]
        planned = self._fit(name, shape, matches[-1].type)
        if planned.note:
            raise CQError(f"--tensor-type {matches[-1].pattern.pattern}={matches[-1].type}: {name}: {planned.note}")
        return planned

    def _fit(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTensor:
        """The nearest larger type that the input width allows."""
        cols, note = shape[-1], ""
        if kind.startswith("cq") and (cols % BLOCK or cols > MAX_COLS):
            kind, note = "q8_0", f"{cols} columns: not a multiple of {BLOCK} up to {MAX_COLS}"
        if kind == "q8_0" and cols % Q8_0_BLOCK:
            kind, note = "f16", f"{cols} columns: not a multiple of {Q8_0_BLOCK}"
        return PlannedTensor(name, shape, kind, self.grouping, note)

    def require_all_used(self) -> None:
        for override in self.unused:
            raise CQError(f"--tensor-type {override.pattern.pattern}={override.type}: no matrix has such a name")
