"""A program as operations of the native library.

Lowering adds the quantization of activations where a matrix needs it, gives every value a buffer that is reused as soon
as its last reader has run, and marks the operations that have to wait for others (ordering.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Quantize, Segment, Step, segment_of, steps, values_of
from pyggml_bridge.cpu.memory import Activation, BufferPool, RoutingArrays, native_matrix
from pyggml_bridge.kv_cache import KVCache
from pyggml_bridge.native import ffi, lib, pointer
from pyggml_bridge.operations import (
    Attention,
    Combine,
    CopyColumns,
    Embed,
    Linear,
    Op,
    Recv,
    RmsNorm,
    Rope,
    Route,
    Routing,
    Rows,
    SelectOutputs,
    Send,
    SwiGLU,
    Value,
)
from pyggml_bridge.ordering import Access, Ordering
from pyggml_bridge.program import Program
from pyggml_bridge.weights import MAX_SECTIONS, Matrix

# Operations whose threads share out rows, each computed from the same row of what they read.
_BY_ROW = frozenset({"embed", "rms_norm", "quantize", "rope", "swiglu", "combine", "copy"})

Touched: TypeAlias = Value | Routing | Activation  # what operations read or write


@dataclass(frozen=True)
class NativeOp:
    """A cq_op of cq.h: `kind` names its arguments in the union and, in capitals, its code.

    rows: the value whose rows it works on, one by one. waits: a barrier stands before it.
    """

    kind: str
    rows: Value
    arguments: Mapping[str, Any]
    waits: bool = False

    @property
    def struct(self) -> dict[str, Any]:
        """What cffi makes the cq_op of."""
        return {
            "code": getattr(lib, f"CQ_OP_{self.kind.upper()}"),
            "rows": self.rows.rows.value,
            "top_k": self.rows.top_k,
            "waits": self.waits,
            "u": {self.kind: self.arguments},
        }


def _native(kind: str, rows: Value, **arguments: Any) -> NativeOp:
    return NativeOp(kind, rows, arguments)


class CPUProgram:
    """Native operations of a program for batches of up to n_batch tokens, and the memory that they work in.

    values: float32 [n_batch * top_k, width] each; values that do not live at the same time share memory.
    """

    def __init__(self, program: Program, n_batch: int) -> None:
        """Lower the program; CQError if there is no memory for its KV cache."""
        self._n_batch, self._bits = n_batch, program.activation_bits
        has_values = any(isinstance(op, Attention) and op.v is not None for op in program.ops)
        self._n_kv_heads, self._n_ctx = program.n_kv_heads, program.n_ctx
        sizes = (program.n_layers, program.n_kv_heads, program.n_ctx, program.head_dim)
        self._cache = KVCache(*sizes, has_values=has_values)
        self._pool = BufferPool()
        self._keep: list[Any] = []  # what C points to
        self._activations: dict[Quantize, Activation] = {}
        self.values: dict[Value, NDArray[np.float32]] = {}
        self.routings: dict[Routing, RoutingArrays] = {}
        self.segments = self._lower(program)

    def _lower(self, program: Program) -> list[Segment[NativeOp]]:
        segments: list[Segment[NativeOp]] = []
        ordering = Ordering()
        for step in steps(program):
            segment = segment_of(segments, step.op)
            if isinstance(step.op, Send | Recv):
                for value in values_of(step.op):
                    self._place(value)
            else:
                native = self._operation(step)
                waits = ordering.waits(self._access(step, native))
                segment.work.append(replace(native, waits=waits))
            for done in step.done:
                arrays = self._activations.pop(done).arrays if isinstance(done, Quantize) else (self.values[done],)
                for array in arrays:
                    self._pool.give_back(array)
        return segments

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache and of all values, once they are all used."""
        cache = sum(array.nbytes for array in (self._cache.k, self._cache.v) if array is not None)
        return cache + self._pool.nbytes

    # ---- operations ----

    def _operation(self, step: Step) -> NativeOp:
        op = step.op
        if isinstance(op, Quantize):
            part = _part_of(op.x, op.parts)
            activation = Activation.take(self._pool, (self._n_batch * part.top_k, part.width), op.group, self._bits)
            self._activations[op] = activation
            self._keep.append(activation)
            return _native("quantize", part, x=self._pointer(op.x), out=activation.struct, n=part.width)
        if isinstance(op, Linear):
            return self._linear(op, self._activations[step.activation].struct if step.activation else ffi.NULL)
        if isinstance(op, Attention):
            return self._attention(op)
        return self._simple(op)

    def _simple(self, op: Op) -> NativeOp:
        at = self._pointer
        match op:
            case Embed():
                return _native("embed", op.out, table=self._matrix(op.table), out=at(op.out))
            case RmsNorm():
                n = len(op.weight)
                weight, bias = self._floats(op.weight), self._floats(op.bias)
                rows = _part_of(op.x, op.x.width // n)
                return _native("rms_norm", rows, x=at(op.x), weight=weight, bias=bias, out=at(op.out), n=n, eps=op.eps)
            case Rope():
                return _native(
                    "rope", op.x, x=at(op.x) + op.first, cos_sin=self._floats(op.cos_sin),
                    n_heads=op.x.width // op.head_dim, head_dim=op.head_dim, n_rot=op.cos_sin.shape[1] * 2,
                    interleaved=op.interleaved,
                )  # fmt: skip
            case SwiGLU():
                gate, n = at(op.gate), op.gate.width
                return _native("swiglu", op.gate, gate=gate, up=at(op.up), out=gate, n=n, hadamard=op.hadamard)
            case Route():
                return _native(
                    "route", op.logits, logits=at(op.logits), routing=self._routing(op.routing),
                    scoring=op.scoring.value, normalize=op.normalize, n_groups=op.n_groups, top_groups=op.top_groups,
                    scale=op.scale, jitter=op.jitter,
                )  # fmt: skip
            case Combine():
                routing = self._routing(op.routing)
                return _native("combine", op.out, y=at(op.y), routing=routing, out=at(op.out), n=op.out.width)
            case SelectOutputs():
                return _native("select_outputs", op.out, x=at(op.x), out=at(op.out), n=op.x.width)
            case CopyColumns():
                x, out = _part_of(op.x, op.parts), _part_of(op.out, op.parts)
                widths = {"x_width": x.width, "out_width": out.width}
                return _native("copy", x, x=at(op.x) + op.first, out=at(op.out) + op.at, n=op.n, **widths)
        raise AssertionError(f"no lowering for {type(op).__name__}")

    def _linear(self, op: Linear, activation: Any) -> NativeOp:
        return _native(
            "linear", op.out if op.routing else _part_of(op.out, op.w.n_experts), w=self._matrix(op.w),
            x=self._pointer(op.x), act=activation, bias=self._floats(op.bias),
            routing=self._routing(op.routing) if op.routing else ffi.NULL, out=self._pointer(op.out),
            gather=op.routing is not None and op.x.rows is Rows.TOKENS, accumulate=op.accumulate,
        )  # fmt: skip

    def _attention(self, op: Attention) -> NativeOp:
        values = None if op.v is None or self._cache.v is None else self._cache.v[op.layer]
        return _native(
            "attention", op.out, q=self._pointer(op.q), k=self._pointer(op.k), out=self._pointer(op.out),
            v=ffi.NULL if op.v is None else self._pointer(op.v),
            k_cache=self._kept(self._cache.k[op.layer], "uint16_t *"), v_cache=self._kept(values, "uint16_t *"),
            n_heads=op.q.width // op.head_dim, n_kv_heads=self._n_kv_heads, head_dim=op.head_dim,
            value_dim=op.value_dim, n_ctx=self._n_ctx, window=op.window, scale=op.scale,
        )  # fmt: skip

    # ---- order ----

    def _access(self, step: Step, native: NativeOp) -> Access:
        """What the operation touches, by which others are put in order with it."""
        op = step.op
        reads: Sequence[Touched]
        writes: Sequence[Touched]
        if isinstance(op, Quantize):
            reads, writes = [op.x], [self._activations[op]]
        elif isinstance(op, Linear) and step.activation is not None:
            reads, writes = [self._activations[step.activation], *([op.routing] if op.routing else [])], [op.out]
        else:
            reads, writes = _read(op), _written(op)
        rows = (native.rows.rows, native.rows.top_k) if native.kind in _BY_ROW else None
        return Access(self._places(reads), self._places(writes, _section(op)), rows)

    def _places(self, touched: Sequence[Touched], section: int | None = None) -> frozenset[Any]:
        """What stands for values, activations and routings where operations are put in order.

        A value stands in as many places as a weight can have sections, since these fill different rows of it.
        """
        sections = range(MAX_SECTIONS) if section is None else [section]
        places: list[Any] = []
        for one in touched:
            if isinstance(one, Value):
                places += [(self.values[one].ctypes.data, i) for i in sections]
            elif isinstance(one, Routing):
                places.append(one)
            else:
                places += [array.ctypes.data for array in one.arrays]
        return frozenset(places)

    # ---- what C points to ----

    def _kept(self, array: NDArray[Any] | None, ctype: str) -> Any:
        """Pointer to an array that then lives as long as the program; NULL for None."""
        self._keep.append(array)
        return pointer(array, ctype)

    def _floats(self, array: NDArray[np.float32] | None) -> Any:
        return self._kept(array, "const float *")

    def _place(self, value: Value) -> NDArray[np.float32]:
        """The value's array, taken from the pool at its first use."""
        if value not in self.values:
            self.values[value] = self._pool.take(np.float32, (self._n_batch * value.top_k, value.width))
        return self.values[value]

    def _pointer(self, value: Value) -> Any:
        return pointer(self._place(value), "float *")

    def _routing(self, routing: Routing) -> Any:
        if routing not in self.routings:
            self.routings[routing] = RoutingArrays.allocate(routing, self._n_batch)
        return self.routings[routing].struct

    def _matrix(self, matrix: Matrix) -> Any:
        struct = native_matrix(matrix)
        self._keep += [struct, matrix]
        return struct


def _part_of(x: Value, parts: int) -> Value:
    """The rows that x [tokens or slots, width] has if each of its rows is `parts` of them."""
    return x if parts == 1 else Value(x.width // parts, Rows.SLOTS, x.top_k * parts)


def _section(op: Op | Quantize) -> int | None:
    """The section of a weight cut by type that a linear layer multiplies."""
    return op.w.section if isinstance(op, Linear) and op.w.experts is not None else None


def _written(op: Op) -> list[Value | Routing]:
    match op:
        case Rope():
            return [op.x]
        case SwiGLU():
            return [op.gate]
        case Route():
            return [op.routing]
        case Send():
            return []
    return [op.out]


def _read(op: Op) -> list[Value | Routing]:
    """Every value and routing that the operation touches and does not write."""
    touched = [getattr(op, field.name) for field in fields(op)]
    return [one for one in touched if isinstance(one, Value | Routing) and one not in _written(op)]
