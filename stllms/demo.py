"""Steering to play with: notebook 00, with widgets where somebody can move them.

The widgets are in :mod:`stllms.widgets`, the order of the questions in
:mod:`stllms.questions`. Without a front end for widgets (papermill, nbconvert, a page that only
shows notebooks) the same call gives, as plain HTML, the pair that the widgets open on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import ipywidgets
from IPython import get_ipython
from IPython.display import HTML

from stllms import coloured, pairs, pipeline, questions
from stllms.config import RunConfig
from stllms.pairs import Ask, Bench
from stllms.widgets import OWN, Demo, render

__all__ = ["OWN", "Demo", "example", "live", "load", "opening", "render", "show", "showcase"]


def load(
    model: str = "tiny-thinker",
    profile: str = "default",
    judge: str = "auto",
    results: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Bench:
    """The bench of a notebook's parameters: :func:`stllms.bench.bench`.

    ``options`` is any other field of :class:`~stllms.config.RunConfig` by name, such as the
    ``max_cost`` of a judge.
    """
    return pairs.bench(
        RunConfig.from_parameters(model, profile, judge, results, options=options)
    )


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
        question: to begin with. ``None``: that on which the push shows most, :func:`opening`.
        coefficient: to begin with. ``None``: the one suggested for the behaviour.
        widgets: ``None`` asks :func:`live`.
    """
    if coefficient is None:
        coefficient = pairs.coefficient_of(bench, behaviour)
    moving = live() if widgets is None else widgets
    if question is None:
        first = opening(bench, behaviour, coefficient)
        return Demo(bench, *first).request().box if moving else showcase(bench, *first)
    ask = Ask(pairs.task(question), behaviour, coefficient)
    return Demo(bench, ask).request().box if moving else example(bench, ask)


def opening(bench: Bench, behaviour: str, coefficient: float) -> tuple[Ask, questions.Listing]:
    """What the demo begins with: the first question of the list, and the list."""
    ask = Ask(questions.choices(bench, 1)[0], behaviour, coefficient)
    listed = questions.listing(bench, ask)
    return Ask(listed.tasks[0], behaviour, coefficient), listed


def live() -> bool:
    """Whether a front end with widgets sent the running cell.

    JupyterLab, Notebook and VS Code name the cell in the request; papermill, nbconvert and
    nbval do not. Colab is known by its module.
    """
    shell = get_ipython()
    if os.environ.get(pipeline.INSIDE) or getattr(shell, "kernel", None) is None:
        return False
    return "google.colab" in sys.modules or "cellId" in shell.get_parent().get("metadata", {})


def example(bench: Bench, ask: Ask, note: str = "") -> HTML:
    """One pair of chains, written at once; raises what :func:`stllms.pairs.write` raises."""
    pair = pairs.write(bench, ask)
    lines = [coloured.html_line(line) for line in (pairs.remark(pair), note) if line]
    question = coloured.html(ask.task.content, (), "question")
    return HTML(question + render(pair) + "<br>".join(lines))


def showcase(bench: Bench, ask: Ask, listed: questions.Listing) -> HTML:
    """The example of :func:`opening`, with a line on how it was picked, and from what."""
    picked = (
        f"Picked: of {len(listed.tasks)} questions the one on which {ask.behaviour} moved "
        f"most. {listed.said}"
    )
    return example(bench, ask, picked if listed.ordered else listed.said)
