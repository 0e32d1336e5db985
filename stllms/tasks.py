"""The tasks of ``messages/``, a person's own JSONL, datasets of reasoning-gym, and reading the
answer a model gave.

Three parts ship with the package: ``train`` (500) and ``evaluate`` (50) in the ten categories
of the paper, and ``checkable`` (100) whose ``answer`` is exact. :func:`read_answer` finds the
final answer of a text, :func:`same` compares it; both would rather reject than guess.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from stllms.config import GYM
from stllms.records import Task, loads
from stllms.registry import FIXTURES, PACKAGE, did_you_mean

#: The parts that ship with the package, one file each.
PARTS = ("train", "evaluate", "checkable")
#: The parts of a run.
PARTS_OF_RUN = ("build", "evaluate", "compare")
#: Who speaks in a chat.
ROLES = ("system", "user", "assistant")
#: Indices of one seed of a dataset; ids have six digits.
INDICES = 10**6
#: Items a dataset object is made with. Some of them depend on this number, so it is fixed.
BLOCK = 500
#: Datasets of reasoning-gym 0.1.25 whose items change with Python's hash seed, found by making
#: three items of each in processes of different hash seeds: no run of them can be resumed.
UNSTABLE = ("isomorphic_strings", "polynomial_multiplication", "ransom_note")


# -- which tasks ---------------------------------------------------------------------------


def select(part: str, *, source: str, n: int, skip: int = 0, seed: int = 0) -> list[Task]:
    """``n`` tasks of a run: ``part`` is ``build``, ``evaluate`` or ``compare``.

    Args:
        source: ``grammar`` (questions of the embedded models, where each seed takes the next
            ``n`` of 1000 to build and 400 to evaluate); ``messages`` (``compare``: a balanced
            sample of the training tasks, method, section 1) or ``checkable``, which evaluates
            on the tasks that have exact answers; ``gym:NAME``, a dataset of reasoning-gym in
            three parts that share no question; else the path of a person's file.
        skip: tasks of a person's file to pass over (those that build, where others evaluate).

    Raises:
        ValueError: where there are fewer tasks, for an unknown part or dataset, and for a file
            that is not one of tasks.
    """
    if part not in PARTS_OF_RUN:
        raise ValueError(
            f"unknown part {part!r} of a run: choose one of {', '.join(PARTS_OF_RUN)}"
        )
    if source == "grammar":
        questions = from_file(FIXTURES / f"{'build' if part == 'build' else 'evaluate'}.jsonl")
        _check_number(n, len(questions), f"{source}, {part}")
        first = seed * n % len(questions)
        return (questions + questions)[first : first + n]
    if source in ("messages", "checkable"):
        if part == "compare":
            return balanced_sample(load("train"), n, seed)
        held_out = "evaluate" if source == "messages" else "checkable"
        return load("train" if part == "build" else held_out, n=n)
    if source.startswith(GYM):
        return list(gym_tasks(gym_dataset(source), part, n, seed=seed))
    own = from_file(Path(source).expanduser())
    _check_number(skip + n, len(own), f"{source}, {part}")
    return own[skip : skip + n]


def subset(tasks: Sequence[Task], n: int | None, *, seed: int) -> list[Task]:
    """``n`` of the tasks in their order, drawn by the seed, the categories in turn; all of them
    where ``n`` is ``None`` or larger (a paid judge gets control chains of a few tasks only)."""
    if n is None or n >= len(tasks):
        return list(tasks)
    groups: dict[str, list[Task]] = {}
    for task in random.Random(seed).sample(list(tasks), len(tasks)):
        groups.setdefault(task.category, []).append(task)
    turns = [(turn, task) for group in groups.values() for turn, task in enumerate(group)]
    drawn = {task.id for _, task in sorted(turns, key=lambda item: item[0])[:n]}
    return [task for task in tasks if task.id in drawn]


def load(part: str, *, n: int | None = None) -> list[Task]:
    """The tasks of a part, in the order of the file; with ``n`` the first ``n`` of them.

    The files go through the categories in turn: the first 20 of ``train`` have two of each.
    ``ValueError`` for an unknown part, or an ``n`` not between 1 and the number of tasks.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    tasks = from_file(_folder() / f"{part}.jsonl")
    if n is not None:
        _check_number(n, len(tasks), f"part {part!r}")
    return tasks[:n]


def from_file(path: str | Path) -> list[Task]:
    """The tasks of a JSONL file: one object a line with ``id``, ``content`` and, if wanted,
    ``category`` (default ``"own"``) and ``answer``, all of them strings. In place of
    ``content`` there may be ``messages``, a chat that is sent as it is: a list of
    ``{"role", "content"}`` that ends with the user; ``content`` is then that last message.

    Blank lines and unknown fields are ignored. Everything else that is wrong raises
    ``ValueError`` with the file, the line number and the field: not JSON, not an object,
    a missing field, a wrong type, an empty text, an ``id`` used twice, no task at all.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        if "content" in row and "messages" in row:
            raise ValueError(f"{where}: both 'content' and 'messages', expected one of them")
        chat = messages(row["messages"], where) if "messages" in row else ()
        task = Task(
            id=_field(row, "id", where),
            category=_field(row, "category", where) if "category" in row else "own",
            content=chat[-1]["content"] if chat else _field(row, "content", where),
            answer=_field(row, "answer", where) if row.get("answer") is not None else None,
            messages=chat,
        )
        if task.id in lines:
            other = lines[task.id]
            raise ValueError(f"{where}, field 'id': {task.id!r} is on line {other} too")
        lines[task.id] = number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{path}: empty, expected one task a line")
    return tasks


def overview(chosen: Sequence[Task]) -> dict[str, int]:
    """Tasks a category, in the order in which they first occur."""
    return dict(Counter(task.category for task in chosen))


def balanced_sample(tasks: Sequence[Task], n: int, seed: int) -> list[Task]:
    """``n`` tasks drawn without replacement, equally many of each category.

    Where ``n`` is not a multiple of the number of categories, some of them, drawn by the seed,
    give one task more. The result goes through the categories in turn and is the same for the
    same arguments. ``ValueError`` if ``n`` is out of range or a category has too few tasks.
    """
    _check_number(n, len(tasks), "the given tasks")
    generator = random.Random(seed)
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.category, []).append(task)
    share, rest = divmod(n, len(groups))
    larger = set(generator.sample(list(groups), rest))
    drawn = []
    for category, group in groups.items():
        wanted = share + (category in larger)
        if wanted > len(group):
            raise ValueError(
                f"category {category!r} has {len(group)} tasks, {wanted} are needed"
                f" for a balanced sample of {n}"
            )
        drawn.append(generator.sample(group, wanted))
    return [group[i] for i in range(share + 1) for group in drawn if i < len(group)]


def _folder() -> Path:
    """The folder of the task files: inside an installed wheel, else beside the package."""
    packaged = PACKAGE / "_messages"
    return packaged if packaged.is_dir() else PACKAGE.parent / "messages"


def _check_number(n: int, available: int, where: str) -> None:
    if not 1 <= n <= available:
        raise ValueError(f"{where}: {n} tasks asked for, between 1 and {available} can be had")


def _field(row: dict[str, object], key: str, where: str) -> str:
    """``row[key]``, which must be a string with something in it."""
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value
    problem = "empty" if isinstance(value, str) else f"expected a string, got {value!r:.40}"
    raise ValueError(f"{where}, field {key!r}: {problem if key in row else 'missing'}")


def messages(given: object, where: str) -> tuple[dict[str, str], ...]:
    """A chat, checked: roles of :data:`ROLES`, texts, and the user last. ``ValueError`` that
    begins with ``where`` for anything else."""
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{where}, field 'messages': expected a list of {{role, content}}")
    chat = []
    for number, one in enumerate(given, start=1):
        place = f"{where}, message {number}"
        if not isinstance(one, dict):
            raise ValueError(f"{place}: expected {{role, content}}, got {one!r:.40}")
        role = _field(one, "role", place)
        if role not in ROLES:
            raise ValueError(f"{place}, field 'role': {role!r}, expected {', '.join(ROLES)}")
        chat.append({"role": role, "content": _field(one, "content", place)})
    if chat[-1]["role"] != "user":
        raise ValueError(f"{where}, field 'messages': the last one must be the user's")
    return tuple(chat)


# -- reasoning-gym -------------------------------------------------------------------------


@dataclass(frozen=True)
class GymTask(Task):
    """A task with what its verifier needs to make it again; ``category`` is the dataset."""

    seed: int = 0
    index: int = 0


def gym_dataset(source: str) -> str:
    """The dataset of reasoning-gym that ``gym:NAME`` names.

    Raises ``ValueError``, one line: the package is not installed, it has no such dataset, or
    the dataset is one of :data:`UNSTABLE`. Source: https://github.com/open-thought/reasoning-gym
    """
    name = source.removeprefix(GYM)
    known = _package().factory.DATASETS
    if name not in known:
        raise ValueError(
            f"tasks: reasoning-gym has no dataset {name!r}{did_you_mean(name, known)}"
        )
    if name in UNSTABLE:
        raise ValueError(
            f"tasks: the items of {source} are others in every process (they depend on"
            " Python's hash seed), so that answers could not be scored; choose another dataset"
        )
    return name


def gym_tasks(name: str, part: str, n: int, *, seed: int = 0) -> list[GymTask]:
    """The first ``n`` different questions of a part of a dataset, in the order of their index.

    A task is made from (dataset, seed, index) alone, with the dataset's default difficulty. A
    hash of the question decides its part: no question is ever in two parts, whatever the seed
    and the number. Raises ``ValueError`` for a dataset that needs options of its own, and one
    without ``n`` different questions for the part among thirty times as many items.
    """
    found: dict[str, GymTask] = {}
    tried = min(INDICES, 10 * len(PARTS_OF_RUN) * n + BLOCK)
    for index in range(tried):
        item = _item(name, seed, index)[1]
        if gym_part(item["question"]) == part:
            answer = None if item["answer"] is None else str(item["answer"])
            named = (f"gym-{name}-{index:06d}", name, item["question"], answer)
            found.setdefault(item["question"], GymTask(*named, seed, index))
        if len(found) == n:
            return list(found.values())
    raise ValueError(
        f"tasks: {GYM}{name} has {len(found)} different questions to {part} among"
        f" {tried} items, {n} are needed: ask for fewer tasks"
    )


def gym_part(question: str) -> str:
    """The part of a run that a question of reasoning-gym belongs to."""
    digest = hashlib.sha256(question.encode()).digest()
    return PARTS_OF_RUN[int.from_bytes(digest[:8], "big") % len(PARTS_OF_RUN)]


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
            f"tasks: {GYM}{name} cannot be made without options of its own ({reason})"
        ) from error


def _package() -> Any:
    try:
        return import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tasks: {GYM}NAME needs the package {str(error.name).replace('_', '-')}:"
            " pip install 'stllms[gym]' (or: pip install reasoning-gym)"
        ) from None


def _gym_score(task: GymTask, text: str) -> float:
    """The best score that the dataset's verifier gives to a reading of ``text``, 0 to 1. Some
    verifiers give a little for the right form, and some evaluate the answer with sympy."""
    final = text.rpartition("</think>")[2]
    if "<think>" in final:
        return 0.0
    several = "\n" in (task.answer or "")
    dataset, item = _item(task.category, task.seed, task.index)
    best = 0.0
    for reading in readings(final, read_answer(text), several_lines=several):
        try:
            best = max(best, float(dataset.score_answer(reading, item)))
        except Exception:  # whatever a verifier raises on text that is no answer
            continue
    return best


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
        found += _BOXED.findall(text)[-1:]
        found += re.findall(r"(?i:answer)(?:\s+is\b\s*:?|\s*:)([^\n]+)", text)[-1:]
        found += text.split("\n")[-1:]
    forms = (form.strip(" \t\n*`$.") for form in found)
    return list(dict.fromkeys(form for form in forms if form))


# -- answers -------------------------------------------------------------------------------


_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_GIVEN = re.compile(
    r"answer(?:\s+to\s[^.:\n]{1,80}?)?"
    r"(?:\s+(?:is|would\s+be|must\s+be)(?![\w'’])\s*[:=]?|\s*[:=]|\s*\n)"
    r"\s*(?:that\s)?(?P<given>\S.*?)(?=[.!]\s|[.!]?$)",
    re.IGNORECASE | re.MULTILINE,
)
_DOUBT = re.compile(r"\b(?:not|if|whether|unless|suppose)\b|n['’]t\b", re.IGNORECASE)
_CLOSING = re.compile(r".*(?:\b(?:is|are|was|equals)\b|=)\s*((?:\S+\s+){0,4}\S+)$")


def read_answer(text: str) -> str | None:
    r"""What ``text`` gives as its final answer, or ``None`` where that is not clear.

    The first of these that is there, each read as plain text without Markdown and LaTeX:

    1. the last ``\boxed{...}``;
    2. the last "the answer is ..." or "Answer: ...", to the end of the sentence, unless the
       words before it in that sentence doubt it ("if", "whether", "I do not think that");
    3. the only bold part of the last paragraph;
    4. the last line if it begins with "Yes" or "No"; else of its last sentence, unless that
       doubts: all of it up to six words; the one to five words after a last "is", "are",
       "was", "equals" or "="; its only number.

    Only what follows the last ``</think>`` is read, and nothing while ``<think>`` is open.
    """
    text = text.rpartition("</think>")[2].strip()
    if "<think>" in text:
        return None
    if boxed := _BOXED.findall(text):
        return _plain(boxed[-1]) or None
    plain = _plain(text)
    for match in reversed(list(_GIVEN.finditer(plain))):
        sentence = re.split(r"[.!?]\s|\n", plain[: match.start()][-300:])[-1]
        if not _DOUBT.search(sentence):
            return _plain(match["given"]) or None
    bold = re.findall(r"\*\*(.+?)\*\*", re.split(r"\n\s*\n", text)[-1])
    if len(bold) == 1 and not bold[0].rstrip().endswith(":"):
        return _plain(bold[0]) or None
    return _from_line(plain.split("\n")[-1])


def score(task: Task, text: str) -> float:
    """How good the final answer of ``text`` (:func:`read_answer`) is: 1 or 0 by :func:`same`,
    NaN for a task without an answer; for a task of reasoning-gym what the dataset's verifier
    gives, 0 to 1.
    """
    if isinstance(task, GymTask):
        return _gym_score(task, text)
    if task.answer is None:
        return math.nan
    given = read_answer(text)
    return float(given is not None and same(given, task.answer))


_REASON = re.compile(r",?\s+(?:because|since)\b.*|,\s+(?:as|so|which|not)\b.*")
_HEDGE = re.compile(
    r"\b(?:not|n?or|n?either|but|except|never|than|at (?:least|most)|up to|approximately|"
    r"nearly|roughly|almost|half|quarters?|thirds?|twice|double|plus|hundred|thousand|[mb]illion|"
    r"dozen|(?:about|around|over|under|above|below)\s+\w+)\b|n['’]t\b|[~≈<>≤≥±√π^]",
    re.IGNORECASE,
)


def same(given: str, answer: str) -> bool:
    """Whether a short answer says the same as the exact one.

    * **Yes or no**: the first word decides, or a closing "is yes"; never both.
    * **Clock times** (``answer`` as ``22:02``): the same minute, am and pm understood.
    * **Numbers**: equal as fractions, so ``1.50``, ``3/2`` and ``1 1/2`` are one number and a
      rounded decimal is another. Exactly one number, in digits or in words up to twenty,
      with at most five words around it (units, currency); ``25%`` equals ``25`` and ``1/4``.
    * **Words**: equal without case, articles and punctuation, or "... is X", or "X is ...".

    A hedge ("about", "or", "not", "more than") is never correct. Units are not converted.
    """
    given, answer = _plain(given), _plain(answer)
    words, wanted = _words(given), _words(answer)
    if wanted in (["yes"], ["no"]):
        decided = words[:1] == wanted or (words[-1:] == wanted and words[-2] == "is")
        return decided and not {"yes", "no"} <= set(words)
    given = _REASON.sub("", given)
    if given.casefold() == answer.casefold() or _HEDGE.search(given):
        return given.casefold() == answer.casefold()
    given = re.sub(r"\s\(.*|\s[–—]\s.*|;.*", "", given)
    if _minute(answer) is not None:
        return _minute(given) == _minute(answer)
    if _values(answer):
        return bool(_values(given) & _values(answer))
    words, n = _words(given), len(wanted)
    if words[:n] == wanted:
        return n > 0 and words[n : n + 1] in ([], ["is"], ["was"], ["did"], ["has"])
    return words[-n:] == wanted and words[-n - 1] in ("is", "was", "on", "in", "by", "letter")


_MARKUP = (
    (r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r" \1\2/\3\4"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox|boxed)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|quad|displaystyle)\b|\^\{?\\circ\}?|\\[()\[\],!;: ]|\\(?=[%$])", ""),
    (r"\\[A-Za-z]+", "≈"),
    (r"(?<=[A-Za-z])\^?\{?[23²³]\}?(?!\w)", ""),
    (r"[−–](?=\s?\d)", "-"),
    (r"(?<!\d)\*|\*(?!\d)|[{}$€£`_°]|(?m:^\s*#+)", ""),
)
_THOUSANDS = r"(?<![\d.,])\d{1,3}(?:[,\u00a0\u202f ]\d{3})+(?![\d:/]|,\d)"


def _plain(text: str) -> str:
    """``text`` without Markdown, LaTeX, currency signs, thousands separators, outer quotes."""
    for pattern, plain in _MARKUP:
        text = re.sub(pattern, plain, text)
    text = re.sub(_THOUSANDS, lambda match: re.sub(r"\D", "", match[0]), text)
    lines = (" ".join(line.split()).strip("\"'“”‘’ ") for line in text.split("\n"))
    return "\n".join(line.rstrip(".,;:!?\"'”’ ") for line in lines).strip("\n")


def _from_line(line: str) -> str | None:
    """The answer that a last line gives, as point 4 of :func:`read_answer` says."""
    if re.match(r"(?:yes|no)\b", line, re.IGNORECASE):
        return line
    sentence = re.split(r"[.!?]\s", line)[-1]
    if not sentence or _DOUBT.search(sentence):
        return None
    if len(sentence.split()) <= 6:
        return sentence
    if closing := _CLOSING.match(sentence):
        return closing[1]
    numbers = re.findall(r"\d[\d.,:/]*\d|\d", sentence)
    return numbers[0] if len(numbers) == 1 else None


def _words(text: str) -> list[str]:
    """The words in lower case, without articles where anything else is left."""
    words = re.findall(r"\w+(?:['’]\w+)*", text.casefold())
    return [word for word in words if word not in ("a", "an", "the")] or words


def _minute(text: str) -> int | None:
    """The minute of the day, where ``text`` has exactly one clock time."""
    times = re.findall(r"(?<![\d:])(\d\d?):(\d\d)(?![\d:])\s*([ap]\.?m\b)?", text.casefold())
    if len(times) != 1:
        return None
    hour, minute, half = int(times[0][0]), int(times[0][1]), times[0][2][:1]
    return 60 * (hour % 12 + 12 * (half == "p") if half else hour) + minute


_COUNTING = "zero one two three four five six seven eight nine ten eleven twelve thirteen"
_COUNTING += " fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_VALUE = re.compile(
    r"(?P<sign>(?:[-+]\s?)?)(?:(?P<whole>\d+)\s+(?=\d+\s?/))?(?P<over>\d*\.?\d+)"
    r"(?:\s?/\s?(?P<under>\d+))?(?P<percent>\s?(?:%|per\s?cent\b))?"
)


def _values(text: str) -> set[Fraction]:
    """The values that a short text can stand for: empty unless it has exactly one number."""
    for number, word in enumerate(_COUNTING.split()):
        text = re.sub(rf"(?<![\w-]){word}(?![\w-])", str(number), text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:minus|negative)\s+", "-", text, flags=re.IGNORECASE)
    match = _VALUE.search(text)
    if match is None or len(text) > 200:
        return set()
    before, after = text[: match.start()], text[match.end() :]
    under = int(match["under"] or 1)
    attached = re.search(r"[\w.,:/]$", before) or re.search(r"\d", before + after)
    if attached or not under or len(f"{before} {after}".split()) > 5:
        return set()
    size = Fraction(match["over"]) / under + int(match["whole"] or 0)
    signed = -size if match["sign"].startswith("-") else size
    return {signed, signed / 100} if match["percent"] else {signed}
