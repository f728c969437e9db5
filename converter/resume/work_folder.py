"""What a conversion has done so far, in a folder: if it is killed, at any moment, the next one goes on from there.

A value is written under another name and then renamed, so it is there as a whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pyggml_bridge.errors import CQError
from pyggml_bridge.version import package_version

from ..console import warn
from ..settings import Settings
from ..source.checkpoint import Checkpoint

IDENTITY, IDENTITY_PART, LOCK = "settings.json", "settings.part", "lock"
Identity = dict[str, str]  # what the bytes of the output follow from, by name
# Settings that do not change these bytes, and paths, whose contents count instead.
FORM = "2"  # counted up when what the folder holds changes
NOT_IDENTITY = ("out", "overwrite", "max_memory", "work_dir", "resume", "model", "calibration")


class WorkFolder:
    """Named values in files: tensors, numbers, strings, and lists and dicts of these; nothing that runs code."""

    def __init__(self, path: Path) -> None:
        """A folder that exists."""
        self.path = path

    @property
    def part(self) -> Path:
        """The output file while it is not complete."""
        return self.path / "output.part"

    def save(self, name: str, value: Any) -> None:
        """Put a value in the place of any earlier one of this name; CQError if the disk does not take it."""
        part = self.path / f"{name}.part"
        try:
            torch.save(value, part)
        except RuntimeError as error:  # torch's own for a write that failed
            raise CQError(f"{part}: could not be written: is the disk full?") from error
        part.replace(self._file(name))

    def load(self, name: str) -> Any:
        """A saved value, None if there is none; CQError if its file is damaged."""
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            return torch.load(file, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise CQError(f"{file}: damaged: start again without --resume") from error

    def has(self, name: str) -> bool:
        """Whether there is a value of this name."""
        return self._file(name).is_file()

    def remove(self, name: str) -> None:
        """Forget a value."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.pt"


@contextmanager
def work_folder(settings: Settings, checkpoint: Checkpoint) -> Iterator[WorkFolder]:
    """The folder of one conversion, which is removed when the work is done.

    With --work-dir or --resume an unfinished conversion leaves it, else it never outlives the conversion. CQError if
    the folder is in use, holds something else, or was made with other settings or of other files.
    """
    out = settings.out
    if settings.work_dir is None and not settings.resume:
        with TemporaryDirectory(prefix=f"{out.name}.", suffix=".part", dir=out.parent) as folder:
            yield WorkFolder(Path(folder))
        return
    path = settings.work_dir or out.with_name(out.name + ".work")
    if path.exists() and not path.is_dir():
        raise CQError(f"--work-dir {path}: is not a directory")
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _prepare(path, _identity(settings, checkpoint), settings.resume)
        try:
            yield WorkFolder(path)
        except KeyboardInterrupt:
            warn(f"{path} keeps what was done: --resume goes on with it")
            raise
        shutil.rmtree(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CQError(f"--work-dir {path}: another conversion uses it") from error
        yield


def _prepare(path: Path, identity: Identity, resume: bool) -> None:
    """Empty the folder, but to resume: then keep all of it, or raise CQError if its identity is another."""
    file = path / IDENTITY
    others = [entry for entry in path.iterdir() if entry.name not in (LOCK, IDENTITY_PART)]
    if others and not file.is_file():
        raise CQError(f"--work-dir {path}: holds something else")
    if others and resume:
        _require_same(path, json.loads(file.read_text(encoding="utf-8")), identity)
        return
    for entry in sorted(others, key=lambda entry: entry == file):  # the identity last: a kill here leaves it known
        entry.unlink()
    part = path / IDENTITY_PART
    part.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    part.replace(file)


def _require_same(path: Path, before: Identity, now: Identity) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise CQError(f"--resume: {path} was made with another {name}: {before.get(name)} there, {value} now")


def _identity(settings: Settings, checkpoint: Checkpoint) -> Identity:
    chosen = {"converter": package_version(), "form of the work folder": FORM}
    chosen |= {f.name: repr(getattr(settings, f.name)) for f in fields(settings) if f.name not in NOT_IDENTITY}
    for file in checkpoint.files:
        stat = file.stat()
        chosen[file.name] = f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    if settings.calibration:
        chosen["calibration text"] = hashlib.sha256(settings.calibration.read_bytes()).hexdigest()
    return chosen
