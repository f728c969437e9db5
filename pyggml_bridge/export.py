"""CQ file -> GGUF of stock types, so that llama.cpp and others can read the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import FILE_TYPES, Companions, FileTensor, Key, add_keys, cq_type, hadamard, is_later_section
from pyggml_bridge.output import complete_file
from pyggml_bridge.reader import GGUFFile, Tensor
from pyggml_bridge.weights import Matrix, Weights

REPLACED = (
    Key.GENERAL_ARCHITECTURE,
    Key.GENERAL_ALIGNMENT,
    Key.GENERAL_FILE_TYPE,
    Key.GENERAL_QUANTIZATION_VERSION,
)
TYPES = {"f16": GGMLQuantizationType.F16, "f32": GGMLQuantizationType.F32, "q8_0": GGMLQuantizationType.Q8_0}


def export(source: Path, out: Path, kind: GGMLQuantizationType) -> None:
    """Write `source` with the weights that stock readers would not understand as `kind`, the rest as it is."""
    file = GGUFFile(source)
    weights = Weights(file)
    clustered = {name for name, tensor in file.tensors.items() if cq_type(tensor.type)}
    cut = {name for name in file.tensors if Companions.of(name).experts in file.tensors}
    converted = clustered | cut | {name for name in file.tensors if _is_transformed(weights, name)}
    absorbed = {name for weight in clustered | cut for name in vars(Companions.of(weight)).values()}
    absorbed |= {name for name in cut if is_later_section(name)}
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in absorbed}
    with complete_file(out) as part:
        architecture: str = file.get(Key.GENERAL_ARCHITECTURE, str)
        writer = GGUFWriter(part, architecture)
        for key, value in file.metadata.items():
            value_type, item_type = file.types[key]
            if not key.startswith("cq.") and key not in REPLACED:
                writer.add_key_value(key, value, value_type, item_type)
        add_keys(
            writer,
            architecture,
            {Key.GENERAL_FILE_TYPE: FILE_TYPES[kind], Key.GENERAL_QUANTIZATION_VERSION: GGML_QUANT_VERSION},
        )
        for name, tensor in kept.items():
            target = kind if name in converted else tensor.type
            shape = (weights.n_experts, *tensor.shape[1:]) if name in cut else tensor.shape
            FileTensor.of(name, shape, target).announce(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in kept.items():
            writer.write_tensor_data(_converted(weights, tensor, kind) if name in converted else tensor.data)
        writer.close()


def _is_transformed(weights: Weights, name: str) -> bool:
    """Whether the weight is stored for inputs after a Hadamard transform, which stock readers do not compute."""
    return "ffn_down" in name and name.endswith(".weight") and weights.file.get(Key.CQ_HADAMARD_FFN_DOWN, int, 0) > 0


def dequantized(matrix: Matrix) -> NDArray[np.float32]:
    """The weights of a matrix as float32 [n_experts, n_rows, n_cols]."""
    values = matrix.clustered.dequantize() if matrix.clustered else dequantize(matrix.data, matrix.type)
    return values.reshape(matrix.n_experts, matrix.n_rows, matrix.n_cols)


def _converted(weights: Weights, tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    *experts, n_rows, n_cols = tensor.shape
    if experts:
        n = weights.n_experts if weights.has(Companions.of(tensor.name).experts) else experts[0]  # else maybe of heads
        parts = weights.experts(tensor.name, n_rows, n_cols, n)
        values = np.empty((n, n_rows, n_cols), np.float32)
        for part in parts:
            values[... if part.experts is None else part.experts] = dequantized(part)
    else:
        values = dequantized(weights.matrix(tensor.name, n_rows, n_cols))[0]
    if _is_transformed(weights, tensor.name):
        values = hadamard(values, weights.hadamard("ffn_down", n_cols))
    if kind == GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise CQError(f"{weights.file.path}: tensor {tensor.name} does not fit F16; use --type f32")
    return np.ascontiguousarray(quantize(values, kind)).view(np.uint8)
