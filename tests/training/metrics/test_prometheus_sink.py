"""The Prometheus endpoint: the last step's numbers in its text format."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from megatron_dppo.training.metrics.prometheus_sink import PrometheusSink, exposition
from tests.forked_ranks import free_port


def test_numbers_are_gauges_and_texts_are_labels() -> None:
    page = exposition({"dppo/mask_fraction_mu_0_0.01": 0.25, "loss": float("nan"), "backend": "cpu"}, 'a "run"')
    assert page.splitlines() == [
        "# TYPE megatron_dppo_dppo_mask_fraction_mu_0_0_01 gauge",
        'megatron_dppo_dppo_mask_fraction_mu_0_0_01{run="a \\"run\\""} 0.25',
        "# TYPE megatron_dppo_loss gauge",
        'megatron_dppo_loss{run="a \\"run\\""} NaN',
        "# TYPE megatron_dppo_backend_info gauge",
        'megatron_dppo_backend_info{run="a \\"run\\"",value="cpu"} 1',
    ]


def test_the_endpoint_has_the_last_step_until_it_is_closed() -> None:
    port = free_port()
    sink = PrometheusSink(port, "run")
    address = f"http://127.0.0.1:{port}"
    try:
        sink.record(1, {"reward/mean": 0.5, "eval/accuracy": 0.1})
        sink.record(2, {"reward/mean": 0.75})
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            page = answer.read().decode()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert 'megatron_dppo_step{run="run"} 2.0' in page
        assert 'megatron_dppo_reward_mean{run="run"} 0.75' in page
        assert "accuracy" not in page  # of an older step
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/elsewhere", timeout=10)
    finally:
        sink.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/metrics", timeout=10)
