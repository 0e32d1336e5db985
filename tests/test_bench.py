"""A person's own run: its directions, layers and ways of writing are taken as they are."""

from __future__ import annotations

import json

import pytest
import torch

from stllms import cli, demo, files, models, pairs, pipeline
from stllms.artifacts import Folder
from stllms.config import RunConfig
from stllms.vectors import SteeringVectors

BEHAVIOUR = "backtracking"


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_tiny_model) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama"))


@pytest.fixture
def results(tmp_path) -> str:
    return str(tmp_path / "results")


def stored(config: RunConfig) -> Folder:
    """A run of ``config`` that has come as far as notebook 03."""
    folder = Folder(config).open()
    vectors = torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.randn(4, 32)
    SteeringVectors((BEHAVIOUR,), *vectors, torch.tensor([10])).save(folder.vectors)
    files.write_json(folder / "steering_layers.json", {BEHAVIOUR: 1})
    return folder


@pytest.fixture
def run(model, results) -> RunConfig:
    """A run that differs from the defaults in every field of its identity that it can."""
    config = RunConfig(
        model, "paper", "openai:gpt-4.1", results, seed=3, n_samples=12, max_tokens=8,
        prompts="published", tasks="checkable",
    )  # fmt: skip
    stored(config)
    return config


@pytest.fixture(autouse=True)
def no_notebooks(monkeypatch):
    def refuse(*job):
        raise AssertionError(f"ran the notebooks for {job}")

    monkeypatch.setattr(pipeline, "_run_headless", refuse)


def test_another_judge_profile_and_seed_are_no_reason_to_refuse_a_run(run, model, results):
    made = pairs.bench(RunConfig(model, results=results, device="cpu"))
    assert made.origin == f"results/{Folder(run).path.name}"
    assert made.layers[BEHAVIOUR] == 1
    assert made.annotator.name == made.preview.name == "offline"
    ask = pairs.Ask(pairs.task("Why?"), BEHAVIOUR)
    expected = {"temperature": 0.0, "max_new_tokens": 8, "seed": 3, "style": "published"}
    assert expected.items() <= pairs.decoding(made, ask).items()
    assert made.config.settings.n_build == 12
    assert made.config.task_set == "checkable"


def test_what_is_asked_for_by_name_goes_before_the_run(run, model, results):
    config = RunConfig(
        model, "smoke", "lexical", results, temperature=0.5, max_tokens=6, device="cpu"
    )
    made = pairs.bench(config)
    assert made.annotator.name == "lexical"
    found = pairs.decoding(made, pairs.Ask(pairs.task("Why?"), BEHAVIOUR))
    assert (found["temperature"], found["max_new_tokens"], found["seed"]) == (0.5, 6, 3)


def test_the_demo_and_the_command_take_the_same_run(run, model, results, capsys):
    bench = demo.load(model, results=results, options={"device": "cpu"})
    words = ["steer", "Why?", "--behaviour", BEHAVIOUR, "--model", model, "--results", results]
    assert cli.main([*words, "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert (made["layer"], made["temperature"], made["max_new_tokens"]) == (1, 0.0, 8)
    assert made["directions"] == bench.origin
    assert "fixture" not in err


def test_a_judge_that_costs_is_bounded(run, model, results, monkeypatch):
    seen = {}
    monkeypatch.setattr(pairs.stage, "for_run", lambda config: seen.update(c=config) or 1 / 0)
    words = ["steer", "Why?", "--behaviour", BEHAVIOUR, "--model", model, "--results", results]
    words += ["--judge", "openai:gpt-4.1", "--max-cost", "2", "--base-url", "http://localhost"]
    with pytest.raises(ZeroDivisionError):
        cli.main([*words, "--device", "cpu"])
    config = seen["c"]
    assert (config.judge, config.max_cost) == ("openai:gpt-4.1", 2.0)
    assert config.base_url == "http://localhost"


def test_a_run_whose_tasks_have_gone_is_still_steered(model, results, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "category": "b", "content": "c"}', encoding="utf-8")
    stored(RunConfig(model, results=results, tasks=str(tasks)))
    assert pairs.bench(RunConfig(model, results=results)).config.task_set == str(tasks)
    tasks.unlink()
    assert pairs.bench(RunConfig(model, results=results)).config.task_set == "messages"


def test_a_run_without_layers_is_steered_in_the_middle(run, model, results):
    (Folder(run) / "steering_layers.json").unlink()
    assert set(pairs.bench(RunConfig(model, results=results)).layers.values()) == {2}


def test_where_there_are_no_directions_notebooks_01_to_03_come_first(
    model, results, monkeypatch
):
    ran = []

    def notebooks(stages, config):
        ran.append(tuple(stages))
        stored(config)

    monkeypatch.setattr(pipeline, "_run_headless", notebooks)
    config = RunConfig(model, results=results, max_tokens=8, device="cpu")
    made = pairs.bench(config)
    assert ran == [pipeline.STAGES[:3]]
    assert made.layers[BEHAVIOUR] == 1
    assert made.config == config


def test_an_unfinished_run_of_another_configuration_is_not_replaced(run, model, results):
    folder = Folder(run)
    folder.vectors.unlink()
    folder.responses.write_text('{"task_id": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"It has no directions yet: finish it \(stllms run"):
        pairs.bench(RunConfig(model, results=results))
    assert folder.responses.is_file()


def test_directions_of_other_weights_or_of_nobody_are_refused(run, model, results):
    folder = Folder(run)
    record = folder.record()
    record["identity"]["revision"] = "0" * 12
    files.write_json(folder.run, record)
    with pytest.raises(ValueError, match="its directions are of revision 000000000000"):
        pairs.bench(RunConfig(model, results=results))
    folder.run.unlink()
    with pytest.raises(ValueError, match=r"no run\.json to say whose"):
        pairs.bench(RunConfig(model, results=results))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_a_quantised_run_without_cuda_is_refused_before_anything_is_loaded(
    model, results, monkeypatch, capsys
):
    stored(RunConfig(model, results=results, quantization="4bit"))
    monkeypatch.setattr(models, "for_run", lambda config: 1 / 0)
    monkeypatch.setattr(SteeringVectors, "load", lambda path: 1 / 0)
    words = ["steer", "Why?", "--behaviour", BEHAVIOUR, "--model", model, "--results", results]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "quantization: '4bit' needs a CUDA device" in err
    assert err.count("\n") == 1


def test_a_wrong_word_is_refused_before_notebooks_are_run(model, results, capsys):
    words = ["steer", "Why?", "--model", model, "--results", results, "--behaviour"]
    for more in (
        ["anger"], [BEHAVIOUR, "--where", "nowhere"], [BEHAVIOUR, "--operation", "multiply"],
        [BEHAVIOUR, "--temperature", "-1"],
    ):  # fmt: skip
        assert cli.main([*words, *more]) == 2
        assert "expected" in capsys.readouterr().err
