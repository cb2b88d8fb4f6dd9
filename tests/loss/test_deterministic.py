"""What ``DPPOLoss(deterministic=...)`` takes; what it gives is in tests/layouts/test_layout_bits.py."""

from __future__ import annotations

import pytest

from megatron_dppo import DPPOConfig, DPPOLoss
from megatron_dppo.loss.config import DIVERGENCES


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_over_all_columns_is_refused(divergence: str) -> None:
    config = DPPOConfig(divergence=divergence)
    if divergence.startswith("exact"):
        with pytest.raises(ValueError, match=f"deterministic='layout' does not cover divergence='{divergence}'"):
            DPPOLoss(config, vocab_size=8, deterministic="layout")
    else:
        assert DPPOLoss(config, vocab_size=8, deterministic="layout").deterministic == "layout"
    assert DPPOLoss(config, vocab_size=8).deterministic == "off"


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match="deterministic must be one of off, layout, not 'on'"):
        DPPOLoss(DPPOConfig(), vocab_size=8, deterministic="on")
