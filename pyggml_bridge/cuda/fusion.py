"""Which of a program's steps one kernel computes together: of a token, most launches take longer than their work."""

from __future__ import annotations

from collections.abc import Iterable

from pyggml_bridge.backend import Quantize, Step, updated_in_place
from pyggml_bridge.cuda.kernels import fits_swiglu_quantize
from pyggml_bridge.cuda.linear import MOST_LAYERS, is_clustered
from pyggml_bridge.operations import Attention, Combine, Linear, Op, Recv, RmsNorm, Rope, Send, SwiGLU, Value

Steps = list[Step]


def fused(steps: Iterable[Step]) -> list[Steps]:
    """The steps in groups, each for one kernel or its own launches, in an order that computes the same."""
    todo, groups = quantized_early(list(steps)), []
    while todo:
        n = max(1, _heads(todo), _linears(todo), _combined(todo), _quantized(todo))
        groups.append(todo[:n])
        todo = todo[n:]
    return groups


def quantized_early(steps: Steps) -> Steps:
    """The steps, with the quantizer of a norm's output moved up to the norm, past a router's steps between them."""
    out: Steps = []
    for step in steps:
        at = len(out)
        if isinstance(step.op, Quantize):
            at = next((i + 1 for i, other in enumerate(out) if _norm_of(other, step.op)), at)
            if any(_is_in_the_way(other.op, step.op.x) for other in out[at:]):
                at = len(out)
        out.insert(at, step)
    return out


def _norm_of(step: Step, quantize: Quantize) -> bool:
    return isinstance(step.op, RmsNorm) and step.op.out is quantize.x


def _is_in_the_way(op: Op | Quantize, x: Value) -> bool:
    return isinstance(op, Send | Recv) or (not isinstance(op, Quantize) and updated_in_place(op) is x)


def _quantized(steps: Steps) -> int:
    """2 for a norm or SwiGLU whose rows are then quantized, each as a whole; else 0."""
    if len(steps) < 2:
        return 0
    op, then = steps[0].op, steps[1].op
    if not isinstance(then, Quantize) or then.group or then.parts > 1:
        return 0
    if isinstance(op, RmsNorm):
        return 2 * (then.x is op.out and len(op.weight) == op.x.width)
    if isinstance(op, SwiGLU):
        return 2 * (then.x is op.gate and fits_swiglu_quantize(op.gate.width, op.hadamard))
    return 0


def _combined(steps: Steps) -> int:
    """How many of the first steps are a sum of experts and its norm, quantized or not."""
    if len(steps) < 2:
        return 0
    op, norm = steps[0].op, steps[1].op
    if not isinstance(op, Combine) or not isinstance(norm, RmsNorm):
        return 0
    return (1 + max(1, _quantized(steps[1:]))) * (norm.x is op.out and len(norm.weight) == op.out.width)


def _linears(steps: Steps) -> int:
    """How many of the first steps are linear layers of one launch: the same input, type, width and routing."""
    first, outs = steps[0], []
    for step in steps[:MOST_LAYERS]:
        op, of = step.op, first.op
        if not isinstance(op, Linear) or not isinstance(of, Linear) or op.out in outs:
            break
        shapes = [(x.w.type, x.w.n_experts, x.w.n_cols, x.routing, x.x) for x in (op, of)]
        if not is_clustered(op.w.type) or step.activation != first.activation or shapes[0] != shapes[1]:
            break
        outs.append(op.out)
    return len(outs)


def _heads(steps: Steps) -> int:
    """How many of the first steps are an attention and, before it, norms of heads and rope of queries and keys."""
    n_norms = 0
    while n_norms < min(2, len(steps)) and isinstance(steps[n_norms].op, RmsNorm):
        n_norms += 1
    ops = [step.op for step in steps[n_norms : n_norms + 3]]
    if [type(op) for op in ops] != [Rope, Rope, Attention]:
        return 0
    q, k, attention = ops
    assert isinstance(q, Rope) and isinstance(k, Rope) and isinstance(attention, Attention)
    fits = attention.v is not None and (q.x, k.x) == (attention.q, attention.k) and q.x is not k.x
    fits &= q.head_dim == k.head_dim == attention.head_dim == attention.value_dim
    fits &= q.cos_sin is k.cos_sin and q.interleaved == k.interleaved and q.first == k.first == 0
    fits &= attention.k in steps[n_norms + 2].done  # nobody reads the keys but from the cache
    for step in steps[:n_norms]:
        assert isinstance(step.op, RmsNorm)
        fits &= step.op.out in (q.x, k.x) and step.op.bias is None and len(step.op.weight) == attention.head_dim
    return (n_norms + 3) * fits
