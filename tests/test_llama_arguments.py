"""cq-run's command line where a llama.cpp user expects something of it: dashes, special numbers, long chats."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_bridge.cli.common import ArgumentParser
from pyggml_bridge.models import load_model
from tests.byte_tokenizer import byte_keys
from tests.test_generate import EOS, GREEDY, Reciter, cli
from tests.tiny_gguf import Tiny, write_tiny

__all__ = ["cli"]  # the fixture


@pytest.mark.parametrize("text", ["---", "--", "-", "-1", "- a list", "-x=y", "--what", "-n5"])
def test_texts_may_begin_with_a_dash(cli, text):
    for option in ("-p", "--prompt"):
        assert cli(Reciter({text: " then" + EOS}), *GREEDY, "--raw", option, text)[1] == " then\n"
    assert cli(Reciter({"Q": f"one{text}two" + EOS}), *GREEDY, "--raw", "-p", "Q", "--stop", text)[1] == "one\n"
    system = Reciter({"<|im_start|>assistant\n": "ok" + EOS})
    assert cli(system, *GREEDY, "--system", text, "-p", "Q")[1] == "ok\n"
    assert f"system\n{text}" in system.tokenizer.decode(system.cache)


def test_options_after_a_text_option_stay_options():
    parser = ArgumentParser(prog="x")
    parser.add_argument("-p", "--prompt")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int)
    assert parser.parse_args(["--prompt=--json", "-n", "-2"]).prompt == "--json"
    assert parser.parse_args(["-p", "---", "--json"]).json
    assert parser.parse_args(["-p-3"]).prompt == "-3"


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfone\r\ntwo\r\n", b"one\r\ntwo\r\n", b"one\ntwo\n"])
def test_what_an_editor_adds_is_no_part_of_a_prompt(cli, tmp_path, data):
    file = tmp_path / "p.txt"
    file.write_bytes(data)
    for source, stdin in ((("-f", str(file)), b""), (("-",), data)):
        model = Reciter({"one\ntwo": "!" + EOS})
        assert cli(model, *GREEDY, "--raw", *source, stdin=stdin)[1] == "!\n"
        assert model.calls[0][1] == model.ids("one\ntwo")


def test_a_chat_from_a_file_with_carriage_returns(cli):
    model = Reciter({"assistant\n": "1" + EOS})
    assert cli(model, *GREEDY, "--chat", stdin=b"\xef\xbb\xbfone\r\n")[:2] == (0, "1\n")
    assert model.calls[0][1] == model.ids("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")


def test_special_numbers_mean_what_they_mean_in_llama_cpp(cli):
    script = {"Q": "abc" + EOS}
    for options in (("-n", "-2"), ("-n", "-1"), ("--seed", "-1"), ("-c", "0")):
        assert cli(Reciter(script), *GREEDY, "--raw", "-p", "Q", *options)[1] == "abc\n"
    assert cli(Reciter(script), "m.gguf", "--temp", "-1", "--raw", "-p", "Q")[1] == "abc\n"


def test_seed_minus_one_differs_from_run_to_run(cli):
    def drawn() -> str:
        model = Reciter({})
        model.forward = lambda tokens, position, n: np.zeros((n, model.vocab_size), np.float32)
        return cli(model, "m.gguf", "--temp", "1", "--raw", "-p", "Q", "-n", "30", "--seed", "-1")[1]

    assert drawn() != drawn()


def test_a_context_of_zero_is_the_models_own(tmp_path):
    keys = byte_keys()
    tiny = Tiny(vocab=len(keys["tokenizer.ggml.tokens"]), hidden=64, ffn=64, head_dim=16)
    write_tiny(tmp_path / "m.gguf", tiny, keys | {"llama.context_length": 9000})
    assert load_model(tmp_path / "m.gguf", n_ctx=0).n_ctx == 9000
    assert load_model(tmp_path / "m.gguf").n_ctx == 8192


# ---- a chat that is longer than the context ----

ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def prompts(model: Reciter) -> list[str]:
    """The text in the cache after each evaluation of more than one token."""
    found, cache = [], []
    for position, tokens in model.calls:
        cache[position:] = tokens
        if len(tokens) > 1:
            found.append(model.tokenizer.decode(cache))
    return found


def test_a_full_chat_forgets_its_oldest_turns_and_says_so(cli):
    n = 6
    model = Reciter({f"m{i}{ASSISTANT}": f"answer {i}" + EOS for i in range(n)}, n_ctx=160)
    lines = "".join(f"m{i}\n" for i in range(n)).encode()
    code, out, err = cli(model, *GREEDY, "--chat", "--system", "SYS", stdin=lines)
    assert (code, out) == (0, "".join(f"answer {i}\n" for i in range(n)))
    assert "the context is full: the oldest turns of the chat (" in err
    first, *_, last = prompts(model)
    assert "m0" in first and "m0" not in last
    assert "SYS" in last and f"m{n - 1}" in last and "answer 4" in last  # the last turns stay, the system message too
    assert all(len(model.ids(prompt)) <= 160 - 40 for prompt in prompts(model))


def test_a_message_that_does_not_fit_is_left_out_and_the_chat_goes_on(cli):
    model = Reciter({f"m{i}{ASSISTANT}": f"answer {i}" + EOS for i in range(2)}, n_ctx=160)
    code, out, err = cli(model, *GREEDY, "--chat", stdin=b"m0\n" + b"x" * 300 + b"\nm1\n")
    assert (code, out) == (0, "answer 0\nanswer 1\n")
    assert "warning: the message is left out: the prompt has " in err and "the context holds 160" in err
    assert "m0" in prompts(model)[-1]


def test_a_chat_that_fits_forgets_nothing(cli):
    model = Reciter({f"m{i}{ASSISTANT}": f"answer {i}" + EOS for i in range(3)})
    _, _, err = cli(model, *GREEDY, "--chat", stdin=b"m0\nm1\nm2\n")
    assert "full" not in err and "m0" in prompts(model)[-1]
