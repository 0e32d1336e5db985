"""Chains that have no label or no text yet, and whether the next run asks for them again.

Counted from what a run stored: rows that failed, and the requests behind them in the folders
of replies. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stllms.artifacts import Folder
from stllms.config import RunConfig
from stllms.files import Rows
from stllms.records import STEERED_KEY

#: Files of a run that hold annotations, by stage.
LABELLED = {
    "02_train_vectors": ("annotations.jsonl",),
    "04_steer": ("steered.jsonl", "sweep.jsonl"),
}


def counted(stage: str, folder: Folder, config: RunConfig) -> tuple[int, int]:
    """(chains labelled, chains that the next run asks for again) among a stage's rows."""
    if stage != "05_compare":
        files = [folder / name for name in LABELLED.get(stage, ())]
        return _of_annotations(files, config)
    labelled = again = 0
    for model in config.models:
        member = folder.member(model)
        counts = _of_annotations([member.annotations], member.config)
        labelled, again = labelled + counts[0], again + counts[1]
        if member.config.entry.source == "api":
            again += _lacking(member.path / "api", member.config.entry.api_id)
    return labelled, again


def _of_annotations(files: Sequence[Path], setup: RunConfig) -> tuple[int, int]:
    """:func:`counted` for files of annotations, or of steered chains that carry one.

    Not asked again: a chain without a text, one of a replay, one answered as often as the
    client asks.
    """
    rows = []
    for path in files:
        key = ("task_id", "annotator") if path.name == "annotations.jsonl" else STEERED_KEY
        rows += [row.get("annotation", row) for row in Rows(path, key).load()]
    mine = [row for row in rows if row and row.get("annotator") == setup.annotator]
    bad = [row for row in mine if row.get("failed") is not None]
    if not bad or setup.annotator.startswith("replay:"):
        return len(mine) - len(bad), 0
    from stllms.annotate.protocols import EMPTY  # not before it is needed

    model = setup.annotator.removeprefix("openai:").partition("#")[0]
    _, waits, ended = _requests(setup.folder / "judge", model)
    final = ended - waits
    return len(mine) - len(bad), sum(
        row["failed"] != EMPTY and row["task_id"] not in final for row in bad
    )


def _lacking(folder: Path, model: str | None) -> int:
    """The tasks that an API model will be asked again, of its folder of replies."""
    good, waits, _ = _requests(folder, model)
    return len(waits - good)


def _requests(folder: Path, model: str | None) -> tuple[set[str], set[str], set[str]]:
    """Names of the stored requests to a model: with a good reply, to be sent again, not."""
    from stllms.replies import Store
    from stllms.sending import Limits  # it brings the client

    good, waits, ended = set(), set(), set()
    for tries in Store(folder).load().rows.values():
        if tries[-1].get("model") != model:
            continue
        answers = [row["status"] for row in tries if row["status"] != "failed"]
        usable = answers[-1:] == ["answered"]
        again = not usable and len(answers) < Limits().asks
        (waits if again else ended).add(tries[-1]["name"])
        if usable:
            good.add(tries[-1]["name"])
    return good, waits, ended
