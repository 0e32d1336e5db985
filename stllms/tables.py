"""Tensors and records -> data frames, for the eyes of a reader, for CSV and for figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from stllms.vectors import Stability


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


def shown(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """For display: rounded, a missing number as ``n/a``, columns of whole numbers without a
    point."""
    return table.apply(_texts, digits=digits)


def _texts(column: pd.Series, digits: int) -> pd.Series:
    if not pd.api.types.is_numeric_dtype(column):
        return column
    whole = (column.dropna() % 1 == 0).all()
    form = "{:.0f}" if whole else f"{{:.{digits}f}}"
    return column.map(lambda value: "n/a" if np.isnan(value) else form.format(value))
