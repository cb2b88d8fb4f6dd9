"""The manifest for Kubernetes: what its documents are made of. No cluster has seen it."""

from __future__ import annotations

import pytest
import yaml

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.kubernetes import manifest
from tests.launch.jobs import job_on_gpus

IMAGE = "launch.container.image=site/dppo:1"


def documents(*overrides: str) -> list[dict]:
    return list(yaml.safe_load_all(manifest(job_on_gpus(IMAGE, *overrides))))


def test_trainer_and_servers_are_indexed_jobs_that_find_each_other() -> None:
    service, trainer, servers = documents()
    assert (service["kind"], service["metadata"]["name"], service["spec"]["selector"]) == (
        "Service",
        "first",
        {"job-name": "first"},
    )
    assert (trainer["spec"]["completions"], servers["spec"]["completions"]) == (2, 1)
    (pod,) = trainer["spec"]["template"]["spec"]["containers"]
    assert pod["command"][pod["command"].index("--head") + 1] == "first-0.first"
    assert pod["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    (server,) = servers["spec"]["template"]["spec"]["containers"]
    registry = server["command"][server["command"].index("--registry") + 1]
    assert pod["command"][-1] == f"rollout.sglang.registry={registry}"


def test_a_pod_that_has_saved_is_started_again_and_one_that_cannot_work_is_not() -> None:
    _, trainer, _ = documents("launch.max_restarts=5", "launch.warning_s=77")
    assert trainer["spec"]["backoffLimit"] == 10  # of two pods
    (rule,) = trainer["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert trainer["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 77


def test_servers_larger_than_a_node_have_addresses() -> None:
    kinds = documents("rollout.sglang.tensor_model_parallel_size=16", "launch.server_nodes=4")
    assert [(d["kind"], d["metadata"]["name"]) for d in kinds] == [
        ("Service", "first"),
        ("Service", "first-servers"),
        ("Job", "first"),
        ("Job", "first-servers"),
    ]
    command = kinds[-1]["spec"]["template"]["spec"]["containers"][0]["command"]
    addresses = command[command.index("--addresses") + 1].split(",")
    assert addresses == [f"first-servers-{node}.first-servers" for node in range(4)]


def test_what_kubernetes_would_expand_reaches_the_process_as_it_is() -> None:
    _, trainer, _ = documents("launch.env={MINE: 'a $(HOME) \"b\": c'}")
    (pod,) = trainer["spec"]["template"]["spec"]["containers"]
    assert {"name": "MINE", "value": 'a $$(HOME) "b": c'} in pod["env"]


def test_an_image_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"launch\.container\.image"):
        manifest(job_on_gpus())
