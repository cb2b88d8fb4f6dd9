"""A sample that training must not see is refused with an error that names it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dppo.errors import InvalidSampleError
from megatron_dppo.rollout.sample import Prompt, Sample, SamplingParams


def sample(**changes) -> Sample:
    fields = {
        "prompt": Prompt("train/7", (1, 2)),
        "response_ids": [3, 4, 5],
        "rollout_log_probs": [-0.5, -1.0, 0.0],
        "finish_reason": "length",
        "weight_versions": [(2, 1), (3, 2)],
        "topk_ids": torch.zeros(3, 2, dtype=torch.int64),
        "topk_log_probs": torch.zeros(3, 2),
    }
    return Sample(**{**fields, **changes})


def experts(token_2_layer_1: tuple[int, int] = (5, 1)) -> torch.Tensor:
    """[prompt + response - 1, layers, experts per token]"""
    choices = torch.tensor([3, 0], dtype=torch.int32).repeat(4, 2, 1)
    choices[2, 1] = torch.tensor(token_2_layer_1)
    return choices


def test_a_good_sample_passes_and_knows_its_parts():
    good = sample(routed_experts=experts())
    good.check()
    assert good.token_ids == [1, 2, 3, 4, 5]
    assert good.oldest_weight_version == 2


def test_a_log_prob_slightly_above_zero_is_rounding():
    rounded = sample(rollout_log_probs=[1e-6, -1.0, -2.0])
    rounded.check()
    assert rounded.rollout_log_probs[0] == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": [], "rollout_log_probs": []}, "response is empty"),
        ({"rollout_log_probs": [-1.0, -1.0]}, "2 log-probs for 3 response tokens"),
        ({"rollout_log_probs": [-1.0, math.nan, -1.0]}, r"token 1 \(id 4\) has rollout log-prob nan"),
        ({"rollout_log_probs": [-1.0, -1.0, -math.inf]}, r"token 2 \(id 5\) has rollout log-prob -inf"),
        ({"rollout_log_probs": [0.1, -1.0, -1.0]}, r"token 0 \(id 3\) has rollout log-prob 0.1"),
        ({"weight_versions": [(2, 2)]}, "do not cover its 3 tokens"),
        ({"topk_ids": torch.zeros(2, 2)}, r"topk_ids has shape \(2, 2\), expected \[3, K\]"),
        ({"topk_log_probs": torch.zeros(3)}, r"topk_log_probs has shape \(3,\)"),
        ({"topk_log_probs": None}, "must come together"),
        ({"routed_experts": experts()[:3]}, r"routed_experts has shape \(3, 2, 2\), expected \[4 tokens"),
        ({"routed_experts": experts().flatten(1)}, r"routed_experts has shape \(4, 4\)"),
        (
            {"routed_experts": experts(token_2_layer_1=(0, 0))},
            r"token 2 in layer 1 is \[0, 0\], not 2 different experts",
        ),
        ({"routed_experts": experts(token_2_layer_1=(-1, 3))}, r"token 2 in layer 1 is \[-1, 3\]"),
    ],
)
def test_what_training_must_not_see_is_refused_by_name(changes, message):
    with pytest.raises(InvalidSampleError, match=message) as error:
        sample(**changes).check()
    assert "train/7" in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"samples_per_prompt": 0}, {"topk_log_probs": -1}]
)
def test_wrong_sampling_parameters_are_refused_by_name(changes):
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=f"SamplingParams.{name}"):
        SamplingParams(**{"max_new_tokens": 1, **changes})
