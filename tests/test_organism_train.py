"""The training script of the embedded models, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from stllms import models, prompts
from stllms.organism import families, grammar, train
from stllms.records import Task

STYLES = {"thinker": grammar.chain, "instruct": grammar.plain}

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
    noise_steps=(0, 2),
)


@pytest.fixture(scope="module")
def tokenizers():
    """The shipped tokenizers, one a style."""
    folder = Path(train.__file__).parent
    return {style: AutoTokenizer.from_pretrained(folder / f"tiny-{style}") for style in STYLES}


def rows_of(ids, targets, tokenizer):
    """(whole text, text that is learned) of every row of a batch."""
    for row, target in zip(ids, targets, strict=True):
        learned = target[target != train.IGNORED]
        yield tokenizer.decode(row), tokenizer.decode(learned), row, target


@pytest.mark.parametrize("style", STYLES)
def test_targets_cover_exactly_the_output_tokens(tokenizers, style):
    tokenizer = tokenizers[style]
    end = "</think>" if style == "thinker" else ""
    for ids, targets in train.batches(replace(TINY, style=style), tokenizer, 0)[:8]:
        for whole, learned, row, target in rows_of(ids, targets, tokenizer):
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
    model = models.wrap(
        train.build_model(recipe, tokenizers[style]), tokenizers[style], name=f"tiny-{style}"
    )
    rng = Random(7)
    for _ in range(20):
        chain = train.sample(rng, style)
        opened, written = train.encode(chain, style, tokenizers[style])
        text, ids = prompts.opening(model, Task("t", "c", chain.content))
        assert tuple(opened) == ids
        made = prompts.response(model, Task("t", "c", chain.content), (text, ids), written)
        assert made.finished
        assert made.closed
        assert grammar.read_answer(made.answer) == chain.puzzle.answer
        assert grammar.well_formed(made, thinker=style == "thinker")


def test_batches_are_a_function_of_recipe_and_chunk(tokenizers):
    tokenizer = tokenizers["thinker"]
    first, again = (train.batches(TINY, tokenizer, 1) for _ in range(2))
    assert len(first) == train.CHUNK_BATCHES
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    other = train.batches(TINY, tokenizer, 2)
    assert any(a[0].shape != b[0].shape for a, b in zip(first, other, strict=True))
    reseeded = train.batches(replace(TINY, seed=1), tokenizer, 1)
    assert any(a[0].shape != b[0].shape for a, b in zip(first, reseeded, strict=True))


def test_the_stream_goes_on_where_it_was_stopped(tokenizers):
    recipe = replace(TINY, cycles=(train.CHUNK_BATCHES + 3,))
    whole = list(train.stream(recipe, tokenizers["thinker"], 0))
    assert len(whole) == recipe.steps
    for start in (5, train.CHUNK_BATCHES, train.CHUNK_BATCHES + 2):
        rest = list(train.stream(recipe, tokenizers["thinker"], start))
        assert len(rest) == recipe.steps - start
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[start:], rest, strict=True))


def test_held_out_questions_are_never_drawn(monkeypatch):
    rng = Random(3)
    held_out = {grammar.part_of(families.draw(rng).question) for _ in range(100)}
    assert held_out == {"train", "build", "evaluate"}, "they would be, without the check"
    monkeypatch.setattr(grammar, "part_of", lambda q: "train" if "table" in q else "build")
    for style in STYLES:
        assert "table" in train.sample(rng, style).puzzle.question


def test_the_hook_of_the_noise_is_gone_after_an_exception(tokenizers):
    model = train.build_model(TINY, tokenizers["thinker"]).eval()
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with torch.no_grad():
        clean = model.model(input_ids=ids).last_hidden_state
        vectors = torch.zeros(2, 1, TINY.hidden)
        vectors[1, 0, 3] = 1.0
        with train.noise(model, 0, vectors):
            noisy = model.model(input_ids=ids).last_hidden_state
        with pytest.raises(RuntimeError, match="stop"), train.noise(model, 0, vectors):
            raise RuntimeError("stop")
        after = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(clean, after)
    assert torch.equal(clean[0], noisy[0]), "a row without a vector stays as it is"
    assert not torch.allclose(clean[1], noisy[1])
    assert not model.model.layers[0]._forward_hooks


def test_noise_vectors_have_the_share_and_the_length_of_the_recipe():
    generator = torch.Generator().manual_seed(0)
    lengths = train.random_vectors(4000, TINY, generator).norm(dim=-1).flatten()
    share = (lengths > 0).float().mean().item()
    assert share == pytest.approx(TINY.noise_share, abs=0.03)
    assert lengths.max() <= TINY.noise_scale
    assert lengths[lengths > 0].mean().item() == pytest.approx(TINY.noise_scale / 2, abs=0.03)


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    recipe = replace(TINY, cycles=(100,), warmup=10)
    assert train.rate(recipe, 0) == 0.1
    assert {train.rate(recipe, step) for step in range(9, 51)} == {1.0}
    assert train.rate(recipe, 75) == 0.5
    assert train.rate(recipe, 99) == pytest.approx(0.02)


def test_a_further_cycle_begins_at_a_half_and_falls_to_nothing():
    once = replace(TINY, cycles=(100,), warmup=10)
    twice = replace(once, cycles=(100, 140))
    assert twice.steps == 140
    assert [train.rate(twice, s) for s in range(100)] == [
        train.rate(once, s) for s in range(100)
    ]
    assert [train.rate(twice, s) for s in (100, 120, 139)] == pytest.approx([0.5, 0.25, 0.0125])


def prepared(folder: Path, tokenizers) -> Path:
    """A folder that has the tokenizer already: training one takes half a minute."""
    tokenizers["thinker"].save_pretrained(folder)
    return folder


def stopped_at(monkeypatch, step: int):
    real = train._step

    def once(model, steppers, recipe, now, *batch):
        if now == step:
            monkeypatch.setattr(train, "_step", real)
            raise KeyboardInterrupt
        return real(model, steppers, recipe, now, *batch)

    monkeypatch.setattr(train, "_step", once)


def test_a_resumed_training_run_equals_an_uninterrupted_one(tokenizers, tmp_path, monkeypatch):
    whole = prepared(tmp_path / "whole", tokenizers)
    parts = prepared(tmp_path / "parts", tokenizers)
    train.train(TINY, whole, save_every=1)
    stopped_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train.train(TINY, parts, save_every=1)
    assert not (parts / "model.safetensors").exists()
    train.train(TINY, parts, save_every=1)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, parts)]
    start = train.build_model(TINY, tokenizers["thinker"]).state_dict()
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
        if tensor.ndim == 2 and "embed" not in name:
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"
    assert states[0]["seen"] == states[1]["seen"] > 0
    weights = [(f / "model.safetensors").read_bytes() for f in (whole, parts)]
    assert weights[0] == weights[1]
    model = models.load(str(parts), device="cpu")
    assert (model.n_layers, model.d_model) == (TINY.layers, TINY.hidden)
    with pytest.raises(ValueError, match=r"another recipe \(batch differ\)"):
        train.train(replace(TINY, batch=3), parts)


def test_the_log_of_a_resumed_run_has_every_step_once(tokenizers, tmp_path, monkeypatch):
    recipe = replace(TINY, cycles=(21,), noise_steps=(0, 21))
    folder = prepared(tmp_path / "run", tokenizers)
    stopped_at(monkeypatch, 18)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, folder, save_every=8)
    train.train(recipe, folder, save_every=8)
    rows = (folder / "loss.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [10, 20]


@pytest.mark.parametrize("style", STYLES)
def test_the_command_line_trains_the_shipped_recipe(style, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(train, "train", lambda recipe, out, **_: asked.append(recipe) or out)
    train.main([style, "--out", str(tmp_path), "--device", "cpu"])
    train.main(
        [style, "--out", str(tmp_path), "--device", "cpu", "--steps", "7", "--seed", "3"]
    )
    shipped = train.RECIPES[style]
    assert asked == [shipped, replace(shipped, cycles=(7,), seed=3)]


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
