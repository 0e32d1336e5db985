"""Files of strangers: directions, effects, chains and weights. Whatever a file holds, it is
read or refused by name; no code in it runs, and it unfolds to no more than it may."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from released_files import chains, layer_effects, mean_vectors

from stllms.comparison import released
from stllms.models.loading import load
from stllms.models.model import ModelError
from stllms.runs import files
from stllms.runs.files import BadFile
from stllms.vectors.directions import SteeringVectors, load_published

#: A mean that is fine, and where each odd one is put.
GOOD = {"mean": torch.full((4, 8), 2.0), "count": 50}


@pytest.fixture
def stored() -> SteeringVectors:
    directions = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return SteeringVectors(
        ("backtracking", "deduction"), directions, directions, directions[0],
        torch.tensor([9, 9]), "m", {"min_spans": 5}, {"initializing": 1}, {"other": 2},
    )  # fmt: skip


# -- damage ------------------------------------------------------------------------------------


def damaged(content: bytes, n: int, seed: int):
    """``n`` versions: cut, with flipped, repeated, inserted, zeroed and swapped bytes."""
    rng = random.Random(seed)
    for _ in range(n):
        made, where = bytearray(content), rng.randrange(len(content))
        length = rng.choice((1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0:
            del made[where:]
        elif kind == 1:
            made[where] ^= 1 << rng.randrange(8)
        elif kind == 2:
            made[where:where] = made[where : where + length]
        elif kind == 3:
            made[where:where] = rng.randbytes(length)
        elif kind == 4:
            made[where : where + length] = bytes(min(length, len(made) - where))
        else:
            made[where : where + length] = b"\xff" * min(length, len(made) - where)
        yield bytes(made)


def read_counts_and_labels(path: Path) -> None:
    released.load_comparison(path)
    for reader in released.READERS.values():
        released.of_file(path, reader)


MEANS, EFFECTS = mean_vectors(layers=4), layer_effects(layers=4, responses=3)


def save_old(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_json(content: object, path: Path) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def is_refused(read: Callable[[Path], object], path: Path) -> bool:
    """Whether a file is refused, in one line with its name; any other error is one."""
    said = ""
    try:
        read(path)
    except BadFile as error:
        said = str(error)
    assert (str(path) in said and "\n" not in said) or not said
    return bool(said)


@pytest.mark.parametrize(
    ("content", "save", "read"),
    [
        (MEANS, torch.save, load_published),
        (MEANS, save_old, load_published),
        (EFFECTS, torch.save, released.read_effects),
        (chains(3), save_json, read_counts_and_labels),
    ],
    ids=["means", "means, old form", "effects", "comparison"],
)
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, content, save, read):
    path = tmp_path / "layer_effects_x.pt"
    save(content, path)
    read(path)
    refused = 0
    for part in damaged(path.read_bytes(), 300, seed=0):
        path.write_bytes(part)
        refused += is_refused(read, path)
    assert refused > 60, "most damage is seen"


def test_damaged_directions_are_read_or_refused_by_name(tmp_path, stored):
    path = tmp_path / "vectors.safetensors"
    stored.save(path)
    refused = 0
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for part in (*damaged(content[:header], 500, seed=1), *damaged(content, 100, seed=2)):
        path.write_bytes(part if len(part) > header else part + content[header:])
        refused += is_refused(SteeringVectors.load, path)
    assert refused > 300


# -- what torch would take ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"mean": [[1.0]], "count": 50},
        {**GOOD, "mean": torch.ones(8)},
        {**GOOD, "mean": torch.ones(0, 8)},
        {**GOOD, "mean": torch.ones(4, 8, dtype=torch.complex64)},
        {**GOOD, "mean": torch.ones(4, 8, dtype=torch.int64)},
        {**GOOD, "mean": torch.ones(4, 8).to_sparse()},
        {**GOOD, "mean": torch.empty(4, 8, device="meta")},
        {**GOOD, "mean": torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8)},
        {**GOOD, "mean": torch.ones(1, 1).expand(2**20, 2**20)},
        {**GOOD, "mean": torch.nn.Parameter(torch.ones(4, 8))},
        {**GOOD, "count": 2**70},
        {**GOOD, "count": -1},
        {**GOOD, "count": True},
        {**GOOD, "count": 5.0},
    ],
    ids=lambda entry: " ".join(str(entry).split())[:40],
)
def test_an_entry_that_is_no_mean_is_named(tmp_path, entry):
    path = tmp_path / "mean_vectors_x.pt"
    torch.save({"overall": GOOD, "backtracking": entry}, path)
    with pytest.raises(BadFile, match=r"_x\.pt: expected label .* at 'backtracking'"):
        load_published(path)
    torch.save({"overall": GOOD, 3: GOOD}, path)
    with pytest.raises(BadFile, match="at 3"):
        load_published(path)


# -- code and size -----------------------------------------------------------------------------


class Code:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize(
    "save",
    [torch.save, save_old, lambda content, path: path.write_bytes(pickle.dumps(content))],
)
@pytest.mark.parametrize("read", [files.load_torch, load_published, released.read_effects])
def test_no_code_of_a_file_runs(tmp_path, save, read):
    path, made = tmp_path / "mean_vectors_x.pt", tmp_path / "made"
    save({"overall": Code(made)}, path)
    with pytest.raises(BadFile, match="no code of it was run"):
        read(path)
    assert not made.exists()
    with suppress(RuntimeError):  # of a bare pickle, after its code has run
        torch.load(path, weights_only=False)
    assert made.is_dir(), "the file of this test is harmless"


def test_no_code_in_the_weights_of_a_folder_runs(tmp_path, save_tiny_model):
    folder, made = tmp_path / "model", tmp_path / "made"
    save_tiny_model(folder, "llama")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Code(made)}, folder / "pytorch_model.bin")
    with pytest.raises((ModelError, pickle.UnpicklingError)):
        load(str(folder), device="cpu")
    assert not made.exists()


def test_a_file_that_unpacks_to_more_than_it_may_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "mean_vectors_x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x/data/0", bytes(33 << 20))
    assert path.stat().st_size < 1 << 16
    monkeypatch.setattr(files, "LARGEST", 32 << 20)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(BadFile, match=r"_x\.pt: 33 MiB, a released file has at most 32 MiB"):
        files.load_torch(path)


@pytest.mark.parametrize("read", [files.load_torch, released.load_comparison])
def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch, read):
    path = tmp_path / "reasoning_comparison_x.json"
    with path.open("wb") as sparse:
        sparse.truncate(files.LARGEST + 1)
    monkeypatch.setattr(files, "loads", lambda _: pytest.fail("it was read"))
    with pytest.raises(BadFile, match="a released file has at most"):
        read(path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 50_000, "1" * 5000, "[1e999999]x"]
)
def test_json_that_python_stumbles_over_is_named(tmp_path, content):
    path = tmp_path / "reasoning_comparison_x.json"
    path.write_text(content)
    for read in (files.read_json, released.load_comparison):
        with pytest.raises(BadFile, match=r"_x\.json: "):
            read(path)


# -- directions of a stranger ------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict], None]) -> None:
    """The header of a safetensors file, changed by hand."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def meta(**values: str) -> Callable[[dict], None]:
    return lambda header: header["__metadata__"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (meta(behaviours='"backtracking"'), "behaviours"),
        (meta(behaviours="[1, 2]"), "behaviours"),
        (meta(behaviours='["a", "a"]'), "behaviours"),
        (meta(behaviours="[[], {}]"), "behaviours"),
        (meta(behaviours='["a"]'), "directions should have shape"),
        (meta(behaviours="[" * 50_000), "metadata"),
        (meta(model="3"), "model"),
        (meta(config="[]"), "config"),
        (meta(unavailable='{"a": "b"}'), "unavailable"),
        (meta(left_out="null"), "left_out"),
        (meta(surprise="1"), "surprise"),
        (lambda header: header.update(extra=header["counts"]), "safetensors"),
        (lambda header: header.update(extra=header.pop("means")), "extra"),
        (lambda header: header["counts"].update(dtype="F64"), "counts"),
        (lambda header: header["directions"].update(dtype="I32"), "directions"),
        (lambda header: header["overall"].update(shape=[4, 3]), "shape"),
        (lambda header: header["overall"].update(shape=[2**40, 2**40]), "safetensors"),
    ],
)  # fmt: skip
def test_directions_that_were_not_written_here_are_named(tmp_path, stored, change, words):
    path = tmp_path / "vectors.safetensors"
    stored.save(path)
    rewritten(path, change)
    with pytest.raises(BadFile, match=r"vectors\.safetensors") as caught:
        SteeringVectors.load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
