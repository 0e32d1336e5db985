"""The directions that ship with the embedded model, and where others are from."""

from __future__ import annotations

import tomllib

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from stllms import pairs, registry
from stllms.config import RunConfig
from stllms.organism import directions
from stllms.vectors import SteeringVectors

BEHAVIOUR = "adding-knowledge"


def test_the_shipped_directions_are_of_the_shipped_weights():
    made = directions.load("tiny-thinker")
    assert made.config["weights"] == directions.weights("tiny-thinker")
    assert made.config["profile"] == "default"
    assert not made.unavailable


def test_the_layers_of_the_registry_are_those_of_the_shipped_sweep():
    swept = pd.read_csv(directions.sweep_file("tiny-thinker"))
    assert directions.best(swept) == registry.TINY_THINKER_LAYERS
    assert len(swept) == 4 * 6 * 2, "four behaviours, six layers, two signs"


@pytest.mark.parametrize("name", ["tiny-thinker", "tiny-instruct"])
def test_the_folder_of_an_embedded_model_has_one_set_of_weights(name):
    """As loaders see it that take every ``*.safetensors`` of a folder for weights: together the
    files hold each parameter once, and nothing else."""
    tensors: list[str] = []
    for path in (directions.HERE / name).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors += file.keys()
    hf, info = AutoModelForCausalLM.from_pretrained(
        directions.HERE / name, output_loading_info=True
    )
    assert len(tensors) == len(set(tensors))
    assert set(tensors) == {key for key, _ in hf.named_parameters()}, "tied heads are no file's"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_lies_beside_the_embedded_models_is_shipped():
    settings = tomllib.loads((registry.PACKAGE.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["stllms.organism"]
    shipped = {path for pattern in patterns for path in directions.HERE.glob(pattern)}
    assert {directions.file("tiny-thinker"), directions.sweep_file("tiny-thinker")} <= shipped
    assert directions.HERE / "tiny-thinker" / "model.safetensors" in shipped


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
    assert directions.best(swept) == {"backtracking": 2}


def test_directions_of_other_weights_are_refused(monkeypatch, tmp_path):
    folder = tmp_path / "tiny-thinker"
    folder.mkdir()
    made = directions.load("tiny-thinker")
    monkeypatch.setattr(directions, "HERE", tmp_path)
    made.save(directions.file("tiny-thinker"))
    (folder / "model.safetensors").write_bytes(b"retrained")
    with pytest.raises(ValueError, match="other weights"):
        directions.load("tiny-thinker")


def test_directions_are_made_by_one_command(tmp_path, capsys):
    path = tmp_path / "made.safetensors"
    directions.main(["--profile", "smoke", "--out", str(path), "--sweep", "4"])
    made = SteeringVectors.load(path)
    assert made.config["weights"] == directions.weights("tiny-thinker")
    assert made.config["responses"] == 16
    assert "deduction" in made.behaviours
    said = capsys.readouterr().out
    assert said.startswith("made.safetensors (")
    assert "made.csv: steer at" in said
    swept = pd.read_csv(tmp_path / "made.csv")
    assert set(swept["layer"]) == set(range(6))
    assert set(swept["n"]) <= set(range(5)), "four questions"
    with pytest.raises(SystemExit):
        directions.main(["--model", "smollm2"])


def test_directions_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    one, overall = torch.ones(1, 2, 8), torch.ones(2, 8)
    SteeringVectors((BEHAVIOUR,), one, one, overall, torch.tensor([10])).save(path)
    with pytest.raises(ValueError, match="of another model than tiny-thinker"):
        pairs.bench(RunConfig(device="cpu"), path)
