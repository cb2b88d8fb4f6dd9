#!/usr/bin/env python3
"""How long it takes to bring new weights to the servers, before a run: counted bytes and calls, times what links do.

    python -W ignore tools/plan_sync.py examples/conf/qwen3_30b_a3b.yaml
    python -W ignore tools/plan_sync.py RECIPE parallel.expert_model_parallel_size=16 rollout.sglang.max_senders=8
    python -W ignore tools/plan_sync.py RECIPE --network 50e9 --call 0.01 --server-tp 8

Buckets are planned as a run plans them (models/hf/export.py) and sent as a run sends them: every sender puts one together
while another is on its way; servers take them one after the other. Rates are of the slowest link or device on the way. Those
that are not given are what H100 nodes with 400 Gb/s each are said to do; tools/bench/weight_sync.py measures them on a CPU
and holds what is planned with them against what it takes. model.path has to be there, its config.json at least.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from megatron_dppo.launch.plan.sync_cost import Forecast, Rates, planned_sync
from megatron_dppo.models.hf.config import is_moe, load_hf_config
from megatron_dppo.training.config.load import load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file; see examples/conf")
    parser.add_argument("--server-tp", type=int, help="ranks of a server; default: of the configuration")
    for rate in fields(Rates):
        parser.add_argument(f"--{rate.name}", type=float, default=rate.default, metavar=f"{rate.default:g}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration overrides")
    options = parser.parse_intermixed_args()
    try:
        config = load_config(options.config, options.overrides)
        hf_config = load_hf_config(config.model.path)
        sync = planned_sync(config, hf_config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sglang, buckets, gathered = config.rollout.sglang, sync.buckets, sync.gathered
    server_ranks = options.server_tp or sglang.tensor_model_parallel_size
    rates = Rates(**{rate.name: getattr(options, rate.name) for rate in fields(Rates)})
    expected = sync.forecast(server_ranks, rates)

    console = Console(highlight=False)
    tensors = [tensor for bucket in buckets for tensor in bucket.tensors]
    console.print(
        f"{sync.nbytes / 1e9:.1f} GB in {len(tensors)} tensors{' (MoE)' if is_moe(hf_config) else ''}, {len(buckets)} buckets"
        f" of {sglang.bucket_bytes / 1e6:.0f} MB from {len({bucket.sender for bucket in buckets})} of {sync.holders} ranks"
        f" that hold one copy; {sum(m for m, _ in gathered)} messages and {sum(b for _, b in gathered) / 1e9:.1f} GB between"
        f" them; one hash launch a bucket"
    )
    table = Table("part", "seconds")
    for part in fields(Forecast):
        if part.name != "total":
            table.add_row(part.name.replace("_", " "), f"{getattr(expected, part.name):.2f}")
    table.add_row("all, overlapped", f"{expected.total:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
