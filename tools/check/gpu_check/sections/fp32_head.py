"""An output layer that leaves its logits in fp32 (model.fp32_head), beside one that rounds them to bf16."""

from __future__ import annotations

import torch

from megatron_dppo.ops.fp32_linear import fp32_linear
from tools.bench.policy_stats import peak_memory
from tools.check.gpu_check.findings import Check, Finding, Options
from tools.check.gpu_check.sections.kernels import medians

LIMIT_S = 120.0


def checks(options: Options) -> list[Check]:
    """TP 4's rows of the output layer, 8192 tokens."""
    shape = (8192, 4096, 37_984) if options.on_gpu else (64, 64, 4000)
    name = "x".join(map(str, shape))
    return [Check(f"tokens x hidden x vocabulary {name}", lambda: compare(options, *shape), LIMIT_S)]


def compare(options: Options, tokens: int, hidden_size: int, vocab: int) -> list[Finding]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    hidden = torch.randn(tokens, hidden_size, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, hidden_size, device=device) * 2 / hidden_size**0.5).bfloat16().requires_grad_()
    grad = torch.randn(tokens, vocab, device=device).bfloat16()
    exact = hidden[:64].detach().double() @ weight.detach().double().t()

    def rounded() -> torch.Tensor:
        return hidden @ weight.t()

    def whole() -> torch.Tensor:
        return fp32_linear(hidden, weight)

    def both_ways(head: object) -> None:
        logits = head()  # type: ignore[operator]
        torch.autograd.grad(logits, (hidden, weight), grad.to(logits.dtype))

    calls = [lambda: both_ways(rounded), lambda: both_ways(whole)]
    times = medians(calls, device, 3 if options.quick else 9)
    memory = [peak_memory(call, device) / 2**20 for call in calls]
    found = []
    # A sum of h products rounds at each addition, by 2^-24 of what it has by then: if all err the same way, h 2^-24 of it.
    limits = {"bf16 logits": 2.0**-8, "fp32 logits": hidden_size * 2.0**-24}
    for (name, limit), head, seconds, mib in zip(limits.items(), (rounded, whole), times, memory, strict=True):
        error = float((head()[:64].detach().double() - exact).norm() / exact.norm())
        cost = f"{1e3 * seconds:.2f} ms forward + backward, {seconds / times[0]:.2f}x, {mib:.0f} MiB"
        figures = f"{cost}, logits {error:.1e} off"
        values = {"seconds": seconds, "bytes": mib * 2**20, "error": error}
        found.append(Finding(figures, error <= limit, values, name=name))
    return found
