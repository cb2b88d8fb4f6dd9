#!/bin/bash
# Compiles csrc/cuda/*.cu with a C++ compiler against the emulation:  build.sh plain|asan|tsan OUTPUT.so [CSRC]
# Needs the CUDA toolkit's headers (CUDA_HOME, default /usr/local/cuda), no nvcc and no GPU.
set -euo pipefail
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
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
scheduler_sanitize=$sanitize
[[ $kind == tsan ]] && scheduler_sanitize=""  # see sanitizers.h
$compile $scheduler_sanitize $define -c "$emulation/scheduler.cpp" -o "$objects/scheduler.o"
$compile $sanitize -c "$emulation/launchers.cpp" -o "$objects/launchers.o"
for source in "$csrc"/cuda/*.cu; do
  $compile $sanitize -x c++ -c "$source" -o "$objects/$(basename "$source").o"
done
${CXX:-g++} -shared $sanitize "$objects"/*.o -o "$output" -lpthread
