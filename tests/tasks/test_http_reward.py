"""A service that grades: what it is asked, what its answers mean, and what its faults cost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_grader
from megatron_dppo.tasks.config import HttpRewardConfig, TaskConfig
from megatron_dppo.tasks.http_reward import HttpRewardError
from megatron_dppo.tasks.scoring import Scorer
from megatron_dppo.tasks.task import BatchTask, Problem

PROBLEM = Problem("judged/0", "2?", "2", {"system_prompt": "Box it.", "extra": {"id": 7}})


class Service:
    """Answers with ``reply(body)``: a value to send as JSON, or bytes, or (status, value)."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Any = lambda body: {"reward": 0.5}
        self.at_once = self.most_at_once = 0
        service, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.bodies.append(body)
                    service.headers.append(dict(self.headers))
                    service.at_once += 1
                    service.most_at_once = max(service.most_at_once, service.at_once)
                answer = service.reply(body)
                with lock:
                    service.at_once -= 1
                status, value = answer if isinstance(answer, tuple) else (200, answer)
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/grade?key=hunter2"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def task_config(service: Service, **settings: Any) -> TaskConfig:
    http_reward = HttpRewardConfig(url=service.url, **{"timeout_s": 5.0, **settings})
    return TaskConfig(name="judged", kind="jsonl", path="unread.jsonl", http_reward=http_reward)


def scores(service: Service, *responses: str, **settings: Any) -> list[float | Exception]:
    task = build_grader(task_config(service, **settings))
    assert isinstance(task, BatchTask)
    return list(task.score_each([(PROBLEM, response) for response in responses]))


def test_each_response_is_a_request_of_its_own_by_default(service: Service) -> None:
    service.reply = lambda body: {"reward": float(body["response"])}
    assert scores(service, "0.25", "1", "0") == [0.25, 1.0, 0.0]
    assert {"question": "2?", "response": "1", "answer": "2"} in service.bodies
    assert all("Authorization" not in headers for headers in service.headers)


def test_requests_and_answers_are_mapped_as_the_service_wants_them(service: Service) -> None:
    """The shapes of OpenRLHF's and slime's reward services, and of one with a list of objects."""
    service.reply = lambda body: {"data": {"scores": [len(text) / 10 for text in body["query"]]}}
    request = {"query": "response", "labels": "answer", "ids": "metadata.extra.id", "system": "system_prompt"}
    shape = {"batch": "columns", "batch_size": 2, "rewards": "data.scores", "reward": ""}
    assert scores(service, "a", "bb", "ccc", request=request, constants={"model": "judge"}, **shape) == [0.1, 0.2, 0.3]
    first = next(body for body in service.bodies if len(body["query"]) == 2)
    expected = {"query": ["a", "bb"], "labels": ["2", "2"], "ids": [7, 7], "system": ["Box it."] * 2, "model": "judge"}
    assert first == expected
    service.reply = lambda body: 0.75
    assert scores(service, "a", reward="") == [0.75]
    service.reply = lambda body: [{"score": [item["response"] == "b"] and [0.5]} for item in body]
    assert scores(service, "a", "b", batch="items", batch_size=32, rewards="", reward="score.0") == [0.5, 0.5]
    service.reply = lambda body: {"rewards": [{"reward": 1}] * len(body["samples"])}
    assert scores(service, "a", "b", batch="items", batch_size=2, items="samples") == [1.0, 1.0]


def test_scores_are_brought_to_0_to_1(service: Service) -> None:
    service.reply = lambda body: {"reward": float(body["response"])}
    assert scores(service, "-2", "3", "0.5", lowest=-2, highest=3) == [0.0, 1.0, 0.5]
    assert scores(service, "0", "-1000", scale="sigmoid") == [0.5, 0.0]
    assert scores(service, "2", "1000", scale="sigmoid") == [pytest.approx(0.8808, abs=1e-4), 1.0]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"reward": float("nan")}, "gives 'nan' as reward, no finite number"),
        ({"reward": "0.5"}, "gives '0.5' as reward, no finite number"),
        ({"reward": True}, "gives 'True' as reward"),
        ({"score": 1}, "gives 'None' as reward"),
        ((404, {}), "answers 404"),
        ((302, {}), "answers 302"),
        ((500, {}), "answers 500"),
        (b"<html>", "something else than JSON: b'<html>'"),
    ],
)
def test_an_answer_that_is_no_reward_is_a_failed_sample(service: Service, reply: Any, reason: str) -> None:
    service.reply = lambda body: reply if body["response"] == "bad" else {"reward": 0.5}
    before, failed, after = scores(service, "a", "bad", "b")
    assert (before, after) == (0.5, 0.5)
    assert isinstance(failed, HttpRewardError)
    assert reason in str(failed)
    assert "hunter2" not in str(failed)  # a query may hold a key
    assert len(service.bodies) == (4 if reply == (500, {}) else 3)


def test_a_list_of_another_length_belongs_to_nobody(service: Service) -> None:
    service.reply = lambda body: {"rewards": [{"reward": 1}]}
    for failed in scores(service, "a", "b", batch="items", batch_size=2, items="samples"):
        assert "gives a list of 1 for 2 responses" in str(failed)


def test_what_fails_for_a_moment_is_tried_again(service: Service) -> None:
    failures = iter([(503, {}), (429, {})])
    service.reply = lambda body: next(failures, {"reward": 1.0})
    assert scores(service, "a", tries=3) == [1.0]
    assert len(service.bodies) == 3
    service.close()
    (failed,) = scores(service, "a")
    assert "cannot be asked (ClientConnectorError)" in str(failed)


def test_a_service_that_hangs_costs_its_time_limit_and_not_more(service: Service) -> None:
    service.reply = lambda body: time.sleep(1.5 if body["response"] == "slow" else 0) or {"reward": 0.5}
    start = time.monotonic()
    slow, quick = scores(service, "slow", "quick", timeout_s=0.5, tries=1)
    assert "does not answer within 0.5 s" in str(slow)
    assert quick == 0.5
    assert time.monotonic() - start < 1.4


def test_so_many_requests_are_under_way_and_no_more(service: Service) -> None:
    service.reply = lambda body: time.sleep(0.05) or {"reward": 0.5}
    assert scores(service, *"abcdefgh", concurrency=3) == [0.5] * 8
    assert service.most_at_once == 3


def test_the_key_is_sent_and_never_told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match=r"task judged: http_reward.api_key_env names JUDGE_KEY, which is not set"):
        scores(service, "a", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "open sesame")
    service.reply = lambda body: (401, {})
    (failed,) = scores(service, "a", api_key_env="JUDGE_KEY")
    assert service.headers[0]["Authorization"] == "Bearer open sesame"
    assert "sesame" not in str(failed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "grade.me"}, "url has to be http://"),
        ({"url": "http://me:hunter2@host"}, "must not hold a password"),
        ({"batch": "rows"}, "batch 'rows' is unknown; choose none, items, columns"),
        ({"batch_size": 2}, "1 with batch: none"),
        ({"batch": "items", "batch_size": 64}, "batch_size is 1 to 32"),
        ({"request": {"a": "prompt"}}, "request maps names to question, response"),
        ({"constants": {"answer": 1}}, "answer is in request and in constants"),
        ({"lowest": 1.0}, "lowest has to be less than highest"),
        ({"tries": 0}, "have to be positive"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    config = HttpRewardConfig(**{"url": "http://127.0.0.1:1/", **settings})
    with pytest.raises(TaskError, match="task judged: http_reward: ") as error:
        build_grader(TaskConfig(name="judged", kind="jsonl", path="unread", http_reward=config))
    assert message in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_scoring_worker_asks_for_a_whole_message_together(service: Service) -> None:
    service.reply = lambda body: time.sleep(0.1) or ({"reward": 0.5} if body["response"] != "7" else {"reward": 3})
    config = task_config(service, concurrency=16)
    config.graded_part = "after_thinking"
    responses = [f"</think>{n}" for n in range(12)] + ["no end of thinking"]
    with Scorer([config], timeout_s=10.0) as scorer:
        results = scorer.score([(PROBLEM, response) for response in responses])
    assert [result.reward for result in results] == [0.5] * 7 + [0.0] + [0.5] * 4 + [0.0]
    assert [result.failure for result in results] == [None] * 7 + ["invalid"] + [None] * 5
    assert service.most_at_once > 6
