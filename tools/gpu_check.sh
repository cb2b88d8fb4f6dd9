#!/usr/bin/env bash
# Everything that only a machine with a CUDA GPU can show, in one command and one table (docs/gpu.md).
#
#   tools/gpu_check.sh                               installs into .venv, builds the CUDA kernels, then checks everything
#   PYTHON=python3 WHEELS=wheels tools/gpu_check.sh  with an interpreter that has torch, and no registry: what it lacks
#                                                    comes from a folder of wheels (tools/setup/gather_wheels.sh makes it)
#   tools/gpu_check.sh --quick                       8 minutes at most
#   tools/gpu_check.sh --only training,loss_call     some sections; --help lists them and all options
#
# Needs an NVIDIA driver and GPU (compute capability 8.0 or newer) and nvcc (CUDA_HOME, if it is neither on PATH nor in
# /usr/local/cuda). Used where installed: compute-sanitizer, ncu, Transformer Engine, Liger, a second GPU.
# Exit code: 0 all passed, 1 something failed or was not run, 2 it could not begin, 3 there is no GPU.
set -euo pipefail
[[ -z ${WHEELS:-} ]] || WHEELS=$(realpath "$WHEELS")
[[ ${PYTHON:-} != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0"
  exec "${PYTHON:-python3}" -m tools.check.gpu_check --help
fi
if [[ " $* " != *" --device cpu "* && " $* " != *" --device=cpu "* ]] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null &&
  ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "no GPU: gpu_check needs an NVIDIA GPU with its driver, and nvcc to build the kernels. Nothing was checked." >&2
  exit 3
fi
if [[ -z ${PYTHON:-} ]]; then
  source tools/setup/environment.sh
  ensure_environment .venv
  PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m tools.check.gpu_check ${WHEELS:+--wheels "$WHEELS"} "$@"
