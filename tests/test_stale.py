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
from stllms.steering.conditions import grid
from stllms.vectors.directions import SteeringVectors

try:
    from stllms.steering.conditions import by_condition, conditions
except ImportError:  # until the words are changed there
    from stllms.steering.conditions import arms as conditions
    from stllms.steering.conditions import by_arm as by_condition

TASKS = [Task(f"t{number}", "any", f"What is {number} + 1?") for number in range(3)]
OPTIONS = {"max_new_tokens": 6, "temperature": 0.7, "seed": 0}


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(RunConfig(results=str(tmp_path / "results"))).open()


def written(folder: Folder, model, tasks=TASKS, **changes):
    """The responses of a run, from its store where it has them."""
    store = folder.rows(folder.responses)
    return responses(model, tasks, store=store, progress=False, **(OPTIONS | changes))


def test_the_same_inputs_take_the_rows_up(folder):
    first = written(folder, tiny.model())
    before = folder.responses.read_bytes()
    assert written(folder, tiny.model()) == first
    assert folder.responses.read_bytes() == before


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one_weight, "weights"),
        (other_tokenizer, "tokenizer"),
        (other_template, "chat template"),
        (lambda model: tiny.wrap(model.hf.double(), model.tokenizer, name="x"), "dtype"),
    ],
)
def test_another_model_is_noticed_by_what_changed(folder, change, named):
    written(folder, tiny.model())
    before = folder.responses.read_bytes()
    with pytest.raises(StaleArtefact, match=rf"responses\.jsonl is stale: {named} changed"):
        written(folder, change(tiny.model()))
    assert folder.responses.read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.8}, {"max_new_tokens": 7}])
def test_another_option_is_noticed(folder, change):
    written(folder, tiny.model())
    (name, value), *_ = change.items()
    with pytest.raises(StaleArtefact, match=rf"{name} changed, .*{value!r} now.*--fresh"):
        written(folder, tiny.model(), **change)


def test_another_question_or_prompt_style_is_noticed(folder):
    written(folder, tiny.model())
    asked = [replace(TASKS[0], content="Something else?"), *TASKS[1:]]
    with pytest.raises(StaleArtefact, match="task t0 answers another prompt"):
        written(folder, tiny.model(), asked)
    with pytest.raises(StaleArtefact, match="task t0 answers another prompt"):
        written(folder, tiny.model(), style="published")


def test_a_change_of_the_weights_in_place_is_noticed(folder):
    """By hand, in a notebook: the very model that wrote the first chains."""
    model = tiny.model()
    written(folder, model)
    one_weight(model)
    with pytest.raises(StaleArtefact, match="weights changed"):
        written(folder, model)


def test_rows_that_nothing_is_known_of_are_not_taken_up(folder):
    written(folder, tiny.model())
    with folder.recorded.edit() as content:
        del content["artefacts"]["responses.jsonl"]
    with pytest.raises(StaleArtefact, match="nothing is recorded"):
        written(folder, tiny.model())


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


def test_directions_times_minus_three_are_noticed(folder, vectors):
    """The names are equal; the content is not."""
    steered(folder, tiny.model(), vectors)
    others = replace(vectors, directions=-3 * vectors.directions)
    with pytest.raises(StaleArtefact, match="direction of backtracking at layer 2"):
        steered(folder, tiny.model(), others)


def test_coefficients_can_be_added_to_a_run(folder, vectors):
    first, _ = steered(folder, tiny.model(), vectors)
    both, _ = steered(folder, tiny.model(), vectors, (1.0, 2.0))
    assert [one for one in both if one.coefficient != 2.0] == first
    with pytest.raises(StaleArtefact, match="direction of backtracking"):
        steered(folder, tiny.model(), replace(vectors, directions=2 * vectors.directions))


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


def test_labels_of_other_chains_are_noticed(folder):
    chains = written(folder, tiny.model())
    store, labels = folder.rows(folder.annotations, KEY), Labels()
    first = annotations(labels, chains, store=store)
    assert annotations(labels, chains, store=store) == first
    assert labels.asked == len(TASKS)
    others = [replace(chains[0], thinking="another text"), *chains[1:]]
    with pytest.raises(StaleArtefact, match="labels another chain of task t0"):
        annotations(labels, others, store=store)


def test_labels_of_another_annotator_of_that_name_are_noticed(folder):
    """Other weights of the classifier, other stored replies."""
    chains = written(folder, tiny.model())
    store = folder.rows(folder.annotations, KEY)
    annotations(Labels(), chains, store=store)
    with pytest.raises(StaleArtefact, match="annotator labels changed"):
        annotations(Labels("2"), chains, store=store)
