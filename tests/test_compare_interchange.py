"""scripts/compare_interchange.py with a stand-in that saves what llama-perplexity saves, computed by our runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.byte_tokenizer import TEXT

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_interchange.py"
STAND_IN = """
import sys
import numpy as np
from pyggml_bridge.models import load_model
from pyggml_bridge.measure.perplexity import chunks_of, log_softmax
from pyggml_bridge.tokenizer import Tokenizer

option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
n_ctx, n_chunk = int(option["-c"]), int(option["--chunks"])
model = load_model(option["-m"], n_ctx=n_ctx)
tokenizer = Tokenizer.from_metadata(model.metadata)
text = open(option["-f"], encoding="utf-8").read().removesuffix("\\n")
tokens = tokenizer.encode(text, add_special=True)[: n_ctx * n_chunk]
with open(option["--kl-divergence-base"], "wb") as out:
    out.write(b"_logits_" + np.array([n_ctx, model.vocab_size, n_chunk], np.int32).tobytes() + tokens.tobytes())
    for chunk in chunks_of(tokens, n_ctx, n_chunk, tokenizer.bos_id if tokenizer.add_bos else None):
        for row in log_softmax(model.forward(chunk, 0, n_ctx - n_ctx // 2)[:-1]) * FACTOR:
            low = max(row.min(), row.max() - 16)
            scale = (row.max() - low) / 65535
            out.write(np.array([scale, low], np.float32).tobytes())
            out.write(np.rint(np.maximum(row - low, 0) / scale).astype(np.uint16).tobytes())
"""


def run(folder: Path, text: str, factor: float) -> subprocess.CompletedProcess[str]:
    program = folder / "build" / "bin" / "llama-perplexity"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nFACTOR = {factor}\n{STAND_IN}")
    program.chmod(0o755)
    (folder / "text.txt").write_text(text)
    options = [
        "--build",
        str(folder / "build"),
        "--text",
        str(folder / "text.txt"),
        "--models",
        "qwen2",
        "--chunks",
        "2",
    ]
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (0.9, 1)])
def test_table_and_verdict(tmp_path, factor, code):
    """16 bits are enough to see that it is the same model; another one is told apart."""
    words = "".join(f"{i * 7919 % 9973} {TEXT}" for i in range(30))  # enough of them for 2032 tokens
    done = run(tmp_path, words, factor)
    assert done.returncode == code, done.stderr
    _, _, line = done.stdout.splitlines()
    name, tokens, ours, theirs, difference, kld, top = (cell.strip() for cell in line.strip("|").split("|"))
    assert (name, tokens) == ("qwen2", "same")
    if code == 0:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5) and float(difference.rstrip("%")) < 1e-3
        assert float(kld) < 1e-6 and top == "100.0%"


def test_missing_program_is_named(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    options = ["--build", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 2 and "llama-perplexity: no such file" in done.stderr
