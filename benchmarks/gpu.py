"""What one card does: steering, activations, layer effects and their memory, in minutes.

    benchmarks/gpu.sh                      # any one CUDA card; nothing is downloaded
    benchmarks/gpu.sh --small              # the same with tiny shapes, on a CPU too

Models are drawn here at known shapes, for their weights do not matter to the clock. Of every
model: tokens per second with a vector of its own for each row, and plain, by batch, for each
engine that is installed; span means and layer effects against their naive loops
(``activations.py``, ``layer_effects.py``); peak memory of a part, its naive loop included. No
chain ends early. Beside each speed stand two limits: the **weight-read limit**, ``batch *
bandwidth / bytes of weights that a step reads`` with the bandwidth of a copy measured here (no
engine that reads the weights once a step can be quicker), and the **compute limit**, two
operations a weight and token at the speed of one large matrix product. Before that, greedy
chains of a small float32 model are compared, token by token, with ``generate`` of
``transformers``, one by one.

The JSON is written after every measurement. Nothing begins after ``--minutes``, and what was
left out says so. A part that fails is named, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
import activations
import common
import layer_effects
import steering

from stllms import models
from stllms.models import Model, engines, loading
from stllms.models.engines import Row
from stllms.models.engines.interventions import Intervention, applied
from stllms.models.model import UNLIMITED

#: By name: the class of the configuration and its shape, of R1-Distill-Qwen-1.5B and
#: R1-Distill-Llama-8B.
SHAPES: dict[str, tuple[type, dict[str, int]]] = {
    "random-qwen2-1.5b": (
        transformers.Qwen2Config,
        {**common.QWEN, "num_hidden_layers": 28, "vocab_size": 151936},
    ),
    "random-llama-8b": (
        transformers.LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "vocab_size": 128256,
        },
    ),
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 512,
}
#: Bytes of the copy whose speed is the bandwidth, and width of the matrices multiplied.
COPIED, WIDTH = 2**32, 8192


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    batches: tuple[int, ...]
    new_tokens: int
    #: Tokens and number of the responses of activations; tokens and positions of layer effects.
    tokens: int
    responses: int
    positions: int
    rows: int  # of a batch of activations


FULL = Size((1, 8, 64, 256, 512), 64, tokens=400, responses=32, positions=20, rows=16)
TINY = Size((1, 8), 8, tokens=80, responses=4, positions=4, rows=2)


@dataclass
class Report:
    """What was measured, written to ``path`` after every part."""

    path: Path
    until: float
    content: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    def part(
        self, place: dict[str, Any], name: str, work: Callable[[], Any], least: float = 0.0
    ) -> Any:
        """``place[name]`` becomes what ``work`` gives, with its seconds and peak memory;
        unless there are no ``least`` seconds left."""
        begun = time.monotonic()
        if begun + least > self.until:
            place[name] = {"left out": "the time was up"}
        else:
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                found = work()
            except torch.OutOfMemoryError:
                found = {"left out": "out of memory"}
            except Exception as error:  # the other parts go on; the exit status says it
                traceback.print_exc()
                self.failed = True
                found = {"failed": f"{type(error).__name__}: {error}"}
            if isinstance(found, dict):
                found.pop("machine", None)  # it is said once
                found["seconds"] = time.monotonic() - begun
                if cuda:
                    found["peak_bytes"] = torch.cuda.max_memory_allocated()
            place[name] = found
        print(f"[{time.monotonic() - begun:6.1f} s] {name}: {_brief(place[name])}", flush=True)
        common.write(self.path.parent, self.path.stem, self.content)
        return place[name]


def _brief(found: Any) -> str:
    """Numbers of a part on a line; deeper ones are in the file."""
    if not isinstance(found, dict):
        return str(found)
    flat = {
        k: f"{v:.4g}" if isinstance(v, float) else v
        for k, v in found.items()
        if not isinstance(v, dict | list)
    }
    return ", ".join(f"{k} {v}" for k, v in flat.items())


# -- the card ------------------------------------------------------------------------------


def card(device: torch.device) -> dict[str, Any]:
    """What the numbers are of."""
    cuda = device.type == "cuda"
    packages = ("torch", "transformers", "nnsight", "vllm", "vllm-lens")
    return {
        "card": torch.cuda.get_device_name(device) if cuda else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def limits(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, float]:
    """Bytes read and written per second by a copy, and products of a matrix product."""
    copied, width = (2**26, 512) if small else (COPIED, WIDTH)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    factor = torch.randn(width, width, device=device, dtype=dtype)
    target.copy_(source)
    factor @ factor
    copy, _ = common.clocked(lambda: target.copy_(source), repeats=5)
    product, _ = common.clocked(lambda: factor @ factor, repeats=5)
    return {
        "copy_bytes_per_second": 2 * copied / copy.wall,
        "matrix_flops_per_second": 2 * width**3 / product.wall,
    }


# -- models --------------------------------------------------------------------------------


def drawn(
    name: str, kind: type, shape: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Model:
    """A random model of a shape, built where it will stay; its chains never end."""
    config = kind(**shape, tie_word_embeddings=False)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    with torch.device(device):
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = loading.checked(hf, common.tokenizer(), name)
    model.eos_ids = ()
    return model


def bytes_read(model: Model) -> int:
    """Bytes of the weights that a step reads: all, without an untied embedding."""
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    embedding, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    return weights if embedding.weight is head.weight else weights - embedding.weight.nbytes


def rows_of(model: Model, count: int) -> list[Row]:
    """Prompts of random ids, each with a vector of its own at the middle layer."""
    noise = torch.randn(count, model.d_model, generator=torch.Generator().manual_seed(0))
    size = 0.1 * float(
        model.hf.get_input_embeddings().weight[:1000].float().norm(dim=-1).mean()
    )
    vectors = size * torch.nn.functional.normalize(noise, dim=-1)
    layer = model.n_layers // 2
    return [
        Row(ids, str(i), (Intervention(vector, layer, 1.0),))
        for i, (ids, vector) in enumerate(
            zip(steering.prompts_of(model, count), vectors, strict=True)
        )
    ]


# -- parts ---------------------------------------------------------------------------------


@torch.no_grad()
def conformance(device: torch.device) -> dict[str, Any]:
    """Mixed greedy rows of a small float32 model against ``generate``, one by one."""
    # Drawn wide, as in tests/tiny.py: with the usual 0.02 every mistake would hide in rounding.
    shape = {**SMALL, "initializer_range": 0.2}
    model = drawn("random-small", transformers.Qwen2Config, shape, device, torch.float32)
    new, rows = 24, []
    for i, row in enumerate(rows_of(model, 12)):
        (item,) = row.interventions
        direction = 30 * item.direction
        edits = [
            (),
            (Intervention(direction, i % 4, 1.0),),
            (Intervention(direction, 1, -1.0),),
        ]
        rows.append(Row(row.prompt_ids, row.key, edits[i % 3]))
    batched = engines.generate(model, rows, max_new_tokens=new, batch_size=len(rows))
    plain = engines.generate(
        model, [Row(row.prompt_ids, row.key) for row in rows], max_new_tokens=new
    )
    equal = 0
    for row, written in zip(rows, batched, strict=True):
        ids = torch.tensor([row.prompt_ids], device=device)
        with applied(model.hf, list(row.interventions) or [None]):
            out = model.hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=model.pad_id,
            )
        equal += tuple(out[0, ids.shape[1] :].tolist()) == written.ids
    moved = sum(
        a.ids != b.ids
        for a, b, row in zip(batched, plain, rows, strict=True)
        if row.interventions
    )
    steered = sum(bool(row.interventions) for row in rows)
    if equal < len(rows) or 2 * moved < steered:
        raise AssertionError(
            f"{equal} of {len(rows)} chains equal those one by one, steering changed {moved} "
            f"of {steered}"
        )
    return {"chains_equal": equal, "of": len(rows), "steered_chains_changed": moved}


def speed(
    model: Model, batch: int, new_tokens: int, read: int, limits: dict[str, float]
) -> dict[str, Any]:
    """Tokens per second of a batch, each row with its own vector, and plain."""
    rows = rows_of(model, batch)
    bare = [Row(row.prompt_ids, row.key) for row in rows]
    model.fits = UNLIMITED

    def write(rows: Sequence[Row], limit: int = new_tokens) -> int:
        written = engines.generate(model, rows, max_new_tokens=limit, batch_size=batch)
        return sum(len(one.ids) for one in written)

    write(rows, 2)
    write(bare, 2)
    (steered, tokens), (plain, plain_tokens) = common.interleaved(
        lambda: write(rows), lambda: write(bare), repeats=1
    )
    assert tokens == plain_tokens == batch * new_tokens, "no chain ends early"
    return {
        "batch": batch,
        "rows_at_a_time": min(batch, model.fits),
        "steered_tokens_per_second": tokens / steered.wall,
        "plain_tokens_per_second": tokens / plain.wall,
        "steering_over_plain": steered.wall / plain.wall - 1,
        "weight_read_limit_tokens_per_second": batch * limits["copy_bytes_per_second"] / read,
        "compute_limit_tokens_per_second": limits["matrix_flops_per_second"]
        / (2 * read / model.dtype.itemsize),
    }


def speeds(report: Report, place: dict[str, Any], model: Model, size: Size, read: int) -> None:
    """:func:`speed` of every batch; the next takes at least as long as the last."""
    took, found_limits = 0.0, report.content["limits"]
    for batch in size.batches:
        found = report.part(
            place,
            f"{batch} rows",
            lambda batch=batch: speed(model, batch, size.new_tokens, read, found_limits),
            took,
        )
        took = found.get("seconds", took)


def of_model(report: Report, name: str, size: Size, small: bool, device: torch.device) -> None:
    """All parts of one model."""
    kind, shape = SHAPES[name]
    dtype = torch.float32 if device.type == "cpu" else loading.pick_dtype("auto", device)
    place: dict[str, Any] = report.content["models"].setdefault(name, {})
    held: list[Model] = []

    def build() -> dict[str, Any]:
        model = drawn(name, kind, SMALL if small else shape, device, dtype)
        held.append(model)
        return {**common.machine(model), "weight_bytes_read_a_step": bytes_read(model)}

    print(name, flush=True)
    built = report.part(place, "build", build)
    if not held:
        return
    (model,) = held
    read = built["weight_bytes_read_a_step"]
    speeds(report, place.setdefault("transformers", {}), model, size, read)
    given = ["--tokens", str(size.tokens), "--repeats", "2"]
    more = ["--responses", str(size.responses), "--batch-size", str(size.rows)]
    options = activations.parser().parse_args([*given, *more])
    report.part(place, "activations", lambda: activations.measure(model, options))
    more = ["--positions", str(size.positions), "--timed-positions", "3", "--frozen"]
    others = layer_effects.parser().parse_args([*given, *more, "--timed-patches", "4"])
    report.part(place, "layer effects", lambda: layer_effects.measure(model, others))
    if importlib.util.find_spec("vllm") is None:
        report.part(place, "vllm", lambda: "not installed here")
        return
    with tempfile.TemporaryDirectory() as folder:
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        del model
        held.clear()
        free()

        def start() -> dict[str, Any]:
            model = models.load(folder, dtype=dtype, engine="vllm")
            model.eos_ids, model.name = (), name
            held.append(model)
            return {"engine": engines.engine.of(model).name}

        vllm = place.setdefault("vllm", {})
        report.part(vllm, "start", start)
        for model in held:
            speeds(report, vllm, model, size, read)
            report.part(vllm, "close", engines.engine.of(model).close)


def free() -> None:
    """Gives the memory of what is no longer held back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--small", action="store_true", help="tiny shapes, on a CPU too")
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--batches", nargs="+", type=int, default=None)
    options.add_argument("--minutes", type=float, default=9, help="nothing begins after these")
    options.add_argument("--out", type=Path, default=None, help="the JSON file")
    given = options.parse_args(argv)
    device = loading.pick_device("auto" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not given.small:
        print("torch finds no CUDA card here: --small measures tiny shapes", file=sys.stderr)
        return 2
    size = TINY if given.small else FULL
    if given.batches:
        size = Size(**{**vars(size), "batches": tuple(given.batches)})
    about = card(device)
    slug = re.sub(r"[^a-z0-9]+", "-", about["card"].lower()).strip("-")
    path = given.out or common.RESULTS / f"gpu-{slug}{'-small' if given.small else ''}.json"
    report = Report(path, time.monotonic() + 60 * given.minutes)
    report.content |= {
        "machine": about, "small": given.small, "new_tokens": size.new_tokens, "models": {},
    }  # fmt: skip
    print(f"{about['card']}, torch {torch.__version__}", flush=True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    report.part(report.content, "limits", lambda: limits(device, dtype, given.small))
    report.part(report.content, "conformance", lambda: conformance(device))
    for name in given.models:
        free()
        of_model(report, name, size, given.small, device)
    print(f"written: {path}", flush=True)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
