"""What a model is asked, and how what it wrote is read (METHOD, section 3).

A thinking model gets the question alone; an instruct model is asked to think step by step
before it answers. The published script sent the step-by-step prompt to every model, which
stays available as ``style="published"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stllms import config
from stllms.provenance import StaleArtefact
from stllms.records import Response, Task

if TYPE_CHECKING:
    from stllms.models import Model

STYLES = ("sound", "published")
STEP_BY_STEP = "{question}\n\nThink step by step first, then give the final answer."
OPEN, CLOSE = "<think>", "</think>"


def prompt(question: str, kind: str, style: str = "sound") -> str:
    """The user message for ``question`` to a model of ``kind`` ("thinking", "instruct", ...).

    Raises ``ValueError`` for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}; choose one of {', '.join(STYLES)}")
    if kind == "thinking" and style == "sound":
        return question
    return STEP_BY_STEP.format(question=question)


def kind_of(model: Model) -> str:
    """``thinking`` or ``instruct``: by the registry, else by a ``<think>`` in the template."""
    entry = config.MODELS.get(model.name)
    if entry is not None and entry.kind in ("thinking", "instruct"):
        return entry.kind
    return "thinking" if OPEN in str(model.tokenizer.chat_template or "") else "instruct"


def opening(model: Model, task: Task, style: str = "sound") -> tuple[str, tuple[int, ...]]:
    """The prompt of ``task`` as text and ids, chat template applied."""
    return model.prompt_ids(prompt(task.content, kind_of(model), style))


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
    start = 0
    if not opened and first < 0 and close < 0:
        start, stop = _stripped(text, 0, len(text))
        return text[start:stop], start, text.strip(), True
    if not opened and first >= 0 and not 0 <= close < first:
        start = first + len(OPEN)
    while (again := _LEADING.match(text, start)) is not None:
        start = again.end()
    closed = CLOSE in text[start:]
    stop = text.index(CLOSE, start) if closed else len(text)
    answer = text[stop + len(CLOSE) :].strip() if closed else ""
    start, stop = _stripped(text, start, stop)
    return text[start:stop], start, answer, closed


_LEADING = re.compile(rf"\s*{re.escape(OPEN)}")


def before(made: Response) -> str:
    """What a model wrote before the ``<think>`` that its thinking follows, mostly nothing."""
    return made.text[: made.thinking_start].replace(OPEN, "").strip()


def irregular(made: Sequence[Response]) -> dict[str, int]:
    """How many responses use the tags otherwise than once each around the thinking.

    ``"<think> again"`` (counting the one in the prompt), ``"</think> again"``, ``"text before
    <think>"``: in all three cases the text is kept (:func:`split`).
    """
    opens = [one.prompt_text.rstrip().endswith(OPEN) + one.text.count(OPEN) for one in made]
    return {
        f"{OPEN} again": sum(count > 1 for count in opens),
        f"{CLOSE} again": sum(one.text.count(CLOSE) > 1 for one in made),
        f"text before {OPEN}": sum(bool(before(one)) for one in made),
    }


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    inside = text[start:stop]
    left = start + len(inside) - len(inside.lstrip())
    return left, max(left, start + len(inside.rstrip()))


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


def as_used(model: Model, made: Sequence[Response], how: str) -> list[Response]:
    """The responses whose ids the activations are taken from (METHOD, section 5).

    ``"generated"``: the ids that were used. ``"published"``: the decoded text tokenised again.
    """
    if how == "generated":
        return list(made)
    again = [
        model.tokenizer([one.prompt_text, one.text], add_special_tokens=False)["input_ids"]
        for one in made
    ]
    return [
        replace(one, prompt_ids=tuple(ids[0]), output_ids=tuple(ids[1]))
        for one, ids in zip(made, again, strict=True)
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
