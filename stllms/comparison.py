"""Thinking models beside instruct models: counts and fractions of segments (METHOD, section 9).

Input is one :class:`Member` a model with the segment counts of its chains, wherever they come
from (a run, an API, a released file). The order is stable: pairs side by side, thinking first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns

from stllms import metrics
from stllms.config import MODELS, ModelEntry
from stllms.records import BEHAVIOURS, Annotation

#: Treatments of a chain without segments: the sound one, and the published one (as zeros).
EMPTY = ("apart", "published")
#: Stands for a model that the registry does not know.
NOWHERE = ModelEntry(name="", hub_id=None, display="", source="folder")


@dataclass(frozen=True)
class Member:
    """The chains of one model: segment ``counts [R, 6]`` in the order of ``task_ids``.

    ``unavailable`` chains have no annotation (a judge failed) and are not in ``counts``;
    a chain that was annotated and has no segment is a row of zeros. ``tasks`` and ``annotator``
    name what was asked and who labelled, where it is known.
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

    def __post_init__(self) -> None:
        if self.counts.shape != (len(self.task_ids), len(BEHAVIOURS)):
            raise ValueError(
                f"{self.name}: counts should be {(len(self.task_ids), len(BEHAVIOURS))}, "
                f"they are {self.counts.shape}"
            )

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
    """The member of a model from the annotations of its chains."""
    good = [a for a in annotations if a.failed is None]
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


def table(members: Sequence[Member], *, empty: str = "apart", seed: int = 0) -> pd.DataFrame:
    """Per model and behaviour: mean count and mean fraction with intervals over tasks.

    Columns ``model, kind, source, behaviour, metric, value, low, high, n``; ``metric`` is
    ``segment count`` or ``segment fraction``, and ``behaviour`` is ``all`` for the total count.
    ``empty="published"`` lets a chain without segments count as zeros in the fractions.
    """
    rows = []
    for one in members:
        fractions = metrics.segment_fractions(one.counts, empty=empty)
        columns = {("segment count", b): one.counts[:, i] for i, b in enumerate(BEHAVIOURS)}
        columns |= {("segment fraction", b): fractions[:, i] for i, b in enumerate(BEHAVIOURS)}
        columns["segment count", "all"] = one.counts.sum(1)
        for (metric, behaviour), values in columns.items():
            found = metrics.bootstrap(values, seed=seed)
            rows.append(
                {
                    "model": one.display,
                    "kind": one.kind,
                    "source": one.source,
                    "behaviour": behaviour,
                    "metric": metric,
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                }
            )
    return pd.DataFrame(rows)


def ledger(members: Sequence[Member]) -> pd.DataFrame:
    """What went into the averages: chains, those without a segment, those unavailable."""
    return pd.DataFrame(
        [
            {
                "model": one.display,
                "kind": one.kind,
                "source": one.source,
                "tasks": one.tasks,
                "annotator": one.annotator,
                "chains": len(one.task_ids),
                "without segments": one.empty,
                "unavailable": one.unavailable,
                "segments a chain": round(float(one.counts.sum(1).mean()), 2)
                if len(one.counts)
                else np.nan,
            }
            for one in members
        ]
    )


def caption(members: Sequence[Member]) -> str:
    """Which models a figure shows, which of them are fixtures, and what else sets them apart:
    other tasks or another annotator."""
    names = ", ".join(f"{one.display} ({len(one.task_ids)} chains)" for one in members)
    fixtures = [
        one.display for one in members if MODELS.get(one.name, NOWHERE).source == "embedded"
    ]
    warning = f" {' and '.join(fixtures)}: fixtures, built to differ." if fixtures else ""
    return f"{names}.{warning}{_setups(members)}"


def _setups(members: Sequence[Member]) -> str:
    """Who answered which tasks and was labelled by whom, if that is not the same for all."""
    setups: dict[tuple[str, str], list[str]] = {}
    for one in members:
        setups.setdefault((one.tasks, one.annotator), []).append(one.display)
    if len(setups) == 1:
        return ""
    said = [
        f"{' and '.join(names)}: tasks {tasks or 'unknown'}, annotator {annotator or 'unknown'}"
        for (tasks, annotator), names in setups.items()
    ]
    return f" Not on the same footing: {'; '.join(said)}."


def group_intervals(
    compared: Sequence[Member], *, empty: str, draws: int = 4000, seed: int = 0
) -> pd.DataFrame:
    """The average over the models of a group, with 95 % intervals over tasks.

    A group is all models of one kind that were asked the same tasks and labelled by the same
    annotator: numbers on another footing are not averaged. The models are taken as given, and
    each draw takes the same tasks for all models of a group.
    """
    rows = []
    for place in dict.fromkeys((one.kind, one.tasks, one.annotator) for one in compared):
        group = [one for one in compared if (one.kind, one.tasks, one.annotator) == place]
        values = np.mean([_means(one, empty, draws, seed) for one in group], axis=0)
        low, high = pd.DataFrame(values[1:]).quantile([0.025, 0.975]).to_numpy()
        for column, (metric, behaviour) in enumerate(_COLUMNS):
            found = values[0, column], low[column], high[column]
            rows.append((*place, metric, behaviour, *found, len(group)))
    columns = ["kind", "tasks", "annotator", "metric", "behaviour"]
    return pd.DataFrame(rows, columns=[*columns, "value", "low", "high", "models"])


def treatments(members: Sequence[Member], *, seed: int = 0) -> pd.DataFrame:
    """:func:`group_intervals` under both treatments of chains without segments, told apart by
    the column ``empty chains`` (METHOD, section 11)."""
    made = {name: group_intervals(members, empty=name, seed=seed) for name in EMPTY}
    return pd.concat(made, names=["empty chains"]).reset_index("empty chains")


_COLUMNS = (
    *(("segment count", behaviour) for behaviour in (*BEHAVIOURS, "all")),
    *(("segment fraction", behaviour) for behaviour in BEHAVIOURS),
)


def _means(one: Member, empty: str, draws: int, seed: int) -> np.ndarray:
    """Mean over the chains (row 0) and over bootstrap samples of them, ``[1 + draws, 13]``."""
    fractions = metrics.segment_fractions(one.counts, empty=empty)
    values = np.hstack([one.counts, one.counts.sum(1, keepdims=True), fractions])
    n = len(values)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = np.vstack([np.ones(n), drawn])
    known = weights @ ~np.isnan(values)
    out = np.full_like(known, np.nan)
    return np.divide(weights @ np.nan_to_num(values), known, out=out, where=known > 0)


def pairs(members: Sequence[Member], *, empty: str = "apart", seed: int = 0) -> pd.DataFrame:
    """Thinking minus instruct of every pair: paired difference of the fractions by task.

    Columns ``thinking, instruct, behaviour, difference, low, high, n, p, p_holm``; sign-flip
    p-values, Holm's correction over all rows. Chains of tasks that both have take part; a
    model of a run is not paired with one of a released file.
    """
    by_name = {(one.name, one.source): one for one in members}
    rows = []
    for one in members:
        if one.kind != "thinking" or (one.pair, one.source) not in by_name:
            continue
        other = by_name[one.pair, one.source]
        both = [task for task in one.task_ids if task in set(other.task_ids)]
        mine, theirs = (_rows(side, both, empty) for side in (one, other))
        for place, behaviour in enumerate(BEHAVIOURS):
            difference = mine[:, place] - theirs[:, place]
            found = metrics.bootstrap(difference, seed=seed)
            rows.append(
                {
                    "thinking": one.display,
                    "instruct": other.display,
                    "behaviour": behaviour,
                    "difference": found.value,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                    "p": metrics.sign_flip(difference, seed=seed),
                }
            )
    columns = ["thinking", "instruct", "behaviour", "difference", "low", "high", "n", "p"]
    made = pd.DataFrame(rows, columns=columns)
    return made.assign(p_holm=metrics.holm(made["p"].to_numpy(float)))


def _rows(one: Member, wanted: Sequence[str], empty: str) -> np.ndarray:
    place = {task: i for i, task in enumerate(one.task_ids)}
    fractions = metrics.segment_fractions(one.counts, empty=empty)
    return fractions[[place[task] for task in wanted]].reshape(len(wanted), len(BEHAVIOURS))


def width(members: Sequence[Member]) -> float:
    """Inches that a figure of grouped bars needs: every model has six bars."""
    return float(np.clip(6 + 0.8 * len(members), 9, 14))
