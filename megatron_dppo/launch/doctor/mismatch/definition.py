"""What a checkpoint folder says that its model computes: every operator, written out in plain torch, in any dtype.

In float64 it is what is right; in the model's dtype it is an example of what rounding does. It reads the folder alone, and
shares no code with the policy, transformers or a server. Tensors are [S, ...]: one sequence, no batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from megatron_dppo.models.hf.config import head_dim, is_moe, load_hf_config
from megatron_dppo.models.hf.config_json import rope_parameters
from megatron_dppo.models.hf.weights import checkpoint_tensors

Operator = Callable[[torch.Tensor], torch.Tensor]
EMBEDDING, FINAL_NORM = "embedding", "final norm"
INPUT_NORM, ATTENTION, MLP_NORM, MLP, ROUTER, EXPERTS = (
    "input norm",
    "attention",
    "post-attention norm",
    "MLP",
    "router",
    "experts",
)


class Definition:
    """The operators of one folder's model in one dtype."""

    def __init__(
        self, folder: str | Path, held_in: torch.dtype, computed_in: torch.dtype, device: torch.device
    ) -> None:
        """``held_in``: the dtype that the model's weights are rounded to; ``computed_in``: that of everything here."""
        self.config: PretrainedConfig = load_hf_config(folder)
        self.dtype = computed_in
        self._held_in = held_in
        self._device = device
        self._read = checkpoint_tensors(folder, self.config)
        self._eps = float(self.config.rms_norm_eps)
        self._wide = torch.float64 if computed_in == torch.float64 else torch.float32  # norms, softmax, angles
        self._frequencies = frequencies(self.config, device).to(self._wide)
        self._kept = cache(self._weight)  # of one layer: forgotten with the next

    @property
    def layers(self) -> int:
        """How many."""
        return int(self.config.num_hidden_layers)

    def operators(self, layer: int) -> dict[str, Operator]:
        """Of a layer, by name, in order. The router gives [S, experts] weights, 0 for those not chosen."""
        prefix = f"model.layers.{layer}."
        self._kept = cache(self._weight)
        named: dict[str, Operator] = {
            INPUT_NORM: lambda x: self._norm(x, f"{prefix}input_layernorm.weight"),
            ATTENTION: lambda x: self._attention(x, f"{prefix}self_attn."),
            MLP_NORM: lambda x: self._norm(x, f"{prefix}post_attention_layernorm.weight"),
        }
        if not is_moe(self.config):
            return {**named, MLP: lambda x: self._mlp(x, f"{prefix}mlp.")}
        return {**named, ROUTER: lambda x: self.router(x, layer)}

    def embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        """[S] -> [S, h]."""
        return self._weight("model.embed_tokens.weight")[tokens.to(self._device)]

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """[S, h] -> [S, h]."""
        return self._norm(x, "model.norm.weight")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, h] -> [n, V]."""
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return F.linear(hidden.to(self._device, self.dtype), self._weight(name))

    def router(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """[S, h] -> [S, experts]."""
        scores = self.router_scores(x, layer)
        values, chosen = scores.to(self._wide).softmax(-1).topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, chosen, values.to(scores.dtype))

    def router_scores(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """[S, h] -> [S, experts]: before the softmax."""
        return F.linear(self._in(x), self._kept(f"model.layers.{layer}.mlp.gate.weight"))

    def experts(self, x: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
        """[S, h], [S, experts] -> [S, h]: the sum of the chosen experts' outputs."""
        x, weights = self._in(x), self._in(weights)
        out = torch.zeros_like(x)
        for expert in weights.any(0).nonzero()[:, 0].tolist():
            rows = weights[:, expert].nonzero()[:, 0]
            each = self._mlp(x[rows], f"model.layers.{layer}.mlp.experts.{expert}.")
            out.index_add_(0, rows, each * weights[rows, expert, None])
        return out

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[S] -> [S, h] after the final norm: all operators in turn."""
        x = self.embedding(tokens)
        for layer in range(self.layers):
            operators = self.operators(layer)
            x = x + operators[ATTENTION](operators[INPUT_NORM](x))
            y = operators[MLP_NORM](x)
            x = x + (self.experts(y, operators[ROUTER](y), layer) if ROUTER in operators else operators[MLP](y))
        return self.final_norm(x)

    def _in(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device, self.dtype)

    def _weight(self, name: str) -> torch.Tensor:
        return self._read(name).to(self._device, self._held_in).to(self.dtype)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self._in(x)
        wide = x.to(self._wide)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)).to(x.dtype) * self._kept(name)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self._kept(f"{name}.bias") if self.config.model_type == "qwen2" and name[-6:] in _BIASED else None
        return F.linear(x, self._kept(f"{name}.weight"), bias)

    def _mlp(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        x = self._in(x)
        gated = F.silu(self._linear(x, f"{prefix}gate_proj")) * self._linear(x, f"{prefix}up_proj")
        return self._linear(gated, f"{prefix}down_proj")

    def _attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        x, size = self._in(x), head_dim(self.config)
        q, k, v = (self._linear(x, f"{prefix}{part}_proj").unflatten(-1, (-1, size)) for part in "qkv")
        if self.config.model_type in ("qwen3", "qwen3_moe"):
            q, k = (self._norm(y, f"{prefix}{part}_norm.weight") for y, part in ((q, "q"), (k, "k")))
        angles = torch.outer(torch.arange(len(x), device=self._device, dtype=self._wide), self._frequencies)
        q, k = (_rotated(y, angles) for y in (q, k))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        future = torch.ones(len(x), len(x), dtype=torch.bool, device=self._device).triu(1)
        shares = scores.to(self._wide).masked_fill(future, -math.inf).softmax(-1).to(x.dtype)
        return self._linear(torch.einsum("hqk,khd->qhd", shares, v).flatten(1), f"{prefix}o_proj")


_BIASED = ("q_proj", "k_proj", "v_proj")


def frequencies(config: PretrainedConfig, device: torch.device) -> torch.Tensor:
    """[head size / 2] float64 angles per position, as the config has them; ``llama3`` stretches the slow ones."""
    rope, size = rope_parameters(config), head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, device=device).double() / size)
    if rope["rope_type"] != "llama3":
        return plain
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = old * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / rope["factor"])


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[S, heads, d]: the pairs (i, i + d/2) turned by their angles; sine and cosine rounded as the rest is."""
    cos, sin = (f(angles).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
