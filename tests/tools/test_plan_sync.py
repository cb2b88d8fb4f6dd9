"""tools/plan_sync.py: what it plans is what ranks do, and its arithmetic is that of its description."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.launch.plan.sync_cost import Rates, forecast, places_of_one_copy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.export import Bucket, ExportPlan, NamedShape, PolicyWeights
from tests.models.policy_runs import loaded_policy
from tests.models.published_configs import QWEN3_30B_A3B
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rank_pool import RankPools

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "plan_sync.py"))
OPTIONS = {"dtype": torch.float32, "bucket_bytes": 8192, "max_senders": 4}
# Everything else takes no time.
FREE = Rates(network=1e30, gather=1e30, message=0, copy=1e30, hash=1e30, call=0, load=1e30, tensor=0, checksum=1e30)


def _bucket(sender: int, elements: int) -> Bucket:
    return Bucket(sender, (sender,), (NamedShape("w", (elements,)),))


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        ({"network": 100.0}, 8.0),  # 4 buckets of 50 elements, 4 bytes each
        ({"load": 100.0}, 8.0),
        ({"call": 1.0}, 11.0),  # 4 buckets, 6 control calls, the checksum
        ({"tensor": 1.0}, 4.0),
        ({"checksum": 100.0}, 4.0),  # two ranks
        ({"copy": 100.0}, 4.0),  # two senders at the same time
        ({"copy": 100.0, "network": 100.0}, 10.0),  # while one is on its way, the next is put together
        ({"hash": 100.0, "network": 100.0}, 8.0),  # each is hashed while it is on its way, or waits
        ({"gather": 10.0}, 4.0),
        ({"message": 1.0}, 4.0),
    ],
)
def test_what_overlaps_is_counted_once(rates: dict[str, float], seconds: float) -> None:
    buckets = [_bucket(sender, 50) for sender in (0, 1, 0, 1)]
    expected = forecast(buckets, [(2, 20)] * 4, 4, 2, replace(FREE, **rates))
    assert expected.total == pytest.approx(seconds)


def _buckets(folder: str, layout: dict[str, Any]) -> list[Bucket]:
    return PolicyWeights(loaded_policy(folder, layout)).buckets(**OPTIONS)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
    ],
)
def test_the_planned_buckets_are_those_of_the_ranks(layout: dict[str, Any], ranks: RankPools, tmp_path: Path) -> None:
    write_tiny_hf_model("qwen3_moe", tmp_path)
    hf_config = load_hf_config(tmp_path)
    places = places_of_one_copy(ParallelConfig(**layout), hf_config.num_hidden_layers)
    planned = ExportPlan(hf_config, places).buckets(**OPTIONS)
    assert ranks(2).run(_buckets, str(tmp_path), layout) == [planned, planned]


def test_the_recipe_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fields = {"architectures": ["Qwen3MoeForCausalLM"], "eos_token_id": 151645, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B | fields))
    recipe = str(ROOT / "examples" / "conf" / "qwen3_30b_a3b.yaml")
    monkeypatch.setattr("sys.argv", ["plan_sync.py", recipe, f"model.path={tmp_path}"])
    assert TOOL["main"]() == 0
    printed = capsys.readouterr().out
    assert "61.1 GB in 18867 tensors (MoE)" in printed
    assert float(printed.split("all, overlapped")[1].split()[1]) < 6
