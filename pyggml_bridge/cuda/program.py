"""A program as launches of CUDA kernels over device buffers; sizes are known before anything is allocated."""

from __future__ import annotations

from pyggml_bridge.backend import Quantize, Segment, segment_of, steps, values_of
from pyggml_bridge.cuda import kernels as ck
from pyggml_bridge.cuda import linear as cl
from pyggml_bridge.cuda.buffers import Buffers
from pyggml_bridge.cuda.fusion import fused
from pyggml_bridge.cuda.lowering import Build, Lowering
from pyggml_bridge.cuda.memory import Buffer
from pyggml_bridge.errors import CQError
from pyggml_bridge.operations import (
    Attention,
    Op,
    Recv,
    Rope,
    Route,
    Rows,
    Send,
    SwiGLU,
    Value,
)
from pyggml_bridge.program import Program


class CUDAProgram:
    """Launches of a program for batches of up to n_batch tokens. memory: all that it needs.

    `inputs` holds int32 [1 + n_batch]: the first token's position, then the tokens.
    """

    def __init__(self, program: Program, n_batch: int, device: ck.DeviceInfo) -> None:
        """Plan the memory; CQError naming what the kernels cannot address or compute."""
        for op in program.ops:
            _require_kernel(op)
        self.n_batch, self.vocab_size = n_batch, program.vocab_size
        self._program, self._buffers = program, Buffers(n_batch)
        self.memory, self.inputs = self._buffers.memory, self._buffers.inputs
        self.segments = self._lower(device)
        assert program.logits is not None  # the output is on the GPU, whatever is not
        self.logits = self.buffer_of(program.logits)

    def _lower(self, device: ck.DeviceInfo) -> list[Segment[tuple[Rows, Build]]]:
        segments: list[Segment[tuple[Rows, Build]]] = []
        lowering = Lowering(self._program, self._buffers, device)
        for group in fused(steps(self._program)):
            first = group[0].op
            segment = segment_of(segments, first)
            if isinstance(first, Send | Recv):
                for value in values_of(first):
                    self._buffers.value(value)
            else:
                segment.work.append((_rows(first), lowering.build(group)))
            for done in (done for step in group for done in step.done):
                self._buffers.give_back(done)
        return segments

    @property
    def nbytes(self) -> int:
        """Device memory of all buffers."""
        return sum(buffer.allocated_bytes for buffer in self.memory.buffers)

    @property
    def routing_ids(self) -> list[tuple[Buffer, int]]:
        """Per MoE layer the experts int32 [n_batch, top_k], and top_k."""
        return [(self._buffers.routing(routing).ids, routing.top_k) for routing in self._program.routings]

    def buffer_of(self, value: Value) -> Buffer:
        """Where the program has a value, float32 [rows, width]."""
        return self._buffers.value(value)

    def launches(self, segment: int, n_tokens: int, n_outputs: int) -> list[ck.Launch]:
        """The kernels of one batch in a segment, in order. Call it when the buffers have addresses."""
        counts = {Rows.TOKENS: n_tokens, Rows.SLOTS: n_tokens, Rows.OUTPUTS: n_outputs}
        work = self.segments[segment].work
        return [launch for rows, build in work if counts[rows] for launch in build(counts[rows], n_tokens)]


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
