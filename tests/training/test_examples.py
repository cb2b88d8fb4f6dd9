"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.forked_ranks import run_script

ROOT = Path(__file__).parents[2]


def test_the_readme_loss_snippets_run_as_they_stand(monkeypatch):
    from megatron.core import parallel_state

    # One rank without Megatron's groups: the logits are whole.
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    in_megatron, alone = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shape, vocab = (2, 4), 151936
    logits = torch.randn(*shape, vocab, requires_grad=True)
    batch = {
        "tokens": torch.zeros(shape, dtype=torch.int64),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "target": torch.randint(0, vocab, shape),
        "loss_mask": torch.ones(shape, dtype=torch.bool),
        "advantages": torch.tensor([[1.0] * 4, [-1.0] * 4]),
        "rollout_log_probs": torch.full(shape, -12.0),
    }
    names: dict = {}
    exec(in_megatron, names)
    output, loss_func = names["forward_step"](iter([batch]), lambda tokens, position_ids, mask: logits * 1.0)
    loss, num_tokens, report = loss_func(output)
    loss.backward()
    assert int(num_tokens) == 8
    assert logits.grad.abs().sum() > 0
    assert "dppo/mask_fraction" in report
    of_megatron, logits.grad = logits.grad, None
    exec(alone, {**batch, "mask": batch["loss_mask"], "logits": logits})
    assert logits.grad.abs().sum() > 0
    assert not torch.equal(logits.grad, of_megatron)  # another divergence, and divided by the tokens


@pytest.mark.slow
def test_the_megatron_loop_example_learns_until_the_trust_region_stops_it(tmp_path):
    """By torchrun a run is started in training/test_killed_runs.py."""
    code, output = run_script(ROOT / "examples/dppo_in_megatron_loop.py", [], ranks=2, folder=tmp_path, timeout=240)
    assert code == 0, output[-3000:]
    losses = [float(x) for x in re.findall(r"loss ([+-]\d+\.\d+)", output)]
    masked = [float(x) for x in re.findall(r"masked (\d+\.\d)%", output)]
    assert len(losses) == 10
    assert losses[1] < losses[0]  # the surrogate improves ...
    assert masked[0] == 0.0  # ... from a policy that is the rollout policy ...
    assert masked[-1] > 50.0  # ... until most tokens have moved as far as they may
