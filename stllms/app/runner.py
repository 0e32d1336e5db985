"""The runner: notebooks 01 to 04 for each model, then 05 once for all of them.

What is done is skipped, another configuration in the same folder is refused, the first failure
stops the run. Notebooks are executed by papermill in a kernel of this interpreter; a line now
and then says how far they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from stllms import terminal
from stllms.app import stages
from stllms.app.stages import STAGES, StageError
from stllms.config import RunConfig
from stllms.runs.artifacts import Folder

#: Lines of a failing cell and of its error that are shown.
HEAD, TAIL = 5, 8
#: Seconds between two looks at what the kernel has done, and between two lines about it.
LOOK, SAY = 0.5, 15.0
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


# -- what is to be run ---------------------------------------------------------------------


def run(
    configs: Sequence[RunConfig],
    *,
    first: str | None = None,
    last: str | None = None,
    fresh: str | None = None,
    quiet: bool = False,
    report: bool = True,
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
    todo = _pending(chosen)
    if todo:
        check_writable(job.folder.path for job in todo)
        for words, some, others in (
            ("done already", chosen, todo),
            ("needed first", todo, chosen),
        ):
            names = [f"{one.stage} {one.config.model}" for one in some if one not in others]
            if names:
                print(f"{words}: {', '.join(names)}")
        execute(todo, quiet=quiet)
        # Those whose directions changed because chains that had failed are now labelled.
        if late := _pending(chosen, again=False):
            execute(late, quiet=quiet)
        for place in _places(chosen):
            print(f"done: {place}")
        for job in dict.fromkeys([*chosen, *todo]):
            if n := stages.failed(*job):
                print(f"{job.stage}: {n} chains failed; the same command asks for them again")
    else:
        print(f"nothing to do: {', '.join(_places(chosen))} complete (--fresh starts again)")
    if report:
        _report(chosen)


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
        for stage in stages.stages_for(config)
        if stage in selected and stage != COMPARE
    ]
    if COMPARE in selected:
        chosen.append(Job(COMPARE, stages.compared(configs)))
    if not chosen:
        names = ", ".join(config.model for config in configs)
        raise ValueError(f"{names}: a model behind an API has only notebook 05")
    return chosen


def _pending(chosen: Sequence[Job], *, again: bool = True) -> list[Job]:
    """What is not done, each with the stages it needs, each once and in order; with ``again``
    what has run and waits for chains that failed counts as not done.
    """
    todo = [
        Job(name, job.config)
        for job in chosen
        for name in stages.pending([job.stage], job.config, again=again)
    ]
    return list(dict.fromkeys(todo))


def _refuse(todo: Sequence[Job], asked: Sequence[str]) -> None:
    """Refuses, before any notebook starts, what would stop one of them."""
    if not todo:
        return
    from stllms.app import preflight  # it brings torch

    for config in dict.fromkeys(job.config for job in todo):
        own = [job.stage for job in todo if job.config == config]
        preflight.check(config, own, asked=asked)


def check_writable(folders: Iterable[Path]) -> None:
    """Makes the folders of the runs; ``ValueError`` for one that cannot be written to."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(folder, os.W_OK) else "no permission to write"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise ValueError(
                f"cannot write runs to {folder} ({reason}): choose another --results"
            )


def _delete(chosen: Sequence[Job], which: str) -> None:
    """``--fresh``: the files of every folder that the run would write to; with a notebook those
    of one stage and of what rests on it.
    """
    if which != "all":
        stage = stages.stage_named(which)
        for config in dict.fromkeys(job.config for job in chosen):
            names = stages.fresh(stage, config)
            others = [name for name in names if not name.startswith("figures/")]
            figures = len(names) - len(others)
            more = f" and {figures} files of figures" if figures else ""
            label = stages.folder_of(stage, config).label
            print(f"deleted in {label}: {', '.join(others) or 'nothing'}{more}")
        return
    for job in chosen:
        if job.stage == COMPARE:
            stages.fresh(*job)
        elif job.folder.path.is_dir():
            with job.folder.lock(*STAGES[:-1]):
                job.folder.fresh()


def shown(path: Path) -> str:
    """A path for people in a terminal: from the working directory where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _places(chosen: Sequence[Job]) -> list[str]:
    return [shown(path) for path in dict.fromkeys(job.folder.path for job in chosen)]


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
    check_writable([folder])
    for path in released.run(published, folder):
        print(path)
    write_ledger(folder, published)
    print(folder / "ledger.csv")


# -- executing -----------------------------------------------------------------------------


def execute(jobs: Sequence[Job], *, quiet: bool = False) -> None:
    """Runs the notebooks one after the other and stops at the first failure.

    Executed copies go to ``notebooks/`` of the run's folder. All parameters are checked
    first; each stage is locked while it runs. Unless ``quiet``, what there is to do is
    estimated first and shown. Raises what :func:`run` raises.
    """
    cells = {job: _check_parameters(job) for job in jobs}
    for job in jobs:
        with job.lock():
            """Is it free? Refused before the first notebook, not in the middle of the run."""
    if not quiet:
        from stllms.app import preflight

        print(preflight.table(preflight.works(jobs, stages.has_directions)), flush=True)
    with _progress(quiet=quiet) as progress:
        for number, job in enumerate(jobs, 1):
            progress.begin(job, cells[job], f"{number} of {len(jobs)}")
            with job.lock():
                stages.check(*job)  # an earlier one may have changed its input
                stages.renew(*job)
                try:
                    _execute(job, progress)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(_interrupted(job)) from None
            if not stages.has_run(*job):
                raise StageError(f"{job.title}: the notebook does not end with stages.finish")


def _check_parameters(job: Job) -> int:
    """The number of cells; ``ValueError`` if the notebook lacks a parameter: papermill would
    only warn.
    """
    import papermill

    path = stages.notebook(job.stage)
    known = papermill.inspect_notebook(str(path))
    lacking = [name for name in job.config.parameters() if name not in known]
    if lacking:
        raise ValueError(f"{path.name} has no parameter {', '.join(lacking)}")
    return len(_cells(job.stage))


def _cells(stage: str) -> list[dict[str, Any]]:
    return json.loads(stages.notebook(stage).read_text(encoding="utf-8"))["cells"]


def _execute(job: Job, progress: Progress) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    _register_engine()
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
                engine_name="stllms",
                progress_bar=False,
                cwd=str(source.parent),
                stdout_file=progress,
                log=log,
            )
        except PapermillExecutionError as error:
            trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
            raise StageError(_failure(job, error.cell_index, error.source, trace)) from None
        except RuntimeError as error:  # the kernel did not start, or died in a cell
            log.seek(0)
            trace = f"{log.read().decode(errors='replace')}\nthe kernel died: {error}"
            raise StageError(_failure(job, progress.done - 1, "", trace)) from None
    failed.replace(copy)


def _register_engine() -> None:
    """An engine of papermill whose kernel is this interpreter, whatever kernels are installed
    for the user, and which counts its cells on our :class:`Progress`. What a kernel writes to
    stderr itself (an interrupted one: tracebacks of its own machinery) goes to ``log``.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, *KERNEL],
            display_name="Python 3",
            language="python",
            env={"PYDEVD_DISABLE_FILE_VALIDATION": "1"},
        )

    class Ours(Engine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man: Any, kernel_name: str, *, stdout_file: Progress, log: IO, **_: Any
        ) -> Any:
            nb_man.pbar = stdout_file
            client = PapermillNotebookClient(
                nb_man,
                kernel_name=kernel_name,
                kernel_manager_class=ThisPython,
                timeout=None,
                stdout_file=stdout_file,
            )
            return client.execute(stderr=log, env=stdout_file.environment)

    papermill_engines.register("stllms", Ours)


def _failure(job: Job, index: int, source: str, trace: str) -> str:
    """Notebook, cell, the head of its source and the last lines of the error."""
    cells = _cells(job.stage)
    tags = [cell.get("metadata", {}).get("tags", ()) for cell in cells]
    parameters = next((i for i, own in enumerate(tags) if "parameters" in own), len(cells))
    if index > parameters:
        index -= 1  # papermill puts a cell of its own behind the parameters
    if not source and 0 <= index < len(cells):
        source = "".join(cells[index]["source"])
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    lines = [line for line in uncoloured.splitlines() if line.strip()]
    return "\n".join(
        [
            f"{job.title} failed in cell {index + 1} of {len(cells)}:",
            *(f"    {line}" for line in source.splitlines()[:HEAD]),
            "with",
            *(f"    {line}" for line in lines[-TAIL:]),
            f"as executed: {shown(job.folder.notebooks / f'{job.stage}.failed.ipynb')}",
        ]
    )


def _interrupted(job: Job) -> str:
    """Where a run was stopped, and what is kept."""
    names = [name for name in stages.RESUMED[job.stage] if name.endswith(".jsonl")]
    paths = [job.folder / name for name in names]
    if job.stage == COMPARE:
        paths = [job.folder.member(model).responses for model in job.config.models]
    rows = [
        f"{len(path.read_bytes().splitlines()):,} rows of {shown(path)}"
        for path in paths
        if path.is_file()
    ]
    kept = ", ".join(["the notebooks before it", *rows])
    return f"interrupted in {job.title}; kept: {kept}"


# -- how far it is -------------------------------------------------------------------------


class Progress:
    """What a person is told of a run: which notebook begins, every :data:`SAY` seconds which
    cell it is in and what is done there, what an API will cost before the first call is sent.

    Kernels write how far they are into the file ``channel`` (:mod:`stllms.terminal`). Stands in
    for papermill's own bar, one a notebook, and for the file of a notebook's output.
    """

    def __init__(self, channel: Path, *, quiet: bool = False) -> None:
        self.channel, self.quiet = channel, quiet
        self._started = str(Path.cwd())  # papermill works in the folder of the notebooks
        self.done = self.cells = 0
        self._job: Job | None = None
        self._rest = ""
        self._begun = self._said = time.monotonic()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a kernel: that of this process, where it was started, and where
        to say how far it is.
        """
        from stllms.models.api import STARTED

        own = {STARTED: self._started, terminal.CHANNEL: str(self.channel)}
        return {**os.environ, **own, stages.INSIDE: str(os.getpid())}

    def begin(self, job: Job, cells: int, place: str) -> None:
        """A notebook of so many cells begins; ``place`` is "2 of 5"."""
        self._job, self.done, self.cells = job, 0, cells
        self._begun = self._said = time.monotonic()
        if str(self.channel) != os.devnull:
            self.channel.write_text("", encoding="utf-8")
        if not self.quiet:
            print(f"{place}: {job.title}", file=sys.stderr, flush=True)

    def look(self) -> None:
        """Says what is due now."""
        if self._job is None:
            return
        state = terminal.read(self.channel)
        now = time.monotonic()
        if now - self._said >= SAY:
            self._said = now
            at = min(max(1, self.done), self.cells)  # papermill has added a cell near the top
            said = f"{terminal.clock(now - self._begun)} in this cell"
            if state is not None and not state.ended:
                said = state.text()
            line = f"{self._job.title}, cell {at}/{self.cells}: {said}"
            print(line, file=sys.stderr, flush=True)

    # What papermill takes for its progress bar.

    def update(self, cells: int) -> None:
        """So many more cells are done."""
        self.done += cells
        self._begun = time.monotonic()

    def set_description(self, _text: str) -> None:
        """Nothing: a line names the notebook and what is under way."""

    def close(self) -> None:
        """Nothing: it serves all notebooks of the run."""

    # What papermill takes for the file of a notebook's output.

    def write(self, text: str) -> None:
        """Shows the lines that say what an API will cost."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if stages.ESTIMATE.match(line):
                print(terminal.plain(line), flush=True)

    def flush(self) -> None:
        """Every whole line is shown as it comes."""


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    """A :class:`Progress` with a thread that looks; where ``quiet``, it says nothing, and
    kernels tell whoever called this runner, or nobody, how far they are.
    """
    if quiet:
        yield Progress(Path(os.environ.get(terminal.CHANNEL) or os.devnull), quiet=True)
        return
    closed = threading.Event()
    with tempfile.TemporaryDirectory(prefix="stllms-") as folder:
        made = Progress(Path(folder) / "progress.json")

        def watch() -> None:
            while not closed.wait(LOOK):
                made.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield made
        finally:
            closed.set()
            thread.join()
