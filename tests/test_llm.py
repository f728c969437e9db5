"""The Python interface against the command line and the model it wraps."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pyggml_bridge import LLM, CQError
from pyggml_bridge.measure.perplexity import log_softmax
from pyggml_bridge.models import load_model
from tests.byte_tokenizer import byte_keys
from tests.test_commands import run_json
from tests.tiny_gguf import Tiny, write_tiny

KEYS = byte_keys()
TINY = Tiny(vocab=len(KEYS["tokenizer.ggml.tokens"]), n_experts=4, hidden=64, ffn=64, head_dim=16)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("llm") / "m.gguf"
    write_tiny(file, TINY, KEYS | {"general.sampling.top_k": 7})
    return file


@pytest.fixture
def llm(path):
    return LLM(path, n_ctx=128, n_threads=1)


def test_pieces_join_to_the_text_of_the_command_line(path, llm):
    options = ("--seed", 3, "--temp", 1.5, "-n", 12)
    pieces = list(llm.generate("Once", max_tokens=12, temperature=1.5, seed=3))
    assert len(pieces) > 1
    assert "".join(pieces) == run_json("run", path, "--raw", "-p", "Once", *options, "--json")["text"]
    stop = pieces[2]
    stopped = run_json("run", path, "--raw", "-p", "Once", *options, "--stop", stop, "--json")["text"]
    assert "".join(llm.generate("Once", 12, stop, temperature=1.5, seed=3)) == stopped
    assert "".join(llm.generate("Once", 12, ["never", stop], temperature=1.5, seed=3)) == stopped
    answer = run_json("run", path, "-p", "Hello", *options, "--json")["text"]
    assert llm.chat(HELLO, max_tokens=12, temperature=1.5, seed=3) == answer


def test_text_comes_before_the_model_has_finished(llm, monkeypatch):
    calls = []
    forward = llm._model.forward
    monkeypatch.setattr(llm._model, "forward", lambda *args: calls.append(args) or forward(*args))
    next(llm.generate("Once", max_tokens=20, temperature=0))
    assert 1 <= len(calls) < 20


def test_what_is_scored(path, llm):
    ids = llm.tokenize("Once upon")
    assert all(isinstance(i, int) for i in ids) and llm.detokenize(ids) == "Once upon"
    want = load_model(path, n_ctx=128, n_threads=1).forward(np.array(ids, np.int32), 0, len(ids))
    logits, logprobs = llm.logits("Once upon"), llm.logprobs(ids)
    assert logits.dtype == logprobs.dtype == np.float32 and logits.shape == (len(ids), TINY.vocab)
    np.testing.assert_array_equal(logits, want)
    np.testing.assert_array_equal(logprobs, log_softmax(want))
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(axis=-1), 1, rtol=1e-5)


def test_calls_do_not_disturb_each_other(llm):
    greedy = {"max_tokens": 8, "temperature": 0}
    want = "".join(llm.generate("Once", **greedy))
    llm.logprobs(llm.tokenize("Something else"))
    assert "".join(llm.generate("Once", **greedy)) == want
    waiting = llm.generate("Once", **greedy)
    llm.logits("Something else")
    assert "".join(waiting) == want  # begun only now
    begun = llm.generate("Once", **greedy)
    next(begun)
    llm.chat(HELLO, max_tokens=1)
    with pytest.raises(CQError, match="later call"):
        next(begun)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda llm: llm.generate("x", temperature=-1), "--temp"),
        (lambda llm: llm.generate("x", top_k=-1), "--top-k"),
        (lambda llm: llm.generate("x", seed=-1), "seed"),
        (lambda llm: llm.generate("x", max_tokens=-2), "max_tokens"),
        (lambda llm: llm.generate("x", stop=""), "--stop"),
        (lambda llm: llm.generate("\udcff"), "UTF-8"),
        (lambda llm: next(llm.generate("x" * 129)), "129 tokens"),
        (lambda llm: llm.chat("Hello"), "messages"),
        (lambda llm: llm.chat([{"role": "user"}]), "messages"),
        (lambda llm: llm.logits(""), "empty"),
        (lambda llm: llm.logits("x" * 129), "129 tokens"),
        (lambda llm: llm.logprobs([]), "token ids"),
        (lambda llm: llm.logprobs([[1, 2]]), "token ids"),
        (lambda llm: llm.logprobs(["a"]), "token ids"),
        (lambda llm: llm.logprobs([1 << 63]), "token ids"),
        (lambda llm: llm.logprobs([TINY.vocab]), "token ids"),
        (lambda llm: llm.detokenize([-1]), "token ids"),
    ],
)
def test_bad_input_is_an_error_of_one_line(llm, call, named):
    with pytest.raises(CQError, match=named) as error:
        call(llm)
    assert len(str(error.value).splitlines()) == 1


def test_unknown_options_are_refused(llm):
    with pytest.raises(TypeError, match="temp"):
        llm.generate("x", temp=1)


def test_models_that_cannot_be_loaded(path, tmp_path):
    (tmp_path / "text.gguf").write_text("no model")
    for options, named in (({"n_ctx": 0}, "n_ctx"), ({"n_threads": 0}, "n_threads"), ({"gpu_layers": 1}, "cuda")):
        with pytest.raises(CQError, match=named):
            LLM(path, **options)
    with pytest.raises(CQError, match="not a GGUF file"):
        LLM(tmp_path / "text.gguf")
    write_tiny(tmp_path / "base.gguf", TINY, {k: v for k, v in KEYS.items() if k != "tokenizer.chat_template"})
    with pytest.raises(CQError, match="chat template"):
        LLM(tmp_path / "base.gguf").chat(HELLO)


def test_importing_the_package_loads_nothing_else():
    code = "import sys, pyggml_bridge; print(*(m for m in sys.modules if m.startswith(('pyggml', 'numpy', 'gguf'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "pyggml_bridge\n"
    with pytest.raises(ImportError):
        from pyggml_bridge import no_such_name  # noqa: F401


def test_the_command_line_does_not_load_the_python_interface():
    code = "import sys, pyggml_bridge.cli.run; print('pyggml_bridge.llm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
