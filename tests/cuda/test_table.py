"""The compiler's view of the kernels: docs/cuda-kernels.csv is of these sources, and the hot kernels never spill."""

from __future__ import annotations

import pytest

from pyggml_bridge.cuda.kernels import AROUND_ATTENTION, ROWS, Module, decode_module
from pyggml_bridge.cuda.linear import ROUTE, linear_module
from pyggml_bridge.format import CQType
from tests.cuda import table


def live() -> list[tuple[Module, int]]:
    """Every source for every target, and every type on the way."""
    found = [(linear_module("gemm.cu", CQType.CQ4, tensor_cores=False), 75)]
    for sm, cq, stock in zip(table.TARGETS, CQType, 3 * (table.F32, table.F16, table.Q8_0), strict=False):
        attention = Module("attention.cu", (("CQ_HEAD_DIM", 64 if cq.trellis else 128),))
        decode = decode_module(64 if cq.trellis else 128, 8)
        linears = (linear_module("gemv.cu", cq), linear_module("gemm.cu", cq), linear_module("stock.cu", stock))
        found += [(module, sm) for module in (*linears, ROUTE, ROWS, AROUND_ATTENTION, attention, decode, table.LATENT)]
    return found


def test_every_kernel_is_there_for_every_target() -> None:
    rows = {(row["kernel"], row["type"], row["variant"], row["sm"]) for row in table.recorded()}
    for sm in map(str, table.TARGETS):
        for cq in CQType:
            assert ("gemv", cq.name, "", sm) in rows and ("gemm", cq.name, "", sm) in rows
        for kernel in ("embed", "rms_norm", "quantize", "quantize_blocks", "rope", "swiglu", "combine", "select_rows"):
            assert (kernel, "", "", sm) in rows
        for kernel in ("copy_columns", "append", "attention_merge", "combine_norm", "swiglu_quantize", "prepare_heads"):
            assert (kernel, "", "", sm) in rows
        assert {("route", "", "", sm), ("group", "", "", sm), ("gemm", "Q8_0", "", sm)} <= rows
        assert ("attention_decode", "head_dim 128", "", sm) in rows
        assert {("attention", "head_dim 128", "", sm), ("latent_attention", "head_dim 576", "", sm)} <= rows
        assert {("stock_gemv", kind, "", sm) for kind in ("F32", "F16", "Q8_0")} <= rows
    assert len(rows) == len(table.recorded())


def test_the_table_is_of_these_sources() -> None:
    sources = {module.source: table.source_hash(module.source) for module in table.modules()}
    hashes = {row["hash"] for row in table.recorded()}
    assert hashes == set(sources.values()), "kernels changed: python -m tests.cuda.table"


def test_nothing_spills_and_the_hot_kernels_use_their_instructions() -> None:
    for row in table.recorded():
        where = f"{row['kernel']} {row['type']} sm_{row['sm']}"
        assert row["spill_bytes"] == "0", where
        assert int(row["shared_bytes"]) <= 48 << 10, where
        if row["kernel"] == "gemv":
            assert int(row["load_128"]) and int(row["prmt"]) and int(row["dp4a"]) and int(row["registers"]) <= 168, (
                where
            )
        if row["kernel"] == "gemm" and row["variant"] == "":
            assert int(row["mma"]) and int(row["ldmatrix"]) and not int(row["dp4a"]), where
            assert bool(int(row["cp_async"])) == (int(row["sm"]) >= 80), where
        if row["kernel"] == "latent_attention":  # two blocks of 256 threads on a multiprocessor
            assert int(row["registers"]) <= 128, where
            assert bool(int(row["cp_async"])) == (int(row["sm"]) >= 80), where
        if row["kernel"] in table.HOT:
            assert int(row["loop"]) > 150, f"{where}: the loop was not found"
        if row["variant"] == "dp4a":
            assert int(row["dp4a"]) and not int(row["mma"]), where


@pytest.mark.parametrize(("module", "sm"), live(), ids=lambda value: getattr(value, "source", value))
def test_compiles_to_what_the_table_says(module: Module, sm: int) -> None:
    """Every source for every target; another compiler may differ in figures, not in spills."""
    recorded = {(row["kernel"], row["type"], row["variant"], row["sm"]): row for row in table.recorded()}
    for row in table.measure(module, sm):
        assert row["spill_bytes"] == "0"
        if table.compiler_version() == table.recorded_version():
            assert row == recorded[row["kernel"], row["type"], row["variant"], row["sm"]]
