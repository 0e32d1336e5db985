"""The widgets of the demo.

They run on a thread of their own, so that sliders stay alive while a chain is written. **A
change cancels the chain under way** and starts again with the newest settings: nothing queues.
What a change of the model or of the behaviour needs (another bench, another order of the
questions) is made on the same thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ipywidgets

from stllms import bench as benches
from stllms import coloured, pairs, questions
from stllms.config import resolve
from stllms.pairs import Ask, Bench, Pair
from stllms.questions import Listing
from stllms.records import BEHAVIOURS, STEERED, Response, Task

#: Seconds between two looks at a chain that is being written, at least.
PAUSE = 0.1
#: A look may cost this share of the time of writing.
LOOKING = 0.25
#: Letters of a question in the list.
LETTERS = 80
OWN = "type a question below"
#: What the box says while it is empty, and the line that then stands for chains.
EMPTY, WAITING = "your question; then click write", "type a question, then click write"
MODELS = (
    "The model of the first cell, and those whose directions are at hand. Another one: "
    'model = "..." in the first cell, a registry name, hub id or folder.'
)
#: The controls that :class:`~stllms.pairs.Ask` is made of.
FIELDS = ("task", "question", "behaviour", "coefficient", "layer", "temperature", "seed")


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
    """The widgets: ``box`` is shown, ``view`` holds the chains, ``status`` one line, ``hint`` a
    line on what the push does on all questions of the list.

    ``controls`` are the model, those of :data:`FIELDS`, and three buttons. One pair is written
    at a time; :meth:`request` cancels it within one token.
    """

    def __init__(self, bench: Bench, ask: Ask, listing: Listing | None = None) -> None:
        self.bench = bench
        self.view, self.status, self.hint = (ipywidgets.HTML() for _ in range(3))
        self.controls = _controls(benches.at_hand(bench.config), bench.config.model)
        self.box = _arranged(self.controls, self.hint, self.status, self.view)
        self._benches = {bench.config.model: bench}
        self._lock = threading.Lock()
        self._number = 0  # of the newest request
        self._wanted: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._listed: str | None = None  # the behaviour that the list is ordered by
        self._own = threading.local()  # whether this thread is setting controls itself
        self._fit(ask, listing)
        for name in ("model", *FIELDS):
            self.controls[name].observe(self._moved, names="value")
        self.controls["write"].on_click(self.request)
        self.controls["another"].on_click(self._another)
        self.controls["stop"].on_click(self.stop)

    def ask(self) -> Ask:
        """The settings as they are; ``ValueError`` for an empty question."""
        return _ask(self._values())

    def request(self, _: Any = None) -> Demo:
        """Cancels what is being written and writes what the controls say; returns itself."""
        values = self._values()
        if values["task"] is OWN and not values["question"].strip():
            self._cancel(coloured.html_line(WAITING), "")
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
        self._cancel(coloured.html_line("stopped"))

    def wait(self) -> None:
        """Returns when nothing is being written (for scripts and tests)."""
        thread = self._thread
        if thread is not None:
            thread.join()

    # -- the controls --------------------------------------------------------------------

    def _values(self) -> dict[str, Any]:
        return {name: self.controls[name].value for name in ("model", *FIELDS)}

    @contextmanager
    def _setting(self) -> Iterator[None]:
        """What this thread does to the controls inside is no request."""
        self._own.setting = True
        try:
            yield
        finally:
            self._own.setting = False

    def _moved(self, change: dict[str, Any]) -> None:
        """A control has a new value: those that go with it follow, then a new pair."""
        if getattr(self._own, "setting", False):
            return
        controls, owner, new = self.controls, change["owner"], change["new"]
        with self._setting():
            if owner is controls["task"]:
                controls["question"].value = "" if new is OWN else new.content
            elif owner is controls["question"]:
                listed = [task for _, task in controls["task"].options if task is not OWN]
                same = (task for task in listed if task.content == new)
                controls["task"].value = next(same, OWN)
            elif owner is controls["behaviour"]:
                controls["layer"].value = pairs.layer_of(self.bench, new)
                controls["coefficient"].value = pairs.coefficient_of(self.bench, new)
        self.request()

    def _another(self, _: Any = None) -> None:
        self.controls["seed"].value += 1

    def _fit(self, ask: Ask, listing: Listing | None) -> None:
        """The controls for this bench, with the values of ``ask``."""
        bench, controls = self.bench, self.controls
        self._list(listing or Listing("", tuple(questions.choices(bench)), ""), ask.task)
        most = max(2.0, abs(ask.coefficient), *map(abs, bench.coefficients.values()))
        warmth = bench.config.settings.temperature
        layer = pairs.layer_of(bench, ask.behaviour)
        with self._setting():
            controls["question"].value = ask.task.content
            controls["behaviour"].value = ask.behaviour
            _slide(controls["coefficient"], -most, most, ask.coefficient)
            _slide(controls["layer"], 0, bench.model.n_layers - 1, layer)
            _slide(controls["temperature"], 0, max(1.5, warmth), warmth)
            controls["seed"].value = bench.config.seed

    def _list(self, listing: Listing, chosen: Task | str) -> None:
        """The questions in the order of ``listing``; ``chosen`` stays chosen."""
        numbered = enumerate(listing.tasks, 1)
        options = [(f"{n}. {_short(task.content)}", task) for n, task in numbered]
        self._listed = listing.behaviour
        self.hint.value = coloured.html_line(listing.said) if listing.said else ""
        control = self.controls["task"]
        with self._setting(), control.hold_sync():
            control.options = [*options, (OWN, OWN)]
            control.value = chosen if chosen in listing.tasks else OWN

    def _cancel(self, line: str, view: str | None = None) -> None:
        with self._lock:
            self._number += 1
            self._wanted = None
            self._show(line, view)

    # -- the thread that writes ----------------------------------------------------------

    def _work(self) -> None:
        """The newest request, until there is none."""
        while True:
            with self._lock:
                number, values, self._wanted = self._number, self._wanted, None
                if values is None:
                    self._thread = None
                    return
            with suppress(_Changed):
                self._try(number, values)

    def _try(self, number: int, values: dict[str, Any]) -> None:
        try:
            if values["model"] != self.bench.config.model:
                values = self._change(number, values)
            ask = _ask(values)
            self._write(number, ask)
            if self._listed != ask.behaviour:
                self._order(number, ask)
        except Exception as error:  # the edge of the thread: all of it is shown
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._tell(number, coloured.html_line(f"{kind}{error}", wrong=True), "")

    def _change(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        """Takes another model: its bench, its questions; returns the settings that fit it."""
        name = values["model"]
        self._tell(number, coloured.html_line(f"loading {resolve(name).display} ..."), "")
        if name not in self._benches:
            self._benches[name] = pairs.bench(benches.of(name, self.bench.config))
        bench = self._benches[name]
        behaviour = _available(bench, values["behaviour"])
        first = questions.choices(bench, 1)[0]
        ask = Ask(first, behaviour, pairs.coefficient_of(bench, behaviour))
        listing = questions.listing(bench, ask, watch=lambda _: self._check(number))
        with self._lock:
            self._check(number)
            self.bench = bench
            self._fit(Ask(listing.tasks[0], behaviour, ask.coefficient), listing)
            return self._values()

    def _order(self, number: int, ask: Ask) -> None:
        """Orders the questions for another behaviour; the chosen one stays."""
        usual = pairs.coefficient_of(self.bench, ask.behaviour)
        pushed = Ask(ask.task, ask.behaviour, usual)
        before, said = self.hint.value, f"by how far {ask.behaviour} moves"
        self.hint.value = coloured.html_line(f"ordering the questions {said} ...")
        try:
            listing = questions.listing(self.bench, pushed, watch=lambda _: self._check(number))
        except BaseException:
            self.hint.value = before
            raise
        with self._lock:
            self._check(number)
            self._list(listing, self.controls["task"].value)

    def _write(self, number: int, ask: Ask) -> None:
        """Streams a pair into the view."""
        self._tell(number, coloured.html_line("writing ..."))
        preview = self.bench.preview
        began = next_look = time.monotonic()

        def watch(made: list[Response]) -> None:
            nonlocal next_look
            self._check(number)
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
        remark = pairs.remark(pair)
        line = f"{said}; {remark}" if remark else said
        self._tell(number, coloured.html_line(line), render(pair))

    def _check(self, number: int) -> None:
        """Raises if there is a newer request."""
        if number != self._number:
            raise _Changed

    def _tell(self, number: int, line: str, view: str | None = None) -> None:
        """Shows something of request ``number``; raises if there is a newer one."""
        with self._lock:
            self._check(number)
            self._show(line, view)

    def _show(self, line: str, view: str | None) -> None:
        self.status.value = line
        if view is not None:
            self.view.value = view


def _ask(values: Mapping[str, Any]) -> Ask:
    """What the values of the controls ask for."""
    given = {name: values[name] for name in FIELDS[2:]}
    own = values["task"] is OWN
    return Ask(task=pairs.task(values["question"]) if own else values["task"], **given)


def _available(bench: Bench, behaviour: str) -> str:
    """The behaviour if the bench has its direction, else the first that it has."""
    there = bench.directions.behaviours
    return next(name for name in (behaviour, *STEERED, *there) if name in there)


def _slide(slider: ipywidgets.Widget, low: float, high: float, value: float) -> None:
    """New bounds and a value; in this order no bound ever passes the other one."""
    slider.min = min(low, slider.min)
    slider.max = high
    slider.value = value
    slider.min = low


def _controls(models: list[str], model: str) -> dict[str, ipywidgets.Widget]:
    """The widgets of the model and of :data:`FIELDS`, and three buttons."""
    names = [*STEERED, *(name for name in BEHAVIOURS if name not in STEERED)]
    shown = [(resolve(name).display, name) for name in models]
    later = {"continuous_update": False}
    half = {"layout": ipywidgets.Layout(width="318px")}
    slider, whole = ipywidgets.FloatSlider, ipywidgets.IntSlider
    made = {
        "model": ipywidgets.Dropdown(options=shown, value=model, tooltip=MODELS, **half),
        "task": ipywidgets.Dropdown(options=[(OWN, OWN)]),
        "question": ipywidgets.Textarea(rows=3, placeholder=EMPTY, **later),
        "behaviour": ipywidgets.Dropdown(options=names, **half),
        "coefficient": slider(step=0.25, **later, **half),
        "layer": whole(**later, **half),
        "temperature": slider(step=0.05, **later, **half),
        "seed": ipywidgets.BoundedIntText(min=0, max=2**31, **half),
    }
    for name, control in made.items():
        control.description = name
        control.style.description_width = "84px"
    for name in ("task", "question"):
        made[name].layout = ipywidgets.Layout(width="640px")
    small = {"layout": ipywidgets.Layout(width="auto")}
    made["write"] = ipywidgets.Button(description="write", icon="pencil", **small)
    made["another"] = ipywidgets.Button(description="another seed", icon="refresh", **small)
    made["stop"] = ipywidgets.Button(description="stop", icon="stop", **small)
    return made


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…"


def _arranged(
    controls: dict[str, ipywidgets.Widget],
    hint: ipywidgets.Widget,
    status: ipywidgets.Widget,
    view: ipywidgets.Widget,
) -> ipywidgets.VBox:
    """Two HTML widgets end the box, the status and the view; the hint is in a row."""
    rows = (
        ("model",),
        ("task",),
        ("question", "write"),
        ("behaviour", "coefficient"),
        ("layer", "temperature"),
        ("seed", "another", "stop"),
    )
    lines = [ipywidgets.HBox([controls[name] for name in row]) for row in rows]
    return ipywidgets.VBox([*lines, ipywidgets.HBox([hint]), status, view])
