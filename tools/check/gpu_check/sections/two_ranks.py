"""Two GPUs over NCCL (on a CPU two gloo ranks): vocabulary shards, layouts beside one rank, and the quick start as it is."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_dppo
from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies

hide_unusable_dependencies()  # the ranks import this module, and it imports megatron.core

from tests.layouts import parity_runs
from tests.layouts.parity_runs import QWEN3, QWEN3_MOE, ROWS, Column
from tests.layouts.parity_tolerances import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from tools.bench import policy_stats as bench
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped
from tools.check.gpu_check.sections import training
from tools.check.gpu_check.sections.policy_stats import compare_methods

LIMIT_S = 400.0
# A layout of each kind of communication, with a policy that has it.
LAYOUTS = {"TP2": QWEN3, "DP2, distributed optimizer": QWEN3, "TP2 EP2": QWEN3_MOE, "PP2": QWEN3, "CP2": QWEN3}
QUICK_LAYOUTS = ("TP2", "DP2, distributed optimizer")
COLUMNS = (Column("padded", "token_mean", False), Column("packed", "seq_mean_token_mean", True))
STEPS = 5


def checks(options: Options) -> list[Check]:
    """Nothing of it on one GPU."""
    names = QUICK_LAYOUTS if options.quick or not options.on_gpu else tuple(LAYOUTS)

    def bind(name: str) -> Check:
        return Check(f"{name} beside one rank", lambda: parity(options, name), LIMIT_S)

    return [
        Check("vocabulary shards", lambda: shards(options), LIMIT_S),
        *map(bind, names),
        Check(f"the quick start on two ranks, {STEPS} steps", lambda: quick_start(options), LIMIT_S),
    ]


def need_two_gpus(options: Options) -> None:
    """Raise Skipped on one."""
    if options.on_gpu and torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")


def shards(options: Options) -> list[Finding]:
    """Two halves of a vocabulary give the statistics and the gradient of the whole; and what they cost."""
    need_two_gpus(options)
    bench.start_ranks(compare_shards, (options.device, str(options.scratch)), 2, options.device)
    shape = "4096x151936" if options.on_gpu else "64x4000"
    return [Finding("two give what one gives", True, name="vocabulary shards"), *compare_methods(options, 2, shape)]


def compare_shards(rank: int, device: str, folder: str) -> None:
    """Raise AssertionError unless this rank's half gives the statistics and gradient of the whole."""
    start_rank(rank, 2, device, f"{folder}/store_of_shards")
    torch.manual_seed(0)
    whole, target = (3 * torch.randn(64, 1024)).to(device), torch.randint(0, 1000, (64,)).to(device)
    whole.requires_grad_()
    half = whole.detach().chunk(2, dim=1)[rank].clone().requires_grad_()
    for logits, group in ((whole, None), (half, dist.group.WORLD)):
        stats = megatron_dppo.vocab_parallel_policy_stats(
            logits, target, vocab_size=1000, tp_group=group, backend=device
        )
        (stats.log_prob + stats.entropy).sum().backward()
    assert whole.grad is not None
    # fp32: sums of 1000 terms in another order.
    torch.testing.assert_close(half.grad, whole.grad.chunk(2, dim=1)[rank], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


def start_rank(rank: int, size: int, device: str, store: str) -> None:
    """torch.distributed on this rank's device."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)


def parity(options: Options, name: str) -> Finding:
    """One update of a tiny policy, compared with the same update on one rank: docs/parity.md, on this device."""
    need_two_gpus(options)
    row = next(row for row in ROWS if row.name == name)
    policy, reference = LAYOUTS[name], options.scratch / f"reference_{LAYOUTS[name]}.pt"
    if not reference.exists():
        bench.start_ranks(one_rank, (options.device, policy, row.num_layers, str(reference)), 1, options.device)
    result = options.scratch / f"{name}.pt"
    arguments = (options.device, policy, row.num_layers, row.layout, str(reference), str(result))
    bench.start_ranks(two_ranks, arguments, 2, options.device)
    worst = parity_runs.worst([torch.load(f"{result}.{rank}", weights_only=False) for rank in range(2)])
    passed = worst.loss <= LOSS_TOLERANCE and worst.mask_fraction == 0.0
    passed &= max(worst.gradient, worst.grad_norm, worst.movement) <= GRADIENT_TOLERANCE
    figures = (
        f"{policy}: loss {worst.loss:.0e} off, gradients {worst.gradient:.0e} ({worst.worst_parameter}), "
        f"norm {worst.grad_norm:.0e}, step {worst.movement:.0e}"
    )
    return Finding(figures, passed, {"loss": worst.loss, "gradient": worst.gradient, "movement": worst.movement})


def one_rank(rank: int, device: str, policy: str, layers: int, file: str) -> None:
    start_rank(rank, 1, device, f"{file}.store")
    torch.save(parity_runs.one_rank_updates(policy, layers), f"{file}.part")
    Path(f"{file}.part").rename(file)
    dist.destroy_process_group()


def two_ranks(rank: int, device: str, policy: str, layers: int, layout: dict, reference: str, file: str) -> None:
    start_rank(rank, 2, device, f"{file}.store")
    differences = parity_runs.compare_with_one_rank(policy, layers, layout, COLUMNS, reference)
    torch.save(parity_runs.worst(list(differences.values())), f"{file}.{rank}")
    dist.destroy_process_group()


def quick_start(options: Options) -> list[Finding]:
    """TP 2, EP 2: whether engine and trainer agree, and how long a step takes. What it learns needs more steps."""
    need_two_gpus(options)
    policy = training.write_policy(options.scratch / "policy")
    run = training.train(policy, options, "two_ranks", 2, f"train.steps={STEPS}", "warm_start.steps=20")
    records = training.read_metrics(run)
    mismatch = max(record["mismatch/abs_log_ratio"] for record in records)
    step_s = statistics.median(record["time/step_s"] for record in records)
    figures = f"{len(records)} steps, {step_s:.2f} s each; log-probs of engine and trainer {mismatch:.1e} apart"
    passed = len(records) == STEPS and mismatch <= training.MISMATCH
    return [Finding(figures, passed, {"seconds": step_s, "abs_log_ratio": mismatch})]
