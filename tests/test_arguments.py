"""The command line of the runner: its help, and what the command is called in it."""

from __future__ import annotations

from stllms import run
from stllms.arguments import OTHER_FIELDS, PURPOSES
from stllms.config import PROFILES


def test_help_shows_examples_profiles_and_what_option_takes(capsys):
    assert run.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert set(PURPOSES) == set(PROFILES)
    for name, profile in PROFILES.items():
        assert f"{name:8} directions from {profile.n_build} tasks, steering on" in said
        assert PURPOSES[name] in said
    below = said.partition("--option takes these names")[2]
    assert OTHER_FIELDS
    for name in OTHER_FIELDS:
        assert name in below
    assert "n_samples" not in below, "it has a flag of its own"
    assert max(map(len, said.splitlines())) < 100


def test_the_caller_says_what_the_command_is_called(capsys):
    assert run.main(["--help"], prog="stllms run") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: stllms run ")
    assert "  stllms run --profile smoke --to 02" in out
    assert "python -m" not in out
    assert run.main(["--modle", "x"], prog="stllms run") == 2
    assert capsys.readouterr().err.startswith("stllms run: unknown option '--modle'")


def test_the_help_names_what_an_option_takes(capsys):
    assert run.main(["--help"]) == 0
    out = capsys.readouterr().out
    for part in (
        "--judge WHO",
        "--results DIR",
        "--seed N",
        "--base-url URL",
        "--max-cost USD",
    ):
        assert part in out
    for word in (" STR", " INT", " FLOAT"):
        assert word not in out
