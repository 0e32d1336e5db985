r"""The tasks of ``messages/``, a person's own JSONL, and reading the answer a model gave.

Three parts ship with the package: ``train`` (500) and ``evaluate`` (50) in the ten categories
of the paper, and ``checkable`` (100) whose ``answer`` is exact. :func:`read_answer` finds the
final answer of a text, :func:`same` compares it; both would rather reject than guess.
:func:`score` does it for any task, those of :mod:`stllms.gym` by their own verifiers.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from stllms import checks, gym
from stllms.config import RunConfig
from stllms.organism import grammar
from stllms.records import Task

#: The parts that ship with the package, one file each.
PARTS: tuple[str, ...] = ("train", "evaluate", "checkable")


def load(part: str, *, n: int | None = None) -> list[Task]:
    """The tasks of a part, in the order of the file; with ``n`` the first ``n`` of them.

    The files go through the categories in turn: the first 20 of ``train`` have two of each.
    ``ValueError`` for an unknown part, or an ``n`` not between 1 and the number of tasks.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    source = _folder() / f"{part}.jsonl"
    tasks = _parse(source.read_text(encoding="utf-8"), str(source))
    if n is not None:
        _check_number(n, len(tasks), f"part {part!r}")
    return tasks[:n]


def from_file(path: str | Path) -> list[Task]:
    """The tasks of a JSONL file: one object a line with ``id``, ``content`` and, if wanted,
    ``category`` (default ``"own"``) and ``answer``, all of them strings.

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
    return _parse(text, str(path))


def for_run(setup: RunConfig, part: str) -> list[Task]:
    """The tasks of a run: ``part`` is ``build``, ``evaluate`` or ``compare``.

    From the grammar (the embedded models), from ``messages/`` (``compare``: a balanced sample
    of the training tasks, METHOD section 9; ``checkable`` evaluates on the tasks that have
    exact answers), from a dataset of reasoning-gym (three parts that share no question), or
    from the person's file: its first tasks build, those after them evaluate, and all of them
    serve the comparison. Raises ``ValueError`` where there are fewer tasks than the run asks
    for, and for an unknown part.
    """
    numbers = {
        "build": setup.settings.n_build,
        "evaluate": setup.settings.n_evaluate,
        "compare": setup.settings.n_compare,
    }
    if part not in numbers:
        raise ValueError(f"unknown part {part!r} of a run: choose one of {', '.join(numbers)}")
    wanted = numbers[part]
    if setup.task_set == "grammar":
        held_out = "build" if part == "build" else "evaluate"
        return grammar.tasks(held_out, wanted, seed=setup.seed)
    if setup.task_set in ("messages", "checkable"):
        if part == "compare":
            return balanced_sample(load("train"), wanted, setup.seed)
        held_out = "evaluate" if setup.task_set == "messages" else "checkable"
        return load("train" if part == "build" else held_out, n=wanted)
    if setup.task_set.startswith(checks.GYM):
        return gym.tasks(gym.check(setup.task_set), part, wanted, seed=setup.seed)
    own = from_file(Path(setup.tasks).expanduser())
    first = setup.settings.n_build if part == "evaluate" else 0
    _check_number(first + wanted, len(own), f"{setup.tasks}, {part}")
    return own[first : first + wanted]


def for_controls(setup: RunConfig, asked: Sequence[Task]) -> list[Task]:
    """Those of the evaluation tasks on which control directions are added.

    All of them where an annotator labels for nothing. A judge is paid for every chain, and the
    controls' are most of them: it gets ``n_control`` tasks, drawn by the seed, the categories
    in turn.
    """
    n = setup.settings.n_control
    if not setup.judged or n is None or n >= len(asked):
        return list(asked)
    generator = random.Random(setup.seed)
    groups: dict[str, list[Task]] = {}
    for task in generator.sample(list(asked), len(asked)):
        groups.setdefault(task.category, []).append(task)
    turns = [(turn, group[turn]) for group in groups.values() for turn in range(len(group))]
    drawn = {task.id for _, task in sorted(turns, key=lambda item: item[0])[:n]}
    return [task for task in asked if task.id in drawn]


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


def _folder() -> Traversable:
    """The folder of the task files: inside an installed wheel, else beside the package."""
    packaged = files("stllms") / "_messages"
    checkout = Path(__file__).resolve().parent.parent / "messages"
    for folder in (packaged, checkout):
        if (folder / "train.jsonl").is_file():
            return folder
    raise FileNotFoundError(f"the tasks are neither in {packaged} nor in {checkout}: reinstall")


def _check_number(n: int, available: int, where: str) -> None:
    if not 1 <= n <= available:
        raise ValueError(f"{where}: {n} tasks asked for, between 1 and {available} can be had")


def _parse(text: str, name: str) -> list[Task]:
    """The tasks of a JSONL text; ``name`` is the file that an error speaks of."""
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        task = Task(
            id=_field(row, "id", where),
            category=_field(row, "category", where) if "category" in row else "own",
            content=_field(row, "content", where),
            answer=_field(row, "answer", where) if row.get("answer") is not None else None,
        )
        if task.id in lines:
            other = lines[task.id]
            raise ValueError(f"{where}, field 'id': {task.id!r} is on line {other} too")
        lines[task.id] = number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{name}: empty, expected one task a line")
    return tasks


def _field(row: dict[str, object], key: str, where: str) -> str:
    """``row[key]``, which must be a string with something in it."""
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value
    problem = "empty" if isinstance(value, str) else f"expected a string, got {value!r:.40}"
    raise ValueError(f"{where}, field {key!r}: {problem if key in row else 'missing'}")


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
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", text)
    if boxed:
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


def is_correct(text: str, answer: str) -> bool:
    """Whether the final answer of ``text`` (:func:`read_answer`) is ``answer``."""
    given = read_answer(text)
    return given is not None and same(given, answer)


def score(task: Task, text: str) -> float:
    """How good the final answer of ``text`` is: 1 or 0 by :func:`is_correct`, NaN for a task
    without an answer; for a task of reasoning-gym what the dataset's verifier gives, 0 to 1.
    """
    if isinstance(task, gym.GymTask):
        final = text.rpartition("</think>")[2]
        several = "\n" in (task.answer or "")
        forms = gym.readings(final, read_answer(text), several_lines=several)
        return gym.score(task, () if "<think>" in final else forms)
    return math.nan if task.answer is None else float(is_correct(text, task.answer))


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
    for value, word in enumerate(_COUNTING.split()):
        text = re.sub(rf"(?<![\w-]){word}(?![\w-])", str(value), text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:minus|negative)\s+", "-", text, flags=re.IGNORECASE)
    match = _VALUE.search(text)
    if match is None or len(text) > 200:
        return set()
    before, after = text[: match.start()], text[match.end() :]
    under = int(match["under"] or 1)
    attached = re.search(r"[\w.,:/]$", before) or re.search(r"\d", before + after)
    if attached or not under or len(f"{before} {after}".split()) > 5:
        return set()
    value = Fraction(match["over"]) / under + int(match["whole"] or 0)
    value *= -1 if match["sign"].startswith("-") else 1
    return {value, value / 100} if match["percent"] else {value}

from stllms.gym import GymTask  # noqa: E402, F401
