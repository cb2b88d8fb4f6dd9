"""A frozen copy of this rank's weights that can be put in the policy's place for a forward pass.

Used for the reference policy (KL penalty) and, with an exact divergence, for the rollout policy of the current batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class FrozenWeights:
    """Clones of the parameters of model chunks, of the same layout: no communication, one copy of the local shards."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._copies = [parameter.detach().clone() for parameter in self._parameters]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The copies."""
        return self._copies

    @torch.no_grad()
    def refresh(self) -> None:
        """Freeze the present weights instead."""
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model computes with the frozen weights.

        Storage is exchanged, not copied, so autograd's version counters do not move and main gradients stay attached to
        their parameters.
        """
        present = [parameter.data for parameter in self._parameters]
        try:
            for parameter, copy in zip(self._parameters, self._copies, strict=True):
                parameter.data = copy
            with torch.no_grad():
                yield
        finally:
            for parameter, data in zip(self._parameters, present, strict=True):
                parameter.data = data
