"""Single values: a ``ValueError`` names the field, its value and what is expected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

#: Sets of tasks that have a name; anything else is a file.
TASK_SETS = ("grammar", "messages")


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


def absolute(name: str, value: Any) -> Any:
    """A value of a field, paths made absolute: kernels have a working folder of their own."""
    if value is None or (name == "tasks" and value in TASK_SETS):
        return value
    if name in ("tasks", "published"):
        return str(Path(value).expanduser().resolve())
    if name == "judge" and value.startswith("replay:"):
        return f"replay:{Path(value.removeprefix('replay:')).expanduser().resolve()}"
    return value
