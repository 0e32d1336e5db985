"""Steering to play with: notebook 00, with widgets where somebody can move them.

Without a front end for widgets (papermill, nbconvert, a page that only shows notebooks) the
same call gives, as plain HTML, the pair that the widgets open on. The questions on which
steering shows come first, by a rule and not by hand (:func:`listing`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML

from stllms import tasks
from stllms.app import bench as benches
from stllms.app import stages
from stllms.app.bench import Ask, Bench, Pair
from stllms.config import RunConfig
from stllms.labels import BEHAVIOURS, STEERED
from stllms.plotting import text
from stllms.records import STEERED_KEY, Response, Steered, Task, steered_from_row
from stllms.runs.artifacts import Folder
from stllms.runs.store import Rows
from stllms.steering import conditions

#: Questions in the list.
LISTED = 30
#: Seconds between two looks at a chain that is being written, at least; and the share of the
#: time of writing that a look may cost.
PAUSE, LOOKING = 0.1, 0.25
#: The entry of the list of questions that stands for a typed one.
OWN = "type a question below"
#: What the box says while it is empty, and the line that then stands for chains.
EMPTY, WAITING = "your question; then click write", "type a question, then click write"
NO_CHAINS = (
    "The questions are in the order of the run: without steered chains of it (notebook 04) "
    "nobody knows on which a push shows. Not every chain changes."
)
#: The controls of the demo, row by row.
ROWS = (
    ("task",), ("question", "write"), ("behaviour", "coefficient"), ("layer", "temperature"),
    ("seed", "another", "stop"),
)  # fmt: skip


def load(
    model: str = "tiny-thinker",
    profile: str = "default",
    judge: str = "auto",
    results: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Bench:
    """The bench of a notebook's parameters: :func:`stllms.app.bench.bench`.

    ``options`` is any other field of :class:`~stllms.config.RunConfig` by name, such as the
    ``max_cost`` of a judge.
    """
    setup = RunConfig.from_parameters(model, profile, judge, results, options=options)
    return benches.bench(setup)


def show(
    bench: Bench,
    question: str | None = None,
    behaviour: str = "backtracking",
    coefficient: float | None = None,
    *,
    widgets: bool | None = None,
) -> ipywidgets.Widget | HTML:
    """The demo as widgets, or the pair they open on as HTML.

    Args:
        question: to begin with. ``None``: that on which steering shows most.
        coefficient: to begin with. ``None``: the one suggested for the behaviour.
        widgets: ``None`` asks :func:`live`.
    """
    if coefficient is None:
        coefficient = bench.coefficient_of(behaviour)
    first = choices(bench, 1)[0] if question is None else benches.task(question)
    ask, listed, note = Ask(first, behaviour, coefficient), None, ""
    if question is None:
        listed = listing(bench, ask)
        ask, note = replace(ask, task=listed.tasks[0]), listed.said
        if listed.ordered:
            picked = f"Picked: of {len(listed.tasks)} questions the one on which {behaviour}"
            note = f"{picked} moved most. {note}"
    if live() if widgets is None else widgets:
        return Demo(bench, ask, listed).request().box
    pair = benches.write(bench, ask)
    lines = [text.html_line(line) for line in (benches.remark(pair), note) if line]
    return HTML(text.html(ask.task.content, (), "question") + render(pair) + "<br>".join(lines))


def live() -> bool:
    """Whether a front end with widgets sent the running cell.

    JupyterLab, Notebook and VS Code name the cell in the request; papermill, nbconvert and
    nbval do not. Colab is known by its module.
    """
    shell = get_ipython()
    if os.environ.get(stages.INSIDE) or getattr(shell, "kernel", None) is None:
        return False
    return "google.colab" in sys.modules or "cellId" in shell.get_parent().get("metadata", {})


def render(pair: Pair, *, whole: bool = True) -> str:
    """Shares and chains of a pair as HTML; ``whole=False`` while it is being written."""
    panels = [
        text.Panel(
            benches.title(chain),
            chain.response.thinking.rstrip("\ufffd"),  # half of a character, for now
            chain.annotation.segments,
            benches.shares(chain),
            benches.note(chain) if whole else f"{len(chain.response.output_ids)} tokens ...",
        )
        for chain in pair
    ]
    return text.html_panels(panels)


# -- which questions -----------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """Questions, and a line on what steering did on all of them. ``ordered`` says that they
    come by how far the behaviour moved, most first."""

    tasks: tuple[Task, ...]
    said: str
    ordered: bool = False


def choices(bench: Bench, n: int = LISTED) -> list[Task]:
    """Up to ``n`` evaluation tasks, one of every category first."""
    options = bench.config.tasks_of("evaluate")
    try:
        every = tasks.select("evaluate", **options)
    except ValueError:  # fewer than notebook 04 would need: enough for a list
        every = tasks.select("evaluate", **{**options, "n": LISTED})
    first = list({task.category: task for task in reversed(every)}.values())[::-1]
    rest = [task for task in every if task not in first]
    return (first + rest)[:n]


def listing(bench: Bench, ask: Ask) -> Listing:
    """The :func:`choices`, those first on which ``ask`` moved the share of its behaviour most.

    "Moved" is in the sense of the coefficient's sign; a chain that broke or has no labels
    comes last. The chains are those of the model's run where notebook 04 has written them;
    those of an embedded model are written now (seconds). Without either nothing is reordered.
    """
    listed = choices(bench)
    pairs = _pairs(bench, ask, listed) if ask.coefficient else {}
    if not pairs:
        return Listing(tuple(listed), NO_CHAINS)
    place, sign = BEHAVIOURS.index(ask.behaviour), np.sign(ask.coefficient)
    # One row a question: the behaviour's share in the plain and in the steered chain.
    share = pd.DataFrame(
        {name: [benches.shares(chain)[place] for chain in pairs[name]] for name in pairs}
    ).T
    moved = sign * (share[1] - share[0])
    broken = [name for name, pair in pairs.items() if benches.broke(pair)]
    gain = moved.drop(broken).reindex([one.id for one in listed])
    order = np.argsort(-gain.to_numpy(), kind="stable")  # NaN last
    found = tuple(listed[place] for place in order)
    here = [one.id for one in listed if one.id in pairs]
    same = sum(benches.same(pairs[name]) for name in here)
    means = share.loc[here].dropna().mean()
    said = (
        f"Not every chain changes: of {len(here)} questions, {ask.coefficient:+g} "
        f"{ask.behaviour} {'raised' if sign > 0 else 'lowered'} its share on "
        f"{sum(moved[here] > 0)} and changed no token on {same}. "
        f"Mean share, plain and steered: {means[0]:.1%} and {means[1]:.1%}."
    )
    return Listing(found, said, ordered=True)


def _pairs(bench: Bench, ask: Ask, listed: Sequence[Task]) -> dict[str, Pair]:
    """Pairs of chains by task id: those that notebook 04 left in the run of the bench's
    directions, else of an embedded model new ones."""
    folder, layer = Folder(bench.config), benches.intervention(bench, ask).layer
    keys = (
        conditions.plain().key("")[1:],
        (ask.behaviour, layer, float(ask.coefficient), ask.operation),
    )
    stored: dict[tuple, Steered] = {}
    if bench.origin == folder.label:
        for row in Rows(folder.steered, STEERED_KEY).load():
            key = tuple(row[name] for name in STEERED_KEY)
            if key[1:] in keys and row["annotation"]:
                stored[key] = steered_from_row(row)
    plain, steered = keys
    pairs = {
        name: (chain, stored[name, *steered])
        for (name, *condition), chain in stored.items()
        if tuple(condition) == plain and (name, *steered) in stored
    }
    if pairs or not bench.config.embedded:
        return pairs
    made = benches.write_all(bench, ask, listed)
    return {one.id: pair for one, pair in zip(listed, made, strict=True)}


# -- the widgets ---------------------------------------------------------------------------


class _Changed(BaseException):
    """The chain under way is not wanted any more: no error, and none that is shown."""


class Demo:
    """The widgets: ``box`` is shown, ``view`` holds the chains, ``status`` one line, and
    ``controls`` those of :data:`ROWS` by name.

    Chains are written on a thread of their own, so that sliders stay alive, one pair at a time.
    **A change cancels the chain under way** within one token and starts again with the newest
    settings: nothing queues.
    """

    def __init__(self, bench: Bench, ask: Ask, listed: Listing | None = None) -> None:
        self.bench = bench
        self.view, self.status = ipywidgets.HTML(), ipywidgets.HTML()
        listed = listed or Listing(tuple(choices(bench)), "")
        self.controls = _controls(bench, ask, listed.tasks)
        rows = [ipywidgets.HBox([self.controls[name] for name in row]) for row in ROWS]
        hint = ipywidgets.HBox([ipywidgets.HTML(text.html_line(listed.said))])
        self.box = ipywidgets.VBox([*rows, hint, self.status, self.view])
        self._lock = threading.Lock()
        self._number = 0  # of the newest request
        self._wanted: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._setting = False  # the demo itself is setting controls
        buttons = {"write": self.request, "another": self._another, "stop": self.stop}
        for name, control in self.controls.items():
            if name in buttons:
                control.on_click(buttons[name])
            else:
                control.observe(self._changed, names="value")

    def ask(self) -> Ask:
        """The settings as they are; ``ValueError`` for an empty question."""
        return _ask(self._values())

    def request(self, _: Any = None) -> Demo:
        """Cancels what is being written and writes what the controls say; returns itself."""
        values = self._values()
        if not values["question"].strip():
            self._cancel(WAITING, "")
            return self
        with self._lock:
            self._number += 1
            self._wanted = values
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        return self

    def stop(self, _: Any = None) -> None:
        """Cancels what is being written; what is there stays."""
        self._cancel("stopped")

    def wait(self) -> None:
        """Returns when nothing is being written (for scripts and tests)."""
        thread = self._thread
        if thread is not None:
            thread.join()

    # What the person does, on the thread of the kernel.

    def _values(self) -> dict[str, Any]:
        controls = self.controls.items()
        return {name: control.value for name, control in controls if hasattr(control, "value")}

    def _changed(self, change: dict[str, Any]) -> None:
        """A control has a new value: those that go with it follow, then a new pair."""
        if self._setting:
            return
        controls, owner, new = self.controls, change["owner"], change["new"]
        self._setting = True
        try:
            if owner is controls["task"]:
                controls["question"].value = "" if new is OWN else new.content
            elif owner is controls["question"]:
                listed = [task for _, task in controls["task"].options if task is not OWN]
                same = (task for task in listed if task.content == new)
                controls["task"].value = next(same, OWN)
            elif owner is controls["behaviour"]:
                controls["layer"].value = self.bench.layer_of(new)
                controls["coefficient"].value = self.bench.coefficient_of(new)
        finally:
            self._setting = False
        self.request()

    def _another(self, _: Any) -> None:
        self.controls["seed"].value += 1

    def _cancel(self, line: str, view: str | None = None) -> None:
        with self._lock:
            self._number += 1
            self._wanted = None
        self._tell(self._number, line, view)

    # The thread that writes.

    def _work(self) -> None:
        """The newest request, until there is none."""
        while True:
            with self._lock:
                number, values, self._wanted = self._number, self._wanted, None
                if values is None:
                    self._thread = None
                    return
            with suppress(_Changed):
                try:
                    self._write(number, _ask(values))
                except Exception as error:  # the edge of the thread: all of it is shown
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    self._tell(number, f"{kind}{error}", "", wrong=True)

    def _write(self, number: int, ask: Ask) -> None:
        """Streams a pair into the view."""
        self._tell(number, "writing ...")
        began = next_look = time.monotonic()

        def watch(responses: list[Response]) -> None:
            nonlocal next_look
            self._check(number)
            now = time.monotonic()
            if now >= next_look:
                pair = benches.label(self.bench, ask, responses, self.bench.preview)[0]
                self.view.value = render(pair, whole=False)
                cost = time.monotonic() - now
                next_look = time.monotonic() + max(PAUSE, cost / LOOKING)

        pair = benches.write(self.bench, ask, watch=watch)
        seconds = time.monotonic() - began
        tokens = sum(len(chain.response.output_ids) for chain in pair)
        said = f"{tokens} tokens in {seconds:.1f} s; labels: {self.bench.annotator.name}"
        remark = benches.remark(pair)
        self._tell(number, f"{said}; {remark}" if remark else said, render(pair))

    def _check(self, number: int) -> None:
        """Raises if there is a newer request."""
        if number != self._number:
            raise _Changed

    def _tell(
        self, number: int, line: str, view: str | None = None, *, wrong: bool = False
    ) -> None:
        """Shows something of request ``number``; raises if there is a newer one."""
        with self._lock:
            self._check(number)
            self.status.value = text.html_line(line, wrong=wrong)
            if view is not None:
                self.view.value = view


def _ask(values: Mapping[str, Any]) -> Ask:
    """What the values of the controls ask for."""
    given = dict(values)
    question = given.pop("question")
    if given["task"] is OWN:
        given["task"] = benches.task(question)
    return Ask(**given)


def _controls(bench: Bench, ask: Ask, tasks: Sequence[Task]) -> dict[str, ipywidgets.Widget]:
    """The widgets of :data:`ROWS` for a bench, with the values of ``ask``."""
    names = [*STEERED, *(name for name in BEHAVIOURS if name not in STEERED)]
    shown = [(f"{n}. {_short(task.content)}", task) for n, task in enumerate(tasks, 1)]
    most = max(2.0, abs(ask.coefficient), *map(abs, bench.coefficients.values()))
    warmth = bench.config.settings.temperature
    late = {"continuous_update": False}
    half, wide, small = (
        {"layout": ipywidgets.Layout(width=width)} for width in ("318px", "640px", "auto")
    )
    controls = {
        "task": ipywidgets.Dropdown(
            options=[*shown, (OWN, OWN)],
            value=ask.task if ask.task in tasks else OWN,
            **wide,
        ),
        "question": ipywidgets.Textarea(
            ask.task.content, rows=3, placeholder=EMPTY, **late, **wide
        ),
        "behaviour": ipywidgets.Dropdown(options=names, value=ask.behaviour, **half),
        "coefficient": ipywidgets.FloatSlider(
            ask.coefficient, min=-most, max=most, step=0.25, **late, **half
        ),
        "layer": ipywidgets.IntSlider(
            bench.layer_of(ask.behaviour), min=0, max=bench.model.n_layers - 1, **late, **half
        ),
        "temperature": ipywidgets.FloatSlider(
            warmth, min=0, max=max(1.5, warmth), step=0.05, **late, **half
        ),
        "seed": ipywidgets.BoundedIntText(bench.config.seed, min=0, max=2**31, **half),
    }
    for name, control in controls.items():
        control.description = name
        control.style.description_width = "84px"
    for name, icon in (("write", "pencil"), ("another", "refresh"), ("stop", "stop")):
        said = "another seed" if name == "another" else name
        controls[name] = ipywidgets.Button(description=said, icon=icon, **small)
    return controls


def _short(line: str) -> str:
    """A question in a line of the list."""
    line = " ".join(line.split())
    return line if len(line) <= 80 else f"{line[:79]}…"
