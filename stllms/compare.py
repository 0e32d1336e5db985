"""The chains of several models for notebook 05: the one loop over whole stages.

Notebooks compose the stages, but have no loops; the comparison runs two stages for each of its
models, so its loop lives here, above the stages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stllms import (
    comparison,
    generate,
    models,
    progress,
    released,
    remote,
    sampling,
    tasks,
)
from stllms.annotate import read, stage
from stllms.artifacts import Folder, Rows, read_json
from stllms.comparison import Member
from stllms.config import MODELS, ModelEntry, RunConfig, resolve
from stllms.records import Annotation, Response, Task

#: Released file -> the label reader: the treatment of METHOD section 11, and the sound one.
READERS = {"published": "published-counts", "apart": "tolerant"}


def members(config: RunConfig, folder: Folder) -> list[Member]:
    """The compared models in their stable order, with the chains they lack made now.

    The models of ``config.models``, then the runs of ``config.folders`` and the released files
    of ``config.published``. Raises ``ValueError`` before any chain is made where an API takes
    no limit as small as the run's.
    """
    for name in config.models:
        remote.check_limit(resolve(name), config.settings.max_tokens_compare)
    found = []
    for name in config.models:
        with progress.about(f"{name}:"):
            found.append(of_model(config.for_model(name), folder.member(name)))
    found += [_apart(of_run(Path(one).expanduser()), found) for one in config.folders]
    if config.published is not None:
        paths = sorted(Path(config.published).glob("reasoning_comparison_*.json"))
        released_ones = [of_released(path, READERS[config.empty_chains]) for path in paths]
        found += [_apart(one, found) for one in released_ones]
    return comparison.ordered(_distinct(found))


def _distinct(found: Sequence[Member]) -> list[Member]:
    """The members; those whose display name another has too go by owner and name."""
    often = Counter(one.display for one in found)
    return [
        replace(one, display="/".join(one.name.split("/")[-2:]))
        if often[one.display] > 1
        else one
        for one in found
    ]


def _apart(one: Member, others: Sequence[Member]) -> Member:
    """A member from elsewhere, by a name of its own where the comparison has the model too."""
    taken = one.display in {other.display for other in others}
    return replace(one, display=f"{one.display} ({one.source})") if taken else one


def of_model(config: RunConfig, folder: Folder) -> Member:
    """One model: its chains on the comparison's tasks, annotated.

    A task for which an API gave no chain, or none with reasoning, is unavailable.
    """
    folder.open()
    responses, model, lacking = _responses(config, folder)
    annotations = stage.annotations(
        stage.for_run(config),
        responses,
        model=model,
        store=folder.rows(folder.annotations, stage.KEY),
    )
    return comparison.member(
        config.entry,
        [*annotations, *lacking],
        tasks=config.task_set,
        annotator=config.annotator,
    )


def _responses(
    config: RunConfig, folder: Folder
) -> tuple[list[Response], models.Model | None, list[Annotation]]:
    """The chains, the model where it is local, and a failed annotation for each task that an
    API gave no chain for."""
    asked = tasks.for_run(config, "compare")
    options = generate.options(config) | {
        "max_new_tokens": config.settings.max_tokens_compare,
    }
    if config.entry.source == "api":
        made = remote.responses(
            config.model,
            asked,
            max_new_tokens=options["max_new_tokens"],
            temperature=options["temperature"],
            style=options["style"],
            base_url=config.base_url,
            max_cost=config.max_cost,
            folder=folder.path / "api",
        )
        kept = [one for one in made if not remote.withheld(one, config.entry.kind)]
        return kept, None, _lacking(config, folder, asked, made, kept)
    model = models.for_run(config)
    folder.note(device=str(model.device), dtype=str(model.dtype))
    folder.made_with(model.identity)
    made = generate.responses(model, asked, store=folder.rows(folder.responses), **options)
    folder.note(sampling_audit_responses=sampling.audit(made).recorded)
    return made, model, []


def _lacking(
    config: RunConfig,
    folder: Folder,
    asked: Sequence[Task],
    made: Sequence[Response],
    kept: Sequence[Response],
) -> list[Annotation]:
    """What stands for the tasks whose chain an API did not give, with the reason."""
    reasons = remote.failures(folder.path / "api")
    reasons |= {one.task_id: "the reply holds no reasoning" for one in made}
    have = {one.task_id for one in kept}
    return [
        Annotation(task.id, config.annotator, failed=reasons.get(task.id, "no reply"))
        for task in asked
        if task.id not in have
    ]


def of_run(path: Path) -> Member:
    """The model of a run's folder: the chains of notebook 01 with the labels of notebook 02.

    Raises ``ValueError`` for a folder without chains that the run's annotator labelled.
    """
    own = RunConfig.from_dict({**read_json(path / "run.json")["configuration"], "folders": []})
    labelled = stage.load(Rows(path / "annotations.jsonl", stage.KEY), own.annotator)
    if not labelled:
        raise ValueError(f"{path}: no annotations by {own.annotator}, the run's annotator")
    return comparison.member(
        own.entry, labelled, source="folder", tasks=own.task_set, annotator=own.annotator
    )


def of_released(path: Path, reader: str) -> Member:
    """The model of a released ``reasoning_comparison_<name>.json``, read by ``reader``.

    The member's tasks are the places in the file: all released files share their 100 questions.
    """
    made = [
        Annotation(
            str(place),
            "released",
            tuple(read(row["annotated_response"], reader=reader).segments),
            ledger={"reader": reader},
        )
        for place, row in enumerate(released.load_comparison(path))
    ]
    return comparison.member(
        entry_of(path), made, source="released", tasks="released", annotator="released"
    )


def entry_of(path: Path) -> ModelEntry:
    """The model of a released file: the registry's with that hub name, else one of no pair.

    A name that is not in the registry is an instruct model if it says so, else of unknown
    kind.
    """
    name = re.sub(r"^(mean_vectors|layer_effects|reasoning_comparison)_", "", path.stem)
    for entry in MODELS.values():
        if entry.hub_id and entry.hub_id.split("/")[-1].lower() == name.lower():
            return entry
    kind = "instruct" if "instruct" in name.lower() else "unknown"
    return ModelEntry(name=name, hub_id=None, display=name, kind=kind)
