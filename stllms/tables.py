"""Tensors and records -> data frames, for the eyes of a reader, for CSV and for figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from stllms.vectors import Stability

#: Columns of tables that hold p-values.
P_VALUES = ("p", "p_holm")


def by_name(values: Tensor, behaviours: Sequence[str]) -> dict[str, np.ndarray]:
    """``[N, L]`` as one array a behaviour."""
    return {name: values[row].cpu().numpy() for row, name in enumerate(behaviours)}


def layers(curves: Mapping[str, np.ndarray], **constant: str) -> pd.DataFrame:
    """One row a behaviour, one column a layer; ``constant`` columns come first."""
    made = pd.DataFrame(curves).T.rename_axis("behaviour").reset_index()
    for name, value in reversed(constant.items()):
        made.insert(0, name, value)
    return made.rename(columns={c: f"layer {c}" for c in made.columns if isinstance(c, int)})


def growth(stability: Stability, layer: int) -> pd.DataFrame:
    """Cosine between directions of disjoint halves at ``layer``, by the number of spans."""
    rows = [
        (name, share, int(stability.counts[i, j]), float(stability.cosines[i, j, layer]))
        for i, share in enumerate(stability.shares)
        for j, name in enumerate(stability.behaviours)
    ]
    return pd.DataFrame(rows, columns=["behaviour", "share", "spans", "cosine"])


def layer_text(chosen: Mapping[str, int]) -> str:
    """``backtracking 17, ...`` for captions."""
    return ", ".join(f"{name} {layer}" for name, layer in chosen.items())


def intervals(
    table: pd.DataFrame, rows: Sequence[str], columns: str, *, digits: int = 2
) -> pd.DataFrame:
    """For display, from rows with ``value, low, high``: ``value (low to high)``, the value
    alone where the interval is missing, ``n/a`` without a value. One row for each of ``rows``,
    one column for each of ``columns``, both in the order in which they occur; ``ValueError``
    where two rows would share a cell."""
    if table.empty:
        return pd.DataFrame(columns=[*rows])
    parts = table[["value", "low", "high"]].itertuples(index=False)
    texts = table.assign(text=[_interval(*part, digits) for part in parts])
    return wide(texts, rows, columns, "text").fillna("n/a").rename_axis(columns=None)


def wide(
    table: pd.DataFrame, rows: Sequence[str], columns: str, values: str = "value"
) -> pd.DataFrame:
    """One row for each of ``rows``, one column for each of ``columns``, both in the order in
    which they occur, a missing cell NaN.

    Nothing is averaged: two numbers for one cell are a ``ValueError`` that names them (pandas'
    ``pivot_table`` would silently show their mean).
    """
    keys = [*rows, columns]
    twice = table[table.duplicated(keys, keep=False)]
    if not twice.empty:
        cell = ", ".join(f"{name} {twice.iloc[0][name]!r}" for name in keys)
        differ = [n for n in table if n not in (*keys, values) and twice[n].nunique() > 1]
        raise ValueError(
            f"{len(twice)} rows share cells with others (first: {cell}); nothing is averaged: "
            f"add to rows what tells them apart, of {', '.join(differ) or 'no column'}"
        )
    order = pd.MultiIndex.from_frame(table[list(rows)].drop_duplicates())
    found = table.set_index(keys)[values].unstack(columns)
    if len(rows) == 1:
        order = order.get_level_values(0)
    return found.reindex(order).reindex(columns=table[columns].drop_duplicates())


def _interval(value: float, low: float, high: float, digits: int) -> str:
    if np.isnan(value):
        return "n/a"
    form = f"z.{digits}f"  # z: no sign before a zero
    text = f"{value:{form}}"
    return text if np.isnan(low) else f"{text} ({low:{form}} to {high:{form}})"


def shown(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """For display: rounded, a missing number as ``n/a``, columns of whole numbers without a
    point, p-values too small for the digits as less than the last of them."""
    return table.apply(_texts, digits=digits)


def _texts(column: pd.Series, digits: int) -> pd.Series:
    if not pd.api.types.is_numeric_dtype(column):
        return column.where(column.notna(), "n/a")
    whole = (column.dropna() % 1 == 0).all()
    form = "{:.0f}" if whole else f"{{:.{digits}f}}"
    least = 10.0**-digits if column.name in P_VALUES else 0.0

    def text(value: float) -> str:
        if np.isnan(value):
            return "n/a"
        return f"<{form.format(least)}" if 0 < value < least else form.format(value)

    return column.map(text)
