"""What a model is asked, and how what it wrote is read (METHOD, section 3).

A thinking model gets the question alone; an instruct model is asked to think step by step
before it answers. The published script sent the step-by-step prompt to every model, which
stays available as ``style="published"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stllms import config
from stllms.files import Rows
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

    ``opened`` says that the prompt ended in ``<think>``. A chain that never closes is cut at
    the end of the text and has no answer. A text without any tag is all thinking and all
    answer, and counts as closed: an instruct model thinks aloud.
    """
    start = 0
    if OPEN in text:
        start = text.index(OPEN) + len(OPEN)
    elif not opened:
        start, stop = _stripped(text, 0, len(text))
        return text[start:stop], start, text.strip(), True
    closed = CLOSE in text[start:]
    stop = text.index(CLOSE, start) if closed else len(text)
    answer = text[stop + len(CLOSE) :].strip() if closed else ""
    start, stop = _stripped(text, start, stop)
    return text[start:stop], start, answer, closed


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    inside = text[start:stop]
    left = start + len(inside) - len(inside.lstrip())
    return left, max(left, start + len(inside.rstrip()))


def same(store: Rows, prompt_ids: Mapping[str, Sequence[int]]) -> None:
    """Raises ``StaleArtefact`` for a stored chain whose prompt is not that of ``prompt_ids``,
    by task: its text, the step-by-step suffix, the template or the tokenizer changed."""
    for row in store.load():
        mine, now = row.get("response", row), prompt_ids.get(row["task_id"])
        if now is not None and tuple(mine["prompt_ids"]) != tuple(now):
            raise StaleArtefact(
                f"{store.path.name}: the chain of task {row['task_id']} answers another prompt "
                f"({mine['prompt_text'][:60]!r} ...): --fresh makes it again; or move "
                f"{store.path} away"
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
    model: Model, task: Task, opened: tuple[str, Sequence[int]], output_ids: Sequence[int]
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
    )
