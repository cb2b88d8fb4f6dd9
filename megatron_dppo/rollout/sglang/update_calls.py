"""What servers are told in a weight update, whichever way the weights take.

pause -> flush the KV cache -> begin -> (buckets: a route's) -> end -> checksums -> label -> continue
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_dppo.errors import RefusedRequestError, WeightSyncError
from megatron_dppo.models.hf.export import Bucket
from megatron_dppo.rollout.sglang.answers import reading
from megatron_dppo.rollout.sglang.parameter_layout import ModelShape, placement
from megatron_dppo.rollout.sglang.transport import Transport


class UpdateCalls:
    """The calls to some servers, all of them at the same time. Each has the time that is left."""

    def __init__(self, urls: Sequence[str], transport: Transport, time_left: Callable[[], float]) -> None:
        """``time_left`` gives seconds, or raises what is to be raised when there are none."""
        self._urls = list(urls)
        self._transport = transport
        self._time_left = time_left

    async def post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        """One call to one server; its answer."""
        return await self._transport.request(url, path, body, self._time_left())

    async def _post_all(self, path: str, body: dict[str, Any]) -> None:
        await asyncio.gather(*(self.post(url, path, body) for url in self._urls))

    async def pause(self) -> None:
        """Nothing is generated from now on, and nothing of what was is kept."""
        await self._post_all("/pause_generation", {"mode": "abort"})
        await self._post_all("/flush_cache", {})

    async def begin(self) -> None:
        """Open the update."""
        await asyncio.gather(*(self._begin(url) for url in self._urls))

    async def _begin(self, url: str) -> None:
        """One that a trainer left open when it died is closed first."""
        try:
            await self.post(url, "/begin_weight_update", {})
        except RefusedRequestError:
            await self.post(url, "/end_weight_update", {})
            await self.post(url, "/begin_weight_update", {})

    async def load(
        self, bucket: Bucket, path: str, bodies: Mapping[str, dict[str, Any]], shape: ModelShape | None
    ) -> None:
        """Let every server load a bucket. Raises WeightSyncError, naming tensors, if one refuses.

        Args:
            bucket: what is loaded.
            path: of the call.
            bodies: url -> what it is told.
            shape: of the model, if the names of servers' parameters are known.
        """
        try:
            await asyncio.gather(*(self.post(url, path, body) for url, body in bodies.items()))
        except RefusedRequestError as error:
            raise WeightSyncError(f"{error}; concerns {_tensors_meant(str(error), bucket, shape)}") from error

    async def end(self) -> None:
        """Close the update."""
        await self._post_all("/end_weight_update", {})

    async def checksums(self, url: str, *asked: str) -> list[tuple[int, dict[str, str]]]:
        """(rank, its checksum of each of its parameters) of each of a server's ranks.

        ``asked``: a ``request_for`` (part_hashes.py) to have those of parts instead, if the server knows how.
        """
        body = {"action": "checksum", **({"skip_tensor_list": asked} if asked else {})}
        answer = await self.post(url, "/weights_checker", body)
        with reading(f"{url}/weights_checker"):
            return [(int(rank["parallelism_info"][0]["tp_rank"]), dict(rank["checksums"])) for rank in answer["ranks"]]

    async def label(self, version: int) -> None:
        """Let every sample from now on say that it is of this version."""
        await self._post_all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def go_on(self) -> None:
        """Generate again."""
        await self._post_all("/continue_generation", {})


def _tensors_meant(refusal: str, bucket: Bucket, shape: ModelShape | None) -> str:
    """The tensors of a bucket that a server speaks of: it names its own parameters, not the checkpoint's tensors."""
    names = [name for name, _ in bucket.tensors]
    if shape is not None:
        places = {name: placement(name, shape) for name in names}
        names = [name for name, place in places.items() if place and place.parameter in refusal] or names
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
