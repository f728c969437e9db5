"""cq-perplexity: perplexity of a GGUF file on a text, and its divergence from a base model in the same pass."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path

import numpy as np

from pyggml_bridge.cli.common import (
    ArgumentParser,
    add_cuda_arguments,
    check_cuda,
    check_threads,
    print_json,
    print_result,
    run_main,
)
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType
from pyggml_bridge.measure.perplexity import (
    Base,
    RunnerReference,
    Statistics,
    chunks_of,
    mean_and_error,
    measure,
    require_same_vocabulary,
)
from pyggml_bridge.model import Model
from pyggml_bridge.models import architectures, load_model
from pyggml_bridge.native import choose_isa, isa_help
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.tokenizer import Tokenizer
from pyggml_bridge.weights import STOCK_TYPES


def main() -> None:
    """Entry point."""
    run_main(_command)


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="cq-perplexity", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="CQ, F32, F16 or Q8_0 GGUF")
    parser.add_argument("-f", "--text", required=True, metavar="TEXT", help="UTF-8 text file")
    parser.add_argument("-c", "--ctx", type=int, default=512, metavar="N", help="tokens per chunk (512)")
    parser.add_argument("--chunks", type=int, metavar="N", help="stop after N chunks")
    parser.add_argument("--threads", "-t", type=int, metavar="N", help="threads (physical cores)")
    parser.add_argument("--isa", metavar="NAME", help=isa_help())
    parser.add_argument(
        "--base", metavar="MODEL", help="original: a GGUF, or what cq-convert accepts (needs [convert])"
    )
    add_cuda_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser.parse_args()


def _command() -> None:
    args = _arguments()
    check_cuda(args)
    if args.ctx < 4 or (args.chunks is not None and args.chunks < 1):
        raise CQError("-c must be at least 4, --chunks at least 1")
    check_threads(args.threads)
    choose_isa(args.isa)
    text = _read_text(Path(args.text))
    model = _load(args.file, args)
    tokenizer = Tokenizer.from_metadata(model.metadata)
    tokens = tokenizer.encode(text, add_special=True, parse_special=False)  # as llama-perplexity does
    chunks = chunks_of(tokens, args.ctx, args.chunks, tokenizer.bos_id if tokenizer.add_bos else None)
    first = next(chunks)  # a text that is too short fails before the base model is loaded
    base = _load_base(args.base, args) if args.base else None
    if base is not None:
        require_same_vocabulary(model, base, tokens)
    count = min(args.chunks or len(tokens), len(tokens) // args.ctx)
    print(f"perplexity: calculating perplexity over {count} chunks, n_ctx={args.ctx}, {model.backend}", file=sys.stderr)
    statistics = Statistics()
    for i, statistics in enumerate(measure(model, chain([first], chunks), base), 1):
        print(f"[{i}]{statistics.perplexity()[0]:.4f},", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    if args.json:
        print_json(asdict(statistics.summary()))
    else:
        print_result("\n".join(_report(statistics)))


def _load(path: str, args: argparse.Namespace) -> Model:
    return load_model(
        path, n_ctx=args.ctx, n_threads=args.threads, n_batch=args.ctx, cuda=args.cuda, gpu_layers=args.gpu_layers
    )


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CQError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return text.removesuffix("\n")


def _load_base(base: str, args: argparse.Namespace) -> Base:
    """A GGUF in types the runner multiplies goes through the runner, everything else through transformers."""
    if base.lower().endswith(".gguf") and Path(base).is_file():
        file = GGUFFile(base)
        runnable = {int(kind) for kind in STOCK_TYPES} | set(CQType)
        weights = [tensor for name, tensor in file.tensors.items() if name.endswith(".weight")]
        if file.metadata.get("general.architecture") in architectures() and all(
            int(tensor.type) in runnable for tensor in weights
        ):
            return RunnerReference(_load(base, args))
    for entry in entry_points(group="codequant.reference"):
        try:
            return entry.load()(base)
        except ImportError as error:
            raise CQError(f"--base {base}: needs the convert extra (pip install 'codequant-gguf[convert]')") from error
    raise CQError(f"--base {base}: no package provides a reference model")


def _report(statistics: Statistics) -> Iterator[str]:
    """The lines of the report, as llama-perplexity has them."""
    ppl, error = statistics.perplexity()
    if not statistics.kld:
        yield f"Final estimate: PPL = {ppl:.4f} +/- {error:.5f}"
        return
    base_ppl, base_error = statistics.perplexity("base_nll")
    nll, base_nll = np.concatenate(statistics.nll), np.concatenate(statistics.base_nll)
    ratio, ratio_error = mean_and_error(nll - base_nll)
    yield "====== Perplexity statistics ======"
    yield f"Mean PPL(Q)                   : {ppl:10.6f} ± {error:10.6f}"
    yield f"Mean PPL(base)                : {base_ppl:10.6f} ± {base_error:10.6f}"
    yield f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * np.corrcoef(nll, base_nll)[0, 1]:9.2f}%"
    yield f"Mean ln(PPL(Q)/PPL(base))     : {ratio:10.6f} ± {ratio_error:10.6f}"
    yield f"Mean PPL(Q)/PPL(base)         : {np.exp(ratio):10.6f} ± {np.exp(ratio) * ratio_error:10.6f}"
    yield f"Mean PPL(Q)-PPL(base)         : {ppl - base_ppl:10.6f}"
    kld, delta_p = np.concatenate(statistics.kld), 100 * np.concatenate(statistics.delta_p)
    yield "\n====== KL divergence statistics ======"
    mean, mean_error = mean_and_error(kld)
    yield f"Mean    KLD: {mean:10.6f} ± {mean_error:10.6f}"
    for label, quantile in _QUANTILES:
        yield f"{label} KLD: {np.quantile(kld, quantile):10.6f}"
    yield "\n====== Token probability statistics ======"
    mean, mean_error = mean_and_error(delta_p)
    yield f"Mean    Δp: {mean:6.3f} ± {mean_error:5.3f} %"
    for label, quantile in _QUANTILES:
        yield f"{label} Δp: {np.quantile(delta_p, quantile):6.3f}%"
    yield f"RMS Δp    : {np.sqrt(np.mean(delta_p**2)):6.3f} %"
    mean, mean_error = mean_and_error(np.concatenate(statistics.same_top).astype(np.float64))
    yield f"Same top p: {100 * mean:6.3f} ± {100 * mean_error:5.3f} %"
    if statistics.routing_sets:
        share = 100 * statistics.routing_changes / statistics.routing_sets
        yield f"Router top-k changed: {share:6.3f} %"


_QUANTILES = (
    ("Maximum", 1.0), ("99.9%  ", 0.999), ("99.0%  ", 0.99), ("95.0%  ", 0.95), ("90.0%  ", 0.9), ("Median ", 0.5),
    ("10.0%  ", 0.1), (" 5.0%  ", 0.05), (" 1.0%  ", 0.01), ("Minimum", 0.0),
)  # fmt: skip


if __name__ == "__main__":
    main()
