"""Readers of the files that were released with the paper.

Tests and the ledger compare with them; none of them is part of this repository. A file that is
not what it should be raises :class:`BadFile` with one line that names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms.config import repository
from stllms.provenance import BadFile, read_json

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

    The file holds a dictionary of lists of lists; a label with an empty list is ``[0, 0]``.
    Raises :class:`BadFile` for anything else.
    """
    import torch

    content = load_torch(path)
    if not isinstance(content, dict) or not content:
        raise BadFile(f"{path}: expected behaviour -> responses -> layers")
    effects: dict[str, torch.Tensor] = {}
    for label, responses in content.items():
        try:
            values = torch.as_tensor(responses, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise BadFile(f"{path}: {label!r} is no table of numbers ({reason})") from None
        if values.shape == (0,):
            values = values.reshape(0, 0)
        if values.ndim != 2:
            raise BadFile(f"{path}: expected behaviour -> responses -> layers at {label!r}")
        effects[str(label)] = values
    return effects


def load_torch(path: str | Path) -> Any:
    """A released ``.pt`` file, read with ``weights_only=True`` onto the CPU.

    Raises :class:`BadFile`, one line with the name, if missing, empty, cut off or unsafe.
    """
    import pickle
    import warnings

    import torch

    path = Path(path)
    if not path.is_file():
        raise BadFile(f"{path}: there is no such file")
    if not path.stat().st_size:
        raise BadFile(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings(action="ignore"):  # about foreign pickles, refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadFile(
            f"{path}: refused, it holds something other than tensors or is damaged "
            "(read with weights_only=True, no code of it was run)"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFile(f"{path}: not a whole file of tensors ({reason})") from None
