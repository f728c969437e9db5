"""cq-bench: prefill and decode speed as llama-bench measures them, or the kernels alone with --kernels."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pyggml_bridge.cli.common import (
    ArgumentParser,
    add_cuda_arguments,
    check_cuda,
    check_threads,
    peak_memory_bytes,
    print_json,
    print_result,
    run_main,
)
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key, cq_type
from pyggml_bridge.machine import default_threads
from pyggml_bridge.measure.bench import BenchResult, KernelResult, cpu_name, measure_kernels, measure_tests
from pyggml_bridge.measure.sizes import tensor_sizes
from pyggml_bridge.measure.synthetic import SHAPES, synthetic_bytes, write_synthetic
from pyggml_bridge.model import Model
from pyggml_bridge.models import load_model
from pyggml_bridge.native import choose_isa, isa_help
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights


def main() -> None:
    """Entry point."""
    run_main(_command)


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="cq-bench", description=__doc__)
    parser.add_argument("file", metavar="FILE", nargs="?")
    parser.add_argument(
        "--synthetic", metavar="NAME", help=f"instead of FILE, random weights in the shapes of {' or '.join(SHAPES)}"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="with --synthetic: only so many layers")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens of the prefill test (512)")
    parser.add_argument("-n", "--n-gen", type=int, default=128, metavar="N", help="tokens of the decode test (128)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="runs of each test (5)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (physical cores)")
    parser.add_argument("-d", "--n-depth", type=int, default=0, metavar="N", help="tokens in the KV cache before (0)")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="table or JSON")
    parser.add_argument("--isa", metavar="NAME", help=isa_help())
    parser.add_argument("--kernels", action="store_true", help="the GEMV and GEMM alone on the model's shapes")
    add_cuda_arguments(parser)
    parser.add_argument("--json", action="store_true", help="same as -o json")
    return parser.parse_args()


def _command() -> None:
    args = _arguments()
    check_cuda(args)
    if args.cuda and args.kernels:
        raise CQError("--kernels measures the CPU's kernels: not with --cuda")
    if min(args.n_prompt, args.n_gen, args.n_depth) < 0 or args.repetitions < 1:
        raise CQError("-p, -n and -d must be at least 0, -r at least 1")
    check_threads(args.threads)
    choose_isa(args.isa)
    with _file(args) as file:
        args.file = file
        as_json = args.json or args.output == "json"
        if args.kernels:
            _show_kernels(_kernels(args), as_json)
        else:
            _show_tests(*_tests(args), as_json)


@contextmanager
def _file(args: argparse.Namespace) -> Iterator[str]:
    """The file to measure; one of random weights is gone afterwards."""
    if (args.file is None) == (args.synthetic is None):
        raise CQError("expected either FILE or --synthetic NAME")
    if args.synthetic is None:
        if args.layers is not None:
            raise CQError("--layers: only with --synthetic")
        yield args.file
        return
    shape = SHAPES.get(args.synthetic)
    if shape is None:
        raise CQError(f"--synthetic {args.synthetic}: not supported (only {', '.join(SHAPES)})")
    layers = shape.layers if args.layers is None else args.layers
    if not 1 <= layers <= shape.layers:
        raise CQError(f"--layers {layers}: expected 1 .. {shape.layers}")
    with tempfile.TemporaryDirectory() as folder:
        needed, free = synthetic_bytes(shape, layers), shutil.disk_usage(folder).free
        if free < needed:
            raise CQError(f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed")
        path = Path(folder, f"{args.synthetic}.gguf")
        print(f"writing {needed / 1e9:.2f} GB of random weights to {path}", file=sys.stderr)
        write_synthetic(path, shape, layers)
        yield str(path)


@dataclass(frozen=True)
class Setup:
    """What was measured and where, in llama-bench's fields; sizes in bytes."""

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_threads: int
    n_gpu_layers: int
    backend: str
    cpu_info: str
    n_depth: int
    peak_memory_bytes: int

    @classmethod
    def of(cls, model: Model, depth: int) -> Setup:
        """After the tests, when the memory was used."""
        sizes, keys = tensor_sizes(model.file), model.metadata
        return cls(
            model_filename=str(model.file.path),
            model_type=str(keys.get(Key.GENERAL_NAME) or keys[Key.GENERAL_ARCHITECTURE]),
            model_size=sum(size.nbytes for size in sizes),
            model_n_params=sum(size.n_weights for size in sizes),
            n_threads=model.n_threads,
            n_gpu_layers=model.gpu_layers,
            backend=model.backend,
            cpu_info=cpu_name(),
            n_depth=depth,
            peak_memory_bytes=peak_memory_bytes(),
        )


def _tests(args: argparse.Namespace) -> tuple[Setup, list[BenchResult]]:
    if not args.n_prompt and not args.n_gen:
        raise CQError("-p and -n are both 0: nothing to measure")
    longest = args.n_depth + max(args.n_prompt, args.n_gen)
    model = load_model(args.file, n_ctx=longest, n_threads=args.threads, cuda=args.cuda, gpu_layers=args.gpu_layers)
    results = measure_tests(model, args.n_prompt, args.n_gen, args.n_depth, args.repetitions)
    return Setup.of(model, args.n_depth), results


def _kernels(args: argparse.Namespace) -> list[KernelResult]:
    file = GGUFFile(args.file)
    shapes = {(cq, t.shape[-2], t.shape[-1]) for t in file.tensors.values() if (cq := cq_type(t.type))}
    if not shapes:
        raise CQError(f"{file.path}: holds no CQ tensors")
    print(f"{cpu_name()}, {args.threads or default_threads()} threads", file=sys.stderr)
    return measure_kernels(sorted(shapes), args.threads or default_threads(), Weights(file).grouping)


def _show_tests(setup: Setup, results: list[BenchResult], as_json: bool) -> None:
    if as_json:
        print_json([asdict(setup) | asdict(result) for result in results])
        return
    size, params = f"{setup.model_size / 2**20:.2f} MiB", f"{setup.model_n_params / 1e6:.2f} M"
    common = [setup.model_type, size, params, setup.backend, str(setup.n_threads)]
    rows = [[*common, result.test, f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}"] for result in results]
    _print_table(["model", "size", "params", "backend", "threads", "test", "t/s"], rows)


def _show_kernels(results: list[KernelResult], as_json: bool) -> None:
    if as_json:
        print_json([asdict(result) for result in results])
        return
    rates = [(r.gbps, r.gmacs, r.frac_bandwidth, r.frac_peak) for r in results]
    rows = [[r.kernel, r.shape, *(f"{x:.3f}" for x in of)] for r, of in zip(results, rates, strict=True)]
    _print_table([field.name for field in fields(KernelResult)], rows)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [[column.ljust(width) for column, width in zip(columns, widths, strict=True)]]
    lines.append(["-" * (width - 1) + ":" for width in widths])
    lines += [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    print_result("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


if __name__ == "__main__":
    main()
