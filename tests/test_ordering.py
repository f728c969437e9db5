"""Barriers: every operation that needs another thread's result waits for it, and most others do not."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_bridge.format import CQType
from pyggml_bridge.models import load_model
from pyggml_bridge.ordering import Access, Ordering

from .tiny_gguf import Tiny, write_tiny


def access(reads: str, writes: str, rows: str | None = None) -> Access:
    return Access(frozenset(reads), frozenset(writes), rows)


def waits(*accesses: Access) -> list[bool]:
    ordering = Ordering()
    return [ordering.waits(one) for one in accesses]


def test_who_waits():
    assert waits(access("x", "a"), access("x", "b")) == [False, False]  # two readers
    assert waits(access("x", "a"), access("a", "b")) == [False, True]  # reads what was written
    assert waits(access("x", "a"), access("y", "x")) == [False, True]  # overwrites what was read
    assert waits(access("x", "a"), access("y", "a")) == [False, True]  # overwrites what was written
    assert waits(access("x", "a"), access("x", "b"), access("y", "c"), access("a", "d")) == [False, False, False, True]
    assert waits(access("x", "a"), access("a", "b"), access("a", "c")) == [False, True, False]  # one barrier for both
    assert waits(access("x", "a", "tokens"), access("a", "b", "tokens")) == [False, False]  # each thread has its rows
    assert waits(access("x", "a", "tokens"), access("a", "b", "slots")) == [False, True]
    assert waits(access("x", "a", "tokens"), access("a", "b")) == [False, True]


@pytest.mark.parametrize("seed", range(20))
def test_a_barrier_stands_between_all_that_conflict(seed):
    rng = np.random.default_rng(seed)
    some = [Access(*(frozenset(rng.integers(0, 12, 2)) for _ in "rw"), rng.choice([None, 1, 2])) for _ in range(60)]
    barriers = np.cumsum(waits(*some))
    for later in range(60):
        for earlier in range(later):
            if some[later].must_follow(some[earlier]):
                assert barriers[earlier] < barriers[later]


def test_experts_of_several_types_do_not_wait_for_each_other(tmp_path):
    waiting = []
    for cqs in ((), (CQType.CQ4, CQType.CQ2, CQType.CQ3, CQType.CQ4)):
        write_tiny(tmp_path / "m.gguf", Tiny(n_experts=4, expert_cqs=cqs))
        waiting.append(waits_of(load_model(tmp_path / "m.gguf")))
    assert sum(waiting[0]) == sum(waiting[1])
    assert len(waiting[1]) == len(waiting[0]) + 2 * 3 * 2  # two layers, three linears, two more types


def test_barriers_of_a_model(tmp_path):
    """Ten a layer of 16 operations: q, rope, attention, its quantizer, attn_output, norm, gate, SwiGLU, down, norm."""
    write_tiny(tmp_path / "m.gguf", Tiny())
    waiting = waits_of(load_model(tmp_path / "m.gguf"))
    embed_norm, select_norm_head = 1, 3  # the first norm has its rows from the embedding
    assert sum(waiting) == 2 * 10 - embed_norm + select_norm_head
    assert len(waiting) > 2 * 16


def waits_of(model):
    ((ops, _),) = model._backend._segments
    return [op.waits for op in ops]
