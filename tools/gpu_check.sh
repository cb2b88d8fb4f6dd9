#!/usr/bin/env bash
# Everything that only a machine with a CUDA GPU can show, in one command and one table.
#
#   tools/gpu_check.sh                 installs into .venv, builds the CUDA kernels, then tests and benchmarks them
#   tools/gpu_check.sh --skip-tests    benchmarks only
#
# Needs an NVIDIA driver and GPU (compute capability 8.0 or newer) and nvcc (CUDA_HOME, if it is neither on PATH nor in
# /usr/local/cuda). Used where installed: compute-sanitizer, Transformer Engine, a second GPU.
# Exit code: 0 all passed, 1 something failed, 3 there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 0
fi
if ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "no GPU: gpu_check needs an NVIDIA GPU with its driver, and nvcc to build the kernels. Nothing was checked." >&2
  exit 3
fi
source tools/setup/environment.sh
export MEGATRON_DPPO_BUILD_EXT=1 MEGATRON_DPPO_CUDA=1 # a build without CUDA kernels is an error here
ensure_environment .venv
if ! .venv/bin/python -c 'import sys, megatron_dppo._C as c; sys.exit(not c.cuda_archs)' 2>/dev/null; then
  .venv/bin/pip install -q --no-deps --no-build-isolation -e . # the environment was made on another day, without CUDA
fi
exec .venv/bin/python tools/check/gpu_check.py "$@"
