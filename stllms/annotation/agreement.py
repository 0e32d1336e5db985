"""Agreement of two annotators over the same responses: how far to trust either of them.

Cohen's kappa ``(p_o - p_e) / (1 - p_e)``, ``p_o`` the observed share of agreement and
``p_e = sum_b p_first(b) p_second(b)`` the one that two unrelated annotators with these
prevalences would reach (Cohen, 1960). The unit is the **character** that is not white space:
annotators cut a text at different places, and the metrics that follow are shares of text.
Characters that only one of the two has labelled are left out of kappa and counted in
``compared``. Neighbouring characters are not independent: intervals resample whole chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stllms.annotation import placing
from stllms.labels import BEHAVIOURS
from stllms.records import Annotation, Response

if TYPE_CHECKING:
    import pandas as pd

#: Resamples of the chains, and the percentiles that are the ends of an interval.
RESAMPLES, ENDS = 1000, (2.5, 97.5)


@dataclass(frozen=True)
class Agreement:
    """How two annotators agree.

    ``confusion [N, N]`` holds shares of the compared characters, rows the first annotator,
    columns the second. ``difference`` maps a label to its share by the second minus that by the
    first, with its interval ``(value, low, high)``. ``compared`` is the share of the
    ``characters`` that both have labelled. ``kappa`` and its interval are NaN where undefined:
    nothing compared, or both always gave the same one label.
    """

    first: str
    second: str
    characters: int
    compared: float
    accuracy: float
    kappa: float
    kappa_low: float
    kappa_high: float
    labels: tuple[str, ...]
    confusion: np.ndarray
    difference: dict[str, tuple[float, float, float]]


def annotators(name: str, *, embedded: bool) -> tuple[str, ...]:
    """Whose labels to compare on a run, the one that the others are measured against first.

    On an embedded model that is the truth, ``grammar``, and the others are ``offline``,
    ``lexical`` and the run's own annotator ``name``. Elsewhere nobody knows the truth: it is
    the run's annotator, compared with ``lexical`` (``offline`` where the run's is ``lexical``).
    """
    if embedded:
        return tuple(dict.fromkeys(("grammar", "offline", "lexical", name)))
    return (name, "offline" if name == "lexical" else "lexical")


def compare(
    first: Sequence[Annotation],
    second: Sequence[Annotation],
    responses: Sequence[Response],
    *,
    rng: np.random.Generator,
    labels: Sequence[str] = BEHAVIOURS,
) -> Agreement:
    """Agreement of two annotators on the chains of ``responses``, matched by position.

    Raises ``ValueError`` where the annotations are not of these responses. Chains that either
    failed on stay out of the comparison, as text without a label.
    """
    _check(first, second, responses)
    counts = np.zeros((len(responses), len(labels), len(labels)))
    characters = 0
    for row, (one, two, response) in enumerate(zip(first, second, responses, strict=True)):
        solid = placing.solid(response.thinking)
        a, b = (label_indices(x, len(solid), labels)[solid] for x in (one, two))
        both = (a >= 0) & (b >= 0)
        np.add.at(counts[row], (a[both], b[both]), 1)
        characters += len(a)

    total = counts.sum(axis=0)
    n = total.sum()
    shares = total / n if n else total
    draws = rng.integers(max(1, len(counts)), size=(RESAMPLES, len(counts)))
    drawn = np.array([counts[draw].sum(axis=0) for draw in draws])
    gaps, drawn_gaps = shares.sum(axis=0) - shares.sum(axis=1), _gaps(drawn)
    low, high = _interval(_kappas(drawn))
    return Agreement(
        first=first[0].annotator if first else "",
        second=second[0].annotator if second else "",
        characters=characters,
        compared=float(n / characters) if characters else 0.0,
        accuracy=float(np.trace(shares)) if n else float("nan"),
        kappa=kappa(total),
        kappa_low=low,
        kappa_high=high,
        labels=tuple(labels),
        confusion=shares,
        difference={
            name: (float(gaps[i]), *_interval(drawn_gaps[:, i]))
            for i, name in enumerate(labels)
        },
    )


def report(compared: Sequence[Agreement]) -> pd.DataFrame:
    """Rows of ``annotator, quantity, value, low, high``; the last two missing where there is
    no interval.

    Quantities: ``kappa``, ``accuracy``, ``compared``, and ``<label>, difference``: its share of
    the text by this annotator minus that by the first (prevalence difference).
    """
    import pandas as pd

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
    """Rows of ``annotator``, ``label`` by the first, and one column per label: how often this
    annotator gave it there. Rows add up to 1, or are NaN for a label the first never gave."""
    import pandas as pd

    made = []
    for found in compared:
        with np.errstate(invalid="ignore"):
            rows = found.confusion / found.confusion.sum(axis=1, keepdims=True)
        labels = list(found.labels)
        made.append(
            pd.DataFrame(rows, columns=labels).assign(annotator=found.second, label=labels)
        )
    joined = pd.concat(made, ignore_index=True)
    return joined[["annotator", "label", *compared[0].labels]]


def kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa of a confusion matrix of counts or shares ``[N, N]``; NaN if undefined."""
    return float(_kappas(np.asarray(confusion, dtype=np.float64)[None])[0])


def label_indices(
    annotation: Annotation, length: int, labels: Sequence[str] = BEHAVIOURS
) -> np.ndarray:
    """The label of each of the ``length`` characters of a chain: an index into ``labels``, -1
    for none."""
    marks = np.full(length, -1)
    for segment in annotation.segments:
        if segment.label in labels:
            marks[segment.start : segment.end] = labels.index(segment.label)
    return marks


def _check(
    first: Sequence[Annotation], second: Sequence[Annotation], responses: Sequence[Response]
) -> None:
    ids = [response.task_id for response in responses]
    for given in (first, second):
        if [one.task_id for one in given] != ids:
            who = given[0].annotator if given else "an annotator"
            raise ValueError(
                f"the {len(given)} annotations of {who} are not those of the "
                f"{len(ids)} responses: give the same chains in the same order"
            )


def _kappas(confusions: np.ndarray) -> np.ndarray:
    """Kappa of each of ``[R, N, N]`` matrices, NaN where it is undefined.

    All resamples at once, which scikit-learn's ``cohen_kappa_score`` (the same numbers) is not.
    """
    n = confusions.sum(axis=(1, 2))
    agreed = np.trace(confusions, axis1=1, axis2=2)
    by_chance = (confusions.sum(axis=1) * confusions.sum(axis=2)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed, expected = agreed / n, by_chance / n**2
        result = (observed - expected) / (1 - expected)
    return np.where(1 - expected > 1e-12, result, np.nan)


def _gaps(confusions: np.ndarray) -> np.ndarray:
    """Prevalences ``[R, N]`` by the second annotator minus those by the first; NaN for none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        n = confusions.sum(axis=(1, 2))[:, None]
        return (confusions.sum(axis=1) - confusions.sum(axis=2)) / n


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, ENDS)
    return float(low), float(high)
