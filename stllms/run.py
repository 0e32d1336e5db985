"""The runner: executes the notebooks for one or more models, and skips what is done.

Notebooks 01-04 for each model, then 05 once for all of them. What is done is skipped, another
configuration in the same folder is refused, the first failure stops the run. Exit status:
0 done, 1 a notebook failed, 2 refused (one line on stderr says why). Notebooks call
:func:`ensure` first and :func:`finish` last.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from stllms import pipeline, report
from stllms.artifacts import LockedFolder
from stllms.config import MODELS, PROFILES, RunConfig
from stllms.pipeline import STAGES, StageError, ensure, finish

__all__ = ["STAGES", "StageError", "ensure", "finish", "main"]

EXAMPLES = """examples:
  python -m stllms.run                                  the embedded model, offline
  python -m stllms.run --profile smoke --to 02          a quick look, notebooks 01 and 02
  python -m stllms.run --model smollm2 --profile smoke  a real model of 135 M parameters
  python -m stllms.run --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\
      --profile paper --judge openai:gpt-4.1            the paper's run
  python -m stllms.run --published DIR                  the paper's own files, no model
  python -m stllms.run --option reader=published --option coefficients=-1,-0.5,0,0.5,1
"""

#: Options of the command line that are fields of ``RunConfig``: flag, type, help.
SINGLE: tuple[tuple[str, type, str], ...] = (
    ("--judge", str, "annotator: grammar, lexical, offline, openai:MODEL, replay:FOLDER"),
    ("--results", str, "folder for the runs (default: results/, or STLLMS_RESULTS)"),
    ("--seed", int, "seed of all sampling"),
    ("--n-samples", int, "tasks that the directions are built from"),
    ("--n-evaluate", int, "tasks that steering is evaluated on"),
    ("--max-tokens", int, "limit of new tokens, for the comparison as well"),
    ("--temperature", float, "0 is greedy"),
    ("--batch-size", int, "rows decoded at once"),
    ("--device", str, "auto, cpu, mps, cuda, cuda:N"),
    ("--dtype", str, "auto, float32, bfloat16, float16"),
    ("--quantization", str, "8bit or 4bit"),
    ("--revision", str, "revision of the model on the hub"),
    ("--tasks", str, "grammar, messages, checkable, gym:NAME, or a JSONL file"),
    ("--base-url", str, "OpenAI-compatible server of a judge or an API model"),
    ("--max-cost", float, "stop before spending more than this, in US dollars"),
    ("--published", str, "folder of the files released with the paper; alone: draws them"),
)


class UsageError(ValueError):
    """The command line does not make sense; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _Parser(
        prog="python -m stllms.run",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="registry name, hub id or local folder; may be repeated (default: tiny-thinker)",
    )
    made.add_argument("--profile", metavar="NAME", help=" | ".join(PROFILES))
    for flag, kind, text in SINGLE:
        made.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    made.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of RunConfig, e.g. reader=published; may be repeated",
    )
    made.add_argument("--from", dest="first", metavar="NOTEBOOK", help="first one, 01 to 05")
    made.add_argument("--to", dest="last", metavar="NOTEBOOK", help="last one, 01 to 05")
    made.add_argument("--fresh", action="store_true", help="delete the run's files first")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    made.add_argument("--list-models", action="store_true", help="list the registry and stop")
    made.add_argument("--configuration", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status and raises nothing."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except StageError as error:
        print(f"stllms.run: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, LockedFolder) as error:
        print(f"stllms.run: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stllms.run: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    known = parser()
    given, unknown = known.parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown(unknown[0], known))
    if given.list_models:
        print(listing())
        return 0
    if given.published and not given.model:
        return _released(given, known)
    configs = configurations(given)
    stages = _selected(given.first, given.last)
    chosen = _jobs(configs, stages)
    if given.fresh:
        _delete(chosen)
    for stage, config in chosen:
        pipeline.check(stage, config)
    todo = _pending(chosen)
    if not todo:
        labels = dict.fromkeys(pipeline.folder_of(*job).label for job in chosen)
        print(f"nothing to do: {', '.join(labels)} complete (--fresh starts again)")
    else:
        _announce(chosen, todo)
        from stllms import execute  # papermill takes two seconds

        execute.execute([execute.Job(*job) for job in todo], quiet=given.quiet)
        for label in dict.fromkeys(pipeline.folder_of(*job).label for job in chosen):
            print(f"done: {label}")
    if not given.configuration:  # a notebook that runs earlier ones shows no report
        _report(chosen)
    return 0


def _report(chosen: Chosen) -> None:
    """The report of every model's folder; that of the comparison where there is no other."""
    folders = {folder.path: folder for folder in (pipeline.folder_of(*job) for job in chosen)}
    own = [folder for path, folder in folders.items() if path.name != report.COMPARISON]
    for folder in own or folders.values():
        folder.keep([folder / report.NAME])
        print(f"report: {report.ensure(folder.path)}")


def _released(given: argparse.Namespace, known: argparse.ArgumentParser) -> int:
    """``--published`` without a model: its figures, its tables and the ledger, no notebook."""
    for action in known._actions:
        taken = action.dest in ("help", "published", "results", "quiet")
        if not taken and getattr(given, action.dest) != action.default:
            flag = action.option_strings[0]
            raise UsageError(f"{flag} needs --model: --published alone only draws its files")
    from stllms import ledger, published  # they bring torch

    results = RunConfig(results=given.results).results_folder
    for path in published.run(given.published, results):
        print(path)
    ledger.write(results, given.published)
    print(results / "ledger.csv")
    return 0


def configurations(given: argparse.Namespace) -> list[RunConfig]:
    """One configuration a model; raises ``ValueError`` for a value that is wrong."""
    if given.configuration:
        return [RunConfig.from_parameters(**json.loads(given.configuration))]
    values: dict[str, Any] = {}
    for name in ("profile", *(flag.lstrip("-").replace("-", "_") for flag, _, _ in SINGLE)):
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
    if name in ("coefficients", "compare") and not text.startswith("["):
        return [_value("", item) for item in text.split(",")]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(flag: str, known: argparse.ArgumentParser) -> str:
    flags = [option for action in known._actions for option in action.option_strings]
    close = difflib.get_close_matches(flag.split("=")[0], flags, n=2)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"unknown option {flag!r}{hint} (--help lists them)"


def _selected(first: str | None, last: str | None) -> tuple[str, ...]:
    start = STAGES.index(pipeline.stage_named(first)) if first else 0
    stop = STAGES.index(pipeline.stage_named(last)) if last else len(STAGES) - 1
    if start > stop:
        raise UsageError(f"--from {first} comes after --to {last}")
    return STAGES[start : stop + 1]


Chosen = list[tuple[str, RunConfig]]


def _jobs(configs: list[RunConfig], stages: tuple[str, ...]) -> Chosen:
    """01-04 for each model, then 05 once. Raises for a model without any such stage."""
    chosen: Chosen = []
    for config in configs:
        own = [stage for stage in pipeline.stages_for(config)[:-1] if stage in stages]
        chosen += [(stage, config) for stage in own]
    if STAGES[-1] in stages:
        chosen.append((STAGES[-1], pipeline.compared(configs)))
    if not chosen:
        names = ", ".join(config.model for config in configs)
        raise UsageError(f"{names}: a model behind an API has only notebook 05")
    return chosen


def _pending(chosen: Chosen) -> Chosen:
    """What is not done, each with the stages it needs, each once and in order."""
    todo: Chosen = []
    for stage, config in chosen:
        todo += [(name, config) for name in pipeline.pending([stage], config)]
    return list({(name, config.to_json()): (name, config) for name, config in todo}.values())


def _delete(chosen: Chosen) -> None:
    """``--fresh``: the files of every folder that the run would write to."""
    folders = {}
    for stage, config in chosen:
        folder = pipeline.folder_of(stage, config)
        folders[folder.path] = folder
        if stage == STAGES[-1]:
            members = [folder.member(model) for model in config.models]
            folders |= {member.path: member for member in members}
    for folder in folders.values():
        if folder.path.is_dir():
            with folder.lock():
                folder.fresh()


def _announce(chosen: Chosen, todo: Chosen) -> None:
    """What is skipped, and what is run although nobody asked for it."""
    for text, jobs, others in (("done already", chosen, todo), ("needed first", todo, chosen)):
        names = [f"{job[0]} {job[1].model}" for job in jobs if job not in others]
        if names:
            print(f"{text}: {', '.join(names)}")


def listing() -> str:
    """The registry as a table: name, kind, where the weights come from, the model's pair."""
    rows = [("name", "kind", "source", "pair")]
    for entry in MODELS.values():
        where = entry.hub_id or (f"api: {entry.api_id}" if entry.api_id else entry.source)
        rows.append((entry.name, entry.kind, where, entry.pair or "-"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
