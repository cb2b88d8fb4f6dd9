#!/usr/bin/env bash
# Set up another megatron-core beside the installed one, and say how to use it. Quick when it is there already.
#
#   tools/setup/megatron_core_environment.sh VERSION [FOLDER]    prints the PYTHONPATH to run with, and nothing else
#   PYTHONPATH=$(tools/setup/megatron_core_environment.sh 0.19.2) .venv/bin/python ...
#
# FOLDER defaults to .venv-megatron-core-VERSION. Everything else comes from .venv, which tools/run_tests.sh makes
# (another one: MEGATRON_DPPO_PYTHON=/path/to/python).
#
# Wheels of megatron-core from 0.17 on ask for Python 3.12, because parts of the distribution that this package does not
# use need it. megatron.core itself runs on 3.10 and 3.11: the wheel for 3.12 is unpacked for every Python. From 0.17 on it
# also imports triton, which a CPU build of torch does not bring along.
set -euo pipefail
if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit $(($# < 1 ? 2 : 0))
fi
version=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${2:-$root/.venv-megatron-core-$version}
python=${MEGATRON_DPPO_PYTHON:-$root/.venv/bin/python}
triton=3.8.0 # where torch came without one
wanted="megatron-core $version, triton $triton, $("$python" -V)"

if [[ ! -f $folder/.complete || $(<"$folder/.complete") != "$wanted" ]]; then
  echo "Unpacking megatron-core $version into $folder ..." >&2
  rm -rf "$folder"
  "$python" -m pip install -q --no-deps --target "$folder" --only-binary=:all: --ignore-requires-python \
    --python-version 3.12 --platform "manylinux_2_28_$(uname -m)" "megatron-core==$version" >&2
  "$python" -c 'import triton' 2>/dev/null ||
    "$python" -m pip install -q --no-deps --target "$folder" "triton==$triton" >&2
  found=$(PYTHONPATH=$folder PYTHONWARNINGS=ignore "$python" -c 'import megatron.core; print(megatron.core.__version__)')
  if [[ ${found%%+*} != "$version" ]]; then # a build may add +commit
    echo "$python imports megatron-core $found from $folder instead of $version" >&2
    exit 1
  fi
  echo "$wanted" >"$folder/.complete"
fi
echo "$folder"
