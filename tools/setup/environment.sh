# Sourced by the other scripts: a virtual environment with this package in it, made once and reused.
#
#   ensure_environment FOLDER     installs with the tested versions; quick when nothing changed
#   PYTHON=python3.12             which interpreter to build it from (default: the first of 3.11, 3.12, 3.10)
#   EXTRAS=te                     more extras of setup.py than dev, e.g. on a GPU host; separated by commas

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.10 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python 3.10, 3.11 or 3.12 found. Install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
  return 2
}

ensure_environment() {
  local folder=$1 python stamp wanted extras=dev${EXTRAS:+,$EXTRAS}
  stamp=$folder/.complete
  wanted=$extras$(cat setup.py pyproject.toml tools/setup/constraints.txt tools/setup/environment.sh $(find csrc -type f 2>/dev/null | sort) | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  python=$(find_python) || return
  echo "Installing into $folder (a few minutes the first time) ..."
  [[ -x $folder/bin/python ]] || "$python" -m venv "$folder" || return
  # torch first: with it in place nothing below can pull another one.
  "$folder/bin/pip" install -q -c tools/setup/constraints.txt pip setuptools wheel || return
  "$folder/bin/pip" install -q -c tools/setup/constraints.txt torch numpy ninja || return
  "$folder/bin/pip" install -q -c tools/setup/constraints.txt --no-build-isolation -e ".[$extras]" || return
  echo "$wanted" >"$stamp"
}
