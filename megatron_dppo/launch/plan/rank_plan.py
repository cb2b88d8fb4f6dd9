"""A rank's part of the trainer, built and run on the meta device: what it keeps, and what a micro-batch takes.

The model, its wrapping for data parallelism, the optimizer, the loss and its kernels are those of a run
(training/policy). Nothing is modelled but what is said in hardware.py and compat/megatron_on_meta.py, and that a layer costs
what every other of its kind does: micro-batches are run through two and three layers and not through ninety.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from transformers import PretrainedConfig

from megatron_dppo.compat.megatron_on_meta import megatron_on_meta
from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.launch.plan.fake_world import Groups, fake_world
from megatron_dppo.launch.plan.largest_batch import largest_batch
from megatron_dppo.launch.plan.trace import Trace, Work
from megatron_dppo.models.sharding import unwrapped
from megatron_dppo.ops import backend as backends
from megatron_dppo.ops import fp32_product
from megatron_dppo.training.checkpoint.optimizer_state import optimizer_shards
from megatron_dppo.training.config.model_overrides import ALLOWED
from megatron_dppo.training.config.recompute import TRANSFORMER_ENGINE_MODULES
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config, ModelConfig
from megatron_dppo.training.data.batcher import MicroBatcher
from megatron_dppo.training.data.micro_batch import MicroBatch
from megatron_dppo.training.policy.dppo_step import DPPOStep
from megatron_dppo.training.policy.trainable import (
    OptimizerState,
    TrainablePolicy,
    build_chunks,
    build_optimizer,
    wrap_for_training,
)

_META = torch.device("meta")
_BACKEND = "planned"
_GRADIENT_ON_HOST = 4  # fp32, pinned
TRACED_LAYERS = (2, 3)  # a straight line through two depths


@dataclass(frozen=True)
class Setting:
    """Where a recipe is to run, and what is assumed of it.

    Attributes:
        world_size: ranks of the trainer, each on a GPU of its own.
        gpus_per_node: of its nodes.
        prompt_tokens: of every prompt.
        expert_load: tokens of the experts of the fullest rank, over the mean.
        as_on_cuda: whether 16-bit products leave fp32 sums without copies, as cuBLAS does.
    """

    world_size: int
    gpus_per_node: int = 8
    prompt_tokens: int = 150
    expert_load: float = 1.0
    as_on_cuda: bool = True


class Share(NamedTuple):
    """Of the parameters that a rank holds: dense ones, or experts. Bytes on the GPU, but for what says otherwise.

    Attributes:
        parameters: how many.
        weights, gradients: of them.
        optimizer: state of those that the rank updates.
        updated: how many those are.
        on_host: bytes of host memory, for the state, gradients and weights of those that the CPU updates.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    updated: int
    on_host: int


@dataclass(frozen=True)
class Kept:
    """What a rank holds from the first step to the last, in bytes but for ``parameters``.

    Attributes:
        dense, experts: of the parameters of either kind.
        frozen: copies of the weights (reference policy, exact divergences).
        groups: process groups that it is in.
    """

    dense: Share
    experts: Share
    frozen: int
    groups: Groups

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.frozen + sum(
            share.weights + share.gradients + share.optimizer for share in (self.dense, self.experts)
        )

    @property
    def weights(self) -> int:
        """Bytes of the weights that are trained."""
        return self.dense.weights + self.experts.weights


class Stage(NamedTuple):
    """Which end of the model a chunk of layers holds."""

    first: bool
    last: bool


@dataclass(frozen=True)
class Pass:
    """One micro-batch, forward and backward, through one chunk of layers.

    Attributes:
        tokens: of the micro-batch on this rank.
        held: bytes between its forward and its backward pass.
        peak: most bytes at any time.
        head: most bytes beside ``held`` until the output layer has done its backward pass: logits or tiles of them, and all
            that belongs to them. 0 where there is none. The layers' backward pass may take more.
        forward, backward: what was done; a layer that is recomputed counts as backward.
    """

    tokens: int
    held: float
    peak: float
    head: float
    forward: Work
    backward: Work


def kept(config: Config, hf_config: PretrainedConfig, world_size: int, rank: int, as_on_cuda: bool = True) -> Kept:
    """Of one rank."""
    with _rank_on_meta(config.parallel, world_size, rank, 1.0, as_on_cuda) as groups:
        policy, step, state = _build(config, hf_config)
        buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        # Padding of a buffer: whatever its parameters do not fill.
        gradient_bytes = sum(buffer.grad_data.nbytes for buffer in buffers)
        named = [(name, p) for chunk in policy.chunks for name, p in chunk.named_parameters()]
        shards = list(optimizer_shards(state.optimizer))
        shares = []
        numbers = {True: 0, False: 0}
        for name, parameter in named:
            numbers[".experts." in name] += parameter.numel()
        total = sum(numbers.values())
        expert_ids = {id(p) for name, p in named if ".experts." in name}
        itemsize = policy.dtype.itemsize
        memory = config.train.optimizer_memory
        per_element, offloaded = memory.bytes_per_parameter(config.model.dtype), memory.offload_fraction
        for of_experts in (False, True):
            count = numbers[of_experts]
            updated = sum(s.main.numel() for s in shards if (id(s.parameter) in expert_ids) == of_experts)
            gradients = round(gradient_bytes * count / total) if total else 0
            here, away = round(updated * (1 - offloaded) * per_element), updated * offloaded
            on_host = round(away * (per_element + _GRADIENT_ON_HOST))
            shares.append(Share(count, count * itemsize, gradients, here, updated, on_host))
        frozen = sum(tensor.nbytes for copy_ in step.frozen for tensor in copy_.tensors)
        return Kept(shares[0], shares[1], frozen, groups)


def traced_pass(config: Config, hf_config: PretrainedConfig, setting: Setting, stage: Stage, depth: int) -> Pass:
    """Of the largest micro-batch that the configuration allows, through ``depth`` layers at such a place in the model."""
    config, stages = _with_stages_like(config, stage)
    shallow = copy.deepcopy(hf_config)
    shallow.num_hidden_layers = depth * stages
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:1] * shallow.num_hidden_layers
    index = 0 if stage.first else stages - 1 if stage.last else 1
    parallel = config.parallel
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_size * stages
    world_size = math.lcm(parallel.replica_size, experts)
    with _rank_on_meta(parallel, world_size, index * world_size // stages, setting.expert_load, setting.as_on_cuda):
        policy, step, _ = _build(config, shallow)
        examples = largest_batch(config, hf_config, setting.prompt_tokens, micro_batches=1)
        (batch,) = MicroBatcher(step.scheduler).micro_batches(examples, 0)
        return _traced(policy, step, policy.on_device(batch), setting.gpus_per_node)


def _with_stages_like(config: Config, stage: Stage) -> tuple[Config, int]:
    """The configuration with the fewest equal stages among which there is one like ``stage``."""
    stages = 1 if stage.first and stage.last else 2 if stage.first or stage.last else 3
    parallel = replace(
        config.parallel,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
    )
    return dataclasses.replace(config, parallel=parallel), stages


def _traced(policy: TrainablePolicy, step: DPPOStep, batch: MicroBatch, gpus_per_node: int) -> Pass:
    (chunk,) = policy.chunks
    model = unwrapped([chunk])[0]
    with Trace(gpus_per_node, _existing(policy)) as trace:
        if not model.pre_process:
            model.set_input_tensor(_received(policy, batch))
        output, loss_of = step.forward(chunk, batch)
        held = trace.live
        forward, trace.work = trace.work, Work()
        head: list[int] = []
        if model.post_process:
            # Called when the output layer has done its backward pass, and the layers have not begun theirs.
            output.register_hook(lambda gradient: head.append(trace.peak - held))
            loss_of(output).loss.backward()
        else:
            torch.autograd.backward(output, torch.empty_like(output))
    return Pass(batch.tokens.numel(), float(held), float(trace.peak), float(sum(head)), forward, trace.work)


def _received(policy: TrainablePolicy, batch: MicroBatch) -> torch.Tensor:
    """What the stage before sends: [S, B, h], or [S/TP, B, h] with sequence parallelism."""
    config = policy.transformer_config
    rows, length = batch.shape
    size = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return torch.empty(length // size, rows, config.hidden_size, dtype=policy.dtype, device=_META, requires_grad=True)


def _existing(policy: TrainablePolicy) -> Iterator[torch.Tensor]:
    for chunk in policy.chunks:
        yield from chunk.parameters()
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data
            if buffer.param_data is not None:
                yield buffer.param_data


@contextmanager
def _rank_on_meta(
    parallel: ParallelConfig, world_size: int, rank: int, expert_load: float, as_on_cuda: bool
) -> Iterator[Groups]:
    with (
        fake_world(parallel, world_size, rank) as groups,
        megatron_on_meta(expert_load),
        mock.patch.object(fp32_product, "_writes_fp32_sums", return_value=as_on_cuda),
    ):
        yield groups


def without_transformer_engine(model: ModelConfig) -> ModelConfig:
    """What can be built on any machine: layers of core's own, without what only Transformer Engine's know. They take more
    memory, not less: norms and activations of experts that would be recomputed are kept.
    """
    engines = {name for name, allowed in ALLOWED.items() if allowed.needs_transformer_engine}
    anywhere = {name: value for name, value in model.overrides.items() if name not in engines}
    recompute = model.recompute
    if recompute.granularity == "selective":
        modules = [module for module in recompute.modules if module not in TRANSFORMER_ENGINE_MODULES]
        recompute = replace(recompute, modules=modules, granularity="selective" if modules else "none")
    return replace(model, backend="local", overrides=anywhere, recompute=recompute)


def with_plain_messages(parallel: ParallelConfig) -> ParallelConfig:
    """That sends the same by collectives that can be traced: no DeepEP, and nothing amid a pass (counted with the step)."""
    dispatcher = "alltoall" if parallel.moe_token_dispatcher == "flex" else parallel.moe_token_dispatcher
    return replace(
        parallel,
        moe_token_dispatcher=dispatcher,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        bucket_size=None,
    )


def _build(config: Config, hf_config: PretrainedConfig) -> tuple[TrainablePolicy, DPPOStep, OptimizerState]:
    """As a run builds them. Kernels are the compiled ones, where they are built, else plain torch, which takes more."""
    if backends.native_operators(torch.device("cpu")) is not None:
        from megatron_dppo.ops.native_backend import NativeBackend

        backends.add_backend(NativeBackend(_BACKEND))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, kernel_backend=_BACKEND))
    algorithm = dataclasses.replace(config.algorithm, routing_replay=False)  # it takes values: its bytes are added
    config = dataclasses.replace(config, algorithm=algorithm)
    dtype, parallel = MODEL_DTYPES[config.model.dtype], with_plain_messages(config.parallel)
    chunks = build_chunks(without_transformer_engine(config.model), parallel, hf_config, _META)
    policy = wrap_for_training(chunks, hf_config, dtype, parallel)
    state = build_optimizer(policy, config.train.optimizer, total_steps=config.train.steps)
    return policy, DPPOStep(config, policy, state), state
