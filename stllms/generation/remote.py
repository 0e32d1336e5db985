"""Tasks -> responses through an API, stored like the replies of a judge.

What a provider calls reasoning, in a field of its own or between ``<think>`` and ``</think>``
in the text, becomes ``thinking``. The tokens are not known here: ``prompt_ids`` and
``output_ids`` are empty.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import Any

from stllms import registry
from stllms.generation import prompts
from stllms.models import api
from stllms.records import CLOSE, OPEN, Response, Task
from stllms.terminal import plain

#: What stands in the identity of a stored reply, where a judge's has its protocol.
PROTOCOL = "response"


def responses(
    entry: registry.ModelEntry,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    folder: str | os.PathLike[str],
    temperature: float = 0.0,
    style: str = "sound",
    system: str | None = None,
    **options: Any,
) -> tuple[list[Response], dict[str, str]]:
    """What an API model writes for each task, in the order of the tasks; and task id -> reason
    of those that failed.

    ``entry`` says how the model is called, which kind it is (``style``, ``system`` and kind
    choose the messages as in :func:`stllms.generation.prompts.chat`) and what is sent beside
    the run's own fields. ``options`` are those of :class:`stllms.models.api.Client`
    (``base_url``, ``max_cost``, ...).

    A task that failed is named in a printed line and asked again on the next run. Another line
    counts the chains of a thinking model that came without reasoning (:func:`withheld`).
    Raises ``ValueError`` for a limit below what the provider takes, and the errors of
    ``Client.replies``.
    """
    check_limit(entry, max_new_tokens)
    name = str(entry.api_id)
    asked = requests(
        entry,
        tasks,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        style=style,
        system=system,
    )
    replies = api.Client(name, folder=folder, **options).replies(asked, unusable)
    made, failed = [], {}
    for task, request, reply in zip(tasks, asked, replies, strict=True):
        if reply.failed:
            failed[task.id] = reply.failed
        else:
            made.append(to_response(task, prompt_text(request), reply, entry.kind))
    if failed:
        first = [f"{task_id}: {reason}" for task_id, reason in islice(failed.items(), 5)]
        print(
            f"{name}: {len(failed)} of {len(tasks)} tasks failed and are left out (asked again "
            f"on the next run): {plain('; '.join(first))}"
            + ("; ..." if len(failed) > 5 else "")
        )
    if silent := sum(withheld(one, entry.kind) for one in made):
        print(
            f"{name}: {silent} of {len(made)} chains of a thinking model came without "
            "reasoning and have nothing to label: the provider keeps it to itself, or wants a "
            "switch for it (docs/gpu_and_costs.md)"
        )
    return made, failed


def requests(
    entry: registry.ModelEntry,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    temperature: float,
    style: str = "sound",
    system: str | None = None,
) -> list[api.Request]:
    """What a model is asked, one request per task; arguments as of :func:`responses`."""
    sent = {"temperature": temperature, **entry.extra}
    chats = [prompts.chat(task, entry.kind, style, system) for task in tasks]
    return [
        api.Request(
            name=task.id,
            messages=tuple(one | {"content": api.clean(one["content"])} for one in chat),
            identity={"protocol": PROTOCOL, "max_tokens": max_new_tokens, **sent},
            max_tokens=max_new_tokens,
            expected_tokens=max_new_tokens,
            extra=sent,
        )
        for task, chat in zip(tasks, chats, strict=True)
    ]


def prompt_text(request: api.Request) -> str:
    """What a model was asked, as one text."""
    return "\n".join(message["content"] for message in request.messages)


def check_limit(entry: registry.ModelEntry, max_new_tokens: int) -> None:
    """Refuses a limit of new tokens that the provider of a model does not take."""
    if max_new_tokens < entry.least_tokens:
        raise ValueError(
            f"max_tokens_compare: {max_new_tokens}, but {entry.name} takes no less than "
            f"{entry.least_tokens} where it thinks; raise it (--option "
            "max_tokens_compare=2000) or leave the model out"
        )


def withheld(response: Response, kind: str) -> bool:
    """Whether a thinking model's reply came without reasoning, in a field or in tags."""
    tags = OPEN in response.text or CLOSE in response.text
    return kind == "thinking" and not response.thinking and not tags


def unusable(reply: api.Reply) -> str | None:
    """Why a reply is no response, ``None`` if it is one."""
    if reply.content.strip() or reply.reasoning.strip():
        return None
    return f"empty reply (finish_reason {reply.finish})"


def to_response(task: Task, prompt_text: str, reply: api.Reply, kind: str) -> Response:
    """The record of a reply. ``closed`` is true only if the provider says so.

    That is a closing tag in the text, or reasoning in its own field with an answer beside it
    and ``finish_reason`` ``stop``. Without any reasoning the whole text is the thinking, as for
    a local instruct model; but for a *thinking* model, whose provider then kept the
    reasoning to itself, the thinking is empty and the text the answer.
    """
    text, finished = reply.content, reply.finish == "stop"
    if reply.reasoning.strip():
        answer = text.strip()
        closed = finished and bool(answer)
        thinking, begin = reply.reasoning.strip(), len(OPEN) + 1
        text = f"{OPEN}\n{thinking}"
        text += f"\n{CLOSE}\n\n{answer}" if closed else ""
    else:
        inline = OPEN in text or CLOSE in text
        thinking, begin, answer, closed = prompts.split(text, opened=False)
        closed = closed and (finished or inline)
        if kind == "thinking" and not inline:
            thinking, begin = "", 0
    return Response(
        task_id=task.id,
        category=task.category,
        prompt_text=prompt_text,
        prompt_ids=(),
        output_ids=(),
        text=text,
        thinking=thinking,
        thinking_start=begin,
        answer=answer,
        closed=closed,
        finished=finished,
    )
