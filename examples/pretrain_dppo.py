#!/usr/bin/env python3
"""Train a policy with DPPO: ``megatron-dppo train`` as a script that torchrun starts.

    torchrun --nproc-per-node 2 examples/pretrain_dppo.py --config examples/conf/quickstart.yaml
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/pretrain_dppo.py --config examples/conf/qwen3_30b_a3b.yaml run.name=my-run rollout.prompts_per_step=256

megatron_dppo/train.py says what the options and the exit codes mean.
"""

from __future__ import annotations

import sys

from megatron_dppo.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
