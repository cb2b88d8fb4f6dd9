#!/usr/bin/env bash
# Build the documentation as a site; a warning, a broken link or a missing heading among them, is an error.
#
#   tools/build_docs.sh             into docs/_build/html; with Sphinx, which it installs into .venv where it is not
#   tools/build_docs.sh FOLDER      into another folder
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit 0
fi
source tools/setup/environment.sh
ensure_environment .venv
if ! .venv/bin/python -c 'import furo, myst_parser, sphinx' 2>/dev/null; then
  .venv/bin/pip install -q -c tools/setup/constraints.txt 'megatron-dppo[docs]'
fi
exec .venv/bin/python -m sphinx -b html -W --keep-going -q docs "${1:-docs/_build/html}"
