"""The policy of Transformer Engine's layers beside the one of Megatron-core's and ours: same weights, loss and gradients.

Both are compared in bf16 with the latter in fp32. Transformer Engine's roundings are others, not more: an error of up to
twice that of the other bf16 policy passes.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dppo.compat.optional_dependencies import probe_transformer_engine
from megatron_dppo.models.hf.export import export_hf_weights
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped
from tools.check.gpu_check.sections.policies import policy_config, random_policy

LIMIT_S = 180.0
LAYERS = 4
# bf16 keeps 8 bits: a gradient that has passed four layers is some 2^-6 of its norm off, never a third of it.
LARGEST_ERROR = 0.3


def checks(options: Options) -> list[Check]:
    """The local spec in bf16 first: it is what the other is measured by."""
    kept: dict[str, Any] = {}

    def local() -> Finding:
        kept["exact"] = loss_and_gradients(options, torch.float32, "local")
        kept["bf16"] = errors(loss_and_gradients(options, torch.bfloat16, "local"), kept["exact"])
        return described(kept["bf16"], max(kept["bf16"].values()) <= LARGEST_ERROR)

    def engine() -> Finding:
        if not options.on_gpu:
            raise Skipped("Transformer Engine's layers run on a GPU only")
        if not (probed := probe_transformer_engine()).usable:
            raise Skipped(probed.reason)
        if "bf16" not in kept:
            raise RuntimeError("there is nothing to compare with: the local layers failed")
        found = errors(loss_and_gradients(options, torch.bfloat16, "te"), kept["exact"])
        fine = all(error <= 2.0 * kept["bf16"][name] for name, error in found.items())
        return described(found, fine)

    return [Check("Megatron-core's layers, bf16", local, LIMIT_S), Check("Transformer Engine's, bf16", engine, LIMIT_S)]


def loss_and_gradients(options: Options, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """The mean log-likelihood of some tokens, and its gradient by Hugging Face name; fp32 on the CPU."""
    layers = LAYERS if options.on_gpu else 2
    (model,) = random_policy(options.device, dtype, layers, backend)
    model.train()
    vocab, device = policy_config(options.device).vocab_size, next(model.parameters()).device
    shape = (2, 256) if options.on_gpu else (2, 16)
    tokens = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(shape[1], device=device).expand(shape)
    logits = model(tokens, positions, None)[:, :-1, :vocab].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    gradients = {name: tensor.float().cpu() for name, tensor in export_hf_weights([model])}
    return {"loss": loss.detach().float().cpu(), **gradients}


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative in norm: of the loss, of all gradients together, and of the worst parameter."""
    if found.keys() != exact.keys():
        raise RuntimeError(f"other parameters: {sorted(found.keys() ^ exact.keys())[:3]}")
    apart = {name: float((found[name] - exact[name]).norm()) for name in exact}
    norms = {name: float(values.norm()) for name, values in exact.items()}
    loss, norm = apart.pop("loss"), norms.pop("loss")
    together = sum(a * a for a in apart.values()) ** 0.5 / sum(n * n for n in norms.values()) ** 0.5
    worst = max(apart[name] / max(norms[name], 1e-30) for name in apart)
    return {"loss": max(loss / norm, 2.0**-12), "gradients": together, "worst parameter": worst}


def described(found: dict[str, float], passed: bool) -> Finding:
    figures = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
    return Finding(f"{figures} off (relative, to fp32)", passed, {f"{name}_error": e for name, e in found.items()})
