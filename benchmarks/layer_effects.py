"""Layer effects in one pass, against the naive loops of method, section 7, in one process.

    python benchmarks/layer_effects.py --model smollm2 --tokens 800 --positions 40

The naive loops run on some of the seeded positions and are extrapolated to all. A naive pass
forwards the whole prefix, so a late position costs more than an early one: the positions are
sorted, cut into equal groups, the middle of each is timed, and the time is multiplied by the
tokens to be forwarded for all positions over those forwarded for the timed ones. For exact
patching the layers are spread evenly over the timed positions too. The output says what was
timed. On a GPU: ``--model random-qwen2 --device cuda --dtype bfloat16``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from stllms import attribution
from stllms.models import Model


def naive_published(
    model: Model, ids: torch.Tensor, t: int, unit: torch.Tensor
) -> torch.Tensor:
    """One position of the published loop, ``[L]``: forward and backward over the prefix."""
    kept: list[torch.Tensor] = []

    def keep(_module, _inputs, output):
        if not kept:
            output.requires_grad_(True)
        output.retain_grad()
        kept.append(output)

    handles = [layer.register_forward_hook(keep) for layer in model.layers]
    try:
        logits = model.hf(input_ids=ids[None, : t + 1]).logits[0, t].float()
    finally:
        for handle in handles:
            handle.remove()
    log_p = logits.log_softmax(0)
    (-(log_p.detach() * log_p).mean()).backward()
    gradients = torch.stack([h.grad[0, t].float() for h in kept])
    return (gradients * unit.to(gradients)).sum(-1).abs().cpu()


def naive_exact(
    model: Model, ids: torch.Tensor, t: int, layer: int, vector: torch.Tensor
) -> torch.Tensor:
    """KL of one position and layer: a clean and a patched forward over the whole prefix."""

    def add(_module, _inputs, output):
        output = output.clone()
        output[0, t] += vector.to(output)
        return output

    with torch.no_grad():
        clean = model.hf(input_ids=ids[None, : t + 1]).logits[0, t]
        handle = model.layers[layer].register_forward_hook(add)
        try:
            patched = model.hf(input_ids=ids[None, : t + 1]).logits[0, t]
        finally:
            handle.remove()
    log_p, log_q = clean.float().log_softmax(0), patched.float().log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum().cpu()


def middles(values: Sequence[int], k: int) -> list[int]:
    """The middle of each of ``k`` equal groups of sorted values."""
    return [values[(2 * group + 1) * len(values) // (2 * k)] for group in range(k)]


def tokens_of(positions: Iterable[int]) -> int:
    """Tokens that one naive forward a position reads: the prefix up to it, and itself."""
    return sum(t + 1 for t in positions)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--positions", type=int, default=40, help="P, span starts")
    options.add_argument("--directions", type=int, default=4, help="N, behaviours")
    options.add_argument("--timed-positions", type=int, default=5)
    options.add_argument("--timed-patches", type=int, default=8)
    options.add_argument(
        "--max-rows", "--batch-size", type=int, default=None,
        help="rows of a short pass; by default as many as their logits fit the budget",
    )  # fmt: skip
    options.add_argument(
        "--frozen", action="store_true",
        help="not the loop with weight gradients, which take as much memory as the weights",
    )  # fmt: skip
    return options


def main() -> None:
    options = parser().parse_args()
    model = common.build(options)
    result = measure(model, options)
    _report(result, common.write(options.output, f"layer_effects_{common.tag(model)}", result))


def measure(model: Model, options: argparse.Namespace) -> dict:
    """Both objectives against their naive loops: seconds, ratios, differences."""
    draw = random.Random(options.seed)
    vocabulary = model.hf.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(0, vocabulary, (options.tokens,), generator=generator).to(model.device)
    positions = sorted(draw.sample(range(1, options.tokens), options.positions))
    directions = _directions(model, ids, options.directions, generator)

    def fast(n: int, objective: str) -> torch.Tensor:
        return attribution.layer_effects(
            model, ids.cpu(), positions, directions[:n], objective=objective,
            max_rows=options.max_rows,
        )  # fmt: skip

    def forward() -> None:
        with torch.no_grad():
            model.hf(input_ids=ids[None])

    forward()
    (plain, _), (published, fast_published), (one, fast_kl) = common.interleaved(
        forward,
        lambda: fast(options.directions, "published"),
        lambda: fast(1, "kl"),
        repeats=options.repeats,
    )
    all_of_them, _ = common.clocked(lambda: fast(options.directions, "kl"))

    some = middles(positions, min(options.timed_positions, len(positions)))
    unit = torch.nn.functional.normalize(directions[0], dim=-1)
    naive_published(model, ids, positions[0], unit)  # warm
    loop, slow = common.clocked(lambda: [naive_published(model, ids, t, unit) for t in some])
    loaded = None
    if not options.frozen:  # as a model comes from ``from_pretrained``
        model.hf.requires_grad_(True)
        loaded, _ = common.clocked(lambda: [naive_published(model, ids, t, unit) for t in some])
        model.hf.requires_grad_(False).zero_grad(set_to_none=True)
    slow_published = torch.stack(slow, dim=1)
    columns = [positions.index(t) for t in some]
    difference = fast_published[0][:, columns] - slow_published
    layers = middles(range(model.n_layers), options.timed_patches)
    draw.shuffle(layers)
    patches = list(zip(middles(positions, options.timed_patches), layers, strict=True))
    patching, slow_kl = common.clocked(
        lambda: [naive_exact(model, ids, t, i, directions[0, i]) for t, i in patches]
    )
    got = torch.stack([fast_kl[0, i, positions.index(t)] for t, i in patches])
    # Two forwards a timed patch; the loop needs one for each layer and the clean one.
    all_tokens, patched_tokens = tokens_of(positions), 2 * tokens_of(t for t, _ in patches)
    loop_all = loop * (all_tokens / tokens_of(some))
    patching_all = patching * ((model.n_layers + 1) * all_tokens / patched_tokens)
    return {
        "machine": common.machine(model),
        "tokens": options.tokens,
        "positions": len(positions),
        "directions": options.directions,
        "plain_forward_s": plain.__dict__,
        "published": {
            "one_pass_all_behaviours_s": published.__dict__,
            "in_plain_forwards": common.ratio(published, plain),
            "naive_one_behaviour_s_extrapolated": loop_all.__dict__,
            "naive_timed": {
                "seconds": loop.wall,
                "positions": some,
                "tokens_forwarded": tokens_of(some),
                "tokens_of_the_whole_loop": all_tokens,
            },
            "times_faster": common.ratio(loop_all, published),
            "times_faster_than_with_weight_gradients": None
            if loaded is None
            else common.ratio(loaded * (all_tokens / tokens_of(some)), published),
            "relative_difference": float(difference.norm() / slow_published.norm()),
        },
        "kl": {
            "one_direction_s": one.__dict__,
            "in_plain_forwards": common.ratio(one, plain),
            "all_directions_s": all_of_them.__dict__,
            "all_in_plain_forwards": common.ratio(all_of_them, plain),
            "naive_one_direction_s_extrapolated": patching_all.__dict__,
            "naive_timed": {
                "seconds": patching.wall,
                "positions_and_layers": patches,
                "tokens_forwarded": patched_tokens,
                "tokens_of_the_whole_loop": (model.n_layers + 1) * all_tokens,
            },
            "times_faster": common.ratio(patching_all, one),
            "largest_difference_nats": float((got - torch.stack(slow_kl)).abs().max()),
            "effects_compared_nats": [float(x) for x in slow_kl],
        },
    }


def _directions(
    model: Model, ids: torch.Tensor, n: int, generator: torch.Generator
) -> torch.Tensor:
    """Random directions as long as the average residual of each layer, ``[N, L, D]``."""
    lengths: list[float] = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, output: lengths.append(float(output.float().mean((0, 1)).norm()))
        )
        for layer in model.layers
    ]
    try:
        with torch.no_grad():
            model.decoder(input_ids=ids[None])
    finally:
        for handle in handles:
            handle.remove()
    noise = torch.randn(n, model.n_layers, model.d_model, generator=generator)
    return torch.nn.functional.normalize(noise, dim=-1) * torch.tensor(lengths)[:, None]


def _report(result: dict, path: Path) -> None:
    published, kl = result["published"], result["kl"]
    size = f"T={result['tokens']}, P={result['positions']}, N={result['directions']}"
    print(f"{result['machine']['model']} on {result['machine']['device']}: {size}")
    print(f"one plain forward: {result['plain_forward_s']['wall']:.3f} s")
    for name, part, own, naive, timed in (
        ("published, all behaviours", published, "one_pass_all_behaviours_s",
         "naive_one_behaviour_s_extrapolated", "positions"),
        ("exact KL, one behaviour", kl, "one_direction_s",
         "naive_one_direction_s_extrapolated", "positions_and_layers"),
    ):  # fmt: skip
        faster, forwards = part["times_faster"], part["in_plain_forwards"]
        clock = part["naive_timed"]
        print(
            f"{name}: {part[own]['wall']:.3f} s = {forwards['wall']:.2f} plain forwards\n"
            f"  naive loop for one behaviour {part[naive]['wall']:.1f} s: "
            f"{faster['wall']:.0f}x ({faster['cpu']:.0f}x by the CPU clock)\n"
            f"  extrapolated by tokens forwarded: {clock['seconds']:.1f} s for "
            f"{clock['tokens_forwarded']} of {clock['tokens_of_the_whole_loop']} tokens, at "
            f"{timed.replace('_', ' ')} {clock[timed]}"
        )
    if loaded := published["times_faster_than_with_weight_gradients"]:
        print(
            f"published loop with weight gradients, as a model is loaded: {loaded['wall']:.0f}x"
        )
    print(
        f"exact KL, all behaviours: {kl['all_in_plain_forwards']['wall']:.2f} plain forwards\n"
        f"agreement: published {published['relative_difference']:.1e} relative, "
        f"KL {kl['largest_difference_nats']:.1e} nats\nwritten: {path}"
    )


if __name__ == "__main__":
    main()
