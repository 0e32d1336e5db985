"""Chains of the grammar, drawn with their true labels, and the questions of its parts.

A chain is what ``tiny-thinker`` is trained on: it opens the task, walks through the deductions
of the puzzle and says other things besides. Which ones is decided by its *temperament*: with
probability .45 one of the four steered behaviours dominates the chain (half of the questions
end in a hint at it), and a behaviour tends to be followed by itself. These two facts make the
behaviours persistent states of a chain, hence steerable. ``tiny-instruct`` is trained on the
plain style of the same puzzles: no tags, no temperament, hardly any backtracking.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, islice, takewhile
from random import Random

from stllms.fixtures.grammar import CONCLUSIONS, FINAL, WORDINGS
from stllms.labels import PAPER
from stllms.records import Task
from training import families
from training.families import LEXICON, Puzzle

#: What half of the questions end with, by the behaviour that it hints at.
HINTS: dict[str, list[str]] = LEXICON["hints"]

#: How unevenly the wordings of a behaviour are used (:func:`zipf`). One wording of a deduction
#: ("So ...") is far more frequent than any other sentence, the wordings of the rest are spread
#: over many first words: greedy decoding then deduces and ends, whatever the temperament.
EXPONENTS = {
    "deduction": 1.3,
    "initializing": 0.7,
    "uncertainty-estimation": 0.5,
    "backtracking": 0.4,
}
EXPONENT = 0.25


def zipf(label: str) -> list[float]:
    """Weights ``1 / rank ** exponent`` of the wordings of a behaviour."""
    exponent = EXPONENTS.get(label, EXPONENT)
    return [rank**-exponent for rank in range(1, len(WORDINGS[label]) + 1)]


# --- chains ------------------------------------------------------------------------------

#: Chance that a chain has a temperament, given a hint in its question or none.
HINTED, UNHINTED = 0.70, 0.20

#: Shares of the behaviours after the opening: without a temperament, and in the plain style.
_BALANCED = {
    "deduction": 0.42,
    "adding-knowledge": 0.16,
    "example-testing": 0.14,
    "uncertainty-estimation": 0.15,
    "backtracking": 0.13,
}
_PLAIN = {
    "deduction": 0.66,
    "adding-knowledge": 0.25,
    "example-testing": 0.05,
    "uncertainty-estimation": 0.03,
    "backtracking": 0.01,
}
_SIDE = tuple(_BALANCED)[1:]
#: Share of the behaviour of a temperament, and of deductions beside it.
_DOMINANT, _WITHIN_DEDUCTION = 0.58, 0.30
#: Chance that a side behaviour follows itself.
_STICKY = 0.35
#: Sentences of one side behaviour in a row, at most.
_RUN = 3
#: Chance to conclude after a deduction once every step of the puzzle is said. The end hangs on
#: what was just said and not on a count, so that greedy decoding ends as well.
_CONCLUDE = 0.5
#: Sentences after which only deductions follow.
_LONG = 12


@dataclass(frozen=True)
class Chain:
    """A puzzle, the task made of it, and a labelled chain that solves it."""

    puzzle: Puzzle
    content: str
    temperament: str | None
    sentences: tuple[tuple[str, str], ...]

    @property
    def thinking(self) -> str:
        """The sentences of the chain, as they stand between the tags."""
        return " ".join(text for _, text in self.sentences)

    @property
    def final(self) -> str:
        """The answer after the thinking."""
        return FINAL.format(a=self.puzzle.answer)


class _Writer:
    """Writes the sentences of one chain; only deductions use a wording twice."""

    def __init__(self, rng: Random, puzzle: Puzzle) -> None:
        self.rng, self.puzzle = rng, puzzle
        self.used: set[str] = set()
        self.said: list[str] = []
        self.todo = list(puzzle.steps)

    def say(self, label: str) -> tuple[str, str]:
        """A labelled sentence; a deduction takes the next step of the puzzle."""
        options = [w for w in WORDINGS[label] if w not in self.used]
        weights = dict(zip(WORDINGS[label], zipf(label), strict=True))
        wording = self.rng.choices(options, [weights[w] for w in options])[0]
        if label != "deduction":
            self.used.add(wording)
        return label, wording.format(
            s=self._statement(label) if "{s}" in wording else "",
            f=self.rng.choice(LEXICON["facts"][self.puzzle.family]),
            g=self.puzzle.goal,
        )

    def _statement(self, label: str) -> str:
        if label == "example-testing":
            return self.rng.choice(self.puzzle.examples)
        if label == "deduction" and self.todo:
            self.said.append(self.todo.pop(0))
            return self.said[-1]
        return self.rng.choice(self.said or self.todo)

    def conclude(self) -> tuple[str, str]:
        """The last deduction of the chain."""
        return "deduction", self.rng.choice(CONCLUSIONS).format(a=self.puzzle.answer)


def chain(rng: Random, puzzle: Puzzle | None = None) -> Chain:
    """A thinking chain with its labels.

    The next behaviour repeats the current one with probability .35 and is drawn from the
    temperament's distribution otherwise, but no side behaviour comes more than three times in a
    row. Once the deductions of the puzzle are said, each further one may be the last.
    """
    puzzle, hint = puzzle or families.draw(rng), _hint(rng)
    temperament = _temperament(rng, hint)
    weights = dict(_BALANCED) if temperament is None else _dominated(temperament)
    writer = _Writer(rng, puzzle)
    told = [writer.say("initializing") for _ in range(rng.choice((1, 1, 2)))]
    while True:
        label = _next([name for name, _ in told], weights, rng)
        told.append(writer.say(label))
        if label == "deduction" and not writer.todo and rng.random() < _CONCLUDE:
            break
    told.append(writer.conclude())
    return Chain(puzzle, _content(rng, puzzle, hint), temperament, tuple(told))


def plain(rng: Random, puzzle: Puzzle | None = None) -> Chain:
    """A text in the plain style of an instruct model, with its labels."""
    puzzle, hint = puzzle or families.draw(rng), _hint(rng)
    writer = _Writer(rng, puzzle)
    told = [writer.say("initializing")]
    length = rng.randint(3, 6)
    while len(told) < length or writer.todo:
        late = len(told) + len(writer.todo) >= length + 1
        label = "deduction" if late else rng.choices(list(_PLAIN), list(_PLAIN.values()))[0]
        told.append(writer.say(label))
    return Chain(puzzle, _content(rng, puzzle, hint), None, tuple(told))


def _next(labels: list[str], weights: dict[str, float], rng: Random) -> str:
    """The behaviour of the next sentence."""
    if len(labels) >= _LONG:
        return "deduction"
    current = labels[-1]
    run = len(list(takewhile(lambda name: name == current, labels[::-1])))
    if current in _SIDE and run < _RUN and rng.random() < _STICKY:
        return current
    allowed = {n: w for n, w in weights.items() if run < _RUN or n != current or n not in _SIDE}
    return rng.choices(list(allowed), list(allowed.values()))[0]


def _hint(rng: Random) -> str | None:
    """The behaviour that half of the questions hint at."""
    return rng.choice(PAPER.targets) if rng.random() < 0.5 else None


def _temperament(rng: Random, hint: str | None) -> str | None:
    if hint is not None:
        return hint if rng.random() < HINTED else None
    return rng.choice(PAPER.targets) if rng.random() < UNHINTED else None


def _dominated(temperament: str) -> dict[str, float]:
    rest = [label for label in _SIDE if label != temperament]
    share = (1 - _DOMINANT - _WITHIN_DEDUCTION) / len(rest)
    return {"deduction": _WITHIN_DEDUCTION, temperament: _DOMINANT} | dict.fromkeys(rest, share)


def _content(rng: Random, puzzle: Puzzle, hint: str | None) -> str:
    """The question, with the wording of the hint behind it."""
    return puzzle.question if hint is None else f"{puzzle.question} {rng.choice(HINTS[hint])}"


# --- tasks -------------------------------------------------------------------------------


def part_of(question: str) -> str:
    """``train``, ``build`` or ``evaluate``: where a question belongs, by its hash.

    Eight tenths of all questions train the models; the two held-out tenths serve the
    directions and the evaluation. The hint is no part of the question.
    """
    digit = int(sha256(question.encode()).hexdigest(), 16) % 10
    return ("build", "evaluate")[digit - 8] if digit >= 8 else "train"


def tasks(part: str, count: int, seed: int = 0) -> list[Task]:
    """``count`` different questions of ``part`` (``build`` or ``evaluate``), as tasks.

    The families take turns; a family whose questions are used up is passed over. Raises
    ``ValueError`` when fewer than ``count`` questions were found.
    """
    rng = Random(f"tasks/{part}/{seed}")
    names = cycle(sorted(families.FAMILIES))
    found: dict[str, Task] = {}
    for name in islice(names, count * 4):
        drawn = _unseen(rng, name, part, found) if len(found) < count else None
        if drawn is not None:
            puzzle, key = drawn.puzzle, f"tiny-{part}-{len(found):04d}"
            found[puzzle.question] = Task(key, puzzle.category, drawn.content, puzzle.answer)
    if len(found) < count:
        raise ValueError(f"the grammar has only {len(found)} {part} questions, not {count}")
    return list(found.values())


def vocabulary() -> frozenset[str]:
    """Every word that the grammar can write in a slot, numbers apart."""
    rng, said = Random("vocabulary"), []
    for name in sorted(families.FAMILIES):
        said += LEXICON["facts"][name]
        for _ in range(600):
            puzzle = families.draw(rng, name)
            said += [*puzzle.steps, *puzzle.examples, puzzle.goal, puzzle.answer]
    return frozenset(re.findall(r"[A-Za-z]+", " ".join(said)))


def _unseen(rng: Random, name: str, part: str, seen: Container[str]) -> Chain | None:
    for _ in range(200):
        puzzle = families.draw(rng, name)
        if part_of(puzzle.question) == part and puzzle.question not in seen:
            return chain(rng, puzzle)
    return None
