"""The registry, the profiles and ``RunConfig``: what is accepted, resolved and refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import re

import pytest
import yaml

from stllms import config, registry, tasks
from stllms.config import CHOICES, PROFILES, RunConfig
from stllms.labels import PAPER
from stllms.registry import MODELS, UnknownModel, resolve, slug

REFERENCE = pathlib.Path(__file__).parents[1] / "results" / "reference" / "tiny-thinker"

# -- the registry ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("R1-Distill-Qwen-1.5B", "r1-distill-qwen-1.5b"),
        ("deepseek-ai/deepseek-r1-distill-llama-8b", "r1-distill-llama-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
        ("tiny-thinker", "tiny-thinker"),
        ("GPT-4o", "gpt-4o"),
    ],
)
def test_a_model_is_found_by_name_and_by_hub_id_in_any_case(name, expected):
    assert resolve(name) is MODELS[expected]
    assert slug(name) == expected


def test_the_registry_has_every_model_of_the_paper_and_mutual_pairs():
    kinds = [(entry.kind, entry.source) for entry in MODELS.values() if entry.of_paper]
    assert kinds.count(("thinking", "hub")) == kinds.count(("instruct", "hub")) == 5
    assert [source for _, source in kinds].count("api") == 7 == len(kinds) - 10
    for entry in MODELS.values():
        if entry.pair:
            other = MODELS[entry.pair]
            assert other.pair == entry.name
            assert {entry.kind, other.kind} == {"thinking", "instruct"}


def test_published_steering_layers():
    """method, section 8, row by row in the order of the paper's figures."""
    rows = {
        "r1-distill-qwen-1.5b": [17, 18, 15, 18],
        "r1-distill-llama-8b": [12, 12, 12, 12],
        "r1-distill-qwen-14b": [29, 29, 29, 24],
    }
    for name, entry in MODELS.items():
        layers = entry.steering_layers
        if entry.source == "hub":
            assert (layers and [layers[label] for label in PAPER.targets]) == rows.get(name)


def test_any_hub_id_has_defaults():
    entry = resolve("Some-Owner/My.Model-7B")
    assert entry.name == "Some-Owner/My.Model-7B"
    assert (entry.kind, entry.source) == ("unknown", "hub")
    assert slug(entry.name) == "some-owner--my.model-7b"


def test_a_local_folder_needs_a_config_and_has_a_slug_of_its_own(tmp_path):
    first, second = tmp_path / "a" / "My Model", tmp_path / "b" / "My Model"
    for folder in (first, second):
        folder.mkdir(parents=True)
        with pytest.raises(UnknownModel, match=r"My Model holds no model.*config\.json"):
            resolve(str(folder))
        (folder / "config.json").write_text("{}")
    entry = resolve(str(first))
    assert (entry.source, entry.display, entry.name) == ("folder", "My Model", str(first))
    assert slug(str(first)).startswith("my-model-")
    assert slug(str(first)) == slug(str(tmp_path / "b/../a/My Model")) != slug(str(second))


@pytest.mark.parametrize(
    "name",
    ["does-not-exist", "", "/no/such/folder", "a/b/c", "./x", "a b", "llama-3.1-8b-instuct"],
)
def test_anything_else_is_unknown_and_close_names_are_offered(name):
    with pytest.raises(UnknownModel, match=re.escape(repr(name))) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    assert ("did you mean llama-3.1-8b-instruct" in str(caught.value)) == ("instuct" in name)


# -- values and what they resolve to -----------------------------------------------------


def test_profiles_are_those_of_the_design():
    rows = {
        name: (p.n_build, p.n_evaluate, p.max_tokens, p.temperature, p.random_directions)
        for name, p in PROFILES.items()
    }
    assert rows == {
        "smoke": (16, 8, 96, 0.65, 2),
        "default": (200, 60, 256, 0.65, 10),
        "laptop": (500, 50, 400, 0.6, 10),
        "full": (1000, 400, 256, 0.65, 20),
        "paper": (500, 50, 1000, 0.0, 10),
    }
    assert (PROFILES["paper"].n_compare, PROFILES["paper"].max_tokens_compare) == (100, 2000)


@pytest.mark.parametrize(
    ("own", "changed"),
    [
        ({"n_samples": 3, "temperature": 0.5}, {"n_build": 3, "temperature": 0.5}),
        ({"coefficients": [2, -1]}, {"coefficients": (-1.0, 2.0)}),
        ({"n_sweep": 3}, {"n_sweep": 3}),
        ({"max_tokens": 50}, {"max_tokens": 50, "max_tokens_compare": 50}),
        (
            {"max_tokens": 50, "max_tokens_compare": 70},
            {"max_tokens": 50, "max_tokens_compare": 70},
        ),
    ],
)
def test_own_values_replace_those_of_the_profile_and_no_others(own, changed):
    expected = dataclasses.replace(PROFILES["paper"], **changed)
    assert RunConfig(profile="paper", **own).settings == expected


def test_only_embedded_models_sweep_the_layers_without_being_told():
    assert RunConfig().settings.n_sweep == 20
    assert RunConfig(n_sweep=0).settings.n_sweep == 0
    assert RunConfig(model="smollm2").settings.n_sweep == 0
    assert RunConfig(model="smollm2", n_sweep=3).settings.n_sweep == 3


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("task_set", config.SIZES)
def test_every_profile_finds_its_tasks_in_messages(profile, task_set):
    setup = RunConfig(model="smollm2", profile=profile, tasks=task_set)
    full = len(tasks.load("evaluate" if task_set == "messages" else "checkable"))
    assert config.SIZES[task_set] == {"n_build": len(tasks.load("train")), "n_evaluate": full}
    asked = [setup.tasks_of(part)["n"] for part in ("build", "evaluate")]
    profiles = PROFILES[profile]
    assert asked == [min(profiles.n_build, 500), min(profiles.n_evaluate, full)]


@pytest.mark.parametrize(
    ("model", "judge", "annotator", "tasks", "models"),
    [
        ("tiny-thinker", "auto", "grammar", "grammar", ("tiny-thinker", "tiny-instruct")),
        ("tiny-instruct", "lexical", "lexical", "grammar", ("tiny-instruct", "tiny-thinker")),
        ("smollm2", "auto", "offline", "messages", ("smollm2",)),
        ("owner/name", "openai:gpt-4.1", "openai:gpt-4.1", "messages", ("owner/name",)),
    ],
)
def test_what_auto_means(model, judge, annotator, tasks, models, monkeypatch):
    monkeypatch.setattr(registry, "missing_packages", not_here)
    made = RunConfig(model=model, judge=judge)
    assert (made.annotator, made.task_set, made.models) == (annotator, tasks, models)


def not_here(name: str) -> tuple[str, ...]:
    """Nothing of the extra smollm2 is installed."""
    return ("gguf",) if name.startswith("smol") else ()


@pytest.mark.parametrize(
    ("options", "joins"),
    [
        ({}, True),
        ({"judge": "lexical"}, True),
        ({"judge": "grammar"}, False),
        ({"judge": "openai:gpt-4.1"}, False),
        ({"model": "owner/name"}, False),
        ({"compare": ("tiny-instruct",)}, False),
    ],
)
def test_smollm2_joins_an_embedded_model_where_it_is_installed(options, joins, monkeypatch):
    monkeypatch.setattr(registry, "missing_packages", lambda name: ())
    assert ("smollm2" in RunConfig(**options).models) == joins
    monkeypatch.setattr(registry, "missing_packages", not_here)
    assert "smollm2" not in RunConfig(**options).models


def test_a_model_that_ships_is_compared_with_its_pair(monkeypatch):
    monkeypatch.setattr(registry, "missing_packages", lambda name: ())
    assert RunConfig(model="smol-thinker").models == ("smol-thinker", "smollm2")
    assert RunConfig(model="smollm2").models == ("smollm2", "smol-thinker")
    monkeypatch.setattr(registry, "missing_packages", not_here)
    assert RunConfig(model="smollm2").models == ("smollm2",)


def test_compared_models_are_normalised_and_named_once():
    others = ["Qwen/Qwen2.5-14B-Instruct", "smollm2", "tiny-thinker", "SmolLM2"]
    made = RunConfig(compare=others)
    assert made.models == ("tiny-thinker", "qwen2.5-14b-instruct", "smollm2")


def test_where_results_go(monkeypatch, tmp_path):
    monkeypatch.delenv("STLLMS_RESULTS", raising=False)
    assert RunConfig().folder == registry.repository() / "results" / "tiny-thinker"
    monkeypatch.setattr(registry, "repository", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert RunConfig().folder == tmp_path / "results" / "tiny-thinker"
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "env"))
    assert RunConfig().results_folder == tmp_path / "env"
    assert RunConfig(results=tmp_path / "own").results_folder == tmp_path / "own"


# -- refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "nothing-like-it"}, "nothing-like-it"),
        ({"profile": "papr"}, "smoke, default, laptop, full, paper (did you mean paper?)"),
        ({"max_tokens": -1}, "-1, expected a whole number of at least 1"),
        ({"max_tokens": 0}, "0, expected"),
        ({"n_samples": 2.5}, "2.5, expected"),
        ({"n_evaluate": True}, "True, expected"),
        ({"batch_size": "8"}, "'8', expected"),
        ({"seed": None}, "None, expected"),
        ({"seed": -1}, "-1, expected"),
        ({"temperature": -0.1}, "-0.1, expected a number of at least 0"),
        ({"temperature": float("nan")}, "nan, expected"),
        ({"max_cost": "free"}, "'free', expected"),
        ({"coefficients": "1"}, "'1', expected a list of numbers"),
        ({"coefficients": [0]}, "[0.0], expected at least one that is not 0"),
        ({"coefficients": [float("inf")]}, "inf, expected a number"),
        ({"judge": "gpt-4.1"}, "'gpt-4.1', expected one of auto, grammar, lexical"),
        ({"judge": "lexicon"}, "did you mean lexical?"),
        ({"judge": "openai:"}, "openai:MODEL"),
        ({"judge": "grammar", "model": "smollm2"}, "not those of smollm2"),
        ({"device": "gpu"}, "'gpu', expected auto, cpu, mps, cuda[:N]"),
        ({"dtype": "fp8"}, "'fp8', expected"),
        ({"quantization": "2bit"}, "8bit"),
        ({"tasks": "no/such.jsonl"}, "'no/such.jsonl' is not a file"),
        ({"tasks": "gym:"}, "gym:NAME"),
        ({"tasks": "mesages"}, "did you mean messages?"),
        ({"results": " "}, "' ', expected"),
        ({"labels": "no/such.yaml"}, "cannot read no/such.yaml (No such file or directory)"),
        ({"prompts": "Q: {quesion}"}, "or a template with {question} in it"),
        ({"prompts": 3}, "3, expected one of sound"),
        ({"system": ""}, "'', expected a text"),
        ({"system": "Hi", "prompts": "raw"}, "no place for a system message"),
        ({"compare": "smollm2"}, "a list of models"),
        ({"folders": "results/x"}, "a list of folders"),
        ({"folders": ["results"]}, "results has no run.json"),
        *(({name: "x"}, ", ".join(values)) for name, values in CHOICES.items()),
    ],
)
def test_a_bad_value_is_refused_by_name(values, words):
    with pytest.raises(ValueError, match=next(iter(values))) as caught:
        RunConfig(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_refused_with_close_ones():
    with pytest.raises(ValueError, match=r"'n_sample' \(did you mean n_samples.*of model, "):
        RunConfig.from_dict({"n_sample": 3})
    with pytest.raises(ValueError, match="seed has a parameter of its own"):
        RunConfig.from_parameters("tiny-thinker", options={"seed": 3})
    with pytest.raises(ValueError, match="part of a run: 'train', expected one of build"):
        RunConfig().tasks_of("train")


# -- to and from plain values ------------------------------------------------------------

FULL = RunConfig(
    model="smollm2",
    profile="smoke",
    judge="lexical",
    seed=7,
    n_samples=5,
    max_tokens=40,
    temperature=0,
    coefficients=(-0.5, 1),
    compare=("tiny-thinker",),
    prompts="published",
    max_cost=2,
    results="somewhere",
)


@pytest.mark.parametrize("made", [RunConfig(), FULL])
def test_json_and_parameters_bring_everything_back(made):
    assert RunConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    parameters = json.loads(json.dumps(made.parameters()))
    assert tuple(parameters) == config.PARAMETERS
    back = RunConfig.from_parameters(**parameters)
    assert back.results_folder == made.results_folder
    assert dataclasses.replace(back, results=made.results) == made


def test_paths_reach_a_kernel_with_another_working_folder(monkeypatch, tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    (tmp_path / "mine.yaml").write_text(LABELS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(REFERENCE)
    made = RunConfig(
        tasks="mine.jsonl",
        judge="replay:stored",
        published="p",
        results="r",
        folders=["run"],
    )
    labelled = RunConfig(labels="mine.yaml").parameters()["options"]["labels"]
    assert labelled == str(tmp_path / "mine.yaml")
    cell = made.parameters()
    assert cell["results"] == str(tmp_path / "r")
    assert cell["judge"] == f"replay:{tmp_path / 'stored'}"
    assert cell["options"] == {
        "tasks": str(tmp_path / "mine.jsonl"),
        "published": str(tmp_path / "p"),
        "folders": [str(REFERENCE)],
    }


# -- what the stages take ------------------------------------------------------------------


def test_options_of_the_stages():
    made = RunConfig(model="smollm2", profile="smoke", seed=3, device="cpu", batch_size=2)
    assert made.loading == {
        "device": "cpu", "dtype": "auto", "quantization": None, "revision": None,
        "device_map": None, "engine": "transformers", "tensor_parallel": 1,
        "pipeline_parallel": 1, "workers": None, "ray": None,
    }  # fmt: skip
    assert made.decoding == {
        "max_new_tokens": 96, "batch_size": 2, "temperature": 0.65, "seed": 3, "style": "sound",
        "system": None,
    }  # fmt: skip
    assert made.tasks_of("compare") == {"source": "messages", "n": 8, "skip": 0, "seed": 3}
    assert (made.annotating, made.settings.n_control) == ({}, None)
    asked = RunConfig(prompts="Q: {question}", system="Be brief.").decoding
    assert (asked["style"], asked["system"]) == ("Q: {question}", "Be brief.")


def test_options_of_a_judge(tmp_path):
    place = {"model": "smollm2", "results": str(tmp_path)}
    paid = RunConfig(judge="openai:gpt-4.1", profile="paper", max_cost=2, **place)
    assert paid.annotating == {
        "base_url": None,
        "max_cost": 2.0,
        "folder": tmp_path / "smollm2" / "judge",
        "reader": "tolerant",
    }
    assert paid.settings.n_control == PROFILES["paper"].n_control == 10
    stored = RunConfig(judge="replay:x", reader="published", n_control=3, **place)
    assert (stored.annotating, stored.settings.n_control) == ({"reader": "published"}, 3)


def test_a_persons_tasks_are_cut_into_parts_and_count_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "mine.jsonl"
    path.write_text("one")
    made = RunConfig(tasks="~/mine.jsonl", n_samples=5, n_evaluate=4, n_compare=9)
    assert [made.tasks_of(part) for part in ("build", "evaluate", "compare")] == [
        {"source": str(path), "n": n, "skip": skip, "seed": 0}
        for n, skip in ((5, 0), (4, 5), (9, 0))
    ]
    first = made.identity()["tasks"]
    path.write_text("two")
    assert first.startswith("mine.jsonl:")
    assert made.identity()["tasks"] != first


def test_a_dataset_is_only_checked_by_its_form_and_counts_with_its_version(monkeypatch):
    made = RunConfig(tasks="gym:no_such_dataset")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.2")
    assert made.identity()["tasks"] == "gym:no_such_dataset (reasoning-gym 1.2)"

    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match="needs the package reasoning-gym: pip install"):
        made.identity()


# -- labels of one's own --------------------------------------------------------------------

LABELS = """
labels:
  planning: {definition: says what it will do, cues: [first, next]}
  doing: does it
targets: [planning]
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(LABELS)
    return str(path)


def test_labels_are_those_of_the_paper_or_of_a_file(own):
    assert RunConfig().label_set is PAPER
    assert not RunConfig().own_labels
    made = RunConfig(labels=own)
    assert (made.label_set.names, made.label_set.targets) == (
        ("planning", "doing"), ("planning",),
    )  # fmt: skip
    assert made.annotating == {"labels": made.label_set}
    paid = RunConfig(labels=own, judge="openai:gpt-4.1").annotating
    assert (paid["labels"], paid["reader"]) == (made.label_set, "tolerant")


def test_labels_count_by_their_content_and_not_by_their_file(own, tmp_path):
    first = RunConfig(labels=own).identity()
    assert "labels" not in RunConfig().identity()
    assert {"labels"} == {*first} - {*RunConfig().identity()}
    assert first["labels"].startswith("mine:")
    (tmp_path / "mine.yaml").write_text(f"# a remark\n{LABELS}")
    assert RunConfig(labels=own).identity() == first
    (tmp_path / "mine.yaml").write_text(LABELS.replace("does it", "does that"))
    assert RunConfig(labels=own).identity() != first
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(PAPER.to_dict(), sort_keys=False))
    assert RunConfig(labels=str(tmp_path / "paper.yaml")).identity() == RunConfig().identity()


@pytest.mark.parametrize("model", ["tiny-thinker", "smollm2"])
def test_who_labels_labels_of_ones_own(own, tmp_path, model):
    assert RunConfig(model, labels=own).annotator == RunConfig(model, labels=own).preview
    assert RunConfig(model, labels=own).annotator == "lexical"
    with pytest.raises(ValueError, match=r"judge: 'offline', expected lexical, offline:"):
        RunConfig(model, labels=own, judge="offline")
    (tmp_path / "mine.yaml").write_text("labels: {planning: says what it will do}")
    with pytest.raises(ValueError, match=r"mine\.yaml has no cues, by which .* lexical"):
        RunConfig(model, labels=own)
    assert RunConfig(model, labels=own, judge="openai:gpt-4.1").label_set.rest == ()


def test_the_released_files_have_the_papers_labels_alone(own):
    with pytest.raises(ValueError, match=r"published: 'x', expected nothing with labels of"):
        RunConfig(labels=own, published="x")


def test_a_registered_annotator_is_a_judge(monkeypatch):
    monkeypatch.setattr(registry, "annotator", registry.Registry("annotator"))
    registry.annotator("shouting")(object())
    assert RunConfig(judge="shouting").annotator == "shouting"
    assert RunConfig(judge="shouting:loud").annotator == "shouting:loud"
    with pytest.raises(ValueError, match=r"'shoutin', expected .*did you mean shouting"):
        RunConfig(judge="shoutin")


# -- identity ----------------------------------------------------------------------------

SAME = {
    "device": "cpu",
    "batch_size": 3,
    "dtype": "float32",
    "max_cost": 1.0,
    "published": "x",
    "coefficients": (2.0,),
    "random_directions": 1,
    "objective": "published",
    "compare": ("smollm2",),
    "folders": (str(REFERENCE),),
    "results": "elsewhere",
}
OTHER = {
    "model": "tiny-instruct",
    "seed": 1,
    "n_samples": 9,
    "n_evaluate": 9,
    "max_tokens": 9,
    "temperature": 0.0,
    "judge": "lexical",
    "prompts": "{question} Why?",
    "system": "Be brief.",
    "revision": "v2",
    "reader": "published",
    "tasks": "messages",
    "quantization": "8bit",
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_what_identifies_a_run_and_what_is_only_recorded_or_keyed(name):
    changed = RunConfig(**{name: {**SAME, **OTHER}[name]})
    assert (changed.identity() == RunConfig().identity()) == (name in SAME)


def test_the_run_of_today_is_the_committed_one():
    record = json.loads((REFERENCE / "run.json").read_text(encoding="utf-8"))
    assert RunConfig().identity() == record["identity"]


def test_profiles_of_equal_values_are_the_same_run():
    same = RunConfig(profile="default", n_samples=16, n_evaluate=8, max_tokens=96)
    assert same.identity() == RunConfig(profile="smoke").identity()


def test_the_comparison_has_an_identity_of_its_own():
    base = RunConfig().comparison_identity()
    assert RunConfig(n_samples=3, n_evaluate=3).comparison_identity() == base
    assert RunConfig(n_compare=3).comparison_identity() != base
    assert RunConfig().for_model("tiny-instruct").comparison_identity() != base


def test_a_classifier_of_ones_own_counts_by_its_content(own, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "weights.safetensors").write_text("1")
    monkeypatch.chdir(tmp_path)
    made = RunConfig(labels=own, judge="offline:mine")
    before = made.identity()["annotator"]
    assert before.startswith("offline:mine:")
    assert made.parameters()["judge"] == f"offline:{folder}"
    (folder / "weights.safetensors").write_text("2")
    assert made.identity()["annotator"] != before


def test_stored_replies_and_released_files_count_by_their_content(tmp_path):
    def named() -> tuple:
        made = RunConfig(judge=f"replay:{tmp_path}", published=str(tmp_path))
        return (
            made.identity()["annotator"],
            made.stage_options("03")["published"],
            made.stage_options("05")["published"],
        )

    before = named()
    for place, name in enumerate(("replies.jsonl", "layer_effects_x.pt", "comparison_x.json")):
        (tmp_path / name).write_text("1")
        after = named()
        assert [a != b for a, b in zip(before, after, strict=True)] == [
            place == n for n in range(3)
        ]
        before = after
