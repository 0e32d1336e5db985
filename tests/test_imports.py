"""What is imported without anything heavy. That imports flow down is import-linter's to say
(``[tool.importlinter]`` in ``pyproject.toml``; ``tests/run.sh`` runs it)."""

from __future__ import annotations

import subprocess
import sys

LIGHT = ("config", "hashes", "labels", "records", "registry", "terminal", "runs")
HEAVY = ("torch", "transformers", "numpy", "pandas", "matplotlib", "scipy", "IPython", "tqdm")


def test_light_rooms_bring_nothing_heavy():
    modules = ", ".join(f"stllms.{name}" for name in LIGHT)
    code = f"import sys, {modules}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
