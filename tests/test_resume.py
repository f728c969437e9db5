"""A conversion killed at any moment and resumed writes the same bytes; what does not fit together is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from codequant_converter import cli
from codequant_converter.output.gguf_file import OutputFile
from codequant_converter.resume.work_folder import WorkFolder

from pyggml_bridge.errors import CQError
from tests.models import MODELS, TEXT

FULL = ("--calibration-tokens", "512")
PAPER = ("--method", "paper", "--calibration-tokens", "256")
HANGS_AFTER = 300  # seconds, for a conversion of four


class Killed(BaseException):
    """Stands for a kill: nothing in the converter may catch it."""


def convert(model: Path, out: Path, *options: str) -> dict:
    arguments = [str(model), "--out", str(out), "--calibration", str(model / "text.txt"), "--threads", "2"]
    document = cli.convert(cli.settings_of(cli.parser().parse_args([*arguments, *options]))).document()
    return {name: value for name, value in document.items() if name not in ("out", "seconds", "peak_memory_bytes")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama-mha-linear", "mixtral"):
        MODELS[name].save(folder / name)
        (folder / name / "text.txt").write_text(TEXT)
    return folder


def killed_at(monkeypatch, kind: type, method: str, n: int) -> list[int]:
    """Raise Killed in place of the n-th call of a method; returns the number of calls so far, in a list."""
    calls, original = [0], getattr(kind, method)

    def wrapper(*arguments):
        calls[0] += 1
        if calls[0] == n:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(kind, method, wrapper)
    return calls


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama-mha-linear", FULL), ("mixtral", FULL), ("mixtral", PAPER)],
    ids=["dense", "moe", "paper"],
)
@pytest.mark.parametrize(("kind", "method", "step"), [(WorkFolder, "save", 2), (OutputFile, "write", 11)])
def test_killed_at_many_moments(models, tmp_path, monkeypatch, name, options, kind, method, step):
    """Before every second value that is kept, and in the middle of layers."""
    with monkeypatch.context() as patch:
        calls = killed_at(patch, kind, method, 0)
        wanted = convert(models / name, tmp_path / "whole.gguf", *options)
    assert calls[0] > step
    for n in range(1, calls[0] + 1, step):
        out = tmp_path / f"{n}.gguf"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, kind, method, n)
            convert(models / name, out, *options, "--work-dir", str(tmp_path / "work"))
        assert not out.exists() and (tmp_path / "work").is_dir()
        assert convert(models / name, out, *options, "--work-dir", str(tmp_path / "work"), "--resume") == wanted
        assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert not (tmp_path / "work").exists()


def newest(work: Path) -> int:
    """When a value was last kept."""
    times = [0]
    for file in work.glob("*.pt"):
        with suppress(FileNotFoundError):  # removed since
            times.append(file.stat().st_mtime_ns)
    return max(times)


def stderr_of(process: subprocess.Popen) -> str:
    """What it wrote until its end; one that hangs fails the test with the stacks of its threads."""
    try:
        return process.communicate(timeout=HANGS_AFTER)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail(f"a conversion hangs:\n{process.communicate()[1]}")


@pytest.mark.slow
def test_killed_as_a_process(models, tmp_path):
    """kill -9 again and again, each time soon after it has kept something new, and at last not."""
    model = models / "mixtral"
    rng, out, kills = random.Random(0), tmp_path / "m.gguf", 0
    program = [sys.executable, "-m", "codequant_converter.cli", str(model), *FULL]
    program += ["--calibration", str(model / "text.txt"), "--threads", "2"]
    subprocess.run([*program, "--out", str(tmp_path / "whole.gguf")], check=True, stderr=subprocess.DEVNULL)
    command = [*program, "--out", str(out), "--resume"]
    while not out.exists():
        before = newest(tmp_path / "m.gguf.work")
        stacks = os.environ | {"PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=stacks)
        while kills < 4 and newest(tmp_path / "m.gguf.work") == before and process.poll() is None:
            time.sleep(0.01)
        if kills < 4:
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            kills += 1
        stderr = stderr_of(process)
        assert process.returncode in (0, -signal.SIGKILL), stderr
    assert kills >= 2
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.fixture
def unfinished(models, tmp_path, monkeypatch):
    """A work folder after two layers."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, OutputFile, "flush", 3)
        convert(models / "llama-mha-linear", tmp_path / "m.gguf", *FULL, "--work-dir", str(tmp_path / "work"))
    return tmp_path / "work"


def resume(models: Path, work: Path, *options: str) -> dict:
    return convert(models / "llama-mha-linear", work.parent / "m.gguf", "--work-dir", str(work), "--resume", *options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((*FULL, "--seed", "1"), "seed: 0 there, 1 now"),
        ((*FULL, "--threads", "1"), "threads"),
        ((*FULL, "--tensor-type", "attn_v=q8_0"), "overrides"),
        (("--calibration-tokens", "576"), "calibration_tokens"),
    ],
)
def test_changed_settings_are_refused(models, unfinished, options, named):
    with pytest.raises(CQError, match=f"--resume: .* was made with another {named}"):
        resume(models, unfinished, *options)
    resume(models, unfinished, *FULL)  # and nothing is lost


def test_changed_files_are_refused(models, unfinished, tmp_path):
    text = models / "llama-mha-linear" / "text.txt"
    try:
        text.write_text("Another " + TEXT)
        with pytest.raises(CQError, match="another calibration text"):
            resume(models, unfinished, *FULL)
    finally:
        text.write_text(TEXT)
    config = models / "llama-mha-linear" / "config.json"
    config.touch()
    with pytest.raises(CQError, match=r"another config\.json"):
        resume(models, unfinished, *FULL)


@pytest.mark.parametrize("name", ["output.part", "written.pt", "rotation.pt"])
def test_damaged_work_is_refused(models, unfinished, name):
    data = (unfinished / name).read_bytes()
    (unfinished / name).write_bytes(data[: len(data) // 3])
    with pytest.raises(CQError, match=f"{name}: .*start again without --resume"):
        resume(models, unfinished, *FULL)


def test_without_resume_it_starts_anew(models, unfinished, monkeypatch):
    calls = killed_at(monkeypatch, OutputFile, "flush", 0)
    convert(models / "llama-mha-linear", unfinished.parent / "m.gguf", *FULL, "--work-dir", str(unfinished))
    assert calls[0] == json.loads((models / "llama-mha-linear" / "config.json").read_text())["num_hidden_layers"]


def test_resumed_work_is_not_done_again(models, unfinished, monkeypatch):
    calls = killed_at(monkeypatch, OutputFile, "flush", 0)
    resume(models, unfinished, *FULL)
    assert calls[0] == json.loads((models / "llama-mha-linear" / "config.json").read_text())["num_hidden_layers"] - 2


def test_folders_of_others_are_left_alone(models, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious").write_text("mine")
    for options in ((), ("--resume",)):
        with pytest.raises(CQError, match="holds something else"):
            convert(models / "llama-mha-linear", tmp_path / "m.gguf", "--work-dir", str(tmp_path / "work"), *options)
    assert (tmp_path / "work" / "precious").read_text() == "mine"
    with pytest.raises(CQError, match="not a directory"):
        convert(models / "llama-mha-linear", tmp_path / "m.gguf", "--work-dir", str(tmp_path / "work" / "precious"))


def test_a_folder_in_use_is_refused(models, unfinished):
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    command = [sys.executable, "-c", script + "; time.sleep(60)", str(unfinished / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(CQError, match="another conversion uses it"):
            resume(models, unfinished, *FULL)
        other.kill()
