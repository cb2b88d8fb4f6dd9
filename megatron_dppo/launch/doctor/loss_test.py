"""The loss on every backend at hand, beside float64."""

from __future__ import annotations

import torch

from megatron_dppo.launch.doctor.lines import Line, Subject
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.dppo_loss import DPPOLoss
from megatron_dppo.loss.inputs import LossInputs
from megatron_dppo.ops.backend import backend_report

_TOKENS, _VOCABULARY, _SPREAD = 64, 1000, 3.0
# A log-prob is x - log sum exp: numbers up to 20, rounded to fp32 (6e-8) some ten times, 1e-5 at the worst. The ratio takes
# that over as it is, weights are bounded by their cap, and the mean over 64 tokens is not above the worst.
_TOLERANCE = 1e-4


def loss_backends(_: Subject) -> list[Line]:
    """Value and gradient of the loss, on each backend; one that cannot be used here is a note."""
    lines = []
    for backend, state in backend_report().items():
        what = f"loss on {backend}"
        if state != "available":
            lines.append(Line(what, "note", state))
            continue
        device = "cuda" if backend == "cuda" else "cpu"
        value, gradient = _errors(backend, torch.device(device))
        found = f"errors against float64: value {value:.1e}, gradient {gradient:.1e}"
        good = max(value, gradient) <= _TOLERANCE  # NaN is not
        remedy = "" if good else "build the extension again; until then train.kernel_backend=torch"
        lines.append(Line(what, "ok" if good else "error", found, remedy))
    return lines


def _errors(backend: str, device: torch.device) -> tuple[float, float]:
    """Of the loss and of its gradient, relative to their size."""
    (exact, exact_gradient), (loss, gradient) = (
        _loss_and_gradient(name, dtype, device) for name, dtype in (("torch", torch.float64), (backend, torch.float32))
    )
    apart = (gradient.double() - exact_gradient).abs().max() / exact_gradient.abs().max()
    return float((loss.double() - exact).abs() / exact.abs()), float(apart)


def _loss_and_gradient(backend: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = _SPREAD * torch.randn(_TOKENS, _VOCABULARY, generator=generator)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    exact = logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    moved = 0.2 * torch.randn(_TOKENS, generator=generator)
    inputs = LossInputs(
        target=target.to(device),
        loss_mask=torch.ones(_TOKENS, dtype=torch.bool, device=device),
        advantages=torch.randn(_TOKENS, generator=generator).to(device),
        rollout_log_probs=(exact + moved).clamp(max=0.0).float().to(device),
    )
    leaf = logits.to(device, dtype).requires_grad_()
    output = DPPOLoss(DPPOConfig(), vocab_size=_VOCABULARY, backend=backend)(leaf, inputs)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output.loss.detach(), gradient
