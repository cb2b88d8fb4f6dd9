"""NeMo-RL's generation backend and cluster: which GPUs train, which serve, and what servers are started with."""

from __future__ import annotations

from typing import Any

from megatron_dppo.launch.import_config.translation import Translation

_GENERATION = "policy.generation"
_COLOCATED = f"{_GENERATION}.colocated"


def translate(translation: Translation) -> None:
    """Fill in ``rollout.engine``, ``rollout.sglang`` and ``launch``."""
    source, options = translation.source, translation.options
    options["rollout.engine"] = "sglang"
    backend = source.take(f"{_GENERATION}.backend", "vllm")
    if backend != "sglang":
        translation.differs[f"{_GENERATION}.backend"] = "SGLang serves here; its log-probs are the anchor"
    size, experts, memory = _server(translation)
    options["rollout.sglang.tensor_model_parallel_size"] = size
    arguments = ["--ep-size", str(experts)] if experts > 1 else []
    if memory is not None:
        arguments += ["--mem-fraction-static", str(memory)]
        translation.differs[f"{_GENERATION}.vllm_cfg.gpu_memory_utilization"] = (
            "SGLang's share is of weights and KV cache alone, activations come on top"
        )
    options["rollout.sglang.extra_args"] = arguments
    _nodes(translation, size)


def _server(translation: Translation) -> tuple[int, int, Any]:
    """(GPUs, expert parallelism, share of a GPU's memory) of a server."""
    source = translation.source
    sections = ("vllm_cfg", "sglang_cfg")

    def first(names: tuple[str, ...]) -> Any:
        keys = [f"{_GENERATION}.{section}.{name}" for section in sections for name in names]
        return next((value for value in map(source.take, keys) if value is not None), None)

    tensor, experts = first(("tensor_parallel_size", "tp_size")) or 1, first(("expert_parallel_size", "ep_size")) or 1
    translation.drop({f"{_GENERATION}.vllm_cfg.pipeline_parallel_size": "servers have no pipeline stages"})
    if translation.source.take(f"{_GENERATION}.vllm_cfg.pipeline_parallel_size", 1) == 1:
        translation.missing.pop(f"{_GENERATION}.vllm_cfg.pipeline_parallel_size", None)
    for key in ("precision", "kv_cache_dtype"):
        if source.take(f"{_GENERATION}.vllm_cfg.{key}", "auto") in ("fp8", "fp8_e4m3"):
            translation.missing[f"{_GENERATION}.vllm_cfg.{key}"] = "servers compute in the trainer's dtype"
    return int(tensor), min(int(experts), int(tensor)), first(("gpu_memory_utilization", "mem_fraction_static"))


def _nodes(translation: Translation, size: int) -> None:
    source, options = translation.source, translation.options
    nodes, gpus = int(source.take("cluster.num_nodes", 1)), int(source.take("cluster.gpus_per_node", 1))
    own_nodes = source.take(f"{_COLOCATED}.resources.num_nodes")
    own_gpus = source.take(f"{_COLOCATED}.resources.gpus_per_node")
    options["launch.gpus_per_node"] = gpus
    if source.take(f"{_COLOCATED}.enabled", True):
        if nodes == 1:
            options |= {"launch.trainer_nodes": 1, "rollout.sglang.colocated": True}
            options["rollout.sglang.num_servers"] = max(1, gpus // size)
            return
        translation.missing[f"{_COLOCATED}.enabled"] = (
            f"trainer and servers share GPUs on one host only: here {nodes} nodes train and as many more serve; change both"
        )
        trainers, servers = nodes, nodes
    elif nodes == 1:
        options |= {"launch.trainer_nodes": 1, "rollout.sglang.num_servers": max(1, int(own_gpus or gpus // 2) // size)}
        return
    else:
        servers = int(own_nodes or 1)
        trainers = max(1, nodes - servers)
    options |= {"launch.trainer_nodes": trainers, "launch.server_nodes": servers}
    options["rollout.sglang.num_servers"] = max(1, servers * gpus // size)
