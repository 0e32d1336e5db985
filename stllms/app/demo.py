"""Steering to play with: notebook 00, with widgets where somebody can move them.

Without a front end for widgets (papermill, nbconvert, a page that only shows notebooks) the
same call gives, as static HTML, the pair that the widgets open on. The questions on which
steering shows come first, by a rule and not by hand (:func:`listing`).
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML

from stllms import registry, tasks
from stllms.annotation import annotators
from stllms.app import bench as benches
from stllms.app import stages
from stllms.app.bench import Ask, Bench, Pair
from stllms.config import RunConfig
from stllms.labels import PAPER, LabelSet
from stllms.plotting import text
from stllms.records import STEERED_KEY, Response, Task, steered_from_row
from stllms.runs.artifacts import Folder
from stllms.runs.store import Rows
from stllms.vectors import reading

#: The model that the demo opens on where it can be loaded.
REAL = "smol-thinker"
#: Questions in the list.
LISTED = 30
#: Seconds between two looks at a chain that is being written.
PAUSE = 0.25
#: The entry of the list of questions that stands for a typed one.
OWN = "type a question below"
#: What the box says while it is empty, and the line that then stands for chains.
EMPTY, WAITING = "your question; then click write", "type a question, then click write"
NO_CHAINS = (
    "The questions are in the order of the run: without steered chains of it (notebook 04) "
    "nobody knows on which a push shows. Not every chain changes."
)
#: What the box is called that colours the tokens by the direction.
BY_DIRECTION = "colour by the direction"
#: The reading of a token, in coefficients, that has the full colour.
FULL = 1.0
#: The controls that an :class:`~stllms.app.bench.Ask` is made of, and the rows of the box.
FIELDS = ("question", "behaviour", "coefficient", "layer", "temperature", "seed")
ROWS = (
    ("task",), ("question", "write"), ("behaviour", "coefficient"), ("layer", "temperature"),
    ("seed", "another", "stop"), ("reading",),
)  # fmt: skip


def load(
    model: str | None = None,
    profile: str = "default",
    judge: str = "auto",
    results: str | None = None,
    labels: str | None = None,
) -> Bench:
    """The bench of a notebook's parameters: :func:`stllms.app.bench.bench`. Without a model,
    the real one where what it needs is installed, else the fixture."""
    if model is None:
        model = "tiny-thinker" if registry.missing_packages(REAL) else REAL
    return benches.bench(RunConfig(model, profile, judge, results, labels=labels))


def show(
    bench: Bench,
    question: str | None = None,
    behaviour: str | None = None,
    coefficient: float | None = None,
    *,
    widgets: bool | None = None,
) -> ipywidgets.Widget | HTML:
    """The demo as widgets, or the pair they open on as HTML.

    Args:
        question: to begin with. ``None``: that on which steering shows most.
        behaviour: to begin with. ``None``: the first target that has a direction.
        coefficient: to begin with. ``None``: the one suggested for the behaviour.
        widgets: ``None`` asks :func:`live`.
    """
    if behaviour is None:
        behaviour = bench.first
    if coefficient is None:
        coefficient = bench.coefficient_of(behaviour)
    if widgets is None:
        widgets = live()
    listed: list[Task] = []
    said = ""
    if widgets or question is None:
        listed, said = listing(bench, behaviour, coefficient)
    first = listed[0] if question is None else benches.task(question)
    ask = Ask(first, behaviour, coefficient)
    if widgets:
        return Demo(bench, ask, listed, said).request().box
    pair = benches.write(bench, ask)
    lines = [text.html_line(line) for line in (benches.remark(pair), said) if line]
    return HTML(
        text.html(first.content, (), "question")
        + render(pair, labels=bench.labels)
        + "<br>".join(lines)
    )


def live() -> bool:
    """Whether a front end with widgets sent the running cell.

    JupyterLab, Notebook and VS Code name the cell in the request; papermill, nbconvert and
    nbval do not. Colab is known by its module.
    """
    shell = get_ipython()
    if os.environ.get(stages.INSIDE) or getattr(shell, "kernel", None) is None:
        return False
    return "google.colab" in sys.modules or "cellId" in shell.get_parent().get("metadata", {})


def render(pair: Pair, *, labels: LabelSet = PAPER, whole: bool = True) -> str:
    """Shares and chains of a pair as HTML; ``whole=False`` while it is being written."""
    panels = [
        text.Panel(
            benches.title(chain),
            chain.response.thinking.rstrip("\ufffd"),  # half of a character, for now
            chain.labelled.segments,
            list(benches.shares(chain, labels=labels)),
            benches.note(chain) if whole else f"{len(chain.response.output_ids)} tokens ...",
        )
        for chain in pair
    ]
    return text.html_panels(panels, labels=labels)


def render_readings(bench: Bench, pair: Pair) -> str:
    """The tokens of both chains, coloured by the direction that the steered one got, as HTML;
    value and surprise on hovering.

    Both are read in the unsteered model, at the layer that was steered: it is the text that
    lights up, not what was added.
    """
    behaviour, layer = pair[1].direction, pair[1].layer
    cells = []
    for chain in pair:
        response = chain.response
        with benches.ONE:
            found = reading.read(bench.model, response, bench.directions, behaviour, layer)
        own = slice(len(response.prompt_ids), None)
        values, surprise = found.values[own].tolist(), found.surprise[own].tolist()
        title = (
            f"{benches.title(chain)}: mean {np.mean(values):+.2f}" if values else "no tokens"
        )
        cells.append(
            text.html_tokens(found.tokens[own], values, surprise, title=title, most=FULL)
        )
    return text.html_line(
        f"The same tokens by the direction {behaviour} at layer {layer}, read in the unsteered "
        f"model: orange along it, blue against it, in coefficients (full colour at {FULL:g})."
    ) + text.html_beside(cells)


# -- which questions -----------------------------------------------------------------------


def choices(bench: Bench) -> list[Task]:
    """The first :data:`LISTED` evaluation tasks of the bench's run, or all of a smaller one."""
    options = bench.config.tasks_of("evaluate")
    return tasks.select("evaluate", **options | {"n": min(LISTED, options["n"])})


def listing(bench: Bench, behaviour: str, coefficient: float) -> tuple[list[Task], str]:
    """The :func:`choices`, those first on which the share of the behaviour moved most, and a
    line on what steering did on all of them.

    "Moved" is in the sense of the coefficient's sign; a chain that broke or has no labels
    comes last. The chains are those of the model's run where notebook 04 has written them;
    those of an embedded model are written now (seconds). Without either nothing is reordered.
    """
    listed = choices(bench)
    ask = Ask(listed[0], behaviour, coefficient)
    known = behaviour in bench.labels.names and coefficient != 0
    pairs = _pairs(bench, ask, listed) if known else {}
    if not pairs:
        return listed, NO_CHAINS
    place = bench.labels.names.index(behaviour)
    shares = {
        n: [benches.shares(one, labels=bench.labels)[place] for one in pair]
        for n, pair in pairs.items()
    }
    share = pd.DataFrame.from_dict(shares, orient="index", columns=["baseline", "steered"])
    moved = (share["steered"] - share["baseline"]) * np.sign(coefficient)
    whole = [not benches.broke(pair) for pair in pairs.values()]
    gain = moved.where(whole).reindex([one.id for one in listed])
    order = np.argsort(-gain.to_numpy(), kind="stable")  # NaN last
    means = " and ".join(f"{mean:.1%}" for mean in share.dropna().mean().dropna()) or "n/a"
    said = (
        f"Not every chain changes: of {len(pairs)} questions, {coefficient:+g} {behaviour} "
        f"{'raised' if coefficient > 0 else 'lowered'} its share on {(moved > 0).sum()} and "
        f"changed no token on {sum(map(benches.same, pairs.values()))}. Mean share, baseline "
        f"and steered: {means}. The list begins with those on which it moved most."
    )
    return [listed[place] for place in order], said


def _pairs(bench: Bench, ask: Ask, listed: Sequence[Task]) -> dict[str, Pair]:
    """Pairs of chains by task id: those that notebook 04 left in the run of the bench's
    directions, else of an embedded model new ones."""
    folder = Folder(bench.config)
    rows = Rows(folder.steered, STEERED_KEY).load() if bench.origin == folder.label else []
    baseline, steered = (
        {
            row["task_id"]: steered_from_row(row)
            for row in rows
            if row["annotation"] and tuple(row[name] for name in STEERED_KEY[1:]) == condition
        }
        for condition in benches.conditions_of(bench, ask)
    )
    ids = [one.id for one in listed]
    stored = {n: (baseline[n], steered[n]) for n in ids if n in baseline and n in steered}
    if stored or not bench.config.embedded:
        return stored
    return dict(zip(ids, benches.write_all(bench, ask, listed), strict=True))


# -- the widgets ---------------------------------------------------------------------------


class Demo:
    """The widgets: ``box`` is shown, ``view`` holds the chains, ``status`` one line.

    ``controls`` are the list of questions, those of :data:`FIELDS`, three buttons, and a box
    (``reading``) that colours the tokens by the direction without writing them again. Chains
    are written on a thread of their own, so that sliders stay alive, one pair at a time. **A
    change cancels the chain under way** within one token and starts again with the newest
    settings: nothing queues.
    """

    def __init__(self, bench: Bench, ask: Ask, listed: Sequence[Task], said: str = "") -> None:
        self.bench = bench
        self.controls = controls = _controls(bench, ask, listed)
        self.status, self.view = ipywidgets.HTML(), ipywidgets.HTML()
        rows = [ipywidgets.HBox([controls[name] for name in row]) for row in ROWS]
        hint = ipywidgets.HBox([ipywidgets.HTML(text.html_line(said))])
        self.box = ipywidgets.VBox([*rows, hint, self.status, self.view])
        self._preview = _preview(bench)
        self.shown: tuple[Ask, Pair, str] | None = None  # the last that was written whole
        self._listed = {one.content: one for one in listed}
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._lock = threading.Lock()
        self._newest = 0  # number of the newest request
        self._last: Future[None] | None = None
        follow = {"task": self._choose, "question": self._find, "behaviour": self._suggest}
        for name, follower in follow.items():
            controls[name].observe(follower, "value")
        for name in FIELDS:
            controls[name].observe(self.request, "value")
        controls["reading"].observe(self._colour, "value")
        controls["write"].on_click(self.request)
        controls["another"].on_click(self._another)
        controls["stop"].on_click(self.stop)

    def ask(self) -> Ask:
        """The settings as they are; ``ValueError`` for an empty question."""
        values = {name: self.controls[name].value for name in FIELDS}
        question = values.pop("question")
        return Ask(self._listed.get(question) or benches.task(question), **values)

    def request(self, _: Any = None) -> Demo:
        """Cancels what is being written and writes what the controls say; returns itself."""
        self._last = self._writer.submit(self._write, self._supersede())
        return self

    def _colour(self, _: Any) -> None:
        """Shows the last pair again, its tokens by the direction or not."""
        if self._last is not None and not self._last.done():
            return  # what is being written is shown so at its end
        if self.shown is not None and self.shown[0] == self.ask():
            self._last = self._writer.submit(self._again, self._supersede())

    def stop(self, _: Any = None) -> None:
        """Cancels what is being written; what is there stays."""
        self._tell(self._supersede(), "stopped")

    def wait(self) -> None:
        """Returns when nothing is being written (for scripts and tests)."""
        if self._last is not None:
            self._last.result()

    # Controls that follow another.

    def _choose(self, change: dict[str, Any]) -> None:
        question = self.controls["question"]
        if change["new"] != OWN:
            question.value = change["new"].content
        elif question.value in self._listed:
            question.value = ""

    def _find(self, change: dict[str, Any]) -> None:
        self.controls["task"].value = self._listed.get(change["new"], OWN)

    def _suggest(self, change: dict[str, Any]) -> None:
        self.controls["layer"].value = self.bench.layer_of(change["new"])
        self.controls["coefficient"].value = self.bench.coefficient_of(change["new"])

    def _another(self, _: Any) -> None:
        self.controls["seed"].value += 1

    # What is written and shown.

    def _supersede(self) -> int:
        """The number of a new request; whatever belongs to an older one is not shown."""
        with self._lock:
            self._newest += 1
            return self._newest

    def _tell(
        self, number: int, line: str, view: str | None = None, *, wrong: bool = False
    ) -> None:
        """Shows something of request ``number`` unless there is a newer one."""
        with self._lock:
            if number == self._newest:
                self.status.value = text.html_line(line, wrong=wrong)
                if view is not None:
                    self.view.value = view

    def _write(self, number: int) -> None:
        """Streams the pair that the controls ask for into the view."""
        if number != self._newest:
            return
        if not self.controls["question"].value.strip():
            self._tell(number, WAITING, "")
            return
        self._tell(number, "writing ...")
        try:
            self._tell(number, *self._written(number, self.ask()))
        except CancelledError:
            pass
        except Exception as error:  # the edge of the thread: all of it is shown
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._tell(number, f"{kind}{error}", "", wrong=True)

    def _again(self, number: int) -> None:
        assert self.shown is not None
        _, pair, said = self.shown
        self._tell(number, said, self._view(pair))

    def _view(self, pair: Pair) -> str:
        """A whole pair as HTML."""
        by_label = render(pair, labels=self.bench.labels)
        by_direction = self.controls["reading"].value
        return by_label + (render_readings(self.bench, pair) if by_direction else "")

    def _written(self, number: int, ask: Ask) -> tuple[str, str]:
        """The line and the chains of a pair, which is shown while it grows."""
        began = next_look = time.monotonic()

        def watch(responses: list[Response]) -> None:
            nonlocal next_look
            if number != self._newest:
                raise CancelledError
            if time.monotonic() >= next_look:
                (pair,) = benches.label(self.bench, ask, responses, self._preview)
                growing = render(pair, labels=self.bench.labels, whole=False)
                self._tell(number, "writing ...", growing)
                next_look = time.monotonic() + PAUSE

        pair = benches.write(self.bench, ask, watch=watch)
        seconds = time.monotonic() - began
        tokens = sum(len(chain.response.output_ids) for chain in pair)
        said = f"{tokens} tokens in {seconds:.1f} s; labels: {self.bench.annotator.name}"
        said = "; ".join(filter(None, (said, benches.remark(pair))))
        self.shown = ask, pair, said
        return said, self._view(pair)


def _preview(bench: Bench) -> annotators.Annotator:
    """The annotator of chains that grow, which costs nothing."""
    config = bench.config
    own = {"labels": bench.labels} if config.own_labels else {}
    return annotators.annotator(config.preview, **own)


def _controls(bench: Bench, ask: Ask, listed: Sequence[Task]) -> dict[str, ipywidgets.Widget]:
    """The widgets by name, with the values of ``ask``."""
    numbered = [
        (f"{number}. {textwrap.shorten(one.content, 80, placeholder='…')}", one)
        for number, one in enumerate(listed, 1)
    ]
    chosen = ask.task if ask.task in listed else OWN
    most = max(2.0, abs(ask.coefficient), *map(abs, bench.coefficients.values()))
    warmth = bench.config.settings.temperature
    late = {"continuous_update": False}
    half, wide, small = (
        {"layout": ipywidgets.Layout(width=width)} for width in ("318px", "640px", "auto")
    )
    controls = {
        "task": ipywidgets.Dropdown(options=[*numbered, (OWN, OWN)], value=chosen, **wide),
        "question": ipywidgets.Textarea(
            ask.task.content, rows=3, placeholder=EMPTY, **late, **wide
        ),
        "behaviour": ipywidgets.Dropdown(options=bench.behaviours, value=ask.behaviour, **half),
        "coefficient": ipywidgets.FloatSlider(
            ask.coefficient, min=-most, max=most, step=0.25, **late, **half
        ),
        "layer": ipywidgets.IntSlider(
            bench.layer_of(ask.behaviour), max=bench.model.n_layers - 1, **late, **half
        ),
        "temperature": ipywidgets.FloatSlider(
            warmth, max=max(1.5, warmth), step=0.05, **late, **half
        ),
        "seed": ipywidgets.BoundedIntText(bench.config.seed, max=2**31, **half),
    }
    for name, control in controls.items():
        control.description = name
        control.style.description_width = "84px"
    controls["reading"] = ipywidgets.Checkbox(
        False, description=BY_DIRECTION, indent=False, **small
    )
    buttons = {"write": "pencil", "another": "refresh", "stop": "stop"}
    return controls | {
        name: ipywidgets.Button(
            description="another seed" if name == "another" else name, icon=icon, **small
        )
        for name, icon in buttons.items()
    }
