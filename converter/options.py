"""cq-convert's options: how they are declared, which of them contradict each other, and the settings they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyggml_bridge.cli.common import ArgumentParser, check_threads
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import BLOCK, MAX_COLS, Grouping
from pyggml_bridge.format import CODEBOOK_ROWS as ROW_COUNTS
from pyggml_bridge.machine import available_memory, default_threads

from .quantize.budget import DEFAULT_BPW, DEFAULT_EXPERTS_BPW
from .quantize.fitting import DESCENT_ROWS
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

DEFAULT_CALIBRATION_TOKENS = 16384  # more are better, and slower: docs/decisions/clustering.md


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="cq-convert", description="Hugging Face checkpoint -> clustered-codebook GGUF")
    p.add_argument("model", metavar="MODEL", help="directory with config.json and safetensors, hub id, or GGUF file")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the GGUF file to write")
    _add_type_options(p)
    _add_grouping_options(p)
    _add_method_options(p)
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


def _add_type_options(p: ArgumentParser) -> None:
    """Which clustered types the linears get."""
    p.add_argument("--bits", type=int, choices=(5, 4, 3, 2), default=None, help="one type for all linears")
    p.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help=f"mix types by sensitivity to X bits per weight ({DEFAULT_BPW}; {DEFAULT_EXPERTS_BPW} with experts)",
    )
    p.add_argument("--no-trellis", action="store_true", help="mix the types without a trellis only")
    p.add_argument("--no-expert-types", action="store_true", help="the same type for all experts of a layer's linear")


def _add_grouping_options(p: ArgumentParser) -> None:
    """What shares a codebook or a scale, and how activations are quantized beside it."""
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


def _add_method_options(p: ArgumentParser) -> None:
    """Calibration, and which steps the method takes."""
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


def _add_run_options(p: ArgumentParser) -> None:
    """How the conversion runs, which does not change what comes out; the seed too."""
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


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Checked settings; CQError naming the option that makes no sense."""
    a = arguments
    _check_ranges(a)
    _check_combinations(a)
    if a.fast:
        a.bits, a.no_sensitivity, a.descent_rounds = a.bits or 4, True, 0
        a.rotation = "none" if a.rotation == "none" else "random"
    paper = a.method == "paper"
    return Settings(
        model=a.model,
        out=a.out,
        bits=a.bits or (4 if paper else None),
        target_bpw=a.target_bpw,
        trellis=not a.no_trellis,
        expert_types=not a.no_expert_types,
        grouping=_grouping(a),
        activation_bits=a.activation_bits,
        calibration=a.calibration,
        calibration_tokens=a.calibration_tokens,
        method=a.method,
        rotation=a.rotation,
        hadamard=not (a.no_hadamard or paper or a.float_type),
        permutation=not a.no_permutation,
        refinement=_refinement(a),
        finetune=not a.no_finetune,
        router_weight=a.router_weight,
        overrides=tuple(Override.parse(text) for text in a.tensor_type),
        seed=a.seed,
        threads=a.threads or default_threads(),
        overwrite=a.overwrite,
        check=not a.no_check,
        max_memory=available_memory() if a.max_memory is None else int(a.max_memory * 1e9),
        work_dir=a.work_dir,
        resume=a.resume,
        float_type=a.float_type,
    )


def _grouping(a: argparse.Namespace) -> Grouping:
    scale_group, codebook_rows = (-1, 1) if a.method == "paper" else (64, CODEBOOK_ROWS)
    return Grouping(a.group_size, a.scale_group or scale_group, a.codebook_rows or codebook_rows)


def _refinement(a: argparse.Namespace) -> Refinement:
    if a.method == "paper" or a.float_type:
        return Refinement(False, False, 0)
    return Refinement(not a.no_feedback, not a.no_sensitivity, 0 if a.no_finetune else a.descent_rounds)


def _check_ranges(a: argparse.Namespace) -> None:
    """Each option by itself."""
    if a.group_size != -1 and (a.group_size < BLOCK or a.group_size % BLOCK or a.group_size > MAX_COLS):
        raise CQError(f"--group-size {a.group_size}: expected -1 or a multiple of {BLOCK} up to {MAX_COLS}")
    if a.calibration_tokens < 64:
        raise CQError(f"--calibration-tokens {a.calibration_tokens}: expected at least 64")
    check_threads(a.threads)
    if a.max_memory is not None and not 0 < a.max_memory <= 1e6:
        raise CQError(f"--max-memory {a.max_memory:g}: expected gigabytes, more than 0")
    if not 0 <= a.descent_rounds <= 1000:
        raise CQError(f"--descent-rounds {a.descent_rounds}: expected 0 .. 1000")
    if not 0 <= a.seed < 1 << 32:
        raise CQError(f"--seed {a.seed}: expected 0 .. 4294967295")
    if a.calibration and not a.calibration.is_file():
        raise CQError(f"--calibration {a.calibration}: no such file")
    if a.target_bpw is not None and not 0 < a.target_bpw <= 16:
        raise CQError(f"--target-bpw {a.target_bpw:g}: expected more than 0, at most 16")
    if not 0 <= a.router_weight <= 1e6:
        raise CQError(f"--router-weight {a.router_weight:g}: expected 0 .. 1000000")


def _check_combinations(a: argparse.Namespace) -> None:
    """Options that need or exclude others."""
    if a.target_bpw is not None and (a.bits or not a.calibration or a.no_sensitivity or a.no_feedback):
        raise CQError("--target-bpw: needs --calibration, and neither --bits nor --no-sensitivity nor --no-feedback")
    if a.fast and (a.target_bpw is not None or a.method == "paper" or a.float_type):
        raise CQError("--fast: not with --target-bpw, --method paper or --rotated-only")
    clustering = a.bits or a.target_bpw is not None or a.tensor_type or a.method == "paper"
    if a.float_type and clustering:
        raise CQError("--rotated-only: not with --bits, --target-bpw, --tensor-type or --method paper")
    for option, value, published in (
        ("--target-bpw", a.target_bpw, None),
        ("--scale-group", a.scale_group, -1),
        ("--codebook-rows", a.codebook_rows, 1),
    ):
        if a.method == "paper" and value not in (None, published):
            raise CQError(f"{option} {value:g}: not with --method paper")
