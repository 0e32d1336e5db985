"""Readers of the files that were released with the paper.

Tests and the ledger compare with them; none of them is part of this repository. A file that is
not what it should be raises :class:`BadFile` with one line that names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms.registry import repository
from stllms.runs.files import LARGEST, BadFile, check_size, is_plain, load_torch, read_json

if TYPE_CHECKING:
    import torch


def published(folder: str | Path | None = None) -> Path:
    """The folder of the released files: ``folder``, else ``STLLMS_PUBLISHED``, else a default.

    The default is ``../shared/published`` beside the checkout (the current folder where there
    is none). It need not exist: the readers say what is missing.
    """
    chosen = folder or os.environ.get("STLLMS_PUBLISHED")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return (repository() or Path.cwd()).parent / "shared" / "published"


COMPARISON_KEYS = ("response", "thinking_process", "label_counts", "annotated_response")


def load_comparison(path: str | Path) -> list[dict[str, Any]]:
    """The released chains of one model: 100 rows of :data:`COMPARISON_KEYS`.

    Raises :class:`BadFile`, one line with the name, if missing, empty, cut off or foreign.
    """
    check_size(Path(path))
    rows = read_json(Path(path))
    if not isinstance(rows, list) or not rows:
        kind = "an empty list" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise BadFile(f"{path}: expected a list of annotated chains, found {kind}")
    for number, row in enumerate(rows):
        lacking = [
            name for name in COMPARISON_KEYS if not isinstance(row, dict) or name not in row
        ]
        if lacking:
            raise BadFile(f"{path}: chain {number} lacks {', '.join(lacking)}")
        if not isinstance(row["annotated_response"], str):
            kind = type(row["annotated_response"]).__name__
            raise BadFile(f"{path}: chain {number}: annotated_response is no text but {kind}")
    return rows


def load_layer_effects(path: str | Path) -> dict[str, torch.Tensor]:
    """The released layer effects: label -> ``[responses, L]``, float32.

    The file holds a dictionary of lists of lists, or of matrices; a label with an empty list is
    ``[0, 0]``. Raises :class:`BadFile` for anything else.
    """
    content = load_torch(path)
    if not isinstance(content, dict) or not content:
        raise BadFile(f"{path}: expected behaviour -> responses -> layers")
    return {str(label): _matrix(path, label, values) for label, values in content.items()}


def _matrix(path: str | Path, label: Any, responses: Any) -> torch.Tensor:
    """A table of numbers ``[responses, L]``, float32.

    A list is looked at before torch sees it: lists within lists may share their parts, so that
    a file of a kilobyte unfolds to more than any memory holds.
    """
    import torch

    if isinstance(responses, torch.Tensor) and is_plain(responses) and responses.ndim == 2:
        return responses.float()
    rows = responses if isinstance(responses, list | tuple) else [None]
    if not all(isinstance(row, list | tuple) for row in rows):
        raise BadFile(f"{path}: expected behaviour -> responses -> layers at {label!r}")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise BadFile(f"{path}: {label!r} is no table: rows of {lengths[0]} to {lengths[-1]}")
    if sum(lengths) * len(rows) * 8 > LARGEST:
        raise BadFile(f"{path}: {label!r} has more numbers than a released file may have")
    if not all(type(value) in (int, float) for row in rows for value in row):
        raise BadFile(f"{path}: {label!r} is no table of numbers")
    try:
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), sum(lengths))
    except (ValueError, OverflowError, RuntimeError):  # a whole number beyond every float
        raise BadFile(f"{path}: {label!r} has a number that no float holds") from None
