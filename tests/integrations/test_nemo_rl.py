"""The NeMo-RL adapter, called with what its own loss preparation passes, padded and packed (records/nemo_rl.json)."""

from __future__ import annotations

import dataclasses
import pickle
from enum import Enum
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.errors import ConfigError, LossInputError, MissingDependencyError
from megatron_dppo.integrations.nemo_rl import RECORDED_VERSIONS, DPPOLossFn
from tests.integrations.recording import load
from tests.integrations.rollouts import CONFIG, LENGTHS, TEMPERATURE, VOCAB, own_step, packed_logits
from tests.integrations.stand_ins import forbid, install

RECORD = load("nemo_rl")
LossType = Enum("LossType", RECORD["types"]["loss"])
LossInputType = Enum("LossInputType", RECORD["types"]["input"])
MetricNormalizer = Enum("MetricNormalizer", sorted({*RECORD["metric_normalizations"].values(), "SEQUENCES"}))


def masked_mean(
    values: torch.Tensor,
    mask: torch.Tensor,
    dim: int | None = None,
    global_normalization_factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the record says of NeMo-RL's."""
    count = mask.sum(dim=dim) if global_normalization_factor is None else global_normalization_factor
    return (values * mask).sum(dim=dim) / (count + 1e-8)


@pytest.fixture(autouse=True)
def _nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {"LossType": LossType, "LossInputType": LossInputType, "MetricNormalizer": MetricNormalizer}
    install(
        monkeypatch,
        {
            "nemo_rl": {"__version__": f"{RECORD['version']}+7ea279a"},
            "nemo_rl.algorithms.loss.interfaces": interfaces,
            "nemo_rl.algorithms.utils": {"masked_mean": masked_mean},
        },
    )


def next_token_log_probs(logits: torch.Tensor) -> list[torch.Tensor]:
    """[l - 1] of every sample, with gradient; from the record's tokens."""
    found = []
    for sample, call in zip(logits.split([sum(lengths) for lengths in LENGTHS]), RECORD["packed"], strict=True):
        tokens = call["data"]["input_ids"][0, 1:]
        found.append((sample[:-1, :VOCAB] / TEMPERATURE).log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return found


def calls_of(batching: str, logits: torch.Tensor) -> list[dict[str, Any]]:
    """The recorded calls, with log-probs that have a gradient."""
    log_probs = next_token_log_probs(logits)
    if batching == "packed":
        return [{**call, "next_token_logprobs": x[None]} for call, x in zip(RECORD["packed"], log_probs, strict=True)]
    width = RECORD["padded"]["next_token_logprobs"].shape[1]
    padded = [torch.nn.functional.pad(x, (0, width - len(x)), value=-3.0) for x in log_probs]
    return [{**RECORD["padded"], "next_token_logprobs": torch.stack(padded)}]


def test_the_recorded_version_is_known() -> None:
    assert RECORD["version"] in RECORDED_VERSIONS


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_the_gradient_is_that_of_our_own_step(batching: str, aggregation: str) -> None:
    config = dataclasses.replace(CONFIG, aggregation=aggregation)
    loss_fn = DPPOLossFn(config, backend="torch")
    logits, total = packed_logits().requires_grad_(), 0.0
    for call, recorded in zip(calls_of(batching, logits), _recorded(batching), strict=True):
        mask = recorded["data"]["token_mask"][:, 1:] == 1
        torch.testing.assert_close(
            call["next_token_logprobs"][mask], recorded["next_token_logprobs"][mask], rtol=0, atol=2e-6
        )
        loss, _ = loss_fn(**call)
        loss.backward()
        total += loss.item()
    # The record's totals are of two such batches: 32 tokens and 8 samples, and gradients are summed.
    mean, gradient = own_step(dataclasses.replace(config, temperature=TEMPERATURE), VOCAB)
    assert abs(2 * total - mean.item()) < 1e-6
    assert float((2 * logits.grad - gradient).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-2


def _recorded(batching: str) -> list[dict[str, Any]]:
    return RECORD["packed"] if batching == "packed" else [RECORD["padded"]]


def test_the_stand_in_for_masked_mean_does_what_nemo_rls_did() -> None:
    data, values = RECORD["padded"]["data"], RECORD["values"]
    mask = data["token_mask"][:, 1:]
    per_token = masked_mean(values, mask, global_normalization_factor=RECORD["padded"]["global_valid_toks"])
    per_sequence = masked_mean(
        masked_mean(values, mask, dim=-1),
        data["sample_mask"],
        global_normalization_factor=RECORD["padded"]["global_valid_seqs"],
    )
    torch.testing.assert_close({"per_token": per_token, "per_sequence": per_sequence}, RECORD["means"])


def test_metrics_add_up_over_micro_batches_and_say_what_they_were_divided_by() -> None:
    loss_fn = DPPOLossFn(CONFIG)
    (padded,) = (loss_fn(**call)[1] for call in calls_of("padded", packed_logits()))
    packed = [loss_fn(**call)[1] for call in calls_of("packed", packed_logits())]
    assert padded.keys() == loss_fn.metric_normalizations.keys()
    for name, value in padded.items():
        assert value == pytest.approx(sum(metrics[name] for metrics in packed), abs=1e-6), name
    assert padded["dppo/mask_fraction"] > 0
    # What grpo.py prints of every step must be there, divided as NeMo-RL divides it.
    for name in ("loss", "gen_kl_error", "token_mult_prob_error", "num_valid_samples"):
        assert loss_fn.metric_normalizations[name].name == RECORD["metric_normalizations"][name]
        assert name in RECORD["metrics"]


def test_it_travels_to_workers_and_says_what_it_takes() -> None:
    loss_fn = DPPOLossFn(DPPOConfig(aggregation="seq_mean_token_mean"))
    copy = pickle.loads(pickle.dumps(loss_fn))
    assert (copy.input_type, copy.loss_type) == (LossInputType.LOGPROB, LossType.SEQUENCE_LEVEL)
    assert DPPOLossFn(CONFIG).loss_type == LossType.TOKEN_LEVEL
    assert copy.config == loss_fn.config


def test_a_batch_without_the_engines_log_probs_is_refused() -> None:
    call = dict(calls_of("padded", packed_logits())[0])
    call["data"] = {name: values for name, values in call["data"].items() if name != "generation_logprobs"}
    with pytest.raises(LossInputError, match="nemo_rl: the batch has no generation_logprobs"):
        DPPOLossFn(CONFIG)(**call)


def test_another_version_and_unread_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ({"temperature": 0.5}, {"divergence": "topk_kl"}, {"kl_coef": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            DPPOLossFn(DPPOConfig(**option))
    with pytest.raises(ConfigError, match="nemo_rl has the aggregations token_mean, seq_mean_token_mean"):
        DPPOLossFn(DPPOConfig(aggregation="seq_mean_token_sum_norm", horizon=8))
    install(monkeypatch, {"nemo_rl": {"__version__": "0.9.0rc1"}})
    with pytest.raises(ConfigError, match=r"nemo_rl 0\.9\.0rc1: .* known of 0\.6\.0 only"):
        DPPOLossFn(CONFIG)
    forbid(monkeypatch, "nemo_rl")
    with pytest.raises(MissingDependencyError, match="the adapter for nemo_rl needs nemo_rl"):
        DPPOLossFn(CONFIG)
