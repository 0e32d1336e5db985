"""Prompts, responses, resume: generation and steering share these."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch

from stllms import artifacts, generate, steering
from stllms.records import Task, to_row
from stllms.vectors import Controls

OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "seed": 1, "progress": False}


@pytest.fixture
def asked():
    return [Task(f"t{i}", "own", "What is " + "so " * i + "good?") for i in range(7)]


# -- steering --------------------------------------------------------------------------------


def test_steered_rows_equal_the_same_rows_alone(tiny_llama, asked):
    """Coefficient 0 is plain, and a mixed batch changes no row of it."""
    vector = torch.randn(tiny_llama.d_model, generator=torch.Generator().manual_seed(0))
    plain = generate.responses(tiny_llama, asked, **OPTIONS)
    zero = [steering.Intervention(vector, 1, 0.0)] * len(asked)
    assert steering.generate(tiny_llama, asked, zero, **OPTIONS) == plain
    strong = steering.Intervention(vector, 1, 3.0)
    edits = [None, strong, [strong]] * 2 + [None]
    mixed = steering.generate(tiny_llama, asked, edits, **OPTIONS)
    alone = steering.generate(tiny_llama, asked[1:2], [strong], **OPTIONS)
    assert mixed[0] == plain[0]
    assert mixed[1] == alone[0] != plain[1]
    with pytest.raises(ValueError, match="7 tasks but 1 interventions"):
        steering.generate(tiny_llama, asked, [None], **OPTIONS)


@pytest.fixture
def steering_vectors(tiny_llama):
    from stllms.vectors import SteeringVectors

    shape = (2, tiny_llama.n_layers, tiny_llama.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return SteeringVectors(
        ("deduction", "backtracking"),
        directions,
        directions,
        directions[0],
        torch.tensor([20, 30]),
        unavailable={"example-testing": 2},
    )


def test_arms_name_what_exists(steering_vectors):
    layers = {"backtracking": 2, "example-testing": 1}
    arms = steering.arms(steering_vectors, layers, (-1, 0, 1))
    assert [(a.direction, a.coefficient) for a in arms] == [
        ("none", 0.0),
        ("backtracking", -1.0),
        ("backtracking", 1.0),
    ]
    with pytest.raises(ValueError, match="no direction for 'dreaming'; there are: deduction"):
        steering.arms(steering_vectors, {"dreaming": 1}, (1,))
    with pytest.raises(ValueError, match="no layer 9 in the vectors; they have layers 0 to 3"):
        steering.arms(steering_vectors, {"backtracking": 9}, (1,))


def test_a_sweep_has_its_controls_at_every_layer(steering_vectors):
    controls = Controls(("shuffled:0", "covariance:0"), 2 * steering_vectors.directions)
    arms = steering.sweep_arms(steering_vectors, (-2, -1, 0, 1), controls)
    bare = steering.sweep_arms(steering_vectors, (-2, -1, 0, 1))
    added = [arm for arm in arms if arm.direction in controls.names]
    keys = [arm.key("t") for arm in arms if arm.direction not in controls.names]
    assert keys == [arm.key("t") for arm in bare]
    places = [(arm.direction, arm.layer, arm.coefficient) for arm in added]
    layers = range(steering_vectors.n_layers)
    assert sorted(places) == sorted(product(controls.names, layers, (-2.0, 1.0)))
    last = added[-1]
    row = controls.names.index(last.direction)
    assert torch.equal(last.intervention.direction, controls.directions[row, last.layer])


def test_a_grid_resumes_to_the_same_bytes(
    tiny_llama, asked, steering_vectors, tmp_path, monkeypatch
):
    monkeypatch.setattr(steering, "CHUNK", 2)
    arms = steering.arms(steering_vectors, {"backtracking": 2}, (-1, 0, 1))
    controls = Controls(("shuffled:0",), steering_vectors.directions[:1])
    arms += steering.control_arms(controls, {"backtracking": 2}, (1,))
    key = steering.STEERED_KEY
    whole = artifacts.Rows(tmp_path / "whole.jsonl", key)
    grid = steering.grid(tiny_llama, asked[:4], arms, store=whole, **OPTIONS)
    assert [one.key[:2] for one in grid[:4]] == [
        ("t0", "none"),
        ("t0", "backtracking"),
        ("t0", "backtracking"),
        ("t0", "shuffled:0"),
    ]
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 16
    for kept in (0, 3, 8, 13):
        cut = tiny.killed(whole, f"cut-{kept}.jsonl", b"".join(lines[:kept]))
        assert steering.grid(tiny_llama, asked[:4], arms, store=cut, **OPTIONS) == grid
        assert cut.path.read_bytes() == content
    monkeypatch.setattr(steering.decode, "run", None)
    assert steering.grid(tiny_llama, asked[:4], arms, store=whole, **OPTIONS) == grid


def test_a_store_takes_no_chains_that_are_steered_somewhere_only(
    tiny_llama, asked, steering_vectors, tmp_path
):
    arms = steering.arms(steering_vectors, {"backtracking": 2}, (1,), where="generated")
    store = artifacts.Rows(tmp_path / "rows.jsonl", steering.STEERED_KEY)
    with pytest.raises(ValueError, match="backtracking acts on generated tokens: a store"):
        steering.grid(tiny_llama, asked[:1], arms, store=store, **OPTIONS)
    assert len(steering.grid(tiny_llama, asked[:1], arms, **OPTIONS)) == len(arms)


def test_directions_of_another_model_are_refused_with_both_shapes(tiny_llama, steering_vectors):
    steering.check(steering_vectors, tiny_llama)
    fewer = replace(
        steering_vectors,
        directions=steering_vectors.directions[:, :3],
        means=steering_vectors.means[:, :3],
        overall=steering_vectors.overall[:3],
    )
    with pytest.raises(ValueError, match=r"\[3, 32\] are of another model .* \[4, 32\]"):
        steering.check(fewer, tiny_llama)


def test_rows_survive_the_file(tiny_llama, asked, steering_vectors):
    from stllms.records import steered_from_row

    arms = steering.arms(steering_vectors, {"backtracking": 2}, (1,))
    for one in steering.grid(tiny_llama, asked[:1], arms, **OPTIONS):
        assert steered_from_row(to_row(one)) == one
