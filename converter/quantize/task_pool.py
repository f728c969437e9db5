"""Independent pieces of work on several threads, the largest first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

import torch


@dataclass(frozen=True)
class Task:
    """A piece of work: run(n_threads) does it; cost: how long that takes, in any unit."""

    cost: float
    run: Callable[[int], None]


_cancelled = Event()


def stop_point() -> None:
    """For long tasks to call now and then: CancelledError if another task has failed or the user interrupted."""
    if _cancelled.is_set():
        raise CancelledError


def run_tasks(tasks: list[Task], n_threads: int, at_once: int | None = None) -> None:
    """Run all tasks, at most at_once side by side; the first exception of any is raised.

    One matrix at a time on all threads would wait at a barrier after every few rows. What a task computes must not
    depend on its number of threads; torch has one thread inside a task.
    """
    workers = min(n_threads, len(tasks), at_once or n_threads)
    if not workers:
        return
    _cancelled.clear()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1))
    try:
        ordered = sorted(tasks, key=lambda task: -task.cost)
        running = [pool.submit(task.run, n_threads // workers) for task in ordered]
        for done in wait(running, return_when=FIRST_EXCEPTION).done:
            done.result()
    except BaseException:
        _cancelled.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
