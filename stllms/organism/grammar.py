"""The grammar of chains: it draws them with their true labels, and recognises them again.

A chain is what ``tiny-thinker`` is trained on: it opens the task, walks through the
deductions of the puzzle and says other things on the side. Which ones is decided by its
*temperament*: with probability .45 one of the four steered behaviours dominates the chain
(hinted at by the last sentence of half of the questions), and a behaviour tends to be followed
by itself. These two facts make the behaviours persistent states of a chain, hence steerable;
DESIGN.md, "The embedded model", has the study that found this.

``tiny-instruct`` is trained on the plain style of the same puzzles: no tags, no
temperament, hardly any backtracking.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import takewhile
from random import Random

from stllms import spans
from stllms.organism import families, lexicon, wordings
from stllms.organism.families import Puzzle
from stllms.records import STEERED, Annotation, PlacedSegment, Response, Task

#: Chance that a chain has a temperament, given a hint in its question or none.
HINTED, UNHINTED = 0.70, 0.20

_SIDE = ("adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking")
_BALANCED = {
    "deduction": 0.42,
    "adding-knowledge": 0.16,
    "example-testing": 0.14,
    "uncertainty-estimation": 0.15,
    "backtracking": 0.13,
}
_DOMINANT, _WITHIN_DEDUCTION = 0.58, 0.30
_STICKY = 0.35
_PLAIN = {
    "deduction": 0.66,
    "adding-knowledge": 0.25,
    "example-testing": 0.05,
    "uncertainty-estimation": 0.03,
    "backtracking": 0.01,
}
#: Sentences of one side behaviour in a row, at most.
_RUN = 3
#: Chance to conclude after a deduction once every step of the puzzle is said. The end hangs on
#: what was just said and not on a count, so that greedy decoding ends as well.
_CONCLUDE = 0.5
#: Sentences after which only deductions follow.
_LONG = 12
_SENTENCE = re.compile(r"\S[^.?!]*[.?!]")
_FINAL = re.compile(r"The answer is [A-Za-z0-9/]+\.")


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
        return wordings.FINAL.format(a=self.puzzle.answer)


class _Teller:
    """Words sentences for one chain; only deductions use a wording twice."""

    def __init__(self, rng: Random, puzzle: Puzzle) -> None:
        self.rng, self.puzzle = rng, puzzle
        self.used: set[str] = set()
        self.said: list[str] = []
        self.todo = list(puzzle.steps)

    def say(self, label: str) -> tuple[str, str]:
        """A labelled sentence; a deduction takes the next step of the puzzle."""
        options = [w for w in wordings.WORDINGS[label] if w not in self.used]
        weights = dict(zip(wordings.WORDINGS[label], wordings.zipf(label), strict=True))
        wording = self.rng.choices(options, [weights[w] for w in options])[0]
        if label != "deduction":
            self.used.add(wording)
        return label, wording.format(
            s=self._statement(label) if "{s}" in wording else "",
            f=self.rng.choice(lexicon.FACTS[self.puzzle.family]),
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
        return "deduction", self.rng.choice(wordings.CONCLUSIONS).format(a=self.puzzle.answer)


def chain(rng: Random, puzzle: Puzzle | None = None) -> Chain:
    """A thinking chain with its labels.

    The next behaviour repeats the current one with probability .35 and is drawn from the
    temperament's distribution otherwise, but no side behaviour comes more than three times in a
    row. Once the deductions of the puzzle are said, each further one may be the last.
    """
    puzzle = families.draw(rng) if puzzle is None else puzzle
    hint = rng.choice(STEERED) if rng.random() < 0.5 else None
    temperament = _temperament(rng, hint)
    weights = dict(_BALANCED) if temperament is None else _dominated(temperament)
    teller = _Teller(rng, puzzle)
    sentences = [teller.say("initializing") for _ in range(rng.choice((1, 1, 2)))]
    while True:
        label = _next([name for name, _ in sentences], weights, rng)
        sentences.append(teller.say(label))
        if label == "deduction" and not teller.todo and rng.random() < _CONCLUDE:
            break
    sentences.append(teller.conclude())
    content = puzzle.question if hint is None else f"{puzzle.question} {_hint(rng, hint)}"
    return Chain(puzzle, content, temperament, tuple(sentences))


def _next(labels: list[str], weights: dict[str, float], rng: Random) -> str:
    """The behaviour of the next sentence."""
    if len(labels) >= _LONG:
        return "deduction"
    current, run = (
        labels[-1],
        len(list(takewhile(lambda name: name == labels[-1], labels[::-1]))),
    )
    if current in _SIDE and run < _RUN and rng.random() < _STICKY:
        return current
    allowed = {n: w for n, w in weights.items() if run < _RUN or n != current or n not in _SIDE}
    return rng.choices(list(allowed), list(allowed.values()))[0]


def plain(rng: Random, puzzle: Puzzle | None = None) -> Chain:
    """A text in the plain style of an instruct model, with its labels."""
    puzzle = families.draw(rng) if puzzle is None else puzzle
    hint = rng.choice(STEERED) if rng.random() < 0.5 else None
    teller = _Teller(rng, puzzle)
    sentences = [teller.say("initializing")]
    length = rng.randint(3, 6)
    while len(sentences) < length or teller.todo:
        late = len(sentences) + len(teller.todo) >= length + 1
        label = "deduction" if late else rng.choices(list(_PLAIN), list(_PLAIN.values()))[0]
        sentences.append(teller.say(label))
    content = puzzle.question if hint is None else f"{puzzle.question} {_hint(rng, hint)}"
    return Chain(puzzle, content, None, tuple(sentences))


def _temperament(rng: Random, hint: str | None) -> str | None:
    if hint is not None:
        return hint if rng.random() < HINTED else None
    return rng.choice(STEERED) if rng.random() < UNHINTED else None


def _dominated(temperament: str) -> dict[str, float]:
    rest = [label for label in _SIDE if label != temperament]
    share = (1 - _DOMINANT - _WITHIN_DEDUCTION) / len(rest)
    return {"deduction": _WITHIN_DEDUCTION, temperament: _DOMINANT} | dict.fromkeys(rest, share)


def _hint(rng: Random, hint: str) -> str:
    return rng.choice(wordings.HINTS[hint])


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
    ``ValueError`` for an unknown part and when fewer than ``count`` questions were found.
    """
    if part not in ("build", "evaluate"):
        raise ValueError(f"unknown part {part!r} of the grammar's tasks: 'build' or 'evaluate'")
    rng = Random(f"tasks/{part}/{seed}")
    names, found, seen = sorted(families.FAMILIES), [], set()
    for turn in range(count * 4):
        if len(found) == count:
            return found
        drawn = _unseen(rng, names[turn % len(names)], part, seen)
        if drawn is not None:
            seen.add(drawn.puzzle.question)
            category, answer = drawn.puzzle.category, drawn.puzzle.answer
            found.append(Task(f"tiny-{part}-{len(found):04d}", category, drawn.content, answer))
    if len(found) < count:
        raise ValueError(f"the grammar has only {len(found)} {part} questions, not {count}")
    return found


def _unseen(rng: Random, name: str, part: str, seen: set[str]) -> Chain | None:
    for _ in range(200):
        puzzle = families.draw(rng, name)
        if part_of(puzzle.question) == part and puzzle.question not in seen:
            return chain(rng, puzzle)
    return None


@lru_cache(maxsize=1)
def _known() -> tuple[tuple[str, str, str, bool], ...]:
    """(start, end, label, has a slot) of every wording, the longest start first."""
    rows = []
    endings = [("deduction", text) for text in (*wordings.CONCLUSIONS, wordings.FINAL)]
    pairs = [(label, text) for label, texts in wordings.WORDINGS.items() for text in texts]
    for label, text in (*pairs, *endings):
        start, slot, end = re.fullmatch(r"(.*?)(\{[sfga]\})?([^{}]*)", text).groups()
        rows.append((start, end, label, slot is not None))
    return tuple(sorted(rows, key=lambda row: -len(row[0])))


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """Every word that the grammar can write in a slot, numbers apart."""
    rng, words = Random("vocabulary"), set()
    for name in sorted(families.FAMILIES):
        words.update(re.findall(r"[A-Za-z]+", " ".join(lexicon.FACTS[name])))
        for _ in range(600):
            puzzle = families.draw(rng, name)
            said = " ".join((*puzzle.steps, *puzzle.examples, puzzle.goal, puzzle.answer))
            words.update(re.findall(r"[A-Za-z]+", said))
    return frozenset(words)


@lru_cache(maxsize=65536)
def label_of(sentence: str) -> str | None:
    """The behaviour of one sentence of the grammar, ``None`` for anything else."""
    for start, end, label, slotted in _known():
        if not (sentence.startswith(start) and sentence.endswith(end)):
            continue
        inside = sentence[len(start) : len(sentence) - len(end)]
        if not slotted and not inside and sentence == start + end:
            return label
        if slotted and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ,/]*", inside):
            known = set(re.findall(r"[A-Za-z]+", inside)) <= vocabulary()
            return label if known else None
    return None


class Annotator:
    """The exact annotator of the grammar: the truth about a chain of the embedded models.

    A sentence that the grammar cannot have written gets no label and is counted in the
    ledger as ``unknown``; on chains drawn from the grammar there is none.
    """

    name = "grammar"

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation a response, in order."""
        return [annotate(response) for response in responses]


def annotate(response: Response) -> Annotation:
    """Label every sentence of ``response.thinking``."""
    text, placed, unknown = response.thinking, [], []
    for match in _SENTENCE.finditer(text):
        label = label_of(match.group())
        if label is None:
            unknown.append(match.group())
        else:
            placed.append(PlacedSegment(label, match.group(), match.start(), match.end()))
    where = spans.place(placed, text)
    return spans.annotation(where, response.task_id, Annotator.name, unknown=unknown)


def well_formed(response: Response, *, thinker: bool = True) -> bool:
    """Whether the grammar could have written the whole of ``response``.

    Every sentence is known and stands one space after the other, the thinking is closed and
    nothing but the final sentence that states the answer follows it (a text without thinking
    ends in that sentence), and the model ended its turn.
    """
    known = " ".join(segment.text for segment in annotate(response).segments)
    whole = known != "" and known == response.thinking
    if thinker:
        before = response.text[: response.thinking_start].strip()
        ends = _FINAL.fullmatch(response.answer.strip()) and before in ("", "<think>")
    else:
        ends = re.search(rf"{_FINAL.pattern}$", response.text.strip())
    return whole and bool(ends) and response.finished and (response.closed or not thinker)


def read_answer(text: str) -> str | None:
    """The answer that a text of the embedded models states last, ``None`` if none does."""
    found = re.findall(r"[Tt]he answer is ([A-Za-z0-9/]+)\.", text)
    return found[-1] if found else None
