"""What a conversion says while it runs, on standard error: warnings and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(
    stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr and sys.stderr.isatty() else 160
)


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


class Advance(Protocol):
    """Moves a progress bar on by `step`; now: what is written beside it."""

    def __call__(self, now: str = "", step: int = 1) -> None:
        """Once per step, or once for many."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr, drawn only on a terminal; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, now="")

        def advance(now: str = "", step: int = 1) -> None:
            bar.update(task, advance=step, now=now)

        yield advance
