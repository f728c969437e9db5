"""Packing of indices, byte by byte, and the effective weights."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pyggml_bridge.format import (
    CODEBOOK_ROWS,
    Clustered,
    CQType,
    hadamard,
    pack,
    packed_shape,
    quantize_activations,
    register,
    unpack,
)
from tests.oracle import random_indices


@pytest.mark.parametrize("cq", CQType)
def test_unpack_inverts_pack(cq):
    rng = np.random.default_rng(0)
    for codebook_rows in CODEBOOK_ROWS:
        indices = random_indices(rng, (3, 11, 192), cq, codebook_rows)
        packed = pack(indices, cq, codebook_rows)
        assert packed.shape == packed_shape(indices.shape, cq) == (3, 11, 3 * cq.block_bytes)
        assert np.array_equal(unpack(packed, cq, codebook_rows), indices)
        anything = rng.integers(0, 256, packed.shape, dtype=np.uint8)  # every bit of a block means something
        assert np.array_equal(pack(unpack(anything, cq, codebook_rows), cq, codebook_rows), anything)


def test_every_index_lands_on_the_documented_bits():
    for column in range(64):
        one = np.zeros(64, np.uint8)
        one[column] = 15
        packed = pack(one, CQType.CQ4)
        assert packed[column % 32] == 15 << 4 * (column // 32) and np.count_nonzero(packed) == 1
        one[column] = 3
        packed = pack(one, CQType.CQ2)
        assert packed[column % 16] == 3 << 2 * (column // 16) and np.count_nonzero(packed) == 1
        for index, cq, plane in ((4, CQType.CQ3, 16), (16, CQType.CQ5, 32)):
            one[column] = index
            packed = pack(one, cq)
            assert packed[plane + column // 8] == 1 << column % 8 and np.count_nonzero(packed) == 1


@pytest.mark.parametrize("cq", CQType)
def test_pack_refuses_what_does_not_fit(cq):
    with pytest.raises(ValueError, match="does not fit"):
        pack(np.full((1, 64), cq.n_centroids, np.uint8), cq)
    with pytest.raises(ValueError, match="multiple of 64"):
        pack(np.zeros((1, 96), np.uint8), cq)


def test_pack_refuses_indices_off_the_trellis():
    indices = random_indices(np.random.default_rng(2), (8, 64), CQType.CQ3T, 8)
    indices[3, 5] ^= 4
    with pytest.raises(ValueError, match="not on the trellis"):
        pack(indices, CQType.CQ3T, 8)


def test_every_free_bit_of_a_trellis_reaches_three_rows():
    column_11 = {CQType.CQ2T: (11, 1 << 1), CQType.CQ3T: (16 + 1, 1 << 3), CQType.CQ4T: (11, 1 << 3)}
    for cq, (byte, bit) in column_11.items():
        for row in range(4):
            packed = np.zeros((4, cq.block_bytes), np.uint8)
            packed[row, byte] = bit
            want = np.zeros((4, 64), np.uint8)
            want[row, 11] = want[(row + 2) % 4, 11] = 1 << cq.bits - 1
            want[(row + 1) % 4, 11] = 1 << cq.bits
            assert np.array_equal(unpack(packed, cq, 4), want)


def test_effective_weights_follow_the_formula():
    cq = CQType.CQ2
    indices = np.tile(np.arange(4, dtype=np.uint8), 48)[None]
    centroids = np.array([[-127, -1, 1, 127, -128, 5, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8]], np.int8)
    groups = np.array([[127, 3]] * 3, np.int8)
    packed, scales = pack(np.repeat(indices, 3, axis=0), cq), np.array([0.5, 0.25, 1], np.float32)
    weight = Clustered(cq, packed, centroids, scales, groups, 128, 128, codebook_rows=2)
    for row in range(3):
        for column in range(192):
            c = int(centroids[row // 2, column // 128 * 4 + column % 4])
            w8 = (c * int(groups[row, column // 128]) + 64) >> 7
            assert weight.weights_i8()[row, column] == w8
            assert weight.dequantize()[row, column] == np.float32(w8) * scales[row]


def test_activation_quantizer_rounds_half_to_even_and_handles_zero_rows():
    x = np.array([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5], np.float32)
    q, scales = quantize_activations(x)
    assert q.tolist() == [[127, 0, 2, -2, -127], [0] * 5] and scales.tolist() == [1.0, 0.0]
    q, scales = quantize_activations(x, bits=4)
    assert np.abs(q).max() == 7 and scales[0] == np.float32(127) / np.float32(7)


def test_gguf_py_reads_our_types_after_one_call(tmp_path):
    from gguf import GGUFReader

    from tests.tiny_gguf import Tiny, write_tiny

    register()
    register()  # idempotent
    dense = write_tiny(tmp_path / "tiny.gguf", Tiny())
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    weight = tensors["blk.0.ffn_down.weight"]
    assert weight.tensor_type.name == "CQ4" and list(weight.shape) == [192, 128]
    w8 = Clustered(
        CQType.CQ4,
        np.asarray(weight.data).reshape(128, -1),
        np.asarray(tensors["blk.0.ffn_down.centroids"].data),
        np.asarray(tensors["blk.0.ffn_down.scales"].data),
        np.asarray(tensors["blk.0.ffn_down.group_scales"].data),
        192,
        64,
    )
    assert np.array_equal(w8.dequantize(), dense["blk.0.ffn_down.weight"])


@pytest.mark.parametrize("block", [2, 16, 64])
def test_hadamard_is_the_matrix_of_the_format_and_its_own_inverse(block):
    x = np.random.default_rng(3).standard_normal((5, 192)).astype(np.float32)
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]) / np.sqrt(block)
    want = (x.reshape(5, -1, block) @ matrix).reshape(x.shape)
    np.testing.assert_allclose(hadamard(x, block), want, atol=1e-6)
    np.testing.assert_allclose(hadamard(hadamard(x, block), block), x, atol=1e-6)


def test_types_are_those_of_the_kernels():
    source = (Path(__file__).parent.parent / "native" / "cuda" / "types.cuh").read_text()
    rows = re.findall(r"TYPE\(CQ_(\w+), +(\d+), (\d), ([01])\)", source)
    assert {(name, int(id), int(bits), bool(int(trellis))) for name, id, bits, trellis in rows} == {
        (cq.name, int(cq), cq.bits, cq.trellis) for cq in CQType
    }
