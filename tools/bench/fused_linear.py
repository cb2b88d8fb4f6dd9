"""What the loss costs from the hidden states on: without the logits, and with them, in one run.

    python tools/bench/fused_linear.py                                    # CPU, 2 threads: 2048 tokens, 151,936 columns
    python tools/bench/fused_linear.py --before HEAD~1 --exact            # beside another revision's, and float64
    python tools/bench/fused_linear.py --device cuda --shapes 8192x4096x151936

Compared, forward and backward of a policy gradient to the hidden states and the output layer's weight:

* ``in forward``: for tokens of the mask only, the gradient made in forward;
* ``two passes``: the same, every logit made twice. ``two passes before``: as another revision's ops/fused_linear.py does it;
* ``logits + ours``: all logits, then this project's policy statistics, whose gradient overwrites them;
* ``logits + eager``: all logits, then log_softmax in fp32 and gather.

The first three add the weight's gradient to an fp32 ``main_grad`` that is there already; the others return it. Methods take
turns, so that a busy machine slows all of them; a ratio is the median over turns of (method's time / our time in that turn).
``memory`` is the peak of what forward + backward allocate. ``gradient error`` is the relative difference, in norm, of the
weight's and the hidden states' gradients to those of ``logits + ours`` (or the last way of ``--only``), or to float64 with
``--exact``. Every bf16 gradient
is rounded at the end, which is 1.7e-3 of it; only ``main_grad`` can be closer.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dppo import vocab_parallel_policy_stats
from megatron_dppo.ops.fp32_linear import fp32_linear
from megatron_dppo.ops.fused_linear import CHUNK_BYTES, fused_linear_policy_stats
from megatron_dppo.ops.gradient_in_forward import zero_with_policy_gradient
from tools.bench.policy_stats import DTYPES, clock, peak_memory, ratios


@dataclass
class Inputs:
    """One shape. The tensors named are leaves that ask for a gradient."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    coefficients: torch.Tensor  # of each token's log-prob
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
    parser.add_argument("--coefficients", default="signs", choices=["signs", "normal"], help="of the tokens' log-probs")
    parser.add_argument("--before", metavar="REV", help="a git revision whose ops/fused_linear.py is run beside")
    parser.add_argument("--only", metavar="WAY,...", help="some of the ways, the one to compare with first")
    parser.add_argument("--exact", action="store_true", help="gradient errors are to float64 (minutes, GiB)")
    parser.add_argument("--fp32-logits", action="store_true", help="ours leave the logits of 16-bit inputs in fp32")
    parser.add_argument("--plot", type=Path, help="write a bar chart (PNG)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    charts = {}
    for shape in options.shapes.split(","):
        inputs = make_inputs(shape, options.masked, DTYPES[options.dtype], options.device, options.coefficients)
        before = None if options.before is None else fused_linear_of(options.before)
        candidates = methods(int(options.chunk_mib * 2**20), options.fp32_logits, before)
        if options.only is not None:
            candidates = {name: candidates[name] for name in options.only.split(",")}
        results = measure(candidates, inputs, options.turns)
        title = f"{shape} {options.dtype}, {int(inputs.mask.sum())} tokens in the mask"
        compared = next(reversed(results)) if "logits + ours" not in results else "logits + ours"
        reference = exact_gradients(inputs) if options.exact else results[compared].gradients
        print_table(title, results, inputs, reference)
        charts[title] = results
    if options.plot:
        plot(charts, options.plot)
    return 0


def make_inputs(shape: str, masked: float, dtype: torch.dtype, device: str, coefficients: str = "signs") -> Inputs:
    tokens, hidden_size, vocab = map(int, shape.split("x"))
    torch.manual_seed(0)
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device).normal_().mul_(2 / hidden_size**0.5)
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype)
    mask = torch.rand(tokens, device=device) >= masked
    target = torch.randint(0, vocab, (tokens,), device=device)
    drawn = torch.randn(tokens, device=device)
    weight = torch.nn.Parameter(weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=device), False
    factors = drawn if coefficients == "normal" else drawn.sign()
    return Inputs(hidden.requires_grad_(), weight, target, mask, factors, mask.nonzero()[:, 0])


def fused_linear_of(revision: str) -> ModuleType:
    """ops/fused_linear.py as it was, on the other modules as they are; it fails where they have become others."""
    path = "megatron_dppo/ops/fused_linear.py"
    source = subprocess.run(
        ["git", "show", f"{revision}:{path}"],
        cwd=Path(__file__).resolve().parents[2],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    module = ModuleType("fused_linear_before")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(source, f"{revision}:{path}", "exec"), module.__dict__)
    return module


def methods(chunk_bytes: int, fp32_logits: bool = False, before: ModuleType | None = None) -> dict[str, Method]:
    common: dict[str, Any] = {
        "accumulate_into_main_grad": True,
        "fp32_logits": fp32_logits,
        "chunk_bytes": chunk_bytes,
        "checks": "off",
    }

    def in_forward(x: Inputs) -> torch.Tensor:
        coefficients = x.coefficients.index_select(0, x.rows)
        block = max(1, chunk_bytes // (x.weight.shape[0] * (4 if fp32_logits else x.weight.dtype.itemsize)))
        others = {"topk_ids": None, "temperature": 1.0, "vocab_size": None, "tp_group": None, "token_mask": None}
        return zero_with_policy_gradient(
            x.hidden,
            x.weight,
            x.target.index_select(0, x.rows),
            rows=x.rows,
            token_gradient=lambda stats, tokens: coefficients[tokens],
            block_rows=block,
            backward_scale=1.0,
            backend="auto",
            sequence_parallel=False,
            reduce_hidden_grad=True,
            deterministic="off",  # not among the common ones, which a commit before is given too
            **others,
            **common,
        )

    def two_passes(x: Inputs, compute: Callable[..., Any] = fused_linear_policy_stats) -> torch.Tensor:
        stats = compute(x.hidden, x.weight, x.target.index_select(0, x.rows), rows=x.rows, **common)
        return (x.coefficients.index_select(0, x.rows) * stats.log_prob).sum()

    def logits_ours(x: Inputs) -> torch.Tensor:
        logits = fp32_linear(x.hidden, x.weight) if fp32_logits else x.hidden @ x.weight.t()
        stats = vocab_parallel_policy_stats(logits, x.target, token_mask=x.mask, inplace_backward=True)
        return (x.coefficients * stats.log_prob).sum()

    def logits_eager(x: Inputs) -> torch.Tensor:
        log_p = torch.log_softmax((x.hidden @ x.weight.t()).float(), dim=-1)
        return torch.where(x.mask, x.coefficients * log_p.gather(1, x.target[:, None])[:, 0], 0.0).sum()

    ours: dict[str, Method] = {"in forward": in_forward, "two passes": two_passes}
    if before is not None:
        ours["two passes before"] = partial(two_passes, compute=before.fused_linear_policy_stats)
    return ours | {"logits + ours": logits_ours, "logits + eager": logits_eager}


def exact_gradients(x: Inputs) -> tuple[torch.Tensor, ...]:
    """In float64, some tokens at a time."""
    hidden, weight = x.hidden.detach().double(), x.weight.detach().double()
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for rows in x.rows.split(128):
        gradient = (hidden[rows] @ weight.t()).softmax(-1).neg_()
        gradient[torch.arange(len(rows)), x.target[rows]] += 1.0
        gradient *= x.coefficients[rows, None]
        grad_hidden[rows] = gradient @ weight
        grad_weight.addmm_(gradient.t(), hidden[rows])
    return grad_hidden, grad_weight


def measure(candidates: dict[str, Method], inputs: Inputs, turns: int) -> dict[str, Result]:
    results = {name: Result() for name in candidates}
    device, leaves = inputs.hidden.device, (inputs.hidden, inputs.weight)
    for name, method in candidates.items():  # warms up as well: allocator, thread pools

        def run(method: Method = method, result: Result = results[name]) -> None:
            result.gradients = torch.autograd.grad(method(inputs), leaves)

        inputs.weight.main_grad.zero_()
        results[name].memory = peak_memory(run, device)
        grad_hidden, grad_weight = results[name].gradients
        if not grad_weight.any():
            results[name].gradients = grad_hidden, inputs.weight.main_grad.clone()
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
    return max(gradient_errors(result, reference.gradients))


def gradient_errors(result: Result, reference: tuple[torch.Tensor, ...]) -> tuple[float, ...]:
    """Relative differences in norm, of the hidden states' gradient and the weight's."""
    return tuple(
        float((ours.to(theirs.dtype) - theirs).norm() / theirs.norm())
        if theirs.dtype is torch.float64
        else float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        for ours, theirs in zip(result.gradients, reference, strict=True)
    )


def print_table(title: str, results: dict[str, Result], inputs: Inputs, reference: tuple[torch.Tensor, ...]) -> None:
    ours = next(iter(results.values()))
    print(f"\n{title}; a gradient of the weight that is returned is {inputs.weight.nbytes / 2**20:.0f} MiB of a memory")
    print(f"{'':18}{'forward':>22}{'forward + backward':>24}{'memory':>20}{'error: hidden':>16}{'weight':>10}")
    for name, result in results.items():
        forward, both = (1e3 * statistics.median(times) for times in (result.forward, result.both))
        hidden_error, weight_error = gradient_errors(result, reference)
        print(
            f"{name:18}{forward:11.1f} ms {ratios(results, name, 'forward'):6.2f}x"
            f"{both:13.1f} ms {ratios(results, name, 'both'):6.2f}x"
            f"{result.memory / 2**20:9.0f} MiB {result.memory / ours.memory:5.2f}x"
            f"{hidden_error:16.1e}{weight_error:10.1e}"
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
