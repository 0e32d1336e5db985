"""A bare transformers model that is steered by hooks writes what our own loop writes."""

from __future__ import annotations

import pytest
import tiny
import torch

from stllms import registry, steering
from stllms.generation import likelihood
from stllms.generation.prompts import opening
from stllms.models.engines import transformers as decode
from stllms.models.engines.interventions import Intervention, applied
from stllms.records import Steered
from stllms.vectors.directions import SteeringVector

NEW = 24


def prompts(model):
    return [model.prompt_ids(text)[1] for text in ("Is 7 odd?", "Count the days of a week.")]


def push(model, layer=2, seed=1, coefficient=1.0, **options):
    torch.manual_seed(seed)
    return Intervention(torch.randn(model.d_model) * 3, layer, coefficient, **options)


def ours(model, rows):
    made = [
        decode.Row(ids, str(i), () if item is None else (item,))
        for i, (ids, item) in enumerate(rows)
    ]
    return [list(one.ids) for one in decode.run(model, made, max_new_tokens=NEW)]


def theirs(model, batch, interventions, **options):
    return generated(model, batch, applied(model.hf, interventions), **options)


def generated(model, batch, steered, **options):
    ids, mask, _ = model.left_pad(batch)
    with steered, torch.no_grad():
        out = model.hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=list(model.eos_ids),
            pad_token_id=model.pad_id,
            **options,
        )
    found = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((k for k, i in enumerate(row) if i in model.eos_ids), NEW)
        found.append(row[: end + 1])
    return found


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_generate_writes_token_for_token_what_the_package_writes(kind, operation):
    model = tiny.model(kind)
    item = push(model, operation=operation)
    batch = prompts(model)
    steered = theirs(model, batch, item)
    assert steered == ours(model, [(ids, item) for ids in batch])
    assert steered != ours(model, [(ids, None) for ids in batch])


def a_vector(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    directions = 3 * torch.randn(model.n_layers, model.d_model, generator=generator)
    return SteeringVector("mine", directions, torch.ones_like(directions), model.name)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_vector_applied_is_what_steering_generates(kind):
    model = tiny.model(kind)
    tasks, coefficients = tiny.TASKS[:3], [1.0, 0.0, -2.0]
    vector = a_vector(model)
    items = [steering.Intervention(vector.directions[2], 2, c) for c in coefficients]
    wanted = steering.generate(model, tasks, items, max_new_tokens=NEW, progress=False)
    batch = [opening(model, task)[1] for task in tasks]
    found = generated(model, batch, vector.applied(model.hf, layer=2, coefficient=coefficients))
    assert found == [list(one.output_ids) for one in wanted]
    plain = theirs(model, batch, [None] * 3)
    assert [a == b for a, b in zip(found, plain, strict=True)] == [False, True, False]
    one = generated(model, batch[:1], vector.applied(model.hf, layer=2))
    assert one == found[:1], "coefficient 1 unless said"


def test_the_hooks_of_a_vector_are_gone_after_an_error():
    model = tiny.model()
    vector = a_vector(model)
    with pytest.raises(RuntimeError, match="1 hook, mine"), vector.applied(model.hf, layer=1):
        raise RuntimeError(f"{len(model.layers[1]._forward_hooks)} hook, mine")
    assert not any(layer._forward_hooks for layer in model.layers)
    for bad, said in (
        ({"layer": 4}, "layer 4 is not in 0"),
        ({"layer": 1, "coefficient": []}, "no coefficient"),
        ({"layer": 1, "operation": "ad"}, "did you mean add"),
    ):
        with pytest.raises(ValueError, match=said):
            vector.applied(model.hf, **bad)


@pytest.fixture
def clamp():
    """An operator of a person's own: sets the projection to the coefficient. It does something
    at coefficient 0, and divides by zero for a row without a vector."""

    @registry.operator("clamp")
    def clamped(hidden, vector, coefficient):
        unit = vector / vector.norm(dim=-1, keepdim=True)
        return (coefficient - (hidden * unit).sum(-1, keepdim=True)) * unit

    yield "clamp"
    registry.operator._known.pop("clamp")


def test_an_operator_of_ones_own_acts_in_every_way_of_steering(clamp):
    model = tiny.model()
    vector = a_vector(model)
    unit = vector.at(2) / vector.at(2).norm()
    with vector.applied(model.hf, layer=2, coefficient=5.0, operation=clamp), torch.no_grad():
        kept = []
        handle = model.layers[3].register_forward_pre_hook(lambda _m, given: kept.append(given))
        model.hf(torch.tensor([prompts(model)[0]]))
        handle.remove()
    projected = kept[0][0][0] @ unit
    torch.testing.assert_close(projected, torch.full_like(projected, 5.0))
    batch = prompts(model)
    items = [push(model, operation=clamp, coefficient=5.0), None]
    assert theirs(model, batch, items) == ours(model, list(zip(batch, items, strict=True)))
    for coefficient in (0.0, 5.0):
        mine = push(model, operation=clamp, coefficient=coefficient)
        every = {("mine", 2, coefficient, clamp): mine, ("none", -1, 0.0, "add"): None}
        tasks = tiny.TASKS[:2]
        chains = steering.generate(model, tasks, [mine] * 2, max_new_tokens=NEW, progress=False)
        steered = [
            Steered(t.id, "mine", 2, coefficient, clamp, one)
            for t, one in zip(tasks, chains, strict=True)
        ]
        rows = likelihood.scores(model, steered, every, progress=False)
        assert all((row["kl"] > 1e-3) == bool(coefficient) for row in rows)


def test_an_operator_of_another_shape_is_refused():
    model = tiny.model()
    registry.operator("flat")(lambda hidden, vector, coefficient: vector)
    try:
        with pytest.raises(ValueError, match=r"operator 'flat' gave \(1, 1, 32\) for"):
            theirs(model, prompts(model)[:1], push(model, operation="flat"))
    finally:
        registry.operator._known.pop("flat")


def test_rows_have_interventions_of_their_own():
    model = tiny.model()
    batch = [prompts(model)[0]] * 4
    items = [None, push(model), push(model, layer=0, coefficient=-1.0), push(model, seed=2)]
    found = theirs(model, batch, items)
    assert found == ours(model, list(zip(batch, items, strict=True)))
    assert len(set(map(tuple, found))) == 4


def test_sequences_of_one_row_share_its_intervention():
    model = tiny.model()
    batch, items = prompts(model), [push(model), None]
    beams = theirs(model, batch, items, num_beams=2, num_return_sequences=1)
    alone = [
        theirs(model, [ids], item or [None], num_beams=2)[0]
        for ids, item in zip(batch, items, strict=True)
    ]
    assert beams == alone


def test_hooks_are_gone_after_the_block_and_after_an_error():
    model = tiny.model()
    batch = prompts(model)
    before = theirs(model, batch, [None, None])
    theirs(model, batch, push(model))
    with pytest.raises(RuntimeError, match="mine"), applied(model.hf, push(model)):
        raise RuntimeError("mine")
    assert not any(layer._forward_hooks for layer in model.layers)
    assert theirs(model, batch, [None, None]) == before


def test_what_a_model_has_no_place_for_is_refused():
    model = tiny.model()
    for item, said in (
        (push(model, layer=4), "layer 4 does not exist"),
        (Intervention(torch.ones(5), 0, 1.0), "width 5"),
        (push(model, where="generated"), "where='generated'"),
    ):
        with pytest.raises(ValueError, match=said), applied(model.hf, item):
            pass
    with pytest.raises(ValueError, match="3 interventions for a batch of 2 rows"):
        theirs(model, prompts(model), [None, None, push(model)])
    assert not any(layer._forward_hooks for layer in model.layers)


def test_half_precision_stays_half_precision():
    model = tiny.model()
    hf = tiny.hf_model().to(torch.bfloat16)
    ids = torch.tensor([prompts(model)[0]])
    with applied(hf, push(model)), torch.no_grad():
        assert hf(ids).logits.dtype == torch.bfloat16
