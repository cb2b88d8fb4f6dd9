"""Rollout on the training model itself: no server, no second copy of the weights, nothing to synchronise.

    engine = EmbeddedEngine(model_chunks, vocab_size=config.vocab_size, max_batch_size=128)
    samples = engine.generate(prompts, SamplingParams(max_new_tokens=64, samples_per_prompt=8))

Meant for small and mid-size policies, where a decode step costs launches rather than arithmetic. Every prompt is
prefilled once and its cache repeated for its samples; rows that have ended leave the batch. Tokens are drawn on one rank
of the replica and broadcast, so the ranks cannot disagree. Random numbers come from a generator of its own, one stream
per data-parallel rank: neither torch's nor Megatron's random state moves, and a response does not depend on
``max_batch_size``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from megatron_dppo.distributed.collectives import first_rank_where
from megatron_dppo.distributed.layout import replica_group
from megatron_dppo.errors import InvalidSampleError, RolloutError
from megatron_dppo.rollout.embedded.config import EmbeddedConfig
from megatron_dppo.rollout.embedded.decoder import CachedPolicy
from megatron_dppo.rollout.embedded.rounding import RoundedWeights
from megatron_dppo.rollout.embedded.routing import BatchRouting, ReplicaRouting
from megatron_dppo.rollout.embedded.sampling import Draw, draw_tokens
from megatron_dppo.rollout.engine import ServerLoad, WeightSource, check_request
from megatron_dppo.rollout.sample import FailedSample, Prompt, Sample, SamplingParams


class EmbeddedEngine:
    """Samples from a Megatron GPT policy with the model that is being trained. See ``RolloutEngine`` for the contract.

    Works with tensor, sequence, expert, data and pipeline parallelism (virtual stages included), fp32 and bf16. With
    context parallelism the ranks of a replica decode the same sequences side by side.
    """

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        vocab_size: int,
        max_batch_size: int = 256,
        config: EmbeddedConfig | None = None,
    ) -> None:
        """Collective over all ranks; nothing is copied.

        Args:
            model_chunks: this rank's part of the policy, as built or wrapped (DDP, Float16Module).
            vocab_size: true size of the vocabulary; logits beyond it are padding.
            max_batch_size: sequences decoded at once, per replica: bounds the memory of the cache. The rest follows.
            config: what it computes with. None: the training weights.

        Raises:
            ValueError: the policy cannot be decoded here (no rotary positions, experts that drop tokens, ...).
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._chunks = list(model_chunks)
        models = list(unwrap_model(self._chunks))
        policy_config = models[0].config
        config = config or EmbeddedConfig()
        self._policy = CachedPolicy(models)
        self._rounded_weights = RoundedWeights(models, config.weight_rounding, config.router_rounding)
        self._device = next(models[0].parameters()).device
        self._vocab_size = vocab_size
        self._max_batch_size = max_batch_size
        self._max_length: int = models[0].max_sequence_length
        self._lockstep = _Lockstep(policy_config.moe_token_dispatcher_type if policy_config.num_moe_experts else None)
        self._group = replica_group()
        has_logits = any(model.post_process for model in models)
        self._drawing_rank = dist.get_global_rank(self._group, first_rank_where(has_logits, group=self._group))
        self._routing: ReplicaRouting | None = None  # made when first asked for
        self._weight_version = 0
        self._closed = False

    @property
    def weight_version(self) -> int:
        """The version last given to ``update_weights``; 0 before."""
        return self._weight_version

    @property
    def max_topk_log_probs(self) -> int:
        """All logits are at hand."""
        return self._vocab_size

    @property
    def ranks_generate_together(self) -> bool:
        """Those of a replica, and those that share experts."""
        return self._group.size() > 1 or self._lockstep.spans_replicas

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample | FailedSample]:
        """See ``RolloutEngine.generate``. Collective over all replicas, each with its own prompts, maybe none.

        Raises ValueError, before anything runs, for prompts or parameters that the policy cannot serve. If its weights give
        NaN, the samples are failed ones.
        """
        self.health()
        check_request(prompts, sampling, vocab_size=self._vocab_size, max_length=self._max_length)
        if sampling.return_routed_experts and self._routing is None:
            self._routing = ReplicaRouting(self._chunks, self._group)
        self._gather_parameters()
        generator = torch.Generator().manual_seed(
            (sampling.seed * 1_000_003 + parallel_state.get_data_parallel_rank()) % 2**63
        )
        group_ids = [g for g in range(len(prompts)) for _ in range(sampling.samples_per_prompt)]
        samples: list[Sample | FailedSample] = []
        with self._rounded_weights.in_place(), self._policy.decoding(), self._recording(sampling):
            for start in range(0, len(group_ids), self._max_batch_size):
                batch = group_ids[start : start + self._max_batch_size]
                samples += self._generate_batch(prompts, batch, sampling, generator)
            while self._lockstep.others_run():
                self._policy.prefill(torch.zeros(1, 1, dtype=torch.int64, device=self._device), None)
        return samples

    def _gather_parameters(self) -> None:
        """The last optimizer step may have left this to the next forward pass of the wrapper, which is bypassed here."""
        for chunk in self._chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _recording(self, sampling: SamplingParams) -> AbstractContextManager[None]:
        if self._routing is None or not sampling.return_routed_experts:
            return nullcontext()
        return self._routing.recording()

    def _routing_of_batch(self, prompts: int, source: list[int], sampling: SamplingParams) -> BatchRouting | None:
        if self._routing is None or not sampling.return_routed_experts:
            return None
        return BatchRouting(self._routing, prompts, source, sampling.max_new_tokens)

    def update_weights(self, weights: WeightSource, version: int) -> None:
        """Take note of the version; ``generate`` reads the training weights themselves. ``weights`` is left alone."""
        self.health()
        self._weight_version = version

    def server_loads(self) -> Mapping[str, ServerLoad]:
        """There are no servers."""
        return {}

    def health(self) -> None:
        """Raise RolloutError once closed."""
        if self._closed:
            raise RolloutError("the embedded engine is closed")

    def close(self) -> None:
        """Nothing was started, so nothing ends; the engine refuses further work."""
        self._closed = True

    def _generate_batch(
        self, prompts: Sequence[Prompt], group_ids: list[int], sampling: SamplingParams, generator: torch.Generator
    ) -> list[Sample | FailedSample]:
        """One response per entry of ``group_ids`` (sorted indices into ``prompts``)."""
        device, limit = self._device, sampling.max_new_tokens
        uniform_BT = torch.rand(len(group_ids), limit, generator=generator, dtype=torch.float64).to(device)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        drawn = _Drawn(len(group_ids), limit, sampling.topk_log_probs, device)
        unique = sorted(set(group_ids))
        source = [unique.index(g) for g in group_ids]
        routing = self._routing_of_batch(len(unique), source, sampling)

        tokens_PL, padding_PL = _left_pad([prompts[g].token_ids for g in unique], device)
        capacity = tokens_PL.shape[1] + limit - 1  # the last token is drawn, never read
        logits = self._prefill(tokens_PL, padding_PL, torch.tensor(source, device=device), capacity, routing)

        rows = torch.arange(len(group_ids), device=device)  # responses that are still in the batch
        finished = torch.zeros(len(group_ids), dtype=torch.bool, device=device)
        for step in range(limit):
            tokens = self._draw(logits, uniform_BT[rows, step], sampling, drawn, rows, step)
            if step == limit - 1:
                break
            if stop_ids.numel():
                finished |= torch.isin(tokens, stop_ids)
                unfinished = int((~finished).sum())
                if unfinished == 0:
                    break
                # Dropping rows copies the cache: at each halving, the copies add up to less than the first cache.
                if unfinished <= len(rows) // 2:
                    keep = (~finished).nonzero()[:, 0]
                    self._policy.select(keep, capacity)
                    rows, tokens, finished = rows[keep], tokens[keep], finished[keep]
            self._lockstep.run_with_others()
            logits = self._policy.decode(tokens)
            if routing is not None:
                routing.take_decoded(rows, step)
        self._share(drawn)
        if routing is not None:
            routing.gather()
        return self._samples(prompts, group_ids, sampling, drawn, routing)

    def _prefill(
        self,
        tokens_PL: torch.Tensor,
        padding_PL: torch.Tensor | None,
        source_B: torch.Tensor,
        capacity: int,
        routing: BatchRouting | None,
    ) -> torch.Tensor | None:
        """Read every prompt once and repeat its cache for its responses; returns logits [B, V] where there are any."""
        self._lockstep.run_with_others()
        logits = self._policy.prefill(tokens_PL, padding_PL)
        self._policy.select(source_B, capacity)
        if routing is not None:
            routing.take_prefill()
        return None if logits is None else logits[source_B]

    def _draw(
        self,
        logits: torch.Tensor | None,
        uniform_B: torch.Tensor,
        sampling: SamplingParams,
        drawn: _Drawn,
        rows: torch.Tensor,
        step: int,
    ) -> torch.Tensor:
        """[B] one token per row, the same on every rank of the replica."""
        if dist.get_rank() == self._drawing_rank:
            assert logits is not None
            draw = draw_tokens(logits, uniform_B, sampling.temperature, self._vocab_size, sampling.topk_log_probs)
            drawn.record(rows, step, draw)
            tokens = draw.token_ids
        else:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if self._group.size() > 1:
            dist.broadcast(tokens, self._drawing_rank, group=self._group)
        return tokens

    def _share(self, drawn: _Drawn) -> None:
        """Give all ranks of the replica what the drawing rank recorded."""
        if self._group.size() > 1:
            for tensor in drawn.tensors():
                dist.broadcast(tensor, self._drawing_rank, group=self._group)

    def _samples(
        self,
        prompts: Sequence[Prompt],
        group_ids: list[int],
        sampling: SamplingParams,
        drawn: _Drawn,
        routing: BatchRouting | None,
    ) -> list[Sample | FailedSample]:
        stop_ids = set(sampling.stop_token_ids)
        token_ids, log_probs, topk_ids, topk_log_probs = (tensor.cpu() for tensor in drawn.tensors())
        samples: list[Sample | FailedSample] = []
        for row, (tokens, row_log_probs) in enumerate(zip(token_ids.tolist(), log_probs.tolist(), strict=True)):
            # A row that has ended may have been decoded further, until it left the batch: cut at its first stop token.
            stopped_at = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
            length = len(tokens) if stopped_at is None else stopped_at + 1
            prompt = prompts[group_ids[row]]
            sample = Sample(
                prompt=prompt,
                response_ids=tokens[:length],
                rollout_log_probs=row_log_probs[:length],
                finish_reason="length" if stopped_at is None else "stop",
                weight_versions=[(self._weight_version, length)],
                topk_ids=topk_ids[row, :length].clone() if sampling.topk_log_probs else None,
                topk_log_probs=topk_log_probs[row, :length].clone() if sampling.topk_log_probs else None,
                routed_experts=None if routing is None else routing.of_response(row, len(prompt.token_ids), length),
                group_id=group_ids[row],
            )
            try:
                sample.check()
            except InvalidSampleError as error:
                samples.append(FailedSample(prompt, str(error), group_ids[row]))
            else:
                samples.append(sample)
        return samples


class _Drawn:
    """Everything drawn for one batch: [B, T] token ids and log-probs, [B, T, K] top-K ids and log-probs."""

    def __init__(self, batch: int, limit: int, topk: int, device: torch.device) -> None:
        self.token_ids = torch.zeros(batch, limit, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(batch, limit, dtype=torch.float32, device=device)
        self.topk_ids = torch.zeros(batch, limit, topk, dtype=torch.int64, device=device)
        self.topk_log_probs = torch.zeros(batch, limit, topk, dtype=torch.float32, device=device)

    def record(self, rows: torch.Tensor, step: int, draw: Draw) -> None:
        self.token_ids[rows, step] = draw.token_ids
        self.log_probs[rows, step] = draw.log_probs
        self.topk_ids[rows, step] = draw.topk_ids
        self.topk_log_probs[rows, step] = draw.topk_log_probs

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.token_ids, self.log_probs, self.topk_ids, self.topk_log_probs


class _Lockstep:
    """Keeps replicas that hold each other's experts at the same number of forward passes.

    An expert layer is a collective over all ranks that share the experts. If those lie in several replicas, a replica
    that has finished must still serve the others' tokens with its experts: it goes on with idle passes until nobody
    works.
    """

    def __init__(self, token_dispatcher: str | None) -> None:
        """``token_dispatcher``: of an MoE policy; None for a dense one."""
        self._group: dist.ProcessGroup | None = None
        if token_dispatcher is None:
            return
        expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        per_stage = replica_group().size() // parallel_state.get_pipeline_model_parallel_world_size()
        if per_stage % expert_group.size() == 0:
            return  # every group of experts lies within one replica
        if token_dispatcher == "allgather":
            raise ValueError(
                "moe_token_dispatcher_type='allgather' needs equal token counts on all expert-parallel ranks, and "
                "replicas generate at different lengths: use 'alltoall'"
            )
        # Groups of ranks are consecutive, so a multiple of the replica covers whole replicas; else play safe.
        self._group = expert_group if expert_group.size() % per_stage == 0 else dist.group.WORLD

    @property
    def spans_replicas(self) -> bool:
        """Whether replicas wait for each other."""
        return self._group is not None

    def run_with_others(self) -> None:
        """Before every forward pass of this replica: those that share experts with it run one at the same time."""
        self._any_runs(True)

    def others_run(self) -> bool:
        """Whether a replica that shares experts with this one, which has no work left, is about to run a forward pass."""
        return self._any_runs(False)

    def _any_runs(self, this_one: bool) -> bool:
        if self._group is None:
            return this_one
        device = "cuda" if torch.cuda.is_available() else "cpu"
        flag = torch.tensor([int(this_one)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())


def _left_pad(token_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, L] int64 tokens, prompts flush right, and [B, L] bool padding (None if all lengths are equal)."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    longest = int(lengths.max())
    tokens_BL = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in token_ids], device=device)
    if int(lengths.min()) == longest:
        return tokens_BL, None
    return tokens_BL, (torch.arange(longest) < longest - lengths[:, None]).to(device)
