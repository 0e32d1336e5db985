"""The evaluation of METHOD section 8, batched by row, against one chain at a time.

    python benchmarks/steering.py --model smollm2 --tokens 128

The work is 4 behaviours x 3 modes x 50 tasks, greedy. The published procedure writes each
chain alone, ``model.generate`` with a hook, and writes the plain chains again for every
behaviour: 600 chains. Ours writes 450, a direction a row. The naive side is timed on a seeded
subset of its chains and multiplied up. End-of-sequence tokens are ignored on both sides, so
that both write ``--tokens`` tokens a chain: no row ends early, and refilling wins nothing.
``--free`` lets chains end.

Beside it: decoding the same rows plain, to see what an intervention costs.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from stllms import decode, steering, tasks
from stllms.decode import Intervention, Row
from stllms.models import Model
from stllms.organism import grammar
from stllms.records import STEERED


def prompts_of(model: Model, count: int) -> list[tuple[int, ...]]:
    """The ids of ``count`` questions; random ids for a model without a vocabulary."""
    if model.name.startswith("random-"):
        draw, size = random.Random(0), model.text_config.vocab_size
        lengths = [draw.randrange(24, 72) for _ in range(count)]
        return [tuple(draw.randrange(1, size) for _ in range(n)) for n in lengths]
    own = model.name.startswith("tiny-")
    asked = grammar.tasks("evaluate", count) if own else tasks.load("evaluate", n=count)
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
        for b in STEERED
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
            pad_token_id=model.pad_id,
        )
        total += out.shape[1] - fed.shape[1]
        for handle in handles:
            handle.remove()
    return total


def our_rows(prompts, chosen) -> list[Row]:
    """Every chain once: plain, and + and - of each behaviour, the arms of a task together."""
    edits: list[tuple[Intervention, ...]] = [()]
    for item in chosen.values():
        edits += [(item,), (Intervention(item.direction, item.layer, -item.coefficient),)]
    return [Row(ids, str(number), edit) for number, ids in enumerate(prompts) for edit in edits]


def ours(model: Model, rows, limit: int, batch: int | None) -> int:
    """Chunks of tasks, as :func:`stllms.steering.grid` writes them."""
    arms = 1 + 2 * len(STEERED)
    size = steering.CHUNK * arms
    return sum(
        len(ids)
        for start in range(0, len(rows), size)
        for ids in decode.run(
            model, rows[start : start + size], max_new_tokens=limit, batch_size=batch
        )
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = common.parser(__doc__.splitlines()[0])
    options.set_defaults(tokens=128, repeats=1)
    options.add_argument("--tasks", type=int, default=50)
    options.add_argument("--subset", type=int, default=12, help="chains of the naive side")
    options.add_argument("--batch-size", type=int, default=None)
    options.add_argument("--free", action="store_true", help="chains may end")
    options = options.parse_args(argv)
    model = common.build(options)
    if not options.free:
        model.eos_ids = ()
    prompts, chosen = prompts_of(model, options.tasks), directions(model, options.seed)
    jobs = naive_jobs(prompts, chosen)
    subset = random.Random(options.seed).sample(jobs, min(options.subset, len(jobs)))
    rows = our_rows(prompts, chosen)
    naive(model, subset[:1], 8, options.free)  # warm
    ours(model, rows[:4], 8, options.batch_size)
    slow, slow_tokens = common.clocked(
        lambda: naive(model, subset, options.tokens, options.free)
    )
    fast, tokens = common.clocked(
        lambda: ours(model, rows, options.tokens, options.batch_size), repeats=options.repeats
    )
    bare = [Row(row.prompt_ids, row.key) for row in rows]
    plain, plain_tokens = common.clocked(
        lambda: ours(model, bare, options.tokens, options.batch_size), repeats=options.repeats
    )
    whole = slow * (len(jobs) / len(subset))
    overhead = (fast.wall / tokens) / (plain.wall / plain_tokens) - 1
    result = {
        "machine": common.machine(model),
        "tasks": options.tasks,
        "new_tokens": options.tokens,
        "chains_may_end": options.free,
        "batch_size": options.batch_size or decode.default_batch_size(model),
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
        "plain": {"seconds": plain.wall, "tokens_per_second": plain_tokens / plain.wall},
        "times_faster": common.ratio(whole, fast),
        "cost_of_steering": overhead,
    }
    path = common.write(options.output, f"steering-{model.name}", result)
    print(
        f"{model.name}: naive {whole.wall:.0f} s for {len(jobs)} chains (extrapolated from "
        f"{len(subset)}), ours {fast.wall:.1f} s for {len(rows)}: "
        f"{result['times_faster']['wall']:.1f}x; steering costs {overhead:+.1%}; wrote {path}"
    )


if __name__ == "__main__":
    main()
