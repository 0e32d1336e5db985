"""The adapter of smol-thinker: how it is trained, and how it is merged."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from stllms import models, registry, tasks
from stllms.config import RunConfig
from stllms.generation.prompts import opening
from stllms.records import Task
from stllms.steering import Intervention, generate
from stllms.vectors import directions
from training import corpus

pytestmark = pytest.mark.skipif(
    bool(registry.missing_packages("smol-thinker")),
    reason="needs the extra smollm2",
)
FOLDER = registry.FIXTURES / "smol-thinker"


@pytest.fixture(scope="module")
def script():
    from training import smol_thinker

    return smol_thinker


@pytest.fixture(scope="module")
def base():
    return models.load("smollm2", device="cpu")


@pytest.fixture(scope="module")
def thinker():
    return models.load("smol-thinker", device="cpu")


@pytest.mark.slow
def test_the_merged_weights_are_base_plus_product(base, thinker):
    """By the formula of LoRA, without peft: W + alpha / r * B A."""
    from safetensors.torch import load_file

    settings = json.loads((FOLDER / "adapter_config.json").read_text())
    adapter = load_file(FOLDER / "adapter_model.safetensors")
    mine, theirs = thinker.hf.state_dict(), base.hf.state_dict()
    for layer, name in ((0, "self_attn.q_proj"), (13, "mlp.up_proj"), (29, "mlp.down_proj")):
        key = f"model.layers.{layer}.{name}"
        a, b = (adapter[f"base_model.model.{key}.lora_{x}.weight"].float() for x in "AB")
        expected = theirs[f"{key}.weight"] + settings["lora_alpha"] / settings["r"] * b @ a
        torch.testing.assert_close(mine[f"{key}.weight"], expected)
    same = "model.embed_tokens.weight"
    assert torch.equal(mine[same], theirs[same])
    assert len(mine) == len(theirs), "nothing of the adapter is left beside the weights"


@pytest.mark.slow
def test_the_prompt_is_that_of_the_training(base, thinker, script):
    text, ids = opening(thinker, Task("t", "", "Why?"))
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    row = {
        "question": "Why?",
        "segments": [{"label": "deduction", "text": "So."}],
        "answer": "A.",
    }
    one = script.encode(row, base.tokenizer)
    assert tuple(one.ids[: one.start]) == ids
    assert base.tokenizer.decode(one.ids[one.start :]) == "So.\n</think>\n\nA.<|im_end|>"
    assert "<think>" not in opening(base, Task("t", "", "Why?"))[0], "the base keeps its own"


@pytest.mark.slow
def test_every_token_of_a_segment_has_its_label(base, script):
    chain = corpus.read()[0]
    one = script.encode(chain, base.tokenizer)
    written = one.ids[one.start :]
    for segment in chain["segments"]:
        pieces = [
            base.tokenizer.decode([i])
            for i, label in zip(written, one.labels, strict=True)
            if label == segment["label"]
        ]
        assert segment["text"].replace(" ", "") in "".join(pieces).replace(" ", "")
    tail = [i for i, label in zip(written, one.labels, strict=True) if label == script.ANSWER]
    assert chain["answer"] in base.tokenizer.decode(tail)
    ids, targets = script.tensors([one, script.Example(one.ids[:5], 3, [])])
    assert (targets[0] != script.IGNORED).sum() == len(written)
    assert targets[1].tolist()[:5] == [script.IGNORED] * 3 + ids[1, 3:5].tolist()
    assert (targets[1, 5:] == script.IGNORED).all()


@pytest.mark.slow
def test_the_shipped_adapter_is_what_its_card_says(script):
    facts = json.loads((FOLDER / "training.json").read_text())
    found = json.loads((FOLDER / "card.json").read_text())
    assert script.page(FOLDER, found) == (FOLDER / "README.md").read_text("utf-8")
    numbers = found["smol-thinker"]
    assert facts["chains"] + facts["held"] == len(corpus.read())
    assert (FOLDER / "adapter_model.safetensors").stat().st_size < 12e6
    assert numbers["closed chains"] >= 0.85
    assert min(numbers["shares"]["offline"].values()) >= 0.04
    kept = [one for one in corpus.read() if not script.held_out(one)]
    assert len(kept) == facts["chains"]


@pytest.mark.slow
def test_a_resumed_training_equals_one_that_was_not_stopped(script, tmp_path, monkeypatch):
    chains = [
        {
            "task_id": f"t-{i:03d}",
            "question": "Why?",
            "segments": [{"label": label, "text": f"So {i}."} for label in corpus.LABELS],
            "answer": "Yes.",
        }
        for i in (1, 2, 3, 4)
    ]
    recipe = script.Recipe(rank=2, epochs=2, batch=1)
    whole = script.train(chains, recipe, tmp_path / "whole", device="cpu")
    taken = script._checkpoint

    def stop(*given):
        taken(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        script.train(chains, recipe, tmp_path / "cut", device="cpu", save=4)
    monkeypatch.setattr(script, "_checkpoint", taken)
    cut = script.train(chains, recipe, tmp_path / "cut", device="cpu")
    for name in ("adapter_model.safetensors", "held_out.csv", "loss.csv"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    with pytest.raises(ValueError, match=r"another recipe .rate"):
        script.train(chains, script.Recipe(2, epochs=2, batch=1, rate=1.0), cut, device="cpu")


def test_the_rate_rises_and_falls_to_nothing(script):
    rates = [script.rate(script.Recipe(warmup=0.1), step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01 / 0.9)
    assert rates.index(max(rates)) in (9, 10)


def test_a_missing_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "peft" else found(name, *a),
    )
    assert registry.missing_packages("smol-thinker") == ("peft",)
    assert registry.missing_packages("smollm2") == ()
    with pytest.raises(
        models.model.ModelError, match=r"'smol-thinker' lacks peft: pip install"
    ):
        models.load("smol-thinker")


@pytest.mark.slow
def test_the_pair_of_the_readme_is_written_again(thinker):
    """The words of both cells, from the model, the directions and the layer that ship."""
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    pair = page.split("<!-- pair -->")[1].split("<!-- /pair -->")[0]
    cells = re.search(r"^\| (.+) … \| (.+) … \|$", pair, re.M).groups()
    coefficient, behaviour = re.search(r"\| ([+-][.\d]+) (\S+) \|", pair).groups()
    (question,) = re.findall(r"^\*(.*)\*$", pair, re.M)
    (task,) = [one for one in tasks.load("evaluate") if one.content == question]
    layer = registry.MODELS["smol-thinker"].steering_layers[behaviour]
    direction = directions.load_shipped("smol-thinker").direction(behaviour, layer)
    push = Intervention(direction, layer, float(coefficient))
    config = RunConfig("smol-thinker", "laptop")
    found = generate(thinker, [task, task], [None, push], progress=False, **config.decoding)
    for cell, one in zip(cells, found, strict=True):
        words = re.sub(r"\*\*|\\", "", cell).split()
        assert one.thinking.split()[: len(words)] == words
        assert len(words) > 70
