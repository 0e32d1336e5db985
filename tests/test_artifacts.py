"""Files: torn lines, resuming, atomic writing, equal bytes, whose folder it is."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from contextlib import suppress

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from stllms import artifacts, files, provenance, released
from stllms.artifacts import BadFile, ChangedConfiguration, Folder, Rows
from stllms.config import RunConfig

# -- rows --------------------------------------------------------------------------------


def row(name: str, **more) -> dict:
    return {"task_id": name, "text": f"naïve “{name}”\u2028next", **more}


NAMES = [f"t{number}" for number in range(10)]


class StoppedError(Exception):
    """A stage that was killed between two chunks."""


def work(path, *, chunk: int = 4, stop_after: int | None = None) -> list[tuple[int, int]]:
    """What a stage does; the chunks it had to make."""
    made = []

    def make(start: int, stop: int) -> list[dict]:
        if len(made) == stop_after:
            raise StoppedError
        made.append((start, stop))
        return [row(name) for name in NAMES[start:stop]]

    with suppress(StoppedError):
        keys = [(name,) for name in NAMES]
        rows = files.resumed(keys, make, size=chunk, store=Rows(path))
        assert rows == [row(name) for name in NAMES]
    return made


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.load() == []
    rows.append([row("b"), row("a")])
    rows.append([row("c")])
    assert [item["task_id"] for item in rows.load()] == ["b", "a", "c"]
    assert Rows(rows.path).load() == [row("b"), row("a"), row("c")]


def test_a_key_may_have_several_fields(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", key=("task_id", "coefficient"))
    rows.append([row("a", coefficient=1.0), row("a", coefficient=-1.0)])
    assert list(rows.by_key()) == [("a", 1.0), ("a", -1.0)]


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
    keys = [(name,) for name in NAMES]
    made, skipped = [], []

    def make(start, stop):
        made.append((start, stop))
        return [row(name) for name in NAMES[start:stop]]

    found = files.resumed(keys, make, size=4, store=rows, skip=skipped.append)
    assert (made, skipped) == ([(4, 8), (8, 10)], [4])
    assert [bool(item.get("old")) for item in found] == [True] * 6 + [False] * 4
    assert rows.load() == found


def test_a_stage_that_makes_too_few_rows_is_found_out(tmp_path):
    with pytest.raises(ValueError, match="1 rows were made of 2 keys"):
        files.resumed([("a",), ("b",)], lambda start, stop: [row("a")], size=2)


def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.append([row("a")])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task_id": "b", "te')
    again = Rows(path)
    assert again.load() == [row("a")]
    assert again.torn
    again.append([row("c")])
    assert path.read_bytes().startswith(whole + b'{"task_id": "c"')
    assert Rows(path).load() == [row("a"), row("c")]


def test_the_file_is_read_again_if_someone_else_added_to_it(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append([row("a")])
    Rows(rows.path).append([row("b")])
    with pytest.raises(ValueError, match="there already"):
        rows.append([row("b")])


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
    artifacts.write_json(path, {"a": 1})

    def broken() -> None:
        with provenance.replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        broken()
    assert artifacts.read_json(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["file.json"]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.int64)}
METADATA = {"model": "tiny-thinker", "behaviours": ["x", "ü"], "n": 3, "none": None, "z": {}}


def test_tensors_and_metadata_come_back_bit_exact(tmp_path):
    path = tmp_path / "deep" / "vectors.safetensors"
    artifacts.save_tensors(path, TENSORS, METADATA)
    tensors, metadata = artifacts.load_tensors(path)
    assert metadata == METADATA
    assert list(tensors) == ["a", "b"]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_tensors_have_the_same_bytes_in_every_process(tmp_path):
    """The library orders metadata by a hash that differs from process to process."""
    code = (
        "import sys, torch\nfrom stllms import artifacts\n"
        "artifacts.save_tensors(sys.argv[1], {'b': torch.ones(3), 'a': torch.zeros(2)},"
        " {name: name for name in 'qwertyuiop'})"
    )
    contents = set()
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "cut"])
def test_a_broken_tensor_file_is_named(tmp_path, content):
    path = tmp_path / "vectors.safetensors"
    if content == "cut":
        artifacts.save_tensors(path, TENSORS, METADATA)
        content = path.read_bytes()[:-4]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFile, match=r"vectors\.safetensors"):
        artifacts.load_tensors(path)


def test_tables_have_a_fixed_format(tmp_path):
    table = pd.DataFrame({"name": ["a", "b"], "value": [1 / 3, None], "n": [1, 2]})
    artifacts.save_table(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_bytes() == b"name,value,n\na,0.33333333,1\nb,,2\n"
    back = artifacts.load_table(tmp_path / "t.csv")
    assert list(back.columns) == ["name", "value", "n"]
    assert back["value"].isna().tolist() == [False, True]
    with pytest.raises(BadFile, match="no such file"):
        artifacts.load_table(tmp_path / "missing.csv")


@pytest.mark.parametrize("content", [b"\n\n", b"a,b\n1,2\n1,2,3\n", b"\xff\xfe\x00"])
def test_a_table_that_is_none_is_named(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(BadFile, match=r"t\.csv: not a table") as caught:
        artifacts.load_table(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


def drawn(folder):
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3], label="line")
    axes.set_title("title")
    artifacts.save_figure(folder, "my_figure", figure, pd.DataFrame({"x": [1.0, 2.5]}))
    plt.close(figure)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_figures_are_three_files_without_dates_and_the_same_every_time(tmp_path):
    first, second = drawn(tmp_path / "a"), drawn(tmp_path / "b")
    assert list(first) == ["my_figure.csv", "my_figure.pdf", "my_figure.png"]
    assert first == second
    assert first["my_figure.png"].startswith(b"\x89PNG")
    assert b"Software" not in first["my_figure.png"]
    assert b"CreationDate" not in first["my_figure.pdf"]


def test_a_figure_name_is_no_path(tmp_path):
    with pytest.raises(ValueError, match="figure name"):
        artifacts.save_figure(tmp_path, "../x", plt.figure(), pd.DataFrame())


# -- the folder of a run -----------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    return {"results": str(tmp_path / "results")}


def test_the_record_of_a_run(place):
    folder = Folder(RunConfig(**place, seed=3, batch_size=5)).open()
    record = artifacts.read_json(folder.run)
    assert record["seed"] == 3
    assert record["identity"] == RunConfig(**place, seed=3).identity()
    assert record["configuration"]["batch_size"] == 5
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert place["results"] not in folder.run.read_text()
    folder.note(device="cpu")
    assert Folder(RunConfig(**place, seed=3)).record()["recorded"] == {"device": "cpu"}


def test_another_configuration_is_refused_with_both_values(place):
    Folder(RunConfig(**place)).open()
    Folder(RunConfig(**place, device="cpu", batch_size=3, coefficients=[2])).open()
    with pytest.raises(ChangedConfiguration) as caught:
        Folder(RunConfig(**place, max_tokens=99, seed=1)).open()
    text = str(caught.value)
    for part in (
        "max_tokens was 256 and is now 99",
        "seed was 0 and is now 1",
        "--fresh",
        "results/tiny-thinker",
    ):
        assert part in text
    assert "n_build" not in text


def test_artefacts_without_a_record_are_refused(place):
    folder = Folder(RunConfig(**place))
    folder.path.mkdir(parents=True)
    folder.responses.write_text("")
    with pytest.raises(ChangedConfiguration, match=r"responses\.jsonl but no run\.json"):
        folder.open()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_broken_record_is_named(place, content):
    folder = Folder(RunConfig(**place))
    folder.path.mkdir(parents=True)
    folder.run.write_text(content)
    with pytest.raises(BadFile, match=r"run\.json"):
        folder.open()


def test_fresh_takes_only_what_was_written(place):
    folder = Folder(RunConfig(**place)).open()
    folder.rows(folder / "extra.jsonl").append([row("a")])
    folder.save_table(folder.steering, pd.DataFrame({"a": [1]}))
    folder.save_figure("bars", plt.figure(), pd.DataFrame({"a": [1]}))
    person = folder.figures / "mine.png"
    person.write_text("")
    outside = folder.path.parent / "outside.txt"
    outside.write_text("")
    record = folder.record()
    artifacts.write_json(folder.run, {**record, "files": [*record["files"], "../outside.txt"]})
    assert folder.fresh() == [
        "extra.jsonl",
        "figures/bars.csv",
        "figures/bars.pdf",
        "figures/bars.png",
        "run.json",
        "steering.csv",
    ]
    left = [path.name for path in sorted(folder.path.rglob("*"))]
    assert [name for name in left if not name.endswith(".lock")] == ["figures", "mine.png"]
    assert outside.is_file()


def test_the_comparison_refuses_a_models_rows_and_not_other_models(place):
    small = RunConfig(**place)
    Folder.comparison(small).open().member("tiny-instruct").open()
    other = Folder.comparison(RunConfig(**place, n_compare=3, compare=["smollm2"])).open()
    other.member("smollm2").open()
    with pytest.raises(ChangedConfiguration, match=r"comparison/tiny-instruct.*n_compare"):
        other.member("tiny-instruct").open()


def test_the_lock_is_free_again_after_the_block(place):
    folder = Folder(RunConfig(**place))
    taken = pytest.raises(artifacts.LockedFolder, match="in use by process")
    with folder.lock("01_generate"), taken:
        _hold(Folder(RunConfig(**place)))
    _hold(folder)


def _hold(folder: Folder) -> None:
    with folder.lock("01_generate"):
        pass


# -- the released files ------------------------------------------------------------------

CHAIN = dict.fromkeys(released.COMPARISON_KEYS, "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("[]", "empty list"),
        (json.dumps([CHAIN, CHAIN])[:-30], "truncated"),
        ("{}", "expected a list"),
        ('[{"response": ""}]', "chain 0 lacks thinking_process"),
        ("[1]", "chain 0 lacks"),
        (json.dumps([{**CHAIN, "annotated_response": None}]), "chain 0: annotated_response is"),
        ("hello", "not JSON"),
        (b"\x80\x81", "not a text file"),
    ],
)
def test_a_bad_comparison_file_is_one_line_with_its_name(tmp_path, content, words):
    path = tmp_path / "reasoning_comparison_x.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadFile, match=words) as caught:
        artifacts.load_comparison(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


class Unsafe:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"nonsense",
        "cut",
        pickle.dumps(Unsafe()),
        {"a": [[1.0], [1.0, 2.0]]},
        {"a": "text"},
        {"a": [1.0]},
        {},
        [1.0],
    ],
)
def test_a_bad_layer_effects_file_is_one_line_with_its_name(tmp_path, content, capsys):
    path = tmp_path / "layer_effects_x.pt"
    if content == "cut":
        torch.save({"a": [[1.0, 2.0]] * 500}, path)
        content = path.read_bytes()[:-200]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(BadFile) as caught:
        artifacts.load_layer_effects(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_where_released_files_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("STLLMS_PUBLISHED", str(tmp_path))
    assert artifacts.published() == tmp_path
    assert artifacts.published(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("STLLMS_PUBLISHED")
    assert artifacts.published().parts[-2:] == ("shared", "published")


def test_the_released_files_are_read(published):
    chains = artifacts.load_comparison(
        published / "reasoning_comparison_deepseek-r1-distill-llama-8b.json"
    )
    assert len(chains) == 100
    effects = artifacts.load_layer_effects(
        published / "layer_effects_deepseek-r1-distill-qwen-1.5b.pt"
    )
    assert {tuple(tensor.shape) for tensor in effects.values()} == {(46, 28)}
    peaks = {label: int(tensor.mean(0).argmax()) for label, tensor in effects.items()}
    assert peaks == {
        "backtracking": 18,
        "uncertainty-estimation": 18,
        "example-testing": 15,
        "adding-knowledge": 18,
    }
