"""The chains of several models for notebook 05: the one loop over whole stages.

Notebooks compose the stages and have no loops. The comparison runs two stages for each of its
models, so its loop lives here, above the stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from stllms import tasks
from stllms.annotation import annotators
from stllms.comparison import groups, ledger, released
from stllms.comparison.groups import Member
from stllms.config import RunConfig
from stllms.generation import remote
from stllms.generation.chains import responses
from stllms.models.loading import load
from stllms.models.model import Model
from stllms.records import Annotation, Response, Task
from stllms.registry import resolve
from stllms.runs import audit
from stllms.runs.artifacts import Folder
from stllms.runs.files import read_json
from stllms.runs.store import Rows
from stllms.terminal import about


def members(config: RunConfig, folder: Folder) -> list[Member]:
    """The compared models in their stable order; the chains that they lack are made now.

    The models of ``config.models``, then the runs of ``config.folders`` and the released files
    of ``config.published``. Raises ``ValueError`` before any chain is made where an API takes
    no limit as small as the run's.
    """
    for name in config.models:
        remote.check_limit(resolve(name), config.settings.max_tokens_compare)
    found = []
    for name in config.models:
        with about(f"{name}:"):
            found.append(of_model(config.for_model(name), folder.member(name)))
    found += [_apart(of_run(Path(one).expanduser()), found) for one in config.folders]
    if config.published is not None:
        paths = sorted(Path(config.published).glob(released.PATTERNS["comparison"]))
        files = released.members(paths, config.empty_chains)
        found += [_apart(one, found) for one in files]
    return groups.ordered(distinct(found))


def claims(config: RunConfig) -> pd.DataFrame:
    """The ledger of the paper's claims, written to ``<results>/ledger.csv``. A run with labels
    of one's own says nothing about them: no rows then, and nothing is written."""
    if config.own_labels:
        return pd.DataFrame(columns=list(ledger.COLUMNS))
    return ledger.write(config.results_folder, config.published)


def distinct(found: Sequence[Member]) -> list[Member]:
    """The members; those whose display name another has too go by owner and name."""
    often = Counter(one.display for one in found)
    return [
        replace(one, display="/".join(one.name.split("/")[-2:]))
        if often[one.display] > 1
        else one
        for one in found
    ]


def _apart(one: Member, others: Sequence[Member]) -> Member:
    """A member from elsewhere, with its source in its name where the comparison has the model
    too."""
    taken = one.display in {other.display for other in others}
    return replace(one, display=f"{one.display} ({one.source})") if taken else one


def of_model(config: RunConfig, folder: Folder) -> Member:
    """One model: its chains on the comparison's tasks, annotated.

    A task for which an API gave no chain, or none with reasoning, is unavailable.
    """
    folder.open()
    asked = tasks.select("compare", **config.tasks_of("compare"))
    decoding = config.decoding | {"max_new_tokens": config.settings.max_tokens_compare}
    model: Model | None = None
    lacking: list[Annotation] = []
    if config.entry.source == "api":
        chains, lacking = _from_api(config, folder, asked, decoding)
    else:
        model = load(config.model, **config.loading)
        folder.made_with(model)
        chains = responses(model, asked, store=folder.rows(folder.responses), **decoding)
        folder.note(sampling_audit_responses=audit.audit(chains).recorded)
    annotations = annotators.annotations(
        annotators.annotator(config.annotator, **config.annotating),
        chains,
        model=model,
        store=folder.rows(folder.annotations, annotators.KEY),
    )
    return groups.member(
        config.entry,
        [*annotations, *lacking],
        tasks=config.task_set,
        annotator=config.annotator,
        labels=config.label_set,
    )


def _from_api(
    config: RunConfig, folder: Folder, asked: Sequence[Task], decoding: dict
) -> tuple[list[Response], list[Annotation]]:
    """The chains with reasoning, and for every other task a failed annotation that says why."""
    replies, reasons = remote.responses(
        config.entry,
        asked,
        max_new_tokens=decoding["max_new_tokens"],
        temperature=decoding["temperature"],
        style=decoding["style"],
        system=decoding["system"],
        base_url=config.base_url,
        max_cost=config.max_cost,
        folder=folder.path / "api",
    )
    kept = [one for one in replies if not remote.withheld(one, config.entry.kind)]
    reasons |= {one.task_id: "the reply holds no reasoning" for one in replies}
    have = {one.task_id for one in kept}
    return kept, [
        Annotation(task.id, config.annotator, failed=reasons.get(task.id, "no reply"))
        for task in asked
        if task.id not in have
    ]


def of_run(path: Path) -> Member:
    """The model of a run's folder: the chains of notebook 01 with the labels of notebook 02.

    Raises ``ValueError`` for a folder without chains that the run's annotator labelled.
    """
    own = RunConfig.from_dict({**read_json(path / "run.json")["configuration"], "folders": []})
    labelled = annotators.load(Rows(path / "annotations.jsonl", annotators.KEY), own.annotator)
    if not labelled:
        raise ValueError(f"{path}: no annotations by {own.annotator}, the run's annotator")
    return groups.member(
        own.entry,
        labelled,
        source="folder",
        tasks=own.task_set,
        annotator=own.annotator,
        labels=own.label_set,
    )
