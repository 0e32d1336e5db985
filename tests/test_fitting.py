"""The memory of a batch: computed beforehand, measured on real forwards, kept for the run."""

from __future__ import annotations

import re
import warnings

import pytest
import tiny
import torch
import transformers

from stllms import artifacts, decode, memory, models
from stllms.config import RunConfig
from stllms.decode import Row
from stllms.kvcache import BatchCache

#: Families whose keys and values are not those of :data:`tiny.KINDS`.
OTHERS = {
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4}),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            **{k: v for k, v in tiny.SIZES.items() if k != "initializer_range"},
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "first_k_dense_replace": 4,
        },
    ),
}


def build(kind: str):
    if kind in tiny.KINDS:
        return tiny.hf_model(kind)
    config_class, options = OTHERS[kind]
    config = config_class(vocab_size=len(tiny.tokenizer()), **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*sorted(tiny.KINDS), *sorted(OTHERS)])
def test_the_cache_is_as_large_as_that_of_a_real_forward(kind, dtype):
    model = models.wrap(build(kind).to(dtype), tiny.tokenizer(), name=kind)
    cache = BatchCache(model.n_layers)
    with torch.no_grad():
        ids = torch.arange(60).reshape(3, 20)
        model.hf(input_ids=ids, past_key_values=cache, use_cache=True)
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        measured = sum(t.numel() * t.element_size() for t in held)
        assert 3 * memory.cache(model.text_config, dtype, 20) == measured
        for _ in range(30):
            model.hf(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    buffers = [t for layer in cache.layers for t in layer.buffers]
    taken = sum(t.numel() * t.element_size() for t in buffers)
    assert 3 * memory.cache(model.text_config, dtype, 50) <= taken
    assert taken <= 3 * memory.row(model, 20, 30), "what is kept while rows are written"


def test_weights_are_counted_once_where_they_are_tied(tmp_path):
    model = tiny.model("qwen2")
    model.hf.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    buffers = sum(b.numel() * 4 for b in model.hf.buffers())
    written = file.stat().st_size
    assert 0 < written - (memory.weights(model) - buffers) < 10_000, "the file has a header"


def test_free_memory_is_the_machines_or_the_cards(monkeypatch):
    with open("/proc/meminfo") as file:
        (line,) = re.findall(r"MemAvailable: +(\d+) kB", file.read())
    assert memory.free(torch.device("cpu")) == pytest.approx(1024 * int(line), rel=0.2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 9_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free(torch.device("cuda")) == 5_400, (
        "what torch holds and does not use counts"
    )


def rows(model, n: int) -> list[Row]:
    return [Row(model.prompt_ids(f"question {i}")[1], f"t{i}") for i in range(n)]


def sizes(monkeypatch) -> list[int]:
    """The batch sizes of the runs to come."""
    seen, real = [], decode._run

    def run(model, chosen, limit, size, *rest):
        seen.append(size)
        return real(model, chosen, limit, size, *rest)

    monkeypatch.setattr(decode, "_run", run)
    return seen


def test_a_batch_that_fits_is_chosen_said_once_and_kept(monkeypatch):
    model = tiny.model()
    plain = decode.run(model, rows(model, 8), max_new_tokens=5, batch_size=8)
    prompt = len(model.prompt_ids("question 0")[1])
    # 4 layers, keys and values of 2 heads of 8, float32, twice; 261 logits or the states.
    one = 2 * 4 * 2 * 2 * 8 * 4 * (prompt + 5) + max(261 * 24, prompt * (8 * 32 + 3 * 48) * 4)
    monkeypatch.setattr(memory, "free", lambda device: 3.5 * one / 0.8)
    seen = sizes(monkeypatch)
    with pytest.warns(UserWarning, match="batches of 3 rows, not 8") as said:
        assert decode.run(model, rows(model, 8), max_new_tokens=5, batch_size=8) == plain
    (line,) = [str(one.message) for one in said]
    assert f"a row of {prompt} + 5 tokens takes" in line
    assert "free on cpu beside weights of" in line
    assert "\n" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode.run(model, rows(model, 8), max_new_tokens=5)
    assert seen == [3, 3]
    assert model.batch_limit == 3
    monkeypatch.setattr(memory, "free", lambda device: 0)
    with pytest.warns(UserWarning, match="batches of 1 rows, not 3"):
        decode.run(model, rows(model, 2), max_new_tokens=5)


def test_nothing_is_said_where_everything_fits(monkeypatch, recwarn):
    model = tiny.model()
    seen = sizes(monkeypatch)
    decode.run(model, rows(model, 3), max_new_tokens=5, batch_size=8)
    assert seen == [8]
    assert model.batch_limit is None
    assert not recwarn


def test_a_resumed_run_starts_from_the_batch_that_fitted(tmp_path, monkeypatch):
    config = RunConfig(device="cpu", profile="smoke", results=str(tmp_path))
    folder = artifacts.Folder(config).open()
    model = models.for_run(config)
    assert model.batch_limit is None
    real = decode._run

    def scarce(model, chosen, limit, size, *rest):
        if size > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, chosen, limit, size, *rest)

    monkeypatch.setattr(decode, "_run", scarce)
    with pytest.warns(UserWarning, match="out of memory"):
        decode.run(model, rows(model, 4), max_new_tokens=3, batch_size=4)
    folder.note(device=str(model.device), batch_size=model.batch_limit)
    monkeypatch.setattr(decode, "_run", real)
    seen = sizes(monkeypatch)
    again = models.for_run(config)
    decode.run(again, rows(again, 4), max_new_tokens=3)
    assert seen == [2]
    asked = RunConfig(device="cpu", profile="smoke", results=str(tmp_path), batch_size=4)
    assert models.for_run(asked).batch_limit is None, "who asks for a size gets it"
    folder.note(device="cuda:0")
    assert models.for_run(config).batch_limit is None, "another device"
