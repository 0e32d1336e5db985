"""The folder of a run: whose it is, who may write there, and whether it is still what it was.

``results/<slug>/`` belongs to one configuration: ``run.json`` holds its identity, and another
one is refused by name. Every file the package writes is noted there, so that ``--fresh``
deletes these and nothing else. :func:`verify` recomputes what ``run.json`` says.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms import __version__, registry
from stllms.config import RunConfig
from stllms.records import STEERED_KEY, from_rows, response_from_row
from stllms.runs.audit import SamplingError, audit
from stllms.runs.files import (
    ARTEFACTS,
    RUN,
    BadFile,
    Record,
    StaleArtefact,
    check,
    load_tensors,
    locked,
    save_figure,
    save_table,
)
from stllms.runs.store import Rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: Packages whose versions are recorded with a run, where they are installed.
RECORDED = (
    "torch", "transformers", "nnsight", "numpy", "scipy", "pandas", "matplotlib",
    "reasoning-gym", "gguf",
)  # fmt: skip

#: Begins the values of ``run.json`` that hold a sampling audit; the name of the rows follows.
AUDIT = "sampling_audit_"


class ChangedConfiguration(ValueError):  # noqa: N818 - reads as what it is
    """The folder holds a run of another configuration."""


#: Names of files that this process noted, by folder: what a stage says it wrote.
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
        self.recorded = Record(self.path)
        self.run = self.path / RUN
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
        path = config.results_folder / "comparison" / registry.slug(config.model)
        return Folder(config, path=path, identity=config.comparison_identity())

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

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
        record = self.record()
        old = record.get("identity", {})
        wanted = {
            "identity": {k: old.get(k) if v is None else v for k, v in self.identity.items()},
            "configuration": {**self.config.to_dict(), "results": None},
        }
        if all(record.get(name) == value for name, value in wanted.items()):
            return self
        with self.recorded.edit() as content:
            if not content:
                content |= {
                    "seed": self.config.seed,
                    "versions": versions(),
                    "commit": commit(),
                    "started": now(),
                    "stages": {},
                    "recorded": {},
                    "files": [],
                    "artefacts": {},
                }
            content |= wanted
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
            # The commit of a hub model is known once it was downloaded: nothing has changed.
            and not (name == "revision" and None in (old.get(name), self.identity.get(name)))
        ]
        if changes:
            raise ChangedConfiguration(
                f"{self.label} holds a run of another configuration: {'; '.join(changes)}; "
                "use --fresh to replace it, or another --results"
            )

    def made_with(self, model: Any) -> None:
        """Notes which model (:class:`stllms.models.model.Model`) a run is made with, its
        device, dtype, norms and remarks, and sets its ``fits`` to the batch size that memory
        allowed in an earlier stage on this device, unless the configuration sets one.

        Raises :class:`~stllms.runs.files.StaleArtefact` for another model, naming what of it
        changed: its weights, tokenizer, chat template or dtype.
        """
        record = self.record()
        made, noted = record.get("model"), record.get("recorded", {})
        if made is None:
            made = dict(model.identity)
            with self.recorded.edit() as content:
                content["model"] = made
        for name, value in model.identity.items():
            if made.get(name) != value:
                raise StaleArtefact(
                    f"{self.label}: the {name} of the model changed, {made.get(name)!r} when "
                    f"the run was made, {value!r} now; use --fresh to replace it, or another "
                    "--results"
                )
        if self.config.batch_size is None and noted.get("device") == str(model.device):
            model.fits = noted.get("batch_size") or model.fits
        self.note(
            device=str(model.device),
            dtype=str(model.dtype),
            norms=list(model.norms),
            remarks=list(model.remarks),
        )

    # -- run.json ------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``; ``{}`` if there is none. :class:`BadFile` if torn."""
        return self.recorded.content()

    def record_or_empty(self) -> dict[str, Any]:
        """:meth:`record`, but ``{}`` for a ``run.json`` that cannot be read."""
        try:
            return self.record()
        except BadFile:
            return {}

    def note(self, **values: Any) -> None:
        """Records values in ``run.json`` that identify nothing: device, batch size, counts."""
        with self.recorded.edit() as content:
            content.setdefault("recorded", {}).update(values)

    def mark(self, stage: str, marker: Mapping[str, Any]) -> None:
        """Stores the marker of a stage that is done."""
        with self.recorded.edit() as content:
            content.setdefault("stages", {})[stage] = dict(marker)

    def marker(self, stage: str) -> dict[str, Any]:
        """The marker of a stage, ``{}`` if it was never done."""
        return self.record().get("stages", {}).get(stage, {})

    def keep(self, paths: Iterable[Path]) -> None:
        """Notes files below the folder as written by the package, for :meth:`fresh`."""
        names = {path.relative_to(self.path).as_posix() for path in paths}
        self.kept.update(names)
        if names - set(self.record().get("files", [])):
            with self.recorded.edit() as content:
                content["files"] = sorted({*content.get("files", []), *names})

    @property
    def kept(self) -> set[str]:
        """The names that this process passed to :meth:`keep`, for any such folder object."""
        return _KEPT.setdefault(self.path, set())

    # -- deleting ------------------------------------------------------------------------

    def fresh(self) -> list[str]:
        """Deletes what the package wrote here, and nothing else; returns the names.

        Known are the artefacts and what ``run.json`` lists.
        """
        record = self.record_or_empty()
        known = {*ARTEFACTS, RUN, *record.get("files", []), *record.get("artefacts", {})}
        return self._delete(known)

    def fresh_stages(self, stages: Mapping[str, Iterable[str]]) -> list[str]:
        """Deletes the files that some stages wrote; the stages count as never done. Returns the
        names."""
        names = {name for own in stages.values() for name in own}
        gone = self._delete(names)
        with self.recorded.edit() as content:
            for stage in stages:
                content.get("stages", {}).pop(stage, None)
            for name in names:
                content.get("artefacts", {}).pop(name, None)
        return gone

    def _delete(self, names: Iterable[str]) -> list[str]:
        root = self.path.resolve()
        known = [self.path / name for name in names]
        paths = [p for p in known if p.is_file() and p.resolve().is_relative_to(root)]
        for path in paths:
            path.unlink()
        for folder in (self.figures, self.notebooks):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return sorted(path.relative_to(self.path).as_posix() for path in paths)

    # -- writing -------------------------------------------------------------------------

    def rows(self, path: Path, key: Iterable[str] = ("task_id",)) -> Rows:
        """A JSONL file of this run; noted for :meth:`fresh`."""
        self.keep([path])
        return Rows(path, tuple(key))

    def save_table(self, path: Path, table: pd.DataFrame) -> None:
        """:func:`stllms.runs.files.save_table` into this run."""
        self.keep([path])
        save_table(path, table)

    def save_figure(self, name: str, figure: Figure, data: pd.DataFrame) -> None:
        """``figures/<name>`` as ``.png``, ``.pdf`` and ``.csv``."""
        self.keep(save_figure(self.figures, name, figure, data))

    @contextmanager
    def lock(self, *stages: str, reading: Iterable[str] = ()) -> Iterator[None]:
        """Holds the locks of ``stages`` while the block runs, and those of ``reading`` together
        with others that read; raises :class:`~stllms.runs.files.LockedFolder` naming the
        pid."""
        with ExitStack() as stack:
            for stage in reading:
                stack.enter_context(locked(self.path / f".{stage}.lock", shared=True))
            for stage in stages:
                stack.enter_context(locked(self.path / f".{stage}.lock"))
            yield


# -- is it still what it was? --------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What :func:`verify` says of one artefact."""

    artefact: str
    holds: bool
    said: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'BAD '} {self.artefact}: {self.said}"


def verify(folder: str | Path) -> list[Finding]:
    """Recomputes what ``run.json`` says, of a run and of every run below ``folder``.

    Each artefact: is it there, do its bytes hash to what was recorded, does it hold as many
    rows, are its tensors finite, was it made from the artefacts that are there now? The model:
    are its weights, tokenizer and chat template those of the run, where they are on this
    machine? The chains: does the sampling audit of their rows pass? Files in ``left_out`` (a
    copy of a run without its largest files) are known by hash only. Raises
    :class:`~stllms.runs.files.BadFile` where there is no run.
    """
    root = Path(folder)
    runs = sorted(path.parent for path in root.rglob(RUN))
    if not runs:
        raise BadFile(f"{root}: no run, there is no {RUN} in it or below")
    return [
        replace(one, artefact=(run.relative_to(root) / one.artefact).as_posix())
        for run in runs
        for one in _verified(run)
    ]


def _verified(run: Path) -> Iterator[Finding]:
    record = Record(run)
    content = record.content()
    if found := _model(content.get("identity") or {}):
        yield found
    for name, entry in sorted(record.entries().items()):
        try:
            said = _contents(run / name, entry, left_out=name in content.get("left_out", ()))
            why = record.stale(name)
            yield Finding(name, not why, f"made from something else: {why}" if why else said)
        except ValueError as error:
            yield Finding(name, False, str(error))
    for key in content.get("recorded", {}):
        path = run / f"{key.removeprefix(AUDIT)}.jsonl"
        if key.startswith(AUDIT) and path.is_file():
            yield _audited(path)


def _contents(path: Path, entry: Mapping[str, Any], *, left_out: bool) -> str:
    """What a file holds, in words; ``ValueError`` where that is not what was recorded."""
    if not path.is_file():
        if not entry["bytes"]:
            return "nothing was written yet"
        if left_out:
            return f"left out here, known by its hash {entry['sha256'][:12]}"
        raise BadFile("is not there")
    check(path)
    if "rows" in entry:
        rows = path.read_bytes().count(b"\n")
        if rows != entry["rows"]:
            raise BadFile(f"{rows} rows, {entry['rows']} were recorded")
        return f"{rows} rows, whole"
    if path.suffix == ".safetensors":
        tensors, _ = load_tensors(path)
        broken = [name for name, tensor in tensors.items() if tensor.isinf().any()]
        if broken:
            raise BadFile(f"not finite: {', '.join(broken)}")
        return f"{len(tensors)} tensors, whole"
    return f"{path.stat().st_size} bytes, whole"


def _audited(path: Path) -> Finding:
    """The sampling audit of a file of chains, computed from its rows."""
    name = f"sampling audit of {path.name}"
    key = ("task_id",) if path.name == "responses.jsonl" else STEERED_KEY
    try:
        rows = Rows(path, key).load()
        chains = from_rows((row.get("response", row) for row in rows), response_from_row, path)
        return Finding(name, True, audit(chains).check().line)
    except (ValueError, SamplingError) as error:
        return Finding(name, False, str(error))


def _model(identity: Mapping[str, Any]) -> Finding | None:
    """Whether the model of a run is what it was, where it is on this machine."""
    if "model" not in identity:
        return None
    try:
        now = registry.content_of(registry.resolve(identity["model"]))
    except registry.UnknownModel as error:
        return Finding("model", True, f"not on this machine: {error}")
    known = {name: value for name, value in now.items() if value is not None}
    changed = [name for name, value in known.items() if identity.get(name) not in (None, value)]
    if changed:
        return Finding("model", False, f"changed since the run: {', '.join(changed)}")
    return Finding("model", True, f"{', '.join(known) or 'nothing'} as recorded")


# -- what a run was made with --------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what its numbers depend on."""
    found = {"python": platform.python_version(), "stllms": __version__}
    for name in RECORDED:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> str:
    """One line for a notebook: this package, Python, and what its numbers depend on most."""
    found = versions()
    names = ("stllms", "python", "torch", "transformers", "nnsight")
    return ", ".join(f"{name} {found[name]}" for name in names)


def commit() -> str | None:
    """The git commit of the checkout, ``-dirty`` if it has changes; ``None`` outside one."""
    root = registry.repository()
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
