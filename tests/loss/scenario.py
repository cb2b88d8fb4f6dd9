"""A small batch with everything in it that the loss has to cope with, made in float64 and handed out in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dppo import LossInputs, TopK

VOCAB, PADDED, BATCH, LENGTH, K = 22, 24, 3, 8, 4


@dataclass
class Scenario:
    logits: torch.Tensor  # [b, s, PADDED]
    rollout_logits: torch.Tensor
    target: torch.Tensor
    loss_mask: torch.Tensor
    advantages: torch.Tensor
    rollout_log_probs: torch.Tensor
    rollout_topk_ids: torch.Tensor
    rollout_topk_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor

    def inputs(self, *names: str) -> LossInputs:
        """What the loss takes: the fields that are always needed, and those of ``names``."""
        optional = {name: getattr(self, name) for name in names if name != "rollout_topk"}
        if "rollout_topk" in names:
            optional["rollout_topk"] = TopK(ids=self.rollout_topk_ids, log_probs=self.rollout_topk_log_probs)
        always = {name: getattr(self, name) for name in ("target", "loss_mask", "advantages", "rollout_log_probs")}
        return LossInputs(**always, **optional)

    def reference_batch(self, *names: str) -> dict[str, torch.Tensor]:
        """The same as tests/loss/reference.py takes it."""
        always = ("target", "loss_mask", "advantages", "rollout_log_probs")
        spelt = {"rollout_topk": ("rollout_topk_ids", "rollout_topk_log_probs")}
        optional = [field for name in names for field in spelt.get(name, (name,))]
        return {name: getattr(self, name) for name in (*always, *optional)}


def make_scenario(seed: int = 0, temperature: float = 1.0, drift: float = 0.7, scale: float = 2.0) -> Scenario:
    """Policies that differ by ``drift``, an engine that disagrees slightly with the recomputed rollout policy."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rollout = scale * normal(BATCH, LENGTH, PADDED)
    # Padding holds whatever the embedding's padded rows give; large values show at once if they are counted.
    rollout[..., VOCAB:] = 30.0
    policy = (rollout + drift * normal(BATCH, LENGTH, PADDED)).float()
    engine = (rollout + 0.02 * normal(BATCH, LENGTH, PADDED))[..., :VOCAB] / temperature
    log_mu = engine.log_softmax(-1)
    target = torch.multinomial(log_mu.exp().view(-1, VOCAB), 1, generator=g).view(BATCH, LENGTH)
    topk_log_probs, topk_ids = log_mu.topk(K, dim=-1)
    advantages = normal(BATCH, LENGTH).float()
    advantages[:, ::4] = 0.0
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[:, 0], mask[0, 6:], mask[2, 3] = False, False, False
    return Scenario(
        logits=policy,
        rollout_logits=rollout.float(),
        target=target,
        loss_mask=mask,
        advantages=advantages,
        rollout_log_probs=log_mu.gather(-1, target[..., None])[..., 0].float(),
        rollout_topk_ids=topk_ids,
        rollout_topk_log_probs=topk_log_probs.float(),
        ref_log_probs=(rollout[..., :VOCAB] / temperature).log_softmax(-1).gather(-1, target[..., None])[..., 0].float()
        - 0.1,
    )
