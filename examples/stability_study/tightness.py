#!/usr/bin/env python3
"""What the cheap divergences miss, on real tokens: binary and top-K against the exact one, for the same pair of policies.

    python examples/stability_study/tightness.py --rounding fp8_e4m3 \\
        runs/stability_study/tightness_{from,to}-fp8-binary_tv-201/hf

mu is the first policy with rounded weights, which draws the tokens; pi the second one, after the updates of a rollout batch.
For each divergence, how often it decides otherwise than the exact one at the same threshold: missed, the share of tokens
beyond the threshold that it lets pass; false, the share of the others that it would mask. Counted are all tokens, as if every
update led outward.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM

from megatron_dppo.loss import divergences
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.rollout.embedded.rounding import ROUNDINGS
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.inputs import RunInputs, read_run_inputs

HEAD = "| divergence | mean D | of the exact | beyond delta | missed | false |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollout", type=Path, help="Hugging Face folder of the policy that draws")
    parser.add_argument("policy", type=Path, help="Hugging Face folder of the policy that has moved")
    parser.add_argument("--rounding", choices=("none", *ROUNDINGS), default="none", help="of the policy that draws")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="to each prompt")
    parser.add_argument("--topk", type=int, nargs="+", default=[5, 20])
    arguments = parser.parse_args()
    conf = Path(__file__).with_name("conf.yaml")
    config = load_config(conf, [f"model.path={arguments.rollout}"])
    inputs = read_run_inputs(config, 1)
    mu, pi = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval()
        for p in (arguments.rollout, arguments.policy)
    )
    round_weights(mu, arguments.rounding)
    torch.manual_seed(0)
    length = config.rollout.max_response_tokens
    log_mu, log_pi, target = token_log_probs(mu, pi, inputs, arguments.prompts, arguments.samples, length)
    print(f"{len(target)} tokens, vocabulary of {log_mu.shape[1]}\n\n{table(log_mu, log_pi, target, arguments.topk)}")


def round_weights(model: torch.nn.Module, rounding: str) -> None:
    """As the embedded engine does."""
    if rounding in ROUNDINGS:
        for name, parameter in model.named_parameters():
            if not name.endswith(".mlp.gate.weight"):  # a router
                parameter.data = ROUNDINGS[rounding](parameter.data)


@torch.no_grad()
def token_log_probs(
    mu: Any, pi: Any, inputs: RunInputs, prompts: int, samples: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Responses drawn from ``mu``: [N, V] log mu and log pi at their tokens, [N] the tokens."""
    found = []
    for prompt in inputs.train_prompts(0, prompts, 0, 1):
        ids = torch.tensor([prompt.token_ids] * samples)
        drawn = mu.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            eos_token_id=list(inputs.stop_token_ids),
            pad_token_id=inputs.stop_token_ids[0],
        )
        target = drawn[:, ids.shape[1] :]
        stops = torch.isin(target, torch.tensor(inputs.stop_token_ids))
        real = stops.cumsum(1) - stops.long() == 0  # up to the first stop token, which was drawn too
        both = [m(drawn).logits[:, ids.shape[1] - 1 : -1].double().log_softmax(-1)[real] for m in (mu, pi)]
        found.append((*both, target[real]))
    log_mu, log_pi, target = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_mu, log_pi, target


def table(log_mu: torch.Tensor, log_pi: torch.Tensor, target: torch.Tensor, topk: list[int]) -> str:
    """Markdown, from [N, V], [N, V] and [N]; at the default thresholds of each kind."""
    return "\n".join([HEAD, *(row for kind in ("tv", "kl") for row in _rows(kind, log_mu, log_pi, target, topk))])


def divergences_of(
    kind: str, log_mu: torch.Tensor, log_pi: torch.Tensor, target: torch.Tensor, topk: list[int]
) -> dict[str, torch.Tensor]:
    """{name: [N] D}, from coarse to fine."""
    at = target[:, None]
    sampled = (log_mu.gather(1, at)[:, 0], log_pi.gather(1, at)[:, 0])
    found = {f"binary_{kind}": getattr(divergences, f"binary_{kind}")(*sampled)}
    for k in sorted(topk):
        top_mu, ids = log_mu.topk(min(k, log_mu.shape[1]), dim=1)
        known = divergences.known_tokens(*sampled, target, ids, top_mu, log_pi.gather(1, ids))
        found[f"top{k}_{kind}"] = getattr(divergences, f"topk_{kind}")(known)
    if kind == "tv":
        found["exact_tv"] = 0.5 * (log_mu.exp() - log_pi.exp()).abs().sum(1)
    else:
        found["exact_kl"] = (log_mu.exp() * (log_mu - log_pi)).sum(1).clamp(min=0.0)
    return found


def _rows(kind: str, log_mu: torch.Tensor, log_pi: torch.Tensor, target: torch.Tensor, topk: list[int]) -> list[str]:
    delta, _ = DPPOConfig(divergence=f"binary_{kind}").thresholds
    found = divergences_of(kind, log_mu, log_pi, target, topk)
    exact = found[f"exact_{kind}"]
    beyond = exact > delta
    rows = []
    for name, values in found.items():
        masked = values > delta
        cells = (
            name,
            f"{values.mean():.4f}",
            f"{values.mean() / exact.mean():.0%}",
            f"{masked.double().mean():.2%}",
            _share(beyond & ~masked, beyond),
            _share(masked & ~beyond, ~beyond),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _share(part: torch.Tensor, of: torch.Tensor) -> str:
    return f"{int(part.sum()) / int(of.sum()):.2%}" if int(of.sum()) else ""


if __name__ == "__main__":
    main()
