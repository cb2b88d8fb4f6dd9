#!/usr/bin/env bash
# Install, train a small Qwen3-MoE policy with DPPO on two processes (TP=2, EP=2), and print what it learned.
#
#   tools/quickstart.sh                              about 5 minutes on 2 CPU cores, installation included
#   tools/quickstart.sh rollout.engine=sglang        the same run with a real SGLang server (installs it first)
#   tools/quickstart.sh train.steps=20 run.name=short      any key of examples/conf/quickstart.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 0
fi
source tools/setup/environment.sh
ensure_environment .venv
if [[ " $* " == *" rollout.engine=sglang "* && -z ${MEGATRON_DPPO_SGLANG_PYTHON:-} ]]; then
  tools/setup/install_sglang_cpu.sh .venv-sglang
  export MEGATRON_DPPO_SGLANG_PYTHON=$PWD/.venv-sglang/bin/python
fi
# Two processes need two GPUs; with fewer the run stays on the CPU.
if (($(nvidia-smi -L 2>/dev/null | wc -l) < 2)); then
  export CUDA_VISIBLE_DEVICES=
fi
export OMP_NUM_THREADS=1
.venv/bin/python tools/setup/make_tiny_policy.py --task spell_backward --output models/quickstart
run=(examples/pretrain_dppo.py --config examples/conf/quickstart.yaml "$@")
.venv/bin/python "${run[@]}" --check --world-size 2 # a mistake shows as one line here, under torchrun as forty
exec .venv/bin/torchrun --standalone --nproc-per-node 2 "${run[@]}"
