"""Bad input to cq-convert: exit 2 with one line that names the culprit, 130 for Ctrl-C, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from codequant_converter import cli
from codequant_converter.settings import Settings
from safetensors.torch import load_file, save_file

from tests.models import MODELS, TEXT
from tests.processes import interruptible

WEIGHT = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "model"
    MODELS["llama-tied"].save(folder)
    return folder


@pytest.fixture
def model(pristine, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_tensors(model: Path, change) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(model: Path, **fields: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def fails(monkeypatch, capsys, out: Path, *arguments: object) -> str:
    """Run cq-convert expecting exit 2; returns its one error line."""
    before = sorted(out.parent.iterdir())
    monkeypatch.setattr(sys, "argv", ["cq-convert", "--out", str(out), *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert exit_info.value.code == 2, captured.err
    assert captured.out == ""
    assert len(errors) == 1, captured.err
    assert errors[0].startswith("error: ")
    assert sorted(out.parent.iterdir()) == before
    return errors[0]


def nan(tensors):
    tensors[WEIGHT][3, 4] = float("nan")


def missing(tensors):
    del tensors[WEIGHT]


def wrong_shape(tensors):
    tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()


def integers(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.int8)


@pytest.mark.parametrize("damage", [nan, missing, wrong_shape, integers])
def test_damaged_tensors_are_named(model, tmp_path, monkeypatch, capsys, damage):
    edit_tensors(model, damage)
    assert WEIGHT in fails(monkeypatch, capsys, tmp_path / "out.gguf", model)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_safetensors(model, tmp_path, monkeypatch, capsys, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in fails(monkeypatch, capsys, tmp_path / "out.gguf", model)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": None}, "'None'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"hidden_size": 97}, "97"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"intermediate_size": 128}, "mlp.gate_proj.weight"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_unsupported_configurations_are_named(model, tmp_path, monkeypatch, capsys, fields, named):
    edit_config(model, **fields)
    assert named in fails(monkeypatch, capsys, tmp_path / "out.gguf", model)


def test_things_that_are_not_models(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.gguf"
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a model" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    (model / "config.json").write_text("{")
    for source in (tmp_path / "absent", junk, empty, model):
        assert source.name in fails(monkeypatch, capsys, out, source)


def test_missing_tokenizer(model, tmp_path, monkeypatch, capsys):
    for file in model.glob("token*"):
        file.unlink()
    assert "tokenizer" in fails(monkeypatch, capsys, tmp_path / "out.gguf", model)


def test_bad_options_and_outputs(pristine, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.gguf"
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for options, named in (
        (["--no-such-option"], "--no-such-option"),
        (["--bits", "6"], "--bits"),
        (["--codebook-rows", "3"], "--codebook-rows"),
        (["--rotation", "some"], "--rotation"),
        (["--router-weight", "nan"], "--router-weight"),
        (["--method", "paper", "--target-bpw", "4"], "--target-bpw"),
        (["--group-size", "100"], "--group-size"),
        (["--target-bpw", "4"], "--calibration"),
        (["--fast", "--target-bpw", "4", "--calibration", __file__], "--fast"),
        (["--fast", "--method", "paper"], "--fast"),
        (["--fast", "--rotated-only"], "--fast"),
        (["--target-bpw", "4", "--calibration", __file__, "--bits", "3"], "--bits"),
        (["--target-bpw", "nan", "--calibration", __file__], "--target-bpw"),
        (["--target-bpw", "0.5", "--calibration", __file__], "the smallest types take"),
        (["--tensor-type", "attn_q"], "--tensor-type"),
        (["--tensor-type", "(=cq4"], "--tensor-type"),
        (["--tensor-type", "no_such_tensor=f16"], "no_such_tensor"),
        (["--tensor-type", "attn_q=cq4"], "96 columns"),
        (["--calibration", str(short)], "short.txt"),
        (["--calibration", str(tmp_path / "absent.txt")], "absent.txt"),
        (["--threads", "0"], "--threads"),
        (["--seed", "-1"], "--seed"),
        (["--report", str(tmp_path / "no" / "r.json")], "--report"),
    ):
        assert named in fails(monkeypatch, capsys, out, pristine, *options)


def test_outputs_that_cannot_be_written(pristine, tmp_path, monkeypatch, capsys):
    existing = tmp_path / "existing.gguf"
    existing.write_bytes(b"precious")
    assert "existing.gguf" in fails(monkeypatch, capsys, existing, pristine)
    assert existing.read_bytes() == b"precious"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "folder" in fails(monkeypatch, capsys, folder, pristine)
    absent = tmp_path / "absent" / "out.gguf"
    assert "absent" in fails(monkeypatch, capsys, tmp_path / "out.gguf", pristine, "--out", absent)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "writable" in fails(monkeypatch, capsys, tmp_path / "out.gguf", pristine)


def test_full_disk_is_noticed_before_the_work(pristine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "free" in fails(monkeypatch, capsys, tmp_path / "out.gguf", pristine)


def test_dry_run_writes_nothing(pristine, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(sys, "argv", ["cq-convert", str(pristine), "--out", str(out), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert exit_info.value.code == 0
    assert list(tmp_path.iterdir()) == []
    assert document["bytes"] == sum(tensor["bytes"] for tensor in document["tensors"])
    assert document["disk_bytes"] >= document["bytes"] and document["peak_memory_bytes"] > 1 << 28
    assert document["seconds"] > 0


def test_fast_stands_for_other_options(pristine):
    def settings(*options: str) -> Settings:
        fixed = (str(pristine), "--out", "x.gguf", "--max-memory", "4")  # its default is what is free at the moment
        return cli.settings_of(cli.parser().parse_args([*fixed, *options]))

    explicit = ("--no-sensitivity", "--descent-rounds", "0")
    assert settings("--fast") == settings("--bits", "4", *explicit, "--rotation", "random")
    assert settings("--fast", "--bits", "3", "--no-rotation") == settings("--bits", "3", *explicit, "--no-rotation")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "codequant_converter.cli", *map(str, arguments)]


def test_as_a_process(model, tmp_path):
    edit_tensors(model, nan)
    result = subprocess.run(command(model, "--out", tmp_path / "out.gguf"), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(rf"(warning: .*\n)?error: .*{re.escape(WEIGHT)}.*\n", result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "part"), [([], "out.gguf.*.part"), (["--no-sensitivity"], "out.gguf.*.part/output.part")]
)
def test_interrupt_leaves_nothing(tmp_path, options, part):
    """Ctrl-C while sensitivity is measured, and while layers are being written."""
    tiny = MODELS["llama-mha-linear"]
    model = tmp_path / "model"
    type(tiny)("llama", tiny.fields | {"num_hidden_layers": 400}).save(model)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = command(model, "--out", tmp_path / "out.gguf", "--calibration", text, "--no-rotation", "--no-check")
    arguments += options
    with interruptible(arguments) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(part)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(tmp_path.glob(part))
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
