"""A Megatron policy made to decode: prefill once, then one token per step over a key-value cache.

Core's own inference path rotates every cached key again at each step, and its interface changes between versions.
Decoding needs three things beyond a training forward pass, and gets them from outside for as long as
``CachedPolicy.decoding()`` lasts:

1. attention that remembers: every layer's core attention is replaced by one that keeps the (rotated) keys and values;
2. rotary angles of the tokens' real positions: the rotary module's forward returns that slice of the table;
3. logits of the last position only, and the ones that the trainer computes: the model stops at its hidden states, and
   ``PolicyHead`` makes logits of them.

Prompts of different lengths are padded on the left. That shifts a row's positions by a constant, and rotary attention
depends on differences of positions only, so the distribution is that of the row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_dppo.models.attention import attend, attention_scale
from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only


class CachedPolicy:
    """This rank's chunks of a Megatron GPT model, with a key-value cache while ``decoding()``.

    All ranks of a replica call the methods in the same order with the same arguments. Logits are [B, V padded],
    gathered over tensor-parallel ranks, on ranks of the last pipeline stage; elsewhere None. With virtual pipeline stages
    a rank holds several chunks, and hidden states go round the pipeline ranks once per chunk.

    Raises ValueError for models that cannot be decoded this way.
    """

    def __init__(self, models: Sequence[GPTModel]) -> None:
        config = models[0].config
        if models[0].position_embedding_type != "rope":
            raise ValueError(
                f"position_embedding_type={models[0].position_embedding_type!r}: the embedded engine needs 'rope', "
                "whose relative positions make left padding harmless"
            )
        if config.moe_expert_capacity_factor is not None:
            raise ValueError(
                f"moe_expert_capacity_factor={config.moe_expert_capacity_factor}: dropped tokens would make a "
                "response's log-probs depend on its batch; leave it unset"
            )
        self.models = models
        self.config = config
        self._attentions = [[_CachedAttention(attention_scale(config)) for _ in m.decoder.layers] for m in models]
        self._rotary = models[0].rotary_pos_emb
        self._head = PolicyHead(models[-1]) if models[-1].post_process else None
        self._padding_BT: torch.Tensor | None = None
        self._rotary_T11D: torch.Tensor | None = None
        self._length = 0  # tokens in the cache
        self._incoming = 0  # tokens per row in the forward pass under way

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within: eval mode, no gradients, cached attention. Afterwards the model is as before, whatever happened."""
        # no_grad and not inference_mode: core caches tensors made here (rotary tables) and uses them in training.
        with ExitStack() as undo, torch.no_grad():
            for owner, name in _sequence_parallel_switches(self.models):
                undo.callback(setattr, owner, name, True)
                setattr(owner, name, False)
            for model, attentions in zip(self.models, self._attentions, strict=True):
                self._prepare(model, attentions, undo)
            undo.callback(self._forget)
            yield

    def _prepare(self, model: GPTModel, attentions: Sequence[_CachedAttention], undo: ExitStack) -> None:
        """See ``decoding``, for one chunk."""
        for module in model.modules():
            if module.training:
                undo.callback(setattr, module, "training", True)
        model.eval()
        for layer, cached in zip(model.decoder.layers, attentions, strict=True):
            undo.callback(setattr, layer.self_attention, "core_attention", layer.self_attention.core_attention)
            layer.self_attention.core_attention = cached
        undo.callback(delattr, model.rotary_pos_emb, "forward")
        model.rotary_pos_emb.forward = self._real_positions
        undo.enter_context(hidden_states_only(model))

    def prefill(self, tokens_BL: torch.Tensor, padding_BL: torch.Tensor | None) -> torch.Tensor | None:
        """Read whole prompts into an empty cache; returns the logits after the last token.

        ``padding_BL`` is True at the padding on the left of shorter prompts; None: there is none.
        """
        self._forget()
        length = tokens_BL.shape[1]
        self._padding_BT = padding_BL
        self._rotary_T11D = self._rotary.get_emb(length)
        masked_out = None
        if padding_BL is not None:
            # A padding query may look at itself: with nothing to look at, its softmax would be NaN and so would its key.
            itself = torch.eye(length, dtype=torch.bool, device=tokens_BL.device)
            later = torch.ones_like(itself).triu(1)
            masked_out = (later | (padding_BL[:, None, :] & ~itself))[:, None]
        return self._forward(tokens_BL, masked_out)

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor | None:
        """Append one token to every row; returns the logits after it."""
        end = self._length + 1
        masked_out = None if self._padding_BT is None else self._padding_BT[:, None, None, :end]
        return self._forward(tokens_B[:, None], masked_out)

    def select(self, rows: torch.Tensor, capacity: int) -> None:
        """Make the cache's rows ``rows`` (repeated, reordered or dropped), with room for ``capacity`` tokens each."""
        for attention in self._all_attentions():
            attention.select(rows, self._length, capacity)
        if self._padding_BT is not None:
            padding_BT = self._padding_BT[rows, : self._length]
            self._padding_BT = torch.nn.functional.pad(padding_BT, (0, capacity - self._length))
        self._rotary_T11D = self._rotary.get_emb(capacity)

    def _all_attentions(self) -> list[_CachedAttention]:
        return [attention for attentions in self._attentions for attention in attentions]

    def _forget(self) -> None:
        for attention in self._all_attentions():
            attention.key_BGTD = attention.value_BGTD = None
        self._padding_BT = self._rotary_T11D = None
        self._length = 0

    def _real_positions(self, *unused: Any, **unused_too: Any) -> torch.Tensor:
        """In place of the rotary module's forward, which does not know where the tokens stand.

        It would also hand out this rank's part of the table under context parallelism; here every rank has all tokens.
        """
        assert self._rotary_T11D is not None
        return self._rotary_T11D[self._length : self._length + self._incoming]

    def _forward(self, tokens_BS: torch.Tensor, masked_out: torch.Tensor | None) -> torch.Tensor | None:
        """The model's layers in order: this rank's chunks, each waiting for the hidden states of the rank before."""
        batch, self._incoming = tokens_BS.shape
        for attention in self._all_attentions():
            attention.length = self._length
        logits = None
        for model in self.models:
            if not model.pre_process:
                model.set_input_tensor(self._receive_hidden(batch))
            # No position ids: rotary takes them from the hook.
            output = model(tokens_BS, None, masked_out)
            if model.post_process:
                logits = self._logits(output[:, -1])
            else:
                dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        self._length += self._incoming
        return logits

    def _logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """[B, V padded] on every tensor-parallel rank."""
        assert self._head is not None
        logits: torch.Tensor = gather_from_tensor_model_parallel_region(
            self._head.logits(hidden_BH), group=self._head.tp_group
        )
        return logits

    def _receive_hidden(self, batch: int) -> torch.Tensor:
        dtype = torch.float32 if self.config.fp32_residual_connection else self.config.pipeline_dtype
        shape = (self._incoming, batch, self.config.hidden_size)
        hidden_SBH = torch.empty(shape, dtype=dtype, device=next(self.models[0].parameters()).device)
        # Ranks form a ring: the first one takes its second chunk's hidden states from the last one.
        dist.recv(hidden_SBH, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden_SBH


class _CachedAttention(torch.nn.Module):
    """Core attention over everything it was ever given. Keys come rotated, so they are rotated once."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.length = 0  # tokens in the cache before this forward pass
        self.key_BGTD: torch.Tensor | None = None
        self.value_BGTD: torch.Tensor | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """[s, b, heads, dim] -> [s, b, heads * dim]; ``attention_mask`` covers the whole cache."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.key_BGTD is None or self.value_BGTD is None:
            self.key_BGTD, self.value_BGTD = key, value
        else:
            end = self.length + key.shape[2]
            self.key_BGTD[:, :, self.length : end] = key
            self.value_BGTD[:, :, self.length : end] = value
            key, value = self.key_BGTD[:, :, :end], self.value_BGTD[:, :, :end]
        context = attend(query, key, value, attention_mask, self.scale)
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    def select(self, rows: torch.Tensor, length: int, capacity: int) -> None:
        """See ``CachedPolicy.select``."""
        assert self.key_BGTD is not None
        assert self.value_BGTD is not None
        self.key_BGTD, self.value_BGTD = (
            _with_capacity(cache[:, :, :length].index_select(0, rows), capacity)
            for cache in (self.key_BGTD, self.value_BGTD)
        )


def _with_capacity(cache_BGTD: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, groups, length, dim = cache_BGTD.shape
    roomy = cache_BGTD.new_empty(batch, groups, capacity, dim)
    roomy[:, :, :length] = cache_BGTD
    return roomy


def _sequence_parallel_switches(models: Sequence[torch.nn.Module]) -> list[tuple[Any, str]]:
    """Every (object, attribute) that has to be off for one token per sequence, which cannot be split over ranks.

    Without sequence parallelism tensor-parallel ranks hold the same whole hidden states: same weights, same numbers. An
    MoE layer then sends each token from every tensor-parallel rank, which costs work at decode but changes nothing.
    """
    modules = [module for model in models for module in model.modules()]
    owners = {id(owner): owner for module in modules for owner in (module, getattr(module, "config", None))}
    return [
        (owner, name)
        for owner in owners.values()
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(owner, name, None) is True
    ]
