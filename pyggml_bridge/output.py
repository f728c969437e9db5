"""Files that appear under their final name only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyggml_bridge.errors import CQError


def check_writable(path: Path, *, overwrite: bool) -> None:
    """CQError if `path` exists (unless overwrite) or its directory cannot be written: before any long work."""
    if path.is_dir():
        raise CQError(f"{path}: is a directory")
    if path.exists() and not overwrite:
        raise CQError(f"{path}: exists already; --overwrite replaces it")
    if not path.parent.is_dir():
        raise CQError(f"{path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise CQError(f"{path}: the directory {path.parent} is not writable")


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; renamed to it on success, removed on any failure or interrupt."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        publish(temporary, path)
    except OSError as error:
        if error.filename is None:  # of a write, such as to a full disk
            why = error.strerror or f"is the disk full? ({error})"  # numpy's tofile says only how much it wrote
            raise CQError(f"{path}: could not be written: {why}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its final name, once its bytes are on the disk; from another disk by way of a copy."""
    if temporary.stat().st_dev != path.parent.stat().st_dev:
        with complete_file(path) as copy:
            shutil.copyfile(temporary, copy)
        return
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
