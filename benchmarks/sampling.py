"""Choosing tokens: the exact choice by blocks, and its audit, against noise for every token.

``python benchmarks/sampling.py [--rows 64] [--vocabulary 151936]`` prints a line and writes
``benchmarks/results/sampling.json``, one entry a vocabulary. Naive is Gumbel-max as
docs/method.md, section 13 says it: noise for every token of the vocabulary, of the same hash.
``topk`` stands beside it as what the cheapest pass over the logits costs. All take turns, the
fastest counts.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import common
import torch

from stllms.models.engines import sampling

#: Of the embedded models, of SmolLM2 and of Qwen2.5.
VOCABULARIES = (1024, 49_152, 151_936)
TEMPERATURE = 0.65


def naive(logits: torch.Tensor, key: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``argmax(logits / temperature + g)`` with noise for every token."""
    noise = sampling.gumbel(key, step, torch.arange(logits.shape[-1], device=logits.device))
    return (logits.float() / TEMPERATURE + noise).argmax(-1)


def measure(rows: int, vocabulary: int, repeats: int, device: torch.device) -> dict:
    """Seconds of a step of each way, on logits of normal noise, four wide."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(device)
    key = torch.tensor([sampling.hash_key(0, str(i)) for i in range(rows)], device=device)
    step = torch.zeros(rows, dtype=torch.long, device=device)
    token = sampling.choose(logits, key, step, TEMPERATURE)
    slow, choice, audit, top = common.interleaved(
        lambda: naive(logits, key, step),
        lambda: sampling.choose(logits, key, step, TEMPERATURE),
        lambda: sampling.measure(logits, token, TEMPERATURE),
        lambda: logits.topk(min(64, vocabulary)),
        repeats=repeats,
    )
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "repeats": repeats,
        "naive_ms": 1e3 * slow[0].wall,
        "choice_ms": 1e3 * choice[0].wall,
        "audit_ms": 1e3 * audit[0].wall,
        "topk_ms": 1e3 * top[0].wall,
        "times_faster": common.ratio(slow[0], choice[0] + audit[0]),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES)
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--device", default="cpu")
    options.add_argument("--output", type=Path, default=common.RESULTS)
    given = options.parse_args(argv)
    device = torch.device(given.device)
    found = [measure(given.rows, size, given.repeats, device) for size in given.vocabulary]
    cuda = device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    name = "sampling-cuda" if cuda else "sampling"
    path = common.write(given.output, name, {"machine": machine, "steps": found})
    for one in found:
        print(
            f"{one['rows']} rows, vocabulary {one['vocabulary']}: choice "
            f"{one['choice_ms']:.1f} ms and audit {one['audit_ms']:.1f} ms a step, noise for "
            f"every token {one['naive_ms']:.0f} ms ({one['times_faster']['wall']:.0f} times), "
            f"topk {one['topk_ms']:.1f} ms"
        )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
