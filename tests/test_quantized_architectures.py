"""Every architecture in CQ4: the runner against transformers' own layers with the file's weights and quantizers.

Not the converter's arithmetic is on trial here but the runner's: each linear layer of transformers' module is replaced
by one that transforms and quantizes its inputs as docs/format.md says and multiplies what the file holds.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codequant_converter import cli
from codequant_converter.calibrate.layer_stream import LayerStream
from codequant_converter.source.checkpoint import (
    EMBEDDING,
    FINAL_NORM,
    GGUF_BIASES,
    GGUF_NAMES,
    HEAD,
    HEAD_BIAS,
    Checkpoint,
)
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.transform.weight_layout import WeightLayout, hadamard_blocks
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyggml_bridge.export import dequantized
from pyggml_bridge.measure.perplexity import routing_of
from pyggml_bridge.model import Model
from pyggml_bridge.models import load_model
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights

from .models import MODELS, VOCAB

# Three or more of each architecture. An activation that lies where int8 rounds, two experts that all but tie, or a
# token beside SparseMixer's thresholds, where a routing weight jumps, can fall on the other side in other orders of
# summation, and processors sum in different orders. Wrong arithmetic would show with any tokens, so one sequence
# without such an accident is enough: each takes every step-th token of the vocabulary. mixtral-top-1 has none among 47.
NAMES = [name for name in MODELS if name != "mixtral-top-1"]
STEPS = [step for step in (37, 29, *range(5, VOCAB // 2)) if gcd(step, VOCAB) == 1]
N_TOKENS = 64
FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
Q8_0_COLS = 32
BOUND = 1e-4  # mean KLD, nats
ROUTED_ALIKE = 0.99  # of all choices: two experts may be all but tied


def quantized_inputs(x: Tensor, kind: GGMLQuantizationType, block: int) -> Tensor:
    """x [..., n] after the Hadamard transform, int8 with a scale per token, per 32 columns for Q8_0."""
    x = hadamard_blocks(x.contiguous(), block)
    if kind in FLOATS:
        return x
    groups = x.unflatten(-1, (-1, Q8_0_COLS if kind == GGMLQuantizationType.Q8_0 else x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (torch.round(groups * inverse).clamp(-127, 127) * scale).flatten(-2)


def with_f16_cache(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """Attention over keys and values as the runner's cache holds them; of a latent attention the keys' rope part."""
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if hasattr(module, "kv_a_layernorm"):
        nope, rope = key.split([key.shape[-1] - module.qk_rope_head_dim, module.qk_rope_head_dim], dim=-1)
        return attention(module, query, torch.cat([nope, rope.half().float()], dim=-1), value, *rest, **options)
    return attention(module, query, key.half().float(), value.half().float(), *rest, **options)


ALL_ATTENTION_FUNCTIONS.register("f16_cache", with_f16_cache)


class FileLinear(nn.Module):
    """A weight [out, in] of the file, rows in transformers' order."""

    def __init__(self, weight: Tensor, kind: GGMLQuantizationType, block: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.kind, self.block, self.bias = weight, kind, block, bias

    def forward(self, x: Tensor) -> Tensor:
        out = quantized_inputs(x, self.kind, self.block) @ self.weight.T
        return out if self.bias is None else out + self.bias


class FileExperts(nn.Module):
    """gate, up, down: one FileLinear per expert."""

    def __init__(self, gate: list[FileLinear], up: list[FileLinear], down: list[FileLinear]) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(states)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            token, slot = torch.where(index == expert)
            if not len(token):
                continue
            y = down(nn.functional.silu(gate(states[token])) * up(states[token]))
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class FileModel:
    """transformers' layers of a checkpoint with the weights of a file made from it."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self.checkpoint, self.weights = checkpoint, Weights(GGUFFile(path))
        self.block = self.weights.file.get("cq.hadamard.ffn_down", int, 0)
        self.stream = LayerStream(checkpoint)
        for layer in self.stream.decoder.layers:
            layer.self_attn.config._attn_implementation = "f16_cache"
        self.chosen: list[Tensor] = []

    def matrices(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, GGMLQuantizationType]:
        """A weight [..., out, in] in the file's layout, and its type."""
        *n, rows, cols = shape
        if n:
            (part,) = self.weights.experts(name, rows, cols, n[0])
        else:
            part = self.weights.matrix(name, rows, cols)
        return torch.from_numpy(np.array(dequantized(part))).reshape(shape), self.weights.file.tensors[name].type

    def vector(self, name: str) -> Tensor:
        (n,) = self.weights.file.tensors[name].shape
        return torch.from_numpy(self.weights.vector(name, n).copy())

    def layer(self, index: int) -> nn.Module:
        arch = self.checkpoint.arch_of(index)
        floats: dict[str, Tensor] = {}
        for spec in arch.unquantized:
            floats[spec.name] = self.vector(spec.in_file(index))
        linears = {}
        for linear in arch.linears:
            stored, kind = self.matrices(linear.in_file(index), self.checkpoint.expected_shape(linear, index))
            heads = getattr(self.checkpoint.config, linear.rope_heads) if linear.rope_heads else 0
            floats[linear.name] = WeightLayout(heads).from_file(stored)
            linears[linear] = floats[linear.name], kind, self.block if linear.hadamard else 0
        module = self.stream.module(index, floats)
        experts = {}
        for linear, (weight, kind, block) in linears.items():
            if linear.experts:
                experts["down" if linear.writes_residual else ("gate", "up")[linear.row_block[0]]] = [
                    FileLinear(matrix, kind, block) for matrix in weight
                ]
            elif kind not in FLOATS:
                name = linear.parameter.removesuffix(".weight")
                module.set_submodule(name, FileLinear(weight, kind, block, module.get_submodule(name).bias))
            if linear.router:
                router = module.get_submodule(linear.parameter.removesuffix(".weight"))
                router.register_forward_hook(lambda _, inputs, output: self.chosen.append(output[2]))
        if hasattr(module.self_attn, "kv_a_layernorm"):  # the latents are what the cache holds
            module.self_attn.kv_a_layernorm.register_forward_hook(lambda _, inputs, output: output.half().float())
        if experts:
            module.set_submodule(arch.experts_module, FileExperts(**experts))
        return module

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> Tensor:
        shape = (self.checkpoint.config.vocab_size, self.checkpoint.config.hidden_size)
        hidden = self.matrices(GGUF_NAMES[EMBEDDING], shape)[0][torch.from_numpy(tokens).long()][None].clone()
        for index in range(self.checkpoint.config.num_hidden_layers):
            self.stream.forward(self.layer(index), hidden)
        norm = self.vector(GGUF_NAMES[FINAL_NORM])
        bias = self.vector(GGUF_BIASES[HEAD_BIAS]) if self.weights.has(GGUF_BIASES[HEAD_BIAS]) else None
        head, kind = self.matrices(GGUF_NAMES[HEAD], shape)
        return FileLinear(head, kind, 0, bias)(self.stream.final_norm(hidden[0]) * norm)


@pytest.mark.parametrize("name", NAMES)
def test_the_runner_computes_what_transformers_computes_with_the_files_weights(name, tmp_path):
    MODELS[name].save(tmp_path / "model")
    out = tmp_path / "m.gguf"
    options = ("--bits", "4", "--no-check", "--tensor-type", r"attn_[kv]_b=f32")
    arguments = [str(tmp_path / "model"), "--out", str(out), *options[: 3 if "deepseek" not in name else 5]]
    cli.convert(cli.settings_of(cli.parser().parse_args(arguments)))
    model = FileModel(open_checkpoint(str(tmp_path / "model")), out)
    runner = load_model(str(out), n_ctx=N_TOKENS, n_threads=1)
    clustered = [t for t in model.weights.file.tensors.values() if t.type.name.startswith("CQ")]
    assert len(clustered) >= 3
    found = []
    for tokens in (np.arange(N_TOKENS, dtype=np.int32) * step % VOCAB for step in STEPS):
        model.chosen.clear()
        kld, routed_alike = compare(runner, model, tokens)
        if kld <= BOUND and routed_alike >= ROUTED_ALIKE:
            return
        found.append(kld)
    pytest.fail(f"no sequence keeps the bounds, the least mean KLD is {min(found)}")


def mean_kld(p: Tensor, q: Tensor) -> float:
    """Of logits q from logits p, in nats."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def compare(runner: Model, model: FileModel, tokens: np.ndarray) -> tuple[float, float]:
    """Mean KLD of the runner's logits from the model's, in nats, and the share of experts that both chose."""
    ours = torch.from_numpy(runner.forward(tokens, 0, N_TOKENS).copy())
    kld = mean_kld(model.logits(tokens), ours)
    chosen = routing_of(runner, N_TOKENS)
    if chosen is None:
        return kld, 1.0
    wanted = torch.stack(model.chosen).numpy()
    return kld, float((np.sort(chosen, -1) == np.sort(wanted, -1)).mean())
