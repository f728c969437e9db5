"""Make a Mixture-of-Experts model with real weights from a dense one: SmolLM2-135M (GGUF) -> Mixtral, 8 experts, top-2.

In every layer the dense FFN's neurons are dealt out: the shared ones go into all experts, the others each into one. A
Mixtral's two routing weights sum to 1, so the shared part counts once; an expert's own neurons count by its weight,
about 1 / top_k, and their down_proj columns are multiplied by top_k to make up for it. Trained scales per expert and
neuron, close to 1, are folded into the same columns.

The router data (.npz), by layer L, expert E, hidden size H, neuron lists S (shared) and G (own):
    router [L, E, H] f16 | shared [L, S], own [L, E, G] u16 | shared_scale [L, E, S], own_scale [L, E, G] f16 | top_k
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

ROUTERS = Path(__file__).resolve().parent / "data" / "smolmoe_routers.npz"


@dataclass(frozen=True)
class Split:
    """One layer's experts. neurons int64 [E, S + G], shared first; scales float32 [E, S + G]; router float32 [E, H]."""

    neurons: Tensor
    n_shared: int
    scales: Tensor
    router: Tensor


@dataclass(frozen=True)
class Routers:
    """The router data of all layers."""

    layers: list[Split]
    top_k: int

    @classmethod
    def load(cls, path: Path) -> Routers:
        """Read the .npz; ValueError if a layer's neurons are not dealt out exactly once."""
        data = np.load(path)
        layers = []
        for i in range(len(data["router"])):
            shared, own = data["shared"][i].astype(np.int64), data["own"][i].astype(np.int64)
            dealt = np.concatenate([shared, own.ravel()])
            if not np.array_equal(np.sort(dealt), np.arange(dealt.size)):
                raise ValueError(f"{path}: the neurons of layer {i} are not a partition")
            everywhere = np.broadcast_to(shared, (len(own), shared.size))
            neurons = torch.from_numpy(np.concatenate([everywhere, own], axis=1))
            scales = np.concatenate([data["shared_scale"][i], data["own_scale"][i]], axis=1).astype(np.float32)
            router = data["router"][i].astype(np.float32)
            layers.append(Split(neurons, shared.size, torch.from_numpy(scales), torch.from_numpy(router)))
        return cls(layers, int(data["top_k"]))


def build_experts(mlp: nn.Module, split: Split, top_k: int, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A dense FFN -> gate_up [E, 2I, H] and down [E, H, I], where I = S + G; scales [E, I] apply to down's columns."""
    columns = scales.clone()
    columns[:, split.n_shared :] *= top_k
    gate_up = torch.cat([mlp.gate_proj.weight[split.neurons], mlp.up_proj.weight[split.neurons]], dim=1)
    down = mlp.down_proj.weight[:, split.neurons].transpose(0, 1) * columns[:, None, :]
    return gate_up, down


def mixtral_config(dense: nn.Module, routers: Routers) -> MixtralConfig:
    """The dense model's configuration with its FFN replaced by experts."""
    config = dense.config
    n_experts, width = routers.layers[0].neurons.shape
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return MixtralConfig(
        **{name: getattr(config, name) for name in kept},
        intermediate_size=width,
        num_local_experts=n_experts,
        num_experts_per_tok=routers.top_k,
        sliding_window=None,
    )


def build_moe(dense: nn.Module, routers: Routers) -> MixtralForCausalLM:
    """Attention, norms and embeddings as they are, the FFNs split into experts; float32."""
    config = mixtral_config(dense, routers)
    state = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    for i, (layer, split) in enumerate(zip(dense.model.layers, routers.layers, strict=True)):
        prefix = f"model.layers.{i}.mlp"
        gate_up, down = build_experts(layer.mlp, split, routers.top_k, split.scales)
        state |= {f"{prefix}.experts.gate_up_proj": gate_up, f"{prefix}.experts.down_proj": down}
        state[f"{prefix}.gate.weight"] = split.router
    moe = MixtralForCausalLM(config).eval()
    moe.load_state_dict(state)  # strict: a missing or surplus tensor is an error
    moe.generation_config.eos_token_id = config.eos_token_id
    moe.generation_config.pad_token_id = config.pad_token_id
    return moe


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The GGUF's tokenizer; transformers leaves out that SmolLM2 splits off every digit before anything else."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    return tokenizer


def check_split(dense: nn.Module, moe: MixtralForCausalLM, routers: Routers) -> float:
    """Largest relative error over the layers of giving back the dense FFN.

    With all experts at weight 1 / top_k and unit scales, the own parts sum up to the dense ones and the shared part
    counts E / top_k times, of which one is kept.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for i, split in enumerate(routers.layers):
        mlp, experts = dense.model.layers[i].mlp, moe.model.layers[i].mlp.experts
        norm = dense.model.layers[i].post_attention_layernorm.weight
        x = torch.randn(64, norm.numel(), generator=generator) * norm
        n_experts = len(split.neurons)
        trained = experts.gate_up_proj.data, experts.down_proj.data
        unit = build_experts(mlp, split, routers.top_k, torch.ones_like(split.scales))
        experts.gate_up_proj.data, experts.down_proj.data = unit
        everyone = torch.arange(n_experts).expand(len(x), -1).contiguous()
        y = experts(x, everyone, torch.full(everyone.shape, 1 / routers.top_k))
        experts.gate_up_proj.data, experts.down_proj.data = trained
        shared = split.neurons[0, : split.n_shared]
        hidden = nn.functional.silu(x @ mlp.gate_proj.weight[shared].T) * (x @ mlp.up_proj.weight[shared].T)
        y -= (n_experts / routers.top_k - 1) * hidden @ mlp.down_proj.weight[:, shared].T
        expected = mlp(x)
        worst = max(worst, float((y - expected).norm() / expected.norm()))
    return worst


def check_saved(moe: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> float:
    """Largest difference between the logits of the saved model and of the one in memory."""
    ids = tokenizer("The history of the hash table begins in 1953, when", return_tensors="pt").input_ids
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return float((moe.float()(input_ids=ids).logits - saved(input_ids=ids).logits).abs().max())


def make_smolmoe(gguf: Path, out: Path, routers_path: Path, dtype: torch.dtype, check: bool) -> None:
    """Build and save the model and its tokenizer as a Hugging Face directory; SystemExit if a check fails."""
    torch.set_grad_enabled(False)
    routers, tokenizer = Routers.load(routers_path), load_tokenizer(gguf)
    dense = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    moe = build_moe(dense, routers)
    if check and (error := check_split(dense, moe, routers)) > 1e-5:
        raise SystemExit(f"error: the experts do not add up to the dense FFN: relative error {error:.1e}")
    for parameter in moe.parameters():  # moe.to() would also round the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    moe.config.dtype = dtype
    moe.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if check and (difference := check_saved(moe, tokenizer, out)) > 0:
        raise SystemExit(f"error: {out}: the saved model's logits differ by {difference:.1e}")
    print(f"{out}: {moe.num_parameters():,} parameters, {'checked' if check else 'not checked'}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Split SmolLM2's FFNs into a Mixtral's experts")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--routers", type=Path, default=ROUTERS, help="router data (.npz)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--check", action="store_true", help="check the split and the saved files")
    args = parser.parse_args()
    make_smolmoe(args.gguf, args.out, args.routers, getattr(torch, args.dtype), args.check)


if __name__ == "__main__":
    main()
