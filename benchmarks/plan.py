"""The arithmetic of ``docs/scale.md``: what cards could do at most, and what a run would take.

    python benchmarks/plan.py [--cards 8] [--bandwidth 3.35e12] [--flops 989e12] [--memory 80e9]

Nothing is run. Parameters are counted on torch's meta device, the cache by
:func:`stllms.models.engines.transformers.cache_bytes`. A step reads the weights once and the
keys and values of every row at half of its length; a token takes two operations a weight that
is multiplied. What is printed is the limit that the slower of the two sets; real engines stay
below it. ``tensor`` splits every layer over all cards; ``map`` gives each card some layers, of
which one works at a time (``--device-map auto``).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

from stllms.models.engines.transformers import cache_bytes

#: Width, inner width, layers, heads, heads of keys and values, vocabulary.
SHAPES: dict[str, tuple[type, tuple[int, ...]]] = {
    "Qwen-1.5B": (transformers.Qwen2Config, (1536, 8960, 28, 12, 2, 151936)),
    "Llama-8B": (transformers.LlamaConfig, (4096, 14336, 32, 32, 8, 128256)),
    "Qwen-14B": (transformers.Qwen2Config, (5120, 13824, 48, 40, 8, 152064)),
    "Qwen-32B": (transformers.Qwen2Config, (5120, 27648, 64, 40, 8, 152064)),
    "Llama-70B": (transformers.LlamaConfig, (8192, 28672, 80, 64, 8, 128256)),
}
FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
PROMPT, NEW, BYTES = 100, 1000, torch.bfloat16.itemsize


def limits(read: int, row: int, batch: int, given: Any, cards: int) -> float:
    """Tokens per second at most, with the bandwidth and operations of ``cards`` at work."""
    reading = (read + batch * row / 2) / (given.bandwidth * cards)
    computing = 2 * batch * read / BYTES / (given.flops * cards)
    return batch / max(reading, computing)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--cards", type=int, default=8)
    options.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes/s of a card")
    options.add_argument("--flops", type=float, default=989e12, help="of a card, dense bf16")
    options.add_argument("--memory", type=float, default=80e9, help="bytes of a card")
    options.add_argument("--chains", type=float, default=1e5)
    given = options.parse_args()
    print(
        f"{PROMPT} + {NEW} tokens a chain, bf16, {given.cards} cards, {given.chains:g} chains"
    )
    for name, (kind, values) in SHAPES.items():
        config = kind(**dict(zip(FIELDS, values, strict=True)), tie_word_embeddings=False)
        with torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(config)
        weights = BYTES * sum(p.numel() for p in hf.parameters())
        read = weights - BYTES * hf.get_input_embeddings().weight.numel()
        row = cache_bytes(config, torch.bfloat16, PROMPT + NEW)
        rows = int((0.9 * given.cards * given.memory - weights) // row)
        print(
            f"{name}: weights {weights / 1e9:.1f} GB, "
            f"cache {row / (PROMPT + NEW) / 1e3:.0f} kB a token, {row / 1e9:.3f} GB a chain, "
            f"room for {rows} whole chains"
        )
        for how, cards, batches in (
            ("tensor", given.cards, (64, 256, 1024)),
            ("map", 1, (64, 256)),
        ):
            for batch in batches:
                speed = limits(read, row, batch, given, cards)
                hours = given.chains * NEW / speed / 3600
                print(f"  {how:7s} batch {batch:5d}: {speed:9.0f} tokens/s, {hours:7.2f} hours")


if __name__ == "__main__":
    main()
