"""An embedded engine over a tiny policy on the ranks at hand, with its Hugging Face twin."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.weights import load_hf_weights
from megatron_dppo.rollout.embedded.engine import EmbeddedEngine
from tests.models.tiny_policies import tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest


def build_tiny_policy(
    kind: str,
    parallel: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    fp32_head: bool = False,
    **overrides: Any,
) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The model chunks of this rank and the Hugging Face model with the same weights. Sets up Megatron's groups."""
    initialize_model_parallel(parallel, seed=1)
    hf_model = tiny_hf_model(kind, seed=0, **overrides)
    model_chunks = build_policy(hf_model.config, parallel, dtype, fp32_head=fp32_head)
    load_from(hf_model, model_chunks)
    return model_chunks, hf_model


def load_from(hf_model: torch.nn.Module, model_chunks: list[torch.nn.Module]) -> None:
    """Through a checkpoint folder, which transformers writes on rank 0 only."""
    with tempfile.TemporaryDirectory() as own_folder:
        folder = [own_folder]
        dist.broadcast_object_list(folder, src=0)
        hf_model.save_pretrained(folder[0])
        dist.barrier()
        load_hf_weights(model_chunks, folder[0])
        dist.barrier()


class NeverRead:
    """A source of weights that fails the test if anyone asks for one."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError("the embedded engine must not start the export: it already has the weights")


def embedded_subject(
    kind: str, parallel: ParallelConfig, max_batch_size: int = 64, **overrides: Any
) -> EngineUnderTest:
    model_chunks, hf_model = build_tiny_policy(kind, parallel, **overrides)
    engine = EmbeddedEngine(model_chunks, hf_model.config.vocab_size, max_batch_size=max_batch_size)

    def serve(new_hf_model: torch.nn.Module, version: int) -> None:
        load_from(new_hf_model, model_chunks)
        engine.update_weights(NeverRead(), version)

    return EngineUnderTest(engine, hf_model, serve)
