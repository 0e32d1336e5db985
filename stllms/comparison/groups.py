"""Thinking models beside instruct models: counts and fractions of segments (method, section 9).

A :class:`Member` is one model with the segment counts of its chains, wherever they come from
(a run, an API, a released file). Two models are averaged or subtracted only where their
:class:`Setup` is the same; only :func:`groups` and :func:`pairs` do either.

Intervals are percentile bootstraps over tasks (Efron 1979). The samples depend on the seed and
on the names of the tasks alone (:func:`stllms.stats.resamples`): the interval of a model stays
the same whoever else is compared, and models that were given the same tasks share samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns

from stllms import stats
from stllms.labels import PAPER, LabelSet
from stllms.records import Annotation
from stllms.registry import MODELS, ModelEntry
from stllms.steering import measures

#: Bootstrap samples of the tasks behind every interval.
DRAWS = 4000


class Setup(NamedTuple):
    """What must be the same before the numbers of two models are averaged or subtracted.

    ``labels`` is empty for the paper's; a table has the column where one of its models has
    others.
    """

    tasks: str
    annotator: str
    reader: str
    labels: str = ""

    def __str__(self) -> str:
        text = f"tasks {self.tasks or 'unknown'}, annotator {self.annotator or 'unknown'}"
        text += f", reader {self.reader}" if self.reader else ""
        return f"{text}, labels {self.labels}" if self.labels else text


@dataclass(frozen=True)
class Member:
    """The chains of one model: segment ``counts [R, N]`` in the order of ``task_ids`` and of
    the names of ``labels``.

    An annotated chain without segments is a row of zeros; chains without an annotation (a judge
    failed) are only counted, in ``unavailable``. ``tasks`` names the task set,
    ``asked`` lists its tasks, those of unavailable chains too; ``annotator`` labelled the
    chains, and ``reader`` read its markup, if it wrote any. All four are empty where unknown.
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
    labels: LabelSet = PAPER

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
    *,
    labels: LabelSet = PAPER,
) -> Member:
    """The member of a model from the annotations of its chains.

    Raises ``ValueError`` where they are of several annotators, or were read by several readers:
    such chains are not averaged.
    """
    good = [a for a in annotations if a.failed is None]
    readers = {str(a.ledger.get("reader", "")) for a in good}
    for what, found in (("annotators", {a.annotator for a in good}), ("readers", readers)):
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
        counts=measures.segment_counts(good, labels.names),
        unavailable=len(annotations) - len(good),
        source=source,
        tasks=tasks,
        annotator=annotator,
        reader="".join(readers),
        asked=tuple(a.task_id for a in annotations),
        labels=labels,
    )


def ordered(members: Sequence[Member]) -> list[Member]:
    """Pairs side by side, the thinking model first, in the registry's order; others last."""
    rank = {name: place for place, name in enumerate(MODELS)}

    def key(one: Member) -> tuple[int, bool, str]:
        places = [rank[name] for name in (one.name, one.pair) if name in rank]
        return min(places, default=len(rank)), one.kind != "thinking", one.display

    return sorted(members, key=key)


# -- how a figure shows them -------------------------------------------------------------


def colours(members: Sequence[Member]) -> dict[str, Any]:
    """Display name -> (red, green, blue): one hue for each pair of one source, the instruct
    model paler.

    The palette has ten hues; more than ten are spread over the colour circle.
    """
    keys = [(frozenset((one.name, one.pair or one.name)), one.source) for one in members]
    hues = list(dict.fromkeys(keys))
    palette = sns.color_palette("colorblind" if len(hues) <= 10 else "husl", len(hues))
    chosen = {}
    for one, key in zip(members, keys, strict=True):
        base = np.array(palette[hues.index(key)])
        pale = base if one.kind == "thinking" else base + 0.55 * (1 - base)
        chosen[one.display] = mpl.colors.to_rgb(tuple(pale))
    return chosen


def width(members: Sequence[Member]) -> float:
    """Inches that a figure of grouped bars needs: every model has a bar for each label."""
    labels = max(len(one.labels.names) for one in members)
    return float(np.clip(6 + 0.8 * len(members) * (labels / 6), 9, 14))


def caption(members: Sequence[Member]) -> str:
    """Which models a figure shows, which of them are fixtures, the labels that no chain has,
    and what else sets the models apart: other tasks, annotators, readers or labels."""
    text = ", ".join(f"{one.display} ({len(one.task_ids)} chains)" for one in members) + "."
    fixtures = [
        one.display
        for one in members
        if one.name in MODELS and MODELS[one.name].source == "embedded"
    ]
    if fixtures:
        text += f" {' and '.join(fixtures)}: fixtures, built to differ."
    if lacking := never(members):
        text += f" In no chain: {', '.join(lacking)}."
    found: dict[Setup, list[str]] = {}
    for one, setup in zip(members, setups(members), strict=True):
        found.setdefault(setup, []).append(one.display)
    if len(found) > 1:
        ways = "; ".join(f"{' and '.join(names)}: {setup}" for setup, names in found.items())
        text += f" Measured differently, so not to be compared by height: {ways}."
    return text


def never(members: Sequence[Member]) -> list[str]:
    """The labels of the members' sets that no segment of any of them has."""
    found: dict[str, float] = {}
    for one in members:
        for name, n in zip(one.labels.names, one.counts.sum(0), strict=True):
            found[name] = found.get(name, 0) + n
    return [name for name, n in found.items() if not n]


# -- what may be compared ----------------------------------------------------------------


def setups(members: Sequence[Member]) -> list[Setup]:
    """The setup of every member.

    Where one name of a task set stands for different tasks (a smaller sample, another seed),
    the number of tasks and a hash of their names are added to it; a hash of what they mean to
    the name of sets of labels that mean different things.
    """
    sets: dict[str, set[frozenset[str]]] = {}
    for one in members:
        sets.setdefault(one.tasks, set()).add(frozenset(one.asked))

    def tasks(one: Member) -> str:
        if len(sets[one.tasks]) == 1:
            return one.tasks
        if not one.asked:
            return f"{one.tasks} (tasks unknown)"
        return f"{one.tasks} ({len(one.asked)} tasks, {_digest(sorted(one.asked))[:4]})"

    names: dict[str, set[str]] = {}
    for one in members:
        names.setdefault(one.labels.name, set()).add(_meaning(one.labels))

    def labels(one: Member) -> str:
        meaning, name = _meaning(one.labels), one.labels.name
        if meaning == _meaning(PAPER):
            return ""
        return name if len(names[name]) == 1 else f"{name} ({meaning[:4]})"

    return [Setup(tasks(one), one.annotator, one.reader, labels(one)) for one in members]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _meaning(labels: LabelSet) -> str:
    """A hash of what an annotator is told: colours and roles change nothing that is counted."""
    told = [(one.name, one.definition, one.cues) for one in labels.labels]
    return _digest([told, labels.example])


def groups(members: Sequence[Member]) -> dict[tuple[str, Setup], list[Member]]:
    """Which models may be averaged: those of one kind and one setup.

    The members of a group are in a fixed order, so that sums do not depend on the order in
    which they came.
    """
    found: dict[tuple[str, Setup], list[Member]] = {}
    for one, setup in zip(members, setups(members), strict=True):
        found.setdefault((one.kind, setup), []).append(one)
    return {
        place: sorted(group, key=lambda one: (one.name, one.source, one.display))
        for place, group in found.items()
    }


def _couples(members: Sequence[Member]) -> Iterator[tuple[Member, Setup, Member, Setup]]:
    """Every thinking model beside its instruct model of the same source, with their setups."""
    pairs = zip(members, setups(members), strict=True)
    known = {(one.name, one.source): (one, setup) for one, setup in pairs}
    for one, setup in known.values():
        other = (one.pair or "", one.source)
        if one.kind == "thinking" and other in known:
            yield one, setup, *known[other]


# -- tables ------------------------------------------------------------------------------


def overview(members: Sequence[Member]) -> pd.DataFrame:
    """What went into the averages: chains, those without a segment, those unavailable."""
    found = pd.DataFrame(
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
    return _told(found)


def _told(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the column ``labels`` where all are the paper's."""
    return table if table["labels"].any() else table.drop(columns="labels")


def table(members: Sequence[Member], *, empty: str = "apart", seed: int = 0) -> pd.DataFrame:
    """Per model and behaviour: mean count and mean fraction with intervals over tasks.

    Columns ``model, kind, source``, those of :class:`Setup`, ``behaviour, metric, value, low,
    high, n``; ``metric`` is ``segment count`` or ``segment fraction``, ``behaviour`` is ``all``
    for the total count, and ``n`` counts the chains that have the number. A difference of two
    rows of another :class:`Setup` is not only one of the models.
    ``empty="published"`` lets a chain without segments count as zeros in the fractions.
    """
    rows = []
    for one, setup in zip(members, setups(members), strict=True):
        values = _values(one, empty)
        means = _means(values, stats.resamples(values.index, draws=DRAWS, seed=seed))
        spread = zip(values.columns, *_interval(means), values.count(), strict=True)
        for (metric, behaviour), *found in spread:
            rows.append((one.display, one.kind, one.source, *setup, behaviour, metric, *found))
    columns = ["model", "kind", "source", *Setup._fields, "behaviour", "metric"]
    return _told(pd.DataFrame(rows, columns=[*columns, "value", "low", "high", "n"]))


def group_intervals(members: Sequence[Member], *, empty: str, seed: int = 0) -> pd.DataFrame:
    """The average over the models of each of the :func:`groups`, with 95 % intervals.

    Every model weighs the same and is taken as given: a bootstrap sample is one of the tasks
    that any model of the group has a chain of, the same for all of them, and a model's mean is
    over the chains that it has of these. A group's interval changes with its members only.
    """
    rows = []
    for (kind, setup), group in groups(members).items():
        tables = [_values(one, empty) for one in group]
        union = sorted({task for table in tables for task in table.index})
        drawn = pd.DataFrame(stats.resamples(union, draws=DRAWS, seed=seed), columns=union)
        means = [_means(table, drawn[table.index].to_numpy()) for table in tables]
        keys = tables[0].columns
        spread = zip(keys, *_interval(np.mean(means, axis=0)), strict=True)
        rows += [(kind, *setup, *column, *found, len(group)) for column, *found in spread]
    columns = ["kind", *Setup._fields, "metric", "behaviour", "value", "low", "high", "models"]
    return _told(pd.DataFrame(rows, columns=columns))


def treatments(members: Sequence[Member], *, seed: int = 0) -> pd.DataFrame:
    """:func:`group_intervals` under both treatments of chains without segments, told apart by
    the column ``empty chains`` (method, section 11)."""
    both = {name: group_intervals(members, empty=name, seed=seed) for name in measures.EMPTY}
    return pd.concat(both, names=["empty chains"]).reset_index("empty chains")


def pairs(members: Sequence[Member], *, empty: str = "apart", seed: int = 0) -> pd.DataFrame:
    """Thinking minus instruct of every pair: paired difference of the fractions by task.

    Columns ``thinking, instruct, behaviour, difference, low, high, n, p, p_holm``; sign-flip
    p-values, Holm's correction over all rows (so ``p_holm``, and it alone, depends on how many
    pairs are compared). Chains of tasks that both have take part; a model is paired with one of
    the same source and :class:`Setup` only (:func:`unpaired` lists the others).
    """
    rows = []
    for one, setup, other, theirs in _couples(members):
        if setup != theirs:
            continue
        mine, their = (_values(side, empty)["segment fraction"] for side in (one, other))
        both = mine.index.intersection(their.index)
        difference = mine.loc[both] - their.loc[both]
        means = _means(difference, stats.resamples(both, draws=DRAWS, seed=seed))
        spread = zip(difference.columns, *_interval(means), difference.count(), strict=True)
        for behaviour, *found in spread:
            p = stats.sign_flip(difference[behaviour].to_numpy(), seed=seed)
            rows.append((one.display, other.display, behaviour, *found, p))
    columns = ["thinking", "instruct", "behaviour", "difference", "low", "high", "n", "p"]
    found = pd.DataFrame(rows, columns=columns)
    return found.assign(p_holm=stats.holm(found["p"].to_numpy(float)))


def unpaired(members: Sequence[Member]) -> pd.DataFrame:
    """The pairs that are not subtracted, because the two were measured differently.

    Columns ``thinking, thinking measured with, instruct, instruct measured with``.
    """
    rows = [
        (one.display, str(setup), other.display, str(theirs))
        for one, setup, other, theirs in _couples(members)
        if setup != theirs
    ]
    columns = ["thinking", "thinking measured with", "instruct", "instruct measured with"]
    return pd.DataFrame(rows, columns=columns)


def _values(one: Member, empty: str) -> pd.DataFrame:
    """``[R, 2 N + 1]``: counts, their sum and fractions of every chain, rows by task in order;
    columns ``(metric, behaviour)``, ``all`` for the sum."""
    fractions = measures.segment_fractions(one.counts, empty=empty)
    values = np.hstack([one.counts, one.counts.sum(1, keepdims=True), fractions])
    names = one.labels.names
    keys = [("segment count", name) for name in (*names, "all")]
    columns = pd.MultiIndex.from_tuples([*keys, *(("segment fraction", n) for n in names)])
    return pd.DataFrame(values, list(one.task_ids), columns).sort_index()


def _means(values: pd.DataFrame, drawn: np.ndarray) -> np.ndarray:
    """Mean over the chains (row 0) and over bootstrap samples ``drawn [draws, R]`` of them,
    ``[1 + draws, columns]``; chains without the number (NaN) take no part."""
    weights = np.vstack([np.ones(len(values)), drawn])
    numbers = values.to_numpy(float)
    known = weights @ ~np.isnan(numbers)
    out = np.full_like(known, np.nan)
    return np.divide(weights @ np.nan_to_num(numbers), known, out=out, where=known > 0)


def _interval(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean (row 0), and 2.5 and 97.5 % of the bootstrap means (the rest), NaN left out."""
    low, high = pd.DataFrame(means[1:]).quantile([0.025, 0.975]).to_numpy()
    return means[0], low, high
