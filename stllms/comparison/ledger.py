"""The claims of method, section 12, against the artefacts of a results folder.

One row for each artefact that speaks to a claim: the paper's number, ours with its interval,
what it was measured on, a verdict. A run with labels of a person's own says nothing about the
paper, and has no row. It is written from artefacts only (``published/*.csv``,
``<slug>/``, ``comparison/``, and ``<slug>/comparison/`` where runs of several results folders
were put into one); a claim without any says what to run.

``python -m stllms.comparison.ledger`` writes ``results/ledger.csv`` and prints the table;
``--into docs/claims.md`` puts it there, between its two marks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stllms.attribution.effects import LayerEffects
from stllms.comparison import released
from stllms.config import PROFILES, RunConfig
from stllms.labels import PAPER
from stllms.registry import MODELS
from stllms.runs.files import BadFile, Record, load_table, save_table
from stllms.steering import measures
from stllms.terminal import plain

#: What the paper reports (method, section 12). ``comparison``: per cent of the segments by
#: treatment and label, of the two :data:`KINDS`; ``segments``: how many a response has.
#: ``steering``: token fraction in per cent, baseline / + / -. ``peak``, ``rank``,
#: ``late_peak``: of the released layer effects, as in :func:`stllms.comparison.released.peaks`.
#: ``cosines``: of the released vectors, rows of the upper triangle in the order of its figure.
REPORTED: dict[str, Any] = json.loads(
    Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
)
KINDS = ["thinking", "instruct"]
#: Models of each kind in the paper, all that it compares, and the pair that is cheapest to run.
GROUP = 5
COMPARED = tuple(name for name, entry in MODELS.items() if entry.of_paper)
PAIR = ("r1-distill-llama-8b", "llama-3.1-8b-instruct")
HEATMAP_MODEL = "r1-distill-qwen-1.5b"
#: A difference is significant below this, after Holm's correction.
LEVEL = 0.05
#: Two directions with a larger cosine are not called distinct (the paper's largest is .64).
SAME = 0.9

#: The cells of a row, without the claim.
Cells = dict[str, str]
COLUMNS = ("claim", "where", "published", "ours", "on", "verdict", "note")
#: A number with its interval, in the tables that are read.
VALUES = ["value", "low", "high"]
#: What the fractions of segments are, in the column ``where``.
SEGMENTS = "per cent of the segments, thinking and instruct"
TAGS = "with the numbered tags read too"

# -- verdicts and words ------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of ours: the name of its folder, and how it was made; empty where unknown."""

    slug: str
    annotator: str = ""
    tasks: str = ""
    profile: str = ""

    @classmethod
    def of(cls, folder: Path) -> Run:
        """From ``run.json``; the profile is named with the values that were not its own."""
        record = Record(folder).content()
        identity = record.get("identity", {})
        name = record.get("configuration", {}).get("profile", "")
        own = vars(PROFILES[name]) if name in PROFILES else {}
        changed = [f"{k} {identity[k]}" for k, v in own.items() if identity.get(k, v) != v]
        profile = f"profile {name}" if name else ""
        if changed:
            profile += f" but {', '.join(changed)}"
        return cls(
            folder.name, identity.get("annotator", ""), identity.get("tasks", ""), profile
        )

    @property
    def name(self) -> str:
        """The display name of its model."""
        return display(self.slug)

    def on(self, what: str) -> str:
        """``what`` with annotator, task set and profile behind it, as far as they are known."""
        parts = [("annotator ", self.annotator), ("tasks ", self.tasks), ("", self.profile)]
        return ", ".join([what, *(f"{word}{text}" for word, text in parts if text)])

    def verdict(
        self, shown: int, tests: int, paper: Collection[str] = tuple(REPORTED["steering"])
    ) -> str:
        """How much of a claim was shown, and on what; ``paper`` are the models it is about.

        A fixture is no evidence, and the paper's model counts as the paper's only in its
        profile.
        """
        degree = "shown in part" if 0 < shown < tests else "shown" if shown else "not shown"
        if self.slug in MODELS and MODELS[self.slug].source == "embedded":
            return f"{degree} on a fixture, no evidence about the paper"
        if self.slug not in paper:
            return f"{degree} on another model"
        if self.profile == "profile paper":
            return f"{degree} on the paper's model"
        profile = self.profile or "an unknown profile"
        return f"{degree} on {self.name} with {profile}, not the paper's run"


def display(slug: str) -> str:
    """The display name of a run folder, the folder's name for a model of a person's own."""
    return MODELS[slug].display if slug in MODELS else slug


def _not_run(*slugs: str) -> Cells:
    models = " ".join(f"--model {MODELS[slug].hub_id}" for slug in slugs)
    command = f"./run_all.sh {models} --profile paper --judge openai:gpt-4.1"
    return {"on": "not run here", "verdict": f"needs the model; run with {command}"}


def _from_files(equal: bool, whole: bool) -> str:
    """The verdict on numbers computed from released files: whether those of all of the paper's
    files and labels are equal to the digits printed."""
    if not whole:
        return "from part of the released files"
    return "reproduced from released files" if equal else "differs from released files"


def _listed(values: Mapping[str, object]) -> str:
    """``deduction 51.4; ...``."""
    return "; ".join(f"{name} {value}" for name, value in values.items())


def _number(found: Sequence[float], *, scale: float = 100, digits: int = 1) -> str:
    """``4.4 (3.5-5.4)``, value and interval in per cent; ``n/a`` for a missing one."""
    value, low, high = (f"{scale * number:.{digits}f}" for number in found)
    return "n/a" if value == "nan" else f"{value} ({low}–{high})"


def _table(path: Path, *columns: str) -> pd.DataFrame:
    """A table of a run or of the released files, without rows if it was not written (a model
    without any direction has none either); ``BadFile`` where it lacks a column."""
    found = load_table(path) if path.is_file() else pd.DataFrame()
    lacking = [name for name in columns if name not in found.columns]
    if lacking and not found.empty:
        raise BadFile(f"{path}: no column {', '.join(lacking)}")
    return found


def _of_runs(results: Path, name: str) -> list[Path]:
    """A file of every run that has the paper's labels, by the slug of the run."""
    return [path for path in sorted(results.glob(f"*/{name}")) if _about_paper(results, path)]


def _about_paper(results: Path, path: Path) -> bool:
    """Whether the run of a file, or of a folder, has the paper's labels."""
    folder = results / path.relative_to(results).parts[0]
    return not Record(folder).content().get("identity", {}).get("labels")


def _of_model(path: Path, slug: str) -> pd.DataFrame:
    """The rows of a model in a table of the released files."""
    found = _table(path)
    return found if found.empty else found[found["model"] == display(slug)]


# -- behaviours differ -------------------------------------------------------------------


def _comparison(results: Path) -> Iterator[Cells]:
    rows = [*_released_comparison(results / "published")]
    for folder in (results / "comparison", *sorted(results.glob("*/comparison"))):
        rows += _pairs(folder)
    yield from rows or [_fractions("published") | _not_run(*PAIR)]


def _fractions(treatment: str) -> Cells:
    """The paper's averages over its models under a treatment."""
    shares = REPORTED["comparison"][treatment].items()
    where = f"comparison, ten models, 100 tasks; {SEGMENTS}"
    return {
        "where": f"{where} {TAGS}" if treatment == "apart" else where,
        "published": _listed({b: f"{thinking} and {other}" for b, (thinking, other) in shares}),
    }


def _released_comparison(folder: Path) -> Iterator[Cells]:
    """Averages over the released files: nothing is reproduced with fewer files than the
    paper's, and files of different tasks are not averaged with each other."""
    groups = _table(folder / "comparison_groups.csv")
    if groups.empty or not {*KINDS} <= {*groups["kind"]} or groups["tasks"].nunique() > 1:
        return
    changes = _table(folder / "comparison_changes.csv")
    chains, equal, recovered = changes[["chains", "equal_stored", "recovered"]].sum()
    for treatment, note in (
        ("published", f"{equal} of {chains} chains count exactly as their file says"),
        ("apart", f"{recovered} of {chains} chains have segments only with numbered tags read"),
    ):
        yield from _averages(groups[groups["treatment"] == treatment], treatment, note)


def _averages(rows: pd.DataFrame, treatment: str, note: str) -> Iterator[Cells]:
    """Fractions, and segments a response, under one treatment."""
    cells = rows.set_index(["metric", "behaviour", "kind"])[VALUES].sort_index()
    thinking, instruct = rows.drop_duplicates("kind").set_index("kind")["models"].loc[KINDS]
    whole = thinking == instruct == GROUP

    def said(metric: str, behaviour: str, scale: float) -> str:
        found = cells.loc[(metric, behaviour)].loc[KINDS].to_numpy()
        return " and ".join(_number(one, scale=scale) for one in found)

    theirs = pd.DataFrame(REPORTED["comparison"][treatment], KINDS).T
    mine = 100 * cells["value"]["segment fraction"].unstack().loc[theirs.index, KINDS]
    signs = (np.sign(mine.diff(axis=1)) == np.sign(theirs.diff(axis=1)))["instruct"]
    fractions = _fractions(treatment) | {
        "on": f"released files, {thinking} thinking and {instruct} instruct models"
        f" of {GROUP} each",
        "verdict": _from_files(mine.round().eq(theirs).all(axis=None), whole),
        "ours": _listed({b: said("segment fraction", b, 100) for b in theirs.index}),
        "note": f"{note}; {signs.sum()} of {len(signs)} differences have the paper's sign",
    }
    yield fractions
    counts = REPORTED["segments"][treatment]
    totals = cells["value"]["segment count", "all"].loc[KINDS]
    yield fractions | {
        "where": fractions["where"].replace("per cent of the segments", "segments a response"),
        "published": " and ".join(map(str, counts)),
        "verdict": _from_files(totals.round(1).tolist() == counts, whole),
        "ours": said("segment count", "all", 1),
        "note": "",
    }


def _pairs(folder: Path) -> Iterator[Cells]:
    """The pairs of notebook 05. Shown: all differences have the paper's sign, with Holm
    p < .05."""
    pairs = _table(folder / "comparison_pairs.csv")
    if pairs.empty or not _about_paper(folder.parent, folder):
        return
    rows = _table(folder / "comparison.csv")
    rows = rows[(rows["metric"] == "segment fraction") & (rows["source"] == "run")]
    cells = rows.set_index(["model", "behaviour"])[VALUES]
    paper = pd.DataFrame(REPORTED["comparison"]["published"], KINDS)
    signs = np.sign(paper.loc["thinking"] - paper.loc["instruct"])
    slugs = {entry.display: slug for slug, entry in MODELS.items()}
    for names, pair in pairs.groupby(["thinking", "instruct"], sort=False):
        if not {*names} <= {*rows["model"]}:
            continue  # of released files
        run = Run.of(folder / slugs.get(names[0], names[0]))
        tests = pair.set_index("behaviour").loc[signs.index]
        holds = (np.sign(tests["difference"]) == signs) & (tests["p_holm"] < LEVEL)
        shown = tests.index[holds].tolist()
        both = " and ".join(names)
        yield _fractions("apart") | {
            "where": f"comparison of {both}; {SEGMENTS}; "
            f"published: averages over ten models, 100 tasks, {TAGS}",
            "on": run.on(f"{both}, {int(tests['n'].max())} tasks"),
            "verdict": run.verdict(len(shown), len(tests), COMPARED),
            "ours": _listed(
                {b: " and ".join(_number(cells.loc[(n, b)]) for n in names) for b in paper}
            ),
            "note": "the paper's sign with Holm p < .05: " + (", ".join(shown) or "none"),
        }


# -- steering works ----------------------------------------------------------------------


def _steering(results: Path) -> Iterator[Cells]:
    paths = _of_runs(results, "steering.csv")
    for slug in REPORTED["steering"]:
        if results / slug / "steering.csv" not in paths:
            yield _effect_of_steering(slug) | _not_run(slug)
    for path in paths:
        columns = ("metric", "direction", "coefficient", "value", "null_low", "null_high")
        table = _table(path, "behaviour", *columns)
        if not table.empty:
            yield _steered(Run.of(path.parent), table)


def _effect_of_steering(slug: str) -> Cells:
    """The paper's numbers, where it has some of this model."""
    numbers, tasks = "every behaviour rises with + and falls with -", ""
    if slug in REPORTED["steering"]:
        known = REPORTED["steering"][slug].items()
        numbers = _listed({b: " / ".join(f"{value:.1f}" for value in row) for b, row in known})
        tasks = ", 50 tasks"
    where = f"steering of {display(slug)}{tasks}; token fraction in per cent, plain / + / -"
    return {"where": where, "published": numbers}


def _steered(run: Run, table: pd.DataFrame) -> Cells:
    """A steered model. Shown: all eight changes go the claimed way, with Holm p < .05 and
    further than any control direction of the same length takes the behaviour."""
    size = measures.shown_coefficient(table)
    bars = measures.bars(table).set_index(["behaviour", "mode"])
    own = table[
        (table["metric"] == "token fraction") & (table["behaviour"] == table["direction"])
    ]
    p_holm = own.set_index(["behaviour", "coefficient"])["p_holm"]
    ours: dict[str, str] = {}
    shown: list[str] = []
    inside: list[str] = []
    for b in PAPER.targets:
        cells = bars.loc[b].loc[list(measures.MODES)]
        ours[b] = " / ".join(_number(cell) for cell in cells[VALUES].to_numpy())
        value = cells["value"]
        for mode, sign, limit in (("positive", 1, "null_high"), ("negative", -1, "null_low")):
            rises = sign * (value[mode] - value["plain"]) > 0
            if rises and p_holm.get((b, sign * size), np.nan) < LEVEL:
                as_a_control = sign * (value[mode] - cells.loc[mode, limit]) <= 0  # not for NaN
                (inside if as_a_control else shown).append(f"{b} {'+' if sign > 0 else '-'}")
    controls = own["null_low"].notna().any()
    where = " and outside the range of control directions" if controls else ""
    at = "" if size == 1 or np.isnan(size) else f"coefficient {size:g}: "
    note = f"{at}changes the claimed way with Holm p < .05{where}: {', '.join(shown) or 'none'}"
    if inside:
        note += f"; with Holm p < .05 but inside that range: {', '.join(inside)}"
    tasks = int(np.nanmax(bars["n"].to_numpy(float), initial=0))
    return _effect_of_steering(run.slug) | {
        "on": run.on(f"{run.name}, {tasks} tasks"),
        "verdict": run.verdict(len(shown), 2 * len(PAPER.targets)),
        "ours": _listed(ours),
        "note": note if controls else f"{note}; no control directions to compare with",
    }


# -- effects peak in the middle ----------------------------------------------------------


def _effects(results: Path) -> Iterator[Cells]:
    paths = _of_runs(results, "layer_effects.safetensors")
    for slug in REPORTED["peak"]:
        found = _of_model(results / "published" / "layer_effects_peaks.csv", slug)
        if len(found):
            yield from _released_peaks(slug, found)
        elif results / slug / "layer_effects.safetensors" not in paths:
            yield _largest(slug) | _not_run(slug)
    for path in paths:
        run, found = Run.of(path.parent), LayerEffects.load(path)
        sets = {name: _peaks(found, name) for name in ("published/others", "kl/own")}
        measured = {name: peaks for name, peaks in sets.items() if len(peaks)}
        if measured:
            yield _run_peaks(run, measured)


def _largest(slug: str) -> Cells:
    where = f"layer effects of {display(slug)}, released values; layer of the largest mean"
    return {"where": where, "published": _listed(REPORTED["peak"][slug])}


def _layers(peaks: pd.DataFrame, name: str) -> dict[str, str]:
    """``18 (9-19)`` for each behaviour."""
    found = peaks.set_index("behaviour")[[name, f"{name}_low", f"{name}_high"]]
    return {b: _number(row, scale=1, digits=0) for b, row in found.iterrows()}


def _middle(peaks: pd.DataFrame) -> tuple[int, str]:
    """How many peaks are in the middle half of the layers, and which are not."""
    place = peaks["peak"] / (peaks["layers"] - 1).clip(lower=1)
    outside = peaks.loc[~place.between(0.25, 0.75), "behaviour"]
    words = f"outside the middle half of the layers: {', '.join(outside) or 'none'}"
    return len(peaks) - len(outside), words


def _released_peaks(slug: str, peaks: pd.DataFrame) -> Iterator[Cells]:
    """Peaks of the released values, and ranks of the steering layer where the paper's are
    known."""

    def verdict(*names: str) -> str:
        found = peaks.set_index("behaviour")
        equal = all(found[name].to_dict() == REPORTED[name][slug] for name in names)
        return _from_files(equal, whole=len(found) == len(PAPER.targets))

    first = _largest(slug) | {
        "on": f"released file, {int(peaks['n'].min())} responses",
        "verdict": verdict("peak"),
        "ours": _listed(_layers(peaks, "peak")),
        "note": _middle(peaks)[1],
    }
    yield first
    if slug in REPORTED["rank"]:
        ranks, late = _layers(peaks, "rank"), _layers(peaks, "late_peak")
        theirs, behind = REPORTED["rank"][slug], REPORTED["late_peak"][slug]
        yield first | {
            "where": first["where"].partition(";")[0]
            + "; rank of the steering layer, and the peak without layers 0-4",
            "published": _listed({b: f"{theirs[b]}, {behind[b]}" for b in theirs}),
            "verdict": verdict("rank", "late_peak"),
            "ours": _listed({b: f"{ranks[b]}, {late[b]}" for b in ranks}),
            "note": "",
        }


def _peaks(found: LayerEffects, name: str) -> pd.DataFrame:
    """Peaks of a set of a run's effects; no rows for behaviours that have none."""
    if name not in found.effects:
        return pd.DataFrame()
    values = dict(zip(found.behaviours, found.of(name).swapaxes(0, 1), strict=True))
    known = [b for b in PAPER.targets if b in values and np.isfinite(values[b]).all(1).any()]
    return released.peaks({b: values[b] for b in known}, None)


def _run_peaks(run: Run, measured: Mapping[str, pd.DataFrame]) -> Cells:
    """Peaks of a run, of the published objective where there is one. Shown: in the middle
    half."""
    name, peaks = next(iter(measured.items()))
    middle, note = _middle(peaks)
    if name != "kl/own" and "kl/own" in measured:
        exact = _listed(_layers(measured["kl/own"], "peak")).replace(";", ",")
        note += f"; exact effects at own spans: {exact}"
    size = f"{peaks['n'].max()} responses, {peaks['layers'].max()} layers"
    published, beside = "in middle layers", ""
    if run.slug in REPORTED["peak"]:
        published, beside = _listed(REPORTED["peak"][run.slug]), "; published: released values"
    return {
        "where": f"layer effects of {run.name}; layer of the largest mean effect{beside}",
        "published": published,
        "on": run.on(f"{run.name}, {name}, {size}"),
        "verdict": run.verdict(middle, len(peaks)),
        "ours": _listed(_layers(peaks, "peak")),
        "note": note,
    }


# -- directions are distinct, and early layers carry the token ---------------------------


def _heatmap(results: Path) -> Iterator[Cells]:
    """Shown by a run: every pair of directions has a cosine below :data:`SAME`."""
    name = display(HEATMAP_MODEL)
    paper = {
        "where": f"heatmap, {name}, released vectors; cosines, upper triangle",
        "published": _triangle(REPORTED["cosines"]),
    }
    found = _of_model(results / "published" / "heatmap.csv", HEATMAP_MODEL)
    runs = _figures(results, "cosine_heatmap")
    if len(found):
        matrix = found.pivot(index="behaviour", columns="other", values="cosine")
        cosines, absent = _upper(matrix)
        equal = [np.round(row, 2).tolist() for row in cosines] == REPORTED["cosines"]
        without = f"; without {', '.join(absent)}" if absent else ""
        yield paper | {
            "on": "released file",
            "verdict": _from_files(equal, whole=not absent),
            "ours": _triangle(cosines),
            "note": f"no interval: the file holds means only{without}",
        }
    elif HEATMAP_MODEL not in runs:
        yield paper | _not_run(HEATMAP_MODEL)
    for slug, matrix in runs.items():
        run = Run.of(results / slug)
        cosines, absent = _upper(matrix)
        values = [value for row in cosines for value in row]
        below = sum(value < SAME for value in values)
        yield paper | {
            "where": f"heatmap of {run.name}, directions of the run; cosines, upper triangle; "
            f"published: {name}, released vectors",
            "on": run.on(f"{run.name}, {len(PAPER.compared) - len(absent)} directions"),
            "verdict": run.verdict(below, len(values)),
            "ours": _triangle(cosines),
            "note": f"{below} of {len(values)} cosines below {SAME}",
        }


def _upper(matrix: pd.DataFrame) -> tuple[list[list[float]], list[str]]:
    """The rows of the upper triangle in the paper's order, and the labels not in it."""
    names = [name for name in PAPER.compared if name in matrix.index]
    square = matrix.loc[names, names].to_numpy(float).tolist()
    rows = [row[place:] for place, row in enumerate(square[:-1], 1)]
    return rows, [name for name in PAPER.compared if name not in names]


def _triangle(rows: Sequence[Sequence[float]]) -> str:
    """``.36 .32 .28 .17; .64 .33 .60; ...``, a part for each row."""
    return "; ".join(" ".join(f"{v:.2f}".replace("0.", ".") for v in row) for row in rows)


def _embedding(results: Path) -> Iterator[Cells]:
    """Shown by a run: the similarity is larger at the first layer than at the last, for all."""
    where = "largest cosine with an embedding row{}, per layer; first and last layer here"
    paper = {"where": where.format(""), "published": "figure only"}
    runs = _figures(results, "similarity_embedding")
    if not {*runs} & {*REPORTED["steering"]}:
        yield paper | _not_run(HEATMAP_MODEL)
    for slug, table in runs.items():
        run = Run.of(results / slug)
        first, last = table.iloc[:, 0].astype(float), table.iloc[:, -1].astype(float)
        falls = int((first > last).sum())
        yield paper | {
            "where": where.format(f" of {run.name}"),
            "on": run.on(f"{run.name}, {table.shape[1]} layers"),
            "verdict": run.verdict(falls, len(table)),
            "ours": _listed({b: f"{first[b]:.2f} and {last[b]:.2f}" for b in table.index}),
            "note": f"larger at the first layer for {falls} of {len(table)}",
        }


def _figures(results: Path, figure: str) -> dict[str, pd.DataFrame]:
    """The data of a figure of every run that has some, by slug, indexed by behaviour."""
    paths = _of_runs(results, f"figures/{figure}.csv")
    found = {path.parents[1].name: _table(path) for path in paths}
    return {slug: one.set_index("behaviour") for slug, one in found.items() if not one.empty}


# -- the ledger --------------------------------------------------------------------------

#: The paper's claims, and what makes the rows of each from a results folder.
CLAIMS: dict[str, Callable[[Path], Iterator[Cells]]] = {
    "behaviours differ between thinking and instruct models": _comparison,
    "adding or subtracting a direction raises or lowers its behaviour": _steering,
    "effects peak in middle layers": _effects,
    "directions are distinct": _heatmap,
    "early layers carry token identity": _embedding,
}
#: Where the table stands in a document.
MARKS = (
    "<!-- ledger: written by python -m stllms.comparison.ledger -->",
    "<!-- end of ledger -->",
)


def ledger(results: str | Path, published: str | Path | None = None) -> pd.DataFrame:
    """The ledger of a results folder, columns :data:`COLUMNS`.

    ``published`` is a folder of released files: what they give is drawn into
    ``<results>/published/`` first, unless it is there already. Raises ``BadFile`` for an
    artefact or a released file that is not what it should be.
    """
    if published is not None:
        released.ensure(published, results)
    empty = dict.fromkeys(COLUMNS, "")
    rows = [
        {**empty, "claim": claim, **cells}
        for claim, rows_of in CLAIMS.items()
        for cells in rows_of(Path(results))
    ]
    return pd.DataFrame(rows)


def write(results: str | Path, published: str | Path | None = None) -> pd.DataFrame:
    """:func:`ledger`, written to ``<results>/ledger.csv``."""
    found = ledger(results, published)
    save_table(Path(results) / "ledger.csv", found)
    return found


def markdown(table: pd.DataFrame) -> str:
    """The ledger as a Markdown table; the commands of what was not run follow once, below."""
    parts = table["verdict"].str.partition("; run with ")
    shown = table.assign(
        claim=table["claim"].mask(table["claim"].duplicated(), ""), verdict=parts[0]
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in shown[[*COLUMNS]].itertuples(index=False):
        cells = [cell.replace("|", "\\|").replace("; ", "<br>") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    commands = [command for command in dict.fromkeys(parts[2]) if command]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Writes ``ledger.csv`` and prints it as Markdown; exit status 2 if refused."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.comparison.ledger", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", metavar="DIR", help="folder of the runs")
    parser.add_argument("--published", metavar="DIR", help="folder of the released files")
    parser.add_argument("--into", metavar="FILE", type=Path, help="a document with its marks")
    given = parser.parse_args(argv)
    results = RunConfig(results=given.results).results_folder
    try:
        table = markdown(write(results, given.published))
        if given.into is not None:
            text = put(given.into.read_text(encoding="utf-8"), table)
            given.into.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"stllms.comparison.ledger: {plain(error)}", file=sys.stderr)
        return 2
    print(plain(table), end="")
    print(results / "ledger.csv", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
