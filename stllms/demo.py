"""Steering to play with: notebook 00, with widgets where somebody can move them.

Widgets run on a thread of their own, so that sliders stay alive while a chain is written. **A
change cancels the chain under way** and starts again with the newest settings: nothing queues.
Without a front end for widgets (papermill, nbconvert, a page that only shows notebooks) the
same call gives one example as plain HTML.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ipywidgets
import numpy as np
from IPython import get_ipython
from IPython.display import HTML

from stllms import coloured, pairs, pipeline, tasks
from stllms.config import RunConfig
from stllms.pairs import Ask, Bench, Pair
from stllms.records import BEHAVIOURS, STEERED, Response, Task

#: Seconds between two looks at a chain that is being written, at least.
PAUSE = 0.1
#: A look may cost this share of the time of writing.
LOOKING = 0.25
#: Tasks in the list, and letters of each.
TASKS, LETTERS = 10, 80
OWN = "type a question below"
#: The controls that :class:`~stllms.pairs.Ask` is made of.
FIELDS = ("task", "question", "behaviour", "coefficient", "layer", "temperature", "seed")


def load(
    model: str = "tiny-thinker",
    profile: str = "default",
    judge: str = "auto",
    results: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Bench:
    """The bench of a notebook's parameters: :func:`stllms.pairs.bench`.

    ``options`` is any other field of :class:`~stllms.config.RunConfig` by name, such as the
    ``max_cost`` of a judge.
    """
    return pairs.bench(
        RunConfig.from_parameters(model, profile, judge, results, options=options)
    )


def choices(bench: Bench, n: int = TASKS) -> list[Task]:
    """Up to ``n`` evaluation tasks, one of every category first."""
    every = tasks.for_run(bench.config, "evaluate")
    first = list({task.category: task for task in reversed(every)}.values())[::-1]
    rest = [task for task in every if task not in first]
    return (first + rest)[:n]


def show(
    bench: Bench,
    question: str | None = None,
    behaviour: str = "backtracking",
    coefficient: float = 1.0,
    *,
    widgets: bool | None = None,
) -> ipywidgets.Widget | HTML:
    """The demo as widgets, or one example as HTML.

    Args:
        question: to begin with. ``None``: the first of :func:`choices` for the widgets,
            :func:`showcase` for the example.
        widgets: ``None`` asks :func:`live`.
    """
    task = choices(bench, 1)[0] if question is None else pairs.task(question)
    ask = Ask(task, behaviour, coefficient)
    if live() if widgets is None else widgets:
        return Demo(bench, ask).request().box
    return showcase(bench, ask) if question is None else example(bench, ask)


def live() -> bool:
    """Whether a front end with widgets sent the running cell.

    JupyterLab, Notebook and VS Code name the cell in the request; papermill, nbconvert and
    nbval do not. Colab is known by its module.
    """
    shell = get_ipython()
    if os.environ.get(pipeline.INSIDE) or getattr(shell, "kernel", None) is None:
        return False
    return "google.colab" in sys.modules or "cellId" in shell.get_parent().get("metadata", {})


def example(bench: Bench, ask: Ask) -> HTML:
    """One pair of chains, written at once; raises what :func:`stllms.pairs.write` raises."""
    return _page(ask.task, pairs.write(bench, ask))


def showcase(bench: Bench, ask: Ask) -> HTML:
    """The one of :func:`choices` on which the behaviour moved most, and the mean over all.

    "Most" is in the sense of the coefficient's sign. A hand-picked example by rule: the line
    below it says so, and what all of them show together.
    """
    listed = choices(bench)
    made = pairs.write_all(bench, ask, listed)
    place = BEHAVIOURS.index(ask.behaviour)
    share = np.array([[pairs.shares(chain)[place] for chain in pair] for pair in made])
    moved = np.nan_to_num((share[:, 1] - share[:, 0]) * np.sign(ask.coefficient), nan=-1.0)
    best = int(moved.argmax())
    known = share[~np.isnan(share).any(1)]
    means = " and ".join(f"{mean:.1%}" for mean in known.mean(0)) if len(known) else "n/a"
    said = (
        f"Picked: of {len(listed)} questions the one on which {ask.behaviour} moved most. "
        f"Mean share over {len(known)} of them, plain and steered: {means}."
    )
    return _page(listed[best], made[best], said)


def _page(task: Task, pair: Pair, note: str = "") -> HTML:
    question = coloured.html(task.content, (), "question")
    return HTML(question + render(pair) + (coloured.html_line(note) if note else ""))


def render(pair: Pair, *, whole: bool = True) -> str:
    """Shares and chains of a pair as HTML; ``whole=False`` while it is being written."""
    panels = [
        coloured.Panel(
            pairs.title(chain),
            chain.response.thinking.rstrip("\ufffd"),  # half of a character, for now
            chain.annotation.segments,
            pairs.shares(chain),
            pairs.note(chain) if whole else f"{len(chain.response.output_ids)} tokens ...",
        )
        for chain in pair
    ]
    return coloured.html_panels(panels)


class _Changed(BaseException):
    """The chain under way is not wanted any more: no error, and none that is shown."""


class Demo:
    """The widgets: ``box`` is shown, ``view`` holds the chains, ``status`` one line.

    ``controls`` are by the field of :class:`~stllms.pairs.Ask` they set, and two buttons. One
    pair is written at a time; :meth:`request` cancels it within one token.
    """

    def __init__(self, bench: Bench, ask: Ask) -> None:
        self.bench = bench
        self.view, self.status = ipywidgets.HTML(), ipywidgets.HTML()
        self.controls = _controls(bench, ask)
        self.box = _arranged(self.controls, self.status, self.view)
        self._lock = threading.Lock()
        self._number = 0  # of the newest request
        self._wanted: Ask | None = None
        self._thread: threading.Thread | None = None
        self._settling = False
        for name in FIELDS:
            self.controls[name].observe(self._moved, names="value")
        self.controls["another"].on_click(self._another)
        self.controls["stop"].on_click(self.stop)

    def ask(self) -> Ask:
        """The settings as they are; ``ValueError`` for an empty question."""
        values = {name: self.controls[name].value for name in FIELDS}
        chosen, question = values.pop("task"), values.pop("question")
        return Ask(task=pairs.task(question) if chosen is OWN else chosen, **values)

    def request(self) -> Demo:
        """Cancels what is being written and writes what the controls say; returns itself."""
        try:
            ask = self.ask()
        except ValueError as error:
            self._cancel(coloured.html_line(str(error), wrong=True))
            return self
        with self._lock:
            self._number += 1
            self._wanted = ask
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        return self

    def stop(self, _: Any = None) -> None:
        """Cancels what is being written; what is there stays."""
        self._cancel(coloured.html_line("stopped"))

    def wait(self) -> None:
        """Returns when nothing is being written (for scripts and tests)."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _moved(self, change: dict[str, Any]) -> None:
        """A control has a new value: those that go with it follow, then a new pair."""
        if self._settling:
            return
        self._settling = True
        owner, new = change["owner"], change["new"]
        if owner is self.controls["task"]:
            self.controls["question"].value = "" if new is OWN else new.content
        elif owner is self.controls["question"]:
            listed = [task for _, task in self.controls["task"].options if task is not OWN]
            same = (task for task in listed if task.content == new)
            self.controls["task"].value = next(same, OWN)
        elif owner is self.controls["behaviour"]:
            self.controls["layer"].value = pairs.layer_of(self.bench, new)
        self._settling = False
        self.request()

    def _another(self, _: Any = None) -> None:
        self.controls["seed"].value += 1

    def _cancel(self, line: str) -> None:
        with self._lock:
            self._number += 1
            self._wanted = None
            self.status.value = line

    # -- the thread that writes ----------------------------------------------------------

    def _work(self) -> None:
        """The newest request, until there is none."""
        while True:
            with self._lock:
                number, ask, self._wanted = self._number, self._wanted, None
                if ask is None:
                    self._thread = None
                    return
            with suppress(_Changed):
                self._try(number, ask)

    def _try(self, number: int, ask: Ask) -> None:
        try:
            self._write(number, ask)
        except Exception as error:  # the edge of the thread: all of it is shown
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._tell(number, coloured.html_line(f"{kind}{error}", wrong=True))

    def _write(self, number: int, ask: Ask) -> None:
        """Streams a pair into the view."""
        self._tell(number, coloured.html_line("writing ..."))
        preview = self.bench.preview
        began = next_look = time.monotonic()

        def watch(made: list[Response]) -> None:
            nonlocal next_look
            if number != self._number:
                raise _Changed
            now = time.monotonic()
            if now >= next_look:
                pair = pairs.label(self.bench, ask, made, preview)[0]
                self.view.value = render(pair, whole=False)
                cost = time.monotonic() - now
                next_look = time.monotonic() + max(PAUSE, cost / LOOKING)

        pair = pairs.write(self.bench, ask, watch=watch)
        seconds = time.monotonic() - began
        tokens = sum(len(chain.response.output_ids) for chain in pair)
        said = f"{tokens} tokens in {seconds:.1f} s; labels: {self.bench.annotator.name}"
        self._tell(number, coloured.html_line(said), render(pair))

    def _tell(self, number: int, line: str, view: str | None = None) -> None:
        """Shows something of request ``number``; raises if there is a newer one."""
        with self._lock:
            if number != self._number:
                raise _Changed
            self.status.value = line
            if view is not None:
                self.view.value = view


def _controls(bench: Bench, ask: Ask) -> dict[str, ipywidgets.Widget]:
    """The widgets of :data:`FIELDS`, with the values of ``ask``, and two buttons."""
    listed = choices(bench)
    options = [(f"{n}. {_short(task.content)}", task) for n, task in enumerate(listed, 1)]
    chosen = ask.task if ask.task in listed else OWN
    names = [*STEERED, *(name for name in BEHAVIOURS if name not in STEERED)]
    layer, last = pairs.layer_of(bench, ask.behaviour), bench.model.n_layers - 1
    most, warmth = max(2.0, abs(ask.coefficient)), bench.config.settings.temperature
    later = {"continuous_update": False}
    half = {"layout": ipywidgets.Layout(width="318px")}
    slider, whole = ipywidgets.FloatSlider, ipywidgets.IntSlider
    made = {
        "task": ipywidgets.Dropdown(options=[*options, (OWN, OWN)], value=chosen),
        "question": ipywidgets.Textarea(ask.task.content, rows=3, **later),
        "behaviour": ipywidgets.Dropdown(options=names, value=ask.behaviour, **half),
        "coefficient": slider(ask.coefficient, min=-most, max=most, step=0.25, **later, **half),
        "layer": whole(layer, min=0, max=last, **later, **half),
        "temperature": slider(warmth, min=0, max=max(1.5, warmth), step=0.05, **later, **half),
        "seed": ipywidgets.BoundedIntText(bench.config.seed, min=0, max=2**31, **half),
    }
    for name, control in made.items():
        control.description = name
        control.style.description_width = "84px"
    for name in ("task", "question"):
        made[name].layout = ipywidgets.Layout(width="640px")
    made["another"] = ipywidgets.Button(description="another seed", icon="refresh")
    made["stop"] = ipywidgets.Button(description="stop", icon="stop")
    return made


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…"


def _arranged(
    controls: dict[str, ipywidgets.Widget], status: ipywidgets.Widget, view: ipywidgets.Widget
) -> ipywidgets.VBox:
    rows = (
        ("task",),
        ("question",),
        ("behaviour", "coefficient"),
        ("layer", "temperature"),
        ("seed", "another", "stop"),
    )
    lines = [ipywidgets.HBox([controls[name] for name in row]) for row in rows]
    return ipywidgets.VBox([*lines, status, view])
