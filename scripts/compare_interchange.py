"""cq-run and llama.cpp on the same exported files: a small seeded model of every architecture, tokens and predictions.

    python scripts/compare_interchange.py --build llama.cpp/build --text text.txt

`--build` is a directory of theirs that holds `bin/llama-perplexity`. Each model is converted by cq-convert with all
stages and F16 weights, written back by cq-export, and read by both programs. They agree if the tokens are equal and the
perplexities differ by less than 0.1%; phimoe, whose routing llama.cpp does not have, is shown and does not count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from interchange_models import MODELS, save
from numpy.typing import NDArray

from pyggml_bridge.measure.perplexity import chunks_of, measure
from pyggml_bridge.model import Model
from pyggml_bridge.models import load_model, phimoe
from pyggml_bridge.operations import Route, Scoring
from pyggml_bridge.program import Program
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.tokenizer import Tokenizer
from pyggml_bridge.weights import Weights

BIN = Path(sys.executable).parent
N_CTX = 512
TOLERANCE = 1e-3
OTHERWISE = "phimoe"  # its router is SparseMixer, llama.cpp's a softmax


class SavedLogits:
    """What `llama-perplexity --kl-divergence-base` saves: tokens int32 [chunks, n_ctx], log-probabilities in 16 bits.

    Layout: "_logits_", int32 n_ctx, n_vocab, n_chunk, the tokens; then for each scored position float32 scale and
    lowest log-probability, and a uint16 per token, the vocabulary padded to an even number.
    """

    def __init__(self, path: Path) -> None:
        """Map the file."""
        data = np.memmap(path, np.uint8)
        n_ctx, self.n_vocab, n_chunk = (int(n) for n in data[8:20].view(np.int32))
        end = 20 + 4 * n_ctx * n_chunk
        self.tokens: NDArray[np.int32] = data[20:end].view(np.int32).reshape(n_chunk, n_ctx)
        self._rows = data[end:].view(np.uint16).reshape(n_chunk, n_ctx - 1 - n_ctx // 2, -1)
        self._next = 0

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probabilities [n, vocab] of the next chunk's n tokens; zero where no position is scored."""
        rows = self._rows[self._next]
        self._next += 1
        found = np.zeros((len(tokens), self.n_vocab), np.float32)
        scale, low = np.ascontiguousarray(rows[:, :4]).view(np.float32).T
        found[len(tokens) // 2 : -1] = rows[:, 4 : 4 + self.n_vocab] * scale[:, None] + low[:, None]
        return found

    def router_top_k(self) -> None:
        """Not saved."""


@dataclass(frozen=True)
class Result:
    """One line of the table; their_ppl of the log-probabilities they saved (they print it at most times only)."""

    name: str
    same_tokens: bool
    our_ppl: float
    their_ppl: float
    kld: float
    same_top: float

    @property
    def difference(self) -> float:
        """Of the perplexities, relative."""
        return self.our_ppl / self.their_ppl - 1

    @property
    def agrees(self) -> bool:
        """Whether it is what the file promises."""
        return self.same_tokens and abs(self.difference) < TOLERANCE

    def line(self) -> str:
        """Of a Markdown table."""
        tokens = "same" if self.same_tokens else "DIFFERENT"
        figures = f"{self.our_ppl:.2f} | {self.their_ppl:.2f} | {self.difference:+.4%} | {self.kld:.1e}"
        return f"| {self.name} | {tokens} | {figures} | {self.same_top:.1%} |"


HEADER = """\
| model | tokens | perplexity, cq-run | llama.cpp | difference | mean KLD | same top token |
|---|---|---|---|---|---|---|"""


def main() -> int:
    """Print the table; 1 if a model that should agree does not."""
    a = parser().parse_args()
    program = a.build / "bin" / "llama-perplexity"
    for path in (program, a.text):
        if not path.is_file():
            print(f"error: {path}: no such file", file=sys.stderr)
            return 2
    results = []
    print(HEADER)
    for name in a.models:
        with TemporaryDirectory() as folder:
            for result in compare(name, Path(folder), program, a.text, a.chunks, a.type):
                print(result.line(), flush=True)
                results.append(result)
    return int(any(not result.agrees for result in results if result.name != OTHERWISE))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="cq-run and llama.cpp on the same exported files")
    p.add_argument("--build", type=Path, required=True, help="llama.cpp's build directory")
    p.add_argument(
        "--text", type=Path, required=True, help="UTF-8 text: tokenizers are trained on it, models run on it"
    )
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="some of them")
    p.add_argument("--chunks", type=int, default=4, metavar="N", help=f"chunks of {N_CTX} tokens (4)")
    p.add_argument("--type", choices=("f16", "f32", "q8_0"), default="f16", help="of cq-export (f16)")
    return p


def compare(name: str, folder: Path, program: Path, text: Path, chunks: int, kind: str) -> Iterator[Result]:
    """Save, convert, export and measure one model; phimoe a second time with llama.cpp's routing in our runner."""
    exported, saved = folder / "exported.gguf", folder / "logits"
    save(name, folder / "model", text.read_text(encoding="utf-8"))
    options = (
        "--tensor-type",
        f".={'f32' if kind == 'f32' else 'f16'}",
        "--group-size",
        "64",
        "--calibration",
        str(text),
        "--calibration-tokens",
        "4096",
    )
    run(str(BIN / "cq-convert"), str(folder / "model"), "--out", str(folder / "m.cq.gguf"), *options)
    run(str(BIN / "cq-export"), str(folder / "m.cq.gguf"), "--out", str(exported), "--type", kind)
    sizes = ("-c", str(N_CTX), "-b", str(N_CTX), "--chunks", str(chunks), "-t", "2")
    run(str(program), "-m", str(exported), "-f", str(text), *sizes, "--kl-divergence-base", str(saved))
    models = {name: load_model(exported, n_ctx=N_CTX)}
    if name == OTHERWISE:
        weights = Weights(GGUFFile(exported))
        softmax = with_softmax_router(phimoe.build(weights, N_CTX))
        models["phimoe, softmax router in cq-run too"] = Model(weights.file, softmax, N_CTX, 2)
    for label, model in models.items():
        yield measured(label, model, text, SavedLogits(saved))


def with_softmax_router(program: Program) -> Program:
    """The program with the choice of experts that llama.cpp makes for Phi-MoE."""
    for i, op in enumerate(program.ops):
        if isinstance(op, Route):
            program.ops[i] = replace(op, scoring=Scoring.SOFTMAX, normalize=True, jitter=0.0)
    return program


def measured(name: str, model: Model, text: Path, theirs: SavedLogits) -> Result:
    """Our tokens and predictions beside theirs."""
    tokenizer = Tokenizer.from_metadata(model.metadata)
    tokens = tokenizer.encode(text.read_text(encoding="utf-8").removesuffix("\n"), add_special=True)
    same = bool(np.array_equal(tokens[: theirs.tokens.size], theirs.tokens.ravel()))
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    *_, statistics = measure(model, chunks_of(tokens, N_CTX, len(theirs.tokens), bos), theirs)
    summary = asdict(statistics.summary())
    return Result(name, same, summary["ppl"], summary["base_ppl"], summary["mean_kld"], summary["same_top_p"])


def run(*command: str) -> None:
    """Run a program; exits with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        sys.exit(f"error: {command[0]} exited with {done.returncode}:\n{tail}")


if __name__ == "__main__":
    sys.exit(main())
