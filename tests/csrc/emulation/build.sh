#!/bin/bash
# Compiles csrc/cuda/*.cu with a C++ compiler against the emulation:  build.sh plain|asan|tsan OUTPUT.so [CSRC [OBJECTS]]
# Needs the CUDA toolkit's headers (CUDA_HOME, default /usr/local/cuda), no nvcc and no GPU. Object files are kept in the
# folder OBJECTS and used again for sources that are the same, headers included.
set -euo pipefail
shopt -s inherit_errexit # a compiler that fails inside of $(...) ends this
kind=$1 output=$(realpath -m "$2") csrc=$(realpath "${3:-$(dirname "$0")/../../../csrc}")
emulation=$(realpath "$(dirname "$0")")
case $kind in
  plain) sanitize="" define="" ;;
  asan) sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" define=-DEMULATION_ASAN ;;
  tsan) sanitize="-fsanitize=thread" define=-DEMULATION_TSAN ;;
  *) echo "build.sh: plain, asan or tsan, not $kind" >&2; exit 2 ;;
esac
compile="${CXX:-g++} -std=c++17 -O1 -g -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wno-unknown-pragmas
  -Wno-unused-function -DDPPO_HOST_EMULATION -I$emulation -I$csrc -isystem ${CUDA_HOME:-/usr/local/cuda}/include"
objects=${4:-}
if [[ -z $objects ]]; then
  objects=$(mktemp -d)
  trap 'rm -rf "$objects"' EXIT
fi
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
linked=()
add() {
  local object
  object=$(object_of "$@")
  linked+=("$object")
}
add "$emulation/scheduler.cpp" $scheduler_sanitize $define
add "$emulation/launchers.cpp" $sanitize
for source in "$csrc"/cuda/*.cu; do
  add "$source" $sanitize
done
${CXX:-g++} -shared $sanitize "${linked[@]}" -o "$output" -lpthread
