"""Steps of a program as functions that return their kernels' launches.

Buffers have no addresses yet when a program is lowered, and the number of rows changes from batch to batch: so each
step becomes a function, a Build, that is called when both are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Quantize, Step
from pyggml_bridge.cuda import kernels as ck
from pyggml_bridge.cuda import linear as cl
from pyggml_bridge.cuda.buffers import Buffers
from pyggml_bridge.cuda.memory import Buffer, address, device_routing
from pyggml_bridge.operations import (
    Attention,
    Combine,
    CopyColumns,
    Embed,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Route,
    Rows,
    SelectOutputs,
    SwiGLU,
)
from pyggml_bridge.program import Program

Build: TypeAlias = Callable[[int, int], list[ck.Launch]]  # from the operation's rows and the batch's tokens


class Lowering:
    """Builds of one program's steps over its buffers."""

    def __init__(self, program: Program, buffers: Buffers, device: ck.DeviceInfo) -> None:
        """Nothing is lowered yet."""
        self._program, self._buffers, self._device = program, buffers, device
        self._bits = program.activation_bits

    def build(self, group: list[Step]) -> Build:
        """The launches of steps that one kernel computes together (fusion.py)."""
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
                table, out, tokens = self._buffers.matrix(op.table), self._buffers.value(op.out), self._buffers.inputs
                return lambda n, _: [cl.embed(table(), tokens.address + 4, out.address, n)]
            case Rope():
                return self._rope(op)
            case SwiGLU():
                gate, up = self._buffers.value(op.gate), self._buffers.value(op.up)
                return lambda n, _: [ck.swiglu(gate.address, up.address, op.gate.width, op.hadamard, n * op.gate.top_k)]
            case SelectOutputs():
                x, out = self._buffers.value(op.x), self._buffers.value(op.out)
                return lambda n, all_: [ck.select_rows(x.address, out.address, op.x.width, all_ - n, n)]
            case CopyColumns():
                x, out = self._buffers.value(op.x), self._buffers.value(op.out)
                part_widths = (op.x.width // op.parts, op.out.width // op.parts)
                start, to, each = 4 * op.first, 4 * op.at, op.parts * op.x.top_k
                return lambda n, _: [ck.copy_columns(x.address + start, out.address + to, part_widths, op.n, n * each)]
        raise AssertionError(f"no kernel for {type(op).__name__}")

    def _rope(self, op: Rope) -> Build:
        x, cos_sin, position = self._buffers.value(op.x), self._buffers.host(op.cos_sin), self._buffers.inputs
        heads, n_rot, start = (op.x.width // op.head_dim, op.head_dim), 2 * op.cos_sin.shape[1], 4 * op.first

        def build(n: int, _: int) -> list[ck.Launch]:
            addresses = (x.address + start, address(cos_sin), position.address)
            return [ck.rope(*addresses, heads, n_rot, n, interleaved=op.interleaved)]

        return build

    def _norm(self, ops: Sequence[Op | Quantize]) -> Build:
        """A norm, with the sum of experts before it and the quantizer after it where `ops` have them."""
        [op] = [op for op in ops if isinstance(op, RmsNorm)]
        x, out, width = self._buffers.value(op.x), self._buffers.value(op.out), len(op.weight)
        weight, bias = self._buffers.host(op.weight), self._buffers.host(op.bias)
        parts, then, before = op.x.width // width * op.x.top_k, ops[-1], ops[0]
        q, scales = self._buffers.activation(then) if isinstance(then, Quantize) else (None, None)
        y = self._buffers.value(before.y) if isinstance(before, Combine) else None

        def build(n: int, _: int) -> list[ck.Launch]:
            quantized = ck.Quantized(q.address, scales.address, self._bits) if q and scales else None
            to = ck.norm(address(weight), out.address, width, op.eps, address(bias), quantized)
            if not isinstance(before, Combine):
                return [ck.rms_norm(x.address, to, n * parts)]
            routing = device_routing(before.routing, self._buffers.routing(before.routing))
            return [cl.combine_norm(address(y), routing, x.address, to, n)]

        return build

    def _swiglu_quantize(self, op: SwiGLU, then: Quantize) -> Build:
        gate, up, to = self._buffers.value(op.gate), self._buffers.value(op.up), self._quantized(then)
        sizes = (op.gate.width, op.hadamard)
        return lambda n, _: [ck.swiglu_quantize(gate.address, up.address, to(), *sizes, n * op.gate.top_k)]

    def _quantized(self, op: Quantize) -> Callable[[], ck.Quantized]:
        q, scales = self._buffers.activation(op)
        return lambda: ck.Quantized(q.address, scales.address, self._bits)

    def _quantize(self, op: Quantize) -> Build:
        x, (q, scales) = self._buffers.value(op.x), self._buffers.activation(op)
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
        w, x = self._buffers.matrix(op.w), self._buffers.value(op.x)
        out, bias = self._buffers.value(op.out), self._buffers.host(op.bias)
        q, scales = self._buffers.activation(activation) if activation else (None, None)
        routing, routed = op.routing, self._buffers.routing(op.routing) if op.routing else None
        gather = routing is not None and op.x.rows is Rows.TOKENS
        places = self._buffers.host(_places(op.w.experts, routing.n_experts)) if routing else None
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
        buffers, routing = self._buffers.routing(op.routing), op.routing
        if isinstance(op, Route):
            logits, groups = self._buffers.value(op.logits), (op.n_groups, op.top_groups)
            choice = cl.Choice(op.scoring.value, op.normalize, *groups, op.scale, op.jitter)
            return lambda n, _: cl.route(logits.address, device_routing(routing, buffers), n, choice)
        y, out, width = self._buffers.value(op.y), self._buffers.value(op.out), op.out.width
        return lambda n, _: [cl.combine(y.address, device_routing(routing, buffers), out.address, width, n)]

    def _attention(self, ops: Sequence[Op | Quantize]) -> Build:
        """The attention that `ops` end with, and the norms and ropes of its queries and keys where `ops` have them."""
        op = ops[-1]
        assert isinstance(op, Attention)
        q, out = self._buffers.value(op.q), self._buffers.value(op.out)
        n_kv_heads, n_ctx = self._program.n_kv_heads, self._program.n_ctx
        widths = [op.head_dim] if op.v is None else [op.head_dim, op.value_dim]
        caches = [self._buffers.new(2 * n_kv_heads * n_ctx * width) for width in widths]
        sizes = (op.q.width // op.head_dim, n_kv_heads, op.head_dim, n_ctx, op.window, op.scale, op.value_dim)
        shape = ck.AttentionShape(*sizes, latent=op.v is None)
        splits = shape.splits(1, self._device.n_processors)
        partial, position = self._buffers.partial(4 * shape.partial_floats(1, splits)), self._buffers.inputs
        before = self._heads(op, ops[:-1], caches) if len(ops) > 1 else self._appends(op, caches)

        def build(n: int, all_: int) -> list[ck.Launch]:
            k_cache, v_cache = caches[0].address, 0 if op.v is None else caches[-1].address
            addresses = (q.address, k_cache, v_cache, out.address, partial.address, position.address)
            return before(n, all_) + ck.attention(shape, addresses, n, splits if n == 1 else 1)

        return build

    def _appends(self, op: Attention, caches: list[Buffer]) -> Build:
        new = [(self._buffers.value(op.k), op.head_dim)]
        if op.v is not None:
            new.append((self._buffers.value(op.v), op.value_dim))
        heads, n_ctx, at = self._program.n_kv_heads, self._program.n_ctx, self._buffers.inputs
        stored = list(zip(new, caches, strict=True))
        return lambda n, _: [
            ck.append(b.address, to.address, at.address, (heads, dim), n_ctx, n) for (b, dim), to in stored
        ]

    def _heads(self, op: Attention, before: Sequence[Op | Quantize], caches: list[Buffer]) -> Build:
        """Norms and ropes of queries and keys, whose results go where attention reads them: the caches and q."""
        norms = {norm.out: norm for norm in before if isinstance(norm, RmsNorm)}
        [rope, _] = [rope for rope in before if isinstance(rope, Rope)]
        assert op.v is not None
        buffers = {"q_out": self._buffers.value(op.q), "v": self._buffers.value(op.v)}
        buffers |= {"position": self._buffers.inputs, "k_cache": caches[0], "v_cache": caches[1]}
        hosted = {"cos_sin": self._buffers.host(rope.cos_sin)}
        epsilons = {}
        for name, value in (("q", op.q), ("k", op.k)):
            self._buffers.value(value)  # planned even if only its norm's input is read: the steps give it back
            norm = norms.get(value)
            buffers[name] = self._buffers.value(norm.x if norm else value)
            hosted[f"{name}_weight"] = self._buffers.host(norm.weight) if norm else None
            epsilons[f"{name}_eps"] = norm.eps if norm else 0.0
        sizes = {"n_heads": op.q.width // op.head_dim, "n_kv_heads": self._program.n_kv_heads}
        sizes |= {"n_ctx": self._program.n_ctx, "head_dim": op.head_dim}
        sizes |= {"n_rot": 2 * rope.cos_sin.shape[1], "interleaved": rope.interleaved}

        def build(n: int, _: int) -> list[ck.Launch]:
            addresses = {name: address(buffer) for name, buffer in (buffers | hosted).items()}
            return [ck.prepare_heads(n, **addresses, **sizes, **epsilons)]

        return build


def _places(experts: NDArray[np.int32] | None, n_experts: int) -> NDArray[np.int32] | None:
    """Which of a section's matrices each expert has, -1 for experts of other sections: int32 [n_experts]."""
    if experts is None:
        return None
    places = np.full(n_experts, -1, np.int32)
    places[experts] = np.arange(len(experts))
    return places
