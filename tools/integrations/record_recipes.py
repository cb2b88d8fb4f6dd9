#!/usr/bin/env python3
"""Record which keys real recipes of NeMo-RL and verl set, for the tests of `megatron-dppo import-config`.

    git clone https://github.com/NVIDIA-NeMo/RL NEMO_RL
    git clone https://github.com/verl-project/verl VERL
    python tools/integrations/record_recipes.py --nemo-rl NEMO_RL --verl VERL

Keys and values only, without comments and without the text of the files: of NeMo-RL what each file of a chain of `defaults`
sets; of verl the arguments that a script passes to its program, for which the script is run with stand-ins for `python3` and
`uv` that write down what they are called with. Run by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

RECORDS = Path(__file__).resolve().parents[2] / "tests" / "launch" / "records"
NEMO_RL = (
    "grpo_math_1B.yaml",
    "grpo_math_1B_megatron.yaml",
    "grpo_math_qwen30ba3b_megatron.yaml",
    "recipes/llm/grpo-qwen3-30ba3b-8n8g-megatron-cp2-r3.yaml",
    "recipes/llm/grpo-qwen3-30ba3b-10n8g-megatron-cp2-r3-async.yaml",
    "recipes/llm/performance/grpo-qwen3-235b-16n8g.yaml",
)
VERL = (
    "dppo_trainer/run_qwen3_30b_a3b_megatron.sh",
    "grpo_trainer/run_qwen3_8b_megatron.sh",
    "grpo_trainer/run_qwen3_235b_a22b_megatron.sh",
)
STAND_IN = '#!/bin/sh\ncase "$1" in -c) exit 1;; esac\nfor word in "$@"; do printf "%s\\n" "$word" >> "$RECORD"; done\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nemo-rl", type=Path, required=True, help="a checkout")
    parser.add_argument("--verl", type=Path, required=True, help="a checkout")
    options = parser.parse_args()
    RECORDS.mkdir(parents=True, exist_ok=True)
    configs = options.nemo_rl / "examples" / "configs"
    save("nemo_rl_recipes", {name: yaml.safe_load((configs / name).read_text()) for name in NEMO_RL})
    save("verl_overrides", {name: arguments(options.verl / "examples" / name) for name in VERL})


def arguments(script: Path) -> list[str]:
    """The overrides that a script passes, in order."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("python3", "uv"):
            stand_in = Path(folder) / name
            stand_in.write_text(STAND_IN)
            stand_in.chmod(0o755)
        record = Path(folder) / "record"
        # Without the caller's variables, on which scripts let their defaults depend.
        environment = {"PATH": f"{folder}:{os.defpath}", "HOME": "/home/user", "RECORD": str(record)}
        subprocess.run(["bash", str(script)], env=environment, cwd=folder, check=True, timeout=60, capture_output=True)
        return [word for word in record.read_text().splitlines() if "=" in word and not word.startswith("ray_kwargs")]


def save(name: str, record: dict[str, Any]) -> None:
    path = RECORDS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
