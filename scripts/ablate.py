"""Every stage on and off: converts and measures case after case, then writes docs/quality.md and its plots.

    python scripts/ablate.py --smol SmolLM2.gguf --moe DIRECTORY --calibration A.txt --text B.txt
    python scripts/ablate.py --render     # only the page, from what docs/quality.json holds

Results are kept in docs/quality.json as they come, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_quality  # beside this script
import quality_page
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RESULTS = ROOT / "docs" / "quality.json"
MACHINE = "2 cores of a Xeon with AVX-512 VNNI, 2023"  # for the seconds: virtual machines do not tell their names

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Case:
    """One conversion and its measurement. group: the table it stands in; model: `smol` or `moe`."""

    group: str
    name: str
    options: tuple[str, ...] = ()
    model: str = "smol"
    tokens: int = 4096
    chunks: int = 12

    @property
    def key(self) -> str:
        """What makes it the same measurement."""
        options = self.name if self.model == "llama.cpp" else " ".join(self.options) or "default"
        return f"{self.model} {options} tokens={self.tokens} chunks={self.chunks}"


def paper(group: str, name: str, *options: str, model: str = "smol") -> Case:
    """A case of the published method."""
    return Case(group, name, ("--method", "paper", *options), model, tokens=4096, chunks=8)


A4 = ("--activation-bits", "4")
UNTUNED = (*A4, "--no-finetune")  # what the rotation and the grouping are worth does not wait for the tuning
BLOCKS = (*UNTUNED, "--group-size", "64")
CASES = (
    Case("acceptance", "SmolLM2, default", tokens=16384, chunks=40),
    Case("acceptance", "SmolLM2, 3.5 bpw", ("--target-bpw", "3.5"), tokens=16384, chunks=40),
    Case("acceptance", "SmolMoE, default", model="moe", tokens=16384, chunks=20),
    Case("stages", "all stages"),
    Case("size", "4.0 bpw, mixed", ("--target-bpw", "4.0")),
    Case("size", "CQ3", ("--bits", "3")),
    Case("size", "CQ4", ("--bits", "4")),
    paper("rotation", "learned", *UNTUNED),
    paper("rotation", "random", *UNTUNED, "--rotation", "random"),
    paper("rotation", "none", *UNTUNED, "--rotation", "none"),
    paper("grouping", "permuted, codebooks of 64 columns", *BLOCKS),
    paper("grouping", "not permuted", *BLOCKS, "--no-permutation"),
    paper("rotation", "learned, centroids fine-tuned", *A4),
    paper("tuning", "lambda 1", model="moe"),
    paper("tuning", "lambda 0", "--router-weight", "0", model="moe"),
    paper("tuning", "no fine-tuning", "--no-finetune", model="moe"),
    Case("moe stages", "all stages", model="moe"),
    Case("moe stages", "one type for all experts of a linear", ("--no-expert-types",), model="moe"),
    Case("moe stages", "routers' choices not in the sensitivity", ("--router-weight", "0"), model="moe"),
    Case("moe stages", "no coordinate descent", ("--no-finetune",), model="moe"),
    Case("stages", "types not mixed: CQ4, attn_v in Q8_0", ("--bits", "4")),
    Case("stages", "no types with a trellis", ("--no-trellis",)),
    Case("stages", "no sensitivity, types not mixed", ("--no-sensitivity",)),
    Case("stages", "no sensitivity, no error feedback", ("--no-feedback",)),
    Case("stages", "no coordinate descent", ("--no-finetune",)),
    Case("stages", "a codebook per row", ("--codebook-rows", "1")),
    Case("stages", "no group scales", ("--scale-group", "-1")),
    Case("stages", "a scale per 128 columns", ("--scale-group", "128")),
    Case("stages", "no rotation", ("--rotation", "none")),
    Case("stages", "random rotation", ("--rotation", "random")),
    Case("stages", "no transform before ffn_down", ("--no-hadamard",)),
    Case("stages", "all that --fast leaves out", ("--fast",)),
    Case("tokens", "2048", tokens=2048),
    Case("tokens", "8192", tokens=8192),
    Case("tokens", "16384", tokens=16384),
    Case("size", "3.0 bpw, mixed", ("--target-bpw", "3.0")),
    Case("size", "2.5 bpw, mixed", ("--target-bpw", "2.5")),
    Case("size", "3.5 bpw, mixed", ("--target-bpw", "3.5")),
    paper("moe rotation", "learned", *UNTUNED, model="moe"),
    paper("moe rotation", "random", *UNTUNED, "--rotation", "random", model="moe"),
    paper("moe rotation", "none", *UNTUNED, "--rotation", "none", model="moe"),
    Case("moe stages", "no sensitivity, types not mixed", ("--no-sensitivity",), model="moe"),
    Case("moe stages", "no sensitivity, no error feedback", ("--no-feedback",), model="moe"),
    Case("moe stages", "all that --fast leaves out", ("--fast",), model="moe"),
    *(Case("peer", name, model="llama.cpp") for name in peer_quality.TYPES),
)


def main() -> None:
    """Run the cases that have no result yet, then render."""
    arguments = parser().parse_args()
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    wanted = [] if arguments.render else [case for case in CASES if re.search(arguments.only, case.key)]
    models = {"smol": arguments.smol, "moe": arguments.moe, "llama.cpp": arguments.llama_cpp and arguments.smol}
    wanted = [case for case in wanted if case.key not in results and models[case.model] is not None]
    for case, result in measured(wanted, models, arguments):
        results[case.key] = result
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    quality_page.render(CASES, results, ROOT / "docs")


def measured(
    cases: list[Case], models: dict[str, Path], arguments: argparse.Namespace
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case and its result, as they come."""
    peer: peer_quality.Peer | None = None
    for case in cases:
        console.print(f"{case.group}: {case.name}")
        if case.model != "llama.cpp":
            yield case, run(case, models[case.model], arguments)
            continue
        if peer is None:
            texts = (arguments.calibration, arguments.text, arguments.work)
            peer = peer_quality.Peer(arguments.llama_cpp, models[case.model], *texts, case.tokens, case.chunks)
            peer.prepare()
        yield case, peer.measure(case.name)
    if peer is not None:
        peer.clean()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="measure every stage, write docs/quality.md")
    p.add_argument("--smol", type=Path, help="SmolLM2-135M, whatever cq-convert takes")
    p.add_argument("--moe", type=Path, help="the Mixture of Experts of scripts/make_smolmoe.py")
    p.add_argument("--llama-cpp", type=Path, metavar="BUILD", help="build directory of llama.cpp: its types too")
    p.add_argument("--calibration", type=Path, help="text to calibrate on")
    p.add_argument("--text", type=Path, help="other text to measure on")
    p.add_argument("--work", type=Path, default=ROOT / "build", help="where converted files go (build)")
    p.add_argument("--only", default="", metavar="REGEX", help="only cases whose key this finds")
    p.add_argument("--render", action="store_true", help="measure nothing, write the page")
    return p


def run(case: Case, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert and measure; what docs/quality.json keeps of both."""
    arguments.work.mkdir(exist_ok=True)
    out, report = arguments.work / "ablation.cq.gguf", arguments.work / "ablation.json"
    convert = [BIN / "cq-convert", model, "--out", out, "--overwrite", "--no-check", "--report", report]
    if case.group != "acceptance":  # the linears alone, and what llama.cpp's files of these models have
        convert += ["--tensor-type", "^output.weight=q8_0"]
    convert += ["--calibration", arguments.calibration, "--calibration-tokens", str(case.tokens), *case.options]
    measure = [
        BIN / "cq-perplexity",
        out,
        "-f",
        arguments.text,
        "--chunks",
        str(case.chunks),
        "--base",
        model,
        "--json",
    ]
    subprocess.run(convert, check=True, stderr=subprocess.DEVNULL)
    quality = json.loads(subprocess.run(measure, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    made = json.loads(report.read_text(encoding="utf-8"))
    out.unlink()
    kept = {name: made[name] for name in ("bpw", "seconds", "rotation_loss") if name in made}
    return kept | {"machine": MACHINE} | quality


if __name__ == "__main__":
    main()
