"""A model whose template switches its thinking: two entries of one hub id, from a cache of the
hub with a tiny Qwen3 in it whose text is known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants

from stllms import models, registry
from stllms.app import cli, compare, preflight
from stllms.comparison import groups
from stllms.config import RunConfig
from stllms.generation import chains, prompts
from stllms.records import Task
from stllms.runs.artifacts import Folder

HUB_ID, ON, OFF = "Qwen/Qwen3-0.6B", "qwen3-0.6b", "qwen3-0.6b-plain"
COMMIT = "0123456789" * 4
#: Of the form of Qwen3's: thinking is on unless it is switched off, and then an empty one
#: stands in the prompt.
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
EMPTY = "<think>\n\n</think>\n\n"
#: What follows the generation prompt of either kind. No token occurs twice behind another.
THINKS, ANSWERS = ["<think>", *"Hm.\tWait, no", "</think>", "7", "<|end|>"], ["Y", "<|end|>"]
TASK = Task("t", "own", "How many?")
SUFFIX = "\n\nThink step by step first, then give the final answer."


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache of the hub with a Qwen3 whose next token depends on the last one alone: layers
    that add nothing, one coordinate of the residual stream for each token."""
    words = tiny.tokenizer(template=TEMPLATE)
    hf = tiny.hf_model("qwen3", hidden_size=len(words) + len(words) % 4)
    state = hf.state_dict()
    for name, weight in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    state["model.embed_tokens.weight"].copy_(
        torch.eye(*state["model.embed_tokens.weight"].shape)
    )
    state["lm_head.weight"].zero_()
    for first, after in (("<|assistant|>", THINKS), ("\n", ANSWERS)):
        ids = [words(text)["input_ids"][0] for text in (first, *after)]
        for one, following in pairwise(ids):
            state["lm_head.weight"][following, one] = 10.0
    root = tmp_path_factory.mktemp("hub")
    place = root / f"models--{HUB_ID.replace('/', '--')}"
    hf.save_pretrained(place / "snapshots" / COMMIT)
    words.save_pretrained(place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return root


@pytest.fixture
def hub(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def chain(name: str):
    model = models.load(name, device="cpu")
    options = {"max_new_tokens": 20, "temperature": 0.0, "progress": False}
    return model, chains.responses(model, [TASK], **options)[0]


def test_the_hub_id_means_the_thinking_one():
    assert registry.resolve(HUB_ID.upper()) is registry.MODELS[ON]
    assert registry.resolve(OFF).hub_id == registry.resolve(ON).hub_id == HUB_ID
    assert registry.api_entry("someone/qwen3-0.6b:free").kind == "thinking"
    assert [registry.slug(name) for name in (HUB_ID, ON, OFF)] == [ON, ON, OFF]
    for size in ("0.6b", "1.7b"):
        on, off = (registry.MODELS[f"qwen3-{size}{end}"] for end in ("", "-plain"))
        assert (on.pair, off.pair) == (off.name, on.name)
        assert (on.kind, off.kind) == ("thinking", "instruct")


def test_a_thinking_model_opens_its_thinking_in_the_output(hub):
    model, one = chain(HUB_ID)
    assert model.name == ON
    assert one.prompt_text == "<|user|>How many?<|assistant|>"
    assert one.text == "<think>Hm.\tWait, no</think>7"
    assert (one.thinking, one.answer, one.closed) == ("Hm.\tWait, no", "7", True)
    found = prompts.response(
        model, TASK, (one.prompt_text, one.prompt_ids), model.tokenizer("<think>\nSo").input_ids
    )
    assert (found.thinking, found.thinking_start, found.answer) == ("So", 8, "")
    assert not found.closed


def test_a_model_that_does_not_think_has_an_empty_thinking_in_its_prompt(hub):
    model, one = chain(OFF)
    assert model.name == OFF
    assert one.prompt_text == f"<|user|>How many?{SUFFIX}<|assistant|>{EMPTY}"
    assert model.decode_all(one.prompt_ids) == one.prompt_text
    assert one.text == one.thinking == one.answer == "Y"
    assert (one.thinking_start, one.closed, one.finished) == (0, True, True)


def test_the_two_are_told_apart_by_content(hub):
    on, off = (models.load(name, device="cpu").identity for name in (ON, OFF))
    assert [name for name in on if on[name] != off[name]] == ["chat template"]
    assert registry.content_of(registry.MODELS[OFF])["revision"] == COMMIT
    assert on["revision"] == off["revision"] == COMMIT


def test_a_model_is_its_own_pair_in_the_comparison(hub, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(
        "".join(f'{{"id": "q{i}", "content": "How many? {i}"}}\n' for i in range(5))
    )
    sizes = {"n_samples": 1, "n_evaluate": 4, "n_compare": 4, "judge": "lexical"}
    run = RunConfig(
        model=HUB_ID,
        compare=(OFF,),
        tasks=str(tasks),
        results=str(tmp_path / "r"),
        temperature=0.0,
        device="cpu",
        **sizes,
    )
    on, off = compare.members(run, Folder.comparison(run))
    assert (on.display, off.display) == ("Qwen3-0.6B", "Qwen3-0.6B (no thinking)")
    labels = on.labels.names
    assert on.counts[:, labels.index("backtracking")].tolist() == [1] * 4
    assert off.counts[:, labels.index("backtracking")].tolist() == [0] * 4
    assert sorted(p.name for p in (tmp_path / "r" / "comparison").iterdir()) == [ON, OFF]
    found = groups.pairs([on, off]).set_index("behaviour")
    assert found.loc["backtracking", "difference"] == 0.5  # one of its two segments
    assert set(found["thinking"]) == {"Qwen3-0.6B"}


def test_the_pair_is_named_where_nothing_is_compared(hub):
    with pytest.raises(preflight.Refused, match=f"--option compare={OFF}"):
        preflight._pair(RunConfig(model=ON, judge="lexical"))


def test_the_revision_is_that_of_both():
    run = RunConfig(model=ON, compare=(OFF, "qwen3-1.7b"), judge="lexical", revision="v2")
    assert run.for_model(OFF).revision == "v2"
    assert run.for_model("qwen3-1.7b").revision is None


def test_they_are_listed_as_not_run_here(capsys):
    assert cli.main(["models"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in (ON, OFF):
        assert listed[name].endswith("not run here")
    assert listed["smollm2"].endswith("yes")
