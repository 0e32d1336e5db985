"""Notebooks through papermill: one progress bar, this interpreter, a report of a failure.

Used by :mod:`stllms.run` only; papermill is imported when something is to be done.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stllms import pipeline, providers
from stllms.config import RunConfig
from stllms.pipeline import StageError
from stllms.terminal import plain

#: Lines of the failing cell and of its error that are shown.
HEAD, TAIL = 5, 8


@dataclass(frozen=True)
class Job:
    """One notebook for one configuration."""

    stage: str
    config: RunConfig

    @property
    def title(self) -> str:
        """``01_generate tiny-thinker``; the models of 05 are too many to name."""
        model = "" if self.stage == "05_compare" else f" {self.config.entry.display}"
        return f"{self.stage}{model}"


class _Bar:
    """What papermill takes for its own progress bar: passes the steps on, never closes."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self.cells = 0

    def update(self, steps: int) -> None:
        self.cells += steps
        self._bar.update(steps)

    def set_description(self, _text: str) -> None:
        """The description names the notebook, not the cell."""

    def close(self) -> None:
        """The bar is shared by all notebooks of the run."""


class _Estimates:
    """What papermill takes for the file of a notebook's output: shows the lines that say what
    an API will cost, above the bar, before the first call is sent."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if pipeline.ESTIMATE.match(line):
                tqdm.write(plain(line), file=sys.stdout)
                sys.stdout.flush()

    def flush(self) -> None:
        """Every whole line is shown as it comes."""


def shown(path: Path) -> str:
    """A path for people in a terminal: from the working directory where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def execute(jobs: Sequence[Job], *, quiet: bool = False) -> None:
    """Runs the notebooks one after the other and stops at the first failure.

    Executed copies go to ``notebooks/`` of the run's folder. All parameters are checked
    first; each stage is locked while it runs. Raises ``ValueError`` for a
    parameter a notebook does not have, ``LockedFolder``, and :class:`StageError` that names
    the notebook, the cell and the error.
    """
    cells = {job: _check_parameters(job) for job in jobs}
    for job in jobs:
        with _lock(job):
            """Is it free? Refused before the first notebook, not in the middle of the run."""
    with ExitStack() as stack:
        stack.enter_context(_own_kernel())
        bar = stack.enter_context(
            tqdm(total=sum(cells.values()), unit="cell", disable=quiet, file=sys.stderr)
        )
        for job in jobs:
            bar.set_description(job.title)
            with _lock(job):
                pipeline.check(
                    job.stage, job.config
                )  # an earlier one may have changed its input
                _execute(job, _Bar(bar))
            if not pipeline.has_run(job.stage, job.config):
                raise StageError(f"{job.title}: the notebook does not end with run.finish")


def _lock(job: Job) -> AbstractContextManager[None]:
    """The lock of what a notebook writes, shared with others for what it reads."""
    folder = pipeline.folder_of(job.stage, job.config)
    return folder.lock(job.stage, reading=pipeline.REQUIRES[job.stage])


def _check_parameters(job: Job) -> int:
    """The number of cells to run; ``ValueError`` if the notebook lacks a parameter."""
    import papermill

    path = pipeline.notebook(job.stage)
    known = papermill.inspect_notebook(str(path))
    lacking = [name for name in job.config.parameters() if name not in known]
    if lacking:
        raise ValueError(f"{path.name} has no parameter {', '.join(lacking)}")
    return len(json.loads(path.read_text(encoding="utf-8"))["cells"]) + 1


def _execute(job: Job, bar: _Bar) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    _register()
    pipeline.renew(job.stage, job.config)
    folder = pipeline.folder_of(job.stage, job.config).open()
    source = pipeline.notebook(job.stage)
    copy, failed = (folder.notebooks / f"{job.stage}{end}.ipynb" for end in ("", ".failed"))
    folder.keep([copy, failed])
    folder.notebooks.mkdir(exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(failed),
            job.config.parameters(),
            kernel_name="python3",
            engine_name="stllms",
            progress_bar=False,
            cwd=str(source.parent),
            stdout_file=_Estimates(),
            bar=bar,
        )
    except PapermillExecutionError as error:
        trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
        raise StageError(_report(job, error.cell_index, error.source, trace)) from None
    except RuntimeError as error:  # the kernel did not start, or died in a cell
        raise StageError(_report(job, bar.cells - 1, "", f"the kernel died: {error}")) from None
    failed.replace(copy)


def _register() -> None:
    """An engine that counts its cells on our bar."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man: Any, kernel_name: str, *, bar: _Bar, **options: Any
        ) -> Any:
            nb_man.pbar = bar
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("stllms", Engine)


def _report(job: Job, index: int, source: str, trace: str) -> str:
    """Notebook, cell, the head of its source and the last lines of the error."""
    cells = json.loads(pipeline.notebook(job.stage).read_text(encoding="utf-8"))["cells"]
    tagged = [
        place
        for place, cell in enumerate(cells)
        if "parameters" in cell.get("metadata", {}).get("tags", ())
    ]
    if tagged and index > tagged[0]:
        index -= 1  # papermill puts a cell of its own behind the parameters
    if not source and 0 <= index < len(cells):
        source = "".join(cells[index]["source"])
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    lines = [line for line in uncoloured.splitlines() if line.strip()]
    copy = pipeline.folder_of(job.stage, job.config).notebooks / f"{job.stage}.failed.ipynb"
    return "\n".join(
        [
            f"{job.title} failed in cell {index + 1} of {len(cells)}:",
            *(f"    {line}" for line in source.splitlines()[:HEAD]),
            "with",
            *(f"    {line}" for line in lines[-TAIL:]),
            f"as executed: {shown(copy)}",
        ]
    )


@contextmanager
def _own_kernel() -> Iterator[None]:
    """``python3`` is this interpreter, whatever kernels are installed for the user.

    A specification in a temporary folder at the head of ``JUPYTER_PATH`` wins over all
    others. Kernels inherit the environment, thread limits included.
    """
    names = ("JUPYTER_PATH", pipeline.INSIDE, providers.STARTED)
    old = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="stllms-") as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        # Without the log level every kernel warns that its sockets on localhost are plain.
        argv = [
            sys.executable,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=ERROR",
        ]
        spec.write_text(
            json.dumps(
                {
                    "argv": argv,
                    "display_name": "Python 3",
                    "language": "python",
                    "env": {"PYDEVD_DISABLE_FILE_VALIDATION": "1"},
                }
            ),
            encoding="utf-8",
        )
        rest = [old["JUPYTER_PATH"]] if old["JUPYTER_PATH"] else []
        os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, *rest])
        os.environ[pipeline.INSIDE] = str(os.getpid())
        os.environ[providers.STARTED] = str(Path.cwd())
        try:
            yield
        finally:
            for name, value in old.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
