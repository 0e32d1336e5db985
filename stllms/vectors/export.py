"""Directions for other engines: safetensors, and GGUF control vectors for llama.cpp.

Layer ``l`` is the output of decoder layer ``l``, counted from 0: ``hidden_states[l + 1]`` of
transformers (whose last entry has passed the final norm), ``direction.l`` of llama.cpp (whose
block 0 cannot be steered) and of EasySteer for vLLM. Every tensor is what is **added** to each
position, prompt included: ``coefficient`` times the direction (method, section 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stllms.runs.files import replacing, save_tensors
from stllms.vectors.directions import SteeringVectors

#: What the metadata says about the layer of a tensor ``<behaviour>.<layer>``.
LAYER_INDEX = (
    "0-based decoder layer whose output the tensor is added to; hidden_states[layer + 1] of"
    " transformers, direction.<layer> of llama.cpp"
)
RESCALING = "||direction|| = ||mean residual|| at its layer, times the coefficient"


def safetensors(
    vectors: SteeringVectors,
    path: str | Path,
    *,
    behaviours: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    coefficient: float = 1.0,
) -> Path:
    """Write ``<behaviour>.<layer>`` tensors ``[D]``, float32; returns the path.

    All behaviours and layers where none are named. The metadata (JSON texts) says model,
    behaviours, layers, layer index, operation, rescaling and coefficient.

    Raises:
        ValueError: an unknown behaviour or layer, naming what there is.
    """
    names = list(behaviours or vectors.behaviours)
    chosen = sorted(set(range(vectors.n_layers) if layers is None else layers))
    tensors = {
        f"{name}.{layer}": coefficient * vectors.direction(name, layer)
        for name in names
        for layer in chosen
    }
    metadata = {
        "format": "stllms directions 1",
        "model": vectors.model,
        "n_layers": vectors.n_layers,
        "behaviours": names,
        "layers": chosen,
        "layer_index": LAYER_INDEX,
        "operation": "add",
        "rescaling": RESCALING,
        "coefficient": float(coefficient),
        "config": vectors.config,
    }
    save_tensors(path, tensors, metadata)
    return Path(path)


def gguf(
    vectors: SteeringVectors,
    behaviour: str,
    path: str | Path,
    *,
    layers: Iterable[int],
    coefficient: float = 1.0,
    model_hint: str | None = None,
) -> Path:
    """Write one behaviour as a GGUF control vector of llama.cpp; returns the path.

    ``direction.<layer>`` ``[D]``, float32, for every layer: one is the paper's steering, those
    of several add up. ``coefficient`` is multiplied in; llama.cpp multiplies by its own
    (``--control-vector-scaled FILE:SCALE``). ``model_hint`` should be the model's architecture
    in llama.cpp (``qwen2``), default ``vectors.model``; llama.cpp does not check it.

    Source: ``common_control_vector_load`` and ``llama_adapter_cvec`` in llama.cpp.

    Raises:
        ValueError: layer 0, which llama.cpp cannot steer, an unknown behaviour or layer, or
            the package ``gguf`` is missing.
    """
    added = {
        layer: coefficient * vectors.direction(behaviour, layer)
        for layer in sorted(set(layers))
    }
    if 0 in added:
        raise ValueError(
            "layer 0: llama.cpp cannot steer its block 0; choose a layer of"
            f" 1 to {vectors.n_layers - 1}, or safetensors"
        )
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a GGUF file needs the package {error.name}: pip install 'stllms[gguf]'"
        ) from None
    with replacing(Path(path)) as beside:
        writer = GGUFWriter(beside, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint or vectors.model or "unknown")
        writer.add_int32("controlvector.layer_count", len(added))
        writer.add_name(f"{behaviour}, {vectors.model}")
        writer.add_description(f"{RESCALING}; direction.N acts on the output of block N")
        writer.add_float32("stllms.coefficient", float(coefficient))
        for layer, direction in added.items():
            writer.add_tensor(f"direction.{layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)
