"""Folders of runs for the report: the quick start's record, with the other files written by the code that writes a run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.training.config.schema import Config, LoggingConfig, RunConfig
from megatron_dppo.training.metrics.run_folder import RunFolder
from megatron_dppo.training.metrics.sample_log import chosen_samples, distribution_record, sample_records
from megatron_dppo.training.metrics.token_record import POSITION_BINS, PROBABILITY_BINS, StepTokens
from tests.training.metrics.made_rollouts import made_rollouts, token_texts

RECORD = Path(__file__).parents[3] / "docs" / "records" / "quickstart"
STEPS = 40
# What a response must not be able to do to the page.
HOSTILE = "</script><img src=x onerror='window.harmed = true'>\u2028<!--data-->"


def write_run(root: Path, name: str, masked: float = 0.1) -> Path:
    """Some steps of the record with samples, distributions and an alarm; ``masked``: share of tokens held back."""
    config = Config(run=RunConfig(name=name, root=str(root)), logging=LoggingConfig(samples_per_step=4))
    config.algorithm.loss = DPPOConfig(delta_low=masked)
    folder = RunFolder(config.run)
    folder.create(config)
    lines = (RECORD / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[: STEPS + 1]
    folder.metrics_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for step in range(1, STEPS + 1):
        rollouts = made_rollouts([(number * step) % 7 / 6 for number in range(8)], text=HOSTILE)
        chosen = chosen_samples(rollouts, 4)
        tokens = StepTokens(
            by_position=[[10.0, 10 * masked, 0.5, 0.7] if bin < 4 else [0.0] * 4 for bin in range(len(POSITION_BINS))],
            by_probability=[[4.0, 4 * masked, 0.2, 0.3]] * len(PROBABILITY_BINS),
            traces={
                number: {
                    place: [float(place % 3 > 0), 0.01 * place, -0.5 * place, -0.4 * place]
                    for place in range(number + 1)
                }
                for number in chosen
            },
        )
        for sample in sample_records(
            step, rollouts.own, chosen, tokens if step % 5 == 0 else StepTokens(), token_texts
        ):
            folder.append(folder.samples_path, sample)
        folder.append(folder.distributions_path, distribution_record(step, rollouts, tokens, longest=512))
    alarm = {"step": 12, "alarm": "mask_fraction", "message": "dppo/mask_fraction was 0.4 in the mean of 10 steps"}
    folder.append(folder.alarms_path, alarm)
    return folder.path


def copy_of_the_record(root: Path, name: str) -> Path:
    """Metrics and configuration alone, as they are in docs/records."""
    return Path(shutil.copytree(RECORD, root / name))


def write_long_run(root: Path, steps: int) -> Path:
    """Metrics of so many steps."""
    (root / "long").mkdir()
    record = json.loads((RECORD / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[5])
    with (root / "long" / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({**record, "step": step}) + "\n")
        file.write('{"step": 999999999, "torn by a ki')
    return root / "long"
