"""The demo's questions: those first on which a push shows, by a rule and not by hand.

The rule reads steered chains: those of the model's run where notebook 04 has made them, those
of an embedded model written on the spot (seconds). Without either nothing is reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stllms import pairs, steering, tasks
from stllms.artifacts import Folder, Rows
from stllms.pairs import Ask, Bench, Pair
from stllms.records import BEHAVIOURS, STEERED_KEY, Response, Task, steered_from_row

#: Questions in the list.
LISTED = 30
#: Why questions stay in the order of the run.
NO_CHAINS = (
    "The questions are in the order of the run: without steered chains of it (notebook 04) "
    "nobody knows on which a push shows. Not every chain changes."
)


@dataclass(frozen=True)
class Listing:
    """Questions for one behaviour; ``said`` is a line on what its push did on all of them.

    ``ordered`` says that they come by how far the behaviour moved, most first.
    """

    behaviour: str
    tasks: tuple[Task, ...]
    said: str
    ordered: bool = False


def choices(bench: Bench, n: int = LISTED) -> list[Task]:
    """Up to ``n`` evaluation tasks, one of every category first."""
    config = bench.config
    try:
        every = tasks.for_run(config, "evaluate")
    except ValueError:  # fewer than notebook 04 would need: enough for a list
        every = tasks.for_run(replace(config, n_evaluate=LISTED), "evaluate")
    first = list({task.category: task for task in reversed(every)}.values())[::-1]
    rest = [task for task in every if task not in first]
    return (first + rest)[:n]


def listing(
    bench: Bench, ask: Ask, *, watch: Callable[[list[Response]], Any] | None = None
) -> Listing:
    """The :func:`choices`, those first on which ``ask`` moved the share of its behaviour most.

    "Moved" is in the sense of the coefficient's sign; a chain that broke or has no labels
    comes last. ``watch`` may end the writing: see :func:`stllms.pairs.write`.
    """
    listed = choices(bench)
    made = _made(bench, ask, listed, watch) if ask.coefficient else {}
    if not made:
        return Listing(ask.behaviour, tuple(listed), NO_CHAINS)
    found = [made.get(task.id) for task in listed]
    gain = np.array([-np.inf if pair is None else _gain(pair, ask) for pair in found])
    order = np.argsort(-gain, kind="stable")
    said = _said([pair for pair in found if pair is not None], ask)
    return Listing(ask.behaviour, tuple(listed[place] for place in order), said, ordered=True)


def _gain(pair: Pair, ask: Ask) -> float:
    """By how much the behaviour's share moved in the sense of the coefficient's sign."""
    plain, steered = (_share(chain, ask) for chain in pair)
    moved = (steered - plain) * np.sign(ask.coefficient)
    return -np.inf if np.isnan(moved) or pairs.broke(pair) else moved


def _share(chain: pairs.Steered, ask: Ask) -> float:
    return float(pairs.shares(chain)[BEHAVIOURS.index(ask.behaviour)])


def _said(made: Sequence[Pair], ask: Ask) -> str:
    """On how many questions the push showed, and the mean shares over them."""
    share = np.array([[_share(chain, ask) for chain in pair] for pair in made])
    known = share[~np.isnan(share).any(1)]
    up = ask.coefficient > 0
    moved = int(((known[:, 1] - known[:, 0]) * np.sign(ask.coefficient) > 0).sum())
    same = sum(pairs.same(pair) for pair in made)
    means = " and ".join(f"{mean:.1%}" for mean in known.mean(0)) if len(known) else "n/a"
    return (
        f"Not every chain changes: of {len(made)} questions, {ask.coefficient:+g} "
        f"{ask.behaviour} {'raised' if up else 'lowered'} its share on {moved} and changed no "
        f"token on {same}. Mean share, plain and steered: {means}."
    )


def _made(
    bench: Bench, ask: Ask, listed: Sequence[Task], watch: Callable[..., Any] | None
) -> dict[str, Pair]:
    """Pairs of chains by task id: the run's, else of an embedded model new ones."""
    stored = _stored(bench, ask)
    if stored or not bench.config.embedded:
        return stored
    made = pairs.write_all(bench, ask, listed, watch=watch)
    return {task.id: pair for task, pair in zip(listed, made, strict=True)}


def _stored(bench: Bench, ask: Ask) -> dict[str, Pair]:
    """The pairs that notebook 04 left in the run that the bench's directions are of."""
    folder, edit = Folder(bench.config), pairs.intervention(bench, ask)
    if bench.origin != folder.label:
        return {}
    arm = (ask.behaviour, edit.layer, float(ask.coefficient), ask.operation)
    sides: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for row in Rows(folder.steered, STEERED_KEY).load():
        kind = tuple(row[name] for name in STEERED_KEY[1:])
        if kind in (steering.plain().key("")[1:], arm) and row.get("annotation"):
            sides[kind == arm][row["task_id"]] = steered_from_row(row)
    return {name: (sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]}
