"""Reuse by content: what rows were made from is changed one thing at a time, and noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from stllms.annotation.annotators import KEY, annotations
from stllms.config import RunConfig
from stllms.generation.chains import responses
from stllms.generation.likelihood import scores
from stllms.records import STEERED_KEY, Annotation, Task
from stllms.runs.artifacts import Folder
from stllms.runs.files import StaleArtefact
from stllms.steering.conditions import by_condition, conditions, grid
from stllms.vectors.directions import SteeringVectors

TASKS = [Task(f"t{number}", "any", f"What is {number} + 1?") for number in range(3)]
OPTIONS = {"max_new_tokens": 6, "temperature": 0.7, "seed": 0}


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(RunConfig(results=str(tmp_path / "results"))).open()


def written(folder: Folder, model, tasks=TASKS, **changes):
    """The responses of a run, from its store where it has them."""
    store = folder.rows(folder.responses)
    return responses(model, tasks, store=store, progress=False, **(OPTIONS | changes))


def one_weight(model):
    with torch.no_grad():
        model.hf.model.layers[2].mlp.up_proj.weight[5, 7] += 1e-3
    return model


def other_tokenizer(model):
    model.tokenizer.add_tokens(["word"])
    return model


def other_template(model):
    model.tokenizer.chat_template += " "
    return model


def other_dtype(model):
    return tiny.wrap(model.hf.double(), model.tokenizer, name="x")


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (one_weight, {}, "weights changed"),
        (other_tokenizer, {}, "tokenizer changed"),
        (other_template, {}, "chat template changed"),
        (other_dtype, {}, "dtype changed"),
        (None, {"seed": 1}, "seed changed, .* 1 now.*--fresh"),
        (None, {"temperature": 0.8}, "temperature changed, .* 0.8 now"),
        (None, {"max_new_tokens": 7}, "max_new_tokens changed, .* 7 now"),
        (None, {"style": "published"}, "task t0 answers another prompt"),
        (
            None,
            {"tasks": [replace(TASKS[0], content="Something else?"), *TASKS[1:]]},
            "task t0 answers another prompt",
        ),
    ],
)
def test_the_same_inputs_take_the_rows_up_and_a_change_is_noticed(
    folder, change, options, named
):
    model = tiny.model()
    first = written(folder, model)
    before = folder.responses.read_bytes()
    assert written(folder, tiny.model()) == first
    changed = change(model) if change else model  # in place: the very model that wrote them
    with pytest.raises(StaleArtefact, match=named):
        written(folder, changed, **options)
    assert folder.responses.read_bytes() == before


@pytest.fixture
def vectors():
    directions = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    return SteeringVectors(
        ("backtracking",), directions, directions, torch.ones(4, 32), torch.tensor([9])
    )


def steered(folder: Folder, model, vectors, coefficients=(1.0,)):
    chosen = conditions(vectors, {"backtracking": 2}, coefficients)
    store = folder.rows(folder.steered, STEERED_KEY)
    chains = grid(model, TASKS, chosen, store=store, progress=False, **OPTIONS)
    return chains, by_condition(chosen)


def test_coefficients_can_be_added_and_other_directions_of_that_name_are_noticed(
    folder, vectors
):
    first, _ = steered(folder, tiny.model(), vectors)
    both, _ = steered(folder, tiny.model(), vectors, (1.0, 2.0))
    assert [one for one in both if one.coefficient != 2.0] == first
    others = replace(vectors, directions=-3 * vectors.directions)
    with pytest.raises(StaleArtefact, match="direction of backtracking at layer 2"):
        steered(folder, tiny.model(), others)


def test_likelihoods_are_of_the_chains_and_directions_they_were_computed_from(folder, vectors):
    model = tiny.model()
    chains, chosen = steered(folder, model, vectors)
    store = folder.rows(folder / "likelihood.jsonl", STEERED_KEY)
    found = scores(model, chains, chosen, store=store, progress=False)
    assert scores(model, chains, chosen, store=store, progress=False) == found
    response = replace(chains[0].response, output_ids=chains[1].response.output_ids[::-1])
    others = [replace(chains[0], response=response), *chains[1:]]
    with pytest.raises(StaleArtefact, match=r"likelihood\.jsonl is of other chains"):
        scores(model, others, chosen, store=store, progress=False)
    doubled = {
        key: item and replace(item, direction=2 * item.direction)
        for key, item in chosen.items()
    }
    with pytest.raises(StaleArtefact, match="direction of backtracking at layer 2"):
        scores(model, chains, doubled, store=store, progress=False)


class Labels:
    """An annotator that counts what it is asked."""

    name = "labels"

    def __init__(self, fingerprint: str = "1") -> None:
        self.fingerprint, self.asked = fingerprint, 0

    def annotate(self, responses):
        self.asked += len(responses)
        return [Annotation(one.task_id, self.name) for one in responses]


def test_labels_of_other_chains_or_of_another_annotator_of_that_name_are_noticed(folder):
    chains = written(folder, tiny.model())
    store, labels = folder.rows(folder.annotations, KEY), Labels()
    first = annotations(labels, chains, store=store)
    assert annotations(labels, chains, store=store) == first
    assert labels.asked == len(TASKS)
    others = [replace(chains[0], thinking="another text"), *chains[1:]]
    with pytest.raises(StaleArtefact, match="labels another chain of task t0"):
        annotations(labels, others, store=store)
    with pytest.raises(StaleArtefact, match="annotator labels changed"):
        annotations(Labels("2"), chains, store=store)
