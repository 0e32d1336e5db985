"""Steered chains a second against those who steer with ``transformers``, token for token.

    uv venv ../peers && uv pip install --python ../peers/bin/python \\
        steering-vectors==0.12.2 repeng==0.4.0 torch
    python benchmarks/peers.py --peers ../peers/bin/python    # smollm2, two quiet cores

16 tasks x 9 conditions (plain, + and - of four random directions at the middle layer) x 64
tokens, greedy, float32, no early stop for anybody:

* ours, in batches that :func:`default_batch_size` gives;
* a careful user of the same ``transformers``: ``generate`` with a hook that adds a vector a
  row, rows of all conditions sorted by length, batches of 48;
* ``steering-vectors`` and ``repeng`` in an environment of their own (their ``transformers`` is
  older): a vector a batch, so batches are the 16 tasks under a condition.

All take turns. A run in which anything else took more than 5 % of the cores is discarded and
done again, ``--tries`` times at most; the fastest of ``--repeats`` counts. Every chain must be
ours token for token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import peer
import steering

from stllms.models import Model
from stllms.models.engines import Row
from stllms.models.engines import transformers as decode

#: Rows of a batch of the careful user, tasks of a batch of the peers.
CAREFUL, PEERS = 48, 16

Chains = list[list[int]]


def ours(model: Model, rows: Sequence[Row], limit: int, batch: int) -> Chains:
    """Our loop."""
    written = decode.run(model, rows, max_new_tokens=limit, batch_size=batch)
    return [list(one.ids) for one in written]


def careful(model: Model, rows: Sequence[Row], limit: int) -> Chains:
    """``generate`` with a vector a row."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
    layer = model.layers[model.n_layers // 2]
    found: Chains = [[]] * len(rows)
    for start in range(0, len(rows), CAREFUL):
        part = order[start : start + CAREFUL]
        vectors = torch.zeros(len(part), 1, model.d_model)
        for place, i in enumerate(part):
            for item in rows[i].interventions:
                vectors[place, 0] = item.coefficient * item.direction
        hook = layer.register_forward_hook(lambda _m, _i, out, push=vectors: out + push)
        prompts = [rows[i].prompt_ids for i in part]
        for i, ids in zip(
            part, peer.generate(model.hf, prompts, limit, model.pad_id), strict=True
        ):
            found[i] = ids
        hook.remove()
    return found


def theirs(python: str, name: str, folder: Path) -> dict[str, Any]:
    """A run of a peer; its chains in the order of our rows."""
    script = Path(__file__).with_name("peer.py")
    done = subprocess.run(
        [python, str(script), name, str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    run = json.loads(done.stdout.splitlines()[-1])
    run["chains"] = [chain for task in zip(*run["chains"], strict=True) for chain in task]
    return run


def handed_over(model: Model, rows: Sequence[Row], limit: int, folder: Path) -> None:
    """The model and the work, for an environment without stllms."""
    config = model.hf.config.to_dict()
    config.pop("quantization_config", None)  # of the file that smollm2 was read from
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # as transformers 4 reads it
    (folder / "config.json").write_text(json.dumps(config, default=str))
    weights = dict(model.hf.named_parameters())  # a tied head once, as the embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    conditions = [
        (item.interventions[0].direction.tolist(), item.interventions[0].coefficient)
        if item.interventions
        else ([], 0.0)
        for item in rows[: steering.CONDITIONS]
    ]
    work = {
        "prompts": [row.prompt_ids for row in rows[:: steering.CONDITIONS]],
        "conditions": conditions,
        "layer": model.n_layers // 2,
        "tokens": limit,
        "batch": PEERS,
        "pad": model.pad_id,
    }
    (folder / "work.json").write_text(json.dumps(work))


def measured(systems: dict[str, Callable[[], dict]], repeats: int, tries: int) -> dict:
    """Undisturbed runs of every system in turn, ``repeats`` of each, and how many were not."""
    kept: dict[str, list[dict]] = {name: [] for name in systems}
    discarded = dict.fromkeys(systems, 0)
    for _ in range(tries):
        for name, system in systems.items():
            if len(kept[name]) == repeats:
                continue
            run = system()
            quiet = run["others"] <= peer.DISTURBED
            print(
                f"{name}: {run['seconds']:.1f} s, others {run['others']:.1%}"
                + ("" if quiet else ", discarded"),
                flush=True,
            )
            if quiet:
                kept[name].append(run)
            else:
                discarded[name] += 1
    if missing := [name for name, runs in kept.items() if not runs]:
        raise SystemExit(f"no undisturbed run of {', '.join(missing)}: the cores are not quiet")
    return {name: {"runs": kept[name], "discarded": discarded[name]} for name in systems}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = common.parser(__doc__.splitlines()[0])
    options.set_defaults(model="smollm2", tokens=64, dtype="float32", device="cpu", repeats=2)
    options.add_argument("--tasks", type=int, default=16)
    options.add_argument("--batch-size", type=int, default=None, help="ours")
    options.add_argument("--peers", help="the Python that has steering-vectors and repeng")
    options.add_argument("--tries", type=int, default=4, help="at most, a system")
    options = options.parse_args(argv)
    model = common.build(options)
    model.eos_ids = ()
    prompts = steering.prompts_of(model, options.tasks)
    rows = steering.our_rows(prompts, steering.directions(model, options.seed))
    batch = options.batch_size or decode.default_batch_size(model)
    limit = options.tokens
    for work in (lambda: ours(model, rows[:9], 2, 9), lambda: careful(model, rows[:9], 2)):
        work()  # warm
    hooks = "transformers, per-row hooks"
    systems: dict[str, Callable[[], dict]] = {
        "stllms": lambda: peer.alone(lambda: ours(model, rows, limit, batch)),
        hooks: lambda: peer.alone(lambda: careful(model, rows, limit)),
    }
    with tempfile.TemporaryDirectory() as name:
        if options.peers:
            handed_over(model, rows, limit, Path(name))
            for other in ("steering-vectors", "repeng"):
                systems[other] = lambda other=other: theirs(options.peers, other, Path(name))
        found = measured(systems, options.repeats, options.tries)
    reference, table = found["stllms"]["runs"][0]["chains"], {}
    tokens = len(rows) * limit
    quickest = min(run["seconds"] for run in found["stllms"]["runs"])
    sizes = {"stllms": min(batch, model.fits, len(rows)), hooks: CAREFUL}
    for name, one in found.items():
        best = min(run["seconds"] for run in one["runs"])
        same = [
            sum(a == b for a, b in zip(reference, run["chains"], strict=True))
            for run in one["runs"]
        ]
        table[name] = {
            "batch_size": sizes.get(name, PEERS),
            "tokens_per_second": tokens / best,
            "ours_times_as_fast": best / quickest,
            "chains_equal_to_ours": min(same),
            "seconds": [run["seconds"] for run in one["runs"]],
            "others_took": [run["others"] for run in one["runs"]],
            "discarded_runs": one["discarded"],
        }
        print(
            f"{name}: {tokens / best:.1f} tokens/s, ours {best / quickest:.2f} times as fast, "
            f"{min(same)} of {len(rows)} chains equal"
        )
    content = {
        "machine": common.machine(model),
        "chains": len(rows),
        "new_tokens": limit,
        "systems": table,
    }
    print(common.write(options.output, f"peers-{common.tag(model)}", content))


if __name__ == "__main__":
    main()
