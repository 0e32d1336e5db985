"""A run as one file to share: ``results/<slug>/report.html``.

Made from what a run leaves: executed notebooks, figures, tables, ``run.json``, and the ledger
of the results folder. The file asks for nothing else, and the same artefacts give the same
bytes. A notebook that was not run is named, with its figures and tables if it left any.

``python -m stllms.report FOLDER`` writes the report and prints its path.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms import files, pipeline
from stllms.artifacts import BadFile
from stllms.config import MODELS, RunConfig

if TYPE_CHECKING:
    from stllms.page import Book, Output

NAME = "report.html"
COMPARISON = "comparison"
#: The verdict of a claim that nothing speaks to yet begins like this.
NEEDS = "needs the model"


@dataclass(frozen=True)
class Section:
    """One notebook of the report: as executed, else what it left and why there is no more."""

    stage: str
    title: str
    state: str
    seconds: float | None
    book: Book | None
    figures: tuple[Output, ...]


def ensure(folder: str | Path) -> Path:
    """The path of a report that is not older than anything it shows; made if need be."""
    path = Path(folder) / NAME
    return path if is_current(folder) else write(folder)


def is_current(folder: str | Path) -> bool:
    """Whether the report is there and no input was written after it. Imports nothing slow."""
    path = Path(folder) / NAME
    if not path.is_file():
        return False
    made = path.stat().st_mtime_ns
    return all(item.stat().st_mtime_ns <= made for item in _inputs(Path(folder)))


def _inputs(folder: Path) -> Iterator[Path]:
    """What changes whenever something in the report would: a stage that ends writes
    ``run.json``, and the ledger looks at all runs of the results folder."""
    results = folder.parent
    yield from results.glob("*/run.json")
    yield from results.glob("published/*.csv")
    for place in {folder, results / COMPARISON}:
        yield from place.glob("notebooks/*.ipynb")


def write(folder: str | Path) -> Path:
    """Writes the report of a run's folder, or of ``results/comparison``; returns its path.

    Raises ``BadFile`` for a folder without ``run.json``, and for a notebook, a table or a
    figure that cannot be read.
    """
    folder = Path(folder).resolve()
    record = _record(folder)
    from stllms import page  # nbconvert and pandas take two seconds

    sections = [section for place in _places(folder) for section in _sections(place)]
    text = page.render(
        title=_title(folder, record),
        fixture=_is_fixture(record),
        facts=_facts(record),
        details=_details(record),
        sections=sections,
        tables=list(_tables(folder)),
        ledger=_ledger(folder.parent),
        style=page.style(),
    )
    with files.replacing(folder / NAME) as beside:
        beside.write_text(text, encoding="utf-8")
    return folder / NAME


def _record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder; :class:`BadFile` if it is not that of a run."""
    path = folder / "run.json"
    if not path.is_file():
        raise BadFile(f"{folder}: not the folder of a run, it has no run.json")
    record = files.read_json(path)
    if not isinstance(record, dict) or "configuration" not in record:
        raise BadFile(f"{path}: not written by stllms (it has no configuration)")
    return record


def _places(folder: Path) -> list[Path]:
    """The folders that a report shows: the run's, and the comparison if the run is in it."""
    comparison = folder.parent / COMPARISON
    compared = (comparison / "run.json").is_file() and (comparison / folder.name).is_dir()
    return [folder, comparison] if compared else [folder]


# -- what is said about the run ------------------------------------------------------------


def _title(folder: Path, record: Mapping[str, Any]) -> str:
    name = record["configuration"]["model"]
    shown = MODELS[name].display if name in MODELS else Path(name).name
    return f"{shown} and what it is compared with" if folder.name == COMPARISON else shown


def _is_fixture(record: Mapping[str, Any]) -> bool:
    entry = MODELS.get(record["configuration"]["model"])
    return entry is not None and entry.source == "embedded"


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """The few things a reader wants to know first."""
    identity, recorded = record.get("identity", {}), record.get("recorded", {})
    facts = {
        "profile": record["configuration"]["profile"],
        "tasks": identity.get("tasks"),
        "tasks for the directions": identity.get("n_build"),
        "tasks for steering": identity.get("n_evaluate"),
        "new tokens at most": identity.get("max_tokens"),
        "temperature": identity.get("temperature"),
        "annotator": identity.get("annotator"),
        "device": recorded.get("device"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _details(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Identity, changed options, versions and the rest of ``run.json`` but the stages."""
    defaults = RunConfig().to_dict()
    changed = {
        name: value
        for name, value in record["configuration"].items()
        if value != defaults.get(name)
    }
    origin = {name: record.get(name) for name in ("commit", "seed", "started")}
    groups = {
        "What identifies the run": record.get("identity", {}),
        "Options that are not the default": changed,
        "Versions": record.get("versions", {}),
        "Recorded": {**origin, **record.get("recorded", {})},
    }
    return {
        title: {name: "none" if value is None else str(value) for name, value in group.items()}
        for title, group in groups.items()
        if group
    }


# -- the notebooks -------------------------------------------------------------------------


def _sections(folder: Path) -> Iterator[Section]:
    """The stages of a folder in order."""
    record = _record(folder)
    last = pipeline.STAGES[-1:]
    for stage in last if folder.name == COMPARISON else pipeline.STAGES[:-1]:
        yield _section(folder, stage, record.get("stages", {}).get(stage, {}))


def _section(folder: Path, stage: str, marker: Mapping[str, Any]) -> Section:
    from stllms import page

    copy, failed = (folder / "notebooks" / f"{stage}{end}.ipynb" for end in ("", ".failed"))
    book = page.book(copy, folder / "figures") if copy.is_file() else None
    drawn = book.drawn if book else []
    figures = [folder / name for name in marker.get("files", []) if name.endswith(".png")]
    rest = [path for path in figures if path.stem not in drawn and path.is_file()]
    title = next((heading.title for heading in book.headings), stage) if book else stage
    return Section(
        stage=stage,
        title=title,
        state=_state(copy.is_file(), failed.is_file(), bool(marker)),
        seconds=marker.get("seconds"),
        book=book,
        figures=tuple(page.picture(path) for path in rest),
    )


def _state(executed: bool, failed: bool, done: bool) -> str:
    """How a notebook stands: what the reader must know before reading on."""
    if failed:
        return "failed when it was last run"
    if executed:
        return "done" if done else "executed, but not finished"
    return "done, without an executed copy: only its figures and tables" if done else "not run"


def _tables(folder: Path) -> Iterator[tuple[str, Any]]:
    """The tables of a run that are not the data of a figure: name and HTML."""
    from stllms import page

    for place in _places(folder):
        for path in sorted(place.glob("*.csv")):
            if path.read_bytes().strip():  # a table without a column has nothing to show
                yield f"{place.name}/{path.name}", page.table(files.load_table(path))


# -- the ledger ----------------------------------------------------------------------------


def _ledger(results: Path) -> dict[str, Any]:
    """The claims that something here speaks to, and those that wait; or why there is none.

    The ledger looks at every run of the results folder: a broken file of another run is
    said here, and does not keep this run from its report.
    """
    from stllms import ledger, page

    try:
        found = ledger.ledger(results)
    except BadFile as error:
        said = str(error).replace(f"{results}/", "")
        return {"problem": said, "measured": None, "waiting": None}
    waits = found["verdict"].str.startswith(NEEDS)
    first = ["claim", "verdict", "where", "on"]
    columns = [*first, *(name for name in found.columns if name not in first)]
    measured, waiting = found.loc[~waits, columns], found.loc[waits, [*first[:3], "published"]]
    return {
        "problem": None,
        "measured": page.table(measured) if len(measured) else None,
        "waiting": page.table(waiting) if len(waiting) else None,
    }


# -- command line --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of a folder and prints its path; exit status 2 if refused."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", metavar="FOLDER", help="a run, such as results/tiny-thinker")
    given = parser.parse_args(argv)
    try:
        print(write(given.folder))
    except (ValueError, OSError) as error:
        print(f"stllms.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
