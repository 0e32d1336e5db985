"""The command ``stllms``: run the notebooks, steer one question, annotate a file, verify a run.

Exit status: 0 done, 1 failed, 2 the command does not make sense or is refused (one line on
stderr says why), 130 interrupted. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from stllms import __version__, registry
from stllms.config import CHOICES, PROFILES, RunConfig
from stllms.labels import BEHAVIOURS, STEERED
from stllms.terminal import plain

if TYPE_CHECKING:
    from stllms.app.bench import Ask, Bench
    from stllms.records import Annotation, Steered

#: Chains without labels that are named, at most.
NAMED = 5
#: What a model may be that can be steered and is not in the registry.
WEIGHTS = "a hub id owner/name, or an existing folder with a config.json"


class Example(NamedTuple):
    """A question to tiny-thinker on which steering shows."""

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

#: What each profile is for, and how long the run of tiny-thinker takes on two cores.
PURPOSES = {
    "smoke": "to see that it works; two or three minutes",
    "default": "the committed figures; four minutes",
    "full": "claims about a shipped model, narrow intervals; much longer",
    "paper": "as published: long, greedy chains; wants a GPU",
}
_PROFILES = "\n".join(
    f"  {name:8} directions from {own.n_build} tasks, steering on {own.n_evaluate}, "
    f"{own.max_tokens} tokens\n{'':11}{PURPOSES[name]}"
    for name, own in PROFILES.items()
)

EPILOG = f"""Examples:
{EXAMPLE}
  stllms annotate chain.txt
  stllms run --profile smoke
  stllms verify results/tiny-thinker

stllms COMMAND --help says more about each. Exit status: 0 done, 1 failed, 2 wrong command."""

RUN = """Profiles:
{profiles}
  The times are those of tiny-thinker on two cores. smollm2 takes about six minutes for smoke;
  nothing was measured on a GPU.

--option takes these names, lists with commas:
  {names}
and these, of which "published" gives what the paper's code does:
  {choices}

Examples:
  stllms run                                  the embedded model, offline
  stllms run --profile smoke --to 02          a quick look, notebooks 01 and 02
  stllms run --model smollm2 --profile smoke  a real model of 135 M parameters
  stllms run --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
      --profile paper --judge openai:gpt-4.1   the paper's run
  stllms run --published DIR                  the paper's own files, no model
  stllms run --option reader=published --option coefficients=-1,-0.5,0,0.5,1"""

STEER = f"""Behaviours:
  {", ".join(STEERED)}

Profiles:
{_PROFILES}

Examples:
{EXAMPLE}
{EXAMPLE} --json
  stllms steer "What is 17 * 23?" --behaviour backtracking --coefficient -1 \\
      --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --vectors mean_vectors.pt

tiny-thinker knows only the questions of its grammar; its directions ship with the package.
Those of another model are of the run in its folder of results, whatever its options were;
notebooks 01 to 03 make one first where there is none (this may take long)."""

ANNOTATE = """Examples:
  stllms annotate chain.txt                              one chain, the offline classifier
  stllms annotate - --judge lexical < chain.txt          from standard input
  stllms annotate responses.jsonl --out segments.jsonl   rows of notebook 01
  stllms annotate reasoning_comparison_MODEL.json        a released file
  stllms annotate responses.jsonl --judge openai:gpt-4.1 --max-cost 2

One JSON object a segment (task_id, annotator, label, text, start, end: characters of the
thinking), then a line on stderr about what was labelled. Status 1 if a chain has no labels:
that line names it, and what the others have is written."""

VERIFY = """Examples:
  stllms verify results/tiny-thinker
  stllms verify results/reference          every run below

One line an artefact: whether it is there and whole (its hash, its rows), and made from what is
there now. Status 1 if one does not hold."""

JUDGES = "grammar, lexical, offline, openai:MODEL (an API) or replay:FOLDER"

#: The options of ``run`` that are fields of ``RunConfig``: group, name, type, metavar, help.
FIELDS: tuple[tuple[str, str, type, str, str], ...] = (
    ("How much", "n_samples", int, "N", "tasks that the directions are built from"),
    ("How much", "n_evaluate", int, "N", "tasks that steering is evaluated on"),
    ("How much", "max_tokens", int, "N", "limit of new tokens a chain, in the comparison too"),
    ("How chains are written", "tasks", str, "SET", "grammar, messages, checkable, gym:NAME, "
     "or a JSONL file (default: grammar for the embedded models, else messages)"),
    ("How chains are written", "temperature", float, "NUMBER", "0 is greedy"),
    ("How chains are written", "seed", int, "N", "seed of all sampling"),
    ("How chains are labelled", "judge", str, "WHO", f"who labels: {JUDGES} (default: grammar "
     "for the embedded models, else offline)"),
    ("How chains are labelled", "base_url", str, "URL", "OpenAI-compatible server of a judge "
     "or an API model"),
    ("How chains are labelled", "max_cost", float, "USD", "bound on what each judge and each "
     "API model may cost"),
    ("Machine", "device", str, "DEVICE", "auto, cpu, mps, cuda, cuda:N"),
    ("Machine", "dtype", str, "DTYPE", "auto, float32, bfloat16, float16"),
    ("Machine", "quantization", str, "BITS", "8bit or 4bit (CUDA and bitsandbytes)"),
    ("Machine", "batch_size", int, "N", "chains written at once (default: what fits)"),
    ("Machine", "revision", str, "COMMIT", "revision of the model on the hub"),
    ("Files", "results", str, "DIR", "folder for the runs (default: results/, or "
     "STLLMS_RESULTS)"),
    ("Files", "published", str, "DIR", "folder of the paper's released files; alone: draws "
     "them"),
)  # fmt: skip

#: The fields of ``RunConfig`` that have no option of their own.
OTHER_FIELDS = tuple(
    item.name
    for item in fields(RunConfig)
    if item.name not in ("model", "profile", *(name for _, name, *_ in FIELDS))
)


# --- the command --------------------------------------------------------------------------


class Option(click.Option):
    """An option that the help shows in a group."""

    def __init__(self, *args: Any, group: str = "Other", **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = group


class Command(click.Command):
    """A command with its options in groups, and an epilogue that keeps its lines."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes each group of options, in the order of their first option."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                groups.setdefault(getattr(param, "group", "Other"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the epilogue as it is."""
        formatter.write(f"\n{self.epilog}\n" if self.epilog else "")


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    format_epilog = Command.format_epilog


class OneOf(click.Choice):
    """A choice that suggests what was meant."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value; an error names those that there are and the one that is close."""
        if value in self.choices:
            return value
        close = difflib.get_close_matches(str(value), self.choices, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        known = ", ".join(self.choices)
        return self.fail(f"{value!r}, expected one of {known}.{hint}", param, ctx)


def option(group: str, *names: str, **options: Any) -> Callable:
    """A decorator: an :class:`Option` of a group."""
    return click.option(*names, cls=Option, group=group, **options)


def spelling(name: str) -> str:
    """An option with American spelling as this package writes it."""
    for american, ours in (("behavior", "behaviour"), ("retokenize", "retokenise")):
        name = name.replace(american, ours)
    return name.replace("quantisation", "quantization")


SETTINGS = {"max_content_width": 96, "token_normalize_func": spelling}


@click.group(cls=Group, epilog=EPILOG, context_settings=SETTINGS)
@click.version_option(__version__, message="stllms %(version)s")
def cli() -> None:
    """Steering vectors for the reasoning behaviours of thinking language models."""


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with cli.make_context("stllms", list(words) or ["--help"]) as context:
            status = cli.invoke(context)
        sys.stdout.flush()
        return status or 0
    except click.exceptions.Exit as stop:  # --help, --version
        return stop.exit_code if words else 2
    except SystemExit as stop:  # of a command with a parser of its own
        return int(stop.code or 0)
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _complain(f"{error.format_message().rstrip('.')}{where}", 2)
    except BrokenPipeError:  # the reader of the output has gone, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _complain(str(error).replace("(--list-models)", "(stllms models)"), 2)
    except (RuntimeError, MemoryError) as error:  # models, servers, stages, memory
        from stllms.app.stages import StageError
        from stllms.runs.files import LockedFolder

        if isinstance(error, StageError):  # the failing cell, in lines
            print(f"stllms: {plain(error)}", file=sys.stderr)
            return 1
        return _complain(error, 2 if isinstance(error, LockedFolder) else 1)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", 130)


def _complain(error: object, status: int) -> int:
    print(f"stllms: {plain(' '.join(str(error).split()))}", file=sys.stderr)
    return status


# --- run ----------------------------------------------------------------------------------


def _fields(function: Callable) -> Callable:
    """Adds the options of :data:`FIELDS`."""
    for group, name, kind, metavar, text in reversed(FIELDS):
        flag = f"--{name.replace('_', '-')}"
        function = option(group, flag, name, type=kind, metavar=metavar, help=text)(function)
    return function


@cli.command(
    epilog=RUN.format(
        profiles=_PROFILES,
        names=textwrap.fill(
            ", ".join(name for name in OTHER_FIELDS if name not in CHOICES),
            90,
            subsequent_indent="  ",
        ),
        choices=", ".join(CHOICES),
    )
)
@option(
    "What is run",
    "--model",
    multiple=True,
    metavar="NAME",
    help=f"registry name, {registry.OTHERS}; may be repeated (default: tiny-thinker)",
)
@option("What is run", "--from", "first", metavar="NOTEBOOK", help="first notebook, 01 to 05")
@option("What is run", "--to", "last", metavar="NOTEBOOK", help="last notebook, 01 to 05")
@option(
    "What is run",
    "--fresh",
    is_flag=False,
    flag_value="all",
    metavar="[NOTEBOOK]",
    help="delete the run's files first; with NOTEBOOK (01 to 05) those of it and of later ones "
    "that rest on it",
)
@option(
    "How much",
    "--profile",
    type=OneOf(list(PROFILES)),
    metavar="NAME",
    help=f"how much to do: {', '.join(PROFILES)} (default: default); see below",
)
@_fields
@option(
    "Other",
    "--option",
    multiple=True,
    metavar="NAME=VALUE",
    help="any other field of RunConfig, see below; may be repeated",
)
@option("Other", "--quiet", is_flag=True, help="show neither the estimate nor the progress")
@option("Other", "--list-models", is_flag=True, help="list the registry and stop")
@option("Other", "--configuration", hidden=True)
@click.pass_context
def run(context: click.Context, **given: Any) -> int | None:
    """Run the notebooks for one or more models; what is done is skipped."""
    if given["list_models"]:
        return _list_models()
    from stllms.app import runner

    if given["published"] and not given["model"]:
        _check_only_published(context)
        runner.draw_released(given["published"], given["results"])
        return None
    try:
        runner.run(
            _configurations(given),
            **{name: given[name] for name in ("first", "last", "fresh", "quiet")},
            report=not given["configuration"],  # a notebook that runs earlier ones shows none
        )
    except KeyboardInterrupt as stop:
        again = "the same command without --fresh" if given["fresh"] else "the same command"
        said = f"{str(stop) or 'interrupted'}; {again} goes on from there"
        raise KeyboardInterrupt(said) from None
    return None


def configurations(argv: Sequence[str]) -> list[RunConfig]:
    """The configurations that ``stllms run`` makes of its arguments, one a model.

    Raises ``click.UsageError`` for words that are no options, ``ValueError`` for wrong values.
    """
    with cli.make_context("stllms", ["run"]) as parent:
        context = run.make_context("run", list(argv), parent=parent)
    return _configurations(context.params)


def _configurations(given: dict[str, Any]) -> list[RunConfig]:
    if given["configuration"]:
        return [RunConfig.from_parameters(**json.loads(given["configuration"]))]
    names = ["profile", *(name for _, name, *_ in FIELDS)]
    values = {name: given[name] for name in names if given[name] is not None}
    for text in given["option"]:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"--option {text!r}, expected NAME=VALUE")
        name = spelling(name.replace("-", "_"))
        values[name] = _value(name, value)
    models = given["model"] or ["tiny-thinker"]
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


def _check_only_published(context: click.Context) -> None:
    """Refuses options that need a model where only released files are drawn."""
    for param in context.command.params:
        given = context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        if given and param.name not in ("published", "results", "quiet"):
            flag = param.opts[0]
            raise ValueError(f"{flag} needs --model: --published alone only draws its files")


@cli.command()
def models() -> int:
    """List the models of the registry."""
    return _list_models()


def _list_models() -> int:
    """Prints the registry: name, kind, where the weights come from, the model's pair."""
    rows = [("name", "kind", "source", "pair")]
    for entry in registry.MODELS.values():
        where = entry.hub_id or (f"api: {entry.api_id}" if entry.api_id else entry.source)
        rows.append((entry.name, entry.kind, where, entry.pair or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(f"or {registry.OTHERS}")
    return 0


# --- steer --------------------------------------------------------------------------------


def _judge(default: str) -> Callable:
    """Adds the options of who labels."""

    def add(function: Callable) -> Callable:
        group = "How chains are labelled"
        known = "a free one" if default == "auto" else default
        for names, options in (
            (["--max-cost"], {"type": float, "metavar": "USD",
             "help": "bound on what an openai: judge costs"}),
            (["--base-url"], {"metavar": "URL", "help": "server of an openai: judge"}),
            (["--judge"], {"default": default, "metavar": "WHO",
             "help": f"who labels: {JUDGES} (default: {known})"}),
        ):  # fmt: skip
            function = option(group, *names, **options)(function)
        return function

    return add


def _judge_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that only a judge behind an API takes, where they are given."""
    names = ("base_url", "max_cost")
    options = {name: given[name] for name in names if given[name] is not None}
    if options and not given["judge"].startswith("openai:"):
        flag = next(iter(options)).replace("_", "-")
        raise ValueError(f"--{flag} is for a judge openai:MODEL, not for {given['judge']}")
    return options


@cli.command(epilog=STEER)
@click.argument("question")
@option(
    "Steering",
    "--behaviour",
    "--behavior",
    "behaviour",
    required=True,
    type=OneOf(BEHAVIOURS),
    metavar="NAME",
    help="what is added or removed; see below",
)
@option("Steering", "--coefficient", type=float, default=1.0, metavar="X",
        help="adds the behaviour, below 0 removes it (default: 1)")  # fmt: skip
@option("Steering", "--layer", type=int, metavar="N",
        help="from 0 (default: the behaviour's own)")  # fmt: skip
@option("Steering", "--vectors", metavar="FILE",
        help="directions: a vectors.safetensors, a released .pt")  # fmt: skip
@option("Steering", "--operation", default="add", metavar="HOW",
        help="add (default) or ablate")  # fmt: skip
@option("Steering", "--where", default="all", metavar="TOKENS",
        help="all (default), generated or thinking tokens")  # fmt: skip
@option("How chains are written", "--model", default="tiny-thinker", metavar="NAME",
        help="registry name, hub id or local folder (default: tiny-thinker)")  # fmt: skip
@option("How chains are written", "--temperature", type=float, metavar="X",
        help="0 is greedy (default: the run's)")  # fmt: skip
@option("How chains are written", "--seed", type=int, default=0, metavar="N",
        help="of the sampling (default: 0)")  # fmt: skip
@option("How chains are written", "--max-tokens", type=int, metavar="N",
        help="limit of new tokens (default: the run's)")  # fmt: skip
@option("How chains are written", "--device", default="auto", metavar="NAME",
        help="auto, cpu, mps, cuda, cuda:N")  # fmt: skip
@_judge("auto")
@option("The run whose directions are taken", "--profile", type=OneOf(list(PROFILES)),
        default="default", metavar="NAME",
        help="how large it is, where it has to be made; see below")  # fmt: skip
@option("The run whose directions are taken", "--results", metavar="DIR",
        help="folder of the runs (default: results/)")  # fmt: skip
@option("Output", "--plain/--no-plain", "plain_too", default=True,
        help="show the plain chain too (default)")  # fmt: skip
@option("Output", "--json", "as_json", is_flag=True,
        help="one JSON object instead of text")  # fmt: skip
def steer(question: str, plain_too: bool, as_json: bool, **given: Any) -> None:
    """Answer QUESTION plain, and with a behaviour added or removed."""
    if not question.strip():
        raise ValueError("the question is empty")
    config = _steering_run(given)
    from stllms.app import bench as benches

    names = ("behaviour", "coefficient", "layer", "operation", "where", "temperature", "seed")
    options = {name: given[name] for name in (*names, "max_tokens")}
    ask = benches.Ask(benches.task(question), **options)
    benches.check(ask)
    with redirect_stdout(sys.stderr):  # what is said while directions are made
        bench = benches.bench(config, given["vectors"])
    pair = benches.write(bench, ask)
    chains = pair if plain_too else pair[1:]
    if remark := benches.remark(pair):
        print(f"stllms: {plain(remark)}", file=sys.stderr)
    if config.embedded:
        print(
            f"{config.model} is a fixture, built to be steerable: it knows only questions of "
            f'its grammar, like "{EXAMPLE.question}"',
            file=sys.stderr,
        )
    if as_json:
        made = _as_json(bench, ask, chains)
        print(plain(json.dumps(made, ensure_ascii=False, allow_nan=False)))
    else:
        print(_as_text(chains, colour=has_colour()))


def _steering_run(given: dict[str, Any]) -> RunConfig:
    """The run that the options of ``steer`` name."""
    names = ("model", "profile", "judge", "results", "device")
    try:
        return RunConfig(**{name: given[name] for name in names}, **_judge_options(given))
    except registry.UnknownModel as error:
        raise ValueError(str(error).replace(registry.OTHERS, WEIGHTS)) from None


def has_colour() -> bool:
    """Whether standard output shows colours: a terminal that can, and nobody said no."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return sys.stdout.isatty()


def _as_text(chains: Sequence[Steered], *, colour: bool) -> str:
    from stllms.app import bench
    from stllms.plotting import text

    parts = []
    for chain in chains:
        segments = chain.annotation.segments if chain.annotation else ()
        shown = text.terminal(chain.response.thinking, segments, colour=colour)
        parts.append(f"{plain(bench.title(chain))}\n{shown}\n({plain(bench.note(chain))})")
    titles = [plain(bench.title(chain)) for chain in chains]
    shares = [bench.shares(chain).tolist() for chain in chains]
    parts.append(text.terminal_shares(titles, shares, colour=colour))
    return "\n\n".join(parts)


def _as_json(bench: Bench, ask: Ask, chains: Sequence[Steered]) -> dict[str, Any]:
    from stllms.app.bench import decoding, intervention

    options = decoding(bench, ask)
    return {
        "question": ask.task.content,
        "model": bench.config.model,
        "directions": bench.origin,
        "behaviour": ask.behaviour,
        "coefficient": ask.coefficient,
        "layer": intervention(bench, ask).layer,
        "operation": ask.operation,
        "where": ask.where,
        **{name: options[name] for name in ("temperature", "seed", "max_new_tokens")},
        "annotator": bench.annotator.name,
        "chains": [_chain_as_json(chain) for chain in chains],
    }


def _chain_as_json(chain: Steered) -> dict[str, Any]:
    from stllms.app import bench
    from stllms.records import to_row

    response, shares, label = chain.response, bench.shares(chain).tolist(), chain.annotation
    known = [None if math.isnan(share) else share for share in shares]
    return {
        "chain": "plain" if chain.direction == "none" else "steered",
        "thinking": response.thinking,
        "answer": response.answer,
        "finished": response.finished,
        "tokens": len(response.output_ids),
        "shares": dict(zip(BEHAVIOURS, known, strict=True)),
        "segments": [to_row(segment) for segment in label.segments] if label else [],
        "failed": label.failed if label else None,
    }


# --- annotate -----------------------------------------------------------------------------


@cli.command(epilog=ANNOTATE)
@click.argument("file")
@_judge("offline")
@option("Output", "--out", metavar="FILE",
        help="write the segments here instead of printing them")  # fmt: skip
def annotate(file: str, out: str | None, **given: Any) -> int:
    """Label the behaviours in the chains of FILE (text, JSONL, JSON; - is standard input)."""
    options = _judge_options(given)
    if out is not None:
        _check_out(file, out)
    from stllms.annotation import annotators
    from stllms.annotation.placing import summarise
    from stllms.generation import prompts

    chains = prompts.read(file)
    annotator = annotators.annotator(given["judge"], **options)
    made = annotator.annotate(chains)
    _write(made, out)
    counted = summarise(made)
    bare = [one for one in made if not one.segments]
    found = f"{_count(counted.chains, 'chain')}, {_count(counted.placed, 'segment')}"
    covered = f"{counted.coverage:.1%} of the text labelled" if counted.total else "no text"
    said = f"{annotator.name}: {found}, {covered}, {_without_labels(bare)}"
    print(plain(said), file=sys.stderr)
    return 1 if bare else 0


def _check_out(source: str, out: str) -> None:
    """Refuses a file that cannot be written, before anything is labelled."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise ValueError(f"--out {out} is a folder; expected a file")
    if not path.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {path.parent}; make it first")
    if source != "-" and path.resolve() == Path(source).expanduser().resolve():
        raise ValueError(f"--out {out} is the file that is read; expected another")


def _write(made: Sequence[Annotation], out: str | None) -> None:
    """The segments as JSONL, to a file or to standard output."""
    from stllms.records import to_row
    from stllms.runs.files import replacing

    text = "".join(
        json.dumps({"task_id": one.task_id, "annotator": one.annotator, **to_row(segment)})
        + "\n"
        for one in made
        for segment in one.segments
    )
    if out is None:
        sys.stdout.write(text)
        return
    with replacing(Path(out).expanduser()) as beside:
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


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


# --- what a run left ----------------------------------------------------------------------


@cli.command(epilog=VERIFY)
@click.argument("folder")
def verify(folder: str) -> int:
    """Recompute what the run in FOLDER, or each run below it, says of its artefacts."""
    from stllms.runs import artifacts

    found = artifacts.verify(Path(folder).expanduser())
    for one in found:
        print(one)
    bad = sum(not one.holds for one in found)
    print(f"{_count(len(found), 'artefact')}, {bad or 'none'} that does not hold")
    return 1 if bad else 0


@cli.command()
@click.argument("folder")
def report(folder: str) -> None:
    """Write the report of the run in FOLDER (report.html) again, and print its path."""
    from stllms.app import report as reports

    print(reports.write(folder))


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--format", "kind", type=click.Choice(["safetensors", "gguf"]), default="safetensors"
)
@click.option("--behaviour", multiple=True, help="gguf: exactly one; default: all")
@click.option(
    "--layer", multiple=True, type=int, help="may be repeated; default: all (gguf: none)"
)
@click.option("--coefficient", default=1.0, help="multiplied into the tensors")
@click.option("--model-hint", help="gguf: the architecture in llama.cpp, e.g. qwen2")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the file to write")
def export(
    source: Path,
    kind: str,
    behaviour: tuple[str, ...],
    layer: tuple[int, ...],
    coefficient: float,
    model_hint: str | None,
    out: Path,
) -> None:
    """Write the directions of a run for other engines (safetensors, GGUF).

    Layer N is the output of decoder layer N, counted from 0 (direction.N of llama.cpp). SOURCE
    is results/<model>, or a vectors.safetensors.
    """
    from stllms.vectors import SteeringVectors
    from stllms.vectors import export as engines

    found = SteeringVectors.load(source / "vectors.safetensors" if source.is_dir() else source)
    if kind == "safetensors":
        chosen: dict[str, Any] = {"behaviours": behaviour or None, "layers": layer or None}
        print(engines.safetensors(found, out, coefficient=coefficient, **chosen))
    elif len(behaviour) != 1 or not layer:
        raise ValueError("--format gguf takes one --behaviour and at least one --layer")
    else:
        chosen = {"layers": layer, "coefficient": coefficient, "model_hint": model_hint}
        print(engines.gguf(found, behaviour[0], out, **chosen))


if __name__ == "__main__":
    sys.exit(main())
