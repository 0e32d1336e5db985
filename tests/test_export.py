"""Directions for other engines: what is in the files, read back by the engines' own readers."""

from __future__ import annotations

import sys

import pytest
import torch

from stllms import artifacts, export
from stllms.vectors import SteeringVectors

LAYERS, WIDTH = 4, 32


@pytest.fixture
def found() -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, LAYERS, WIDTH, generator=generator)
    overall = torch.randn(LAYERS, WIDTH, generator=generator)
    return SteeringVectors(
        ("backtracking", "deduction"),
        directions,
        directions,
        overall,
        torch.tensor([20, 30]),
        model="tiny-thinker",
        config={"estimator": "difference-of-means"},
        unavailable={"example-testing": 3},
    )


@pytest.fixture
def reader():
    """The reader of the package ``gguf``."""
    return pytest.importorskip("gguf", reason="the extra 'gguf' is not installed").GGUFReader


def test_a_tensor_a_behaviour_and_layer_with_its_contract(found, tmp_path):
    path = export.safetensors(found, tmp_path / "all.safetensors")
    tensors, metadata = artifacts.load_tensors(path)
    assert len(tensors) == 2 * LAYERS
    for row, name in enumerate(found.behaviours):
        for layer in range(LAYERS):
            assert torch.equal(tensors[f"{name}.{layer}"], found.directions[row, layer])
    assert metadata["model"] == "tiny-thinker"
    assert metadata["behaviours"] == ["backtracking", "deduction"]
    assert metadata["layers"] == [0, 1, 2, 3]
    assert (metadata["operation"], metadata["coefficient"]) == ("add", 1.0)
    assert "hidden_states[layer + 1]" in metadata["layer_index"]
    assert "mean residual" in metadata["rescaling"]
    assert metadata["config"] == found.config


def test_the_coefficient_is_multiplied_in(found, tmp_path):
    path = tmp_path / "some.safetensors"
    export.safetensors(found, path, behaviours=["deduction"], layers=[2, 1], coefficient=-0.5)
    tensors, metadata = artifacts.load_tensors(path)
    assert sorted(tensors) == ["deduction.1", "deduction.2"]
    assert torch.equal(tensors["deduction.2"], -0.5 * found.direction("deduction", 2))
    assert (metadata["layers"], metadata["coefficient"]) == ([1, 2], -0.5)


def test_the_layer_of_the_contract_is_where_transformers_has_it(tiny_llama):
    ids = torch.tensor([[1, 5, 9, 2]])
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for layer in tiny_llama.layers
    ]
    with torch.no_grad():
        hidden = tiny_llama.hf(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert len(hidden) == len(outputs) + 1
    for layer, output in enumerate(outputs[:-1]):
        assert torch.equal(hidden[layer + 1], output)
    assert not torch.allclose(hidden[-1], outputs[-1])  # it has passed the final norm


def test_a_control_vector_as_llama_cpp_reads_it(found, tmp_path, reader):
    path = tmp_path / "vector.gguf"
    made = export.gguf(
        found, "deduction", path, layers=[3, 1], coefficient=2, model_hint="qwen2"
    )
    assert made == path
    content = reader(path)
    texts = {name: field.contents() for name, field in content.fields.items()}
    assert texts["general.architecture"] == "controlvector"
    assert texts["controlvector.model_hint"] == "qwen2"
    assert texts["controlvector.layer_count"] == 2
    assert texts["stllms.coefficient"] == 2.0
    assert "deduction" in texts["general.name"]
    assert [tensor.name for tensor in content.tensors] == ["direction.1", "direction.3"]
    for tensor, layer in zip(content.tensors, (1, 3), strict=True):
        assert tensor.tensor_type.name == "F32"
        assert tensor.shape.tolist() == [WIDTH]
        assert tensor.data.tolist() == (2 * found.direction("deduction", layer)).tolist()


def test_the_same_call_gives_the_same_bytes(found, tmp_path, reader):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        export.gguf(found, "deduction", path, layers=[2])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert reader(paths[0]).fields["controlvector.model_hint"].contents() == "tiny-thinker"


@pytest.mark.parametrize(
    ("behaviour", "layers", "words"),
    [
        ("deduction", [0, 2], "layer 0: llama.cpp cannot steer its block 0.* 1 to 3"),
        ("deduction", [4], "layer 4: the vectors have layers 0 to 3"),
        ("deduction", [-1], "layer -1"),
        ("deduction", [], "layers: none given"),
        ("guessing", [1], "no direction of 'guessing'; there are backtracking, deduction"),
        ("example-testing", [1], "unavailable: 3 spans"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_no_file(
    found, tmp_path, reader, behaviour, layers, words
):
    path = tmp_path / "vector.gguf"
    with pytest.raises(ValueError, match=words):
        export.gguf(found, behaviour, path, layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_command(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'stllms\[gguf\]'"):
        export.gguf(found, "deduction", tmp_path / "vector.gguf", layers=[1])


# -- the command ---------------------------------------------------------------------------


@pytest.fixture
def run_folder(found, tmp_path):
    folder = tmp_path / "results" / "tiny-thinker"
    folder.mkdir(parents=True)
    found.save(folder / "vectors.safetensors")
    return folder


def test_the_command_writes_both_formats(found, run_folder, tmp_path, capsys, reader):
    out = tmp_path / "made.gguf"
    arguments = [str(run_folder), "--format", "gguf", "--behaviour", "backtracking"]
    assert export.main([*arguments, "--layer", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    data = reader(out).tensors[0].data
    assert torch.equal(torch.tensor(data), found.direction("backtracking", 2))
    out = tmp_path / "made.safetensors"
    assert export.main([str(run_folder / "vectors.safetensors"), "--out", str(out)]) == 0
    assert len(artifacts.load_tensors(out)[0]) == 2 * LAYERS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gguf"], "takes one --behaviour and at least one --layer"),
        (["--format", "gguf", "--behaviour", "deduction", "--layer", "0"], "block 0"),
        (["--behaviour", "guessing"], "there are backtracking, deduction"),
        (["--layer", "9"], "layers 0 to 3"),
        (["--layer", "two"], "argument --layer: invalid int value: 'two'"),
        (["--format", "onnx"], "choose from"),
    ],
)
def test_the_command_refuses_in_one_line(run_folder, tmp_path, capsys, arguments, words):
    out = tmp_path / "made"
    try:
        status = export.main([str(run_folder), "--out", str(out), *arguments])
    except SystemExit as stopped:
        status = stopped.code
    lines = capsys.readouterr().err.strip().split("\n")
    assert status == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert not out.exists()


def test_a_folder_without_directions_is_named(tmp_path, capsys):
    assert export.main([str(tmp_path), "--out", str(tmp_path / "made")]) == 2
    assert "vectors.safetensors: there is no such file" in capsys.readouterr().err


def test_help_says_what_a_layer_is(capsys):
    with pytest.raises(SystemExit):
        export.main(["--help"])
    assert "counted from 0 (direction.N of" in " ".join(capsys.readouterr().out.split())
