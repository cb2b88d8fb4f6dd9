"""What the trace of a micro-batch counts, against what is known of it otherwise."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_dppo.compat.megatron_on_meta import even_routing
from megatron_dppo.launch.plan.rank_plan import Pass, Setting, Stage, traced_pass
from megatron_dppo.launch.plan.trace import Trace, message
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.training.config.load import load_config
from tests.launch.plan.recipes import DENSE, MOE, QUICKSTART

LENGTH = 64
ONE_RANK = ["parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1"]
SHORT = [
    "rollout.max_prompt_tokens=16",
    f"rollout.max_response_tokens={LENGTH - 16}",
    "train.micro_batch_size=2",
    "algorithm.max_mismatch=0",
]
WHOLE = Stage(first=True, last=True)


def _pass(fields: dict, *overrides: str, setting: Setting | None = None) -> Pass:
    config = load_config(QUICKSTART, [*ONE_RANK, *SHORT, *overrides])
    setting = setting or Setting(1, prompt_tokens=1)
    return traced_pass(config, load_hf_config(fields), setting, WHOLE, fields["num_hidden_layers"])


def test_memory_is_that_of_tensors_that_live():
    existing = torch.empty(1000)
    with Trace(8, [existing]) as trace:
        existing.view(10, 100).mul_(2)
        assert (trace.live, trace.peak) == (0, 0)
        a = torch.empty(256)
        b = a + 1
        assert trace.live == 2 * 1024
        del a
        assert trace.live == 1024
        c = b.view(16, 16).t()
        del b
        assert trace.live == 1024
        del c
    assert (trace.live, trace.peak) == (0, 2 * 1024)


@pytest.mark.parametrize("fields", [DENSE, MOE], ids=["dense", "MoE"])
def test_operations_are_those_of_the_formula(fields):
    """models/flops.py counts neither the router nor the padding of the vocabulary."""
    counted = _pass(fields)
    flops = PolicyFlops.of(load_hf_config(fields))
    head = 2 * fields["hidden_size"]
    tokens = counted.tokens
    learned = 2 * (LENGTH - 1)  # logits are made of response tokens only
    router = 2 * fields["hidden_size"] * fields.get("num_experts", 0) * fields["num_hidden_layers"] * tokens
    rows = -(-fields["vocab_size"] // 128) * 128
    layers = (flops.per_token - head * fields["vocab_size"]) * tokens + router
    expected = layers + head * rows * learned
    assert counted.forward.flops("matmul") == layers
    assert counted.forward.flops("matmul") + counted.backward.flops("matmul") == pytest.approx(3 * expected, rel=1e-6)
    pairs = 2 * LENGTH * (LENGTH + 1) / 2
    assert counted.forward.flops("attention") == flops.per_pair * pairs
    assert counted.backward.flops("attention") == 2.5 * flops.per_pair * pairs  # scores are computed again


def test_products_are_counted_as_torch_counts_them():
    a, b, c = (torch.empty(size, device="meta") for size in ((3, 5), (5, 7), (3, 7)))
    stack = torch.empty(4, 3, 5, device="meta"), torch.empty(4, 5, 7, device="meta")

    def products() -> None:
        a @ b
        torch.mm(a, b, out=c)
        torch.addmm(c, a, b)
        torch.bmm(*stack)
        torch.nn.functional.linear(stack[0], b.t())

    with FlopCounterMode(display=False) as counter:
        products()
    with Trace(8) as trace:
        products()
    assert trace.work.flops("matmul") == counter.get_total_flops()
    with Trace(8) as trace:
        c.addmm_(a, b)  # which torch does not count
    assert trace.work.flops("matmul") == 2 * 3 * 5 * 7


def test_recomputed_layers_run_forward_again_and_keep_their_input_only():
    plain, recomputed = _pass(DENSE), _pass(DENSE, "model.recompute.granularity=full")
    again = recomputed.backward.flops("matmul") - plain.backward.flops("matmul")
    assert again == plain.forward.flops("matmul")
    assert recomputed.held < plain.held / 3


def test_fused_logits_never_exist_as_a_whole():
    wide = {**DENSE, "vocab_size": 131072}
    logits = 2 * (LENGTH - 1) * 131072 * 4
    assert _pass(wide).head > logits
    assert _pass(wide, "train.fused_linear=true", "train.micro_batch_size=2").head < _pass(wide).head


def test_experts_with_more_than_their_share_take_more():
    def on_two(load: float) -> Pass:
        layout = ["parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1"]
        return _pass(MOE, *layout, setting=Setting(2, 8, prompt_tokens=1, expert_load=load))

    even, loaded = on_two(1.0), on_two(1.5)
    assert loaded.held > even.held
    assert 1 < loaded.forward.flops("matmul") / even.forward.flops("matmul") < 1.5


@pytest.mark.parametrize("load", [0.5, 1.0, 1.3, 2.0])
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "own"), [(97, 16, 4, range(4, 8)), (50, 8, 2, range(8)), (9, 4, 3, range(1))]
)
def test_a_routing_gives_experts_their_share(load, tokens, experts, topk, own):
    routing = even_routing(tokens, experts, topk, own, load)
    assert routing.sum(1).tolist() == [topk] * tokens
    of_experts = routing.sum(0)
    wanted = load * tokens * topk * len(own) / experts
    possible = min(max(wanted, tokens * max(0, topk - experts + len(own))), tokens * min(topk, len(own)))
    assert int(of_experts[list(own)].sum()) == pytest.approx(possible, abs=1)
    assert int(of_experts[list(own)].max() - of_experts[list(own)].min()) <= 1


def test_what_leaves_a_node_is_told_apart():
    assert message(300.0, range(0, 4), 8, 0) == (300.0, 0.0)
    on_node, away = message(700.0, range(0, 16, 2), 8, 0)  # 3 of the 7 others are on the first node
    assert (on_node, away) == (300.0, 400.0)
    assert message(5.0, [0], 8, 0) == (0.0, 0.0)
