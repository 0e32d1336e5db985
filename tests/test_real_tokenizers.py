"""Real vocabularies: the characters of a token, against the tokenizer's own offsets."""

from __future__ import annotations

import pytest
import tiny
from transformers import AutoTokenizer

from stllms import models, spans
from stllms.records import PlacedSegment

#: Sentences of a chain; a non-ASCII character follows a space in every one but the first.
SENTENCES = (
    "Okay, so naïve counting gives 1,024 — no.\n\n",
    "¿Qué? Ñandú → ña ñu ¡ñ!",
    "🤔 Wait, 🙂🙃 𝔘 is not U…",
    "日本語 の 漢字, then café.",
    "ж ы щ\t   ∀x ∈ ℕ: x² ≥ 0",
)
TEXT = " ".join(SENTENCES)


@pytest.fixture(params=["smollm2", "qwen2.5", "llama3.1"])
def model(request):
    """A tiny network around a real tokenizer."""
    if request.param == "smollm2":
        tokenizer = request.getfixturevalue("smollm2_tokenizer")
    else:
        folder = request.getfixturevalue("npm_tokenizer")(request.param)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = tiny.hf_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    hf.config.eos_token_id = hf.generation_config.eos_token_id = None  # of another vocabulary
    return models.wrap(hf, tokenizer, name=request.param)


def test_offsets_are_those_of_the_tokenizer_itself(model):
    read = model.tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    offsets = model.offsets([0, 1], read["input_ids"], 0, TEXT)
    assert [tuple(pair) for pair in offsets[2:].tolist()] == read["offset_mapping"]
    assert "".join(model.pieces(read["input_ids"])) == TEXT


def test_spans_begin_with_the_token_of_their_first_byte(model):
    """The ids are made sentence by sentence, each with the space before it: where a sentence
    begins is then a sum of lengths, and needs no offsets."""
    parts = [SENTENCES[0], *(f" {sentence}" for sentence in SENTENCES[1:])]
    ids = [model.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    placed, starts, at, first = [], [], 0, 0
    for part, own in zip(parts, ids, strict=True):
        text = part.strip()
        begin = at + part.index(text)
        placed.append(PlacedSegment("deduction", text, begin, begin + len(text)))
        starts.append(first)
        at, first = at + len(part), first + len(own)
    every = [i for own in ids for i in own]
    offsets = model.offsets([], every, 0, "".join(parts))
    found = spans.token_spans(placed, offsets, "".join(parts))
    assert [one.start for one in found] == starts
