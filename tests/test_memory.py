"""Peak memory of collecting activations, seen from outside: the resident set of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FORGET = Path("/proc/self/clear_refs")
#: Hidden states of one batch and layer: 4 rows x 1024 tokens x 256 floats of 4 bytes.
BATCH, TOKENS, WIDTH, LAYERS = 4, 1024, 256, 24
OF_A_LAYER = BATCH * TOKENS * WIDTH * 4

CHILD = f"""
import json, pathlib, sys
sys.path.insert(0, {str(TESTS)!r})
import collections, tiny, torch
from stllms.records import Response
from stllms.vectors import activations, means

Span = collections.namedtuple("Span", "label start end")
status = pathlib.Path("/proc/self/status")

def peak():
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])

def above(work):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    work()
    return peak() - before

model = tiny.model("llama", hidden_size={WIDTH}, num_hidden_layers={LAYERS},
                   max_position_embeddings={TOKENS})
ids = [n % 256 for n in range({TOKENS})]
rest = ("c", "", tuple(ids[:9]), tuple(ids[9:]), "", "", 0, "", True, True)
rows = [Response(f"task-{{n}}", *rest) for n in range({16 * BATCH})]
rows = [row for row in rows if means.is_build(row.task_id)]  # batches of one half are full
assert len(rows) >= {4 * BATCH}
spans = [Span("deduction", at, at + 20) for at in range(10, {TOKENS} - 20, 20)]
spans.append(Span("deduction", {TOKENS} - 20, {TOKENS}))

def collect(n):
    activations.collect(model, rows[:n], [spans] * n, batch_size={BATCH}, progress=False)

with torch.no_grad():
    model.decoder(input_ids=torch.tensor([ids] * {BATCH}), use_cache=False)
collect({BATCH})
print(json.dumps([above(lambda: collect({BATCH})), above(lambda: collect({4 * BATCH}))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not FORGET.exists(), reason="the resident set's peak is Linux's to tell")
def test_nothing_of_size_tokens_times_layers_is_kept_and_responses_do_not_add_up():
    # Memory that is freed goes back at once: without it the peak is as the heap happens to lie.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    few, many = json.loads(done.stdout.splitlines()[-1])
    assert few < LAYERS * OF_A_LAYER / 2
    assert many < few + OF_A_LAYER
