"""Tables of a results folder -> rows of the ledger: our number, its interval, the verdict.

Each row begins as a claim of :mod:`stllms.claims`; the docstrings say what counts as shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd

from stllms import claims, evaluation
from stllms.claims import Made, Row
from stllms.config import MODELS
from stllms.records import HEATMAP, STEERED

#: A difference is significant below this, after Holm's correction.
LEVEL = 0.05
#: Two directions with a larger cosine are not called distinct (the paper's largest is .64).
SAME = 0.9
#: The groups of the comparison, and the columns of a number with its interval.
KINDS = ("thinking", "instruct")
VALUES = ["value", "low", "high"]


def _verdict(
    shown: int,
    tests: int,
    slug: str,
    made: Made,
    paper: Collection[str] = claims.STEERING,
) -> str:
    """How much of a claim was shown, and on what; ``paper`` are the models it is about."""
    degree = "shown in part" if 0 < shown < tests else "shown" if shown else "not shown"
    if slug in MODELS and MODELS[slug].source == "embedded":
        return f"{degree} on a fixture, no evidence about the paper"
    if slug not in paper:
        return f"{degree} on another model"
    if made.as_paper:
        return f"{degree} on the paper's model"
    profile = made.profile or "an unknown profile"
    return f"{degree} on {claims.display(slug)} with {profile}, not the paper's run"


def _released(equal: bool) -> str:
    return claims.REPRODUCED if equal else claims.DIFFERS


def _number(value: float, low: float, high: float, *, scale: float = 100) -> str:
    """``4.4 (3.5-5.4)``, in per cent; ``n/a`` for a missing one."""
    if np.isnan(value):
        return "n/a"
    return f"{scale * value:.1f} ({scale * low:.1f}–{scale * high:.1f})"


# -- comparison ----------------------------------------------------------------------------


def released_comparison(groups: pd.DataFrame, treatment: str, note: str) -> Iterator[Row]:
    """Fractions and segments a response of the released files, from their group averages.

    The paper's averages are over all ten models: with fewer files nothing is reproduced, and
    files of different questions are not averaged with each other.
    """
    apart = groups.groupby("kind")["tasks"].nunique()
    if (apart > 1).any():
        on = "released files of different questions: " + "; ".join(
            f"{row.kind} {row.tasks}, {row.models} models"
            for row in groups.drop_duplicates(["kind", "tasks"]).itertuples()
        )
        yield claims.compared(on, claims.PART, treatment=treatment, note=note)
        return
    cells = groups.set_index(["kind", "metric", "behaviour"]).sort_index()
    models = [int(cells.loc[kind, "models"].iloc[0]) for kind in KINDS]
    on = "released files, {} thinking and {} instruct models of {} each".format(
        *models, claims.GROUP
    )
    whole = models == [claims.GROUP, claims.GROUP]
    paper = [claims.COMPARISON[treatment][kind] for kind in KINDS]
    ours, signs, equal = {}, 0, True
    for place, behaviour in enumerate(claims.ORDER):
        found = [cells.loc[(kind, "segment fraction", behaviour)] for kind in KINDS]
        mine, theirs = [100 * one["value"] for one in found], [one[0][place] for one in paper]
        signs += np.sign(mine[0] - mine[1]) == np.sign(theirs[0] - theirs[1])
        equal &= [round(value) for value in mine] == theirs
        ours[behaviour] = " and ".join(_number(*one[VALUES]) for one in found)
    fractions = claims.compared(
        on,
        _released(equal) if whole else claims.PART,
        treatment=treatment,
        ours=claims.listed(ours),
        note=f"{note}; {signs} of {len(claims.ORDER)} differences have the paper's sign",
    )
    yield fractions
    found = [cells.loc[(kind, "segment count", "all")] for kind in KINDS]
    theirs = [one[1] for one in paper]
    equal = [round(one["value"], 1) for one in found] == theirs
    yield replace(
        fractions,
        where=fractions.where.replace("per cent of the segments", "segments a response"),
        published=" and ".join(str(value) for value in theirs),
        verdict=_released(equal) if whole else claims.PART,
        ours=" and ".join(_number(*one[VALUES], scale=1) for one in found),
        note="",
    )


def slug_of(name: str) -> str:
    """The run folder of a display name, the name itself for a model of a person's own."""
    return next((slug for slug, entry in MODELS.items() if entry.display == name), name)


def run_comparison(
    rows: pd.DataFrame, pair: pd.DataFrame, thinking: str, instruct: str, made: Made
) -> Row:
    """A pair of a run. Shown: all six differences have the paper's sign, Holm p below .05."""
    cells = rows.set_index(["model", "behaviour"])[VALUES]
    ours = {
        b: " and ".join(_number(*cells.loc[(model, b)]) for model in (thinking, instruct))
        for b in claims.ORDER
    }
    tests = pair.set_index("behaviour")
    thinks, instructs = (claims.COMPARISON["published"][kind][0] for kind in KINDS)
    signs = dict(zip(claims.ORDER, np.sign(np.subtract(thinks, instructs)), strict=True))
    shown = [
        b
        for b in claims.ORDER
        if np.sign(tests.loc[b, "difference"]) == signs[b] and tests.loc[b, "p_holm"] < LEVEL
    ]
    tasks = int(tests["n"].max())
    return claims.compared(
        made.after(f"{thinking} and {instruct}, {tasks} tasks"),
        _verdict(len(shown), len(claims.ORDER), slug_of(thinking), made, claims.COMPARED),
        treatment="apart",
        pair=f"{thinking} and {instruct}",
        ours=claims.listed(ours),
        note="the paper's sign with Holm p < .05: " + (", ".join(shown) or "none"),
    )


# -- steering ------------------------------------------------------------------------------


def run_steering(slug: str, table: pd.DataFrame, made: Made) -> Row:
    """A steered model. Shown: all eight changes go the claimed way, with Holm p below .05 and
    further than any control direction of the same length takes the behaviour."""
    bars = evaluation.bars(table).set_index(["behaviour", "mode"])
    ours, shown, inside, tests = {}, [], [], 0
    own = table[
        (table["metric"] == "token fraction") & (table["behaviour"] == table["direction"])
    ]
    p_holm = own.set_index(["behaviour", "coefficient"])["p_holm"]
    for b in STEERED:
        cells = [bars.loc[(b, mode)] for mode in evaluation.MODES]
        ours[b] = " / ".join(_number(c["value"], c["low"], c["high"]) for c in cells)
        for cell, sign in zip(cells[1:], (1, -1), strict=True):
            tests += 1
            change = sign * (cell["value"] - cells[0]["value"])
            if change > 0 and p_holm.get((b, float(sign)), np.nan) < LEVEL:
                name = f"{b} {'+' if sign > 0 else '-'}"
                (inside if _as_a_control(cell, sign) else shown).append(name)
    tasks = int(np.nanmax(bars["n"].to_numpy(float), initial=0))
    controls = own["null_low"].notna().any()
    where = " and outside the range of control directions" if controls else ""
    note = f"changes the claimed way with Holm p < .05{where}: {', '.join(shown) or 'none'}"
    if inside:
        note += f"; with Holm p < .05 but inside that range: {', '.join(inside)}"
    return claims.steered(
        slug,
        made.after(f"{claims.display(slug)}, {tasks} tasks"),
        _verdict(len(shown), tests, slug, made),
        ours=claims.listed(ours),
        note=note if controls else f"{note}; no control directions to compare with",
    )


def _as_a_control(cell: pd.Series, sign: int) -> bool:
    """Whether a control direction takes the behaviour as far; never without any."""
    if sign > 0:
        return bool(cell["value"] <= cell["null_high"])
    return bool(cell["value"] >= cell["null_low"])


# -- layer effects -------------------------------------------------------------------------


def _layers(peaks: pd.DataFrame, name: str) -> dict[str, str]:
    """``18 (9-19)`` a behaviour."""
    rows = peaks.set_index("behaviour")
    return {
        b: f"{int(row[name])} ({int(row[name + '_low'])}–{int(row[name + '_high'])})"
        for b, row in rows.iterrows()
    }


def _outside(peaks: pd.DataFrame) -> list[str]:
    """Behaviours whose peak is not in the middle half of the layers."""
    place = peaks["peak"] / (peaks["layers"] - 1).clip(lower=1)
    return peaks.loc[(place < 0.25) | (place > 0.75), "behaviour"].tolist()


def _middle(peaks: pd.DataFrame) -> str:
    names = ", ".join(_outside(peaks))
    return f"outside the middle half of the layers: {names or 'none'}"


def released_effects(slug: str, peaks: pd.DataFrame) -> Iterator[Row]:
    """Peaks of the released values, and ranks of the steering layer where METHOD has them.

    A file without some of the behaviours reproduces a part at most.
    """
    on = f"released file, {int(peaks['n'].min())} responses"
    found = peaks.set_index("behaviour").reindex(
        [b for b in STEERED if b in {*peaks["behaviour"]}]
    )
    places, whole = [STEERED.index(b) for b in found.index], len(found) == len(STEERED)

    def verdict(**numbers: Sequence[int]) -> str:
        equal = all(
            found[name].tolist() == [theirs[place] for place in places]
            for name, theirs in numbers.items()
        )
        return claims.PART if equal and not whole else _released(equal)

    first = claims.peaked(
        slug,
        on,
        verdict(peak=claims.PEAKS[slug]),
        ours=claims.listed(_layers(peaks, "peak")),
        note=_middle(peaks),
    )
    yield first
    if slug not in claims.LATE:
        return
    ranks, late = claims.LATE[slug]
    mine = {
        b: f"{_layers(peaks, 'rank')[b]}, {_layers(peaks, 'late_peak')[b]}" for b in found.index
    }
    theirs = {b: f"{r}, {p}" for b, r, p in zip(STEERED, ranks, late, strict=True)}
    yield replace(
        first,
        where=f"{first.where.partition(';')[0]}; rank of the steering layer, and the peak "
        "without layers 0-4",
        published=claims.listed(theirs),
        verdict=verdict(rank=ranks, late_peak=late),
        ours=claims.listed(mine),
        note="",
    )


def run_effects(slug: str, measured: Mapping[str, pd.DataFrame], made: Made) -> Row:
    """Peaks of a run, the published objective where there is one. Shown: in the middle half."""
    name = next(iter(measured))
    peaks = measured[name]
    note = _middle(peaks)
    if name != "kl/own" and "kl/own" in measured:
        exact = [f"{b} {text}" for b, text in _layers(measured["kl/own"], "peak").items()]
        note += f"; exact effects at own spans: {', '.join(exact)}"
    return claims.peaked(
        slug,
        made.after(
            f"{claims.display(slug)}, {name}, {peaks['n'].max()} responses, "
            f"{peaks['layers'].max()} layers"
        ),
        _verdict(len(peaks) - len(_outside(peaks)), len(peaks), slug, made),
        run=True,
        ours=claims.listed(_layers(peaks, "peak")),
        note=note,
    )


# -- directions ----------------------------------------------------------------------------


def _upper(matrix: pd.DataFrame) -> tuple[np.ndarray, int]:
    names = [name for name in HEATMAP if name in matrix.index]
    square = matrix.loc[names, names].to_numpy(float)
    return square[np.triu_indices(len(names), 1)], len(names)


def released_heatmap(matrix: pd.DataFrame) -> Row:
    """The cosines of the released vectors, to two decimals; a part where labels are absent."""
    cosines, n = _upper(matrix)
    theirs = [
        value
        for pair, value in zip(combinations(HEATMAP, 2), claims.TRIANGLE, strict=True)
        if {*pair} <= {*matrix.index}
    ]
    equal = np.round(cosines, 2).tolist() == theirs
    absent = [name for name in HEATMAP if name not in matrix.index]
    without = f"; without {', '.join(absent)}" if absent else ""
    return claims.distinct(
        "released file",
        claims.PART if equal and absent else _released(equal),
        ours=claims.triangle(cosines, n),
        note=f"no interval: the file holds means only{without}",
    )


def run_heatmap(slug: str, matrix: pd.DataFrame, made: Made) -> Row:
    """Cosines of a run. Shown: every pair of directions is below :data:`SAME`."""
    cosines, n = _upper(matrix)
    below = int((cosines < SAME).sum())
    return claims.distinct(
        made.after(f"{claims.display(slug)}, {n} directions"),
        _verdict(below, len(cosines), slug, made),
        run=slug,
        ours=claims.triangle(cosines, n),
        note=f"{below} of {len(cosines)} cosines below {SAME}",
    )


def run_embedding(slug: str, table: pd.DataFrame, made: Made) -> Row:
    """Similarity of a run. Shown: larger at the first layer than at the last, for all."""
    first, last = table.iloc[:, 0].to_numpy(float), table.iloc[:, -1].to_numpy(float)
    ours = {b: f"{f:.2f} and {s:.2f}" for b, f, s in zip(table.index, first, last, strict=True)}
    falls = int((first > last).sum())
    return claims.early(
        made.after(f"{claims.display(slug)}, {table.shape[1]} layers"),
        _verdict(falls, len(table), slug, made),
        run=slug,
        ours=claims.listed(ours),
        note=f"larger at the first layer for {falls} of {len(table)}",
    )
