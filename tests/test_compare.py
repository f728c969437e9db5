"""scripts/compare_llamacpp.py with our own cq-bench and a stand-in that prints what llama-bench prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_gguf import Tiny, write_tiny

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_llamacpp.py"


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A directory whose bin/llama-bench reports one and two million tokens per second, and fails for `bad.gguf`."""
    results = [{"n_prompt": 16, "n_gen": 0, "avg_ts": 1e6}, {"n_prompt": 0, "n_gen": 4, "avg_ts": 2e6}]
    program = tmp_path / "build" / "bin" / "llama-bench"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if any(x.endswith('bad.gguf') for x in sys.argv):\n    sys.exit('first line\\nfailed to load model')\n"
        f"print({json.dumps(json.dumps(results))})\n"
    )
    program.chmod(0o755)
    return tmp_path / "build"


def compare(tmp_path: Path, build: Path, model: str) -> subprocess.CompletedProcess[str]:
    write_tiny(tmp_path / "ours.gguf", Tiny(hidden=64, ffn=64, head_dim=32, vocab=64))
    (tmp_path / "theirs.gguf").touch(), (tmp_path / "bad.gguf").touch()
    command = [sys.executable, SCRIPT, tmp_path / "ours.gguf", "--build", build, "--models", tmp_path / model]
    options = ["-p", "16", "-n", "4", "-t", "1", "-r", "2"]
    return subprocess.run([*map(str, command), *options], capture_output=True, text=True, env={"COLUMNS": "120"})


def test_table_has_both_engines_and_their_ratio(tmp_path: Path, build: Path) -> None:
    done = compare(tmp_path, build, "theirs.gguf")
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines() if ".gguf" in line]
    ours = {test: float(rate) for name, test, rate, *_ in rows if name == "ours.gguf"}
    theirs = {test: [float(cell) for cell in cells] for name, test, *cells in rows if name == "theirs.gguf"}
    for test, rate in (("pp16", 1e6), ("tg4", 2e6)):
        assert theirs[test][0] == rate
        assert theirs[test][3] == pytest.approx(ours[test] / rate, abs=0.006)


@pytest.mark.parametrize(("model", "message"), [("none.gguf", "no such file"), ("bad.gguf", "failed to load model")])
def test_failures_are_one_line(tmp_path: Path, build: Path, model: str, message: str) -> None:
    done = compare(tmp_path, build, model)
    assert done.returncode
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr.splitlines()[-1]
