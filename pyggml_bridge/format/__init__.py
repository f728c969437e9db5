"""The CQ format, as docs/format.md describes it: keys, tensor types, a weight's tensors, and the NumPy oracle."""

from pyggml_bridge.format.activations import hadamard, quantize_activations
from pyggml_bridge.format.clustered import Clustered, pack, unpack
from pyggml_bridge.format.keys import ARCHITECTURE, VERSION, Key, Keys, KeyValue, add_keys, find_key, is_known
from pyggml_bridge.format.layout import (
    EMBEDDINGS_AND_HEAD,
    Companions,
    FileTensor,
    Grouping,
    is_later_section,
    section_name,
    weight_tensors,
)
from pyggml_bridge.format.tensor_types import (
    BLOCK,
    CODEBOOK_ROWS,
    FILE_TYPES,
    MAX_COLS,
    CQType,
    TensorType,
    cq_type,
    packed_shape,
    register,
    type_name,
)

__all__ = [
    "ARCHITECTURE",
    "BLOCK",
    "CODEBOOK_ROWS",
    "EMBEDDINGS_AND_HEAD",
    "FILE_TYPES",
    "MAX_COLS",
    "VERSION",
    "CQType",
    "Clustered",
    "Companions",
    "FileTensor",
    "Grouping",
    "Key",
    "KeyValue",
    "Keys",
    "TensorType",
    "add_keys",
    "cq_type",
    "find_key",
    "hadamard",
    "is_known",
    "is_later_section",
    "pack",
    "packed_shape",
    "quantize_activations",
    "register",
    "section_name",
    "type_name",
    "unpack",
    "weight_tensors",
]
