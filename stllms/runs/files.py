"""Single files: hashed, recorded, locked, written beside and renamed into place.

``run.json`` has an entry for every file that the package writes into the folder of a run::

    "steered.jsonl": {"sha256": "...", "bytes": 81920, "rows": 600,
                      "made_from": {"vectors.safetensors": "...", "seed": 0, ...}}

A file is whole if its content has that hash (of a file of rows: its first ``bytes`` bytes; rows
behind them were appended just before a kill). It is stale if anything in ``made_from`` is
another one now. A file that is not what was recorded is named and never used.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms.hashes import file_hash
from stllms.records import loads

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

RUN = "run.json"

#: Eight significant digits: all of a float32, and stable text.
FLOAT_FORMAT = "%.8g"
#: Dots per inch of the figures.
DPI = 150

#: The most bytes of a released file, or of what it unpacks to. Means of 80 layers of width 8192
#: for a dozen labels have 32 million, a hundred annotated chains two.
LARGEST = 1 << 30


class BadFile(ValueError):  # noqa: N818 - reads as what it is
    """A file is missing, torn or not what it should be; the message, one line, names it."""


class DamagedFile(BadFile):
    """A file of a run is not what the run wrote."""


class StaleArtefact(ValueError):  # noqa: N818 - reads as what it is
    """An artefact was made from something that is another one now; the message names both."""


class LockedFolder(RuntimeError):  # noqa: N818 - reads as what it is
    """Another process is using what this one wants to write."""


# -- the artefacts of a run ----------------------------------------------------------------


@dataclass(frozen=True)
class Artefact:
    """A file of a run.

    ``stage`` is the number of the notebook that makes it; ``made_from`` names the artefacts it
    is computed from. ``promised``: its stage always leaves it. ``resumed``: its stage takes it
    up where it stopped. It then holds hours of work, so that a stale one is refused by name;
    everything else is made again without asking.
    """

    stage: str
    made_from: tuple[str, ...] = ()
    promised: bool = True
    resumed: bool = False


_LABELLED = ("responses.jsonl", "annotations.jsonl")
_DIRECTIONS = ("vectors.safetensors", "controls.safetensors")

#: Every artefact by name; a run also writes figures, tables and executed notebooks.
ARTEFACTS: dict[str, Artefact] = {
    "responses.jsonl": Artefact("01", resumed=True),
    "annotations.jsonl": Artefact("02", resumed=True),
    "collecting.safetensors": Artefact("02", promised=False, resumed=True),
    "vectors.safetensors": Artefact("02", _LABELLED),
    "controls.safetensors": Artefact("02", _LABELLED),
    "layer_effects.safetensors": Artefact("03", _DIRECTIONS, resumed=True),
    "steering_layers.json": Artefact("03", ("layer_effects.safetensors",), promised=False),
    "steered.jsonl": Artefact("04", _DIRECTIONS, resumed=True),
    "sweep.jsonl": Artefact("04", _DIRECTIONS, promised=False, resumed=True),
    "likelihood.jsonl": Artefact("04", _DIRECTIONS, promised=False, resumed=True),
    "steering.csv": Artefact("04", ("steered.jsonl", "likelihood.jsonl")),
}


# -- locks ---------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds a lock file while the block runs; raises :class:`LockedFolder` naming the pid.

    ``shared``: with others that only read. ``wait``: until it is free. The operating system
    frees it when its holder dies, so a leftover file is no obstacle. Without ``fcntl``
    (Windows) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedFolder(
                f"{path.parent.parent.name}/{path.parent.name} is in use by process {holder}: "
                "wait for it, stop it, or choose another --results"
            ) from None
        if not shared and not wait:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


# -- the record of a run -------------------------------------------------------------------


class Record:
    """The entries of ``run.json`` in ``folder``, by the names of files relative to it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def around(cls, path: Path) -> Record | None:
        """The record that a file belongs to: of its folder, or of the one above it."""
        for folder in Path(path).absolute().parents[:2]:
            if (folder / RUN).is_file():
                return cls(folder)
        return None

    def name(self, path: Path) -> str:
        """A file's name in the record."""
        return Path(path).absolute().relative_to(self.folder.absolute()).as_posix()

    def content(self) -> dict[str, Any]:
        """All of ``run.json``, ``{}`` without one; :class:`BadFile` for no JSON object."""
        path = self.folder / RUN
        if not path.is_file():
            return {}
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("artefacts", {}), dict):
            raise BadFile(f"{path}: not written by stllms (not a JSON object)")
        return content

    def entries(self) -> dict[str, dict[str, Any]]:
        """Every entry by the name of its file."""
        return self.content().get("artefacts", {})

    def entry(self, path: Path) -> dict[str, Any]:
        """The entry of a file, ``{}`` without one."""
        return self.entries().get(self.name(path), {})

    def inputs(self, name: str) -> dict[str, str]:
        """The recorded hashes of the artefacts that an artefact is computed from."""
        sources = ARTEFACTS[name].made_from if name in ARTEFACTS else ()
        entries = self.entries()
        return {one: entries[one]["sha256"] for one in sources if one in entries}

    @contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """The content of ``run.json`` to be changed: one process at a time, written back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".run.lock", wait=True):
            content = self.content()
            yield content
            write_json(self.folder / RUN, content)

    def put(self, path: Path, **values: Any) -> None:
        """Sets values of a file's entry."""
        with self.edit() as content:
            content.setdefault("artefacts", {}).setdefault(self.name(path), {}).update(values)

    def wrote(self, path: Path, beside: Path, **values: Any) -> None:
        """Records what is about to take the place of ``path``, and what it was made from.

        Written before the file takes its place: a kill between the two leaves the old file
        with the hash ``before``. What a file of rows says of itself
        (:meth:`stllms.runs.store.Rows.bind`) stays.
        """
        name = self.name(path)
        with self.edit() as content:
            entries = content.setdefault("artefacts", {})
            old = entries.get(name, {})
            said = old.get("made_from", {}) if "rows" in values else {}
            made_from = {**self.inputs(name), **said}
            entries[name] = {
                "sha256": file_hash(beside),
                "bytes": beside.stat().st_size,
                "before": old.get("sha256"),
                **values,
                **({"made_from": made_from} if made_from else {}),
            }

    def check(self, path: Path) -> None:
        """Raises :class:`DamagedFile` for a file that is not what was recorded of it."""
        entry = self.entry(path)
        if "sha256" not in entry or not path.is_file():
            return
        size, written, rows = path.stat().st_size, entry["bytes"], "rows" in entry
        whole = size == written or (size > written and rows)
        if whole and file_hash(path, written) == entry["sha256"]:
            return
        if entry.get("before") and file_hash(path) == entry["before"]:
            # Killed before the new file took its place, or put back by hand.
            counted = {"rows": path.read_bytes().count(b"\n")} if rows else {}
            self.put(path, sha256=entry["before"], bytes=size, before=None, **counted)
            return
        raise DamagedFile(
            f"{path}: not what the run wrote: damaged, or changed by hand; put the file back, "
            "or move it away and run again to have it made again"
        )

    def stale(self, name: str) -> str | None:
        """Why an artefact is stale by what it was computed from, ``None`` if it is not."""
        made_from = self.entries().get(name, {}).get("made_from", {})
        for source, now in self.inputs(name).items():
            if source in made_from and made_from[source] != now:
                return f"{source} changed"
            if source not in made_from and made_from:
                return f"{source} is new"
        return None


# -- writing and reading -------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, record: bool = True, **values: Any) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    A reader sees the old file or the new one, never a part; an error leaves the old one. In the
    folder of a run the new content is recorded, with ``values`` in its entry, if ``record``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        around = Record.around(path) if record and path.name != RUN else None
        if around is not None:
            around.wrote(path, beside, **values)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check(path: str | Path) -> None:
    """:meth:`Record.check` of a file in the folder of a run; nothing elsewhere."""
    path = Path(path)
    if path.name != RUN and (record := Record.around(path)) is not None:
        record.check(path)


def remove(path: Path) -> None:
    """Deletes a file that is no longer needed; the record of the run forgets it."""
    path.unlink(missing_ok=True)
    if (record := Record.around(path)) is not None:
        with record.edit() as content:
            content.get("artefacts", {}).pop(record.name(path), None)


def _there(path: str | Path) -> Path:
    """The path of a file that exists, is what was recorded and is not empty."""
    path = Path(path)
    if not path.is_file():
        raise BadFile(f"{path}: there is no such file")
    check(path)
    if not path.stat().st_size:
        raise BadFile(f"{path}: the file is empty")
    return path


def write_json(path: str | Path, value: Any) -> None:
    """JSON with sorted keys; NaN is refused with ``ValueError``."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replacing(Path(path)) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; :class:`BadFile` if missing, empty, not JSON
    (:func:`stllms.records.loads`), or not what the run wrote."""
    path = _there(path)
    try:
        return loads(path.read_bytes())
    except ValueError as error:
        raise BadFile(f"{path}: not JSON ({error})") from None


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """A safetensors file; every metadata value is stored as JSON text under its own key.

    Equal input gives equal bytes: the header is written again with its keys sorted, which
    the library leaves in random order.
    """
    from safetensors.torch import save

    whole = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    texts = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    with replacing(Path(path)) as beside:
        beside.write_bytes(_sorted_header(save(whole, texts)))


def _sorted_header(content: bytes) -> bytes:
    """Format: 8 bytes length, JSON header padded with spaces to a multiple of 8, data."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of :func:`save_tensors`; :class:`BadFile` otherwise."""
    from safetensors import SafetensorError, safe_open

    path = _there(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            texts = file.metadata() or {}
        return tensors, {name: loads(text) for name, text in sorted(texts.items())}
    except (SafetensorError, ValueError) as error:
        raise BadFile(f"{path}: not a safetensors file with our metadata ({error})") from None


def save_table(path: str | Path, table: pd.DataFrame) -> None:
    """CSV without the index, floats with eight significant digits, a missing value empty."""
    with replacing(Path(path)) as beside:
        table.to_csv(beside, index=False, float_format=FLOAT_FORMAT, lineterminator="\n")


def load_table(path: str | Path) -> pd.DataFrame:
    """The inverse of :func:`save_table`; :class:`BadFile` if missing, empty or not a table."""
    import pandas as pd

    path = _there(path)
    try:
        return pd.read_csv(path)
    except ValueError as error:  # pandas' own errors, and bytes that are no text
        raise BadFile(f"{path}: not a table ({str(error).splitlines()[0]})") from None


def save_figure(
    folder: str | os.PathLike[str], name: str, figure: Figure, data: pd.DataFrame
) -> list[Path]:
    """``name`` in ``folder`` as ``.png`` and ``.pdf`` (without dates or software names), and
    its data as ``.csv``; returns the paths."""
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    paths = [Path(folder) / f"{name}.{kind}" for kind in (*metadata, "csv")]
    for path, (kind, values) in zip(paths, metadata.items(), strict=False):
        with replacing(path) as beside:
            figure.savefig(beside, format=kind, dpi=DPI, bbox_inches="tight", metadata=values)
    save_table(paths[-1], data)
    return paths


# -- files of torch that others wrote ------------------------------------------------------


def load_torch(path: str | Path) -> Any:
    """A ``.pt`` file that others wrote, read with ``weights_only=True`` onto the CPU.

    Raises :class:`BadFile`, one line with the name, if missing, empty, cut off, unsafe or too
    large.
    """
    import pickle
    import warnings

    import torch

    path = _there(path)
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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what it seems: floats, one after the other in memory, and no more
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


def check_size(path: str | Path) -> None:
    """Refuses a file of more than :data:`LARGEST` bytes, packed or unpacked, before it is read:
    torch unpacks what a stranger may have packed a thousandfold."""
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(item.file_size for item in archive.infolist()))
        except Exception as error:  # zipfile has no one error for archives that are none
            raise BadFile(f"{path}: not a whole file of tensors ({error})") from None
    if size > LARGEST:
        most = f"{LARGEST / 2**20:.0f} MiB"
        raise BadFile(f"{path}: {size / 2**20:.0f} MiB, a released file has at most {most}")
