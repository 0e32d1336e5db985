"""A model and its tokenizer: the only place that knows padding, character offsets, the tokens
that end a turn, and where the layers are.

In transformers 5 the output of a decoder layer *is* the tensor ``h[l]`` of shape ``[B, T, D]``;
:mod:`stllms.models.selfcheck` refuses a model where that does not hold.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from nnsight import TransformersModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from stllms.hashes import digest
from stllms.records import Response

if hasattr(object, "save"):
    # Importing nnsight hangs ``save`` on every object of the process. What looks at all
    # attributes of a class then fails (anyio, below the openai client). Write nnsight.save(x).
    from nnsight._c import unmount  # the extension that put it there

    unmount("save")

#: Where decoder layers live in the families of transformers, as ``decoder . list`` paths.
LAYER_PATHS: tuple[tuple[str, str], ...] = (
    ("model", "layers"),
    ("model.language_model", "layers"),
    ("language_model.model", "layers"),
    ("language_model", "layers"),
    ("model.decoder", "layers"),
    ("transformer", "h"),
    ("gpt_neox", "layers"),
    ("backbone", "layers"),
)
#: :attr:`Model.fits` where memory was never short.
UNLIMITED = 2**31
#: Tokens that end a turn in the chat formats of the models this package meets.
CHAT_ENDS: tuple[str, ...] = (
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)
#: What decoders write for bytes that are no character (yet).
REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class ModelError(RuntimeError):
    """A model that cannot be loaded, or whose inside is not what the package relies on."""


class Model:
    """A causal language model and its tokenizer, with everything the stages ask of them.

    Attributes: ``hf`` (the ``transformers`` module, in eval mode, without parameter gradients),
    ``nn`` (the ``nnsight`` model around the same module, for traces and interventions),
    ``tokenizer``, ``template`` (options of its chat template), ``name``, ``n_layers``,
    ``d_model``, ``device``, ``dtype``, ``layers`` and ``nn_layers`` (the ``L`` decoder layers),
    ``decoder`` and ``nn_decoder`` (the base model, without the head), ``engine`` (what
    writes its chains, :mod:`stllms.models.engines`), ``eos_ids`` (every token
    that ends a turn), ``pad_id``, ``max_context`` (tokens), ``fits`` (rows a batch may have,
    lowered where memory is short), ``workers`` (a :class:`stllms.runs.workers.Pool` of other
    processes that share the work, or ``None``), ``portion`` (of the free memory of its device:
    that of one process). After the self check: ``norms`` (``L`` median lengths of the
    residual stream) and ``remarks`` (what the check let through, a line each).
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template = dict(template or {})
        self.name = name
        decoder_path, list_name = find_layers(self.hf)
        self.decoder: nn.Module = self.hf.get_submodule(decoder_path)
        self.layers: nn.ModuleList = getattr(self.decoder, list_name)
        self.n_layers = len(self.layers)
        self.text_config = self.hf.config.get_text_config()
        self.d_model = int(self.text_config.hidden_size)
        # A model that is spread over devices has a map of its own and must not be moved.
        placed = {} if getattr(hf, "hf_device_map", None) else {"device": self.hf.device}
        self.nn = Traced(self.hf, tokenizer=tokenizer, task="text-generation", **placed)
        self.nn_decoder = self.nn.get(decoder_path)
        self.nn_layers = getattr(self.nn_decoder, list_name)
        self.eos_ids = _eos_ids(self.hf, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else next(iter(self.eos_ids), 0))
        self.max_context = int(getattr(self.text_config, "max_position_embeddings", 2**31))
        self.fits = UNLIMITED
        self.workers: Any = None  # stllms.models.loading.load makes one
        self.portion = 1.0
        self.revision: str | None = None
        self.engine: Any = None  # stllms.models.engines.engine.of makes one
        self.norms: tuple[float, ...] = ()
        self.remarks: tuple[str, ...] = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.name}: a process loads a model of its own, none is pickled")

    @property
    def identity(self) -> dict[str, str | None]:
        """What a chain depends on of the model, by name: ``dtype``, ``weights`` (a checksum of
        every parameter as it is now, so that a change in place counts), ``tokenizer``, ``chat
        template`` with its options, the ``revision`` that a model of the hub was loaded at, and
        the ``engine`` that writes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = (
            sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        )
        written = getattr(self.tokenizer, "chat_template", None)
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": digest([_checksum(*item) for item in stored(self.hf)]),
            "tokenizer": digest(words),
            "chat template": digest([written, self.template] if self.template else written),
            "revision": self.revision,
            "engine": getattr(self.engine, "name", "transformers"),
        }

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {type(self.hf).__name__}, layers={self.n_layers}, "
            f"d_model={self.d_model}, {self.dtype}, {self.device}"
            + (f"; see its {len(self.remarks)} .remarks)" if self.remarks else ")")
        )

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where ids go in and logits come out."""
        return runs_on(self.hf.get_input_embeddings())

    @property
    def shares(self) -> dict[torch.device, float]:
        """The devices that the layers run on, and the share of the layers on each."""
        places = Counter(runs_on(layer) for layer in self.layers)
        return {device: count / self.n_layers for device, count in places.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        return self.hf.dtype

    @property
    def batch_limit(self) -> int | None:
        """Rows a batch may have where memory was short, ``None`` where it was not; for
        ``folder.note(batch_size=...)``."""
        return None if self.fits == UNLIMITED else self.fits

    @property
    def probed(self) -> list[dict[str, Any]] | None:
        """What the probes of the engine found (:mod:`stllms.models.engines.probes`), ``None``
        where nothing was probed; for ``folder.note(probes=...)``."""
        return getattr(self.engine, "report", None) or None

    def embedding(self) -> Tensor:
        """Rows of the input embedding, ``[V, D]``, float32 on the CPU."""
        return _matrix(self.hf.get_input_embeddings(), "input embedding")

    def unembedding(self) -> Tensor:
        """Rows of the output head, ``[V, D]``, float32 on the CPU (the embedding if tied)."""
        return _matrix(self.hf.get_output_embeddings(), "output head")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of decoder outputs ``[B, T, D]`` (behind the final norm).

        The model's own forward makes them, with the decoder's part already done, so that what
        a family does to its logits (soft-capping, scaling) is not said a second time here.
        """
        own = vars(self.decoder).get("forward")
        done = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
        done.router_logits = None  # mixtures of experts ask for them
        self.decoder.forward = lambda *_args, **_options: done
        try:
            return self.hf(inputs_embeds=hidden, use_cache=False).logits
        finally:
            del self.decoder.forward
            if own is not None:
                self.decoder.forward = own

    def prompt_ids(
        self, messages: str | Sequence[dict[str, str]]
    ) -> tuple[str, tuple[int, ...]]:
        """The prompt of a chat, as text and as the ids to be used.

        ``messages`` is a task, or a list of ``{"role", "content"}``. The chat template is
        applied with its generation prompt and the model's options (method, section 3); a
        tokenizer without a template
        gets the plain contents and a newline.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        templated = getattr(self.tokenizer, "chat_template", None) is not None
        if templated:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self.template
            )
        else:
            text = "\n".join(message["content"] for message in messages) + "\n"
        # The template writes its own beginning-of-sequence token: never add a second one.
        ids = self.tokenizer(text, add_special_tokens=not templated)["input_ids"]
        return text, tuple(int(i) for i in ids)

    def left_pad(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences of ids as one batch, padding on the left.

        Returns ``input_ids``, ``attention_mask`` and ``position_ids``, each ``[B, T]`` int64 on
        the model's device. The mask is built from the lengths, never from ``ids != pad``: the
        padding token of many models is their end-of-sequence token.
        """
        if not sequences or not all(len(ids) for ids in sequences):
            raise ValueError("left_pad needs at least one sequence, and none of them empty")
        rows = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, mask = pad(rows, padding_value=self.pad_id), pad([*map(torch.ones_like, rows)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return ids.to(self.device), mask.to(self.device), positions.to(self.device)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first end-of-sequence token, other tags included."""
        return self.decode_all(self.before_end(ids))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of all ids, special tokens included."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def offsets_of(self, response: Response) -> np.ndarray:
        """Characters of the thinking that every token of prompt and output covers.

        Returns:
            int64 ``[T, 2]``, half-open ``[start, end)`` in characters of ``response.thinking``;
            ``(-1, -1)`` for a token outside, and for all of the prompt. A character whose bytes
            are spread over tokens belongs to all of them, so ranges of such neighbours overlap
            by that one character.

        Raises:
            ValueError: where the thinking is not at ``thinking_start`` of the decoded output.
        """
        text, begin = response.thinking, response.thinking_start
        kept = self.before_end(response.output_ids)
        whole = self.decode_all(kept)
        if not 0 <= begin <= len(whole) or not whole.startswith(text, begin):
            raise ValueError(
                f"the decoded output does not hold the given thinking at {begin}: "
                f"{whole[begin : begin + 40]!r} is not {text[:40]!r}"
            )
        first = len(response.prompt_ids)
        ranges = np.full((first + len(response.output_ids), 2), -1, dtype=np.int64)
        found = (character_ranges(self.decode_all, kept, whole) - begin).clip(0, len(text))
        inside = found[:, 1] > found[:, 0]
        ranges[first : first + len(kept)][inside] = found[inside]
        return ranges

    def before_end(self, ids: Sequence[int]) -> list[int]:
        """Ids before the first end-of-sequence token."""
        ids = [int(i) for i in ids]
        end = next((k for k, i in enumerate(ids) if i in self.eos_ids), len(ids))
        return ids[:end]


class Traced(TransformersModel):
    """nnsight's model, that hands a prepared forward to the module as it is.

    A forward that comes with ``past_key_values`` brings its own masks. nnsight 0.8.1 would
    split those into rows, which fails for the dictionary of masks (one a layer type) that
    Gemma or Qwen models take.
    """

    def _batch(self, invokes: list, fn: Any) -> tuple:
        if len(invokes) == 1 and "past_key_values" in invokes[0][1]:
            return invokes[0]
        return super()._batch(invokes, fn)


def wrap(
    hf_model: nn.Module,
    tokenizer: Any,
    *,
    name: str,
    template: Mapping[str, Any] | None = None,
) -> Model:
    """A :class:`Model` around an already built transformers model; ``template`` are options of
    its chat template. Parameters are frozen and the model set to eval mode; nothing is copied
    and nothing checked."""
    with quiet():
        return Model(hf_model, tokenizer, name=name, template=template)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars and advice; errors still come through."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def find_layers(hf: nn.Module) -> tuple[str, str]:
    """The path of the base decoder and the name of its list of layers.

    Raises:
        ModelError: naming every place that was looked at.
    """
    for decoder, layers in LAYER_PATHS:
        with contextlib.suppress(AttributeError):
            if isinstance(hf.get_submodule(f"{decoder}.{layers}"), nn.ModuleList):
                return decoder, layers
    looked = ", ".join(f"{decoder}.{layers}" for decoder, layers in LAYER_PATHS)
    raise ModelError(
        f"no decoder layers found in {type(hf).__name__}: looked for a ModuleList at {looked}"
    )


def runs_on(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its weights, or that to which accelerate brings
    offloaded ones for a forward."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            hook = getattr(part, "_hf_hook", None) if weight.is_meta else None
            return weight.device if hook is None else torch.device(hook.execution_device)
    raise ModelError(f"{type(module).__name__} has no weights")


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The entries of a state dict; offloaded ones are fetched one at a time."""
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            path, _, leaf = name.rpartition(".")
            tensor = module.get_submodule(path)._hf_hook.weights_map[leaf]
        yield name, tensor


def _checksum(name: str, tensor: Tensor) -> str:
    """Name, shape, type and the sum of the bits as whole numbers: exact, hence the same on
    every device and in every order, where a sum of floats is not."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(whole[tensor.element_size()])
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}"


def _eos_ids(hf: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a turn, from generation config, config, tokenizer and vocabulary."""
    configs = (getattr(hf, "generation_config", None), hf.config)
    values = [getattr(config, "eos_token_id", None) for config in configs]
    found = [
        i for value in values for i in (value if isinstance(value, list | tuple) else [value])
    ]
    added = getattr(tokenizer, "added_tokens_encoder", {})
    found += [tokenizer.eos_token_id, *(added.get(token) for token in CHAT_ENDS)]
    return tuple(sorted({int(i) for i in found if i is not None}))


def _matrix(module: nn.Module | None, what: str) -> Tensor:
    weight = None if module is None else dict(stored(module)).get("weight")
    if weight is None or not weight.is_floating_point():
        raise ModelError(f"the {what} has no floating-point weight: {module}")
    return weight.detach().to("cpu", torch.float32)


# -- which characters of a decoded text each token holds -----------------------------------
#
# Decoding one token at a time is not decoding the text: a character may be spread over tokens,
# and SentencePiece decoders treat the first token apart. So the *end* of token k is defined by
# whole texts: the length of the longest common prefix of decode(ids[:k + 1]) and decode(ids).


def character_ranges(decode: Decode, ids: Sequence[int], whole: str) -> np.ndarray:
    r"""Half-open ranges int64 ``[T, 2]`` of the characters of ``whole = decode(ids)``.

    A character whose bytes are spread over tokens is in the range of each of them: of the
    token that holds its first bytes, be it alone or behind a space or a letter (``" \xc3"``
    and ``"\xb1"`` make ``" ñ"``), of those between, and of the one that completes it.

    Linear time, by short windows; every prefix is decoded only where the windows do not add up
    to ``whole``.
    """
    marks = _windowed(decode, ids, whole)
    if marks is None:
        marks = [_mark(decode(ids[: k + 1]), whole) for k in range(len(ids))]
    table = np.array(marks, dtype=np.int64).reshape(-1, 2)
    table = np.maximum.accumulate(table, axis=0)
    complete, begun = table[:, 0], np.minimum(table[:, 1], len(whole))
    starts = np.concatenate([[0], complete])[: len(ids)]
    stops = np.maximum(begun, np.minimum(starts + 1, len(whole)))
    return np.stack([starts, stops], axis=1)


def _windowed(decode: Decode, ids: Sequence[int], whole: str) -> list[tuple[int, int]] | None:
    """The marks, decoding short windows: the open group of tokens (up to the first whose text
    ends in a finished character) behind the group before it, as context. ``None`` where the
    windows do not add up to ``whole``.
    """
    marks: list[tuple[int, int]] = []
    settled, begin, group = 0, 0, 0
    prefix = ""
    for k in range(len(ids)):
        text = decode(ids[begin : k + 1])
        if text.endswith(REPLACEMENT) and k + 1 < len(ids):
            continue
        n = len(prefix)
        added = text[n:]
        if not text.startswith(prefix) or not whole.startswith(added, settled):
            return None
        for j in range(group, k):
            complete, begun = _mark(decode(ids[begin : j + 1]), text)
            marks.append((settled + max(0, complete - n), settled + max(0, begun - n)))
        settled += len(added)
        marks.append((settled, settled))
        begin, group = group, k + 1
        prefix = decode(ids[begin:group])
    return marks if settled == len(whole) else None


def _mark(part: str, whole: str) -> tuple[int, int]:
    """Characters of ``whole`` that a decoded prefix has complete, and those it has begun: what
    it writes beyond its common prefix with ``whole`` are bytes of the next character."""
    if whole.startswith(part):
        return len(part), len(part)
    pairs = enumerate(zip(part, whole, strict=False))
    complete = next((k for k, (a, b) in pairs if a != b), min(len(part), len(whole)))
    return complete, complete + (len(part) > complete)
