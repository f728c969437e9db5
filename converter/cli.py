"""cq-convert: arguments -> one frozen Settings -> the pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pyggml_bridge.cli.common import ArgumentParser, print_json, run_main
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import BLOCK, MAX_COLS, Grouping
from pyggml_bridge.format import CODEBOOK_ROWS as ROW_COUNTS
from pyggml_bridge.native import default_threads

from .console import console, warn
from .estimate.memory import free_memory
from .output.gguf_file import check_output
from .pipeline import Needs, convert, needs, plan_conversion
from .quantize.budget import DEFAULT_BPW, DEFAULT_EXPERTS_BPW
from .quantize.matrix import DESCENT_ROWS
from .quantize.plan import Plan
from .report import tensor_table
from .settings import (
    CODEBOOK_ROWS,
    DESCENT_ROUNDS,
    FLOAT_TYPES,
    METHODS,
    ROTATIONS,
    Override,
    Refinement,
    Settings,
)

LONG_SECONDS = 7200  # from here on a dry run says what is faster
DEFAULT_CALIBRATION_TOKENS = 16384  # more are better, and slower: docs/decisions/clustering.md


def main() -> None:
    """Entry point of cq-convert."""
    run_main(command)


def command() -> None:
    """Parse, convert, report."""
    arguments = parser().parse_args()
    settings = settings_of(arguments)
    if arguments.report and not arguments.report.resolve().parent.is_dir():
        raise CQError(f"--report {arguments.report}: no such directory")
    if arguments.dry_run:
        checkpoint, plan = plan_conversion(settings)
        show_plan(settings, plan, needs(settings, checkpoint, plan), arguments.json)
        return
    report = convert(settings)
    document = report.document()
    if arguments.report:
        arguments.report.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print_json(document)
    report.print()


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="cq-convert", description="Hugging Face checkpoint -> clustered-codebook GGUF")
    p.add_argument("model", metavar="MODEL", help="directory with config.json and safetensors, hub id, or GGUF file")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the GGUF file to write")
    p.add_argument("--bits", type=int, choices=(5, 4, 3, 2), default=None, help="one type for all linears")
    p.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help=f"mix types by sensitivity to X bits per weight ({DEFAULT_BPW}; {DEFAULT_EXPERTS_BPW} with experts)",
    )
    p.add_argument("--no-trellis", action="store_true", help="mix the plain types only")
    p.add_argument("--no-expert-types", action="store_true", help="the same type for all experts of a layer's linear")
    p.add_argument("--group-size", type=int, default=-1, metavar="N", help="columns that share a codebook; -1: the row")
    p.add_argument(
        "--codebook-rows",
        type=int,
        choices=ROW_COUNTS,
        help=f"rows that share their codebooks ({CODEBOOK_ROWS}; paper: 1)",
    )
    p.add_argument(
        "--scale-group", type=int, choices=(-1, 64, 128), help="columns that share a scale, -1: the row (64; paper: -1)"
    )
    p.add_argument("--activation-bits", type=int, choices=(8, 4), default=8, help="activations at run time")
    p.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate on; without it weights only")
    p.add_argument(
        "--calibration-tokens", type=int, default=DEFAULT_CALIBRATION_TOKENS, metavar="N", help="tokens used of it"
    )
    p.add_argument("--method", choices=METHODS, default="full", help="paper: AOS, POG and ACCF as published")
    p.add_argument(
        "--rotation", choices=ROTATIONS, default="learned", help="of the residual stream and the value heads"
    )
    p.add_argument("--no-rotation", dest="rotation", action="store_const", const="none", help="--rotation none")
    p.add_argument("--no-hadamard", action="store_true", help="no transform at run time before the FFN's last linear")
    p.add_argument("--no-permutation", action="store_true", help="keep the order of channels (with --group-size)")
    p.add_argument("--no-feedback", action="store_true", help="nearest centroids: no error feedback, no descent")
    p.add_argument("--no-sensitivity", action="store_true", help="no gradients: every output error counts the same")
    p.add_argument("--no-finetune", action="store_true", help="codebooks as k-means finds them")
    p.add_argument(
        "--router-weight", type=float, default=1.0, metavar="LAMBDA", help="weight of the routers' choices (1)"
    )
    p.add_argument(
        "--descent-rounds",
        type=int,
        default=DESCENT_ROUNDS,
        metavar="N",
        help=f"codebook refits, where each column has {DESCENT_ROWS} calibration tokens ({DESCENT_ROUNDS})",
    )
    p.add_argument(
        "--fast",
        action="store_true",
        help="for models too large to wait for: --bits 4 --no-sensitivity --descent-rounds 0 --rotation random",
    )
    p.add_argument("--tensor-type", action="append", default=[], metavar="REGEX=TYPE", help="type of matching matrices")
    p.add_argument(
        "--rotated-only",
        dest="float_type",
        nargs="?",
        choices=FLOAT_TYPES,
        const=FLOAT_TYPES[0],
        help="cluster nothing: the smoothed model in floats (f16), for llama.cpp and its quantizers",
    )
    _add_run_options(p)
    return p


def _add_run_options(p: ArgumentParser) -> None:
    """Those that say how it runs, not what comes out; the seed too."""
    p.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same bytes")
    p.add_argument("--threads", type=int, default=None, metavar="N", help="threads (default: physical cores)")
    p.add_argument("--max-memory", type=float, metavar="GB", help="memory it may take (what is free)")
    p.add_argument("--no-check", action="store_true", help="do not reload and run the result")
    p.add_argument("--dry-run", action="store_true", help="print types, sizes, memory, disk and time; write nothing")
    p.add_argument("--work-dir", type=Path, metavar="DIR", help="keep unfinished work there (--resume: FILE.work)")
    p.add_argument("--resume", action="store_true", help="go on with the unfinished work of the same conversion")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    p.add_argument("--report", type=Path, metavar="FILE.json", help="also write the report here")
    p.add_argument("--json", action="store_true", help="the report as JSON on standard output")


def _check(a: argparse.Namespace) -> None:
    if a.group_size != -1 and (a.group_size < BLOCK or a.group_size % BLOCK or a.group_size > MAX_COLS):
        raise CQError(f"--group-size {a.group_size}: expected -1 or a multiple of {BLOCK} up to {MAX_COLS}")
    if a.calibration_tokens < 64:
        raise CQError(f"--calibration-tokens {a.calibration_tokens}: expected at least 64")
    if a.threads is not None and not 1 <= a.threads <= 1024:
        raise CQError(f"--threads {a.threads}: expected 1 .. 1024")
    if a.max_memory is not None and not 0 < a.max_memory <= 1e6:
        raise CQError(f"--max-memory {a.max_memory:g}: expected gigabytes, more than 0")
    if not 0 <= a.descent_rounds <= 1000:
        raise CQError(f"--descent-rounds {a.descent_rounds}: expected 0 .. 1000")
    if not 0 <= a.seed < 1 << 32:
        raise CQError(f"--seed {a.seed}: expected 0 .. 4294967295")
    if a.calibration and not a.calibration.is_file():
        raise CQError(f"--calibration {a.calibration}: no such file")
    if a.target_bpw is not None and (a.bits or not a.calibration or a.no_sensitivity or a.no_feedback):
        raise CQError("--target-bpw: needs --calibration, and neither --bits nor --no-sensitivity nor --no-feedback")
    if a.target_bpw is not None and not 0 < a.target_bpw <= 16:
        raise CQError(f"--target-bpw {a.target_bpw:g}: expected more than 0, at most 16")
    if a.fast and (a.target_bpw is not None or a.method == "paper" or a.float_type):
        raise CQError("--fast: not with --target-bpw, --method paper or --rotated-only")
    clustering = a.bits or a.target_bpw is not None or a.tensor_type or a.method == "paper"
    if a.float_type and clustering:
        raise CQError("--rotated-only: not with --bits, --target-bpw, --tensor-type or --method paper")
    if not 0 <= a.router_weight <= 1e6:
        raise CQError(f"--router-weight {a.router_weight:g}: expected 0 .. 1000000")
    for option, value, published in (
        ("--target-bpw", a.target_bpw, None),
        ("--scale-group", a.scale_group, -1),
        ("--codebook-rows", a.codebook_rows, 1),
    ):
        if a.method == "paper" and value not in (None, published):
            raise CQError(f"{option} {value:g}: not with --method paper")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Checked settings; CQError naming the option that makes no sense."""
    a = arguments
    _check(a)
    if a.fast:
        a.bits, a.no_sensitivity, a.descent_rounds = a.bits or 4, True, 0
        a.rotation = "none" if a.rotation == "none" else "random"
    paper = a.method == "paper"
    refinement = Refinement(not a.no_feedback, not a.no_sensitivity, 0 if a.no_finetune else a.descent_rounds)
    return Settings(
        model=a.model,
        out=a.out,
        bits=a.bits or (4 if paper else None),
        target_bpw=a.target_bpw,
        trellis=not a.no_trellis,
        expert_types=not a.no_expert_types,
        grouping=Grouping(
            a.group_size, a.scale_group or (-1 if paper else 64), a.codebook_rows or (1 if paper else CODEBOOK_ROWS)
        ),
        activation_bits=a.activation_bits,
        calibration=a.calibration,
        calibration_tokens=a.calibration_tokens,
        method=a.method,
        rotation=a.rotation,
        hadamard=not (a.no_hadamard or paper or a.float_type),
        permutation=not a.no_permutation,
        refinement=Refinement(False, False, 0) if paper or a.float_type else refinement,
        finetune=not a.no_finetune,
        router_weight=a.router_weight,
        overrides=tuple(Override.parse(text) for text in a.tensor_type),
        seed=a.seed,
        threads=a.threads or default_threads(),
        overwrite=a.overwrite,
        check=not a.no_check,
        max_memory=free_memory() if a.max_memory is None else int(a.max_memory * 1e9),
        work_dir=a.work_dir,
        resume=a.resume,
        float_type=a.float_type,
    )


def show_plan(settings: Settings, plan: Plan, needs: Needs, as_json: bool) -> None:
    """The dry run's output; CQError if the output could not be written."""
    check_output(settings.out, settings.overwrite, plan.nbytes)
    if settings.measures_sensitivity and settings.bits is None:
        warn("types are chosen when sensitivity is measured; these are the ones without it")
    tensors: list[dict[str, Any]] = [
        {"name": t.name, "type": t.type_name, "shape": list(t.shape), "bpw": t.bpw, "bytes": t.nbytes}
        for t in plan.tensors
    ]
    if as_json:
        needed = {"peak_memory_bytes": needs.memory, "disk_bytes": needs.disk, "seconds": needs.seconds}
        print_json({"out": str(settings.out), "bytes": plan.nbytes, "bpw": plan.bpw, **needed, "tensors": tensors})
    console.print(tensor_table(plan, {}))
    console.print(
        f"{settings.out}: {plan.nbytes / 1e6:.1f} MB of tensors, {plan.bpw:.3f} bits per weight; "
        f"about {needs.memory / 1e9:.1f} GB of memory, {needs.disk / 1e9:.1f} GB of disk at most while it converts, "
        f"{needs.seconds / 60:.0f} minutes or so; "
        "nothing written"
    )
    if settings.measures_sensitivity and needs.seconds > LONG_SECONDS:
        console.print("--fast takes a fraction of that, for a larger divergence")


if __name__ == "__main__":
    main()
