"""Tiny random models and a byte-level tokenizer, built in code: nothing is downloaded.

The weights are drawn wide (``initializer_range`` 0.2) so that attention, soft-capping and the
layers all matter to the logits; with the usual 0.02 every mistake would hide in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stllms.models.model import Model, wrap
from stllms.records import Response, Task
from stllms.runs.files import Record
from stllms.runs.store import Rows

#: The ten categories of tasks.
CATEGORIES: tuple[str, ...] = (
    "mathematical logic",
    "spatial reasoning",
    "verbal logic",
    "pattern recognition",
    "lateral thinking",
    "causal reasoning",
    "probabilistic thinking",
    "systems thinking",
    "creative problem solving",
    "scientific reasoning",
)
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
}
WINDOW = 7
#: kind -> configuration class and what makes the family special.
KINDS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "sliding_window": WINDOW,
            "head_dim": 8,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "sliding_window": WINDOW,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}

#: Tasks of seven lengths, and how responses to them are made.
TASKS = [Task(f"t{i}", "own", "What is " + "so " * i + "good?") for i in range(7)]
OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "seed": 1, "progress": False}


def tokenizer(*, template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """Every byte is a token; chat and thinking tags are single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIALS[0], pad_token=SPECIALS[0]
    )
    wrapped.chat_template = template
    return wrapped


def hf_model(kind: str = "llama", *, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A random causal language model of a family, float32, in eval mode."""
    words = tokenizer()
    config_class, special = KINDS[kind]
    options = {**SIZES, **special, **changes}
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = config_class(vocab_size=len(words), **options, **ids)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def model(kind: str = "llama", *, seed: int = 0, **changes) -> Model:
    """:func:`hf_model` wrapped, with the byte tokenizer."""
    return wrap(hf_model(kind, seed=seed, **changes), tokenizer(), name=f"tiny-random-{kind}")


def states(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """``h [L, T, D]`` of one sequence alone, by transformers; the last layer by a hook."""
    last = []
    handle = model.layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out[0]))
    with torch.no_grad():
        hidden = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    return torch.stack([*(h[0] for h in hidden[1:-1]), last[0]])


def save_tiny_model(
    folder: Path | str, kind: str = "llama", *, seed: int = 0, **changes
) -> Path:
    """Write a tiny random model and its tokenizer as a Hugging Face folder; returns it."""
    folder = Path(folder)
    hf_model(kind, seed=seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def response(thinking: str, task_id: str = "t") -> Response:
    """A chain without tokens, as from a file."""
    return Response(task_id, "c", "", (), (), thinking, thinking, 0, "", True, True)


def killed(whole: Rows, name: str, content: bytes) -> Rows:
    """The store ``name`` beside ``whole`` as a kill leaves it: made from the same, ``content``
    on the disk, and nothing of it recorded yet."""
    left = Rows(whole.path.with_name(name), whole.key)
    record = Record(whole.path.parent)
    left.bind(record.entry(whole.path)["made_from"])
    left.path.write_bytes(content)
    return left
