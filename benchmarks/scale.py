"""How time and memory of each stage grow with the rows of a run, from a hundred up.

    python benchmarks/scale.py [--rows 100 1000 10000 100000] [--stages append load]

Rows are the steered chains of the committed run of ``tiny-thinker`` (``results/reference``),
29 conditions a task, its tasks repeated under new names: real ids, texts and labels, short
ones (90 tokens, where the paper's have up to 1000). Every stage of every size has a process of
its own. Peak memory is what the resident set grows by from when modules and model are loaded.

A size whose stage would take longer than ``--limit`` seconds, or more than half of the free
memory, by the growth seen so far, is extrapolated and marked so. ``exponent`` is that of the
time between the last two measured sizes: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from activations import FORGET, resident_peak
from common import RESULTS, write

from stllms import attribution, models, tasks
from stllms.annotation import annotators
from stllms.generation import likelihood
from stllms.labels import PAPER
from stllms.models.engines.interventions import Intervention
from stllms.records import STEERED_KEY, Steered, Task, from_rows, steered_from_row
from stllms.runs.files import write_json
from stllms.runs.store import Rows, resumed
from stllms.steering import conditions, measures
from stllms.vectors import SteeringVectors, activations

REFERENCE = RESULTS.parents[1] / "results" / "reference" / "tiny-thinker"


class Work:
    """``rows`` chains, all conditions of a task together, and where they are kept."""

    def __init__(self, rows: int, folder: Path) -> None:
        self.count = rows
        self.chains_made: int | None = None
        self.store = Rows(folder / "steered.jsonl", STEERED_KEY)
        self.annotated = Rows(folder / "annotated.jsonl", STEERED_KEY)
        if not (folder / "run.json").is_file():
            write_json(folder / "run.json", {})
        known = {one.id: one for one in tasks.select("evaluate", source="grammar", n=400)}
        lines = (REFERENCE / "steered.jsonl").read_text().splitlines()
        read = [json.loads(line) for line in lines]
        by_task: dict[str, list[dict]] = {}
        for row in read:
            by_task.setdefault(row["task_id"], []).append(row)
        self.by_task = list(by_task.values())
        self.size = len(self.by_task[0])
        self.tasks: list[Task] = []
        for i in range(-(-rows // self.size)):
            task = known[self.by_task[i % len(self.by_task)][0]["task_id"]]
            self.tasks.append(replace(task, id=f"{task.id}~{i}"))

    def rows(self, start: int = 0, stop: int | None = None, *, labels: bool) -> list[dict]:
        """The rows of some tasks."""
        made = []
        for i, task in list(enumerate(self.tasks))[start:stop]:
            for row in self.by_task[i % len(self.by_task)]:
                response = {**row["response"], "task_id": task.id}
                annotation = {**row["annotation"], "task_id": task.id} if labels else None
                changed = {"task_id": task.id, "response": response, "annotation": annotation}
                made.append({**row, **changed})
        return made

    def chains(self, store: Rows) -> list[Steered]:
        """The stored chains, as a notebook reads them."""
        return from_rows(store.load(), steered_from_row, store.path)


def unlike(chains: list[Steered]) -> list[Steered]:
    """Chains whose responses have a task each, as those of notebook 01."""
    return [
        replace(
            one,
            response=replace(one.response, task_id=f"{i}"),
            annotation=replace(one.labelled, task_id=f"{i}"),
        )
        for i, one in enumerate(chains)
    ]


# -- the stages ----------------------------------------------------------------------------


def append(work: Work) -> Callable[[], Any]:
    """Chains appended by the chunk, as notebook 04 does while it steers."""

    def run() -> None:
        work.store.bind({"seed": 0})
        for start in range(0, len(work.tasks), conditions.CHUNK):
            work.store.append(work.rows(start, start + conditions.CHUNK, labels=False))

    return run


def rewrite(work: Work) -> Callable[[], Any]:
    """The whole file with its annotations, as an annotator leaves it."""
    return lambda: work.annotated.write(work.rows(labels=True))


def load(work: Work) -> Callable[[], Any]:
    """The file as checked records."""
    return lambda: work.chains(work.annotated)


def resume(work: Work) -> Callable[[], Any]:
    """A finished stage that is asked for again: nothing is made."""

    def run() -> None:
        keys = [tuple(row[name] for name in STEERED_KEY) for row in work.rows(labels=False)]
        size = conditions.CHUNK * work.size
        resumed(keys, keys, lambda *_: [], size=size, store=work.store)

    return run


def annotate(work: Work) -> Callable[[], Any]:
    """The fixture's annotator, with token spans."""
    model, who = models.load("tiny-thinker", device="cpu"), annotators.annotator("grammar")
    return lambda: annotators.steered(who, work.chains(work.store), model=model)


def measure(work: Work) -> Callable[[], Any]:
    """Measures of every chain and the table with intervals and tests."""

    def run() -> None:
        measures.table(measures.measure(work.chains(work.annotated), work.tasks))

    return run


def steer(work: Work) -> Callable[[], Any]:
    """New chains of the fixture under 9 conditions, at most 90 tokens, with their store."""
    model, found = models.load("tiny-thinker", device="cpu"), vectors()
    every = conditions.conditions(found, dict.fromkeys(PAPER.targets, 2), [-1, 1])
    known = tasks.select("evaluate", source="grammar", n=400)
    asked = [
        replace(known[i % len(known)], id=f"{i}") for i in range(-(-work.count // len(every)))
    ]
    work.chains_made = len(asked) * len(every)
    store = Rows(work.store.path.with_name("made.jsonl"), STEERED_KEY)
    options = {"max_new_tokens": 90, "temperature": 0.65, "progress": False}
    return lambda: conditions.grid(model, asked, every, store=store, **options)


def vectors() -> SteeringVectors:
    """The directions of the committed run."""
    return SteeringVectors.load(REFERENCE / "vectors.safetensors")


def span_means(work: Work) -> Callable[[], Any]:
    """Activations of all layers, one forward pass a chain."""
    model = models.load("tiny-thinker", device="cpu")

    def run() -> None:
        chains = unlike(work.chains(work.annotated))
        spans = [one.labelled.spans for one in chains]
        activations.collect(model, [one.response for one in chains], spans, progress=False)

    return run


def effects(work: Work) -> Callable[[], Any]:
    """Exact layer effects of the directions in every chain."""
    model, found = models.load("tiny-thinker", device="cpu"), vectors()

    def run() -> None:
        chains = unlike(work.chains(work.annotated))
        pairs = [one.response for one in chains], [one.labelled for one in chains]
        attribution.collect(model, *pairs, found, progress=False)

    return run


def likelihoods(work: Work) -> Callable[[], Any]:
    """KL and perplexity of every chain."""
    model, found = models.load("tiny-thinker", device="cpu"), vectors()
    store = Rows(work.store.path.with_name("likelihood.jsonl"), STEERED_KEY)

    def run() -> None:
        chains = work.chains(work.annotated)
        edit = Intervention(found.directions[0, 2], 2, 1.0)
        every = {one.key[1:]: edit if one.direction != "none" else None for one in chains}
        likelihood.scores(model, chains, every, store=store, progress=False)

    return run


def parquet(work: Work) -> Callable[[], Any]:
    """The annotated rows as a Parquet file, group by group; needs pyarrow, which no stage of
    the package uses. Beside their key the rows are JSON, as a column."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    columns = ("response", "annotation")
    kinds = [pyarrow.string(), pyarrow.string(), pyarrow.int32(), pyarrow.float64()]
    schema = pyarrow.schema(
        [*zip(STEERED_KEY, [*kinds, pyarrow.string()], strict=True)]
        + [(name, pyarrow.string()) for name in columns]
    )

    def run() -> None:
        path = work.annotated.path.with_suffix(".parquet")
        with ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(0, len(work.tasks), conditions.CHUNK):
                rows = work.rows(start, start + conditions.CHUNK, labels=True)
                flat = [row | {name: json.dumps(row[name]) for name in columns} for row in rows]
                writer.write_table(pyarrow.Table.from_pylist(flat, schema))

    return run


STAGES: dict[str, Callable[[Work], Callable[[], Any]]] = {
    "append": append,
    "rewrite": rewrite,
    "load": load,
    "resume": resume,
    "annotate": annotate,
    "measure": measure,
    "steer": steer,
    "activations": span_means,
    "layer effects": effects,
    "likelihood": likelihoods,
    "parquet": parquet,
}


# -- measuring -----------------------------------------------------------------------------


def child(stage: str, rows: int, folder: Path) -> None:
    """One stage at one size; prints what it took."""
    work = Work(rows, folder)
    run = STAGES[stage](work)
    if FORGET.exists():
        FORGET.write_text("5")
    before, wall, cpu = (
        psutil.Process().memory_info().rss,
        time.monotonic(),
        time.process_time(),
    )
    run()
    found = {
        "rows": work.chains_made or len(work.tasks) * work.size,
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": resident_peak() - before,
        "measured": True,
    }
    print(json.dumps(found))


def grown(stage: str, sizes: list[int], limit: float, folders: dict[int, Path]) -> list[dict]:
    """A stage at every size, measured or extrapolated by the growth so far."""
    found: list[dict] = []
    for rows in sizes:
        guess = guessed(found, rows)
        room = psutil.virtual_memory().available / 2
        if guess and not (guess["seconds"] <= limit and (guess["peak_bytes"] or 0) < room):
            found.append(guess)
        else:
            command = [sys.executable, __file__, "--child", stage, "--rows", str(rows)]
            done = subprocess.run(
                [*command, "--folder", folders[rows]], stdout=subprocess.PIPE, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
        one = found[-1]
        note = "" if one["measured"] else "  extrapolated"
        memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:9.0f} MiB"
        print(
            f"{stage:14s}{one['rows']:8d} rows {one['seconds']:9.2f} s {memory}{note}",
            flush=True,
        )
    return found


def guessed(found: list[dict], rows: int) -> dict | None:
    """The time by the power of the last two measured sizes, at least linear, and the memory by
    the line through them; ``None`` before anything is measured."""
    known = [one for one in found if one["measured"]]
    if not known:
        return None
    last, peak = known[-1], None
    if len(known) > 1:
        slope = (last["peak_bytes"] - known[-2]["peak_bytes"]) / (
            last["rows"] - known[-2]["rows"]
        )
        peak = int(last["peak_bytes"] + max(0.0, slope) * (rows - last["rows"]))
    power = max(1.0, exponent(found) or 1.0)
    seconds = last["seconds"] * (rows / last["rows"]) ** power
    return {"rows": rows, "seconds": seconds, "peak_bytes": peak, "measured": False}


def exponent(found: list[dict]) -> float | None:
    """Of the time between the last two measured sizes, by the CPU clock."""
    known = [one for one in found if one["measured"]]
    if len(known) < 2:
        return None
    small, large = known[-2:]
    return math.log(large["cpu_seconds"] / small["cpu_seconds"]) / math.log(
        large["rows"] / small["rows"]
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES)[:-1])
    options.add_argument("--limit", type=float, default=120, help="seconds of a stage and size")
    options.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options.add_argument("--child", choices=STAGES, help="internal")
    options.add_argument("--folder", type=Path, help="internal")
    given = options.parse_args(argv)
    if given.child:
        child(given.child, given.rows[0], given.folder)
        return
    machine = {
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content: dict[str, Any] = {"stages": {}, "bytes": {"jsonl": {}, "parquet": {}}}
    if given.out.is_file():  # of stages measured before
        content = json.loads(given.out.read_text())
    content["machine"] = machine
    with tempfile.TemporaryDirectory() as folder:
        folders = {rows: Path(folder) / str(rows) for rows in given.rows}
        for path in folders.values():
            path.mkdir()
        for stage in given.stages:
            found = grown(stage, given.rows, given.limit, folders)
            content["stages"][stage] = {"exponent": exponent(found), "sizes": found}
            write(given.out.parent, given.out.stem, content)
        for kind, sizes in content["bytes"].items():
            for rows, path in folders.items():
                file = path / f"annotated.{kind}"
                sizes |= {str(rows): file.stat().st_size} if file.is_file() else {}
        write(given.out.parent, given.out.stem, content)
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
