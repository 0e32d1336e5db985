"""Stage 1: tasks -> responses (method, section 3).

The work is cut into fixed chunks of tasks, the unit of refill, flush and resume: a chunk is
always decoded whole, so that a run which was stopped ends in the same ids as one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from stllms.generation import prompts
from stllms.models import engines
from stllms.models.engines import Row
from stllms.models.model import Model
from stllms.records import CLOSE, OPEN, Response, Task, from_rows, response_from_row, to_row
from stllms.runs import audit
from stllms.runs.store import Rows, resumed
from stllms.runs.workers import Tick
from stllms.terminal import token_bar

#: Tasks in a chunk.
CHUNK = 100


def responses(
    model: Model,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    style: str = "sound",
    system: str | None = None,
    store: Rows | None = None,
    progress: bool = True,
) -> list[Response]:
    """What ``model`` writes for ``tasks``, in their order.

    Args:
        max_new_tokens: limit of a response; one that reaches it is not ``finished``.
        batch_size: rows at a time; ``None`` suits the device.
        temperature: 0 is greedy.
        seed: of the sampling noise, with the task's id (:mod:`stllms.models.engines.sampling`).
        style, system: of the prompts (:func:`stllms.generation.prompts.opening`).
        store: rows by ``task_id``; what it holds is not made again, what is made is added
            chunk by chunk.

    Raises:
        ValueError: for a task id that occurs twice, or a prompt longer than the context.
        StaleArtefact: where the rows of ``store`` were made by another model, with another
            prompt or other options, naming it.
        SamplingError: if the audit of all of them fails.
    """
    twice = [name for name, count in Counter(task.id for task in tasks).items() if count > 1]
    if twice:
        raise ValueError(f"task ids must differ; more than once: {', '.join(sorted(twice))}")
    opened = [prompts.opening(model, task, style, system) for task in tasks]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    if store is not None:
        store.bind({**model.identity, **options})
        ids = {task.id: start[1] for task, start in zip(tasks, opened, strict=True)}
        prompts.same(store.path, read(store), ids)

    shown = token_bar(len(tasks), "responses", most=max_new_tokens, enabled=progress)
    with engines.writing(model), shown as bar:
        keys = [(task.id,) for task in tasks]
        asked = list(zip(tasks, opened, strict=True))
        make = partial(_written, batch_size=batch_size, **options)
        rows = resumed(keys, asked, make, size=CHUNK, model=model, store=store, bar=bar)
    found = [response_from_row(row) for row in rows]
    audit.audit(found).check()
    return found


def _written(
    model: Model,
    asked: Sequence[tuple[Task, tuple[str, tuple[int, ...]]]],
    tick: Tick,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows of a chunk of tasks, each with its opened prompt."""
    rows = [Row(ids, task.id) for task, (_, ids) in asked]
    written = engines.generate(model, rows, progress=tick, **options)
    return [
        to_row(prompts.response(model, task, prompt, chain.ids, chain.audit))
        for (task, prompt), chain in zip(asked, written, strict=True)
    ]


def read(store: Rows) -> list[Response]:
    """The stored responses, in the order of the file."""
    return from_rows(store.load(), response_from_row, store.path)


def summary(responses: Sequence[Response]) -> dict[str, float]:
    """Counts that a reader should see before any number: finished, closed, lengths, and the
    responses that use a tag twice (counting the one in the prompt) or write before it, whose
    text is kept all the same (:func:`stllms.generation.prompts.split`)."""
    count = len(responses)
    tokens = [len(one.output_ids) for one in responses]
    opened = [
        one.prompt_text.rstrip().endswith(OPEN) + one.text.count(OPEN) for one in responses
    ]
    return {
        "responses": count,
        "finished": sum(one.finished for one in responses),
        "truncated": sum(not one.finished for one in responses),
        "thinking closed": sum(one.closed for one in responses),
        "without thinking": sum(not one.thinking for one in responses),
        f"{OPEN} again": sum(times > 1 for times in opened),
        f"{CLOSE} again": sum(one.text.count(CLOSE) > 1 for one in responses),
        f"text before {OPEN}": sum(bool(prompts.before(one)) for one in responses),
        "mean output tokens": round(sum(tokens) / max(1, count), 1),
        "longest output": max(tokens, default=0),
    }
