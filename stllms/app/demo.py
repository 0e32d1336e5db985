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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from IPython import get_ipython
from IPython.display import HTML

from stllms import registry, tasks
from stllms.app import bench as benches
from stllms.app import preflight, stages
from stllms.app.bench import Ask, Bench, Pair
from stllms.config import RunConfig
from stllms.labels import BEHAVIOURS, STEERED
from stllms.plotting import text
from stllms.records import STEERED_KEY, Response, Steered, Task, steered_from_row
from stllms.runs.artifacts import Folder
from stllms.runs.files import BadFile, read_json
from stllms.runs.store import Rows
from stllms.steering import conditions
from stllms.vectors import directions

#: Questions in the list.
LISTED = 30
#: Seconds between two looks at a chain that is being written, at least; and the share of the
#: time of writing that a look may cost.
PAUSE, LOOKING = 0.1, 0.25
#: The entry of the list of questions that stands for a typed one.
OWN = "type a question below"
#: What the box says while it is empty, and the line that then stands for chains.
EMPTY, WAITING = "your question; then click write", "type a question, then click write"
MODELS = (
    "The model of the first cell, and those whose directions are at hand. Another one: "
    'model = "..." in the first cell, a registry name, hub id or folder.'
)
NO_CHAINS = (
    "The questions are in the order of the run: without steered chains of it (notebook 04) "
    "nobody knows on which a push shows. Not every chain changes."
)
#: The controls that an :class:`~stllms.app.bench.Ask` is made of, and their rows in the box.
FIELDS = ("task", "question", "behaviour", "coefficient", "layer", "temperature", "seed")
ROWS = (
    ("model",), ("task",), ("question", "write"), ("behaviour", "coefficient"),
    ("layer", "temperature"), ("seed", "another", "stop"),
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
        ask = replace(ask, task=listed.tasks[0])
        note = f"{listed.picked}{listed.said}"
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
            chain.labelled.segments,
            list(benches.shares(chain)),
            benches.note(chain) if whole else f"{len(chain.response.output_ids)} tokens ...",
        )
        for chain in pair
    ]
    return text.html_panels(panels)


# -- which models --------------------------------------------------------------------------


def at_hand(setup: RunConfig) -> list[str]:
    """The models that can be steered at once, that of ``setup`` first: those whose directions
    ship with the package, and those of the runs in the folder of results that hold directions
    and whose weights are on this machine."""
    shipped = [name for name in registry.MODELS if directions.shipped(name)]
    found = [_model_of(path) for path in sorted(setup.results_folder.glob("*/run.json"))]
    return list(dict.fromkeys([setup.model, *shipped, *filter(None, found)]))


def _model_of(run: Path) -> str | None:
    """The model of a run with directions if it can be loaded here, ``None`` otherwise."""
    if not run.with_name("vectors.safetensors").is_file():
        return None
    try:
        entry = registry.resolve(read_json(run)["configuration"]["model"])
    except (BadFile, KeyError, TypeError, registry.UnknownModel):
        return None
    there = entry.source != "api" and not registry.missing_packages(entry.name)
    if entry.source == "hub":
        there = preflight.in_cache(str(entry.hub_id))
    return entry.name if there and registry.slug(entry.name) == run.parent.name else None


def of(name: str, setup: RunConfig) -> RunConfig:
    """The run of another model that is at hand, with the judge and the folder of ``setup``."""
    judge = "auto" if setup.judge == "grammar" else setup.judge
    kept = ("results", "device", "dtype", "base_url", "max_cost")
    return RunConfig(name, judge=judge, **{one: getattr(setup, one) for one in kept})


# -- which questions -----------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """Questions for one behaviour; ``said`` is a line on what steering did on all of them.

    ``ordered`` says that they come by how far the behaviour moved, most first.
    """

    behaviour: str
    tasks: tuple[Task, ...]
    said: str
    ordered: bool = False

    @property
    def picked(self) -> str:
        """How the first question was picked, and from what."""
        if not self.ordered:
            return ""
        return (
            f"Picked: of {len(self.tasks)} questions the one on which {self.behaviour} moved "
            "most. "
        )


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


def listing(
    bench: Bench, ask: Ask, *, watch: Callable[[list[Response]], Any] | None = None
) -> Listing:
    """The :func:`choices`, those first on which ``ask`` moved the share of its behaviour most.

    "Moved" is in the sense of the coefficient's sign; a chain that broke or has no labels
    comes last. The chains are those of the model's run where notebook 04 has written them;
    those of an embedded model are written now (seconds), and ``watch`` may end that
    (:func:`stllms.app.bench.write`). Without either nothing is reordered.
    """
    listed = choices(bench)
    pairs = _pairs(bench, ask, listed, watch) if ask.coefficient else {}
    if not pairs:
        return Listing(ask.behaviour, tuple(listed), NO_CHAINS)
    moved = {name: _moved(pair, ask) for name, pair in pairs.items()}
    whole = {name for name, pair in pairs.items() if not benches.broke(pair)}
    gain = np.array([moved[one.id] if one.id in whole else np.nan for one in listed])
    order = np.argsort(-gain, kind="stable")  # NaN last
    known = [pairs[one.id] for one in listed if one.id in pairs]
    found = tuple(listed[place] for place in order)
    return Listing(ask.behaviour, found, _said(known, ask), ordered=True)


def _shares(pair: Pair, ask: Ask) -> list[float]:
    """The behaviour's share in the plain and in the steered chain; NaN without labels."""
    place = BEHAVIOURS.index(ask.behaviour)
    return [float(benches.shares(chain)[place]) for chain in pair]


def _moved(pair: Pair, ask: Ask) -> float:
    """By how much the behaviour's share moved in the sense of the coefficient's sign."""
    plain, steered = _shares(pair, ask)
    return (steered - plain) * float(np.sign(ask.coefficient))


def _said(pairs: Sequence[Pair], ask: Ask) -> str:
    """On how many questions steering showed, and the mean shares over them."""
    share = np.array([_shares(pair, ask) for pair in pairs])
    known = share[~np.isnan(share).any(1)]
    moved = sum(_moved(pair, ask) > 0 for pair in pairs)
    same = sum(benches.same(pair) for pair in pairs)
    means = " and ".join(f"{mean:.1%}" for mean in known.mean(0)) if len(known) else "n/a"
    verb = "raised" if ask.coefficient > 0 else "lowered"
    return (
        f"Not every chain changes: of {len(pairs)} questions, {ask.coefficient:+g} "
        f"{ask.behaviour} {verb} its share on {moved} and changed no token on {same}. "
        f"Mean share, plain and steered: {means}."
    )


def _pairs(
    bench: Bench, ask: Ask, listed: Sequence[Task], watch: Callable[..., Any] | None
) -> dict[str, Pair]:
    """Pairs of chains by task id: those that notebook 04 left in the run of the bench's
    directions, else of an embedded model new ones."""
    folder, layer = Folder(bench.config), benches.intervention(bench, ask).layer
    steered = (ask.behaviour, layer, float(ask.coefficient), ask.operation)
    sides: tuple[dict[str, Steered], dict[str, Steered]] = ({}, {})
    if bench.origin == folder.label:
        for row in Rows(folder.steered, STEERED_KEY).load():
            condition = tuple(row[name] for name in STEERED_KEY[1:])
            if condition in (conditions.plain().key("")[1:], steered) and row["annotation"]:
                sides[condition == steered][row["task_id"]] = steered_from_row(row)
    stored = {name: (sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]}
    if stored or not bench.config.embedded:
        return stored
    pairs = benches.write_all(bench, ask, listed, watch=watch)
    return {one.id: pair for one, pair in zip(listed, pairs, strict=True)}


# -- the widgets ---------------------------------------------------------------------------


class _Changed(BaseException):
    """The chain under way is not wanted any more: no error, and none that is shown."""


class Demo:
    """The widgets: ``box`` is shown, ``view`` holds the chains, ``status`` one line, ``hint`` a
    line on what steering does on all questions of the list.

    ``controls`` are the model, those of :data:`FIELDS`, and three buttons. Chains are written
    on a thread of their own, so that sliders stay alive, one pair at a time. **A change cancels
    the chain under way** within one token and starts again with the newest settings: nothing
    queues. What a change of the model or of the behaviour needs (another bench, another order
    of the questions) is made on the same thread.
    """

    def __init__(self, bench: Bench, ask: Ask, listed: Listing | None = None) -> None:
        self.bench = bench
        self.view, self.status, self.hint = (ipywidgets.HTML() for _ in range(3))
        self.controls = _controls(at_hand(bench.config), bench.config.model)
        rows = [ipywidgets.HBox([self.controls[name] for name in row]) for row in ROWS]
        hint = ipywidgets.HBox([self.hint])
        self.box = ipywidgets.VBox([*rows, hint, self.status, self.view])
        self._benches = {bench.config.model: bench}
        self._lock = threading.Lock()
        self._number = 0  # of the newest request
        self._wanted: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._listed = ""  # the behaviour that the list is ordered by
        self._own = threading.local()  # whether this thread is setting controls itself
        self._fit(ask, listed or Listing("", tuple(choices(bench)), ""))
        for name in ("model", *FIELDS):
            self.controls[name].observe(self._changed, names="value")
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
        return {name: self.controls[name].value for name in ("model", *FIELDS)}

    @contextmanager
    def _setting(self) -> Iterator[None]:
        """What this thread does to the controls inside is no request."""
        self._own.setting = True
        try:
            yield
        finally:
            self._own.setting = False

    def _changed(self, change: dict[str, Any]) -> None:
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
                controls["layer"].value = self.bench.layer_of(new)
                controls["coefficient"].value = self.bench.coefficient_of(new)
        self.request()

    def _another(self, _: Any) -> None:
        self.controls["seed"].value += 1

    def _cancel(self, line: str, view: str | None = None) -> None:
        with self._lock:
            self._number += 1
            self._wanted = None
        self._tell(self._number, line, view)

    # What follows from it, on either thread.

    def _fit(self, ask: Ask, listed: Listing) -> None:
        """The controls for this bench, with the values of ``ask``."""
        bench, controls = self.bench, self.controls
        self._list(listed, ask.task)
        most = max(2.0, abs(ask.coefficient), *map(abs, bench.coefficients.values()))
        warmth, last = bench.config.settings.temperature, bench.model.n_layers - 1
        with self._setting():
            controls["question"].value = ask.task.content
            controls["behaviour"].value = ask.behaviour
            _slide(controls["coefficient"], -most, most, ask.coefficient)
            _slide(controls["layer"], 0, last, bench.layer_of(ask.behaviour))
            _slide(controls["temperature"], 0, max(1.5, warmth), warmth)
            controls["seed"].value = bench.config.seed

    def _list(self, listed: Listing, chosen: Task | str) -> None:
        """The questions in the order of ``listed``; ``chosen`` stays chosen."""
        numbered = enumerate(listed.tasks, 1)
        options = [(f"{n}. {_short(one.content)}", one) for n, one in numbered]
        self._listed = listed.behaviour
        self.hint.value = text.html_line(listed.said) if listed.said else ""
        control = self.controls["task"]
        with self._setting(), control.hold_sync():
            control.options = [*options, (OWN, OWN)]
            control.value = chosen if chosen in listed.tasks else OWN

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
                self._try(number, values)

    def _try(self, number: int, values: dict[str, Any]) -> None:
        try:
            if values["model"] != self.bench.config.model:
                values = self._take(number, values)
            ask = _ask(values)
            self._write(number, ask)
            if self._listed != ask.behaviour:
                self._order(number, ask)
        except Exception as error:  # the edge of the thread: all of it is shown
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._tell(number, f"{kind}{error}", "", wrong=True)

    def _take(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        """Takes another model: its bench, its questions; returns the settings that fit it."""
        name = values["model"]
        self._tell(number, f"loading {registry.resolve(name).display} ...", "")
        if name not in self._benches:
            self._benches[name] = benches.bench(of(name, self.bench.config))
        bench = self._benches[name]
        there = bench.directions.behaviours
        behaviour = next(one for one in (values["behaviour"], *STEERED, *there) if one in there)
        ask = Ask(choices(bench, 1)[0], behaviour, bench.coefficient_of(behaviour))
        listed = listing(bench, ask, watch=lambda _: self._check(number))
        with self._lock:
            self._check(number)
            self.bench = bench
            self._fit(replace(ask, task=listed.tasks[0]), listed)
            return self._values()

    def _order(self, number: int, ask: Ask) -> None:
        """Orders the questions for another behaviour; the chosen one stays."""
        usual = self.bench.coefficient_of(ask.behaviour)
        pushed = Ask(ask.task, ask.behaviour, usual)
        before, said = self.hint.value, f"by how far {ask.behaviour} moves"
        self.hint.value = text.html_line(f"ordering the questions {said} ...")
        try:
            listed = listing(self.bench, pushed, watch=lambda _: self._check(number))
        except BaseException:
            self.hint.value = before
            raise
        with self._lock:
            self._check(number)
            self._list(listed, self.controls["task"].value)

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
    given = {name: values[name] for name in FIELDS[2:]}
    own = values["task"] is OWN
    return Ask(task=benches.task(values["question"]) if own else values["task"], **given)


def _short(line: str) -> str:
    """A question in a line of the list."""
    line = " ".join(line.split())
    return line if len(line) <= 80 else f"{line[:79]}…"


def _slide(slider: ipywidgets.Widget, low: float, high: float, value: float) -> None:
    """New bounds and a value, checked together."""
    with slider.hold_trait_notifications():
        slider.min, slider.max, slider.value = low, high, value


def _controls(models: list[str], model: str) -> dict[str, ipywidgets.Widget]:
    """The widgets of the model and of :data:`FIELDS`, and three buttons."""
    names = [*STEERED, *(name for name in BEHAVIOURS if name not in STEERED)]
    shown = [(registry.resolve(name).display, name) for name in models]
    late = {"continuous_update": False}
    half, wide, small = (
        {"layout": ipywidgets.Layout(width=width)} for width in ("318px", "640px", "auto")
    )
    controls = {
        "model": ipywidgets.Dropdown(options=shown, value=model, tooltip=MODELS, **half),
        "task": ipywidgets.Dropdown(options=[(OWN, OWN)], **wide),
        "question": ipywidgets.Textarea(rows=3, placeholder=EMPTY, **late, **wide),
        "behaviour": ipywidgets.Dropdown(options=names, **half),
        "coefficient": ipywidgets.FloatSlider(step=0.25, **late, **half),
        "layer": ipywidgets.IntSlider(**late, **half),
        "temperature": ipywidgets.FloatSlider(step=0.05, **late, **half),
        "seed": ipywidgets.BoundedIntText(min=0, max=2**31, **half),
    }
    for name, control in controls.items():
        control.description = name
        control.style.description_width = "84px"
    buttons = {"write": "pencil", "another": "refresh", "stop": "stop"}
    said = {"another": "another seed"}
    return controls | {
        name: ipywidgets.Button(description=said.get(name, name), icon=icon, **small)
        for name, icon in buttons.items()
    }
