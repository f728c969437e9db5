"""The forward pass of a tiny llama-architecture CQ file in plain PyTorch, with the run-time activation quantizer.

Two experts of nearly equal probability may fall either way, and one flip moves every later token. So the oracle takes
the experts that the runner chose, and says how much worse than its own best they are: `routing_regret`.

Written from docs/format.md and the architecture's definition, independently of the runner: no code is shared with it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.tiny_gguf import Tiny


class TorchOracle:
    """Logits of whole sequences; keeps the experts that it would have chosen in the last call."""

    def __init__(self, weights: dict[str, np.ndarray], t: Tiny) -> None:
        self.w = {name: torch.from_numpy(array) for name, array in weights.items()}
        self.t = t
        self.experts: list[torch.Tensor] = []
        self.given: list[np.ndarray] = []
        self.routing_regret = 0.0
        n = t.hadamard
        signs = [[1 - 2 * ((a & b).bit_count() % 2) for b in range(n)] for a in range(n)]
        self.hadamard = torch.tensor(signs) / n**0.5 if n else None

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        top = 127.0 if self.t.activation_bits == 8 else 7.0
        scale = x.abs().amax(-1, keepdim=True) / top
        return torch.round(x * (1.0 / scale)).clamp(-top, top) * scale

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        out = self.fake_quantize(x) @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.w[f"{name}.weight"]

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        n, _, dim = x.shape
        inverse = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        rotation = torch.polar(torch.ones(()).double(), torch.arange(n).double()[:, None] * inverse)
        pairs = torch.view_as_complex(x.double().reshape(n, x.shape[1], dim // 2, 2))
        return torch.view_as_real(pairs * rotation[:, None]).reshape(x.shape).float()

    def attention(self, x: torch.Tensor, block: str) -> torch.Tensor:
        t, n = self.t, len(x)
        q = self.rope(self.linear(x, f"{block}.attn_q").reshape(n, t.n_heads, t.head_dim))
        k = self.rope(self.linear(x, f"{block}.attn_k").reshape(n, t.n_kv_heads, t.head_dim))
        v = self.linear(x, f"{block}.attn_v").reshape(n, t.n_kv_heads, t.head_dim)
        k, v = k.half().float(), v.half().float()  # the cache's type
        k, v = (y.repeat_interleave(t.n_heads // t.n_kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(t.head_dim)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, -1)
        return self.linear(out, f"{block}.attn_output")

    def swiglu_ffn(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        x = self.fake_quantize(x)
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        if self.hadamard is not None:
            hidden = (hidden.unflatten(-1, (-1, self.t.hadamard)) @ self.hadamard).flatten(-2)
        return self.fake_quantize(hidden) @ down.T

    def ffn(self, x: torch.Tensor, block: str) -> torch.Tensor:
        if not self.t.n_experts:
            return self.swiglu_ffn(x, *(self.w[f"{block}.ffn_{name}.weight"] for name in ("gate", "up", "down")))
        probabilities = (x @ self.w[f"{block}.ffn_gate_inp.weight"].T).softmax(-1)
        best, ids = probabilities.topk(self.t.top_k)
        self.experts.append(ids)
        if self.given:
            ids = torch.from_numpy(self.given[len(self.experts) - 1]).long()
        weights = probabilities.gather(-1, ids)
        self.routing_regret = max(self.routing_regret, float((best.sum(-1) - weights.sum(-1)).max()))
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for weight, expert in zip(weights[token], ids[token], strict=True):
                parts = (self.w[f"{block}.ffn_{name}_exps.weight"][expert] for name in ("gate", "up", "down"))
                out[token] += weight * self.swiglu_ffn(x[token : token + 1], *parts)[0]
        return out

    @torch.no_grad()
    def logits(self, tokens: np.ndarray, experts: list[np.ndarray] | None = None) -> np.ndarray:
        """Logits [n, vocab] of tokens [n]; experts: per layer [n, top_k] to use instead of the best."""
        self.experts, self.given, self.routing_regret = [], experts or [], 0.0
        x = self.w["token_embd.weight"][torch.from_numpy(tokens).long()]
        for layer in range(self.t.n_layers):
            x = x + self.attention(self.norm(x, f"blk.{layer}.attn_norm"), f"blk.{layer}")
            x = x + self.ffn(self.norm(x, f"blk.{layer}.ffn_norm"), f"blk.{layer}")
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        return (self.norm(x, "output_norm") @ head.T).numpy()
