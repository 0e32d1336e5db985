"""Reuse by content: each input changed one at a time, each artefact truncated and flipped."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch

from stllms.runs.files import save_tensors
from stllms import (
    artifacts,
    cli,
    decode,
    generate,
    likelihood,
    pipeline,
    provenance,
    registry,
    steering,
)
from stllms.annotate import stage
from stllms.artifacts import DamagedFile, Folder, LockedFolder, Rows, StaleArtefact
from stllms.config import RunConfig
from stllms.records import STEERED_KEY, Annotation, Task
from stllms.vectors import SteeringVectors

TASKS = [Task(f"t{number}", "any", f"What is {number} + 1?") for number in range(3)]
OPTIONS = {"max_new_tokens": 6, "temperature": 0.7, "seed": 0}


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(results=str(tmp_path / "results"))


@pytest.fixture
def folder(config) -> Folder:
    return Folder(config).open()


# -- what responses are made from ----------------------------------------------------------


def written(folder: Folder, model, tasks=TASKS, **changes):
    """The responses of a run, from its store where it has them."""
    store = folder.rows(folder.responses)
    return generate.responses(model, tasks, store=store, progress=False, **(OPTIONS | changes))


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


def test_a_run_keeps_to_its_model(folder):
    folder.made_with(tiny.model().identity)
    folder.made_with(tiny.model().identity)
    with pytest.raises(StaleArtefact, match="the weights of the model changed"):
        folder.made_with(one_weight(tiny.model()).identity)


# -- what steered chains are made from -----------------------------------------------------


@pytest.fixture
def vectors():
    directions = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    return SteeringVectors(
        ("backtracking",), directions, directions, torch.ones(4, 32), torch.tensor([9])
    )


def steered(folder: Folder, model, vectors, coefficients=(1.0,)):
    conditions = steering.arms(vectors, {"backtracking": 2}, coefficients)
    store = folder.rows(folder.steered, STEERED_KEY)
    chains = steering.grid(model, TASKS, conditions, store=store, progress=False, **OPTIONS)
    return chains, steering.by_arm(conditions)


def test_directions_times_minus_three_are_noticed(folder, vectors):
    """Today's names are equal; the content is not."""
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
    chains, conditions = steered(folder, model, vectors)
    store = folder.rows(folder / "likelihood.jsonl", STEERED_KEY)
    found = likelihood.scores(model, chains, conditions, store=store, progress=False)
    assert likelihood.scores(model, chains, conditions, store=store, progress=False) == found
    response = replace(chains[0].response, output_ids=chains[1].response.output_ids[::-1])
    others = [replace(chains[0], response=response), *chains[1:]]
    with pytest.raises(StaleArtefact, match=r"likelihood\.jsonl is of other chains"):
        likelihood.scores(model, others, conditions, store=store, progress=False)
    doubled = {
        key: item and replace(item, direction=2 * item.direction)
        for key, item in conditions.items()
    }
    with pytest.raises(StaleArtefact, match="direction of backtracking at layer 2"):
        likelihood.scores(model, chains, doubled, store=store, progress=False)


def test_the_fingerprint_of_a_direction_is_a_hash_of_its_numbers(vectors):
    edit = decode.Intervention(vectors.directions[0, 2], 2, 1.0)
    other = decode.Intervention(vectors.directions[0, 2] * (1 + 1e-6), 2, 1.0)
    key = ("backtracking", 2, 1.0, "add")
    first, again, changed = (
        decode.fingerprints({key: one}) for one in (edit, replace(edit, coefficient=3.0), other)
    )
    assert first == again
    assert first != changed
    assert decode.fingerprints({("none", -1, 0.0, "add"): None}) == {}


# -- what labels are made from -------------------------------------------------------------


class Labels:
    """An annotator that counts what it is asked."""

    name = "labels"

    def __init__(self, fingerprint: str = "1") -> None:
        self.fingerprint, self.asked = fingerprint, 0

    def annotate(self, responses):
        self.asked += len(responses)
        return [Annotation(one.task_id, self.name) for one in responses]


def test_labels_of_other_chains_are_noticed(folder):
    responses = written(folder, tiny.model())
    store, labels = folder.rows(folder.annotations, stage.KEY), Labels()
    first = stage.annotations(labels, responses, store=store)
    assert stage.annotations(labels, responses, store=store) == first
    assert labels.asked == len(TASKS)
    others = [replace(responses[0], thinking="another text"), *responses[1:]]
    with pytest.raises(StaleArtefact, match="labels another chain of task t0"):
        stage.annotations(labels, others, store=store)


def test_labels_of_another_annotator_of_that_name_are_noticed(folder):
    """Other weights of the classifier, other stored replies."""
    responses = written(folder, tiny.model())
    store = folder.rows(folder.annotations, stage.KEY)
    stage.annotations(Labels(), responses, store=store)
    with pytest.raises(StaleArtefact, match="annotator labels changed"):
        stage.annotations(Labels("2"), responses, store=store)


def test_other_stored_replies_are_another_run(tmp_path):
    judged = tmp_path / "judge"
    judged.mkdir()
    (judged / "replies.jsonl").write_text("{}\n")
    config = RunConfig(judge=f"replay:{judged}")
    before = config.identity()["annotator"]
    (judged / "replies.jsonl").write_text("{} \n")
    assert config.identity()["annotator"] != before


def test_released_files_are_part_of_the_stages_that_show_them(tmp_path):
    (tmp_path / "reasoning_comparison_x.json").write_text("[1]")
    (tmp_path / "layer_effects_x.pt").write_text("1")
    config = RunConfig(published=str(tmp_path))
    three, five = config.stage_options("03"), config.stage_options("05")
    (tmp_path / "reasoning_comparison_x.json").write_text("[2]")
    assert config.stage_options("03") == three
    assert config.stage_options("05") != five
    (tmp_path / "layer_effects_x.pt").write_text("2")
    assert config.stage_options("03") != three


# -- what a model is -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"))


def flip(path, at: float = 0.5) -> None:
    """Turns one bit of a byte, in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.safetensors", "weights"),
        ("config.json", "weights"),
        ("generation_config.json", "weights"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat_template"),
    ],
)
def test_one_bit_in_the_middle_of_a_models_file_makes_another_model(
    saved, tmp_path, name, part
):
    folder = shutil.copytree(saved, tmp_path / "copy")
    before = registry.content_of(registry.resolve(str(folder)))
    flip(folder / name)
    after = registry.content_of(registry.resolve(str(folder)))
    changed = [key for key in before if before[key] != after[key]]
    assert changed == [part]


def test_a_template_inside_the_tokenizers_configuration_counts_as_one(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    found = []
    for template in ("one", "two"):
        text = json.dumps({**settings, "chat_template": template})
        (folder / "tokenizer_config.json").write_text(text)
        found.append(registry.content_of(registry.resolve(str(folder)))["chat_template"])
    assert found[0] != found[1]


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(provenance.LARGE + 1))
    hashed = []
    real = provenance.file_hash
    monkeypatch.setattr(
        provenance, "file_hash", lambda p, *rest: hashed.append(p) or real(p, *rest)
    )
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [provenance.remembered_hash(path) for _ in range(3)] == [expected] * 3
    assert hashed == [path]
    path.write_bytes(bytes(provenance.LARGE + 2))
    assert provenance.remembered_hash(path) != expected
    assert len(hashed) == 2


# -- whole or not --------------------------------------------------------------------------

NAMES = (
    "responses.jsonl", "annotations.jsonl", "vectors.safetensors", "layer_effects.safetensors",
    "steering_layers.json", "steered.jsonl", "likelihood.jsonl", "steering.csv",
    "figures/bars.png", "figures/bars.pdf", "figures/bars.csv",
)  # fmt: skip
ROWS = {
    "annotations.jsonl": stage.KEY,
    "steered.jsonl": STEERED_KEY,
    "likelihood.jsonl": STEERED_KEY,
}


def fill(folder: Folder) -> None:
    """A run with a little of everything, in the order in which stages write."""
    from matplotlib import pyplot as plt

    base = dict.fromkeys((*STEERED_KEY, "annotator"), "x")
    for name in NAMES[:8]:
        path = folder / name
        if path.suffix == ".jsonl":
            store = folder.rows(path, ROWS.get(name, ("task_id",)))
            store.append([{**base, "task_id": f"t{number}"} for number in range(5)])
        elif path.suffix == ".safetensors":
            save_tensors(path, {"values": torch.arange(64.0)}, {"name": name})
        elif path.suffix == ".json":
            artifacts.write_json(path, {"backtracking": 3})
        else:
            folder.save_table(path, pd.DataFrame({"a": range(9)}))
    folder.save_figure("bars", plt.figure(), pd.DataFrame({"a": [1]}))
    plt.close("all")


def read(folder: Folder, name: str):
    path = folder / name
    if path.suffix == ".jsonl":
        return Rows(path, ROWS.get(name, ("task_id",))).load()
    if path.suffix == ".safetensors":
        return artifacts.load_tensors(path)
    return artifacts.read_json(path) if path.suffix == ".json" else artifacts.load_table(path)


def test_a_run_that_is_whole_verifies(folder):
    fill(folder)
    found = artifacts.verify(folder.path)
    assert [one for one in found if not one.holds] == []
    assert {*NAMES, "model"} <= {one.artefact for one in found}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["halved", "flipped", "zeros", "emptied"])
def test_a_damaged_artefact_is_named_and_never_used(folder, name, damage):
    fill(folder)
    path = folder / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "halved":
        cut = content.find(b"\n", middle) + 1 if path.suffix == ".jsonl" else middle
        path.write_bytes(content[: cut or middle])
    elif damage == "flipped":
        flip(path)
    elif damage == "zeros":
        path.write_bytes(content[:middle] + bytes(20) + content[middle + 20 :])
    else:
        path.write_bytes(b"")
    bad = [one for one in artifacts.verify(folder.path) if not one.holds]
    assert [one.artefact for one in bad] == [name]
    if path.suffix not in (".png", ".pdf"):
        with pytest.raises(DamagedFile, match=path.name):
            read(folder, name)
    before = path.read_bytes()
    if path.suffix == ".jsonl":
        with pytest.raises(DamagedFile):
            folder.rows(path, ROWS.get(name, ("task_id",))).append([{"task_id": "new"}])
    assert path.read_bytes() == before


def test_the_rows_behind_the_record_were_appended_before_a_kill(folder):
    """The rows are on the disk before ``run.json`` says so."""
    store = folder.rows(folder.responses)
    store.append([{"task_id": "a"}])
    with folder.responses.open("ab") as file:
        file.write(b'{"task_id": "b"}\n{"task_id": "c", "te')
    assert [row["task_id"] for row in Rows(folder.responses).load()] == ["a", "b"]
    again = folder.rows(folder.responses)
    again.load()
    again.append([{"task_id": "d"}])
    assert [row["task_id"] for row in Rows(folder.responses).load()] == ["a", "b", "d"]
    assert all(one.holds for one in artifacts.verify(folder.path))


def test_a_kill_before_a_file_takes_its_place_leaves_the_old_one(folder):
    folder.save_table(folder.steering, pd.DataFrame({"a": [1]}))
    old = folder.steering.read_bytes()
    folder.save_table(folder.steering, pd.DataFrame({"a": [2]}))
    folder.steering.write_bytes(old)  # as if the second were recorded and never renamed
    assert artifacts.load_table(folder.steering)["a"].tolist() == [1]
    assert all(one.holds for one in artifacts.verify(folder.path))
    folder.steering.write_bytes(old.replace(b"1", b"3"))
    with pytest.raises(DamagedFile):
        artifacts.load_table(folder.steering)


def test_vectors_that_are_put_back_make_nothing_stale(folder, config):
    fill(folder)
    old = folder.vectors.read_bytes()
    save_tensors(folder.vectors, {"values": torch.zeros(64)}, {})
    with pytest.raises(StaleArtefact):
        pipeline.check("04_steer", config)
    folder.vectors.write_bytes(old)
    pipeline.check("04_steer", config)


def test_a_stage_refuses_a_damaged_artefact_that_it_reads(folder, config):
    fill(folder)
    flip(folder.vectors)
    for name in ("03_attribute_layers", "04_steer"):
        with pytest.raises(DamagedFile, match="vectors"):
            pipeline.check(name, config)
    pipeline.check("01_generate", config)


def test_the_command_says_what_does_not_hold(folder, capsys):
    fill(folder)
    assert cli.main(["verify", str(folder.path)]) == 0
    assert "none that does not hold" in capsys.readouterr().out
    (folder / "steered.jsonl").unlink()
    flip(folder.vectors)
    assert cli.main(["verify", str(folder.path.parent)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert [line.split()[1] for line in lines] == [
        "tiny-thinker/steered.jsonl:",
        "tiny-thinker/vectors.safetensors:",
    ]
    assert cli.main(["verify", str(folder.path / "figures")]) == 2


def test_a_file_that_is_done_with_is_forgotten(folder):
    fill(folder)
    save_tensors(folder.collecting, {"values": torch.ones(3)}, {})
    provenance.remove(folder.collecting)
    assert not folder.collecting.exists()
    assert [one for one in artifacts.verify(folder.path) if not one.holds] == []


def test_files_left_out_of_a_copy_are_known_by_their_hash(folder):
    fill(folder)
    names = ["steered.jsonl", "figures/bars.pdf"]
    for name in names:
        (folder / name).unlink()
    with folder.recorded.edit() as content:
        content["left_out"] = names
    found = {one.artefact: one for one in artifacts.verify(folder.path)}
    for name in names:
        assert found[name].holds
        assert "left out" in found[name].said


def test_another_model_under_the_name_does_not_verify(saved, tmp_path):
    model = shutil.copytree(saved, tmp_path / "model")
    config = RunConfig(model=str(model), results=str(tmp_path / "results"))
    fill(Folder(config).open())
    flip(model / "model.safetensors")
    bad = [one for one in artifacts.verify(config.results_folder) if not one.holds]
    assert [one.said for one in bad] == ["changed since the run: weights"]


# -- stale ---------------------------------------------------------------------------------


def test_other_vectors_make_what_was_made_from_them_stale(folder, config):
    fill(folder)
    for name in pipeline.STAGES[2:4]:
        pipeline.check(name, config)
    save_tensors(folder.vectors, {"values": -3 * torch.arange(64.0)}, {})
    for stage_name, name in (
        ("03_attribute_layers", "layer_effects.safetensors"),
        ("04_steer", "steered.jsonl"),
    ):
        message = f"{name} was made with other vectors: vectors.safetensors changed"
        with pytest.raises(StaleArtefact, match=message):
            pipeline.check(stage_name, config)
    bad = {one.artefact for one in artifacts.verify(folder.path) if not one.holds}
    assert bad == {"layer_effects.safetensors", "steered.jsonl", "likelihood.jsonl"}
    pipeline.check("02_train_vectors", config)


def test_the_same_vectors_written_again_make_nothing_stale(folder, config):
    fill(folder)
    values = {"values": torch.arange(64.0)}
    save_tensors(folder.vectors, values, {"name": "vectors.safetensors"})
    for name in pipeline.STAGES[:4]:
        pipeline.check(name, config)


def test_fresh_of_a_stage_takes_what_rests_on_it_and_nothing_before(folder, config):
    fill(folder)
    gone = pipeline.fresh("03_attribute_layers", config)
    assert gone == sorted([
        "layer_effects.safetensors", "likelihood.jsonl", "steered.jsonl", "steering.csv",
    ])  # fmt: skip
    assert folder.responses.is_file()
    assert folder.vectors.is_file()
    assert folder.run.is_file()
    assert [one for one in artifacts.verify(folder.path) if not one.holds] == []


# -- who writes ----------------------------------------------------------------------------

HOLD = """import sys
from stllms.runs.files import save_tensors
from stllms import pipeline
from stllms.config import RunConfig
config = RunConfig.from_dict({config})
pipeline.ensure("{stage}", config)
print("open", flush=True)
sys.stdin.read()
"""


def opened_elsewhere(stage_name: str, config: RunConfig) -> subprocess.Popen:
    """A notebook opened by hand in another process, as far as its first cell."""
    code = HOLD.format(config=config.to_dict(), stage=stage_name)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert "open" in (child.stdout.readline().strip() for _ in range(2))
    return child


def test_a_notebook_opened_by_hand_has_its_stage_to_itself(folder, config, monkeypatch):
    monkeypatch.delenv(pipeline.INSIDE, raising=False)
    child = opened_elsewhere("01_generate", config)
    try:
        with pytest.raises(LockedFolder, match=f"in use by process {child.pid}"):
            pipeline.ensure("01_generate", config)
        with pytest.raises(LockedFolder), folder.lock("02", reading=["01_generate"]):
            """Nobody reads what is being written."""
        with folder.lock("05_compare"):
            """Another stage is free."""
    finally:
        child.communicate("")
    pipeline.ensure("01_generate", config)
    pipeline.release(folder)


def test_two_may_read_what_neither_writes(folder):
    with folder.lock("03", reading=["01"]):
        with folder.lock("04", reading=["01"]):
            """Both read."""
        with pytest.raises(LockedFolder), folder.lock("01"):
            """Somebody reads it."""


def test_two_processes_may_write_the_record_at_once(folder):
    """Each of them adds its own; a read and a write in between would lose some."""
    code = (
        "import sys\nfrom stllms.provenance import Record\n"
        "for n in range(40):\n"
        "    with Record(sys.argv[1]).edit() as content:\n"
        "        content.setdefault('recorded', {})[f'{sys.argv[2]}{n}'] = n\n"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    children = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    assert len(folder.record()["recorded"]) == 80
