"""Measure the embedded models on held-out questions and write their cards.

``python -m stllms.organism.card`` writes ``README.md`` and ``card.json`` into each model
folder. Every number of a card comes from here or from ``training.json``, which the training
script wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from stllms import generate, metrics, models
from stllms.organism import grammar
from stllms.records import BEHAVIOURS, Response, Task

HERE = Path(__file__).parent
MODELS = {"tiny-thinker": "thinker", "tiny-instruct": "instruct"}
TEMPERATURE, TOKENS, QUESTIONS = 0.65, 256, 400

_CARD = """\
# {name}

A `Qwen2ForCausalLM` of {millions:.2f} M parameters ({layers} layers, width {hidden}), trained
from nothing on chains of the grammar in `stllms/organism/`. It ships with the package so that
every notebook runs without a model hub.

**It is a fixture. Its steerability was designed in**: behaviours are persistent states of its
training chains (see `grammar.py`). What it shows is that the pipeline works and what its
instruments measure; it says nothing about whether the claims of the paper hold for real models.

## Measured on {questions} held-out questions

| | greedy | temperature {temperature} |
|---|---|---|
| well-formed | {greedy[well_formed]:.3f} | {sampled[well_formed]:.3f} |
| answer correct | {greedy[accuracy]:.3f} | {sampled[accuracy]:.3f} |
| finished within {tokens} tokens | {greedy[finished]:.3f} | {sampled[finished]:.3f} |
| mean output tokens | {greedy[tokens]:.1f} | {sampled[tokens]:.1f} |

Share of the segments, in %:

| behaviour | greedy | temperature {temperature} |
|---|---|---|
{shares}

"Well-formed" means that every sentence is a wording of the grammar with known words in its slot
(their order is not checked), that the thinking is closed (thinker) and that the turn ended. The
text of the questions was never seen in training; their families were. Greedy decoding deduces
and ends: by the design of the wordings, every other behaviour is spread over many first words,
none of which is the likeliest.

## Training

Data: chains drawn on the fly from the grammar (`Random("{style}/{seed}/chunk")`), the questions
whose hash falls into the held-out fifth left out. {steps} steps of {batch} chains,
{output_tokens:,} output tokens, {minutes:.0f} minutes of wall time on {device} ({threads}
thread(s) of a machine with other work, torch {torch}), mean loss of the last hundred steps
{loss:.4f} nats a token. Made again by `python -m stllms.organism.train {style}`; `loss.csv` is
the log.

Written by `python -m stllms.organism.card`. Licence: MIT, as the package.
"""


def measure(made: list[Response], tasks: list[Task], style: str) -> dict[str, Any]:
    """Shares of well-formed, correct and finished responses, lengths, shares of segments."""
    thinker = style == "thinker"
    annotations = grammar.Annotator().annotate(made)
    counts = metrics.segment_counts(annotations).sum(0)
    answers = [grammar.read_answer(item.answer if thinker else item.text) for item in made]
    right = [a == task.answer for a, task in zip(answers, tasks, strict=True)]
    return {
        "well_formed": np.mean([grammar.well_formed(r, thinker=thinker) for r in made]),
        "accuracy": np.mean(right),
        "finished": np.mean([item.finished for item in made]),
        "tokens": np.mean([len(item.output_ids) for item in made]),
        "shares": dict(zip(BEHAVIOURS, (counts / counts.sum()).tolist(), strict=True)),
    }


def card(folder: Path, style: str, questions: int = QUESTIONS) -> dict[str, Any]:
    """Measure the model in ``folder`` and write its card there; returns the numbers."""
    model = models.load(folder.name if folder.parent == HERE else str(folder), device="cpu")
    tasks = grammar.tasks("evaluate", questions)
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        made = generate.responses(
            model, tasks, max_new_tokens=TOKENS, temperature=temperature, seed=0
        )
        found[name] = measure(made, tasks, style)
    training = json.loads((folder / "training.json").read_text())
    numbers = {"questions": questions, "temperature": TEMPERATURE, "tokens": TOKENS} | found
    rows = (folder / "loss.csv").read_text().splitlines()[-10:]
    loss = float(np.mean([float(row.split(",")[1]) for row in rows]))
    greedy, sampled = found["greedy"]["shares"], found["sampled"]["shares"]
    shares = "\n".join(
        f"| {b} | {100 * greedy[b]:.1f} | {100 * sampled[b]:.1f} |" for b in BEHAVIOURS
    )
    text = _CARD.format(
        **training,
        **numbers,
        name=f"tiny-{style}",
        shares=shares,
        loss=loss,
        millions=training["parameters"] / 1e6,
        minutes=training["seconds"] / 60,
    )
    (folder / "README.md").write_text(text)
    (folder / "card.json").write_text(json.dumps(numbers, indent=1, default=float) + "\n")
    return numbers


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stllms.organism.card", description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the model folders are")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    options = parser.parse_args(argv)
    for name, style in MODELS.items():
        numbers = card(options.folder / name, style, options.questions)
        print(name, json.dumps(numbers, default=lambda x: round(float(x), 3)))


if __name__ == "__main__":
    main()
