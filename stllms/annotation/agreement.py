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
from stllms.hashes import digest
from stllms.labels import PAPER, LabelSet
from stllms.records import Annotation, Response

if TYPE_CHECKING:
    import pandas as pd

    from stllms.annotation.annotators import Annotator

#: Resamples of the chains, and the percentiles at which an interval ends.
RESAMPLES, ENDS = 1000, (2.5, 97.5)
#: A judge is asked twice about one chain in so many, but about this many at least.
ONE_IN, LEAST = 20, 3


@dataclass(frozen=True)
class Agreement:
    """How ``annotator`` agrees with the one that it is measured against.

    ``confusion [N, N]`` holds shares of the compared characters, rows the other's labels,
    columns this annotator's. ``quantities`` maps to ``(value, low, high)``, the last two NaN
    where there is no interval: ``kappa``; ``accuracy``; ``compared``, the share of the
    characters that both have labelled; ``<label>, difference``, the label's share of the
    text by this annotator minus that by the other; and ``<label>, kappa``, that of this label
    against all others. ``kappa`` is NaN where it is undefined: nothing compared, or both always
    gave the same one label. A label that neither has given is NaN throughout.
    """

    annotator: str
    confusion: np.ndarray
    quantities: dict[str, tuple[float, float, float]]


def annotators(name: str, *, embedded: bool, labels: LabelSet = PAPER) -> tuple[str, ...]:
    """Whose labels to compare on a run, the one that the others are measured against first.

    On an embedded model that is the truth, ``grammar``, and the others are ``offline``,
    ``lexical`` and the run's own annotator ``name``. Elsewhere nobody knows the truth: it is
    the run's annotator, compared with ``lexical`` (``offline`` where the run's is ``lexical``).
    Of other labels than the paper's it is always the run's, compared with ``lexical`` where the
    labels have cues; else there is nobody to compare it with.
    """
    if set(labels.names) != set(PAPER.names):
        cues = any(one.cues for one in labels.labels)
        return tuple(dict.fromkeys((name, "lexical"))) if cues else (name,)
    if embedded:
        return tuple(dict.fromkeys(("grammar", "offline", "lexical", name)))
    return (name, "offline" if name == "lexical" else "lexical")


def compare(
    first: Sequence[Annotation],
    second: Sequence[Annotation],
    responses: Sequence[Response],
    *,
    rng: np.random.Generator,
    labels: LabelSet = PAPER,
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
    counts = _counts(first, second, responses, labels)
    characters = sum(int(placing.solid(one.thinking).sum()) for one in responses)
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
    given = total.sum(axis=0) + total.sum(axis=1) > 0
    for i, name in enumerate(labels.names):
        known = (float(gaps[i]), *_interval(drawn_gaps[:, i])) if given[i] else (nan, nan, nan)
        quantities[f"{name}, difference"] = known
    for i, name in enumerate(labels.names):
        quantities[f"{name}, kappa"] = (
            kappa(one_against_all(total, i)),
            *_interval(_kappas(one_against_all(drawn, i))),
        )
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


def confusions(compared: Sequence[Agreement], *, labels: LabelSet = PAPER) -> pd.DataFrame:
    """Rows of ``annotator``, ``label`` by the first, and one column per label: how often this
    annotator gave it there. Rows add up to 1, or are NaN for a label the first never gave; no
    rows where nothing was compared.
    """
    import pandas as pd

    names = labels.names
    if not compared:
        return pd.DataFrame(columns=["annotator", "label", *names])
    tables = {one.annotator: pd.DataFrame(one.confusion, names, names) for one in compared}
    joined = pd.concat(tables, names=["annotator", "label"])
    return joined.div(joined.sum(axis=1), axis=0).reset_index()


# --- label noise: a judge that is asked twice --------------------------------------------


def twice(responses: Sequence[Response]) -> list[Response]:
    """The chains that a judge is asked about a second time: :func:`n_twice` of those with text,
    drawn by a hash of their task ids, so that the same chains are drawn again when there are
    more; in their order.
    """
    able = [one for one in responses if one.thinking.strip()]
    drawn = sorted(able, key=lambda one: digest(["asked twice", one.task_id]))
    ids = {one.task_id for one in drawn[: n_twice(len(able))]}
    return [one for one in able if one.task_id in ids]


def n_twice(n: int) -> int:
    """How many of ``n`` chains a judge is asked about twice."""
    return min(n, max(LEAST, round(n / ONE_IN)))


def repeated(
    annotator: Annotator,
    responses: Sequence[Response],
    annotations: Sequence[Annotation],
    *,
    labels: LabelSet = PAPER,
) -> pd.DataFrame:
    """Label noise: how a judge agrees with itself when it is asked about :func:`twice` again.

    ``annotations`` are its first ones, of the same responses. Rows ``label, kappa, low, high,
    n, characters``: all labels together (``all``), then each against all others. ``n`` are the
    chains that got the label at least once, ``characters`` how many did either time. Kappa is
    NaN for a label that never occurred. Judges are asked at temperature 0: what is seen here is
    the least that their labels vary.

    The frame is empty for an annotator that cannot answer otherwise, and for stored replies
    among which there is no second one.
    """
    import pandas as pd

    columns = ["label", "kappa", "low", "high", "n", "characters"]
    again = getattr(annotator, "again", None)
    first = {one.task_id: one for one in annotations if one.failed is None}
    asked = [one for one in twice(responses) if one.task_id in first] if again else []
    second = again(asked) if again else []
    pairs = [
        (one, made) for one, made in zip(asked, second, strict=True) if made.failed is None
    ]
    if not pairs:
        return pd.DataFrame(columns=columns)
    chains, made = zip(*pairs, strict=True)
    before = [first[one.task_id] for one in chains]
    found = compare(before, made, chains, rng=np.random.default_rng(0), labels=labels)
    counts = _counts(before, made, chains, labels)
    sizes = {"all": counts.sum(axis=(1, 2))}
    for i, name in enumerate(labels.names):
        sizes[name] = counts[:, i].sum(axis=1) + counts[:, :, i].sum(axis=1) - counts[:, i, i]
    rows = []
    for name, size in sizes.items():
        numbers = found.quantities["kappa" if name == "all" else f"{name}, kappa"]
        rows.append([name, *numbers, int((size > 0).sum()), int(size.sum())])
    return pd.DataFrame(rows, columns=columns)


def kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa of a confusion matrix of counts or shares ``[N, N]``; NaN if undefined."""
    return float(_kappas(np.asarray(confusion, dtype=np.float64)[None])[0])


def label_indices(annotation: Annotation, length: int, labels: LabelSet = PAPER) -> np.ndarray:
    """The label of each of the ``length`` characters of a chain: an index into the names of the
    set, -1 for none.
    """
    marks = np.full(length, -1)
    for segment in annotation.segments:
        if segment.label in labels.names:
            marks[segment.start : segment.end] = labels.names.index(segment.label)
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


def _counts(
    first: Sequence[Annotation],
    second: Sequence[Annotation],
    responses: Sequence[Response],
    labels: LabelSet,
) -> np.ndarray:
    """Characters of every chain by both labels ``[R, N, N]``, rows the first annotation's."""
    counts = np.zeros((len(responses), len(labels.names), len(labels.names)))
    for row, (one, two, response) in enumerate(zip(first, second, responses, strict=True)):
        solid = placing.solid(response.thinking)
        a, b = (label_indices(x, len(solid), labels)[solid] for x in (one, two))
        both = (a >= 0) & (b >= 0)
        np.add.at(counts[row], (a[both], b[both]), 1)
    return counts


def one_against_all(confusions: np.ndarray, i: int) -> np.ndarray:
    """``[..., N, N]`` -> ``[..., 2, 2]``: label ``i``, and all others as one."""
    both, first, second = (
        confusions[..., i, i],
        confusions[..., i, :].sum(axis=-1),
        confusions[..., :, i].sum(axis=-1),
    )
    neither = confusions.sum(axis=(-2, -1)) - first - second + both
    rows = [[both, first - both], [second - both, neither]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, ENDS) if len(values) else (np.nan, np.nan)
    return float(low), float(high)
