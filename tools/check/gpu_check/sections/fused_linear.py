"""The loss from hidden states: without the logits, by way of them, eager, and Liger's cross entropy where it is installed."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from megatron_dppo.ops.linear_call import CHUNK_BYTES
from megatron_dppo.ops.linear_route import BLOCK_BYTES_ELSEWHERE
from tools.bench import fused_linear as bench
from tools.bench.policy_stats import ratios
from tools.check.gpu_check.findings import Check, Finding, Options

LIMIT_S = 180.0
# The gradients of two bf16 routes differ by a few of its roundings, 2^-8 each, and those are of either sign.
GRADIENT_TOLERANCE = 2.0**-6


def checks(options: Options) -> list[Check]:
    """TP 1's 151,936 columns and TP 4's, with bf16 logits and with fp32 ones (--quick: TP 4's, fp32)."""
    shapes = ["64x64x4000"]
    if options.on_gpu:
        shapes = ["8192x4096x37984"] if options.quick else ["8192x4096x37984", "8192x4096x151936"]
    return [
        Check(f"{shape}, half masked, {dtype} logits", bind(options, shape, dtype == "fp32"), LIMIT_S)
        for shape in shapes
        for dtype in (("fp32",) if options.quick else ("bf16", "fp32"))
    ]


def bind(options: Options, shape: str, fp32_logits: bool) -> Any:
    return lambda: compare(options, shape, fp32_logits)


def compare(options: Options, shape: str, fp32_logits: bool) -> list[Finding]:
    inputs = bench.make_inputs(shape, 0.5, torch.bfloat16, options.device)
    block_bytes, tile_bytes = (BLOCK_BYTES_ELSEWHERE, CHUNK_BYTES) if options.on_gpu else (2**16, 2**14)
    ways = bench.methods(tile_bytes, fp32_logits)
    ways["in forward"] = bench.methods(block_bytes, fp32_logits)["in forward"]
    if (liger := liger_cross_entropy()) is not None and options.on_gpu:
        ways["Liger"] = liger
    results = bench.measure(ways, inputs, turns=3 if options.quick else 5)
    found = []
    for name, result in results.items():
        median, ratio = statistics.median(result.both), ratios(results, name, "both")
        figures = f"{1e3 * median:.1f} ms forward + backward, {ratio:.2f}x, {result.memory / 2**20:.0f} MiB"
        values: dict[str, float] = {"seconds": median, "ratio": ratio, "bytes": result.memory}
        passed = None
        if name == "Liger":
            figures += "; cross entropy only"
        elif name != "logits + ours":
            error = values["gradient_error"] = bench.gradient_error(result, results["logits + ours"])
            figures += f", gradient {error:.1e} from that of logits + ours"
            passed = error <= GRADIENT_TOLERANCE
        found.append(Finding(figures, passed, values, name=f"{name}, {shape} {'fp32' if fp32_logits else 'bf16'}"))
    return found


def liger_cross_entropy() -> bench.Method | None:
    """Liger's fused linear cross entropy of the mask's tokens: another loss, at the same sizes."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except Exception as error:  # a package that does not fit its torch or triton raises whatever it likes
        print(f"Liger is left out: {type(error).__name__}: {error}", flush=True)
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda x: loss(x.weight, x.hidden.index_select(0, x.rows), x.target.index_select(0, x.rows))
