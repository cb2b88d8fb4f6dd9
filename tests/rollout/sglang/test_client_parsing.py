"""What is asked of a server and what is made of its answer, without a server."""

from __future__ import annotations

import base64
import copy
import dataclasses
import math

import pytest
import torch

from megatron_dppo.errors import ConfigError, InvalidSampleError, RolloutError
from megatron_dppo.rollout.engine import check_request
from megatron_dppo.rollout.sample import Prompt, SamplingParams
from megatron_dppo.rollout.sglang.config import SGLangConfig
from megatron_dppo.rollout.sglang.engine import SGLangEngine
from megatron_dppo.rollout.sglang.routed_experts import RoutingShape
from megatron_dppo.rollout.sglang.server_facts import ServerFacts
from megatron_dppo.rollout.sglang.servers.server import first_gpu
from megatron_dppo.rollout.sglang.wire_format import build_request, parse_response, request_seed, was_aborted
from tests.models.tiny_policies import tiny_hf_config

PROMPT = Prompt("train/sum/3", (5, 6, 7))
SAMPLING = SamplingParams(max_new_tokens=8, temperature=0.7, stop_token_ids=(2,), topk_log_probs=2)

# As SGLang 0.5.23 answers (fields that are not read left out).
ANSWER = {
    "output_ids": [11, 2],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "output_token_logprobs": [[-0.5, 11, None], [-1.25, 2, None]],
        "output_top_logprobs": [[[-0.5, 11, None], [-1.5, 4, None]], [[-0.75, 9, None], [-1.25, 2, None]]],
        "weight_versions": [{"version": "4", "start": 0, "end": 2}],
    },
}


def _answer(**meta):
    answer = copy.deepcopy(ANSWER)
    answer["meta_info"].update(meta)
    return answer


def test_a_request_samples_from_the_plain_softmax():
    params = build_request(PROMPT, SAMPLING, seed=1)["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"], params["min_p"]) == (0.7, 1.0, -1, 0.0)
    assert (params["frequency_penalty"], params["presence_penalty"], params["repetition_penalty"]) == (0.0, 0.0, 1.0)


def test_end_of_sequence_is_ignored_only_without_stop_tokens():
    assert build_request(PROMPT, SamplingParams(8), seed=1)["sampling_params"]["ignore_eos"] is True
    params = build_request(PROMPT, SAMPLING, seed=1)["sampling_params"]
    assert (params["ignore_eos"], params["stop_token_ids"]) == (False, [2])


def test_request_seeds_differ_within_a_batch_and_repeat_between_runs():
    other = Prompt("train/sum/4", (5, 6, 7))
    seeds = [request_seed(p, i, s, SAMPLING) for i, p in enumerate((PROMPT, other)) for s in range(8)]
    assert len(set(seeds)) == 16
    assert seeds == [request_seed(p, i, s, SAMPLING) for i, p in enumerate((PROMPT, other)) for s in range(8)]
    assert request_seed(PROMPT, 0, 0, SamplingParams(8, seed=1)) != request_seed(
        PROMPT, 0, 0, SamplingParams(8, seed=2)
    )


def test_an_answer_becomes_a_sample_with_the_stop_token_in_it():
    sample = parse_response(ANSWER, PROMPT, 5, SAMPLING, weight_version=4)
    assert (sample.response_ids, sample.rollout_log_probs) == ([11, 2], [-0.5, -1.25])
    assert (sample.finish_reason, sample.group_id, sample.weight_versions) == ("stop", 5, [(4, 2)])
    assert torch.equal(sample.topk_ids, torch.tensor([[11, 4], [9, 2]]))
    assert torch.equal(sample.topk_log_probs, torch.tensor([[-0.5, -1.5], [-0.75, -1.25]]))


def test_a_response_that_the_server_ended_for_its_own_reason_is_refused():
    with pytest.raises(RolloutError, match="add that id to stop_token_ids"):
        parse_response(_answer(finish_reason={"type": "stop", "matched": 9}), PROMPT, 0, SAMPLING, 4)


def test_tokens_drawn_by_other_weights_are_refused():
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    with pytest.raises(RolloutError, match="train/sum/3: drawn by weights version '3'"):
        parse_response(_answer(weight_versions=spans), PROMPT, 0, SAMPLING, 4)


def test_log_probs_of_other_tokens_than_the_output_are_refused():
    with pytest.raises(RolloutError, match="not those of its output tokens"):
        parse_response({**ANSWER, "output_ids": [11, 3]}, PROMPT, 0, SAMPLING, 4)


@pytest.mark.parametrize("log_prob", [math.nan, -math.inf, 0.5])
def test_impossible_log_probs_are_refused(log_prob):
    broken = [[log_prob, 11, None], [-1.25, 2, None]]
    with pytest.raises(InvalidSampleError, match=r"train/sum/3: token 0 \(id 11\)"):
        parse_response(_answer(output_token_logprobs=broken), PROMPT, 0, SAMPLING, 4)


def test_a_null_log_prob_names_its_sample_and_token():
    """JSON has no NaN: the server writes null."""
    broken = [[-0.5, 11, None], [None, 2, None]]
    with pytest.raises(InvalidSampleError, match=r"train/sum/3: token 1 \(id 2\) has rollout log-prob null"):
        parse_response(_answer(output_token_logprobs=broken), PROMPT, 0, SAMPLING, 4)
    topk = [[[-0.5, 11, None], [None, 4, None]], [[-0.75, 9, None], [-1.25, 2, None]]]
    with pytest.raises(InvalidSampleError, match=r"train/sum/3: .*\(id 4\) has rollout log-prob null"):
        parse_response(_answer(output_top_logprobs=topk), PROMPT, 0, SAMPLING, 4)


def test_too_few_top_log_probs_are_refused():
    short = [[[-0.5, 11, None]], [[-0.75, 9, None], [-1.25, 2, None]]]
    with pytest.raises(InvalidSampleError, match="train/sum/3: token 0 has 1 top log-probs, not the 2 asked for"):
        parse_response(_answer(output_top_logprobs=short), PROMPT, 0, SAMPLING, 4)


@pytest.mark.parametrize(
    "meta",
    [
        {"output_token_logprobs": None},
        {"output_token_logprobs": [[-0.5, None, None], [-1.25, 2, None]]},
        {"output_token_logprobs": [None, None]},
        {"output_token_logprobs": [["-half", 11, None], [-1.25, 2, None]]},
        {"output_top_logprobs": None},
        {"output_top_logprobs": [None, [[-0.75, 9, None], [-1.25, 2, None]]]},
        {"finish_reason": None},
        {"weight_versions": None},
        {"weight_versions": [{"version": "4", "start": None, "end": 2}]},
    ],
)
def test_an_answer_of_another_form_is_an_error_that_names_the_sample(meta):
    with pytest.raises(RolloutError, match="sample of train/sum/3: the server's answer is not of the form"):
        parse_response(_answer(**meta), PROMPT, 0, SAMPLING, 4)


@pytest.mark.parametrize("field", ["output_token_logprobs", "output_top_logprobs", "finish_reason", "weight_versions"])
def test_an_answer_without_a_field_is_an_error_that_names_both(field):
    answer = copy.deepcopy(ANSWER)
    del answer["meta_info"][field]
    with pytest.raises(RolloutError, match=f"sample of train/sum/3: the server's answer has no '{field}'"):
        parse_response(answer, PROMPT, 0, SAMPLING, 4)


@pytest.mark.parametrize("answer", ["a text", None, {"meta_info": None}, {"meta_info": {"finish_reason": None}}])
def test_what_is_no_generation_at_all_is_no_type_error(answer):
    with pytest.raises(RolloutError, match="/generate: the server's answer"):
        was_aborted(answer)


@pytest.mark.parametrize("info", [None, "a text", {"device": "cpu"}, {"tp_size": None, "device": "cpu"}])
def test_server_info_of_another_form_is_an_error_that_names_the_server(info):
    with pytest.raises(RolloutError, match="http://a:1/server_info: the server's answer"):
        ServerFacts.of("http://a:1", info)


ROUTING = RoutingShape(layers=2, experts=4, experts_per_token=2)
# [prompt of 3 + response of 2 - 1, layers, experts per token]
EXPERTS = torch.tensor([[[0, 1], [3, 2]], [[1, 2], [3, 0]], [[2, 3], [0, 1]], [[3, 0], [1, 2]]], dtype=torch.int32)


def _encoded(experts: torch.Tensor) -> str:
    return base64.b64encode(experts.numpy().tobytes()).decode()


def test_expert_choices_are_read_when_they_were_asked_for():
    assert build_request(PROMPT, SAMPLING, seed=1)["return_routed_experts"] is False
    sampling = dataclasses.replace(SAMPLING, return_routed_experts=True)
    assert build_request(PROMPT, sampling, seed=1)["return_routed_experts"] is True
    sample = parse_response(_answer(routed_experts=_encoded(EXPERTS)), PROMPT, 0, sampling, 4, ROUTING)
    assert sample.routed_experts.dtype == torch.int32
    assert torch.equal(sample.routed_experts, EXPERTS)


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        (None, RolloutError, "returned no expert choices.*--enable-return-routed-experts"),
        ("no base64!", RolloutError, "not base64"),
        (
            _encoded(EXPERTS[:3]),
            RolloutError,
            r"48 bytes of expert choices, expected int32 numbers of shape \(4, 2, 2\)",
        ),
        (_encoded(EXPERTS + 4), RolloutError, "chose expert 7 of 4"),
        (_encoded(EXPERTS * 0), InvalidSampleError, r"token 0 in layer 0 is \[0, 0\], not 2 different experts"),
    ],
)
def test_missing_or_wrong_expert_choices_are_refused(field, error, message):
    with pytest.raises(error, match=f"train/sum/3: .*{message}"):
        parse_response(_answer(routed_experts=field), PROMPT, 0, SAMPLING, 4, ROUTING)


def test_a_dense_policy_has_no_expert_choices(tmp_path):
    tiny_hf_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this policy is dense"):
        SGLangEngine(
            SGLangConfig(),
            tmp_path,
            vocab_size=250,
            dtype=torch.float32,
            log_folder=tmp_path,
            return_routed_experts=True,
        )


@pytest.mark.parametrize("token_ids", [(), (3, 250), (-1,)])
def test_prompts_that_would_end_the_server_are_never_sent(token_ids):
    with pytest.raises(ValueError, match="prompt bad"):
        check_request([Prompt("good", (1, 249)), Prompt("bad", token_ids)], SAMPLING, vocab_size=250)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_servers", 0),
        ("sync_timeout_s", -1.0),
        ("request_timeout_s", 7200.0),
        ("verify", "maybe"),
        ("dtype", "bf16"),
        ("urls", ["10.0.0.1:30000"]),
        ("urls", ["http://a:1", "http://a:1"]),
        ("base_gpu_id", -1),
        ("host", ""),
    ],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(ValueError, match=f"SGLangConfig.{field}"):
        SGLangConfig(**{field: value}).check()


def test_a_timeout_that_could_never_pass_is_refused_with_the_remedy():
    SGLangConfig(request_timeout_s=99.0, generate_timeout_s=100.0).check()
    with pytest.raises(ConfigError, match="Lower request_timeout_s or raise generate_timeout_s"):
        SGLangConfig(request_timeout_s=100.0, generate_timeout_s=100.0).check()


def test_servers_take_the_gpus_after_the_trainers(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = SGLangConfig(tensor_model_parallel_size=2)
    assert [first_gpu(config, index, gpu_count=8) for index in (0, 1)] == [4, 6]
    assert first_gpu(SGLangConfig(base_gpu_id=0), 0, gpu_count=1) == 0
    shared = SGLangConfig(tensor_model_parallel_size=2, colocated=True)
    assert [first_gpu(shared, index, gpu_count=4) for index in (0, 1)] == [0, 2]
    with pytest.raises(ValueError, match="server 2 needs GPUs 8 to 9, but this machine has 8"):
        first_gpu(config, 2, gpu_count=8)


def test_servers_on_shared_gpus_all_have_to_be_there():
    assert SGLangConfig(num_servers=4, min_servers=2).fewest_servers == 2
    assert SGLangConfig(num_servers=4, min_servers=2, colocated=True).fewest_servers == 4
