"""A person's own run: its directions, layers and ways of writing are taken as they are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from stllms import cli, demo, models, pairs, pipeline, provenance
from stllms.artifacts import Folder
from stllms.config import RunConfig
from stllms.loading import ModelError
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
    provenance.write_json(folder / "steering_layers.json", {BEHAVIOUR: 1})
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


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("*.safetensors", "has no weights (*.safetensors, *.bin)"),
        ("*token*", "has no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_before_notebooks_are_run(
    tmp_path, save_tiny_model, results, capsys, gone, words
):
    folder = save_tiny_model(tmp_path / "model", "llama")
    for path in folder.glob(gone):
        path.unlink()
    words_of = ["steer", "Why?", "--behaviour", BEHAVIOUR, "--results", results, "--model"]
    assert cli.main([*words_of, str(folder)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stllms: model: the folder ")
    assert words in line


def test_weights_that_cannot_be_read_are_one_sentence(tmp_path, save_tiny_model, results):
    folder = save_tiny_model(tmp_path / "model", "llama")
    next(folder.glob("*.safetensors")).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"cannot be loaded; expected config\.json") as found:
        pairs.bench(RunConfig(str(folder), results=results, device="cpu"))
    assert "\n" not in str(found.value)


def test_a_hub_that_is_not_reached_is_told_at_once(results, monkeypatch):
    monkeypatch.setattr(models, "for_run", lambda config: 1 / 0)
    with pytest.raises(ModelError, match="the hub does not give it"):
        pairs.bench(RunConfig("someowner/somemodel", results=results, device="cpu"))


def test_a_judge_without_a_key_is_refused_before_the_model_is_loaded(
    model, results, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("STLLMS_API_KEY", raising=False)
    monkeypatch.setattr(models, "for_run", lambda config: 1 / 0)
    words = ["steer", "Why?", "--behaviour", BEHAVIOUR, "--judge", "openai:gpt-4.1"]
    assert cli.main(words) == 1
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_a_failing_notebook_is_its_cell_and_the_last_line_of_its_error(
    model, results, monkeypatch, capsys
):
    said = "01_generate llama failed in cell 4 of 9:\n    x = 1\nwith\n    Traceback\n"
    said += "    OSError: the disk is full\nas executed: results/x/notebooks/01.failed.ipynb"

    def fail(*_):
        raise pipeline.StageError(said)

    monkeypatch.setattr(pipeline, "_run_headless", fail)
    words = ["steer", "Why?", "--behaviour", BEHAVIOUR, "--model", model, "--results", results]
    assert cli.main([*words, "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert err.endswith(
        "stllms: 01_generate llama failed in cell 4 of 9: OSError: the disk is full "
        "(as executed: results/x/notebooks/01.failed.ipynb)\n"
    )
    assert (
        "notebooks 01 to 03 make them first, from 200 tasks. Quicker: the profile smoke" in err
    )


def test_a_line_says_which_notebook_is_running(model, results, monkeypatch, capsys, no_child):
    config = RunConfig(model, results=results, n_samples=7)
    no_child(pipeline.STAGES[:2], config)
    out = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in out] == [
        "1 of 2: 01_generate",
        "2 of 2: 02_train_vectors",
    ]
    assert out[0].endswith(", 7 tasks ...")


@pytest.fixture
def no_child(monkeypatch):
    """What shows the stages, with a child that lives until both have run."""
    looks = iter([None] * 4)
    child = SimpleNamespace(poll=lambda: next(looks, 0))
    ran = iter([False, True, True])
    monkeypatch.setattr(pipeline, "has_run", lambda *_: next(ran))
    monkeypatch.setattr(pipeline, "LOOK", 0.0)
    return lambda stages, config: pipeline._show_stages(stages, config, child, int)


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


def test_the_coefficients_of_a_run_are_those_that_notebook_04_suggests(run, model, results):
    assert pairs.bench(RunConfig(model, results=results)).coefficients == {}
    rows = f"behaviour,sign,coefficient\n{BEHAVIOUR},+,0.5\n{BEHAVIOUR},-,-2\n"
    (Folder(run) / "steering_suggested.csv").write_text(f"{rows}adding-knowledge,+,\n")
    made = pairs.bench(RunConfig(model, results=results))
    assert made.coefficients == {BEHAVIOUR: 0.5}
    assert pairs.coefficient_of(made, "adding-knowledge") == 1.0


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
    record["identity"]["weights"] = "0" * 12
    provenance.write_json(folder.run, record)
    with pytest.raises(
        ValueError,
        match=r"the weights of the model changed since its directions were made \(000000000000",
    ):
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
