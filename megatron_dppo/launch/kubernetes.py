"""The manifest of a job on Kubernetes, for `kubectl apply -f`; nothing here talks to a cluster.

The trainer is an indexed Job, whose pods meet at the first one's name; a pod that ends with exit code 75 (saved, start me
again), or because another one has failed, is started again. Servers are a second indexed Job, which ends when the first has
said that it is done. Pods are told to stop by SIGTERM and have ``launch.warning_s`` to save.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_dppo.errors import EXIT_BAD_INPUT, EXIT_STOPPED, ConfigError
from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.job import Job

_PORT = 29500
_INDEX = "JOB_COMPLETION_INDEX"  # Kubernetes tells each pod of an indexed job its number by this name


def manifest(job: Job) -> str:
    """YAML documents. Raises ConfigError without an image."""
    if job.launch.container.image is None:
        raise ConfigError("launch.executor=kubernetes needs an image with this package: set launch.container.image")
    name = re.sub(r"[^a-z0-9-]+", "-", job.name.lower()).strip("-")[:40] or "run"
    documents = [_service(job, name), _trainer(job, name)]
    if job.serving:
        documents += [_servers(job, name)]
        if job.serving.nodes_per_server > 1:
            documents.insert(1, _service(job, f"{name}-servers"))
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _metadata(job: Job, name: str) -> dict[str, Any]:
    namespace = {"namespace": job.launch.kubernetes.namespace} if job.launch.kubernetes.namespace else {}
    return {"name": name, **namespace}


def _service(job: Job, name: str) -> dict[str, Any]:
    """Gives the pods of the job of the same name addresses."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, name),
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
    }


def _trainer(job: Job, name: str) -> dict[str, Any]:
    command = job.trainer_command(
        head=f"{name}-0.{name}",
        port=str(job.launch.port or _PORT),
        attempt=_attempt(job),
        node_rank=["--node-rank-variable", _INDEX],
    )
    document = _indexed_job(job, name, job.launch.trainer_nodes, _container(job, TRAINER, command))
    fatal = {"operator": "In", "values": [EXIT_BAD_INPUT, EXIT_STOPPED]}
    document["spec"]["podFailurePolicy"] = {
        "rules": [{"action": "FailJob", "onExitCodes": {"containerName": TRAINER, **fatal}}]
    }
    return document


def _servers(job: Job, name: str) -> dict[str, Any]:
    assert job.serving is not None
    own = f"{name}-servers"
    addresses = ",".join(f"{own}-{node}.{own}" for node in range(job.serving.nodes))
    sharing = ["--node-variable", _INDEX, "--end-with", _attempt(job)]
    if job.serving.nodes_per_server > 1:
        place = ["--addresses", addresses, "--port", str((job.launch.port or _PORT) + 1)]
        sharing += ["--nodes-per-server", str(job.serving.nodes_per_server), *place]
    command = job.server_command(attempt=_attempt(job), arguments=[], sharing=sharing)
    return _indexed_job(job, own, job.serving.nodes, _container(job, SERVER, command))


def _attempt(job: Job) -> str:
    """One folder for all starts: pods are started one by one, and take the names of those before them."""
    return str(job.folder / "kubernetes")


def _indexed_job(job: Job, name: str, pods: int, container: dict[str, Any]) -> dict[str, Any]:
    settings = job.launch.kubernetes
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": settings.claim}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
    ]
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.launch.warning_s,
        "containers": [container],
        "volumes": volumes,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, name),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": job.launch.max_restarts * pods,  # each start again of the run is one of every pod
            "template": {"metadata": {"labels": {"app": "megatron-dppo"}}, "spec": pod},
        },
    }


def _container(job: Job, role: str, command: list[str]) -> dict[str, Any]:
    settings = job.launch.kubernetes
    container: dict[str, Any] = {
        "name": role,
        "image": job.launch.container.image,
        "workingDir": str(job.directory),
        # Kubernetes expands $(NAME) in what follows; $$ is a dollar sign.
        "command": [word.replace("$(", "$$(") for word in command],
        "env": [
            {"name": variable.name, "value": variable.value.replace("$(", "$$(")} for variable in job.environment[role]
        ],
        "volumeMounts": [{"name": "shared", "mountPath": settings.mount}, {"name": "memory", "mountPath": "/dev/shm"}],
    }
    if settings.secret:
        container["envFrom"] = [{"secretRef": {"name": settings.secret}}]
    if job.launch.gpus_per_node:
        container["resources"] = {"limits": {settings.gpu_resource: job.launch.gpus_per_node}}
    return container
