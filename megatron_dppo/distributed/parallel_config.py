"""How one policy is spread over ranks: the options, and what is wrong with them. Nothing of Megatron's is imported."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dppo.distributed.ranks import COLLECTIVE_TIMEOUT_S
from megatron_dppo.errors import ConfigError

MOE_TOKEN_DISPATCHERS = ("alltoall", "allgather", "flex")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel groups. What is left of the world is data parallelism.

    Attributes:
        tensor_model_parallel_size: ranks that share every matrix.
        pipeline_model_parallel_size: stages that share the layers.
        num_layers_in_first_pipeline_stage: of the stage that also holds the embedding; the others share what is left evenly.
            None: as many as any other.
        num_layers_in_last_pipeline_stage: of the stage that also holds the output layer, likewise.
        virtual_pipeline_model_parallel_size: model chunks per stage: each stage holds that many shorter runs of layers, so
            that the pipeline fills faster (Megatron's interleaved schedule). None or 1: one chunk.
        context_parallel_size: ranks that share every sequence.
        expert_model_parallel_size: ranks that share the experts of an MoE layer; they are taken from TP x CP x DP.
        expert_tensor_parallel_size: ranks that share every expert's matrices. None: 1 if there is expert parallelism
            (small expert matrices are better kept whole), else the tensor-parallel size (each expert on every TP rank
            would otherwise repeat it).
        sequence_parallel: split activations over the TP ranks outside of the matrices. None: on when TP > 1.
        moe_token_dispatcher: how tokens reach experts on other ranks: ``alltoall`` sends each token where it is needed,
            ``allgather`` sends every token everywhere (for few experts per rank and small groups), ``flex`` is alltoall by
            DeepEP's kernels, which send a token once to each node that needs it (GPUs, 16 bits; ``deep_ep`` has to be there).
        use_distributed_optimizer: shard the optimizer's state over the data-parallel ranks.
        overlap_grad_reduce: gradients are reduced bucket by bucket while the last micro-batch's backward pass makes others.
        overlap_param_gather: with the distributed optimizer, weights are gathered bucket by bucket while the next optimizer
            step's first forward pass uses those before. After the last step of a rollout batch they are gathered at once.
        bucket_size: parameters of a bucket: gradients that are reduced, or weights that are gathered, in one message. None:
            core's choice, 40 million or a million for each data-parallel rank if that is more.
        collective_timeout_s: how long ranks wait for each other in a collective on tensors before the run ends. They come
            within seconds of each other, but for a weight update of servers, which has to be allowed less.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    moe_token_dispatcher: str = "alltoall"
    use_distributed_optimizer: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "bucket_size",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"ParallelConfig.{name} must be at least 1, not {size}")
        if not self.collective_timeout_s > 0:
            raise ConfigError(f"ParallelConfig.collective_timeout_s must be above 0, not {self.collective_timeout_s}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "ParallelConfig.sequence_parallel=True needs tensor_model_parallel_size > 1: it splits over the "
                "tensor-parallel ranks (leave it None to have it follow)"
            )
        if self.chunks_per_stage > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"ParallelConfig.virtual_pipeline_model_parallel_size={self.chunks_per_stage} needs "
                "pipeline_model_parallel_size > 1: without a pipeline there is nothing to interleave (leave it None)"
            )
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            if getattr(self, name) is None:
                continue
            if self.pipeline_model_parallel_size == 1 or self.chunks_per_stage > 1:
                raise ConfigError(
                    f"ParallelConfig.{name}={getattr(self, name)} needs pipeline_model_parallel_size > 1, and no virtual"
                    " stages (leave it None)"
                )
        if self.moe_token_dispatcher == "flex" and self.expert_model_parallel_size * self.expert_tensor_size == 1:
            raise ConfigError(
                "ParallelConfig.moe_token_dispatcher='flex' needs expert_model_parallel_size > 1: every expert is on this"
                " rank, and there is nothing to send (use 'alltoall')"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError(
                "ParallelConfig.overlap_param_gather=True gathers weights that the ranks of a distributed optimizer updated,"
                " in the buckets of overlap_grad_reduce: set use_distributed_optimizer and overlap_grad_reduce too"
            )
        if self.bucket_size is not None and not self.overlap_grad_reduce:
            raise ConfigError(
                f"ParallelConfig.bucket_size={self.bucket_size}: without overlap_grad_reduce there are no buckets: set it, or"
                " leave bucket_size None"
            )
        if self.moe_token_dispatcher not in MOE_TOKEN_DISPATCHERS:
            raise ConfigError(
                f"ParallelConfig.moe_token_dispatcher={self.moe_token_dispatcher!r} is not one of "
                f"{', '.join(MOE_TOKEN_DISPATCHERS)}"
            )

    @property
    def uses_sequence_parallel(self) -> bool:
        """``sequence_parallel`` with None resolved."""
        if self.sequence_parallel is None:
            return self.tensor_model_parallel_size > 1
        return self.sequence_parallel

    @property
    def chunks_per_stage(self) -> int:
        """``virtual_pipeline_model_parallel_size`` with None resolved: model chunks that each rank holds."""
        return self.virtual_pipeline_model_parallel_size or 1

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """How many layers each pipeline stage holds, virtual stages together. Raises ConfigError if they do not come out."""
        stages = self.pipeline_model_parallel_size
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        equal_stages = stages - (first is not None) - (last is not None)
        left = num_layers - (first or 0) - (last or 0)
        parts = equal_stages * self.chunks_per_stage
        if (left != 0) if parts == 0 else (left <= 0 or left % parts):
            raise ConfigError(
                f"num_hidden_layers={num_layers} cannot be divided among the stages of pipeline_model_parallel_size={stages},"
                f" virtual_pipeline_model_parallel_size={self.chunks_per_stage}, num_layers_in_first_pipeline_stage={first},"
                f" num_layers_in_last_pipeline_stage={last}: {left} layers are left for {parts} equal parts"
            )
        equal = left // equal_stages if equal_stages else 0
        shares = [equal] * stages
        shares[0] = equal if first is None else first
        shares[-1] = shares[-1] if last is None else last
        return shares

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor_parallel_size`` with None resolved."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the dense weights and work on the same sequences: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def check_world_size(self, world_size: int) -> None:
        """Raise ConfigError if the groups do not divide the number of ranks."""
        expert = self.expert_model_parallel_size * self.expert_tensor_size * self.pipeline_model_parallel_size
        for size, formula in (
            (
                self.replica_size,
                f"tensor {self.tensor_model_parallel_size} x pipeline {self.pipeline_model_parallel_size} "
                f"x context {self.context_parallel_size}",
            ),
            (
                expert,
                f"expert {self.expert_model_parallel_size} x expert_tensor {self.expert_tensor_size} "
                f"x pipeline {self.pipeline_model_parallel_size}",
            ),
        ):
            if world_size % size:
                raise ConfigError(
                    f"the parallel layout {formula} = {size} does not divide the {world_size} ranks: "
                    f"start a multiple of {size} ranks, or choose sizes that divide {world_size}"
                )
