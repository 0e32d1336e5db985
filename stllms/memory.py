"""The memory that a batch of decoding takes, from a model's configuration, and what is free.

Not in :mod:`stllms.decode`, which runs a batch and need not know what its device is: the sizes
here are bytes of tensors that do not exist yet.

A row of ``T`` tokens holds keys and values of every layer,

    ``2 * layers * kv_heads * head_dim * T * bytes of the type``

(with DeepSeek's latent attention one latent and one rotated key for all heads), in buffers that
may be twice as long (:mod:`stllms.kvcache`); at a step its logits and their float32 copies; and
while the prompt is read the hidden states of one layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from stllms.models import Model

#: The share of the free memory that a batch may take; the rest is for what is not counted.
SHARE = 0.8
#: Buffers of the cache grow to twice what they hold.
SPARE = 2
#: Bytes a logit takes beside the model's own: float32 and float64 copies for sampling.
SAMPLING = 4 + 8 + 8


def weights(model: Model) -> int:
    """Bytes of the parameters and buffers of a loaded model."""
    held = {id(t): t for t in (*model.hf.parameters(), *model.hf.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


def cache(text_config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of one row of ``tokens``, all layers."""
    heads = text_config.num_attention_heads
    if getattr(text_config, "kv_lora_rank", None):
        width = text_config.kv_lora_rank + text_config.qk_rope_head_dim
    else:
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        width = 2 * head_dim * (getattr(text_config, "num_key_value_heads", None) or heads)
    return text_config.num_hidden_layers * width * tokens * dtype.itemsize


def row(model: Model, prompt: int, new: int) -> int:
    """Bytes that a row of ``prompt`` tokens takes until ``new`` more are written."""
    config, size = model.text_config, model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * model.d_model
    states = prompt * (8 * model.d_model + 3 * inner) * size
    logits = config.vocab_size * (size + SAMPLING)
    return SPARE * cache(config, model.dtype, prompt + new) + max(states, logits)


def free(device: torch.device) -> int:
    """Bytes that can still be taken on a device: of the card, else of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def rows(model: Model, prompt: int, new: int) -> tuple[int, str]:
    """How many rows of ``prompt`` and ``new`` tokens fit now (0: not one), and why in words."""
    needed, there = row(model, prompt, new), free(model.device)
    why = (
        f"a row of {prompt} + {new} tokens takes {_gb(needed)} for keys, values and logits, "
        f"{_gb(there)} are free on {model.device} beside weights of {_gb(weights(model))}"
    )
    return int(SHARE * there) // needed, why


def _gb(count: float) -> str:
    return f"{count / 1e9:.2g} GB" if count < 1e9 else f"{count / 1e9:.1f} GB"
