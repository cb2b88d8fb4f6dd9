"""What the loss costs from the hidden states on: without the logits, and with them, in one run.

    python tools/bench/fused_linear.py                                    # CPU, 2 threads: 2048 tokens, 151,936 columns
    python tools/bench/fused_linear.py --device cuda --shapes 8192x4096x151936

Compared, forward and backward to the hidden states and the output layer's weight: ``fused`` (this project's fused linear,
for tokens of the mask only), ``logits + ours`` (all logits, then this project's policy statistics, whose gradient overwrites
them) and ``logits + eager`` (all logits, then log_softmax in fp32, gather and entropy). Methods take turns, so that a busy
machine slows all of them; a ratio is the median over turns of (method's time / our time in that turn). ``memory`` is the peak
of what forward + backward allocate; the weight's gradient, which every method returns, is in it and shown beside it.
``gradient error`` is the relative difference, in norm, to the gradients of the weight and the hidden states by ``logits +
ours``: in bf16 the products of other shapes round differently, which is all there should be to see.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dppo import vocab_parallel_policy_stats
from megatron_dppo.ops.fp32_linear import fp32_linear
from megatron_dppo.ops.fused_linear import CHUNK_BYTES, fused_linear_policy_stats
from tools.bench.policy_stats import DTYPES, clock, peak_memory, ratios


@dataclass
class Inputs:
    """One shape. The tensors named are leaves that ask for a gradient."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor  # the places of the mask's tokens, as a batch that was laid out on the host knows them


@dataclass
class Result:
    """One method; times are one per turn, in seconds, memory in bytes."""

    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    memory: float = 0.0
    gradients: tuple[torch.Tensor, ...] = ()


Method = Callable[[Inputs], torch.Tensor]  # -> a scalar to differentiate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="2048x1024x151936", help="tokens x hidden x vocabulary, comma-separated")
    parser.add_argument("--masked", type=float, default=0.5, help="share of the tokens that are prompt or padding")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chunk-mib", type=float, default=CHUNK_BYTES / 2**20, help="largest tile of logits")
    parser.add_argument("--fp32-logits", action="store_true", help="ours leave the logits of 16-bit inputs in fp32")
    parser.add_argument("--plot", type=Path, help="write a bar chart (PNG)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    charts = {}
    for shape in options.shapes.split(","):
        inputs = make_inputs(shape, options.masked, DTYPES[options.dtype], options.device)
        results = measure(methods(int(options.chunk_mib * 2**20), options.fp32_logits), inputs, options.turns)
        title = f"{shape} {options.dtype}, {int(inputs.mask.sum())} tokens in the mask"
        print_table(title, results, inputs)
        charts[title] = results
    if options.plot:
        plot(charts, options.plot)
    return 0


def make_inputs(shape: str, masked: float, dtype: torch.dtype, device: str) -> Inputs:
    tokens, hidden_size, vocab = map(int, shape.split("x"))
    torch.manual_seed(0)
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device).normal_().mul_(2 / hidden_size**0.5)
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype)
    mask = torch.rand(tokens, device=device) >= masked
    target = torch.randint(0, vocab, (tokens,), device=device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, mask, mask.nonzero()[:, 0])


def methods(chunk_bytes: int, fp32_logits: bool = False) -> dict[str, Method]:
    def fused(x: Inputs) -> torch.Tensor:
        target = x.target.index_select(0, x.rows)
        stats = fused_linear_policy_stats(
            x.hidden, x.weight, target, rows=x.rows, fp32_logits=fp32_logits, chunk_bytes=chunk_bytes
        )
        return stats.log_prob.sum() + 0.01 * stats.entropy.sum()

    def logits_ours(x: Inputs) -> torch.Tensor:
        logits = fp32_linear(x.hidden, x.weight) if fp32_logits else x.hidden @ x.weight.t()
        stats = vocab_parallel_policy_stats(logits, x.target, token_mask=x.mask, inplace_backward=True)
        return stats.log_prob.sum() + 0.01 * stats.entropy.sum()

    def logits_eager(x: Inputs) -> torch.Tensor:
        log_p = torch.log_softmax((x.hidden @ x.weight.t()).float(), dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_prob = log_p.gather(1, x.target[:, None])[:, 0]
        return torch.where(x.mask, log_prob + 0.01 * entropy, 0.0).sum()

    return {"fused": fused, "logits + ours": logits_ours, "logits + eager": logits_eager}


def measure(candidates: dict[str, Method], inputs: Inputs, turns: int) -> dict[str, Result]:
    results = {name: Result() for name in candidates}
    device, leaves = inputs.hidden.device, (inputs.hidden, inputs.weight)
    for name, method in candidates.items():  # warms up as well: allocator, thread pools

        def run(method: Method = method, result: Result = results[name]) -> None:
            result.gradients = torch.autograd.grad(method(inputs), leaves)

        results[name].memory = peak_memory(run, device)
    for _ in range(turns):
        for name, method in candidates.items():
            start = clock(device)
            total = method(inputs)
            results[name].forward.append(clock(device) - start)
            torch.autograd.grad(total, leaves)
            results[name].both.append(clock(device) - start)
            del total
    return results


def gradient_error(result: Result, reference: Result) -> float:
    """The larger one of the two gradients' relative differences."""
    return max(
        float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        for ours, theirs in zip(result.gradients, reference.gradients, strict=True)
    )


def print_table(title: str, results: dict[str, Result], inputs: Inputs) -> None:
    ours = next(iter(results.values()))
    print(f"\n{title}; the weight's gradient is {inputs.weight.nbytes / 2**20:.0f} MiB of each memory")
    print(f"{'':16}{'forward':>22}{'forward + backward':>24}{'memory':>20}{'gradient error':>18}")
    for name, result in results.items():
        forward, both = (1e3 * statistics.median(times) for times in (result.forward, result.both))
        print(
            f"{name:16}{forward:11.1f} ms {ratios(results, name, 'forward'):6.2f}x"
            f"{both:13.1f} ms {ratios(results, name, 'both'):6.2f}x"
            f"{result.memory / 2**20:9.0f} MiB {result.memory / ours.memory:5.2f}x"
            f"{gradient_error(result, results['logits + ours']):18.1e}"
        )


def plot(charts: dict[str, dict[str, Result]], path: Path) -> None:
    from megatron_dppo.compat.extras import from_extra

    with from_extra("plots"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(charts), 2, figsize=(8, 2.2 * len(charts)), squeeze=False, layout="constrained")
    for (time_axis, memory_axis), (title, results) in zip(axes, charts.items(), strict=True):
        names = list(results)
        time_axis.barh(names, [statistics.median(results[name].both) for name in names])
        time_axis.set_xlabel("forward + backward, s")
        memory_axis.barh(names, [results[name].memory / 2**30 for name in names], color="C1")
        memory_axis.set_xlabel("peak memory beyond the inputs, GiB")
        memory_axis.set_yticks([])
        for axis in (time_axis, memory_axis):
            axis.invert_yaxis()
        time_axis.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
