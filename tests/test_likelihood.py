"""Likelihoods against a naive pass: one chain, one prefix, one token at a time, with hooks."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch

from stllms.generation import likelihood
from stllms.models.engines.interventions import Intervention
from stllms.records import STEERED_KEY, Steered, Task
from stllms.runs.store import Rows
from stllms.steering import conditions

TASKS = [Task(f"t{i}", "c", text) for i, text in enumerate(("one", "a longer one", "three"))]


@pytest.fixture(scope="module", params=sorted(tiny.KINDS))
def model(request):
    return tiny.model(request.param)


def interventions(model) -> dict[tuple, Intervention | None]:
    """By (direction, layer, coefficient, operation): plain, and every operation and place."""
    generator = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, model.d_model, generator=generator)
    edits = {
        "a": Intervention(v, 1, 2.0),
        "b": Intervention(v, 2, -1.5, "ablate", "generated"),
        "c": Intervention(w, 0, 3.0, "add", "thinking"),
    }
    steered = {(name, e.layer, e.coefficient, e.operation): e for name, e in edits.items()}
    return {("none", -1, 0.0, "add"): None, **steered}


def steer(model, tasks, every, **options) -> list[Steered]:
    pairs = [(task, key) for task in tasks for key in every]
    responses = conditions.generate(
        model, [task for task, _ in pairs], [every[key] for _, key in pairs],
        progress=False, **options,
    )  # fmt: skip
    return [
        Steered(task.id, *key, one) for (task, key), one in zip(pairs, responses, strict=True)
    ]


@pytest.fixture(scope="module")
def written(model) -> list[Steered]:
    every = interventions(model)
    return steer(model, TASKS, every, max_new_tokens=9, temperature=1.0)


@contextmanager
def steered(model, item: Intervention | None, prompt: int, ids: list[int]):
    """The intervention as a hook, its places written out in a loop."""

    def hook(_module, _args, output):
        output, ended = output.clone(), False
        for t, token in enumerate(ids):
            ended = ended or (t >= prompt and token == think)
            if item.where == "generated" and t < prompt:
                continue
            if item.where == "thinking" and (t < prompt or ended):
                continue
            v = item.direction
            if item.operation == "add":
                output[0, t] += item.coefficient * v
            else:
                u = v / v.norm()
                output[0, t] -= item.coefficient * (output[0, t] @ u) * u
        return output

    think = model.tokenizer.get_vocab()["</think>"]
    handle = None if item is None else model.layers[item.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def naive(model, one: Steered, item: Intervention | None) -> tuple[float, float]:
    prompt, output = list(one.response.prompt_ids), list(one.response.output_ids)
    kls, surprises = [], []
    for t, token in enumerate(output):
        ids = prompt + output[:t]
        logs = []
        for edit in (item, None):
            with steered(model, edit, len(prompt), ids):
                logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
            logs.append(logits.double().log_softmax(-1))
        kls.append(float((logs[0].exp() * (logs[0] - logs[1])).sum()))
        surprises.append(-float(logs[1][token]))
    return sum(kls) / len(kls), math.exp(sum(surprises) / len(surprises))


def test_kl_and_perplexity_equal_a_naive_pass_for_every_operation_and_place(model, written):
    every = interventions(model)
    found = likelihood.scores(model, written, every, progress=False)
    assert [tuple(row[k] for k in STEERED_KEY) for row in found] == [c.key for c in written]
    for row, one in zip(found, written, strict=True):
        kl, perplexity = naive(model, one, every[one.key[1:]])
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert row["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert (row["kl"] == 0) == (one.direction == "none")


def with_output(one: Steered, ids: tuple[int, ...]) -> Steered:
    return replace(one, response=replace(one.response, output_ids=ids))


def test_the_steered_thinking_ends_with_its_tag(model, written):
    """A written chain with the closing tag in its middle: later tokens are left alone."""
    tag = model.tokenizer.get_vocab()["</think>"]
    every = interventions(model)
    changed = with_output(written[3], (65, 66, tag, 67, 68))
    assert changed.direction == "c"
    (row,) = likelihood.scores(model, [changed], every, progress=False)
    kl, _ = naive(model, changed, every[changed.key[1:]])
    assert row["kl"] == pytest.approx(kl, rel=1e-3)


def test_batches_and_a_restart_change_nothing(model, written, tmp_path, monkeypatch):
    every = interventions(model)
    whole = Rows(tmp_path / "whole.jsonl", STEERED_KEY)
    monkeypatch.setattr(likelihood, "CHUNK", 5)
    likelihood.scores(model, written, every, store=whole, progress=False)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    again = tiny.killed(whole, "again.jsonl", b"".join(lines[:7]) + lines[7][:20])
    likelihood.scores(model, written, every, store=again, progress=False)
    assert again.path.read_text() == whole.path.read_text()
    for name in ("TOKENS", "LOGITS"):
        monkeypatch.setattr(likelihood, name, 1)  # every chain alone, every position alone
        alone = likelihood.scores(model, written, every, progress=False)
        for a, b in zip(alone, whole.load(), strict=True):
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-6)
            assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-4)


def test_a_vocabulary_too_large_for_a_batch_of_logits_does_not_shrink_the_batch(monkeypatch):
    """Twelve chains are one batch, two passes through the layers; the head sees few positions
    at a time, each of them once per pass, and no padding."""
    model = tiny.model("qwen2")
    every = interventions(model)
    chains = steer(model, TASKS, every, max_new_tokens=9)
    shapes: dict[str, list] = {"layer": [], "head": []}
    model.layers[0].register_forward_hook(lambda m, i, h: shapes["layer"].append(h.shape[:2]))
    model.hf.lm_head.register_forward_hook(lambda m, i, h: shapes["head"].append(h.shape[1]))
    monkeypatch.setattr(likelihood, "LOGITS", 5 * model.text_config.vocab_size)
    likelihood.scores(model, chains, every, progress=False)
    longest = max(len(one.response.prompt_ids + one.response.output_ids) for one in chains)
    assert shapes["layer"] == [(12, longest)] * 2
    assert max(shapes["head"]) == 5
    tokens = sum(len(one.response.output_ids) for one in chains)
    assert sum(shapes["head"]) == 2 * tokens


def test_a_chain_without_output_has_no_likelihood_and_hurts_no_other(model, written):
    every = interventions(model)
    both = likelihood.scores(
        model, [with_output(written[1], ()), written[2]], every, progress=False
    )
    assert (both[0]["kl"], both[0]["perplexity"]) == (None, None)
    (alone,) = likelihood.scores(model, [written[2]], every, progress=False)
    assert both[1]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


def test_an_unknown_condition_is_refused_by_name(written):
    plain = {("none", -1, 0.0, "add"): None}
    with pytest.raises(ValueError, match=r"conditions without an intervention: \('a', 1, 2.0"):
        likelihood.scores(None, written, plain, progress=False)
