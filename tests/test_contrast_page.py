"""The page of contrast pairs: its numbers are the files', and these are the chains'."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS / "examples"
PAGE = (DOCS / "contrast_pairs.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")

each = pytest.mark.parametrize("name", ["formal", "french"])


def rows(name: str) -> pd.DataFrame:
    return pd.read_csv(EXAMPLES / f"{name}.csv")


def chains(name: str) -> pd.DataFrame:
    return pd.read_csv(EXAMPLES / f"{name}_chains.csv", keep_default_na=False)


def numbers(text: str) -> list[float]:
    return [float(one) for one in NUMBER.findall(text)]


@each
def test_the_table_of_the_page_is_the_file(name):
    table = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- {name} ends -->")[0]
    shown = [numbers(line) for line in table.splitlines()[2:] if line]
    found = rows(name).dropna(subset="coefficient").set_index(["coefficient", "quantity"])
    assert len(shown) == 7
    for c, *values in shown:
        expected = []
        for quantity, digits in (("per 100 words", 1), ("different", 1), ("loops", 2)):
            one = found.loc[(c, quantity)]
            ends = ["null_low", "null_high"] if c else []
            expected += [(one[key], digits) for key in ("value", "low", "high", *ends)]
        *values, n = values
        assert n == 12
        for value, (exact, digits) in zip(values, expected, strict=True):
            assert abs(value - exact) <= 0.5001 * 10**-digits, (c, value, exact)


@each
def test_the_numbers_before_steering_are_the_file(name):
    (line,) = [one for one in PAGE.splitlines() if one.lower().startswith(f"| {name} | 0.")]
    found = rows(name).set_index("quantity")
    expected = found.loc[["cosine", "AUC"], ["value", "null_low", "null_high"]].to_numpy()
    assert numbers(line) == pytest.approx(expected.flatten().tolist(), abs=0.005001)


FRENCH = """le la les un une des du de et est sont je tu il elle nous vous ils elles que qui ne
pas dans pour avec sur ce cette au aux mais ou par plus mon ma sa ses leur"""
CASUAL = """y'all gonna gotta wanna kinda sorta dunno gimme lemme yeah yep yup nope nah hey
hi ok okay oh wow oops ugh huh cool awesome super totally guy guys dude buddy folks stuff kid
kids mom dad bunch crazy fun pretty damn cheers thanks bye it's that's there's what's who's
here's let's he's she's how's where's"""
ENDS = ("'m", "'re", "'ll", "'ve", "'d", "n't")


@each
def test_the_words_are_counted_again(name):
    """Another way to the means of the direction and of the controls: words by blanks."""
    known, ends = (CASUAL.split(), ENDS) if name == "formal" else (FRENCH.split(), ())

    def share(text: str) -> float:
        text = text.lower().replace("\u2019", "'")
        kept = "".join(c if c.isalpha() or c == "'" else " " for c in text)
        words = [word.strip("'") for word in kept.split() if word.strip("'")]
        if not words:  # a broken chain, which no mean counts
            return float("nan")
        return 100 * sum(word in known or word.endswith(ends) for word in words) / len(words)

    written = chains(name)
    counted = written.assign(share=written["text"].map(share))
    means = counted.groupby(["coefficient", "direction"])["share"].mean()
    found = rows(name)
    found = found[found["quantity"] == "per 100 words"].set_index("coefficient")
    for c, row in found.iterrows():
        here = means.loc[c]
        own = here.loc["none" if c == 0 else name]
        assert row["value"] == pytest.approx(own, abs=0.05)
        if c:
            null = here.drop(name)
            assert len(null) == 6
            assert row["null_low"] == pytest.approx(null.min(), abs=0.05)
            assert row["null_high"] == pytest.approx(null.max(), abs=0.05)


def test_the_chains_on_the_page_are_those_of_the_files():
    every = pd.concat([chains("formal"), chains("french")])
    every = every[every["direction"].isin(["formal", "french"])]
    lines = re.findall(r"^\| (.+) \| ([+-][\d.]+) \| ([A-Z].+) \|$", PAGE, re.MULTILINE)
    assert len(lines) == 6
    for prompt, coefficient, text in lines:
        same = (every["prompt"] == prompt) & (every["coefficient"] == float(coefficient))
        flat = [" ".join(one.split()) for one in every.loc[same, "text"]]
        assert any(text in one for one in flat), (prompt, coefficient, text)


def test_the_cosines_of_the_controls_and_their_rank_correlation_are_the_files():
    found = {name: rows(name).set_index("quantity")["value"] for name in ("formal", "french")}
    lines = re.findall(r"^\| (\w+:\d) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(lines) == 6
    for control, *shown in lines:
        expected = [one[f"cosine of {control}"] for one in found.values()]
        assert [float(x) for x in shown] == pytest.approx(expected, abs=0.005001)
    (line,) = re.findall(r"rank correlation\s(\S+) and (\S+)\)", PAGE)
    expected = [one["rank correlation of the controls"] for one in found.values()]
    assert [float(x) for x in line] == pytest.approx(expected, abs=0.005001)
