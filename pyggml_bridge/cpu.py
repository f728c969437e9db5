"""The CPU backend: lowers a Program to the native library's operations and runs it.

Lowering adds the quantization of activations where a matrix needs it, sends every value a buffer that is reused as soon
as its last reader has run, and marks the operations that have to wait for others (ordering.py).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Quantize, Segment, Segments, Step, finish, row_count, segment_of, steps, values_of
from pyggml_bridge.kv_cache import KVCache
from pyggml_bridge.native import aligned_empty, current_isa, ffi, lib, pointer
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
_BY_ROW = (
    lib.CQ_OP_EMBED, lib.CQ_OP_RMS_NORM, lib.CQ_OP_QUANTIZE, lib.CQ_OP_ROPE, lib.CQ_OP_SWIGLU, lib.CQ_OP_COMBINE,
    lib.CQ_OP_COPY,
)  # fmt: skip


class CPUBackend:
    """A program bound to buffers for batches of up to n_batch tokens."""

    def __init__(self, program: Program, n_batch: int, n_threads: int) -> None:
        """Allocate buffers and lower the program."""
        self.name = f"CPU ({current_isa()})"
        self.n_batch, self.n_threads = n_batch, n_threads
        has_values = any(isinstance(op, Attention) and op.v is not None for op in program.ops)
        sizes = (program.n_layers, program.n_kv_heads, program.n_ctx, program.head_dim)
        self._cache = KVCache(*sizes, has_values=has_values)
        self._n_kv_heads, self._n_ctx = program.n_kv_heads, program.n_ctx
        self._bits = program.activation_bits
        self._keep: list[Any] = []  # what C points to
        self._buffers = _BufferPool()
        self._values: dict[Value, NDArray[np.float32]] = {}
        self._quantized: dict[Quantize, Any] = {}
        self._routings: dict[Routing, Any] = {}
        self._chosen: dict[Routing, NDArray[np.int32]] = {}
        segments = self._lower(program)
        self.routing_ids = [self._chosen[routing] for routing in program.routings]
        self._segments = [(ffi.new("cq_op[]", segment.work), segment) for segment in segments]
        scratch = max(lib.cq_scratch_bytes(ops, len(segment.work), n_threads) for ops, segment in self._segments)
        self._scratch = aligned_empty(scratch)
        self._step = ffi.new("cq_step *")
        self._step.n_threads = n_threads
        self._step.scratch = pointer(self._scratch, "uint8_t *")
        self._logits = self._values[program.logits] if program.logits else np.empty((0, program.vocab_size), np.float32)

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """Logits [n_outputs, vocab] of the batch's last rows: a view that the next run overwrites.

        tokens: int32 [n], n <= n_batch, stored in the KV cache from `position` on.
        """
        return finish(self.segments(tokens, position, n_outputs))

    def refresh(self, array: NDArray[Any]) -> None:
        """As Backend.refresh: operations read the array itself."""

    def segments(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> Segments:
        """As Partition.segments."""
        self._step.tokens = pointer(tokens, "const int32_t *")
        self._step.n_tokens, self._step.position, self._step.n_outputs = len(tokens), position, n_outputs
        for ops, segment in self._segments:
            status = lib.cq_run(ops, len(segment.work), self._step)
            assert status == lib.CQ_OK, f"cq_run refused a program of {len(segment.work)} operations"
            if segment.hands_over:
                received = yield [self._values[v][: row_count(v, len(tokens), n_outputs)] for v in segment.sends]
                for value, array in zip(segment.recvs, received, strict=True):
                    self._values[value][: len(array)] = array
        return self._logits[:n_outputs]

    # ---- lowering ----

    def _lower(self, program: Program) -> list[Segment[Any]]:
        segments: list[Segment[Any]] = []
        ordering = Ordering()
        for step in steps(program):
            segment = segment_of(segments, step.op)
            if isinstance(step.op, Send | Recv):
                for value in values_of(step.op):
                    self._pointer(value)
            else:
                native, reads, writes = self._native(step)
                rows = (native["rows"], native["top_k"]) if native["code"] in _BY_ROW else None
                access = Access(self._places(reads), self._places(writes, _section(step.op)), rows)
                segment.work.append(native | {"waits": ordering.waits(access)})
            for done in step.done:
                if isinstance(done, Quantize):
                    self._buffers.release_all(self._quantized.pop(done))
                else:
                    self._buffers.release(self._values[done])
        return segments

    def _native(self, step: Step) -> tuple[dict[str, Any], list[Any], list[Any]]:
        """A step as a cq_op, and what it reads and writes."""
        op = step.op
        if isinstance(op, Quantize):
            part = _part_of(op.x, op.parts)
            self._quantized[op] = self._activation(part, op.group)
            arguments = {"x": self._pointer(op.x), "out": self._quantized[op], "n": part.width}
            return _native_op(lib.CQ_OP_QUANTIZE, part, "quantize", arguments), [op.x], [self._quantized[op]]
        if not isinstance(op, Linear):
            return self._simple(op), _read(op), _written(op)
        if step.activation is None:
            return self._linear(op, ffi.NULL), _read(op), _written(op)
        activation = self._quantized[step.activation]
        routing = [op.routing] if op.routing else []
        return self._linear(op, activation), [activation, *routing], [op.out]

    def _simple(self, op: Op) -> Any:
        at = self._pointer
        match op:
            case Embed():
                return _native_op(
                    lib.CQ_OP_EMBED, op.out, "embed", {"table": self._matrix(op.table), "out": at(op.out)}
                )
            case RmsNorm():
                weight = self._array(op.weight, "const float *")
                arguments = {"x": at(op.x), "weight": weight, "out": at(op.out), "n": len(op.weight), "eps": op.eps}
                arguments |= {"bias": self._array(op.bias, "const float *")}
                return _native_op(
                    lib.CQ_OP_RMS_NORM, _part_of(op.x, op.x.width // len(op.weight)), "rms_norm", arguments
                )
            case Rope():
                n_heads, n_rot = op.x.width // op.head_dim, op.cos_sin.shape[1] * 2
                table = self._array(op.cos_sin, "const float *")
                arguments = {"x": at(op.x) + op.first, "cos_sin": table, "n_heads": n_heads, "head_dim": op.head_dim}
                arguments |= {"n_rot": n_rot, "interleaved": op.interleaved}
                return _native_op(lib.CQ_OP_ROPE, op.x, "rope", arguments)
            case Attention():
                return self._attention(op)
            case SwiGLU():
                arguments = {"gate": at(op.gate), "up": at(op.up), "out": at(op.gate), "n": op.gate.width}
                arguments |= {"hadamard": op.hadamard}
                return _native_op(lib.CQ_OP_SWIGLU, op.gate, "swiglu", arguments)
            case Route():
                arguments = {"logits": at(op.logits), "routing": self._routing(op.routing)}
                arguments |= {"scoring": op.scoring.value, "normalize": op.normalize}
                arguments |= {
                    "n_groups": op.n_groups,
                    "top_groups": op.top_groups,
                    "scale": op.scale,
                    "jitter": op.jitter,
                }
                return _native_op(lib.CQ_OP_ROUTE, op.logits, "route", arguments)
            case Combine():
                arguments = {"y": at(op.y), "routing": self._routing(op.routing), "out": at(op.out), "n": op.out.width}
                return _native_op(lib.CQ_OP_COMBINE, op.out, "combine", arguments)
            case SelectOutputs():
                arguments = {"x": at(op.x), "out": at(op.out), "n": op.x.width}
                return _native_op(lib.CQ_OP_SELECT_OUTPUTS, op.out, "select_outputs", arguments)
            case CopyColumns():
                x, out = _part_of(op.x, op.parts), _part_of(op.out, op.parts)
                arguments = {"x": at(op.x) + op.first, "out": at(op.out) + op.at, "n": op.n}
                arguments |= {"x_width": x.width, "out_width": out.width}
                return _native_op(lib.CQ_OP_COPY, x, "copy", arguments)
        raise AssertionError(f"no lowering for {type(op).__name__}")

    def _linear(self, op: Linear, activation: Any) -> Any:
        gather = op.routing is not None and op.x.rows is Rows.TOKENS
        arguments = {
            "w": self._matrix(op.w),
            "x": self._pointer(op.x),
            "act": activation,
            "bias": self._array(op.bias, "const float *"),
            "routing": ffi.NULL if op.routing is None else self._routing(op.routing),
            "out": self._pointer(op.out),
            "gather": gather,
            "accumulate": op.accumulate,
        }
        rows = op.out if op.routing else _part_of(op.out, op.w.n_experts)
        return _native_op(lib.CQ_OP_LINEAR, rows, "linear", arguments)

    def _attention(self, op: Attention) -> Any:
        arguments = {name: self._pointer(getattr(op, name)) for name in ("q", "k", "out")}
        arguments |= {"v": ffi.NULL if op.v is None else self._pointer(op.v)}
        values = None if op.v is None or self._cache.v is None else self._cache.v[op.layer]
        arguments |= {"k_cache": self._array(self._cache.k[op.layer], "uint16_t *")}
        arguments |= {"v_cache": self._array(values, "uint16_t *")}
        arguments |= {"n_heads": op.q.width // op.head_dim, "n_kv_heads": self._n_kv_heads, "head_dim": op.head_dim}
        arguments |= {"value_dim": op.value_dim, "n_ctx": self._n_ctx, "window": op.window, "scale": op.scale}
        return _native_op(lib.CQ_OP_ATTENTION, op.out, "attention", arguments)

    def _places(self, used: list[Any], section: int | None = None) -> frozenset[Any]:
        """What stands for values, activations and routings where operations are put in order.

        A value stands in as many places as a weight can have sections, since these fill different rows of it.
        """
        sections = range(MAX_SECTIONS) if section is None else [section]
        places: list[Any] = []
        for one in used:
            if isinstance(one, Value):
                places += [(self._values[one].ctypes.data, i) for i in sections]
            elif isinstance(one, Routing):
                places.append(one)
            else:
                places += [array.ctypes.data for array in self._buffers.owners[one]]
        return frozenset(places)

    # ---- what C points to ----

    def _array(self, array: NDArray[Any] | None, ctype: str) -> Any:
        self._keep.append(array)
        return pointer(array, ctype)

    def _pointer(self, value: Value) -> Any:
        if value not in self._values:
            n_rows = self.n_batch * value.top_k
            self._values[value] = self._buffers.take(np.float32, (n_rows, value.width))
        return pointer(self._values[value], "float *")

    def _activation(self, x: Value, group: int) -> Any:
        n_rows = self.n_batch * x.top_k
        q = self._buffers.take(np.int8, (n_rows, x.width))
        n_scales = x.width // group if group else 1
        scales, sums = (self._buffers.take(kind, (n_rows, n_scales)) for kind in (np.float32, np.int32))
        # Blocks of 32 belong to Q8_0 tensors, which keep 8 bits whatever the file's activation bits.
        activation = ffi.new("cq_activation *", {"bits": 8 if group else self._bits, "group": group})
        activation.q, activation.scales = pointer(q, "int8_t *"), pointer(scales, "float *")
        activation.sums = pointer(sums, "int32_t *")
        self._buffers.owners[activation] = [q, scales, sums]
        self._keep.append(activation)
        return activation

    def _routing(self, routing: Routing) -> Any:
        if routing not in self._routings:
            n_slots = self.n_batch * routing.top_k
            ids, order = np.zeros((self.n_batch, routing.top_k), np.int32), np.zeros(n_slots, np.int32)
            weights, offsets = np.zeros(n_slots, np.float32), np.zeros(routing.n_experts + 1, np.int32)
            struct = ffi.new("cq_routing *", {"n_experts": routing.n_experts, "top_k": routing.top_k})
            struct.ids, struct.order = self._array(ids, "int32_t *"), self._array(order, "int32_t *")
            struct.offsets, struct.weights = self._array(offsets, "int32_t *"), self._array(weights, "float *")
            self._routings[routing], self._chosen[routing] = struct, ids
        return self._routings[routing]

    def _matrix(self, matrix: Matrix) -> Any:
        struct = native_matrix(matrix)
        self._keep += [struct, matrix]
        return struct


def native_matrix(matrix: Matrix) -> Any:
    """The cq_matrix of a weight; the caller keeps both alive."""
    clustered = matrix.clustered
    struct = ffi.new("cq_matrix *", {"type": int(matrix.type), "n_experts": matrix.n_experts})
    struct.n_rows, struct.n_cols = matrix.n_rows, matrix.n_cols
    struct.data = pointer(matrix.data, "const uint8_t *")
    struct.experts = pointer(matrix.experts, "const int32_t *")
    if clustered is not None:
        struct.codebook_cols, struct.scale_cols = clustered.codebook_cols, clustered.scale_cols
        struct.codebook_rows = clustered.codebook_rows
        struct.centroids = pointer(clustered.centroids, "const int8_t *")
        struct.group_scales = pointer(clustered.group_scales, "const int8_t *")
        struct.scales = pointer(clustered.scales, "const float *")
    return struct


def _part_of(x: Value, parts: int) -> Value:
    """The rows that x [tokens or slots, width] is if each of its rows is `parts` of them."""
    return x if parts == 1 else Value(x.width // parts, Rows.SLOTS, x.top_k * parts)


def _native_op(code: int, shape: Value, member: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"code": code, "rows": shape.rows.value, "top_k": shape.top_k, "u": {member: arguments}}


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
    """Everything else that it touches."""
    touched = [getattr(op, field.name) for field in fields(op)]
    return [one for one in touched if isinstance(one, Value | Routing) and one not in _written(op)]


class _BufferPool:
    """Buffers by size; one given back is handed out again for the next value of that size."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._bytes: dict[int, NDArray[np.uint8]] = {}  # address -> buffer in use
        self.owners: dict[Any, list[NDArray[Any]]] = {}

    def take(self, dtype: Any, shape: tuple[int, int]) -> NDArray[Any]:
        n_bytes = np.dtype(dtype).itemsize * shape[0] * shape[1]
        free = self._free[n_bytes]
        buffer = free.pop() if free else aligned_empty(n_bytes)
        self._bytes[buffer.ctypes.data] = buffer
        return buffer.view(dtype).reshape(shape)

    def release(self, array: NDArray[Any]) -> None:
        buffer = self._bytes.pop(array.ctypes.data)
        self._free[buffer.nbytes].append(buffer)

    def release_all(self, owner: Any) -> None:
        for array in self.owners.pop(owner):
            self.release(array)
