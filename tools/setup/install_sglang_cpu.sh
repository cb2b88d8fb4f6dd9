#!/bin/bash
# Makes a virtual environment with an SGLang server that runs on a CPU, for tests and small experiments.
#
#   tools/setup/install_sglang_cpu.sh .venv-sglang
#   export MEGATRON_DPPO_SGLANG_PYTHON=$PWD/.venv-sglang/bin/python
#   pytest tests/rollout/sglang
#
# About 2.5 GB and three minutes; at once when the environment is already complete. Needs Python 3.11 (or PYTHON=...).
# A plain `pip install sglang` would bring 5 GB of CUDA libraries: so torch comes first, everything else is held to
# constraints_sglang_cpu.txt, and the two packages that insist on CUDA builds are installed without their dependencies.
# Where pip offers only a CUDA build of torch, point it at a CPU one (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL) beforehand.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 <folder of the virtual environment>" >&2
    exit 2
fi
venv=$1
constraints=$(cd "$(dirname "$0")" && pwd)/constraints_sglang_cpu.txt
stamp=$venv/.complete
wanted=$(sha256sum <"$constraints")

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "$venv is complete"
    exit 0
fi

pinned() { # the line of the constraints file for one package, e.g. torch==2.13.0
    grep -i "^$1==" "$constraints"
}

"${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --constraint "$constraints" torch numpy
# The versions are complete (a freeze of a working environment), so nothing is left for a resolver to decide.
grep -Ev '^(#|torch==|torchvision==|sglang==)' "$constraints" >"$venv/requirements.txt"
"${pip[@]}" --no-deps --requirement "$venv/requirements.txt"
"${pip[@]}" --no-deps "$(pinned torchvision)" "$(pinned sglang)"

# A server that can print its options has imported all that it needs.
shim=$(cd "$(dirname "$0")/../../megatron_dppo/rollout/sglang/cpu_shim" && pwd)
PYTHONPATH=$shim SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -m sglang.launch_server --help >/dev/null
echo "$wanted" >"$stamp"
echo "$venv is complete"
