"""The paper's claims and numbers (METHOD, section 12), and what a row of the ledger says.

Verdicts, the whole vocabulary:

* ``reproduced from released files`` / ``differs from released files``: the paper's numbers,
  to the digits printed, computed again from its own files;
* ``from part of the released files``: the numbers are averages over more files than there are;
* ``shown`` / ``shown in part`` / ``not shown``, followed by ``on the paper's model`` (in the
  paper profile), ``on MODEL with profile ..., not the paper's run`` (in any other), ``on
  another model`` or ``on a fixture, no evidence about the paper``: a run of ours. What counts
  as shown is said in the note of the row;
* ``needs the model; run with ...``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stllms.config import MODELS, PROFILES
from stllms.records import HEATMAP, STEERED

REPRODUCED, DIFFERS = "reproduced from released files", "differs from released files"
PART = "from part of the released files"
NEEDS = "needs the model; run with ./run_all.sh {models} --profile paper --judge openai:gpt-4.1"
#: METHOD's order of the six labels in the comparison.
ORDER = (*STEERED, "initializing", "deduction")
#: Treatment -> group -> (per cent of the segments in :data:`ORDER`, segments a response).
COMPARISON: dict[str, dict[str, tuple[tuple[int, ...], float]]] = {
    "published": {
        "thinking": ((4, 9, 6, 15, 7, 52), 27.6),
        "instruct": ((1, 2, 5, 24, 9, 57), 14.4),
    },
    "apart": {
        "thinking": ((5, 9, 6, 16, 7, 56), 29.6),
        "instruct": ((1, 2, 5, 25, 9, 58), 14.7),
    },
}
#: Models of a group in the paper, and all that it compares.
GROUP = 5
COMPARED = tuple(name for name, entry in MODELS.items() if entry.hub_id or entry.api_id)
PAIR = ("r1-distill-llama-8b", "llama-3.1-8b-instruct")
#: Token fraction in per cent, plain / + / -, in the order of ``STEERED``.
STEERING: dict[str, tuple[tuple[float, float, float], ...]] = {
    "r1-distill-qwen-1.5b": (
        (7.9, 35.7, 0.2), (19.7, 28.6, 2.0), (13.6, 34.0, 1.6), (43.1, 49.7, 11.2),
    ),
    "r1-distill-llama-8b": (
        (10.0, 22.1, 6.2), (20.4, 33.6, 6.7), (17.4, 30.9, 5.2), (34.8, 61.5, 17.7),
    ),
    "r1-distill-qwen-14b": (
        (5.8, 26.1, 0.9), (19.8, 46.7, 1.4), (21.9, 34.9, 1.4), (37.9, 66.6, 18.3),
    ),
}  # fmt: skip
#: Layers of the largest released effect, in the order of ``STEERED``.
PEAKS: dict[str, tuple[int, ...]] = {
    "r1-distill-qwen-1.5b": (18, 18, 15, 18),
    "r1-distill-qwen-14b": (29, 30, 29, 46),
    "r1-distill-llama-8b": (0, 2, 0, 0),
}
#: Ranks of the steering layer, and the peaks without layers 0-4.
LATE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "r1-distill-llama-8b": ((2, 4, 2, 4), (12, 12, 12, 12)),
}
HEATMAP_MODEL = "r1-distill-qwen-1.5b"
#: The upper triangle, row by row, in the order of ``records.HEATMAP``.
TRIANGLE = (0.36, 0.32, 0.28, 0.17, 0.64, 0.33, 0.60, 0.19, 0.51, 0.45)


@dataclass(frozen=True)
class Made:
    """How a run was made, as its ``run.json`` says; empty where there is none."""

    annotator: str = ""
    tasks: str = ""
    profile: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Made:
        """From the content of ``run.json``; a profile with the values that were not its own."""
        identity, given = record.get("identity") or {}, record.get("configuration") or {}
        name = given.get("profile", "")
        own = vars(PROFILES[name]) if name in PROFILES else {}
        changed = [f"{k} {identity[k]}" for k, v in own.items() if identity.get(k, v) != v]
        profile = f"profile {name}" + (f" but {', '.join(changed)}" if changed else "")
        return cls(
            identity.get("annotator", ""), identity.get("tasks", ""), profile if name else ""
        )

    @property
    def as_paper(self) -> bool:
        """Whether the run has the numbers of tasks and tokens of the paper."""
        return self.profile == "profile paper"

    def after(self, on: str) -> str:
        """``on`` with annotator, task set and profile behind it, as far as they are known."""
        parts = [("annotator ", self.annotator), ("tasks ", self.tasks), ("", self.profile)]
        return ", ".join([on, *(f"{word}{text}" for word, text in parts if text)])


@dataclass(frozen=True)
class Row:
    """One row of the ledger, all text."""

    claim: str
    where: str
    published: str
    on: str
    verdict: str
    ours: str = ""
    note: str = ""


def display(slug: str) -> str:
    """The display name of a run folder, the folder's name for a model of a person's own."""
    return MODELS[slug].display if slug in MODELS else slug


def layers_of(slug: str) -> dict[str, int] | None:
    """The published steering layers of a run folder's model."""
    return MODELS[slug].steering_layers if slug in MODELS else None


def needs(*slugs: str) -> str:
    """The verdict of what was not run, with the command that runs it."""
    return NEEDS.format(models=" ".join(f"--model {MODELS[slug].hub_id}" for slug in slugs))


def listed(values: Mapping[str, str]) -> str:
    """``backtracking 4.4; deduction 51.4``."""
    return "; ".join(f"{name} {value}" for name, value in values.items())


def compared(
    on: str, verdict: str, *, treatment: str = "published", pair: str = "", **cells: str
) -> Row:
    """The claim about fractions, with the paper's numbers of a treatment; ``pair`` names the
    models of a run of ours, whose numbers stand beside averages over other models."""
    thinking, instruct = (COMPARISON[treatment][kind][0] for kind in ("thinking", "instruct"))
    numbers = {b: f"{t} and {i}" for b, t, i in zip(ORDER, thinking, instruct, strict=True)}
    read = " with the numbered tags read too" if treatment == "apart" else ""
    where = "comparison, ten models, 100 tasks; "
    where += f"per cent of the segments, thinking and instruct{read}"
    if pair:
        where = f"comparison of {pair}; per cent of the segments, thinking and instruct; "
        where += f"published: averages over ten models, 100 tasks{',' * bool(read)}{read}"
    return Row(
        "behaviours differ between thinking and instruct models",
        where,
        listed(numbers),
        on,
        verdict,
        **cells,
    )


def steered(slug: str, on: str, verdict: str, **cells: str) -> Row:
    """The claim about steering, with the paper's numbers where ``slug`` is its model."""
    numbers = "every behaviour rises with + and falls with -"
    where = f"steering of {display(slug)}; token fraction in per cent, plain / + / -"
    if slug in STEERING:
        rows = zip(STEERED, STEERING[slug], strict=True)
        numbers = listed({b: " / ".join(f"{value:.1f}" for value in row) for b, row in rows})
        where = (
            f"steering of {display(slug)}, 50 tasks; token fraction in per cent, plain / + / -"
        )
    claim = "adding or subtracting a direction raises or lowers its behaviour"
    return Row(claim, where, numbers, on, verdict, **cells)


def peaked(slug: str, on: str, verdict: str, *, run: bool = False, **cells: str) -> Row:
    """The claim about peaks, with the paper's numbers where ``slug`` is its model; ``run``:
    ours are of a run, not of the released values."""
    numbers, where = "in middle layers", "layer effects; layer of the largest mean effect"
    if slug in PEAKS:
        numbers = listed({b: str(layer) for b, layer in zip(STEERED, PEAKS[slug], strict=True)})
        where = f"layer effects of {display(slug)}, released values; layer of the largest mean"
    if run:
        known = "; published: released values" if slug in PEAKS else ""
        where = f"layer effects of {display(slug)}; layer of the largest mean effect{known}"
    return Row("effects peak in middle layers", where, numbers, on, verdict, **cells)


def distinct(on: str, verdict: str, *, run: str = "", **cells: str) -> Row:
    """The claim about the heatmap; ``run`` is the run folder whose directions ours are."""
    released = f"{display(HEATMAP_MODEL)}, released vectors"
    where = f"heatmap, {released}; cosines, upper triangle"
    if run:
        where = f"heatmap of {display(run)}, directions of the run; cosines, upper triangle; "
        where += f"published: {released}"
    return Row("directions are distinct", where, triangle(TRIANGLE), on, verdict, **cells)


def triangle(values: Sequence[float], n: int = len(HEATMAP)) -> str:
    """``.36 .32 .28 .17; .64 .33 .60; ...``, a part a row."""
    rest, rows = [f"{value:.2f}".replace("0.", ".") for value in values], []
    for length in range(n - 1, 0, -1):
        rows.append(" ".join(rest[:length]))
        rest = rest[length:]
    return "; ".join(rows)


def early(on: str, verdict: str, *, run: str = "", **cells: str) -> Row:
    """The claim about the embedding; ``run`` is the run folder that ours is of."""
    of = f" of {display(run)}" if run else ""
    where = f"largest cosine with an embedding row{of}, per layer; first and last layer here"
    return Row("early layers carry token identity", where, "figure only", on, verdict, **cells)
