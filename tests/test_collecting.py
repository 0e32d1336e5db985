"""Collecting span means as a long run does: stopped and resumed, and short of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from test_activations import sample

from stllms import activations, artifacts, means
from stllms.records import BEHAVIOURS


def everything(got: means.Means) -> dict[str, torch.Tensor]:
    return {name: getattr(got, name) for name in means.TENSORS}


def stopped(monkeypatch, after: int, *given, **options) -> None:
    """Collects until ``after`` batches were read, then stops as a keyboard interrupt does."""
    read, seen = activations._add, []

    def add(*arguments):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(arguments)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(activations, "SAVE_EVERY", 4)
        patch.setattr(activations, "_add", add)
        with pytest.raises(KeyboardInterrupt):
            activations.collect(*given, **options)


@pytest.mark.parametrize(
    ("after", "half"), [(2, "build"), (4, "build"), (5, "test"), (8, "test")]
)
def test_a_stopped_collection_goes_on_bit_for_bit(
    tiny_llama, tmp_path, monkeypatch, after, half
):
    work = (tiny_llama, *sample())
    build = sum(means.is_build(one.task_id) for one in work[1])
    options = {"batch_size": 3, "keep": (1, 3), "progress": False}
    whole = activations.collect(*work, **options)
    path = tmp_path / "collecting.safetensors"
    stopped(monkeypatch, after, *work, path=path, **options)
    saved = artifacts.load_tensors(path)[1]["done"]
    assert 0 < saved < len(work[1])
    assert (saved > build) == (half == "test")
    seen, read = [], activations._add
    monkeypatch.setattr(activations, "_add", lambda *a: seen.extend(a[2]) or read(*a))
    resumed = activations.collect(*work, path=path, **options)
    assert len(seen) == len(work[1]) - saved
    for name, tensor in everything(whole).items():
        assert torch.equal(getattr(resumed, name), tensor), name
    for name in means.METADATA:
        assert getattr(resumed, name) == getattr(whole, name), name
    assert not path.exists()


def test_a_stopped_collection_goes_on_in_other_batches(tiny_llama, tmp_path, monkeypatch):
    work = (tiny_llama, *sample())
    path = tmp_path / "collecting.safetensors"
    stopped(monkeypatch, 4, *work, path=path, batch_size=4, progress=False)
    resumed = activations.collect(*work, path=path, batch_size=1, progress=False)
    whole = activations.collect(*work, batch_size=4, progress=False)
    assert torch.equal(resumed.counts, whole.counts)
    for name in ("sums", "squares", "overall_sums", "projections"):
        got, want = getattr(resumed, name), getattr(whole, name)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_collection_of_something_else_is_refused_by_name(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    responses, spans = sample()
    path = tmp_path / "collecting.safetensors"
    options = {"batch_size": 4, "path": path, "progress": False}
    stopped(monkeypatch, 3, model, responses, spans, **options)
    kept = path.read_bytes()

    def refused(message, model=model, responses=responses, spans=spans, **changes):
        with pytest.raises(ValueError, match=rf"something else: {message}.*; delete it"):
            activations.collect(model, responses, spans, **{**options, **changes})

    refused("model was 'tiny-random-llama.* now 'tiny-random-qwen2", tiny_model("qwen2"))
    refused("responses was '24, .* now '23, ", responses=responses[1:], spans=spans[1:])
    other = [replace(responses[0], prompt_ids=(7,) * 5), *responses[1:]]
    refused("responses was '24, .* now '24, ", responses=other)
    *others, last = spans[0]
    label = next(name for name in BEHAVIOURS if name != last.label)
    refused("spans was ", spans=[[*others, replace(last, label=label)], *spans[1:]])
    refused("spans was ", spans=[[*others, replace(last, start=last.end - 1)], *spans[1:]])
    refused(r"spans was .*behaviours was \['initializing'", behaviours=BEHAVIOURS[1:])
    refused(r"keep was \[\] and is now \[2\]", keep=[2])
    refused("readout was '' and is now ", readout=torch.ones(6, 4, 32))
    assert path.read_bytes() == kept
    artifacts.save_tensors(path, {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(artifacts.BadFile, match="no unfinished collection, but kl/own"):
        activations.collect(model, responses, spans, **options)


def short_of_memory(model, most: int, where: str) -> list[int]:
    """Layer 1 runs out of memory for more than ``most`` rows; the rows of every try."""
    tried = []

    def hook(_module, _arguments, output):
        tried.append(len(output))
        if len(output) > most:
            raise torch.OutOfMemoryError(where)

    model.layers[1].register_forward_hook(hook)
    return tried


def test_out_of_memory_halves_the_batch_and_adds_nothing_twice():
    responses, spans = sample()
    want = activations.collect(
        tiny.model("llama"), responses, spans, batch_size=2, keep=[2], progress=False
    )
    model = tiny.model("llama")
    tried = short_of_memory(model, 2, "layer 1")
    with pytest.warns(UserWarning, match="out of memory: going on with batches of") as warned:
        got = activations.collect(
            model, responses, spans, batch_size=8, keep=[2], progress=False
        )
    assert [str(one.message).split()[-2] for one in warned] == ["4", "2"]
    assert tried[:3] == [8, 4, 2]
    assert model.fits == 2
    for name, tensor in everything(want).items():
        assert torch.equal(getattr(got, name), tensor), name
    tried.clear()
    activations.collect(model, responses, spans, batch_size=8, progress=False)
    assert max(tried) == 2


def test_memory_that_ends_while_a_layer_is_averaged_halves_the_batch(monkeypatch):
    responses, spans = sample()
    model = tiny.model("llama")
    want = activations.collect(model, responses, spans, batch_size=3, progress=False)
    read = activations._of_layer

    def of_layer(h, *others):
        if len(h) > 3:
            raise torch.OutOfMemoryError("the products")
        return read(h, *others)

    monkeypatch.setattr(activations, "_of_layer", of_layer)
    with pytest.warns(UserWarning, match="batches of 3 responses"):
        got = activations.collect(model, responses, spans, batch_size=6, progress=False)
    for name, tensor in everything(want).items():
        assert torch.equal(getattr(got, name), tensor), name


def test_one_response_that_does_not_fit_is_out_of_memory():
    responses, spans = sample()
    model = tiny.model("llama")
    short_of_memory(model, 0, "no room")
    with (
        pytest.warns(UserWarning, match="batches of 1 responses"),
        pytest.raises(torch.OutOfMemoryError, match="no room"),
    ):
        activations.collect(model, responses, spans, batch_size=2, progress=False)
