"""The estimate before a run: what it says must be what is then written, sent and paid."""

from __future__ import annotations

import json
import re

import pytest
import torch

from stllms import (
    api,
    artifacts,
    estimate,
    generate,
    pipeline,
    records,
    replies,
    steering,
    tasks,
)  # fmt: skip
from stllms.annotate import stage
from stllms.annotate.judge import Judge
from stllms.config import RunConfig
from stllms.files import Rows
from stllms.records import STEERED, STEERED_KEY, to_row
from stllms.vectors import Controls, SteeringVectors

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


def work(name: str, config: RunConfig) -> estimate.Work:
    (found,) = estimate.works([(name, config)])
    return found


def lines(path) -> int:
    return len(path.read_text().splitlines())


def test_what_is_left_of_a_stopped_generation_is_what_is_then_written(config, tiny_llama):
    """Five chains of at most twelve tokens; two of them are there."""
    assert work("01_generate", config) == estimate.Work("01_generate", config.model, 5, 60)
    folder, asked = artifacts.Folder(config).open(), tasks.for_run(config, "build")
    store, options = folder.rows(folder.responses), generate.options(config)
    generate.responses(tiny_llama, asked[:2], store=store, progress=False, **options)
    left = work("01_generate", config)
    assert (left.chains, left.tokens) == (3, 36)
    generate.responses(tiny_llama, asked, store=store, progress=False, **options)
    assert lines(folder.responses) == 2 + left.chains
    assert work("01_generate", config).chains == 0


def some_vectors(model) -> SteeringVectors:
    """Directions of three behaviours; the fourth had too few spans."""
    torch.manual_seed(0)
    directions = torch.randn(3, model.n_layers, model.d_model)
    names = STEERED[:3]
    return SteeringVectors(
        names,
        directions,
        directions,
        directions.mean(0),
        torch.full((3,), 30),
        unavailable={STEERED[3]: 2},
    )


def test_steered_chains_and_the_sweep_are_as_many_as_estimated(config, tiny_llama, monkeypatch):
    config = RunConfig.from_dict({**config.to_dict(), "n_sweep": 2})
    before = work("04_steer", config)
    # 4 tasks x (plain + 4 behaviours x 3 + 3 controls x 4 layers x 3), 2 x (plain + 7 x 4 x 2)
    assert (before.chains, before.at_most) == (4 * (1 + 12 + 36) + 2 * (1 + 56), True)
    assert before.tokens == 12 * before.chains

    folder, vectors = artifacts.Folder(config).open(), some_vectors(tiny_llama)
    layers = dict(zip(STEERED, (1, 2, 1, 2), strict=True))
    vectors.save(folder.vectors)
    names = ("shuffled:0", "covariance:0", "shuffled:1")
    controls = Controls(names, torch.randn(3, *vectors.overall.shape))
    controls.save(folder / "controls.safetensors")
    artifacts.write_json(folder / "steering_layers.json", layers)
    monkeypatch.setattr(pipeline, "has_run", lambda stage, config: stage < "04")
    left = work("04_steer", config)
    assert not left.at_most
    arms = steering.arms(vectors, layers, config.settings.coefficients)
    arms += steering.control_arms(controls, layers, config.settings.coefficients)
    sweep = steering.sweep_arms(vectors, config.settings.coefficients, controls)
    asked, options = tasks.for_run(config, "evaluate"), generate.options(config)
    written = 0
    for name, some, every in (("steered", asked, arms), ("sweep", asked[:2], sweep)):
        path = folder / f"{name}.jsonl"
        store = folder.rows(path, STEERED_KEY)
        steering.grid(tiny_llama, some, every, store=store, progress=False, **options)
        written += lines(path)
        left_now = work("04_steer", config)
        assert left_now.chains == left.chains - written
    assert written == left.chains == 4 * (1 + 9 + 18) + 2 * (1 + 6 * 4 * 2)


# -- judges and APIs ---------------------------------------------------------------------------


@pytest.fixture
def prices(tmp_path, monkeypatch):
    table = {"currency": "EUR", "models": {"dear": {"input": 3.0, "output": 7.0}}}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(table))
    monkeypatch.setenv("STLLMS_PRICES", str(path))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def judged(config: RunConfig, judge: str, **more) -> RunConfig:
    return RunConfig.from_dict({**config.to_dict(), "judge": judge, **more})


@pytest.mark.usefixtures("prices")
def test_a_judge_is_asked_once_a_chain_and_paid_by_its_price(config, tmp_path):
    (call,) = work("02_train_vectors", judged(config, "openai:dear")).calls
    assert (call.calls, call.currency) == (5, "EUR")
    assert call.cost == pytest.approx((3 * call.tokens_in + 7 * call.tokens_out) / 1e6)
    (longer,) = work("02_train_vectors", judged(config, "openai:dear", max_tokens=112)).calls
    assert longer.tokens_in - call.tokens_in == 5 * 100, "the chains, and the prompts around"
    (found,) = work("04_steer", judged(config, "openai:dear")).calls
    assert found.calls == work("04_steer", config).chains
    few = judged(config, "openai:dear", n_control=1)
    (found,) = work("04_steer", few).calls
    assert found.calls == work("04_steer", few).chains == 4 * (1 + 12) + 1 * 36
    assert work("02_train_vectors", config).calls == ()


@pytest.mark.usefixtures("prices")
def test_real_chains_cost_no_more_than_was_said(monkeypatch, tmp_path):
    """The committed chains of tiny-thinker against what is said before they are written."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path))
    config = RunConfig(judge="openai:dear")
    (said,) = work("02_train_vectors", config).calls
    reference = RunConfig(results="results/reference").folder
    responses = generate.read(Rows(reference / "responses.jsonl", ("task_id",)))
    real = Judge("dear", folder=tmp_path / "none").estimate(responses)
    assert real.calls <= said.calls == 200
    assert 0.05 * said.cost < real.cost < said.cost


@pytest.mark.usefixtures("prices")
def test_what_a_judge_has_answered_or_labelled_is_not_paid_again(config, tiny_llama):
    config = judged(config, "openai:dear")
    folder, asked = artifacts.Folder(config).open(), tasks.for_run(config, "build")
    options = generate.options(config)
    made = generate.responses(
        tiny_llama, asked, store=folder.rows(folder.responses), progress=False, **options
    )
    assert all(one.thinking.strip() for one in made)
    assert work("02_train_vectors", config).n_calls == 5
    judge = stage.for_run(config)
    (request,) = judge.protocol.requests(made[0])
    body = {"choices": [{"message": {"content": '["deduction"]x["end-section"]'}}]}
    with replies.Store(config.folder / "judge").writing() as store:
        key = request.key("dear")
        row = {"key": key, "status": "answered", "body": body, "name": "t0", "model": "dear"}
        store.append({**row, "identity": {}, "about": {}, "reason": None})
    assert work("02_train_vectors", config).n_calls == 4
    label = records.Annotation(made[1].task_id, config.annotator)
    folder.rows(folder.annotations, stage.KEY).append([to_row(label)])
    assert work("02_train_vectors", config).n_calls == 3


@pytest.mark.usefixtures("prices")
def test_the_comparison_asks_a_model_behind_an_api_and_its_judge(config):
    config = judged(config, "openai:dear", compare=["api:dear"])
    own, other = estimate.works([("05_compare", config)])
    assert (own.chains, own.tokens, own.n_calls) == (6, 6 * 12, 6)
    assert (other.chains, other.tokens, other.n_calls) == (6, 0, 12)
    (call,) = other.calls
    assert call.tokens_out > 6 * 12


# -- said -----------------------------------------------------------------------------------


def call(model, calls, cost, currency="USD") -> api.Estimate:
    return api.Estimate(model, calls, 0, 1000, 100, cost, currency)


def test_the_table_adds_up_and_says_what_nobody_knows():
    made = [
        estimate.Work("01_generate", "owner/name", 200, 51_200),
        estimate.Work("02_train_vectors", "owner/name", calls=(call("dear", 200, 1.5),)),
        estimate.Work(
            "04_steer", "owner/name", 1740, 445_440, True, (call("dear", 1740, 11.25),)
        ),
        estimate.Work("05_compare", "x", 60, calls=(call("who", 60, None),)),
    ]
    lines = estimate.table(made).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1, "the last column ends on the right"
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["to do", "chains", "tokens at most", "calls", "cost"],
        ["01_generate name", "200", "51,200", "-", "-"],
        ["02_train_vectors name", "-", "-", "200", "at most 1.50 USD"],
        ["04_steer name", "up to 1,740", "445,440", "up to 1,740", "at most 11.25 USD"],
        ["05_compare x", "60", "-", "60", "price of who unknown"],
        [
            "together", "up to 2,000", "496,640", "up to 2,000",
            "at most 12.75 USD, price of who unknown",
        ],
    ]  # fmt: skip
    assert estimate.table(made[:1]).splitlines()[-1] == "no calls to an API"


def test_a_notebook_opened_by_hand_has_a_line_of_its_own(config):
    assert estimate.line("01_generate", config) == (
        "01_generate: 5 chains to write, at most 60 tokens"
    )
    assert estimate.line("03_attribute_layers", config) == ""
    assert "5 calls to an API, price of who unknown" in estimate.line(
        "02_train_vectors", judged(config, "openai:who")
    )
