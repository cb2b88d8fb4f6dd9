"""How far trainer and rollout engine disagree, with and without fp32 logits; of an MoE policy, with and without replay.

A real SGLang server samples, once with a 16-bit and once with an fp32 output layer; Megatron computes the same tokens'
log-probs on the same weights, with either output layer and all in fp32, and for an MoE policy with the experts that its own
routers choose and with those that the server recorded. Prints a table:

    python tools/bench/mismatch.py --server-python .venv-sglang/bin/python
    python tools/bench/mismatch.py --server-python PYTHON --model models/smollm2-135m-instruct

Without --model, a small random Qwen3-MoE policy is made for the occasion, whose logits have the size of a real model's
(SmolLM2-135M-Instruct: 4.6 on average, the largest of a token 27, an entropy of 1.5). A model with a tokenizer answers
questions; one without goes on from random tokens.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.errors import RolloutError
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import is_moe, load_hf_config
from megatron_dppo.models.hf.export import PolicyWeights
from megatron_dppo.models.hf.weights import load_hf_weights
from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
from megatron_dppo.models.routing_replay import RoutingRecorder, RoutingReplay
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangConfig, SGLangEngine

HEADS = {"bf16": False, "fp32": True}
TRAINERS = {  # name -> dtype of the model, heads
    "bf16": (torch.bfloat16, HEADS),
    "all in fp32": (torch.float32, {"fp32, as all": True}),
}
QUESTIONS = (
    "What is 17 + 25? Explain each step.",
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "List five uses of a paper clip.",
    "How do plants make sugar from light?",
    "What is the difference between a crocodile and an alligator?",
    "Describe how to boil an egg.",
    "Who was Ada Lovelace?",
    "Translate 'good morning' into three languages.",
    "Write a poem about rain.",
    "Explain what a prime number is, with examples.",
    "How many days are there in a leap year, and why?",
    "Give me a recipe for pancakes.",
    "What causes the tides?",
    "Write a function in Python that reverses a list.",
    "Name the planets of the solar system in order.",
)


@dataclass(frozen=True)
class Mismatch:
    """Between trainer and server, over all response tokens."""

    mean_abs_log_ratio: float
    max_abs_log_ratio: float
    kl_k3: float  # mean of r - 1 - log r with r = pi / mu: estimates KL(mu || pi)


def main() -> None:
    args = parse_arguments()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or make_model(Path(scratch) / "model", args)
        policies = {name: load_policy(folder, dtype) for name, (dtype, _) in TRAINERS.items()}
        print(
            "| server's logits | trainer's logits | experts | mean abs(log pi - log mu) | largest | KL (k3) | reroutes |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        for server_head in args.server_head:
            samples = generate(folder, policies["bf16"], Path(scratch), args, HEADS[server_head])
            for trainer, (_, heads) in TRAINERS.items():
                print_rows(server_head, policies[trainer], heads, samples)
        print(f"\n{describe(policies['bf16'], samples)}")
    dist.destroy_process_group()


def print_rows(
    server_head: str, chunks: list[torch.nn.Module], heads: Mapping[str, bool], samples: Sequence[Sample]
) -> None:
    for replayed in (False, True) if is_moe(chunks[0].hf_config) else (False,):
        log_ratios, rerouted = measure(chunks, samples, replayed, heads)
        experts = "-" if rerouted is None else "replayed" if replayed else "own choice"
        for head, log_ratio in log_ratios.items():
            m = mismatch(log_ratio)
            print(
                f"| {server_head} | {head} | {experts} | {m.mean_abs_log_ratio:.2e} | {m.max_abs_log_ratio:.2e} "
                f"| {m.kl_k3:.2e} | {'-' if rerouted is None else f'{rerouted:.1%}'} |",
                flush=True,
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--server-python", required=True, help="interpreter that has SGLang installed")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a policy; default: a small random MoE")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-per-token", type=int, default=4)
    parser.add_argument("--logit-scale", type=float, default=5.0, help="standard deviation of the made policy's logits")
    parser.add_argument("--logit-mean", type=float, default=8.0, help="what they have in common")
    parser.add_argument("--server-head", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples-per-prompt", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="per response")
    return parser.parse_args()


def make_model(folder: Path, args: argparse.Namespace) -> Path:
    """Random weights, large enough for every layer to matter; stored in bf16, which is what both sides compute in.

    After the final norm a hidden state's elements are about 1, so that a row of the output layer with elements of standard
    deviation s / sqrt(hidden size) gives logits of standard deviation s, here around a mean that all of them have in common.
    """
    config = Qwen3MoeConfig(
        vocab_size=8192,
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
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, args.logit_scale / config.hidden_size**0.5)
    add_to_all_logits(model, args.logit_mean)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def add_to_all_logits(model: PreTrainedModel, mean: float) -> None:
    """As in a real model: exact logits would not care, 16-bit ones lie on a coarser grid.

    One element of the residual stream becomes the same for every token, and the output layer's row of it for every logit.
    """
    embedding, tokens = model.model.embed_tokens.weight, torch.arange(128)[None]
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            parameter.select(-2, 0).zero_()  # what layers add to it
    model.model.norm.weight[0] = 1.0
    embedding[:, 0] = embedding.std()
    embedding[:, 0] /= model.model(tokens).last_hidden_state[..., 0].mean()  # large enough to be about 1 at the end
    model.lm_head.weight[:, 0] = mean / model.model(tokens).last_hidden_state[..., 0].mean()


def load_policy(folder: Path, dtype: torch.dtype) -> list[torch.nn.Module]:
    chunks = build_policy(load_hf_config(folder), ParallelConfig(), dtype)
    load_hf_weights(chunks, folder)
    return chunks


def generate(
    folder: Path, chunks: list[torch.nn.Module], logs: Path, args: argparse.Namespace, fp32_head: bool
) -> list[Sample]:
    hf_config = chunks[0].hf_config
    recorded = is_moe(hf_config)
    engine = SGLangEngine(
        SGLangConfig(python=args.server_python),
        folder,
        vocab_size=hf_config.vocab_size,
        dtype=torch.bfloat16,
        log_folder=logs,
        return_routed_experts=recorded,
        fp32_head=fp32_head,
    )
    with closing(engine):
        engine.update_weights(PolicyWeights(chunks), 1)
        params = SamplingParams(args.tokens, samples_per_prompt=args.samples_per_prompt, return_routed_experts=recorded)
        return usable(engine.generate(make_prompts(folder, hf_config.vocab_size, args.prompts), params))


def make_prompts(folder: Path, vocab_size: int, count: int) -> list[Prompt]:
    """Questions, again and again, if the model has a tokenizer; else random tokens."""
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
            for i in range(count)
        ]
    else:
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(0, vocab_size, (8 + i % 24,), generator=generator).tolist() for i in range(count)]
    return [Prompt(f"prompt/{i}", tuple(tokens)) for i, tokens in enumerate(ids)]


def usable(samples: Sequence[Sample | FailedSample]) -> list[Sample]:
    """All of them, or the first failure as an error."""
    for sample in samples:
        if isinstance(sample, FailedSample):
            raise RolloutError(sample.reason)
    return [sample for sample in samples if isinstance(sample, Sample)]


def measure(
    chunks: list[torch.nn.Module], samples: Sequence[Sample], replayed: bool, heads: Mapping[str, bool] = HEADS
) -> tuple[dict[str, torch.Tensor], float | None]:
    """([tokens] fp64 log pi - log mu with each of the trainer's heads, share of (token, layer) pairs that are rerouted).

    Routers are asked for their own choice in either case; with replay they see hidden states of replayed experts.
    """
    model, parts = chunks[0], {name: [] for name in heads}
    routing = Routing(chunks, replayed) if is_moe(model.hf_config) else None
    for sample, hidden_nh in response_hidden_states(model, samples, routing):
        mu = torch.tensor(sample.rollout_log_probs, dtype=torch.float64)
        for name, fp32_head in heads.items():
            model.fp32_head = fp32_head
            log_pi = log_probs(PolicyHead(model).logits(hidden_nh), sample, model.hf_config.vocab_size)
            parts[name].append(log_pi.double() - mu)
    return {name: torch.cat(values) for name, values in parts.items()}, None if routing is None else routing.rerouted()


class Routing:
    """Watches the routers, and replays what a sample recorded if asked to."""

    def __init__(self, chunks: list[torch.nn.Module], replayed: bool) -> None:
        self._chunk, self._replayed = chunks[0], replayed
        self._recorder, self._replay = RoutingRecorder(chunks), RoutingReplay(chunks)
        self._differ: list[torch.Tensor] = []

    def forward_pass(self, sample: Sample) -> AbstractContextManager[Any]:
        """For the forward pass of all but the last token of ``sample``."""
        assert sample.routed_experts is not None
        if self._replayed:
            return self._replay.forward_pass(self._chunk, sample.routed_experts[None])
        return self._recorder.recording()

    def compare(self, sample: Sample) -> None:
        """After the forward pass, within it."""
        if not self._replayed:
            own_SLk, recorded_SLk = self._recorder.take(1)[0], sample.routed_experts
            self._differ.append((own_SLk.sort(-1).values != recorded_SLk.sort(-1).values).any(-1))

    def rerouted(self) -> float:
        """Share of (token, layer) pairs whose own choice was not what the server recorded."""
        return self._replay.replayed_differently() if self._replayed else torch.cat(self._differ).double().mean().item()


@torch.no_grad()
def response_hidden_states(
    model: torch.nn.Module, samples: Sequence[Sample], routing: Routing | None
) -> Iterator[tuple[Sample, torch.Tensor]]:
    """Each sample with [n, h] what its response tokens' logits are made of."""
    for sample in samples:
        tokens = torch.tensor([sample.token_ids[:-1]])
        positions = torch.arange(tokens.shape[1])[None]
        with hidden_states_only(model), nullcontext() if routing is None else routing.forward_pass(sample):
            output = model(tokens, positions, None)
            if routing is not None:
                routing.compare(sample)
        rows = positions[0, -len(sample.response_ids) :]
        yield sample, PolicyHead(model).response_hidden(output, rows, tuple(tokens.shape))


def log_probs(logits_nV: torch.Tensor, sample: Sample, vocab_size: int) -> torch.Tensor:
    target = torch.tensor(sample.response_ids)
    return vocab_parallel_policy_stats(logits_nV, target, vocab_size=vocab_size).log_prob


def mismatch(log_ratio: torch.Tensor) -> Mismatch:
    return Mismatch(
        mean_abs_log_ratio=log_ratio.abs().mean().item(),
        max_abs_log_ratio=log_ratio.abs().max().item(),
        kl_k3=(log_ratio.exp() - 1 - log_ratio).mean().item(),
    )


@torch.no_grad()
def describe(chunks: list[torch.nn.Module], samples: Sequence[Sample]) -> str:
    """How many tokens there were and how large the logits are that have been rounded."""
    model = chunks[0]
    model.fp32_head, vocab_size = True, model.hf_config.vocab_size
    routing = Routing(chunks, False) if is_moe(model.hf_config) else None
    logits = torch.cat(
        [
            PolicyHead(model).logits(hidden)[:, :vocab_size]
            for _, hidden in response_hidden_states(model, samples[:4], routing)
        ]
    )
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    tokens = sum(len(sample.response_ids) for sample in samples)
    return (
        f"{tokens} response tokens of {len(samples)} samples. Logits: mean {logits.mean():.1f}, standard deviation over "
        f"the vocabulary {logits.std(-1).mean():.1f}, largest of a token {logits.amax(-1).mean():.1f}; entropy "
        f"{entropy.mean():.2f}"
    )


if __name__ == "__main__":
    main()
