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

from stllms import claims, files, pipeline, provenance
from stllms.artifacts import AUDIT, BadFile
from stllms.config import MODELS, RunConfig
from stllms.terminal import plain

if TYPE_CHECKING:
    from stllms.page import Book, Output

NAME = "report.html"
COMPARISON = "comparison"
#: The verdict of a claim that nothing speaks to yet begins like this.
NEEDS = "needs the model"
#: The figures of the summary, as far as they were made; the first one is large.
FIRST = ("steering", "layer_effects_grid", "cosine_heatmap")


@dataclass(frozen=True)
class Section:
    """One notebook of the report: as executed, else what it left and why there is no more."""

    stage: str
    title: str
    state: str
    seconds: float | None
    book: Book | None
    figures: tuple[Output, ...]

    @property
    def shown(self) -> list[str]:
        """The names of the run's figures in this section."""
        drawn = self.book.drawn if self.book else []
        return [*drawn, *(figure.name for figure in self.figures)]


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

    readings = _is_committed(record)
    sections = [s for place in _places(folder) for s in _sections(place, readings)]
    text = page.render(
        title=_title(folder, record),
        fixture=_is_fixture(record),
        sentence=_sentence(folder, record),
        figures=[page.picture(path) for path in _first_figures(folder, sections)],
        configuration=_configuration(folder, record),
        details=_details(record),
        audits=_audits(record),
        sections=sections,
        tables=list(_tables(folder)),
        ledger=_ledger(folder),
        style=page.style(),
    )
    with provenance.replacing(folder / NAME, record=False) as beside:
        beside.write_text(text, encoding="utf-8")
    return folder / NAME


def _record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder; :class:`BadFile` if it is not that of a run."""
    path = folder / "run.json"
    if not path.is_file():
        raise BadFile(f"{folder}: not the folder of a run, it has no run.json")
    record = provenance.read_json(path)
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


def _is_committed(record: Mapping[str, Any]) -> bool:
    """Whether the run is the one that the committed notebooks show and their readings are
    about: every option that could change a number is the default."""
    default = RunConfig()
    try:
        config = RunConfig.from_dict(record["configuration"])
        same = config.identity() == default.identity()
    except (ValueError, OSError):  # of a model or of tasks that are no longer there
        return False
    stages = pipeline.STAGES
    return same and all(config.stage_options(s) == default.stage_options(s) for s in stages)


def _sentence(folder: Path, record: Mapping[str, Any]) -> str:
    """What was run: model, profile, tasks, annotator; and what it was compared with."""
    identity, compared = record.get("identity", {}), _compared(folder)
    parts = {
        "directions from the chains of {} tasks": identity.get("n_build"),
        "steering tried on {} others": identity.get("n_evaluate"),
        "task set {}": identity.get("tasks"),
        "sentences labelled by the annotator {}": identity.get("annotator"),
        "at most {} new tokens": identity.get("max_tokens"),
        "temperature {}": identity.get("temperature"),
        "on {}": record.get("recorded", {}).get("device"),
        "compared with {}": " and ".join(compared) or None,
    }
    said = [text.format(value) for text, value in parts.items() if value is not None]
    return f"Profile {record['configuration'].get('profile')}: {', '.join(said)}."


def _compared(folder: Path) -> list[str]:
    """The other models of notebook 05, by their rows in its table."""
    path = folder.parent / COMPARISON / "comparison.csv"
    if COMPARISON not in (place.name for place in _places(folder)) or not path.is_file():
        return []
    from stllms.findings import slug_of

    models = files.load_table(path)["model"]
    return [name for name in dict.fromkeys(models) if slug_of(name) != folder.name]


def _first_figures(folder: Path, sections: Sequence[Section]) -> Iterator[Path]:
    """Those of :data:`FIRST` that a section shows."""
    shown = {name for section in sections for name in section.shown}
    for name in FIRST:
        path = folder / "figures" / f"{name}.png"
        if name in shown and path.is_file():
            yield path


def _configuration(folder: Path, record: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Every field of the configuration with the value it came to, and whether it was given;
    those given first. Of a model or of tasks that are gone: as recorded."""
    given, default = record["configuration"], RunConfig().to_dict()
    values = {**given, **_resolved(given)}
    values["compare"] = _compared(folder) or given.get("compare", ())
    rows = [
        (name, _text(value), given.get(name) != default.get(name, given.get(name)))
        for name, value in values.items()
        if name != "results"
    ]
    return sorted(rows, key=lambda row: (not row[2], row[0]))


def _resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields that were left to the profile or to the model came to."""
    try:
        config = RunConfig.from_dict(given)
        values = vars(config.settings) | {
            "n_samples": config.settings.n_build,
            "judge": config.annotator,
            "tasks": config.task_set,
        }
    except (ValueError, OSError):
        return {}
    return {name: value for name, value in values.items() if name in given}


def _details(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Identity, versions and the rest of ``run.json`` but configuration and stages."""
    origin = {name: record.get(name) for name in ("commit", "seed", "started")}
    groups = {
        "What identifies the run": record.get("identity", {}),
        "Versions": record.get("versions", {}),
        "Recorded": {**origin, **_recorded(record, audits=False)},
    }
    return {
        title: {name: _text(value) for name, value in group.items()}
        for title, group in groups.items()
        if group
    }


def _audits(record: Mapping[str, Any]) -> dict[str, str]:
    """The line of every sampling audit, by the rows it is about."""
    found = _recorded(record, audits=True)
    return {name.removeprefix(AUDIT): _text(value["line"]) for name, value in found.items()}


def _recorded(record: Mapping[str, Any], *, audits: bool) -> dict[str, Any]:
    every = record.get("recorded", {})
    return {name: every[name] for name in every if name.startswith(AUDIT) == audits}


def _text(value: Any) -> str:
    """A value for people: lists with commas, nothing as ``none``."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


# -- the notebooks -------------------------------------------------------------------------


def _sections(folder: Path, readings: bool) -> Iterator[Section]:
    """The stages of a folder in order; with ``readings`` of the committed figures or not."""
    record = _record(folder)
    last = pipeline.STAGES[-1:]
    for stage in last if folder.name == COMPARISON else pipeline.STAGES[:-1]:
        yield _section(folder, stage, record.get("stages", {}).get(stage, {}), readings)


def _section(folder: Path, stage: str, marker: Mapping[str, Any], readings: bool) -> Section:
    from stllms import page

    copy, failed = (folder / "notebooks" / f"{stage}{end}.ipynb" for end in ("", ".failed"))
    figures = folder / "figures"
    book = page.book(copy, figures, readings=readings) if copy.is_file() else None
    drawn = book.drawn if book else []
    saved = [folder / name for name in marker.get("files", []) if name.endswith(".png")]
    own = [path for path in saved if page.is_figure(figures, path.stem)]
    rest = [figures / path.name for path in own if path.stem not in drawn]
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


def _ledger(folder: Path) -> dict[str, Any]:
    """The claims that this run speaks to, those that anything here does, and those that wait;
    or why there is none.

    The ledger looks at every run of the results folder: a broken file of another run is
    said here, and does not keep this run from its report.
    """
    from stllms import ledger, page

    results = folder.parent
    try:
        found = ledger.ledger(results)
    except BadFile as error:
        said = str(error).replace(f"{results}/", "")
        return {"problem": said, "own": None, "measured": None, "waiting": None}
    waits = found["verdict"].str.startswith(NEEDS)
    first = ["claim", "verdict", "where", "on"]
    columns = [*first, *(name for name in found.columns if name not in first)]
    measured, waiting = found.loc[~waits, columns], found.loc[waits, [*first[:3], "published"]]
    own = measured.loc[[_speaks_of(folder, on) for on in measured["on"]], first[:3]]
    own["where"] = own["where"].str.split("; ").str[0]
    return {
        "problem": None,
        "own": page.table(own) if len(own) else None,
        "measured": page.table(measured) if len(measured) else None,
        "waiting": page.table(waiting) if len(waiting) else None,
    }


def _speaks_of(folder: Path, on: str) -> bool:
    """Whether a row of the ledger was measured on this run, alone or with another."""
    names = on.split(", ")[0].split(" and ")
    if folder.name == COMPARISON:
        return len(names) > 1
    return claims.display(folder.name) in names


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
        print(f"stllms.report: {plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
