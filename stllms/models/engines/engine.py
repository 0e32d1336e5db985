"""What an engine is asked for, and what it says that it can.

A stage hands over rows (prompt ids, the key of their noise, interventions) and gets the ids
that were written. It knows neither batches nor devices. What an engine cannot do is refused
before the first chain, by name (:func:`check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from stllms.models.engines.interventions import WHERE, Intervention, fingerprint, think_end
from stllms.models.engines.interventions import check as check_place
from stllms.models.model import Model


@dataclass(frozen=True)
class Row:
    """One chain to be written: its prompt, the key of its noise, its interventions. Of a
    ``probe`` (:mod:`stllms.models.engines.probes`) one token is written, its logits kept."""

    prompt_ids: tuple[int, ...]
    key: str
    interventions: tuple[Intervention, ...] = ()
    probe: bool = False


@dataclass(frozen=True)
class Written:
    """A chain that was written: its new ids, the one that ended it included, and its audit
    (:func:`stllms.runs.audit.entry`), whose last digits depend on the batch and which
    is not compared; of a probe also the ``logits [V]`` behind its prompt."""

    ids: tuple[int, ...]
    audit: dict[str, float] = field(compare=False)
    logits: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Can:
    """What an engine can do.

    ``operators`` and ``where`` are those of its interventions (``None``: every registered
    operator); ``per_row_vectors`` whether rows of a batch may differ in theirs, ``several``
    whether a row may have more than one; ``same_noise`` whether a token is a function of the
    logits, the seed, the key of the row and the step alone, so that plain and steered rows
    share their noise; ``watch`` whether what is written can be followed token by token.
    """

    operators: tuple[str, ...] | None = None
    where: tuple[str, ...] = WHERE
    per_row_vectors: bool = True
    several: bool = True
    same_noise: bool = True
    watch: bool = True


class Engine(Protocol):
    """Writes chains for one model."""

    name: str
    can: Can

    def generate(self, rows: Sequence[Row], **options: Any) -> list[Written]:
        """What is written for every row; options and result are those of :func:`generate`."""

    def close(self) -> None:
        """Gives the memory back, and the model its weights; the next call of
        :meth:`generate` starts again."""


def of(model: Model) -> Engine:
    """The engine of a model: the one it was loaded with, else our own loop."""
    if model.engine is None:
        from stllms.models.engines.transformers import Transformers

        model.engine = Transformers(model)
    return model.engine


@contextmanager
def writing(model: Model) -> Iterator[None]:
    """Around all that a stage writes: behind it the engine is closed, so that the weights of
    the model are there for what comes next."""
    try:
        yield
    finally:
        of(model).close()


def generate(
    model: Model,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    watch: Callable[[Sequence[Sequence[int]]], Any] | None = None,
) -> list[Written]:
    """What the engine of a model writes for every row, in the order of ``rows``.

    Args:
        max_new_tokens: limit of a row.
        batch_size: rows at a time; ``None`` suits the model and its device.
        temperature: 0 is greedy.
        seed: of the noise, with the key of a row.
        progress: called with (new tokens, rows that ended), and with what was told so far,
            below 0, when rows start again.
        watch: called after every step with the ids of every row so far; to be read, not kept
            or changed. What it raises ends the run.

    Raises:
        ValueError: for a row that does not fit the model (context, layer, width) or asks what
            the engine cannot do, naming both.
        SamplingError: for logits that are not finite, naming the row.
    """
    engine = of(model)
    if watch is not None and not engine.can.watch:
        raise ValueError(f"engine {engine.name} cannot be followed token by token")
    for row in rows:
        if len(row.prompt_ids) + max_new_tokens > model.max_context:
            raise ValueError(
                f"{row.key}: {len(row.prompt_ids)} prompt tokens and {max_new_tokens} new ones "
                f"exceed the context of {model.name}, {model.max_context} tokens: ask for fewer"
            )
    if temperature and not engine.can.same_noise:
        raise ValueError(
            f"engine {engine.name} draws with noise of its own, so that plain and steered "
            "rows would differ by chance: take temperature 0, or engine transformers"
        )
    check(model, [row.interventions for row in rows])
    return engine.generate(
        rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
        watch=watch,
    )


def check(model: Model, interventions: Iterable[Sequence[Intervention]]) -> None:
    """Raises ``ValueError`` for interventions of rows that have no place in the model or that
    its engine cannot do, naming what it can."""
    engine = of(model)
    can = engine.can
    every = [tuple(items) for items in interventions]
    if not can.per_row_vectors and len({*map(fingerprint, every)}) > 1:
        raise ValueError(
            f"engine {engine.name} steers all rows of a batch alike: take engine transformers"
        )
    for items in every:
        for item in items:
            check_place(item, model.n_layers, model.d_model, model.name)
            if can.operators is not None and item.operation not in can.operators:
                raise ValueError(
                    f"engine {engine.name} cannot do {item.operation!r}, only "
                    f"{', '.join(can.operators)}: take engine transformers"
                )
            if item.where not in can.where:
                raise ValueError(
                    f"engine {engine.name} cannot steer where={item.where!r}, only "
                    f"{', '.join(can.where)}: take engine transformers"
                )
            if item.where == "thinking" and think_end(model) < 0:
                raise ValueError(
                    f"{model.name} has no token </think>: where='thinking' would be all that "
                    "it writes, which is where='generated'"
                )
        if len(items) > 1 and not can.several:
            raise ValueError(
                f"engine {engine.name} has one intervention a row, not {len(items)}: take "
                "engine transformers"
            )
