"""One call of the loss, forward and backward: how long, how many launches, waits for the device, captured whole.

On a CPU operators are counted in place of launches, those that would wait for a device are looked for, and the call is
captured by torch.compile in place of a CUDA graph.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs
from megatron_dppo.loss.inputs import TopK
from tests.device_waits import DeviceWaits
from tools.bench.policy_stats import clock
from tools.check.gpu_check.findings import Check, Finding, Options

LIMIT_S = 120.0
CONFIGS = {
    "binary_tv": DPPOConfig(divergence="binary_tv"),
    "topk_kl, seq_mean": DPPOConfig(divergence="topk_kl", aggregation="seq_mean_token_mean"),
}
_BATCH, _TOPK = 8, 20


@dataclass(frozen=True)
class Call:
    """A call of the loss as training makes it: rows are chosen already, impossible values are looked for later."""

    logits: torch.Tensor  # [b, s, V], a leaf
    inputs: LossInputs
    loss: DPPOLoss

    def __call__(self) -> torch.Tensor:
        """The gradient to the logits."""
        output = self.loss(self.logits, self.inputs)
        (gradient,) = torch.autograd.grad(output.loss, self.logits)
        return gradient


def checks(options: Options) -> list[Check]:
    """TP 4's share of a micro-batch of 8192 tokens, where the host's time shows beside the kernels'."""
    tokens, vocab = (8192, 37_984) if options.on_gpu else (64, 500)
    found = []
    for name, config in CONFIGS.items():
        for what, check in (("time", time_of), ("launches", launches), ("waits", waits), ("captured", captured)):

            def run(check: Callable[[Call], Finding] = check, config: DPPOConfig = config) -> Finding:
                return check(make_call(config, tokens, vocab, options.device))

            found.append(Check(f"{what}, {name}, {tokens}x{vocab} bf16", run, LIMIT_S))
    return found


def make_call(config: DPPOConfig, tokens: int, vocab: int, device: str) -> Call:
    torch.manual_seed(0)
    shape = (_BATCH, tokens // _BATCH)
    logits = torch.randn(*shape, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    log_mu = -3.0 * torch.rand(*shape, device=device)
    topk = torch.log_softmax(torch.randn(*shape, _TOPK + 1, device=device), -1)[..., :_TOPK]
    inputs = LossInputs(
        target=torch.randint(0, vocab, shape, device=device),
        loss_mask=None,
        advantages=torch.randn(*shape, device=device),
        rollout_log_probs=log_mu,
        rollout_topk=TopK(ids=torch.arange(_TOPK, device=device).repeat(*shape, 1), log_probs=topk),
    )
    return Call(logits, inputs, DPPOLoss(config, vocab_size=vocab, backend=device, checks="deferred"))


def time_of(call: Call, turns: int = 20) -> Finding:
    times = []
    for _ in range(turns + 3):
        start = clock(call.logits.device)
        call()
        times.append(clock(call.logits.device) - start)
    median = statistics.median(times[3:])
    return Finding(f"{1e3 * median:.3f} ms forward + backward", None, {"seconds": median})


def launches(call: Call) -> Finding:
    call()
    if call.logits.device.type == "cpu":
        with DeviceWaits() as counted:
            call()
        return Finding(f"{counted.operators} operators", None, {"operators": counted.operators})
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events()]
    launched = sum(bool(re.match(r"cu(da)?Launch", name)) for name in names)
    copies = sum(name.startswith(("cudaMemcpy", "cudaMemset")) for name in names)
    figures = f"{launched} launches, {copies} copies and fills"
    return Finding(figures, None, {"launches": launched, "copies_and_fills": copies})


def waits(call: Call) -> Finding:
    call()
    if call.logits.device.type == "cpu":
        with DeviceWaits() as found:
            call()
        where = ", ".join(f"{name} in {caller.rpartition('/')[2]}" for name, caller in found.found)
        return Finding(where or "no operator that would wait for a device", not found.found)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # an operator that waits is an error, and so the row's
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Finding("none", True)


def captured(call: Call) -> Finding:
    """The captured call gives, for other values in the same tensors, what an ordinary one gives."""
    if call.logits.device.type == "cpu":
        compiled = torch.compile(call.loss, fullgraph=True, backend="aot_eager")

        def replay() -> torch.Tensor:
            return torch.autograd.grad(compiled(call.logits, call.inputs).loss, call.logits)[0]

    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warms up: a capture cannot load kernels
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradient = call()

        def replay() -> torch.Tensor:
            graph.replay()
            return gradient

    replay()
    with torch.no_grad():
        call.logits.mul_(-0.5)
        call.inputs.advantages.neg_()
    same = torch.equal(replay(), call())
    how = "torch.compile, whole" if call.logits.device.type == "cpu" else "a CUDA graph"
    return Finding(f"by {how}: {'the same gradient' if same else 'ANOTHER gradient'} on other values", same)
