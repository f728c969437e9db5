"""The types of tensors: the seven CQ types, and those of ggml's that stand beside them in a file."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

BLOCK = 64
CODEBOOK_ROWS = (1, 2, 4, 8)  # how many rows may share codebooks: clustering takes eight side by side
MAX_COLS = 65536  # the int32 accumulator's bound, see native/src/kernels.h
FILE_TYPES = {  # general.file_type of files of one stock type
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


class CQType(IntEnum):
    """GGUF tensor type ids of the clustered types, far from any in use elsewhere.

    bits: per weight, of the packed indices. trellis: whether the rows above take part in an index, which then has one
    bit more than is stored.
    """

    bits: int
    trellis: bool

    def __new__(cls, number: int, bits: int = 0, trellis: bool = False) -> CQType:
        """From a row of the table; CQType(number) finds the member."""
        member = int.__new__(cls, number)
        member._value_, member.bits, member.trellis = number, bits, trellis
        return member

    CQ2 = 17202, 2, False
    CQ3 = 17203, 3, False
    CQ4 = 17204, 4, False
    CQ5 = 17205, 5, False
    CQ2T = 17212, 2, True
    CQ3T = 17213, 3, True
    CQ4T = 17214, 4, True

    @classmethod
    def of_bits(cls, bits: int) -> CQType:
        """The type without a trellis of 2 to 5 bits per weight."""
        return next(cq for cq in cls if cq.bits == bits and not cq.trellis)

    @property
    def n_centroids(self) -> int:
        """Entries of a codebook."""
        return 1 << self.bits + self.trellis

    @property
    def block_bytes(self) -> int:
        """Bytes of a packed block of 64 indices."""
        return BLOCK * self.bits // 8


TensorType: TypeAlias = CQType | GGMLQuantizationType  # of a weight: one of ours, or a stock type as it is


def cq_type(kind: int) -> CQType | None:
    """The clustered type of this id; None if the id is of another type."""
    return CQType(kind) if kind in CQType._value2member_map_ else None


def type_name(kind: TensorType) -> str:
    """As options and reports show it: `cq3t`, `q8_0`."""
    return kind.name.lower()


def register() -> None:
    """Teach gguf-py the CQ types (idempotent): its reader and writer then handle our files like any other."""
    members, values = GGMLQuantizationType._member_map_, GGMLQuantizationType._value2member_map_
    for cq in CQType:
        if cq.value in values:
            continue
        member = int.__new__(GGMLQuantizationType, cq.value)
        member._name_, member._value_ = cq.name, cq.value
        members[cq.name] = values[cq.value] = member
        GGMLQuantizationType._member_names_.append(cq.name)
        GGML_QUANT_SIZES[member] = (BLOCK, cq.block_bytes)


def packed_shape(shape: tuple[int, ...], cq: CQType) -> tuple[int, ...]:
    """Byte shape of packed indices of a [..., rows, cols] weight; ValueError unless cols is a multiple of 64."""
    if shape[-1] % BLOCK:
        raise ValueError(f"{cq.name} needs a multiple of {BLOCK} columns, not {shape[-1]}")
    return (*shape[:-1], shape[-1] // BLOCK * cq.block_bytes)
