"""Training checkpoint <-> Hugging Face folder, in one process that is a group of one rank, on the CPU.

Layouts do not matter: a checkpoint is read in full whichever layout wrote it, and a run in any layout reads what is written
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_dppo.distributed.layout import initialize_model_parallel
from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.distributed.ranks import joined_ranks
from megatron_dppo.errors import CheckpointError
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import load_hf_weights, save_hf_checkpoint
from megatron_dppo.training.checkpoint.info import CheckpointInfo, TrainerState
from megatron_dppo.training.checkpoint.load import load_weights
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from megatron_dppo.training.config.schema import MODEL_DTYPES
from megatron_dppo.training.policy.trainable import TrainablePolicy

VERIFIED_TOKENS = 32
# fp32 kernels of two libraries differ by some 1e-6 of the largest logit and layer; a wrong weight by 1e-1.
TOLERANCE = 1e-3


def to_hf(checkpoint: Path, folder: Path, *, tokenizer: Path | None, verify: bool) -> None:
    """Write the policy of a training checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a folder ``step_<N>``.
        folder: written; must not exist.
        tokenizer: folder whose tokenizer files are copied.
        verify: compare both models' logits.

    Raises:
        CheckpointError: no checkpoint, or the two are not the same model.
    """
    info = CheckpointInfo.read(checkpoint)
    hf_config = load_hf_config(info.hf_config)
    with _one_rank():
        chunks = build_policy(hf_config, ParallelConfig(), getattr(torch, info.dtype), "cpu")
        load_weights(checkpoint, chunks)
        save_hf_checkpoint(chunks, hf_config, folder, tokenizer_folder=tokenizer, model_folder=tokenizer)
        print(f"{folder}: step {info.trainer.step} of {checkpoint}, {info.dtype}")
        if verify:
            _verify(folder, checkpoint)


def from_hf(folder: Path, checkpoints: Path, *, dtype: str, verify: bool) -> None:
    """Write the checkpoint that a run starts from.

    Args:
        folder: config.json and safetensors.
        checkpoints: ``<run.root>/<run.name>/checkpoints`` of the run to be; gets ``step_00000000``, without optimizer state.
        dtype: the run's ``model.dtype``.
        verify: compare both models' logits.

    Raises:
        CheckpointError: the folder of checkpoints is in use, or the two are not the same model.
    """
    if list(checkpoints.glob("step_*")):
        raise CheckpointError(f"{checkpoints} holds checkpoints already: choose another run.name")
    hf_config = load_hf_config(folder)
    with _one_rank():
        chunks = build_policy(hf_config, ParallelConfig(), MODEL_DTYPES[dtype], "cpu")
        load_hf_weights(chunks, folder)
        with CheckpointWriter(checkpoints, keep=1, asynchronous=False) as writer:
            written = writer.save(TrainablePolicy(chunks, hf_config, MODEL_DTYPES[dtype]), None, TrainerState())
        del chunks
        print(f"{written}: {folder}, {MODEL_DTYPES[dtype]}")
        if verify:
            _verify(folder, written)


@contextmanager
def _one_rank() -> Iterator[None]:
    with joined_ranks(torch.device("cpu")):
        initialize_model_parallel(ParallelConfig(), seed=0)
        yield


@torch.no_grad()
def _largest_logit_difference(folder: Path, checkpoint: Path, hf_config: PretrainedConfig) -> tuple[float, float]:
    """(largest difference between the two models' logits, largest logit)."""
    tokens = torch.randint(0, hf_config.vocab_size, (1, VERIFIED_TOKENS), generator=torch.Generator().manual_seed(0))
    chunks = build_policy(hf_config, ParallelConfig(), torch.float32, "cpu")
    load_weights(checkpoint, chunks)
    logits = chunks[0].eval()(tokens, torch.arange(VERIFIED_TOKENS)[None], None)[..., : hf_config.vocab_size]
    del chunks
    dtype = getattr(torch, CheckpointInfo.read(checkpoint).dtype)  # rounds an fp32 folder as from-hf has done
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).float().eval()
    expected = model(tokens).logits
    return float((logits - expected).abs().max()), float(expected.abs().max())


def _verify(folder: Path, checkpoint: Path) -> None:
    difference, scale = _largest_logit_difference(folder, checkpoint, load_hf_config(folder))
    print(f"largest difference of {VERIFIED_TOKENS} tokens' logits: {difference:.2e} (largest logit {scale:.2f})")
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise CheckpointError(f"{folder} and {checkpoint} are not the same model")
