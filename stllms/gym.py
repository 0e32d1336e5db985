"""Tasks of the ``reasoning-gym`` package by name (``--tasks gym:chain_sum``); an extra.

A task is made from (dataset, seed, index) alone, with the dataset's default difficulty, and
scored by the dataset's own verifier. Which part of a run it belongs to (build, evaluate,
compare) is decided by a hash of its question: no question is ever in two parts, whatever the
seed and however many tasks are asked for.

Source: https://github.com/open-thought/reasoning-gym
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from stllms import checks
from stllms.records import Task

#: The parts of a run, in the order of the hash.
PARTS = ("build", "evaluate", "compare")

#: Indices of one seed; ids have six digits.
INDICES = 10**6

#: Items a dataset object is made with. Some of them depend on this number, so it is fixed.
BLOCK = 500

#: Datasets of 0.1.25 whose items change with Python's hash seed, found by making three items
#: of each dataset in processes of different hash seeds: a run of them could not be resumed.
UNSTABLE = ("isomorphic_strings", "polynomial_multiplication", "ransom_note")


@dataclass(frozen=True)
class GymTask(Task):
    """A task with what its verifier needs to make it again; ``category`` is the dataset."""

    seed: int = 0
    index: int = 0


def check(task_set: str) -> str:
    """The dataset that ``gym:NAME`` names.

    Raises ``ValueError``, one line: the package is not installed (with the command that
    installs it), it has no such dataset (with names that are close), or the dataset is one of
    :data:`UNSTABLE`.
    """
    name = task_set.removeprefix(checks.GYM)
    known = _package().factory.DATASETS
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        close = close or [one for one in sorted(known) if name and name in one][:3]
        hint = f"did you mean {' or '.join(close)}?"
        if not close:
            hint = f"it has {len(known)}, from {min(known)} to {max(known)}"
        raise ValueError(f"tasks: reasoning-gym has no dataset {name!r}; {hint}")
    if name in UNSTABLE:
        raise ValueError(
            f"tasks: the items of {task_set} are others in every process (they depend on"
            " Python's hash seed), so that answers could not be scored; choose another dataset"
        )
    return name


def tasks(name: str, part: str, n: int, *, seed: int = 0) -> list[GymTask]:
    """The first ``n`` different questions of a part of a dataset, in the order of their index.

    About three items are made for every task. Raises ``ValueError`` for an unknown part or
    dataset, a dataset that needs options of its own, and one that does not have ``n``
    different questions for the part among ten times as many items.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of a run: choose one of {', '.join(PARTS)}")
    check(name)
    found: dict[str, GymTask] = {}
    tried = min(INDICES, 10 * len(PARTS) * n + BLOCK)
    for index in range(tried):
        task = _task(name, seed, index)
        if part_of(task.content) == part:
            found.setdefault(task.content, task)
        if len(found) == n:
            return list(found.values())
    raise ValueError(
        f"tasks: {checks.GYM}{name} has {len(found)} different questions to {part} among"
        f" {tried} items, {n} are needed: ask for fewer tasks"
    )


def part_of(question: str) -> str:
    """The part of a run that a question belongs to."""
    digest = hashlib.sha256(question.encode()).digest()
    return PARTS[int.from_bytes(digest[:8], "big") % len(PARTS)]


def score(task: GymTask, readings: Iterable[str]) -> float:
    """The verifier's score of an answer, 0 to 1: the best of several readings of one text.

    0 without any reading. Verifiers raise whatever their parser raises on text that is no
    answer; that too is a 0. Some give a little for the right form, and some evaluate the
    answer with sympy.
    """
    dataset, item = _item(task.category, task.seed, task.index)
    return max((_verified(dataset, item, text) for text in readings), default=0.0)


def _verified(dataset: Any, item: dict[str, Any], text: str) -> float:
    try:
        return float(dataset.score_answer(text, item))
    except Exception:  # a verifier that cannot parse the text does not accept it
        return 0.0


def _task(name: str, seed: int, index: int) -> GymTask:
    _, item = _item(name, seed, index)
    answer = item["answer"]
    return GymTask(
        id=f"gym-{name}-{index:06d}",
        category=name,
        content=item["question"],
        answer=None if answer is None else str(answer),
        seed=seed,
        index=index,
    )


@lru_cache(maxsize=4096)
def _item(name: str, seed: int, index: int) -> tuple[Any, dict[str, Any]]:
    """The dataset object and its item. Items draw from ``seed + place``: blocks go on there."""
    block, place = divmod(index, BLOCK)
    dataset = _dataset(name, seed * INDICES + block * BLOCK)
    return dataset, dataset[place]


@lru_cache(maxsize=8)
def _dataset(name: str, seed: int) -> Any:
    try:
        return _package().create_dataset(name, size=BLOCK, seed=seed)
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"tasks: {checks.GYM}{name} cannot be made without options of its own ({reason})"
        ) from error


def _package() -> Any:
    try:
        return import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tasks: {checks.GYM}NAME needs the package {error.name.replace('_', '-')}:"
            " pip install 'stllms[gym]' (or: pip install reasoning-gym)"
        ) from None


def readings(text: str, plain: str | None, *, several_lines: bool) -> list[str]:
    r"""The forms in which a text's final answer may be handed to a verifier, each once.

    ``text`` is what follows ``</think>``, ``plain`` the answer read from it without markup.
    The last ``<answer>...</answer>`` alone, where there is one. Else, for an answer of
    several lines (a grid, a list of moves): the last fenced block, the last paragraph; for
    one of a line: ``plain``, the last ``\boxed{...}`` and what follows the last "answer is"
    or "Answer:" as they stand, the last line.
    """
    if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        return [tagged[-1].strip()]
    text = text.strip()
    if several_lines:
        found = re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL)[-1:]
        found += re.split(r"\n\s*\n", text)[-1:]
    else:
        found = [plain or ""]
        found += re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)[-1:]
        found += re.findall(r"(?i:answer)(?:\s+is\b\s*:?|\s*:)([^\n]+)", text)[-1:]
        found += text.split("\n")[-1:]
    forms = (form.strip(" \t\n*`$.") for form in found)
    return list(dict.fromkeys(form for form in forms if form))
