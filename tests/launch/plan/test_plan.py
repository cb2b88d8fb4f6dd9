"""The plan of a recipe: what is known of its memory otherwise, what is refused, and what helps against it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from megatron_dppo.cli import main
from megatron_dppo.launch.plan.hardware import GPUS, Assumptions
from megatron_dppo.launch.plan.memory import Memo, Setting, memory_of_stages, micro_batches_in_flight
from megatron_dppo.launch.plan.plan import Plan, changed, make_plan
from megatron_dppo.launch.plan.rank_plan import kept
from megatron_dppo.launch.plan.remedies import Remedy, find_remedies
from megatron_dppo.launch.plan.search import search
from megatron_dppo.launch.plan.servers import kv_bytes_per_token, planned_servers, touched_share
from megatron_dppo.launch.plan.tables import as_json, print_plan
from megatron_dppo.models.hf.config import check_policy_fits, load_hf_config
from megatron_dppo.training.config.load import load_config
from tests.launch.plan.recipes import DENSE, H100_RECIPE, MOE, QUICKSTART, model_folder
from tests.models.published_configs import QWEN3_30B_A3B

SERVERS = "rollout.sglang.urls=[http://a:1,http://b:1]"
LONG = {**QWEN3_30B_A3B, "max_position_embeddings": 40960}


def _planned(
    fields: dict[str, Any], world_size: int, *overrides: str, recipe=QUICKSTART, memo: Memo | None = None
) -> Plan:
    return make_plan(
        load_config(recipe, overrides),
        load_hf_config(fields),
        world_size=world_size,
        gpus_per_node=8,
        gpu=GPUS["h100"],
        assume=Assumptions(),
        memo=memo,
    )


@pytest.mark.parametrize(
    ("layout", "sharded", "gigabytes"),
    [
        ({"tensor_model_parallel_size": 4, "expert_model_parallel_size": 16}, True, 14.0),
        ({"tensor_model_parallel_size": 4, "expert_model_parallel_size": 16}, False, 39.7),
        ({"tensor_model_parallel_size": 2, "context_parallel_size": 2, "expert_model_parallel_size": 16}, True, 16.3),
    ],
)
def test_what_is_kept_is_what_docs_layouts_says(layout, sharded, gigabytes):
    config = load_config(H100_RECIPE)
    for name, value in {**layout, "use_distributed_optimizer": sharded}.items():
        config = changed(config, f"parallel.{name}", value)
    assert kept(config, load_hf_config(LONG), 512, 0).total / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert not dist.is_initialized()


def test_ranks_of_a_stage_hold_the_same():
    config = load_config(
        QUICKSTART, ["parallel.pipeline_model_parallel_size=2", "parallel.use_distributed_optimizer=true"]
    )
    hf_config = load_hf_config(MOE)
    of_ranks = [kept(config, hf_config, 8, rank) for rank in range(8)]
    for stage in (of_ranks[:4], of_ranks[4:]):
        # The last of those that share a buffer may have less of it to update.
        assert (
            len({(k.dense.parameters, k.experts.parameters, k.dense.gradients, k.experts.gradients) for k in stage})
            == 1
        )
        assert max(k.total for k in stage) - min(k.total for k in stage) < 0.02 * stage[0].total
    assert of_ranks[0].groups.values == [8]
    assert of_ranks[0].dense.parameters + of_ranks[4].dense.parameters == sum(k.dense.parameters for k in of_ranks) / 4


@pytest.mark.parametrize(
    "recompute",
    [{}, {"granularity": "full"}, {"granularity": "full", "method": "block", "num_layers": 2},
     {"granularity": "full", "method": "block", "num_layers": 5}, {"granularity": "full", "num_layers": 2}],
    ids=str,
)  # fmt: skip
def test_two_depths_foretell_a_third(recompute):
    deep = {**MOE, "num_hidden_layers": 6}
    recomputed = [f"model.recompute.{name}={value}" for name, value in recompute.items()]
    config = load_config(QUICKSTART, ["train.micro_batch_size=2", "algorithm.max_mismatch=0", *recomputed])
    hf_config, setting = load_hf_config(deep), Setting(2, 8)
    (foretold,) = memory_of_stages(config, hf_config, setting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dppo.launch.plan.memory.TRACED_LAYERS", (6, 7))
        (traced,) = memory_of_stages(config, hf_config, setting)
    assert len(traced.traced.passes) == 1
    assert foretold.held == pytest.approx(traced.held, rel=1e-3)
    assert foretold.running == pytest.approx(
        traced.running, rel=1e-2 if recompute else 1e-3
    )  # which layer is the peak's
    flops = [sum(w.flops("matmul") for w in (one.forward, one.backward)) for one in foretold.traced.passes]
    plain = [sum(w.flops("matmul") for w in (one.forward, one.backward)) for one in foretold.traced.plain]
    (whole,) = [sum(w.flops("matmul") for w in (one.forward, one.backward)) for one in traced.traced.passes]
    assert foretold.traced.whole(flops, plain) == pytest.approx(whole, rel=1e-6)
    assert foretold.kept.total == traced.kept.total


@pytest.mark.parametrize(
    ("stages", "chunks", "in_flight"), [(1, 1, [1]), (4, 1, [4, 3, 2, 1]), (2, 2, [5, 3]), (4, 3, [15, 13, 11, 9])]
)
def test_micro_batches_in_flight(stages, chunks, in_flight):
    assert [micro_batches_in_flight(stages, chunks, index) for index in range(stages)] == in_flight


def test_room_of_a_server():
    """By hand: 30.5e9 parameters of 2 bytes on 4 GPUs; 48 layers, one of 4 heads of 128 a GPU, keys and values, 2 bytes."""
    hf_config, gpu = load_hf_config(LONG), GPUS["h100"]
    config = load_config(H100_RECIPE, ['rollout.sglang.extra_args=["--mem-fraction-static","0.8"]'])
    servers = planned_servers(config, hf_config, gpu, Assumptions())
    assert servers is not None
    assert servers.kv_bytes == 48 * 128 * 2 * 2
    assert servers.weights == pytest.approx(30.53e9 * 2 / 4, rel=1e-3)
    assert servers.room == pytest.approx(0.8 * gpu.memory - servers.weights)
    assert servers.tokens == int(servers.room / servers.kv_bytes)
    assert kv_bytes_per_token(hf_config, 16, 2) == kv_bytes_per_token(hf_config, 4, 2)  # heads are repeated
    assert touched_share(hf_config, 1) == pytest.approx(8 / 128)
    assert touched_share(hf_config, 1000) == pytest.approx(1)


@pytest.fixture(scope="module")
def memo() -> Memo:
    return Memo()


@pytest.fixture(scope="module")
def recipe_on_16(memo) -> Plan:
    return _planned(LONG, 16, SERVERS, recipe=H100_RECIPE, memo=memo)


def test_a_recipe_that_fits(recipe_on_16):
    made = as_json(recipe_on_16, [], None)
    assert made["fits"]
    (stage,) = made["stages"]
    # By hand, in the recipe: 3.61e9 x 12 + 0.40e9 x 9.
    state = sum(
        sum(stage[kind][part] for part in ("weights", "gradients", "optimizer")) for kind in ("dense", "experts")
    )
    assert state / 1e9 == pytest.approx(47.0, abs=0.1)
    assert stage["on_device"] < made["gpu_bytes"]
    phases = made["step"]["phases"]
    assert list(phases) == ["generate", "score", "hand-over", "update", "optimizer", "sync"]
    assert sum(phases.values()) == pytest.approx(made["step"]["total"])
    assert made["step"]["within_update"]["messages"] > 0
    assert 0.02 < made["step"]["update_mfu"] < 0.6
    assert made["assumptions"]["network"] == 45e9
    json.dumps(made)


def test_an_assumption_changes_what_it_is_about(recipe_on_16):
    slower = replace(recipe_on_16, assume=replace(recipe_on_16.assume, hbm_share=0.4))
    before, after = recipe_on_16.step.within_update, slower.step.within_update
    assert after["other"] == pytest.approx(2 * before["other"])
    assert after["messages"] == before["messages"]


def test_servers_that_are_too_small(recipe_on_16, memo):
    small = replace(
        recipe_on_16,
        config=changed(recipe_on_16.config, "rollout.sglang.tensor_model_parallel_size", 1),
        assume=replace(recipe_on_16.assume, server_fraction=0.7),
    )
    (problem,) = small.problems
    assert problem.what.startswith("a server's GPU holds 61.1 GB of weights and has 0.0 GB left")
    (remedy,) = find_remedies(small, memo)
    assert remedy.settings == ("rollout.sglang.tensor_model_parallel_size=2",)
    assert remedy.fits


def test_the_tables_name_the_layout_the_sizes_and_the_assumptions(recipe_on_16):
    printed = io.StringIO()
    print_plan(recipe_on_16, [], None, Console(file=printed, width=126, highlight=False))
    for text in (
        "16 trainer GPUs of 80 GB, 8 a node: TP 4, EP 8, 4 replicas",
        "optimizer state, experts",
        "KV cache",
        "update",
    ):
        assert text in printed.getvalue()
    assert "matmul_share=0.6" in printed.getvalue()


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """``plan(arguments)`` -> (exit code, output, errors) of the command, for the H100 recipe and a small model"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: str, fields: dict[str, Any] = MOE) -> tuple[int, str, str]:
        model = f"model.path={model_folder(tmp_path / 'model', fields)}"
        code = main(
            ["plan", "--recipe", str(H100_RECIPE), model, SERVERS, "parallel.tensor_model_parallel_size=2", *arguments]
        )
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_one_object(plan):
    code, output, errors = plan(
        "--gpus",
        "16",
        "--json",
        "--gpu",
        "h200",
        "rollout.prompts_per_step=1",
        "train.updates_per_rollout=1",
    )
    assert (code, errors) == (0, "")
    made = json.loads(output)
    assert made["trainer_gpus"] == 16
    assert made["gpu_bytes"] == 141e9
    assert made["search"] is None
    assert made["step"]["idle_servers"] == 0  # of two, which share the one prompt's samples


@pytest.mark.nightly
@pytest.mark.slow
def test_a_recipe_that_does_not_fit_is_told_what_would(plan):
    too_large = [
        "--gpus",
        "8",
        "parallel.tensor_model_parallel_size=4",
        "train.fused_linear=false",
        "model.recompute.granularity=none",
    ]
    code, output, _ = plan(*too_large, "--json", fields=LONG)
    assert code == 1
    made = json.loads(output)
    assert made["step"] is None
    assert "stage 0 of the trainer needs" in made["problems"][0]
    enough = [remedy["settings"] for remedy in made["remedies"] if remedy["fits"]]
    assert enough
    changes = [setting for setting in enough[0] if not setting.startswith("launch.")]
    nodes = [setting for setting in enough[0] if setting.startswith("launch.")]
    gpus = ["--gpus", str(8 * int(nodes[0].partition("=")[2]))] if nodes else []
    assert plan(*too_large, *gpus, *changes, "--json", fields=LONG)[0] == 0


def _remedies(least_memory: float) -> tuple[Plan, dict[tuple[str, ...], Remedy]]:
    """Of a small policy on a GPU that is too small for it."""
    memo = Memo()
    gpu = replace(GPUS["h100"], memory=least_memory)
    layout = ["parallel.expert_tensor_parallel_size=1", "rollout.max_batch_size=8", "algorithm.max_mismatch=0"]
    made = make_plan(
        load_config(QUICKSTART, layout),
        load_hf_config({**MOE, "num_hidden_layers": 2, "vocab_size": 32768}),
        world_size=4,
        gpus_per_node=4,
        gpu=gpu,
        assume=replace(Assumptions(), memory_reserve=0.0, group_bytes=0.0),
        memo=memo,
    )
    assert [problem.where for problem in made.problems] == ["trainer"]
    return made, {remedy.settings: remedy for remedy in find_remedies(made, memo)}


def test_every_setting_that_is_enough_is_named():
    made, found = _remedies(200e6)
    assert ("train.micro_batch_size=64",) in found
    assert ("parallel.context_parallel_size=2",) in found
    for settings, remedy in found.items():
        assert remedy.fits, settings
        assert remedy.plan.on_device(remedy.plan.stages[0]) < 200e6 < made.on_device(made.stages[0])


@pytest.mark.nightly
@pytest.mark.slow
def test_several_settings_that_are_enough_together_are_named():
    _, found = _remedies(60e6)
    ((settings, remedy),) = found.items()
    assert len(settings) > 1
    assert remedy.fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "6"], "does not divide the 6 ranks"),
        (["--gpus", "0"], "at least one GPU has to train"),
        (["launch.gpus_per_node=0"], "launch.gpus_per_node is 0: set it, or give --gpus"),
        (["--gpus", "16", "--assume", "speed=1"], "there is no 'speed'; there are memory_reserve"),
        (["--gpus", "16", "--assume", "network=fast"], "network is a number"),
        (["--gpus", "16", "--assume", "network=0"], "network must be above 0"),
        (["--gpus", "16", "parallel.tensor_model_parallel_size=8"], "num_attention_heads=4 is not divisible"),
        (["--gpus", "16", "train.step=3"], "did you mean `train.steps`"),
        (["--gpus", "16", "model.path=nowhere"], "a plan needs this one file of the model"),
        (["--gpus", "16", "rollout.sglang.extra_args=[--mem-fraction-static]"], "is a number between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(plan, arguments, message):
    code, output, errors = plan(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_search_finds_what_the_trainer_accepts_and_what_fits():
    memo = Memo()
    found = search(
        _planned(DENSE, 4, "parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1", memo=memo),
        memo,
    )
    layouts = [plan.config.parallel for plan in found.plans]
    assert len(set(layouts)) == len(layouts) > 3
    for layout in layouts:
        check_policy_fits(load_hf_config(DENSE), layout, 4)
    assert found.refused > 0  # two key/value heads: no TP 4
    assert all(layout.tensor_model_parallel_size <= 2 for layout in layouts)
    seconds = [plan.step.total for plan in found.plans]
    assert seconds == sorted(seconds)
