"""The runner: executes the notebooks for one or more models, and skips what is done.

Notebooks 01-04 for each model, then 05 once for all of them. What is done is skipped, another
configuration in the same folder is refused, the first failure stops the run. Exit status:
0 done, 1 a notebook failed, 2 refused (one line on stderr says why). Notebooks call
:func:`ensure` first and :func:`finish` last.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from stllms import arguments, execute, pipeline, refusals, report
from stllms.arguments import PROG, UsageError, configurations, parser
from stllms.artifacts import LockedFolder
from stllms.config import MODELS, RunConfig
from stllms.pipeline import STAGES, StageError, ensure, finish
from stllms.registry import OTHERS
from stllms.terminal import plain

__all__ = ["STAGES", "StageError", "configurations", "ensure", "finish", "main", "parser"]

#: Stages with their configurations, in the order in which they run.
Chosen = list[tuple[str, RunConfig]]


def main(argv: Sequence[str] | None = None, *, prog: str = PROG) -> int:
    """Runs what the command line asks for; returns the exit status and raises nothing.

    ``prog`` is what the command is called in its help and in its errors.
    """
    called = "stllms.run" if prog == PROG else prog
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _main(words, prog)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except StageError as error:
        print(f"{called}: {plain(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, LockedFolder) as error:
        print(f"{called}: {plain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        fresh = any(word.partition("=")[0] == "--fresh" for word in words)
        again = "the same command without --fresh" if fresh else "the same command"
        print(f"{called}: {stop or 'interrupted'}; {again} goes on from there", file=sys.stderr)
        return 130


def _main(argv: list[str], prog: str) -> int:
    known = parser(prog)
    given, unknown = known.parse_known_args(argv)
    if unknown:
        raise UsageError(arguments.unknown(unknown[0], known))
    if given.list_models:
        print(listing())
        return 0
    if given.published and not given.model:
        return _released(given, known)
    configs = configurations(given)
    stages = _selected(given.first, given.last)
    chosen = _jobs(configs, stages)
    _check_inputs(chosen if given.fresh else _pending(chosen), stages)
    if given.fresh:
        _delete(chosen, given.fresh)
    for stage, config in chosen:
        pipeline.check(stage, config)
    todo = _pending(chosen)
    if not todo:
        print(f"nothing to do: {', '.join(_places(chosen))} complete (--fresh starts again)")
    else:
        _check_writable(pipeline.folder_of(*job).path for job in todo)
        _announce(chosen, todo)
        _execute(chosen, todo, quiet=given.quiet)
    if not given.configuration:  # a notebook that runs earlier ones shows no report
        _report(chosen)
    return 0


def _execute(chosen: Chosen, todo: Chosen, *, quiet: bool) -> None:
    """Runs the notebooks; then those whose directions changed because chains that had failed
    are now labelled. Says what failed in the end."""
    execute.execute([execute.Job(*job) for job in todo], quiet=quiet)
    late = _pending(chosen, again=False)
    if late:
        execute.execute([execute.Job(*job) for job in late], quiet=quiet)
    for place in _places(chosen):
        print(f"done: {place}")
    for stage, config in dict.fromkeys([*chosen, *todo]):
        if n := pipeline.failed(stage, config):
            print(f"{stage}: {n} chains failed; the same command asks for them again")


def _places(chosen: Chosen) -> list[str]:
    """The folders of a run as a person at the terminal would call them."""
    paths = dict.fromkeys(pipeline.folder_of(*job).path for job in chosen)
    return [execute.shown(path) for path in paths]


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
    _check_writable([results])
    for path in published.run(given.published, results):
        print(path)
    ledger.write(results, given.published)
    print(results / "ledger.csv")
    return 0


def _selected(first: str | None, last: str | None) -> tuple[str, ...]:
    start = STAGES.index(pipeline.stage_named(first)) if first else 0
    stop = STAGES.index(pipeline.stage_named(last)) if last else len(STAGES) - 1
    if start > stop:
        raise UsageError(f"--from {first} comes after --to {last}")
    return STAGES[start : stop + 1]


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


def _pending(chosen: Chosen, *, again: bool = True) -> Chosen:
    """What is not done, each with the stages it needs, each once and in order; with ``again``
    what has run and waits for chains that failed counts as not done."""
    todo: Chosen = []
    for stage, config in chosen:
        todo += [(name, config) for name in pipeline.pending([stage], config, again=again)]
    return list({(name, config.to_json()): (name, config) for name, config in todo}.values())


def _check_inputs(todo: Chosen, asked: Sequence[str]) -> None:
    """Refuses, before any notebook starts, what would stop one of them."""
    stages: dict[str, tuple[RunConfig, list[str]]] = {}
    for stage, config in todo:
        stages.setdefault(config.to_json(), (config, []))[1].append(stage)
    for config, own in stages.values():
        refusals.check(config, own, asked=asked)


def _check_writable(folders: Iterable[Path]) -> None:
    """Makes the folders of the runs; :class:`UsageError` for one that cannot be written to."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(folder, os.W_OK) else "no permission to write"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise UsageError(
                f"cannot write runs to {folder} ({reason}): choose another --results"
            )


def _delete(chosen: Chosen, which: str) -> None:
    """``--fresh``: the files of every folder that the run would write to; with a notebook those
    of one stage and of what rests on it."""
    if which != "all":
        stage = pipeline.stage_named(which)
        for config in {config.to_json(): config for _, config in chosen}.values():
            _say_deleted(pipeline.folder_of(stage, config).label, pipeline.fresh(stage, config))
        return
    for stage, config in chosen:
        if stage == STAGES[-1]:
            pipeline.fresh(stage, config)
            continue
        folder = pipeline.folder_of(stage, config)
        if folder.path.is_dir():
            with folder.lock(*STAGES[:-1]):
                folder.fresh()


def _say_deleted(label: str, names: Sequence[str]) -> None:
    figures = [name for name in names if name.startswith("figures/")]
    others = [name for name in names if name not in figures]
    more = f" and {len(figures)} files of figures" if figures else ""
    print(f"deleted in {label}: {', '.join(others) or 'nothing'}{more}")


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
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"or {OTHERS}"])


if __name__ == "__main__":
    sys.exit(main())
