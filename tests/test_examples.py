"""The programs in examples/ as a user starts them, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyggml_bridge import LLM
from tests.byte_tokenizer import byte_keys
from tests.models import MODELS
from tests.tiny_gguf import Tiny, write_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
KEYS = byte_keys()


def start(example: str, *arguments: object) -> str:
    line = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(line, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()  # not as text, for which the model's \r would be \n


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("examples") / "m.gguf"
    write_tiny(file, Tiny(vocab=len(KEYS["tokenizer.ggml.tokens"]), hidden=64, ffn=64, head_dim=16), KEYS)
    return file


def test_every_example_is_tested_and_says_how_to_call_it():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"generate.py", "score.py", "convert_and_run.py"}
    for name in names:
        assert f"python examples/{name}" in (EXAMPLES / name).read_text(encoding="utf-8")


def test_generate(path):
    text = "".join(LLM(path, n_ctx=2048).generate("Once", max_tokens=64, temperature=0.7, seed=0))
    assert start("generate.py", path, "Once") == f"Once{text}\n"


def test_score(path):
    llm = LLM(path)
    first = llm.logprobs(llm.tokenize("Once"))[-1]
    worst, best = (llm.detokenize([i]) for i in (first[110:].argmin() + 110, first[3:80].argmax() + 3))
    lines = start("score.py", path, "Once", worst, best).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [repr(best), repr(worst)]
    assert float(lines[0].split()[0]) == pytest.approx(first[llm.tokenize(best)[0]], abs=1e-3)


def test_convert_and_run(tmp_path):
    MODELS["llama-tied"].save(tmp_path / "model")
    out = tmp_path / "m.gguf"
    printed = start("convert_and_run.py", tmp_path / "model", out, "Once", "--bits", 4, "--no-check")
    assert "bits per weight" in printed
    assert printed.endswith("Once" + "".join(LLM(out).generate("Once", max_tokens=32, temperature=0)) + "\n")
