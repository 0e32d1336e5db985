"""A peer's side of ``peers.py``, run by the Python of its own environment, without stllms:

    PYTHON benchmarks/peer.py {steering-vectors,repeng} FOLDER

``FOLDER`` has the model (``transformers`` files) and ``work.json``. A line of JSON is printed:
the chains, the seconds that they took, and the share of the cores that others took meanwhile.
Both peers have one vector for a whole batch, so a batch is a condition of all tasks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

#: The share of the cores that others may take before a run counts as disturbed.
DISTURBED = 0.05


def alone(work: Callable[[], Any]) -> dict[str, Any]:
    """What ``work`` gave, its seconds, and the share of the cores that others took."""

    def busy() -> tuple[float, float]:
        spent = os.times()
        jiffies = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        everyone = sum(jiffies) - jiffies[3] - jiffies[4]  # idle, waiting for a disk
        return everyone / os.sysconf("SC_CLK_TCK"), spent.user + spent.system

    start, (all_before, own_before) = time.perf_counter(), busy()
    chains = work()
    seconds, (all_after, own_after) = time.perf_counter() - start, busy()
    others = all_after - all_before - (own_after - own_before)
    share = max(0.0, others / seconds / (os.cpu_count() or 1))
    return {"chains": chains, "seconds": seconds, "others": share}


@torch.no_grad()
def generate(
    hf: Any, prompts: Sequence[Sequence[int]], limit: int, pad: int
) -> list[list[int]]:
    """Greedy chains of ``limit`` tokens, prompts padded on the left."""
    hf.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    out = hf.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=pad
    )
    return out[:, width:].tolist()


Steer = Callable[[torch.Tensor, float], AbstractContextManager]


def steering_vectors(hf: Any, layer: int) -> Steer:
    from steering_vectors import SteeringVector

    return lambda v, c: SteeringVector({layer: v}, "decoder_block").apply(hf, multiplier=c)


def repeng(hf: Any, layer: int) -> Steer:
    from repeng import ControlModel, ControlVector

    control = ControlModel(hf, [layer])

    @contextmanager
    def steer(vector: torch.Tensor, coefficient: float) -> Iterator[None]:
        control.set_control(ControlVector("llama", {layer: vector.numpy()}), coefficient)
        yield
        control.reset()

    return steer


def main(name: str, folder: str) -> None:
    work = json.loads((Path(folder) / "work.json").read_text())
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    steer = {"steering-vectors": steering_vectors, "repeng": repeng}[name](hf, work["layer"])

    def chains(limit: int) -> list[list[list[int]]]:
        found = []
        for vector, coefficient in work["conditions"]:
            acting = steer(torch.tensor(vector), coefficient) if vector else nullcontext()
            with acting:
                batch = range(0, len(work["prompts"]), work["batch"])
                parts = [work["prompts"][i : i + work["batch"]] for i in batch]
                found.append([x for p in parts for x in generate(hf, p, limit, work["pad"])])
        return found

    chains(2)
    print(json.dumps(alone(lambda: chains(work["tokens"]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
