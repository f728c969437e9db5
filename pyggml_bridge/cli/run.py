"""cq-run: answer a prompt with a GGUF model. The answer goes to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyggml_bridge.chat import ChatTemplate, Message
from pyggml_bridge.cli.common import (
    ArgumentParser,
    add_cuda_arguments,
    check_cuda,
    check_threads,
    peak_memory_bytes,
    print_json,
    run_main,
)
from pyggml_bridge.errors import CQError
from pyggml_bridge.generate import Chunk, Context, Finish, PromptTooLong, StopFilter, generate
from pyggml_bridge.models import load_model
from pyggml_bridge.native import choose_isa, isa_help
from pyggml_bridge.sampling import Sampler, SamplingConfig
from pyggml_bridge.tokenizer import Tokenizer


def main() -> None:
    """Entry point."""
    run_main(_command)


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="cq-run", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="GGUF file with CQ, Q8_0, F16 or F32 weights")
    parser.add_argument("stdin", metavar="-", nargs="?", choices=["-"], help="take the prompt from standard input")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    parser.add_argument("-f", "--prompt-file", metavar="FILE", type=Path, help="take the prompt from a UTF-8 file")
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        default=-1,
        metavar="N",
        help="at most N tokens (-1 and -2: until EOS or the end of the context)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--chat", action="store_true", help="converse: one message a line, until end of file")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT (repeatable)")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    sampling = parser.add_argument_group("sampling (default: what the file recommends, else llama.cpp's defaults)")
    sampling.add_argument("--temp", type=float, metavar="X", help="temperature, 0: always the most likely token (0.8)")
    sampling.add_argument("--top-k", type=int, metavar="N", help="only the N most likely tokens, 0: all (40)")
    sampling.add_argument("--top-p", type=float, metavar="X", help="only the most likely up to this probability (0.95)")
    sampling.add_argument("--min-p", type=float, metavar="X", help="only those within this factor of the best (0.05)")
    sampling.add_argument(
        "--repeat-penalty", type=float, metavar="X", help="penalty on the last 64 tokens, 1: none (1)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same answer (-1, the default: random)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--ctx", "-c", type=int, metavar="N", help="context size, 0: the model's (the model's, at most 8192)"
    )
    machine.add_argument("--threads", "-t", type=int, metavar="N", help="threads (physical cores)")
    machine.add_argument("--isa", metavar="NAME", help=isa_help())
    add_cuda_arguments(machine)
    return parser.parse_intermixed_args()  # so that `-` may stand anywhere


def _command() -> None:
    args = _arguments()
    _check(args)
    prompt = _read_prompt(args)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    choose_isa(args.isa)
    started = time.perf_counter()
    session = Session(args)
    load_seconds = time.perf_counter() - started
    print(f"loaded {args.file} in {load_seconds:.2f} s: {session.backend}, context {session.n_ctx}", file=sys.stderr)
    if args.chat:
        for message in _turns(prompt):
            session.converse(message)
        return
    assert prompt is not None  # _check
    text, finish = session.answer(prompt, shown=not args.json)
    if args.json:
        print_json(_document(text, finish, load_seconds, session.backend))


def _check(args: argparse.Namespace) -> None:
    """Refuse bad usage before anything is loaded."""
    check_cuda(args)
    sources = [args.prompt is not None, args.prompt_file is not None, args.stdin is not None]
    if sum(sources) > 1:
        raise CQError("give one prompt: -p TEXT, -f FILE or -")
    if not any(sources) and not args.chat:
        raise CQError("no prompt: give -p TEXT, -f FILE or - (standard input), or --chat")
    for option, clash in (("--json", args.json), ("--raw", args.raw), ("-", args.stdin is not None)):
        if args.chat and clash:
            raise CQError(f"--chat and {option} exclude each other")
    if args.raw and args.system is not None:
        raise CQError("--raw and --system exclude each other")
    if args.max_tokens < -2:
        raise CQError(f"-n: {args.max_tokens} is neither a number of tokens nor -1 or -2")
    check_threads(args.threads)
    for option, value, least in (("--ctx", args.ctx, 0), ("--seed", args.seed, -1)):
        if value is not None and value < least:
            raise CQError(f"{option}: {value} is below {least}")
    StopFilter(args.stop)


def _read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt, without a file's last newline; None where --chat starts without one."""
    if args.prompt is not None:
        source, prompt = "-p", args.prompt
    elif args.prompt_file is not None:
        source, prompt = str(args.prompt_file), _decode(str(args.prompt_file), args.prompt_file.read_bytes())
    elif args.stdin is not None:
        source, prompt = "standard input", _decode("standard input", sys.stdin.buffer.read())
    else:
        return None
    if not prompt:
        raise CQError(f"{source}: the prompt is empty")
    return prompt


def _decode(source: str, data: bytes) -> str:
    """Without what an editor adds to a text: a byte order mark, carriage returns, the last newline."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise CQError(f"{source}: not UTF-8 text (byte {error.start})") from error


def _turns(first: str | None) -> Iterator[str]:
    """The user's messages; on a terminal each after a `> ` that stays out of standard output."""
    if first is not None:
        yield first
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if message := _decode("standard input", line).strip():
            yield message


class Session:
    """A loaded model and the conversation with it; the KV cache keeps what was said."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load the model; CQError if the file lacks what the arguments ask for."""
        model = load_model(
            args.file, n_ctx=args.ctx, n_threads=args.threads, cuda=args.cuda, gpu_layers=args.gpu_layers
        )
        self.backend, self.n_ctx = model.backend, model.n_ctx
        self._context = Context(model)
        self._tokenizer = Tokenizer.from_metadata(model.metadata)
        self._template = None if args.raw else ChatTemplate.from_metadata(model.metadata, self._tokenizer)
        if self._template is None and (args.chat or args.system is not None):
            raise CQError(f"{args.file}: no chat template in the file, which --chat and --system need")
        if self._template is None and not args.raw:
            print(f"{args.file} holds no chat template: continuing the prompt as it is", file=sys.stderr)
        temperature = None if args.temp is None else max(args.temp, 0.0)  # llama.cpp is greedy below 0 too
        config = SamplingConfig.resolve(
            model.metadata, temp=temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
            repeat_penalty=args.repeat_penalty,
        )  # fmt: skip
        self._sampler = Sampler(config, None if args.seed == -1 else args.seed)
        self._max_tokens, self._stops = max(args.max_tokens, -1), args.stop
        self._messages: list[Message] = [] if args.system is None else [Message(role="system", content=args.system)]

    def converse(self, message: str) -> None:
        """Answer one message of a chat, which ends neither at a full context nor at a message that does not fit."""
        before = list(self._messages)
        try:
            self._make_room(message)
            self.answer(message, shown=True)
        except PromptTooLong as error:
            print(f"warning: the message is left out: {error}", file=sys.stderr)
            self._messages = before

    def _make_room(self, message: str) -> None:
        """Forget the oldest turns if less than a quarter of the context would be left for the answer.

        What stays takes at most half of the context, so that the next turns need not be computed anew. CQError if the
        message does not fit even alone.
        """
        said, last = self._messages, Message(role="user", content=message)
        n_kept = sum(entry["role"] == "system" for entry in said[:1])  # the system message stays
        starts = [i for i in range(n_kept, len(said)) if said[i]["role"] == "user"]

        def length(start: int) -> int:
            return len(self._tokens([*said[:n_kept], *said[start:], last]))

        most = self.n_ctx - self.n_ctx // 4
        if length(n_kept) <= most:
            return
        fitting = [start for limit in (self.n_ctx // 2, most) for start in starts[1:] if length(start) <= limit]
        start = fitting[0] if fitting else len(said)
        self._context.check_length(length(start))
        n_dropped = sum(first < start for first in starts)
        if n_dropped:
            print(f"the context is full: the oldest turns of the chat ({n_dropped}) are forgotten", file=sys.stderr)
        self._messages = [*said[:n_kept], *said[start:]]

    def _tokens(self, messages: list[Message]) -> list[int]:
        """The prompt of a conversation, or the text of its one message where there is no template."""
        if self._template is None:
            tokens = self._tokenizer.encode(messages[-1]["content"], add_special=True)
        else:
            tokens = self._template.encode(messages)
        ids: list[int] = tokens.tolist()
        return ids

    def answer(self, message: str, shown: bool) -> tuple[str, Finish]:
        """Answer one message, streaming to standard output if shown."""
        self._messages.append(Message(role="user", content=message))
        tokens = self._tokens(self._messages)
        text = ""
        events = generate(
            self._context, self._tokenizer, tokens, self._sampler, self._max_tokens, self._stops,
            at_start=self._template is not None,
        )  # fmt: skip
        for event in events:
            if isinstance(event, Chunk):
                text += event.text
                if shown:
                    print(event.text, end="", flush=True)
            else:
                finish = event
        if shown:
            print(flush=True)
        self._messages.append(Message(role="assistant", content=text))
        print(_timings(finish), file=sys.stderr)
        return text, finish


def _timings(finish: Finish) -> str:
    return (
        f"prompt: {finish.prompt_evaluated} of {finish.prompt_tokens} tokens evaluated, {finish.prompt_tps:.1f} t/s; "
        f"answer: {finish.generated_tokens} tokens, {finish.gen_tps:.1f} t/s; stopped by {finish.stop_reason}"
    )


def _document(text: str, finish: Finish, load_seconds: float, backend: str) -> dict[str, str | int | float]:
    return {
        "text": text,
        "prompt_tokens": finish.prompt_tokens,
        "generated_tokens": finish.generated_tokens,
        "stop_reason": finish.stop_reason,
        "prompt_tps": finish.prompt_tps,
        "gen_tps": finish.gen_tps,
        "load_seconds": load_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "backend": backend,
    }


if __name__ == "__main__":
    main()
