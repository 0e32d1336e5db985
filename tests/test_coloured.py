"""Coloured text: nothing is lost, everything is escaped, and colours are told apart."""

from __future__ import annotations

import re
from html import unescape

import pytest

from stllms import coloured, plots
from stllms.records import BEHAVIOURS, Annotation, PlacedSegment, Response, Steered

NAN = float("nan")
TEXT = "Okay, I need to find 2 < 3 & $x$.\nWait, let me go back to the start. So it is 5."
SEGMENTS = (
    PlacedSegment("initializing", TEXT[:33], 0, 33),
    PlacedSegment("backtracking", TEXT[34:69], 34, 69),
)


def bare(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize(
    "segments",
    [SEGMENTS, (*SEGMENTS, PlacedSegment("deduction", TEXT[20:50], 20, 50)), ()],
    ids=["apart", "overlapping", "none"],
)
def test_a_chain_keeps_its_text_and_shows_overlaps_once(segments):
    assert bare(coloured.html(TEXT, segments)) == TEXT
    painted = coloured.terminal(TEXT, segments, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == TEXT
    lines = coloured.terminal(TEXT, segments, colour=False).splitlines()
    assert " ".join(line[24:] for line in lines).split() == TEXT.split()


def test_html_is_escaped_everywhere():
    evil = "<script>alert(1)</script>"
    panel = coloured.Panel(
        evil, evil, (PlacedSegment(evil, evil, 0, len(evil)),), [0] * 6, evil
    )
    made = coloured.html_panels([panel]) + coloured.html(evil, (), title=evil)
    made += coloured.html_line(evil, wrong=True)
    assert "<script" not in made
    assert made.count("&lt;script&gt;") >= 6


def test_segments_have_the_colours_of_the_figures():
    assert plots.COLOURS is coloured.COLOURS
    assert coloured.COLOURS["backtracking"] in coloured.html(TEXT, SEGMENTS)
    assert all(name in coloured.html_legend() for name in BEHAVIOURS)
    assert len(set(coloured.TERMINAL.values())) == len(BEHAVIOURS) == len(coloured.TERMINAL)
    for name, code in coloured.TERMINAL.items():
        assert f"48;5;{code}m{name}" in coloured.terminal_shares(["a"], [[0] * 6], colour=True)


def test_several_chains_need_an_annotation_each():
    one = Response("t1", "c", "", (), (), TEXT, TEXT, 0, "", True, True)
    made = coloured.html_chains([one, one], [Annotation("t1", "x", SEGMENTS)] * 2)
    assert made.count("t1") == 2
    with pytest.raises(ValueError, match="shorter"):
        coloured.html_chains([one], [])


def test_bars_are_as_long_as_the_shares_and_a_missing_share_is_no_zero():
    shares = [0.0, 0.5, 0.25, 0.25, 0.0, NAN]
    made = coloured.html_panels([coloured.Panel("plain", TEXT, SEGMENTS, shares)])
    widths = [int(width) for width in re.findall(r"width:(\d+)px", made)]
    assert widths == [round(share * coloured.WIDTH) for share in shares[:5]]
    assert "50%" in made
    assert made.count("n/a") == 1
    table = coloured.terminal_shares(["plain"], [shares], colour=False).splitlines()
    assert table[0].split() == ["share", "of", "tokens", "plain"]
    assert [line.split()[-1] for line in table[1:]] == ["0%", "50%", "25%", "25%", "0%", "n/a"]


def test_an_error_is_one_line():
    made = coloured.html_line("two\nlines", wrong=True)
    assert bare(made) == "error: two lines"


def test_a_pair_shows_both_chains_with_what_was_added():
    def steered(coefficient, text):
        direction = "backtracking" if coefficient else "none"
        response = Response("t1", "", "", (), (), text, text, 0, "", closed=True, finished=True)
        return Steered(
            "t1", direction, 4, coefficient, "add", response, Annotation("t1", "x", ())
        )

    made = coloured.html_pair(steered(0.0, "plainly said"), steered(1.0, "<b>back</b>"))
    assert "plainly said" in made
    assert "&lt;b&gt;back" in made
    assert "+1 backtracking, layer 4" in made
    assert made.count("<td") == 2
    both = coloured.html_pairs({"backtracking": None, "deduction": None})
    assert both.count("not steered, or no chain rose") == 2
    assert coloured.html_pairs({}) == coloured.html_legend()
