"""A bare transformers model that is steered by hooks writes what our own loop writes."""

from __future__ import annotations

import pytest
import tiny
import torch

from stllms.generation import decode
from stllms.generation.interventions import Intervention, applied

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
