"""The runner: notebooks 01 to 04 for each model, then 05 once for all of them.

What is done is skipped, another configuration in the same folder is refused, the first failure
stops the run. Notebooks are executed by papermill in a kernel of this interpreter, in a
notebook that needs earlier ones too; a line now and then says how far they are.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from stllms import terminal
from stllms.app import stages
from stllms.app.stages import STAGES, StageError
from stllms.config import RunConfig
from stllms.runs.artifacts import Folder
from stllms.runs.files import read_json

if TYPE_CHECKING:  # it takes a second
    from jupyter_client.manager import KernelManager

#: Lines of a failing cell and of its error that are shown.
HEAD, TAIL = 5, 8
#: Seconds between two lines about a kernel.
SAY = 15.0
#: A kernel; without the log level it warns that its sockets on localhost are plain.
KERNEL = ("-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}")
#: The notebook that writes into another folder than the others.
COMPARE = STAGES[-1]


class Job(NamedTuple):
    """One notebook for one configuration."""

    stage: str
    config: RunConfig

    @property
    def title(self) -> str:
        """``01_generate tiny-thinker``; the models of 05 are too many to name."""
        model = "" if self.stage == COMPARE else f" {self.config.entry.display}"
        return f"{self.stage}{model}"

    @property
    def folder(self) -> Folder:
        """The folder that it writes to."""
        return stages.folder_of(*self)

    def lock(self) -> AbstractContextManager[None]:
        """The lock of what it writes, shared with others for what it reads."""
        return self.folder.lock(self.stage, reading=stages.REQUIRES[self.stage])


#: What a run of an embedded model says first.
FIXTURE = (
    "{} is a fixture, built to be steerable: it shows that the pipeline works and says nothing "
    "about real models (a real one: --model smol-thinker --profile laptop)"
)

# -- what is to be run ---------------------------------------------------------------------


def run(
    configs: Sequence[RunConfig],
    *,
    first: str | None = None,
    last: str | None = None,
    fresh: str | None = None,
    quiet: bool = False,
) -> None:
    """Runs the notebooks from ``first`` to ``last`` for every configuration.

    ``fresh`` deletes files before: ``"all"`` of every folder, else those of one notebook and of
    what rests on it. ``quiet`` shows neither estimate nor progress. Raises ``ValueError`` for
    what is refused, ``LockedFolder``, :class:`StageError` for a notebook that failed, and
    ``KeyboardInterrupt`` that says what is kept.
    """
    selected = _selected(first, last)
    chosen = _jobs(configs, selected)
    _refuse(chosen if fresh else _pending(chosen), selected)
    if fresh:
        _delete(chosen, fresh)
    for job in chosen:
        stages.check(*job)
    places = [shown(path) for path in dict.fromkeys(job.folder.path for job in chosen)]
    for name in dict.fromkeys(one.model for one in configs if one.embedded and not quiet):
        print(FIXTURE.format(name))
    if todo := _pending(chosen):
        _say("done already", [job for job in chosen if job not in todo])
        _say("needed first", [job for job in todo if job not in chosen])
        execute(todo, quiet=quiet)
        # Those whose directions changed because calls that had failed now gave labels.
        if late := _pending(chosen, again=False):
            execute(late, quiet=quiet)
        for place in places:
            print(f"done: {place}")
        for job in dict.fromkeys([*chosen, *todo]):
            if n := stages.failed(*job):
                print(f"{job.stage}: {n} calls failed; the same command makes them again")
    else:
        print(f"nothing to do: {', '.join(places)} complete (--fresh starts again)")
    _report(chosen)


def _say(words: str, jobs: Sequence[Job]) -> None:
    if jobs:
        print(f"{words}: {', '.join(f'{job.stage} {job.config.model}' for job in jobs)}")


def _selected(first: str | None, last: str | None) -> tuple[str, ...]:
    start = STAGES.index(stages.stage_named(first)) if first else 0
    stop = STAGES.index(stages.stage_named(last)) if last else len(STAGES) - 1
    if start > stop:
        raise ValueError(f"--from {first} comes after --to {last}")
    return STAGES[start : stop + 1]


def _jobs(configs: Sequence[RunConfig], selected: Sequence[str]) -> list[Job]:
    """01-04 for each model, then 05 once. Raises for a model without any such stage."""
    chosen = [
        Job(stage, config)
        for config in configs
        for stage in selected
        if stage != COMPARE and config.entry.source != "api"  # where nothing can be steered
    ]
    if COMPARE in selected:
        chosen.append(Job(COMPARE, stages.compared(configs)))
    if not chosen:
        names = ", ".join(config.model for config in configs)
        raise ValueError(f"{names}: a model behind an API has only notebook 05")
    return chosen


def _pending(chosen: Sequence[Job], *, again: bool = True) -> list[Job]:
    """What is not done, each with the stages it needs, each once and in order; with ``again``
    what has run and has calls that failed counts as not done.
    """
    todo = [
        Job(name, job.config)
        for job in chosen
        for name in stages.pending([job.stage], job.config, again=again)
    ]
    return list(dict.fromkeys(todo))


def _refuse(todo: Sequence[Job], asked: Sequence[str]) -> None:
    """Refuses, before any notebook starts, what would stop one of them."""
    for config in dict.fromkeys(job.config for job in todo):
        from stllms.app import preflight  # it brings torch

        own = [job.stage for job in todo if job.config == config]
        preflight.check(config, own, asked=asked)


def _delete(chosen: Sequence[Job], which: str) -> None:
    """``--fresh``: the files of every folder that the run would write to; with a notebook those
    of one stage and of what rests on it.
    """
    if which != "all":
        stage = stages.stage_named(which)
        for config in dict.fromkeys(job.config for job in chosen):
            gone = stages.listed(stages.fresh(stage, config))
            print(f"deleted in {stages.folder_of(stage, config).label}: {gone}")
        return
    for job in {job.folder.path: job for job in chosen}.values():
        if job.stage == COMPARE:
            stages.fresh(*job)
        else:
            with job.folder.lock(*STAGES[:-1]):
                job.folder.fresh()


def shown(path: Path) -> str:
    """A path for people in a terminal: from the working directory where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _report(chosen: Sequence[Job]) -> None:
    """The report of every model's folder; that of the comparison where there is no other."""
    from stllms.app import report

    own = [job.folder for job in chosen if job.stage != COMPARE]
    for folder in {one.path: one for one in own or [chosen[0].folder]}.values():
        folder.keep([folder / report.NAME])
        print(f"report: {report.write(folder.path)}")


def draw_released(published: str, results: str | None) -> None:
    """``--published`` without a model: its figures, its tables and the ledger, no notebook."""
    from stllms.comparison import released
    from stllms.comparison.ledger import write as write_ledger

    folder = RunConfig(results=results).results_folder
    for path in released.run(published, folder):
        print(path)
    write_ledger(folder, published)
    print(folder / "ledger.csv")


# -- executing -----------------------------------------------------------------------------


def execute(jobs: Sequence[Job], *, quiet: bool = False) -> None:
    """Runs the notebooks one after the other and stops at the first failure.

    Executed copies go to ``notebooks/`` of the run's folder. All parameters are checked
    first; each stage is locked while it runs. Unless ``quiet``, what there is to do is
    estimated first and shown. Works in a notebook too. Raises what :func:`run` raises.
    """
    for job in jobs:
        _check_parameters(job)
        with job.lock():
            """Is it free? Refused before the first notebook, not in the middle of the run."""
    if not quiet:
        from stllms.app import preflight

        if said := preflight.table(preflight.works(jobs)):
            print(said, flush=True)
    for number, job in enumerate(jobs, 1):
        with job.lock(), _progress(job, f"{number} of {len(jobs)}", quiet=quiet) as progress:
            stages.check(*job)  # an earlier one may have changed its input
            stages.renew(*job)
            try:
                _execute(job, progress)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted in {job.title}; what was written is kept"
                ) from None
        if not stages.has_run(*job):
            raise StageError(f"{job.title}: the notebook does not end with stages.finish")


def _check_parameters(job: Job) -> None:
    """``ValueError`` if the notebook lacks a parameter: papermill would only warn."""
    import papermill

    path = stages.notebook(job.stage)
    known = papermill.inspect_notebook(str(path))
    lacking = [name for name in job.config.parameters() if name not in known]
    if lacking:
        raise ValueError(f"{path.name} has no parameter {', '.join(lacking)}")


def _execute(job: Job, progress: Progress) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    folder, source = job.folder.open(), stages.notebook(job.stage)
    copy, failed = (folder.notebooks / f"{job.stage}{end}.ipynb" for end in ("", ".failed"))
    folder.keep([copy, failed])
    folder.notebooks.mkdir(exist_ok=True)
    with tempfile.TemporaryFile() as log:  # what the kernel says besides its outputs
        try:
            papermill.execute_notebook(
                str(source),
                str(failed),
                job.config.parameters(),
                kernel_name="python3",
                kernel_manager_class=_kernel(progress.channel, log),
                resources={"metadata": {"path": str(source.parent)}},
                progress_bar=False,
                on_cell_start=progress.start,
                stdout_file=progress,
            )
        except PapermillExecutionError as error:
            trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
            raise StageError(_failure(progress, trace)) from None
        except RuntimeError as error:  # the kernel did not start, or died in a cell
            log.seek(0)
            trace = f"{log.read().decode(errors='replace')}\nthe kernel died: {error}"
            raise StageError(_failure(progress, trace)) from None
    failed.replace(copy)


def _kernel(channel: Path, log: IO[bytes]) -> type[KernelManager]:
    """Kernels of this interpreter, whatever kernels are installed for the user.

    One knows where it was started, and says in ``channel`` how far it is. What it writes to
    stderr itself (an interrupted one: tracebacks of its own machinery) goes to ``log``.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    from stllms.models.api import STARTED

    environment = {
        **os.environ,
        STARTED: str(Path.cwd()),
        stages.INSIDE: str(os.getpid()),
        terminal.CHANNEL: str(channel),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, *KERNEL], display_name="Python 3", language="python"
        )

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            await super().start_kernel(**options, env=environment, stderr=log)

    return ThisPython


def _failure(progress: Progress, trace: str) -> str:
    """Notebook, cell, the head of its source and the last lines of the error."""
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    lines = [line for line in uncoloured.splitlines() if line.strip()]
    job = progress.job
    return "\n".join(
        [
            f"{job.title} failed in cell {progress.at} of {progress.cells}:",
            *(f"    {line}" for line in progress.source.splitlines()[:HEAD]),
            "with",
            *(f"    {line}" for line in lines[-TAIL:]),
            f"as executed: {shown(job.folder.notebooks / f'{job.stage}.failed.ipynb')}",
        ]
    )


# -- how far it is -------------------------------------------------------------------------


class Progress:
    """How far a kernel is: the cell that it is in (``at``, from 1), its source, and what it
    says of itself in the file ``channel`` (:mod:`stllms.terminal`).

    Papermill takes it for the file of the notebook's output.
    """

    def __init__(self, job: Job, channel: Path) -> None:
        self.job, self.channel = job, channel
        self.cells = len(read_json(stages.notebook(job.stage))["cells"])
        self.at, self.source, self._rest = 0, "", ""
        self._begun = time.monotonic()

    def start(self, cell: Any, **_: Any) -> None:
        """A cell begins; the one that papermill adds for the parameters does not count."""
        self.at += "injected-parameters" not in cell.metadata.get("tags", ())
        self.source, self._begun = cell.source, time.monotonic()

    def __str__(self) -> str:
        state = terminal.read(self.channel)
        said = f"{terminal.clock(time.monotonic() - self._begun)} in this cell"
        if state is not None and not state.ended:
            said = state.text()
        return f"{self.job.title}, cell {max(1, self.at)}/{self.cells}: {said}"

    def write(self, text: str) -> None:
        """Shows the lines that say what an API will cost."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if stages.ESTIMATE.match(line):
                print(terminal.plain(line), flush=True)

    def flush(self) -> None:
        """Every whole line is shown as it comes."""


@contextmanager
def _progress(job: Job, place: str, *, quiet: bool) -> Iterator[Progress]:
    """The progress of one kernel, the ``place`` ("2 of 5") of the run. Unless ``quiet``, a line
    says that it begins, and every :data:`SAY` seconds one how far it is.
    """
    closed = threading.Event()
    with tempfile.TemporaryDirectory(prefix="stllms-") as folder:
        progress = Progress(job, Path(folder) / "progress.json")

        def say() -> None:
            while not quiet and not closed.wait(SAY):
                print(progress, file=sys.stderr, flush=True)

        if not quiet:
            print(f"{place}: {job.title}", file=sys.stderr, flush=True)
        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            closed.set()
            thread.join()
