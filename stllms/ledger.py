"""The claims of METHOD, section 12, against the artefacts of a results folder.

One row a claim and whatever speaks to it: the paper's number, ours with its interval, on what
it was measured, a verdict. Written from artefacts only (``results/published/*.csv``,
``results/<slug>/``, ``results/comparison/``); a claim without any says what to run. A verdict
about the paper needs the paper's models or files: a fixture only shows that the pipeline works.

``python -m stllms.ledger`` writes ``results/ledger.csv`` and prints the table;
``--into README.md`` puts it there, between its two marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stllms import artifacts, claims, findings, published, published_tables
from stllms.artifacts import BadFile
from stllms.claims import Made, Row
from stllms.config import RunConfig
from stllms.effects import LayerEffects
from stllms.records import STEERED
from stllms.terminal import plain

#: Where the table stands in a document.
MARKS = ("<!-- ledger: written by python -m stllms.ledger -->", "<!-- end of ledger -->")
COLUMNS = ("claim", "where", "published", "ours", "on", "verdict", "note")


def ledger(results: str | Path, released: str | Path | None = None) -> pd.DataFrame:
    """The ledger of a results folder, columns :data:`COLUMNS`.

    ``released`` is a folder of released files: what they give is drawn into
    ``<results>/published/`` first, unless it is there already. Raises ``BadFile`` for an
    artefact or a released file that is not what it should be.
    """
    results = Path(results)
    if released is not None:
        published.ensure(released, results)
    rows = [
        *_comparison(results),
        *_steering(results),
        *_effects(results),
        *_heatmap(results),
        *_embedding(results),
    ]
    return pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))


def write(results: str | Path, released: str | Path | None = None) -> pd.DataFrame:
    """:func:`ledger`, written to ``<results>/ledger.csv``."""
    made = ledger(results, released)
    artifacts.save_table(Path(results) / "ledger.csv", made)
    return made


def markdown(table: pd.DataFrame) -> str:
    """The ledger as a Markdown table; the commands of what was not run follow once, below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    commands: dict[str, None] = {}
    before = ""
    for _, row in table.fillna("").iterrows():
        cells = [str(row[name]).replace("|", "\\|") for name in COLUMNS]
        verdict, _, command = cells[5].partition("; run with ")
        commands |= {command: None} if command else {}
        cells[5] = verdict
        cells[0], before = ("" if cells[0] == before else cells[0]), cells[0]
        lines.append("| " + " | ".join(cell.replace("; ", "<br>") for cell in cells) + " |")
    if commands:
        lines += ["", f"What needs the model runs with `{'` or `'.join(commands)}`."]
    return "\n".join(lines) + "\n"


def put(text: str, table: str) -> str:
    """``text`` with ``table`` between its :data:`MARKS`; ``ValueError`` where they are not."""
    before, first, rest = text.partition(MARKS[0])
    _, second, after = rest.partition(MARKS[1])
    if not first or not second:
        raise ValueError(f"no place for the ledger: expected the lines {' and '.join(MARKS)}")
    return f"{before}{first}\n\n{table}\n{second}{after}"


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame | None:
    """A table of a run, ``None`` where it was not made or has no rows (a model without any
    direction); :class:`BadFile` without a column."""
    if not path.is_file():
        return None
    found = artifacts.load_table(path)
    if found.empty:
        return None
    lacking = [name for name in columns if name not in found.columns]
    if lacking:
        raise BadFile(f"{path}: no column {', '.join(lacking)}")
    return found


def _made(folder: Path) -> Made:
    """How the run in a folder was made."""
    path = folder / "run.json"
    record = artifacts.read_json(path) if path.is_file() else {}
    if not isinstance(record, dict):
        raise BadFile(f"{path}: not written by stllms (not a JSON object)")
    return Made.of(record)


# -- comparison --------------------------------------------------------------------------


def _comparison(results: Path) -> Iterator[Row]:
    rows = [*_released_comparison(results), *_run_comparison(results)]
    yield from rows or [claims.compared("not run here", claims.needs(*claims.PAIR))]


def _released_comparison(results: Path) -> Iterator[Row]:
    columns = ("treatment", "kind", "tasks", "metric", "behaviour", "models")
    columns += ("value", "low", "high")
    groups = _table(results / "published" / "comparison_groups.csv", columns)
    changes = _table(
        results / "published" / "comparison_changes.csv",
        ("chains", "equal_stored", "recovered"),
    )
    if groups is None or changes is None or not {"thinking", "instruct"} <= {*groups["kind"]}:
        return
    chains, equal, recovered = (
        int(changes[name].sum()) for name in ("chains", "equal_stored", "recovered")
    )
    notes = {
        "published": f"{equal} of {chains} chains count exactly as their file says",
        "apart": f"{recovered} of {chains} chains have segments only with numbered tags read",
    }
    for treatment, note in notes.items():
        chosen = groups[groups["treatment"] == treatment]
        yield from findings.released_comparison(chosen, treatment, note)


def _run_comparison(results: Path) -> Iterator[Row]:
    """A row a pair of notebook 05: both fractions, and which differences are significant."""
    folder = results / "comparison"
    columns = ("model", "source", "behaviour", "metric", "value", "low", "high")
    rows = _table(folder / "comparison.csv", columns)
    columns = ("thinking", "instruct", "behaviour", "difference", "n", "p_holm")
    pairs = _table(folder / "comparison_pairs.csv", columns)
    if rows is None or pairs is None:
        return
    rows = rows[(rows["metric"] == "segment fraction") & (rows["source"] == "run")]
    for (thinking, instruct), pair in pairs.groupby(["thinking", "instruct"], sort=False):
        if {thinking, instruct} <= {*rows["model"]}:
            made = _made(folder / findings.slug_of(thinking))
            yield findings.run_comparison(rows, pair, thinking, instruct, made)


# -- steering ----------------------------------------------------------------------------


def _steering(results: Path) -> Iterator[Row]:
    columns = ("behaviour", "direction", "coefficient", "metric", "value", "ci_low", "p_holm")
    columns += ("null_low", "null_high")
    found = {
        path.parent.name: _table(path, columns)
        for path in sorted(results.glob("*/steering.csv"))
    }
    for slug in claims.STEERING:
        if slug not in found:
            yield claims.steered(slug, "not run here", claims.needs(slug))
    for slug, table in found.items():
        if table is not None:
            yield findings.run_steering(slug, table, _made(results / slug))


# -- layer effects -----------------------------------------------------------------------


def _effects(results: Path) -> Iterator[Row]:
    columns = ("model", "behaviour", "layers", *_PEAKS)
    released = _table(results / "published" / "layer_effects_peaks.csv", columns)
    runs = {
        path.parent.name: path for path in sorted(results.glob("*/layer_effects.safetensors"))
    }
    for slug in claims.PEAKS:
        found = None
        if released is not None:
            found = released[released["model"] == claims.display(slug)]
        if found is not None and len(found):
            yield from findings.released_effects(slug, found)
        elif slug not in runs:
            yield claims.peaked(slug, "not run here", claims.needs(slug))
    for slug, path in runs.items():
        measured = _peaks(slug, path)
        if measured:
            yield findings.run_effects(slug, measured, _made(results / slug))


_PEAKS = ("peak", "peak_low", "peak_high", "late_peak", "late_peak_low", "late_peak_high")


def _peaks(slug: str, path: Path) -> dict[str, pd.DataFrame]:
    """Peaks of a run by set (``published/others``, ``kl/own``), where any behaviour has one."""
    found = LayerEffects.load(path)
    made = {}
    for name in ("published/others", "kl/own"):
        if name not in found.effects:
            continue
        values = dict(zip(found.behaviours, found.of(name).swapaxes(0, 1), strict=True))
        known = {
            b: values[b] for b in STEERED if b in values and np.isfinite(values[b]).all(1).any()
        }
        if known:
            made[name] = published_tables.peaks(known, claims.layers_of(slug))
    return made


# -- directions --------------------------------------------------------------------------


def _heatmap(results: Path) -> Iterator[Row]:
    released = _table(results / "published" / "heatmap.csv", ("model", "behaviour", "other"))
    found = None
    if released is not None:
        found = released[released["model"] == claims.display(claims.HEATMAP_MODEL)]
    if found is not None and len(found):
        matrix = found.pivot(index="behaviour", columns="other", values="cosine")
        yield findings.released_heatmap(matrix)
    runs = _of_runs(results, "cosine_heatmap", ("behaviour",))
    if (found is None or not len(found)) and claims.HEATMAP_MODEL not in runs:
        yield claims.distinct("not run here", claims.needs(claims.HEATMAP_MODEL))
    for slug, matrix in runs.items():
        yield findings.run_heatmap(slug, matrix, _made(results / slug))


def _embedding(results: Path) -> Iterator[Row]:
    runs = _of_runs(results, "similarity_embedding", ("behaviour", "layer 0"))
    if not any(slug in claims.STEERING for slug in runs):
        yield claims.early("not run here", claims.needs(claims.HEATMAP_MODEL))
    for slug, table in runs.items():
        yield findings.run_embedding(slug, table, _made(results / slug))


def _of_runs(results: Path, figure: str, columns: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The data of a figure of every run that has some, by slug, indexed by behaviour."""
    found = {
        path.parents[1].name: _table(path, columns)
        for path in sorted(results.glob(f"*/figures/{figure}.csv"))
    }
    return {
        slug: table.set_index("behaviour") for slug, table in found.items() if table is not None
    }


# -- command line ------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Writes ``ledger.csv`` and prints it as Markdown; exit status 2 if refused."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.ledger", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", metavar="DIR", help="folder of the runs")
    parser.add_argument("--published", metavar="DIR", help="folder of the released files")
    parser.add_argument("--into", metavar="FILE", type=Path, help="a document with its marks")
    given = parser.parse_args(argv)
    results = RunConfig(results=given.results).results_folder
    try:
        made = write(results, given.published)
        if given.into is not None:
            text = put(given.into.read_text(encoding="utf-8"), markdown(made))
            given.into.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"stllms.ledger: {plain(error)}", file=sys.stderr)
        return 2
    print(plain(markdown(made)), end="")
    print(results / "ledger.csv", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
