"""The five notebooks as stages: what each needs and leaves, when one is done.

A stage has run when the marker that its last cell left in ``run.json`` still fits (same
identity and options, same code cells of its notebook and of those before it, same version of
the package) and the files it wrote are there, whole, and made from what is there now. It is
done when, besides, no request of it waits to be asked again. Rows that cost hours are never
dropped because they are stale: the run says so and stops.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from stllms import __version__
from stllms.config import RunConfig
from stllms.hashes import digest
from stllms.registry import PACKAGE, repository
from stllms.runs.artifacts import Folder, now
from stllms.runs.files import ARTEFACTS, StaleArtefact, read_json

#: The stages in order; each is the notebook of that name.
STAGES = ("01_generate", "02_train_vectors", "03_attribute_layers", "04_steer", "05_compare")

#: The stages whose artefacts a stage reads. 05 makes its own responses.
REQUIRES: dict[str, tuple[str, ...]] = {
    "01_generate": (),
    "02_train_vectors": STAGES[:1],
    "03_attribute_layers": STAGES[:2],
    "04_steer": STAGES[:3],
    "05_compare": (),
}

#: What a stage must have left, besides the figures that its marker lists.
PROMISED = {
    stage: tuple(n for n, one in ARTEFACTS.items() if one.stage == stage[:2] and one.promised)
    for stage in STAGES
}
#: What a stage takes up where it stopped; stale ones are refused by name.
RESUMED = {
    stage: tuple(n for n, one in ARTEFACTS.items() if one.stage == stage[:2] and one.resumed)
    for stage in STAGES
}

#: A line that begins like this says what an API would cost; the runner shows it at once.
ESTIMATE = re.compile(r"\S.*: \d+ calls to send, \d+ replies stored; about .*")
#: Set by the runner for its kernels: inside one, :func:`ensure` runs nothing again.
INSIDE = "STLLMS_RUNNER"

#: When each stage began in this process.
_begun: dict[tuple[str, Path], float] = {}
#: What this process locks for the notebook that was opened in it by hand.
_held: dict[Path, ExitStack] = {}


class StageError(RuntimeError):
    """A notebook failed, or did not leave what it should have."""


# -- names and places ----------------------------------------------------------------------


def notebook(stage: str) -> Path:
    """The file of a stage, in ``STLLMS_NOTEBOOKS``, else in the checkout's ``notebooks``, else
    in the wheel; ``ValueError`` if there is none.
    """
    root = repository()
    shipped = root / "notebooks" if root else PACKAGE / "_notebooks"
    folder = Path(os.environ.get("STLLMS_NOTEBOOKS") or shipped).resolve()
    path = folder / f"{stage}.ipynb"
    if not path.is_file():
        raise ValueError(f"the notebook {path.name} is not in {folder}")
    return path


def stage_named(text: str) -> str:
    """The stage meant by ``03``, ``3``, ``03_attribute_layers`` or ``attribute_layers``."""
    for stage in STAGES:
        number, _, name = stage.partition("_")
        if text.removesuffix(".ipynb") in (stage, number, number.lstrip("0"), name):
            return stage
    raise ValueError(f"unknown notebook {text!r}, expected one of {', '.join(STAGES)}")


def folder_of(stage: str, config: RunConfig) -> Folder:
    """``results/<slug>/``, or ``results/comparison/`` for notebook 05."""
    return Folder.comparison(config) if stage == "05_compare" else Folder(config)


def members(stage: str, config: RunConfig) -> list[Folder]:
    """The folders that hold the rows of a stage, one a model, each with its configuration."""
    folder = folder_of(stage, config)
    if stage != "05_compare":
        return [folder]
    return [folder.member(model) for model in config.models]


def _folders(stage: str, config: RunConfig) -> list[Folder]:
    """The folders that a stage writes to."""
    own = {one.path: one for one in (folder_of(stage, config), *members(stage, config))}
    return list(own.values())


def _files_of(stage: str, folder: Folder) -> set[str]:
    """The names of the files that a stage writes, or said that it wrote."""
    return {*PROMISED[stage], *RESUMED[stage], *folder.marker(stage).get("files", ())}


def _holds_nothing(folder: Folder) -> bool:
    """Whether a run began here and left neither a finished stage nor a row of one."""
    record, paths = folder.record_or_empty(), [folder / name for name in ARTEFACTS]
    return (
        isinstance(record.get("identity"), dict)
        and not record.get("stages")
        and not any(path.stat().st_size for path in paths if path.is_file())
    )


def compared(configs: Sequence[RunConfig]) -> RunConfig:
    """The configuration of notebook 05 for all models of a run: the first, and the others."""
    first = configs[0]
    names = [*(config.model for config in configs[1:]), *first.compare]
    return RunConfig.from_dict({**first.to_dict(), "compare": names}) if names else first


# -- what is done --------------------------------------------------------------------------


def check(stage: str, config: RunConfig) -> None:
    """Raises ``ChangedConfiguration`` if a folder of the stage holds rows of another run,
    ``StaleArtefact`` for rows made from something that changed since, and ``DamagedFile``.
    """
    for folder in _folders(stage, config):
        if _holds_nothing(folder):
            continue
        folder.check()
        read = {name for one in REQUIRES[stage] for name in PROMISED[one]}
        for name in sorted(_files_of(stage, folder) | read):
            folder.recorded.check(folder / name)
        for name in RESUMED[stage]:
            if (folder / name).is_file() and (why := folder.recorded.stale(name)):
                raise StaleArtefact(
                    f"{folder.label}: {name} was made with other vectors: {why}. --fresh "
                    f"{stage} makes it again, and what rests on it"
                )


def _code_of(stage: str) -> str:
    """A hash of the code cells of a notebook; its text and its parameters do not count."""
    return digest(
        [
            "".join(cell["source"])
            for cell in read_json(notebook(stage))["cells"]
            if cell["cell_type"] == "code"
            and "parameters" not in cell.get("metadata", {}).get("tags", ())
        ]
    )


def key_of(stage: str, config: RunConfig) -> str:
    """The hash that a marker must carry: all that the artefacts of a stage depend on."""
    identities = [one.identity for one in members(stage, config)]
    before = [key_of(needed, config) for needed in REQUIRES[stage]]
    options = config.stage_options(stage)
    return digest([identities, options, _code_of(stage), before, __version__])


def has_run(stage: str, config: RunConfig) -> bool:
    """Whether the marker of a stage fits, its files are there, and none of them is stale."""
    folder = folder_of(stage, config)
    marker = folder.marker(stage)
    if marker.get("key") != key_of(stage, config):
        return False
    names = marker.get("files", ())
    return all((folder / name).is_file() and not folder.recorded.stale(name) for name in names)


def has_directions(config: RunConfig) -> bool:
    """Whether all that steering needs is made: directions, controls, steering layers."""
    return all(has_run(stage, config) for stage in REQUIRES["04_steer"])


def failed(stage: str, config: RunConfig) -> int:
    """The calls to APIs that failed in a stage and that the next run makes again."""
    return folder_of(stage, config).marker(stage).get("failed", 0)


def pending(stages: Sequence[str], config: RunConfig, *, again: bool = True) -> list[str]:
    """The stages among ``stages`` that are not done, and those they need, in order.

    With ``again`` those that have run, and whose calls failed, are not done.
    """
    wanted = {needed for stage in stages for needed in (*REQUIRES[stage], stage)}
    return [
        stage
        for stage in STAGES
        if stage in wanted and (not has_run(stage, config) or (again and failed(stage, config)))
    ]


def fresh(stage: str, config: RunConfig) -> list[str]:
    """Deletes what a stage left and what rests on it (``--fresh STAGE``); returns the names."""
    if stage == "05_compare":
        folders = _folders(stage, config)
        with ExitStack() as stack:
            for folder in folders:
                stack.enter_context(folder.lock(stage))
            return [name for folder in folders for name in folder.fresh()]
    folder = folder_of(stage, config)
    resting = [one for one in STAGES[:-1] if one == stage or stage in REQUIRES[one]]
    with folder.lock(*resting):
        return folder.fresh_stages({one: _files_of(one, folder) for one in resting})


def renew(stage: str, config: RunConfig) -> None:
    """Clears the folders of the stage that a failed run of another configuration left without
    any row, so that the corrected one can have them. Call it with the stage locked.
    """
    for folder in _folders(stage, config):
        if _holds_nothing(folder) and folder.record()["identity"] != folder.identity:
            folder.fresh()


# -- the first and the last cell of a notebook ---------------------------------------------


def ensure(stage: str, config: RunConfig) -> Folder:
    """The open folder of a stage, after running the earlier notebooks that have not run.

    The first call of every notebook. A notebook opened by hand holds the lock of its stage, and
    shares those of what it reads, until :func:`finish`, the next stage or the end of the
    process. Raises what :func:`prepare` raises, and ``LockedFolder`` where another process
    writes or reads what this stage writes.
    """
    folder = folder_of(stage, config)
    release(folder)
    prepare(stage, config)
    if not os.environ.get(INSIDE):
        _held[folder.path] = ExitStack()
        _held[folder.path].enter_context(folder.lock(stage, reading=REQUIRES[stage]))
        renew(stage, config)
        from stllms.app import preflight  # it brings torch

        if said := preflight.table(preflight.works([(stage, config)])):
            print(said, flush=True)
    folder.open().kept.clear()
    _begun[stage, folder.path] = time.monotonic()
    return folder


def prepare(stage: str, config: RunConfig) -> None:
    """Runs the earlier notebooks that have not run; inside a run of the runner there are none.

    Raises ``ChangedConfiguration`` for a folder of another run, ``StaleArtefact`` and
    ``DamagedFile`` as :func:`check` does, ``ValueError`` for what would stop the run later, and
    :class:`StageError` with notebook, cell and reason if one of them fails.
    """
    check(stage, config)
    if os.environ.get(INSIDE):
        return
    from stllms.app import preflight, runner  # both import this module

    preflight.check(config, pending([stage], config, again=False), asked=[stage])
    if missing := pending(REQUIRES[stage], config, again=False):
        print(f"{stage} needs {', '.join(missing)}: running this first", flush=True)
        runner.execute([runner.Job(one, config) for one in missing])
        check(stage, config)  # what it reads may have changed


def release(folder: Folder) -> None:
    """Gives back what :func:`ensure` locked in this process."""
    if held := _held.pop(folder.path, None):
        held.close()


def finish(stage: str, config: RunConfig) -> None:
    """Marks a stage as done and says what it left; the last call of every notebook.

    The marker holds how many calls to APIs failed and will be made again by the next run.
    Raises :class:`StageError` if an artefact that the stage promises is not there.
    """
    folder = folder_of(stage, config).open()
    lacking = [name for name in PROMISED[stage] if not (folder / name).is_file()]
    if lacking:
        raise StageError(f"{stage} is not done: {folder.label} lacks {', '.join(lacking)}")
    begun = _begun.get((stage, folder.path))
    names = folder.kept | set(PROMISED[stage])
    written = sorted(name for name in names if (folder / name).is_file())
    n_failed = _to_call_again(stage, config)
    folder.mark(
        stage,
        {
            "key": key_of(stage, config),
            "files": written,
            "failed": n_failed,
            "finished": now(),
            "seconds": None if begun is None else round(time.monotonic() - begun, 1),
        },
    )
    release(folder)
    print(f"{folder.label}: {listed(written)}")
    if n_failed:
        print(f"{n_failed} calls to an API failed; the next run makes them again")
    if following := STAGES[STAGES.index(stage) + 1 :]:
        print(f"next: {following[0]}")


def _to_call_again(stage: str, config: RunConfig) -> int:
    """The calls to APIs that a stage has left. None is left of a replay, nor to a model that
    gave nothing usable as often as the client asks."""
    models = [one.config for one in members(stage, config)]
    if not any(own.judged or own.entry.source == "api" for own in models):
        return 0
    from stllms.app import preflight

    return sum(work.n_calls for work in preflight.works([(stage, config)]))


def listed(written: Sequence[str]) -> str:
    """The files of a stage in one line, the three files of a figure as one."""
    figures = {Path(name).stem for name in written if name.startswith("figures/")}
    others = [name for name in written if not name.startswith("figures/")]
    drawn = f"figures {', '.join(sorted(figures))}" if figures else ""
    return "; ".join(part for part in (", ".join(others), drawn) if part) or "nothing"
