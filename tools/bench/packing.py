"""What packed micro-batches save over padded ones, on lengths as reinforcement learning with long answers has them.

    python -W ignore tools/bench/packing.py                                 # CPU, about a minute
    python -W ignore tools/bench/packing.py --device cuda --cap 16384 --median 3000 --hidden 1024 --layers 8 --tokens 32768

Response lengths are drawn from a log-normal distribution and cut at a cap, as sampling cuts them at max_response_tokens:
most answers are short, a few run on. The defaults (median a quarter of the cap, sigma 1) cut 8 % of them and make the mean
0.35 of the cap. Every prompt has the same length.

Both ways get the same memory: padded micro-batches hold as many rows as would fit the token budget at full length,
packed ones the budget itself. Padded ones group similar lengths already; "arrival order" is what they would compute
without that. A turn is one whole optimizer step of a small policy on the same sequences, each way in turn, so that a busy
machine slows both; the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.distributed.ranks import joined_ranks
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.schema import AdamConfig, TrainConfig
from megatron_dppo.training.data.batcher import MicroBatcher, ReplicaBatch
from megatron_dppo.training.data.micro_batch import ExampleFields, MicroBatch, TrainingExample
from megatron_dppo.training.data.schedule import Scheduler
from megatron_dppo.training.policy.head_outputs import response_log_probs
from megatron_dppo.training.policy.optimizer_step import MicroBatchLoss, optimizer_step
from megatron_dppo.training.policy.trainable import OptimizerState, TrainablePolicy, build_optimizer, wrap_for_training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=48, help="per optimizer step")
    parser.add_argument("--median", type=float, default=128, help="response tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the response length")
    parser.add_argument("--cap", type=int, default=512, help="response tokens at most")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=2176, help="tokens that fit a micro-batch")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    examples = draw_examples(options)
    rows = options.tokens // (options.prompt + options.cap)
    ways = {
        "padded": TrainConfig(batching="padded", micro_batch_size=rows),
        "packed": TrainConfig(batching="packed", tokens_per_micro_batch=options.tokens),
    }
    with joined_ranks(device):
        torch.set_num_threads(options.threads)
        initialize_model_parallel(ParallelConfig(), seed=0)
        policy, optimizer_state = small_policy(options, device)
        batches = {name: micro_batches(train, examples, policy) for name, train in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.turns + 1):
            for name, train in ways.items():
                taken = time_step(policy, optimizer_state, train, batches[name])
                if turn:  # the first warms up
                    seconds[name].append(taken)
    print_report(options, examples, rows, batches, seconds)
    return 0


def draw_examples(options: argparse.Namespace) -> list[TrainingExample]:
    """Sequences of random tokens with the lengths that the options ask for."""
    generator = torch.Generator().manual_seed(options.seed)
    lengths = (options.median * (options.sigma * torch.randn(options.sequences, generator=generator)).exp()).long()
    return [
        TrainingExample(
            torch.randint(0, options.vocab, (options.prompt + int(length),), generator=generator),
            options.prompt,
        )
        for length in lengths.clamp(1, options.cap)
    ]


def micro_batches(train: TrainConfig, examples: Sequence[TrainingExample], policy: TrainablePolicy) -> list[MicroBatch]:
    """All examples in one optimizer step of one replica."""
    scheduler = Scheduler(train, ParallelConfig(), 1, PolicyFlops.of(policy.hf_config).training)
    (planned,) = scheduler.schedule({n: len(example.token_ids) for n, example in enumerate(examples)}).replicas
    return MicroBatcher(scheduler).micro_batches(ReplicaBatch([planned], dict(enumerate(examples)), ExampleFields()), 0)


def small_policy(options: argparse.Namespace, device: torch.device) -> tuple[TrainablePolicy, OptimizerState]:
    """A Llama of random weights: fp32 on a CPU, bf16 on a GPU."""
    hf_config = load_hf_config(
        {
            "model_type": "llama",
            "vocab_size": options.vocab,
            "hidden_size": options.hidden,
            "intermediate_size": 3 * options.hidden,
            "num_hidden_layers": options.layers,
            "num_attention_heads": max(options.hidden // 64, 1),
            "num_key_value_heads": max(options.hidden // 64, 1),
            "max_position_embeddings": options.prompt + options.cap,
            "tie_word_embeddings": False,
        }
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chunks = build_policy(hf_config, ParallelConfig(), dtype, device)
    initialize_randomly(chunks, seed=0)
    policy = wrap_for_training(chunks, hf_config, dtype, ParallelConfig())
    return policy, build_optimizer(policy, AdamConfig(), total_steps=1000)


def time_step(
    policy: TrainablePolicy, optimizer_state: OptimizerState, train: TrainConfig, batches: Sequence[MicroBatch]
) -> float:
    """Seconds of one optimizer step: forward, backward, Adam."""

    def likelihood(batch: MicroBatch, hidden: torch.Tensor, _: torch.Tensor | None) -> MicroBatchLoss:
        return MicroBatchLoss(
            -response_log_probs(policy, train, batch, hidden).sum(),
            torch.full((), len(batch.rows), device=hidden.device),
        )

    start = time.perf_counter()
    optimizer_step(policy, optimizer_state, batches, likelihood)  # reads the gradient norm, so it ends with the device
    return time.perf_counter() - start


def print_report(
    options: argparse.Namespace,
    examples: Sequence[TrainingExample],
    rows: int,
    batches: dict[str, list[MicroBatch]],
    seconds: dict[str, list[float]],
) -> None:
    lengths = [len(e.token_ids) for e in examples]
    print(
        f"{len(lengths)} sequences, prompts of {options.prompt}, responses log-normal (median {options.median:g}, sigma"
        f" {options.sigma:g}) cut at {options.cap}: {sum(lengths)} tokens, longest {max(lengths)}, seed {options.seed}"
    )
    print(
        f"at most {options.tokens} tokens in a micro-batch, or {rows} rows; torch {torch.__version__}, {options.device}\n"
    )
    print(f"{'':14}{'micro-batches':>14}{'computed':>10}{'padding':>9}{'s / step':>10}{'tokens / s':>12}")
    arrival = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    computed = sum(len(group) * max(group) for group in arrival)
    print(f"{'arrival order':14}{len(arrival):>14}{computed:>10}{1 - sum(lengths) / computed:>9.1%}")
    for name, made in batches.items():
        computed = sum(batch.tokens.numel() for batch in made)
        padding = sum(batch.num_padding for batch in made)
        taken = statistics.median(seconds[name])
        print(
            f"{name:14}{len(made):>14}{computed:>10}{padding / computed:>9.1%}{taken:>10.3f}{sum(lengths) / taken:>12.0f}"
        )
    ratios = sorted(a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True))
    print(f"\npacked is {statistics.median(ratios):.2f} times as fast as padded ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    sys.exit(main())
