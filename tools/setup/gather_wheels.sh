#!/usr/bin/env bash
# Download what tools/gpu_check.sh needs besides torch, as wheels, for a machine that reaches no registry (docs/gpu.md).
#
#   tools/setup/gather_wheels.sh FOLDER                          for this interpreter's Python
#   tools/setup/gather_wheels.sh FOLDER --python-version 3.12    for another, on Linux
#   tools/setup/gather_wheels.sh FOLDER --installed LIST         without what that machine has: its `pip freeze`, or names
#   tools/setup/gather_wheels.sh FOLDER liger-kernel             more packages; without what they depend on
#
# PYTHON=python3.12 chooses the interpreter whose pip is used (default: .venv's, else python3). Versions are those of
# constraints.txt. torch and what comes with it is never among them.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/../.."
if [[ $# == 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit $(($# == 0 ? 2 : 0))
fi
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
folder=$(cd "$here" && realpath -m "$1") installed= more=() target=()
shift
while (($#)); do
  case $1 in
    --python-version)
      target=(--python-version "$2" --implementation cp)
      for glibc in 39 38 35 34 31 28 27 24 17; do target+=(--platform "manylinux_2_${glibc}_$(uname -m)"); done
      target+=(--platform "manylinux2014_$(uname -m)" --platform "manylinux1_$(uname -m)")
      shift
      ;;
    --installed) installed=$(cd "$here" && realpath "$2") && shift ;;
    -*) echo "gather_wheels.sh: unknown option $1" >&2 && exit 2 ;;
    *) more+=("$1") ;;
  esac
  shift
done
[[ -z $installed || -f $installed ]] || { echo "gather_wheels.sh: there is no file $installed" >&2 && exit 2; }
mkdir -p "$folder"
download=("$python" -m pip download -q --disable-pip-version-check --only-binary=:all: -c tools/setup/constraints.txt -d "$folder")
download+=(${target[@]+"${target[@]}"})
# What asks for torch is downloaded without its dependencies; numpy and packaging, its others, come with transformers.
"$python" tools/check/gpu_check/wheels.py | grep -v '^megatron-core' | xargs "${download[@]}"
"${download[@]}" --no-deps "$("$python" tools/check/gpu_check/wheels.py | grep '^megatron-core')" ${more[@]+"${more[@]}"}
if [[ -n $installed ]]; then
  normalised() { tr 'A-Z_.' 'a-z--' | sed 's/[-]\{2,\}/-/g'; }
  there=$(sed 's/[ =<>!~@;].*//' "$installed" | normalised)
  for wheel in "$folder"/*.whl; do
    name=$(basename "$wheel" | cut -d- -f1 | normalised)
    if grep -qx -- "$name" <<<"$there"; then rm "$wheel"; fi
  done
fi
du -sh "$folder" | sed "s/\t.*/ in $(ls "$folder" | wc -l) wheels/"
