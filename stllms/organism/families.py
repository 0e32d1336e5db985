"""Families of procedural tasks with checkable answers, the questions of the grammar.

A family draws a :class:`Puzzle`: a question, the deductions that lead to its answer, and
what a chain may say on the side (facts, examples). Every sentence is a wording of
:mod:`stllms.organism.wordings` with its slots filled, so that its behaviour is known. Importing
:mod:`~stllms.organism.numeric` and :mod:`~stllms.organism.verbal` registers them.
"""

from __future__ import annotations

from random import Random

from stllms.organism import numeric, verbal
from stllms.organism.puzzles import FAMILIES, Puzzle

__all__ = ["FAMILIES", "Puzzle", "draw", "numeric", "verbal"]


def draw(rng: Random, name: str | None = None) -> Puzzle:
    """A puzzle of family ``name``, or of a family drawn evenly."""
    name = rng.choice(sorted(FAMILIES)) if name is None else name
    return FAMILIES[name][1](rng)
