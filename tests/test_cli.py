"""The command ``stllms``: what it prints, its exit status, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from stllms.annotation import annotators, placing
from stllms.app import cli, runner
from stllms.config import PROFILES
from stllms.generation import prompts
from stllms.labels import PAPER

CHAIN = "Okay, I need to find 2+2. Wait, maybe I should check. So 2+2 is 4."
STEER = ["steer", cli.QUESTION, "--behaviour", "backtracking", "--max-tokens", "24"]


def told(capsys, *argv: str) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# --- the command line ----------------------------------------------------------------------


def test_the_module_shows_help_and_models_without_importing_anything_heavy():
    program = (
        "import runpy, sys; from stllms.app import cli, runner, stages\n"
        "done = [cli.main(words) for words in (['steer', '--help'], ['models'])]\n"
        "heavy = {'torch', 'transformers', 'papermill', 'pandas', 'matplotlib'}\n"
        "sys.argv[1:] = ['--version']\n"
        "try: runpy.run_module('stllms', run_name='__main__')\n"
        "finally: print(done, heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0] set()"
    assert "Examples:" in done.stdout
    assert "r1-distill-qwen-1.5b" in done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
        (["steer", "what?"], "(see stllms steer --help)"),
        (["steer", " ", "--behaviour", "backtracking"], "the question is empty"),
        ([*STEER, "--coefficient", "much"], "'much' is not a valid float"),
        ([*STEER, "--model", "typo"], "(stllms models)"),
        ([*STEER, "--model", "gpt-4o"], "'gpt-4o' is reached through an API"),
        ([*STEER, "--base-url", "http://x"], "--base-url is for a judge openai:MODEL"),
        (["steer", "what?", "--behavior", "bactracking"], "did you mean backtracking?"),
        ([*STEER, "--layer", "6"], "layer 6 is not in 0 .. 5"),
        ([*STEER, "--coefficient", "1e39"], "expected a number from -1000 to 1000"),
        (["steer", "caf\udce9", *STEER[2:]], "question: character 4 is no UTF-8"),
        ([*STEER, "--vectors", "nowhere.safetensors"], "nowhere.safetensors"),
        (["steer", "why? " * 500, *STEER[2:]], "exceed the context of tiny-thinker"),
        (["annotate", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["annotate", "x", "--max-cost", "2"], "--max-cost is for a judge openai:MODEL"),
        (["annotate", __file__, "--judge", "replay:."], "holds no stored replies"),
        (["run", "--published", "x", "--seed", "3"], "--seed needs --model"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line_and_status_2(capsys, argv, words):
    status, out, err = told(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("stllms: ")
    assert err.count("\n") == 1
    assert words in err


def test_the_help_names_commands_profiles_behaviours_and_what_option_takes(capsys):
    status, out, _ = told(capsys)
    assert status == 2, "no command at all"
    assert "annotate" in out
    _, out, _ = told(capsys, "run", "--help")
    assert all(
        f"{name:8} directions from {one.n_build}" in out for name, one in PROFILES.items()
    )
    below = out.partition("--option takes these names")[2]
    assert all(name in below for name in cli.OTHER_FIELDS)
    assert "n_samples" not in below, "it has an option of its own"
    assert max(map(len, out.splitlines())) < 100
    assert all(name in told(capsys, "steer", "--help")[1] for name in PAPER.targets)


@pytest.mark.parametrize(
    ("words", "fresh"), [("", None), ("--fresh", "all"), ("--fresh 3", "3")]
)
def test_the_options_of_run_become_configurations(capsys, monkeypatch, words, fresh):
    ran = []
    monkeypatch.setattr(runner, "run", lambda configs, **given: ran.append((configs, given)))
    words += " --to 03 --model tiny-thinker --model TINY-INSTRUCT --profile smoke"
    words += " --max-tokens 9 --option reader=published --option coefficients=-1,0.5"
    words += " --quantization 8bit"
    assert told(capsys, "run", *words.split())[0] == 0
    ((found, given),) = ran
    assert (given["fresh"], given["first"], given["last"]) == (fresh, None, "03")
    assert [config.model for config in found] == ["tiny-thinker", "tiny-instruct"]
    assert {config.settings.max_tokens for config in found} == {9}
    assert (found[0].reader, found[0].quantization) == ("published", "8bit")
    assert (found[0].coefficients, found[0].settings.n_build) == ((-1.0, 0.5), 16)


def test_the_first_example_of_the_help_shows_the_behaviour_rise(capsys):
    words = shlex.split(cli.EXAMPLE.replace("\\\n", " "))[1:]
    for command in ((), ("steer",)):
        shown = textwrap.indent(f"Examples:\n  {cli.EXAMPLE}", "  ")
        assert shown in told(capsys, *command, "--help")[1]
    status, out, err = told(capsys, *words, "--json")
    assert status == 0
    baseline, steered = (one["shares"]["backtracking"] for one in json.loads(out)["chains"])
    assert steered - baseline >= 0.2
    assert err.startswith("tiny-thinker is a fixture")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (RuntimeError("the server is gone"), 1)]
)
def test_interrupted_and_failed(capsys, monkeypatch, error, status):
    def fail(_):
        raise error

    monkeypatch.setattr(prompts, "read", fail)
    found, _, err = told(capsys, "annotate", "x")
    assert found == status
    assert err == f"stllms: {error if str(error) else 'interrupted'}\n"


# --- steer ---------------------------------------------------------------------------------


def test_steer_as_json_at_0_is_the_same_chain_twice(capsys):
    status, out, _ = told(capsys, *STEER, "--coefficient", "0", "--json", "--seed", "5")
    made = json.loads(out)
    assert status == 0
    assert [chain["chain"] for chain in made["chains"]] == ["baseline", "steered"]
    baseline, steered = ({**chain, "chain": None} for chain in made["chains"])
    assert baseline == steered
    assert baseline["thinking"]
    assert set(baseline["shares"]) == set(PAPER.names)
    settings = {name: made[name] for name in ("question", "seed", "max_new_tokens")}
    assert settings == {"question": cli.QUESTION, "seed": 5, "max_new_tokens": 24}


def test_steer_prints_labels_without_a_terminal_and_colours_with_one(capsys, monkeypatch):
    status, out, _ = told(capsys, *STEER, "--coefficient", "-1")
    assert status == 0
    assert out.startswith("baseline\n")
    assert "-1 backtracking, layer " in out
    assert "\x1b" not in out
    assert any(line.startswith("initializing  ") for line in out.splitlines())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = told(capsys, *STEER)
    assert "+1 backtracking, layer " in out
    assert "\x1b[30;48;5;" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in told(capsys, *STEER)[1]


def test_a_push_that_changes_no_token_is_one_more_line(capsys):
    said = "stllms: the push changed no token: try another seed"
    assert said in told(capsys, *STEER, "--coefficient", "0.01", "--json")[2]


# --- annotate ------------------------------------------------------------------------------


def test_a_text_from_standard_input_is_labelled_where_it_says(capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(f"<think>{CHAIN}</think> 4".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, err = told(capsys, "annotate", "-", "--judge", "lexical")
    rows = lines(out)
    assert status == 0
    assert {row["label"] for row in rows} >= {"initializing", "backtracking"}
    assert all(CHAIN[row["start"] : row["end"]] == row["text"] for row in rows)
    found = f"lexical: 1 chains, {len(rows)} segments, 100.0% of the text labelled"
    assert err == f"{found}, 0 chains without labels\n"


def test_a_chain_without_labels_is_status_1_and_named(capsys, tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    texts = {"good": CHAIN, "nothing": "", "unknown": "zzz", "broken": CHAIN}
    rows = [{"task_id": name, "thinking": text} for name, text in texts.items()]
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    class Partly:
        name = "partly"

        def annotate(self, chains):
            made = annotators.Lexical().annotate(chains)
            made[2] = placing.annotation(placing.place([], "zzz"), "unknown", self.name)
            made[3] = replace(made[2], task_id="broken", failed="no stored reply")
            return made

    monkeypatch.setattr(annotators, "annotator", lambda *_: Partly())
    status, out, err = told(capsys, "annotate", str(source))
    assert status == 1
    assert err.endswith(
        ", 3 chains without labels: nothing (empty), unknown (nothing found), "
        "broken (no stored reply)\n"
    )
    assert {row["task_id"] for row in lines(out)} == {"good"}


# --- what a file may be --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "thinking"),
    [
        ("a.txt", CHAIN, CHAIN),
        ("a.txt", f"<think>\n{CHAIN}\n</think>\n4", CHAIN),
        ("a.txt", '["deduction"] so it is ["end-section"]', None),
        ("a.json", json.dumps([{"response": f"{CHAIN}</think>4"}]), CHAIN),
        ("a.jsonl", json.dumps({"text": f"<think>{CHAIN}</think>4"}) + "\n\n", CHAIN),
        ("a.jsonl", json.dumps({"task_id": "t7", "thinking": CHAIN}), CHAIN),
        ("a", json.dumps({"thinking_process": CHAIN, "response": "no"}), CHAIN),
    ],
)
def test_the_content_says_what_a_file_is(tmp_path, name, content, thinking):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    (made,) = prompts.read(str(path))
    assert made.thinking == (content if thinking is None else thinking)
    assert made.task_id == ("t7" if "t7" in content else made.task_id)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"  \n", "empty"),
        ("a.txt", b"\xff\xfe\x00", "not a text in UTF-8"),
        ("a.json", b"[1, 2", "no whole JSON"),
        ("a.json", b"{}", "expected a list of chains"),
        ("a.json", b"[1]", "chain 1: a number, expected an object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text',
            "line 2, character 2: no JSON (Unterminated string starting)",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "task_id": 7}\n\n{"text": "b", "task_id": "7"}',
            "a.jsonl, line 3: task_id '7' again, it is that of line 1",
        ),
        ("a.json", b'[{"text": "a", "task_id": "2"}, {"text": "b"}]', "chain 2: task_id '2'"),
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
