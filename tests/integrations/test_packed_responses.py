"""The adapters for slime and miles, called with what their own ``loss_function`` passes, on every context-parallel rank."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.errors import ConfigError, LossInputError, MissingDependencyError
from megatron_dppo.integrations.packed_responses import LossFunction, response_rows
from megatron_dppo.loss.token_losses import TokenLosses
from tests.integrations.recording import load
from tests.integrations.rollouts import CONFIG, PADDED, TEMPERATURE, VOCAB, own_step, packed_logits
from tests.integrations.stand_ins import install

FRAMEWORKS = ("slime", "miles")
RECORDS = {name: load(name) for name in FRAMEWORKS}
RANKS = {"cp1": (0, 1), "cp2 rank 0": (0, 2), "cp2 rank 1": (1, 2)}
CASES = [(framework, rank) for framework in FRAMEWORKS for rank in RANKS]


def adapter_of(
    framework: str, rank: str, monkeypatch: pytest.MonkeyPatch, version: str | None = None
) -> Callable[..., LossFunction]:
    """``make_loss_function`` of the adapter, in a process that believes to be this rank of this version."""
    found = {framework: version or RECORDS[framework]["version"]}
    monkeypatch.setattr("megatron_dppo.integrations.framework.version", found.__getitem__)
    cp_rank, cp_size = RANKS[rank]
    parallel_state = {
        "get_context_parallel_rank": lambda: cp_rank,
        "get_context_parallel_world_size": lambda: cp_size,
        "get_tensor_model_parallel_group": lambda: None,
    }
    state = SimpleNamespace(cp=SimpleNamespace(rank=cp_rank, size=cp_size), tp=SimpleNamespace(group=None))
    install(
        monkeypatch,
        {
            "megatron.core.parallel_state": parallel_state,
            "miles.backends.training_utils.parallel": {"get_parallel_state": lambda: state},
        },
    )
    return importlib.import_module(f"megatron_dppo.integrations.{framework}").make_loss_function


def recorded_call(framework: str, rank: str, **changed: Any) -> tuple[Namespace, dict[str, Any]]:
    record = RECORDS[framework]["ranks"][rank]
    return Namespace(**{**record["args"], **changed}), dict(record["batch"])


def local_logits(framework: str, rank: str, logits: torch.Tensor) -> torch.Tensor:
    """[1, T, PADDED]: this rank's rows of all the rollouts' logits, those of padding 0."""
    rows = RECORDS[framework]["ranks"][rank]["rows"]
    return torch.where(rows[:, None] >= 0, logits[rows.clamp(min=0)], 0.0)[None]


def reducer(framework: str, rank: str, per_token: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the record says of the framework's: every sample's sum over its whole rollout's length, or plain sums."""
    batch = RECORDS[framework]["ranks"][rank]["batch"]
    _, token_at = response_rows(batch["total_lengths"], batch["response_lengths"], *RANKS[rank])
    masks, lengths = [], []
    for i, (mask, at) in enumerate(zip(batch["loss_masks"], token_at, strict=True)):
        masks.append(mask[at - (batch["total_lengths"][i] - batch["response_lengths"][i])])
        lengths.append(1.0 if per_token else float(batch["rollout_mask_sums"][i]))

    def reduce(values: torch.Tensor) -> torch.Tensor:
        parts = values.split([len(mask) for mask in masks])
        return torch.stack([(x * m).sum() / n for x, m, n in zip(parts, masks, lengths, strict=True)]).sum()

    return reduce


@pytest.mark.parametrize(("framework", "rank"), CASES)
def test_the_rows_are_those_that_the_framework_scores(framework: str, rank: str) -> None:
    record = RECORDS[framework]["ranks"][rank]
    batch = record["batch"]
    rows, _ = response_rows(batch["total_lengths"], batch["response_lengths"], *RANKS[rank])
    logits = local_logits(framework, rank, packed_logits())[0, :, :VOCAB] / TEMPERATURE
    every = torch.cat([tokens.roll(-1) for tokens in batch["unconcat_tokens"]])  # the token that each row predicts
    log_probs = logits.log_softmax(-1).gather(-1, every[record["rows"].clamp(min=0)][:, None])[:, 0]
    for at, theirs in zip(rows, record["log_probs"], strict=True):
        torch.testing.assert_close(log_probs[at], theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("framework", "rank"), CASES)
@pytest.mark.parametrize("how", ["per_rollout", "per_token"])
def test_the_stand_in_for_the_reducer_does_what_theirs_did(framework: str, rank: str, how: str) -> None:
    reduced = RECORDS[framework]["ranks"][rank]["reduced"]
    ours = reducer(framework, rank, how == "per_token")(reduced["vector"])
    torch.testing.assert_close(ours, reduced[how], rtol=1e-6, atol=0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("ranks", [["cp1"], ["cp2 rank 0", "cp2 rank 1"]], ids=["cp1", "cp2"])
@pytest.mark.parametrize("how", ["per_rollout", "per_token"])
def test_the_gradient_is_that_of_our_own_step(
    framework: str, ranks: list[str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, total = packed_logits().requires_grad_(), 0.0
    for rank in ranks:
        loss_function = adapter_of(framework, rank, monkeypatch)(CONFIG, backend="torch")
        args, batch = recorded_call(framework, rank)
        reduce = reducer(framework, rank, how == "per_token")
        loss, _ = loss_function(args, batch, local_logits(framework, rank, logits), reduce)
        loss.backward()
        total += loss.item()
    # What the frameworks do with the loss (records: factor, normalizer; two micro-batches, four rollouts): times cp and over
    # cp * tokens; or times micro-batches * cp / rollouts, and averaged over micro-batches and cp. Both come to these:
    divisor = {"per_token": 16, "per_rollout": 4}[how]
    aggregation = {"per_token": "token_mean", "per_rollout": "seq_mean_token_mean"}[how]
    mean, gradient = own_step(dataclasses.replace(CONFIG, temperature=TEMPERATURE, aggregation=aggregation), VOCAB)
    assert abs(total / divisor - mean.item()) < 1e-6
    assert float((logits.grad / divisor - gradient).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-2


@pytest.mark.parametrize(("framework", "rank"), CASES)
def test_the_divisors_are_the_ones_recorded(framework: str, rank: str) -> None:
    record, cp_size = RECORDS[framework]["ranks"][rank], RANKS[rank][1]
    rollouts, micro_batches, tokens = 4, 2, 16
    per_rollout, per_token = record["per_rollout"], record["per_token"]
    # Megatron divides by the normalizer, by the number of micro-batches and, averaging gradients, by cp.
    assert per_rollout["factor"].item() / (micro_batches * cp_size) == 1 / rollouts
    assert per_rollout["normalizer"].item() == 1
    # Per token it sums gradients and divides once by the sum of the normalizers, which every cp rank reports whole.
    assert per_token["factor"].item() / (cp_size * per_token["normalizer"].item()) == 1 / tokens


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_metrics_and_the_entropy_bonus_go_through_the_frameworks_reducer(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[TokenLosses] = []
    loss_function = adapter_of(framework, "cp1", monkeypatch)(CONFIG, collect=collected.append)
    logits, reduce = local_logits(framework, "cp1", packed_logits()), reducer(framework, "cp1", True)
    args, batch = recorded_call(framework, "cp1")
    loss, metrics = loss_function(args, batch, logits, reduce)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert metrics["loss"] == loss
    final = collected[0].metrics.finalize()
    assert metrics["mismatch/abs_log_ratio"].item() / 16 == pytest.approx(final["mismatch/abs_log_ratio"], rel=1e-6)
    assert final["dppo/mask_fraction"] > 0
    args.entropy_coef = 0.5
    with_bonus, _ = loss_function(args, batch, logits, reduce)
    assert with_bonus.item() == pytest.approx(loss.item() - 0.5 * metrics["entropy"].item(), abs=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_rank_without_response_tokens_takes_part_in_backward(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_function = adapter_of(framework, "cp2 rank 0", monkeypatch)(CONFIG)
    args, batch = recorded_call(framework, "cp2 rank 0")
    (first,) = (
        {name: values[:1] for name, values in batch.items()},
    )  # of the first sample this rank has the prompt alone
    logits = torch.zeros(1, 4, PADDED, requires_grad=True)
    loss, _ = loss_function(args, first, logits, torch.sum)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_tis": True}, "--use-tis is not read"),
        ({"use_kl_loss": True}, "--use-kl-loss is not read"),
        ({"rollout_top_p": 0.9}, "--rollout-top-p must be 1, not 0.9"),
        ({"rollout_top_k": 50}, "--rollout-top-k -1, not 50"),
        ({"qkv_format": "bshd"}, "--qkv-format bshd was not recorded"),
        ({"rollout_log_probs": None}, "the batch has no rollout_log_probs"),
    ],
)
def test_what_it_cannot_do_is_refused(
    framework: str, changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_function = adapter_of(framework, "cp1", monkeypatch)(CONFIG)
    args, batch = recorded_call(framework, "cp1", **changed)
    batch.update({name: value for name, value in changed.items() if name in batch})
    with pytest.raises((ConfigError, LossInputError), match=f"{framework}: .*{message}"):
        loss_function(args, batch, local_logits(framework, "cp1", packed_logits()), torch.sum)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_another_layout_or_version_is_refused(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_function = adapter_of(framework, "cp2 rank 0", monkeypatch)(CONFIG)
    args, batch = recorded_call(framework, "cp2 rank 0", allgather_cp=True)
    with pytest.raises(ConfigError, match="--allgather-cp lays samples out otherwise"):
        loss_function(args, batch, local_logits(framework, "cp2 rank 0", packed_logits()), torch.sum)
    with pytest.raises(ConfigError, match=rf"{framework} 9\.9: .* known of"):
        adapter_of(framework, "cp1", monkeypatch, version="9.9")(CONFIG)
    with pytest.raises(ConfigError, match=r"temperature=0\.5 is not read here"):
        adapter_of(framework, "cp1", monkeypatch)(DPPOConfig(temperature=0.5))
    monkeypatch.setattr("megatron_dppo.integrations.framework.version", importlib.metadata.version)
    with pytest.raises(MissingDependencyError, match=f"needs {framework}, which is not installed"):
        importlib.import_module(f"megatron_dppo.integrations.{framework}").make_loss_function(CONFIG)
