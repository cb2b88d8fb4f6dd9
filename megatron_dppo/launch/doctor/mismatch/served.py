"""Responses of a real SGLang server: tokens, log-probs, last hidden states and, for an MoE policy, expert choices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_dppo.errors import RolloutError
from megatron_dppo.launch.doctor.mismatch.sides import SERVER, Side, Tokens
from megatron_dppo.models.hf.config import is_moe
from megatron_dppo.rollout.sample import Prompt, SamplingParams
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.routed_experts import RoutingShape
from megatron_dppo.rollout.sglang.servers.served_policy import prepare_served_folder
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.wire_format import build_request, parse_response, request_seed

# "full", because "last" is of newer servers; after the final norm either way.
_HIDDEN_STATES = ("--enable-return-hidden-states", "--return-hidden-states-mode", "full")
_VERSION = 0


def served(
    folder: Path,
    config: PretrainedConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    server: SGLangConfig,
    dtype: str,
    fp32_head: bool,
    scratch: Path,
) -> tuple[Side, list[Tokens]]:
    """Start a server on ``folder`` alone, have it answer every prompt, and end it.

    Raises RolloutError if it does not start or does not answer.
    """
    server = replace(server, extra_args=[*server.extra_args, *_HIDDEN_STATES])
    seen = prepare_served_folder(folder, scratch / "served")
    process = SGLangServer(
        server,
        seen,
        dtype,
        scratch,
        0,
        return_routed_experts=is_moe(config),
        fp32_head=fp32_head and dtype != "float32",
    )
    with closing(Transport(server.keys)) as transport, closing(process):
        process.start()
        process.wait_until_ready(transport)
        return answers(process.url, config, prompts, new_tokens, transport, server.request_timeout_s)


def answers(
    url: str,
    config: PretrainedConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    transport: Transport,
    timeout_s: float,
) -> tuple[Side, list[Tokens]]:
    """Of a server that is there; its hidden states are None if it returns none."""
    sampling = SamplingParams(new_tokens, return_routed_experts=is_moe(config))
    shape = RoutingShape.of(config) if is_moe(config) else None
    sequences, log_probs, hidden = [], [], []
    for index, ids in enumerate(prompts):
        prompt = Prompt(f"prompt/{index}", tuple(ids))
        body = build_request(prompt, sampling, request_seed(prompt, index, 0, sampling))
        answer = transport.call(url, "/generate", {**body, "return_hidden_states": True}, timeout_s)
        with reading("/generate"):
            for span in answer["meta_info"]["weight_versions"]:
                span["version"] = str(_VERSION)  # whatever it calls the weights that it loaded: it was sent none
        sample = parse_response(answer, prompt, index, sampling, _VERSION, shape)
        sequences.append(Tokens(tuple(sample.token_ids), len(sample.response_ids), sample.routed_experts))
        log_probs += sample.rollout_log_probs
        hidden.append(hidden_states(answer, len(sample.response_ids)))
    whole = None if any(rows is None for rows in hidden) else torch.cat([rows for rows in hidden if rows is not None])
    return Side(SERVER, torch.tensor(log_probs, dtype=torch.float64), whole), sequences


def hidden_states(answer: dict[str, Any], response: int) -> torch.Tensor | None:
    """[response, h] that the response's tokens were drawn from: the prompt's last, then those of all tokens but the last.

    Raises RolloutError if there are some, but not as many.
    """
    with reading("/generate"):
        entries = answer["meta_info"].get("hidden_states")
        if not entries:
            return None
        # The first entry is that of the prompt, all its tokens or its last; the others have one token each.
        rows = [torch.tensor(entry, dtype=torch.float32).reshape(-1, _width(entry))[-1] for entry in entries]
    if len(rows) < response:
        raise RolloutError(f"the server returned hidden states of {len(rows)} tokens for {response}")
    return torch.stack(rows[:response])


def _width(entry: list[Any]) -> int:
    return len(entry[0]) if isinstance(entry[0], list) else len(entry)
