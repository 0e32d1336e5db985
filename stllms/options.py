"""The words of the command ``stllms``: its options, help and examples."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple, NoReturn

from stllms import __version__
from stllms.config import PROFILES
from stllms.records import STEERED


class Example(NamedTuple):
    """A question to tiny-thinker on which a push shows."""

    question: str
    behaviour: str
    coefficient: float
    seed: int

    @property
    def words(self) -> list[str]:
        """The arguments of ``stllms`` that ask it."""
        options = f"--behaviour {self.behaviour} --coefficient {self.coefficient:g}"
        return ["steer", self.question, *f"{options} --seed {self.seed}".split()]

    def __str__(self) -> str:
        options = " ".join(self.words[2:])
        return f'  stllms steer "{self.question}" \\\n      {options}'


#: What the help shows first. Hand-picked: on many questions it shows less (notebook 04).
EXAMPLE = Example(
    "Ben has 4 coins and gets 3 more. How many coins does Ben have?", "backtracking", 1.0, 31
)

EXAMPLES = f"""examples:
{EXAMPLE}
  stllms annotate chain.txt
  stllms run --profile smoke
  stllms verify results/tiny-thinker

stllms COMMAND --help says more about each. exit status: 0 done, 1 failed, 2 wrong command."""

STEER = f"""examples:
{EXAMPLE}
{EXAMPLE} --json
  stllms steer "What is 17 * 23?" --behaviour backtracking --coefficient -1 \\
      --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --vectors mean_vectors.pt

tiny-thinker knows only the questions of its grammar; its directions ship with the package.
Those of another model are of the run in its folder of results, whatever its options were;
notebooks 01 to 03 make one first where there is none (this may take long)."""

ANNOTATE = """examples:
  stllms annotate chain.txt                              one chain, the offline classifier
  stllms annotate - --judge lexical < chain.txt          from standard input
  stllms annotate responses.jsonl --out segments.jsonl   rows of notebook 01
  stllms annotate reasoning_comparison_MODEL.json        a released file
  stllms annotate responses.jsonl --judge openai:gpt-4.1 --max-cost 2

One JSON object a segment (task_id, annotator, label, text, start, end: characters of the
thinking), then a line on stderr about what was labelled. Status 1 if a chain has no labels:
that line names it, and what the others have is written."""

VERIFY = """examples:
  stllms verify results/tiny-thinker
  stllms verify results/reference          every run below

One line an artefact: whether it is there and whole (its hash, its rows), and made from what is
there now. Status 1 if one does not hold."""

JUDGES = "grammar, lexical, offline, openai:MODEL, replay:FOLDER"


#: What each profile is for.
PURPOSES: dict[str, str] = {
    "smoke": "to see that it works",
    "default": "a first result",
    "full": "narrow intervals",
    "paper": "as published: long, greedy chains",
}


class UsageError(ValueError):
    """The command line does not make sense; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        options |= {"formatter_class": argparse.RawTextHelpFormatter}
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _Parser(prog="stllms", description=_TITLE, epilog=EXAMPLES)
    made.add_argument("--version", action="version", version=f"stllms {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    text = "run the notebooks for one or more models (what run_all.sh calls)"
    commands.add_parser("run", help=text, add_help=False)
    text = "answer a question plain and with a behaviour added or removed"
    _steer_options(commands.add_parser("steer", help=text, description=text, epilog=STEER))
    text = "label the behaviours in chains of a file"
    options = {"help": text, "description": text, "epilog": ANNOTATE}
    _annotate_options(commands.add_parser("annotate", **options))
    text = "recompute what a run says of its artefacts"
    options = {"help": text, "description": text, "epilog": VERIFY}
    checked = commands.add_parser("verify", **options)
    checked.add_argument("folder", metavar="FOLDER", help="results/<slug>, or a folder of runs")
    return made


_TITLE = "Steering vectors for the reasoning behaviours of thinking language models."


def _steer_options(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("question", metavar="QUESTION", help="what the model is asked")
    names = ",\n".join(", ".join(STEERED[at : at + 2]) for at in range(0, len(STEERED), 2))
    add("--behaviour", required=True, metavar="NAME", help=names)
    number = "adds the behaviour, below 0 removes it (default: 1)"
    add("--coefficient", type=float, default=1.0, metavar="X", help=number)
    place = "registry name, hub id or local folder\n(default: tiny-thinker)"
    add("--model", default="tiny-thinker", metavar="NAME", help=place)
    add("--layer", type=int, metavar="N", help="from 0 (default: the behaviour's own)")
    add("--vectors", metavar="FILE", help="directions: a vectors.safetensors, a released .pt")
    add("--operation", default="add", metavar="HOW", help="add (default) or ablate")
    where = "all (default), generated or thinking tokens"
    add("--where", default="all", metavar="TOKENS", help=where)
    add("--temperature", type=float, metavar="X", help="0 is greedy (default: the run's)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    limit = "limit of new tokens (default: the run's)"
    add("--max-tokens", type=int, metavar="N", help=limit)
    add("--profile", default="default", metavar="NAME", help=_profiles())
    who = f"who labels (default: a free one):\n{JUDGES}"
    add("--judge", default="auto", metavar="WHO", help=who)
    _judge_options(made)
    add("--results", metavar="DIR", help="folder of the runs (default: results/)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, mps, cuda, cuda:N")
    switch = argparse.BooleanOptionalAction
    add("--plain", action=switch, default=True, help="show the plain chain too (default)")
    add("--json", action="store_true", help="one JSON object instead of text")


def _profiles() -> str:
    """A line a profile: the tasks that directions are made from, and what it is for."""
    lines = [
        f"{name:<8}{profile.n_build:>5} tasks, {PURPOSES[name]}"
        for name, profile in PROFILES.items()
    ]
    return "\n".join(["how large a run is, where one has to be made:", *lines])


def _annotate_options(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("file", metavar="FILE", help="text, JSONL, JSON, or - for standard input")
    who = f"who labels (default: offline):\n{JUDGES}"
    add("--judge", default="offline", metavar="WHO", help=who)
    _judge_options(made)
    add("--out", metavar="FILE", help="write the segments here instead of printing them")


def _judge_options(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--base-url", metavar="URL", help="server of an openai: judge")
    add("--max-cost", type=float, metavar="USD", help="bound on what an openai: judge costs")
