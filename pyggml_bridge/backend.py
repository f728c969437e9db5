"""What runs a program: the CPU backend (cpu/) and the CUDA backend (cuda/) look the same to a model.

Here is their interface, and what both do with a program: the steps that they lower, and the segments of a program that
was cut in two.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pyggml_bridge.operations import Combine, CopyColumns, Linear, Op, Recv, Rope, Rows, Send, SwiGLU, Value
from pyggml_bridge.program import Program

Q8_0_BLOCK = 32

Arrays: TypeAlias = list[NDArray[np.float32]]
Segments: TypeAlias = Generator[Arrays, Arrays, NDArray[np.float32]]
Work = TypeVar("Work")


class Backend(Protocol):
    """A program bound to buffers for batches of up to n_batch tokens, with its KV cache."""

    name: str

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """Per MoE layer the experts [n_batch, top_k] of the last batch."""

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """Logits [n_outputs, vocab] of the batch's last rows, which the next run may overwrite.

        tokens: int32 [n], n <= n_batch, stored in the KV cache from `position` on.
        """

    def refresh(self, array: NDArray[Any]) -> None:
        """Called when an array that the program's operations read has changed its contents."""


class Partition(Protocol):
    """A backend of one of the two partitions of a program: it waits where it needs values of the other partition."""

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """As Backend's, of the MoE layers whose experts this partition chooses."""

    def segments(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> Segments:
        """As Backend.run, segment by segment.

        After each segment but the last the generator yields the values that it sends, float32 [rows, width] each, and
        is resumed with the values that it receives. Both may be overwritten when the segment after next begins. The
        generator returns the logits, which have no rows if the other partition computes them.
        """

    def refresh(self, array: NDArray[Any]) -> None:
        """As Backend.refresh; the array may be one that only the other partition reads."""


def finish(segments: Segments) -> NDArray[np.float32]:
    """The logits of a program that was not cut in two, so that its one segment sends nothing."""
    try:
        next(segments)
    except StopIteration as end:
        return end.value
    raise AssertionError("a partition cannot run alone")


@dataclass
class Segment(Generic[Work]):
    """Operations that run without the other partition, as a backend lowers them, and the values sent and received after
    them."""

    work: list[Work] = field(default_factory=list)
    sends: list[Value] = field(default_factory=list)
    recvs: list[Value] = field(default_factory=list)

    @property
    def hands_over(self) -> bool:
        """Whether the other partition goes on after it."""
        return bool(self.sends or self.recvs)


def segment_of(segments: list[Segment[Work]], op: Op | Quantize) -> Segment[Work]:
    """The segment of the next operation, appended to `segments` if it is new; Send and Recv are entered in it."""
    handed = isinstance(op, Send | Recv)
    if not segments or (segments[-1].hands_over and not handed):
        segments.append(Segment())
    if isinstance(op, Send):
        segments[-1].sends.append(op.x)
    if isinstance(op, Recv):
        segments[-1].recvs.append(op.out)
    return segments[-1]


def row_count(value: Value, n_tokens: int, n_outputs: int) -> int:
    """Rows of a value in a batch."""
    return n_outputs if value.rows is Rows.OUTPUTS else n_tokens * value.top_k


@dataclass(frozen=True)
class Quantize:
    """The int8 or int4 form of x [rows, width].

    group: columns that share a scale, 32 for Q8_0; 0 for the whole row, as CQ types have it. parts: equal parts of a
    row, each of which is quantized as if it were a row.
    """

    x: Value
    group: int
    parts: int = 1


@dataclass(frozen=True)
class Step:
    """One operation for a backend. activation: what a linear layer reads instead of its x; done: values and activations
    that no later step reads, so that their memory is free."""

    op: Op | Quantize
    activation: Quantize | None
    done: list[Value | Quantize]


def steps(program: Program) -> Iterator[Step]:
    """The program's operations with activations quantized where a matrix needs them, once for all that read them."""
    last_use = {value: i for i, op in enumerate(program.ops) for value in values_of(op)}
    if program.logits is not None:
        last_use[program.logits] = len(program.ops)
    live: set[Quantize] = set()
    for i, op in enumerate(program.ops):
        activation = None
        if isinstance(op, Linear) and op.w.is_quantized:
            parts = op.w.n_experts if op.routing is None else 1
            activation = Quantize(op.x, Q8_0_BLOCK if op.w.type == GGMLQuantizationType.Q8_0 else 0, parts)
            if activation not in live:
                live.add(activation)
                yield Step(activation, None, [])
        done: list[Value | Quantize] = [value for value in values_of(op) if last_use[value] == i]
        stale = [quantized for quantized in live if quantized.x in done or quantized.x is updated_in_place(op)]
        stale.sort(key=lambda quantized: (quantized.group, quantized.parts))
        live.difference_update(stale)
        yield Step(op, activation, [*done, *stale])


def values_of(op: Op) -> list[Value]:
    """The values that an operation reads or writes."""
    return [value for field in fields(op) if isinstance(value := getattr(op, field.name), Value)]


def updated_in_place(op: Op) -> Value | None:
    """The value that the operation changes while it keeps some of its former contents, or adds to them."""
    if isinstance(op, Rope):
        return op.x
    if isinstance(op, SwiGLU):
        return op.gate
    if isinstance(op, Combine | CopyColumns | Recv) or (isinstance(op, Linear) and op.accumulate):
        return op.out
    return None
