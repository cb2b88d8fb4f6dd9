"""The loss from logits in one pass (ops/gradient_over_logits.py) beside two passes: forward + backward, in turns.

    python tools/bench/one_pass.py [--shapes 512x49152,128x151936] [--dtypes bf16,fp32] [--device cpu|cuda] [--turns 15]

A policy gradient alone of whole logits, the gradient written over them. Prints the median time of each way, and the median
over turns of (one pass / two passes in that turn). On a CPU time is what the process computed, so that waiting for a busy
machine is left out. ``taken``: whether the rule (ops/logits_route.py) takes one pass there; here it always is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs
from megatron_dppo.ops import logits_route
from megatron_dppo.ops.backend import choose_backend

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="512x49152,128x151936")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    print(f"{options.device}, {torch.get_num_threads()} threads, {options.turns} turns")
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        for name in options.dtypes.split(","):
            print(
                f"{shape:>12} {name}", compared(rows, columns, DTYPES[name], options.device, options.turns), flush=True
            )


def compared(rows: int, columns: int, dtype: torch.dtype, device: str, turns: int) -> str:
    generator = torch.Generator().manual_seed(0)
    values = (2 * torch.randn(rows, columns, generator=generator)).to(device, dtype)
    target = torch.randint(0, columns, (rows,), generator=generator).to(device)
    inputs = LossInputs(
        target=target,
        loss_mask=None,
        advantages=torch.randn(rows, generator=generator).to(device),
        rollout_log_probs=values.float().log_softmax(-1).gather(-1, target[:, None])[:, 0] - 0.01,
    )
    ways = [
        DPPOLoss(DPPOConfig(), vocab_size=columns, checks="off", inplace_backward=True, backward_scale=promise)
        for promise in (1.0, None)
    ]
    taken = logits_route.takes_one_pass(fresh(values), columns, choose_backend("auto", values))
    with mock.patch.object(logits_route, "_workers", return_value=(0, float("inf"))):
        seconds = [[seconds_of(loss, values, inputs) for loss in ways] for _ in range(turns + 1)][1:]
    one, two = (statistics.median(turn[way] for turn in seconds) * 1e3 for way in (0, 1))
    ratio = statistics.median(turn[0] / turn[1] for turn in seconds)
    return f"one pass {one:8.2f} ms   two passes {two:8.2f} ms   ratio {ratio:.2f}   taken: {'yes' if taken else 'no'}"


def fresh(values: torch.Tensor) -> torch.Tensor:
    """Logits that may be overwritten: no leaf."""
    return values.clone().requires_grad_() * 1


def seconds_of(loss: DPPOLoss, values: torch.Tensor, inputs: LossInputs) -> float:
    logits = fresh(values)
    begin = clock(values.device)
    output = loss(logits, inputs)
    torch.autograd.grad(output.loss, logits)
    return clock(values.device) - begin


def clock(device: torch.device) -> float:
    """Seconds; on a GPU once it is done with what was asked of it."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
