"""Thinking models beside instruct models: counts and fractions of segments (METHOD, section 9).

Input is one :class:`Member` a model with the segment counts of its chains, wherever they come
from (a run, an API, a released file). The order is stable: pairs side by side, thinking first.

Two models are averaged, or subtracted from each other, only where their :class:`Setup` is the
same: one task set, one annotator, one reader. :func:`groups` and :func:`pairs` are the only
places that do either; :func:`unpaired` names what they leave apart.

Intervals are percentile bootstraps over tasks (Efron 1979). The samples of tasks are a function
of the seed and of the names of the tasks (:func:`stllms.metrics.resamples`), so that the
interval of a model stays the same, bit by bit, whoever else is compared, and models of a group
that were asked the same tasks share their samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns

from stllms import metrics
from stllms.config import MODELS, ModelEntry
from stllms.records import BEHAVIOURS, Annotation

#: Treatments of a chain without segments: the sound one, and the published one (as zeros).
EMPTY = ("apart", "published")
#: Bootstrap samples of the tasks behind every interval.
DRAWS = 4000
#: The numbers of a chain: (metric, behaviour), ``all`` for the total count.
_COLUMNS = (
    *(("segment count", behaviour) for behaviour in (*BEHAVIOURS, "all")),
    *(("segment fraction", behaviour) for behaviour in BEHAVIOURS),
)
#: Stands for a model that the registry does not know.
NOWHERE = ModelEntry(name="", hub_id=None, display="", source="folder")


class Setup(NamedTuple):
    """What must be the same before the numbers of two models are averaged or subtracted."""

    tasks: str
    annotator: str
    reader: str

    def __str__(self) -> str:
        said = f"tasks {self.tasks or 'unknown'}, annotator {self.annotator or 'unknown'}"
        return f"{said}, reader {self.reader}" if self.reader else said


@dataclass(frozen=True)
class Member:
    """The chains of one model: segment ``counts [R, 6]`` in the order of ``task_ids``.

    ``unavailable`` chains have no annotation (a judge failed) and are not in ``counts``;
    a chain that was annotated and has no segment is a row of zeros. ``tasks`` names the task
    set and ``asked`` the tasks of it, those of unavailable chains too; ``annotator`` labelled
    the chains, and ``reader`` read the markup that it wrote, if it wrote any. All four are
    empty where they are not known.

    Raises ``ValueError`` for counts of another shape, and for a task that occurs twice.
    """

    name: str
    display: str
    kind: str
    pair: str | None
    task_ids: tuple[str, ...]
    counts: np.ndarray
    unavailable: int = 0
    source: str = "run"
    tasks: str = ""
    annotator: str = ""
    reader: str = ""
    asked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.counts.shape != (len(self.task_ids), len(BEHAVIOURS)):
            raise ValueError(
                f"{self.name}: counts should be {(len(self.task_ids), len(BEHAVIOURS))}, "
                f"they are {self.counts.shape}"
            )
        if len(set(self.task_ids)) < len(self.task_ids):
            twice = next(t for t in self.task_ids if self.task_ids.count(t) > 1)
            raise ValueError(f"{self.name}: task {twice!r} occurs twice, expected each once")

    @property
    def empty(self) -> int:
        """Annotated chains without any segment."""
        return int((self.counts.sum(1) == 0).sum())


def member(
    entry: ModelEntry,
    annotations: Sequence[Annotation],
    source: str = "run",
    tasks: str = "",
    annotator: str = "",
) -> Member:
    """The member of a model from the annotations of its chains.

    Raises ``ValueError`` where they are of several annotators, or were read by several readers:
    such chains are not averaged.
    """
    good = [a for a in annotations if a.failed is None]
    ways = {
        "annotators": {a.annotator for a in good},
        "readers": {str(a.ledger.get("reader", "")) for a in good},
    }
    for what, found in ways.items():
        if len(found) > 1:
            raise ValueError(
                f"{entry.name}: chains of several {what} ({', '.join(sorted(found))}), "
                "which are not averaged; annotate all of them the same way"
            )
    return Member(
        name=entry.name,
        display=entry.display,
        kind=entry.kind,
        pair=entry.pair,
        task_ids=tuple(a.task_id for a in good),
        counts=metrics.segment_counts(good),
        unavailable=len(annotations) - len(good),
        source=source,
        tasks=tasks,
        annotator=annotator,
        reader=next(iter(ways["readers"]), ""),
        asked=tuple(a.task_id for a in annotations),
    )


def ordered(members: Sequence[Member]) -> list[Member]:
    """Pairs side by side, the thinking model first, in the registry's order; others last."""
    known = list(MODELS)
    rank = {name: place for place, name in enumerate(known)}

    def key(one: Member) -> tuple:
        partner = one.pair if one.pair in rank else one.name
        first = min(rank.get(one.name, len(rank)), rank.get(partner, len(rank)))
        return first, one.kind != "thinking", one.display

    return sorted(members, key=key)


def colours(members: Sequence[Member]) -> dict[str, tuple[float, float, float]]:
    """A colour a model by display name: one hue a pair (of one source), the instruct model
    paler. More than ten hues are spread over the circle: the palette has no more."""

    def pair(one: Member) -> tuple[frozenset, str]:
        return frozenset((one.name, one.pair or one.name)), one.source

    hues: dict[tuple, int] = {}
    for one in members:
        hues.setdefault(pair(one), len(hues))
    palette = sns.color_palette("colorblind" if len(hues) <= 10 else "husl", len(hues))
    chosen = {}
    for one in members:
        base = np.array(palette[hues[pair(one)]])
        pale = base if one.kind == "thinking" else base + 0.55 * (1 - base)
        chosen[one.display] = mpl.colors.to_rgb(tuple(pale))
    return chosen


def setups(members: Sequence[Member]) -> list[Setup]:
    """The setup of every member.

    Where one name of a task set stands for different tasks (a smaller sample, another seed),
    the number of tasks and a hash of their names are added to it.
    """
    sets: dict[str, set[frozenset[str]]] = {}
    for one in members:
        sets.setdefault(one.tasks, set()).add(frozenset(one.asked))
    return [
        Setup(
            one.tasks if len(sets[one.tasks]) == 1 else _particular(one),
            one.annotator,
            one.reader,
        )
        for one in members
    ]


def _particular(one: Member) -> str:
    if not one.asked:
        return f"{one.tasks} (tasks unknown)"
    content = json.dumps(sorted(one.asked)).encode()
    return f"{one.tasks} ({len(one.asked)} tasks, {hashlib.sha256(content).hexdigest()[:4]})"


def groups(members: Sequence[Member]) -> dict[tuple[str, Setup], list[Member]]:
    """Which models may be averaged: those of one kind, one task set, one annotator, one reader.

    Nothing else in the package averages over models. The members of a group are in a fixed
    order, so that sums do not depend on the order in which they came.
    """
    found: dict[tuple[str, Setup], list[Member]] = {}
    for one, setup in zip(members, setups(members), strict=True):
        found.setdefault((one.kind, setup), []).append(one)
    return {
        place: sorted(group, key=lambda one: (one.name, one.source, one.display))
        for place, group in found.items()
    }


def table(members: Sequence[Member], *, empty: str = "apart", seed: int = 0) -> pd.DataFrame:
    """Per model and behaviour: mean count and mean fraction with intervals over tasks.

    Columns ``model, kind, source, tasks, annotator, reader, behaviour, metric, value, low,
    high, n``; ``metric`` is ``segment count`` or ``segment fraction``, ``behaviour`` is ``all``
    for the total count, and ``n`` counts the chains that have the number. A row is of one
    model: rows of different ``tasks``, ``annotator`` or ``reader`` stand beside each other, but
    their difference is not only one of the models.
    ``empty="published"`` lets a chain without segments count as zeros in the fractions.
    """
    rows = []
    for one, setup in zip(members, setups(members), strict=True):
        values = _values(one, empty)
        means = _means(values, metrics.resamples(values.index, draws=DRAWS, seed=seed))
        spread = zip(values.columns, means[0], *_limits(means), values.count(), strict=True)
        for (metric, behaviour), *found in spread:
            rows.append((one.display, one.kind, one.source, *setup, behaviour, metric, *found))
    columns = ["model", "kind", "source", *Setup._fields, "behaviour", "metric"]
    return pd.DataFrame(rows, columns=[*columns, "value", "low", "high", "n"])


def ledger(members: Sequence[Member]) -> pd.DataFrame:
    """What went into the averages: chains, those without a segment, those unavailable."""
    return pd.DataFrame(
        [
            {
                "model": one.display,
                "kind": one.kind,
                "source": one.source,
                **setup._asdict(),
                "chains": len(one.task_ids),
                "without segments": one.empty,
                "unavailable": one.unavailable,
                "segments a chain": round(float(one.counts.sum(1).mean()), 2)
                if len(one.counts)
                else np.nan,
            }
            for one, setup in zip(members, setups(members), strict=True)
        ]
    )


def caption(members: Sequence[Member]) -> str:
    """Which models a figure shows, which of them are fixtures, and what else sets them apart:
    other tasks, another annotator or another reader."""
    names = ", ".join(f"{one.display} ({len(one.task_ids)} chains)" for one in members)
    fixtures = [
        one.display for one in members if MODELS.get(one.name, NOWHERE).source == "embedded"
    ]
    warning = f" {' and '.join(fixtures)}: fixtures, built to differ." if fixtures else ""
    return f"{names}.{warning}{_apart(members)}"


def _apart(members: Sequence[Member]) -> str:
    """Who answered which tasks and was labelled by whom, if that is not the same for all."""
    found: dict[Setup, list[str]] = {}
    for one, setup in zip(members, setups(members), strict=True):
        found.setdefault(setup, []).append(one.display)
    if len(found) <= 1:
        return ""
    said = [f"{' and '.join(names)}: {setup}" for setup, names in found.items()]
    return f" Measured differently, so not to be compared by height: {'; '.join(said)}."


def group_intervals(
    compared: Sequence[Member], *, empty: str, draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """The average over the models of each of the :func:`groups`, with 95 % intervals.

    Every model weighs the same and is taken as given: a bootstrap sample is one of the tasks
    that any model of the group has a chain of, the same for all of them, and a model's mean is
    over the chains that it has of these. A group's interval changes with its members only.
    """
    rows = []
    for (kind, setup), group in groups(compared).items():
        tables = [_values(one, empty) for one in group]
        union = sorted({task for table in tables for task in table.index})
        drawn = metrics.resamples(union, draws=draws, seed=seed)
        place = {task: column for column, task in enumerate(union)}
        values = np.mean(
            [_means(table, drawn[:, [place[t] for t in table.index]]) for table in tables],
            axis=0,
        )
        spread = zip(_COLUMNS, values[0], *_limits(values), strict=True)
        rows += [(kind, *setup, *column, *found, len(group)) for column, *found in spread]
    columns = ["kind", *Setup._fields, "metric", "behaviour", "value", "low", "high", "models"]
    return pd.DataFrame(rows, columns=columns)


def treatments(members: Sequence[Member], *, seed: int = 0) -> pd.DataFrame:
    """:func:`group_intervals` under both treatments of chains without segments, told apart by
    the column ``empty chains`` (METHOD, section 11)."""
    made = {name: group_intervals(members, empty=name, seed=seed) for name in EMPTY}
    return pd.concat(made, names=["empty chains"]).reset_index("empty chains")


def _values(one: Member, empty: str) -> pd.DataFrame:
    """``[R, 13]``: counts, their sum and fractions of every chain, rows by task in order."""
    fractions = metrics.segment_fractions(one.counts, empty=empty)
    values = np.hstack([one.counts, one.counts.sum(1, keepdims=True), fractions])
    columns = pd.MultiIndex.from_tuples(_COLUMNS)
    return pd.DataFrame(values, list(one.task_ids), columns).sort_index()


def _means(values: pd.DataFrame, drawn: np.ndarray) -> np.ndarray:
    """Mean over the chains (row 0) and over bootstrap samples ``drawn [draws, R]`` of them,
    ``[1 + draws, columns]``; chains without the number (NaN) take no part."""
    weights = np.vstack([np.ones(len(values)), drawn])
    numbers = values.to_numpy(float)
    known = weights @ ~np.isnan(numbers)
    out = np.full_like(known, np.nan)
    return np.divide(weights @ np.nan_to_num(numbers), known, out=out, where=known > 0)


def _limits(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2.5 and 97.5 % of the bootstrap means (all rows but the first), NaN left out."""
    low, high = pd.DataFrame(means[1:]).quantile([0.025, 0.975]).to_numpy()
    return low, high


def pairs(members: Sequence[Member], *, empty: str = "apart", seed: int = 0) -> pd.DataFrame:
    """Thinking minus instruct of every pair: paired difference of the fractions by task.

    Columns ``thinking, instruct, behaviour, difference, low, high, n, p, p_holm``; sign-flip
    p-values, Holm's correction over all rows (so ``p_holm``, and it alone, depends on how many
    pairs are compared). Chains of tasks that both have take part; a model of a run is not
    paired with one of a released file, and none with one of another :class:`Setup`
    (:func:`unpaired` names those).
    """
    rows = []
    for one, other, setup, theirs in _couples(members):
        if setup != theirs:
            continue
        mine, their = (_values(side, empty)["segment fraction"] for side in (one, other))
        both = mine.index.intersection(their.index)
        difference = mine.loc[both] - their.loc[both]
        means = _means(difference, metrics.resamples(both, draws=DRAWS, seed=seed))
        spread = zip(BEHAVIOURS, means[0], *_limits(means), difference.count(), strict=True)
        rows += [
            (
                *(one.display, other.display, *found),
                metrics.sign_flip(difference[found[0]].to_numpy(), seed=seed),
            )
            for found in spread
        ]
    columns = ["thinking", "instruct", "behaviour", "difference", "low", "high", "n", "p"]
    made = pd.DataFrame(rows, columns=columns)
    return made.assign(p_holm=metrics.holm(made["p"].to_numpy(float)))


def unpaired(members: Sequence[Member]) -> pd.DataFrame:
    """The pairs that are not subtracted, because the two were measured differently.

    Columns ``thinking, thinking measured with, instruct, instruct measured with``.
    """
    rows = [
        (one.display, str(setup), other.display, str(theirs))
        for one, other, setup, theirs in _couples(members)
        if setup != theirs
    ]
    measured = [(kind, f"{kind} measured with") for kind in ("thinking", "instruct")]
    return pd.DataFrame(rows, columns=[name for names in measured for name in names])


def _couples(members: Sequence[Member]) -> list[tuple[Member, Member, Setup, Setup]]:
    """Every thinking model beside its instruct model of the same source, with their setups."""
    known = {
        (one.name, one.source): (one, setup)
        for one, setup in zip(members, setups(members), strict=True)
    }
    return [
        (one, other, setup, theirs)
        for one, setup in known.values()
        if one.kind == "thinking" and (one.pair, one.source) in known
        for other, theirs in [known[one.pair, one.source]]
    ]


def width(members: Sequence[Member]) -> float:
    """Inches that a figure of grouped bars needs: every model has six bars."""
    return float(np.clip(6 + 0.8 * len(members), 9, 14))
