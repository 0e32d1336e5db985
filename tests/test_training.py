"""The scripts of training/: what they draw, resume and measure; they train for seconds."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import response
from transformers import AutoTokenizer

from stllms import registry
from stllms.annotation import offline, placing
from stllms.annotation.agreement import kappa
from stllms.annotation.annotators import annotator
from stllms.fixtures import grammar
from stllms.generation import prompts
from stllms.labels import PAPER
from stllms.models.loading import load
from stllms.models.model import wrap
from stllms.records import PlacedSegment, Task, to_row
from stllms.runs.files import BadFile
from stllms.vectors.directions import SteeringVectors, weights_of

pytest.importorskip("sklearn")
sys.path.insert(0, str(registry.PACKAGE.parent))

from training import chains, families
from training import directions as directions_script
from training import fixtures as train
from training import offline as offline_script

STYLES = {"thinker": chains.chain, "instruct": chains.plain}

TINY = train.Recipe(
    "thinker",
    cycles=(2,),
    batch=2,
    hidden=16,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=16,
    warmup=1,
)


@pytest.fixture(scope="module")
def tokenizers():
    """The shipped tokenizers, one a style."""
    return {
        style: AutoTokenizer.from_pretrained(registry.FIXTURES / f"tiny-{style}")
        for style in STYLES
    }


@pytest.mark.parametrize("style", STYLES)
def test_targets_cover_exactly_the_output_tokens(tokenizers, style):
    tokenizer = tokenizers[style]
    end = "</think>" if style == "thinker" else ""
    for ids, targets in train.batches(replace(TINY, style=style), tokenizer, 0)[:8]:
        for row, target in zip(ids, targets, strict=True):
            learned = tokenizer.decode(target[target != train.IGNORED])
            whole = tokenizer.decode(row)
            opened, _, written = whole.partition("<think>\n" if end else train.ASSISTANT)
            assert opened.startswith(train.BEGIN)
            stop = written.index(train.END) + len(train.END)
            assert learned == written[:stop]
            assert set(written[stop:].replace(train.END, "")) == set(), "only padding follows"
            at = (target != train.IGNORED).nonzero().flatten()
            assert (at.diff() == 1).all()
            assert torch.equal(target[at], row[at + 1]), "a target is the next token"


@pytest.mark.parametrize("style", STYLES)
def test_prompts_are_those_of_the_package(tokenizers, style):
    recipe = replace(TINY, style=style)
    model = wrap(
        train.build_model(recipe, tokenizers[style]), tokenizers[style], name=f"tiny-{style}"
    )
    rng = Random(7)
    for _ in range(20):
        chain = train.sample(rng, style)
        opened, written = train.encode(chain, style, tokenizers[style])
        text, ids = prompts.opening(model, Task("t", "c", chain.puzzle.question))
        assert tuple(opened) == ids
        made = prompts.response(
            model, Task("t", "c", chain.puzzle.question), (text, ids), written
        )
        assert made.finished
        assert made.closed
        assert grammar.read_answer(made.answer) == chain.puzzle.answer
        assert grammar.well_formed(made, thinker=style == "thinker")


def test_the_stream_is_a_function_of_the_recipe_and_goes_on_where_it_was_stopped(tokenizers):
    recipe = replace(TINY, cycles=(train.CHUNK_BATCHES + 3,))
    whole = list(train.stream(recipe, tokenizers["thinker"], 0))
    assert len(whole) == recipe.steps
    for start in (5, train.CHUNK_BATCHES, train.CHUNK_BATCHES + 2):
        rest = list(train.stream(recipe, tokenizers["thinker"], start))
        assert len(rest) == recipe.steps - start
        for one, two in zip(whole[start:], rest, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
    others = train.batches(recipe, tokenizers["thinker"], 1)[:3]
    others += train.batches(replace(recipe, seed=1), tokenizers["thinker"], 0)[:3]
    assert not any(torch.equal(a[0], b[0]) for a in whole[:3] for b in others)


def test_held_out_questions_are_never_drawn(monkeypatch):
    rng = Random(3)
    held_out = {chains.part_of(families.draw(rng).question) for _ in range(100)}
    assert held_out == {"train", "build", "evaluate"}, "they would be, without the check"
    monkeypatch.setattr(chains, "part_of", lambda q: "train" if "table" in q else "build")
    for style in STYLES:
        assert "table" in train.sample(rng, style).puzzle.question


def test_the_rate_warms_up_stays_falls_to_nothing_and_begins_again_at_a_half():
    once = replace(TINY, cycles=(100,), warmup=10)
    twice = replace(once, cycles=(100, 140))
    assert train.rate(once, 0) == 0.1
    assert {train.rate(once, step) for step in range(9, 51)} == {1.0}
    assert [train.rate(once, step) for step in (75, 99)] == pytest.approx([0.5, 0.02])
    assert all(train.rate(twice, step) == train.rate(once, step) for step in range(100))
    assert [train.rate(twice, s) for s in (100, 120, 139)] == pytest.approx([0.5, 0.25, 0.0125])
    assert twice.steps == 140


def test_a_resumed_training_run_equals_an_uninterrupted_one(tokenizers, tmp_path, monkeypatch):
    """Stopped at step 11, after the line of step 10 in the log, it goes on from step 8."""
    recipe, step = replace(TINY, cycles=(12,)), train._step

    def stopped(model, steppers, recipe, now, *batch):
        if now == 11:
            raise KeyboardInterrupt
        return step(model, steppers, recipe, now, *batch)

    whole, parts = folders = tmp_path / "whole", tmp_path / "parts"
    for folder in folders:  # the tokenizer is there: training one takes half a minute
        tokenizers["thinker"].save_pretrained(folder)
    train.train(recipe, whole, save_every=8)
    monkeypatch.setattr(train, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, parts, save_every=8)
    assert not (parts / "model.safetensors").exists()
    monkeypatch.setattr(train, "_step", step)
    train.train(recipe, parts, save_every=8)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in folders]
    start = train.build_model(TINY, tokenizers["thinker"]).state_dict()
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
        if tensor.ndim == 2 and "embed" not in name:
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"
    assert states[0]["seen"] == states[1]["seen"] > 0
    weights = [(f / "model.safetensors").read_bytes() for f in folders]
    assert weights[0] == weights[1]
    assert [pd.read_csv(f / "loss.csv")["step"].tolist() for f in folders] == [[10], [10]]
    model = load(str(parts), device="cpu")
    assert (model.n_layers, model.d_model) == (TINY.layers, TINY.hidden)
    with pytest.raises(ValueError, match=r"another recipe \(batch differ\)"):
        train.train(replace(recipe, batch=3), parts)


def test_the_tokenizer_recipe_has_single_digits_and_whole_tags(tokenizers):
    for style, tokenizer in tokenizers.items():
        ids = tokenizer("So 12 plus 34 is 46.", add_special_tokens=False)["input_ids"]
        pieces = [tokenizer.decode([i]) for i in ids]
        assert sum(piece.strip().isdigit() for piece in pieces) == 6, pieces
        assert len(tokenizer("</think>", add_special_tokens=False)["input_ids"]) == 1
        opened = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
        )
        assert opened.endswith("<think>\n") == (style == "thinker")


@pytest.mark.parametrize("style", STYLES)
def test_the_command_line_trains_the_shipped_recipe(style, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(train, "train", lambda recipe, out, **_: asked.append(recipe) or out)
    train.main(["train", style, "--out", str(tmp_path)])
    train.main(["train", style, "--out", str(tmp_path), "--steps", "7", "--seed", "3"])
    shipped = train.RECIPES[style]
    assert asked == [shipped, replace(shipped, cycles=(7,), seed=3)]


def test_a_card_has_the_numbers_of_its_model(tmp_path):
    folder = tmp_path / "tiny-thinker"
    shutil.copytree(registry.FIXTURES / "tiny-thinker", folder)
    (folder / "README.md").unlink()
    numbers = train.card(folder, "thinker", questions=4)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Measured on 4 held-out questions" in text
    assert f"| well-formed | {numbers['greedy']['well_formed']:.3f} |" in text
    assert json.loads((folder / "card.json").read_text())["questions"] == 4
    assert sum(numbers["sampled"]["shares"].values()) == pytest.approx(1)


# --- directions --------------------------------------------------------------------------


def test_the_layers_of_the_registry_are_those_of_the_shipped_sweep():
    swept = pd.read_csv(directions_script.SWEEP)
    assert directions_script.best(swept) == registry.TINY_THINKER_LAYERS
    assert len(swept) == 4 * 6 * 2, "four behaviours, six layers, two signs"


def test_the_best_layer_moves_both_ways_and_keeps_the_text():
    rows = [
        # layer, +1, -1, well-formed: plain is .2
        (0, 0.60, 0.20, 1.0),  # rises only
        (1, 0.30, 0.10, 1.0),
        (2, 0.35, 0.08, 1.0),
        (3, 0.90, 0.00, 0.5),  # breaks the text
        (4, 0.90, 0.00, 1.0),  # the last: left out by choice
    ]
    swept = pd.DataFrame(
        [
            ("backtracking", layer, sign, value, 0.2, whole)
            for layer, up, down, whole in rows
            for sign, value in ((1.0, up), (-1.0, down))
        ],
        columns=["behaviour", "layer", "coefficient", "value", "plain", "well-formed"],
    )
    assert directions_script.best(swept) == {"backtracking": 2}


@pytest.mark.slow
def test_directions_are_made_by_one_command(tmp_path, capsys):
    path = tmp_path / "made.safetensors"
    directions_script.main(["--profile", "smoke", "--out", str(path), "--sweep", "4"])
    made = SteeringVectors.load(path)
    assert made.config["weights"] == weights_of("tiny-thinker")
    assert (made.config["responses"], made.config["profile"]) == (16, "smoke")
    assert "deduction" in made.behaviours
    said = capsys.readouterr().out
    assert said.startswith("made.safetensors (")
    assert "made.csv: steer at" in said
    swept = pd.read_csv(tmp_path / "made.csv")
    assert set(swept["layer"]) == set(range(6))
    assert set(swept["n"]) <= set(range(5)), "four questions"


# --- the offline annotator ---------------------------------------------------------------


CUE = {
    "initializing": "Okay, so I need to find {}.",
    "deduction": "So it must be {}.",
    "adding-knowledge": "I remember that {} is known.",
    "example-testing": "For example, suppose {}.",
    "uncertainty-estimation": "I'm not sure about {}.",
    "backtracking": "Wait, no, {} is wrong.",
}


def released_file(path, seed):
    """A comparison file in the released format, every sentence with its cue."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(10):
        labels = ["initializing", *rng.choice(PAPER.names[1:], size=9)]
        parts = [CUE[label].format(f"x{rng.integers(99)}") for label in labels]
        marked = [f'["{a}"]{b}["end-section"]' for a, b in zip(labels, parts, strict=True)]
        rows.append(
            {"thinking_process": " ".join(parts), "annotated_response": "".join(marked)}
        )
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_training_learns_cues_and_writes_weights_and_card(tmp_path):
    files = [released_file(tmp_path / f"model{i}.json", i) for i in range(2)]
    out = tmp_path / "mine" / "own.npz"
    offline_script.main(["--data", *map(str, files), "--out", str(out)])
    numbers = json.loads((tmp_path / "mine" / "own_card.json").read_text(encoding="utf-8"))
    assert numbers["kappa"] > 0.8
    per_label = [row["sentences"] for row in numbers["per_label"].values()]
    assert numbers["sentences"] == sum(per_label) == 200
    low, high = numbers["kappa_interval"]
    assert low <= numbers["kappa"] <= high
    chain = offline_script.read_chains(files[0])[0]
    found = annotator("offline", weights=out).annotate([response(chain.text)])[0]
    labels = offline_script.sentence_labels(found, chain.text, chain.places)
    assert (labels == chain.truth).mean() >= 0.8


def test_the_shipped_card_is_the_page_of_its_numbers_and_reaches_the_target():
    stem = offline.WEIGHTS.with_name("offline_card")
    numbers = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert numbers["by_source"]["chains"]["kappa"] >= 0.60
    assert numbers["kappa"] > numbers["rules"]["kappa"] + 0.1
    assert set(numbers["trained_on"]) == {"chains.jsonl", "grammar"}, "no released chain"
    assert offline_script.page(numbers) == stem.with_suffix(".md").read_text(encoding="utf-8")
    assert numbers["trained_on"] == offline.Offline().classifier.metadata["trained_on"]
    table = np.array(numbers["confusion"])
    assert table.sum() == numbers["sentences"]
    assert kappa(table) == pytest.approx(numbers["kappa"], abs=1e-4)


@pytest.mark.parametrize("unseen", ["models", "questions"])
def test_held_out_predictions_know_not_the_question_nor_the_model(monkeypatch, unseen):
    """Every training set of the cross-validation is disjoint from its test rows in the
    question, and in the source too where models are to be unseen."""
    source, chain = np.repeat([0, 1], 50), np.repeat(np.arange(20), 5)
    question = np.tile(np.repeat(np.arange(10), 5), 2)
    seen = []

    class Stub:
        def probabilities(self, rows):
            return np.full((len(rows), 6), 1 / 6)

    monkeypatch.setattr(offline_script, "fit", lambda data: seen.append(data) or Stub())
    monkeypatch.setattr(offline_script, "as_features", lambda matrix: matrix)
    data = offline_script.Data(
        np.arange(100.0)[:, None], np.zeros(100, int), source, question, chain, np.ones(100)
    )
    assert np.isfinite(offline_script.cross_predict(data, unseen)).all()
    sources = (0, 1) if unseen == "models" else (None,)
    tests = [(s, f) for s in sources for f in range(5)]
    for used, (left_out, fold) in zip(seen, tests, strict=True):
        assert left_out is None or (used.source != left_out).all()
        assert (used.question % offline_script.FOLDS != fold).all()
        assert len(used.truth) == (80 if left_out is None else 40)


def test_chains_that_take_no_part_are_measured_with_the_finished_classifier(tmp_path):
    """Sentences with the cue of their label: a classifier trained on others of them knows all;
    with the labels turned round it knows none, and kappa falls below nothing."""
    files = [released_file(tmp_path / f"model{i}.json", i) for i in range(3)]
    rows = json.loads(files[2].read_text())
    turned = dict(zip(PAPER.names, PAPER.names[1:] + PAPER.names[:1], strict=True))
    for row in rows:
        parts = row["annotated_response"].split('["')
        row["annotated_response"] = '["'.join(
            turned[p.split('"]')[0]] + p[p.index('"]') :] if p.split('"]')[0] in turned else p
            for p in parts
        )
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(rows))
    out = tmp_path / "own"
    offline_script.main(
        [
            "--data",
            *map(str, files[:2]),
            "--out",
            str(out),
            "--measure",
            str(files[2]),
            str(wrong),
        ]
    )
    found = json.loads((out / "offline_card.json").read_text())["elsewhere"]
    assert (found["model2.json"]["chains"], found["model2.json"]["sentences"]) == (10, 100)
    assert found["model2.json"]["kappa"] > 0.8 > 0 > found["wrong.json"]["kappa"]
    assert "model2.json | 10 | 100" in (out / "offline_card.md").read_text()


def test_a_sentence_has_the_label_of_most_of_its_characters():
    text = "Go on now. Stay."
    parts = [
        PlacedSegment("deduction", "Go", 0, 2),
        PlacedSegment("backtracking", "on now.", 3, 10),
    ]
    one = placing.annotation(placing.place(parts, text), "t", "x")
    found = offline_script.sentence_labels(one, text, [(0, 10), (11, 16)])
    assert found.tolist() == [PAPER.names.index("backtracking"), -1]


def write_run(folder, responses, annotations, *more):
    for name, rows in (("responses", responses), ("annotations", annotations)):
        lines = [json.dumps(to_row(row)) for row in rows]
        lines += more if name == "annotations" else ()
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder / "annotations.jsonl"


def test_our_own_annotations_can_be_trained_on(tmp_path):
    chains = [response("Okay, go. Wait, no.", "a"), response("So be it.", "b")]
    chains.append(response("x", "c"))
    records = annotator("lexical").annotate(chains[:2])
    records.append(placing.failed("x", "c", "lexical", "timed out"))
    found = offline_script.read_chains(write_run(tmp_path, chains, records))
    assert [chain.question for chain in found] == ["a", "b"]
    assert [PAPER.names[i] for i in found[0].truth] == ["initializing", "backtracking"]


@pytest.mark.parametrize("line", ["null", "{}", '{"a":' * 2_500])
def test_files_that_hold_no_chains_are_named(tmp_path, line):
    path = tmp_path / "wrong.json"
    path.write_text('[{"text": "x"}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"wrong\.json: expected a list of chains"):
        offline_script.read_chains(path)
    chains = [response("Okay, go.")]
    path = write_run(tmp_path, chains, annotator("lexical").annotate(chains), line)
    with pytest.raises(BadFile, match=r"annotations\.jsonl: line 2"):
        offline_script.read_chains(path)


def test_saved_weights_come_back_within_their_eight_bits(tmp_path):
    model = offline.Offline().classifier
    offline_script.save(model, tmp_path / "again.npz")
    again = offline.Classifier.load(tmp_path / "again.npz")
    for name, array in model.arrays.items():
        step = np.abs(array).max(axis=0) / 127
        assert (np.abs(again.arrays[name] - array) <= step).all()
    assert (again.labels, again.correction) == (model.labels, model.correction)
