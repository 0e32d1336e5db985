"""What a model is asked: the exact text, for every style."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from stllms.generation import chains, prompts, remote
from stllms.records import Task
from stllms.registry import MODELS
from stllms.steering import conditions

TASK = Task("t", "own", "Why {really}?")
SUFFIX = "\n\nThink step by step first, then give the final answer."
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture
def thinker():
    return tiny.model()


@pytest.fixture
def instruct():
    model = tiny.model()
    model.tokenizer.chat_template = PLAIN
    return model


@pytest.mark.parametrize(
    ("style", "to_thinker", "to_instruct"),
    [
        ("sound", "Why {really}?", "Why {really}?" + SUFFIX),
        ("published", "Why {really}?" + SUFFIX, "Why {really}?" + SUFFIX),
        ("bare", "Why {really}?", "Why {really}?"),
        ("Q: {question} {A}:", "Q: Why {really}? {A}:", "Q: Why {really}? {A}:"),
    ],
)
def test_the_user_message_of_a_style(thinker, instruct, style, to_thinker, to_instruct):
    text, ids = prompts.opening(thinker, TASK, style)
    assert text == f"<|user|>{to_thinker}<|assistant|><think>\n"
    assert thinker.decode_all(ids) == text
    assert prompts.opening(instruct, TASK, style)[0] == f"[user]{to_instruct}[assistant]"


def test_raw_text_goes_in_as_it_is(instruct):
    text, ids = prompts.opening(instruct, TASK, "raw")
    assert text == instruct.decode_all(ids) == "Why {really}?"


def test_a_system_message_comes_first(instruct):
    text, _ = prompts.opening(instruct, TASK, "bare", "Be brief.")
    assert text == "[system]Be brief.[user]Why {really}?[assistant]"
    with pytest.raises(ValueError, match="no place for a system message"):
        prompts.opening(instruct, TASK, "raw", "Be brief.")


def test_a_chat_of_ones_own_is_sent_whole(instruct):
    chat = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Why?"},
        {"role": "user", "content": "Pie."},
    ]
    task = Task("t", "own", "", messages=tuple(chat))
    text, _ = prompts.opening(instruct, task, "published")
    assert text == "[system]Rhyme.[user]Hi[assistant]Why?[user]Pie.[assistant]"


@pytest.mark.parametrize("style", ["other", "Q: question", "sounds"])
def test_a_template_without_the_question_is_refused(thinker, style):
    with pytest.raises(ValueError, match=r"or a template with \{question\} in it") as refused:
        prompts.opening(thinker, TASK, style)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("style", "system", "sent"),
    [
        ("sound", None, [("user", "Why {really}?" + SUFFIX)]),
        ("raw", None, [("user", "Why {really}?")]),
        ("{question} Go.", "Rhyme.", [("system", "Rhyme."), ("user", "Why {really}? Go.")]),
    ],
)
def test_an_api_is_sent_the_same_messages(style, system, sent):
    entry = dataclasses.replace(MODELS["gpt-4o"], kind="instruct")
    own = Task("o", "own", "Pie.", messages=({"role": "user", "content": "Pie."},))
    asked = remote.requests(
        entry, [TASK, own], max_new_tokens=9, temperature=0, style=style, system=system
    )
    found = [[(m["role"], m["content"]) for m in one.messages] for one in asked]
    assert found == [sent, [("user", "Pie.")]]
    assert remote.prompt_text(asked[0]) == "\n".join(text for _, text in sent)


def test_style_and_system_message_reach_responses_and_steering(instruct):
    options = {"max_new_tokens": 2, "style": "Q: {question}", "system": "Be brief."}
    wanted = "[system]Be brief.[user]Q: Why {really}?[assistant]"
    plain = [conditions.plain()]
    made = [
        *chains.responses(instruct, [TASK], progress=False, **options),
        *conditions.generate(instruct, [TASK], [None], progress=False, **options),
        *(
            s.response
            for s in conditions.grid(instruct, [TASK], plain, progress=False, **options)
        ),
    ]
    assert [one.prompt_text for one in made] == [wanted] * 3
