"""Requests to and responses from SGLang's ``/generate``, and nothing about how they travel."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from megatron_dppo.errors import InvalidSampleError, RolloutError
from megatron_dppo.rollout.sample import FinishReason, Prompt, Sample, SamplingParams
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.routed_experts import RoutingShape, parse_routed_experts


def request_seed(prompt: Prompt, prompt_index: int, sample_index: int, sampling: SamplingParams) -> int:
    """A seed that differs between the samples of a batch and is the same in every run."""
    text = f"{sampling.seed}/{prompt.prompt_id}/{prompt_index}/{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def build_request(prompt: Prompt, sampling: SamplingParams, seed: int) -> dict[str, Any]:
    """The body of one ``/generate`` request for one response.

    Everything that a model's generation_config.json could turn on (top-p, top-k, penalties) is turned off explicitly:
    the rollout policy must be the plain softmax. ``ignore_eos`` switches off stop_token_ids as well, so it is set only
    when there are none.
    """
    return {
        "input_ids": list(prompt.token_ids),
        "sampling_params": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": not sampling.stop_token_ids,
            "sampling_seed": seed,
        },
        "return_logprob": True,
        "top_logprobs_num": sampling.topk_log_probs,
        "return_routed_experts": sampling.return_routed_experts,
        "return_text_in_logprobs": False,
    }


def parse_response(
    response: dict[str, Any],
    prompt: Prompt,
    group_id: int,
    sampling: SamplingParams,
    weight_version: int,
    routing: RoutingShape | None = None,
) -> Sample:
    """Turn the answer to ``build_request`` into a checked Sample. Raises RolloutError or InvalidSampleError.

    ``weight_version`` is the version that the servers were last synchronised to: an answer drawn, even in part, by
    other weights means that somebody restarted or updated a server behind the engine's back. ``routing`` is the shape of the
    expert choices, if they were asked for.
    """
    with reading(f"sample of {prompt.prompt_id}"):
        meta = response["meta_info"]
        response_ids, log_probs = _parse_tokens(meta["output_token_logprobs"], prompt)
        if response_ids != response["output_ids"]:
            raise RolloutError(
                f"sample of {prompt.prompt_id}: the server's log-probs are not those of its output tokens"
            )
        topk_ids, topk_log_probs = _parse_topk(meta, sampling.topk_log_probs, prompt)
        sample = Sample(
            prompt=prompt,
            response_ids=response_ids,
            rollout_log_probs=log_probs,
            finish_reason=_finish_reason(meta["finish_reason"], prompt, sampling),
            weight_versions=_parse_weight_versions(meta, prompt, weight_version),
            topk_ids=topk_ids,
            topk_log_probs=topk_log_probs,
            routed_experts=parse_routed_experts(meta, prompt, len(response_ids), routing) if routing else None,
            group_id=group_id,
        )
        sample.check()
    return sample


def was_aborted(response: dict[str, Any]) -> bool:
    """Whether the server gave this request up (a pause, an overload) instead of finishing it."""
    with reading("/generate"):
        return bool(response["meta_info"]["finish_reason"]["type"] == "abort")


def generated_tokens(response: dict[str, Any]) -> int:
    """How many tokens the server generated for this request."""
    with reading("/generate"):
        return len(response["output_ids"])


def _parse_tokens(entries: list[Any], prompt: Prompt) -> tuple[list[int], list[float]]:
    """[T] token ids and [T] log-probs from entries ``[log_prob, token_id, ...]``."""
    ids = [int(entry[1]) for entry in entries]
    for position, (log_prob, *_) in enumerate(entries):
        if log_prob is None:  # how the server writes NaN and infinities
            raise InvalidSampleError(
                f"sample of {prompt.prompt_id}: token {position} (id {ids[position]}) has rollout log-prob null"
            )
    return ids, [float(log_prob) for log_prob, *_ in entries]


def _finish_reason(reason: dict[str, Any], prompt: Prompt, sampling: SamplingParams) -> FinishReason:
    if reason["type"] == "length":
        return "length"
    if reason["type"] == "stop" and reason.get("matched") in sampling.stop_token_ids:
        return "stop"
    raise RolloutError(
        f"sample of {prompt.prompt_id}: the server ended the response for its own reason ({reason}), not one of "
        f"stop_token_ids {sampling.stop_token_ids}. A server that was not started by this engine also stops at the "
        "eos_token_id of its model folder: add that id to stop_token_ids"
    )


def _parse_weight_versions(meta: dict[str, Any], prompt: Prompt, weight_version: int) -> list[tuple[int, int]]:
    spans = [(span["version"], span["end"] - span["start"]) for span in meta["weight_versions"]]
    for version, _ in spans:
        if version != str(weight_version):
            raise RolloutError(
                f"sample of {prompt.prompt_id}: drawn by weights version {version!r}, but version {weight_version} was "
                "the last one sent; a server was restarted or updated by somebody else"
            )
    return [(weight_version, tokens) for _, tokens in spans]


def _parse_topk(meta: dict[str, Any], k: int, prompt: Prompt) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """[T, K] int64 ids and [T, K] fp32 log-probs, most likely first; None, None if k is 0."""
    if k == 0:
        return None, None
    rows = [_parse_tokens(row, prompt) for row in meta["output_top_logprobs"]]
    for position, (ids, _) in enumerate(rows):
        if len(ids) != k:
            raise InvalidSampleError(
                f"sample of {prompt.prompt_id}: token {position} has {len(ids)} top log-probs, not the {k} asked for"
            )
    ids_TK = torch.tensor([ids for ids, _ in rows], dtype=torch.int64).view(-1, k)
    log_probs_TK = torch.tensor([log_probs for _, log_probs in rows], dtype=torch.float32).view(-1, k)
    return ids_TK, log_probs_TK
