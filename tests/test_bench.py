"""A model that is ready to be steered, and one question, answered as it is and steered. A
person's own run is taken as it is: its directions, layers and ways of writing."""

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
from stllms.config import RunConfig
from stllms.labels import PAPER
from stllms.models.model import ModelError
from stllms.registry import MODELS
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


def stored(config: RunConfig, name: str = BEHAVIOUR) -> Folder:
    """A run of ``config`` that has come as far as notebook 03."""
    folder = Folder(config).open()
    vectors = torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.randn(4, 32)
    SteeringVectors((name,), *vectors, torch.tensor([10])).save(folder.vectors)
    write_json(folder / "steering_layers.json", {name: 1})
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
    """No notebook is run."""
    monkeypatch.setattr(
        stages, "prepare", lambda stage, config: pytest.fail(f"ran notebooks for {stage}")
    )


# -- where the model and its directions come from ------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "gpt-4o"}, ValueError, "reached through an API, where nothing can be added"),
        ({"model": "someowner/somemodel"}, ModelError, "the hub does not give it"),
        ({"judge": "openai:gpt-4.1"}, RuntimeError, "OPENAI_API_KEY"),
        ({"device": "cuda"}, ValueError, "torch finds no CUDA device"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_run(
    model, results, monkeypatch, tmp_path, options, error, words
):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("refused only where there is no CUDA")
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "STLLMS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded the model"))
    with pytest.raises(error, match=words):
        benches.bench(RunConfig(**{"model": model, "results": results, **options}))


def test_weights_that_cannot_be_read_are_one_sentence(tmp_path, results):
    folder = tiny.save_tiny_model(tmp_path / "model", "llama")
    stored(config := RunConfig(str(folder), results=results, device="cpu"))
    vectors = Folder(config).vectors
    next(folder.glob("*.safetensors")).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"cannot be loaded; expected config\.json") as found:
        benches.bench(config, vectors)
    assert "\n" not in str(found.value)


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


def test_where_there_are_no_directions_notebooks_01_to_03_come_first(
    model, results, monkeypatch, capsys
):
    jobs = []

    def prepare(stage, config):
        jobs.append(stage)
        stored(config)

    monkeypatch.setattr(stages, "prepare", prepare)
    config = RunConfig(model, results=results, max_tokens=8, device="cpu")
    bench = benches.bench(config)
    assert jobs == ["04_steer"]
    assert bench.layers[BEHAVIOUR] == 1
    assert bench.config == config
    assert "from 200 tasks. Quicker: the profile smoke" in capsys.readouterr().out


def test_a_run_is_taken_as_it_is_and_what_is_asked_for_by_name_goes_before_it(
    run, model, results
):
    bench = benches.bench(RunConfig(model, results=results, device="cpu"))
    assert bench.origin == f"results/{Folder(run).path.name}"
    assert bench.layers[BEHAVIOUR] == 1
    assert bench.annotator.name == "offline", "another judge is no reason to refuse"
    ask = Ask(benches.task("Why?"), BEHAVIOUR)
    expected = {"temperature": 0.0, "max_new_tokens": 8, "seed": 3, "style": "published"}
    assert expected.items() <= benches.decoding(bench, ask).items()
    assert bench.config.settings.n_build == 12
    assert bench.config.task_set == "checkable"
    baseline, steered = benches.write(bench, ask)
    assert (steered.layer, steered.coefficient) == (1, 1.0)
    assert len(baseline.response.output_ids) <= 8
    own = RunConfig(model, "smoke", "lexical", results, temperature=0.5, max_tokens=6)
    bench = benches.bench(own)
    assert bench.annotator.name == "lexical"
    expected |= {"temperature": 0.5, "max_new_tokens": 6}
    assert expected.items() <= benches.decoding(bench, ask).items()
    assert benches.decoding(bench, replace(ask, temperature=0.0, seed=0)) == (
        benches.decoding(bench, ask) | {"temperature": 0.0, "seed": 0}
    )


def test_layers_and_coefficients_are_those_of_the_run(run, model, results):
    rows = f"behaviour,sign,coefficient\n{BEHAVIOUR},+,0.5\n{BEHAVIOUR},-,-2\n"
    (Folder(run) / "steering_suggested.csv").write_text(f"{rows}adding-knowledge,+,\n")
    (Folder(run) / "steering_layers.json").unlink()
    bench = benches.bench(RunConfig(model, results=results))
    assert set(bench.layers.values()) == {2}, "the middle, where nothing is chosen"
    assert bench.coefficients == {BEHAVIOUR: 0.5}
    assert bench.coefficient_of("adding-knowledge") == 1.0


# -- labels of one's own -------------------------------------------------------------------

OWN = "labels: {planning: {cues: [first]}, doing: {cues: [so]}}\ntargets: [doing, planning]"


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    return str(path)


def test_the_labels_are_those_of_the_run_and_no_direction_of_others_is_taken(
    model, results, own, tmp_path, monkeypatch
):
    stored(RunConfig(model, labels=own, results=results, max_tokens=8), "doing")
    bench = benches.bench(RunConfig(model, results=results), behaviour="doing")
    assert bench.labels.names == ("planning", "doing")
    assert (bench.annotator.name, bench.first) == ("lexical", "doing")
    assert bench.layers == {"doing": 1, "planning": 2}, "the middle, where none was chosen"
    pair = benches.write(bench, Ask(benches.task("Why?"), "doing"))
    assert [len(benches.shares(one, labels=bench.labels)) for one in pair] == [2, 2]
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded the model"))
    with pytest.raises(ValueError, match=r"'dooing', expected one of .*did you mean doing"):
        benches.bench(RunConfig(model, results=results), behaviour="dooing")
    (tmp_path / "other.yaml").write_text(OWN.replace("doing", "waiting"))
    other = RunConfig(model, results=results, labels=str(tmp_path / "other.yaml"))
    with pytest.raises(ValueError, match=r"of the labels mine:\w+, not of other:\w+: name"):
        benches.bench(other)


def test_a_run_of_the_papers_labels_is_none_of_ones_own(run, model, results, own):
    with pytest.raises(ValueError, match=r"of the labels paper, not of mine:\w+: name another"):
        benches.bench(RunConfig(model, results=results, labels=own))


def test_the_shipped_directions_are_of_the_papers_labels_only(results, own, monkeypatch):
    made = []
    monkeypatch.setattr(stages, "prepare", lambda stage, config: made.append(stage))
    with pytest.raises(ValueError, match="'anger', expected one of planning, doing"):
        benches.bench(RunConfig(labels=own, results=results), behaviour="anger")
    assert made == [], "refused before the notebooks are run"
    with pytest.raises(ValueError, match=r"vectors\.safetensors"):
        benches.bench(RunConfig(labels=own, results=results), behaviour="doing")
    assert made == ["04_steer"], "made, and not taken from the package"


def test_a_file_has_directions_of_any_name(bench, ask, tmp_path):
    old = bench.directions
    names = ("formal", *old.behaviours[1:])
    file = tmp_path / "contrast.safetensors"
    vectors = (old.directions, old.means, old.overall, old.counts)
    SteeringVectors(names, *vectors).save(file)
    made = benches.bench(RunConfig(max_tokens=8, device="cpu"), file, "formal")
    assert made.behaviours == (*PAPER.names, "formal")
    pair = benches.write(made, replace(ask, behaviour="formal", layer=None))
    assert (pair[1].direction, pair[1].layer) == ("formal", made.layers["backtracking"])
    with pytest.raises(ValueError, match=r"no direction of 'initializing'; there are formal"):
        benches.write(made, replace(ask, behaviour=old.behaviours[0]))


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
    baseline, steered = benches.write(bench, replace(ask, coefficient=0.0))
    assert baseline.response == steered.response
    assert len(baseline.response.output_ids) > 8
    assert (baseline.direction, steered.direction) == ("none", KNOWLEDGE)
    spans = baseline.annotation.spans
    sizes = [sum(s.end - s.start for s in spans if s.label == name) for name in PAPER.names]
    expected = pytest.approx([n / sum(sizes) for n in sizes])
    assert benches.shares(baseline).tolist() == expected
    pushed = benches.write(bench, replace(ask, coefficient=4.0))
    assert texts(pushed)[0] == baseline.response.text
    assert texts(pushed)[1] != baseline.response.text
    titles = ["baseline", f"+4 {KNOWLEDGE}, layer {LAYER}"]
    assert [benches.title(chain) for chain in pushed] == titles
    other = benches.write(bench, replace(ask, seed=11))
    assert texts(other)[0] != baseline.response.text


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


def test_what_the_watcher_raises_ends_the_run_and_two_threads_may_write(bench, ask):
    def stop(_):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        benches.write(bench, ask, watch=stop)
    found = {}

    def write(seed):
        found[seed] = texts(benches.write(bench, replace(ask, seed=seed)))

    thread = threading.Thread(target=write, args=(1,))
    thread.start()
    write(2)
    thread.join()
    for seed in (1, 2):
        assert found[seed] == texts(benches.write(bench, replace(ask, seed=seed)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"behaviour": "anger"}, "no direction of 'anger'; there are"),
        ({"layer": 6}, "layer 6 is not in 0 .. 5"),
        ({"layer": -1}, "layer -1 is not in 0 .. 5"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"coefficient": -1001.0}, "from -1000 to 1000"),
        ({"temperature": -0.1}, "temperature"),
        ({"seed": -1}, "seed"),
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
    baseline, steered = benches.write(bench, replace(ask, coefficient=1.5))
    assert benches.remark((baseline, steered)) == ""
    same = replace(steered, response=baseline.response, annotation=baseline.annotation)
    assert "changed no token: try another seed" in benches.remark((baseline, same))
    assert benches.remark((baseline, replace(same, coefficient=0.0))) == ""
    whole = replace(baseline, response=replace(baseline.response, finished=True))
    endless = replace(steered, response=replace(steered.response, finished=False))
    assert "broke the text (not finished)" in benches.remark((whole, endless))
    assert benches.remark((replace(baseline, response=endless.response), same)) == ""
    bare = {**steered.annotation.ledger, "coverage": 0.2}
    noise = replace(steered, annotation=replace(steered.annotation, ledger=bare))
    assert "broke the text (mostly unlabelled)" in benches.remark((baseline, noise))
