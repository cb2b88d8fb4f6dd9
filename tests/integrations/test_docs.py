"""What docs/integrations.md shows is what the frameworks get: every block runs, and gives what the hook asks for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integrations.recording import load
from tests.integrations.stand_ins import install

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
LONGEST = 10


def blocks() -> dict[str, str]:
    """{adapter: code} of the page's Python blocks."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return {re.search(r"integrations\.(\w+) import", block)[1]: block for block in found}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Frameworks of the recorded versions; what is registered with any of them."""
    losses: dict[str, Any] = {}
    versions = {name: load(name)["version"] for name in ("verl", "slime", "miles", "nemo_rl", "skyrl", "megatron_rl")}
    monkeypatch.setattr("megatron_dppo.integrations.framework.version", versions.__getitem__)
    kinds = SimpleNamespace(LOGPROB="logprob", TOKENS=1, SEQUENCES=2, NONE=3)
    interfaces = {"LossInputType": kinds, "MetricNormalizer": kinds, "LossType": {"TOKEN_LEVEL": "token"}}
    rl_utils = SimpleNamespace(selective_log_softmax=None)
    install(
        monkeypatch,
        {
            "verl": {"__version__": versions["verl"]},
            "verl.trainer.ppo.core_algos": {
                "register_policy_loss": lambda name: lambda loss: losses.setdefault(name, loss)
            },
            "nemo_rl": {"__version__": versions["nemo_rl"]},
            "nemo_rl.algorithms.loss.interfaces": interfaces,
            "skyrl": {"__version__": versions["skyrl"]},
            "skyrl.backends.skyrl_train.utils.ppo_utils": {
                "PolicyLossRegistry": SimpleNamespace(register=losses.__setitem__)
            },
            "megatron.core.package_info": {"__version__": versions["megatron_rl"]},
            "megatron.rl": {"rl_utils": rl_utils},
        },
    )
    return losses


def test_every_adapter_has_a_block_of_a_few_lines() -> None:
    assert blocks().keys() == {"verl", "slime", "nemo_rl", "megatron_rl", "skyrl"}  # miles has slime's, by its own name
    assert max(block.count("\n") for block in blocks().values()) <= LONGEST


@pytest.mark.parametrize("adapter", ["verl", "skyrl"])
def test_a_registered_loss_is_in_the_registry(adapter: str, registered: dict[str, Any]) -> None:
    exec(blocks()[adapter], {})
    (name,) = registered
    assert f"={name}" in PAGE.read_text(encoding="utf-8")  # the option that chooses it
    assert callable(registered[name])


@pytest.mark.parametrize(
    ("adapter", "name"),
    [("slime", "loss_function"), ("nemo_rl", "loss_fn"), ("megatron_rl", "calculate_grpo_loss")],
)
def test_a_loss_has_the_name_that_the_framework_calls(adapter: str, name: str, registered: dict[str, Any]) -> None:
    for framework in (adapter, "miles") if adapter == "slime" else (adapter,):
        names: dict[str, Any] = {}
        exec(blocks()[adapter].replace(f"integrations.{adapter} ", f"integrations.{framework} "), names)
        assert callable(names[name])
        if adapter == "megatron_rl":
            assert callable(names["rl_utils"].selective_log_softmax)
