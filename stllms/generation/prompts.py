"""What a model is asked, and how what it wrote is read (method, section 3).

A thinking model gets the question alone; an instruct model is asked to think step by step
before it answers. The published script sent the step-by-step prompt to every model, which
stays available as ``style="published"``; a person's own prompts go in as they are
(:func:`opening`). :func:`read` takes chains from a person's own file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms.config import QUESTION, STYLES, check_style
from stllms.records import CLOSE, OPEN, Response, Task, kind, loads
from stllms.registry import MODELS
from stllms.runs.files import BadFile, StaleArtefact

if TYPE_CHECKING:  # torch
    from stllms.models.model import Model

STEP_BY_STEP = f"{QUESTION}\n\nThink step by step first, then give the final answer."
_LEADING = re.compile(rf"\s*{re.escape(OPEN)}")

#: Key of a row of a person's file -> whether its text is the thinking alone; else the tags of
#: a chain are read.
FIELDS: dict[str, bool] = {
    "thinking": True,
    "thinking_process": True,
    "text": False,
    "response": False,
}


def prompt(question: str, kind: str, style: str = "sound") -> str:
    """The user message for ``question`` to a model of ``kind`` ("thinking", "instruct", ...).

    Raises ``ValueError`` as :func:`stllms.config.check_style`.
    """
    if check_style(style) not in STYLES:
        return style.replace(QUESTION, question)
    if style in ("bare", "raw") or (style == "sound" and kind == "thinking"):
        return question
    return STEP_BY_STEP.replace(QUESTION, question)


def kind_of(model: Model) -> str:
    """``thinking`` or ``instruct``: by the registry, else by a ``<think>`` in the template."""
    entry = MODELS.get(model.name)
    if entry is not None and entry.kind in ("thinking", "instruct"):
        return entry.kind
    return "thinking" if OPEN in str(model.tokenizer.chat_template or "") else "instruct"


def opening(
    model: Model, task: Task, style: str = "sound", system: str | None = None
) -> tuple[str, tuple[int, ...]]:
    """The prompt of ``task`` as text and ids.

    * ``"sound"``: the task through the chat template, with the step-by-step suffix for a model
      that is no thinking one; ``"published"``: with the suffix for every model (method,
      section 3); ``"bare"``: without it for every model;
    * a template such as ``"Q: {question}"`` is the user message;
    * ``"raw"``: the text as it is, without the chat template; ``system`` is refused.

    ``system`` is put before it as a system message. A task with ``messages`` of its own is
    asked with these, whatever the style.
    """
    if style == "raw" and not task.messages:
        if system is not None:
            raise ValueError("prompts='raw' has no place for a system message")
        return task.content, tuple(model.tokenizer(task.content)["input_ids"])
    return model.prompt_ids(chat(task, kind_of(model), style, system))


def chat(
    task: Task, kind: str, style: str = "sound", system: str | None = None
) -> list[dict[str, str]]:
    """The messages (``{"role", "content"}``) that a model of ``kind`` is sent for ``task``, in
    the sense of :func:`opening`; what is raw is the user's message as it is."""
    if task.messages:
        return [dict(one) for one in task.messages]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt(task.content, kind, style)}]


def split(text: str, *, opened: bool) -> tuple[str, int, str, bool]:
    """(thinking, where it starts, answer, closed) of a decoded output.

    ``opened`` says that the prompt ended in ``<think>``; so does a ``</think>`` before any
    ``<think>``. The thinking goes from there, else from the first ``<think>``, to the next
    ``</think>``. A model that opened in the prompt may open again: tags at the very beginning
    are passed over, a ``<think>`` further on stays in the thinking, which is one piece of
    ``text``. Nothing but tags at its edges and white space is lost: ``text`` is what stands
    before the first ``<think>`` (:func:`before`), the thinking, and the answer. A chain that
    never closes is cut at the end of the text and has no answer. A text without any tag is all
    thinking and all answer, and counts as closed: an instruct model thinks aloud.
    """
    first, close = text.find(OPEN), text.find(CLOSE)
    if not opened and first < 0 and close < 0:
        return *_stripped(text, 0, len(text)), text.strip(), True
    start = first + len(OPEN) if not opened and first >= 0 and not 0 <= close < first else 0
    while (again := _LEADING.match(text, start)) is not None:
        start = again.end()
    stop = text.find(CLOSE, start)
    if stop < 0:
        return *_stripped(text, start, len(text)), "", False
    return *_stripped(text, start, stop), text[stop + len(CLOSE) :].strip(), True


def _stripped(text: str, start: int, stop: int) -> tuple[str, int]:
    """``text[start:stop]`` without white space at its edges, and where it starts."""
    inside = text[start:stop]
    return inside.strip(), start + len(inside) - len(inside.lstrip())


def before(response: Response) -> str:
    """What a model wrote before the ``<think>`` that its thinking follows, mostly nothing."""
    return response.text[: response.thinking_start].replace(OPEN, "").strip()


def same(
    path: Path, stored: Iterable[Response], prompt_ids: Mapping[str, Sequence[int]]
) -> None:
    """Raises ``StaleArtefact`` for a chain of the file ``path`` whose prompt is not that of
    ``prompt_ids``, by task: its text, the step-by-step suffix or the template changed."""
    for one in stored:
        now = prompt_ids.get(one.task_id)
        if now is not None and one.prompt_ids != tuple(now):
            raise StaleArtefact(
                f"{path.name}: the chain of task {one.task_id} answers another prompt "
                f"({one.prompt_text[:60]!r} ...): --fresh makes it again; or move {path} away"
            )


def as_used(model: Model, responses: Sequence[Response], how: str) -> list[Response]:
    """The responses whose ids the activations are taken from (method, section 5).

    ``"generated"``: the ids that were used. ``"published"``: the decoded text tokenised again.
    """
    if how == "generated":
        return list(responses)
    again = [
        model.tokenizer([one.prompt_text, one.text], add_special_tokens=False)["input_ids"]
        for one in responses
    ]
    return [
        replace(one, prompt_ids=tuple(ids[0]), output_ids=tuple(ids[1]))
        for one, ids in zip(responses, again, strict=True)
    ]


def response(
    model: Model,
    task: Task,
    opened: tuple[str, Sequence[int]],
    output_ids: Sequence[int],
    audit: dict[str, float] | None = None,
) -> Response:
    """The record of what ``model`` wrote after the prompt ``opened`` (text, ids)."""
    prompt_text, prompt_ids = opened
    text = model.decode(output_ids)
    in_prompt = prompt_text.rstrip().endswith(OPEN)
    thinking, start, answer, closed = split(text, opened=in_prompt)
    finished = bool(output_ids) and output_ids[-1] in model.eos_ids
    return Response(
        task_id=task.id,
        category=task.category,
        prompt_text=prompt_text,
        prompt_ids=tuple(prompt_ids),
        output_ids=tuple(output_ids),
        text=text,
        thinking=thinking,
        thinking_start=start,
        answer=answer,
        closed=closed and (finished or CLOSE in text),
        finished=finished,
        audit=audit,
    )


# -- chains of a person's file -------------------------------------------------------------


def read(source: str) -> list[Response]:
    """The chains of a file, or of standard input for ``-``.

    A JSON list of objects, JSONL, or else one chain as plain text; of an object the first of
    :data:`FIELDS` counts that holds text. Rows are called by their ``task_id``, else by their
    number from 1. Raises :class:`BadFile`, one line that names the file, the place in it, and
    what is wrong there; two chains of one name are refused.
    """
    name = "standard input" if source == "-" else source
    text = _content(source, name)
    if not text.strip():
        raise BadFile(f"{name}: empty, expected the text of a chain, JSONL or JSON")
    rows = _rows(text, name, Path(source).suffix.lower())
    if rows is None:
        return [chain("1", text, whole=False)]
    chains: list[Response] = []
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(rows, 1):
        one = _from_row(row, number, f"{name}, {place}")
        if one.task_id in places:
            raise BadFile(
                f"{name}, {place}: task_id {one.task_id!r} again, it is that of "
                f"{places[one.task_id]}; expected a task_id for each chain"
            )
        places[one.task_id] = place
        chains.append(one)
    return chains


def _content(source: str, name: str) -> str:
    """The text; standard input and files are UTF-8, whatever the locale says."""
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        return Path(source).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{name}: not a text in UTF-8 (byte {error.start})") from None
    except FileNotFoundError:
        raise BadFile(f"{name}: there is no such file") from None
    except OSError as error:
        raise BadFile(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, RuntimeError) as error:  # a NUL in the name; ~NOBODY
        raise BadFile(f"{name!r}: no name of a file ({error})") from None


def _rows(text: str, name: str, suffix: str) -> list[tuple[str, Any]] | None:
    """The rows of JSON or JSONL, each with its place; ``None`` for plain text."""
    start = text.lstrip()[0]
    if start == "[" or suffix == ".json":
        try:
            rows = loads(text)
        except ValueError as error:
            if suffix != ".json":  # the judges' markup begins with a bracket as well
                return None
            raise BadFile(f"{name}: no whole JSON ({error})") from None
        if not isinstance(rows, list) or not rows:
            raise BadFile(f"{name}: expected a list of chains that is not empty")
        return [(f"chain {number}", row) for number, row in enumerate(rows, 1)]
    if start != "{" and suffix != ".jsonl":
        return None
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return [(place, _line(line, f"{name}, {place}")) for place, line in lines if line.strip()]


def _line(line: str, place: str) -> Any:
    try:
        return loads(line)
    except JSONDecodeError as error:  # its own line is of this one line
        place = f"{place}, character {error.pos + 1}"
        raise BadFile(f"{place}: no JSON ({error.msg.removesuffix(' at')})") from None
    except ValueError as error:  # a number of thousands of digits, nested too deep
        raise BadFile(f"{place}: no JSON ({error})") from None


def _from_row(row: Any, number: int, place: str) -> Response:
    """The chain of a row; ``number`` is its name if it has none, ``place`` is for errors."""
    if not isinstance(row, Mapping):
        raise BadFile(f"{place}: {kind(row)}, expected an object")
    task_id = number if row.get("task_id") is None else row["task_id"]
    if isinstance(task_id, bool) or not isinstance(task_id, str | int):
        raise BadFile(f"{place}: task_id: {kind(task_id)}, expected a text or a number")
    for key, whole in FIELDS.items():
        if isinstance(row.get(key), str):
            return chain(str(task_id), row[key], whole=whole)
    found = ", ".join(f"{name!r} ({kind(value)})" for name, value in row.items())
    raise BadFile(f"{place}: expected one of {', '.join(FIELDS)} as text; it has {found:.300}")


def chain(task_id: str, text: str, *, whole: bool) -> Response:
    """A response with a text and no ids; ``whole`` says that the text is the thinking. Half
    surrogate pairs (from a cut emoji) become U+FFFD, for nothing can store or show them."""
    task_id, text = (re.sub("[\ud800-\udfff]", "\ufffd", part) for part in (task_id, text))
    thinking, start, answer, closed = (
        (text, 0, "", True) if whole else split(text, opened=False)
    )
    return Response(task_id, "", "", (), (), text, thinking, start, answer, closed, True)
