"""The emulator finds what it is there to find: races, missing barriers, uninitialised and asynchronous memory."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from tests.cuda.emulate import compiled_text, launch_function
from tests.cuda.test_linear import SEEDS

KERNELS = """
typedef signed char i8;
#define KERNEL(name) extern "C" __global__ void name(int *out)
KERNEL(reverse) {
    CQ_SHARED(int, values, 64);
    values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = values[63 - threadIdx.x];
}
KERNEL(race) {
    CQ_SHARED(int, values, 64);
    values[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = values[63 - threadIdx.x];
}
KERNEL(uninitialised) {
    CQ_SHARED(int, values, 65);
    values[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x + 1];
}
KERNEL(overrun) {
    CQ_SHARED(int, values, 64);
    out[threadIdx.x] = values[threadIdx.x + 1];
}
KERNEL(overflow) { out[threadIdx.x] += 0x7fffffff; }
KERNEL(divergent) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 1;
}
KERNEL(half_a_warp) {
    if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 2);
}
KERNEL(early) {
    CQ_SHARED(int, values, 256);
    copy_async(values + 4 * threadIdx.x, out, true);
    __syncthreads();
    out[64 + threadIdx.x] = values[4 * threadIdx.x];
}
KERNEL(waited) {
    CQ_SHARED(int, values, 256);
    copy_async(values + 4 * threadIdx.x, out, true);
    copy_wait();
    __syncthreads();
    out[64 + threadIdx.x] = values[4 * threadIdx.x];
}
KERNEL(multiply) {
    int d[4] = {0, 0, 0, 0};
    const u32 *words = (const u32 *)out;
    if (threadIdx.x < 32) matrix_multiply(d, words + 4 * threadIdx.x, words + 128 + 2 * threadIdx.x);
    for (int e = 0; e < 4 && threadIdx.x < 32; e++) out[192 + 4 * threadIdx.x + e] = d[e];
}
"""


def launch(kernel: str, out: np.ndarray, seed: int = 0) -> str:
    """The emulator's error, empty if there was none."""
    library = compiled_text("emulator_test", KERNELS, re.findall(r"^KERNEL\((\w+)\)", KERNELS, re.MULTILINE))
    address = ctypes.c_void_p(out.ctypes.data)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    return launch_function(library, kernel)(pointers, (ctypes.c_uint * 3)(1, 1, 1), 64, 0, seed).decode()


def outputs(kernel: str) -> list[bytes]:
    results = []
    for seed in SEEDS:
        out = np.zeros(320, np.int32)
        assert launch(kernel, out, seed) == ""
        results.append(out.tobytes())
    return results


@pytest.mark.parametrize("kernel", ["race", "uninitialised", "early"])
def test_wrong_kernels_depend_on_the_seed(kernel: str) -> None:
    assert len(set(outputs(kernel))) > 1


@pytest.mark.parametrize("kernel", ["reverse", "waited"])
def test_right_kernels_do_not(kernel: str) -> None:
    assert len(set(outputs(kernel))) == 1


@pytest.mark.parametrize("kernel", ["divergent", "half_a_warp"])
def test_threads_that_never_come_are_an_error(kernel: str) -> None:
    assert launch(kernel, np.zeros(320, np.int32)) == "threads wait for others that never come"


def test_matrix_fragments() -> None:
    """As the PTX manual lays them out for m16n8k32, written here from the matrices' side."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, shape, dtype=np.int8) for shape in ((16, 32), (8, 32)))
    a_bytes, b_bytes = np.zeros((32, 4, 4), np.int8), np.zeros((32, 2, 4), np.int8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            rows, columns = g + 8 * (register % 2), 4 * t + 16 * (register // 2)
            a_bytes[lane, register] = a[rows, columns : columns + 4]
        for register in range(2):
            b_bytes[lane, register] = b[g, 4 * t + 16 * register : 4 * t + 16 * register + 4]
    out = np.zeros(320, np.int32)
    out[:128], out[128:192] = a_bytes.view(np.int32).reshape(-1), b_bytes.view(np.int32).reshape(-1)
    assert launch("multiply", out) == ""
    product, d = a.astype(np.int32) @ b.T.astype(np.int32), out[192:].reshape(32, 2, 2)
    for lane in range(32):
        g, t = divmod(lane, 4)
        np.testing.assert_array_equal(d[lane], product[[g, g + 8], 2 * t : 2 * t + 2])
