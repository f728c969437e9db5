"""Standard streams and signals of a command: closed or full streams, narrow encodings, SIGTERM and SIGHUP."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO, cast

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, after which a command cleans up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        """number: the signal's."""
        super().__init__(number)
        self.number = number


class _Closed(io.TextIOBase):
    """Standard output that was closed before the command began."""

    def write(self, text: str) -> int:
        """Fail as a write to the closed descriptor does."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class _Results:
    """Standard output, whose errors name it."""

    def __init__(self, stream: TextIO) -> None:
        """stream: where the results go."""
        self._stream = stream

    def write(self, text: str) -> int:
        """As TextIO's."""
        with _named():
            return self._stream.write(text)

    def flush(self) -> None:
        """As TextIO's."""
        with _named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


class _Messages:
    """Standard error, whose own failures are ignored: no work is lost because a message could not be written."""

    def __init__(self, stream: TextIO) -> None:
        """stream: where the messages go."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Standard streams that a command can use without a look at how it was started, until the block ends.

    A closed input is empty, closed messages vanish, and writing to a closed output is an OSError. Characters that the
    output's encoding lacks are written as escapes.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    _occupy_standard_descriptors()
    sys.stdin = before[0] or open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stdout = cast(TextIO, _Results(before[1] or cast(TextIO, _Closed())))
    sys.stderr = cast(TextIO, _Messages(before[2] or open(os.devnull, "w", encoding="utf-8")))  # noqa: PTH123, SIM115
    if isinstance(before[1], io.TextIOWrapper):
        before[1].reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _occupy_standard_descriptors() -> None:
    """Without this the first file that is opened becomes descriptor 1 or 2, and C libraries print into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def close_quietly(stream: TextIO | None) -> None:
    """What a stream cannot write goes nowhere, silently, when Python ends."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), cast(TextIO, stream).fileno())


@contextmanager
def raised_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated, unless whoever started the process had them ignored (nohup)."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is signal.SIG_DFL:
            signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, _: FrameType | None) -> None:
    for other in SIGNALS:  # cleaning up is not interrupted a second time
        signal.signal(other, signal.SIG_IGN)
    raise Terminated(number)
