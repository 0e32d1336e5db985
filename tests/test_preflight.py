"""What would stop a notebook is refused before the first one starts, in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.hf_api import ModelInfo

from stllms import config as configuration
from stllms import tasks
from stllms.annotation import annotators
from stllms.annotation.judge import Judge, protocol_of
from stllms.app import cli, preflight, runner, stages
from stllms.app.preflight import Work
from stllms.config import RunConfig
from stllms.generation import remote
from stllms.generation.chains import read as read_responses
from stllms.generation.chains import responses as generate
from stllms.labels import PAPER
from stllms.models import api
from stllms.records import STEERED_KEY, Annotation, Response, to_row
from stllms.runs.artifacts import Folder
from stllms.runs.files import write_json
from stllms.runs.store import Rows
from stllms.steering import conditions as steering
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.nulls import Controls


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty results folder; a notebook that were to run fails the test."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv(stages.INSIDE, raising=False)
    monkeypatch.setattr(runner, "execute", lambda *_, **__: pytest.fail("a notebook runs"))
    for name in (api.OWN_SERVER, api.KEY, *(key for _, key in api.PROVIDERS.values())):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a call with exit status 2."""
    assert cli.main(["run", *arguments, "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def nothing_began(place) -> None:
    assert not (place / "results").exists()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ("--judge openai:gpt-4.1", "set OPENAI_API_KEY in the environment or in a .env"),
        ("--judge openai:gpt-4.1 --from 04 --to 04", "OPENAI_API_KEY"),
        ("--judge openai:owner/model", "OPENROUTER_API_KEY"),
        ("--judge openai:m --base-url https://elsewhere.invalid", "STLLMS_API_KEY"),
        ("--model gpt-4o --judge lexical", "OPENAI_API_KEY"),
        ("--judge lexical --option compare=gpt-4o", "OPENAI_API_KEY"),
        ("--model api:deepseek/x --judge offline", "OPENROUTER_API_KEY"),
        ("--judge openai:unheard-of --max-cost 2", "nobody knows the price of unheard-of"),
        ("--judge openai:m#unheard", "unheard"),
        ("--published nope --model tiny-instruct", "nope: there is no such folder"),
        ("--model owner/name --from 05", "compared with nothing: name other models"),
        ("--model r1-distill-qwen-1.5b --from 05", "--option compare=qwen2.5-1.5b-instruct"),
        ("--judge replay:nowhere", "nowhere"),
        ("--judge grammar --option compare=smollm2 --from 05", "not those of smollm2"),
        ("--tasks messages --n-samples 501", "501 tasks asked for"),
        ("--model claude-3.7-sonnet --judge lexical --max-tokens 10", "max_tokens_compare: 10"),
        ("--model owner/unheard-of", "is not on this machine, and the hub does not give it"),
    ],
)
def test_what_cannot_end_well_is_refused_first(place, capsys, ask, words):
    assert words in refused(capsys, *ask.split())
    nothing_began(place)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused(place, capsys):
    assert "device: 'cuda:0'" in refused(capsys, "--device", "cuda:0")


# -- tasks ---------------------------------------------------------------------------------


def write_tasks(path, n: int, *more: str):
    rows = [json.dumps({"id": str(i), "content": f"question {i}"}) for i in range(n)]
    path.write_text("\n".join([*rows, *more]))
    return str(path)


def test_too_few_tasks_name_the_numbers_and_their_options(place, capsys):
    path = write_tasks(place / "own.jsonl", 20)
    ask = ["--model", "smollm2", "--tasks", path, "--profile", "smoke"]
    line = refused(capsys, *ask)
    for part in ("own.jsonl, evaluate: 24 tasks asked for", "20 can be had", "from 16 tasks"):
        assert part in line
    for flag in ("--n-samples N", "--n-evaluate N", "--option n_compare=N"):
        assert flag in line
    nothing_began(place)
    few = RunConfig("smollm2", tasks=path, profile="smoke")
    preflight.check(few, stages.STAGES[:2])  # which need no more than there are


def test_a_failed_run_without_rows_does_not_block_the_corrected_one(place, capsys):
    first = RunConfig(tasks=write_tasks(place / "own.jsonl", 30))
    folder = stages.folder_of("01_generate", first).open()
    folder.keep([folder.notebooks / "01_generate.failed.ipynb"])
    folder.notebooks.mkdir()
    (folder.notebooks / "01_generate.failed.ipynb").write_text("{}")
    corrected = RunConfig(tasks=write_tasks(place / "own.jsonl", 400))
    opened = stages.ensure("01_generate", corrected)
    assert opened.record()["identity"] == corrected.identity()
    assert not folder.notebooks.exists()
    folder.responses.write_text('{"task_id": "0"}\n')
    third = RunConfig(tasks=write_tasks(place / "own.jsonl", 401))
    with pytest.raises(ValueError, match=r"tasks was .* and is now"):
        stages.ensure("01_generate", third)


def test_compared_rows_are_kept_and_folders_without_any_are_not(place):
    member = stages.members("05_compare", RunConfig(seed=1))[1].open()
    stages.ensure("05_compare", RunConfig(seed=2))
    assert not member.run.is_file()
    member.open().responses.write_text('{"task_id": "0"}\n')
    with pytest.raises(ValueError, match="seed was 1 and is now 2"):
        stages.check("05_compare", RunConfig(seed=2))


# -- released files, and where the runs go ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("reasoning_comparison_x.json", "[]", "reasoning_comparison_x.json"),
        ("layer_effects_x.pt", "nonsense", "layer_effects_x.pt"),
        ("notes.txt", "hello", "no released file"),
    ],
)
def test_a_bad_released_file_is_refused_first(place, capsys, name, content, words):
    (place / "released").mkdir()
    (place / "released" / name).write_text(content)
    published = str(place / "released")
    assert words in refused(capsys, "--model", "tiny-thinker", "--published", published)


def test_results_that_are_a_file_are_refused(place, capsys, monkeypatch):
    monkeypatch.undo()
    (place / "results").write_text("a file")
    line = refused(capsys, "--to", "01", "--results", str(place / "results"))
    assert "Not a directory" in line
    assert str(place / "results") in line


# -- devices -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_quantization_needs_its_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"'4bit' needs bitsandbytes: pip install"):
        configuration.hardware("auto", "4bit")
    with pytest.raises(ValueError, match="needs a CUDA device and device is 'cpu'"):
        configuration.hardware("cpu", "4bit")
    configuration.hardware("cuda", None)


# -- keys and annotators -------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["02_train_vectors", "04_steer", "05_compare"])
def test_a_notebook_opened_by_hand_is_refused_before_any_other_is_run(place, stage):
    with pytest.raises(preflight.Refused, match="OPENAI_API_KEY"):
        stages.ensure(stage, RunConfig(judge="openai:gpt-4.1"))
    nothing_began(place)
    preflight.check(RunConfig(judge="openai:gpt-4.1"), ["01_generate", "03_attribute_layers"])


# -- models --------------------------------------------------------------------------------


def test_a_folder_without_weights_is_refused_first(place, capsys):
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    line = refused(capsys, "--model", str(place / "model"))
    assert "has no weights (*.safetensors, *.bin)" in line
    nothing_began(place)


def test_one_model_may_stand_alone_where_it_has_other_notebooks_or_an_api(place, monkeypatch):
    monkeypatch.setattr(preflight, "model", lambda _: 0)
    preflight.check(RunConfig("smollm2"), ["05_compare"], asked=stages.STAGES)
    preflight.check(RunConfig("smollm2", compare=("tiny-instruct",)), ["05_compare"])
    preflight.check(RunConfig("tiny-thinker"), ["05_compare"])
    monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    monkeypatch.setattr(preflight, "hardware", lambda *_: pytest.fail("no device is used"))
    alone = RunConfig("gpt-4o", judge="lexical", quantization="8bit")
    preflight.check(alone, ["05_compare"])


# -- the disk ------------------------------------------------------------------------------

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"


def free(monkeypatch, size: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=size)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)


def test_a_disk_without_room_for_a_run_or_for_weights_is_refused_first(
    place, capsys, monkeypatch
):
    free(monkeypatch, 1 << 20)
    line = refused(capsys, "--profile", "smoke")
    assert f"0.2 GiB on the disk of {place / 'results'}, which has 0.0 GiB free" in line
    files = [("model.safetensors", 30 << 30), ("pytorch_model.bin", 31 << 30), ("x.txt", 9)]
    listed = [{"rfilename": name, "size": size} for name, size in files]
    info = ModelInfo(id="owner/model", siblings=listed)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    free(monkeypatch, 20 << 30)
    assert "may need 32.0 GiB" in refused(capsys, "--model", "owner/model")
    nothing_began(place)
    free(monkeypatch, 40 << 30)
    preflight.check(RunConfig("owner/model"), ["01_generate"])


def test_the_committed_run_fits_into_the_room_and_has_as_many_chains_as_are_counted(place):
    folder, config = REFERENCE / "tiny-thinker", RunConfig(n_sweep=0)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < preflight.ROOM < 100 * size
    for stage, name in (("01_generate", "responses"), ("04_steer", "steered")):
        (keys,) = preflight.rows(stage, config).values()
        assert len(keys) == (folder / f"{name}.jsonl").read_bytes().count(b"\n")


# -- the estimate: what is said is what is then written, sent and paid ----------------------

TASKS = [
    {"id": f"t{i}", "category": "own", "content": f"What is {i} plus {i + 1}?", "answer": "3"}
    for i in range(9)
]
SMALL = {
    "profile": "smoke",
    "n_samples": 5,
    "n_evaluate": 4,
    "n_compare": 6,
    "max_tokens": 12,
    "coefficients": (-1.0, 0.0, 0.5, 2.0),
    "random_directions": 3,
}


@pytest.fixture
def config(tmp_path, save_tiny_model, monkeypatch):
    """A run of a random model of four layers; nothing of it exists."""
    monkeypatch.delenv("STLLMS_RESULTS", raising=False)
    asked = tmp_path / "tasks.jsonl"
    asked.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    model = save_tiny_model(tmp_path / "tiny", "llama")
    return RunConfig(
        model=str(model), tasks=str(asked), results=str(tmp_path / "results"), **SMALL
    )


def work(name: str, config: RunConfig) -> Work:
    (found,) = preflight.works([(name, config)])
    return found


def lines(path) -> int:
    return len(path.read_text().splitlines())


def test_what_is_left_of_a_stopped_generation_is_what_is_then_written(config, tiny_llama):
    """Five chains of at most twelve tokens; two of them are there."""
    assert work("01_generate", config) == Work("01_generate", config.model, 5, 60)
    folder, asked = Folder(config).open(), tasks.select("build", **config.tasks_of("build"))
    store, options = folder.rows(folder.responses), config.decoding
    generate(tiny_llama, asked[:2], store=store, progress=False, **options)
    left = work("01_generate", config)
    assert (left.chains, left.tokens) == (3, 36)
    generate(tiny_llama, asked, store=store, progress=False, **options)
    assert lines(folder.responses) == 2 + left.chains
    assert work("01_generate", config).chains == 0


def some_vectors(model) -> SteeringVectors:
    """Directions of three behaviours; the fourth had too few spans."""
    torch.manual_seed(0)
    directions = torch.randn(3, model.n_layers, model.d_model)
    names = PAPER.targets[:3]
    return SteeringVectors(
        names,
        directions,
        directions,
        directions.mean(0),
        torch.full((3,), 30),
        unavailable={PAPER.targets[3]: 2},
    )


def test_steered_chains_and_the_sweep_are_as_many_as_estimated(config, tiny_llama, monkeypatch):
    config = RunConfig.from_dict({**config.to_dict(), "n_sweep": 2})
    before = work("04_steer", config)
    # 4 tasks x (plain + 4 behaviours x 3 + 3 controls x 4 layers x 3), 2 x (plain + 7 x 4 x 2)
    n = 4 * (1 + 12 + 36) + 2 * (1 + 56)
    assert (before.chains, before.tokens, before.at_most) == (n, 12 * n, True)
    folder, vectors = Folder(config).open(), some_vectors(tiny_llama)
    layers = dict(zip(PAPER.targets, (1, 2, 1, 2), strict=True))
    vectors.save(folder.vectors)
    names = ("shuffled:0", "covariance:0", "shuffled:1")
    controls = Controls(names, torch.randn(3, *vectors.overall.shape))
    controls.save(folder / "controls.safetensors")
    write_json(folder / "steering_layers.json", layers)
    monkeypatch.setattr(stages, "has_directions", lambda _: True)
    left = work("04_steer", config)
    found = steering.conditions(vectors, layers, config.settings.coefficients)
    found += steering.control_conditions(controls, layers, config.settings.coefficients)
    sweep = steering.sweep_conditions(vectors, config.settings.coefficients, controls)
    asked, options = tasks.select("evaluate", **config.tasks_of("evaluate")), config.decoding
    written = 0
    for name, some, every in (("steered", asked, found), ("sweep", asked[:2], sweep)):
        path = folder / f"{name}.jsonl"
        store = folder.rows(path, STEERED_KEY)
        steering.grid(tiny_llama, some, every, store=store, progress=False, **options)
        written += lines(path)
        assert work("04_steer", config).chains == left.chains - written
    assert written == left.chains == 4 * (1 + 9 + 18) + 2 * (1 + 6 * 4 * 2)


def test_controls_may_be_added_on_fewer_tasks_and_at_fewer_coefficients(config):
    whole = work("04_steer", config).chains
    fewer = replace(config, n_control=1, control_coefficients=(1.0,))
    assert work("04_steer", fewer).chains == whole - (4 * 36 - 1 * 12)


def test_labels_of_ones_own_have_as_many_directions_as_targets(config, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("labels: {a: {cues: [x]}, b: {cues: [y]}, c: {cues: [z]}}\ntargets: [a, c]")
    before = work("04_steer", RunConfig.from_dict({**config.to_dict(), "labels": str(path)}))
    # 4 tasks x (plain + 2 behaviours x 3 + 3 controls x 2 layers x 3)
    assert before.chains == 4 * (1 + 6 + 18)


# -- judges and APIs ---------------------------------------------------------------------------


@pytest.fixture
def prices(tmp_path, monkeypatch):
    table = {"currency": "EUR", "models": {"dear": {"input": 3.0, "output": 7.0}}}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(table))
    monkeypatch.setenv("STLLMS_PRICES", str(path))
    monkeypatch.delenv(api.OWN_SERVER, raising=False)


def with_judge(config: RunConfig, judge: str, **more) -> RunConfig:
    return RunConfig.from_dict({**config.to_dict(), "judge": judge, **more})


@pytest.mark.usefixtures("prices")
def test_a_judge_is_asked_once_a_chain_and_about_three_twice_and_paid_by_its_price(
    config, tmp_path
):
    call, again = work("02_train_vectors", with_judge(config, "openai:dear")).calls
    assert (call.calls, call.currency, again.calls) == (5, "EUR", 3)
    assert again.cost == pytest.approx(call.cost * 3 / 5)
    assert call.cost == pytest.approx((3 * call.tokens_in + 7 * call.tokens_out) / 1e6)
    longer_chains = with_judge(config, "openai:dear", max_tokens=112)
    longer = work("02_train_vectors", longer_chains).calls[0]
    assert longer.tokens_in - call.tokens_in == 5 * 100, "the chains, and the prompts around"
    (found,) = work("04_steer", with_judge(config, "openai:dear")).calls
    assert found.calls == work("04_steer", config).chains
    few = with_judge(config, "openai:dear", n_control=1)
    (found,) = work("04_steer", few).calls
    assert found.calls == work("04_steer", few).chains == 4 * (1 + 12) + 1 * 36
    assert work("02_train_vectors", config).calls == ()


@pytest.mark.usefixtures("prices")
def test_real_chains_cost_no_more_than_was_said(monkeypatch, tmp_path):
    """The committed chains of tiny-thinker against what is said before they are written."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path))
    config = RunConfig(judge="openai:dear")
    said, again = work("02_train_vectors", config).calls
    reference = RunConfig(results="results/reference").folder
    responses = read_responses(Rows(reference / "responses.jsonl", ("task_id",)))
    real = Judge("dear", folder=tmp_path / "none").estimate(responses)
    assert real.calls <= said.calls == 200
    assert again.calls == 200 / 20, "a twentieth of them is asked twice"
    assert 0.05 * said.cost < real.cost < said.cost


def store(folder: Path, model: str, **replies: Sequence[str]) -> None:
    """Stored replies: the status of each try, by the key of its request."""
    row = {"model": model, "name": "", "identity": {}, "about": {"pieces": 1}, "reason": "why"}
    with api.Store(folder).writing() as rows:
        for key, tries in replies.items():
            for status in tries:
                text = f'["deduction"]{key}["end-section"] 1 deduction'  # of both protocols
                text = text if status == "answered" else ""
                body = {"choices": [{"message": {"content": text}}]}
                rows.append({**row, "key": key, "status": status, "body": body})


def answer_again(config: RunConfig, model: str, chains: Sequence[Response]) -> None:
    """Stored replies of when the judge was asked about the chains a second time."""
    protocol = annotators.annotator(config.annotator, **config.annotating).protocol
    keys = [r.key(model) for one in chains for r in protocol.requests(one, again=True)]
    store(config.folder / "judge", model, **{key: ["answered"] for key in keys})


def chain(task: str, thinking: str | None = None) -> Response:
    text = f"I think {task}." if thinking is None else thinking
    return Response(task, "own", "p", (1,), (2,), text, text, 0, "", True, True)


@pytest.mark.usefixtures("prices", "place")
def test_what_a_judge_has_answered_or_labelled_is_not_paid_again_and_needs_no_key(config):
    config = with_judge(config, "openai:dear")
    folder, chains = Folder(config).open(), [chain(f"t{i}") for i in range(5)]
    folder.rows(folder.responses).append(map(to_row, chains))
    assert work("02_train_vectors", config).n_calls == 5 + 3
    protocol = annotators.annotator(config.annotator, **config.annotating).protocol
    (request,) = protocol.requests(chains[0])
    store(config.folder / "judge", "dear", **{request.key("dear"): ["answered"]})
    assert work("02_train_vectors", config).n_calls == 4 + 3
    answer_again(config, "dear", chains)
    assert work("02_train_vectors", config).n_calls == 4
    with pytest.raises(preflight.Refused, match="OPENAI_API_KEY"):
        preflight.check(config, ["02_train_vectors"])
    labels = [to_row(Annotation(one.task_id, config.annotator)) for one in chains[1:]]
    folder.rows(folder.annotations, annotators.KEY).append(labels)
    assert work("02_train_vectors", config) == Work("02_train_vectors", config.model)
    preflight.check(config, ["02_train_vectors"])
    with pytest.raises(preflight.Refused, match="OPENAI_API_KEY"):
        preflight.check(config, ["02_train_vectors", "04_steer"])


@pytest.mark.parametrize(
    ("judge", "replies", "thinking", "waiting"),
    [
        ("openai:m", ["failed"], None, 1),
        ("openai:m", ["unusable"], None, 1),
        ("openai:m", ["unusable"] * 2, None, 0),
        ("openai:m#indexed", ["unusable"] * 2, None, 0),
        ("openai:m", ["failed", "answered"], None, 0),
        ("openai:m", [], None, 1),
        ("openai:m", [], " ", 0),
        ("openai:other", ["unusable"] * 2, None, 1),
        ("replay", [], None, 0),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_stage_is_done_when_no_call_is_to_be_made_again(
    config, capsys, judge, replies, thinking, waiting
):
    stored = Path(config.results) / "stored"
    (request,) = protocol_of(judge.partition("#")[2] or "rewrite").requests(chain("t0"))
    store(stored, "m", **{request.key("m"): ["answered"]})
    config = with_judge(config, f"replay:{stored}" if judge == "replay" else judge)
    store(config.folder / "judge", "m", **{request.key("m"): replies})
    for stage in stages.STAGES[:2]:
        folder = stages.folder_of(stage, config).open()
        for name in stages.PROMISED[stage]:
            (folder / name).write_text("")
        rows = [chain("t0", thinking), *(chain(f"t{i}") for i in range(1, 5))]
        Rows(folder.responses).write(map(to_row, rows))
        if stage == "02_train_vectors":
            made = [Annotation(one.task_id, config.annotator) for one in rows]
            if judge != "replay":
                answer_again(config, judge.partition(":")[2].partition("#")[0], rows)
            made[0] = replace(made[0], failed="why")
            made.append(Annotation("t1", "lexical", failed="why"))
            Rows(folder.annotations, annotators.KEY).write(map(to_row, made))
        stages.finish(stage, config)
    said = capsys.readouterr().out
    assert ("1 calls to an API failed; the next run makes them again" in said) is bool(waiting)
    assert stages.failed("02_train_vectors", config) == waiting
    assert stages.has_run("02_train_vectors", config)
    assert len(stages.pending(["02_train_vectors"], config)) == waiting
    assert stages.pending(["02_train_vectors"], config, again=False) == []


@pytest.mark.usefixtures("prices")
def test_the_comparison_asks_a_model_behind_an_api_and_its_judge(config):
    config = with_judge(config, "openai:dear", compare=["api:dear"])
    own, other = preflight.works([("05_compare", config)])
    assert (own.chains, own.tokens, own.n_calls) == (6, 6 * 12, 6)
    assert (other.chains, other.tokens, other.n_calls) == (6, 0, 12)
    assert sum(call.tokens_out for call in other.calls) > 6 * 12
    member = stages.members("05_compare", config)[1]
    texts = remote.requests(
        member.config.entry,
        tasks.select("compare", **config.tasks_of("compare")),
        max_new_tokens=config.settings.max_tokens_compare,
        temperature=config.settings.temperature,
        style=config.prompts,
    )
    keys = [request.key("dear") for request in texts]
    tries = (["answered"], ["failed"], ["failed", "answered"])
    store(member.path / "api", "dear", **dict(zip(keys, tries, strict=False)))
    _, other = preflight.works([("05_compare", config)])
    assert [call.calls for call in other.calls] == [4, 2, 4], "texts, and labels of old and new"
    label = Annotation(texts[0].name, config.annotator)
    member.rows(member.annotations, annotators.KEY).append([to_row(label)])
    _, other = preflight.works([("05_compare", config)])
    assert [call.calls for call in other.calls] == [4, 1, 4]


# -- said -----------------------------------------------------------------------------------


def call(model, calls, cost, currency="USD") -> api.Estimate:
    return api.Estimate(model, calls, 0, 1000, 100, cost, currency)


def test_the_table_adds_up_and_says_what_nobody_knows():
    made = [
        Work("01_generate", "owner/name", 200, 51_200),
        Work("02_train_vectors", "owner/name", calls=(call("dear", 200, 1.5),)),
        Work("03_attribute_layers", "owner/name"),
        Work("04_steer", "owner/name", 1740, 445_440, True, (call("dear", 1740, 11.25),)),
        Work("05_compare", "x", 60, calls=(call("who", 60, None),)),
    ]
    assert preflight.table(made).splitlines() == [
        "01_generate name: 200 chains to write, at most 51,200 tokens",
        "02_train_vectors name: 200 calls to an API, at most 1.50 USD",
        "04_steer name: up to 1,740 chains to write, at most 445,440 tokens; "
        "up to 1,740 calls to an API, at most 11.25 USD",
        "05_compare x: 60 chains to write; 60 calls to an API, price of who unknown",
        "together: up to 2,000 chains to write, at most 496,640 tokens; "
        "up to 2,000 calls to an API, at most 12.75 USD, price of who unknown",
    ]
    assert preflight.table(made[:1]).splitlines()[-1] == "no calls to an API"


def test_a_notebook_opened_by_hand_says_what_it_will_do(config, capsys):
    stages.ensure("01_generate", config)
    said = "01_generate tiny: 5 chains to write, at most 60 tokens\nno calls to an API\n"
    assert capsys.readouterr().out == said
