"""The chains of several models for notebook 05: the one loop over whole stages.

Notebooks compose the stages, but have no loops; the comparison runs two stages for each of its
models, so its loop lives here, above the stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stllms import comparison, generate, models, released, remote, tasks
from stllms.annotate import read, stage
from stllms.artifacts import Folder
from stllms.comparison import Member
from stllms.config import MODELS, ModelEntry, RunConfig
from stllms.records import Annotation, Response

#: Released file -> the label reader: the treatment of METHOD section 11, and the sound one.
READERS = {"published": "published-counts", "apart": "tolerant"}


def members(config: RunConfig, folder: Folder) -> list[Member]:
    """The compared models in their stable order, with the chains they lack made now.

    The models of ``config.models``, then the released files of ``config.published``.
    """
    found = [of_model(config.for_model(name), folder.member(name)) for name in config.models]
    if config.published is not None:
        paths = sorted(Path(config.published).glob("reasoning_comparison_*.json"))
        released_ones = [of_released(path, READERS[config.empty_chains]) for path in paths]
        found += [_apart(one, found) for one in released_ones]
    return comparison.ordered(found)


def _apart(one: Member, others: Sequence[Member]) -> Member:
    """The member of a released file, by a name of its own where the run has the model too."""
    taken = one.display in {other.display for other in others}
    return replace(one, display=f"{one.display} (released)") if taken else one


def of_model(config: RunConfig, folder: Folder) -> Member:
    """One model: its chains on the comparison's tasks, annotated."""
    folder.open()
    responses, model = _responses(config, folder)
    annotations = stage.annotations(
        stage.for_run(config),
        responses,
        model=model,
        store=folder.rows(folder.annotations, stage.KEY),
    )
    return comparison.member(
        config.entry, annotations, tasks=config.task_set, annotator=config.annotator
    )


def _responses(config: RunConfig, folder: Folder) -> tuple[list[Response], models.Model | None]:
    asked = tasks.for_run(config, "compare")
    options = generate.options(config) | {
        "max_new_tokens": config.settings.max_tokens_compare,
    }
    if config.entry.source == "api":
        made = remote.responses(
            config.entry.api_id,
            asked,
            max_new_tokens=options["max_new_tokens"],
            temperature=options["temperature"],
            base_url=config.base_url,
            max_cost=config.max_cost,
            folder=folder.path / "api",
        )
        return made, None
    model = models.for_run(config)
    folder.note(device=str(model.device), dtype=str(model.dtype))
    return generate.responses(
        model, asked, store=folder.rows(folder.responses), **options
    ), model


def of_released(path: Path, reader: str) -> Member:
    """The model of a released ``reasoning_comparison_<name>.json``, read by ``reader``.

    The member's tasks are the places in the file: all released files share their 100 questions.
    """
    made = [
        Annotation(
            str(place), reader, tuple(read(row["annotated_response"], reader=reader).segments)
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
