"""One question answered twice, plain and steered: what the demo and the command line share.

Both chains are rows of one batch with one key, so they share their sampling noise and part
where the direction first changes the choice of a token. With coefficient 0 they are the same
text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stllms import checks, decode, generate, metrics, steering
from stllms.annotate import Annotator, stage
from stllms.bench import Bench, bench
from stllms.decode import Intervention
from stllms.records import BEHAVIOURS, Response, Steered, Task

__all__ = ["Ask", "Bench", "Pair", "bench", "task", "write", "write_all"]

#: The task id of a question that somebody typed, and so the key of its noise.
TYPED = "question"
#: A cell may write while the demo's thread does: nnsight traces one at a time.
_ONE = threading.Lock()
#: The largest absolute coefficient; beyond it nothing but noise is left of any model.
MOST = 1000.0
#: A chain of which less than this share is labelled is mostly unlabelled.
LABELLED = 0.5


@dataclass(frozen=True)
class Ask:
    """What is written: a question, an intervention, and how tokens are chosen.

    ``None`` is the default of the bench: the behaviour's own layer, the profile's temperature
    (0 is greedy) and limit of new tokens, the run's seed.
    """

    task: Task
    behaviour: str
    coefficient: float = 1.0
    layer: int | None = None
    operation: str = "add"
    where: str = "all"
    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


Pair = tuple[Steered, Steered]


def task(question: str) -> Task:
    """A task of a typed question; ``ValueError`` for an empty one, and for one whose bytes
    were no UTF-8 (a terminal hands them on as lone surrogates)."""
    if not question.strip():
        raise ValueError("the question is empty: type one, or choose one")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"question: character {error.start + 1} is no UTF-8; type it in a UTF-8 terminal"
        ) from None
    return Task(TYPED, TYPED, question.strip())


def check(ask: Ask) -> None:
    """Refuses, without a bench, what no bench can do; ``ValueError`` names the field."""
    checks.one_of("behaviour", ask.behaviour, BEHAVIOURS)
    coefficient = checks.real("coefficient", ask.coefficient)
    if coefficient is None or abs(coefficient) > MOST:
        raise ValueError(
            f"coefficient: {coefficient!r}, expected a number from {-MOST:g} to {MOST:g}"
        )
    checks.one_of("operation", ask.operation, tuple(decode.OPERATIONS))
    checks.one_of("where", ask.where, decode.WHERE)
    _own(ask)


def _own(ask: Ask) -> dict[str, Any]:
    """The values of ``ask`` for decoding that are not left to the bench."""
    given = {
        "max_new_tokens": checks.whole("max_tokens", ask.max_tokens, least=1),
        "temperature": checks.real("temperature", ask.temperature, least=0.0),
        "seed": checks.whole("seed", ask.seed, least=0),
    }
    return {name: value for name, value in given.items() if value is not None}


def layer_of(bench: Bench, behaviour: str) -> int:
    """The layer a behaviour is steered at: one without its own takes that of backtracking."""
    return bench.layers.get(behaviour, bench.layers["backtracking"])


def coefficient_of(bench: Bench, behaviour: str) -> float:
    """The coefficient that is suggested for adding a behaviour; 1 where none is known."""
    return bench.coefficients.get(behaviour, 1.0)


def intervention(bench: Bench, ask: Ask) -> Intervention:
    """What is done to the steered row; ``ValueError`` names what is wrong, and what exists."""
    check(ask)
    layer = layer_of(bench, ask.behaviour) if ask.layer is None else ask.layer
    if not 0 <= layer < bench.model.n_layers:
        last = bench.model.n_layers - 1
        raise ValueError(f"layer: {layer}, {bench.model.name} has layers 0 to {last}")
    try:
        direction = bench.directions.direction(ask.behaviour, layer)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    return Intervention(direction, layer, ask.coefficient, ask.operation, ask.where)


def decoding(bench: Bench, ask: Ask) -> dict[str, Any]:
    """How tokens are chosen: those of the run with the values of ``ask`` put in."""
    return {**generate.options(bench.config), **_own(ask)}


def write(
    bench: Bench, ask: Ask, *, watch: Callable[[list[Response]], Any] | None = None
) -> Pair:
    """The plain and the steered chain, written together and labelled by the annotator.

    ``watch`` is called with both responses so far after every token; what it raises ends the
    run. Raises ``ValueError`` for an empty question, one that does not fit the context, and
    any wrong value of ``ask``.
    """
    return write_all(bench, ask, [ask.task], watch=watch)[0]


def write_all(
    bench: Bench,
    ask: Ask,
    asked: Sequence[Task],
    *,
    watch: Callable[[list[Response]], Any] | None = None,
) -> list[Pair]:
    """:func:`write` for several tasks instead of that of ``ask``, in one batch."""
    for one in asked:
        task(one.content)
    edit = intervention(bench, ask)
    with _ONE:
        made = steering.generate(
            bench.model,
            [one for one in asked for _ in range(2)],
            [None, edit] * len(asked),
            **decoding(bench, ask),
            progress=False,
            watch=watch,
        )
        return label(bench, ask, made, bench.annotator)


def label(bench: Bench, ask: Ask, made: Sequence[Response], annotator: Annotator) -> list[Pair]:
    """Responses, plain and steered in turn, as labelled pairs; whole or being written."""
    edit, plain = intervention(bench, ask), steering.plain()
    arm = steering.Arm(ask.behaviour, edit.layer, float(ask.coefficient), edit, ask.operation)
    chains = [
        Steered(*(arm if place % 2 else plain).key(one.task_id), one)
        for place, one in enumerate(made)
    ]
    labelled = stage.steered(annotator, chains, model=bench.model)
    return list(zip(labelled[::2], labelled[1::2], strict=True))


def shares(chain: Steered) -> np.ndarray:
    """Share of each of the six behaviours among the labelled tokens, ``[6]``; NaN without."""
    return metrics.token_fractions([chain.annotation], BEHAVIOURS)[0]


def title(chain: Steered) -> str:
    """``plain``, or what was done to the chain."""
    if chain.direction == "none":
        return "plain"
    how = "" if chain.operation == "add" else f" {chain.operation}"
    return f"{chain.coefficient:+g}{how} {chain.direction}, layer {chain.layer}"


def note(chain: Steered) -> str:
    """Length, how the chain ended, its answer, and how much of it is labelled, in a line."""
    response, label = chain.response, chain.annotation
    said = f"answer: {' '.join(response.answer.split())}" if response.answer else "no answer"
    parts = [f"{len(response.output_ids)} tokens", said]
    if not response.finished:
        parts.append("not finished")
    failed = f"no labels ({label.failed})"
    parts.append(failed if label.failed else f"{label.ledger['coverage']:.0%} labelled")
    return "; ".join(parts)


def same(pair: Pair) -> bool:
    """Whether the push changed no token."""
    plain, steered = (chain.response.output_ids for chain in pair)
    return plain == steered


def broke(pair: Pair) -> list[str]:
    """What is wrong with the steered chain and not with the plain one."""
    plain, steered = map(_wrong, pair)
    return [what for what in steered if what not in plain]


def remark(pair: Pair) -> str:
    """What a reader of a pair should know: that nothing changed, or that the text broke."""
    if pair[1].coefficient == 0:
        return ""
    if same(pair):
        return "the push changed no token: try another seed or a larger coefficient"
    if wrong := broke(pair):
        return f"the push broke the text ({', '.join(wrong)}): try a smaller coefficient"
    return ""


def _wrong(chain: Steered) -> list[str]:
    label = chain.annotation
    found = [] if chain.response.finished else ["not finished"]
    bare = label.failed is None and label.ledger["coverage"] < LABELLED
    return [*found, *(["mostly unlabelled"] if bare else [])]
