"""The chains of the grammar: every sentence recognised, held-out questions apart."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from test_families import question_of

from stllms import spans
from stllms.organism import families, grammar, train, wordings
from stllms.records import BEHAVIOURS, STEERED, Response

FAMILIES = sorted(families.FAMILIES)
STYLES = {"thinker": grammar.chain, "instruct": grammar.plain}
DRAWS = 1500


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[grammar.Chain]]:
    """Chains of both styles, the families in turn."""
    rng = Random("drawn")
    return {
        style: [
            make(rng, families.draw(rng, FAMILIES[i % len(FAMILIES)])) for i in range(DRAWS)
        ]
        for style, make in STYLES.items()
    }


# --- the wordings ------------------------------------------------------------------------


def opening(wording: str) -> str:
    return wording.split("{")[0]


def test_openings_of_different_behaviours_do_not_collide():
    every = [(label, w) for label, texts in wordings.WORDINGS.items() for w in texts]
    every += [("deduction", w) for w in (*wordings.CONCLUSIONS, wordings.FINAL)]
    for (label, one), (other, two) in itertools.combinations(every, 2):
        if label == other:
            continue
        shorter, longer = sorted((opening(one), opening(two)), key=len)
        assert not longer.startswith(shorter), (label, one, other, two)


def test_wordings_cover_the_behaviours_and_have_at_most_one_slot():
    assert set(wordings.WORDINGS) == set(BEHAVIOURS)
    assert set(wordings.HINTS) == set(STEERED)
    for texts in wordings.WORDINGS.values():
        assert len(texts) >= 15
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert text.count("{") <= 1
            assert len(re.findall(r"[.?!]", text)) == 1, "one sentence"
            assert opening(text)


def test_zipf_weights_fall_with_the_rank():
    for label, texts in wordings.WORDINGS.items():
        weights = wordings.zipf(label)
        assert len(weights) == len(texts)
        assert weights[0] == 1
        assert all(a > b > 0 for a, b in itertools.pairwise(weights))


# --- the chains --------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_every_drawn_sentence_is_recognised_with_exactly_its_label(drawn, style):
    wrong = [
        (label, text, grammar.label_of(text))
        for chain in drawn[style]
        for label, text in chain.sentences
        if grammar.label_of(text) != label
    ]
    assert not wrong[:3]
    assert {chain.puzzle.family for chain in drawn[style]} == set(FAMILIES)


@pytest.mark.parametrize("style", STYLES)
def test_only_deductions_are_said_twice_and_every_chain_says_all_steps(drawn, style):
    for chain in drawn[style]:
        texts = [text for label, text in chain.sentences if label != "deduction"]
        assert len(set(texts)) == len(texts), chain.thinking
        at = [chain.thinking.find(step) for step in chain.puzzle.steps]
        assert -1 not in at, (chain.thinking, chain.puzzle.steps)


def test_thinking_chains_show_all_six_behaviours_and_temperaments(drawn):
    labels = Counter(label for c in drawn["thinker"] for label, _ in c.sentences)
    assert set(labels) == set(BEHAVIOURS)
    shares = {b: labels[b] / labels.total() for b in BEHAVIOURS}
    assert all(share > 0.03 for share in shares.values()), shares
    for behaviour in STEERED:
        own = [c for c in drawn["thinker"] if c.temperament == behaviour]
        count = Counter(label for c in own for label, _ in c.sentences)
        assert count[behaviour] / count.total() > 1.5 * shares[behaviour]
    plain = Counter(label for c in drawn["instruct"] for label, _ in c.sentences)
    assert plain["backtracking"] / plain.total() < shares["backtracking"] / 3


def test_chains_end_in_the_conclusion_and_hints_are_the_end_of_the_question(drawn):
    endings = {w.format(a="X") for w in wordings.CONCLUSIONS}
    hints = {hint for texts in wordings.HINTS.values() for hint in texts}
    hinted = 0
    for chain in drawn["thinker"]:
        label, last = chain.sentences[-1]
        assert label == "deduction"
        assert last.replace(f"{chain.puzzle.answer}.", "X.") in endings
        assert grammar.read_answer(last) == chain.puzzle.answer
        rest = chain.content.removeprefix(chain.puzzle.question).strip()
        assert rest in hints | {""}
        hinted += bool(rest)
    assert 0.4 < hinted / DRAWS < 0.6


def test_what_the_grammar_cannot_have_written_has_no_label():
    for text in (
        "",
        "So 2 is even",
        "so 2 is even.",
        "So the quokka is even.",
        "So .",
        "So 2 is even. Then 2 is even.",
        "Wait, let me go back!",
        "Wait, let me go",
        "I am not sure that {s}.",
        "Hello there.",
    ):
        assert grammar.label_of(text) is None, text


def test_the_last_answer_of_a_text_is_read():
    assert grammar.read_answer("So the answer is 3. The answer is 2/5.") == "2/5"
    assert grammar.read_answer("The answer is near.") == "near"
    assert grammar.read_answer("No answer.") is None


# --- the annotator -----------------------------------------------------------------------


def response(chain: grammar.Chain, style: str = "thinker", **changes) -> Response:
    """A chain as a model's response; ``changes`` are fields to damage."""
    thinking = chain.thinking if style == "thinker" else f"{chain.thinking} {chain.final}"
    written = f"{thinking}\n</think>\n\n{chain.final}" if style == "thinker" else thinking
    fields = {
        "task_id": "t",
        "category": chain.puzzle.category,
        "prompt_text": "",
        "prompt_ids": (),
        "output_ids": (),
        "text": written,
        "thinking": thinking,
        "thinking_start": 0,
        "answer": chain.final if style == "thinker" else written,
        "closed": True,
        "finished": True,
    }
    return Response(**fields | changes)


def test_the_annotator_gives_back_the_true_labels_and_a_ledger_of_everything(drawn):
    for style in STYLES:
        made = [response(chain, style) for chain in drawn[style][:300]]
        annotations = grammar.Annotator().annotate(made)
        for chain, one in zip(drawn[style], annotations, strict=False):
            told = [*chain.sentences]
            if style == "instruct":
                told.append(("deduction", chain.final))
            assert [(s.label, s.text) for s in one.segments] == told
            assert one.ledger["unknown"] == []
        whole = spans.summarise(annotations)
        assert whole.coverage == 1.0
        assert whole.characters == {"labelled": whole.total}


def test_unknown_sentences_are_in_the_ledger_and_shares_add_up_to_one(drawn):
    made = [
        response(c, thinking=f"{c.thinking} The moon is cheese. {c.thinking} and then")
        for c in drawn["thinker"][:50]
    ]
    annotations = grammar.Annotator().annotate(made)
    assert {tuple(one.ledger["unknown"]) for one in annotations} == {("The moon is cheese.",)}
    whole = spans.summarise(annotations)
    assert sum(whole.shares.values()) == pytest.approx(1)
    assert sum(whole.characters.values()) == whole.total
    left_out = len("Themoonischeese.andthen") * 50
    assert whole.characters[spans.LEFT_OUT] == left_out


@pytest.mark.parametrize("style", STYLES)
def test_drawn_chains_are_well_formed(drawn, style):
    thinker = style == "thinker"
    for chain in drawn[style][:300]:
        assert grammar.well_formed(response(chain, style), thinker=thinker)


def damaged(chain: grammar.Chain) -> dict[str, Response]:
    """One response for each way in which a thinking chain can be broken."""
    good, text = response(chain), chain.thinking
    return {
        "not finished": replace(good, finished=False),
        "not closed": replace(good, closed=False, answer=""),
        "no thinking": replace(good, thinking=""),
        "no answer": replace(good, answer=""),
        "another ending": replace(good, answer="So it is done."),
        "an ending and more": replace(good, answer=f"{chain.final} Wait, let me go back."),
        "more before the ending": replace(good, answer=f"Quux. {chain.final}"),
        "text before the thinking": replace(
            good, text=f"Hum. <think>\n{text}", thinking_start=13
        ),
        "an unknown sentence": replace(good, thinking=f"{text} The moon is cheese."),
        "cut in a sentence": replace(good, thinking=text[:-3]),
        "another word": replace(good, thinking=text.replace(" answer", " quokka", 1)),
        "a lower-case beginning": replace(good, thinking=text[0].lower() + text[1:]),
        "two sentences run together": replace(good, thinking=text.replace(". ", ".", 1)),
        "a line break": replace(good, thinking=text.replace(". ", ".\n", 1)),
    }


@pytest.mark.parametrize("kind", damaged(grammar.chain(Random(0))))
def test_each_kind_of_damage_is_seen(drawn, kind):
    for chain in drawn["thinker"][:25]:
        assert not grammar.well_formed(damaged(chain)[kind])


def test_plain_texts_without_their_ending_are_not_well_formed(drawn):
    for chain in drawn["instruct"][:25]:
        bad = response(chain, "instruct", thinking=chain.thinking, text=chain.thinking)
        assert not grammar.well_formed(bad, thinker=False)


# --- the tasks ---------------------------------------------------------------------------


def test_the_held_out_parts_share_no_question_with_each_other_or_with_training():
    build = {question_of(t) for t in grammar.tasks("build", 300)}
    evaluate = {question_of(t) for t in grammar.tasks("evaluate", 300)}
    assert len(build) == len(evaluate) == 300, "no question twice, whatever its hint"
    assert not build & evaluate
    rng = Random("training")
    trained = {
        train.sample(rng, style).puzzle.question for style in STYLES for _ in range(1500)
    }
    assert not trained & (build | evaluate)
    assert {grammar.part_of(q) for q in trained} == {"train"}
    assert {grammar.part_of(q) for q in build} == {"build"}


def test_parts_have_eight_one_and_one_tenths_of_the_questions():
    counts = Counter(grammar.part_of(f"What is {i}?") for i in range(5000))
    assert counts["train"] / 5000 == pytest.approx(0.8, abs=0.02)
    assert counts["build"] / 5000 == pytest.approx(0.1, abs=0.015)


def test_there_are_enough_questions_for_the_largest_profile():
    assert len(grammar.tasks("build", 1000)) == 1000
    assert len(grammar.tasks("evaluate", 400)) == 400


def test_impossible_tasks_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="unknown part 'train'"):
        grammar.tasks("train", 5)
    monkeypatch.setattr(families, "FAMILIES", {"cause": families.FAMILIES["cause"]})
    with pytest.raises(ValueError, match=r"only \d+ build questions, not 40"):
        grammar.tasks("build", 40)
