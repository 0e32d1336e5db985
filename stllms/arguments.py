"""The command line of the runner: its options, its help, and the configurations it means."""

from __future__ import annotations

import argparse
import difflib
import json
import textwrap
from dataclasses import fields
from typing import Any, NoReturn

from stllms.config import CHOICES, PROFILES, RunConfig
from stllms.registry import OTHERS

#: The first line of the help.
TITLE = "Executes the notebooks for one or more models, and skips what is done."

#: What a profile is for, and how long it takes for the embedded model on two cores.
PURPOSES = {
    "smoke": "does it run here? two or three minutes",
    "default": "the committed figures; four minutes",
    "full": "claims about the embedded model; much longer than default",
    "paper": "the numbers of the paper, greedy, long chains; wants a GPU",
}

EPILOG = """profiles:
{profiles}
  The times are those of tiny-thinker on two cores. smollm2 takes about six minutes for smoke;
  nothing was measured on a GPU.

--option takes these names, lists with commas:
  {names}
and these, of which "published" gives what the paper's code does:
  {choices}

examples:
  {prog}                                  the embedded model, offline
  {prog} --profile smoke --to 02          a quick look, notebooks 01 and 02
  {prog} --model smollm2 --profile smoke  a real model of 135 M parameters
  {prog} --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
      --profile paper --judge openai:gpt-4.1   the paper's run
  {prog} --published DIR                  the paper's own files, no model
  {prog} --option reader=published --option coefficients=-1,-0.5,0,0.5,1
"""

#: What the command is called where its caller does not say.
PROG = "python -m stllms.run"

#: Options of the command line that are fields of ``RunConfig``: flag, type, metavar, help.
SINGLE: tuple[tuple[str, type, str, str], ...] = (
    (
        "--judge",
        str,
        "WHO",
        "who labels the chains: grammar, lexical, offline, openai:MODEL (an API) or "
        "replay:FOLDER (default: grammar for the embedded models, else offline)",
    ),
    ("--results", str, "DIR", "folder for the runs (default: results/, or STLLMS_RESULTS)"),
    ("--seed", int, "N", "seed of all sampling"),
    (
        "--n-samples",
        int,
        "N",
        "tasks that the directions are built from (default: the profile's, as below)",
    ),
    ("--n-evaluate", int, "N", "tasks that steering is evaluated on"),
    ("--max-tokens", int, "N", "limit of new tokens a chain, in the comparison too"),
    ("--temperature", float, "NUMBER", "0 is greedy"),
    ("--batch-size", int, "N", "chains written at once (default: what suits the device)"),
    ("--device", str, "DEVICE", "auto, cpu, mps, cuda, cuda:N"),
    ("--dtype", str, "DTYPE", "auto, float32, bfloat16, float16"),
    ("--quantization", str, "BITS", "8bit or 4bit (CUDA and bitsandbytes)"),
    ("--revision", str, "COMMIT", "revision of the model on the hub"),
    (
        "--tasks",
        str,
        "SET",
        "grammar, messages, checkable, gym:NAME, or a JSONL file (default: grammar "
        "for the embedded models, else messages)",
    ),
    ("--base-url", str, "URL", "OpenAI-compatible server of a judge or an API model"),
    ("--max-cost", float, "USD", "bound on what each judge and each API model may cost"),
    ("--published", str, "DIR", "folder of the paper's released files; alone: draws them"),
)

#: The fields of ``RunConfig`` that have no flag of their own.
OTHER_FIELDS = tuple(
    item.name
    for item in fields(RunConfig)
    if f"--{item.name.replace('_', '-')}"
    not in ("--model", "--profile", *(s[0] for s in SINGLE))
)


class UsageError(ValueError):
    """The command line does not make sense; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line of a command called ``prog``."""
    made = _Parser(
        prog=prog,
        description=TITLE,
        epilog=epilog(prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help=f"registry name, {OTHERS}; may be repeated (default: tiny-thinker)",
    )
    made.add_argument(
        "--profile",
        metavar="NAME",
        help=f"how much to do: {', '.join(PROFILES)} (default: default); see below",
    )
    for flag, kind, word, text in SINGLE:
        made.add_argument(flag, type=kind, metavar=word, help=text)
    made.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of RunConfig, see below; may be repeated",
    )
    made.add_argument(
        "--from", dest="first", metavar="NOTEBOOK", help="first notebook to run, 01 to 05"
    )
    made.add_argument(
        "--to", dest="last", metavar="NOTEBOOK", help="last notebook to run, 01 to 05"
    )
    made.add_argument(
        "--fresh",
        nargs="?",
        const="all",
        metavar="NOTEBOOK",
        help="delete the run's files first; with NOTEBOOK (01 to 05) those of it and of later "
        "ones that rest on it",
    )
    made.add_argument(
        "--quiet", action="store_true", help="show neither the estimate nor the progress"
    )
    made.add_argument("--list-models", action="store_true", help="list the registry and stop")
    made.add_argument("--configuration", help=argparse.SUPPRESS)
    return made


def epilog(prog: str) -> str:
    """What the help says below the options: profiles, names of ``--option``, examples."""
    profiles = [
        f"  {name:8} directions from {own.n_build} tasks, steering on {own.n_evaluate}, "
        f"{own.max_tokens} tokens\n{'':11}{PURPOSES[name]}"
        for name, own in PROFILES.items()
    ]
    names = [name for name in OTHER_FIELDS if name not in CHOICES]
    return EPILOG.format(
        prog=prog,
        profiles="\n".join(profiles),
        names=textwrap.fill(", ".join(names), 90, subsequent_indent="  "),
        choices=", ".join(CHOICES),
    )


def configurations(given: argparse.Namespace) -> list[RunConfig]:
    """One configuration a model; raises ``ValueError`` for a value that is wrong."""
    if given.configuration:
        return [RunConfig.from_parameters(**json.loads(given.configuration))]
    values: dict[str, Any] = {}
    for name in ("profile", *(flag.lstrip("-").replace("-", "_") for flag, *_ in SINGLE)):
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    for text in given.option:
        name, _, value = text.partition("=")
        if not name or not value:
            raise UsageError(f"--option {text!r}, expected NAME=VALUE")
        values[name.replace("-", "_")] = _value(name, value)
    models = given.model or ["tiny-thinker"]
    made = [RunConfig.from_dict({**values, "model": model}) for model in models]
    return list({config.model: config for config in made}.values())


def _value(name: str, text: str) -> Any:
    """Numbers and JSON as they are, lists with commas, else text."""
    if name in ("coefficients", "compare", "folders") and not text.startswith("["):
        return [_value("", item) for item in text.split(",")]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def unknown(flag: str, known: argparse.ArgumentParser) -> str:
    """The complaint about an option that there is not, with those that are close."""
    flags = [option for action in known._actions for option in action.option_strings]
    close = difflib.get_close_matches(flag.split("=")[0], flags, n=2)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"unknown option {flag!r}{hint} (--help lists them)"
