"""The embedded models' world: every answer solved again from the words of its question, every
sentence recognised, held-out questions apart, and the training script without training."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from stllms import models, prompts, spans
from stllms.organism import families, grammar, lexicon, train, wordings
from stllms.records import BEHAVIOURS, CATEGORIES, STEERED, Response, Task

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


# --- the answers, from the question alone ------------------------------------------------
# A small solver a family, written from the English of the question. None of them looks at the
# steps of the puzzle; what words mean is said here again.

COMPASS = ["north", "east", "south", "west"]
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SORTS = {
    "dog cow horse sheep goat": "animal",
    "plum pear grape cherry lemon": "fruit",
    "iron gold copper silver zinc": "metal",
    "Mars Venus Saturn Jupiter Neptune": "planet",
}
SERVES = {
    "cut paper": "knife razor",
    "carry water": "bucket bottle",
    "drive a nail": "hammer mallet",
    "light a room": "torch lantern",
    "cross a river": "boat raft",
}
STATE = {
    "solid": "ice wood glass steel salt",
    "liquid": "water milk oil honey juice",
    "gas": "steam air oxygen helium smoke",
}


def numbers(question: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", question)]


def solve_flow(question: str) -> int:
    into, out, hours = numbers(question)
    return (into - out) * hours


def solve_machine(question: str) -> int:
    first, second = numbers(question)
    return (first + second) * 2  # adding is symmetric: it does not matter which is put in


def solve_extreme(question: str) -> int:
    return (max if "largest" in question else min)(numbers(question))


def solve_sequence(question: str) -> int:
    first, second, third = numbers(question)
    assert third - second == second - first
    return third + (third - second)


def solve_repeat(question: str) -> str:
    row = re.search(r"sees (.*)\. Which", question)[1].split(", ")
    assert row[2] == row[0] != row[1], "two colours in turn"
    return row[len(row) - 2]


def solve_order(question: str) -> str:
    pairs = re.findall(r"(\w+) is (\w+) than (\w+)", question)
    people = {name for one, _, other in pairs for name in (one, other)}
    above = {(one, other) for one, _, other in pairs}
    (rank,) = [
        order
        for order in itertools.permutations(people)
        if all(order.index(one) < order.index(other) for one, other in above)
    ]
    word = re.search(r"Who is the (\w+)\?", question)[1]
    same_word = word[:3] == pairs[0][1][:3]  # tallest goes with taller, shortest does not
    return rank[0] if same_word else rank[-1]


def solve_syllogism(question: str) -> str:
    every, kind, trait, who, own, asked, which = re.fullmatch(
        r"(All|No) (\w+)s are (\w+)\. (\w+) is a (\w+)\. Is (\w+) (\w+)\?", question
    ).groups()
    assert (kind, trait, who) == (own, which, asked)
    return "yes" if every == "All" else "no"


def solve_turn(question: str) -> str:
    start = re.search(r"\b(north|east|south|west)\b", question)[1]
    quarters = {"right": 1, "back": 2, "left": 3}[re.search(r"turns (\w+)", question)[1]]
    return COMPASS[(COMPASS.index(start) + quarters) % 4]


def solve_walk(question: str) -> int:
    there, back = re.findall(r"(\d+) steps (\w+)", question)
    assert {there[1], back[1]} in [{"north", "south"}, {"east", "west"}, {"up", "down"}]
    return abs(int(there[0]) - int(back[0]))


def solve_weekday(question: str) -> str:
    start = re.search(r"Today is (\w+)\.", question)[1]
    return WEEK[(WEEK.index(start) + numbers(question)[0]) % 7]


def solve_cause(question: str) -> str:
    cause, effect, given, asked = re.fullmatch(
        r"\w+ knows: if (.+), (.+)\. (.+)\. Is it true that (.+)\?", question
    ).groups()
    given = given[0].lower() + given[1:]
    if given == cause and asked == effect:
        return "yes"
    assert given == f"it is false that {effect}", "only modus ponens and modus tollens"
    assert asked == cause
    return "no"


def solve_chance(question: str) -> Fraction:
    (n, colour), (m, _) = re.findall(r"(\d+) (red|blue|green|white|black|yellow)", question)
    assert re.search(rf"(of {colour}\?|a {colour} one\?)$", question)
    return Fraction(int(n), int(n) + int(m))


def solve_certain(question: str) -> str:
    all_of, asked = re.search(r"are (\w+)\. .* be (\w+)\?", question).groups()
    return "yes" if all_of == asked else "no"


def solve_odd_one(question: str) -> str:
    words = re.search(r": (.*)\?", question)[1].split(", ")
    sort = {w: kind for group, kind in SORTS.items() for w in group.split()}
    counts = Counter(sort[word] for word in words)
    assert sorted(counts.values()) == [1, 3]
    return next(word for word in words if counts[sort[word]] == 1)


def solve_tool(question: str) -> str:
    use = next(use for use in SERVES if use in question)
    offered = re.findall(r"\ba (\w+)", question.replace(use, ""))
    (fit,) = set(offered) & set(SERVES[use].split())
    assert len(offered) == 2
    return fit


def solve_matter(question: str) -> str:
    item, asked = re.search(r"[Ii]s (\w+) a (\w+)", question).groups()
    return "yes" if item in STATE[asked].split() else "no"


def solve_count(question: str) -> int:
    target, row = re.fullmatch(r"How often is (\w+) in this row: (.*)\?", question).groups()
    return row.split(", ").count(target)


SOLVERS = {
    "sum": lambda q: sum(numbers(q)),
    "difference": lambda q: numbers(q)[0] - numbers(q)[1],
    "machine": solve_machine,
    "flow": solve_flow,
    "extreme": solve_extreme,
    "parity": lambda q: "even" if numbers(q)[0] % 2 == 0 else "odd",
    "sequence": solve_sequence,
    "repeat": solve_repeat,
    "order": solve_order,
    "syllogism": solve_syllogism,
    "turn": solve_turn,
    "walk": solve_walk,
    "weekday": solve_weekday,
    "cause": solve_cause,
    "chance": solve_chance,
    "certain": solve_certain,
    "odd-one": solve_odd_one,
    "tool": solve_tool,
    "matter": solve_matter,
    "count": solve_count,
}


def test_there_are_at_least_twelve_families_in_the_categories_of_the_paper():
    assert len(FAMILIES) >= 12
    categories = {category for category, _ in families.FAMILIES.values()}
    assert categories == set(CATEGORIES)
    assert set(lexicon.FACTS) == set(FAMILIES)
    assert set(SOLVERS) == set(FAMILIES), "a solver is missing, or solves nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_the_one_that_the_question_asks_for(name):
    rng = Random(f"solve/{name}")
    answers = set()
    for _ in range(150):
        puzzle = families.draw(rng, name)
        solved = SOLVERS[name](puzzle.question)
        if isinstance(solved, Fraction):
            assert Fraction(puzzle.answer) == solved, puzzle.question
        else:
            assert puzzle.answer == str(solved), puzzle.question
        assert (puzzle.family, puzzle.category) == (name, families.FAMILIES[name][0])
        answers.add(puzzle.answer)
    assert len(answers) > 1, "an answer that never changes tests nothing"


OPERATIONS = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b}


@pytest.mark.parametrize("name", FAMILIES)
def test_arithmetic_in_steps_and_examples_is_right(name):
    rng = Random(f"arithmetic/{name}")
    for _ in range(150):
        puzzle = families.draw(rng, name)
        for said in (*puzzle.steps, *puzzle.examples):
            for a, word, b, result in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", said):
                assert OPERATIONS[word](int(a), int(b)) == int(result), said
            for half, whole in re.findall(r"twice (\d+) is (\d+)", said):
                assert 2 * int(half) == int(whole), said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_step_states_the_answer(name):
    rng = Random(f"steps/{name}")
    for _ in range(60):
        puzzle = families.draw(rng, name)
        if puzzle.answer in ("yes", "no"):
            continue
        last = puzzle.steps[-1]
        parts = puzzle.answer.split("/")
        assert all(re.search(rf"\b{part}\b", last) for part in parts), (last, puzzle.answer)


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


def question_of(task: Task) -> str:
    """The question without the hint that may follow it."""
    for hint in (h for texts in wordings.HINTS.values() for h in texts):
        if task.content.endswith(f" {hint}"):
            return task.content.removesuffix(f" {hint}")
    return task.content


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


def test_tasks_are_deterministic_unique_and_go_through_the_families_in_turn():
    first = grammar.tasks("evaluate", 60)
    assert first == grammar.tasks("evaluate", 60)
    assert first[:20] == grammar.tasks("evaluate", 20), "more tasks begin with the same ones"
    assert first != grammar.tasks("evaluate", 60, seed=1)
    assert len({t.id for t in first}) == 60
    per_category = Counter(category for category, _ in families.FAMILIES.values())
    found = Counter(t.category for t in first)
    for category, count in per_category.items():
        assert abs(found[category] - 60 * count / len(FAMILIES)) <= 3, category
    for task in first:
        (name,) = [n for n in FAMILIES if _solves(n, question_of(task), task)]
        assert families.FAMILIES[name][0] == task.category


def _solves(name: str, question: str, task: Task) -> bool:
    """Whether ``task`` is of this family: drawn from it by its words, and solved by it."""
    if families.FAMILIES[name][0] != task.category or shape(question) not in _shapes(name):
        return False
    solved = SOLVERS[name](question)
    return solved == Fraction(task.answer) if name == "chance" else str(solved) == task.answer


def shape(question: str) -> tuple[str, ...]:
    """The two words that tell templates apart: none of them can be drawn."""
    closed = {*lexicon.NAMES, *lexicon.THINGS, *lexicon.COLOURS, *lexicon.KINDS}
    closed |= {*lexicon.TRAITS, *lexicon.DAYS, *lexicon.POINTS}
    closed |= {w for words in lexicon.MATTER.values() for w in words}
    return tuple(w for w in re.findall(r"[A-Za-z]+", question) if w not in closed)[:2]


def _shapes(name: str, known: dict[str, set] = {}) -> set[tuple[str, ...]]:  # noqa: B006
    if name not in known:
        rng = Random(f"shapes/{name}")
        known[name] = {shape(families.draw(rng, name).question) for _ in range(200)}
    return known[name]


def test_there_are_enough_questions_for_the_largest_profile():
    assert len(grammar.tasks("build", 1000)) == 1000
    assert len(grammar.tasks("evaluate", 400)) == 400


def test_impossible_tasks_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="unknown part 'train'"):
        grammar.tasks("train", 5)
    monkeypatch.setattr(families, "FAMILIES", {"cause": families.FAMILIES["cause"]})
    with pytest.raises(ValueError, match=r"only \d+ build questions, not 40"):
        grammar.tasks("build", 40)


# --- the training script, without training -------------------------------------------------

TINY = train.Recipe(
    "thinker",
    cycles=(2,),
    batch=2,
    hidden=16,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=16,
    warmup=1,
    noise_steps=(0, 2),
)


@pytest.fixture(scope="module")
def tokenizers():
    """The shipped tokenizers, one a style."""
    folder = Path(train.__file__).parent
    return {style: AutoTokenizer.from_pretrained(folder / f"tiny-{style}") for style in STYLES}


def rows_of(ids, targets, tokenizer):
    """(whole text, text that is learned) of every row of a batch."""
    for row, target in zip(ids, targets, strict=True):
        learned = target[target != train.IGNORED]
        yield tokenizer.decode(row), tokenizer.decode(learned), row, target


@pytest.mark.parametrize("style", STYLES)
def test_targets_cover_exactly_the_output_tokens(tokenizers, style):
    tokenizer = tokenizers[style]
    end = "</think>" if style == "thinker" else ""
    for ids, targets in train.batches(replace(TINY, style=style), tokenizer, 0)[:8]:
        for whole, learned, row, target in rows_of(ids, targets, tokenizer):
            opened, _, written = whole.partition("<think>\n" if end else train.ASSISTANT)
            assert opened.startswith(train.BEGIN)
            stop = written.index(train.END) + len(train.END)
            assert learned == written[:stop]
            assert set(written[stop:].replace(train.END, "")) == set(), "only padding follows"
            at = (target != train.IGNORED).nonzero().flatten()
            assert (at.diff() == 1).all()
            assert torch.equal(target[at], row[at + 1]), "a target is the next token"


@pytest.mark.parametrize("style", STYLES)
def test_prompts_are_those_of_the_package(tokenizers, style):
    recipe = replace(TINY, style=style)
    model = models.wrap(
        train.build_model(recipe, tokenizers[style]), tokenizers[style], name=f"tiny-{style}"
    )
    rng = Random(7)
    for _ in range(20):
        chain = train.sample(rng, style)
        opened, written = train.encode(chain, style, tokenizers[style])
        text, ids = prompts.opening(model, Task("t", "c", chain.content))
        assert tuple(opened) == ids
        made = prompts.response(model, Task("t", "c", chain.content), (text, ids), written)
        assert made.finished
        assert made.closed
        assert grammar.read_answer(made.answer) == chain.puzzle.answer
        assert grammar.well_formed(made, thinker=style == "thinker")


def test_batches_are_a_function_of_recipe_and_chunk(tokenizers):
    tokenizer = tokenizers["thinker"]
    first, again = (train.batches(TINY, tokenizer, 1) for _ in range(2))
    assert len(first) == train.CHUNK_BATCHES
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    other = train.batches(TINY, tokenizer, 2)
    assert any(a[0].shape != b[0].shape for a, b in zip(first, other, strict=True))
    reseeded = train.batches(replace(TINY, seed=1), tokenizer, 1)
    assert any(a[0].shape != b[0].shape for a, b in zip(first, reseeded, strict=True))


def test_the_stream_goes_on_where_it_was_stopped(tokenizers):
    recipe = replace(TINY, cycles=(train.CHUNK_BATCHES + 3,))
    whole = list(train.stream(recipe, tokenizers["thinker"], 0))
    assert len(whole) == recipe.steps
    for start in (5, train.CHUNK_BATCHES, train.CHUNK_BATCHES + 2):
        rest = list(train.stream(recipe, tokenizers["thinker"], start))
        assert len(rest) == recipe.steps - start
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[start:], rest, strict=True))


def test_held_out_questions_are_never_drawn(monkeypatch):
    rng = Random(3)
    held_out = {grammar.part_of(families.draw(rng).question) for _ in range(100)}
    assert held_out == {"train", "build", "evaluate"}, "they would be, without the check"
    monkeypatch.setattr(grammar, "part_of", lambda q: "train" if "table" in q else "build")
    for style in STYLES:
        assert "table" in train.sample(rng, style).puzzle.question


def test_the_hook_of_the_noise_is_gone_after_an_exception(tokenizers):
    model = train.build_model(TINY, tokenizers["thinker"]).eval()
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with torch.no_grad():
        clean = model.model(input_ids=ids).last_hidden_state
        vectors = torch.zeros(2, 1, TINY.hidden)
        vectors[1, 0, 3] = 1.0
        with train.noise(model, 0, vectors):
            noisy = model.model(input_ids=ids).last_hidden_state
        with pytest.raises(RuntimeError, match="stop"), train.noise(model, 0, vectors):
            raise RuntimeError("stop")
        after = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(clean, after)
    assert torch.equal(clean[0], noisy[0]), "a row without a vector stays as it is"
    assert not torch.allclose(clean[1], noisy[1])
    assert not model.model.layers[0]._forward_hooks


def test_noise_vectors_have_the_share_and_the_length_of_the_recipe():
    generator = torch.Generator().manual_seed(0)
    lengths = train.random_vectors(4000, TINY, generator).norm(dim=-1).flatten()
    share = (lengths > 0).float().mean().item()
    assert share == pytest.approx(TINY.noise_share, abs=0.03)
    assert lengths.max() <= TINY.noise_scale
    assert lengths[lengths > 0].mean().item() == pytest.approx(TINY.noise_scale / 2, abs=0.03)


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    recipe = replace(TINY, cycles=(100,), warmup=10)
    assert train.rate(recipe, 0) == 0.1
    assert {train.rate(recipe, step) for step in range(9, 51)} == {1.0}
    assert train.rate(recipe, 75) == 0.5
    assert train.rate(recipe, 99) == pytest.approx(0.02)


def test_a_further_cycle_begins_at_a_half_and_falls_to_nothing():
    once = replace(TINY, cycles=(100,), warmup=10)
    twice = replace(once, cycles=(100, 140))
    assert twice.steps == 140
    assert [train.rate(twice, s) for s in range(100)] == [
        train.rate(once, s) for s in range(100)
    ]
    assert [train.rate(twice, s) for s in (100, 120, 139)] == pytest.approx([0.5, 0.25, 0.0125])


def prepared(folder: Path, tokenizers) -> Path:
    """A folder that has the tokenizer already: training one takes half a minute."""
    tokenizers["thinker"].save_pretrained(folder)
    return folder


def stopped_at(monkeypatch, step: int):
    real = train._step

    def once(model, steppers, recipe, now, *batch):
        if now == step:
            monkeypatch.setattr(train, "_step", real)
            raise KeyboardInterrupt
        return real(model, steppers, recipe, now, *batch)

    monkeypatch.setattr(train, "_step", once)


def test_a_resumed_training_run_equals_an_uninterrupted_one(tokenizers, tmp_path, monkeypatch):
    whole = prepared(tmp_path / "whole", tokenizers)
    parts = prepared(tmp_path / "parts", tokenizers)
    train.train(TINY, whole, save_every=1)
    stopped_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train.train(TINY, parts, save_every=1)
    assert not (parts / "model.safetensors").exists()
    train.train(TINY, parts, save_every=1)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, parts)]
    start = train.build_model(TINY, tokenizers["thinker"]).state_dict()
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
        if tensor.ndim == 2 and "embed" not in name:
            assert not torch.equal(tensor, start[name]), f"{name} was not trained"
    assert states[0]["seen"] == states[1]["seen"] > 0
    weights = [(f / "model.safetensors").read_bytes() for f in (whole, parts)]
    assert weights[0] == weights[1]
    model = models.load(str(parts), device="cpu")
    assert (model.n_layers, model.d_model) == (TINY.layers, TINY.hidden)
    with pytest.raises(ValueError, match=r"another recipe \(batch differ\)"):
        train.train(replace(TINY, batch=3), parts)


def test_the_log_of_a_resumed_run_has_every_step_once(tokenizers, tmp_path, monkeypatch):
    recipe = replace(TINY, cycles=(21,), noise_steps=(0, 21))
    folder = prepared(tmp_path / "run", tokenizers)
    stopped_at(monkeypatch, 18)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, folder, save_every=8)
    train.train(recipe, folder, save_every=8)
    rows = (folder / "loss.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [10, 20]


@pytest.mark.parametrize("style", STYLES)
def test_the_command_line_trains_the_shipped_recipe(style, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(train, "train", lambda recipe, out, **_: asked.append(recipe) or out)
    train.main([style, "--out", str(tmp_path), "--device", "cpu"])
    train.main(
        [style, "--out", str(tmp_path), "--device", "cpu", "--steps", "7", "--seed", "3"]
    )
    shipped = train.RECIPES[style]
    assert asked == [shipped, replace(shipped, cycles=(7,), seed=3)]


def test_the_tokenizer_recipe_has_single_digits_and_whole_tags(tokenizers):
    for style, tokenizer in tokenizers.items():
        ids = tokenizer("So 12 plus 34 is 46.", add_special_tokens=False)["input_ids"]
        pieces = [tokenizer.decode([i]) for i in ids]
        assert sum(piece.strip().isdigit() for piece in pieces) == 6, pieces
        assert len(tokenizer("</think>", add_special_tokens=False)["input_ids"]) == 1
        opened = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
        )
        assert opened.endswith("<think>\n") == (style == "thinker")
