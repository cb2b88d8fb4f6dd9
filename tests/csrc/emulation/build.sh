#!/bin/bash
# Compiles csrc/cuda/*.cu with a C++ compiler against the emulation:  build.sh KIND OUTPUT.so [CSRC [OBJECTS]]
# Needs the CUDA toolkit's headers (CUDA_HOME, default /usr/local/cuda), no nvcc and no GPU. Object files are kept in the
# folder OBJECTS and used again for sources that are the same, headers included.
#
#   plain, asan, tsan   launchers with a C interface, for ctypes (emulation_library.py); two of them under a sanitizer
#   operators           torch.ops.megatron_dppo_emulated.*; TORCH_INCLUDES and TORCH_LIBRARIES are flags for torch's
#                       headers and libraries (emulated_backend.py)
set -euo pipefail
shopt -s inherit_errexit # a compiler that fails inside of $(...) ends this
kind=$1 output=$(realpath -m "$2") csrc=$(realpath "${3:-$(dirname "$0")/../../../csrc}")
emulation=$(realpath "$(dirname "$0")")
case $kind in
  plain | operators) sanitize="" define="" ;;
  asan) sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" define=-DEMULATION_ASAN ;;
  tsan) sanitize="-fsanitize=thread" define=-DEMULATION_TSAN ;;
  *) echo "build.sh: plain, asan, tsan or operators, not $kind" >&2; exit 2 ;;
esac
compile="${CXX:-g++} -std=c++17 -O1 -g -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wno-unknown-pragmas
  -Wno-unused-function -DDPPO_HOST_EMULATION -I$emulation -I$csrc -isystem ${CUDA_HOME:-/usr/local/cuda}/include"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
objects=${4:-$scratch/objects}
mkdir -p "$objects"

# object_of SOURCE FLAGS...: compiles it, unless that was done, and prints where it is
object_of() {
  local source=$1 object
  shift
  object=$objects/$({ echo "$@" && $compile "$@" -x c++ -E -P "$source"; } | sha256sum | cut -c1-32).o
  if [[ ! -f $object ]]; then
    $compile "$@" -x c++ -c "$source" -o "$object.$$"
    mv "$object.$$" "$object"
  fi
  echo "$object"
}

scheduler_sanitize=$sanitize
[[ $kind == tsan ]] && scheduler_sanitize="" # see sanitizers.h
# As many compilers at a time as there are cores. Each leaves the name of its object in a file.
compilers=()
add() {
  while (($(jobs -rp | wc -l) >= $(nproc))); do
    wait -n
  done
  object_of "$@" >"$scratch/${#compilers[@]}.name" &
  compilers+=($!)
}
add "$emulation/scheduler.cpp" $scheduler_sanitize $define
libraries="-lpthread"
if [[ $kind == operators ]]; then
  # Its warnings are those of the extension's own build.
  add "$emulation/operators.cpp" -std=c++20 -g0 -w -DDPPO_WITH_CUDA -DDPPO_OPERATORS=megatron_dppo_emulated $TORCH_INCLUDES
  libraries+=" $TORCH_LIBRARIES"
else
  add "$emulation/launchers.cpp" $sanitize
fi
for source in "$csrc"/cuda/*.cu; do
  add "$source" $sanitize
done
for compiler in "${compilers[@]}"; do
  wait "$compiler"
done
${CXX:-g++} -shared $sanitize $(cat "$scratch"/*.name) -o "$output.$$" $libraries
mv "$output.$$" "$output"
