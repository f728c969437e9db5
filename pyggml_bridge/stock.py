"""What stock llama.cpp does differently with an exported file, as far as the file's keys tell."""

from __future__ import annotations

from typing import Any

from pyggml_bridge.reader import GGUFFile

# Architectures for which llama.cpp has no head width: it expects heads of hidden / n_heads columns.
NO_HEAD_DIM = ("qwen2", "qwen2moe", "olmoe", "phimoe")


def differences(file: GGUFFile) -> list[str]:
    """One sentence each; none for most files. docs/architectures.md has the reasons."""
    arch: str = file.get("general.architecture", str)

    def key(name: str, default: Any) -> Any:
        return file.metadata.get(f"{arch}.{name}", default)

    hidden, heads = key("embedding_length", 0), key("attention.head_count", 1)
    wide = arch in NO_HEAD_DIM and key("attention.key_length", hidden // heads) * heads != hidden
    shared_keys = arch == "olmoe" and key("attention.head_count_kv", heads) != heads
    grouped = arch == "deepseek2" and key("expert_group_count", 1) > 1
    scaled = arch == "deepseek2" and key("rope.scaling.attn_factor", 1.0) != 1.0
    long_factor = key("rope.scaling.attn_factor_long", None)
    nameless = file.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in file.metadata
    found = {
        f"does not load it: {arch} with heads other than hidden / heads wide": wide,
        "does not load it: olmoe with fewer KV heads than heads": shared_keys,
        "routes by a softmax over all experts, not by SparseMixer": arch == "phimoe",
        "has no sliding window for phimoe": arch == "phimoe" and key("attention.sliding_window", 0) > 0,
        "takes one attention factor for short and long sequences": long_factor
        not in (
            None,
            key("rope.scaling.attn_factor", None),
        ),
        "does not renormalize the chosen experts' weights": arch == "qwen2moe" and key("expert_weights_norm", False),
        "chooses expert groups by their two best experts, not by the best": grouped,
        "takes rope.scaling.attn_factor for 1": scaled,
        "does not know the pre-tokenizer: its tokens may differ": nameless,
    }
    return [what for what, applies in found.items() if applies]
