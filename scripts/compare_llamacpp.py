"""Our runner and llama.cpp (or ik_llama.cpp) in turn on one machine: prefill and decode, medians and ratios.

    python scripts/compare_llamacpp.py model.cq.gguf --build llama.cpp/build --models Q4_0.gguf IQ4_NL.gguf

`--build` is a directory of theirs that holds `bin/llama-bench`. Every round runs each engine once, so that a noisy
minute meets all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

BIN = Path(sys.executable).parent

Rates = dict[str, list[float]]  # tokens per second of every round, by test: pp512, tg128


def main() -> int:
    """Run the rounds, print the table."""
    arguments = parser().parse_args()
    bench = arguments.build / "bin" / "llama-bench"
    for path in (bench, arguments.file, *arguments.models):
        if not path.is_file():
            print(f"error: {path}: no such file", file=sys.stderr)
            return 2
    sizes = ["-p", str(arguments.n_prompt), "-n", str(arguments.n_gen), "-t", str(arguments.threads), "-r", "1"]
    ours = [str(BIN / "cq-bench"), str(arguments.file), *sizes, "--json"]
    ours += ["--isa", arguments.isa] if arguments.isa else []
    commands = {arguments.file.name: ours}
    for model, options in product(arguments.models, arguments.options or [""]):
        theirs = [str(bench), "-m", str(model), *sizes, *options.split(), "-o", "json"]
        commands[f"{model.name} {options}".strip()] = theirs
    console = Console(stderr=True)
    rates: dict[str, Rates] = {name: {} for name in commands}
    for _ in track(range(arguments.rounds), "rounds", console=console):
        for name, command in commands.items():
            for test, rate in run(command).items():
                rates[name].setdefault(test, []).append(rate)
    Console().print(table(rates, arguments.file.name))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="our runner and llama.cpp in turn")
    p.add_argument("file", type=Path, help="a file of cq-convert")
    p.add_argument("--build", type=Path, required=True, help="llama.cpp's build directory")
    p.add_argument("--models", type=Path, nargs="+", required=True, help="files for llama.cpp, of the same model")
    p.add_argument("--options", action="append", metavar="TEXT", help="of theirs, for rows of their own (--options=)")
    p.add_argument("-p", "--n-prompt", type=int, default=512, help="tokens of the prefill test (512)")
    p.add_argument("-n", "--n-gen", type=int, default=128, help="tokens of the decode test (128)")
    p.add_argument("-t", "--threads", type=int, default=2, help="threads of both (2)")
    p.add_argument("-r", "--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    p.add_argument("--isa", help="our instruction set (the widest)")
    return p


def run(command: list[str]) -> dict[str, float]:
    """One run of a bench program: tokens per second by test."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        sys.exit(f"error: {command[0]} exited with {done.returncode}: {reason}")
    return {test_name(result): result["avg_ts"] for result in json.loads(done.stdout)}


def test_name(result: dict[str, object]) -> str:
    """`pp512` or `tg128`, of either program's JSON."""
    if "test" in result:
        return str(result["test"])
    return f"pp{result['n_prompt']}" if result["n_prompt"] else f"tg{result['n_gen']}"


def table(rates: dict[str, Rates], ours: str) -> Table:
    """Medians, and how many times a peer's rate ours is."""
    out = Table("file", "test", "t/s", "lowest", "highest", "ours / theirs")
    for name, tests in rates.items():
        for test, samples in tests.items():
            ratio = median(rates[ours][test]) / median(samples)
            spread = (f"{value:.1f}" for value in (median(samples), min(samples), max(samples)))
            out.add_row(name, test, *spread, "" if name == ours else f"{ratio:.2f}")
    return out


if __name__ == "__main__":
    sys.exit(main())
