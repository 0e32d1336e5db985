"""What a puzzle is, and the register of the families that draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Draw = Callable[[Random], "Puzzle"]


@dataclass(frozen=True)
class Puzzle:
    """One question with everything a chain about it can say.

    ``steps`` are the deductions in the order in which they are needed, ``goal`` completes
    "find ...", ``examples`` are complete statements with small cases, ``answer`` is exact.
    """

    family: str
    category: str
    question: str
    goal: str
    steps: tuple[str, ...]
    examples: tuple[str, ...]
    answer: str


FAMILIES: dict[str, tuple[str, Draw]] = {}


def family(name: str, category: str) -> Callable[[Draw], Draw]:
    """Register a drawing function under ``name`` with its category of the paper."""

    def register(draw: Draw) -> Draw:
        FAMILIES[name] = (category, draw)
        return draw

    return register


def puzzle(name: str, question: str, goal: str, steps, examples, answer) -> Puzzle:
    """A puzzle of a registered family."""
    category = FAMILIES[name][0]
    return Puzzle(name, category, question, goal, tuple(steps), tuple(examples), str(answer))


def two(rng: Random, items) -> tuple:
    """Two different items."""
    return tuple(rng.sample(list(items), 2))
