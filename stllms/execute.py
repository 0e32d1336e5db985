"""Notebooks through papermill: one line of progress, this interpreter, a report of a failure.

Used by :mod:`stllms.run` only; papermill is imported when something is to be done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from stllms import pipeline, progress, providers
from stllms.config import RunConfig
from stllms.pipeline import StageError
from stllms.terminal import plain

if TYPE_CHECKING:
    from stllms.estimate import Work

#: Lines of the failing cell and of its error that are shown.
HEAD, TAIL = 5, 8

#: Seconds between two looks at what the kernel has done, and between two plain lines.
LOOK, PLAIN = 0.5, 30.0

#: Chains after which the speed of a model is known well enough to be told.
MEASURED = 100


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


class Screen:
    """What a person sees of a run on ``stream``: which notebook and cell, what is done there.

    In a terminal one line, drawn twice a second; elsewhere (CI, nohup) a plain line every
    :data:`PLAIN` seconds and one when a notebook begins; nothing where ``quiet``. A thread
    of its own looks into the file ``channel``, in which kernels say how far they are.
    """

    def __init__(
        self,
        channel: Path,
        works: Sequence[Work] = (),
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.channel, self.works = channel, works
        self._stream = stream or sys.stderr
        self.kind = "quiet" if quiet else "line" if self._stream.isatty() else "plain"
        self._title, self._job = "", None
        self._done = self._cells = 0
        self._begun = self._printed = time.monotonic()
        self._told: set[str] = set()
        self._closed = threading.Event()
        self._line = tqdm(
            bar_format="{desc}",
            file=self._stream,
            disable=self.kind != "line",
            ncols=1000,  # our lines are cut already, and a terminal may say
            nrows=20,  # that it has no size
            leave=False,
        )
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Screen:
        if self.kind != "quiet":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._line.close()

    def begin(self, job: Job, cells: int, place: str) -> None:
        """A notebook of so many cells begins; ``place`` is "2 of 5"."""
        self.channel.write_text("", encoding="utf-8")
        self._job, self._title = job, job.title
        self._done, self._cells = 0, cells
        self._begun = self._printed = time.monotonic()
        if self.kind == "plain":
            self.say(f"{place}: {job.title}", self._stream)

    def say(self, text: str, stream: TextIO | None = None) -> None:
        """Prints a line above the one that is drawn."""
        stream = stream or sys.stdout
        tqdm.write(text, file=stream)
        stream.flush()

    def line(self, width: int | None = None) -> str:
        """What is going on, in one line of at most ``width`` characters."""
        at = min(max(1, self._done), self._cells)  # papermill has added a cell near the top
        head = f"{self._title}, cell {at}/{self._cells}: "
        state = progress.read(self.channel)
        if state is None or state.ended:
            return f"{head}{progress.clock(time.monotonic() - self._begun)} in this cell"
        return head + state.text(None if width is None else max(20, width - len(head)))

    # What papermill takes for its own progress bar, one a notebook.

    def update(self, cells: int) -> None:
        """So many more cells are done."""
        self._done += cells
        self._begun = time.monotonic()

    def set_description(self, _text: str) -> None:
        """The line names the notebook and what is under way, not the cell."""

    def close(self) -> None:
        """The screen is that of all notebooks of the run."""

    @property
    def cells(self) -> int:
        """The cells that are done, with the one that papermill added."""
        return self._done

    def _watch(self) -> None:
        while not self._closed.wait(LOOK):
            self.look()

    def look(self) -> None:
        """Draws or prints what is due now, and tells a speed that is new."""
        if self._job is None:
            return
        self._tell_speed(self._job)
        now = time.monotonic()
        if self.kind == "line":
            width = shutil.get_terminal_size().columns - 1
            self._line.set_description_str(self.line(width)[:width])
        elif self.kind == "plain" and now - self._printed >= PLAIN:
            self._printed = now
            self.say(self.line(), self._stream)

    def _tell_speed(self, job: Job) -> None:
        """Once a model: how long its other chains will take, when some have been written."""
        state, model = progress.read(self.channel), job.config.model
        if state is None or model in self._told or job.stage == "05_compare":
            return
        if state.most is None or not state.rate or not state.made:
            return  # it writes no chains, or has just begun
        if state.made < MEASURED and not state.ended:
            return
        self._told.add(model)
        later = pipeline.STAGES[pipeline.STAGES.index(job.stage) :]
        mine = [w for w in self.works if w.model == model and w.stage in later]
        rest = sum(work.chains for work in mine) - state.made
        if rest > 0:
            mean = state.tokens / state.made
            up_to = "up to " if any(work.at_most for work in mine) else ""
            takes = progress.words(rest * mean / state.rate)
            self.say(
                f"{model}: at {state.rate:,.0f} tokens/s and {mean:.0f} tokens a chain, "
                f"{up_to}{rest:,} chains still to write take about {takes}"
            )


class _Estimates:
    """What papermill takes for the file of a notebook's output: shows the lines that say what
    an API will cost, above the line of progress, before the first call is sent."""

    def __init__(self, screen: Screen) -> None:
        self._rest, self._screen = "", screen

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if pipeline.ESTIMATE.match(line):
                self._screen.say(plain(line))

    def flush(self) -> None:
        """Every whole line is shown as it comes."""


def shown(path: Path) -> str:
    """A path for people in a terminal: from the working directory where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def execute(jobs: Sequence[Job], *, quiet: bool = False) -> None:
    """Runs the notebooks one after the other and stops at the first failure.

    Executed copies go to ``notebooks/`` of the run's folder. All parameters are checked
    first; each stage is locked while it runs. Unless ``quiet``, what there is to do is
    estimated first and shown. Raises ``ValueError`` for a parameter a notebook does not have,
    ``LockedFolder``, :class:`StageError` that names the notebook, the cell and the error, and
    ``KeyboardInterrupt`` that says what is kept.
    """
    cells = {job: _check_parameters(job) for job in jobs}
    for job in jobs:
        with _lock(job):
            """Is it free? Refused before the first notebook, not in the middle of the run."""
    with ExitStack() as stack:
        works = [] if quiet else _estimated(jobs)
        channel = stack.enter_context(_own_kernel(quiet=quiet))
        screen = stack.enter_context(Screen(channel, works, quiet=quiet))
        for number, job in enumerate(jobs, 1):
            screen.begin(job, cells[job], f"{number} of {len(jobs)}")
            with _lock(job):
                # An earlier one may have changed its input.
                pipeline.check(job.stage, job.config)
                try:
                    _execute(job, screen)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(_interrupted(job)) from None
            if not pipeline.has_run(job.stage, job.config):
                raise StageError(f"{job.title}: the notebook does not end with run.finish")


def _estimated(jobs: Sequence[Job]) -> list[Work]:
    """Prints what the notebooks have to do, before the first one begins."""
    from stllms import estimate  # it brings torch

    works = estimate.works([(job.stage, job.config) for job in jobs])
    print(estimate.table(works), flush=True)
    return works


def _interrupted(job: Job) -> str:
    """Where a run was stopped, and what is kept."""
    names = [name for name in pipeline.RESUMED[job.stage] if name.endswith(".jsonl")]
    own = pipeline.folder_of(job.stage, job.config)
    paths = [own / name for name in names]
    if job.stage == "05_compare":
        paths = [own.member(model).responses for model in job.config.models]
    rows = [
        f"{len(path.read_bytes().splitlines()):,} rows of {shown(path)}"
        for path in paths
        if path.is_file()
    ]
    kept = ", ".join(["the notebooks before it", *rows])
    return f"interrupted in {job.title}; kept: {kept}"


def _lock(job: Job) -> AbstractContextManager[None]:
    """The lock of what a notebook writes, shared with others for what it reads."""
    folder = pipeline.folder_of(job.stage, job.config)
    return folder.lock(job.stage, reading=pipeline.REQUIRES[job.stage])


def _check_parameters(job: Job) -> int:
    """The number of cells; ``ValueError`` if the notebook lacks a parameter."""
    import papermill

    path = pipeline.notebook(job.stage)
    known = papermill.inspect_notebook(str(path))
    lacking = [name for name in job.config.parameters() if name not in known]
    if lacking:
        raise ValueError(f"{path.name} has no parameter {', '.join(lacking)}")
    return len(json.loads(path.read_text(encoding="utf-8"))["cells"])


def _execute(job: Job, screen: Screen) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    _register()
    pipeline.renew(job.stage, job.config)
    folder = pipeline.folder_of(job.stage, job.config).open()
    source = pipeline.notebook(job.stage)
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
                stdout_file=_Estimates(screen),
                screen=screen,
                log=log,
            )
        except PapermillExecutionError as error:
            trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
            raise StageError(_report(job, error.cell_index, error.source, trace)) from None
        except RuntimeError as error:  # the kernel did not start, or died in a cell
            log.seek(0)
            said = log.read().decode(errors="replace")
            trace = f"{said}\nthe kernel died: {error}"
            raise StageError(_report(job, screen.cells - 1, "", trace)) from None
    failed.replace(copy)


def _register() -> None:
    """An engine that counts its cells on our screen. What a kernel writes to stderr itself
    (an interrupted one: tracebacks of its own machinery) goes to ``log``."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines

    class Ours(Engine):
        @classmethod
        def execute_managed_notebook(
            cls,
            nb_man: Any,
            kernel_name: str,
            *,
            screen: Screen,
            log: IO[bytes],
            stdout_file: _Estimates,
            **_: Any,
        ) -> Any:
            nb_man.pbar = screen
            client = PapermillNotebookClient(
                nb_man, kernel_name=kernel_name, timeout=None, stdout_file=stdout_file
            )
            return client.execute(stderr=log)

    papermill_engines.register("stllms", Ours)


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
def _own_kernel(*, quiet: bool) -> Iterator[Path]:
    """``python3`` is this interpreter, whatever kernels are installed for the user.

    A specification in a temporary folder at the head of ``JUPYTER_PATH`` wins over all
    others. Kernels inherit the environment, thread limits included. Gives the file in which
    they say how far they are; with ``quiet`` that of the caller, else the null device.
    """
    names = ("JUPYTER_PATH", pipeline.INSIDE, providers.STARTED, progress.CHANNEL)
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
        heard = old[progress.CHANNEL] or os.devnull  # by who called this runner, or nobody
        channel = Path(heard if quiet else Path(folder) / "progress.json")
        os.environ[progress.CHANNEL] = str(channel)
        try:
            yield channel
        finally:
            for name, value in old.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
