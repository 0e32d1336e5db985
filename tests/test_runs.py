"""The folder of a run and its files: torn lines, resuming, atomic writing, equal bytes, whose
folder it is, who writes there, and every artefact damaged in turn."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import safetensors.torch
import torch

from stllms import hashes, registry
from stllms.config import RunConfig
from stllms.records import STEERED_KEY
from stllms.runs import artifacts, files
from stllms.runs.artifacts import ChangedConfiguration, Folder
from stllms.runs.files import BadFile, DamagedFile, LockedFolder, StaleArtefact
from stllms.runs.store import Rows, resumed
from stllms.terminal import Bar


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(results=str(tmp_path / "results"))


@pytest.fixture
def folder(config) -> Folder:
    return Folder(config).open()


# -- rows --------------------------------------------------------------------------------


def row(name: str, **more) -> dict:
    return {"task_id": name, "text": f"naïve “{name}”\u2028next", **more}


NAMES = [f"t{number}" for number in range(10)]
KEYS = [(name,) for name in NAMES]


class StoppedError(Exception):
    """A stage that was killed between two chunks."""


def work(path, *, stop_after: int | None = None) -> None:
    """What a stage does, in chunks of four."""
    made = []

    def make(_model, names, _tick) -> list[dict]:
        if len(made) == stop_after:
            raise StoppedError
        made.append(names)
        return [row(name) for name in names]

    with suppress(StoppedError):
        found = resumed(KEYS, NAMES, make, size=4, store=Rows(path))
        assert found == [row(name) for name in NAMES]


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", key=("task_id", "coefficient"))
    assert rows.load() == []
    first = [row("b", coefficient=1.0), row("b", coefficient=-1.0)]
    rows.append(first)
    rows.append([row("a", coefficient=0)])
    assert Rows(rows.path, rows.key).load() == [*first, row("a", coefficient=0)]
    assert list(rows.by_key()) == [("b", 1.0), ("b", -1.0), ("a", 0)]
    rows.write(first[1:])
    rows.append(first[:1])
    assert rows.load() == first[::-1]
    Rows(rows.path, rows.key).append([row("a", coefficient=0)])
    with pytest.raises(ValueError, match="there already"):
        rows.append([row("a", coefficient=0)])


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_killed_anywhere_and_resumed_equals_uninterrupted(tmp_path, cut):
    """A kill leaves some prefix of the bytes; whichever it is, the file ends the same."""
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    work(whole)
    content = whole.read_bytes()
    broken.write_bytes(content[: len(content) * cut // 200])
    work(broken)
    assert broken.read_bytes() == content


def test_stopped_between_chunks_and_resumed_equals_uninterrupted(tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    work(whole)
    work(broken, stop_after=1)
    assert len(Rows(broken).load()) == 4
    work(broken)
    assert broken.read_bytes() == whole.read_bytes()


def test_a_chunk_that_is_there_in_part_is_made_whole_and_only_its_missing_rows_are_added(
    tmp_path,
):
    """Rows of a chunk share batches, so all of them are made again to get the same ones."""
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append([row(name, old=True) for name in NAMES[:6]])
    made, bar = [], Bar(len(NAMES))

    def make(_model, names, tick):
        made.append(names)
        tick(0, len(names))
        return [row(name) for name in names]

    found = resumed(KEYS, NAMES, make, size=4, store=rows, bar=bar)
    assert made == [NAMES[4:8], NAMES[8:]]
    assert (bar.made, bar.done) == (6, 10)
    assert [bool(item.get("old")) for item in found] == [True] * 6 + [False] * 4
    assert rows.load() == found
    with pytest.raises(ValueError, match="shorter"):
        resumed(KEYS[:2], NAMES[:2], lambda *_: [row("t0")], size=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"task_id": "a"}\nnonsense\n', "line 2 is not JSON"),
        (b'{"task_id": "a"}\n[1]\n', "line 2 is not a JSON object"),
        (b'{"other": "a"}\n', "line 1 lacks task_id"),
        (b'{"task_id": "a"}\n{"task_id": "a"}\n', "line 2 repeats the key"),
        (b"\x00\x00\xff\n", "line 1 is not JSON"),
    ],
)
def test_a_broken_line_inside_is_an_error_with_its_number(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=words) as caught:
        Rows(path).load()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "bad", [{"text": "no key"}, row("a", value=float("nan")), row("there")]
)
def test_a_bad_row_writes_nothing_of_its_chunk(tmp_path, bad):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append([row("there")])
    before = rows.path.read_bytes()
    with pytest.raises(ValueError, match=r"lacks task_id|JSON compliant|there already"):
        rows.append([row("new"), bad])
    assert rows.path.read_bytes() == before
    assert list(rows.by_key()) == [("there",)]


# -- atomic and deterministic ------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})

    def broken() -> None:
        with files.replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        broken()
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["file.json"]


TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.int64)}
METADATA = {name: name for name in "qwertyuiopasdfgh"} | {"many": ["x", "ü"], "none": None}


def test_tensors_come_back_bit_exact_and_have_the_same_bytes_every_time(tmp_path):
    """The library orders metadata by a hash that differs from call to call."""
    paths = [tmp_path / "deep" / f"{number}.safetensors" for number in range(5)]
    for path in paths:
        files.save_tensors(path, TENSORS, METADATA)
    (content,) = {path.read_bytes() for path in paths}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(METADATA)
    tensors, metadata = files.load_tensors(paths[0])
    assert metadata == METADATA
    assert list(tensors) == ["a", "b"]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_tables_have_a_fixed_format(tmp_path):
    table = pd.DataFrame({"name": ["a", "b"], "value": [1 / 3, None], "n": [1, 2]})
    files.save_table(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_bytes() == b"name,value,n\na,0.33333333,1\nb,,2\n"
    back = files.load_table(tmp_path / "t.csv")
    assert list(back.columns) == ["name", "value", "n"]
    assert back["value"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (files.load_tensors, None),
        (files.load_tensors, b""),
        (files.load_tensors, b"nonsense"),
        (files.load_tensors, safetensors.torch.save({"a": TENSORS["a"]})[:-4]),
        (files.load_table, None),
        (files.load_table, b"\n\n"),
        (files.load_table, b"a,b\n1,2\n1,2,3\n"),
        (files.load_table, b"\xff\xfe\x00"),
        (files.read_json, None),
        (files.read_json, b""),
        (files.read_json, b'{"a": 1'),
        (files.read_json, b"\xff\xfe\x00"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, read, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFile, match=f"^{path}: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def drawn(folder):
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3], label="line")
    axes.set_title("title")
    files.save_figure(folder, "my_figure", figure, pd.DataFrame({"x": [1.0, 2.5]}))
    plt.close(figure)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_figures_are_three_files_without_dates_and_the_same_every_time(tmp_path):
    first, second = drawn(tmp_path / "a"), drawn(tmp_path / "b")
    assert list(first) == ["my_figure.csv", "my_figure.pdf", "my_figure.png"]
    assert first == second
    assert first["my_figure.png"].startswith(b"\x89PNG")
    assert b"Software" not in first["my_figure.png"]
    assert b"CreationDate" not in first["my_figure.pdf"]


# -- whose folder it is ------------------------------------------------------------------


def test_the_record_of_a_run_and_another_configuration_is_refused_with_both_values(config):
    own = RunConfig(results=config.results, seed=3, batch_size=5)
    folder = Folder(own).open()
    record = files.read_json(folder.run)
    assert (record["seed"], record["identity"]) == (3, own.identity())
    assert record["configuration"]["batch_size"] == 5
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert config.results not in folder.run.read_text()
    folder.note(device="cpu")
    assert Folder(own).record()["recorded"] == {"device": "cpu"}
    Folder(replace(own, device="cpu", batch_size=3, coefficients=[2])).open()
    with pytest.raises(ChangedConfiguration) as caught:
        Folder(replace(own, max_tokens=99, seed=1)).open()
    text = str(caught.value)
    for part in (
        "max_tokens was 256 and is now 99",
        "seed was 3 and is now 1",
        "--fresh",
        "results/tiny-thinker",
    ):
        assert part in text
    assert "n_build" not in text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_broken_record_is_named(config, content):
    folder = Folder(config)
    folder.path.mkdir(parents=True)
    folder.responses.write_text("")
    with pytest.raises(ChangedConfiguration, match=r"responses\.jsonl but no run\.json"):
        folder.open()
    folder.run.write_text(content)
    with pytest.raises(BadFile, match=r"run\.json"):
        folder.open()


def test_fresh_takes_only_what_was_written(folder):
    folder.rows(folder / "extra.jsonl").append([row("a")])
    folder.save_table(folder.steering, pd.DataFrame({"a": [1]}))
    folder.save_figure("bars", plt.figure(), pd.DataFrame({"a": [1]}))
    person, outside = folder.figures / "mine.png", folder.path.parent / "outside.txt"
    person.write_text("")
    outside.write_text("")
    record = folder.record()
    files.write_json(folder.run, {**record, "files": [*record["files"], "../outside.txt"]})
    bars = [f"figures/bars.{kind}" for kind in ("csv", "pdf", "png")]
    assert folder.fresh() == ["extra.jsonl", *bars, "run.json", "steering.csv"]
    left = [path.name for path in sorted(folder.path.rglob("*"))]
    assert [name for name in left if not name.endswith(".lock")] == ["figures", "mine.png"]
    assert outside.is_file()


def test_the_comparison_refuses_a_models_rows_and_not_other_models(config):
    Folder.comparison(config).open().member("tiny-instruct").open()
    changed = RunConfig(results=config.results, n_compare=3, compare=["smollm2"])
    other = Folder.comparison(changed).open()
    other.member("smollm2").open()
    with pytest.raises(ChangedConfiguration, match=r"comparison/tiny-instruct.*n_compare"):
        other.member("tiny-instruct").open()


def test_a_run_keeps_to_its_model_and_to_the_batch_that_fitted(folder, config):
    model = SimpleNamespace(
        device="cpu", dtype="float32", norms=(1.0,), remarks=("r",), identity={"weights": "w"},
        fits=1 << 30,
    )  # fmt: skip
    folder.made_with(model)
    noted = folder.record()["recorded"]
    assert noted == {"device": "cpu", "dtype": "float32", "norms": [1.0], "remarks": ["r"]}
    folder.note(batch_size=2)
    Folder(replace(config, batch_size=4)).made_with(model)
    assert model.fits == 1 << 30, "whoever asks for a size gets it"
    folder.made_with(model)
    assert model.fits == 2
    elsewhere = SimpleNamespace(**vars(model) | {"device": "cuda:0", "fits": 1 << 30})
    folder.made_with(elsewhere)
    assert elsewhere.fits == 1 << 30, "memory was short on another device"
    model.identity = {"weights": "other"}
    with pytest.raises(StaleArtefact, match="the weights of the model changed, 'w' when"):
        folder.made_with(model)


# -- whole or not --------------------------------------------------------------------------

#: Without what a run may lack; two of them are written by the tests.
ARTEFACTS = [
    name for name in files.ARTEFACTS if not name.startswith(("coll", "controls", "sweep"))
]
EVERY = (*ARTEFACTS, "figures/bars.png", "figures/bars.pdf", "figures/bars.csv")
ROWS = {
    "annotations.jsonl": ("task_id", "annotator"),
    "steered.jsonl": STEERED_KEY,
    "likelihood.jsonl": STEERED_KEY,
}


def rows_of(folder: Folder, name: str) -> Rows:
    return folder.rows(folder / name, ROWS.get(name, ("task_id",)))


def fill(folder: Folder) -> None:
    """A run with a little of everything, in the order in which stages write."""
    base = dict.fromkeys((*STEERED_KEY, "annotator"), "x")
    for name in ARTEFACTS:
        path = folder / name
        if path.suffix == ".jsonl":
            rows = rows_of(folder, name)
            rows.bind({})
            rows.append([{**base, "task_id": f"t{n}"} for n in range(5)])
        elif path.suffix == ".safetensors":
            files.save_tensors(path, {"values": torch.arange(64.0)}, {"name": name})
        elif path.suffix == ".json":
            files.write_json(path, {"backtracking": 3})
        else:
            folder.save_table(path, pd.DataFrame({"a": range(9)}))
    folder.save_figure("bars", plt.figure(), pd.DataFrame({"a": [1]}))
    plt.close("all")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A filled run, to be copied."""
    place = tmp_path_factory.mktemp("filled") / "results"
    folder = Folder(RunConfig(results=str(place))).open()
    fill(folder)
    return place


@pytest.fixture
def full(filled, config) -> Folder:
    shutil.copytree(filled, config.results)
    return Folder(config)


def bad(folder: Folder) -> dict[str, str]:
    return {one.artefact: one.said for one in artifacts.verify(folder.path) if not one.holds}


def read(folder: Folder, name: str):
    kind = (folder / name).suffix
    if kind == ".jsonl":
        return rows_of(folder, name).load()
    readers = {
        ".safetensors": files.load_tensors, ".json": files.read_json, ".csv": files.load_table,
    }  # fmt: skip
    return readers[kind](folder / name)


def test_a_run_that_is_whole_verifies(full):
    assert not bad(full)
    assert {*EVERY, "model"} <= {one.artefact for one in artifacts.verify(full.path)}
    with pytest.raises(BadFile, match="no run"):
        artifacts.verify(full.figures)


@pytest.mark.parametrize("name", EVERY)
def test_a_damaged_artefact_is_named_and_never_used(full, name):
    path = full / name
    content = path.read_bytes()
    middle = len(content) // 2
    cut = content.find(b"\n", middle) + 1 if path.suffix == ".jsonl" else middle
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    zeros = content[:middle] + bytes(20) + content[middle + 20 :]
    for damaged in (content[: cut or middle], flipped, zeros, b""):
        path.write_bytes(damaged)
        assert list(bad(full)) == [name]
        if path.suffix not in (".png", ".pdf"):
            with pytest.raises(DamagedFile, match=path.name):
                read(full, name)
        if path.suffix == ".jsonl":
            with pytest.raises(DamagedFile):
                rows_of(full, name).append([{"task_id": "new"}])
        assert path.read_bytes() == damaged


def test_the_rows_behind_the_record_were_appended_before_a_kill(folder):
    """The rows are on the disk before ``run.json`` says so."""
    folder.rows(folder.responses).append([{"task_id": "a"}])
    with folder.responses.open("ab") as file:
        file.write(b'{"task_id": "b"}\n{"task_id": "c", "te')
    assert bad(folder) == {"responses.jsonl": "2 rows, 1 were recorded"}
    assert [row["task_id"] for row in Rows(folder.responses).load()] == ["a", "b"]
    folder.rows(folder.responses).append([{"task_id": "d"}])
    assert [row["task_id"] for row in Rows(folder.responses).load()] == ["a", "b", "d"]
    assert not bad(folder)


def test_appending_reads_nothing_of_what_is_there_and_records_its_hash(folder, monkeypatch):
    """Else a run of many chunks would take quadratic time."""
    path, opened = folder.responses, []

    def watched(self, mode="r", *more, **options):
        if self == path:
            opened.append(mode)
        return plain(self, mode, *more, **options)

    plain = type(path).open
    rows, twice = folder.rows(path), folder.rows(path)
    rows.append([{"task_id": "a"}])
    monkeypatch.setattr(type(path), "open", watched)
    for name in "bcd":
        rows.append([{"task_id": name}])
        recorded = folder.record()["artefacts"][path.name]
        assert opened == ["ab"]
        opened.clear()
        assert recorded["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        opened.clear()
    twice.append([{"task_id": "e"}])
    assert "rb" in opened, "it has not seen the others"
    rows.append([{"task_id": "f"}])
    assert [row["task_id"] for row in Rows(path).load()] == [*"abcdef"]
    assert not bad(folder)


def test_a_kill_before_a_file_takes_its_place_leaves_the_old_one(folder):
    folder.save_table(folder.steering, pd.DataFrame({"a": [1]}))
    old = folder.steering.read_bytes()
    folder.save_table(folder.steering, pd.DataFrame({"a": [2]}))
    folder.steering.write_bytes(old)  # as if the second were recorded and never renamed
    assert files.load_table(folder.steering)["a"].tolist() == [1]
    assert not bad(folder)
    folder.steering.write_bytes(old.replace(b"1", b"3"))
    with pytest.raises(DamagedFile):
        files.load_table(folder.steering)
    files.remove(folder.steering)
    assert not bad(folder), "a file that is no longer needed is forgotten"


def test_files_left_out_of_a_copy_are_known_by_their_hash(full):
    names = ["steered.jsonl", "figures/bars.pdf"]
    for name in names:
        (full / name).unlink()
    assert {*bad(full)} == {*names}
    with full.recorded.edit() as content:
        content["left_out"] = names
    found = {one.artefact: one for one in artifacts.verify(full.path)}
    assert all(found[name].holds and "left out" in found[name].said for name in names)


def test_other_vectors_make_what_was_made_from_them_stale(full):
    made_from_them = {"layer_effects.safetensors", "steered.jsonl", "likelihood.jsonl"}
    old = full.vectors.read_bytes()
    files.save_tensors(full.vectors, {"values": -3 * torch.arange(64.0)}, {})
    assert {*bad(full)} == made_from_them
    assert full.recorded.stale("steered.jsonl") == "vectors.safetensors changed"
    full.vectors.write_bytes(old)
    assert files.load_tensors(full.vectors), "what is put back is the file of the record again"
    assert not bad(full)
    tensors, metadata = files.load_tensors(full.vectors)
    files.save_tensors(full.vectors, tensors, metadata)
    assert not bad(full), "the same content written again"
    files.save_tensors(full / "controls.safetensors", tensors, {})
    assert full.recorded.stale("steered.jsonl") == "controls.safetensors is new"


def test_a_stage_that_is_made_anew_takes_its_files_and_no_others(full):
    full.mark("03", {"key": "k"})
    names = ["figures/bars.png", "layer_effects.safetensors"]
    assert full.fresh_stages({"03": names}) == names
    assert full.marker("03") == {}
    assert not bad(full)


def test_what_rows_depend_on_is_recorded_and_another_value_refused(folder):
    store = folder.rows(folder.responses)
    store.bind({"seed": 0})
    store.append([row("a")])
    store.bind({"seed": 0, "added": 1})
    with pytest.raises(StaleArtefact, match=r"seed changed, 0 when .* 1 now\. --fresh"):
        folder.rows(folder.responses).bind({"seed": 1})
    assert folder.recorded.entry(folder.responses)["made_from"] == {"seed": 0, "added": 1}
    with folder.recorded.edit() as content:
        del content["artefacts"]["responses.jsonl"]
    with pytest.raises(StaleArtefact, match="nothing is recorded"):
        store.bind({"seed": 0})


# -- what a model is -----------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, save_tiny_model):
    return save_tiny_model(tmp_path / "copy")


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
def test_one_bit_in_the_middle_of_a_models_file_makes_another_model(copied, config, name, part):
    run = RunConfig(model=str(copied), results=config.results)
    fill(Folder(run).open())
    before = registry.content_of(run.entry)
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    after = registry.content_of(run.entry)
    assert [key for key in before if before[key] != after[key]] == [part]
    assert bad(Folder(run)) == {"model": f"changed since the run: {part}"}


def test_a_template_inside_the_tokenizers_configuration_counts_as_one(copied):
    (copied / "chat_template.jinja").unlink()
    settings = copied / "tokenizer_config.json"
    found = set()
    for template in ("one", "two"):
        files.write_json(settings, {**files.read_json(settings), "chat_template": template})
        found.add(registry.content_of(registry.resolve(str(copied)))["chat_template"])
    assert len(found) == 2
    settings.write_text("{")
    with pytest.raises(registry.UnknownModel, match=r"tokenizer_config\.json: not JSON"):
        registry.content_of(registry.resolve(str(copied)))


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, hashed, real = tmp_path / "weights.bin", [], hashes.file_hash
    path.write_bytes(bytes(hashes.LARGE + 1))
    monkeypatch.setattr(hashes, "file_hash", lambda p: hashed.append(p) or real(p))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [hashes.remembered_hash(path) for _ in range(3)] == [expected] * 3
    path.write_bytes(bytes(hashes.LARGE + 2))
    assert hashes.remembered_hash(path) != expected
    assert hashed == [path, path]


# -- who writes ----------------------------------------------------------------------------


def test_a_stage_has_one_writer_and_any_number_of_readers(folder, config):
    again = Folder(config)
    with folder.lock("01"):
        with pytest.raises(LockedFolder, match="in use by process"), again.lock("01"):
            """Somebody writes."""
        with pytest.raises(LockedFolder), again.lock("02", reading=["01"]):
            """Nobody reads what is being written."""
        with again.lock("05"):
            """Another stage is free."""
    with (
        folder.lock("03", reading=["01"]),
        again.lock("04", reading=["01"]),
        pytest.raises(LockedFolder),
        Folder(config).lock("01"),
    ):
        """Somebody reads it."""
    with folder.lock("01"):
        """Free again after the block."""


def test_two_processes_may_write_the_record_at_once(folder):
    """Each of them adds its own; a read and a write in between would lose some."""
    code = (
        "import sys\nfrom stllms.runs.files import Record\n"
        "for n in range(40):\n"
        "    with Record(sys.argv[1]).edit() as content:\n"
        "        content.setdefault('recorded', {})[f'{sys.argv[2]}{n}'] = n\n"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    children = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    assert len(folder.record()["recorded"]) == 80
