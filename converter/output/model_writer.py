"""Writes the converted model in file order: embedding, layer after layer as they are quantized, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.fisher import Sensitivity
from ..calibrate.hessian import Hessian
from ..calibrate.layer_stream import LayerStream
from ..quantize.fitting import quantize
from ..quantize.layers import LayerQuantizer
from ..quantize.paper.tuner import tuner_for
from ..quantize.plan import Plan, PlannedTensor
from ..quantize.stored import StoredWeight
from ..quantize.tuner import Stored
from ..results import ExpertTokens, Findings
from ..resume.work_folder import WorkFolder
from ..resume.written import Written
from ..settings import Settings
from ..source.checkpoint import GGUF_BIASES, HEAD_BIAS
from ..source.rope import rope_tensors
from ..transform.transformed_model import TransformedModel
from .gguf_file import OutputFile
from .metadata import metadata


@dataclass(frozen=True)
class ModelWriter:
    """From the float model in its final basis to the file, which grows in the work folder.

    tokens [sequences, n]: the calibration's, None without a text; sensitivity: None where it is not measured.
    """

    settings: Settings
    plan: Plan
    model: TransformedModel
    stream: LayerStream
    work: WorkFolder
    tokens: Tensor | None
    sensitivity: Sensitivity | None

    def write(self) -> Findings:
        """The whole file, on from the last layer that it holds."""
        written = Written.load(self.work)
        file = self._open(written.n_layers if written else None)
        try:
            if written is None:
                written = self._write_first(file)
            self._write_layers(file, written)
            self._write_last(file, written)
            file.close()
        except BaseException:
            file.abandon()
            raise
        return written.findings

    def _open(self, n_layers: int | None) -> OutputFile:
        """With so many layers in it, or with nothing yet."""
        plan, checkpoint = self.plan, self.model.checkpoint
        n_tensors = 0 if n_layers is None else len(plan.first) + sum(map(len, plan.layers[:n_layers]))
        keys = metadata(checkpoint, self.settings, plan, 0 if self.tokens is None else self.tokens.numel())
        return OutputFile(self.work.part, checkpoint.arch.gguf_name, keys, plan.tensors, n_tensors)

    def _write_first(self, file: OutputFile) -> Written:
        """Rope factors and embedding; returns what the first layer starts from."""
        *_, planned_embedding = self.plan.first
        factors = rope_tensors(self.model.checkpoint.config).values()
        for planned, values in zip(self.plan.first, factors, strict=False):
            file.write(planned, [values])
        embedding = self._quantize(planned_embedding, self.model.embedding())
        written = Written()
        _write(file, embedding, written.findings)
        if self.tokens is not None and self.settings.float_type is None:
            written.hidden = embedding.rows(self.tokens, self.settings.threads)
        return written

    def _write_layers(self, file: OutputFile, written: Written) -> None:
        """Hidden states follow through the already quantized layers."""
        tuner = None
        if self.tokens is not None:
            tuner = tuner_for(self.settings, self.model, self.stream, self.tokens)
        if tuner:
            tuner.load(self.work, written.n_layers)
        folder, findings = self.work.path, written.findings
        quantizer = LayerQuantizer(self.settings, self.plan, self.model, self.stream, folder, self.sensitivity, tuner)
        for layer in quantizer.layers(written.hidden, written.n_layers):
            for weight in layer.tensors.values():
                _write(file, weight, findings)
            if layer.tuned:
                findings.tuned.append(layer.tuned)
            if layer.tokens:
                findings.experts.append(ExpertTokens(written.n_layers, layer.tokens))
            file.flush()
            written.n_layers += 1
            if tuner:
                tuner.save(self.work, written.n_layers)
            written.save(self.work)
            del layer, weight  # else they would stay while the next layer is made

    def _write_last(self, file: OutputFile, written: Written) -> None:
        """Final norm, biases and head, whose inputs are the hidden states behind the last layer."""
        norm, *biases, planned_head = self.plan.last
        _write(file, self._quantize(norm, torch.ones(norm.shape)), written.findings)
        for planned in biases:  # the head's takes in the final norm's, which leaves zero
            bias = self.model.head_bias() if planned.name == GGUF_BIASES[HEAD_BIAS] else None
            values = torch.zeros(planned.shape) if bias is None else bias
            _write(file, self._quantize(planned, values), written.findings)
        inputs = None
        if written.hidden is not None:
            inputs = Hessian.of_rows(self.stream.final_norm(written.hidden).flatten(0, 1))
        _write(file, self._quantize(planned_head, self.model.head(), inputs), written.findings)

    def _quantize(self, planned: PlannedTensor, weight: Tensor, inputs: Hessian | None = None) -> StoredWeight:
        return quantize(planned, weight, inputs, self.settings.refinement, self.settings.threads)


def _write(file: OutputFile, weight: Stored, findings: Findings) -> None:
    file.write(weight.planned, weight.arrays())
    if len(weight.planned.shape) > 1:
        findings.rel_errors[weight.planned.name] = weight.rel_error
