"""The command ``stllms``: run the notebooks, steer one question, annotate a file, verify a run.

Exit status: 0 done, 1 failed, 2 the command does not make sense (one line on stderr says
why), 130 interrupted. Nothing heavy is imported before it is needed; the words of the command
line are in :mod:`stllms.options`.
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
from typing import TYPE_CHECKING, Any

from stllms.options import EXAMPLE, UsageError, parser
from stllms.terminal import plain

if TYPE_CHECKING:
    from stllms.config import RunConfig
    from stllms.pairs import Ask, Bench
    from stllms.records import Annotation, Steered

#: Chains without labels that are named, at most.
NAMED = 5
#: What a model may be that can be steered and is not in the registry.
WEIGHTS = "a hub id owner/name, or an existing folder with a config.json"


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
    except (RuntimeError, MemoryError) as error:  # models, servers, stages, memory
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(error: object, status: int) -> int:
    print(f"stllms: {plain(' '.join(str(error).split()))}", file=sys.stderr)
    return status


def _main(argv: list[str]) -> int:
    if not argv:
        parser().print_help()
        return 2
    given = parser().parse_args(argv)
    commands = {"steer": _steer, "annotate": _annotate, "verify": _verify}
    return commands[given.command](given)


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
    if remark := pairs.remark(pair):
        print(f"stllms: {plain(remark)}", file=sys.stderr)
    if config.embedded:
        print(
            f"{config.model} is a fixture, built to be steerable: it knows only questions of "
            f'its grammar, like "{EXAMPLE.question}"',
            file=sys.stderr,
        )
    if given.json:
        made = _as_json(bench, ask, chains)
        print(plain(json.dumps(made, ensure_ascii=False, allow_nan=False)))
    else:
        print(_as_text(chains, colour=has_colour()))
    return 0


def _configuration(given: argparse.Namespace) -> RunConfig:
    """The run that the options of ``steer`` name."""
    from stllms import registry
    from stllms.config import RunConfig, UnknownModel

    names = ("model", "profile", "judge", "results", "device")
    values = {name: getattr(given, name) for name in names}
    try:
        return RunConfig(**values, **_of_the_judge(given))
    except UnknownModel as error:
        there = str(error).replace("(--list-models)", "(stllms run --list-models)")
        raise UsageError(there.replace(registry.OTHERS, WEIGHTS)) from None


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
        parts.append(f"{plain(pairs.title(chain))}\n{shown}\n({plain(pairs.note(chain))})")
    titles = [plain(pairs.title(chain)) for chain in chains]
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
    found = f"{_count(counted.chains, 'chain')}, {_count(counted.placed, 'segment')}"
    said = f"{annotator.name}: {found}, {labelled}, {_without_labels(bare)}"
    print(plain(said), file=sys.stderr)
    return 1 if bare else 0


# --- verify -------------------------------------------------------------------------------


def _verify(given: argparse.Namespace) -> int:
    """A line an artefact; 1 where one does not hold."""
    from stllms import artifacts

    found = artifacts.verify(Path(given.folder).expanduser())
    for one in found:
        print(one)
    bad = sum(not one.holds for one in found)
    print(f"{_count(len(found), 'artefact')}, {bad or 'none'} that does not hold")
    return 1 if bad else 0


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


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
    from stllms import provenance
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
    with provenance.replacing(Path(out).expanduser()) as beside:
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
