"""The one definition of what a rollout is: a prompt that was asked, a response that was sampled, and how.

Every engine returns these and the trainer reads nothing else, so a log-probability means the same thing wherever it came
from: the natural log of the probability under which the token was drawn, i.e. of ``softmax(logits / temperature)`` over the
true (unpadded) vocabulary. With ``temperature == 0`` (greedy evaluation) it is that of ``softmax(logits)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron_dppo.errors import InvalidSampleError
from megatron_dppo.models.expert_choices import is_invalid_choice

# Rounding can put a log-prob this far above 0.
_LOG_PROB_SLACK = 1e-3

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One prompt to be sampled from.

    Attributes:
        prompt_id: names the prompt in logs and errors, e.g. ``"train/chain_sum/17"``.
        token_ids: the prompt as the model reads it, chat template included; never empty.
        metadata: what the scorer needs to grade a response; engines carry it along untouched.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. DPPO needs untruncated sampling: truncation changes the support of the rollout policy.

    Attributes:
        max_new_tokens: responses end here with ``finish_reason == "length"``.
        temperature: divides the logits; 0 means greedy.
        samples_per_prompt: responses drawn for every prompt.
        stop_token_ids: sampling one of them ends a response; the token is part of the response.
        topk_log_probs: how many of the most likely tokens to return per position (0: none).
        seed: the same seed, prompts and weights give the same responses on one engine and layout.
        return_routed_experts: return the experts that computed every token, to be replayed in training (MoE policies).
    """

    max_new_tokens: int
    temperature: float = 1.0
    samples_per_prompt: int = 1
    stop_token_ids: tuple[int, ...] = ()
    topk_log_probs: int = 0
    seed: int = 0
    return_routed_experts: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingParams.max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"SamplingParams.temperature must be >= 0, not {self.temperature}")
        if self.samples_per_prompt < 1:
            raise ValueError(f"SamplingParams.samples_per_prompt must be at least 1, not {self.samples_per_prompt}")
        if self.topk_log_probs < 0:
            raise ValueError(f"SamplingParams.topk_log_probs must be >= 0, not {self.topk_log_probs}")


@dataclass(frozen=True)
class FailedSample:
    """A response that was asked for and cannot be used.

    Attributes:
        prompt: the prompt that was asked.
        reason: why not; names the prompt.
        group_id: as of a ``Sample``.
    """

    prompt: Prompt
    reason: str
    group_id: int = 0


@dataclass
class Sample:
    """One response (T tokens) to one prompt.

    Attributes:
        prompt: the prompt that was asked.
        response_ids: [T] sampled token ids, the stop token included.
        rollout_log_probs: [T] log-probability of each sampled token under the policy that drew it.
        finish_reason: ``stop``, ``length``, or ``abort`` (the engine gave up; such samples are not trained on).
        weight_versions: spans ``(version, tokens)`` in order; the token counts sum to T.
        topk_ids: [T, K] int64 global token ids, most likely first, or None.
        topk_log_probs: [T, K] fp32 log-probabilities of ``topk_ids``, or None.
        routed_experts: [prompt + T - 1, layers, experts per token] int32 router choices, or None. The last token has none:
            it was drawn and never read.
        group_id: samples with the same id answer the same prompt and share a baseline.
        reward: in [0, 1] once scored.
    """

    prompt: Prompt
    response_ids: list[int]
    rollout_log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int]]
    topk_ids: torch.Tensor | None = None
    topk_log_probs: torch.Tensor | None = None
    routed_experts: torch.Tensor | None = None
    group_id: int = 0
    reward: float | None = None

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response, as the policy reads them in training."""
        return [*self.prompt.token_ids, *self.response_ids]

    @property
    def oldest_weight_version(self) -> int:
        """The version that drew the first of this sample's tokens to be drawn by an old policy."""
        return min(version for version, _ in self.weight_versions)

    def check(self) -> None:
        """Raise InvalidSampleError if an engine returned something that training must not see.

        A log-prob of NaN or -inf for a sampled token, or well above 0, would turn into a silent wrong ratio. Rounding
        can put a log-prob slightly above 0; that is left for the loss to clamp.
        """
        name, length = self.prompt.prompt_id, len(self.response_ids)
        if length == 0:
            raise InvalidSampleError(f"sample of {name}: the response is empty")
        if len(self.rollout_log_probs) != length:
            raise InvalidSampleError(
                f"sample of {name}: {len(self.rollout_log_probs)} log-probs for {length} response tokens"
            )
        log_probs = torch.tensor(self.rollout_log_probs, dtype=torch.float64, device="cpu")
        impossible = ~(log_probs.isfinite() & (log_probs <= _LOG_PROB_SLACK))
        if impossible.any():
            position = int(impossible.nonzero()[0])
            raise InvalidSampleError(
                f"sample of {name}: token {position} (id {self.response_ids[position]}) has rollout log-prob "
                f"{self.rollout_log_probs[position]}"
            )
        if sum(tokens for _, tokens in self.weight_versions) != length:
            raise InvalidSampleError(
                f"sample of {name}: weight_versions {self.weight_versions} do not cover its {length} tokens"
            )
        for label, tensor in (("topk_ids", self.topk_ids), ("topk_log_probs", self.topk_log_probs)):
            if tensor is not None and (tensor.dim() != 2 or tensor.shape[0] != length):
                raise InvalidSampleError(
                    f"sample of {name}: {label} has shape {tuple(tensor.shape)}, expected [{length}, K]"
                )
        if (self.topk_ids is None) != (self.topk_log_probs is None):
            raise InvalidSampleError(f"sample of {name}: topk_ids and topk_log_probs must come together")
        if self.routed_experts is not None:
            self._check_routed_experts(self.routed_experts)

    def _check_routed_experts(self, experts: torch.Tensor) -> None:
        """An engine that did not record a token returns zeros for it, which would be replayed as if they were choices."""
        name, tokens = self.prompt.prompt_id, len(self.token_ids) - 1
        if experts.dim() != 3 or experts.shape[0] != tokens or 0 in experts.shape[1:]:
            raise InvalidSampleError(
                f"sample of {name}: routed_experts has shape {tuple(experts.shape)}, expected [{tokens} tokens of prompt "
                "and response, layers, experts per token]"
            )
        bad = is_invalid_choice(experts)
        if bad.any():
            token, layer = (int(index) for index in bad.nonzero()[0])
            raise InvalidSampleError(
                f"sample of {name}: routed_experts of token {token} in layer {layer} is {experts[token, layer].tolist()}, "
                f"not {experts.shape[-1]} different experts"
            )
