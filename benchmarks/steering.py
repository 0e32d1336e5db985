"""The evaluation of method, section 8, batched by row, against one chain at a time.

    python benchmarks/steering.py --model smollm2 --tokens 128

The work is 4 behaviours x 3 modes x 50 tasks, greedy. The published procedure writes each
chain alone, ``model.generate`` with a hook, and writes the plain chains again for every
behaviour: 600 chains. Ours writes 450, one direction per row. The naive side is timed on a
seeded subset of its chains and multiplied up. End-of-sequence tokens are ignored on both
sides, so that both write ``--tokens`` tokens a chain: no row ends early, and refilling wins
nothing.
``--free`` lets chains end.

What steering costs over plain decoding is measured beside it on the rows of ``--cost-tasks``
tasks, written steered and plain in turn ``--repeats`` times; the fastest of each counts.

``--chunk`` tasks of nine chains are decoded together, as in ``conditions.grid``; a
batch is never larger than that. On a GPU full batches are had with

    python benchmarks/steering.py --model random-qwen2 --device cuda --dtype bfloat16 \\
        --batch-size 256 --chunk 28 --tasks 56 --cost-tasks 28    # or 64, 7, 49, 7

For context, not measured here: EasySteer reports 25,310 tokens/s for R1-Distill-Qwen-1.5B
(the shape of ``random-qwen2``) at batch 256, on an RTX PRO 6000.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from stllms import tasks
from stllms.labels import PAPER
from stllms.models import Model
from stllms.models.engines import Row
from stllms.models.engines import transformers as decode
from stllms.models.engines.interventions import Intervention
from stllms.steering import conditions

#: Chains of a task: plain, and + and - of each behaviour.
CONDITIONS = 1 + 2 * len(PAPER.targets)


def prompts_of(model: Model, count: int) -> list[tuple[int, ...]]:
    """The ids of ``count`` questions; random ids for a model without a vocabulary."""
    if model.name.startswith("random-"):
        draw, size = random.Random(0), model.text_config.vocab_size
        lengths = [draw.randrange(24, 72) for _ in range(count)]
        return [tuple(draw.randrange(1, size) for _ in range(n)) for n in lengths]
    own = model.name.startswith("tiny-")
    asked = tasks.select("evaluate", source="grammar" if own else "messages", n=count)
    return [model.prompt_ids(task.content)[1] for task in asked]


def directions(model: Model, seed: int) -> dict[str, Intervention]:
    """A random direction a behaviour, a tenth as long as the embedding's rows: what it is
    does not matter to the clock."""
    draw = torch.Generator().manual_seed(seed)
    size = 0.1 * float(model.hf.get_input_embeddings().weight.float().norm(dim=-1).mean())
    layer = model.n_layers // 2
    return {
        b: Intervention(
            torch.nn.functional.normalize(torch.randn(model.d_model, generator=draw), dim=0)
            * size,
            layer,
            1.0,
        )
        for b in PAPER.targets
    }


def naive_jobs(prompts, chosen) -> list[tuple[tuple[int, ...], Intervention | None]]:
    """Every chain that the published script writes: plain, + and - for each behaviour."""
    jobs = []
    for item in chosen.values():
        minus = Intervention(item.direction, item.layer, -item.coefficient)
        jobs += [(ids, edit) for ids in prompts for edit in (None, item, minus)]
    return jobs


@torch.no_grad()
def naive(model: Model, jobs, limit: int, free: bool) -> int:
    """Batch 1, ``generate`` with a forward hook; the number of new tokens."""
    total = 0
    for ids, item in jobs:
        handles = []
        if item is not None:
            push = (item.coefficient * item.direction).to(model.device, model.dtype)
            layer = model.layers[item.layer]
            handles = [layer.register_forward_hook(lambda _m, _i, out, push=push: out + push)]
        fed = torch.tensor([ids], device=model.device)
        out = model.hf.generate(
            fed,
            attention_mask=torch.ones_like(fed),
            max_new_tokens=limit,
            min_new_tokens=None if free else limit,
            do_sample=False,
            eos_token_id=list(model.eos_ids) or None,
            pad_token_id=model.pad_id,
        )
        total += out.shape[1] - fed.shape[1]
        for handle in handles:
            handle.remove()
    return total


def our_rows(prompts, chosen) -> list[Row]:
    """Every chain once: plain, and + and - of each behaviour, a task's conditions together."""
    edits: list[tuple[Intervention, ...]] = [()]
    for item in chosen.values():
        edits += [(item,), (Intervention(item.direction, item.layer, -item.coefficient),)]
    return [Row(ids, str(number), edit) for number, ids in enumerate(prompts) for edit in edits]


def ours(model: Model, rows, limit: int, batch: int, size: int) -> int:
    """Chunks of ``size`` rows, as ``conditions.grid`` writes them; the new tokens."""
    return sum(
        len(chain.ids)
        for start in range(0, len(rows), size)
        for chain in decode.run(
            model, rows[start : start + size], max_new_tokens=limit, batch_size=batch
        )
    )


def cost(model: Model, rows: list[Row], write: Callable, repeats: int) -> dict:
    """Tokens per second of ``rows`` and of the same prompts plain, written in turn."""
    bare = [Row(row.prompt_ids, row.key) for row in rows]
    (steered, tokens), (plain, plain_tokens) = common.interleaved(
        lambda: write(rows), lambda: write(bare), repeats=repeats
    )
    fast, bare_fast = tokens / steered.wall, plain_tokens / plain.wall
    return {
        "chains": len(rows),
        "repeats": repeats,
        "steered_tokens_per_second": fast,
        "plain_tokens_per_second": bare_fast,
        "steering_over_plain": bare_fast / fast - 1,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = common.parser(__doc__.splitlines()[0])
    options.set_defaults(tokens=128)
    options.add_argument("--tasks", type=int, default=50)
    options.add_argument("--subset", type=int, default=12, help="chains of the naive side")
    options.add_argument("--batch-size", type=int, default=None)
    options.add_argument("--chunk", type=int, default=conditions.CHUNK, help="tasks")
    options.add_argument("--cost-tasks", type=int, default=10, help="steered against plain")
    options.add_argument("--free", action="store_true", help="chains may end")
    options = options.parse_args(argv)
    model = common.build(options)
    if not options.free:
        model.eos_ids = ()
    prompts, chosen = prompts_of(model, options.tasks), directions(model, options.seed)
    jobs = naive_jobs(prompts, chosen)
    subset = random.Random(options.seed).sample(jobs, min(options.subset, len(jobs)))
    rows = our_rows(prompts, chosen)
    some = rows[: options.cost_tasks * CONDITIONS]
    asked = options.batch_size or decode.default_batch_size(model)
    batch = min(asked, options.chunk * CONDITIONS, len(rows))

    def write(rows: list[Row], limit: int = options.tokens) -> int:
        return ours(model, rows, limit, batch, options.chunk * CONDITIONS)

    naive(model, subset[:1], 8, options.free)  # warm
    write(rows[:batch], 8)
    slow, slow_tokens = common.clocked(
        lambda: naive(model, subset, options.tokens, options.free)
    )
    fast, tokens = common.clocked(lambda: write(rows))
    price = cost(model, some, write, options.repeats)
    batch = min(batch, model.fits)  # halved where memory ran out
    whole = slow * (len(jobs) / len(subset))
    result = {
        "machine": common.machine(model),
        "tasks": options.tasks,
        "new_tokens": options.tokens,
        "chains_may_end": options.free,
        "chunk_of_tasks": options.chunk,
        "batch_size": batch,
        "naive": {
            "chains": len(jobs),
            "timed_chains": len(subset),
            "seconds_timed": slow.wall,
            "seconds_extrapolated": whole.wall,
            "tokens_per_second": slow_tokens / slow.wall,
        },
        "ours": {
            "chains": len(rows),
            "seconds": fast.wall,
            "tokens_per_second": tokens / fast.wall,
        },
        "times_faster": common.ratio(whole, fast),
        "cost": {"batch_size": min(batch, len(some))} | price,
    }
    given = "" if options.batch_size is None else f"-b{batch}"
    path = common.write(options.output, f"steering-{common.tag(model)}{given}", result)
    print(
        f"{model.name} on {result['machine']['device']}: naive {whole.wall:.0f} s for "
        f"{len(jobs)} chains (extrapolated from {len(subset)}), ours {fast.wall:.1f} s for "
        f"{len(rows)} in batches of {batch}: {result['times_faster']['wall']:.1f}x, "
        f"{tokens / fast.wall:.0f} tokens/s\n"
        f"{price['chains']} chains in turn, fastest of {price['repeats']}: steered "
        f"{price['steered_tokens_per_second']:.0f}, plain "
        f"{price['plain_tokens_per_second']:.0f} tokens/s: steering costs "
        f"{price['steering_over_plain']:+.1%}\nwritten: {path}"
    )


if __name__ == "__main__":
    main()
