"""A model that is ready to be steered, and one question, plain and steered. A person's own run
is taken as it is: its directions, layers and ways of writing."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
import tiny
import torch

from stllms import models
from stllms.app import bench as benches
from stllms.app import stages
from stllms.app.bench import Ask, Bench
from stllms.config import MODELS, RunConfig
from stllms.labels import BEHAVIOURS
from stllms.models.loading import ModelError
from stllms.records import Task
from stllms.runs.artifacts import Folder
from stllms.runs.files import write_json
from stllms.vectors.directions import SteeringVectors

BEHAVIOUR = "backtracking"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama"))


@pytest.fixture
def results(tmp_path) -> str:
    return str(tmp_path / "results")


def stored(config: RunConfig) -> Folder:
    """A run of ``config`` that has come as far as notebook 03."""
    folder = Folder(config).open()
    vectors = torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.randn(4, 32)
    SteeringVectors((BEHAVIOUR,), *vectors, torch.tensor([10])).save(folder.vectors)
    write_json(folder / "steering_layers.json", {BEHAVIOUR: 1})
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
def notebooks(monkeypatch):
    """What notebooks 01 to 03 would do; by default they must not be run."""
    jobs = []
    work = {"do": lambda config: pytest.fail(f"ran the notebooks for {config.model}")}

    def prepare(stage, config):
        jobs.append(stage)
        work["do"](config)

    monkeypatch.setattr(stages, "prepare", prepare)
    return jobs, work


# -- what is refused before anything is run ------------------------------------------------


def no_model(*_, **__):
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("*.safetensors", "has no weights (*.safetensors, *.bin)"),
        ("*token*", "has no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(tmp_path, results, gone, words):
    folder = tiny.save_tiny_model(tmp_path / "model", "llama")
    for path in folder.glob(gone):
        path.unlink()
    with pytest.raises(ModelError, match=re.escape(words)):
        benches.bench(RunConfig(str(folder), results=results, device="cpu"))


def test_weights_that_cannot_be_read_are_one_sentence(tmp_path, results):
    folder = tiny.save_tiny_model(tmp_path / "model", "llama")
    stored(config := RunConfig(str(folder), results=results, device="cpu"))
    vectors = Folder(config).vectors
    next(folder.glob("*.safetensors")).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"cannot be loaded; expected config\.json") as found:
        benches.bench(config, vectors)
    assert "\n" not in str(found.value)


def test_a_model_behind_an_api_a_hub_out_of_reach_and_a_judge_without_a_key(
    model, results, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("STLLMS_API_KEY", raising=False)
    monkeypatch.setattr(models, "load", no_model)
    with pytest.raises(ValueError, match="reached through an API, where nothing can be added"):
        benches.bench(RunConfig("gpt-4o", results=results))
    with pytest.raises(ModelError, match="the hub does not give it"):
        benches.bench(RunConfig("someowner/somemodel", results=results, device="cpu"))
    with pytest.raises(RuntimeError, match="OPENAI_API_KEY"):
        benches.bench(RunConfig(model, judge="openai:gpt-4.1", results=results))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_a_quantised_run_without_cuda_is_refused(model, results, monkeypatch):
    stored(RunConfig(model, results=results, quantization="4bit"))
    monkeypatch.setattr(models, "load", no_model)
    with pytest.raises(ValueError, match="quantization: '4bit' needs a CUDA device"):
        benches.bench(RunConfig(model, results=results))


def test_directions_of_other_weights_or_of_nobody_are_refused(run, model, results):
    folder = Folder(run)
    record = folder.record()
    record["identity"]["weights"] = "0" * 12
    write_json(folder.run, record)
    words = r"the weights of the model changed since its directions were made \(000000000000"
    with pytest.raises(ValueError, match=words):
        benches.bench(RunConfig(model, results=results))
    folder.run.unlink()
    with pytest.raises(ValueError, match=r"no run\.json to say whose"):
        benches.bench(RunConfig(model, results=results))


# -- where there are no directions ---------------------------------------------------------


def test_notebooks_01_to_03_come_first(model, results, notebooks, capsys):
    jobs, work = notebooks
    work["do"] = stored
    config = RunConfig(model, results=results, max_tokens=8, device="cpu")
    bench = benches.bench(config)
    assert jobs == ["04_steer"]
    assert bench.layers[BEHAVIOUR] == 1
    assert bench.config == config
    said = capsys.readouterr().out
    assert "from 200 tasks. Quicker: the profile smoke" in said


def test_a_failing_notebook_is_its_cell_and_the_last_line_of_its_error(
    model, results, notebooks
):
    said = "01_generate llama failed in cell 4 of 9:\n    x = 1\nwith\n    Traceback\n"
    said += "    OSError: the disk is full\nas executed: results/x/notebooks/01.failed.ipynb"

    def fail(_):
        raise stages.StageError(said)

    notebooks[1]["do"] = fail
    with pytest.raises(ModelError) as found:
        benches.bench(RunConfig(model, results=results, device="cpu"))
    assert str(found.value) == (
        "01_generate llama failed in cell 4 of 9: OSError: the disk is full "
        "(as executed: results/x/notebooks/01.failed.ipynb)"
    )


# -- a person's own run --------------------------------------------------------------------


def test_another_judge_profile_and_seed_are_no_reason_to_refuse_a_run(run, model, results):
    bench = benches.bench(RunConfig(model, results=results, device="cpu"))
    assert bench.origin == f"results/{Folder(run).path.name}"
    assert bench.layers[BEHAVIOUR] == 1
    assert bench.annotator.name == bench.preview.name == "offline"
    ask = Ask(benches.task("Why?"), BEHAVIOUR)
    expected = {"temperature": 0.0, "max_new_tokens": 8, "seed": 3, "style": "published"}
    assert expected.items() <= benches.decoding(bench, ask).items()
    assert bench.config.settings.n_build == 12
    assert bench.config.task_set == "checkable"
    plain, steered = benches.write(bench, ask)
    assert (steered.layer, steered.coefficient) == (1, 1.0)
    assert len(plain.response.output_ids) <= 8


def test_what_is_asked_for_by_name_goes_before_the_run(run, model, results):
    config = RunConfig(
        model, "smoke", "lexical", results, temperature=0.5, max_tokens=6, device="cpu"
    )
    bench = benches.bench(config)
    assert bench.annotator.name == "lexical"
    found = benches.decoding(bench, Ask(benches.task("Why?"), BEHAVIOUR))
    assert (found["temperature"], found["max_new_tokens"], found["seed"]) == (0.5, 6, 3)


def test_a_run_whose_tasks_have_gone_is_still_steered(model, results, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "category": "b", "content": "c"}', encoding="utf-8")
    stored(RunConfig(model, results=results, tasks=str(tasks)))
    assert benches.bench(RunConfig(model, results=results)).config.task_set == str(tasks)
    tasks.unlink()
    assert benches.bench(RunConfig(model, results=results)).config.task_set == "messages"


def test_layers_and_coefficients_are_those_of_the_run(run, model, results):
    rows = f"behaviour,sign,coefficient\n{BEHAVIOUR},+,0.5\n{BEHAVIOUR},-,-2\n"
    (Folder(run) / "steering_suggested.csv").write_text(f"{rows}adding-knowledge,+,\n")
    (Folder(run) / "steering_layers.json").unlink()
    bench = benches.bench(RunConfig(model, results=results))
    assert set(bench.layers.values()) == {2}, "the middle, where nothing is chosen"
    assert bench.coefficients == {BEHAVIOUR: 0.5}
    assert bench.coefficient_of("adding-knowledge") == 1.0


# -- a pair of chains ----------------------------------------------------------------------

KNOWLEDGE = "adding-knowledge"
LAYER = MODELS["tiny-thinker"].steering_layers[KNOWLEDGE]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return benches.bench(RunConfig(max_tokens=32, device="cpu"))


@pytest.fixture(scope="module")
def ask() -> Ask:
    asked = "Gina is richer than Finn. Finn is richer than Ann. Who is the poorest?"
    return Ask(benches.task(asked), KNOWLEDGE, 1.5)


def texts(pair) -> list[str]:
    return [chain.response.text for chain in pair]


def test_at_coefficient_0_both_chains_are_the_same_and_a_direction_changes_one(bench, ask):
    plain, steered = benches.write(bench, replace(ask, coefficient=0.0))
    assert plain.response == steered.response
    assert len(plain.response.output_ids) > 8
    assert (plain.direction, steered.direction) == ("none", KNOWLEDGE)
    pushed = benches.write(bench, replace(ask, coefficient=4.0))
    assert texts(pushed)[0] == plain.response.text
    assert texts(pushed)[1] != plain.response.text
    assert benches.title(pushed[1]) == f"+4 {KNOWLEDGE}, layer {LAYER}"
    other = benches.write(bench, replace(ask, seed=11))
    assert texts(other)[0] != plain.response.text


def test_streamed_text_grows_token_by_token_into_the_final_one(bench, ask):
    seen = []
    pair = benches.write(bench, ask, watch=seen.append)
    assert len(seen) == max(len(chain.response.output_ids) for chain in pair)
    for row, chain in enumerate(pair):
        final = chain.response
        for step, responses in enumerate(seen, 1):
            assert responses[row].output_ids == final.output_ids[:step]
            assert final.text.startswith(responses[row].text.rstrip("\ufffd"))
        assert seen[-1][row] == final


def test_what_the_watcher_raises_ends_the_run_and_harms_nothing(bench, ask):
    def stop(_):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        benches.write(bench, ask, watch=stop)
    assert texts(benches.write(bench, ask)) == texts(benches.write(bench, ask))


def test_two_threads_may_write_at_the_same_time(bench, ask):
    found = {}

    def write(seed):
        found[seed] = texts(benches.write(bench, replace(ask, seed=seed)))

    thread = threading.Thread(target=write, args=(1,))
    thread.start()
    write(2)
    thread.join()
    for seed in (1, 2):
        assert found[seed] == texts(benches.write(bench, replace(ask, seed=seed)))


def test_shares_are_those_of_the_labelled_tokens(bench, ask):
    plain, _ = benches.write(bench, ask)
    spans = plain.annotation.spans
    sizes = [sum(s.end - s.start for s in spans if s.label == name) for name in BEHAVIOURS]
    assert benches.shares(plain).tolist() == pytest.approx([n / sum(sizes) for n in sizes])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": Task("t", "c", " \n")}, "the question is empty"),
        ({"task": Task("t", "c", "why? " * 500)}, "exceed the context"),
        ({"task": Task("t", "c", "caf\udce9?")}, "character 4 is no UTF-8"),
        ({"behaviour": "anger"}, "expected one of initializing"),
        ({"layer": 6}, "has layers 0 to 5"),
        ({"layer": -1}, "has layers 0 to 5"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"coefficient": -1001.0}, "from -1000 to 1000"),
        ({"temperature": -0.1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"operation": "multiply"}, "add, ablate"),
        ({"where": "nowhere"}, "all, generated, thinking"),
    ],
)
def test_a_wrong_value_is_refused_by_name(bench, ask, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        benches.write(bench, replace(ask, **change))


def test_a_behaviour_without_a_direction_is_refused_with_its_spans(bench, ask):
    old = bench.directions
    kept = [i for i, name in enumerate(old.behaviours) if name != KNOWLEDGE]
    fewer = SteeringVectors(
        tuple(old.behaviours[i] for i in kept),
        old.directions[kept],
        old.means[kept],
        old.overall,
        old.counts[kept],
        unavailable={KNOWLEDGE: 3},
    )
    with pytest.raises(ValueError, match="unavailable: 3 spans"):
        benches.write(replace(bench, directions=fewer), ask)


def test_steering_that_changes_nothing_or_breaks_the_text_is_remarked(bench, ask):
    plain, steered = benches.write(bench, replace(ask, coefficient=2.5))
    assert benches.remark((plain, steered)) == ""
    same = replace(steered, response=plain.response, annotation=plain.annotation)
    assert "changed no token: try another seed" in benches.remark((plain, same))
    assert benches.remark((plain, replace(same, coefficient=0.0))) == ""
    whole = replace(plain, response=replace(plain.response, finished=True))
    endless = replace(steered, response=replace(steered.response, finished=False))
    assert "broke the text (not finished)" in benches.remark((whole, endless))
    assert benches.remark((replace(plain, response=endless.response), same)) == ""
    bare = {**steered.annotation.ledger, "coverage": 0.2}
    noise = replace(steered, annotation=replace(steered.annotation, ledger=bare))
    assert "broke the text (mostly unlabelled)" in benches.remark((plain, noise))
