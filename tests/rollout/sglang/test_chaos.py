"""Everything that happens to servers, one thing after the other: no sample is lost, doubled or drawn by other weights.

Real servers; what is done to them is done by signals. Only lost, refused and late answers are made here. Nightly: on every
push test_failures.py has one server that dies amid a generation and one that dies amid an update.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dppo.errors import TransientServerError
from megatron_dppo.rollout.sample import Sample, SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine
from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import server_config, tiny_weights
from tests.rollout.sglang.server_faults import signal_when_they_work

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]

PROMPTS, SAMPLES, TOKENS = 12, 8, 100


class Fleet:
    """Two servers, the engine that has them, and the weights that they are to serve."""

    def __init__(self, folder: Path) -> None:
        model = write_tiny_hf_model("llama", folder / "model", seed=0)
        # A server that is stopped is given up within seconds.
        config = server_config(
            num_servers=2, request_timeout_s=15.0, control_timeout_s=10.0, max_attempts=8, sync_timeout_s=40.0
        )
        self.engine = SGLangEngine(config, model, vocab_size=250, dtype=torch.float32, log_folder=folder)
        self.servers: list[SGLangServer] = self.engine._pool._source.servers
        self.weights = [tiny_weights("llama", seed) for seed in (1, 2)]
        self.version = 0

    def update(self, servers: int) -> None:
        """To the next version, by at least so many servers."""
        self.version += 1
        self.engine._config.min_servers = servers
        self.engine.update_weights(WholeWeights(self.weights[self.version % 2][1]), self.version)
        assert len(self.engine._sync.urls) >= servers

    def generate(self) -> None:
        """All samples are there, once, and are those of the newest weights."""
        prompts = make_prompts(250, [4] * PROMPTS, seed=self.version)
        samples = self.engine.generate(prompts, SamplingParams(max_new_tokens=TOKENS, samples_per_prompt=SAMPLES))
        assert [type(sample) for sample in samples] == [Sample] * (PROMPTS * SAMPLES)
        assert [sample.group_id for sample in samples] == [index for index in range(PROMPTS) for _ in range(SAMPLES)]
        assert [sample.prompt for sample in samples] == [prompts[sample.group_id] for sample in samples]
        assert {span for sample in samples for span in sample.weight_versions} == {(self.version, TOKENS)}
        of_prompts = {tuple(sample.response_ids) for sample in samples}
        assert len(of_prompts) == len(samples), "seeds differ, so a response that comes twice was counted twice"
        hf_model = self.weights[self.version % 2][0]
        assert_log_probs_match(EngineUnderTest(self.engine, hf_model, lambda *_: None), samples[::19], 1.0)

    @contextmanager
    def at(self, path: str, action: Callable[[str], None]) -> Iterator[list[str]]:
        """Before the first request to ``path`` is sent within, this happens; it is given the server's address."""
        intact, done = self.engine._transport.request, []

        async def request(url: str, asked: str, body: Any, timeout_s: float) -> Any:
            if asked == path and not done:
                done.append(url)
                action(url)
            return await intact(url, asked, body, timeout_s)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine._transport, "request", request)
            yield done
        assert done, f"nobody asked {path}"

    def signal(self, server: SGLangServer, number: signal.Signals) -> None:
        os.killpg(server.pid, number)

    def server_at(self, url: str) -> SGLangServer:
        return next(server for server in self.servers if server.url == url)


def killed_while_it_generates(fleet: Fleet, which: int, _chance: random.Random) -> None:
    fleet.update(servers=2)
    killer = signal_when_they_work([fleet.servers[which]])
    fleet.generate()
    killer.join()


def killed_while_it_is_idle(fleet: Fleet, which: int, _chance: random.Random) -> None:
    fleet.update(servers=2)
    fleet.signal(fleet.servers[which], signal.SIGKILL)
    fleet.generate()


def _killed_at(path: str) -> Callable[[Fleet, int, random.Random], None]:
    def happens(fleet: Fleet, _which: int, _chance: random.Random) -> None:
        with fleet.at(path, lambda url: fleet.signal(fleet.server_at(url), signal.SIGKILL)) as killed:
            fleet.update(servers=1)
        assert killed[0] not in fleet.engine._sync.urls, "started again, it has another port"
        fleet.generate()

    happens.__name__ = f"killed_at{path.replace('/', '_')}"
    return happens


def stopped_for_longer_than_the_timeout(fleet: Fleet, which: int, _chance: random.Random) -> None:
    fleet.update(servers=2)
    server = fleet.servers[which]
    stopper = signal_when_they_work([server], signal.SIGSTOP)
    fleet.generate()
    stopper.join()
    fleet.update(servers=1)  # without it
    fleet.generate()
    fleet.signal(server, signal.SIGCONT)
    time.sleep(1.0)
    fleet.update(servers=2)  # with it: it has the weights of two versions ago, and gets these
    fleet.generate()


def one_answer_in_twenty_is_lost_refused_or_late(fleet: Fleet, _which: int, chance: random.Random) -> None:
    fleet.update(servers=2)
    intact, faults = fleet.engine._transport.request, []

    async def request(url: str, path: str, body: Any, timeout_s: float) -> Any:
        if path != "/generate" or chance.random() > 0.05:
            return await intact(url, path, body, timeout_s)
        faults.append(chance.choice(["refused", "lost", "late"]))
        if faults[-1] == "refused":
            raise TransientServerError(f"{url}{path} failed (503): busy")
        answer = await intact(url, path, body, timeout_s)
        if faults[-1] == "late":
            await asyncio.sleep(3.0)
            return answer
        raise TransientServerError(f"{url}{path} cannot be reached: connection reset")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet.engine._transport, "request", request)
        for _ in range(3):
            fleet.generate()
    assert set(faults) == {"refused", "lost", "late"}, "the seed does not bring all of them"


EVENTS = [
    killed_while_it_generates,
    killed_while_it_is_idle,
    _killed_at("/update_weights_from_distributed"),
    _killed_at("/weights_checker"),
    _killed_at("/continue_generation"),
    stopped_for_longer_than_the_timeout,
    one_answer_in_twenty_is_lost_refused_or_late,
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_doubled_or_drawn_by_other_weights(fleet: Fleet, seed: int) -> None:
    chance = random.Random(seed)
    for event in chance.sample(EVENTS, len(EVENTS)):
        print(f"version {fleet.version + 1}: {event.__name__}")
        event(fleet, chance.randrange(2), chance)
    fleet.update(servers=2)  # all have come back
    fleet.generate()
