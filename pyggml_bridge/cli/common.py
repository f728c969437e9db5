"""What every command line shares: exit codes, one-line errors, JSON on standard output."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pyggml_bridge.errors import CQError
from pyggml_bridge.machine import logical_cpus, require_threads

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Version(argparse.Action):
    """argparse's own action "version", except that the version is looked up only when someone asks."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from pyggml_bridge.version import package_version  # here: reading the package's metadata takes a while

        print(f"{parser.prog} {package_version()}")
        parser.exit()


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that bad usage is one `error: ...` line, like every other bad input; and with --version."""

    def __init__(self, **options: Any) -> None:
        """options: argparse's."""
        super().__init__(**options)
        self.add_argument("--version", action=_Version)

    def error(self, message: str) -> NoReturn:
        """Raise CQError instead of printing the usage."""
        raise CQError(message)


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
    """Run a command and exit: 0 done, 2 bad usage or input (one line on stderr), 130 interrupted."""
    try:
        command()
        sys.stdout.flush()
    except CQError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output went away: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except MemoryError as error:
        fail(f"not enough memory: {error}" if str(error) else "not enough memory")
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def fail(message: str) -> NoReturn:
    """Print one `error: ...` line on stderr and exit with 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def peak_memory_bytes() -> int:
    """The process's largest resident size so far, the mapped file's touched pages included."""
    import resource  # Unix only, like the memory map's advice

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_json(document: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write the one JSON document of --json to standard output."""
    print(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1))
