"""One pass over the logits gives every bit that two passes give; and its gradient is given out once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_dppo.ops import logits_route
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.gradient_over_logits import gradient_over_logits

K = 3
LIMITS = [0.05, 0.1, 1.7, 0.2, 0.28, 3.0, 0.5, 1.5]
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
DIRECTIONS = ("ratio", "exact_collision", "aggregated_tail", "uniform_tail", "symmetric")
TRUST_REGIONS = ("mask", "smooth", "ppo_clip", "cispo", "none")
RULES = list(itertools.product(DIVERGENCES, DIRECTIONS, TRUST_REGIONS))


def rule_of(divergence: str, direction: str, trust_region: str) -> dict[str, Any]:
    return {"divergence": divergence, "direction": direction, "trust_region": trust_region, "limits": LIMITS}


def tokens(n: int, vocab_size: int, masked: bool) -> dict[str, Any]:
    mask = torch.rand(n) < 0.6 if masked else None
    fields = {
        "target": torch.randint(0, vocab_size, (n,)),
        "rollout_log_probs": -4 * torch.rand(n),
        "advantages": torch.randn(n) * (torch.rand(n) < 0.8),
        "topk_ids": torch.randint(0, vocab_size, (n, K)),
        "topk_log_probs": -2 - 4 * torch.rand(n, K),
    }
    if mask is not None:
        for values in fields.values():
            values[~mask] = torch.nan if values.is_floating_point() else -100
    return fields | {"mask": mask}


def aligned_rows(n: int, columns: int, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, columns] whose rows begin ``offset`` elements behind a 16-byte boundary."""
    return torch.empty(n, -(-columns // 8) * 8 + 8, dtype=dtype)[:, offset : offset + columns]


def in_two_passes(
    logits: torch.Tensor,
    t: dict[str, Any],
    weights: Any,
    rule: Any,
    temperature: float,
    vocab: int,
    scale: float,
    ops: Any,
) -> tuple[torch.Tensor, ...]:
    """log_prob, entropy, collision, topk_log_prob, gradient: the operators of two passes, and autograd's arithmetic."""
    partials = ops.row_partials(logits, None, t["mask"], t["target"], t["topk_ids"], temperature, 0, vocab)
    log_prob, entropy, collision, topk, maximum, log_sum = ops.merge_partials(partials[None], t["mask"])
    coefficient = ops.token_objective(
        *(t["rollout_log_probs"], log_prob, t["advantages"], entropy, collision, t["target"], t["mask"], t["topk_ids"]),
        *(t["topk_log_probs"], topk, None, vocab),
        **rule,
    )[0]
    incoming = torch.tensor(scale) if weights is None else torch.tensor(scale) * weights
    grad_log_prob = (coefficient * -incoming).masked_fill(log_prob == -torch.inf, 0.0)
    gradient = torch.empty_like(logits)
    state = (t["target"], maximum, log_sum, log_prob, entropy, grad_log_prob, None, temperature, 0, vocab)
    ops.policy_backward(logits, gradient, t["mask"], *state)
    return log_prob, entropy, collision, topk, gradient


def in_one_pass(logits: torch.Tensor, t: dict[str, Any], **others: Any) -> tuple[torch.Tensor, ...]:
    # As far from a 16-byte boundary as the original: that decides which thread takes which value.
    storage = torch.empty(logits.storage_offset() + logits.shape[0] * logits.stride(0), dtype=logits.dtype)
    given = storage.as_strided(logits.shape, logits.stride(), logits.storage_offset()).copy_(logits)
    zero, stats = gradient_over_logits(given.requires_grad_(), **t, **others)
    (gradient,) = torch.autograd.grad(zero * others["backward_scale"], given)
    assert gradient.data_ptr() == given.data_ptr()
    return *stats, gradient


@pytest.mark.parametrize(
    ("dtype", "offset", "masked", "weighted", "temperature"),
    [
        (torch.bfloat16, 0, True, False, 1.0),
        (torch.bfloat16, 3, False, True, 0.7),
        (torch.float16, 1, True, True, 1.3),
        (torch.float32, 1, True, True, 0.7),
        (torch.float32, 0, False, False, 1.0),
    ],
)
def test_every_bit_is_that_of_two_passes(
    dtype: torch.dtype, offset: int, masked: bool, weighted: bool, temperature: float, compiled_backend: str
) -> None:
    n, columns, vocab = 9, 4500, 4477
    backend = choose_backend(compiled_backend, torch.zeros(1))
    t = tokens(n, vocab, masked)
    logits = aligned_rows(n, columns, offset, dtype).copy_(3 * torch.randn(n, columns))
    logits[2, int(t["target"].clamp(min=0)[2])] = -torch.inf
    if masked:
        logits[~t["mask"]] = torch.nan
    weights = torch.rand(n) + 0.5 if weighted else None
    for rule in map(rule_of, *zip(*RULES[:: 7 if compiled_backend == "cpu" else 33], strict=True)):
        expected = in_two_passes(logits, t, weights, rule, temperature, vocab, 0.5, backend.operators)
        common = {"temperature": temperature, "vocab_size": vocab, "backward_scale": 0.5, "backend": backend}
        found = in_one_pass(logits, t, token_weights=weights, rule=rule, **common)
        names = ("log_prob", "entropy", "collision", "topk_log_prob", "gradient")
        for name, one, two in zip(names, found, expected, strict=True):
            assert torch.equal(one, two), (rule, name)


@pytest.mark.parametrize("rule", [rule_of(*rule) for rule in RULES], ids="-".join)
def test_every_rule(rule: dict[str, Any], compiled_backend: str) -> None:
    backend = choose_backend(compiled_backend, torch.zeros(1))
    t, logits = tokens(7, 41, masked=True), 2 * torch.randn(7, 43)
    expected = in_two_passes(logits, t, None, rule, 1.0, 41, 1.0, backend.operators)
    common = {"temperature": 1.0, "vocab_size": 41, "backward_scale": 1.0, "backend": backend}
    found = in_one_pass(logits, t, token_weights=None, rule=rule, **common)
    assert all(map(torch.equal, found, expected))


def call(logits: torch.Tensor, compiled_backend: str, scale: float = 1.0) -> torch.Tensor:
    common = {"temperature": 1.0, "vocab_size": 11, "backward_scale": scale}
    backend, rule = choose_backend(compiled_backend, torch.zeros(1)), rule_of("binary_tv", "ratio", "mask")
    return gradient_over_logits(
        logits, **tokens(5, 11, masked=False), token_weights=None, rule=rule, **common, backend=backend
    )[0]


def test_what_is_promised_is_held(compiled_backend: str) -> None:
    logits = torch.randn(5, 11, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match=r"another number than the promised backward_scale=4\.0"):
        call(logits, compiled_backend, 4.0).backward()
    logits = torch.randn(5, 11, requires_grad=True) * 1
    zero = call(logits, compiled_backend)
    assert zero == 0
    zero.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="backward a second time through a gradient that was written over the logits"
    ):
        zero.backward()


def test_whoever_saved_the_logits_is_stopped(compiled_backend: str) -> None:
    logits = torch.randn(5, 11, requires_grad=True) * 1
    other = logits.square().sum()
    zero = call(logits, compiled_backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + zero).backward()


def test_rows_that_share_memory_are_refused(compiled_backend: str) -> None:
    with pytest.raises(ValueError, match="rows of the logits share memory"):
        call((torch.randn(1, 11, requires_grad=True) * 1).expand(5, 11), compiled_backend)


def test_the_operator_refuses_what_it_cannot_compute(compiled_backend: str) -> None:
    t, rule = tokens(5, 11, masked=False), rule_of("binary_tv", "ratio", "mask")
    operator = choose_backend(compiled_backend, torch.zeros(1)).operators.policy_gradient_

    def refused(
        message: str, *, logits: Any = None, vocab: int = 11, scale: float = 1.0, topk: Any = None, **more: Any
    ) -> None:
        fields = (None, t["target"], t["rollout_log_probs"], t["advantages"], topk, None, None)
        with pytest.raises(ValueError, match=message):
            operator(torch.randn(5, 11) if logits is None else logits, *fields, 1.0, vocab, scale, **{**rule, **more})

    refused("divergence='given' would have to be known", divergence="given")
    refused(r"num_columns must be in \[0, 11\], not 12", vocab=12)
    refused("vocab_size must be positive, not 0", vocab=0)
    refused("scale must be finite, not inf", scale=float("inf"))
    refused("topk_ids and topk_log_mu must be given together", topk=t["topk_ids"])
    refused("logits has rows that share memory", logits=torch.randn(1, 11).expand(5, 11))
    refused("logits must be float32, bfloat16 or float16", logits=torch.randn(5, 11, dtype=torch.float64))


def test_the_rule(compiled_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 100 fp32 columns, and two workers."""
    monkeypatch.setattr(logits_route, "_workers", lambda device: (2, 400.0))
    backend = choose_backend(compiled_backend, torch.zeros(1))

    def takes(rows: int = 16, columns: int = 100, dtype: torch.dtype = torch.float32, **more: Any) -> bool:
        logits = torch.zeros(rows, columns + 9, dtype=dtype).requires_grad_() * 1
        return logits_route.takes_one_pass(logits, columns, more.get("backend", backend))

    assert takes()
    assert not takes(rows=15)  # a worker would be idle for long
    assert not takes(columns=101)
    assert takes(columns=200, dtype=torch.bfloat16)
    assert not takes(columns=201, dtype=torch.bfloat16)
    assert not takes(backend=choose_backend("torch", torch.zeros(1)))
    with torch.no_grad():
        assert not takes()
    leaf = torch.zeros(16, 100, requires_grad=True)
    assert not logits_route.takes_one_pass(leaf, 100, backend)
    assert not logits_route.takes_one_pass(leaf.view(4, 4, 100), 100, backend)
    assert not logits_route.takes_one_pass(leaf.detach(), 100, backend)
    assert logits_route.takes_one_pass((leaf * 1).view(4, 4, 100), 100, backend)
