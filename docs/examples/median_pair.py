"""A steered chain beside its baseline, chosen by a rule: the pair that the README shows.

``python docs/examples/median_pair.py results/smol-thinker`` prints Markdown. Of the evaluation
tasks whose chains, both of them, are finished and do not loop, it takes the one on which the
token fraction of the behaviour changed by the median: half of the pairs changed more.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from stllms import labels, tasks
from stllms.records import STEERED_KEY, Steered, steered_from_row
from stllms.runs.files import load_table, read_json
from stllms.runs.store import Rows
from stllms.steering import measures

#: The largest share of repeated 4-grams of a chain that is shown, as in notebook 04.
LOOPS = 0.15
#: Words of each chain that are shown.
WORDS = 75


def median(
    chains: list[Steered], every: list[tasks.Task], behaviour: str, coefficient: float
) -> tuple[Steered, Steered, int]:
    """Baseline and steered chain of the median task, and how many pairs there are."""
    kept = ("none", behaviour)
    chains = [
        one for one in chains if one.direction in kept and one.coefficient in (0, coefficient)
    ]
    rows = measures.measure(chains, every).set_index(["task_id", "direction"])
    whole = (rows["truncated"] == 0) & (rows["loops"] <= LOOPS)
    fraction = rows[f"{measures.FRACTION}/{behaviour}"].where(whole).unstack()
    change = (fraction[behaviour] - fraction["none"]).dropna().sort_values(kind="stable")
    chosen = change.index[(len(change) - 1) // 2]
    pair = {one.direction: one for one in chains if one.response.task_id == chosen}
    return pair["none"], pair[behaviour], len(change)


def cell(one: Steered, behaviour: str) -> str:
    """The first words of a chain, the sentences of the behaviour in bold."""
    assert one.annotation is not None
    text, at, parts = one.response.thinking, 0, []
    for segment in one.annotation.segments:
        parts.append((text[at : segment.start], False))
        parts.append((text[segment.start : segment.end], segment.label == behaviour))
        at = segment.end
    parts.append((text[at:], False))
    shown, left = [], WORDS
    for part, bold in parts:
        words = re.sub(r"([|*_<>])", r"\\\1", part).split()
        if words and left > 0:
            said = " ".join(words[:left])
            shown.append(f"**{said}**" if bold else said)
        left -= len(words)
    return " ".join(shown) + (" …" if left < 0 else "")


def main() -> None:
    """Prints the pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that got as far as notebook 04")
    parser.add_argument("--behaviour", default=labels.PAPER.targets[0])
    given = parser.parse_args()
    record = read_json(given.run / "run.json")["configuration"]
    coefficient = measures.shown_coefficient(load_table(given.run / "steering.csv"))
    layers = read_json(given.run / "steering_layers.json")
    rows = Rows(given.run / "steered.jsonl", STEERED_KEY).load()
    chains = [
        steered_from_row(row)
        for row in rows
        if row["layer"] in (-1, layers[given.behaviour])  # -1: the baseline
    ]
    every = tasks.load("evaluate")
    plain, steered, pairs = median(chains, every, given.behaviour, coefficient)
    task = next(one for one in every if one.id == plain.response.task_id)
    print(f"*{task.content}*\n")
    print(f"| baseline | {coefficient:+g} {given.behaviour} |\n|---|---|")
    print(f"| {cell(plain, given.behaviour)} | {cell(steered, given.behaviour)} |\n")
    print(f"(the median of {pairs} pairs; {record['model']}, layer {steered.layer})")


if __name__ == "__main__":
    main()
