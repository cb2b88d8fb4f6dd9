#!/usr/bin/env python3
"""Record what slime, or its fork miles, passes to a custom loss function, without and with context parallelism.

    git clone https://github.com/THUDM/slime SOURCE && git -C SOURCE checkout COMMIT      # or radixark/miles
    PYTHONPATH=SOURCE:. python tools/integrations/record_slime.py slime --commit COMMIT   # or miles

Runs the framework's ``get_batch``, ``slice_log_prob_with_cp``, ``loss_function`` and ``get_log_probs_and_entropy`` as they
stand in that source, on the rollouts of tests/integrations/rollouts.py. One process stands for each rank in turn: what
Megatron is asked is the rank and size of its groups, which are given here. Needs megatron-core beside torch; run by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.integrations.absent import stand_in_for
from tests.integrations.recording import save
from tests.integrations.rollouts import PADDED, TEMPERATURE, VOCAB, make_rollouts, packed_logits

ABSENT = (
    "ray",
    "sglang",
    "sglang_router",
    "mbridge",
    "megatron.bridge",
    "httpx",
    "datasets",
    "wandb",
    "torch_memory_saver",
    "pybase64",
    "PIL",
    "qwen_vl_utils",
    "aiohttp",
    "fastapi",
    "uvicorn",
)
RANKS = {"cp1": (0, 1), "cp2 rank 0": (0, 2), "cp2 rank 1": (1, 2)}
PAD = 4  # data_pad_size_multiplier
calls: list[tuple[Any, ...]] = []


def recorder(args: Namespace, batch: dict[str, Any], logits: torch.Tensor, reducer: Any) -> Any:
    """The custom loss function; returns 1 so that what becomes of it is the factor of the framework."""
    calls.append((args, batch, logits, reducer))
    return logits.sum() * 0 + 1.0, {"loss": torch.ones(())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("slime", "miles"))
    parser.add_argument("--commit", required=True, help="of the source on PYTHONPATH")
    arguments = parser.parse_args()
    import transformers  # noqa: F401  before the stand-ins

    stand_in_for(*ABSENT)
    modules = Modules(arguments.framework)
    source = Path(importlib.import_module(arguments.framework).__path__[0]).parent / "setup.py"
    version = re.search(r'version="([\d.]+)"', source.read_text(encoding="utf-8"))
    assert version is not None
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    per_rank = {name: recorded(modules, *rank) for name, rank in RANKS.items()}
    save(
        arguments.framework,
        {"framework": arguments.framework, "version": version[1], "commit": arguments.commit, "ranks": per_rank},
    )


class Modules:
    """Where the two frameworks have the same things."""

    def __init__(self, framework: str) -> None:
        self.is_miles = framework == "miles"
        package = "miles.backends.training_utils" if self.is_miles else "slime.backends.megatron_utils"
        self.loss = importlib.import_module(f"{package}.loss")
        self.data = importlib.import_module(f"{package}.data")
        self.cp = importlib.import_module(f"{package}.cp_utils")
        self.parallel: ModuleType | None = importlib.import_module(f"{package}.parallel") if self.is_miles else None

    def as_rank(self, rank: int, size: int) -> Any:
        """Context in which the framework believes that it is this context-parallel rank."""
        if self.parallel is not None:

            def group(r: int, n: int) -> Any:
                return SimpleNamespace(rank=r, size=n, group=torch.distributed.group.WORLD, gloo_group=None)

            one = group(0, 1)
            names = dict.fromkeys(("intra_dp", "tp", "pp", "ep", "etp", "indep_dp"), one)
            self.parallel.set_parallel_state(
                self.parallel.ParallelState(intra_dp_cp=group(rank, size), cp=group(rank, size), **names)
            )
        answers = {
            "get_context_parallel_rank": rank,
            "get_context_parallel_world_size": size,
            "get_tensor_model_parallel_rank": 0,
            "get_tensor_model_parallel_world_size": 1,
            "get_tensor_model_parallel_group": torch.distributed.group.WORLD,
        }
        return mock.patch.multiple(
            "megatron.core.parallel_state",
            get_data_parallel_world_size=lambda with_context_parallel=False: size if with_context_parallel else 1,
            **{name: mock.Mock(return_value=value) for name, value in answers.items()},
        )


def recorded(modules: Modules, rank: int, size: int) -> dict[str, Any]:
    """The call on one rank, and what the framework makes of the results."""
    args = Namespace(
        loss_type="custom_loss",
        custom_loss_function_path="recorder",
        recompute_loss_function=False,
        calculate_per_token_loss=False,
        allgather_cp=False,
        qkv_format="thd",
        rollout_temperature=TEMPERATURE,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        global_batch_size=len(make_rollouts()),
        use_dynamic_global_batch_size=False,
        true_on_policy_mode=False,
        multi_lora=False,
        vocab_size=VOCAB,
        padded_vocab_size=PADDED,
        entropy_coef=0.0,
        use_kl_loss=False,
        use_tis=False,
        use_opsm=False,
        use_rollout_logprobs=True,
        log_probs_chunk_size=-1,
        log_probs_max_tokens_per_gpu=None,
        fused_lm_head=False,
    )
    with modules.as_rank(rank, size):
        data = rollout_data(modules)
        iterator = SimpleNamespace(rollout_data=data, get_next=lambda keys: {key: data.get(key) for key in keys})
        keys = [
            "tokens",
            "multimodal_train_inputs",
            "total_lengths",
            "response_lengths",
            "loss_masks",
            "advantages",
            "rollout_log_probs",
            "rollout_mask_sums",
            "log_probs",
            "max_seq_lens",
        ]
        with on_this_device(modules.is_miles):
            batch = modules.data.get_batch(iterator, keys, PAD)
        logits = packed_logits()
        rows = local_rows(modules, batch["tokens"].shape[1])
        local = torch.where(rows[:, None] >= 0, logits[rows.clamp(min=0)], 0.0)[None]
        factors = {}
        for per_token in (False, True):
            args.calculate_per_token_loss = per_token
            extra = {"apply_megatron_loss_scaling": True} if modules.is_miles else {"step_global_batch_size": 4}
            loss_module = "miles.backends.training_utils.loss_hub.losses" if modules.is_miles else modules.loss.__name__
            with mock.patch(f"{loss_module}.load_function", return_value=recorder):
                factor, normalizer, _ = modules.loss.loss_function(args, batch, 2, logits=local, **extra)
            factors[per_token] = {"factor": factor.detach(), "normalizer": torch.as_tensor(normalizer)}
        reducers = [call[3] for call in calls[-2:]]
        found = modules.loss.get_log_probs_and_entropy(
            local[..., :VOCAB].contiguous(),
            args=args,
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            with_entropy=True,
        )
        found = found[1] if isinstance(found, tuple) else found
        vector = torch.arange(1.0, 1.0 + sum(len(x) for x in batch["rollout_log_probs"]))
    read = (
        "unconcat_tokens",
        "total_lengths",
        "response_lengths",
        "loss_masks",
        "advantages",
        "rollout_log_probs",
        "rollout_mask_sums",
    )
    return {
        "batch": {key: batch[key] for key in read},
        "args": {key: value for key, value in vars(args).items() if key != "calculate_per_token_loss"},
        "rows": rows,
        "log_probs": found["log_probs"],
        "reduced": {"vector": vector, "per_rollout": reducers[0](vector), "per_token": reducers[1](vector)},
        "per_rollout": factors[False],
        "per_token": factors[True],
    }


@contextlib.contextmanager
def on_this_device(is_miles: bool) -> Iterator[None]:
    """Tensors that the framework would make on its accelerator are made here."""
    here = torch.device("cpu")
    if is_miles:
        with (
            mock.patch("torch.cuda.current_device", return_value=here),
            mock.patch("torch.Tensor.cuda", lambda self: self),
        ):
            yield
    else:
        with mock.patch.multiple("slime.utils.accelerator", current_device=lambda: here, device=lambda: here):
            yield


def rollout_data(modules: Modules) -> dict[str, Any]:
    """The rollouts as the trainer holds them; what it slices for context parallelism is sliced by its own function."""
    rollouts = make_rollouts()

    def sliced(rollout: Any, values: torch.Tensor) -> torch.Tensor:
        return modules.cp.slice_log_prob_with_cp(values, len(rollout.tokens), len(rollout.response))

    sums = [r.loss_mask.sum().float() for r in rollouts]
    return {
        "tokens": [r.tokens for r in rollouts],
        "total_lengths": [len(r.tokens) for r in rollouts],
        "response_lengths": [len(r.response) for r in rollouts],
        "loss_masks": [r.loss_mask.int() for r in rollouts],
        "advantages": [sliced(r, torch.full_like(r.rollout_log_probs, r.advantage)) for r in rollouts],
        "rollout_log_probs": [sliced(r, r.rollout_log_probs) for r in rollouts],
        "rollout_mask_sums": sums,
    }


def local_rows(modules: Modules, length: int) -> torch.Tensor:
    """[length] which row of the packed logits each local position is; -1 for padding."""
    rows, start = [], 0
    for rollout in make_rollouts():
        positions = torch.arange(start, start + len(rollout.tokens))
        rows.append(modules.cp.slice_with_cp(positions, -1))
        start += len(rollout.tokens)
    joined = torch.cat(rows)
    return torch.cat([joined, joined.new_full((length - len(joined),), -1)])


if __name__ == "__main__":
    main()
