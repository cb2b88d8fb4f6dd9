"""The embedded engine on prompts of several lengths: tokens per second, memory, and its log-probs beside a forward pass."""

from __future__ import annotations

import torch

from megatron_dppo.rollout.embedded.engine import EmbeddedEngine
from megatron_dppo.rollout.sample import Prompt, Sample, SamplingParams
from tools.bench.policy_stats import clock
from tools.check.gpu_check.findings import Check, Finding, Options
from tools.check.gpu_check.sections.policies import policy_config, random_policy

LIMIT_S = 180.0
# fp32, some tens of roundings of a logit in another order (tests/rollout/engine_contract.py), with 28 layers on a GPU in
# place of two: ten times as many. A wrong position, mask or row costs 1e-3 and more.
FP32_TOLERANCE = {"cpu": 2e-5, "cuda": 2e-4}


def checks(options: Options) -> list[Check]:
    """In fp32 the log-probs are held to rounding; in bf16 the speed is of interest, and how far rounding goes."""
    return [
        Check("fp32", lambda: generate(options, torch.float32), LIMIT_S),
        Check("bf16", lambda: generate(options, torch.bfloat16), LIMIT_S),
    ]


def generate(options: Options, dtype: torch.dtype) -> Finding:
    prompts_n, samples, length, new = (32, 4, 256, 128) if options.on_gpu else (4, 2, 12, 8)
    if options.quick and options.on_gpu:
        new = 64
    chunks = random_policy(options.device, dtype)
    vocab, device = policy_config(options.device).vocab_size, next(chunks[0].parameters()).device
    engine = EmbeddedEngine(chunks, vocab, max_batch_size=prompts_n * samples)
    generator = torch.Generator().manual_seed(0)
    # Of unequal lengths, so that prompts are padded and attention gets a mask.
    lengths = [length - length * n // (4 * prompts_n) for n in range(prompts_n)]
    tokens_of = [torch.randint(0, vocab, (size,), generator=generator).tolist() for size in lengths]
    prompts = [Prompt(f"prompt/{n}", tuple(tokens)) for n, tokens in enumerate(tokens_of)]
    engine.generate(prompts[:2], SamplingParams(max_new_tokens=2))  # warms up
    if options.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if options.on_gpu else 0
    start = clock(device)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=new, samples_per_prompt=samples, seed=1))
    seconds = clock(device) - start
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30 if options.on_gpu else 0.0
    engine.close()
    good = [answer for answer in answers if isinstance(answer, Sample)]
    if len(good) < len(answers):
        return Finding(f"{len(answers) - len(good)} of {len(answers)} samples failed", False)
    differences = torch.cat([log_probs_off(chunks[0], sample, device, vocab) for sample in good[:: len(good) // 4]])
    mean, largest = float(differences.mean()), float(differences.max())
    tokens = sum(len(sample.response_ids) for sample in good)
    figures = (
        f"{tokens / seconds:.0f} tokens/s of {len(good)} sequences, {memory:.1f} GiB beside the weights; log-probs "
        f"{mean:.1e} off on average, {largest:.1e} at most"
    )
    values = {"tokens_per_s": tokens / seconds, "bytes": memory * 2**30, "mean_error": mean, "largest_error": largest}
    return Finding(figures, largest <= FP32_TOLERANCE[options.device] if dtype is torch.float32 else None, values)


@torch.no_grad()
def log_probs_off(model: torch.nn.Module, sample: Sample, device: torch.device, vocab: int) -> torch.Tensor:
    """[T] |log-prob of the engine - of one forward pass over the whole sequence|."""
    model.eval()
    tokens = torch.tensor([sample.token_ids], device=device)
    positions = torch.arange(tokens.shape[1], device=device)[None]
    first = len(sample.prompt.token_ids) - 1
    logits = model(tokens, positions, None)[0, first : first + len(sample.response_ids), :vocab].float()
    drawn = torch.tensor(sample.response_ids, device=device)[:, None]
    expected = torch.log_softmax(logits, -1).gather(1, drawn)[:, 0]
    return (torch.tensor(sample.rollout_log_probs, device=device) - expected).abs()
