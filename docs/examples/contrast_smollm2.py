"""Two directions from contrast pairs on a real model, beside control directions.

    python docs/examples/contrast_smollm2.py

On SmolLM2-135M-Instruct and the pairs of ``formal.jsonl`` and ``french.jsonl``: how good the
direction is on held-out pairs, and how often chains steered with it use the words of a list.
Every chain goes to ``<name>_chains.csv``, every number to ``<name>.csv``, and the tables into
``docs/contrast_pairs.md``. About a quarter of an hour on a free core.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stllms import models, stats
from stllms.models.engines.interventions import Intervention
from stllms.models.model import Model
from stllms.records import Task
from stllms.steering import conditions, measures
from stllms.vectors import contrast, difference_of_means, nulls, quality
from stllms.vectors.means import Means

HERE = Path(__file__).parent
PAGE = HERE.parent / "contrast_pairs.md"
MODEL, LAYER, POSITION = "smollm2", 12, "mean"
COEFFICIENTS = (-0.6, -0.3, -0.15, 0.0, 0.15, 0.3, 0.6)
CONTROLS = 6
NEW_TOKENS = 48

PROMPTS = (
    "Why is the sky blue?",
    "Can you come to my birthday party on Saturday?",
    "What should I cook for dinner tonight?",
    "I missed my bus. What should I do?",
    "Tell me about your favourite animal.",
    "How do I clean my kitchen?",
    "My neighbour is very loud at night. What can I do?",
    "What is a good way to learn to swim?",
    "Write a short message to my boss: I am ill today.",
    "Tell me a story about a dog and a cat.",
    "What did people eat in the old days?",
    "Which book should I read next?",
)

#: Contractions ('s only where it cannot be a possessive) and words of casual speech, written
#: down before any chain was read.
CASUAL = re.compile(
    r"\w+n't|\w+'(m|re|ll|ve|d)|(it|that|there|what|who|here|let|he|she|how|where)'s|y'all"
    r"|gonna|gotta|wanna|kinda|sorta|dunno|gimme|lemme|yeah|yep|yup|nope|nah|hey|hi|ok|okay|oh"
    r"|wow|oops|ugh|huh|cool|awesome|super|totally|guy|guys|dude|buddy|folks|stuff|kid|kids"
    r"|mom|dad|bunch|crazy|fun|pretty|damn|cheers|thanks|bye"
)
#: Forty frequent words of French.
FRENCH = re.compile(
    r"le|la|les|un|une|des|du|de|et|est|sont|je|tu|il|elle|nous|vous|ils|elles|que|qui|ne|pas"
    r"|dans|pour|avec|sur|ce|cette|au|aux|mais|ou|par|plus|mon|ma|sa|ses|leur"
)
#: Name of a file of pairs -> the words that are counted in the chains.
SETS = {"formal": CASUAL, "french": FRENCH}


def words(text: str) -> list[str]:
    """Lower-case words; apostrophes and accents belong to them."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("’", "'"))


def examine(model: Model, name: str) -> None:
    """Direction, controls, chains and numbers of one file of pairs."""
    means = contrast.collect(
        model, contrast.read_pairs(HERE / f"{name}.jsonl"), name=name, position=POSITION
    )
    write(model, name, means)
    numbers(name, means)


def write(model: Model, name: str, means: Means) -> None:
    """All prompts under all conditions, to ``<name>_chains.csv``."""
    direction = difference_of_means(means).direction(name, LAYER)
    controls = nulls.control_directions(means, "matched", CONTROLS)
    every = [conditions.plain()]
    for c in filter(None, COEFFICIENTS):
        push = Intervention(direction, LAYER, c)
        every.append(conditions.Condition(name, LAYER, c, push))
    every += conditions.control_conditions(controls, {name: LAYER}, COEFFICIENTS)
    tasks = [Task(f"{i:02}", "everyday", prompt) for i, prompt in enumerate(PROMPTS)]
    steered = conditions.grid(model, tasks, every, max_new_tokens=NEW_TOKENS, style="bare")
    chains = pd.DataFrame(
        [
            (one.direction, one.coefficient, PROMPTS[int(one.task_id)], one.response.text)
            for one in steered
        ],
        columns=["direction", "coefficient", "prompt", "text"],
    )
    chains.to_csv(HERE / f"{name}_chains.csv", index=False)


def numbers(name: str, means: Means) -> None:
    """``<name>.csv`` from the pairs and the chains of ``<name>_chains.csv``."""
    chains = pd.read_csv(HERE / f"{name}_chains.csv", keep_default_na=False)
    found = quality.table(means, {name: LAYER})
    rows = of_pairs(found) + of_chains(chains, name) + of_controls(chains, name, means)
    pd.DataFrame(rows).round(4).to_csv(HERE / f"{name}.csv", index=False)


def of_pairs(held_out: pd.DataFrame) -> list[dict]:
    """Split-half cosine and AUC, and the central 95 % of 200 shuffled directions."""
    rows = []
    for quantity in ("cosine", "AUC"):
        found = held_out[held_out["quantity"] == quantity].set_index("direction")
        own, null = found.loc["difference-of-means"], found.loc["shuffled"]
        rows.append(
            {
                "quantity": quantity,
                "value": own["value"],
                "null_low": null["low"],
                "null_high": null["high"],
            }
        )
    return rows


def of_chains(chains: pd.DataFrame, name: str) -> list[dict]:
    """Means over prompts with their bootstrap interval, and the range of the means of the
    control directions at the same coefficient."""
    measured = pd.DataFrame([measure(text, SETS[name]) for text in chains["text"]])
    own = chains["direction"].isin([name, "none"])
    rows = []
    for quantity in measured:
        for c in COEFFICIENTS:
            here = chains["coefficient"] == c
            one = stats.bootstrap(measured.loc[own & here, quantity])
            null = measured.loc[~own & here, quantity].groupby(chains["direction"]).mean()
            rows.append(
                {
                    "quantity": quantity,
                    "coefficient": c,
                    "value": one.value,
                    "low": one.low,
                    "high": one.high,
                    "n": one.n,
                    "null_low": null.min(),
                    "null_high": null.max(),
                }
            )
    return rows


def of_controls(chains: pd.DataFrame, name: str, means: Means) -> list[dict]:
    """The cosine ``k`` of every control with the direction, and the rank correlation, over
    controls and coefficients ``c``, of ``k c`` with what is counted: a control that is partly
    the direction does a part of what it does."""
    controls = nulls.control_directions(means, "matched", CONTROLS)
    direction = difference_of_means(means).direction(name, LAYER)
    cosines = torch.cosine_similarity(controls.directions[:, LAYER], direction[None])
    of = dict(zip(controls.names, cosines.tolist(), strict=True))
    some = chains[chains["direction"].isin(of)]
    counted = [measure(text, SETS[name])["per 100 words"] for text in some["text"]]
    share = some["direction"].map(of) * some["coefficient"]
    points = some.assign(counted=counted, share=share)
    points = points.groupby(["direction", "coefficient"])[["share", "counted"]].mean()
    rank = points["share"].corr(points["counted"], method="spearman")
    rows = [{"quantity": f"cosine of {control}", "value": k} for control, k in of.items()]
    return [*rows, {"quantity": "rank correlation of the controls", "value": rank}]


def measure(text: str, counted: re.Pattern[str]) -> dict[str, float]:
    """Counted words in every 100, how many different ones, and the share of word 4-grams that
    occurred before; NaN for a text without words."""
    every = words(text)
    found = [word for word in every if counted.fullmatch(word)]
    return {
        "per 100 words": 100 * len(found) / len(every) if every else np.nan,
        "different": len(set(found)) if every else np.nan,
        "loops": measures.coherence(text)["loops"],
    }


# --- the page -----------------------------------------------------------------------------


def table(name: str) -> str:
    """The numbers of ``<name>.csv`` as a table in Markdown."""
    rows = pd.read_csv(HERE / f"{name}.csv", dtype={"n": "Int64"})
    shown = ["per 100 words", "different", "loops"]
    lines = [
        "| coefficient | per 100 words | controls | different words | controls | loops "
        "| controls | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c, found in rows.dropna(subset="coefficient").groupby("coefficient"):
        cells = [f"{c:+g}" if c else "0"]
        for _, one in found.set_index("quantity").loc[shown].iterrows():
            digits = 2 if one.name == "loops" else 1
            value, low, high = (f"{x:.{digits}f}" for x in one[["value", "low", "high"]])
            ends = [f"{x:.{digits}f}" for x in one[["null_low", "null_high"]] if c]
            cells += [f"{value} ({low} to {high})", " to ".join(ends)]
        lines.append(f"| {' | '.join(cells)} | {found['n'].iloc[0]} |")
    return "\n".join(lines)


def fill(page: str) -> str:
    """The text of a page with the tables of all sets between their marks.

    Raises:
        ValueError: a mark that is not there.
    """
    for name in SETS:
        start, end = f"<!-- {name} -->\n", f"<!-- {name} ends -->"
        if start not in page or end not in page:
            raise ValueError(f"{PAGE.name} lacks the marks of {name}: {start.strip()}, {end}")
        before, rest = page.split(start)
        page = before + start + table(name) + "\n" + end + rest.split(end)[1]
    return page


def main() -> None:
    """All sets, one after the other."""
    model = models.load(MODEL)
    for name in SETS:
        examine(model, name)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
