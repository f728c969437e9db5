"""Commands whose standard streams are closed, full, narrow or left by their readers, and commands that are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from codequant_converter.resume.work_folder import WorkFolder

from pyggml_bridge.cli import common
from pyggml_bridge.errors import CQError
from pyggml_bridge.output import complete_file
from tests.byte_tokenizer import byte_keys
from tests.models import TEXT, TinyModel
from tests.processes import interruptible
from tests.tiny_gguf import Tiny, write_tiny

KEYS = byte_keys()
TINY = Tiny(vocab=len(KEYS["tokenizer.ggml.tokens"]), n_experts=4, hidden=64, ffn=64, head_dim=16)
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_tiny(folder / "m.gguf", TINY, KEYS | {"general.name": "Größe ± … " + "x" * 80})
    (folder / "text.txt").write_text("Once upon a time there was a hash table. " * 20)
    return folder / "m.gguf"


def shell(command: str, redirection: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    """A command under a shell that redirects its streams, without Python's UTF-8 mode."""
    module = "codequant_converter.cli" if command == "convert" else f"pyggml_bridge.cli.{command}"
    line = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", module, *map(str, args)]
    return subprocess.run(line, capture_output=True, timeout=300, env=os.environ | environment, stdin=subprocess.PIPE)


def perplexity(model: Path, *args: str) -> tuple[object, ...]:
    return (model, "-f", model.with_name("text.txt"), "-c", 32, "--chunks", 2, *args)


COMMANDS = [
    ("info", lambda m: (m,)),
    ("info", lambda m: (m, "--json")),
    ("bench", lambda m: (m, "-p", 4, "-n", 2, "-r", 1)),
    ("perplexity", lambda m: perplexity(m, "--base", m)),
    ("run", lambda m: (m, "--raw", "-p", "Once", "-n", 4, "--temp", 0)),
]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(("command", "args"), COMMANDS)
def test_narrow_encodings_lose_no_result(model, command, args, encoding):
    done = shell(command, "", *args(model), PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout and b"Traceback" not in done.stderr
    if "--json" in args(model):
        assert json.loads(done.stdout.decode(encoding))["metadata"]["general.name"].startswith("Größe ± …")


@pytest.mark.parametrize(("command", "args"), COMMANDS)
def test_a_full_or_closed_output_is_one_line(model, command, args):
    for redirection, why in ((">/dev/full", b"No space left on device"), (">&-", b"Bad file descriptor")):
        done = shell(command, redirection, *args(model))
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == b"error: standard output: " + why


def test_what_was_measured_is_on_standard_error_if_the_output_is_full(model):
    for args in (perplexity(model), perplexity(model, "--json")):
        done = shell("perplexity", ">/dev/full", *args)
        assert b"PPL = " in done.stderr or b'"ppl": ' in done.stderr
    assert b" tg2 |" in shell("bench", ">&-", model, "-p", 0, "-n", 2, "-r", 1).stderr


@pytest.mark.parametrize(("command", "args"), COMMANDS)
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-"])
def test_without_messages_or_input_the_result_alone_is_on_the_output(model, command, args, redirection):
    done = shell(command, redirection, *args(model))
    assert done.returncode == 0 and done.stdout
    for message in (b"loaded", b"chunks", b"warning"):
        assert message not in done.stdout
    if "--json" in args(model):
        json.loads(done.stdout)


def test_a_closed_input_is_empty(model):
    done = shell("run", "<&-", model, "-")
    assert (done.returncode, done.stderr) == (2, b"error: standard input: the prompt is empty\n")
    assert shell("run", "<&-", model, "--chat").returncode == 0


def test_a_reader_that_leaves_is_no_error(model):
    line = f"{sys.executable} -m pyggml_bridge.cli.info {model}; echo $? >&2"
    done = subprocess.run(["bash", "-c", f"( {line} ) | true"], capture_output=True, timeout=300)
    assert done.stderr == b"141\n"


def test_help_into_a_full_output(model):
    assert b"Exception" not in shell("run", ">/dev/full", "--help").stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_termination_is_one_line(model, number, code):
    line = [sys.executable, "-m", "pyggml_bridge.cli.bench", str(model), "-n", "100000", "-p", "0"]
    with interruptible(line) as process:
        time.sleep(2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == f"error: ended by {number.name}\n"


def test_a_hangup_that_is_ignored_stays_ignored(model):
    line = f"trap '' HUP; exec {sys.executable} -m pyggml_bridge.cli.bench {model} -n 100000 -p 0"
    with interruptible(["bash", "-c", line]) as process:
        time.sleep(2)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)


def test_a_write_that_fails_names_the_file(tmp_path):
    with (
        pytest.raises(CQError, match=r"m\.gguf: could not be written: No space left"),
        complete_file(tmp_path / "m.gguf") as part,
    ):
        part.touch()
        with FULL.open("w") as full:
            full.write("x" * 100000)
    assert not list(tmp_path.iterdir())


def test_documents_hold_what_json_can(capsys):
    common.print_json({"ppl": 2.0, "ppl_stderr": float("nan"), "all": [float("inf"), 1]})
    assert json.loads(capsys.readouterr().out) == {"ppl": 2.0, "ppl_stderr": None, "all": [None, 1]}


# ---- conversions ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    TinyModel("llama").save(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_a_report_that_cannot_be_written_is_on_the_output(checkpoint, tmp_path):
    out = tmp_path / "m.gguf"
    done = shell("convert", "", checkpoint, "--out", out, "--rotated-only", "f32", "--no-check", "--report", FULL)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, b"error: --report /dev/full: No space left on device")
    assert json.loads(done.stdout)["bytes"] == out.stat().st_size


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_that_is_ended_leaves_nothing_or_its_work_folder(checkpoint, tmp_path, number):
    command = [sys.executable, "-m", "codequant_converter.cli", str(checkpoint), "--out", str(tmp_path / "m.gguf")]
    command += ["--calibration", str(checkpoint / "text.txt"), "--descent-rounds", "1000"]
    for folder, left in (((), set()), (("--work-dir", str(tmp_path / "work")), {"work"})):
        with interruptible([*command, *folder]) as process:
            while not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("work/rotation.pt")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(number)
            _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number and err.splitlines()[-1] == f"error: ended by {number.name}"
        assert "Traceback" not in err
        assert {path.name for path in tmp_path.iterdir()} == left


def test_a_work_folder_on_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "rotation.part").symlink_to(FULL)
    with pytest.raises(CQError, match=r"rotation\.part: could not be written"):
        WorkFolder(tmp_path).save("rotation", {"rotation": torch.zeros(100_000)})
