"""Single values: a ``ValueError`` names the field, its value and what is expected."""

from __future__ import annotations

import importlib.util
import math
from importlib import metadata
from pathlib import Path
from typing import Any

from stllms import provenance

#: Sets of tasks that have a name; anything else is a file. ``checkable`` is ``messages``, but
#: evaluated on tasks that have exact answers.
TASK_SETS = ("grammar", "messages", "checkable")

#: What a set of tasks from the reasoning-gym package begins with; a dataset's name follows.
GYM = "gym:"


#: How many tasks the sets of ``messages/`` have for a part of a run, by the profile's number.
SIZES = {
    "messages": {"n_build": 500, "n_evaluate": 50},
    "checkable": {"n_build": 500, "n_evaluate": 100},
}


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a value that is not among ``allowed``."""
    if value not in allowed:
        raise ValueError(
            f"{name}: {value!r}, expected one of {', '.join(str(item) for item in allowed)}"
        )


def whole(name: str, value: Any, *, least: int) -> int | None:
    """A whole number of at least ``least``; ``None`` (use the default) is let through."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r}, expected a whole number of at least {least}")
    return value


def real(name: str, value: Any, *, least: float = -math.inf) -> float | None:
    """A finite number of at least ``least``; ``None`` is let through."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        bound = f" of at least {least:g}" if math.isfinite(least) else ""
        raise ValueError(f"{name}: {value!r}, expected a number{bound}")
    return float(value)


def coefficients(values: Any) -> tuple[float, ...] | None:
    """Sorted and distinct; ``None`` stays ``None``."""
    if values is None:
        return None
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ValueError(f"coefficients: {values!r}, expected a list of numbers")
    numbers = sorted({real("coefficients", value) or 0.0 for value in values})
    if not any(numbers):
        raise ValueError("coefficients: expected at least one that is not 0")
    return tuple(numbers)


def has_name(task_set: str) -> bool:
    """Whether a set of tasks is known by name and is not a file."""
    return task_set in TASK_SETS or task_set.startswith(GYM)


def task_file(task_set: str) -> None:
    """Refuses a set of tasks that neither has a name nor is a file."""
    if not has_name(task_set) and not Path(task_set).expanduser().is_file():
        raise ValueError(
            f"tasks: {task_set!r} is no file; expected {', '.join(TASK_SETS)}, {GYM}NAME"
            " (a dataset of reasoning-gym) or a JSONL file"
        )


def task_identity(task_set: str) -> str:
    """The name of a set of tasks; with the version of the package that makes it, or the hash
    of the file's content."""
    if task_set.startswith(GYM):
        return f"{task_set} (reasoning-gym {metadata.version('reasoning-gym')})"
    if has_name(task_set):
        return task_set
    path = Path(task_set).expanduser()
    return f"{path.name}:{provenance.file_hash(path)[:12]}"


def judge_identity(judge: str) -> str:
    """The annotator of a run; of stored replies with the hash of what is stored."""
    if not judge.startswith("replay:"):
        return judge
    return f"replay:{content_identity(judge.removeprefix('replay:'), '*.jsonl')}"


def content_identity(folder: str | None, pattern: str) -> str | None:
    """The name of a folder and a hash of the names and contents of some of its files."""
    if folder is None:
        return None
    path = Path(folder).expanduser()
    files = [
        f"{one.name} {provenance.remembered_hash(one)}" for one in sorted(path.glob(pattern))
    ]
    return f"{path.name}:{provenance.digest(files)[:12]}"


def hardware(device: str, quantization: str | None) -> None:
    """Refuses CUDA, and quantization, where this machine or environment does not have it."""
    if quantization is None and not device.startswith("cuda"):
        return
    import torch  # not before it is needed

    found = torch.cuda.is_available()
    if device.startswith("cuda") and not found:
        raise ValueError(f"device: {device!r}, but torch finds no CUDA device; expected cpu")
    if quantization is None:
        return
    if not found or device in ("cpu", "mps"):
        where = f"device is {device!r}" if found else "torch finds none"
        raise ValueError(
            f"quantization: {quantization!r} needs a CUDA device and {where}; leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization: {quantization!r} needs bitsandbytes: pip install bitsandbytes"
        )


def absolute(name: str, value: Any) -> Any:
    """A value of a field, paths made absolute: kernels have a working folder of their own."""
    if value is None or (name == "tasks" and has_name(value)):
        return value
    if name == "folders":
        return [str(Path(one).expanduser().resolve()) for one in value]
    if name in ("tasks", "published"):
        return str(Path(value).expanduser().resolve())
    if name == "judge" and value.startswith("replay:"):
        return f"replay:{Path(value.removeprefix('replay:')).expanduser().resolve()}"
    return value


def run_folders(value: Any) -> tuple[str, ...]:
    """``folders``: a list of folders of runs, as texts; each must hold what a run leaves."""
    if isinstance(value, str | Path):
        raise ValueError(f"folders: {str(value)!r}, expected a list of folders")
    found = tuple(str(one) for one in value)
    for one in found:
        for needed in ("run.json", "annotations.jsonl"):
            if not (Path(one).expanduser() / needed).is_file():
                raise ValueError(
                    f"folders: {one} has no {needed}: expected the folder of a run that got "
                    "as far as notebook 02"
                )
    return found
