"""What every command line shares: exit codes, one-line errors, JSON on standard output."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyggml_bridge.cli.streams import Terminated, close_quietly, raised_signals, usable_streams
from pyggml_bridge.errors import CQError
from pyggml_bridge.machine import logical_cpus, require_threads

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Version(argparse.Action):
    """argparse's own action "version", except that the version is looked up only when someone asks."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from pyggml_bridge.version import package_version  # here: reading the package's metadata takes a while

        print(f"{parser.prog} {package_version()}")
        parser.exit()


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that bad usage is one `error: ...` line, like every other bad input; and with --version.

    Texts and paths that follow an option may begin with a dash, unless they are options of the same command.
    """

    def __init__(self, **options: Any) -> None:
        """options: argparse's."""
        super().__init__(**options)
        self.add_argument("--version", action=_Version)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        return super().parse_args(self._joined(args), namespace)

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's."""
        return super().parse_intermixed_args(self._joined(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Raise CQError instead of printing the usage."""
        raise CQError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse's, which drops a text `--`."""
        if action.option_strings and _takes_text(action) and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def _joined(self, args: Sequence[str] | None) -> list[str]:
        """The words with `-p ---` as `--prompt=---`: argparse takes every word with a dash for an option."""
        words, joined = list(sys.argv[1:] if args is None else args), list[str]()
        options = self._option_string_actions
        while words:
            word = words.pop(0)
            if word == "--":
                return [*joined, word, *words]
            action = options.get(word)
            follows = words[0] if words and words[0].startswith("-") else None
            if action and _takes_text(action) and follows and follows.partition("=")[0] not in options:
                word = f"{max(action.option_strings, key=len)}={words.pop(0)}"
            joined.append(word)
        return joined


def _takes_text(action: argparse.Action) -> bool:
    return action.nargs is None and action.choices is None and action.type in (None, Path)


def add_cuda_arguments(parser: argparse._ActionsContainer) -> None:
    """--cuda and --gpu-layers."""
    parser.add_argument("--cuda", action="store_true", help="run on an NVIDIA GPU")
    parser.add_argument(
        "--gpu-layers", "-ngl", type=int, metavar="N",
        help="with --cuda: only the last N layers wholly on the GPU (all); the CPU has the experts of the others, or "
        "all of them if the model has no experts",
    )  # fmt: skip


def check_cuda(args: argparse.Namespace) -> None:
    """CQError if these arguments contradict each other, or this machine cannot run with --cuda."""
    if args.gpu_layers is not None and not args.cuda:
        raise CQError("--gpu-layers: only with --cuda")
    if args.gpu_layers is not None and args.gpu_layers < 0:
        raise CQError(f"--gpu-layers: {args.gpu_layers} is below 0")
    if args.cuda:
        from pyggml_bridge.cuda.backend import require_device  # here: a start on the CPU need not wait for it

        require_device()


def check_threads(n_threads: int | None) -> None:
    """CQError unless this process can start so many threads; a warning if they are more than its processors."""
    if n_threads is None:
        return
    require_threads(n_threads, "--threads")
    n_cpus = logical_cpus()
    if n_threads > n_cpus:
        print(
            f"warning: --threads {n_threads}: this process may use {n_cpus} processors, and more threads are slower",
            file=sys.stderr,
        )


def run_main(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 bad usage, bad input or a write that failed (one line on stderr).

    After a signal 128 + its number (SIGINT 130, SIGTERM 143, SIGHUP 129), and 141, as after SIGPIPE, in silence if the
    reader of the output went away.
    """
    with usable_streams(), raised_signals():
        code = _exit_code(command)
    close_quietly(sys.stdout)
    close_quietly(sys.stderr)
    sys.exit(code)


def _exit_code(command: Callable[[], None]) -> int:
    try:
        try:
            command()
        except SystemExit as end:  # argparse's, after --help
            return int(end.code or 0)
        sys.stdout.flush()
    except CQError as error:
        return _failed(str(error))
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _failed(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except MemoryError as error:
        return _failed(f"not enough memory: {error}" if str(error) else "not enough memory")
    except Terminated as error:
        _failed(f"ended by {signal.Signals(error.number).name}")
        return 128 + error.number
    except KeyboardInterrupt:
        _failed("interrupted")
        return EXIT_INTERRUPTED
    return 0


def _failed(message: str) -> int:
    """Print one `error: ...` line on stderr; the exit code of bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_BAD_INPUT


def peak_memory_bytes() -> int:
    """The process's largest resident size so far, the mapped file's touched pages included."""
    import resource  # Unix only, like the memory map's advice

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_json(document: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write the one JSON document of --json to standard output, as print_result does. What is not finite is null."""
    finite = _finite(document)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False, indent=1)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an escape of Python's would be no JSON
        text = json.dumps(finite, allow_nan=False, indent=1)
    print_result(text)


def print_result(text: str) -> None:
    """Write what a command has found to standard output; if that fails, to standard error before the OSError."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        print(text, file=sys.stderr)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
