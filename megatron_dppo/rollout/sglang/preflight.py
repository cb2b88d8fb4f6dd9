"""What a run asks of its servers before it loads anything: who they are, what they compute, and whether bytes reach them.

    settings -> layout -> one token -> meaning of log-probs -> one byte from this host to all of them

Every check is one that otherwise fails in the middle of the first update, after the model was loaded on every GPU, with an
error of somebody else's. The servers keep their weights: the byte goes to a tensor that no model has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dppo.errors import RefusedRequestError, RolloutError
from megatron_dppo.rollout.sample import Prompt, SamplingParams
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.probe_byte import ProbeByte
from megatron_dppo.rollout.sglang.router import Router
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.server_settings import TESTED_VERSION, Finding, examine_settings, examine_software
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.servers.software import Software, software_here
from megatron_dppo.rollout.sglang.transport import Transport
from megatron_dppo.rollout.sglang.wire_format import build_request

_TOP = 8
_PROBE_TEMPERATURE = 0.5
# Of log-probs that ought to be twice as far apart: between them and those that are not there is room for any rounding.
_LEAST_SPREAD = 0.05
_NOTHING_KNOWN: Mapping[str, Software | None] = {}


@dataclass
class Report:
    """Of one server, or of all of them together.

    Attributes:
        subject: whom it concerns.
        facts: what was found to be so, in words.
        findings: what needs attention.
    """

    subject: str
    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_fatal(self) -> bool:
        """Whether a run with it would fail."""
        return any(finding.is_fatal for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.subject}: {', '.join(self.facts) or 'nothing is known of it'}"]
        lines += [f"  {'error' if finding.is_fatal else 'note'}: {finding}" for finding in self.findings]
        return "\n".join(lines)


class Preflight:
    """Asks servers that have no run of their own: while it does, their weights are open for an update."""

    def __init__(self, config: SGLangConfig, policy: ServedPolicy, transport: Transport, longest: int) -> None:
        """``longest``: tokens of the longest prompt and response together."""
        self._config = config
        self._policy = policy
        self._transport = transport
        self._longest = longest

    def examine(self, urls: Sequence[str], software: Mapping[str, Software | None] = _NOTHING_KNOWN) -> list[Report]:
        """A report for each server, and one for what needs all of them. ``software``: of servers, as far as it is known."""
        reports, servers = [], []
        for url in urls:
            report = Report(url)
            facts = self._examine_one(url, report)
            if facts is not None:
                on_gpu = facts.layout.device_type == "cuda" and not self._config.colocated
                there = software.get(url)
                report.facts += [str(there)] if there is not None else []
                report.findings += examine_software(there, software_here(), by_nccl=on_gpu)
            reports.append(report)
            if facts is not None:
                servers.append(facts)
        if len(servers) == len(urls) and not any(report.is_fatal for report in reports):
            reports.append(self._send_a_byte(servers))
        return reports

    def examine_router(self, router: Router, urls: Sequence[str]) -> Report:
        """Whether it takes these servers and passes on what is asked of them. It has them, and no others, afterwards."""
        report = Report(router.url)
        try:
            self._transport.submit(router.serve_by(urls)).result()
            report.facts.append(f"passes requests on to {len(urls)} servers")
            sampling = SamplingParams(max_new_tokens=1, topk_log_probs=_TOP)
            answer = self._call(
                router.url, "/generate", build_request(Prompt("preflight", (1, 2, 3)), sampling, seed=0)
            )
            with reading(f"{router.url}/generate"):
                (tokens,), _ = answer["meta_info"]["output_top_logprobs"], answer["meta_info"]["weight_versions"]
            if len(tokens) != _TOP:
                raise RolloutError(f"a token through it came with {len(tokens)} log-probs instead of {_TOP}")
            report.facts.append("a token came through it")
        except RolloutError as error:
            keys = "start it with --api-key, the key that rollout.sglang.api_key_variable names"
            remedy = keys if "(401)" in str(error) else "see its log, or leave rollout.sglang.router out"
            report.findings.append(Finding(str(error), remedy))
        return report

    def _examine_one(self, url: str, report: Report) -> ServerFacts | None:
        facts = None
        try:
            info = self._call(url, "/server_info")
            with reading(f"{url}/server_info"):
                report.facts += [f"SGLang {info['version']}", f"{info['dtype']}", f"TP {info['tp_size']}"]
                report.findings += examine_settings(info, self._policy)
                report.findings += self._too_short(info)
            facts = ServerFacts.of(url, info)
            report.findings += self._meaning_of_log_probs(url)
            report.facts.append("generates")
        except RefusedRequestError as error:
            keys = "set rollout.sglang.api_key_variable and admin_api_key_variable to the server's keys"
            report.findings.append(Finding(str(error), keys if "(401)" in str(error) else "see the server's log"))
        except RolloutError as error:
            report.findings.append(Finding(str(error), "see the server's log, and the way from this host to it"))
        return facts

    def _too_short(self, info: dict[str, Any]) -> Iterator[Finding]:
        options = {"context_length": "--context-length", "max_total_num_tokens": "--max-total-tokens"}
        for name, option in options.items():
            length = info.get(name)
            if length is not None and int(length) < self._longest:
                yield Finding(
                    f"its {name} is {length}, and prompt and response can have {self._longest} tokens",
                    f"start it with {option} {self._longest} or more, or lower rollout.max_response_tokens",
                )

    def _meaning_of_log_probs(self, url: str) -> Iterator[Finding]:
        """Log-probs have to be those of the distribution that tokens are drawn from: at the temperature, not truncated."""
        plain, warm = self._top_log_probs(url, 1.0), self._top_log_probs(url, _PROBE_TEMPERATURE)
        shared = sorted(plain.keys() & warm.keys(), key=plain.__getitem__)
        if sum(math.exp(log_prob) for log_prob in plain.values()) > 1.0 + 1e-3:
            yield Finding(
                "the probabilities of its likeliest tokens add up to more than 1",
                "its log-probs are of no use: see its log",
            )
        if len(shared) < 2 or plain[shared[-1]] - plain[shared[0]] < _LEAST_SPREAD:
            return  # all alike: temperature makes no difference that could be seen
        spread, scaled = (probs[shared[-1]] - probs[shared[0]] for probs in (plain, warm))
        wanted = spread / _PROBE_TEMPERATURE
        if abs(scaled - wanted) > abs(scaled - spread):
            yield Finding(
                "its log-probs are not those of the distribution at the temperature that tokens are drawn with",
                "start it without --enable-custom-logit-processor and other settings that change log-probs, or with"
                f" SGLang {TESTED_VERSION}",
            )

    def _top_log_probs(self, url: str, temperature: float) -> dict[int, float]:
        body = {
            "input_ids": [1, 2, 3],
            "sampling_params": {"temperature": temperature, "max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": _TOP,
        }
        answer = self._call(url, "/generate", body)
        with reading(f"{url}/generate"):
            (tokens,) = answer["meta_info"]["output_top_logprobs"]
            return {int(token): float(log_prob) for log_prob, token, *_ in tokens}

    def _send_a_byte(self, servers: Sequence[ServerFacts]) -> Report:
        report = Report(f"this host to {len(servers)} servers")
        on_cuda = servers[0].layout.device_type == "cuda"
        if on_cuda and not torch.cuda.is_available():
            remedy = "run this on a host of the trainer's"
            report.findings.append(
                Finding("no byte was sent: the servers have GPUs, this host has none", remedy, False)
            )
            return report
        report.facts.append(str(software_here()))
        began = time.monotonic()
        try:
            ProbeByte(servers, self._config, self._transport, "nccl" if on_cuda else "gloo").send()
            report.facts.append(f"a byte arrived after {time.monotonic() - began:.1f} s")
        except (RolloutError, RuntimeError) as error:
            report.findings.append(
                Finding(
                    f"no byte arrived: {error}",
                    "ports between the hosts must be open, rollout.sglang.master_address an address of this host that servers"
                    f" reach, and NCCL the same version on both sides (here: {software_here()}; see docs/servers.md)",
                )
            )
        return report

    def _call(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._transport.call(url, path, body, self._config.control_timeout_s)
