"""Checked weights: GGUF tensors -> matrices and vectors of the shapes a model asks for, views of the memory map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import (
    BLOCK,
    CODEBOOK_ROWS,
    MAX_COLS,
    VERSION,
    Clustered,
    Companions,
    CQType,
    FileTensor,
    Grouping,
    Key,
    cq_type,
    find_key,
    section_name,
    weight_tensors,
)
from pyggml_bridge.reader import GGUFFile, Tensor

MAX_SECTIONS = 8  # parts of a weight cut by its experts' types: one for each type there is
STOCK_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)


@dataclass(frozen=True)
class Matrix:
    """A weight [n_experts, n_rows, n_cols] in a type the kernels multiply; `clustered` holds the parts of a CQ type.

    experts: int32 [n_experts], whose matrices these are where the weight is cut by type; None: all experts in order.
    section: which part of the weight this is.
    """

    name: str
    type: GGMLQuantizationType
    n_experts: int
    n_rows: int
    n_cols: int
    data: NDArray[np.uint8]
    clustered: Clustered | None = None
    experts: NDArray[np.int32] | None = None
    section: int = 0

    @property
    def is_quantized(self) -> bool:
        """Whether the kernels multiply it with quantized activations."""
        return self.clustered is not None or self.type == GGMLQuantizationType.Q8_0


class Weights:
    """Tensors of an open file by name; every accessor raises CQError naming the file and tensor if it does not fit."""

    def __init__(self, file: GGUFFile) -> None:
        """Check the file-wide CQ keys."""
        self.file = file
        self._read: set[str] = set()
        self.is_clustered = any(cq_type(tensor.type) for tensor in file.tensors.values())
        version = file.get(Key.CQ_VERSION, int, VERSION if not self.is_clustered else ...)
        if version != VERSION:
            raise CQError(f"{file.path}: CQ format version {version} is not supported (only {VERSION})")
        self.grouping = Grouping(
            self._columns(Key.CQ_GROUP_SIZE),
            self._columns(Key.CQ_SCALE_GROUP),
            self._one_of(Key.CQ_CODEBOOK_ROWS, CODEBOOK_ROWS, 1),
        )
        self.activation_bits = self._one_of(Key.CQ_ACTIVATION_BITS, (4, 8), 8)

    def _one_of(self, key: Key, allowed: tuple[int, ...], default: int) -> int:
        value: int = self.file.get(key, int, default)
        if value not in allowed:
            *others, last = allowed
            expected = f"{', '.join(map(str, others))} or {last}"
            raise CQError(f"{self.file.path}: the key {key} is {value}, expected {expected}")
        return value

    def _columns(self, key: Key) -> int:
        value: int = self.file.get(key, int, -1 if not self.is_clustered else ...)
        if value != -1 and (value < BLOCK or value % BLOCK or value > MAX_COLS):
            raise CQError(f"{self.file.path}: the key {key} is {value}, expected -1 or a multiple of {BLOCK}")
        return value

    def hadamard(self, linear: str, width: int) -> int:
        """Columns per block of the Hadamard transform before this linear (`ffn_down`) of `width` inputs; 0: none."""
        key = find_key(f"cq.hadamard.{linear}")
        block: int = self.file.get(key, int, 0)
        if block and (block < 2 or block & (block - 1) or width % block):
            raise CQError(f"{self.file.path}: the key {key} is {block}, expected a power of two that divides {width}")
        return block

    @property
    def n_experts(self) -> int:
        """Experts of a layer that has any, 0 in a dense model."""
        arch: str = self.file.get(Key.GENERAL_ARCHITECTURE, str)
        count: int = self.file.get(Key.EXPERT_COUNT.of(arch), int, 0)
        return count

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self.file.tensors

    def require_all_read(self) -> None:
        """CQError if the file has tensors that were not asked for: a model that uses them computes something else."""
        unread = [name for name in self.file.tensors if name not in self._read]
        if unread:
            more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            raise CQError(f"{self.file.path}: the architecture has no tensor {', '.join(unread[:3])}{more}")

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of this name and shape."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise CQError(f"{self.file.path}: tensor {name} is missing")
        self._read.add(name)
        if tensor.shape != shape:
            raise CQError(f"{self.file.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def _array(self, expected: FileTensor) -> NDArray[Any]:
        tensor = self.tensor(expected.name, expected.shape)
        if tensor.type != expected.type:
            raise CQError(
                f"{self.file.path}: tensor {tensor.name} is {tensor.type.name}, expected {expected.type.name}"
            )
        return tensor.data.view(expected.dtype).reshape(expected.shape)

    def vector(self, name: str, n: int) -> NDArray[np.float32]:
        """A float32 [n] tensor (norm weights, biases), checked finite."""
        vector = self._array(FileTensor.of(name, (n,), GGMLQuantizationType.F32))
        if not np.isfinite(vector).all():
            raise CQError(f"{self.file.path}: tensor {name} has values that are not finite")
        return vector

    def matrix(self, name: str, n_rows: int, n_cols: int, n_experts: int | None = None) -> Matrix:
        """A weight [n_rows, n_cols], or [n_experts, n_rows, n_cols] if n_experts is given."""
        lead = (n_rows,) if n_experts is None else (n_experts, n_rows)
        tensor = self.tensor(name, (*lead, n_cols))
        experts = n_experts or 1
        if tensor.type in STOCK_TYPES:
            return Matrix(name, tensor.type, experts, n_rows, n_cols, tensor.data)
        cq = cq_type(tensor.type)
        if cq is None:
            raise CQError(
                f"{self.file.path}: tensor {name} has type {tensor.type.name}, which this runner does not compute"
            )
        if n_cols > MAX_COLS:
            raise CQError(f"{self.file.path}: tensor {name} has {n_cols} columns, more than {MAX_COLS}")
        return Matrix(name, tensor.type, experts, n_rows, n_cols, tensor.data, self._clustered(tensor, cq))

    def experts(self, name: str, n_rows: int, n_cols: int, n_experts: int) -> tuple[Matrix, ...]:
        """The weight [n_experts, n_rows, n_cols] of all experts: one matrix, or one for each of the experts' types."""
        if not self.has(Companions.of(name).experts):
            return (self.matrix(name, n_rows, n_cols, n_experts),)
        parts: list[Matrix] = []
        while self.has(part := section_name(name, len(parts))) and len(parts) < MAX_SECTIONS:
            tensor = self.file.tensors.get(Companions.of(part).experts)
            n = tensor.shape[0] if tensor is not None and tensor.shape else 0
            ids = self._array(FileTensor.of(Companions.of(part).experts, (n,), GGMLQuantizationType.I32))
            parts.append(replace(self.matrix(part, n_rows, n_cols, n), experts=ids, section=len(parts)))
        ids = np.concatenate([part.experts for part in parts if part.experts is not None])
        if not np.array_equal(np.sort(ids), np.arange(n_experts)):
            raise CQError(f"{self.file.path}: the parts of {name} do not hold each of {n_experts} experts once")
        return tuple(parts)

    def _clustered(self, tensor: Tensor, cq: CQType) -> Clustered:
        packed, *companions = weight_tensors(tensor.name, tensor.shape, cq, self.grouping)
        centroids, scales, *group_scales = map(self._array, companions)
        n_cols = tensor.shape[-1]
        return Clustered(
            cq=cq,
            packed=tensor.data.reshape(packed.shape),
            centroids=centroids,
            scales=scales,
            group_scales=group_scales[0] if group_scales else None,
            codebook_cols=self.grouping.codebook_cols(n_cols),
            scale_cols=self.grouping.scale_cols(n_cols),
            codebook_rows=self.grouping.codebook_rows,
        )
