"""Span means of every layer in one pass, against keeping every hidden state, in one process.

    python benchmarks/activations.py --model smollm2 --tokens 400 --responses 32

The naive procedure forwards one response at a time, keeps ``[L, T, D]`` and loops over spans
and behaviours. Peak memory is the resident set of a subprocess that does one thing only.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from stllms import activations
from stllms.models import Model
from stllms.records import BEHAVIOURS, Response, TokenSpan


def work(model: Model, n: int, tokens: int, seed: int) -> tuple[list, list]:
    """Seeded random responses, and spans of 10 to 30 tokens over the last three quarters."""
    draw = random.Random(seed)
    vocabulary = model.hf.get_input_embeddings().weight.shape[0]
    responses, spans = [], []
    for number in range(n):
        length = draw.randrange(int(0.8 * tokens), tokens + 1)
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        cut = length // 4
        responses.append(
            Response(f"r{number}", "", "", tuple(ids[:cut]), tuple(ids[cut:]), "", "", 0, "",
                     closed=True, finished=True)
        )  # fmt: skip
        at, mine = cut, []
        while at < length:
            end = min(at + draw.randrange(10, 31), length)
            mine.append(TokenSpan(draw.choice(BEHAVIOURS), at, end))
            at = end
        spans.append(mine)
    return responses, spans


def naive(model: Model, responses: list, spans: list) -> tuple[dict, torch.Tensor]:
    """Means by METHOD section 6, one response and one span at a time."""
    sums = {
        b: torch.zeros(model.n_layers, model.d_model, dtype=torch.float64) for b in BEHAVIOURS
    }
    counts = dict.fromkeys(BEHAVIOURS, 0)
    overall = torch.zeros(model.n_layers, model.d_model, dtype=torch.float64)
    for response, mine in zip(responses, spans, strict=True):
        ids = torch.tensor([response.prompt_ids + response.output_ids], device=model.device)
        kept: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(
                lambda _m, _i, output, kept=kept: kept.append(output[0])
            )
            for layer in model.layers
        ]
        with torch.no_grad():
            model.hf(input_ids=ids)
        for handle in handles:
            handle.remove()
        hidden = torch.stack(kept).float().cpu()
        for b in BEHAVIOURS:
            for span in mine:
                if span.label == b and span.start > 0:
                    window = hidden[:, span.start - 1 : min(span.end - 1, span.start + 10)]
                    sums[b] += window.mean(1)
                    counts[b] += 1
        overall += hidden[:, mine[0].start : mine[-1].end].mean(1)
    return {b: sums[b] / max(counts[b], 1) for b in BEHAVIOURS}, overall / len(responses)


def forward_only(model: Model, responses: list, batch_size: int, *, head: bool) -> None:
    """The same batches through the decoder, or through the whole model with its logits."""
    rows = sorted((r.prompt_ids + r.output_ids for r in responses), key=len, reverse=True)
    module = model.hf if head else model.decoder
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        ids = ids.to(model.device)
        with torch.no_grad():
            module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def peak(options, mode: str) -> int:
    """Peak resident bytes of a subprocess that builds the model and does ``mode``."""
    command = [sys.executable, __file__, "--mode", mode]
    for name in ("model", "tokens", "layers", "vocabulary", "device", "dtype", "seed"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    command += ["--responses", str(options.responses), "--batch-size", str(options.batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--responses", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--mode", choices=["all", "build", "plain", "collect"], default="all")
    options.add_argument("--no-memory", action="store_true")
    options = options.parse_args()
    model = common.build(options)
    responses, spans = work(model, options.responses, options.tokens, options.seed)

    def collect():
        return activations.collect(
            model, responses, spans, batch_size=options.batch_size, progress=False
        )

    if options.mode != "all":
        if options.mode == "plain":
            forward_only(model, responses, options.batch_size, head=True)
        elif options.mode == "collect":
            collect()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"peak": used * (1 if sys.platform == "darwin" else 1024)}))
        return

    forward_only(model, responses[: options.batch_size], options.batch_size, head=False)
    decoder, _ = common.clocked(
        lambda: forward_only(model, responses, options.batch_size, head=False),
        repeats=options.repeats,
    )
    one_pass, means = common.clocked(collect, repeats=options.repeats)
    slow, (want, want_overall) = common.clocked(lambda: naive(model, responses, spans))
    want = torch.stack([want[b] for b in BEHAVIOURS])
    result = {
        "machine": common.machine(model),
        "responses": len(responses),
        "tokens": options.tokens,
        "batch_size": options.batch_size,
        "spans": int(means.counts.sum()),
        "decoder_forwards_s": decoder.__dict__,
        "one_pass_s": one_pass.__dict__,
        "in_decoder_forwards": common.ratio(one_pass, decoder),
        "naive_s": slow.__dict__,
        "times_faster": common.ratio(slow, one_pass),
        "relative_difference": float((means.mean() - want).norm() / want.norm()),
        "relative_difference_overall": float(
            (means.overall() - want_overall).norm() / want_overall.norm()
        ),
    }
    if not options.no_memory:
        peaks = {mode: peak(options, mode) for mode in ("build", "plain", "collect")}
        result["peak_resident_bytes"] = peaks
        result["peak_over_plain_forward"] = peaks["collect"] / peaks["plain"]
    path = common.write(options.output, f"activations_{options.model}", result)
    print(
        f"{model.name} on {result['machine']['device']}: {len(responses)} responses of up to "
        f"{options.tokens} tokens, {result['spans']} spans\n"
        f"one pass {one_pass.wall:.2f} s = {result['in_decoder_forwards']['wall']:.2f} decoder "
        f"forwards ({result['in_decoder_forwards']['cpu']:.2f} by the CPU clock); naive "
        f"{slow.wall:.2f} s, {result['times_faster']['wall']:.1f}x\n"
        f"agreement {result['relative_difference']:.1e} relative; peak memory "
        f"{result.get('peak_over_plain_forward', float('nan')):.2f} of a plain forward\n"
        f"written: {path}"
    )


if __name__ == "__main__":
    main()
