"""The files of a run: its folder, who may write there, and what it may find there.

``results/<slug>/`` belongs to one configuration: ``run.json`` holds its identity, and another
one is refused by name. Every file the package writes is noted there, so that ``--fresh``
deletes these and nothing else. Readers and writers of single files are in
:mod:`stllms.files`, readers of the files released with the paper in :mod:`stllms.released`;
import both from here.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms import __version__, files
from stllms.config import RunConfig, repository, slug
from stllms.files import (
    BadFile,
    Rows,
    load_table,
    load_tensors,
    read_json,
    save_table,
    save_tensors,
    write_json,
)
from stllms.released import load_comparison, load_layer_effects, load_torch, published

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

__all__ = [
    "BadFile", "ChangedConfiguration", "Folder", "LockedFolder", "Rows", "load_comparison",
    "load_layer_effects", "load_table", "load_tensors", "load_torch", "published",
    "read_json", "save_figure", "save_table", "save_tensors", "write_json",
]  # fmt: skip

#: Packages whose versions are recorded with a run.
RECORDED = ("torch", "transformers", "nnsight", "numpy", "scipy", "pandas", "matplotlib")
#: Packages of extras, recorded where they are installed.
EXTRAS = ("reasoning-gym", "gguf")


class ChangedConfiguration(ValueError):  # noqa: N818 - reads as what it is
    """The folder holds a run of another configuration."""


class LockedFolder(RuntimeError):  # noqa: N818 - reads as what it is
    """Another process is writing to the folder."""


#: Names kept by this process, by folder: what a stage says it wrote.
_KEPT: dict[Path, set[str]] = {}


class Folder:
    """``results/<slug>/``: the artefacts of one run.

    ``Folder(config)`` only names it; :meth:`open` makes it, or refuses it for another
    configuration. Paths are attributes; ``folder / "name"`` is any other file in it.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        path: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.path = path or config.folder
        self.identity = dict(config.identity() if identity is None else identity)
        self.run = self.path / "run.json"
        self.responses = self.path / "responses.jsonl"
        self.annotations = self.path / "annotations.jsonl"
        self.collecting = self.path / "collecting.safetensors"
        self.vectors = self.path / "vectors.safetensors"
        self.layer_effects = self.path / "layer_effects.safetensors"
        self.steered = self.path / "steered.jsonl"
        self.steering = self.path / "steering.csv"
        self.figures = self.path / "figures"
        self.notebooks = self.path / "notebooks"

    @classmethod
    def comparison(cls, config: RunConfig) -> Folder:
        """``results/comparison/`` of notebook 05: figures and tables of the last comparison.

        It belongs to no configuration; the rows of each model do: :meth:`member`.
        """
        return cls(config, path=config.results_folder / "comparison", identity={})

    def member(self, model: str) -> Folder:
        """``results/comparison/<slug>/``: the compared rows of one of ``config.models``."""
        config = self.config.for_model(model)
        path = config.results_folder / "comparison" / slug(config.model)
        return Folder(config, path=path, identity=config.comparison_identity())

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Folder({self.label})"

    @property
    def label(self) -> str:
        """The folder's name for people, without the machine's own path."""
        root = self.config.results_folder
        return f"{root.name}/{self.path.relative_to(root).as_posix()}"

    # -- whose folder it is --------------------------------------------------------------

    def open(self) -> Folder:
        """Makes the folder and ``run.json``; raises :class:`ChangedConfiguration`.

        Options outside of the identity may change: ``run.json`` has those of the latest call.
        A folder with artefacts but without ``run.json`` is refused too.
        """
        self.check()
        configuration = {**self.config.to_dict(), "results": None}
        if not self.run.is_file():
            write_json(
                self.run,
                {
                    "identity": self.identity,
                    "configuration": configuration,
                    "seed": self.config.seed,
                    "versions": versions(),
                    "commit": commit(),
                    "started": now(),
                    "stages": {},
                    "recorded": {},
                    "files": [],
                },
            )
        elif (record := self.record()).get("configuration") != configuration:
            write_json(self.run, {**record, "configuration": configuration})
        return self

    def check(self) -> None:
        """Raises :class:`ChangedConfiguration` that names field, old value and new value."""
        if not self.run.is_file():
            artefacts = (self.responses, self.annotations, self.vectors, self.steered)
            stray = [path.name for path in artefacts if path.exists()]
            if stray:
                raise ChangedConfiguration(
                    f"{self.label} holds {', '.join(stray)} but no run.json to say which "
                    "run it is: move it away, or choose another --results"
                )
            return
        old = self.record().get("identity")
        if not isinstance(old, dict):
            raise BadFile(f"{self.run}: not written by stllms (it has no identity)")
        changes = [
            f"{name} was {old.get(name)!r} and is now {self.identity.get(name)!r}"
            for name in dict.fromkeys([*self.identity, *old])
            if old.get(name) != self.identity.get(name)
        ]
        if changes:
            raise ChangedConfiguration(
                f"{self.label} holds a run of another configuration: {'; '.join(changes)}; "
                "use --fresh to replace it, or another --results"
            )

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``; ``{}`` if there is none. :class:`BadFile` if torn."""
        if not self.run.is_file():
            return {}
        content = read_json(self.run)
        if not isinstance(content, dict):
            raise BadFile(f"{self.run}: not written by stllms (not a JSON object)")
        return content

    def note(self, **values: Any) -> None:
        """Records values in ``run.json`` that identify nothing: device, batch size, counts."""
        content = self.record()
        content["recorded"] = {**content.get("recorded", {}), **values}
        write_json(self.run, content)

    def mark(self, stage: str, marker: Mapping[str, Any]) -> None:
        """Stores the marker of a stage that is done."""
        content = self.record()
        content["stages"] = {**content.get("stages", {}), stage: dict(marker)}
        write_json(self.run, content)

    def marker(self, stage: str) -> dict[str, Any]:
        """The marker of a stage, ``{}`` if it was never done."""
        return self.record().get("stages", {}).get(stage, {})

    def keep(self, paths: Iterable[Path]) -> None:
        """Notes files below the folder as written by the package, for :meth:`fresh`."""
        content = self.record()
        names = {path.relative_to(self.path).as_posix() for path in paths}
        self.kept.update(names)
        known = set(content.get("files", []))
        if names - known:
            content["files"] = sorted(known | names)
            write_json(self.run, content)

    @property
    def kept(self) -> set[str]:
        """The names that this process passed to :meth:`keep`, for any such folder object."""
        return _KEPT.setdefault(self.path, set())

    def fresh(self) -> list[str]:
        """Deletes what the package wrote here, and nothing else; returns the names.

        Known are the artefacts of DESIGN and what ``run.json`` lists. Folders that are then
        empty go as well.
        """
        standard = (
            self.responses,
            self.annotations,
            self.collecting,
            self.vectors,
            self.layer_effects,
            self.steered,
            self.steering,
        )
        known = [self.path / name for name in self.record_or_empty().get("files", [])]
        inside = [path for path in known if path.resolve().is_relative_to(self.path.resolve())]
        paths = [path for path in {*standard, *inside, self.run} if path.is_file()]
        for path in paths:
            path.unlink()
        folders = {path.parent for path in paths} | {self.figures, self.notebooks}
        for folder in sorted(folders, key=lambda item: len(item.parts), reverse=True):
            if folder.is_dir() and folder != self.path and not any(folder.iterdir()):
                folder.rmdir()
        return sorted(path.relative_to(self.path).as_posix() for path in paths)

    def record_or_empty(self) -> dict[str, Any]:
        """:meth:`record`, but ``{}`` for a ``run.json`` that cannot be read."""
        try:
            return self.record()
        except BadFile:
            return {}

    # -- what is written into it ---------------------------------------------------------

    def rows(self, path: Path, key: Iterable[str] = ("task_id",)) -> Rows:
        """A JSONL file of this run; noted for :meth:`fresh`."""
        self.keep([path])
        return Rows(path, tuple(key))

    def save_tensors(
        self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
    ) -> None:
        """:func:`files.save_tensors` into this run."""
        self.keep([path])
        save_tensors(path, tensors, metadata)

    def save_table(self, path: Path, table: pd.DataFrame) -> None:
        """:func:`files.save_table` into this run."""
        self.keep([path])
        save_table(path, table)

    def save_figure(self, name: str, figure: Figure, data: pd.DataFrame) -> None:
        """``figures/<name>`` as ``.png``, ``.pdf`` and ``.csv``."""
        self.keep(self.figures / f"{name}.{kind}" for kind in ("png", "pdf", "csv"))
        files.draw(self.figures, name, figure, data)

    # -- who may write -------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds ``.lock`` while the block runs; raises :class:`LockedFolder` naming the pid.

        The operating system frees it when its holder dies, however that happens, so a stale
        file is no obstacle. Where there is no ``fcntl`` (Windows) nothing is held.
        """
        try:
            import fcntl
        except ImportError:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise LockedFolder(
                    f"{self.label} is in use by process {holder}: wait for it, stop it, "
                    "or choose another --results"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
            file.truncate(0)


def save_figure(
    folder: Folder | str | Path, name: str, figure: Figure, data: pd.DataFrame
) -> None:
    """``name`` as ``.png``, ``.pdf`` and ``.csv``, in ``figures/`` of a run or in a folder."""
    if isinstance(folder, Folder):
        folder.save_figure(name, figure, data)
    else:
        files.draw(Path(folder), name, figure, data)


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what its numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "stllms": __version__}
    for name in RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    for name in EXTRAS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The git commit of the checkout, ``-dirty`` if it has changes; ``None`` outside one."""
    root = repository()
    if root is None or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
