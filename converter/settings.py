"""What the user asked for, checked once and frozen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType, Grouping, TensorType, type_name

DESCENT_ROUNDS = 1
CODEBOOK_ROWS = 8
METHODS = ("full", "paper")
ROTATIONS = ("learned", "random", "none")
FLOAT_TYPES = ("f16", "f32")
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
TENSOR_TYPES: dict[str, TensorType] = {type_name(kind): kind for kind in (F32, F16, Q8_0, *reversed(CQType))}


@dataclass(frozen=True)
class Override:
    """--tensor-type REGEX=TYPE: matrices whose name the pattern finds get this type."""

    pattern: re.Pattern[str]
    type: TensorType

    @classmethod
    def parse(cls, text: str) -> Override:
        """From `REGEX=TYPE`; CQError if either half is invalid."""
        pattern, separator, kind = text.rpartition("=")
        if not separator or kind.lower() not in TENSOR_TYPES:
            raise CQError(f"--tensor-type {text}: expected REGEX=TYPE with a type of {', '.join(TENSOR_TYPES)}")
        try:
            return cls(re.compile(pattern), TENSOR_TYPES[kind.lower()])
        except re.error as error:
            raise CQError(f"--tensor-type {text}: invalid pattern: {error}") from error

    def __str__(self) -> str:
        """`REGEX=TYPE` again, for error messages."""
        return f"{self.pattern.pattern}={type_name(self.type)}"


@dataclass(frozen=True)
class Refinement:
    """What follows the k-means where the inputs' second moments are known. Descent needs feedback before it, and tokens
    enough for each column (quantize/fitting.py).

    sensitivity: Hessians weighted by gradients, and feedback from row to row (calibrate/fisher.py).
    """

    feedback: bool = True
    sensitivity: bool = True
    descent_rounds: int = DESCENT_ROUNDS


@dataclass(frozen=True)
class Settings:
    """One conversion. calibration None: weight-only clustering and a random rotation.

    bits: one type for all ordinary linears. None: types by sensitivity, to target_bpw bits per weight (None: the
    default), or four bits where sensitivity is not measured. trellis: mix in the types with T. expert_types: each
    expert may have its own type. method: METHODS; rotation: ROTATIONS, of the residual stream and the value heads.
    finetune: of centroids, where the method has it. router_weight: how much the divergence of a router's choice counts
    beside that of the output. float_type: the type of all matrices where nothing is clustered, None where something is.
    max_memory: bytes that it may take. work_dir: what is kept of unfinished work; resume: go on with it.
    """

    model: str
    out: Path
    bits: int | None
    target_bpw: float | None
    trellis: bool
    expert_types: bool
    grouping: Grouping
    activation_bits: int
    calibration: Path | None
    calibration_tokens: int
    method: str
    rotation: str
    hadamard: bool
    permutation: bool
    refinement: Refinement
    finetune: bool
    router_weight: float
    overrides: tuple[Override, ...]
    seed: int
    threads: int
    overwrite: bool
    check: bool
    max_memory: int
    work_dir: Path | None
    resume: bool
    float_type: str | None = None

    @property
    def cq(self) -> CQType:
        """The clustered type of ordinary linears where types are not mixed."""
        return CQType.of_bits(self.bits or 4)

    @property
    def head_type(self) -> TensorType:
        """Of the output: clustered where its inputs are known; without them it costs four times the divergence."""
        inputs_known = self.calibration is not None and self.refinement.feedback and self.method == "full"
        return CQType.CQ5 if inputs_known else Q8_0

    @property
    def tunes_centroids(self) -> bool:
        """Whether codebooks still change after clustering (quantize/paper/)."""
        return self.method == "paper" and self.finetune

    @property
    def measures_sensitivity(self) -> bool:
        """Whether gradients are measured, so that types can be mixed."""
        return self.calibration is not None and self.refinement.feedback and self.refinement.sensitivity
