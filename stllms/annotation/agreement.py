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

#: Resamples of the chains, and the percentiles at which an interval ends.
RESAMPLES, ENDS = 1000, (2.5, 97.5)


@dataclass(frozen=True)
class Agreement:
    """How ``annotator`` agrees with the one that it is measured against.

    ``confusion [N, N]`` holds shares of the compared characters, rows the other's labels,
    columns this annotator's. ``quantities`` maps to ``(value, low, high)``, the last two NaN
    where there is no interval: ``kappa``; ``accuracy``; ``compared``, the share of the
    characters that both have labelled; and ``<label>, difference``, the label's share of the
    text by this annotator minus that by the other. ``kappa`` is NaN where it is undefined:
    nothing compared, or both always gave the same one label.
    """

    annotator: str
    confusion: np.ndarray
    quantities: dict[str, tuple[float, float, float]]


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
) -> Agreement:
    """How ``second`` agrees with ``first`` on the chains of ``responses``, by position.

    Raises ``ValueError`` where the annotations are not of these responses. Chains that either
    failed on stay out of the comparison, as text without a label.
    """
    ids = [response.task_id for response in responses]
    for given in (first, second):
        if [one.task_id for one in given] != ids:
            raise ValueError(
                f"{len(given)} annotations are not those of the {len(ids)} responses: "
                "give the same chains in the same order"
            )
    n_labels = len(BEHAVIOURS)
    counts, characters = np.zeros((len(ids), n_labels, n_labels)), 0
    for row, (one, two, response) in enumerate(zip(first, second, responses, strict=True)):
        solid = placing.solid(response.thinking)
        a, b = (label_indices(x, len(solid))[solid] for x in (one, two))
        both = (a >= 0) & (b >= 0)
        np.add.at(counts[row], (a[both], b[both]), 1)
        characters += len(a)

    draws = rng.integers(max(1, len(counts)), size=(RESAMPLES, len(counts)))
    drawn = np.array([counts[draw].sum(axis=0) for draw in draws])
    total, nan = counts.sum(axis=0), float("nan")
    n = total.sum()
    shares = total / n if n else total
    quantities = {
        "kappa": (kappa(total), *_interval(_kappas(drawn))),
        "accuracy": (float(np.trace(shares)) if n else nan, nan, nan),
        "compared": (float(n / characters) if characters else 0.0, nan, nan),
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        by_second, by_first = drawn.sum(axis=1), drawn.sum(axis=2)
        drawn_gaps = (by_second - by_first) / drawn.sum(axis=(1, 2))[:, None]
    gaps = shares.sum(axis=0) - shares.sum(axis=1)
    for name, gap, resampled in zip(BEHAVIOURS, gaps, drawn_gaps.T, strict=True):
        quantities[f"{name}, difference"] = (float(gap), *_interval(resampled))
    return Agreement(second[0].annotator if second else "", shares, quantities)


def report(compared: Sequence[Agreement]) -> pd.DataFrame:
    """Rows of ``annotator, quantity, value, low, high``: see :class:`Agreement`."""
    import pandas as pd

    rows = [
        (one.annotator, quantity, *numbers)
        for one in compared
        for quantity, numbers in one.quantities.items()
    ]
    return pd.DataFrame(rows, columns=["annotator", "quantity", "value", "low", "high"])


def confusions(compared: Sequence[Agreement]) -> pd.DataFrame:
    """Rows of ``annotator``, ``label`` by the first, and one column per label: how often this
    annotator gave it there. Rows add up to 1, or are NaN for a label the first never gave.
    """
    import pandas as pd

    tables = {
        one.annotator: pd.DataFrame(one.confusion, BEHAVIOURS, BEHAVIOURS) for one in compared
    }
    joined = pd.concat(tables, names=["annotator", "label"])
    return joined.div(joined.sum(axis=1), axis=0).reset_index()


def kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa of a confusion matrix of counts or shares ``[N, N]``; NaN if undefined."""
    return float(_kappas(np.asarray(confusion, dtype=np.float64)[None])[0])


def label_indices(annotation: Annotation, length: int) -> np.ndarray:
    """The label of each of the ``length`` characters of a chain: an index into
    :data:`~stllms.labels.BEHAVIOURS`, -1 for none.
    """
    marks = np.full(length, -1)
    for segment in annotation.segments:
        if segment.label in BEHAVIOURS:
            marks[segment.start : segment.end] = BEHAVIOURS.index(segment.label)
    return marks


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


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, ENDS) if len(values) else (np.nan, np.nan)
    return float(low), float(high)
