"""llama.cpp's own types on the chunks that scripts/ablate.py measures ours on: size, perplexity, divergence.

Programs of a llama.cpp build make an importance matrix of the calibration text, quantize and measure; the original is
its file in F32. Embedding and output stay in Q8_0, as in our files that this is held against, so that only the linear
layers differ.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

TYPES = ("IQ2_XS", "Q2_K", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M")
CHUNK = 512

PRINTED = {
    "ppl": r"^Mean PPL\(Q\)\s*:\s*([0-9.]+)",
    "base_ppl": r"^Mean PPL\(base\)\s*:\s*([0-9.]+)",
    "mean_kld": r"^Mean\s+KLD:\s*([0-9.]+)",
    "same_top_p": r"^Same top p:\s*([0-9.]+)",
}


@dataclass(frozen=True)
class Peer:
    """A llama.cpp build, and the texts. model: GGUF of the original; chunks: of 512 tokens to measure on."""

    build: Path
    model: Path
    calibration: Path
    text: Path
    work: Path
    tokens: int
    chunks: int

    def program(self, name: str, *arguments: object) -> str:
        """Standard output of one of their programs; CalledProcessError where it fails."""
        command = [str(self.build / "bin" / name), *map(str, arguments)]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout

    def prepare(self) -> None:
        """The original in F32, its logits on the text, and the importance matrix."""
        self.program("llama-quantize", "--allow-requantize", self.model, self.work / "peer-f32.gguf", "F32")
        sizes = ("-c", CHUNK, "-b", CHUNK)
        original = ("-m", self.work / "peer-f32.gguf", *sizes)
        self.program(
            "llama-imatrix", *original, "-f", self.calibration, "--chunks", self.tokens // CHUNK, "-o", self.imatrix
        )
        self.program(
            "llama-perplexity", *original, "-f", self.text, "--chunks", self.chunks, "--kl-divergence-base", self.logits
        )

    @property
    def imatrix(self) -> Path:
        """The importance matrix."""
        return self.work / "peer-imatrix.gguf"

    @property
    def logits(self) -> Path:
        """The original's logits."""
        return self.work / "peer-logits.bin"

    def measure(self, type_name: str) -> dict[str, Any]:
        """What docs/quality.json keeps of one type."""
        out = self.work / "peer.gguf"
        plain = ("--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")
        self.program("llama-quantize", "--imatrix", self.imatrix, *plain, self.work / "peer-f32.gguf", out, type_name)
        printed = self.program(
            "llama-perplexity", "-m", out, "-c", CHUNK, "-b", CHUNK, "--kl-divergence-base", self.logits,
            "--kl-divergence",
        )  # fmt: skip
        values = {name: float(_found(pattern, printed)) for name, pattern in PRINTED.items()}
        values["same_top_p"] /= 100
        result = {"bpw": linear_bpw(out), **values, "router_top_k_change": None}
        out.unlink()
        return result

    def clean(self) -> None:
        """Remove what prepare made."""
        for path in (self.work / "peer-f32.gguf", self.imatrix, self.logits):
            path.unlink(missing_ok=True)


def linear_bpw(path: Path) -> float:
    """Bits per weight of the matrices of the layers."""
    tensors = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"llama-perplexity printed nothing like {pattern}")
    return match[1]
