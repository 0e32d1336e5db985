"""Text of others reaches a terminal without anything that the terminal would obey."""

from __future__ import annotations

import json
import unicodedata

import pytest

from stllms import cli, coloured, ledger, pairs, published, remote, report, run
from stllms.records import Annotation, PlacedSegment, Response, Steered
from stllms.terminal import plain

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
EVIL = " ".join(ESCAPES.values())


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
def test_what_a_terminal_obeys_is_written_out(name):
    assert obeyed(ESCAPES[name]), "no such text"
    assert obeyed(plain(f"before {ESCAPES[name]} after")) == []


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
    assert plain(ValueError("why")) == "why"


def test_json_keeps_its_values():
    value = {"text": EVIL, "list": ["\U000e0041", "\x7f\x9b", "\\u001b"]}
    written = plain(json.dumps(value, ensure_ascii=False))
    assert obeyed(written) == []
    assert json.loads(written) == value


# -- wherever text of others is printed --------------------------------------------------------


def chain(direction: str, text: str) -> Steered:
    response = Response("t", "", "", (), (1,), text, text, 0, text, closed=True, finished=True)
    segments = (PlacedSegment("deduction", text, 0, len(text)),)
    label = Annotation("t", text, segments, ledger={"coverage": 1.0}, failed=None)
    return Steered("t", direction, 4, 1.0, "add", response, label)


@pytest.mark.parametrize("colour", [False, True])
def test_steer_shows_a_chain_without_its_escapes(colour):
    made = cli._as_text([chain("none", EVIL), chain("backtracking", EVIL)], colour=colour)
    for one in coloured.TERMINAL.values():
        made = made.replace(f"\x1b[30;48;5;{one}m", "")
    made = made.replace("\x1b[0m", "")
    assert obeyed(made) == []
    assert "\\u001b[31m" in made


def test_steer_as_json_and_its_remarks(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_as_json", lambda *_: {"text": EVIL})
    monkeypatch.setattr(pairs, "bench", lambda *_: None)
    monkeypatch.setattr(pairs, "write", lambda *_: ())
    monkeypatch.setattr(pairs, "remark", lambda _: EVIL)
    assert cli.main(["steer", "what?", "--behaviour", "backtracking", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"text": EVIL}
    assert obeyed(out + err) == []


def test_annotate_and_its_errors(capsys, tmp_path):
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps({"task_id": EVIL, "thinking": " "}) + "\n")
    assert cli.main(["annotate", str(path)]) == 1
    path.write_text(json.dumps({"task_id": 1, EVIL: "x"}) + "\n")
    assert cli.main(["annotate", str(path)]) == 2
    path.write_text(json.dumps({"task_id": EVIL, "thinking": f"So {EVIL} it is."}) + "\n")
    assert cli.main(["annotate", str(path), "--judge", "lexical"]) == 0
    out, err = capsys.readouterr()
    assert obeyed(out + err) == []
    whole = EVIL.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(out.splitlines()[0])["task_id"] == whole, "half a pair is no text"
    assert "\\u001b" in err


def raising(error: Exception):
    def stop(*_args: object, **_options: object) -> None:
        raise error

    return stop


@pytest.mark.parametrize("error", [ValueError, run.StageError, OSError])
def test_errors_of_the_commands(capsys, monkeypatch, error):
    monkeypatch.setattr(run, "_main", raising(error(EVIL)))
    monkeypatch.setattr(cli, "_main", raising(error(EVIL)))
    monkeypatch.setattr(report, "write", raising(error(EVIL)))
    assert run.main([])
    assert cli.main(["steer"])
    if error is not run.StageError:
        assert report.main(["x"])
    err = capsys.readouterr().err
    assert err.count("\\u001b]52") >= 2
    assert obeyed(err) == []


def test_released_labels_and_the_ledger(capsys, monkeypatch, tmp_path):
    class Written:
        def table(self, *_: object) -> None:
            """Nothing is written."""

    published._list_left_out(Written(), {tmp_path / "x.pt": {EVIL: EVIL}})
    monkeypatch.setattr(ledger, "write", lambda *_: None)
    monkeypatch.setattr(ledger, "markdown", lambda _: EVIL)
    assert ledger.main(["--results", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert obeyed(out + err) == []


def test_reasons_of_a_server(capsys, monkeypatch):
    from stllms import api
    from stllms.records import Task
    from stllms.replies import Reply

    failed = Reply({"key": "k", "reason": EVIL}, EVIL)
    monkeypatch.setattr(api.Client, "replies", lambda *_: [failed])
    asked = [Task(EVIL, "c", "what?")]
    assert remote.responses("m", asked, max_new_tokens=9, folder="x", base_url="http://h") == []
    out = capsys.readouterr().out
    assert "1 of 1 tasks failed" in out
    assert obeyed(out) == []
