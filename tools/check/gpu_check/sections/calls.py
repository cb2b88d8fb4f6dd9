"""Every kernel beside a definition in float64, where its other paths are taken.

    python -m tools.check.gpu_check.sections.calls DEVICE        all of them at once: what the sanitizers run

``CASES`` says what each shape reaches. The tensors are views that begin at an odd element, so that no row of an odd length
begins where vectors are loaded from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, vocab_parallel_policy_stats
from megatron_dppo.loss.inputs import TopK
from megatron_dppo.ops.exact_divergence import vocab_parallel_divergence
from megatron_dppo.rollout.sglang import tile_hash_reference
from megatron_dppo.rollout.sglang.tile_hash import Piece, hash_pieces
from tools.check.gpu_check.findings import Check, Finding, Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMIT_S = 120.0
# All arithmetic is in fp32 on the same inputs as the reference. A logit of up to 16 times 2^-24 is 1e-6 that an exponential
# is off by, and so, if all err the same way, a sum of them; an entropy of up to 12 nats is a sum of such errors, weighted
# by 1 + |log p| < 20. What these tests have to find, an element left out or read twice, costs 1 / V = 7e-6 of a sum at the
# least where all elements are alike; the largest of a row, where vectors begin and end, far more.
ABSOLUTE = 2e-5
# A gradient is rounded once to its dtype, after fp32 arithmetic: p (1 + log p + H) less 1 at the target. log p and H may be
# off by ABSOLUTE each; p, an exponential, by what its argument's rounding makes of it and by the GPU's instruction.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SMALLEST = {torch.bfloat16: 1e-30, torch.float16: 6e-8, torch.float32: 1e-30}  # fp16 is subnormal below 6e-5
EXPONENTIAL = 2.0**-22
AT_TARGET = 2.0**-22


@dataclass(frozen=True)
class Case:
    """One shape, and what it is for."""

    rows: int
    vocab: int
    offset: int  # elements between an aligned address and the first logit
    reaches: str


CASES = (
    Case(5, 53, 0, "rows shorter than a block"),
    Case(2, 33_000, 3, "a row cut into segments, which are merged"),
    Case(3, 151_936, 1, "long rows that begin at odd elements"),
    Case(3000, 77, 1, "more rows than a launch has blocks"),
)


def checks(options: Options) -> list[Check]:
    """A row for each case and dtype."""
    found = [
        Check(
            f"policy statistics {case.rows}x{case.vocab} {name}", bind(statistics, case, dtype, options.device), LIMIT_S
        )
        for case in CASES
        for name, dtype in DTYPES.items()
    ]
    found += [
        Check(f"exact divergence {case.rows}x{case.vocab} bf16", bind(divergence, case, options.device), LIMIT_S)
        for case in CASES
    ]
    found += [Check(f"objective of {n} tokens", bind(objective, n, options.device), LIMIT_S) for n in (1, 257, 5000)]
    return [*found, Check("hash of weights", lambda: hashes(options.device), LIMIT_S)]


def bind(function: Callable[..., Finding], *arguments: object) -> Callable[[], Finding]:
    return lambda: function(*arguments)


def odd_view(case: Case, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """[rows, vocab] logits of 3 standard deviations, beginning ``offset`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    size = case.rows * case.vocab
    storage = torch.zeros(size + case.offset, dtype=dtype, device=device)
    view = storage[case.offset :].view(case.rows, case.vocab)
    return view.copy_((3 * torch.randn(size, generator=generator)).view(case.rows, case.vocab))


def statistics(case: Case, dtype: torch.dtype, device: str) -> Finding:
    """Forward (row_partials, merge_partials) and backward (policy_backward), with a mask and a few likely tokens."""
    logits = odd_view(case, dtype, device, seed=0)
    target = torch.arange(case.rows, device=device) * 7919 % case.vocab
    topk = logits.float().topk(4).indices
    mask = torch.arange(case.rows, device=device) % 5 != 3
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact, -1)
    expected = torch.stack([log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
    (expected * mask).sum().backward()
    ours = logits.detach().requires_grad_()
    stats = vocab_parallel_policy_stats(ours, target, topk_ids=topk, token_mask=mask, backend=device)
    (stats.log_prob + stats.entropy).sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert stats.topk_log_prob is not None
    values = torch.stack([stats.log_prob, stats.entropy]).detach()
    error = max(
        float((values - expected.detach() * mask).abs().max()),
        float(((stats.topk_log_prob - log_p.detach().gather(1, topk)) * mask[:, None]).abs().max()),
    )
    rounding = ROUNDING[dtype] + EXPONENTIAL * (1.0 + log_p.detach().abs())
    allowed = rounding * exact.grad.abs() + 2 * ABSOLUTE * log_p.detach().exp() + SMALLEST[dtype]
    allowed[torch.arange(case.rows, device=device), target] += AT_TARGET
    gradient = float(((ours.grad.double() - exact.grad).abs() / allowed).max())
    figures = f"{case.reaches}: values {error:.1e} off, gradient {gradient:.2f} of what rounding may do"
    passed = error <= ABSOLUTE and gradient <= 1.0
    return Finding(figures, passed, {"error": error, "gradient_of_tolerance": gradient})


def divergence(case: Case, device: str) -> Finding:
    policy, rollout = (odd_view(case, torch.bfloat16, device, seed) for seed in (0, 1))
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (policy, rollout))
    expected = {"tv": (p.exp() - q.exp()).abs().sum(-1) / 2, "kl": (q.exp() * (q - p)).sum(-1)}
    error = max(
        float((vocab_parallel_divergence(policy, rollout, kind=kind, backend=device) - values).abs().max())
        for kind, values in expected.items()
    )
    # KL is a sum of terms of up to 20 nats, as an entropy is: the same bound, for two policies.
    return Finding(f"{case.reaches}: {error:.1e} off", error <= 2 * ABSOLUTE, {"error": error})


def objective(n: int, device: str) -> Finding:
    """The kernel that decides about tokens, beside its definition in torch, on the same statistics."""
    generator = torch.Generator().manual_seed(n)
    logits = (2 * torch.randn(n, 61, generator=generator)).to(device)
    log_p = torch.log_softmax(logits + 0.3 * torch.randn(n, 61, generator=generator).to(device), -1)
    topk = log_p.topk(5)
    target = torch.randint(0, 61, (n,), generator=generator).to(device)
    inputs = LossInputs(
        target=target,
        loss_mask=None,
        advantages=torch.randn(n, generator=generator).to(device),
        rollout_log_probs=log_p.gather(1, target[:, None])[:, 0],
        rollout_topk=TopK(ids=topk.indices, log_probs=topk.values),
    )
    outputs = [
        DPPOLoss(DPPOConfig(divergence="topk_kl"), vocab_size=61, backend=backend)(logits, inputs)
        for backend in (device, "torch")
    ]
    error = float((outputs[0].divergence - outputs[1].divergence).abs().max())
    # A token whose divergence is within rounding of the threshold may fall on either side of it.
    differ = float((outputs[0].weight != outputs[1].weight).float().mean())
    passed = error <= ABSOLUTE and differ <= 1e-3
    return Finding(f"divergence {error:.1e} off, {differ:.1%} of the decisions differ", passed, {"error": error})


def hashes(device: str) -> Finding:
    """Sums modulo 2**64: equal or wrong."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, padding in ((1, 2, 0), (3, 8190, 0), (129, 4098, 0), (129, 1001, 23)):
        weights = torch.randn(rows, columns + 1, generator=generator).bfloat16()[:, 1:]  # rows begin at any element
        whole = torch.nn.functional.pad(weights, (0, padding))
        width, half = columns + padding, rows // 2
        parts = [(0, half), (half, rows)] if half else [(0, rows)]
        pieces = [Piece(weights.to(device)[a:b], b - a, width, a * width // 2) for a, b in parts]  # two elements a word
        (ours,) = hash_pieces({"weights": (whole.numel() // 2, pieces)}).values()
        if ours.hexdigest() != tile_hash_reference.checksum(whole):
            return Finding(f"the hash of {rows} x {columns} elements, padded by {padding}, is wrong", False)
    return Finding("as the definition says", True)


def main() -> int:
    """Everything, without a table; exit code 1 if something is off."""
    options = Options(device=sys.argv[1], quick=False, sanitizers=(), scratch=None)  # type: ignore[arg-type]
    wrong = 0
    for check in checks(options):
        found = check.run()
        assert isinstance(found, Finding)
        print(f"{check.name}: {found.figures}", flush=True)
        wrong += found.passed is False
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
