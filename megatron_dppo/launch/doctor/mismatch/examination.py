"""From sides that are loaded to a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megatron_dppo.compat.optional_dependencies import probe_transformer_engine
from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.launch.doctor.mismatch.comparison import Yardstick, pairs
from megatron_dppo.launch.doctor.mismatch.definition import Definition
from megatron_dppo.launch.doctor.mismatch.diagnosis import Diagnosis
from megatron_dppo.launch.doctor.mismatch.operators import OperatorError, carried_apart, operator_errors
from megatron_dppo.launch.doctor.mismatch.sides import (
    POLICY,
    TRANSFORMERS,
    Side,
    Tokens,
    policy_side,
    transformers_side,
)
from megatron_dppo.launch.doctor.mismatch.switches import effects
from megatron_dppo.launch.doctor.mismatch.trace import Trace
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import checkpoint_tensors, export_hf_weights, load_hf_weights


@torch.no_grad()
def examine(
    folder: Path,
    policy: torch.nn.Module,
    in_fp32: Callable[[], torch.nn.Module] | None,
    reference: PreTrainedModel,
    sequences: Sequence[Tokens],
    server: Side | None = None,
) -> Diagnosis:
    """Compare all sides.

    Args:
        folder: what all of them were loaded from.
        policy: its only chunk, on one rank.
        in_fp32: loads the policy in fp32; None: it is.
        reference: the transformers model, in the policy's dtype.
        sequences: that the server, or else transformers, has drawn.
        server: what it computed.
    """
    device, dtype = next(policy.parameters()).device, next(policy.parameters()).dtype
    exact, rounded = (Definition(folder, dtype, computed, device) for computed in (torch.float64, dtype))
    of_policy, policy_traces = policy_side(policy, sequences)
    of_reference, reference_traces = transformers_side(reference, sequences)
    sides = [*([server] if server is not None else []), of_policy, of_reference]
    yardstick = Yardstick(exact, rounded, sequences)
    traces = {POLICY: policy_traces, TRANSFORMERS: reference_traces}
    return Diagnosis(
        model=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        tokens=sum(tokens.response for tokens in sequences),
        pairs=pairs(sides),
        parts=[yardstick.measure(side) for side in sides],
        operators={side: _worst(each, exact, rounded) for side, each in traces.items()},
        apart=carried_apart(policy_traces, reference_traces),
        weights=other_weights(folder, policy),
        effects=effects(policy, in_fp32, server or of_reference, sequences),
    )


def load_policy(folder: Path, dtype: torch.dtype, fp32_head: bool = True) -> torch.nn.Module:
    """The policy of a folder on this rank alone, model parallelism being initialised."""
    # As a run would build it, or would have to be told to where Transformer Engine cannot be used.
    backend = "local" if torch.cuda.is_available() and not probe_transformer_engine().usable else "auto"
    chunks = build_policy(load_hf_config(folder), ParallelConfig(), dtype, fp32_head=fp32_head, backend=backend)
    load_hf_weights(chunks, folder)
    return chunks[0].eval()


def _worst(traces: Sequence[Trace], exact: Definition, rounded: Definition) -> list[OperatorError]:
    """Of every operator the sequence in which it is farthest beyond what is explained."""
    each = zip(*(list(operator_errors(trace, exact, rounded)) for trace in traces), strict=True)
    return [max(lines, key=lambda line: line.excess) for lines in each]


def other_weights(folder: Path, policy: torch.nn.Module) -> list[str]:
    """Names of the folder's tensors that the policy, which was loaded from it, holds with other numbers."""
    read, found = checkpoint_tensors(folder, policy.hf_config), []
    for name, held in export_hf_weights([policy]):
        if not torch.equal(held, read(name).to(held)):
            found.append(name)
    return found
