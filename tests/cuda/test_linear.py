"""LUT GEMV and GEMM: integers equal to the NumPy oracle in every type, grouping, shape and order of threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pyggml_bridge.cuda import linear as cl
from pyggml_bridge.format import CODEBOOK_ROWS, MAX_COLS, Clustered, CQType
from tests.cuda.arrays import Memory
from tests.cuda.emulate import run
from tests.oracle import random_clustered

EPS = 2.0**-24
SEEDS = (0, 1, 2)
CANARY = 123456789


def wanted(w: Clustered, x: np.ndarray) -> np.ndarray:
    """float64 holds every partial sum exactly."""
    return (x.astype(np.float64) @ w.weights_i8().astype(np.float64).T).astype(np.int32)


def activations(rng: np.random.Generator, tokens: int, cols: int) -> np.ndarray:
    return rng.integers(-127, 128, (tokens, cols), dtype=np.int8)


def integers(w: Clustered, x: np.ndarray, *, gemm: bool, seed: int = 0, tensor_cores: bool = True) -> np.ndarray:
    """Accumulators [tokens, rows]: a matrix without scales stores them."""
    memory = Memory()
    out = memory.full((len(x), w.shape[0]), CANARY, np.int32)
    matrix = replace(memory.matrix(w), scales=0)
    operands = cl.Operands(len(x), out.ctypes.data, q=memory.at(x), scales=memory.at(np.ones(len(x), np.float32)))
    run(cl.gemm(matrix, operands, tensor_cores=tensor_cores) if gemm else cl.gemv(matrix, operands), seed)
    return out


def check(w: Clustered, x: np.ndarray) -> None:
    want = wanted(w, x)
    for gemm in (False, True):
        got = integers(w, x, gemm=gemm)
        np.testing.assert_array_equal(got, want, err_msg=f"{'gemm' if gemm else 'gemv'} of {w.cq.name} {w.shape}")


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("cols", [64, 128, 192, 576])
def test_integers_of_every_grouping(cq: CQType, cols: int) -> None:
    rng = np.random.default_rng(cols)
    for codebook_cols in (None, 64, 128):
        for scale_cols in (0, 64, 128):
            rows, codebook_rows = int(rng.choice([1, 2, 3, 31, 33])), int(rng.choice(CODEBOOK_ROWS))
            w = random_clustered(rng, cq, rows, cols, codebook_cols, scale_cols, codebook_rows=codebook_rows)
            check(w, activations(rng, int(rng.integers(1, 4)), cols))


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("codebook_rows", CODEBOOK_ROWS)
def test_integers_of_every_tail(cq: CQType, codebook_rows: int) -> None:
    """Rows and tokens around the tiles' edges, incomplete rings."""
    rng = np.random.default_rng(codebook_rows)
    for rows, tokens in ((7, 3), (129, 65)):
        check(
            random_clustered(rng, cq, rows, 192, scale_cols=64, codebook_rows=codebook_rows),
            activations(rng, tokens, 192),
        )


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("centroid", [-128, 127])
@pytest.mark.parametrize("group_scale", [None, 0, 127])
def test_extremes_fit_the_accumulator(cq: CQType, centroid: int, group_scale: int | None) -> None:
    rng = np.random.default_rng(0)
    fill = (cq.n_centroids - 1, centroid, group_scale or 0)
    w = random_clustered(rng, cq, 1, MAX_COLS, scale_cols=0 if group_scale is None else 64, fill=fill)
    x = np.full((2, MAX_COLS), 127, np.int8)
    x[1] = -127
    np.testing.assert_array_equal(integers(w, x, gemm=False), wanted(w, x))
    narrow = random_clustered(rng, cq, 1, 320, scale_cols=0 if group_scale is None else 64, fill=fill)
    check(narrow, x[:, :320])


@pytest.mark.parametrize("cq", CQType)
def test_each_column_reads_its_own_index(cq: CQType) -> None:
    """An identity as activations returns the weights themselves, one by one."""
    w = random_clustered(np.random.default_rng(1), cq, 5, 192, 128, 64, codebook_rows=2)
    for gemm in (False, True):
        np.testing.assert_array_equal(integers(w, np.eye(192, dtype=np.int8), gemm=gemm), w.weights_i8().T)


@pytest.mark.parametrize("cq", [CQType.CQ4, CQType.CQ3T])
def test_dp4a_equals_tensor_cores(cq: CQType) -> None:
    rng = np.random.default_rng(5)
    w, x = random_clustered(rng, cq, 133, 128, scale_cols=64, codebook_rows=8), activations(rng, 67, 128)
    np.testing.assert_array_equal(integers(w, x, gemm=True, tensor_cores=False), wanted(w, x))


@pytest.mark.parametrize("cq", [CQType.CQ5, CQType.CQ4T])
@pytest.mark.parametrize("gemm", [False, True])
def test_order_of_threads_does_not_matter(cq: CQType, gemm: bool) -> None:
    rng = np.random.default_rng(6)
    w, x = random_clustered(rng, cq, 140, 320, 128, 64, codebook_rows=8), activations(rng, 70 if gemm else 3, 320)
    for seed in SEEDS:
        np.testing.assert_array_equal(integers(w, x, gemm=gemm, seed=seed), wanted(w, x))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("tokens", [1, 70])
def test_scales_bias_and_accumulation(tokens: int, accumulate: bool) -> None:
    rng = np.random.default_rng(8)
    w, x = random_clustered(rng, CQType.CQ4, 37, 128, scale_cols=64), activations(rng, tokens, 128)
    memory = Memory()
    scales, bias = rng.uniform(1e-3, 2, tokens).astype(np.float32), rng.normal(size=37).astype(np.float32)
    before = rng.normal(size=(tokens, 37)).astype(np.float32)
    out = memory.put(before)
    operands = cl.Operands(
        tokens, out.ctypes.data, q=memory.at(x), scales=memory.at(scales), bias=memory.at(bias), accumulate=accumulate
    )
    run(cl.linear(memory.matrix(w), operands))
    exact = wanted(w, x) * w.scales.astype(np.float64) * scales[:, None]
    old = before if accumulate else 0 * before
    # the product of the scales, times the accumulator (itself rounded), two sums
    bound = EPS * (3 * np.abs(exact) + 2 * (np.abs(exact) + np.abs(old) + np.abs(bias)))
    assert (np.abs(out - (exact + old + bias)) <= bound).all()


@pytest.mark.parametrize("cq", [CQType.CQ4, CQType.CQ3T])
@pytest.mark.parametrize("tokens", [1, 4, 67])
@pytest.mark.parametrize("heights", [(300, 33, 7), (5, 140)])
def test_layers_of_one_launch(heights: tuple[int, ...], tokens: int, cq: CQType) -> None:
    """Matrices of different heights, groupings and biases that read the same rows."""
    rng, memory = np.random.default_rng(tokens), Memory()
    x, scales = activations(rng, tokens, 192), rng.uniform(1e-3, 2, tokens).astype(np.float32)
    ws = [random_clustered(rng, cq, rows, 192, 64 * (i % 2) or None, 64 * (i % 2)) for i, rows in enumerate(heights)]
    at, at_scales = memory.at(x), memory.at(scales)
    alone, together = ([memory.full((tokens, rows), np.nan, np.float32) for rows in heights] for _ in range(2))
    biases = [memory.at(rng.normal(size=rows).astype(np.float32)) for rows in heights[:-1]] + [0]

    def layers(outs: list[np.ndarray]) -> list[cl.Layer]:
        return [
            (memory.matrix(w), cl.Operands(tokens, out.ctypes.data, q=at, scales=at_scales, bias=bias))
            for w, out, bias in zip(ws, outs, biases, strict=True)
        ]

    for w, operands in layers(alone):
        run(cl.linear(w, operands))
    (w, operands), *others = layers(together)
    run(cl.linear(w, operands, *others), seed=1)
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.isfinite(want).all()


@pytest.mark.parametrize("cq", CQType)
@pytest.mark.parametrize("team", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), [(33, 576), (140, 64), (16, 4160)])
def test_any_size_of_a_team_gives_the_integers(rows: int, cols: int, team: int, cq: CQType) -> None:
    rng, memory = np.random.default_rng(cols), Memory()
    w, x = random_clustered(rng, cq, rows, cols, scale_cols=64, codebook_rows=8), activations(rng, 2, cols)
    out = memory.full((2, rows), CANARY, np.int32)
    operands = cl.Operands(2, out.ctypes.data, q=memory.at(x), scales=memory.at(np.ones(2, np.float32)))
    launch = cl.gemv(replace(memory.matrix(w), scales=0), operands)
    grid = (cl.ceil_div(rows, 8 * (128 // team)), 2, 1)
    run(replace(launch, grid=grid, args=(launch.args[0], np.int32(team))), seed=team)
    np.testing.assert_array_equal(out, wanted(w, x))


def test_larger_teams_share_rows_where_processors_would_idle() -> None:
    """Of an H100: q, k and v of Qwen3-30B-A3B, its attention output, gate and up, down, output; few and wide rows."""
    shapes = [(2048, 5120), (4096, 2048), (2048, 12288), (768, 16384), (2048, 151936), (64, 64), (32768, 8)]
    assert [cl.gemv_team(cols, rows // 8, 132) for cols, rows in shapes] == [64, 128, 32, 32, 32, 32, 128]
    assert cl.gemv_team(768, 2048, 1) == 8 and cl.gemv_team(2048, 1 << 20, 1) == 32


def experts_case(rng: np.random.Generator, n_tokens: int, gather: bool) -> tuple[Clustered, np.ndarray, np.ndarray]:
    """Five experts, of which one gets no token, and one most of them."""
    ids = np.where(rng.random((n_tokens, 2)) < 0.8, [[3, 0]], [[1, 4]])
    parts = [random_clustered(rng, CQType.CQ3T, 13, 128, 64, 64, codebook_rows=8) for _ in range(5)]
    stacked = [
        np.stack([getattr(part, name) for part in parts]) for name in ("packed", "centroids", "scales", "group_scales")
    ]
    w = Clustered(CQType.CQ3T, *stacked, 64, 64, 8)
    return w, ids.astype(np.int32), activations(rng, n_tokens if gather else 2 * n_tokens, 128)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 4, 5, 90])
def test_experts_multiply_their_slots(n_tokens: int, gather: bool) -> None:
    w, ids, x = experts_case(np.random.default_rng(n_tokens), n_tokens, gather)
    memory = Memory()
    matrix, routing = replace(memory.matrix(w), scales=0), memory.routing(ids, 5)
    rows = np.repeat(x, 2, axis=0) if gather else x
    want = np.einsum("sc,src->sr", rows.astype(np.int64), w.weights_i8()[ids.reshape(-1)].astype(np.int64))
    scales = memory.at(np.ones(len(x), np.float32))
    for launch in (cl.gemv, cl.gemm):
        out = memory.full(want.shape, CANARY, np.int32)
        run(
            launch(
                matrix,
                cl.Operands(n_tokens, out.ctypes.data, q=memory.at(x), scales=scales, routing=routing, gather=gather),
            )
        )
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("cq", [CQType.CQ4, CQType.CQ3T])
@pytest.mark.parametrize("n_tokens", [1, 4, 66, 130])
def test_every_part_of_a_row_has_its_own_matrix(cq: CQType, n_tokens: int) -> None:
    """As many matrices as attention heads, tiles of tokens that do not come out even, and both kinds of kernel."""
    rng, n_parts = np.random.default_rng(n_tokens), 3
    parts = [random_clustered(rng, cq, 131, 64, scale_cols=64, codebook_rows=8) for _ in range(n_parts)]
    names = ("packed", "centroids", "scales", "group_scales")
    w = Clustered(cq, *(np.stack([getattr(part, name) for part in parts]) for name in names), 64, 64, 8)
    x = activations(rng, n_tokens * n_parts, 64)
    want = np.einsum("tpc,prc->tpr", x.reshape(n_tokens, n_parts, 64).astype(np.int64), w.weights_i8().astype(np.int64))
    for launch in (cl.gemv, cl.gemm):
        memory = Memory()
        out = memory.full(want.shape, CANARY, np.int32)
        scales = memory.at(np.ones(len(x), np.float32))
        operands = cl.Operands(n_tokens, out.ctypes.data, q=memory.at(x), scales=scales, parts=n_parts)
        run(launch(replace(memory.matrix(w), scales=0), operands))
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("n_tokens", [3, 70])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_part_of_a_row_has_its_own_float_matrix(dtype: type, n_tokens: int) -> None:
    rng, kind = np.random.default_rng(n_tokens), GGMLQuantizationType.F16
    kind = kind if dtype is np.float16 else GGMLQuantizationType.F32
    w, x = rng.normal(size=(5, 67, 32)).astype(dtype), rng.normal(size=(n_tokens, 5, 32)).astype(np.float32)
    want, magnitude = (
        np.einsum("tpc,prc->tpr", f(x.astype(np.float64)), f(w.astype(np.float64))) for f in (np.positive, np.abs)
    )
    for launch in (cl.gemv, cl.gemm):
        memory = Memory()
        out = memory.full(want.shape, np.nan, np.float32)
        matrix = cl.DeviceMatrix(int(kind), 5, 67, 32, memory.at(w))
        run(launch(matrix, cl.Operands(n_tokens, out.ctypes.data, x=memory.at(x), parts=5)))
        assert (np.abs(out - want) <= EPS * 35 * magnitude).all()


def q8_0(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    blocks = np.zeros((rows, cols // 32), np.dtype([("scale", "<f2"), ("q", "i1", 32)]))
    blocks["scale"], blocks["q"] = rng.uniform(1e-3, 2, blocks.shape), rng.integers(-128, 128, blocks["q"].shape)
    return blocks


@pytest.mark.parametrize("tokens", [1, 4, 65])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (131, 96), (70, 320)])
@pytest.mark.parametrize("tensor_cores", [True, False])
def test_q8_0(tokens: int, rows: int, cols: int, tensor_cores: bool) -> None:
    rng = np.random.default_rng(tokens + rows)
    blocks, x, n_blocks = q8_0(rng, rows, cols), activations(rng, tokens, cols), cols // 32
    scales, bias = rng.uniform(1e-3, 2, (tokens, n_blocks)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
    before = rng.normal(size=(tokens, rows)).astype(np.float32)
    terms = np.einsum(
        "tbi,rbi->trb", x.reshape(tokens, n_blocks, 32).astype(np.float64), blocks["q"].astype(np.float64)
    )
    terms *= scales[:, None] * blocks["scale"].astype(np.float64)
    magnitude = np.einsum("tbi,rbi->tr", np.abs(x.reshape(tokens, n_blocks, 32)).astype(np.float64) * scales[..., None],
                          np.abs(blocks["q"].astype(np.float64)) * blocks["scale"][..., None])  # fmt: skip
    bound = EPS * (n_blocks + 11) * (magnitude + np.abs(before) + np.abs(bias))
    for launch in (cl.gemv, lambda w, o: cl.gemm(w, o, tensor_cores=tensor_cores)):
        memory = Memory()
        out = memory.put(before)
        matrix = cl.DeviceMatrix(int(GGMLQuantizationType.Q8_0), 1, rows, cols, memory.at(blocks.view(np.uint8)))
        addresses = {"q": memory.at(x), "scales": memory.at(scales), "bias": memory.at(bias)}
        run(launch(matrix, cl.Operands(tokens, out.ctypes.data, **addresses, accumulate=True)))
        assert (np.abs(out - (before + terms.sum(-1) + bias)) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 4, 66])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (67, 33), (64, 160)])
def test_float_matrices(dtype: type, tokens: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(cols)
    kind = GGMLQuantizationType.F32 if dtype is np.float32 else GGMLQuantizationType.F16
    w, x = rng.normal(size=(rows, cols)).astype(dtype), rng.normal(size=(tokens, cols)).astype(np.float32)
    bias, exact = rng.normal(size=rows).astype(np.float32), x.astype(np.float64) @ w.astype(np.float64).T
    bound = EPS * (cols + 3) * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + np.abs(bias))
    for launch in (cl.gemv, cl.gemm):
        memory = Memory()
        out = memory.full((tokens, rows), np.nan, np.float32)
        matrix = cl.DeviceMatrix(int(kind), 1, rows, cols, memory.at(w))
        run(launch(matrix, cl.Operands(tokens, out.ctypes.data, x=memory.at(x), bias=memory.at(bias))))
        assert (np.abs(out - (exact + bias)) <= bound).all()
