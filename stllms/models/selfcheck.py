"""What must hold of a model and its tokenizer before any number is taken from them.

Each time a model is loaded it is put to the test with a few fixed texts and one short forward.
A tokenizer that loses text (a Llama class around a byte-level BPE drops every space:
huggingface/transformers#45488) writes fluent nonsense that no later stage notices.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from stllms.models.model import Model, ModelError, character_ranges

#: The releases of transformers that read a byte-level ``tokenizer.json`` as it is.
TRANSFORMERS = ">=5.22,<6"
CURE = (
    f"install transformers{TRANSFORMERS} (here {transformers.__version__}) and load with "
    "AutoTokenizer, or take another tokenizer.json"
)
#: Root mean square of a coordinate of the residual stream that is extreme. Ordinary models stay
#: far below (smollm2: 2 to 31, Qwen2.5-1.5B: 0.4 to 6); float16 ends at 65,504, and single
#: coordinates are hundreds of times the rest.
EXTREME = 100.0

SENTENCE = "Okay, so I need to find out how many legs three spiders have."
CHAIN = (
    "<think>\nOkay, so 12 + 30 = 42.\n\nWait, is that right? Yes.\n</think>\n\nIt is **42**."
)
TEXTS = (
    SENTENCE,
    CHAIN,
    "one  two   three    four",
    "first\nsecond\n\nthird\n\n\nfourth",
    "a\tb\t\tc \t d",
    "3.14159, 1,024 and 2026-01-31; 0x1F; 7 000 000",
    "naïve café, Ñandú, Straße, Жук и щука, ελιά",
    "日本語の文章。 漢字 한국어",
    "🙂 🤔 👍🏽 → ∀x ∈ ℕ: x² ≥ 0 — “so”…",
)


def check(model: Model) -> None:
    """Puts a model to the test and sets its ``norms`` and ``remarks``.

    Raises:
        ModelError: naming the text, the layer or the value that is not as expected.
    """
    remarks = tokenizer(model)
    model.norms = tuple(residual(model))
    model.remarks = (*remarks, *extreme(model.norms, model.d_model))


def tokenizer(model: Model) -> list[str]:
    """Remarks on the tokenizer, a line each.

    * A **byte-level** vocabulary can hold any text: each text must come back as it was. Only
      what the tokenizer itself declares is let through, with a remark: its Unicode
      normalisation, and a space before the first word.
    * **Any other** vocabulary (SentencePiece, WordPiece) must give back the words of ASCII
      texts; changed white space, and characters that it does not have, are remarked.
    * Special tokens are one id each, in text too. Ids of texts and of padding have an
      embedding; a special token without one (some classes add tokens the model never had) is
      remarked.
    * The characters that tokens cover leave no gap, and no token covers more than it writes.

    Raises:
        ModelError: for a tokenizer that loses text, naming its class, the text and the release
            of transformers to install.
    """
    words = model.tokenizer
    name, byte_level = type(words).__name__, is_byte_level(words.get_vocab())
    remarks, changed = _check_special(model), []
    for text, ids in _read(model):
        _check_ids(model, repr(text), max(ids))
        back = model.decode_all(ids)
        if not (_only_normalised(words, text, back) if byte_level else _same_words(text, back)):
            raise ModelError(
                f"{model.name}: {name} does not give {text!r} back but {back!r}: {CURE}"
            )
        if back != text:
            changed.append(f"{text!r} becomes {back!r}")
        _check_offsets(model, ids)
    if changed:
        remarks.append(f"{name} changes {len(changed)} of its texts: {changed[0]}")
    return remarks


def is_byte_level(vocabulary: Sequence[str]) -> bool:
    """Whether tokens are written in the byte alphabet of GPT-2, where ``Ġ`` is the space.

    The vocabulary says so, not the classes around it: they are what may be wrong.
    """
    marks = [token[0] for token in vocabulary if token[:1] in ("Ġ", "▁")]
    return marks.count("Ġ") > marks.count("▁")


def _read(model: Model) -> Iterator[tuple[str, list[int]]]:
    """The texts and their ids; with a chat template a prompt too, which must add nothing."""
    for text in TEXTS:
        yield text, model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if getattr(model.tokenizer, "chat_template", None) is not None:
        text, ids = model.prompt_ids(SENTENCE)
        yield text, list(ids)


def _only_normalised(words: Any, text: str, back: str) -> bool:
    normalizer = getattr(getattr(words, "backend_tokenizer", None), "normalizer", None)
    declared = text if normalizer is None else normalizer.normalize_str(text)
    return back in (text, declared, f" {declared}")


def _same_words(text: str, back: str) -> bool:
    return not text.isascii() or unicodedata.normalize("NFKC", back).split() == text.split()


def _check_ids(model: Model, what: str, index: int) -> None:
    rows = len(model.hf.get_input_embeddings().weight)
    if index >= rows:
        raise ModelError(
            f"{model.name}: {type(model.tokenizer).__name__} gives {what} the id {index}, but "
            f"the model has {rows} embeddings: it is the tokenizer of another model"
        )


def _check_special(model: Model) -> list[str]:
    _check_ids(model, "its padding", model.pad_id)
    words, rows = model.tokenizer, len(model.hf.get_input_embeddings().weight)
    unknown = []
    for token in words.all_special_tokens:
        index = words.convert_tokens_to_ids(token)
        ids = words(token, add_special_tokens=False)["input_ids"]
        if index not in ids or model.decode_all([index]).strip() != token.strip():
            raise ModelError(
                f"{model.name}: {type(words).__name__} reads its special token {token!r} as "
                f"{words.convert_ids_to_tokens(ids)}: {CURE}"
            )
        if index >= rows:
            unknown.append(token)
    if not unknown:
        return []
    return [f"no embedding for {', '.join(unknown)}: a text that has it cannot be read"]


def _check_offsets(model: Model, ids: Sequence[int]) -> None:
    ids = model.before_end(ids)
    text = model.decode_all(ids)
    ranges = character_ranges(model.decode_all, ids, text)
    covered = np.zeros(len(text), dtype=bool)
    for start, end in ranges:
        covered[start:end] = True
    # One more than it writes alone: SentencePiece leaves a first space out.
    most = [1 + max(1, len(model.decode_all([i]))) for i in ids]
    if not covered.all() or (ranges[:, 1] - ranges[:, 0] > most).any():
        raise ModelError(
            f"{model.name}: the characters of the tokens of {text!r} cannot be found with "
            f"{type(model.tokenizer).__name__}: {CURE}"
        )


def residual(model: Model) -> list[float]:
    """Norm of the residual stream after every layer, the median over the tokens of a sentence.

    Raises:
        ModelError: where a layer's output is not one tensor ``[1, T, D]``, or not finite.
    """
    ids = model.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids], device=model.device)
    shape = (1, len(ids), model.d_model)
    norms: list[float] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        layer = len(norms)
        if not isinstance(output, Tensor) or tuple(output.shape) != shape:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output)
            raise ModelError(
                f"{model.name}: the output of layer {layer} should be one tensor of "
                f"shape {shape} (transformers 5), found {found}"
            )
        length = output[0].float().norm(dim=-1)
        _check_finite(model, length, f"the residual stream after layer {layer}")
        norms.append(float(length.median()))

    hooks = [layer.register_forward_hook(look) for layer in model.layers]
    try:
        with torch.no_grad():
            logits = model.hf(input_ids=given, attention_mask=torch.ones_like(given)).logits
    finally:
        for hook in hooks:
            hook.remove()
    _check_finite(model, logits, "a logit of a short sentence")
    return norms


def _check_finite(model: Model, values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        damaged = model.dtype == torch.float32
        cure = "its weights are damaged" if damaged else "try dtype='float32'"
        raise ModelError(f"{model.name}: {what} is not finite in {model.dtype}: {cure}")


def extreme(norms: Sequence[float], d_model: int) -> list[str]:
    """A remark where the residual stream is :data:`EXTREME`; none for an ordinary model."""
    limit = EXTREME * d_model**0.5
    beyond = [layer for layer, norm in enumerate(norms) if norm > limit]
    if not beyond:
        return []
    return [
        f"the residual stream is extreme from layer {beyond[0]} on: its norm reaches "
        f"{max(norms):,.0f}, where ordinary models of width {d_model} stay below {limit:,.0f}"
    ]
