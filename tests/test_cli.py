"""The command ``stllms``: what it prints, its exit status, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from stllms import cli, inputs, run
from stllms.records import BEHAVIOURS, to_row

CHAIN = "Okay, I need to find 2+2. Wait, maybe I should check. So 2+2 is 4."
QUESTION = "Is wood a solid, Leo asks?"
STEER = ["steer", QUESTION, "--behaviour", "backtracking", "--max-tokens", "24"]


def told(capsys, *argv: str) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# --- the command line ----------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from stllms import cli; status = cli.main(['steer', '--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "stllms", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "stllms")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["--quick"], "COMMAND"),
        (["steer", "what?"], "--behaviour (see stllms steer --help)"),
        (["steer", " ", "--behaviour", "backtracking"], "the question is empty"),
        ([*STEER, "--coefficient", "much"], "invalid float value: 'much'"),
        (["steer", "what?", "--behaviour", "backtracking", "--model", "nope"], "unknown model"),
        (["steer", "what?", "--behaviour", "anger"], "expected one of initializing"),
        ([*STEER, "--layer", "6"], "layers 0 to 5"),
        ([*STEER, "--temperature", "-1"], "temperature: -1.0"),
        ([*STEER, "--where", "nowhere"], "all, generated, thinking"),
        ([*STEER, "--vectors", "nowhere.safetensors"], "nowhere.safetensors"),
        (["steer", "why? " * 500, *STEER[2:]], "exceed the context of tiny-thinker"),
        (["annotate", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["annotate", "x", "--max-cost", "2"], "--max-cost is for a judge openai:MODEL"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line_and_status_2(capsys, argv, words):
    status, out, err = told(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("stllms: ")
    assert err.count("\n") == 1
    assert words in err


def test_no_command_shows_the_help(capsys):
    status, out, _ = told(capsys)
    assert status == 2
    assert "annotate" in out


def test_run_hands_its_arguments_on(capsys, monkeypatch):
    monkeypatch.setattr(run, "main", lambda argv: print(argv) or 7)
    assert told(capsys, "run", "--profile", "smoke", "--help")[:2] == (
        7,
        "['--profile', 'smoke', '--help']\n",
    )


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (RuntimeError("the server is gone"), 1)]
)
def test_interrupted_and_failed(capsys, monkeypatch, error, status):
    def fail(_):
        raise error

    monkeypatch.setattr(inputs, "read", fail)
    found, _, err = told(capsys, "annotate", "x")
    assert found == status
    assert err == f"stllms: {error if str(error) else 'interrupted'}\n"


# --- steer ---------------------------------------------------------------------------------


def test_steer_as_json_at_0_is_the_same_chain_twice(capsys):
    status, out, _ = told(capsys, *STEER, "--coefficient", "0", "--json", "--seed", "5")
    made = json.loads(out)
    assert status == 0
    assert [chain["chain"] for chain in made["chains"]] == ["plain", "steered"]
    plain, steered = ({**chain, "chain": None} for chain in made["chains"])
    assert plain == steered
    assert plain["thinking"]
    assert set(plain["shares"]) == set(BEHAVIOURS)
    settings = {name: made[name] for name in ("question", "seed", "max_new_tokens")}
    assert settings == {"question": QUESTION, "seed": 5, "max_new_tokens": 24}


def test_steer_prints_labels_without_a_terminal_and_colours_with_one(capsys, monkeypatch):
    status, out, _ = told(capsys, *STEER, "--coefficient", "-1")
    assert status == 0
    assert out.startswith("plain\n")
    assert "-1 backtracking, layer " in out
    assert "\x1b" not in out
    assert any(line.startswith("initializing  ") for line in out.splitlines())
    monkeypatch.setattr(cli, "has_colour", lambda: True)
    status, out, _ = told(capsys, *STEER, "--no-plain")
    assert out.startswith("+1 backtracking, layer ")
    assert "\x1b[30;48;5;" in out
    assert "plain" not in out


@pytest.mark.parametrize(
    ("tty", "no_colour", "term", "expected"),
    [
        (True, None, "xterm", True),
        (True, "", "xterm", True),
        (True, "1", "xterm", False),
        (True, None, "dumb", False),
        (False, None, "xterm", False),
    ],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, tty, no_colour, term, expected):
    stdout = io.StringIO()
    stdout.isatty = lambda: tty
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour is not None:
        monkeypatch.setenv("NO_COLOR", no_colour)
    assert cli.has_colour() is expected


# --- annotate ------------------------------------------------------------------------------


def test_a_text_from_standard_input_is_labelled_where_it_says(capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(f"<think>{CHAIN}</think> 4".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, err = told(capsys, "annotate", "-", "--judge", "lexical")
    rows = lines(out)
    assert status == 0
    assert {row["label"] for row in rows} >= {"initializing", "backtracking"}
    assert all(CHAIN[row["start"] : row["end"]] == row["text"] for row in rows)
    assert err == f"lexical: 1 chains, {len(rows)} segments, 100.0% of the text labelled, " + (
        "none failed\n"
    )


def test_segments_are_written_to_a_file(capsys, tmp_path):
    source, out = tmp_path / "a.txt", tmp_path / "b.jsonl"
    source.write_text(CHAIN, encoding="utf-8")
    status, printed, _ = told(capsys, "annotate", str(source), "--out", str(out))
    assert (status, printed) == (0, "")
    rows = lines(out.read_text(encoding="utf-8"))
    assert {row["annotator"] for row in rows} == {"offline"}


def test_a_chain_without_labels_is_status_1_and_named(capsys, tmp_path):
    source = tmp_path / "a.jsonl"
    rows = [{"task_id": "good", "thinking": CHAIN}, {"task_id": "bad", "thinking": ""}]
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    store = tmp_path / "replies"
    status, _, err = told(capsys, "annotate", str(source), "--judge", f"replay:{store}")
    assert status == 2, "there is no such folder"
    assert "holds no stored replies" in err


def test_released_chains_are_read(capsys, published, tmp_path):
    path = published / "reasoning_comparison_qwen2.5-14b-instruct.json"
    made = inputs.read(str(path))
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [one.thinking for one in made] == [row["thinking_process"] for row in rows]


# --- what a file may be --------------------------------------------------------------------


def test_responses_are_read_as_they_were_written(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(CHAIN, encoding="utf-8")
    one = inputs.read(str(source))[0]
    stored = tmp_path / "responses.jsonl"
    stored.write_text(json.dumps({**to_row(one), "task_id": "t7"}) + "\n\n", encoding="utf-8")
    again = inputs.read(str(stored))
    assert [(item.task_id, item.thinking) for item in again] == [("t7", CHAIN)]


@pytest.mark.parametrize(
    ("name", "content", "thinking"),
    [
        ("a.txt", CHAIN, CHAIN),
        ("a.txt", f"<think>\n{CHAIN}\n</think>\n4", CHAIN),
        ("a.txt", '["deduction"] so it is ["end-section"]', None),
        ("a.json", json.dumps([{"response": f"{CHAIN}</think>4"}]), CHAIN),
        ("a.jsonl", json.dumps({"text": f"<think>{CHAIN}</think>4"}), CHAIN),
        ("a", json.dumps({"thinking_process": CHAIN, "response": "no"}), CHAIN),
    ],
)
def test_the_content_says_what_a_file_is(tmp_path, name, content, thinking):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    (made,) = inputs.read(str(path))
    assert made.thinking == (content if thinking is None else thinking)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"  \n", "empty"),
        ("a.txt", b"\xff\xfe\x00", "not a text in UTF-8"),
        ("a.json", b"[1, 2", "no whole JSON"),
        ("a.json", b"{}", "expected a list of chains"),
        ("a.json", b"[1]", "chain 1: a int, expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text', "line 2: no JSON"),
        ("a.jsonl", b'{"label": "b"}', "expected one of thinking"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(capsys, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    status, out, err = told(capsys, "annotate", str(path))
    assert (status, out) == (2, "")
    assert f"{name}" in err
    assert words in err
    assert err.count("\n") == 1
