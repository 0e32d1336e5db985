"""Span means of every layer for every behaviour, in one forward pass per batch.

Method, section 6. For a span ``[s, e)`` of ``prompt_ids + output_ids`` and layer ``l``::

    span mean     = average of h[l, s-1 ... min(e-1, s+10)-1]     (at most 11 tokens, from s-1)
    response mean = average of h[l, first span's start ... last span's end - 1]

Both are rows of one averaging matrix ``A [B, S, T]``, so a layer costs one batched product
``A @ h[l]`` inside the trace, after which ``h[l]`` is free. The sums of control directions
(method, section 13) are linear in the span means and made in the same pass.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnsight import save
from torch import Tensor

from stllms.annotation.placing import check
from stllms.labels import PAPER, LabelSet
from stllms.models.model import Model
from stllms.records import Response, Span
from stllms.runs.files import BadFile, load_tensors, remove, save_tensors
from stllms.runs.store import refuse_other_work
from stllms.runs.workers import Tick, over
from stllms.terminal import token_bar
from stllms.vectors.means import HALVES, MIN_SPANS, PARTS, Means, is_build, mark, part_of

#: Tokens of a span that enter its mean, counted from the one before it.
WINDOW = 11
#: Responses between two saves of :func:`collect`.
SAVE_EVERY = 50


class _Job(NamedTuple):
    """One response: ids up to the end of its last span, windows and labels of its spans."""

    task_id: str
    ids: tuple[int, ...]
    whole: tuple[int, int]
    windows: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]


def collect(
    model: Model,
    responses: Sequence[Response],
    spans_per_response: Sequence[Sequence[Span]],
    *,
    batch_size: int = 8,
    keep: Sequence[int] = (),
    controls: int = 0,
    seed: int = 0,
    path: Path | None = None,
    labels: LabelSet = PAPER,
    progress: bool = True,
) -> Means:
    """Means of all spans of some responses.

    The build half is read first; its directions then project the spans of the test half
    (:func:`stllms.vectors.quality.separability`), so that this needs no second pass.

    Args:
        model: whose activations.
        responses: in any order; the result does not depend on it.
        spans_per_response: the token spans of each response, as its annotation has them; those
            of other labels than those of ``labels`` are counted, not used.
        batch_size: responses in a forward pass; the result does not depend on it. If the
            device runs out of memory, it is halved with a warning, and ``model.fits`` keeps
            what fitted.
        keep: layers whose span means are kept one by one (``Means.samples``); memory then
            grows with the number of spans.
        controls: how many control directions of each kind to sum up
            (:mod:`stllms.vectors.nulls`). Each is a function of the seed and the responses
            alone. Shuffled ones imitate the targets with enough spans, in turn.
        seed: of their permutations and signs.
        path: where to save what was read so far, about every :data:`SAVE_EVERY` responses. A
            file that a stopped collection left there is completed, bit for bit as if it had
            not been stopped (at the same ``batch_size``), and removed at the end.
        labels: whose names are the behaviours, whose targets are imitated.
        progress: whether to show a bar.

    Raises:
        ValueError: a response given twice, a span that is empty or outside its response, lists
            of different length, or activations that are not finite (naming where).
        StaleArtefact: a file of a collection of something else (naming what differs).
        BadFile: a file that no collection wrote.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, it is {batch_size}")
    keep = tuple(dict.fromkeys(keep))
    if not set(keep) <= set(range(model.n_layers)):
        raise ValueError(f"{model.name} has {model.n_layers} layers; asked to keep {keep}")
    jobs, ledger = _jobs(responses, spans_per_response, labels.names)
    config: dict[str, Any] = {"window": WINDOW}
    if controls:
        config["controls"] = {"seed": seed, "targets": _targets(jobs, labels)}
    means = Means.zeros(
        labels.names,
        model.n_layers,
        model.d_model,
        model=model.name,
        sample_layers=keep,
        controls=controls,
        ledger=ledger,
        config=config,
    )
    identity = _identity(model, means, jobs)
    means, done = _resume(path, means, identity)
    n_build = sum(is_build(job.task_id) for job in jobs)
    size = min(batch_size, model.fits)
    with token_bar(len(jobs), "activations", unit="responses", enabled=progress) as bar:
        bar.skip(done)
        for end in (n_build, len(jobs)):
            parts = [jobs[at : min(at + size, end)] for at in range(done, end, size)]
            make = partial(_read, plan=_plan(means, test=end > n_build))
            made = over(model, make, parts, bar.tick)
            for part, found in zip(parts, made, strict=True):
                for batch, read in found:
                    means = _add(means, batch, read)
                before, done = done, done + len(part)
                if path is not None and done // SAVE_EVERY > before // SAVE_EVERY:
                    save_tensors(path, means.tensors, {"collecting": identity, "done": done})
    if path is not None:
        remove(path)
    return means


# --- what is read, and in which order ----------------------------------------------------


def _jobs(
    responses: Sequence[Response],
    spans_per_response: Sequence[Sequence[Span]],
    names: Sequence[str],
) -> tuple[list[_Job], dict[str, int]]:
    """Checked work in the order of reading: the build half, then the test half, each with
    similar lengths together, longest first; and the ledger of what is used and what is not. A
    span at token 0 has no token before it and is dropped."""
    if len(responses) != len(spans_per_response):
        raise ValueError(
            f"{len(responses)} responses but spans of {len(spans_per_response)} of them"
        )
    for task_id, n in Counter(response.task_id for response in responses).items():
        if n > 1:
            raise ValueError(f"response {task_id!r} is given {n} times: give each once")
    jobs = []
    for response, spans in zip(responses, spans_per_response, strict=True):
        check(response, spans)
        if spans:
            jobs.append(_job(response, spans, names))
    jobs.sort(key=lambda job: (not is_build(job.task_id), -len(job.ids), job.task_id))
    every = [span for spans in spans_per_response for span in spans]
    late = sum(span.start > 0 for span in every)
    used = sum(len(job.labels) for job in jobs)
    return jobs, {
        "responses": len(jobs),
        "responses without spans": len(responses) - len(jobs),
        "spans": used,
        "spans at token 0": len(every) - late,
        "spans of other labels": late - used,
    }


def _job(response: Response, spans: Sequence[Span], names: Sequence[str]) -> _Job:
    used = [span for span in spans if span.label in names and span.start > 0]
    whole = (min(span.start for span in spans), max(span.end for span in spans))
    return _Job(
        task_id=response.task_id,
        ids=(*response.prompt_ids, *response.output_ids)[: whole[1]],
        whole=whole,
        windows=tuple((s.start - 1, min(s.end - 1, s.start + WINDOW - 1)) for s in used),
        labels=tuple(names.index(span.label) for span in used),
    )


def _targets(jobs: Sequence[_Job], labels: LabelSet) -> list[str]:
    """The behaviours that shuffled controls imitate."""
    spans = Counter(labels.names[label] for job in jobs for label in job.labels)
    known = [name for name in labels.names if spans[name] >= MIN_SPANS]
    return [name for name in labels.targets if name in known] or known


# --- resuming ----------------------------------------------------------------------------


def _identity(model: Model, means: Means, jobs: list[_Job]) -> dict[str, Any]:
    """What a collection is of: all that its sums depend on, by name."""
    responses, spans = sha256(), sha256()
    for job in jobs:
        responses.update(repr((job.task_id, job.ids)).encode())
        spans.update(repr((job.whole, job.windows, job.labels)).encode())
    return {
        "model": f"{model.name}, {model.n_layers} layers of {model.d_model}, {model.dtype}",
        "responses": f"{len(jobs)}, {responses.hexdigest()[:12]}",
        "spans": spans.hexdigest()[:12],
        "behaviours": list(means.behaviours),
        "keep": list(means.sample_layers),
        "number of controls": len(means.signs),
        **means.config,
    }


def _resume(path: Path | None, means: Means, identity: dict[str, Any]) -> tuple[Means, int]:
    """The sums that a stopped collection left, and how many responses are in them."""
    if path is None or not path.is_file():
        return means, 0
    tensors, metadata = load_tensors(path)
    if "collecting" not in metadata or set(tensors) != set(means.tensors):
        raise BadFile(f"{path}: no unfinished collection, but {', '.join(tensors)}")
    refuse_other_work(path, metadata["collecting"], identity)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return replace(means, **copies), metadata["done"]


# --- one batch ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is read of every batch of one half: the sums of ``n`` behaviours, and of shuffled
    controls that imitate ``targets [K]`` and as many signed ones, drawn by ``seed``; the spans
    at ``layers``; in the test half the projections on ``units [N, L, D]``."""

    n: int
    targets: tuple[int, ...]
    seed: int
    layers: tuple[int, ...]
    units: Tensor
    test: bool


def _plan(means: Means, *, test: bool) -> _Plan:
    drawn = means.config.get("controls", {"seed": 0, "targets": ()})
    targets = [means.behaviours.index(name) for name in drawn["targets"]] or [-1]
    units = means.units(HALVES["build"]).float()
    return _Plan(
        n=len(means.behaviours),
        targets=tuple(np.resize(targets, len(means.signs)).tolist()),
        seed=drawn["seed"],
        layers=means.sample_layers,
        units=units if test else units[:0],
        test=test,
    )


def _add(means: Means, batch: list[_Job], read: dict[str, Tensor]) -> Means:
    """What was read of a batch of one half, added to ``means`` in place; returns the record
    with its lists of spans extended."""
    n, k = len(means.behaviours), len(means.signs)
    sums, squares, controls, wholes = (
        read[name].double().transpose(0, 1)
        for name in ("sums", "squares", "controls", "wholes")
    )
    means.sums.add_(sums.unflatten(0, (PARTS, n)))
    means.squares.add_(squares.unflatten(0, (PARTS, n)))
    means.counts.add_(read["counts"].unflatten(0, (PARTS, n)))
    means.shuffled.add_(controls[:k])
    means.signed.add_(controls[k:])
    means.signs.add_(read["signs"])
    parts = torch.tensor([part_of(job.task_id) for job in batch])
    means.overall_sums.index_add_(0, parts, wholes)
    means.overall_counts.add_(torch.bincount(parts, minlength=PARTS))
    labels = torch.tensor([x for job in batch for x in job.labels], dtype=torch.long)
    new: dict[str, Tensor] = {}
    if "projections" in read:
        projections = read["projections"].transpose(0, 1)
        new |= {"projections": projections, "projection_labels": labels}
    if means.sample_layers:
        owners = torch.tensor([mark(job.task_id) for job in batch for _ in job.labels]).long()
        samples = read["spans"].transpose(0, 1)
        new |= {"samples": samples, "sample_labels": labels, "sample_responses": owners}
    return replace(means, **{k: torch.cat([getattr(means, k), v]) for k, v in new.items()})


def _read(
    model: Model, part: list[_Job], tick: Tick, *, plan: _Plan
) -> list[tuple[list[_Job], dict[str, Tensor]]]:
    """What is read of a part of one half: of it as one batch, or of as many as fit."""
    found, done = [], 0
    while done < len(part):
        batch = part[done : done + model.fits]
        try:
            read = _of_batch(model, batch, plan)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            model.fits = len(batch) // 2
            note = f"out of memory: going on with batches of {model.fits} responses"
            warnings.warn(note, stacklevel=2)
            continue
        found.append((batch, read))
        done += len(batch)
        tick(sum(len(job.ids) for job in batch), len(batch))
    return found


def _of_batch(model: Model, batch: list[_Job], plan: _Plan) -> dict[str, Tensor]:
    """What :func:`_of_layer` reads of every layer, stacked ``[L, ...]`` on the CPU, ``spans``
    of the layers to keep, in their order; and ``counts [H * N]``, ``signs [K]``.

    Rows are padded on the right: later tokens cannot reach earlier ones in a causal model, so
    no mask is needed. Raises ``ValueError`` for activations that are not finite.
    """
    groups, weights = _groups(batch, plan.n), _weights(batch, plan)
    counts, signs = groups.sum(1).long(), weights[len(plan.targets) :].sum(1).long()
    ids, matrix, place = (x.to(model.device) for x in _padded(batch, model.pad_id))
    groups, weights = groups.to(model.device), weights.to(model.device)
    units = plan.units.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), model.nn_decoder.trace(**inputs, use_cache=False):
        layers, kept = save([]), save({})
        for layer, envoy in enumerate(model.nn_layers):
            products, spans, found = _of_layer(
                envoy.output, matrix, place, groups, weights, units[:, layer]
            )
            found["wholes"] = products[:, 0].clone()  # a view would keep all products
            found["finite"] = products.isfinite().flatten(1).all(1)
            layers.append(found)
            if layer in plan.layers:
                kept[layer] = spans
    by_name = {name: [found[name] for found in layers] for name in layers[0]}
    by_name["spans"] = [kept[layer] for layer in plan.layers]
    if not plan.test:
        del by_name["projections"]
    read = {
        name: torch.stack([x.to(model.device) for x in values]).cpu()
        for name, values in by_name.items()
        if values
    }
    if not read["finite"].all():
        layer, row = (~read["finite"]).nonzero()[0].tolist()
        task_id = batch[row].task_id
        raise ValueError(f"activations are not finite: layer {layer}, response {task_id!r}")
    return read | {"counts": counts, "signs": signs}


def _of_layer(
    h: Tensor, matrix: Tensor, place: Tensor, groups: Tensor, weights: Tensor, units: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What is read of a layer's output ``h [B, T, D]``, on its own device, since a model may
    lie on several: all products ``A @ h``; the span means ``[S, D]``, those at rows ``place
    [S]``; their sums and sums of squares by group, sums of controls, and projections on
    ``units [N, D]``."""
    matrix, place, groups, weights, units = (
        x.to(h.device) for x in (matrix, place, groups, weights, units)
    )
    products = torch.bmm(matrix, h.float())
    spans = products.flatten(0, 1).index_select(0, place)
    return (
        products,
        spans,
        {
            "sums": groups @ spans,
            "squares": groups @ spans.square(),
            "controls": weights @ spans,
            "projections": spans @ units.T,
        },
    )


def _padded(batch: list[_Job], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ids [B, T]``; ``A [B, 1 + S, T]``, whose row 0 averages the whole response and row
    ``1 + k`` its window ``k``; and the places of all windows among the ``B * (1 + S)`` rows."""
    ids = torch.full((len(batch), max(len(job.ids) for job in batch)), pad_id)
    matrix = torch.zeros(len(batch), 1 + max(len(job.windows) for job in batch), ids.shape[1])
    place = []
    for row, job in enumerate(batch):
        ids[row, : len(job.ids)] = torch.tensor(job.ids)
        for k, (start, stop) in enumerate((job.whole, *job.windows)):
            matrix[row, k, start:stop] = 1.0 / (stop - start)
        place += [row * matrix.shape[1] + 1 + k for k in range(len(job.windows))]
    return ids, matrix, torch.tensor(place, dtype=torch.long)


def _groups(batch: list[_Job], n: int) -> Tensor:
    """``[H * N, S]``, zeros and ones: the spans of each behaviour in each part."""
    spans = [part_of(job.task_id) * n + label for job in batch for label in job.labels]
    rows = torch.zeros(PARTS * n, len(spans))
    rows[spans, range(len(spans))] = 1.0
    return rows


def _weights(batch: list[_Job], plan: _Plan) -> Tensor:
    """``[2 * K, S]``, the weights of the spans in the sums of controls: in the ``K`` shuffled
    ones 1 where a permuted label is the control's target, in the ``K`` signed ones random
    signs. Each kind has a generator of its own for each response, so that control ``i`` is the
    same however many there are."""
    k, targets = len(plan.targets), np.array(plan.targets, dtype=int)
    made = []
    for job in batch:
        shuffling, tossing = (
            np.random.default_rng([plan.seed, mark(job.task_id), kind]) for kind in (0, 1)
        )
        shape = (k, len(job.labels))
        labels = np.array(job.labels, dtype=int)
        permuted = np.array([shuffling.permutation(labels) for _ in range(k)]).reshape(shape)
        signs = 1 - 2 * tossing.integers(0, 2, shape)
        made.append(np.concatenate([permuted == targets[:, None], signs]))
    return torch.from_numpy(np.concatenate(made, 1)).float()
