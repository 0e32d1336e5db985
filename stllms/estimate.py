"""What a run has to do before it begins: chains, tokens at most, calls to APIs and their cost.

A module of its own, because the runner (:mod:`stllms.execute`) imports no stage, and this asks
the stages themselves: tasks, conditions and requests come from the functions that the notebooks
call, so that the estimate and the run cannot disagree. What a store holds is not counted.

Upper bounds, and said to be: every chain may reach its limit of tokens; where the directions
are still to be made, every behaviour may get one and a layer of its own; a judge is sent chains
of the greatest length, at the guess of :func:`stllms.replies.tokens`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from stllms import api, artifacts, loading, pipeline, remote, steering, tasks
from stllms.annotate import stage as annotation
from stllms.annotate.judge import Judge
from stllms.config import RunConfig
from stllms.files import Rows
from stllms.records import (
    STEERED,
    STEERED_KEY,
    Response,
    response_from_row,
    steered_from_row,
)
from stllms.replies import Request
from stllms.vectors import Controls, SteeringVectors

#: What stands for a text that is not written yet, where a judge is to be paid for it. It has
#: 21 tokens; the released chains of three R1 distillations have 19 to 21 a sentence.
_SENTENCE = (
    "So the next thing to find out is whether this holds for the number that was given. "
)


@dataclass(frozen=True)
class Work:
    """What a stage still has to do for one model.

    ``chains`` are to be written, in ``tokens`` at most where the model is a local one;
    ``at_most`` says that there may be fewer. ``calls`` are what APIs are sent.
    """

    stage: str
    model: str
    chains: int = 0
    tokens: int = 0
    at_most: bool = False
    calls: tuple[api.Estimate, ...] = ()

    @property
    def n_calls(self) -> int:
        """Calls to any API."""
        return sum(one.calls for one in self.calls)


def works(jobs: Iterable[tuple[str, RunConfig]]) -> list[Work]:
    """What the stages with their configurations have to do, in their order; notebook 05 has an
    entry for each of its models. Sends nothing and needs no key.

    Raises ``ValueError`` for tasks that cannot be had, and ``BadFile`` for a store that cannot
    be read.
    """
    made: list[Work] = []
    for stage, config in jobs:
        if stage == "05_compare":
            made += [_compared(config, model) for model in config.models]
        else:
            made.append(_OF_STAGE[stage](config))
    return made


# -- the stages ------------------------------------------------------------------------------


def _generated(config: RunConfig) -> Work:
    lacking, _ = _responses(config, "build", config.folder / "responses.jsonl")
    limit = config.settings.max_tokens
    return Work("01_generate", config.model, lacking, lacking * limit)


def _labelled(config: RunConfig) -> Work:
    lacking, there = _responses(config, "build", config.folder / "responses.jsonl")
    calls = _judged(config, config.folder / "annotations.jsonl", there, lacking)
    return Work("02_train_vectors", config.model, at_most=lacking > 0, calls=calls)


def _measured(config: RunConfig) -> Work:
    return Work("03_attribute_layers", config.model)


def _steered(config: RunConfig) -> Work:
    settings, grids = config.settings, conditions(config)
    known = all(pipeline.has_run(stage, config) for stage in pipeline.REQUIRES["04_steer"])
    chains, calls = 0, []
    for name, keys in grids.items():
        store = Rows(config.folder / name, STEERED_KEY)
        stored = {one.key: one for one in map(steered_from_row, store.load())}
        lacking = sum(key not in stored for key in keys)
        bare = [
            one.response
            for key in keys
            if (one := stored.get(key)) and not annotation.labelled(one, config.annotator)
        ]
        chains += lacking
        calls += _calls(config, bare, lacking, settings.max_tokens)
    tokens = chains * settings.max_tokens
    return Work("04_steer", config.model, chains, tokens, not known and chains > 0, _sum(calls))


def _compared(config: RunConfig, model: str) -> Work:
    member = artifacts.Folder.comparison(config).member(model)
    own, limit = member.config, member.config.settings.max_tokens_compare
    if own.entry.source != "api":
        lacking, there = _responses(own, "compare", member.responses)
        calls = _judged(own, member.annotations, there, lacking, limit)
        return Work("05_compare", model, lacking, lacking * limit, calls=calls)
    asked = remote.requests(
        own.entry,
        tasks.for_run(own, "compare"),
        max_new_tokens=limit,
        temperature=own.settings.temperature,
        style=own.prompts,
    )
    client = api.Client(
        str(own.entry.api_id), folder=member.path / "api", base_url=own.base_url
    )
    sent = client.estimate(asked, remote.unusable)
    unlabelled = len(asked) - len(_done(own, member.annotations))
    calls = [sent, *_calls(own, [], unlabelled, limit)]
    return Work("05_compare", model, sent.calls, calls=_sum(calls))


_OF_STAGE = {
    "01_generate": _generated,
    "02_train_vectors": _labelled,
    "03_attribute_layers": _measured,
    "04_steer": _steered,
}


def conditions(config: RunConfig) -> dict[str, list[tuple]]:
    """The keys of the rows that notebook 04 writes, by file: as many as there will be, or may
    be where the directions are not made yet."""
    settings, asked = config.settings, tasks.for_run(config, "evaluate")
    vectors, layers, controls = _directions(config)
    arms = steering.arms(vectors, layers, settings.coefficients)
    nulls = steering.control_arms(controls, layers, settings.coefficients)
    some = tasks.for_controls(config, asked)
    found = {
        "steered.jsonl": [arm.key(task.id) for task in asked for arm in arms]
        + [arm.key(task.id) for task in some for arm in nulls]
    }
    if settings.n_sweep:
        vectors, _, controls = _directions(config, every_layer=True)
        few = controls.first(steering.SWEPT_CONTROLS)
        arms = steering.sweep_arms(vectors, settings.coefficients, few)
        swept = asked[: settings.n_sweep]
        found["sweep.jsonl"] = [arm.key(task.id) for task in swept for arm in arms]
    return found


def _directions(
    config: RunConfig, *, every_layer: bool = False
) -> tuple[SteeringVectors, dict[str, int], Controls]:
    """The directions, steering layers and controls of a run; before they are made, as many as
    there can be, of width 1."""
    folder, n = artifacts.Folder(config), config.settings.random_directions
    if all(pipeline.has_run(stage, config) for stage in pipeline.REQUIRES["04_steer"]):
        return (
            SteeringVectors.load(folder.vectors),
            artifacts.read_json(folder / "steering_layers.json"),
            Controls.load(folder / "controls.safetensors").first(n),
        )
    layers = config.entry.steering_layers or {b: i for i, b in enumerate(STEERED)}
    n_layers = _n_layers(config) if every_layer else max(layers.values()) + 1
    zeros = torch.zeros(len(STEERED), n_layers, 1)
    counts = torch.zeros(len(STEERED), dtype=torch.long)
    controls = Controls(tuple(f"control:{i}" for i in range(n)), torch.zeros(n, n_layers, 1))
    return SteeringVectors(STEERED, zeros, zeros, zeros[0], counts), layers, controls


def _n_layers(config: RunConfig) -> int:
    """The layers of a model that is not loaded."""
    source, options = loading.source_of(config.entry)
    if config.revision is not None:
        options = options | {"revision": config.revision}
    with loading.quiet():
        found = transformers.AutoConfig.from_pretrained(source, **options)
    return found.get_text_config().num_hidden_layers


# -- what is stored, and what a judge is sent ------------------------------------------------


def _responses(config: RunConfig, part: str, path: Path) -> tuple[int, list[Response]]:
    """How many tasks have no stored response, and the responses that are there."""
    stored = {row["task_id"]: row for row in Rows(path, ("task_id",)).load()}
    asked = tasks.for_run(config, part)
    there = [response_from_row(stored[t.id]) for t in asked if t.id in stored]
    return len(asked) - len(there), there


def _judged(
    config: RunConfig,
    path: Path,
    there: Sequence[Response],
    lacking: int,
    limit: int | None = None,
) -> tuple[api.Estimate, ...]:
    """What a judge is sent about the responses that are there without a label in the file
    ``path``, and about those that are lacking."""
    done = _done(config, path)
    bare = [one for one in there if one.task_id not in done]
    return _sum(_calls(config, bare, lacking, limit or config.settings.max_tokens))


def _done(config: RunConfig, path: Path) -> set[str]:
    """The tasks whose chain the run's annotator has labelled."""
    stored = annotation.load(Rows(path, annotation.KEY), config.annotator)
    return {one.task_id for one in stored if one.failed is None}


def _calls(
    config: RunConfig, bare: Sequence[Response], lacking: int, limit: int
) -> list[api.Estimate]:
    """What the judge of a run is sent about responses, and about as many as are ``lacking``."""
    if not config.annotator.startswith("openai:"):
        return []
    judge = annotation.for_run(config)
    assert isinstance(judge, Judge)
    one = _unwritten(judge, limit)
    sizes = [request.size for request in one]
    tokens_in, tokens_out = (lacking * sum(size[i] for size in sizes) for i in range(2))
    price = judge.client.target.price
    later = api.Estimate(
        judge.client.target.model,
        lacking * len(one),
        0,
        tokens_in,
        tokens_out,
        price.of(tokens_in, tokens_out) if price else None,
        price.currency if price else "USD",
    )
    return [judge.estimate(bare), later]


def _unwritten(judge: Judge, limit: int) -> list[Request]:
    """The requests about a chain of ``limit`` tokens."""
    text = (_SENTENCE * (4 * limit // len(_SENTENCE) + 1))[: 4 * limit]
    response = Response("", "", "", (), (), text, text, 0, "", True, True)
    return judge.protocol.requests(response)


def _sum(calls: Iterable[api.Estimate]) -> tuple[api.Estimate, ...]:
    """One estimate a model, without those that send nothing."""
    found: dict[str, api.Estimate] = {}
    for one in calls:
        if one.calls:
            old = found.get(one.model)
            found[one.model] = one if old is None else _both(old, one)
    return tuple(found.values())


def _both(one: api.Estimate, other: api.Estimate) -> api.Estimate:
    known = one.cost is not None and other.cost is not None
    return api.Estimate(
        one.model,
        one.calls + other.calls,
        one.stored + other.stored,
        one.tokens_in + other.tokens_in,
        one.tokens_out + other.tokens_out,
        one.cost + other.cost if known else None,
        one.currency,
    )


# -- for people ------------------------------------------------------------------------------


def table(made: Sequence[Work]) -> str:
    """The works and their sum as lines of text; without calls the columns of calls are left
    out, and a line says that there are none."""
    paid = any(work.calls for work in made)
    head = ["to do", "chains", "tokens at most", *(("calls", "cost") if paid else ())]
    rows = [head, *(_row(f"{w.stage} {_short(w.model)}", [w], paid) for w in made)]
    if len(made) > 1:
        rows.append(_row("together", made, paid))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    if not paid:
        lines.append("no calls to an API")
    return "\n".join(lines)


def line(stage: str, config: RunConfig) -> str:
    """What one stage has to do, in a line; empty where it writes no chain and calls no API."""
    made = works([(stage, config)])
    chains, tokens = sum(work.chains for work in made), sum(work.tokens for work in made)
    parts = []
    if chains:
        up_to = "up to " if any(work.at_most for work in made) else ""
        limit = f", at most {tokens:,} tokens" if tokens else ""
        parts.append(f"{up_to}{chains:,} chains to write{limit}")
    if any(work.calls for work in made):
        calls = sum(work.n_calls for work in made)
        parts.append(f"{calls:,} calls to an API, {_cost(made)}")
    return f"{stage}: {'; '.join(parts)}" if parts else ""


def _row(name: str, made: Sequence[Work], paid: bool) -> list[str]:
    chains, tokens = sum(work.chains for work in made), sum(work.tokens for work in made)
    up_to = "up to " if any(work.at_most and work.chains for work in made) else ""
    cells = [name, f"{up_to}{chains:,}" if chains else "-", f"{tokens:,}" if tokens else "-"]
    if paid:
        calls = sum(work.n_calls for work in made)
        up_to = "up to " if any(work.at_most and work.calls for work in made) else ""
        cells += [f"{up_to}{calls:,}" if calls else "-", _cost(made) if calls else "-"]
    return cells


def _cost(made: Sequence[Work]) -> str:
    """What the calls cost at most, by currency, and whose price nobody knows."""
    sums: Counter[str] = Counter()
    unknown = {}
    for one in (call for work in made for call in work.calls):
        if one.cost is None:
            unknown[one.model] = None
        else:
            sums[one.currency] += one.cost
    parts = [f"at most {value:,.2f} {currency}" for currency, value in sums.items()]
    return ", ".join([*parts, *(f"price of {model} unknown" for model in unknown)])


def _short(model: str) -> str:
    """A model's name without the owner or the folders before it."""
    return model.rstrip("/").rpartition("/")[2]
