"""The command ``stllms``: run the notebooks, steer one question, annotate a file.

Exit status: 0 done, 1 failed, 2 the command does not make sense (one line on stderr says
why), 130 interrupted. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from stllms import __version__

if TYPE_CHECKING:
    from stllms.config import RunConfig
    from stllms.pairs import Ask, Bench
    from stllms.records import Annotation, Steered


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
    "Ben has 4 coins and gets 3 more. How many coins does Ben have?", "backtracking", 1.0, 5
)

EXAMPLES = f"""examples:
{EXAMPLE}
  stllms annotate chain.txt
  stllms run --profile smoke

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

JUDGES = "grammar, lexical, offline, openai:MODEL, replay:FOLDER"
#: Chains without labels that are named, at most.
NAMED = 5
#: The names of records.STEERED, for the help; anything else is refused with what there is.
BEHAVIOURS = "backtracking, uncertainty-estimation, example-testing, adding-knowledge, ..."


class UsageError(ValueError):
    """The command line does not make sense; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
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
    return made


_TITLE = "Steering vectors for the reasoning behaviours of thinking language models."


def _steer_options(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("question", help="what the model is asked")
    add("--behaviour", required=True, metavar="NAME", help=BEHAVIOURS)
    add("--coefficient", type=float, default=1.0, help="negative removes (default: 1)")
    add("--model", default="tiny-thinker", help="registry name, hub id or local folder")
    add("--layer", type=int, help="0-based (default: the behaviour's own)")
    add("--vectors", metavar="FILE", help="directions: a vectors.safetensors, a released .pt")
    add("--operation", default="add", help="add (default) or ablate")
    add("--where", default="all", help="all (default), generated or thinking")
    add("--temperature", type=float, help="0 is greedy (default: the run's)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--max-tokens", type=int, help="limit of new tokens (default: the run's)")
    add("--profile", default="default", help="smoke, default, full, paper: where a run is made")
    add("--judge", default="auto", help=f"who labels: {JUDGES} (default: a free one)")
    _judge_options(made)
    add("--results", metavar="DIR", help="folder of the runs (default: results/)")
    add("--device", default="auto", help="auto, cpu, mps, cuda, cuda:N")
    switch = argparse.BooleanOptionalAction
    add("--plain", action=switch, default=True, help="show the plain chain too")
    add("--json", action="store_true", help="one JSON object instead of text")


def _annotate_options(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("file", help="text, JSONL, JSON, or - for standard input")
    add("--judge", default="offline", help=f"who labels: {JUDGES} (default: offline)")
    _judge_options(made)
    add("--out", metavar="FILE", help="write the segments here instead of printing them")


def _judge_options(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--base-url", metavar="URL", help="server of an openai: judge")
    add("--max-cost", type=float, metavar="USD", help="bound on what an openai: judge costs")


def _of_the_judge(given: argparse.Namespace) -> dict[str, Any]:
    """The options that only a judge behind an API takes, where they are given."""
    options = {"base_url": given.base_url, "max_cost": given.max_cost}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not given.judge.startswith("openai:"):
        flag = next(iter(options)).replace("_", "-")
        raise UsageError(f"--{flag} is for a judge openai:MODEL, not for {given.judge}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["run"]:
        from stllms import run

        return run.main(given[1:], prog="stllms run")
    try:
        status = _main(given)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of the output has gone, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _complain(error, 2)
    except RuntimeError as error:  # models, servers, stages, memory
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(error: object, status: int) -> int:
    print(f"stllms: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _main(argv: list[str]) -> int:
    if not argv:
        parser().print_help()
        return 2
    given = parser().parse_args(argv)
    return {"steer": _steer, "annotate": _annotate}[given.command](given)


# --- steer --------------------------------------------------------------------------------


def _steer(given: argparse.Namespace) -> int:
    if not given.question.strip():
        raise UsageError("the question is empty")
    config = _configuration(given)
    from stllms import pairs

    names = ("behaviour", "coefficient", "layer", "operation", "where", "temperature", "seed")
    options = {name: getattr(given, name) for name in (*names, "max_tokens")}
    ask = pairs.Ask(pairs.task(given.question), **options)
    pairs.check(ask)
    with redirect_stdout(sys.stderr):  # what is said while directions are made
        bench = pairs.bench(config, given.vectors)
    pair = pairs.write(bench, ask)
    chains = pair if given.plain else pair[1:]
    if config.embedded:
        print(
            f"{config.model} is a fixture, built to be steerable: it knows only questions of "
            f'its grammar, like "{EXAMPLE.question}"',
            file=sys.stderr,
        )
    if given.json:
        print(json.dumps(_as_json(bench, ask, chains), ensure_ascii=False, allow_nan=False))
    else:
        print(_as_text(chains, colour=has_colour()))
    return 0


def _configuration(given: argparse.Namespace) -> RunConfig:
    """The run that the options of ``steer`` name."""
    from stllms.config import RunConfig, UnknownModel

    names = ("model", "profile", "judge", "results", "device")
    values = {name: getattr(given, name) for name in names}
    try:
        return RunConfig(**values, **_of_the_judge(given))
    except UnknownModel as error:
        there = str(error).replace("(--list-models)", "(stllms run --list-models)")
        raise UsageError(there) from None


def has_colour() -> bool:
    """Whether standard output shows colours: a terminal that can, and nobody said no."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return sys.stdout.isatty()


def _as_text(chains: Sequence[Steered], *, colour: bool) -> str:
    from stllms import coloured, pairs

    parts = []
    for chain in chains:
        text = chain.response.thinking
        shown = coloured.terminal(text, chain.annotation.segments, colour=colour)
        parts.append(f"{pairs.title(chain)}\n{shown}\n({pairs.note(chain)})")
    titles = [pairs.title(chain) for chain in chains]
    shares = [pairs.shares(chain) for chain in chains]
    parts.append(coloured.terminal_shares(titles, shares, colour=colour))
    return "\n\n".join(parts)


def _as_json(bench: Bench, ask: Ask, chains: Sequence[Steered]) -> dict[str, Any]:
    from stllms import pairs

    edit, options = pairs.intervention(bench, ask), pairs.decoding(bench, ask)
    return {
        "question": ask.task.content,
        "model": bench.config.model,
        "directions": bench.origin,
        "behaviour": ask.behaviour,
        "coefficient": ask.coefficient,
        "layer": edit.layer,
        "operation": ask.operation,
        "where": ask.where,
        **{name: options[name] for name in ("temperature", "seed", "max_new_tokens")},
        "annotator": bench.annotator.name,
        "chains": [_chain_as_json(chain) for chain in chains],
    }


def _chain_as_json(chain: Steered) -> dict[str, Any]:
    from stllms import pairs
    from stllms.records import BEHAVIOURS, to_row

    response, shares = chain.response, pairs.shares(chain).tolist()
    known = [None if math.isnan(share) else share for share in shares]
    return {
        "chain": "plain" if chain.direction == "none" else "steered",
        "thinking": response.thinking,
        "answer": response.answer,
        "finished": response.finished,
        "tokens": len(response.output_ids),
        "shares": dict(zip(BEHAVIOURS, known, strict=True)),
        "segments": [to_row(segment) for segment in chain.annotation.segments],
        "failed": chain.annotation.failed,
    }


# --- annotate -----------------------------------------------------------------------------


def _annotate(given: argparse.Namespace) -> int:
    from stllms import inputs

    options = _of_the_judge(given)
    if given.out is not None:
        _check_out(given.file, given.out)
    chains = inputs.read(given.file)
    from stllms import annotate, spans

    annotator = annotate.annotator(given.judge, **options)
    made = annotator.annotate(chains)
    _write(made, given.out)
    counted = spans.summarise(made)
    bare = [one for one in made if not one.segments]
    labelled = f"{counted.coverage:.1%} of the text labelled" if counted.total else "no text"
    said = f"{annotator.name}: {counted.chains} chains, {counted.placed} segments, {labelled}"
    print(f"{said}, {_without_labels(bare)}", file=sys.stderr)
    return 1 if bare else 0


def _check_out(source: str, out: str) -> None:
    """Refuses a file that cannot be written, before anything is labelled."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise UsageError(f"--out {out} is a folder; expected a file")
    if not path.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {path.parent}; make it first")
    if source != "-" and path.resolve() == Path(source).expanduser().resolve():
        raise UsageError(f"--out {out} is the file that is read; expected another")


def _write(made: Sequence[Annotation], out: str | None) -> None:
    """The segments as JSONL, to a file or to standard output."""
    from stllms import files
    from stllms.records import to_row

    text = "".join(
        json.dumps({"task_id": one.task_id, "annotator": one.annotator, **to_row(segment)})
        + "\n"
        for one in made
        for segment in one.segments
    )
    if out is None:
        sys.stdout.write(text)
        return
    with files.replacing(Path(out).expanduser()) as beside:
        beside.write_text(text, encoding="utf-8")


def _without_labels(bare: Sequence[Annotation]) -> str:
    """The chains without a segment by name, each with the reason."""
    if not bare:
        return "no chain without labels"
    named = [
        f"{one.task_id} ({one.failed or ('nothing found' if one.ledger['total'] else 'empty')})"
        for one in bare[:NAMED]
    ]
    more = [f"{len(bare) - NAMED} more"] if len(bare) > NAMED else []
    return f"{len(bare)} without labels: {', '.join([*named, *more])}"


if __name__ == "__main__":
    sys.exit(main())
