"""Whether a server computes what the policy computes, as far as its settings say, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.rollout.sglang.servers.server import EXPERT_CHOICES_FLAG, FP32_HEAD_FLAG
from megatron_dppo.rollout.sglang.servers.software import Software

# What every statement about SGLang in this package was tried with.
TESTED_VERSION = "0.5.23"


@dataclass(frozen=True)
class Finding:
    """Something about a server that needs attention.

    Attributes:
        fault: what is wrong.
        remedy: what to do.
        is_fatal: whether rollouts of this server cannot be used. If not, they may be.
    """

    fault: str
    remedy: str
    is_fatal: bool = True

    def __str__(self) -> str:
        return f"{self.fault}: {self.remedy}"


def examine_settings(info: dict[str, Any], policy: ServedPolicy) -> list[Finding]:
    """Compare a server's ``/server_info`` with the policy that it is to serve."""
    return [*_other_numbers(info, policy), *_other_software(info)]


def examine_software(there: Software | None, here: Software, *, by_nccl: bool) -> list[Finding]:
    """NCCL refuses to talk to another version of itself, with an error that does not say so."""
    if there is None or not by_nccl or there.nccl == here.nccl:
        return []
    return [
        Finding(
            f"its NCCL is {there.nccl}, and that of this host is {here.nccl}: weights cannot travel between them",
            "install the same torch, or the same nvidia-nccl, on both sides; docs/servers.md names a pair",
        )
    ]


def _other_numbers(info: dict[str, Any], policy: ServedPolicy) -> Iterator[Finding]:
    dtype = info.get("dtype")
    if dtype not in (policy.dtype, None, "auto"):
        yield Finding(
            f"it computes in {dtype}, and is to compute in {policy.dtype}",
            f"start it with --dtype {policy.dtype}, or set rollout.sglang.dtype={dtype}",
        )
    yield from _other_head(info, policy)
    if info.get("quantization"):
        yield Finding(
            f"its weights are quantised ({info['quantization']})",
            "start it without --quantization: it gets whole weights",
        )
    if info.get("kv_cache_dtype") not in (None, "auto", policy.dtype):
        yield Finding(
            f"its key-value cache is in {info['kv_cache_dtype']}: log-probs will differ from the policy's",
            "start it with --kv-cache-dtype auto",
            is_fatal=False,
        )
    if info.get("ep_num_redundant_experts"):
        yield Finding(
            "it keeps some experts twice (ep_num_redundant_experts), which no checksum foresees",
            "start it without --ep-num-redundant-experts",
        )
    if policy.return_routed_experts and not info.get("enable_return_routed_experts"):
        yield Finding(
            "it does not keep expert choices, which routing replay needs", f"start it with {EXPERT_CHOICES_FLAG}"
        )


def _other_head(info: dict[str, Any], policy: ServedPolicy) -> Iterator[Finding]:
    """Both sides round their logits to 16 bits, or neither: the rounding of one alone is mismatch (docs/mismatch.md)."""
    fp32_head = bool(info.get("enable_fp32_lm_head"))
    if policy.dtype == "float32" or fp32_head == policy.fp32_head:
        return
    if policy.fp32_head:
        yield Finding(
            "it rounds its logits to 16 bits, and the trainer does not (model.fp32_head=true, or model.dtype=fp32)",
            f"start it with {FP32_HEAD_FLAG}, or set model.fp32_head=false in bf16",
        )
    else:
        yield Finding(
            f"it leaves its logits in fp32 ({FP32_HEAD_FLAG}), and the trainer rounds them to 16 bits"
            " (model.fp32_head=false)",
            f"set model.fp32_head=true, or start it without {FP32_HEAD_FLAG}",
        )


def _other_software(info: dict[str, Any]) -> Iterator[Finding]:
    version = info.get("version")
    if version != TESTED_VERSION:
        yield Finding(
            f"it is SGLang {version}, and nothing was tried with that",
            f"install sglang=={TESTED_VERSION}, or look closely at the first updates",
            is_fatal=False,
        )
