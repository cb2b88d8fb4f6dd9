"""docs/metrics.md lists every metric that the code writes, and no other."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from megatron_dppo.loss import metrics
from tests.metric_names import STEP_METRICS

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
LISTED = [name for row in ROWS for name in re.findall("`([^`]+)`", row)]
GROUPS = "batch|bound|dppo|eval|memory|mismatch|reference|reward|rollout|throughput|time|train"
# Made from parts of a name ...
MASKED_BY_MU = {
    f"dppo/mask_fraction_mu_{low:g}_{high:g}" for low, high in itertools.pairwise(metrics.ROLLOUT_PROBABILITY_BINS)
}
LOOP = [ROOT / "megatron_dppo/training" / file for file in ("trainer.py", "devices.py")]
PHASES = {phase for file in LOOP for phase in re.findall(r"timed\(\"(\w+)\"\)", file.read_text())}
WORK = {"generate", "score", "forward_backward"}
TIMES = {f"time/{phase}_{what}" for phase in PHASES | WORK for what in ("s", "mean_s", "slowest_rank")}
# ... and what only serves to make another (the effective sample size, the largest token's share), or is Kubernetes' name.
NOT_WRITTEN = {"mismatch/ratio_squared_mean", "dppo/update_mean", "dppo/update_max", "batch/v1"}


def written_in(source: str) -> set[str]:
    """Names of metrics that stand in a file as string literals."""
    return set(re.findall(rf'"((?:{GROUPS})/[a-z0-9_.]+)"', source))


def test_every_metric_is_on_the_page_and_the_page_has_no_other() -> None:
    in_code = set().union(*(written_in(file.read_text("utf-8")) for file in (ROOT / "megatron_dppo").rglob("*.py")))
    assert len(PHASES) == 5
    without_group = {name for name in STEP_METRICS if "/" not in name}
    assert sorted(LISTED) == sorted((in_code - NOT_WRITTEN) | MASKED_BY_MU | TIMES | without_group)


def test_the_metrics_that_every_run_reports_are_on_the_page() -> None:
    assert set(STEP_METRICS) <= set(LISTED)
