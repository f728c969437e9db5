"""Tasks on several threads: all of them run, an error ends the others, torch keeps its threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from codequant_converter.quantize.task_pool import Task, run_tasks, stop_point


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n_tasks", [0, 1, 3, 20])
def test_every_task_runs_once_on_its_share_of_threads(n_tasks, n_threads):
    before, seen, lock = torch.get_num_threads(), [], threading.Lock()

    def run(i: int, threads: int) -> None:
        with lock:
            seen.append((i, threads, torch.get_num_threads()))

    run_tasks([Task(i, lambda n, i=i: run(i, n)) for i in range(n_tasks)], n_threads)
    assert sorted(i for i, *_ in seen) == list(range(n_tasks))
    assert all(threads == max(1, n_threads // max(1, n_tasks)) and own == 1 for _, threads, own in seen)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_no_more_run_side_by_side_than_may(at_once):
    running, most, lock = 0, 0, threading.Lock()

    def run(n_threads: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    run_tasks([Task(1, run)] * 12, 4, at_once)
    assert most == at_once


def test_the_largest_comes_first():
    order: list[int] = []
    run_tasks([Task(cost, lambda n, cost=cost: order.append(cost)) for cost in (3, 9, 1, 7)], 1)
    assert order == [9, 7, 3, 1]


@pytest.mark.parametrize("cost_of_failing", [0, 2])
def test_an_error_is_raised_and_ends_what_still_runs(cost_of_failing):
    started, ended = threading.Event(), threading.Event()

    def endless(n_threads: int) -> None:
        started.set()
        try:
            while True:
                stop_point()
                time.sleep(0.001)
        finally:
            ended.set()

    def fails(n_threads: int) -> None:
        started.wait(10)
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_tasks([Task(cost_of_failing, fails), Task(1, endless)], 2)
    assert ended.is_set()
    run_tasks([Task(1, lambda n: stop_point())], 1)  # and the next ones run again
