"""What log-prob, entropy and their gradient cost: this project's operator beside the usual ways, in one run.

    python tools/bench/policy_stats.py                                  # CPU, 2 threads, TP=1 and TP=2 (gloo)
    python tools/bench/policy_stats.py --device cuda --shapes 8192x151936 --tensor-parallel 1
    python tools/bench/policy_stats.py --record docs/records/policy_stats   # keep the figures, redraw docs/
    python tools/bench/policy_stats.py --redraw docs/records/policy_stats   # redraw only

Compared, on the same logits: ``eager`` (log_softmax in fp32, gather, entropy), Megatron-core's vocab-parallel cross entropy
(log-prob only: no entropy), unfused and fused, and ``read`` (x.sum(-1)), the floor that memory sets. The methods take turns,
so that a busy machine slows all of them; a ratio is the median over turns of (method's time / our time in that turn). At
TP=2 each rank has half of the columns and half of the threads. ``memory`` is the peak of what forward + backward allocates,
as a multiple of the logits (ours writes the gradient over the logits, as Megatron's unfused one does over its fp32 copy).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dppo import vocab_parallel_policy_stats
from tools.check.record_run import commit_that_ran, write_record
from tools.plot_run import read_metrics

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "broadcast",
)


@dataclass
class Result:
    """One method at one shape, dtype and TP size; times are one per turn, in seconds."""

    forward: list[float]
    both: list[float]
    memory: float = 0.0
    collectives: int = 0


Method = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits, target -> a scalar to differentiate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="512x49152,1024x75968", help="rows x vocabulary, comma-separated")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--tensor-parallel", default="1,2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, shared by the ranks")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--plot", type=Path, help="write a bar chart (PNG)")
    parser.add_argument("--record", type=Path, help="keep the figures in this folder (see docs/records/README.md)")
    parser.add_argument("--redraw", type=Path, help="measure nothing: draw the figures of this record")
    options = parser.parse_args()
    if options.redraw:
        show_record(options.redraw, options.plot)
        return 0
    commit = commit_that_ran(time.time()) if options.record else ""  # refused before anything is measured
    charts = {}
    for size in map(int, options.tensor_parallel.split(",")):
        for (shape, dtype), results in run_ranks(size, options).items():
            title = f"{shape} {dtype} TP={size}"
            print_table(title, results)
            charts[title] = results
    if options.plot:
        plot(charts, options.plot)
    if options.record:
        keep_record(charts, options, commit)
        show_record(options.record, None)
    return 0


def keep_record(charts: dict[str, dict[str, Result]], options: argparse.Namespace, commit: str) -> None:
    """Every method's times of every turn, and how they were measured."""
    lines = [
        {"chart": title, "method": name, **asdict(result)}
        for title, results in charts.items()
        for name, result in results.items()
    ]
    write_record(
        options.record,
        {name: value for name, value in vars(options).items() if name not in ("plot", "record", "redraw")},
        lines,
        command=shlex.join(["python", "tools/bench/policy_stats.py", *sys.argv[1:]]),
        draw=f"python tools/bench/policy_stats.py --redraw docs/records/{options.record.name}",
        commit=commit,
        ended=time.time(),
    )


def read_charts(folder: Path) -> dict[str, dict[str, Result]]:
    """What ``keep_record`` kept."""
    charts: dict[str, dict[str, Result]] = {}
    for entry in read_metrics(folder):
        title, name = entry.pop("chart"), entry.pop("method")
        charts.setdefault(title, {})[name] = Result(**entry)
    return charts


def show_record(folder: Path, figure: Path | None) -> None:
    """Draw a record's chart into ``figure``; without one, into docs/, and put its table into docs/kernels.md."""
    charts = read_charts(folder)
    plot(charts, figure or ROOT / "docs" / "figures" / f"{folder.name}.png")
    if figure is None:
        page = ROOT / "docs" / "kernels.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), charts), encoding="utf-8")


def with_table(page: str, charts: dict[str, dict[str, Result]]) -> str:
    """The page with a new table of ratios between its two markers."""
    begin, end = "<!-- policy_stats: begin -->\n", "<!-- policy_stats: end -->"
    names = list(dict.fromkeys(name for results in charts.values() for name in list(results)[1:]))
    lines = [f"| logits | ours: forward / both | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for title, results in charts.items():
        ours = next(iter(results.values()))
        cells = [f"{1e3 * statistics.median(ours.forward):.3g} / {1e3 * statistics.median(ours.both):.3g} ms"]
        for name in names:
            both = (ratios(results, name, field) for field in ("forward", "both")) if name in results else ()
            cells.append(" / ".join(f"{ratio:.2g}" for ratio in both) or "-")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    before, rest = page.split(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]


def run_ranks(size: int, options: argparse.Namespace) -> dict[tuple[str, str], dict[str, Result]]:
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(rank_main, (size, options, folder), size, options.device)
        return torch.load(f"{folder}/results.pt", weights_only=False)


def start_ranks(function: Callable[..., None], arguments: tuple[Any, ...], size: int, device: str) -> None:
    """Run ``function(rank, *arguments)`` in so many processes.

    CUDA does not survive a fork. On a CPU they are forked from one process that has imported what takes seconds.
    """
    method = "spawn" if device == "cuda" else "forkserver"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(
            ["megatron.core.fusions.fused_cross_entropy", "megatron_dppo.ops.policy_stats"]
        )
    start_processes(function, args=arguments, nprocs=size, start_method=method)


def rank_main(rank: int, size: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(max(1, options.threads // size))
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    table = {}
    for shape in options.shapes.split(","):
        rows, vocab = map(int, shape.split("x"))
        for dtype in options.dtypes.split(","):
            torch.manual_seed(rank)
            logits = (torch.randn(rows, vocab // size, device=options.device) * 3).to(DTYPES[dtype])
            target = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(options.device)
            table[shape, dtype] = measure(methods(options.device), logits, target, options.turns)
    if rank == 0:
        torch.save(table, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def methods(device: str) -> dict[str, Method]:
    """Every method that can run here, ours first."""
    group = dist.group.WORLD

    def ours(backend: str) -> Method:
        def run(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            stats = vocab_parallel_policy_stats(logits, target, tp_group=group, inplace_backward=True, backend=backend)
            return stats.log_prob.sum() + 0.01 * stats.entropy.sum()

        return run

    def eager(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits.float(), dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, target[:, None]).sum() + 0.01 * entropy.sum()

    found = {f"ours ({device})": ours(device), "ours (torch)": ours("torch")}
    if dist.get_world_size() == 1:
        found["eager"] = eager
    found |= megatron_methods(group)
    found["read"] = lambda logits, target: logits.sum(-1).float().sum()
    return found


def megatron_methods(group: Any) -> dict[str, Method]:
    try:
        from megatron.core import parallel_state
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    except ImportError as error:
        print(f"megatron-core is left out: {error}", file=sys.stderr)
        return {}
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    found: dict[str, Method] = {
        "mcore": lambda logits, target: -vocab_parallel_cross_entropy(logits[:, None], target[:, None]).sum(),
        "mcore fused": lambda logits, target: (
            -fused_vocab_parallel_cross_entropy(logits[:, None], target[:, None], group).sum()
        ),
    }
    if (te_cross_entropy := transformer_engine_cross_entropy()) is not None:
        found["TE"] = lambda logits, target: -te_cross_entropy(logits[:, None], target[:, None], group).sum()
    return found


def transformer_engine_cross_entropy() -> Callable[..., torch.Tensor] | None:
    """Transformer Engine's, as Megatron-core calls it; None where that is not installed, or broken."""
    if not torch.cuda.is_available():
        return None
    try:
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy
    except Exception as error:  # a half-installed Transformer Engine raises whatever it likes
        print(f"Transformer Engine is left out: {error}", file=sys.stderr)
        return None
    return te_parallel_cross_entropy


def measure(candidates: dict[str, Method], logits: torch.Tensor, target: torch.Tensor, turns: int) -> dict[str, Result]:
    results = {name: Result([], []) for name in candidates}
    copy = torch.empty_like(logits).requires_grad_()
    for turn in range(-1, turns):  # turn -1 warms up: compilation, allocator, thread pools
        for name, method in candidates.items():
            # Megatron's forward overwrites fp32 logits, our backward any: everyone finds them restored, outside the clock.
            copy.detach().copy_(logits)
            dist.barrier()
            start = clock(logits.device)
            total = method(copy, target)
            forward = clock(logits.device) - start
            torch.autograd.grad(total, copy)
            both = clock(logits.device) - start
            if turn >= 0:
                results[name].forward.append(forward)
                results[name].both.append(both)
    for name, method in candidates.items():
        with counted_collectives() as count:
            results[name].memory = forward_backward_peak(method, logits, target) / logits.nbytes
        results[name].collectives = len(count)
    return results


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Names of the collectives that were called through torch.distributed."""
    called: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield called
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def forward_backward_peak(method: Method, logits: torch.Tensor, target: torch.Tensor) -> float:
    copy = logits.clone().requires_grad_()
    return peak_memory(lambda: torch.autograd.grad(method(copy, target), copy), logits.device)


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that ``run`` allocates at once, beyond what lives already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    # The summarised events fold allocations into the operators that made them; only the raw ones say when each was freed.
    raw = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(raw, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def ratios(results: dict[str, Result], name: str, field: str) -> float:
    ours = getattr(next(iter(results.values())), field)
    return statistics.median(a / b for a, b in zip(getattr(results[name], field), ours, strict=True))


def print_table(title: str, results: dict[str, Result]) -> None:
    print(f"\n{title}\n{'':14}{'forward':>20}{'forward + backward':>24}{'memory':>10}{'collectives':>14}")
    for name, result in results.items():
        forward, both = (1e3 * statistics.median(times) for times in (result.forward, result.both))
        print(
            f"{name:14}{forward:9.2f} ms {ratios(results, name, 'forward'):6.2f}x"
            f"{both:13.2f} ms {ratios(results, name, 'both'):6.2f}x{result.memory:9.3f}x{result.collectives:14d}"
        )


def plot(charts: dict[str, dict[str, Result]], path: Path) -> None:
    from megatron_dppo.compat.extras import from_extra

    with from_extra("plots"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import matplotlib.ticker

    columns = min(len(charts), 4)
    rows = -(-len(charts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    for axis, (title, results) in zip(axes.flat, charts.items(), strict=False):
        names = list(results)
        for shift, field, label in ((-0.2, "forward", "forward"), (0.2, "both", "forward + backward")):
            times = [1e3 * statistics.median(getattr(results[name], field)) for name in names]
            axis.barh([i + shift for i in range(len(names))], times, height=0.38, label=label)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())  # on a short range it would label every tick
        axis.set_xlim(left=1.0)
        axis.set_xlabel("ms (log scale)")
        axis.set_title(title, fontsize=9)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
