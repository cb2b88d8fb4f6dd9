"""Log-prob, entropy and their gradient, beside eager torch and the cross entropies that are installed (tools/bench)."""

from __future__ import annotations

import os
import statistics
from argparse import Namespace
from unittest import mock

from tools.bench import policy_stats as bench
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped

LIMIT_S = 300.0


def checks(options: Options) -> list[Check]:
    """TP 1's columns; two_ranks has TP 2's."""
    shape = "4096x151936" if options.on_gpu else "64x4000"
    return [Check(f"methods at {shape}", lambda: one_rank(options, shape), LIMIT_S)]


def one_rank(options: Options, shape: str) -> list[Finding]:
    if options.quick:
        raise Skipped("left out by --quick")
    return compare_methods(options, 1, shape)


def compare_methods(options: Options, ranks: int, shape: str) -> list[Finding]:
    """A row for each method, ours first; ratios are to ours."""
    turns = 3 if options.quick else 9
    settings = Namespace(shapes=shape, dtypes="bf16", device=options.device, threads=2, turns=turns)
    # Megatron-core's fused cross entropy is compiled, for up to a minute in every process, unless the compiler is off.
    compiler = {} if options.on_gpu and not options.quick else {"TORCHDYNAMO_DISABLE": "1"}
    with mock.patch.dict(os.environ, compiler):
        (results,) = bench.run_ranks(ranks, settings).values()
    found = []
    for name, result in results.items():
        median, ratio = statistics.median(result.both), bench.ratios(results, name, "both")
        figures = (
            f"{1e3 * median:.3f} ms forward + backward, {ratio:.2f}x, memory {result.memory:.2f} of the logits, "
            f"{result.collectives} collectives"
        )
        values = {"seconds": median, "ratio": ratio, "memory_of_logits": result.memory}
        found.append(Finding(figures, None, values, name=f"{name}, {shape} bf16, TP {ranks}"))
    return found
