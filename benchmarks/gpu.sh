#!/usr/bin/env bash
# benchmarks/gpu.py on this machine's card, in an environment that has what it needs: PYTHON, else
# the python of the shell, else that of run_all.sh, which is made if it is not there.
#   benchmarks/gpu.sh            one CUDA card, under ten minutes, no network
#   benchmarks/gpu.sh --small    tiny shapes, on a CPU too, under a minute
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

for python in "${PYTHON:-}" python python3 ""; do
  [ -n "$python" ] && why=$("$python" -c 'import stllms.models.engines' 2>&1) && break
done
if [ -z "$python" ]; then
  printf 'gpu.sh: no python here has what it needs (%s): asking run_all.sh for one\n' \
    "$(tail -n 1 <<<"$why")" >&2
  python=$("$root/run_all.sh" --environment-only)
fi
exec "$python" "$root/benchmarks/gpu.py" "$@"
