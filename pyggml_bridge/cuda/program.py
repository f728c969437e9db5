"""A program as launches of CUDA kernels over device buffers; sizes are known before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Quantize, Segment, Step, segment_of, steps, values_of
from pyggml_bridge.cuda import kernels as ck
from pyggml_bridge.cuda import linear as cl
from pyggml_bridge.cuda.fusion import fused
from pyggml_bridge.cuda.memory import Buffer, Memory, RoutingBuffers, address, device_routing
from pyggml_bridge.errors import CQError
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
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Matrix

MAX_EXPERT_BYTES = 1 << 32  # offsets within one expert's matrix are 32 bits wide: codebook.cuh


@dataclass(frozen=True)
class DeviceInfo:
    """What launches depend on. n_processors: streaming multiprocessors."""

    n_processors: int
    tensor_cores: bool = True


Build = Callable[[int, int], list[ck.Launch]]  # from the operation's rows and the batch's tokens


class CUDAProgram:
    """Launches of a program for batches of up to n_batch tokens. memory: all that it needs.

    `inputs` holds int32 [1 + n_batch]: the first token's position, then the tokens.
    """

    def __init__(self, program: Program, n_batch: int, device: DeviceInfo) -> None:
        """Plan the memory; CQError naming what the kernels cannot address or compute."""
        for op in program.ops:
            _require_kernel(op)
        self.memory = Memory()
        self.inputs = self.memory.new(4 * (1 + n_batch))
        self.routings: dict[Routing, RoutingBuffers] = {}
        self.n_batch, self.vocab_size = n_batch, program.vocab_size
        self._device, self._bits = device, program.activation_bits
        self._program = program
        self._partial: dict[int, Buffer] = {}
        self._of: dict[Value | Quantize, tuple[Buffer, ...]] = {}
        self.segments: list[Segment[tuple[Rows, Build]]] = []
        for group in fused(steps(program)):
            first = group[0].op
            segment = segment_of(self.segments, first)
            if isinstance(first, Send | Recv):
                for value in values_of(first):
                    self.buffer_of(value)
            else:
                segment.work.append((self._rows(first), self._build(group)))
            for buffer in (buffer for step in group for done in step.done for buffer in self._of[done]):
                self.memory.give_back(buffer)
        assert program.logits is not None  # the output is on the GPU, whatever is not
        self.logits = self.buffer_of(program.logits)

    @property
    def nbytes(self) -> int:
        """Device memory of all buffers."""
        return sum(buffer.allocated_bytes for buffer in self.memory.buffers)

    @property
    def routing_ids(self) -> list[tuple[Buffer, int]]:
        """Per MoE layer the experts int32 [n_batch, top_k], and top_k."""
        return [(self.routings[routing].ids, routing.top_k) for routing in self._program.routings]

    def launches(self, segment: int, n_tokens: int, n_outputs: int) -> list[ck.Launch]:
        """The kernels of one batch in a segment, in order. Call it when the buffers have addresses."""
        counts = {Rows.TOKENS: n_tokens, Rows.SLOTS: n_tokens, Rows.OUTPUTS: n_outputs}
        work = self.segments[segment].work
        return [launch for rows, build in work if counts[rows] for launch in build(counts[rows], n_tokens)]

    # ---- memory ----

    def buffer_of(self, value: Value) -> Buffer:
        """float32 [rows, width], shared with values that do not live at the same time."""
        if value not in self._of:
            self._of[value] = (self.memory.take(4 * self.n_batch * value.top_k * value.width),)
        return self._of[value][0]

    def _activation(self, quantized: Quantize) -> tuple[Buffer, Buffer]:
        x, n_rows = quantized.x, self.n_batch * quantized.x.top_k
        if quantized not in self._of:
            n_scales = x.width // quantized.group if quantized.group else quantized.parts
            self._of[quantized] = (self.memory.take(n_rows * x.width), self.memory.take(4 * n_rows * n_scales))
        q, scales = self._of[quantized]
        return q, scales

    def _routing(self, routing: Routing) -> RoutingBuffers:
        if routing not in self.routings:
            n_slots = self.n_batch * routing.top_k
            n_tiles = device_routing(routing).max_tiles(self.n_batch)
            sizes = (n_slots, n_slots, n_slots, routing.n_experts + 1, 2 * n_tiles)
            self.routings[routing] = RoutingBuffers(*(self.memory.new(4 * size) for size in sizes))
        return self.routings[routing]

    def _matrix(self, w: Matrix) -> Callable[[], cl.DeviceMatrix]:
        parts = w.clustered
        if w.data.nbytes // w.n_experts >= MAX_EXPERT_BYTES:
            raise CQError(f"--cuda: tensor {w.name} has 4 GiB or more in one matrix")
        data = self.memory.host(w.data)
        assert data is not None
        if parts is None:
            return lambda: cl.DeviceMatrix(int(w.type), w.n_experts, w.n_rows, w.n_cols, data.address)
        centroids, groups, scales = map(self.memory.host, (parts.centroids, parts.group_scales, parts.scales))
        return lambda: cl.DeviceMatrix(
            int(w.type), w.n_experts, w.n_rows, w.n_cols, data.address, address(centroids), address(groups),
            address(scales), parts.codebook_rows, parts.codebook_cols, parts.scale_cols,
        )  # fmt: skip

    # ---- operations ----

    @staticmethod
    def _rows(op: Op | Quantize) -> Rows:
        """What decides how many rows an operation works on."""
        match op:
            case Quantize() | Rope() | Send():
                return op.x.rows
            case SwiGLU():
                return op.gate.rows
            case Route():
                return op.logits.rows
        return op.out.rows

    def _build(self, group: list[Step]) -> Build:
        """Launches of steps that fused() put together."""
        ops = [step.op for step in group]
        match ops[0], ops[-1]:
            case Linear(), _:
                return self._linears(group)
            case _, Attention():
                return self._attention(ops)
            case (RmsNorm(), _) | (_, RmsNorm()) | (Combine(), Quantize()):
                return self._norm(ops)
            case SwiGLU(), Quantize():
                return self._swiglu_quantize(ops[0], ops[-1])
            case Quantize(), _:
                return self._quantize(ops[0])
            case Route() | Combine(), _:
                return self._experts(ops[0])
        return self._simple(ops[0])

    def _simple(self, op: Op | Quantize) -> Build:
        match op:
            case Embed():
                table, out = self._matrix(op.table), self.buffer_of(op.out)
                return lambda n, _: [cl.embed(table(), self.inputs.address + 4, out.address, n)]
            case Rope():
                x, table_ = self.buffer_of(op.x), self.memory.host(op.cos_sin)
                heads, n_rot = (op.x.width // op.head_dim, op.head_dim), 2 * op.cos_sin.shape[1]
                return lambda n, _: [
                    ck.rope(
                        x.address + 4 * op.first,
                        address(table_),
                        self.inputs.address,
                        heads,
                        n_rot,
                        n,
                        interleaved=op.interleaved,
                    )
                ]
            case SwiGLU():
                gate, up = self.buffer_of(op.gate), self.buffer_of(op.up)
                return lambda n, _: [ck.swiglu(gate.address, up.address, op.gate.width, op.hadamard, n * op.gate.top_k)]
            case SelectOutputs():
                x, out = self.buffer_of(op.x), self.buffer_of(op.out)
                return lambda n, all_: [ck.select_rows(x.address, out.address, op.x.width, all_ - n, n)]
            case CopyColumns():
                x, out, widths = self.buffer_of(op.x), self.buffer_of(op.out), (op.x.width, op.out.width)
                part_widths = (widths[0] // op.parts, widths[1] // op.parts)
                start, to, each = 4 * op.first, 4 * op.at, op.parts * op.x.top_k
                return lambda n, _: [ck.copy_columns(x.address + start, out.address + to, part_widths, op.n, n * each)]
        raise AssertionError(f"no kernel for {type(op).__name__}")

    def _norm(self, ops: Sequence[Op | Quantize]) -> Build:
        """A norm; before it the sum of experts and after it the quantizer, if they go with it."""
        [op] = [op for op in ops if isinstance(op, RmsNorm)]
        x, out, width = self.buffer_of(op.x), self.buffer_of(op.out), len(op.weight)
        weight, bias = self.memory.host(op.weight), self.memory.host(op.bias)
        parts, then, before = op.x.width // width * op.x.top_k, ops[-1], ops[0]
        q, scales = self._activation(then) if isinstance(then, Quantize) else (None, None)
        y = self.buffer_of(before.y) if isinstance(before, Combine) else None

        def build(n: int, _: int) -> list[ck.Launch]:
            quantized = ck.Quantized(q.address, scales.address, self._bits) if q and scales else None
            to = ck.norm(address(weight), out.address, width, op.eps, address(bias), quantized)
            if not isinstance(before, Combine):
                return [ck.rms_norm(x.address, to, n * parts)]
            routing = device_routing(before.routing, self._routing(before.routing))
            return [cl.combine_norm(address(y), routing, x.address, to, n)]

        return build

    def _swiglu_quantize(self, op: SwiGLU, then: Quantize) -> Build:
        gate, up, to = self.buffer_of(op.gate), self.buffer_of(op.up), self._quantized(then)
        sizes = (op.gate.width, op.hadamard)
        return lambda n, _: [ck.swiglu_quantize(gate.address, up.address, to(), *sizes, n * op.gate.top_k)]

    def _quantized(self, op: Quantize) -> Callable[[], ck.Quantized]:
        q, scales = self._activation(op)
        return lambda: ck.Quantized(q.address, scales.address, self._bits)

    def _quantize(self, op: Quantize) -> Build:
        x, (q, scales) = self.buffer_of(op.x), self._activation(op)
        width, each, to = op.x.width // op.parts, op.x.top_k * op.parts, self._quantized(op)
        if op.group:
            return lambda n, _: [ck.quantize_blocks(x.address, q.address, scales.address, width, n * each)]
        return lambda n, _: [ck.quantize(x.address, to(), width, n * each)]

    def _linears(self, group: list[Step]) -> Build:
        layers = [self._linear(step.op, step.activation) for step in group if isinstance(step.op, Linear)]

        def build(n: int, _: int) -> list[ck.Launch]:
            (w, operands), *others = (layer(n) for layer in layers)
            device = self._device
            return [cl.linear(w, operands, *others, tensor_cores=device.tensor_cores, n_processors=device.n_processors)]

        return build

    def _linear(self, op: Linear, activation: Quantize | None) -> Callable[[int], cl.Layer]:
        w, x, out, bias = self._matrix(op.w), self.buffer_of(op.x), self.buffer_of(op.out), self.memory.host(op.bias)
        q, scales = self._activation(activation) if activation else (None, None)
        routing, routed = op.routing, self._routing(op.routing) if op.routing else None
        gather = routing is not None and op.x.rows is Rows.TOKENS
        places = self.memory.host(_places(op.w.experts, routing.n_experts)) if routing else None
        parts = 1 if routing else op.w.n_experts

        def build(n: int) -> cl.Layer:
            n_items = n if routing else n * op.out.top_k
            experts = device_routing(routing, routed) if routing else None
            inputs = (x.address, address(q), address(scales), address(bias))
            operands = cl.Operands(
                n_items, out.address, *inputs, experts, gather, op.accumulate, address(places), parts
            )
            return w(), operands

        return build

    def _experts(self, op: Route | Combine) -> Build:
        buffers, routing = self._routing(op.routing), op.routing
        if isinstance(op, Route):
            logits, groups = self.buffer_of(op.logits), (op.n_groups, op.top_groups)
            choice = cl.Choice(op.scoring.value, op.normalize, *groups, op.scale, op.jitter)
            return lambda n, _: cl.route(logits.address, device_routing(routing, buffers), n, choice)
        y, out, width = self.buffer_of(op.y), self.buffer_of(op.out), op.out.width
        return lambda n, _: [cl.combine(y.address, device_routing(routing, buffers), out.address, width, n)]

    def _attention(self, ops: Sequence[Op | Quantize]) -> Build:
        """An attention, the last one, alone or with what comes before it."""
        op = ops[-1]
        assert isinstance(op, Attention)
        q, out = self.buffer_of(op.q), self.buffer_of(op.out)
        n_kv_heads, n_ctx = self._program.n_kv_heads, self._program.n_ctx
        caches = [
            self.memory.new(2 * n_kv_heads * n_ctx * dim)
            for dim in (op.head_dim, op.value_dim)[: 1 + (op.v is not None)]
        ]
        sizes = (op.q.width // op.head_dim, n_kv_heads, op.head_dim, n_ctx, op.window, op.scale, op.value_dim)
        shape = ck.AttentionShape(*sizes, latent=op.v is None)
        splits = shape.splits(1, self._device.n_processors)
        partial_bytes = 4 * shape.partial_floats(1, splits)
        if partial_bytes not in self._partial:  # layers run one after the other
            self._partial[partial_bytes] = self.memory.new(partial_bytes)
        partial = self._partial[partial_bytes]
        before = self._heads(op, ops[:-1], caches) if len(ops) > 1 else self._appends(op, caches)

        def build(n: int, all_: int) -> list[ck.Launch]:
            k_cache, v_cache = caches[0].address, 0 if op.v is None else caches[-1].address
            addresses = (q.address, k_cache, v_cache, out.address, partial.address, self.inputs.address)
            return before(n, all_) + ck.attention(shape, addresses, n, splits if n == 1 else 1)

        return build

    def _appends(self, op: Attention, caches: list[Buffer]) -> Build:
        new = [(self.buffer_of(op.k), op.head_dim)]
        if op.v is not None:
            new.append((self.buffer_of(op.v), op.value_dim))
        heads, n_ctx, at = self._program.n_kv_heads, self._program.n_ctx, self.inputs
        stored = list(zip(new, caches, strict=True))
        return lambda n, _: [
            ck.append(b.address, to.address, at.address, (heads, dim), n_ctx, n) for (b, dim), to in stored
        ]

    def _heads(self, op: Attention, before: Sequence[Op | Quantize], caches: list[Buffer]) -> Build:
        """Norms of heads and rope, stored where attention reads them."""
        norms = {norm.out: norm for norm in before if isinstance(norm, RmsNorm)}
        [rope, _] = [rope for rope in before if isinstance(rope, Rope)]
        assert op.v is not None
        buffers = {"q_out": self.buffer_of(op.q), "v": self.buffer_of(op.v), "position": self.inputs}
        buffers |= {"k_cache": caches[0], "v_cache": caches[1]}
        hosted = {"cos_sin": self.memory.host(rope.cos_sin)}
        epsilons = {}
        for name, value in (("q", op.q), ("k", op.k)):
            self.buffer_of(value)
            norm = norms.get(value)
            buffers[name] = self.buffer_of(norm.x if norm else value)
            hosted[f"{name}_weight"] = self.memory.host(norm.weight) if norm else None
            epsilons[f"{name}_eps"] = norm.eps if norm else 0.0
        sizes = {
            "n_heads": op.q.width // op.head_dim,
            "n_kv_heads": self._program.n_kv_heads,
            "n_ctx": self._program.n_ctx,
        }
        sizes |= {"head_dim": op.head_dim, "n_rot": 2 * rope.cos_sin.shape[1], "interleaved": rope.interleaved}

        def build(n: int, _: int) -> list[ck.Launch]:
            addresses = {name: address(buffer) for name, buffer in (buffers | hosted).items()}
            return [ck.prepare_heads(n, **addresses, **sizes, **epsilons)]

        return build


def _places(experts: NDArray[np.int32] | None, n_experts: int) -> NDArray[np.int32] | None:
    """Which of a part's matrices each expert has, -1 for those of other parts: int32 [n_experts]."""
    if experts is None:
        return None
    places = np.full(n_experts, -1, np.int32)
    places[experts] = np.arange(len(experts))
    return places


def _require_kernel(op: Op) -> None:
    """CQError for what no kernel has room for."""
    if isinstance(op, Route) and op.routing.n_experts > cl.MAX_EXPERTS:
        raise CQError(f"--cuda: more than {cl.MAX_EXPERTS} experts ({op.routing.n_experts}) are not supported")
    if not isinstance(op, Attention) or op.v is None:
        return
    if op.head_dim > ck.MAX_HEAD_DIM:
        raise CQError(f"--cuda: attention heads wider than {ck.MAX_HEAD_DIM} columns ({op.head_dim}) are not supported")
    if op.value_dim != op.head_dim:
        raise CQError(f"--cuda: attention heads of {op.head_dim} columns, values of {op.value_dim}, are not supported")
