"""Training checkpoint <-> Hugging Face folder, on one CPU process; no GPU and none of the run's layout is needed.

    python tools/convert_checkpoint.py to-hf runs/math/checkpoints/step_00000200 exported --tokenizer models/Qwen3-4B --verify
    python tools/convert_checkpoint.py from-hf exported runs/next/checkpoints --verify

``to-hf`` reads a checkpoint that any layout wrote. ``from-hf`` writes ``step_00000000``, without optimizer state, into the
checkpoints folder of a run to be: ``pretrain_dppo.py`` with that run.root and run.name starts from it, in any layout.
``--verify`` computes the logits of a few tokens with transformers from the Hugging Face folder, and with Megatron from the
checkpoint, both in fp32, and fails if they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before torch looks: Megatron-core takes a visible GPU wherever there is one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.distributed.ranks import joined_ranks
from megatron_dppo.errors import CheckpointError
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import load_hf_weights, save_hf_checkpoint
from megatron_dppo.training.checkpoint.info import CheckpointInfo
from megatron_dppo.training.checkpoint.load import TrainerState, load_weights
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from megatron_dppo.training.policy.trainable import TrainablePolicy

VERIFIED_TOKENS = 32
# fp32 kernels of two libraries differ by some 1e-6 of the largest logit and layer; a wrong weight by 1e-1.
TOLERANCE = 1e-3


def to_hf(checkpoint: Path, folder: Path, tokenizer: Path | None) -> None:
    info = CheckpointInfo.read(checkpoint)
    hf_config = load_hf_config(info.hf_config)
    chunks = build_policy(hf_config, ParallelConfig(), getattr(torch, info.dtype), "cpu")
    load_weights(checkpoint, chunks)
    save_hf_checkpoint(chunks, hf_config, folder, tokenizer_folder=tokenizer, model_folder=tokenizer)
    print(f"{folder}: step {info.trainer.step} of {checkpoint}, {info.dtype}")


def from_hf(folder: Path, checkpoints: Path, dtype: torch.dtype) -> Path:
    hf_config = load_hf_config(folder)
    chunks = build_policy(hf_config, ParallelConfig(), dtype, "cpu")
    load_hf_weights(chunks, folder)
    with CheckpointWriter(checkpoints, keep=1, asynchronous=False) as writer:
        written = writer.save(TrainablePolicy(chunks, hf_config, dtype), None, TrainerState())
    print(f"{written}: {folder}, {dtype}")
    return written


@torch.no_grad()
def largest_logit_difference(folder: Path, checkpoint: Path, hf_config: PretrainedConfig) -> tuple[float, float]:
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


def verify(folder: Path, checkpoint: Path) -> None:
    difference, scale = largest_logit_difference(folder, checkpoint, load_hf_config(folder))
    print(f"largest difference of {VERIFIED_TOKENS} tokens' logits: {difference:.2e} (largest logit {scale:.2f})")
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise CheckpointError(f"{folder} and {checkpoint} are not the same model")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="training checkpoint -> Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="a folder step_<N>")
    export.add_argument("folder", type=Path, help="written; must not exist")
    export.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied (default: none)")
    start = commands.add_parser("from-hf", help="Hugging Face folder -> checkpoint that a run can start from")
    start.add_argument("folder", type=Path, help="with config.json and safetensors")
    start.add_argument("checkpoints", type=Path, help="<run.root>/<run.name>/checkpoints of the run to be")
    start.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="the run's model.dtype (default: bf16)"
    )
    for command in (export, start):
        command.add_argument("--verify", action="store_true", help="compare the logits of both models")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    logging.disable_progress_bar()
    options = parse_arguments(arguments)
    with joined_ranks(torch.device("cpu")):
        initialize_model_parallel(ParallelConfig(), seed=0)
        if options.command == "to-hf":
            to_hf(options.checkpoint, options.folder, options.tokenizer)
            checkpoint = options.checkpoint
        else:
            if list(options.checkpoints.glob("step_*")):
                raise CheckpointError(f"{options.checkpoints} holds checkpoints already: choose another run.name")
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
            checkpoint = from_hf(options.folder, options.checkpoints, dtype)
        if options.verify:
            verify(options.folder, checkpoint)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
