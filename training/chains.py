"""Chains of the grammar, drawn with their true labels, and the questions of its parts.

A chain is what ``tiny-thinker`` is trained on: it opens the task and goes through *phases*,
each of one of the four steered behaviours. A phase opens with a sentence of its behaviour and
mixes such sentences with the deductions of the puzzle; after every sentence it may end, and the
next one is of another behaviour, rather of one that the chain did not have yet. So a behaviour
is a persistent state of a stretch of the chain, hence steerable.
``tiny-instruct`` is trained on the plain style of the same puzzles: no tags, no phases, hardly
any backtracking.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, islice
from random import Random

from stllms.fixtures.grammar import CONCLUSIONS, FINAL, WORDINGS
from stllms.labels import PAPER
from stllms.records import Task
from training import families
from training.families import LEXICON, Puzzle

#: How unevenly the wordings of a behaviour are used (:func:`zipf`). One wording of a deduction
#: ("So ...") is far more frequent than any other sentence, the wordings of the rest are spread
#: over many first words: greedy decoding then comes to the deductions, and to an end.
EXPONENTS = {"deduction": 0.9, "initializing": 0.7}
EXPONENT = 0.25


def zipf(label: str) -> list[float]:
    """Weights ``1 / rank ** exponent`` of the wordings of a behaviour."""
    exponent = EXPONENTS.get(label, EXPONENT)
    return [rank**-exponent for rank in range(1, len(WORDINGS[label]) + 1)]


# --- chains ------------------------------------------------------------------------------

#: Chance that a phase ends after a sentence, and that a sentence in it is a deduction.
_LEAVE, _DEDUCE = 0.35, 0.45
#: How much less likely a phase is with every phase of its behaviour that the chain had before.
_FRESH = 3
#: Chance to conclude after a deduction once every step of the puzzle is said. The end hangs on
#: what was just said and not on a count, so that greedy decoding ends as well.
_CONCLUDE = 0.5
#: Sentences after which only deductions follow.
_LONG = 20

#: Shares of the behaviours after the opening in the plain style.
_PLAIN = {
    "deduction": 0.66,
    "adding-knowledge": 0.25,
    "example-testing": 0.05,
    "uncertainty-estimation": 0.03,
    "backtracking": 0.01,
}


@dataclass(frozen=True)
class Chain:
    """A labelled chain that solves a puzzle."""

    puzzle: Puzzle
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
    """A thinking chain with its labels: an opening, phases, and the conclusion.

    Once the deductions of the puzzle are said, each further one may be the last.
    """
    puzzle = puzzle or families.draw(rng)
    writer = _Writer(rng, puzzle)
    told = [writer.say("initializing") for _ in range(rng.choice((1, 1, 2)))]
    phases, done = _phases(rng), False
    while not done:
        label = next(phases) if len(told) < _LONG else "deduction"
        told.append(writer.say(label))
        done = label == "deduction" and not writer.todo and rng.random() < _CONCLUDE
    return Chain(puzzle, (*told, writer.conclude()))


def _phases(rng: Random) -> Iterator[str]:
    """The behaviours of the sentences of one phase after the other, without end."""
    had, phase = Counter[str](), ""
    while True:
        others = [name for name in PAPER.targets if name != phase]
        phase = rng.choices(others, [_FRESH ** -had[name] for name in others])[0]
        had[phase] += 1
        yield phase
        while rng.random() >= _LEAVE:
            yield "deduction" if rng.random() < _DEDUCE else phase


def plain(rng: Random, puzzle: Puzzle | None = None) -> Chain:
    """A text in the plain style of an instruct model, with its labels."""
    puzzle = puzzle or families.draw(rng)
    writer = _Writer(rng, puzzle)
    told = [writer.say("initializing")]
    length = rng.randint(3, 6)
    while len(told) < length or writer.todo:
        late = len(told) + len(writer.todo) >= length + 1
        label = "deduction" if late else rng.choices(list(_PLAIN), list(_PLAIN.values()))[0]
        told.append(writer.say(label))
    return Chain(puzzle, tuple(told))


# --- tasks -------------------------------------------------------------------------------


def part_of(question: str) -> str:
    """``train``, ``build`` or ``evaluate``: where a question belongs, by its hash.

    Eight tenths of all questions train the models; the two held-out tenths serve the
    directions and the evaluation.
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
            key = f"tiny-{part}-{len(found):04d}"
            found[drawn.question] = Task(key, drawn.category, drawn.question, drawn.answer)
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


def _unseen(rng: Random, name: str, part: str, seen: Container[str]) -> Puzzle | None:
    for _ in range(200):
        puzzle = families.draw(rng, name)
        if part_of(puzzle.question) == part and puzzle.question not in seen:
            return puzzle
    return None
