"""Prompts, the decoding loop, its cache and its memory, responses and their resume, and chains
of a person's file. The loop is compared with a naive one: no cache, one row, one forward for
each token, with hooks."""

from __future__ import annotations

import functools
import json
import random
import re
import warnings
from dataclasses import replace

import naive_sampling
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import OPTIONS, TASKS
from transformers.cache_utils import DynamicLayer

from stllms import models, registry
from stllms.generation import chains, prompts
from stllms.models import engines
from stllms.models.engines import Row, engine
from stllms.models.engines import transformers as decode
from stllms.models.engines.interventions import Intervention, ablate, think_end
from stllms.records import CLOSE, Response, Task
from stllms.runs.files import BadFile
from stllms.runs.store import Rows


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("a b\n</think>\n\nyes", True, ("a b", 0, "yes", True)),
        ("\n a b", True, ("a b", 2, "", False)),
        ("<think>\na</think>b", False, ("a", 8, "b", True)),
        ("no tags ", False, ("no tags", 0, "no tags", True)),
        ("</think>b", True, ("", 0, "b", True)),
        ("a</think>b</think>c", True, ("a", 0, "b</think>c", True)),
        ("", True, ("", 0, "", False)),
        # Opened in the prompt and again in the text: nothing of the thinking is lost.
        ("a <think> b</think>c", True, ("a <think> b", 0, "c", True)),
        ("<think>\na</think>b", True, ("a", 8, "b", True)),
        (" <think>\n<think> a", True, ("a", 17, "", False)),
        ("a <think> b", True, ("a <think> b", 0, "", False)),
        ("x <think> a <think> b", False, ("a <think> b", 10, "", False)),
        ("Sure. <think>a</think>b", False, ("a", 13, "b", True)),
        ("<think>a<think>b</think>c</think>d", False, ("a<think>b", 7, "c</think>d", True)),
        ("<think></think>a <think>b</think>", False, ("", 7, "a <think>b</think>", True)),
        # A closing tag first says that the thinking was opened before the text.
        ("a</think>b<think>c", False, ("a", 0, "b<think>c", True)),
    ],
)
def test_split_finds_the_thinking_and_where_it_starts(text, opened, expected):
    found = prompts.split(text, opened=opened)
    assert found == expected
    assert text[found[1] : found[1] + len(found[0])] == found[0]


TAGS = re.compile(r"</?think>")
PIECES = st.sampled_from(["<think>", "</think>", "<", "think>", "/", " ", "\n", "a", "b.", "é"])


def visible(*texts: str) -> str:
    """The characters that are neither white space nor of a tag."""
    return "".join("".join(TAGS.sub("", text).split()) for text in texts)


@given(st.lists(PIECES, max_size=14).map("".join), st.booleans())
def test_no_character_outside_the_tags_is_lost(text, opened):
    thinking, start, answer, closed = prompts.split(text, opened=opened)
    one = response(text, prompt="Q <think>\n" if opened else "Q ")
    one = replace(one, thinking=thinking, thinking_start=start, answer=answer)
    assert text.startswith(thinking, start)
    assert thinking == thinking.strip()
    if opened or TAGS.search(text):
        assert visible(prompts.before(one), thinking, answer) == visible(text)
        assert closed == (CLOSE in text)
    else:  # thinks aloud: all of it is both
        assert visible(thinking) == visible(answer) == visible(text)
    assert CLOSE not in thinking
    assert not opened or not prompts.before(one)


def response(text: str, prompt: str = "Q <think>\n") -> Response:
    thinking, start, answer, closed = prompts.split(text, opened="<think>" in prompt)
    made = ("t", "own", prompt, (), (), text, thinking, start, answer, closed, True)
    return Response(*made)


def test_the_summary_counts_responses_that_use_a_tag_twice_or_write_before_it():
    made = [
        response("a</think>b"),
        response("<think>a</think>b"),
        response("a <think> b"),
        response("a</think>b</think>"),
        response("Sure. <think>a</think>b", prompt="Q"),
        response("no tags", prompt="Q"),
    ]
    found = chains.summary(made)
    names = ("<think> again", "</think> again", "text before <think>", "thinking closed")
    assert [found[name] for name in names] == [2, 1, 1, 5]
    assert not any(chains.summary([]).values())


load = functools.cache(models.load)


@pytest.mark.parametrize(
    "name", ["tiny-thinker", pytest.param("smollm2", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "text",
    [
        "First a. <think> Wait, <think> b.</think> So c.</think> d",
        "<think>\n<think> é a, b",
        "Sure! <think>\n a b </think> c",
    ],
)
def test_offsets_find_the_thinking_in_a_text_with_tags_twice(name, text):
    """Every character of the thinking that a model wrote is covered, none outside it."""
    if missing := registry.missing_packages(name):
        pytest.skip(f"not installed: {', '.join(missing)}")
    model = load(name)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    task = Task("t", "own", "Q?")
    one = prompts.response(model, task, ("Q <think>\n", [0]), ids)
    whole = model.decode(ids)
    assert one.text == whole
    ranges = model.offsets_of(one)
    covered = {i for start, end in ranges if start >= 0 for i in range(start, end)}
    assert covered == set(range(len(one.thinking)))
    assert whole[one.thinking_start :].startswith(one.thinking)
    assert visible(one.thinking, one.answer) == visible(whole)


def test_kind_is_the_registrys_or_the_templates():
    model = tiny.model("llama")
    assert prompts.kind_of(model) == "thinking"
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert prompts.kind_of(model) == "instruct"


def test_responses_hold_the_ids_that_were_used(tiny_llama):
    found = chains.responses(tiny_llama, TASKS, **OPTIONS)
    for task, one in zip(TASKS, found, strict=True):
        assert one.task_id == task.id
        assert one.prompt_ids == tiny_llama.prompt_ids(task.content)[1]
        assert one.text == tiny_llama.decode(one.output_ids)
        assert one.text[one.thinking_start :].startswith(one.thinking)
        assert one.finished == (one.output_ids[-1] in tiny_llama.eos_ids)
        assert one.finished or len(one.output_ids) == OPTIONS["max_new_tokens"]
    assert prompts.as_used(tiny_llama, found, "generated") == found
    for one in prompts.as_used(tiny_llama, found, "published"):
        assert tiny_llama.decode(one.output_ids) == one.text
    with pytest.raises(ValueError, match="more than once: t0"):
        chains.responses(tiny_llama, [*TASKS, TASKS[0]], **OPTIONS)


def test_a_truncated_chain_is_marked(tiny_llama):
    found = chains.responses(tiny_llama, TASKS, **(OPTIONS | {"max_new_tokens": 1}))
    assert not any(one.closed or one.finished for one in found if one.output_ids[0] > 3)
    counts = chains.summary(found)
    assert counts["truncated"] == sum(not one.finished for one in found)
    assert counts["longest output"] == 1


def test_a_killed_run_resumes_to_the_same_bytes(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(chains, "CHUNK", 3)
    whole = Rows(tmp_path / "whole.jsonl")
    first = chains.responses(tiny_llama, TASKS, store=whole, **OPTIONS)
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    for kept, torn in [(0, b""), (1, b""), (3, lines[3][:20]), (5, lines[5][:-1])]:
        cut = tiny.killed(whole, f"cut-{kept}.jsonl", b"".join(lines[:kept]) + torn)
        chains.responses(tiny_llama, TASKS, store=cut, **OPTIONS)
        assert cut.path.read_bytes() == content
    monkeypatch.setattr(decode, "run", None)  # nothing is decoded that is there
    assert chains.responses(tiny_llama, TASKS, store=whole, **OPTIONS) == first
    assert chains.read(whole) == first


# -- the loop ------------------------------------------------------------------------------

LIMIT, TEMPERATURE, SEED = 14, 0.9, 3
ENDS = tuple(range(0, 20))


@pytest.fixture(scope="module", params=["qwen2", "llama", "mistral", "gemma2"])
def model(request):
    """A tiny model in float64, some of whose ordinary tokens end a chain, so that rows end.

    Gemma-2 stays in float32: its eager attention overflows on padding in float64.
    """
    built = tiny.model(request.param)
    if request.param != "gemma2":
        built.hf.double()
    built.eos_ids = (*built.eos_ids, *ENDS)
    return built


def rows(model, count: int = 15) -> list[Row]:
    """Rows of all lengths: plain, with one intervention, with two at two layers."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = tuple(rng.randrange(40, 200) for _ in range(rng.randint(2, 12)))
        first, second = torch.randn(2, model.d_model, generator=generator)
        edits = (
            (),
            (Intervention(first, i % model.n_layers, 1.5),),
            (
                Intervention(first, 1, -0.7, where="generated"),
                Intervention(second, 3, 1.0, "ablate"),
            ),
        )[i % 3]
        made.append(Row(ids, f"task-{i}", edits))
    return made


def naive(model, row: Row) -> tuple[int, ...]:
    """method, section 8, word for word: the whole prefix again for every token, with hooks."""
    ids, prompt, written = list(row.prompt_ids), len(row.prompt_ids), []

    def hook(item: Intervention):
        def edit(_module, _inputs, output):
            vector = item.direction.to(output.dtype)
            if item.operation == "add":
                delta = (item.coefficient * vector).expand_as(output).clone()
            else:
                unit = vector / vector.norm()
                delta = -item.coefficient * (output @ unit)[..., None] * unit
            if item.where != "all":
                delta[:, :prompt] = 0
            return output + delta

        return edit

    for step in range(LIMIT):
        handles = [
            model.layers[item.layer].register_forward_hook(hook(item))
            for item in row.interventions
        ]
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        written.append(naive_sampling.draw(logits, TEMPERATURE, SEED, row.key, step))
        ids.append(written[-1])
        if written[-1] in model.eos_ids:
            break
    return tuple(written)


def run(model, chosen, size: int | None = 6, **changes) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": LIMIT, "temperature": TEMPERATURE, "seed": SEED} | changes
    return [chain.ids for chain in decode.run(model, chosen, batch_size=size, **options)]


def test_a_mixed_refilled_batch_equals_the_naive_loop_whatever_its_size_and_order(model):
    chosen = rows(model)
    found = run(model, chosen)
    assert found == [naive(model, row) for row in chosen]
    lengths = {len(ids) for ids in found}
    assert len(lengths) > 2, "rows end at different times, so the batch was refilled"
    assert run(model, chosen, size=1) == found
    assert run(model, chosen, size=64) == found
    assert run(model, chosen[::-1], size=4) == found[::-1]


def test_coefficient_zero_and_a_vector_with_its_opposite_are_plain(model):
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    plain = [Row(row.prompt_ids, row.key) for row in rows(model)]

    def written(*coefficients: float) -> list[tuple[int, ...]]:
        edits = tuple(Intervention(vector, 2, c) for c in coefficients)
        return run(model, [replace(row, interventions=edits) for row in plain])

    assert written(0.0) == written(1.0, -1.0) == written()
    assert written(4.0) != written()


def test_greedy_ignores_seed_and_key(tiny_llama):
    ids = (50, 60, 70)
    found = run(tiny_llama, [Row(ids, "a"), Row(ids, "b")], temperature=0.0)
    assert found[0] == found[1] == run(tiny_llama, [Row(ids, "c")], temperature=0, seed=9)[0]


def test_thinking_only_stops_at_the_closing_tag(tiny_llama):
    """A vector that forces one token acts until that token is </think>, then no longer."""
    end = think_end(tiny_llama)
    assert end > 0
    push = tiny_llama.unembedding()[end] * 1e3
    last = tiny_llama.n_layers - 1
    ids = (50, 60, 70)

    def write(*edits):
        return run(tiny_llama, [Row(ids, "a", edits)], temperature=0.0)[0]

    assert set(write(Intervention(push, last, 1.0))) == {end}
    generated = write(Intervention(push, last, 1.0, where="generated"))
    assert generated[0] == write()[0], "the prompt is not touched"
    assert set(generated[1:]) == {end}
    found = write(Intervention(push, last, 1.0, where="thinking"))
    assert found[:2] == generated[:2]
    assert end not in found[2:]


def test_ablation_leaves_nothing_along_the_direction():
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    vector = torch.randn(2, 1, 8, dtype=torch.float64)
    after = hidden + ablate(hidden, vector, torch.ones(2, 1, 1, dtype=torch.float64))
    assert torch.allclose((after * vector).sum(-1), torch.zeros(2, 3, dtype=torch.float64))
    nothing = ablate(hidden, torch.zeros_like(vector), torch.ones(2, 1, 1))
    assert torch.equal(nothing, torch.zeros_like(hidden))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row((1,) * 600, "long"), "long: 600 prompt tokens and 14 new ones exceed"),
        (Row((1,), "a", (Intervention(torch.ones(32), 4, 1.0),)), "layers 0 to 3"),
        (Row((1,), "a", (Intervention(torch.ones(31), 1, 1.0),)), "width 31, .* has 32"),
        (
            Row((1,), "a", (Intervention(torch.ones(32), 1, 1.0, where="thinking"),)),
            "no token </think>: where='thinking' would be",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(tiny_llama, monkeypatch, row, message):
    monkeypatch.setattr(engine, "think_end", lambda model: -1)
    with pytest.raises(ValueError, match=message):
        engines.generate(tiny_llama, [row], max_new_tokens=14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "push"}, "no operator 'push'; there are add, ablate"),
        ({"where": "later"}, "unknown place 'later'"),
        ({"direction": torch.tensor([1.0, float("nan")])}, "finite vector"),
        ({"direction": torch.ones(2, 2)}, "finite vector"),
    ],
)
def test_interventions_that_make_no_sense_are_refused(arguments, message):
    values = {"direction": torch.ones(4), "layer": 0, "coefficient": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        Intervention(**values)


def test_rows_that_wait_are_streamed_as_empty(tiny_llama):
    seen = []
    made = run(
        tiny_llama,
        [Row((5, 6, 7), "a"), Row((8, 9), "b")],
        size=1,
        watch=lambda written: seen.append([tuple(ids) for ids in written]),
    )
    assert seen[0][1] == ()
    assert seen[-1] == made
    assert [sum(map(len, rows)) for rows in seen] == list(range(1, len(seen) + 1))


# -- memory --------------------------------------------------------------------------------

#: Families whose keys and values are not those of :data:`tiny.KINDS`.
OTHERS = {
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4}),
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
    cache = transformers.DynamicCache()
    with torch.no_grad():
        ids = torch.arange(60).reshape(3, 20)
        model.hf(input_ids=ids, past_key_values=cache, use_cache=True)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    measured = sum(t.numel() * t.element_size() for t in held)
    assert 3 * decode.cache_bytes(model.text_config, dtype, 20) == measured
    assert decode.row_bytes(model, 15, 5) > 2 * measured / 3


def test_free_memory_is_the_machines_or_the_cards(monkeypatch):
    with open("/proc/meminfo") as file:
        (line,) = re.findall(r"MemAvailable: +(\d+) kB", file.read())
    assert decode.free_bytes(torch.device("cpu")) == pytest.approx(1024 * int(line), rel=0.2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 9_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    held = "what torch holds and does not use counts"
    assert decode.free_bytes(torch.device("cuda")) == 5_400, held


# -- prompts that are shared, and the cache --------------------------------------------------


def conditions(model) -> list[Row]:
    """Two prompts of two lengths, each plain, pushed up and down at layer 1, at layer 2, at
    both, and where prompts are left alone."""
    generator = torch.Generator().manual_seed(2)
    first, second = 2 * torch.randn(2, model.d_model, generator=generator)
    up, down = Intervention(first, 1, 1.0), Intervention(first, 1, -1.0)
    other = Intervention(second, 2, 1.0, "ablate")
    later = Intervention(second, 0, 1.0, where="generated")
    edits = ((), (up,), (down,), (other,), (up, other), (later,))
    prompts = tuple(range(50, 59)), tuple(range(90, 95))
    return [Row(ids, f"{len(ids)}", edit) for ids in prompts for edit in edits]


def test_rows_that_share_a_prompt_equal_the_naive_loop(model):
    chosen = conditions(model)
    found = run(model, chosen, size=64)
    assert found == [naive(model, row) for row in chosen]
    assert len(set(found)) > 6


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "deepseek_v3", "gpt2"])
def test_a_prompt_is_read_once_until_its_rows_part(kind):
    """Rows that enter each layer while prompts are read, counted by hand. Layers of GPT-2 take
    what is not known to have a row for each prompt: there nothing is shared."""
    model = models.wrap(build(kind), tiny.tokenizer(), name=kind)
    chosen, seen = conditions(model), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _m, given: seen.append(len(given[0])))
    together = run(model, chosen, size=64)
    entered = [2, 2, 6, 10] if model.n_layers == 4 else [12] * 3
    assert seen[: model.n_layers] == entered
    assert together == run(model, chosen, size=1)


def test_portions_of_prompts_change_nothing(tiny_llama, monkeypatch):
    chosen, sizes = conditions(tiny_llama), []
    whole = run(tiny_llama, chosen, size=64)
    embedding = tiny_llama.hf.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[:2]))
    monkeypatch.setattr(decode, "PORTION", 40)  # four rows of nine tokens
    assert run(tiny_llama, chosen, size=64) == whole
    handle.remove()
    assert sizes[:3] == [(1, 9), (2, 9), (1, 5)]
    assert sizes[3] == (12, 1)


def test_the_cache_holds_what_that_of_transformers_holds_and_seldom_moves(monkeypatch):
    monkeypatch.setattr(decode, "ROOM", 4)

    def columns(rows: int, n: int):
        return torch.randn(2, rows, 3, n, 5).unbind()

    mine, theirs = decode._Layer(), DynamicLayer()
    places = []
    for n in [7, *[1] * 10]:
        new = columns(4, n)
        for a, b in zip(mine.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(a, b)
        places.append(mine.keys.data_ptr())
    assert len(set(places[1:])) == 2, "five columns, then five more"
    mine.take(torch.tensor([3, 1]), 2)
    assert torch.equal(mine.keys, theirs.keys[[3, 1], :, 2:])
    other, (keys, values) = decode._Layer(), columns(1, 6)
    other.update(keys, values)
    mine.append([other])
    assert torch.equal(mine.values[2:, :, 9:], values)
    assert not mine.values[2:, :, :9].any()
    new = columns(3, 1)
    before = mine.values.clone()
    assert torch.equal(mine.update(*new)[1], torch.cat([before, new[1]], dim=-2))
    assert mine.get_seq_length() == 16


# -- memory that runs out ---------------------------------------------------------------------


def few(model, n: int) -> list[Row]:
    return [Row(model.prompt_ids(f"question {i}")[1], f"t{i}") for i in range(n)]


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The batch sizes of the runs to come. More than three rows at once run out of memory."""
    seen, real = [], decode._run

    def scarce(model, chosen, limit, size, *rest):
        seen.append(size)
        written = real(model, chosen, limit, size, *rest)
        if min(size, len(chosen)) > 3:
            raise torch.OutOfMemoryError("no room")
        return written

    monkeypatch.setattr(decode, "_run", scarce)
    return seen


def test_memory_that_runs_out_halves_the_batch_says_so_and_is_remembered(sizes):
    model = tiny.model()
    chosen, told = few(model, 4), []
    alone = run(model, chosen, size=1)
    with pytest.warns(UserWarning, match="out of memory: going on with batches of 2 rows"):
        assert run(model, chosen, size=8, progress=lambda *n: told.append(n)) == alone
    assert sizes == [1, 8, 2], "four rows are one batch of 8 or of 4"
    assert sum(tokens for tokens, _ in told) == sum(map(len, alone))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(model, chosen, size=8) == alone
    assert sizes[-1] == model.batch_limit == 2


def test_a_batch_that_fits_is_chosen_said_once_and_kept(sizes, monkeypatch):
    model = tiny.model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, few(model, 3), size=8)
    assert (sizes, model.batch_limit) == ([8], None)
    plain = run(model, few(model, 8), size=2)
    prompt = len(model.prompt_ids("question 0")[1])
    # 4 layers, keys and values of 2 heads of 8, float32, twice; 261 logits or the states.
    states = prompt * (8 * 32 + 3 * 48) * 4
    one = 2 * 4 * 2 * 2 * 8 * 4 * (prompt + LIMIT) + max(261 * 24, states)
    monkeypatch.setattr(decode, "free_bytes", lambda device: 3.5 * one / 0.8)
    with pytest.warns(UserWarning, match="batches of 3 rows, not 8") as said:
        assert run(model, few(model, 8), size=8) == plain
    (line,) = [str(one.message) for one in said]
    assert f"a row of {prompt} + {LIMIT} tokens takes" in line
    assert "\n" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, few(model, 8), size=None)
    assert sizes[-2:] == [3, 3]
    monkeypatch.setattr(decode, "free_bytes", lambda device: 0)
    with pytest.warns(UserWarning, match="batches of 1 rows, not 3"):
        run(model, few(model, 2))
    assert model.batch_limit == 1


# -- a person's file ------------------------------------------------------------------------

#: Texts that are values of JSON and not what a field wants; and texts that are none.
STRANGE = (
    *("null", "true", "7", "1e999", '"\\ud83d"', '"a\\u0000b"', "[]", "[[[]]]", '{"a": 1}'),
    *("9" * 5_000, "[" * 2_500 + "]" * 2_500, '{"a":' * 2_500, "\x00", "{"),
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("strange", STRANGE)
def test_a_persons_file_is_read_or_refused_in_one_line(tmp_path, name, strange):
    path = tmp_path / name
    for text in (strange, f'{{"text": {strange}}}', f'{{"text": "a", "task_id": {strange}}}'):
        content = f"[{text}]" if name.endswith("json") else f'{{"text": "a b."}}\n{text}'
        path.write_text(content, encoding="utf-8")
        found, said = [], ""
        try:
            found = prompts.read(str(path))
        except BadFile as error:
            said = str(error)
        assert bool(found) != bool(said)
        assert not said or re.search(r"line 2|chain 1|no whole JSON", said)
        assert said.startswith(str(path) if said else "")
        assert "\n" not in said
        for one in found:
            (one.task_id + one.text + one.thinking + one.answer).encode()  # can be stored


@pytest.mark.parametrize("name", ["a\x00b", "~nobody-of-this-name/x", "x" * 5_000, "nowhere"])
def test_a_file_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(BadFile) as caught:
        prompts.read(name)
    assert "\n" not in str(caught.value)


def test_a_persons_chains_keep_their_names_and_their_tags(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"task_id": 7, "thinking": "<think> stays"}, {"response": "<think>a</think>b"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    found = prompts.read(str(path))
    made = [(one.task_id, one.thinking, one.answer) for one in found]
    assert made == [("7", "<think> stays", ""), ("2", "a", "b")]
