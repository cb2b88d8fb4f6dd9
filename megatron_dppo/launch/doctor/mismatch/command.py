"""Find out why server and policy disagree: the same tokens through server, policy (Megatron-core) and transformers.

    megatron-dppo doctor mismatch models/tiny --server-python .venv-sglang/bin/python
    megatron-dppo doctor mismatch models/tiny --dtype fp32 --json

Every operator of the policy and of transformers is computed again in float64 from the folder's own tensors and settings, on
the input that the side itself had, so that the first one that differs is where the fault is. A server shows its last hidden
states only: its layers together are held against float64, and its output layer against those hidden states. What rounding of
the dtype explains is measured, with plain torch in that dtype.

MODEL is a Hugging Face folder. Without --server-python no server is asked, and transformers draws the tokens. Runs in one
process: it needs room for the policy twice (in bf16 a third time in fp32), and for a layer in float64.

Exit code 1: something differs by more than rounding explains; 2: the arguments cannot work; 3: the server does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dppo.errors import BAD_INPUT, EXIT_BAD_INPUT, EXIT_STOPPED, RolloutError

if TYPE_CHECKING:
    import torch

    from megatron_dppo.launch.doctor.mismatch.diagnosis import Diagnosis

_EXIT_DIFFERS = 1


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dppo doctor mismatch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the policy")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line; default: built-in questions")
    parser.add_argument("--tokens", type=int, default=32, help="response tokens per prompt (default 32)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of all sides (default bf16)")
    parser.add_argument("--no-fp32-head", action="store_true", help="round logits to bf16: model.fp32_head=false")
    parser.add_argument("--server-python", help="interpreter that has SGLang; default: no server is asked")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error(f"--tokens must be at least 1, not {options.tokens}")
    return options


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse_arguments(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    try:
        with _one_rank() as device:
            diagnosis = _diagnose(options, device)
    except (*BAD_INPUT, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RolloutError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED
    print(json.dumps(diagnosis.as_json(), indent=1) if options.json else diagnosis)
    return _EXIT_DIFFERS if diagnosis.faults else 0


@contextmanager
def _one_rank() -> Iterator[torch.device]:
    """Within: a process group of this process alone, as Megatron-core needs one, and the device that it computes on."""
    import torch  # help needs none of this
    import torch.distributed as dist

    from megatron_dppo.distributed.layout import initialize_model_parallel
    from megatron_dppo.distributed.parallel_config import ParallelConfig

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        initialize_model_parallel(ParallelConfig(), seed=1)
        yield torch.device("cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


def _diagnose(options: argparse.Namespace, device: torch.device) -> Diagnosis:
    from functools import partial

    import torch
    from transformers import AutoModelForCausalLM

    from megatron_dppo.launch.doctor.mismatch.examination import examine, load_policy
    from megatron_dppo.launch.doctor.mismatch.prompts import prompt_tokens
    from megatron_dppo.launch.doctor.mismatch.sides import sampled
    from megatron_dppo.models.hf.config import load_hf_config
    from megatron_dppo.training.config.schema import MODEL_DTYPES

    folder, dtype, server = options.model, MODEL_DTYPES[options.dtype], None
    config = load_hf_config(folder)
    prompts = prompt_tokens(folder, config, options.prompts)
    fp32_head = not options.no_fp32_head
    if options.server_python:
        from megatron_dppo.launch.doctor.mismatch.served import served  # its HTTP client is an extra
        from megatron_dppo.rollout.sglang.config import SGLangConfig

        name = str(dtype).removeprefix("torch.")
        settings = SGLangConfig(python=options.server_python, base_gpu_id=0)
        with tempfile.TemporaryDirectory(prefix="megatron_dppo_doctor_") as scratch:
            server, sequences = served(
                folder, config, prompts, options.tokens,
                server=settings, dtype=name, fp32_head=fp32_head, scratch=Path(scratch),
            )  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    if server is None:
        sequences = sampled(reference, prompts, options.tokens)
    in_fp32 = partial(load_policy, folder, torch.float32) if dtype != torch.float32 else None
    return examine(folder, load_policy(folder, dtype, fp32_head), in_fp32, reference, sequences, server)
