"""What the benchmarks of models share: options, models, clocks, and the JSON they write.

Times are wall-clock seconds; where the process has one thread its CPU seconds are given too,
which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from stllms import models
from stllms.models import loading

RESULTS = Path(__file__).parent / "results"
MODELS = ("tiny-thinker", "smollm2", "random-qwen2", "random-smollm2")
#: Shape of R1-Distill-Qwen-1.5B; ``--layers`` and ``--vocabulary`` scale it to the machine.
QWEN = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
#: Shape of SmolLM2-135M, for machines without the package that carries its weights.
SMOLLM = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Took:
    """Seconds of one call, on the wall and on the CPU."""

    wall: float
    cpu: float

    def __mul__(self, factor: float) -> Took:
        return Took(self.wall * factor, self.cpu * factor)

    def __add__(self, other: Took) -> Took:
        return Took(self.wall + other.wall, self.cpu + other.cpu)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark of a model takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--model", default="tiny-thinker", help=f"{', '.join(MODELS)} or an id"
    )
    options.add_argument("--tokens", type=int, default=800, help="T, tokens of a response")
    options.add_argument("--layers", type=int, default=None, help="of a random model")
    options.add_argument("--vocabulary", type=int, default=None, help="of a random model")
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--repeats", type=int, default=3, help="the fastest of these counts")
    options.add_argument("--output", type=Path, default=RESULTS)
    return options


def build(options: argparse.Namespace) -> models.Model:
    """The model to measure; ``random-*`` are drawn here at a known shape."""
    if not options.model.startswith("random-"):
        return models.load(options.model, device=options.device, dtype=options.dtype)
    place = loading.pick_device(options.device)
    full = place.type == "cuda"
    if options.model == "random-qwen2":
        config_class, shape = transformers.Qwen2Config, QWEN
        layers = options.layers or (28 if full else 6)
        vocabulary = options.vocabulary or (151936 if full else 16384)
    else:
        config_class, shape = transformers.LlamaConfig, SMOLLM
        layers, vocabulary = options.layers or 30, options.vocabulary or 49152
    config = config_class(num_hidden_layers=layers, vocab_size=vocabulary, **shape)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(options.seed)
    with torch.device(place):
        hf = transformers.AutoModelForCausalLM.from_config(
            config, dtype=loading.pick_dtype(options.dtype, place)
        )
    return models.wrap(hf, tokenizer(), name=options.model)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A stand-in for random models, whose ids alone matter: every byte is a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )


def clocked(work: Callable[[], Any], *, repeats: int = 1) -> tuple[Took, Any]:
    """The fastest of some calls, and what the last of them returned."""
    best, result = None, None
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = Took(time.perf_counter() - wall, time.process_time() - cpu)
        best = took if best is None or took.wall < best.wall else best
    return best, result


def interleaved(*works: Callable[[], Any], repeats: int) -> list[tuple[Took, Any]]:
    """:func:`clocked` of each, all in turn ``repeats`` times: what else the machine does then
    falls on all of them alike. The fastest of each counts, with what it returned."""
    rounds = [[clocked(work) for work in works] for _ in range(repeats)]
    return [min(column, key=lambda one: one[0].wall) for column in zip(*rounds, strict=True)]


def machine(model: models.Model) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = model.device.type == "cuda"
    return {
        "model": model.name,
        "class": type(model.hf).__name__,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "layers": model.n_layers,
        "width": model.d_model,
        "vocabulary": model.hf.get_output_embeddings().weight.shape[0],
        "dtype": str(model.dtype),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def tag(model: models.Model) -> str:
    """The model's name for a file; numbers of a GPU do not overwrite those of the CPU."""
    return model.name + ("-cuda" if model.device.type == "cuda" else "")


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write ``<folder>/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('/', '--')}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def ratio(slow: Took, fast: Took) -> dict[str, float]:
    """How many times faster, by both clocks."""
    return {"wall": slow.wall / fast.wall, "cpu": slow.cpu / max(fast.cpu, 1e-9)}
