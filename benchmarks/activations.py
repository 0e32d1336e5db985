"""Span means of every layer in one pass, against keeping every hidden state, in one process.

    python benchmarks/activations.py --model smollm2 --tokens 400 --responses 32

The naive procedure forwards one response at a time, keeps ``[L, T, D]`` and loops over spans
and behaviours.

Peak memory is that of subprocesses that do one thing only, counted from when the model is
loaded (reading a file takes more than it leaves): the resident set, on a GPU the device memory
allocated. ``decoder`` and ``plain`` forward the same responses without and with the head, whose
logits alone may outweigh everything else. A peak depends on the rows of a batch, not on how
many batches follow: small batches are enough, and the pass is made with two batches' and eight
batches' responses to show it. Peaks scatter by some MiB, for ``tiny-thinker`` as much as the
forward takes. On a GPU: ``--model random-qwen2 --device cuda --dtype bfloat16 --batch-size 256
--responses 512``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from stllms.labels import PAPER
from stllms.models.model import Model
from stllms.records import Response, Span
from stllms.vectors import activations

#: What a subprocess does; see :func:`child`.
MODES = ("build", "decoder", "plain", "collect")
#: Linux: writing 5 to the first makes the resident set's peak, in the second, start anew.
FORGET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def work(model: Model, n: int, least: int, most: int, seed: int) -> tuple[list, list]:
    """Seeded random responses of ``least`` to ``most`` tokens, and spans of 10 to 30 tokens
    over the last three quarters."""
    draw = random.Random(seed)
    vocabulary = model.hf.get_input_embeddings().weight.shape[0]
    responses, spans = [], []
    for number in range(n):
        length = draw.randrange(least, most + 1)
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        cut = length // 4
        responses.append(
            Response(f"r{number}", "", "", tuple(ids[:cut]), tuple(ids[cut:]), "", "", 0, "",
                     closed=True, finished=True)
        )  # fmt: skip
        at, mine = cut, []
        while at < length:
            end = min(at + draw.randrange(10, 31), length)
            mine.append(Span(draw.choice(PAPER.names), at, end))
            at = end
        spans.append(mine)
    return responses, spans


def naive(model: Model, responses: list, spans: list) -> tuple[dict, torch.Tensor]:
    """Means by the method, section 6, one response and one span at a time."""
    sums = {
        b: torch.zeros(model.n_layers, model.d_model, dtype=torch.float64) for b in PAPER.names
    }
    counts = dict.fromkeys(PAPER.names, 0)
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
        for b in PAPER.names:
            for span in mine:
                if span.label == b and span.start > 0:
                    window = hidden[:, span.start - 1 : min(span.end - 1, span.start + 10)]
                    sums[b] += window.mean(1)
                    counts[b] += 1
        overall += hidden[:, mine[0].start : mine[-1].end].mean(1)
    return {b: sums[b] / max(counts[b], 1) for b in PAPER.names}, overall / len(responses)


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


def child(options) -> None:
    """Do ``--mode`` and print the peak bytes of it, the loaded model included."""
    model = common.build(options)
    responses, spans = work(
        model, options.responses, options.tokens, options.tokens, options.seed
    )
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif FORGET.exists():
        FORGET.write_text("5")
    if options.mode in ("decoder", "plain"):
        forward_only(model, responses, options.batch_size, head=options.mode == "plain")
    elif options.mode == "collect":
        activations.collect(
            model, responses, spans, batch_size=options.batch_size, progress=False
        )
    print(json.dumps({"peak": torch.cuda.max_memory_allocated() if cuda else resident_peak()}))


def resident_peak() -> int:
    """Bytes. Not ``ru_maxrss`` on Linux: a subprocess begins with that of its parent."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def memory(options, cuda: bool) -> dict:
    """Peaks of the subprocesses and their ratios."""
    few, many = 2 * options.memory_batch, 8 * options.memory_batch
    given = []
    for name in ("model", "tokens", "layers", "vocabulary", "device", "dtype", "seed"):
        if getattr(options, name) is not None:
            given += [f"--{name}", str(getattr(options, name))]

    def peak(mode: str, responses: int = few) -> int:
        command = [sys.executable, __file__, "--mode", mode, "--responses", str(responses)]
        command += ["--batch-size", str(options.memory_batch), *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return int(json.loads(done.stdout.splitlines()[-1])["peak"])

    if cuda:
        torch.cuda.empty_cache()  # leave room to the subprocesses
    build, decoder, plain = peak("build"), peak("decoder"), peak("plain")
    collected = {few: peak("collect", few), many: peak("collect", many)}
    most = max(collected.values())
    return {
        "of": "device memory allocated" if cuda else "resident set",
        "since": "the model is loaded" if cuda or FORGET.exists() else "the process began",
        "batch_size": options.memory_batch,
        "tokens": options.tokens,
        "peak_bytes": {
            "build_only": build,
            "decoder_forward": decoder,
            "plain_forward_with_head": plain,
            "collect_by_responses": collected,
        },
        "collect_over_decoder": most / decoder,
        "collect_over_plain": most / plain,
        "extra_over_extra_of_decoder": (most - build) / max(decoder - build, 1),
        "extra_of_many_over_few": (collected[many] - build) / max(collected[few] - build, 1),
    }


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--responses", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--memory-batch", type=int, default=4, help="rows; 0: no memory part")
    options.add_argument("--mode", choices=["all", *MODES], default="all", help="internal")
    return options


def main() -> None:
    options = parser().parse_args()
    if options.mode != "all":
        child(options)
        return
    model = common.build(options)
    result = measure(model, options)
    if options.memory_batch:
        result["memory"] = memory(options, model.device.type == "cuda")
    _report(result, common.write(options.output, f"activations_{common.tag(model)}", result))


def measure(model: Model, options: argparse.Namespace) -> dict:
    """One pass against decoder forwards and the naive procedure: seconds, ratios,
    differences."""
    responses, spans = work(
        model, options.responses, int(0.8 * options.tokens), options.tokens, options.seed
    )
    forward_only(model, responses[: options.batch_size], options.batch_size, head=False)
    (decoder, _), (one_pass, means) = common.interleaved(
        lambda: forward_only(model, responses, options.batch_size, head=False),
        lambda: activations.collect(
            model, responses, spans, batch_size=options.batch_size, progress=False
        ),
        repeats=options.repeats,
    )
    slow, (want, want_overall) = common.clocked(lambda: naive(model, responses, spans))
    want = torch.stack([want[b] for b in PAPER.names])
    return {
        "machine": common.machine(model),
        "responses": len(responses),
        "tokens": options.tokens,
        "batch_size": min(options.batch_size, len(responses)),
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


def _report(result: dict, path: Path) -> None:
    forwards, faster = result["in_decoder_forwards"], result["times_faster"]
    print(
        f"{result['machine']['model']} on {result['machine']['device']}: "
        f"{result['responses']} responses of up to {result['tokens']} tokens, "
        f"{result['spans']} spans\n"
        f"one pass {result['one_pass_s']['wall']:.2f} s = {forwards['wall']:.2f} decoder "
        f"forwards ({forwards['cpu']:.2f} by the CPU clock); naive "
        f"{result['naive_s']['wall']:.2f} s, {faster['wall']:.1f}x\n"
        f"agreement {result['relative_difference']:.1e} relative"
    )
    if "memory" in result:
        used = result["memory"]
        peaks = dict(used["peak_bytes"])
        for n, value in peaks.pop("collect_by_responses").items():
            peaks[f"collect of {n} responses"] = value
        print(f"peak {used['of']} since {used['since']}, batches of {used['batch_size']}:")
        for name, value in peaks.items():
            print(f"  {name.replace('_', ' '):27s}{value / 2**20:10.0f} MiB")
        print(
            f"  collect over decoder {used['collect_over_decoder']:.2f}, over plain "
            f"{used['collect_over_plain']:.2f}; without the model, over decoder "
            f"{used['extra_over_extra_of_decoder']:.2f}, more responses over fewer "
            f"{used['extra_of_many_over_few']:.2f}"
        )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
