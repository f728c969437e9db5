"""The rooflines of docs/performance.md: what GPUs that nobody measured should do, by arithmetic from their data sheets.

python scripts/cuda_roofline.py            # prints the section
python scripts/cuda_roofline.py --write    # puts it in its place in docs/performance.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gpu_model as g  # beside this script

from pyggml_bridge import program as p
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.format import CQType
from pyggml_bridge.measure.synthetic import SHAPES
from pyggml_bridge.split import RESERVED_BYTES, cut, most_layers, on_cpu

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- begin: scripts/cuda_roofline.py -->\n", "<!-- end: scripts/cuda_roofline.py -->\n"
MODELS = {"Qwen3-30B-A3B": "qwen3-30b-a3b", "Mixtral 8x7B": "mixtral-8x7b"}
DEPTH = 512
LATENCY = 700e-9  # assumed, of a read from memory: what has to be in flight is this times the bandwidth

INTRODUCTION = """### Roofline on paper

Arithmetic, not measurement: what an H100 really does is above. Bytes, multiply-adds, kernels and memory are those of
the programs that the runner would run, counted by its planner; registers and instructions are the compiler's; rates are
data sheets'. Assumed: {gap:.1f} us between two kernels of a graph, {handover:.0f} us to hand over to the CPU and back,
the host's rates, the share of the tensor cores that mma.sync gets, and {taken:.0f} GiB of the card for others. Waves
that do not fill the card, and caches, are left out; of a loop all instructions count, also those that begin a ring of
rows in each of the GEMV's eight rows, where rings of eight take them once. Models have CQ4 in three layers of four and
CQ5 in the fourth, embedding Q8_0, output CQ5; a context of {context}, batches of {batch}, decoding after {depth}
tokens.
"""

FORMULAS = """S multiprocessors make f clocks a second, and a warp's turn of a loop takes
32 max(instructions / 128, those of the ALU pipe / 64) clocks of one of them.

    decode     sum over matrices of max(bytes / bandwidth, weights / GEMV rate) + KV cache / bandwidth + kernels * gap
    prefill    sum over matrices of max(tiles * steps * clocks of a step / (S f), bytes / bandwidth)
               + attention + activations / bandwidth + kernels * gap
    GEMV rate  S f * 32 lanes * 256 weights / clocks of a warp's turn
    step       max(128 rows * 64 tokens * 64 columns / (multiply-adds a clock * share), 8 warps * clocks of a turn)
    tiles      128 rows times 64 tokens of one expert, of which a binomial distribution says how many there are
    attention  tokens^2 / 2 * width * 2 * 1.4 instructions / (128 S f)
    split      the GPU's half + the CPU's half + handovers * 30 us + handed bytes / PCIe
    CPU's half max(bytes / host bandwidth, multiply-adds / host rate)
"""

COMPILED = """What the compiler (NVRTC, `make cuda-table`, [cuda-kernels.csv](cuda-kernels.csv)) makes of the kernels
for sm_75, 80, 86, 89, 90, 100 and 120, machine code read with nvdisasm: none of them spills. Ranges are over targets.
"""


def main() -> int:
    """Print the section or put it in the page."""
    section = "\n".join((COMPILED, *_compiled(), "", _introduction(), FORMULAS, *map("\n".join, _tables())))
    if sys.argv[1:] == ["--write"]:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(before + BEGIN + section + END + after, encoding="utf-8")
    elif len(sys.argv) == 1:
        print(section, end="")
    else:
        print("error: only --write", file=sys.stderr)
        return 2
    return 0


def _introduction() -> str:
    assumed = {"gap": 1e6 * g.GAP_SECONDS, "handover": 1e6 * g.HANDOVER_SECONDS, "taken": g.TAKEN_BYTES / g.GIB}
    return INTRODUCTION.format(**assumed, context=g.N_CTX, batch=g.N_BATCH, depth=DEPTH)


def _compiled() -> list[str]:
    columns = ("registers", "load_128", "load_64", "prmt", "dp4a", "loop")
    names = ("registers", "128-bit loads", "64-bit", "permutes", "dp4a", "loop")
    rows = [["type", *(f"GEMV: {names[0]}", *names[1:]), "GEMM: registers", "permutes", "loop"]]
    for cq in sorted(CQType, key=lambda cq: (cq.bits, cq.trellis)):
        values = [_range("gemv", cq.name, column) for column in columns]
        rows.append([cq.name, *values, *(_range("gemm", cq.name, column) for column in ("registers", "prmt", "loop"))])
    return _lines(rows)


def _range(kernel: str, kind: str, column: str) -> str:
    """Over the targets."""
    found = {int(row[column]) for (k, t, _), row in g.recorded().items() if (k, t) == (kernel, kind)}
    return f"{min(found)} to {max(found)}" if len(found) > 1 else str(min(found))


def _tables() -> Iterator[list[str]]:
    yield _table("Chips and hosts", _chips())
    yield _table("Budgets per kernel: registers, shared memory, and what a multiprocessor holds", _budgets())
    yield _table("GEMV: what a type's bytes and instructions allow, in GB/s of packed weights", _gemv())
    yield _table("GEMM: clocks of a step, tensor cores / everything else", _gemm())
    programs = {name: g.program_of(SHAPES[key]) for name, key in MODELS.items()}
    yield _table("Models, per token", _models(programs))
    yield _table("Expected tokens per second", _expected(programs))
    yield _table("What the layers that do not fit leave to the CPU, same free memory", _splits(programs))


def _table(title: str, rows: list[list[str]]) -> list[str]:
    return [f"**{title}**", "", *_lines(rows), ""]


def _lines(rows: list[list[str]]) -> list[str]:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def _chips() -> list[list[str]]:
    head = ["", "SMs", "GHz", "GB", "GB/s", "int8 TMAC/s", "by mma.sync", "PCIe GB/s", "host GB/s", "host GMAC/s"]
    rows = [head]
    for c in g.CHIPS:
        peak = c.processors * c.clock * c.macs
        row = [c.name, f"{c.processors}", f"{c.clock / 1e9:.2f}", f"{c.memory_bytes / 1e9:.1f}"]
        row += [f"{c.bandwidth / 1e9:.0f}", f"{peak / 1e12:.0f}", f"{c.mma_share:.2f}", f"{c.pcie / 1e9:.0f}"]
        rows.append([*row, f"{c.host_bandwidth / 1e9:.0f}", f"{c.host_macs / 1e9:.0f}"])
    return rows


KERNELS = (
    ("gemv", "CQ4", 128), ("gemv", "CQ5", 128), ("gemv", "CQ4T", 128), ("gemm", "CQ4", 256), ("gemm", "CQ5", 256),
    ("gemm", "CQ4T", 256), ("plain_gemv", "Q8_0", 128), ("gemm", "Q8_0", 256), ("attention", "head_dim 128", 128),
    ("attention_decode", "head_dim 128", 128),
    ("latent_attention", "head_dim 576", 256),
    ("rms_norm", "", 256), ("combine_norm", "", 256), ("quantize", "", 256), ("swiglu", "", 256),
    ("swiglu_quantize", "", 256), ("prepare_heads", "", 256), ("route", "", 128), ("group", "", 256),
)  # fmt: skip


def _budgets() -> list[list[str]]:
    rows = [["kernel", "type", "threads", *(f"{c.name}: regs, KB, blocks, occupancy" for c in g.CHIPS[:2])]]
    for kernel, kind, threads in KERNELS:
        row = [kernel, kind, str(threads)]
        for chip in g.CHIPS[:2]:
            found = g.recorded()[kernel, kind, chip.sm]
            registers, shared = int(found["registers"]), int(found["shared_bytes"])
            blocks = _blocks(chip, threads, registers, shared)
            share = blocks * threads / 32 / chip.max_warps
            row.append(f"{registers}, {shared / 1024:.1f}, {blocks}, {share:.0%}")
        rows.append(row)
    return rows


def _blocks(chip: g.Chip, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds: registers are dealt to warps by 256, shared memory has 1 KB more a block."""
    warps = threads // 32
    by_registers = (64 * g.KIB) // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = chip.shared_bytes // (shared + g.KIB)
    return min(chip.max_blocks, chip.max_warps // warps, by_registers, by_shared)


def _gemv() -> list[list[str]]:
    rows = [["type", "bits", *(f"{c.name}: instructions allow, bound by" for c in g.CHIPS)]]
    for cq in sorted(CQType, key=lambda cq: (cq.bits, cq.trellis)):
        bits = cq.bits + 8 / 64 + cq.n_centroids / 8 * 8 / 2048 + 32 / 2048  # rows of 2048 columns
        row = [cq.name, f"{bits:.2f}"]
        for chip in g.CHIPS:
            rate = g.gemv_rate(chip, cq.name) * bits / 8
            row.append(f"{rate / 1e9:.0f}, {'memory' if rate > chip.bandwidth else 'instructions'}")
        rows.append(row)
    in_flight = [["", *(c.name for c in g.CHIPS)]]
    for label, kind in (("CQ4: KB in flight, of KB needed", "CQ4"), ("CQ5", "CQ5")):
        row = [label]
        for chip in g.CHIPS:
            blocks = _blocks(chip, 128, int(g.recorded()["gemv", kind, chip.sm]["registers"]), 0)
            ahead = 8 * 16 if kind == "CQ4" else 4 * 24  # bytes of a lane: rows fetched ahead
            flying = chip.processors * blocks * 128 * ahead
            row.append(f"{flying / 1024:.0f} of {chip.bandwidth * LATENCY / 1024:.0f}")
        in_flight.append(row)
    return [*rows, *([label, "", *values] for label, *values in in_flight[1:])]


def _gemm() -> list[list[str]]:
    rows = [["type", *(c.name for c in g.CHIPS)]]
    for cq in sorted(CQType, key=lambda cq: (cq.bits, cq.trellis)):
        pairs = [g.gemm_clocks(chip, cq.name) for chip in g.CHIPS]
        rows.append([cq.name, *(f"{tensor:.0f} / {other:.0f}" for tensor, other in pairs)])
    return rows


def _models(programs: dict[str, p.Program]) -> list[list[str]]:
    rows = [
        ["", "weights", "file", "bits per weight", "read", "multiply-adds", "of them experts", "KV cache", "kernels"]
    ]
    for name, program in programs.items():
        linears = [op for op in program.ops if isinstance(op, p.Linear)]
        body = [op for op in linears if op.w.name != "output.weight"]
        weights = sum(op.w.n_experts * op.w.n_rows * op.w.n_cols for op in body)
        nbytes = sum(g.matrix_bytes(op.w) for op in body)
        embed = next(op.table for op in program.ops if isinstance(op, p.Embed))
        output = [op for op in linears if op not in body]
        file = nbytes + g.matrix_bytes(output[0].w) + embed.data.nbytes
        experts = g.token_macs([op for op in linears if op.routing]) / g.token_macs(linears)
        row = [name, f"{weights / 1e9:.2f} G", f"{file / 1e9:.2f} GB", f"{8 * nbytes / weights:.2f}"]
        row += [f"{g.token_bytes(linears) / 1e9:.3f} GB", f"{g.token_macs(linears) / 1e9:.2f} G", f"{experts:.0%}"]
        row += [f"{g.cache_bytes(program, 1) / 1024:.0f} KB", f"{g.launches(g.CHIPS[1], program, 1)}"]
        rows.append(row)
    return rows


def _expected(programs: dict[str, p.Program]) -> list[list[str]]:
    columns = ["layers on the GPU", "GB there", "decode, memory alone", "decode", f"prefill of {g.N_BATCH}"]
    rows = [["", "", *columns]]
    for name, program in programs.items():
        for chip in g.CHIPS:
            layers = _layers_that_fit(chip, program)
            host, device = _halves(program, layers)
            there = CUDAProgram(device, g.N_BATCH, chip.info).nbytes + RESERVED_BYTES
            memory, _, _ = g.decode_seconds(chip, device, DEPTH)
            alone = memory + (g.host_seconds(chip, host, 1, DEPTH) if host else 0.0)
            decode, prefill = _seconds(chip, host, device)
            label = "all" if host is None else f"{layers} of {program.n_layers}"
            rates = [f"{1 / alone:.0f}", f"{1 / decode:.0f}", f"{g.N_BATCH / prefill:.0f}"]
            rows.append([name, chip.name, label, f"{there / 1e9:.1f}", *rates])
    return rows


def _splits(programs: dict[str, p.Program]) -> list[list[str]]:
    rows = [
        [
            "",
            "",
            "the CPU has",
            "layers on the GPU",
            "the CPU reads per token",
            "decode",
            "decode after 3584",
            "prefill",
        ]
    ]
    for name, program in programs.items():
        for chip in g.CHIPS:
            if _layers_that_fit(chip, program) == program.n_layers:
                continue
            for label, cut_up in (("experts", program), ("whole layers", replace(program, routings=[]))):
                layers = _layers_that_fit(chip, cut_up)
                host, device = _halves(cut_up, layers)
                assert host is not None
                (decode, prefill), (deep, _) = _seconds(chip, host, device), _seconds(chip, host, device, 3584)
                read = f"{(g.token_bytes(host.ops) + g.cache_bytes(host, DEPTH)) / 1e9:.2f} GB"
                rates = [f"{1 / decode:.1f}", f"{1 / deep:.1f}", f"{g.N_BATCH / prefill:.0f}"]
                rows.append([name, chip.name, label, f"{layers} of {program.n_layers}", read, *rates])
            rows.append([name, chip.name, *_streamed(chip, program)])
    return rows


def _streamed(chip: g.Chip, program: p.Program) -> list[str]:
    """The same experts multiplied by the GPU, which fetches them over PCIe; without any time of the GPU's own."""
    layers = _layers_that_fit(chip, program)
    host, device = _halves(program, layers)
    assert host is not None
    linears = [op for op in host.ops if isinstance(op, p.Linear)]
    once = g.token_bytes(linears) / chip.pcie
    decode = sum(g.decode_seconds(chip, device, DEPTH)[1:]) + once
    deep = sum(g.decode_seconds(chip, device, 3584)[1:]) + once
    batch = sum(g.matrix_bytes(op.w) * g.touched_share(op, g.N_BATCH) for op in linears) / chip.pcie
    prefill = max(batch, g.prefill_seconds(chip, program, g.N_BATCH))
    rates = [f"{1 / decode:.1f}", f"{1 / deep:.1f}", f"{g.N_BATCH / prefill:.0f}"]
    return [
        "experts, fetched over PCIe",
        f"{layers} of {program.n_layers}",
        f"{g.token_bytes(linears) / 1e9:.2f} GB",
        *rates,
    ]


def _layers_that_fit(chip: g.Chip, program: p.Program) -> int:
    if CUDAProgram(program, g.N_BATCH, chip.info).nbytes + RESERVED_BYTES <= chip.free_bytes:
        return program.n_layers
    layers = most_layers(program, g.N_BATCH, chip.info, chip.free_bytes, below=program.n_layers)
    assert layers is not None
    return layers


def _halves(program: p.Program, layers: int) -> tuple[p.Program | None, p.Program]:
    return (None, program) if layers == program.n_layers else cut(program, on_cpu(program, layers))


def _seconds(chip: g.Chip, host: p.Program | None, device: p.Program, depth: int = DEPTH) -> tuple[float, float]:
    """One token and a batch."""
    decode = sum(g.decode_seconds(chip, device, depth)[1:])
    prefill = g.prefill_seconds(chip, device, g.N_BATCH)
    if host is not None:
        decode += g.host_seconds(chip, host, 1, depth) + g.between_seconds(chip, device, 1)
        prefill += g.host_seconds(chip, host, g.N_BATCH, 0) + g.between_seconds(chip, device, g.N_BATCH)
    return decode, prefill


if __name__ == "__main__":
    sys.exit(main())
