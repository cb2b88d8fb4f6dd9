#!/bin/bash
# Compiles the CUDA kernels for every architecture and holds them to tools/check/sass_budget.json; then runs them on the host
# emulation, under sanitizers and with seeded bugs. No GPU needed.
#
#   tools/check/check_cuda.sh            all of it (minutes)
#   tools/check/check_cuda.sh --budget   the compiled code only (seconds)
#
# nvdisasm comes from the toolkit or, where that has none, from PyPI (nvidia-cuda-nvdisasm, 6 MB) into a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
nvdisasm=$(command -v nvdisasm || true)
if [[ -z $nvdisasm ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  if "$python" -m pip install --quiet --no-deps --target "$folder" nvidia-cuda-nvdisasm; then
    nvdisasm=$(find "$folder" -type f -name nvdisasm | head -n 1)
    chmod +x "$nvdisasm"
  else
    echo "check_cuda: nvdisasm cannot be installed; its part of the check is skipped"
  fi
fi
"$python" tools/check/sass_report.py ${nvdisasm:+--nvdisasm "$nvdisasm"}
[[ ${1:-} == --budget ]] || "$python" -m pytest tests/csrc/test_emulated_kernels.py
