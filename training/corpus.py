"""Read the corpus of ``training/corpus/``, check it, write its card.

``python training/corpus.py`` prints what is wrong (and exits with 1) or writes
``training/corpus/README.md`` and ``card.json``. The guide by which the chains were written is
``training/corpus/GUIDE.md``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score

from stllms.labels import PAPER

FOLDER = Path(__file__).resolve().parent / "corpus"
READINGS = FOLDER / "readings.jsonl"
MESSAGES = Path(__file__).resolve().parent.parent / "messages"
LABELS = PAPER.names
#: Words of a chain with its answer; the least share of the segments of each label; how often an
#: opening of three words may come among the sentences of a label; the least share of distinct
#: triples of words.
WORDS, SHARE, OPENING, DISTINCT = (120, 300), 0.10, 0.03, 0.55

Chain = dict[str, Any]


def read(path: Path | None = None) -> list[Chain]:
    """The chains of a JSONL file; the corpus without any."""
    lines = (path or FOLDER / "chains.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def thinking(chain: Chain) -> str:
    """What stands between the tags: the segments, joined by a blank."""
    return " ".join(segment["text"] for segment in chain["segments"])


def words(text: str) -> list[str]:
    """Words and numbers, in lower case."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|\d+(?:\.\d+)?", text.lower().replace("’", "'"))


def sentences(text: str) -> list[str]:
    """Sentences, cut at a stop that a blank follows."""
    return [one for one in re.split(r"(?<=[.!?])[\"”]?\s+", text) if words(one)]


# -- what can be wrong with one chain ------------------------------------------------------

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_SIGN = r"\s*(?:[-+*/×−÷]|times|plus|minus|divided by|over)\s*"
_SUM = re.compile(
    rf"(?<![\w.,)%^/+*×÷−-])({_NUMBER}(?:{_SIGN}{_NUMBER})+)\s*(?:=|is|equals|makes|gives)\s*"
    rf"(-?{_NUMBER}(?:\s*/\s*\d+)?)(?![\w%^]|\.\d|,\d|\s*[-+*/×÷−(^%]|\s*(?:times|plus|minus|per))"
)
_SIGNS = {"×": "*", "−": "-", "÷": "/", "times": "*", "plus": "+", "minus": "-",
          "divided by": "/", "over": "/"}  # fmt: skip


def wrong_sums(text: str) -> list[str]:
    """Equations ``a + b = c`` in a text whose two sides differ by more than rounding."""
    return [found[0] for found in _SUM.finditer(text) if not _holds(found[1], found[2])]


def _holds(left: str, right: str) -> bool:
    for word, sign in _SIGNS.items():
        left = left.replace(word, sign)
    exact = _value(left)
    digits = len(right.partition(".")[2]) if "/" not in right else 12
    return exact is None or abs(exact - (_value(right) or 0)) <= Fraction(1, 2 * 10**digits)


def _value(expression: str) -> Fraction | None:
    """An expression of numbers and the four signs, exactly; ``None`` after a division by 0."""
    plain = re.sub(rf"({_NUMBER})", r"Fraction('\1')", expression.replace(",", ""))
    try:
        return eval(plain, {"__builtins__": {}, "Fraction": Fraction})
    except ZeroDivisionError:
        return None


_TOOLS = {"math": math, "itertools": itertools, "Fraction": Fraction, "comb": math.comb,
          "factorial": math.factorial, "gcd": math.gcd}  # fmt: skip


def wrong_answer(chain: Chain) -> str | None:
    """What the chain's own check computes, where the answer does not have it."""
    if "check" not in chain:
        return None
    value = str(eval(chain["check"], dict(_TOOLS)))
    plain = chain["answer"].replace(",", "").lower()
    found = re.search(rf"(?<![\w.]){re.escape(value.lower())}(?![\w]|\.\d)", plain)
    return None if found else value


def problems(chain: Chain, questions: dict[str, str]) -> list[str]:
    """What is wrong with a chain, in words."""
    found, labels = [], [segment["label"] for segment in chain["segments"]]
    if chain["question"] != questions.get(chain["task_id"]):
        found.append("its question is not that of the training task")
    size = len(words(f"{thinking(chain)} {chain['answer']}"))
    if not WORDS[0] <= size <= WORDS[1]:
        found.append(f"{size} words, not {WORDS[0]} to {WORDS[1]}")
    if unknown := set(labels) - set(LABELS):
        found.append(f"unknown labels {', '.join(sorted(unknown))}")
    if labels[0] != "initializing":
        found.append("does not begin with initializing")
    if "initializing" in labels[4:]:
        found.append("initializing after the fourth segment")
    if len(set(labels)) < 4:
        found.append(f"only {len(set(labels))} labels")
    texts = [segment["text"] for segment in chain["segments"]]
    if len(set(texts)) < len(texts):
        found.append("the same segment twice")
    openings = Counter(opening(one) for text in texts for one in sentences(text))
    found += [f"opens twice with {o!r}" for o, n in openings.items() if n > 1 and o]
    for text in (*texts, chain["answer"]):
        if text != " ".join(text.split()) or re.search(r"\*\*|[#`$\\]|</?think|^[-•]", text):
            found.append(f"markup or white space in {text!r:.60}")
        if not re.search(r"[.!?][\"”')]?$", text):
            found.append(f"no stop at the end of {text!r:.60}")
        found += [f"a sum that is wrong: {one}" for one in wrong_sums(text)]
    near = overlap(texts[0], chain["question"])
    if near > 0.6:
        found.append(f"the first segment repeats the question ({near:.0%} of its triples)")
    if (value := wrong_answer(chain)) is not None:
        found.append(f"its check gives {value}, which the answer lacks")
    return found


def opening(sentence: str) -> str:
    """The first three words; empty for shorter sentences."""
    first = words(sentence)[:3]
    return " ".join(first) if len(first) == 3 else ""


def overlap(text: str, other: str) -> float:
    """The share of the triples of words of ``text`` that ``other`` has."""
    mine, theirs = triples(words(text)), set(triples(words(other)))
    return sum(one in theirs for one in mine) / max(1, len(mine))


def triples(said: Sequence[str]) -> list[tuple[str, ...]]:
    """All runs of three words."""
    return list(zip(said, said[1:], said[2:], strict=False))


# -- what is measured of all of them -------------------------------------------------------


def statistics(chains: Sequence[Chain]) -> dict[str, Any]:
    """The numbers of the card that need no second reader."""
    counts: Counter[str] = Counter()
    openings: dict[str, Counter[str]] = defaultdict(Counter)
    runs: list[tuple[str, ...]] = []
    for chain in chains:
        runs += triples(words(thinking(chain)))
        for segment in chain["segments"]:
            counts[segment["label"]] += 1
            openings[segment["label"]].update(map(opening, sentences(segment["text"])))
    sizes = [len(words(f"{thinking(one)} {one['answer']}")) for one in chains]
    stock = {}
    for label, found in openings.items():
        (first, times), *_ = [pair for pair in found.most_common(2) if pair[0]]
        stock[label] = [first, round(times / found.total(), 4)]
    return {
        "chains": len(chains),
        "tasks": len({chain["task_id"] for chain in chains}),
        "words": sum(sizes),
        "words a chain, 5 50 95 %": np.quantile(sizes, (0.05, 0.5, 0.95)).astype(int).tolist(),
        "segments": counts.total(),
        "share of segments": {name: round(counts[name] / counts.total(), 4) for name in LABELS},
        "commonest opening": {name: stock[name] for name in LABELS if name in stock},
        "distinct triples": round(len(set(runs)) / len(runs), 4),
        "answers with a check": sum("check" in chain for chain in chains),
    }


# -- second readers ------------------------------------------------------------------------


def readings() -> list[dict[str, Any]]:
    """``readings.jsonl``: of some chains the label of each sentence as written, and as two
    readers gave it who saw the text alone (``task_id``, ``sentences``, ``written``,
    ``readings [2][n]``)."""
    return [json.loads(line) for line in READINGS.read_text("utf-8").splitlines()]


def agreement(read: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Cohen's kappa of each reader with the writing, and of the readers with each other: of
    all labels, and of each label against the rest."""
    written = [label for one in read for label in one["written"]]
    first, second = ([label for one in read for label in one["readings"][k]] for k in (0, 1))
    pairs = {
        "reader 1 with the writing": (written, first),
        "reader 2 with the writing": (written, second),
        "reader 1 with reader 2": (first, second),
    }
    both = sum(w not in (a, b) for w, a, b in zip(written, first, second, strict=True))
    return {
        "chains": len(read),
        "sentences": len(written),
        "kappa": {name: kappas(*pair) for name, pair in pairs.items()},
        "against both readers": both,
    }


def kappas(first: Sequence[str], second: Sequence[str]) -> dict[str, float]:
    """Kappa of two readings, and of each label against the rest."""
    found = {"all": cohen_kappa_score(first, second)}
    for name in LABELS:
        one, two = ([label == name for label in side] for side in (first, second))
        found[name] = cohen_kappa_score(one, two)
    return {name: round(float(value), 3) for name, value in found.items()}


# -- the card ------------------------------------------------------------------------------

_CARD = """\
# A corpus of labelled chains of thought

{chains} chains in English about the {tasks} training tasks of `messages/` (none of the
evaluation tasks), written for this package sentence by sentence with a label, by the guide
[GUIDE.md](GUIDE.md). `chains.jsonl` has one chain a line: `task_id`, `category`, `question`,
`segments` (`label`, `text`), `answer`, and for {checked} of them `check`, a line of Python
whose value the answer contains. The text of a chain is its segments joined by a blank.
`smol-thinker` and the offline annotator are trained on it. The writers were language models at
work on this package; no person has read all of it. Licence: MIT, as the package.

Written by `python training/corpus.py`, which also checks every chain: its length, its labels,
sums that are written as equations, answers that have a check, markup, repeated sentences and
openings.

| | |
|---|---|
| words, with the answers | {words:,} |
| words a chain (5, 50, 95 %) | {sizes} |
| segments | {segments:,} |
| distinct triples of words | {distinct:.3f} |

| label | segments | commonest opening | kappa, reader 1 | reader 2 | 1 with 2 |
|---|---|---|---|---|---|
{rows}

The openings are the first three words of a sentence, as a share of the label's sentences.

**Two readers** labelled the sentences of {read} chains ({sentences:,} sentences) from the raw
text and the definitions of the guide alone. Kappa is agreement beyond chance, of each label
against the rest. {both} sentences had a written label that neither reader gave; they were
mended afterwards, in label or wording. The readers are language models like the writers: their
agreement is that of one school, and says nothing about how people would read.
"""


def card(chains: Sequence[Chain]) -> str:
    """The text of ``README.md``; the numbers go to ``card.json``."""
    found, read = statistics(chains), agreement(readings())
    (FOLDER / "card.json").write_text(json.dumps({**found, "agreement": read}, indent=1) + "\n")
    share, stock = found["share of segments"], found["commonest opening"]
    by = read["kappa"].values()
    rows = [
        f"| {name} | {share[name]:.1%} | {stock[name][0]} ({stock[name][1]:.1%}) | "
        + " | ".join(f"{one[name]:.2f}" for one in by)
        + " |"
        for name in LABELS
    ]
    rows.append("| all | | | " + " | ".join(f"{one['all']:.2f}" for one in by) + " |")
    return _CARD.format(
        **{name: found[name] for name in ("chains", "tasks", "words", "segments")},
        checked=found["answers with a check"],
        sizes=", ".join(map(str, found["words a chain, 5 50 95 %"])),
        distinct=found["distinct triples"],
        rows="\n".join(rows),
        read=read["chains"],
        sentences=read["sentences"],
        both=read["against both readers"],
    )


def faults(chains: Sequence[Chain], questions: dict[str, str]) -> list[str]:
    """What is wrong with the corpus: with a chain, or with all of them together."""
    found = [f"{one['task_id']}: {what}" for one in chains for what in problems(one, questions)]
    numbers = statistics(chains)
    for name in LABELS:
        if numbers["share of segments"].get(name, 0) < SHARE:
            found.append(f"{name}: less than {SHARE:.0%} of the segments")
        if numbers["commonest opening"].get(name, ["", 0])[1] > OPENING:
            found.append(f"{name}: {numbers['commonest opening'][name]} is a stock opening")
    if numbers["distinct triples"] < DISTINCT:
        found.append(f"only {numbers['distinct triples']} of the triples of words are distinct")
    return found


def main() -> int:
    """The command."""
    chains = read()
    lines = (MESSAGES / "train.jsonl").read_text("utf-8").splitlines()
    questions = {row["id"]: row["content"] for row in map(json.loads, lines)}
    if found := faults(chains, questions):
        print(*found, sep="\n")
        return 1
    (FOLDER / "README.md").write_text(card(chains), encoding="utf-8")
    print(f"{len(chains)} chains are as they should be; wrote {FOLDER / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
