"""Models that accelerate spreads over devices.

With layers on the disk everything is run, against the same model in one piece. Two cards are
fake ones (torch's ``FakeTensorMode``): no number comes out, but an operation on tensors of both
is an error there as on real ones.
"""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from stllms import models, registry
from stllms.attribution import layer_effects
from stllms.generation import likelihood
from stllms.labels import PAPER
from stllms.models import Model, loading, wrap
from stllms.models.engines import Row, generate, interventions
from stllms.models.engines import transformers as decode
from stllms.models.engines.interventions import Intervention, applied
from stllms.models.model import ModelError
from stllms.records import Response, Span, Steered
from stllms.vectors import activations

accelerate = pytest.importorskip("accelerate")
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
DISK = {f"model.layers.{i}": "disk" for i in (1, 3)}
OFFLOADED = {**dict.fromkeys((*PARTS, "model.layers.0", "model.layers.2"), "cpu"), **DISK}

GENERATOR = torch.Generator().manual_seed(0)
UP, DOWN, LATE = (
    Intervention(vector, layer, coefficient)
    for vector, layer, coefficient in zip(
        torch.randn(3, 32, generator=GENERATOR), (0, 1, 3), (2.0, -3.0, 1.5), strict=True
    )
)
ROWS = [
    Row((5, 6, 7), "plain"),
    Row((9, 10, 11, 12, 13), "up", (UP,)),
    Row((9, 10), "down", (DOWN,)),
    Row((14, 15, 16), "both", (LATE, DOWN)),
]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request, tmp_path_factory) -> tuple[Model, Model]:
    """A model in one piece, and the same with the layers 1 and 3 on the disk."""
    folder = tiny.save_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    whole = models.load(folder, device="cpu")
    spread = models.load(folder, device_map=OFFLOADED)
    away = {name for name, weight in spread.hf.named_parameters() if weight.is_meta}
    assert {name.rpartition(".layers.")[2][0] for name in away} == {"1", "3"}
    return whole, spread


# -- layers on the disk --------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chains_are_those_of_the_model_in_one_piece(pair, temperature):
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    whole, spread = (generate(model, ROWS, **options) for model in pair)
    assert whole == spread
    plain = generate(pair[1], [Row(row.prompt_ids, row.key) for row in ROWS], **options)
    assert [a.ids != b.ids for a, b in zip(plain, spread, strict=True)] == [False] + 3 * [True]


def test_hooks_steer_a_bare_model_too(pair):
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    found = []
    for model in pair:
        with applied(model.hf, [UP, LATE]), torch.no_grad():
            found.append(model.hf(ids).logits)
    assert torch.equal(*found)
    with torch.no_grad():
        assert not torch.allclose(found[1], pair[1].hf(ids).logits, atol=0.1)


def test_hooks_need_no_weight_in_memory(tmp_path):
    whole, away = tiny.hf_model("llama"), tiny.hf_model("llama")
    everything = dict.fromkeys(OFFLOADED, "disk")
    away = accelerate.dispatch_model(away, everything, offload_dir=tmp_path)
    assert away.model.embed_tokens.weight.is_meta
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad(), applied(whole, UP), applied(away, UP):
        assert torch.equal(whole(ids).logits, away(ids).logits)


def test_activations_are_equal(pair):
    ids = tuple(range(3, 33))
    responses = [
        Response(f"r{i}", "", "", ids[:5], ids[5 : 20 + 5 * i], "", "", 0, "", True, True)
        for i in range(3)
    ]
    spans = [[Span(PAPER.names[i], 5, 11), Span(PAPER.names[0], 11, 19)] for i in range(3)]
    whole, spread = (
        activations.collect(model, responses, spans, controls=2, keep=(1,), progress=False)
        for model in pair
    )
    assert whole.tensors.keys() == spread.tensors.keys()
    assert all(torch.equal(whole.tensors[k], spread.tensors[k]) for k in whole.tensors)
    assert whole.sums.abs().max() > 0.1


@pytest.mark.parametrize("objective", ["kl", "published"])
def test_layer_effects_are_equal(pair, objective):
    directions = torch.randn(2, 4, 32, generator=GENERATOR)
    whole, spread = (
        layer_effects(model, list(range(3, 40)), [4, 20, 36], directions, objective=objective)
        for model in pair
    )
    assert torch.equal(whole, spread)
    assert (whole[:, :3] > 0).all()


def test_likelihoods_are_equal(pair):
    chains = [
        Steered(f"t{i}", name, layer, 1.0, "add",
                Response(f"t{i}", "", "", (5, 6), (7, 8, 9), "", "", 0, "", True, True), None)
        for i, (name, layer) in enumerate((("none", -1), ("a", 3)))
    ]  # fmt: skip
    every = {("none", -1, 1.0, "add"): None, ("a", 3, 1.0, "add"): LATE}
    whole, spread = (likelihood.scores(model, chains, every, progress=False) for model in pair)
    assert whole == spread
    assert spread[1]["kl"] > 0.01


def test_the_identity_is_of_the_weights_wherever_they_are(pair, tmp_path):
    whole, spread = pair
    assert spread.identity == whole.identity
    kind = whole.hf.config.model_type
    other = tiny.save_tiny_model(tmp_path, kind, seed=1)
    assert models.load(other, device_map=OFFLOADED).identity != whole.identity


def test_a_head_on_the_disk_is_read_from_there(tmp_path):
    folder = tiny.save_tiny_model(tmp_path, "llama")
    spread = models.load(folder, device_map={**OFFLOADED, "lm_head": "disk"})
    assert spread.hf.lm_head.weight.is_meta
    assert torch.equal(spread.unembedding(), models.load(folder, device="cpu").unembedding())


# -- two cards -----------------------------------------------------------------------------

CARDS = [torch.device("cuda:0"), torch.device("cuda:1")]
LAYERS = [CARDS[i > 1] for i in range(4)]


def indexed(tensor: torch.Tensor, index) -> torch.Tensor:
    """``tensor[index]``, which torch without CUDA refuses for a card, even a fake one."""
    if tensor.device.type == "cpu":
        return GET(tensor, index)
    items = index if isinstance(index, tuple) else (index,)
    there = [item for item in items if isinstance(item, torch.Tensor)]
    assert all(item.device.type == "cpu" or item.device == tensor.device for item in there)
    items = tuple(item.cpu() if isinstance(item, torch.Tensor) else item for item in items)
    return GET(tensor.cpu(), items).to(tensor.device)


GET = torch.Tensor.__getitem__


@pytest.fixture
def two(monkeypatch):
    """A model whose layers 2 and 3, norm and head are on a second card; without values."""
    monkeypatch.setattr(torch.Tensor, "__getitem__", indexed)
    monkeypatch.setattr(torch.Tensor, "contiguous", torch.Tensor.clone)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hf = tiny.hf_model("llama")
        layers = {f"model.layers.{i}": card for i, card in enumerate(LAYERS)}
        places = (
            dict(zip(PARTS, (CARDS[0], CARDS[0], CARDS[1], CARDS[1]), strict=True)) | layers
        )
        for name, card in places.items():
            for part in hf.get_submodule(name).modules():
                for key, weight in part.named_parameters(recurse=False):
                    empty = torch.empty(weight.shape, device=card)
                    part._parameters[key] = torch.nn.Parameter(empty)
                for key, buffer in part.named_buffers(recurse=False):
                    part._buffers[key] = torch.empty(buffer.shape, device=card)
        accelerate.hooks.attach_align_device_hook_on_blocks(
            hf,
            execution_device={"": CARDS[0], **places},
            offload=dict.fromkeys(places, False),
            skip_keys="past_key_values",
        )
        hf.hf_device_map = places
        yield wrap(hf, tiny.tokenizer(), name="two")


@torch.no_grad()
def test_vectors_and_cache_follow_the_layers(two):
    assert two.device == CARDS[0]
    batch = decode._prefill(two, ROWS, [0, 1, 2, 3], 0.9, 0)
    assert {edit.vector.device for edit in batch.edits} == {CARDS[0]}, "they are moved"
    decode._advance(batch, 0.9)
    assert batch.token.device == CARDS[0]
    other = decode._prefill(two, ROWS[:1], [0], 0.9, 0)
    for layer, more in zip(batch.cache.layers, other.cache.layers, strict=True):
        layer.take(torch.tensor([0, 2]).to(CARDS[0]), 1)
        layer.append([more])
    assert [layer.keys.device for layer in batch.cache.layers] == LAYERS
    assert [layer.values.shape[0] for layer in batch.cache.layers] == [3] * 4


@torch.no_grad()
def test_hooks_follow_the_layers(two):
    with applied(two.hf, [UP, LATE]):
        ids = torch.ones(2, 3, dtype=torch.long, device=CARDS[0])
        assert two.hf(ids).logits.device == CARDS[0]


@torch.no_grad()
def test_states_come_back_to_where_ids_go_in(two):
    ids = torch.ones(1, 4, dtype=torch.long, device=CARDS[0])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    assert two.decoder(**inputs).last_hidden_state.device == CARDS[1]
    acting = interventions.edits(two, [(UP, LATE)])
    found = likelihood._steered(two, inputs, acting, ids == 1)
    assert found.device == two.logits(found).device == CARDS[0]


def test_activations_are_read_on_every_card(two):
    """A fake tensor has no values, so whether they are finite cannot be asked: all goes well
    until then."""
    batch = [activations._Job("r", (1, 2, 3, 4, 5), (1, 5), ((0, 3),), (0,))]
    names = len(PAPER.names)
    plan = activations._Plan(names, (0,), 0, (0, 3), torch.ones(names, 4, 32), test=True)
    with pytest.raises(DataDependentOutputException):
        activations._of_batch(two, batch, plan)


def test_the_tighter_card_decides_how_many_rows_fit(monkeypatch):
    model = tiny.model("llama")
    shares = {CARDS[0]: 0.75, CARDS[1]: 0.25}
    monkeypatch.setattr(Model, "shares", shares)
    # Keys and values of 100 tokens in 4 layers, 2 heads of 8 numbers, float32; taken twice.
    cache = 2 * (2 * 4 * 2 * 8 * 100 * 4)
    rest = decode.row_bytes(model, 60, 40) - cache
    for free, rows in (({0: 9, 1: 10}, 9), ({0: 40, 1: 6}, 6)):
        room = {
            card: (free[card.index] + 0.5) * (share * cache + rest) / decode.SHARE
            for card, share in shares.items()
        }
        monkeypatch.setattr(decode, "free_bytes", room.__getitem__)
        model.fits = 2**31
        with pytest.warns(UserWarning, match=rf"of {rows} rows.*free on cuda:{rows == 6:d}"):
            assert decode._fitting(model, [Row((1,) * 60, "a")] * 64, 40, 64) == rows


def test_layers_of_a_share_are_counted(pair, two):
    assert pair[1].shares == {torch.device("cpu"): 1.0}
    assert two.shares == {CARDS[0]: 0.5, CARDS[1]: 0.5}


# -- loading -------------------------------------------------------------------------------


def test_auto_is_the_whole_model_where_there_is_one_device(tmp_path):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several")
    model = models.load(tiny.save_tiny_model(tmp_path, "qwen2"), device_map="auto")
    assert model.shares == {model.device: 1.0}


def test_quantised_weights_may_be_spread(tmp_path, monkeypatch):
    folder = tiny.save_tiny_model(tmp_path, "llama")
    given = {}

    def load(*_, **options):
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(loading, "_quantization", lambda *_: {"device_map": {"": "cuda"}})
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    with pytest.raises(InterruptedError):
        models.load(folder, quantization="8bit", device_map="auto")
    assert given["device_map"] == "auto"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny-thinker", {"device_map": "balance"}, "'balance' is neither 'auto' nor a device"),
        ("tiny-thinker", {"device": "cuda:1"}, "'cuda:1' and a device_map"),
        ("smol-thinker", {}, "smol-thinker: its adapter is merged"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name(name, options, message):
    with pytest.raises(ModelError, match=message):
        models.load(name, **{"device_map": "auto", **options})


def test_a_registered_loader_places_its_model_itself(monkeypatch):
    monkeypatch.setitem(registry.model._known, "mine", lambda: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"its own loader sets .* device_map"):
        models.load("mine", device_map="auto")


def test_without_accelerate_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install accelerate"):
        models.load("tiny-thinker", device_map="auto")


def test_an_embedding_on_the_disk_is_refused(tmp_path):
    folder = tiny.save_tiny_model(tmp_path, "llama")
    with pytest.raises(ModelError, match="offloads its embedding"):
        models.load(folder, device_map={**OFFLOADED, "model.embed_tokens": "disk"})
