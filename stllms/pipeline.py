"""The five notebooks as stages: where they are, what they need, when one is done.

A stage is done when the marker that its last cell left in ``run.json`` still fits: same
identity and options, same code cells of its notebook and of those before it, same version of
the package, and the files it wrote are there. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stllms import __version__
from stllms.artifacts import Folder, now
from stllms.config import PACKAGE, RunConfig, repository
from stllms.files import read_json

#: The stages in order; each is the notebook of that name.
STAGES = ("01_generate", "02_train_vectors", "03_attribute_layers", "04_steer", "05_compare")

#: The stages whose artefacts a stage reads. 05 makes its own responses.
REQUIRES: dict[str, tuple[str, ...]] = {
    "01_generate": (),
    "02_train_vectors": STAGES[:1],
    "03_attribute_layers": STAGES[:2],
    "04_steer": STAGES[:3],
    "05_compare": (),
}

#: What a stage must have left, besides the figures that its marker lists.
ARTEFACTS: dict[str, tuple[str, ...]] = {
    "01_generate": ("responses.jsonl",),
    "02_train_vectors": ("annotations.jsonl", "vectors.safetensors"),
    "03_attribute_layers": ("layer_effects.safetensors",),
    "04_steer": ("steered.jsonl", "steering.csv"),
    "05_compare": (),
}

#: Set by the runner for its kernels: inside one, :func:`ensure` runs nothing again.
INSIDE = "STLLMS_RUNNER"

#: When each stage began in this process.
_begun: dict[tuple[str, Path], float] = {}


class StageError(RuntimeError):
    """A notebook failed, or did not leave what it should have."""


def notebooks_folder() -> Path:
    """``STLLMS_NOTEBOOKS``, else the checkout's ``notebooks``, else those of the wheel."""
    chosen = os.environ.get("STLLMS_NOTEBOOKS")
    if chosen:
        return Path(chosen).resolve()
    root = repository()
    return root / "notebooks" if root else PACKAGE / "_notebooks"


def notebook(stage: str) -> Path:
    """The file of a stage; ``ValueError`` if there is no such stage or file."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}, expected one of {', '.join(STAGES)}")
    path = notebooks_folder() / f"{stage}.ipynb"
    if not path.is_file():
        raise ValueError(f"the notebook {path.name} is not in {path.parent}")
    return path


def stage_named(text: str) -> str:
    """The stage meant by ``03``, ``3``, ``03_attribute_layers`` or ``attribute_layers``."""
    for stage in STAGES:
        number, _, name = stage.partition("_")
        if text.removesuffix(".ipynb") in (stage, number, number.lstrip("0"), name):
            return stage
    raise ValueError(f"unknown notebook {text!r}, expected one of {', '.join(STAGES)}")


def stages_for(config: RunConfig) -> tuple[str, ...]:
    """The stages that a model can go through: one behind an API has no activations."""
    return STAGES[-1:] if config.entry.source == "api" else STAGES


def folder_of(stage: str, config: RunConfig) -> Folder:
    """``results/<slug>/``, or ``results/comparison/`` for notebook 05."""
    return Folder.comparison(config) if stage == "05_compare" else Folder(config)


def check(stage: str, config: RunConfig) -> None:
    """Raises ``ChangedConfiguration`` if a folder of the stage holds another run."""
    folder = folder_of(stage, config)
    folder.check()
    if stage == "05_compare":
        for model in config.models:
            folder.member(model).check()


def code_of(stage: str) -> str:
    """A hash of the code cells of a notebook; its text and its parameters do not count."""
    content = read_json(notebook(stage))
    cells = [
        "".join(cell["source"])
        for cell in content["cells"]
        if cell["cell_type"] == "code"
        and "parameters" not in cell.get("metadata", {}).get("tags", ())
    ]
    return _digest(cells)


def key_of(stage: str, config: RunConfig) -> str:
    """The hash that a marker must carry: all that the artefacts of a stage depend on."""
    folder = folder_of(stage, config)
    identities = [folder.identity]
    if stage == "05_compare":
        identities = [folder.member(model).identity for model in config.models]
    before = [key_of(needed, config) for needed in REQUIRES[stage]]
    options = config.stage_options(stage)
    return _digest([identities, options, code_of(stage), before, __version__])


def is_done(stage: str, config: RunConfig) -> bool:
    """Whether the marker of a stage fits and its files are there."""
    folder = folder_of(stage, config)
    marker = folder.marker(stage)
    if marker.get("key") != key_of(stage, config):
        return False
    return all((folder / name).is_file() for name in marker.get("files", ()))


def pending(stages: Sequence[str], config: RunConfig) -> list[str]:
    """The stages among ``stages`` that are not done, and those they need, in order."""
    wanted = {needed for stage in stages for needed in (*REQUIRES[stage], stage)}
    return [stage for stage in STAGES if stage in wanted and not is_done(stage, config)]


def ensure(stage: str, config: RunConfig) -> Folder:
    """The open folder of a stage, after running the earlier notebooks that are not done.

    The first call of every notebook. They run headless in a process of their own; one line
    says so. Inside a run of the runner nothing is run again. Raises
    ``ChangedConfiguration`` for a folder of another run, :class:`StageError` with the
    failing notebook and cell if one of them fails.
    """
    check(stage, config)
    if not os.environ.get(INSIDE):
        missing = pending(REQUIRES[stage], config)
        if missing:
            print(f"{stage} needs {', '.join(missing)}: running this first", flush=True)
            _run_headless(missing, config)
    folder = folder_of(stage, config).open()
    folder.kept.clear()
    _begun[stage, folder.path] = time.monotonic()
    return folder


def finish(stage: str, config: RunConfig) -> None:
    """Marks a stage as done and says what it left; the last call of every notebook.

    Raises :class:`StageError` if an artefact that the stage promises is not there.
    """
    folder = folder_of(stage, config).open()
    lacking = [name for name in ARTEFACTS[stage] if not (folder / name).is_file()]
    if lacking:
        raise StageError(f"{stage} is not done: {folder.label} lacks {', '.join(lacking)}")
    begun = _begun.get((stage, folder.path))
    names = folder.kept | set(ARTEFACTS[stage])
    written = sorted(name for name in names if (folder / name).is_file())
    folder.mark(
        stage,
        {
            "key": key_of(stage, config),
            "files": written,
            "finished": now(),
            "seconds": None if begun is None else round(time.monotonic() - begun, 1),
        },
    )
    following = STAGES[STAGES.index(stage) + 1 :][:1]
    print(f"{folder.label}: {_listed(written)}")
    if following:
        print(f"next: {following[0]}")


def _listed(written: Sequence[str]) -> str:
    """The files of a stage in one line, the three files of a figure as one."""
    figures = {Path(name).stem for name in written if name.startswith("figures/")}
    others = [name for name in written if not name.startswith("figures/")]
    drawn = f"figures {', '.join(sorted(figures))}" if figures else ""
    return "; ".join(part for part in (", ".join(others), drawn) if part) or "nothing"


def _run_headless(stages: Sequence[str], config: RunConfig) -> None:
    """The runner as a child process: a kernel has an event loop of its own already."""
    command = [
        sys.executable,
        "-m",
        "stllms.run",
        "--configuration",
        json.dumps(config.parameters()),
        "--from",
        stages[0],
        "--to",
        stages[-1],
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(done.stderr.strip() or f"{' '.join(stages)}: exit {done.returncode}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def compared(configs: Sequence[RunConfig]) -> RunConfig:
    """The configuration of notebook 05 for all models of a run: the first, and the others."""
    first = configs[0]
    names = [*(config.model for config in configs[1:]), *first.compare]
    return RunConfig.from_dict({**first.to_dict(), "compare": names}) if names else first
