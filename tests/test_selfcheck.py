"""What a loaded model must hold: a tokenizer that loses nothing, a finite residual stream."""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from stllms import models
from stllms.models import selfcheck
from stllms.models.model import ModelError

PROJECT = Path(__file__).resolve().parent.parent


def wrapped(words) -> models.Model:
    """A tiny network with as many embeddings as the tokenizer has ids."""
    hf = tiny.hf_model(hidden_size=8, intermediate_size=8)
    hf.resize_token_embeddings(len(words))
    hf.config.eos_token_id = hf.generation_config.eos_token_id = None
    return models.wrap(hf, words, name="tried")


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_every_family_passes_without_a_remark(tiny_model, kind):
    model = tiny_model(kind)
    selfcheck.check(model)
    assert model.remarks == ()
    assert "remarks" not in repr(model)
    with torch.no_grad():
        ids = model.tokenizer(selfcheck.SENTENCE, return_tensors="pt")["input_ids"]
        states = model.hf(input_ids=ids, output_hidden_states=True).hidden_states
    # The last of them is behind the final norm.
    for norm, hidden in zip(model.norms, states[1:-1], strict=False):
        assert norm == pytest.approx(float(hidden[0].norm(dim=-1).median()), rel=1e-5)
    assert len(model.norms) == model.n_layers


def test_a_llama_class_around_a_byte_level_vocabulary_is_refused():
    """huggingface/transformers#45488: the class brings a Metaspace pre-tokenizer and decoder of
    its own, and every space is lost."""
    inner = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    broken = LlamaTokenizer(vocab=inner["vocab"], merges=inner["merges"])
    ids = broken("a  b", add_special_tokens=False)["input_ids"]
    assert broken.decode(ids) == "ab", "else this is not the defect"
    said = r"LlamaTokenizer does not give 'Okay, so .* back but 'Okay,soIneed.*transformers>=5"
    with pytest.raises(ModelError, match=said) as raised:
        selfcheck.check(wrapped(broken))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5"])
def test_a_real_tokenizer_passes_as_published_and_is_refused_in_the_class_of_another(
    npm_tokenizer, name
):
    folder = npm_tokenizer(name)
    good = wrapped(AutoTokenizer.from_pretrained(folder))
    selfcheck.check(good)
    assert good.remarks == ()
    inner = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in inner["merges"]]
    with pytest.raises(ModelError, match=r"LlamaTokenizer does not give .* back"):
        selfcheck.check(wrapped(LlamaTokenizer(vocab=inner["vocab"], merges=merges)))


def test_smollm2s_tokenizer_passes(smollm2_tokenizer):
    model = wrapped(smollm2_tokenizer)
    selfcheck.check(model)
    assert model.remarks == ()


def pieces(*more: str) -> LlamaTokenizer:
    """A tokenizer as SentencePiece makes them: ``▁``, ASCII letters, and what ``more`` adds."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), *more]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def test_sentencepiece_passes_with_bytes_and_with_a_remark_without_them():
    whole = wrapped(pieces(*(f"<0x{byte:02X}>" for byte in range(256))))
    selfcheck.check(whole)
    assert whole.remarks == ()
    model = wrapped(pieces("\n", "\t"))
    selfcheck.check(model)
    (remark,) = model.remarks
    assert "LlamaTokenizer changes 3 of its texts: 'naïve café" in remark
    assert repr(model).endswith("; see its 1 .remarks)")
    with pytest.raises(ModelError, match=r"= 42\.\\n\\nWait, .* back but .*= 42\.Wait, is"):
        selfcheck.check(wrapped(pieces()))  # no newline


@pytest.mark.parametrize(
    ("normalizer", "said"),
    [
        ("NFKC", "changes 1 of its texts: .* becomes .*x2 ≥ 0"),
        ("Lowercase", "changes 4 of its"),
    ],
)
def test_what_a_tokenizer_declares_is_remarked(normalizer, said):
    words = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words["normalizer"] = {"type": normalizer}
    inner = Tokenizer.from_str(json.dumps(words))
    model = wrapped(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=tiny.SPECIALS[0]))
    selfcheck.check(model)
    (remark,) = model.remarks
    assert re.search(said, remark)


def test_a_prompt_must_come_back_as_its_text(monkeypatch):
    model = tiny.model()
    real = models.Model.prompt_ids

    def lossy(self, messages):
        text, ids = real(self, messages)
        return text, ids[:3] + ids[4:]

    monkeypatch.setattr(models.Model, "prompt_ids", lossy)
    with pytest.raises(ModelError, match=r"does not give '<\|user\|>Okay"):
        selfcheck.check(model)


def test_a_special_token_that_is_read_in_pieces_is_refused():
    model = tiny.model()
    model.tokenizer.split_special_tokens = True
    with pytest.raises(ModelError, match=r"reads its special token '<\|end\|>' as \['<', "):
        selfcheck.check(model)


def test_the_tokenizer_of_a_larger_vocabulary_is_refused():
    words = tiny.tokenizer()
    words.add_tokens(["three spiders"])
    with pytest.raises(ModelError, match=r"id 261, but the model has 261 embeddings"):
        selfcheck.check(models.wrap(tiny.hf_model(), words, name="short"))
    words = tiny.tokenizer()
    words.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ModelError, match="gives its padding the id 261"):
        selfcheck.check(models.wrap(tiny.hf_model(), words, name="short"))
    words = tiny.tokenizer()
    words.add_special_tokens({"bos_token": "<begin>"})
    model = models.wrap(tiny.hf_model(), words, name="unused")
    selfcheck.check(model)
    assert model.remarks == ("no embedding for <begin>: a text that has it cannot be read",)


@pytest.mark.parametrize("change", ["gap", "greedy"])
def test_offsets_that_do_not_follow_the_text_are_refused(monkeypatch, change):
    real = selfcheck.character_ranges

    def wrong(*arguments):
        ranges = real(*arguments).copy()
        if change == "gap":
            ranges[3] = ranges[2]
        else:
            ranges[3:6] = (ranges[3, 0], ranges[5, 1])
        return ranges

    monkeypatch.setattr(selfcheck, "character_ranges", wrong)
    with pytest.raises(ModelError, match=r"characters of the tokens of 'Okay, so I .* found"):
        selfcheck.check(tiny.model())


def test_a_layer_is_named_with_what_is_wrong_of_it():
    model = tiny.model()
    hook = model.layers[1].register_forward_hook(lambda m, i, output: (output,), prepend=True)
    with pytest.raises(ModelError, match=r"layer 1 should be one tensor.*tuple"):
        selfcheck.check(model)
    hook.remove()
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight[0] = float("inf")
    with pytest.raises(ModelError, match=r"after layer 2 is not finite in torch.float32"):
        selfcheck.check(model)
    half = tiny.model()
    half.hf.to(torch.float16)
    with torch.no_grad():
        half.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ModelError, match=r"after layer 1 .* torch.float16: try dtype='float32"):
        selfcheck.check(half)
    last = tiny.model()
    with torch.no_grad():
        last.decoder.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="a logit of a short sentence is not finite"):
        selfcheck.check(last)


def test_an_extreme_residual_stream_is_said_in_its_place_and_not_on_every_load():
    model = tiny.model()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight *= 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selfcheck.check(model)
        shipped = models.load("tiny-thinker", device="cpu")
    (remark,) = model.remarks
    assert remark.startswith("the residual stream is extreme from layer 0 on: its norm reaches")
    assert "ordinary models of width 32 stay below 566" in remark
    assert not any("extreme" in remark for remark in shipped.remarks)


def test_the_release_that_errors_name_is_the_one_that_is_required():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert f"transformers{selfcheck.TRANSFORMERS}" in settings["project"]["dependencies"]
