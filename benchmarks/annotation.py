"""Chains per second of the reader, the alignment and the offline annotator.

``python benchmarks/annotation.py [--chains 500]`` prints a table and writes
``benchmarks/results/annotation.json``. The chains are the released ones (``STLLMS_PUBLISHED``,
default ``../shared/published``). Beside each step stands the naive published procedure: quoted
and closed tags, first exact occurrence. Times are of the process, one thread, best of three.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stllms.annotation import annotators, markup, placing
from stllms.records import Response

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(os.environ.get("STLLMS_PUBLISHED", ROOT.parent / "shared" / "published"))
RESULTS = ROOT / "benchmarks" / "results" / "annotation.json"


def released(limit: int) -> list[dict]:
    """The released chains, evenly from all files; says what is missing where there are none."""
    files = sorted(PUBLISHED.glob("reasoning_comparison_*.json"))
    if not files:
        raise SystemExit(f"no released files at {PUBLISHED}: set STLLMS_PUBLISHED")
    share = -(-limit // len(files))
    rows = [json.loads(file.read_text(encoding="utf-8"))[:share] for file in files]
    return [row for file in rows for row in file][:limit]


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of process time of the fastest of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def coverage(rows: list[dict], readings: list[markup.Reading], method: str) -> float:
    """Labelled share of the characters that are not white space."""
    found = [
        placing.align(reading.segments, row["thinking_process"], method=method)
        for row, reading in zip(rows, readings, strict=True)
    ]
    return sum(one.characters["labelled"] for one in found) / sum(one.total for one in found)


def measure(rows: list[dict]) -> list[dict]:
    """One row a step: chains per second and, where it places text, coverage."""
    replies = [row["annotated_response"] for row in rows]
    texts = [row["thinking_process"] for row in rows]
    responses = [
        Response(str(i), "", "", (), (), text, text, 0, "", True, True)
        for i, text in enumerate(texts)
    ]
    table = []

    def add(step: str, work: Callable[[], object], share: float | None = None) -> None:
        table.append({"step": step, "chains_per_s": len(rows) / best(work), "coverage": share})

    for reader, method in (("published", "published"), ("tolerant", "tolerant")):
        readings = [markup.read(reply, reader=reader) for reply in replies]
        share = coverage(rows, readings, method)
        name = {"published": "naive published", "tolerant": "ours"}[reader]
        add(f"reader, {name}", lambda r=reader: [markup.read(x, reader=r) for x in replies])
        add(
            f"alignment, {name}",
            lambda r=readings, m=method: [
                placing.align(a.segments, b, method=m) for a, b in zip(r, texts, strict=True)
            ],
            share,
        )
    for name in ("lexical", "offline"):
        annotator = annotators.annotator(name)
        share = placing.summarise(annotator.annotate(responses)).coverage
        add(f"annotator, {name}", lambda a=annotator: a.annotate(responses), share)
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=500)
    rows = released(parser.parse_args().chains)
    table = measure(rows)
    print(f"{len(rows)} chains, {platform.machine()}, numpy {np.__version__}")
    for row in table:
        share = "" if row["coverage"] is None else f"{100 * row['coverage']:6.1f} % covered"
        print(f"{row['step']:28s}{row['chains_per_s']:10.0f} chains/s  {share}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result = {"chains": len(rows), "machine": platform.machine(), "steps": table}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
