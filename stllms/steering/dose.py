"""What a coefficient does and its side effects, from the rows of ``steering.csv``.

The dose-response of every direction, the coefficients that keep the text whole, and at those
the two comparisons that a claim needs: outside the interval of the baseline, and outside the
null interval, the range of control directions of the same length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from stllms.labels import PAPER, LabelSet
from stllms.steering import measures
from stllms.steering.measures import FRACTION, SHARE, SIDE_EFFECTS

#: How much worse than the baseline a side effect may get before a coefficient is not suggested.
LIMITS: dict[str, float] = {
    "accuracy": 0.15,
    "closed": 0.10,
    "loops": 0.15,
    "well-formed": 0.10,
}
#: Worse is lower for these, a change either way for the length, and higher for the rest, those
#: of a person among them.
_LOWER = ("accuracy", "closed", "compression", "labelled", "well-formed")


def side_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """Side effects (columns) under every condition (rows); control directions as the mean of a
    kind, over the tasks that they were measured on.
    """
    side = rows[rows["metric"].isin(_measured(rows))]
    kind = side["direction"].str.replace(r":\d+$", "", regex=True)
    wide = side.assign(direction=kind).pivot_table(
        index=["direction", "coefficient"], columns="metric", values="value", sort=False
    )
    return wide[[name for name in _measured(rows) if name in wide.columns]].reset_index()


def _measured(rows: pd.DataFrame) -> list[str]:
    """The side effects in ``rows``: those of :data:`SIDE_EFFECTS`, then a person's own."""
    there = [name for name in rows["metric"].unique() if name not in (FRACTION, SHARE)]
    return sorted(there, key=lambda name: [*SIDE_EFFECTS, name].index(name))


def table(rows: pd.DataFrame, *, labels: LabelSet = PAPER) -> pd.DataFrame:
    """Dose-response: own token fraction and side effects of every direction (column
    ``steered``) over its coefficients, the baseline at 0; with interval and null interval.
    """
    made = []
    for behaviour in labels.targets:
        fraction = (rows["metric"] == FRACTION) & (rows["behaviour"] == behaviour)
        found = rows[fraction | rows["metric"].isin(_measured(rows))].assign(steered=behaviour)
        mine = found["direction"].isin([behaviour, "none"])
        made.append(found[mine & (found["direction"] == behaviour).any()])
    columns = ["steered", "metric", "coefficient", "value", "ci_low", "ci_high", "n"]
    every = pd.concat(made)[[*columns, "null_low", "null_high", "null_n"]]
    return every.sort_values(["steered", "metric", "coefficient"], ignore_index=True)


def broken(
    rows: pd.DataFrame, limits: Mapping[str, float] = LIMITS, *, labels: LabelSet = PAPER
) -> dict[tuple[str, float], dict[str, tuple[float, float]]]:
    """The conditions whose side effects go beyond ``limits`` (:data:`LIMITS`), and by what.

    ``(direction, coefficient) -> {side effect: (baseline, steered)}``; control directions are
    not looked at. Raises ``ValueError`` for a limit on something that is no side effect, and
    for one below 0.
    """
    known = dict.fromkeys((*SIDE_EFFECTS, *_measured(rows)))
    for name, limit in limits.items():
        if name not in known:
            raise ValueError(f"no side effect {name!r}; there are: {', '.join(known)}")
        if not limit >= 0:
            raise ValueError(f"the limit of {name} is {limit}: say how much worse it may get")
    side = rows[rows["metric"].isin(limits)].set_index(["direction", "coefficient", "metric"])
    values = side["value"].to_dict()
    found: dict[tuple[str, float], dict[str, tuple[float, float]]] = {}
    for (direction, coefficient, metric), value in values.items():
        plain = values["none", 0.0, metric]
        change = value - plain
        worse = abs(change) if metric == "tokens" else (-change if metric in _LOWER else change)
        if direction in labels.targets and worse > limits[metric]:
            found.setdefault((direction, coefficient), {})[metric] = (plain, value)
    return found


def warning(
    rows: pd.DataFrame, limits: Mapping[str, float] = LIMITS, *, labels: LabelSet = PAPER
) -> str:
    """One line for every coefficient that breaks the text, always with the loop score."""
    measured = rows[rows["metric"] == "loops"]  # a control has a row for each of its layers
    loops = measured.set_index(["direction", "coefficient"])["value"].to_dict()
    lines = []
    for (direction, coefficient), beyond in broken(rows, limits, labels=labels).items():
        beyond = {"loops": (loops["none", 0.0], loops[direction, coefficient])} | beyond
        parts = [f"{name} {b:.2f} (plain {a:.2f})" for name, (a, b) in beyond.items()]
        lines.append(f"{direction} {coefficient:+g} breaks the text: {', '.join(parts)}")
    return "\n".join(lines) or "no coefficient breaks the text"


def suggested(
    rows: pd.DataFrame,
    behaviour: str,
    sign: int,
    limits: Mapping[str, float] = LIMITS,
    *,
    labels: LabelSet = PAPER,
) -> float | None:
    """The largest coefficient of a sign up to which no side effect goes beyond ``limits``.

    ``None`` if the smallest one does already, or if there is none of this sign. A side effect
    that was not measured (NaN) is within.
    """
    own = rows.loc[rows["direction"] == behaviour, "coefficient"].unique()
    tried = sorted((float(c) for c in own if np.sign(c) == sign), key=abs)
    bad = broken(rows, limits, labels=labels)
    whole = list(itertools.takewhile(lambda c: (behaviour, c) not in bad, tried))
    return whole[-1] if whole else None


def summary(
    rows: pd.DataFrame, limits: Mapping[str, float] = LIMITS, *, labels: LabelSet = PAPER
) -> pd.DataFrame:
    """Every direction at its suggested coefficients, one row a sign.

    ``outside plain``: the own token fraction is beyond the interval of the baseline on the side
    of the sign; ``outside controls``: beyond the most extreme of the control directions at the
    same coefficient (empty without any). Where no coefficient is within the limits, the row
    has no numbers.
    """
    own = rows[rows["metric"] == FRACTION].set_index(["behaviour", "direction", "coefficient"])
    side = rows.set_index(["metric", "direction", "coefficient"])["value"]
    made = []
    steered = [b for b in labels.targets if (b, b) in own.index.droplevel(2)]
    for behaviour, sign in itertools.product(steered, (1, -1)):
        plain = own.loc[behaviour, "none", 0.0]
        at = suggested(rows, behaviour, sign, limits, labels=labels)
        row = {"behaviour": behaviour, "sign": "+-"[sign < 0], "coefficient": at}
        row |= {"plain": plain["value"], "plain_low": plain["ci_low"]}
        row |= {"plain_high": plain["ci_high"]}
        if at is not None:
            found = own.loc[behaviour, behaviour, at]
            end = "high" if sign > 0 else "low"
            row |= found[["value", "null_low", "null_high"]].to_dict()
            row["outside plain"] = _outside(sign * (found["value"] - plain[f"ci_{end}"]))
            row["outside controls"] = _outside(sign * (found["value"] - found[f"null_{end}"]))
            for name in ("well-formed", "accuracy"):
                row[name] = side.get((name, behaviour, at), np.nan)
        made.append(row)
    columns = ["behaviour", "sign", "coefficient", "plain", "plain_low", "plain_high", "value"]
    columns += ["null_low", "null_high", "outside plain", "outside controls"]
    return pd.DataFrame(made, columns=[*columns, "well-formed", "accuracy"])


def _outside(beyond: float) -> str:
    return "" if np.isnan(beyond) else "yes" if beyond > 0 else "no"


def sweep(measured: pd.DataFrame) -> pd.DataFrame:
    """Own token fraction of every direction by layer and coefficient, with the baseline and the
    null interval, from the measurements of a sweep over layers (no rows without any).
    """
    columns = ["behaviour", "layer", "coefficient", "value", "ci_low", "ci_high", "n", "plain"]
    columns += ["null_low", "null_high", "null_n"]
    if measured.empty:
        return pd.DataFrame(columns=columns)
    rows = measures.table(measured)
    own = rows[rows["metric"] == FRACTION]
    plain = own[own["direction"] == "none"].set_index("behaviour")["value"]
    mine = own[own["behaviour"] == own["direction"]]
    found = mine.assign(plain=mine["behaviour"].map(plain))[columns]
    return found.sort_values(["behaviour", "coefficient", "layer"], ignore_index=True)
