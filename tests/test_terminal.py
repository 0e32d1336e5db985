"""Text of others reaches a terminal without anything that it would obey; rate and time left by
a clock that the test turns, and what a kernel tells its runner."""

from __future__ import annotations

import json
import random
import time
import unicodedata

import pytest

from stllms import terminal
from stllms.terminal import Bar, State, plain

#: One of each: colour, title, link, clipboard, C1, hidden line, bidi, backspace, half a pair.
ESCAPES = {
    "colour": "\x1b[31m",
    "title": "\x1b]0;mine\x07",
    "link": "\x1b]8;;https://elsewhere.invalid\x1b\\ours\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "c1": "\x9b2J\x9d0;mine\x9c",
    "hidden": "rm -rf /\rls",
    "backspace": "no\x08\x08yes",
    "override": "\u202etxt.exe\u202c",
    "isolate": "\u2066a\u2069",
    "half": "\ud83d alone",
    "delete": "\x7f",
    "tag": "\U000e0041",
    "next line": "a\x85b\u2028c",
    "null": "\x00",
}


def obeyed(text: str) -> list[str]:
    """Characters that a terminal would not simply show, by their Unicode categories.

    ``Cf`` holds joiners that emoji and scripts need: of it those that change what is read.
    """
    needed = "\u200b\u200c\u200d\ufeff\u00ad\u2060"
    return [
        one
        for one in text
        if (unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") and one not in "\n\t")
        or unicodedata.bidirectional(one) in ("LRO", "RLO", "LRE", "RLE", "PDF", "LRI", "RLI")
        or (unicodedata.category(one) == "Cf" and one not in needed)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_what_a_terminal_obeys_is_written_out_and_json_keeps_its_values(name):
    assert obeyed(ESCAPES[name]), "no such text"
    value = {"text": f"before {ESCAPES[name]} after", "list": ["\\u001b"]}
    written = plain(json.dumps(value, ensure_ascii=False))
    assert obeyed(written) == obeyed(plain(value["text"])) == []
    assert json.loads(written) == value


def test_every_character_of_unicode_is_shown_or_written_out():
    every = "".join(map(chr, range(0x110000)))
    rest = set(obeyed(plain(every)))
    prepended = {one for one in rest if unicodedata.category(one) == "Cf"}
    assert rest == prepended, "only format marks of scripts and music are left"
    assert all(unicodedata.bidirectional(one) not in ("RLO", "LRO", "RLE") for one in rest)


def test_what_people_write_stays():
    text = "a\tb\nc — 北京, Привет, שלום, مرحبا, नमस्ते, 👩\u200d💻, x\u00b2 <think>"
    assert plain(text) == text
    assert plain("one\r\ntwo") == "one\ntwo"


# -- progress ------------------------------------------------------------------------------


class Clock:
    time = 100.0

    def __call__(self) -> float:
        return self.time


def fed(total, steps, *, seconds=1.0, most=None):
    """A bar after the ticks ``steps``, each ``seconds`` after the one before, and its clock."""
    now = Clock()
    meter = Bar(total, most=most, now=now)
    for step in steps:
        now.time += seconds
        meter.tick(*step)
    return meter, now


#: 16 rows in two batches of 8, a token a second, all of 50 tokens.
BATCH = [(8, 0)] * 49 + [(8, 8)]


@pytest.mark.parametrize(
    ("total", "steps", "options", "rate", "left"),
    [
        (100, [(10, 1)] * 20, {}, 10, 80),
        (40, [(0, 1)] * 30, {"seconds": 5}, 1 / 5, 50),  # without tokens, rows are counted
        (16, BATCH[:49], {"most": 50}, 8, None),  # no row has ended: nobody can know
        (16, BATCH, {"most": 50}, 8, 50),
        (16, BATCH + BATCH[:30], {"most": 50}, 8, 20),  # half-written rows count
        (1000, [(5, 1)] * 9, {}, 5, None),  # before ten have ended
        (1000, [(5, 1)] * 10, {}, 5, 990),
        (10, [(5, 1)], {}, 5, 9),  # one of ten will do
        (10, [], {}, None, None),
        (5000, [(10, 1)] * 200 + [(100, 10)] * 61, {}, 100, 419),  # only the recent speed
    ],
)
def test_the_time_left_is_that_of_the_rest_at_the_recent_speed(
    total, steps, options, rate, left
):
    meter, _ = fed(total, steps, **options)
    assert meter.rate == (rate and pytest.approx(rate))
    assert meter.left == (left and pytest.approx(left))


def test_rows_that_were_there_say_nothing_about_the_speed():
    now = Clock()
    meter = Bar(1000, now=now)
    for _ in range(90):
        now.time += 1  # reading them takes its time
        meter.skip(10)
    for _ in range(50):
        now.time += 2
        meter.tick(6, 1)
        assert meter.rate == pytest.approx(3)
    assert meter.done == 950
    assert meter.left == pytest.approx(100)


def test_what_is_made_again_is_taken_back():
    meter, now = fed(10, [(10, 1)] * 4)
    meter.tick(-40, -4)
    assert (meter.done, meter.tokens, meter.rate, meter.left) == (0, 0, None, None)
    for _ in range(5):
        now.time += 1
        meter.tick(10, 1)
    assert meter.done == 5


def test_a_run_of_rows_of_unequal_length_is_foretold_without_bias():
    """Geometric lengths of mean 40, 20 at a time, refilled: 5 s a step. At a third of the
    rows, over many runs, the time foretold is on average the time that it then takes."""
    draw = random.Random(1)
    ratios = []
    for _ in range(60):
        waiting = [1 + int(draw.expovariate(1 / 39.5)) for _ in range(300)]
        now = Clock()
        meter, live, told = Bar(300, now=now), [], None
        while waiting or live:
            while waiting and len(live) < 20:
                live.append(waiting.pop())
            live = [rest - 1 for rest in live]
            now.time += 5
            meter.tick(len(live), live.count(0))
            live = [rest for rest in live if rest]
            if told is None and meter.done >= 100:
                told = now.time, meter.left
        ratios.append(told[1] / (now.time - told[0]))
    mean = sum(ratios) / len(ratios)
    assert 0.8 < mean < 1.05, mean  # the last rows of a run leave the batch half empty


# -- shown, told to a runner, or neither -------------------------------------------------------


def test_a_state_is_said_in_one_line():
    state = State("steered", 340, 1740, tokens=81_200, rate=2310.4, left=190, note="0.02 USD")
    said = "steered 340/1,740 rows, 81,200 tokens, 2,310 tokens/s, 0.02 USD, 3:10 left"
    assert state.text() == said
    assert State("calls", 1, 2, "calls", rate=3, left=10_800, ended=True).text() == (
        "calls 1/2 calls"
    )
    assert [terminal.clock(s) for s in (0, 59.6, 754, 3600)] == [
        "0:00", "1:00", "12:34", "1:00:00",
    ]  # fmt: skip


def count(rows=3, **options):
    with terminal.token_bar(rows, "digging", **options) as bar:
        for _ in range(rows):
            bar.tick(7, 1)


def test_a_script_sees_a_bar_unless_it_asks_for_silence(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(terminal.CHANNEL, raising=False)
    count()
    assert "digging 0/3 rows" in capsys.readouterr().err
    count(enabled=False)
    monkeypatch.setenv(terminal.CHANNEL, str(tmp_path / "told"))
    count(enabled=False)
    assert not (tmp_path / "told").exists()
    assert capsys.readouterr() == ("", "")


def test_a_kernel_tells_its_runner_and_draws_nothing(capsys, monkeypatch, tmp_path):
    path = tmp_path / "told"
    assert terminal.read(path) is None
    monkeypatch.setenv(terminal.CHANNEL, str(path))
    with terminal.about("model 2 of 3"), terminal.token_bar(3, "digging", most=9) as bar:
        begun = terminal.read(path)
        bar.tick(7, 1)
        bar.tick(7, 1)
    assert (begun.what, begun.done, begun.ended) == ("model 2 of 3 digging", 0, False)
    told, whole = terminal.read(path), path.read_text()
    assert (told.done, told.total, told.tokens, told.ended) == (2, 3, 14, True)
    assert capsys.readouterr() == ("", "")
    for end in range(len(whole)):
        path.write_text(whole[:end])
        assert terminal.read(path) is None, "just being written"


def test_a_kernel_tells_a_few_times_a_second_at_most(monkeypatch, tmp_path):
    written = []
    monkeypatch.setenv(terminal.CHANNEL, str(tmp_path / "told"))
    monkeypatch.setattr(terminal, "report", lambda path, state: written.append(state))
    begun = time.monotonic()
    count(5000)
    assert len(written) <= (time.monotonic() - begun) / terminal.SHOWN_EVERY + 2
    assert written[-1].done == 5000, "the last one is never left out"
