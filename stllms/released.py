"""Readers of the files that were released with the paper.

Tests and the ledger compare with them; none of them is part of this repository. A file that is
not what it should be raises :class:`BadFile` with one line that names it.
"""

from __future__ import annotations

import os
import zipfile
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


#: Bytes of a released file, or of what it unpacks to. Means of 80 layers of width 8192 for a
#: dozen labels have 32 million, a hundred annotated chains two.
LARGEST = 1 << 30
#: What a file of torch's present form begins with; that of an older one is a bare pickle.
ZIP = b"PK\x03\x04"

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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what it seems: floats, one after the other in memory, and not more
    than a released file may have (one number can be spread out to any shape)."""
    import torch

    return (
        type(tensor) is torch.Tensor
        and not (tensor.is_nested or tensor.requires_grad)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.numel() * 8 <= LARGEST
    )


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
    check_size(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about foreign pickles, refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadFile(
            f"{path}: refused, it holds something other than tensors or is damaged "
            "(read with weights_only=True, no code of it was run)"
        ) from None
    except Exception as error:  # whatever torch makes of bytes that it did not write
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFile(f"{path}: not a whole file of tensors ({reason})") from None


def check_size(path: Path) -> None:
    """Refuses a file of more than :data:`LARGEST` bytes, packed or unpacked, before it is read:
    torch unpacks what a stranger may have packed a thousandfold."""
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        packed = file.read(len(ZIP)) == ZIP
    if packed:
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(item.file_size for item in archive.infolist()))
        except Exception as error:  # zipfile has no one error for archives that are none
            raise BadFile(f"{path}: not a whole file of tensors ({error})") from None
    if size > LARGEST:
        most = f"{LARGEST / 2**20:.0f} MiB"
        raise BadFile(f"{path}: {size / 2**20:.0f} MiB, a released file has at most {most}")
