"""Checked weights: GGUF tensors -> matrices and vectors of the shapes a model asks for, views of the memory map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import BLOCK, CODEBOOK_ROWS, MAX_COLS, VERSION, Clustered, Companions, CQType, section_name
from pyggml_bridge.reader import GGUFFile, Tensor

MAX_SECTIONS = 8  # parts of a weight cut by its experts' types: one for each type there is
_GGML_TYPES: dict[Any, GGMLQuantizationType] = {
    np.float32: GGMLQuantizationType.F32,
    np.int32: GGMLQuantizationType.I32,
    np.int8: GGMLQuantizationType.I8,
}
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
        self.is_clustered = any(int(tensor.type) in list(CQType) for tensor in file.tensors.values())
        version = file.get("cq.version", int, VERSION if not self.is_clustered else ...)
        if version != VERSION:
            raise CQError(f"{file.path}: CQ format version {version} is not supported (only {VERSION})")
        self.group_size = self._columns("cq.group_size")
        self.scale_group = self._columns("cq.scale_group")
        self.codebook_rows: int = file.get("cq.codebook_rows", int, 1)
        if self.codebook_rows not in CODEBOOK_ROWS:
            raise CQError(f"{file.path}: the key cq.codebook_rows is {self.codebook_rows}, expected 1, 2, 4 or 8")
        self.activation_bits: int = file.get("cq.activation_bits", int, 8)
        if self.activation_bits not in (4, 8):
            raise CQError(f"{file.path}: the key cq.activation_bits is {self.activation_bits}, expected 4 or 8")

    def _columns(self, key: str) -> int:
        value: int = self.file.get(key, int, -1 if not self.is_clustered else ...)
        if value != -1 and (value < BLOCK or value % BLOCK or value > MAX_COLS):
            raise CQError(f"{self.file.path}: the key {key} is {value}, expected -1 or a multiple of {BLOCK}")
        return value

    def hadamard(self, linear: str, width: int) -> int:
        """Columns per block of the Hadamard transform before this linear (`ffn_down`) of `width` inputs; 0: none."""
        key = f"cq.hadamard.{linear}"
        block: int = self.file.get(key, int, 0)
        if block and (block < 2 or block & (block - 1) or width % block):
            raise CQError(f"{self.file.path}: the key {key} is {block}, expected a power of two that divides {width}")
        return block

    @property
    def n_experts(self) -> int:
        """Experts of a layer that has any, 0 in a dense model."""
        arch: str = self.file.get("general.architecture", str)
        count: int = self.file.get(f"{arch}.expert_count", int, 0)
        return count

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self.file.tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of this name and shape."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise CQError(f"{self.file.path}: tensor {name} is missing")
        if tensor.shape != shape:
            raise CQError(f"{self.file.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def _typed(self, name: str, shape: tuple[int, ...], dtype: type[np.number[Any]]) -> NDArray[Any]:
        tensor = self.tensor(name, shape)
        expected = _GGML_TYPES[dtype]
        if tensor.type != expected:
            raise CQError(f"{self.file.path}: tensor {name} is {tensor.type.name}, expected {expected.name}")
        return tensor.data.view(dtype).reshape(shape)

    def vector(self, name: str, n: int) -> NDArray[np.float32]:
        """A float32 [n] tensor (norm weights, biases), checked finite."""
        vector = self._typed(name, (n,), np.float32)
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
        if int(tensor.type) not in list(CQType):
            raise CQError(
                f"{self.file.path}: tensor {name} has type {tensor.type.name}, which this runner does not compute"
            )
        if n_cols > MAX_COLS:
            raise CQError(f"{self.file.path}: tensor {name} has {n_cols} columns, more than {MAX_COLS}")
        return Matrix(name, tensor.type, experts, n_rows, n_cols, tensor.data, self._clustered(tensor, lead, n_cols))

    def experts(self, name: str, n_rows: int, n_cols: int, n_experts: int) -> tuple[Matrix, ...]:
        """The weight [n_experts, n_rows, n_cols] of all experts: one matrix, or one for each of the experts' types."""
        if not self.has(Companions.of(name).experts):
            return (self.matrix(name, n_rows, n_cols, n_experts),)
        parts: list[Matrix] = []
        while self.has(part := section_name(name, len(parts))) and len(parts) < MAX_SECTIONS:
            tensor = self.file.tensors.get(Companions.of(part).experts)
            n = tensor.shape[0] if tensor is not None and tensor.shape else 0
            ids = self._typed(Companions.of(part).experts, (n,), np.int32)
            parts.append(replace(self.matrix(part, n_rows, n_cols, n), experts=ids, section=len(parts)))
        ids = np.concatenate([part.experts for part in parts if part.experts is not None])
        if not np.array_equal(np.sort(ids), np.arange(n_experts)):
            raise CQError(f"{self.file.path}: the parts of {name} do not hold each of {n_experts} experts once")
        return tuple(parts)

    def _clustered(self, tensor: Tensor, lead: tuple[int, ...], n_cols: int) -> Clustered:
        cq, names = CQType(int(tensor.type)), Companions.of(tensor.name)
        codebook_cols = min(n_cols, self.group_size) if self.group_size > 0 else n_cols
        n_codebooks = -(-n_cols // codebook_cols)
        books = (*lead[:-1], -(-lead[-1] // self.codebook_rows))
        scale_cols, group_scales = 0, None
        if self.scale_group > 0:
            scale_cols = min(n_cols, self.scale_group)
            group_scales = self._typed(names.group_scales, (*lead, -(-n_cols // scale_cols)), np.int8)
        return Clustered(
            cq=cq,
            packed=tensor.data.reshape(*lead, n_cols // BLOCK * cq.block_bytes),
            centroids=self._typed(names.centroids, (*books, n_codebooks * cq.n_centroids), np.int8),
            scales=self._typed(names.scales, lead, np.float32),
            group_scales=group_scales,
            codebook_cols=codebook_cols,
            scale_cols=scale_cols,
            codebook_rows=self.codebook_rows,
        )
