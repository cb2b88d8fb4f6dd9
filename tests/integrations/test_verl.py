"""The verl adapter, called with what verl's own ``ppo_loss`` and Megatron engine pass (records/verl.json)."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.errors import ConfigError, LossInputError, MissingDependencyError
from megatron_dppo.integrations import verl as adapter
from megatron_dppo.loss.token_losses import TokenLosses
from tests.integrations.recording import load
from tests.integrations.rollouts import CONFIG, PADDED, TEMPERATURE, VOCAB, own_step, packed_logits
from tests.integrations.stand_ins import forbid, install

RECORD = load("verl")


def agg_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    loss_agg_mode: str,
    dp_size: int,
    batch_num_tokens: int,
    global_batch_size: int,
    loss_scale_factor: int | None,
) -> torch.Tensor:
    """What the record says of verl's: a share of the global mean, times the ranks over which gradients are averaged."""
    per_row = (loss_mat * loss_mask).sum(-1)
    if loss_agg_mode == "token-mean":
        return per_row.sum() / batch_num_tokens * dp_size
    if loss_agg_mode == "token-sum":
        return per_row.sum() * dp_size
    if loss_agg_mode == "seq-mean-token-mean":
        per_row = per_row / loss_mask.sum(-1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        per_row = per_row / (loss_scale_factor or loss_mask.shape[-1])
    return per_row.sum() / global_batch_size * dp_size


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A verl of the recorded version; what is registered with it."""
    losses: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Any:
        return lambda function: losses.setdefault(name, function)

    core_algos = {"agg_loss": agg_loss, "register_policy_loss": register_policy_loss}
    install(monkeypatch, {"verl": {"__version__": RECORD["version"]}, "verl.trainer.ppo.core_algos": core_algos})
    return losses


def recorded_call(log_prob: torch.Tensor, **changed: Any) -> dict[str, Any]:
    """The arguments of the record; the configuration has verl's manners, which are those of a mapping and an object."""
    call = dict(RECORD["call"])
    config = call["config"]
    call["config"] = SimpleNamespace(policy_loss=config["policy_loss"], global_batch_info=config["global_batch_info"])
    return {**call, "log_prob": log_prob, **changed}


def response_log_probs(logits: torch.Tensor) -> torch.Tensor:
    """[b, r] as verl computes them, with gradient."""
    operator = RECORD["log_prob_operator"]
    log_probs = (logits[:, :VOCAB] / TEMPERATURE).log_softmax(-1).gather(-1, operator["label"][0, :, None])[:, 0]
    return log_probs[RECORD["row_of_response"]]


def test_verl_had_imported_the_plugin_and_chosen_the_engine() -> None:
    assert RECORD["plugin_registered"]
    assert RECORD["log_prob_operator"]["our_engine_is_chosen"]
    assert RECORD["version"] in adapter.RECORDED_VERSIONS


@pytest.mark.parametrize("mode", RECORD["aggregated"])
def test_the_stand_in_for_agg_loss_does_what_verl_did(mode: str) -> None:
    call = RECORD["call"]
    ours = agg_loss(call["log_prob"], call["response_mask"], mode, **call["config"]["global_batch_info"])
    torch.testing.assert_close(ours, RECORD["aggregated"][mode], rtol=1e-6, atol=0)  # 16 terms of one sign


def test_the_gradient_is_that_of_our_own_step(registry: dict[str, Any]) -> None:
    adapter.register("dppo", CONFIG, backend="torch")
    logits = packed_logits().requires_grad_()
    log_prob = response_log_probs(logits)
    torch.testing.assert_close(log_prob[RECORD["call"]["response_mask"]], _recorded_log_probs(), rtol=0, atol=1e-6)
    loss, _ = registry["dppo"](**recorded_call(log_prob))
    loss.backward()
    mean, gradient = own_step(dataclasses.replace(CONFIG, temperature=TEMPERATURE), VOCAB)
    # Two ranks: the loss is its share of the mean times two, since gradients are averaged; the other rank is like this one.
    assert abs(loss.item() - mean.item()) < 1e-6
    assert float((logits.grad - gradient).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-2


def _recorded_log_probs() -> torch.Tensor:
    return RECORD["call"]["log_prob"][RECORD["call"]["response_mask"]]


def test_metrics_have_the_same_names_for_every_micro_batch(registry: dict[str, Any]) -> None:
    collected: list[TokenLosses] = []
    adapter.register("dppo", CONFIG, collect=collected.append)
    call = recorded_call(RECORD["call"]["log_prob"])
    _, metrics = registry["dppo"](**call)
    _, none_moved = registry["dppo"](**{**call, "advantages": torch.zeros_like(call["advantages"])})
    assert metrics.keys() == none_moved.keys()  # verl refuses to average lists of different lengths
    assert all(isinstance(value, float) for value in [*metrics.values(), *none_moved.values()])
    final = collected[0].metrics.finalize()
    assert metrics["actor/dppo/mask_fraction"] == final["dppo/mask_fraction"] > 0
    assert none_moved["actor/dppo/mask_fraction"] == 0.0
    assert "actor/entropy" not in metrics  # not known here; 0 would be a lie


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {
                "config": SimpleNamespace(
                    policy_loss={"rollout_correction": {"bypass_mode": False}}, global_batch_info={}
                )
            },
            "verl: old_log_prob is a recomputation",
        ),
        ({"config": SimpleNamespace(policy_loss={}, global_batch_info={})}, "calculate_log_probs=True"),
        ({"rollout_is_weights": torch.ones(4, 6)}, "would count twice"),
        ({"advantages": torch.full((4, 6), torch.nan)}, "advantages must be finite"),
        ({"old_log_prob": torch.zeros(4, 5)}, "rollout_log_probs has shape"),
        ({"old_log_prob": torch.zeros(4, 6).bfloat16()}, "must be float32"),
    ],
)
def test_what_is_not_anchored_on_the_engine_is_refused(
    registry: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    adapter.register("dppo", CONFIG)
    with pytest.raises((ConfigError, LossInputError), match=message):
        registry["dppo"](**recorded_call(RECORD["call"]["log_prob"], **changed))


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, registry: dict[str, Any]) -> None:
    install(monkeypatch, {"verl": {"__version__": "0.11.0"}})
    with pytest.raises(ConfigError, match=r"verl 0\.11\.0: .* known of 0\.10\.0\.dev only"):
        adapter.register("dppo", CONFIG)
    forbid(monkeypatch, "verl")
    with pytest.raises(MissingDependencyError, match="the adapter for verl needs verl"):
        adapter.register("dppo", CONFIG)
    assert registry == {}


@pytest.mark.parametrize(
    "option",
    [{"divergence": "topk_tv"}, {"temperature": 0.8}, {"entropy_coef": 0.1}, {"aggregation": "seq_mean_token_mean"}],
)
def test_options_that_are_verls_are_refused(registry: dict[str, Any], option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        adapter.register("dppo", DPPOConfig(**option))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> adapter.OneReadHead:
    parallel_state = {"get_tensor_model_parallel_group": lambda: None}
    install(monkeypatch, {"megatron.core.parallel_state": parallel_state})
    head = adapter.OneReadHead()
    head.model_config = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=VOCAB))  # type: ignore[attr-defined]
    return head


def call_head(head: adapter.OneReadHead, logits: torch.Tensor, **changed: Any) -> dict[str, torch.Tensor]:
    operator = RECORD["log_prob_operator"]
    unread = {"logits_processor_func": None, "batch": None, "data_format": "thd"}
    arguments = {**operator["flags"], **unread, "temperature": operator["temperature"], **changed}
    return head._lm_head_logits_processor(logits[None], operator["label"], **arguments)


@pytest.mark.parametrize("columns", [VOCAB, PADDED])
def test_one_read_of_the_logits_gives_what_three_operators_of_verl_gave(
    head: adapter.OneReadHead, columns: int
) -> None:
    ours, theirs = call_head(head, packed_logits()[:, :columns]), RECORD["log_prob_operator"]["results"]["true"]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-5, atol=2e-6)
    # verl counts the vocabulary's padding as probability: of these logits it took up to 1.4 nats from a log-prob.
    padded = RECORD["log_prob_operator"]["results"]["padded"]
    assert float((padded["log_probs"] - theirs["log_probs"]).abs().max()) > 1.0


def test_bf16_logits_are_not_rounded_a_second_time(head: adapter.OneReadHead) -> None:
    logits = packed_logits()[:, :VOCAB].bfloat16()
    truth = (logits.double() / TEMPERATURE).log_softmax(-1)
    label = RECORD["log_prob_operator"]["label"][0, :, None]
    error = {
        "ours": call_head(head, logits)["log_probs"],
        "verl's": RECORD["log_prob_operator"]["results"]["bf16"]["log_probs"],
    }
    worst = {name: float((found[0] - truth.gather(-1, label)[:, 0]).abs().max()) for name, found in error.items()}
    assert worst["ours"] < 2e-6
    assert worst["verl's"] > 1e-3  # the tempered logits were written back as bf16


def test_the_head_refuses_what_it_does_not_do(head: adapter.OneReadHead) -> None:
    temperature = RECORD["log_prob_operator"]["temperature"].clone()
    temperature[0, -1] = 0.0  # padding
    call_head(head, packed_logits(), temperature=temperature)
    temperature[0, 0] = 0.5
    with pytest.raises(LossInputError, match=r"one sampling temperature .* not 0\.5 to 0\.8"):
        call_head(head, packed_logits(), temperature=temperature)
    with pytest.raises(ConfigError, match="does not distil"):
        call_head(head, packed_logits(), distillation_use_topk=True)
