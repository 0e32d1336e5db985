"""Agreement of two annotators over the same responses: how far to trust either of them.

Cohen's kappa ``(p_o - p_e) / (1 - p_e)``, ``p_o`` the observed share of agreement and
``p_e = sum_b p_first(b) p_second(b)`` the one that two unrelated annotators with these
prevalences would reach (Cohen, 1960).

The unit is the **character** that is not white space, by default: annotators cut a text at
different places, and the metrics that follow are shares of text, so that a unit which needs
no common cut compares them without favouring either. ``unit="sentence"`` gives every
sentence one vote (the label of most of its characters), which is what the offline annotator
is trained on; long sentences then weigh no more than short ones. Neighbouring units are not
independent, so intervals come from resampling whole chains.

Units that only one of the two has labelled carry no agreement; they are left out of kappa
and counted in ``compared``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stllms import sentences
from stllms.config import RunConfig
from stllms.records import BEHAVIOURS, Annotation, Response

UNITS = ("character", "sentence")


@dataclass(frozen=True)
class Agreement:
    """How two annotators agree; plot it, print it, or take :meth:`table`.

    ``confusion [N, N]`` holds shares of the compared units, rows the first annotator,
    columns the second. ``prevalence`` maps a label to its share by the first, by the second,
    and ``difference`` to second minus first with its interval ``(value, low, high)``.
    ``compared`` is the share of units that both have labelled. ``kappa`` and its interval are
    NaN where undefined: nothing compared, or both always gave the same one label.
    """

    first: str
    second: str
    unit: str
    chains: int
    units: int
    compared: float
    accuracy: float
    kappa: float
    kappa_low: float
    kappa_high: float
    labels: tuple[str, ...]
    confusion: np.ndarray
    prevalence: dict[str, tuple[float, float]]
    difference: dict[str, tuple[float, float, float]]

    def table(self) -> list[dict[str, float | str]]:
        """One row a label: prevalence by each, their difference and interval, F1."""
        rows = []
        for i, name in enumerate(self.labels):
            first, second = self.prevalence[name]
            value, low, high = self.difference[name]
            both = first + second
            rows.append(
                {
                    "label": name,
                    self.first: first,
                    self.second if self.second != self.first else self.second + " (2)": second,
                    "difference": value,
                    "ci_low": low,
                    "ci_high": high,
                    "f1": 2 * float(self.confusion[i, i]) / both if both else float("nan"),
                }
            )
        return rows

    def by_first(self) -> np.ndarray:
        """``confusion`` with rows that add up to 1, NaN for a label the first never gave."""
        sums = self.confusion.sum(axis=1, keepdims=True)
        return np.divide(
            self.confusion, sums, out=np.full_like(self.confusion, np.nan), where=sums > 0
        )

    def kappa_text(self) -> str:
        """``0.63 (0.59 to 0.66)``, or ``n/a`` where it is undefined."""
        if np.isnan(self.kappa):
            return "n/a"
        return f"{self.kappa:.2f} ({self.kappa_low:.2f} to {self.kappa_high:.2f})"


def annotators(setup: RunConfig) -> tuple[str, ...]:
    """Whose labels to compare on a run, the one that the others are measured against first.

    On an embedded model that is the truth, ``grammar``, and the others are ``offline``,
    ``lexical`` and the run's own annotator. Elsewhere nobody knows the truth: it is the run's
    annotator, compared with ``lexical`` (``offline`` where the run's is ``lexical``).
    """
    if setup.embedded:
        return tuple(dict.fromkeys(("grammar", "offline", "lexical", setup.annotator)))
    return (setup.annotator, "offline" if setup.annotator == "lexical" else "lexical")


def report(compared: Sequence[Agreement]) -> pd.DataFrame:
    """Rows of ``annotator, quantity, value, low, high``; the last two missing where there is
    no interval.

    Quantities: ``kappa``, ``accuracy``, ``compared``, and ``<label>, difference``: its share of
    the text by this annotator minus that by the first (prevalence difference).
    """
    rows: list[tuple[str, str, float, float, float]] = []
    nothing = (float("nan"), float("nan"))
    for found in compared:
        who = found.second
        rows.append((who, "kappa", found.kappa, found.kappa_low, found.kappa_high))
        rows.append((who, "accuracy", found.accuracy, *nothing))
        rows.append((who, "compared", found.compared, *nothing))
        for label in found.labels:
            rows.append((who, f"{label}, difference", *found.difference[label]))
    return pd.DataFrame(rows, columns=["annotator", "quantity", "value", "low", "high"])


def confusions(compared: Sequence[Agreement]) -> pd.DataFrame:
    """:meth:`Agreement.by_first` as rows: annotator, label by the first, one column a label."""
    made = [
        pd.DataFrame(found.by_first(), columns=list(found.labels)).assign(
            annotator=found.second, label=found.labels
        )
        for found in compared
    ]
    joined = pd.concat(made, ignore_index=True)
    return joined[["annotator", "label", *compared[0].labels]]


def kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa of a confusion matrix of counts or shares ``[N, N]``; NaN if undefined."""
    return float(_kappas(np.asarray(confusion, dtype=np.float64)[None])[0])


def compare(
    first: Sequence[Annotation],
    second: Sequence[Annotation],
    responses: Sequence[Response],
    *,
    rng: np.random.Generator,
    unit: str = "character",
    labels: Sequence[str] = BEHAVIOURS,
    resamples: int = 1000,
    level: float = 0.95,
) -> Agreement:
    """Agreement of two annotators on the chains of ``responses``, matched by position.

    Raises ``ValueError`` where the annotations are not of these responses. Chains that either
    failed on stay out of the comparison, as units without a label.
    """
    if unit not in UNITS:
        raise ValueError(f"no unit {unit!r}: choose one of {', '.join(UNITS)}")
    _check(first, second, responses)
    counts = np.zeros((len(responses), len(labels), len(labels)))
    units = 0
    for row, (one, two, response) in enumerate(zip(first, second, responses, strict=True)):
        a, b = (_units(x, response.thinking, unit, tuple(labels)) for x in (one, two))
        both = (a >= 0) & (b >= 0)
        np.add.at(counts[row], (a[both], b[both]), 1)
        units += len(a)

    draws = rng.integers(len(counts), size=(resamples, len(counts))) if len(counts) else []
    resampled = np.array([counts[draw].sum(axis=0) for draw in draws])
    resampled = resampled.reshape(-1, len(labels), len(labels))
    total = counts.sum(axis=0)
    shares = total / total.sum() if total.sum() else total
    edge = 100 * (1 - level) / 2
    low, high = _interval(_kappas(resampled), edge)
    by_first, by_second = shares.sum(axis=1), shares.sum(axis=0)
    return Agreement(
        first=first[0].annotator if first else "",
        second=second[0].annotator if second else "",
        unit=unit,
        chains=len(responses),
        units=units,
        compared=float(total.sum() / units) if units else 0.0,
        accuracy=float(np.trace(shares)) if total.sum() else float("nan"),
        kappa=kappa(total),
        kappa_low=low,
        kappa_high=high,
        labels=tuple(labels),
        confusion=shares,
        prevalence={
            name: (float(by_first[i]), float(by_second[i])) for i, name in enumerate(labels)
        },
        difference={
            name: (float(by_second[i] - by_first[i]), *_interval(_gaps(resampled, i), edge))
            for i, name in enumerate(labels)
        },
    )


def _check(first, second, responses) -> None:
    ids = [response.task_id for response in responses]
    for given in (first, second):
        if [one.task_id for one in given] != ids:
            who = given[0].annotator if given else "an annotator"
            raise ValueError(
                f"the {len(given)} annotations of {who} are not those of the "
                f"{len(ids)} responses: give the same chains in the same order"
            )


def unit_labels(annotation: Annotation, text: str, unit: str = "character") -> np.ndarray:
    """The label of every unit of a chain as an index into the behaviours, -1 for none."""
    return _units(annotation, text, unit, BEHAVIOURS)


def _units(annotation: Annotation, text: str, unit: str, labels: tuple[str, ...]) -> np.ndarray:
    marks = np.full(len(text), -1)
    for segment in annotation.segments:
        if segment.label in labels:
            marks[segment.start : segment.end] = labels.index(segment.label)
    solid = np.array([not c.isspace() for c in text], dtype=bool)
    if unit == "character":
        return marks[solid]
    return np.array(
        [_vote(marks[s:e][solid[s:e]]) for s, e in sentences.split(text)], dtype=int
    )


def _vote(marks: np.ndarray) -> int:
    """The label of most of a sentence's characters, -1 where less than half have one."""
    labelled = marks[marks >= 0]
    if 2 * len(labelled) < len(marks):
        return -1
    return int(np.bincount(labelled).argmax())


def _kappas(confusions: np.ndarray) -> np.ndarray:
    """Kappa of each of ``[..., N, N]`` matrices, NaN where it is undefined."""
    n = confusions.sum(axis=(1, 2))
    agreed = np.trace(confusions, axis1=1, axis2=2)
    by_chance = (confusions.sum(axis=1) * confusions.sum(axis=2)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed, expected = agreed / n, by_chance / n**2
        result = (observed - expected) / (1 - expected)
    return np.where(1 - expected > 1e-12, result, np.nan)


def _gaps(confusions: np.ndarray, i: int) -> np.ndarray:
    """Prevalence of label ``i`` by the second annotator minus that by the first."""
    n = confusions.sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (confusions[:, :, i].sum(axis=1) - confusions[:, i, :].sum(axis=1)) / n


def _interval(values: np.ndarray, edge: float) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [edge, 100 - edge])
    return float(low), float(high)
