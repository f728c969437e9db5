"""What a program costs on a GPU by arithmetic alone: chips' data sheets, weights without contents, and times."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pyggml_bridge import program as p
from pyggml_bridge.backend import values_of
from pyggml_bridge.cuda.linear import GEMV_MAX_TOKENS, TILE_TOKENS
from pyggml_bridge.cuda.program import CUDAProgram, DeviceInfo
from pyggml_bridge.format import BLOCK, Clustered, CQType
from pyggml_bridge.measure.synthetic import CODEBOOK_ROWS, HADAMARD, HEAD, SCALE_GROUP, Shape
from pyggml_bridge.models.decoder import build_decoder
from pyggml_bridge.weights import Matrix, Weights

TABLE = Path(__file__).resolve().parents[1] / "docs" / "cuda-kernels.csv"
N_CTX, N_BATCH = 4096, 512
GAP_SECONDS = 1.5e-6  # assumed: from the end of one kernel of a graph to the start of the next that waits for it
HANDOVER_SECONDS = 30e-6  # assumed: copies, a synchronization and Python, there and back
TAKEN_BYTES = 1 << 30  # assumed: a display and CUDA's context
GEMV_WEIGHTS = 8 * 32  # of a lane in one turn of gemv.cu's loop
GEMM_ROWS, GEMM_COLUMNS, GEMM_WARPS = 128, 64, 8  # of a block in one turn of gemm.cu's loop
ATTENTION_INSTRUCTIONS = 1.4  # per multiply-add: of 16, two loads of queries and four of keys; of four, one of values
ISSUED, ON_A_PIPE = 128, 64  # lanes a clock of a multiprocessor: four schedulers; ALU or integer FMA pipe


@dataclass(frozen=True)
class Chip:
    """A GPU and the machine around it. macs: int8, dense, a clock of a multiprocessor; mma_share: what mma.sync gets.

    macs of the tensor cores and host_macs are multiply-adds, bandwidth, pcie and host_bandwidth bytes a second.
    """

    name: str
    sm: int
    processors: int
    clock: float
    memory_bytes: float
    bandwidth: float
    macs: int
    mma_share: float
    pcie: float
    max_warps: int
    max_blocks: int
    shared_bytes: int
    host_bandwidth: float
    host_macs: float

    @property
    def free_bytes(self) -> int:
        """What the runner may take."""
        return int(self.memory_bytes) - TAKEN_BYTES

    @property
    def info(self) -> DeviceInfo:
        """As the runner sees it."""
        return DeviceInfo(self.processors)


KIB, GIB = 1 << 10, 1 << 30
CHIPS = (
    Chip("H100 SXM", 90, 132, 1.83e9, 79.6 * GIB, 3350e9, 4096, 0.63, 50e9, 64, 32, 228 * KIB, 200e9, 2e12),
    Chip("RTX 4090", 89, 128, 2.52e9, 24 * GIB, 1008e9, 1024, 1.0, 25e9, 48, 24, 100 * KIB, 70e9, 0.8e12),
    Chip("RTX 4060 Laptop", 89, 24, 1.92e9, 8 * GIB, 256e9, 1024, 1.0, 12e9, 48, 24, 100 * KIB, 60e9, 0.5e12),
)


# ---- weights without contents ----


def _sized(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    """An array of that size, at an address of its own, that takes no memory."""
    return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape), writeable=False)


class SizesOnly(Weights):
    """A model's weights as default conversions have them: CQ4, every fourth layer CQ5, embedding Q8_0, head CQ5."""

    def __init__(self, shape: Shape) -> None:
        """Nothing is read."""
        heads: dict[str, float] = {"attention.head_count": shape.heads, "attention.head_count_kv": shape.kv_heads}
        heads |= {"attention.key_length": shape.head_dim, "attention.layer_norm_rms_epsilon": 1e-6}
        experts = {"expert_count": shape.experts, "expert_used_count": shape.top_k}
        widths = {"embedding_length": shape.hidden, "feed_forward_length": shape.ffn, "block_count": shape.layers}
        keys: dict[str, Any] = {f"{shape.arch}.{key}": value for key, value in (heads | experts | widths).items()}
        keys["general.architecture"] = shape.arch
        tensors = {"token_embd.weight": SimpleNamespace(shape=(shape.vocab, shape.hidden))}
        if shape.head_norms:
            names = [f"blk.{i}.attn_{x}_norm.weight" for i in range(shape.layers) for x in "qk"]
            tensors |= dict.fromkeys(names, SimpleNamespace(shape=(shape.head_dim,)))
        self._names = {"output.weight", *tensors}
        file = SimpleNamespace(
            path=shape.arch, tensors=tensors, get=lambda key, _, default=None: keys.get(key, default)
        )
        self.file, self.activation_bits = file, 8  # type: ignore[assignment]

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        return name in self._names

    def hadamard(self, linear: str, width: int) -> int:
        """As cq-convert sets it."""
        return HADAMARD

    def vector(self, name: str, n: int) -> NDArray[np.float32]:
        """A norm's weights."""
        return _sized(n, dtype=np.float32)

    def matrix(self, name: str, n_rows: int, n_cols: int, n_experts: int | None = None) -> Matrix:
        """A weight [n_rows, n_cols] or [n_experts, n_rows, n_cols]."""
        n, sizes = n_experts or 1, (n_experts or 1, n_rows, n_cols)
        if name == "token_embd.weight":
            return Matrix(name, GGMLQuantizationType.Q8_0, *sizes, _sized(n * n_rows * n_cols // 32 * 34))
        if "ffn_gate_inp" in name:
            return Matrix(name, GGMLQuantizationType.F32, *sizes, _sized(n * n_rows * n_cols * 4))
        layer = 3 if name == "output.weight" else int(name.split(".")[1])
        cq = HEAD if name == "output.weight" else CQType.CQ5 if layer % 4 == 3 else CQType.CQ4
        packed = _sized(n, n_rows, n_cols // BLOCK * cq.block_bytes)
        centroids = _sized(n, -(-n_rows // CODEBOOK_ROWS), cq.n_centroids, dtype=np.int8)
        scales = _sized(n, n_rows, dtype=np.float32)
        groups = _sized(n, n_rows, -(-n_cols // SCALE_GROUP), dtype=np.int8)
        clustered = Clustered(cq, packed, centroids, scales, groups, n_cols, SCALE_GROUP, CODEBOOK_ROWS)
        data = _sized(packed.nbytes)
        return Matrix(name, GGMLQuantizationType(cq), *sizes, data, clustered)


def program_of(shape: Shape) -> p.Program:
    """The forward pass that the runner would record."""
    return build_decoder(SizesOnly(shape), N_CTX, interleaved_rope=not shape.head_norms)


# ---- bytes and multiply-adds ----


def matrix_bytes(w: Matrix) -> int:
    """Of all experts, sidecars included."""
    return w.clustered.nbytes if w.clustered else w.data.nbytes


def used_share(op: p.Linear) -> float:
    """Of a matrix's experts that a token multiplies."""
    return op.routing.top_k / op.routing.n_experts if op.routing else 1.0


def token_bytes(ops: Sequence[p.Op]) -> float:
    """Bytes of weights that one token reads; an embedding's row is nothing beside them."""
    return sum(matrix_bytes(op.w) * used_share(op) for op in ops if isinstance(op, p.Linear))


def token_macs(ops: Sequence[p.Op]) -> float:
    """Multiply-adds of one token with weights."""
    linears = [op for op in ops if isinstance(op, p.Linear)]
    return sum(op.w.n_experts * op.w.n_rows * op.w.n_cols * used_share(op) for op in linears)


def cache_bytes(program: p.Program, depth: int) -> int:
    """Keys and values that one token reads after `depth` others."""
    layers = sum(isinstance(op, p.Attention) for op in program.ops)
    return layers * 2 * program.n_kv_heads * program.head_dim * 2 * depth


def touched_share(op: p.Linear, n_tokens: int) -> float:
    """Of a matrix's experts that some token of a batch is expected to choose, each as likely as another."""
    return 1 - (1 - used_share(op)) ** n_tokens


def token_tiles(op: p.Linear, n_tokens: int) -> float:
    """Tiles of 64 tokens, of all experts: the mean over even chances of every expert (a binomial distribution)."""
    if not op.routing:
        return -(-n_tokens // TILE_TOKENS)
    n, chance = np.arange(n_tokens + 1), used_share(op)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n_tokens - n[:-1]) / (n[:-1] + 1)))])
    probability = np.exp(log_choose + n * np.log(chance) + (n_tokens - n) * np.log1p(-chance))
    return op.w.n_experts * float(probability @ -(-n // TILE_TOKENS))


# ---- time on a chip ----


@cache
def recorded() -> dict[tuple[str, str, int], dict[str, str]]:
    """docs/cuda-kernels.csv by kernel, type and compute capability."""
    with TABLE.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(row["kernel"], row["type"], int(row["sm"])): row for row in rows if row["variant"] == ""}


def loop_clocks(chip: Chip, kernel: str, kind: str) -> float:
    """Clocks of a multiprocessor for a warp's turn of a kernel's loop: by all instructions, or by those of one pipe."""
    row = recorded()[kernel, kind, chip.sm]
    every, alu = int(row["loop"]), int(row["loop_alu"])
    return 32 * max(every / ISSUED, alu / ON_A_PIPE)


def gemv_rate(chip: Chip, kind: str) -> float:
    """Weights a second that the GEMV's instructions allow."""
    return chip.processors * chip.clock * 32 * GEMV_WEIGHTS / loop_clocks(chip, "gemv", kind)


def gemm_clocks(chip: Chip, kind: str) -> tuple[float, float]:
    """Clocks of a multiprocessor for a block's turn of the GEMM's loop: tensor cores, everything else."""
    tensor = GEMM_ROWS * TILE_TOKENS * GEMM_COLUMNS / (chip.macs * chip.mma_share)
    return tensor, GEMM_WARPS * loop_clocks(chip, "gemm", kind)


def decode_seconds(chip: Chip, program: p.Program, depth: int) -> tuple[float, float, float]:
    """One token on the GPU: by memory alone, by memory or instructions of each matrix, and the gaps between kernels."""
    memory = (token_bytes(program.ops) + cache_bytes(program, depth)) / chip.bandwidth
    slower = cache_bytes(program, depth) / chip.bandwidth
    for op in program.ops:
        if isinstance(op, p.Linear):
            weights = op.w.n_experts * op.w.n_rows * op.w.n_cols * used_share(op)
            by_instructions = weights / gemv_rate(chip, op.w.clustered.cq.name) if op.w.clustered else 0.0
            slower += max(matrix_bytes(op.w) * used_share(op) / chip.bandwidth, by_instructions)
    return memory, slower, launches(chip, program, 1) * GAP_SECONDS


def launches(chip: Chip, program: p.Program, n_tokens: int) -> int:
    """Kernels of a batch, as the runner would launch them."""
    planned = CUDAProgram(program, N_BATCH, chip.info)
    return sum(len(planned.launches(turn, n_tokens, 1)) for turn in range(len(planned.turns)))


def prefill_seconds(chip: Chip, program: p.Program, n_tokens: int) -> float:
    """A batch on the GPU: each matrix by tiles or by its bytes, attention, activations through memory, gaps."""
    assert n_tokens > GEMV_MAX_TOKENS
    lanes = chip.processors * chip.clock
    seconds = launches(chip, program, n_tokens) * GAP_SECONDS
    for op in program.ops:
        if isinstance(op, p.Linear) and op.out.rows is not p.Rows.OUTPUTS:
            steps = token_tiles(op, n_tokens) * -(-op.w.n_rows // GEMM_ROWS) * -(-op.w.n_cols // GEMM_COLUMNS)
            clocks = max(gemm_clocks(chip, op.w.clustered.cq.name)) if op.w.clustered else 0.0
            read = matrix_bytes(op.w) * touched_share(op, n_tokens) / chip.bandwidth
            seconds += max(steps * clocks / lanes, read)
        if isinstance(op, p.Attention):
            multiply_adds = n_tokens**2 / 2 * op.q.width * 2
            seconds += multiply_adds * ATTENTION_INSTRUCTIONS / (ISSUED * lanes)
        rows = {p.Rows.TOKENS: n_tokens, p.Rows.SLOTS: n_tokens, p.Rows.OUTPUTS: 1}
        seconds += sum(4 * rows[v.rows] * v.top_k * v.width for v in values_of(op)) / chip.bandwidth
    return seconds


# ---- time on the host, and between ----


def handed_bytes(program: p.Program, n_tokens: int) -> float:
    """Bytes of a batch that cross PCIe, both ways."""
    given = [op.x for op in program.ops if isinstance(op, p.Give)]
    taken = [op.out for op in program.ops if isinstance(op, p.Take)]
    return sum(4 * n_tokens * value.top_k * value.width for value in given + taken)


def handovers(program: p.Program) -> int:
    """Times that the other half goes on and comes back."""
    return len({i for i, op in enumerate(program.ops) if isinstance(op, p.Take) and not _takes(program, i - 1)})


def _takes(program: p.Program, i: int) -> bool:
    return i >= 0 and isinstance(program.ops[i], p.Take)


def host_seconds(chip: Chip, program: p.Program, n_tokens: int, depth: int) -> float:
    """A batch on the CPU: weights and cache read once, or multiply-adds."""
    linears = [op for op in program.ops if isinstance(op, p.Linear)]
    read = sum(matrix_bytes(op.w) * touched_share(op, n_tokens) for op in linears) + cache_bytes(program, depth)
    return max(read / chip.host_bandwidth, n_tokens * token_macs(linears) / chip.host_macs)


def between_seconds(chip: Chip, half: p.Program, n_tokens: int) -> float:
    """What handing over takes."""
    return handovers(half) * HANDOVER_SECONDS + handed_bytes(half, n_tokens) / chip.pcie
