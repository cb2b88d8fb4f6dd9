"""How far trainer and rollout engine disagree on an MoE policy, with and without routing replay.

A real SGLang server samples; Megatron computes the same tokens' log-probs on the same weights, once with the experts that its
own routers choose and once with those that the server recorded. Prints a table:

    python tools/bench/routing_mismatch.py --server-python .venv-sglang/bin/python
    python tools/bench/routing_mismatch.py --server-python PYTHON --model models/Qwen3-30B-A3B --server-dtype bfloat16

Without --model, a small random Qwen3-MoE policy is made for the occasion.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.errors import RolloutError
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.models.hf.weights import load_hf_weights
from megatron_dppo.models.routing_replay import RoutingRecorder, RoutingReplay
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangConfig, SGLangEngine


@dataclass(frozen=True)
class Mismatch:
    """Between trainer and server, over all response tokens (log-probs) and all tokens that were read (experts).

    Routers are asked for their own choice in either case; with replay they see hidden states of replayed experts.
    """

    mean_abs_log_ratio: float
    max_abs_log_ratio: float
    kl_k3: float  # mean of r - 1 - log r with r = pi / mu: estimates KL(mu || pi)
    choices_differ: float  # share of (token, layer) pairs
    tokens_differ: float | None  # share of tokens for which any layer differs; not counted with replay


def main() -> None:
    args = parse_arguments()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or make_model(Path(scratch) / "model", args)
        samples = generate(folder, Path(scratch), args)
        tokens = sum(len(sample.response_ids) for sample in samples)
        print(f"\n{tokens} response tokens of {len(samples)} samples; server in {args.server_dtype}\n")
        print("| trainer | experts | mean abs(log pi - log mu) | max | KL k3 | routers differ | tokens with any |")
        print("|---|---|---|---|---|---|---|")
        for dtype in args.trainer_dtype:
            chunks = load_policy(folder, getattr(torch, dtype))
            for replayed in (False, True):
                m = measure(chunks, samples, replayed)
                print(
                    f"| {dtype} | {'replayed' if replayed else 'own choice'} | {m.mean_abs_log_ratio:.2e} "
                    f"| {m.max_abs_log_ratio:.2e} | {m.kl_k3:.2e} | {m.choices_differ:.2%} "
                    f"| {'-' if m.tokens_differ is None else format(m.tokens_differ, '.2%')} |"
                )
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--server-python", required=True, help="interpreter that has SGLang installed")
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder of a Qwen3-MoE policy; default: a small random one"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-per-token", type=int, default=4)
    parser.add_argument("--server-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--trainer-dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples-per-prompt", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="per response")
    return parser.parse_args()


def make_model(folder: Path, args: argparse.Namespace) -> Path:
    """Random weights, large enough for every layer to matter; stored in bf16, so that all dtypes start from the same."""
    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=args.experts,
        num_experts_per_tok=args.experts_per_token,
        moe_intermediate_size=64,
        max_position_embeddings=1024,
        initializer_range=0.15,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load_policy(folder: Path, dtype: torch.dtype) -> list[torch.nn.Module]:
    chunks = build_policy(load_hf_config(folder), ParallelConfig(), dtype)
    load_hf_weights(chunks, folder)
    return chunks


def generate(folder: Path, logs: Path, args: argparse.Namespace) -> list[Sample]:
    vocab_size = load_hf_config(folder).vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(f"prompt/{i}", tuple(torch.randint(0, vocab_size, (8 + i % 24,), generator=generator).tolist()))
        for i in range(args.prompts)
    ]
    config = SGLangConfig(python=args.server_python, dtype=args.server_dtype)
    dtype = getattr(torch, args.server_dtype)
    engine = SGLangEngine(
        config, folder, vocab_size=vocab_size, dtype=dtype, log_folder=logs, return_routed_experts=True
    )
    with closing(engine):
        engine.update_weights(PolicyWeights(load_policy(folder, dtype)), 1)
        params = SamplingParams(args.tokens, samples_per_prompt=args.samples_per_prompt, return_routed_experts=True)
        return usable(engine.generate(prompts, params))


def usable(samples: Sequence[Sample | FailedSample]) -> list[Sample]:
    """All of them, or the first failure as an error."""
    for sample in samples:
        if isinstance(sample, FailedSample):
            raise RolloutError(sample.reason)
    return [sample for sample in samples if isinstance(sample, Sample)]


@torch.no_grad()
def measure(chunks: list[torch.nn.Module], samples: Sequence[Sample], replayed: bool) -> Mismatch:
    recorder, replay = RoutingRecorder(chunks), RoutingReplay(chunks)
    log_ratios, differ = [], []
    for sample in samples:
        recorded_SLk = sample.routed_experts
        assert recorded_SLk is not None
        tokens = torch.tensor([sample.token_ids[:-1]])
        positions = torch.arange(tokens.shape[1])[None]
        with replay.forward_pass(chunks[0], recorded_SLk[None]) if replayed else recorder.recording():
            logits_SV = chunks[0](tokens, positions, None)[0].float()
            if not replayed:
                differ.append((recorder.take(1)[0].sort(-1).values != recorded_SLk.sort(-1).values).any(-1))
        vocab_size = chunks[0].hf_config.vocab_size
        response = torch.tensor(sample.response_ids)[:, None]
        log_probs = logits_SV[-len(response) :, :vocab_size].log_softmax(-1).gather(-1, response)[:, 0]
        log_ratios.append(log_probs - torch.tensor(sample.rollout_log_probs))
    log_ratio = torch.cat(log_ratios).double()
    differ_SL = torch.cat(differ) if differ else None
    return Mismatch(
        mean_abs_log_ratio=log_ratio.abs().mean().item(),
        max_abs_log_ratio=log_ratio.abs().max().item(),
        kl_k3=(log_ratio.exp() - 1 - log_ratio).mean().item(),
        choices_differ=replay.replayed_differently() if differ_SL is None else differ_SL.double().mean().item(),
        tokens_differ=None if differ_SL is None else differ_SL.any(-1).double().mean().item(),
    )


if __name__ == "__main__":
    main()
