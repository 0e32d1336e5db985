"""Span means of every layer for every behaviour, in one forward pass a batch.

METHOD, section 6. For a span ``[s, e)`` of ``prompt_ids + output_ids`` and layer ``l``::

    span mean    = average of h[l, s-1 ... min(e-1, s+10)-1]     (at most 11 tokens, from s-1)
    response mean = average of h[l, first span's start ... last span's end - 1]

Both are rows of one averaging matrix ``A [B, S, T]``, so that a layer costs one batched product
``A @ h[l]`` inside the nnsight trace of the decoder (no logits are computed), after which
``h[l]`` is free: nothing of the size tokens x layers is kept. The products are summed by
behaviour on the device and added up in float64 on the CPU (:class:`stllms.means.Means`).

Rows are padded on the *right* and cut after the last span: later tokens cannot reach earlier
ones in a causal model, so no mask is needed and a batch gives what its rows give alone.

Control directions (METHOD, section 13) are linear in the span means, so that their sums are
made in the same pass: each is one more row of weights over the spans of a batch, and no span
mean is kept for them. The weights are drawn for each response from ``(seed, task)`` alone.

The order of reading is fixed, so that a collection that was stopped goes on from its sums and
the number of responses in them, and shards that were read apart add up (``Means.merge``).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stllms import artifacts, provenance
from stllms.means import MIN_SPANS, PARTS, TENSORS, Means, digest, is_build, mark, part_of
from stllms.models import Model
from stllms.progress import token_bar
from stllms.records import BEHAVIOURS, STEERED, Response, TokenSpan
from stllms.spans import check

#: Tokens of a span that enter its mean, counted from the one before it.
WINDOW = 11
#: Responses between two saves of :func:`collect`.
SAVE_EVERY = 50
#: What the ledger counts; spans at token 0 have no token before them and are dropped.
LEDGER = (
    "responses",
    "responses without spans",
    "spans",
    "spans at token 0",
    "spans of other labels",
)


@dataclass(frozen=True)
class _Job:
    """One response: ids up to the end of its last span, windows and labels, and the weights
    ``[2 * K, S]`` of its spans in the ``K`` shuffled and the ``K`` signed sums."""

    task_id: str
    part: int
    ids: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    whole: tuple[int, int]
    labels: tuple[int, ...]
    weights: np.ndarray


def collect(
    model: Model,
    responses: Sequence[Response],
    spans_per_response: Sequence[Sequence[TokenSpan]],
    *,
    batch_size: int = 8,
    behaviours: Sequence[str] = BEHAVIOURS,
    keep: Sequence[int] = (),
    readout: Tensor | None = None,
    controls: int = 0,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    path: Path | None = None,
    progress: bool = True,
) -> Means:
    """Means of all spans of some responses.

    The build half is read first; its directions then project the spans of the test half
    (:func:`stllms.means.separability`), so that this too needs no second pass. Shards whose
    projections are to be merged need one ``readout`` instead.

    Args:
        spans_per_response: the token spans of each response, as its annotation has them.
        batch_size: responses a forward; the result does not depend on it. If the device runs
            out of memory it is halved with a warning, the failed batch is read again, and later
            work of this model stays at what fitted.
        behaviours: labels to keep apart; spans of other labels are counted, not used.
        keep: layers whose span means are kept one by one (``Means.samples``, for the probe);
            memory then grows with the number of spans.
        readout: ``[N, L, D]`` directions to project the test half on, instead of those of the
            build half.
        controls: how many control directions of each kind to sum up
            (:func:`stllms.vectors.controls`). The first ones do not depend on how many there
            are, nor on the order or the batches of the responses.
        targets: the behaviours that shuffled controls imitate, each control one in turn; by
            default the steered ones with at least :data:`~stllms.means.MIN_SPANS` spans.
            Shards that are to be merged need the same ones.
        seed: of the permutations and signs.
        path: where to save what was read so far, about every :data:`SAVE_EVERY` responses. A
            file that a stopped collection left there is completed, bit for bit as if it had
            not been stopped (with another ``batch_size``: as another one would differ); it is
            removed at the end. :meth:`stllms.means.Means.save` keeps a result.

    Raises:
        ValueError: a response given twice, a span that is empty or outside its response, lists
            of different length, a readout or activations that are not finite (naming where); a
            file of a collection of other responses, spans, options or of another model (naming
            which).
        artifacts.BadFile: a file that no collection wrote.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, it is {batch_size}")
    if controls < 0:
        raise ValueError(f"controls should be at least 0, it is {controls}")
    behaviours = tuple(behaviours)
    jobs, ledger = _jobs(responses, spans_per_response, behaviours)
    aims = _targets(jobs, behaviours, targets) if controls else ()
    if controls:
        rows = [behaviours.index(name) for name in aims]
        jobs = [_weighted(job, controls, rows, seed) for job in jobs]
    keep = tuple(dict.fromkeys(keep))
    _check_layers(model, keep)
    _check_readout(readout, behaviours, model)
    drawn = {"controls": {"seed": seed, "targets": list(aims)}} if controls else {}
    means = Means.zeros(
        behaviours,
        model.n_layers,
        model.d_model,
        model=model.name,
        sample_layers=keep,
        readout="" if readout is None else digest(readout),
        controls=controls,
        config={"window": WINDOW, **drawn},
    )
    task_ids = tuple(sorted(one.task_id for one in responses))
    means = replace(means, ledger=ledger, task_ids=task_ids)
    build = _ordered(job for job in jobs if is_build(job.task_id))
    test = _ordered(job for job in jobs if not is_build(job.task_id))
    identity = _identity(model, means, [*build, *test])
    means, done = _resume(path, means, identity)
    left = build[done:], test[max(0, done - len(build)) :]
    size = min(batch_size, model.fits)
    with token_bar(len(jobs), "activations", unit="responses", enabled=progress) as bar:
        bar.skip(done)
        for held_out, half in enumerate(left):
            if held_out and readout is None and build:
                own = slice(PARTS // 2)
                readout = means.mean(own) - means.overall(own)
            while half:
                batch = half[:size]
                try:
                    means = _add(means, model, batch, readout if held_out else None)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    size = model.fits = len(batch) // 2
                    note = f"out of memory: going on with batches of {size} responses"
                    warnings.warn(note, stacklevel=2)
                    continue
                half = half[len(batch) :]
                before, done = done, done + len(batch)
                bar.tick(sum(len(job.ids) for job in batch), len(batch))
                if path is not None and done // SAVE_EVERY > before // SAVE_EVERY:
                    _save(path, means, identity, done)
    if path is not None:
        provenance.remove(path)
    return means


def _identity(model: Model, means: Means, jobs: list[_Job]) -> dict[str, Any]:
    """What a collection is of: all that its sums depend on, by the names of its arguments."""
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
        "readout": means.readout[:12],
        "number of controls": len(means.signs),
        **means.config,
    }


def _save(path: Path, means: Means, identity: dict[str, Any], done: int) -> None:
    tensors = {name: getattr(means, name) for name in TENSORS}
    artifacts.save_tensors(path, tensors, {"collecting": identity, "done": done})


def _resume(path: Path | None, means: Means, identity: dict[str, Any]) -> tuple[Means, int]:
    """The sums that a stopped collection left, and how many responses are in them."""
    if path is None or not path.is_file():
        return means, 0
    tensors, metadata = artifacts.load_tensors(path)
    if "collecting" not in metadata or set(tensors) != set(TENSORS):
        raise artifacts.BadFile(f"{path}: no unfinished collection, but {', '.join(tensors)}")
    old = metadata["collecting"]
    changes = [
        f"{name} was {old.get(name)!r} and is now {identity.get(name)!r}"
        for name in dict.fromkeys([*identity, *old])
        if old.get(name) != identity.get(name)
    ]
    if changes:
        raise ValueError(
            f"{path} holds an unfinished collection of something else: {'; '.join(changes)}; "
            "delete it, or choose another path"
        )
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return replace(means, **copies), metadata["done"]


def _check_layers(model: Model, layers: Sequence[int]) -> None:
    unknown = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if unknown:
        raise ValueError(
            f"no layer {unknown[0]} to keep: {model.name} has layers 0 to {model.n_layers - 1}"
        )


def _check_readout(readout: Tensor | None, behaviours: Sequence[str], model: Model) -> None:
    if readout is None:
        return
    given, shape = tuple(readout.shape), (len(behaviours), model.n_layers, model.d_model)
    if given != shape:
        raise ValueError(f"readout has shape {given}, expected [N, L, D] {shape}")
    broken = (~readout.isfinite()).any(-1).nonzero().tolist()
    if broken:
        row, layer = broken[0]
        raise ValueError(f"readout is not finite: {behaviours[row]} at layer {layer}")


def _jobs(
    responses: Sequence[Response],
    spans_per_response: Sequence[Sequence[TokenSpan]],
    behaviours: tuple[str, ...],
) -> tuple[list[_Job], dict[str, int]]:
    """Checked and windowed work, and the ledger of what is used and what is not."""
    if len(responses) != len(spans_per_response):
        raise ValueError(
            f"{len(responses)} responses but spans of {len(spans_per_response)} of them"
        )
    times = Counter(response.task_id for response in responses)
    for task_id, n in times.most_common(1):
        if n > 1:
            raise ValueError(
                f"response {task_id!r} is given {n} times and its spans would count {n} times: "
                "give each response once"
            )
    ledger = dict.fromkeys(LEDGER, 0)
    jobs = []
    for response, spans in zip(responses, spans_per_response, strict=True):
        ids = tuple(response.prompt_ids) + tuple(response.output_ids)
        check(response, spans)
        used = [s for s in spans if s.label in behaviours and s.start > 0]
        ledger["spans"] += len(used)
        ledger["spans at token 0"] += sum(s.start == 0 for s in spans)
        ledger["spans of other labels"] += sum(
            s.label not in behaviours and s.start > 0 for s in spans
        )
        if not spans:
            ledger["responses without spans"] += 1
            continue
        ledger["responses"] += 1
        whole = (min(s.start for s in spans), max(s.end for s in spans))
        jobs.append(
            _Job(
                task_id=response.task_id,
                part=part_of(response.task_id),
                ids=ids[: whole[1]],
                windows=tuple(
                    (s.start - 1, min(s.end - 1, s.start + WINDOW - 1)) for s in used
                ),
                whole=whole,
                labels=tuple(behaviours.index(s.label) for s in used),
                weights=np.zeros((0, len(used)), dtype=np.float32),
            )
        )
    return jobs, ledger


def _targets(
    jobs: Sequence[_Job], behaviours: tuple[str, ...], targets: Sequence[str] | None
) -> tuple[str, ...]:
    """The behaviours that shuffled controls imitate."""
    if targets is not None:
        strange = [name for name in targets if name not in behaviours]
        if strange or not targets:
            raise ValueError(
                f"targets {list(targets)}: expected at least one of {', '.join(behaviours)}"
            )
        return tuple(targets)
    spans = Counter(behaviours[label] for job in jobs for label in job.labels)
    known = [name for name in behaviours if spans[name] >= MIN_SPANS]
    return tuple(name for name in STEERED if name in known) or tuple(known)


def _weighted(job: _Job, controls: int, targets: Sequence[int], seed: int) -> _Job:
    """The response with its weights: ones where a permuted label is the control's target, then
    random signs. Each kind has a generator of its own, so that control ``i`` is the same
    whatever ``controls`` is."""
    shuffling, tossing = (
        np.random.default_rng([seed, mark(job.task_id), kind]) for kind in (0, 1)
    )
    labels = np.array(job.labels, dtype=int)
    weights = np.zeros((2 * controls, len(labels)), dtype=np.float32)
    for i in range(controls):
        permuted = shuffling.permutation(labels)
        if targets:
            weights[i] = permuted == targets[i % len(targets)]
        weights[controls + i] = 1 - 2 * tossing.integers(0, 2, len(labels))
    return replace(job, weights=weights)


def _ordered(jobs: Iterable[_Job]) -> list[_Job]:
    """Jobs of similar length together, the longest first."""
    return sorted(jobs, key=lambda job: (-len(job.ids), job.task_id))


def _averaging(batch: list[_Job], width: int) -> Tensor:
    """``A [B, 1 + S, T]``: row 0 averages the whole response, row ``1 + k`` window ``k``."""
    n_spans = max(len(job.windows) for job in batch)
    matrix = torch.zeros(len(batch), 1 + n_spans, width)
    for row, job in enumerate(batch):
        for k, (start, stop) in enumerate((job.whole, *job.windows)):
            matrix[row, k, start:stop] = 1.0 / (stop - start)
    return matrix


def _add(means: Means, model: Model, batch: list[_Job], readout: Tensor | None) -> Means:
    """One forward over a batch, and its sums added to ``means``."""
    device = model.device
    width = max(len(job.ids) for job in batch)
    ids = torch.full((len(batch), width), model.pad_id, dtype=torch.long)
    for row, job in enumerate(batch):
        ids[row, : len(job.ids)] = torch.tensor(job.ids)
    matrix = _averaging(batch, width).to(device)
    place = [
        row * matrix.shape[1] + 1 + k
        for row, job in enumerate(batch)
        for k in range(len(job.labels))
    ]
    place = torch.tensor(place, dtype=torch.long, device=device)
    n = len(means.behaviours)
    groups = _groups(batch, n).to(device)
    weights = torch.from_numpy(np.concatenate([job.weights for job in batch], 1)).to(device)
    units = [None] * model.n_layers
    if readout is not None:
        units = torch.nn.functional.normalize(readout, dim=-1).float().to(device).unbind(1)
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    # One room for the results of all layers: small ones allocated between the layers would
    # keep the heap from reusing what the large activations leave.
    n_layers, d_model, n_spans = model.n_layers, model.d_model, len(place)
    sums = torch.empty(n_layers, len(groups), d_model, device=device)
    squares = torch.empty(n_layers, len(groups), d_model, device=device)
    controls = torch.empty(n_layers, len(weights), d_model, device=device)
    wholes = torch.empty(n_layers, len(batch), d_model, device=device)
    finite = torch.empty(n_layers, len(batch), dtype=torch.bool, device=device)
    projected = torch.empty(n_spans, n_layers, n, device=device)
    samples = torch.empty(n_spans, len(means.sample_layers), d_model, device=device)
    with torch.no_grad(), model.nn_decoder.trace(**inputs, use_cache=False):
        for layer, envoy in enumerate(model.nn_layers):
            products, spans, sums[layer], squares[layer], along = _of_layer(
                envoy.output, matrix, place, groups, units[layer]
            )
            if len(weights):
                controls[layer] = weights.to(spans.device) @ spans
            finite[layer] = products.isfinite().flatten(1).all(1)
            wholes[layer] = products[:, 0]
            if along is not None:
                projected[:, layer] = along
            if layer in means.sample_layers:
                samples[:, means.sample_layers.index(layer)] = spans
    _refuse_not_finite(finite.cpu(), batch)
    return _accumulate(
        means,
        batch,
        sums=sums.cpu().double(),
        squares=squares.cpu().double(),
        wholes=wholes.cpu().double(),
        controls=controls.transpose(0, 1).cpu().double(),
        projected=None if readout is None else projected.cpu(),
        samples=samples.cpu() if means.sample_layers else None,
    )


def _of_layer(
    h: Tensor, matrix: Tensor, place: Tensor, groups: Tensor, units: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What is read of a layer's output ``h [B, T, D]``, on the device where that is: a model
    may lie on several. Products ``A @ h``, the span means at rows ``place [S]`` of all these,
    sums of span means and of their squares by group, projections on ``units [N, D]``."""
    matrix, place, groups = (x.to(h.device) for x in (matrix, place, groups))
    products = torch.bmm(matrix, h.float())
    spans = products.flatten(0, 1).index_select(0, place)
    projected = None if units is None else spans @ units.to(h.device).T
    return products, spans, groups @ spans, groups @ spans.square(), projected


def _groups(batch: list[_Job], n: int) -> Tensor:
    """``[H * N, S]``, zeros and ones: the spans of each behaviour in each of ``H`` parts."""
    spans = [(job.part, label) for job in batch for label in job.labels]
    rows = torch.zeros(PARTS * n, len(spans))
    for column, (part, label) in enumerate(spans):
        rows[part * n + label, column] = 1.0
    return rows


def _refuse_not_finite(finite: Tensor, batch: list[_Job]) -> None:
    """``finite [L, B]``; names the first layer and response where it is false."""
    if not finite.all():
        layer, row = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"activations are not finite: layer {layer}, response {batch[row].task_id!r}"
        )


def _accumulate(
    means: Means,
    batch: list[_Job],
    *,
    sums: Tensor,
    squares: Tensor,
    wholes: Tensor,
    controls: Tensor,
    projected: Tensor | None,
    samples: Tensor | None,
) -> Means:
    """Add one batch in place: ``sums`` and ``squares`` ``[L, H*N, D]``, ``wholes [L, B, D]``,
    ``controls [2 * K, L, D]``, ``projected [S, L, N]``, ``samples [S, K, D]``. Returns the
    record with its lists of kept spans extended."""
    n = len(means.behaviours)
    labels = torch.tensor([x for job in batch for x in job.labels], dtype=torch.long)
    means.sums.add_(sums.transpose(0, 1).unflatten(0, (PARTS, n)))
    means.squares.add_(squares.transpose(0, 1).unflatten(0, (PARTS, n)))
    k = len(means.signs)
    means.shuffled.add_(controls[:k])
    means.signed.add_(controls[k:])
    for row, job in enumerate(batch):
        means.signs.add_(torch.from_numpy(job.weights[k:].sum(1)).long())
        means.counts[job.part] += torch.bincount(torch.tensor(job.labels).long(), minlength=n)
        means.overall_sums[job.part] += wholes[:, row]
        means.overall_counts[job.part] += 1
    changes = {}
    if projected is not None:
        changes["projections"] = torch.cat([means.projections, projected])
        changes["projection_labels"] = torch.cat([means.projection_labels, labels])
    if samples is not None:
        changes["samples"] = torch.cat([means.samples, samples])
        changes["sample_labels"] = torch.cat([means.sample_labels, labels])
        owners = torch.tensor([mark(job.task_id) for job in batch for _ in job.labels])
        changes["sample_responses"] = torch.cat([means.sample_responses, owners.long()])
    return replace(means, **changes) if changes else means
