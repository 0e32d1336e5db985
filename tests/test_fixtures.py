"""The grammar of the embedded models: answers solved again from the words of their questions,
drawn chains recognised sentence by sentence, the questions and files that ship."""

from __future__ import annotations

import itertools
import re
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from stllms import registry, tasks
from stllms.annotation import placing
from stllms.annotation.annotators import Grammar
from stllms.fixtures import grammar
from stllms.labels import PAPER
from stllms.records import Response
from stllms.vectors import directions

sys.path.insert(0, str(registry.PACKAGE.parent))
from training import chains, families
from training import fixtures as script

FAMILIES = sorted(families.FAMILIES)
STYLES = {"thinker": chains.chain, "instruct": chains.plain}
DRAWS = 1500

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
    (there, way), (back, other) = re.findall(r"(\d+) steps (\w+)", question)
    assert {way, other} in [{"north", "south"}, {"east", "west"}, {"up", "down"}]
    return abs(int(there) - int(back))


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
    return "yes" if re.search(r"are (\w+)\. .* be \1\?", question) else "no"


def solve_odd_one(question: str) -> str:
    words = re.search(r": (.*)\?", question)[1].split(", ")
    sort = {w: kind for group, kind in SORTS.items() for w in group.split()}
    counts = Counter(sort[word] for word in words)
    return next(word for word in words if counts[sort[word]] == 1)


def solve_matter(question: str) -> str:
    item, asked = re.search(r"[Ii]s (\w+) a (\w+)", question).groups()
    return "yes" if item in STATE[asked].split() else "no"


def solve_tool(question: str) -> str:
    use = next(use for use in SERVES if use in question)
    offered = re.findall(r"\ba (\w+)", question.replace(use, ""))
    (fit,) = set(offered) & set(SERVES[use].split())
    return fit


SOLVERS = {
    name.removeprefix("solve_").replace("_", "-"): solver
    for name, solver in list(globals().items())
    if name.startswith("solve_")
} | {
    "sum": lambda q: sum(numbers(q)),
    "difference": lambda q: numbers(q)[0] - numbers(q)[1],
    "machine": lambda q: sum(numbers(q)) * 2,  # it does not matter which is put in
    "flow": lambda q: (numbers(q)[0] - numbers(q)[1]) * numbers(q)[2],
    "extreme": lambda q: (max if "largest" in q else min)(numbers(q)),
    "sequence": lambda q: 2 * numbers(q)[2] - numbers(q)[1],
    "parity": lambda q: "even" if numbers(q)[0] % 2 == 0 else "odd",
}


OPERATIONS = {"plus": int.__add__, "minus": int.__sub__}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_that_the_questions_ask_for_and_what_is_said_is_right(name):
    rng = Random(f"solve/{name}")
    answers = set()
    for _ in range(150):
        puzzle = families.draw(rng, name)
        answer = Fraction(puzzle.answer) if name == "chance" else puzzle.answer
        assert str(answer) == str(SOLVERS[name](puzzle.question)), puzzle.question
        for said in (*puzzle.steps, *puzzle.examples):
            for a, word, b, result in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", said):
                assert OPERATIONS[word](int(a), int(b)) == int(result), said
            for half, whole in re.findall(r"twice (\d+) is (\d+)", said):
                assert 2 * int(half) == int(whole), said
        if puzzle.answer not in ("yes", "no"):
            parts = puzzle.answer.split("/")
            assert all(re.search(rf"\b{part}\b", puzzle.steps[-1]) for part in parts), puzzle
        answers.add(puzzle.answer)
    assert len(answers) > 1, "an answer that never changes tests nothing"


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[chains.Chain]]:
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
    every = [(label, w) for label, texts in grammar.WORDINGS.items() for w in texts]
    every += [("deduction", w) for w in (*grammar.CONCLUSIONS, grammar.FINAL)]
    for (label, one), (other, two) in itertools.combinations(every, 2):
        if label == other:
            continue
        shorter, longer = sorted((opening(one), opening(two)), key=len)
        assert not longer.startswith(shorter), (label, one, other, two)


def test_a_wording_is_one_sentence_with_one_slot_and_falls_in_frequency():
    assert set(grammar.WORDINGS) == set(PAPER.names)
    for label, texts in grammar.WORDINGS.items():
        for text in texts:
            assert text.count("{") <= 1
            assert len(re.findall(r"[.?!]", text)) == 1
            assert opening(text)
        assert all(a > b > 0 for a, b in itertools.pairwise(chains.zipf(label)))


# --- the chains --------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_every_drawn_sentence_has_its_label_and_every_chain_says_all_steps(drawn, style):
    assert chains.vocabulary() == grammar.VOCABULARY
    for chain in drawn[style]:
        for label, text in chain.sentences:
            assert grammar.label_of(text) == label
        texts = [text for label, text in chain.sentences if label != "deduction"]
        assert len(set(texts)) == len(texts), "only deductions are said twice"
        assert all(step in chain.thinking for step in chain.puzzle.steps)


def test_behaviours_are_states_of_a_stretch_of_a_thinking_chain_and_not_of_the_chain(drawn):
    told = [[label for label, _ in chain.sentences] for chain in drawn["thinker"]]
    labels = Counter(itertools.chain(*told))
    assert set(labels) == set(PAPER.names)
    plain = Counter(label for c in drawn["instruct"] for label, _ in c.sentences)
    for behaviour in PAPER.targets:
        share = labels[behaviour] / labels.total()
        after = Counter(two for one in told for two in itertools.pairwise(one))
        stays = after[behaviour, behaviour] / labels[behaviour]
        assert stays > 2 * share > 0.2, "a behaviour follows itself"
        # Where a label is moved within its chain, how often does it fall on its behaviour?
        moved = sum(one.count(behaviour) ** 2 / len(one) for one in told) / labels[behaviour]
        assert moved < stays - 0.1
    assert plain["backtracking"] / plain.total() < labels["backtracking"] / labels.total() / 3


def test_thinking_chains_end_in_the_conclusion(drawn):
    for chain in drawn["thinker"]:
        label, last = chain.sentences[-1]
        assert label == "deduction"
        assert last in {w.format(a=chain.puzzle.answer) for w in grammar.CONCLUSIONS}
        assert grammar.read_answer(last) == chain.puzzle.answer


def test_what_the_grammar_cannot_have_written_has_no_label_and_the_last_answer_is_read():
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
    assert grammar.read_answer("So the answer is 3. The answer is 2/5.") == "2/5"
    assert grammar.read_answer("The answer is near.") == "near"
    assert grammar.read_answer("No answer.") is None


# --- the annotator -----------------------------------------------------------------------


def response(chain: chains.Chain, style: str = "thinker", **changes) -> Response:
    """A chain as a model's response; ``changes`` are fields to damage."""
    thinker, text = style == "thinker", chain.thinking
    thinking = text if thinker else f"{text} {chain.final}"
    written = f"{text}\n</think>\n\n{chain.final}" if thinker else thinking
    answer = chain.final if thinker else written
    made = Response("t", "own", "", (), (), written, thinking, 0, answer, True, True)
    return replace(made, **changes)


def test_drawn_chains_are_well_formed_and_the_annotator_gives_back_their_labels(drawn):
    for style in STYLES:
        made = [response(chain, style) for chain in drawn[style][:300]]
        annotations = Grammar().annotate(made)
        for chain, one in zip(drawn[style], annotations, strict=False):
            told = [*chain.sentences]
            if style == "instruct":
                told.append(("deduction", chain.final))
            assert [(s.label, s.text) for s in one.segments] == told
            assert one.ledger["unknown"] == []
        assert all(grammar.well_formed(one, thinker=style == "thinker") for one in made)
        assert placing.summarise(annotations).characters.keys() == {"labelled"}


def test_unknown_sentences_are_in_the_ledger_and_left_out(drawn):
    made = [
        response(c, thinking=f"{c.thinking} The moon is cheese. {c.thinking} and then")
        for c in drawn["thinker"][:50]
    ]
    annotations = Grammar().annotate(made)
    assert {tuple(one.ledger["unknown"]) for one in annotations} == {("The moon is cheese.",)}
    whole = placing.summarise(annotations)
    left_out = len("Themoonischeese.andthen") * 50
    assert whole.characters[placing.LEFT_OUT] == left_out


def damaged(chain: chains.Chain) -> dict[str, Response]:
    """One response for each way in which a thinking chain can be broken."""
    good, text = response(chain), chain.thinking
    return {
        "not finished": replace(good, finished=False),
        "not closed": replace(good, closed=False, answer=""),
        "no thinking": replace(good, thinking=""),
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
        "a line break": replace(good, thinking=text.replace(". ", ".\n", 1)),
    }


@pytest.mark.parametrize("kind", damaged(chains.chain(Random(0))))
def test_each_kind_of_damage_is_seen(drawn, kind):
    for chain in drawn["thinker"][:25]:
        assert not grammar.well_formed(damaged(chain)[kind])
    for chain in drawn["instruct"][:25]:
        bare = response(chain, "instruct", thinking=chain.thinking, text=chain.thinking)
        assert not grammar.well_formed(bare, thinker=False), "without its ending"


# --- the questions ----------------------------------------------------------------------


def test_the_shipped_questions_are_those_that_the_grammar_draws_for_their_part(tmp_path):
    script.questions(tmp_path)
    seen = set()
    for part, count in script.PARTS.items():
        shipped = registry.FIXTURES / f"{part}.jsonl"
        assert shipped.read_bytes() == (tmp_path / shipped.name).read_bytes()
        questions = [task.content for task in tasks.from_file(shipped)]
        assert len(questions) == len(set(questions)) == count, "no question twice"
        assert {chains.part_of(question) for question in questions} == {part}
        assert not seen.intersection(questions)
        seen.update(questions)


# --- what ships --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-thinker", "tiny-instruct"])
def test_the_folder_of_an_embedded_model_has_one_set_of_weights(name):
    """As loaders see it that take every ``*.safetensors`` of a folder for weights: together the
    files hold each parameter once, and nothing else."""
    tensors: list[str] = []
    for path in (registry.FIXTURES / name).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors += file.keys()
    hf, info = AutoModelForCausalLM.from_pretrained(
        registry.FIXTURES / name, output_loading_info=True
    )
    assert len(tensors) == len(set(tensors))
    assert set(tensors) == {key for key, _ in hf.named_parameters()}, "tied heads are no file's"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_lies_in_the_folder_is_shipped():
    settings = tomllib.loads((registry.PACKAGE.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["stllms.fixtures"]
    shipped = {path for pattern in patterns for path in registry.FIXTURES.glob(pattern)}
    there = (path for path in registry.FIXTURES.rglob("*") if path.is_file())
    assert {path for path in there if path.suffix not in (".py", ".pyc")} == {
        path for path in shipped if path.is_file()
    }
    assert directions.shipped_file("tiny-thinker") in shipped


@pytest.mark.parametrize("name", ["tiny-thinker", "tiny-instruct"])
def test_the_residual_stream_grows_from_the_embeddings_as_in_real_models(name):
    """Residual noise in training once drove its norm to ten thousand times theirs."""
    model = AutoModelForCausalLM.from_pretrained(registry.FIXTURES / name).float()
    tokenizer = AutoTokenizer.from_pretrained(registry.FIXTURES / name)
    lengths: list[float] = []
    for layer in (model.model.embed_tokens, *model.model.layers):
        layer.register_forward_hook(
            lambda _m, _args, out: lengths.append(float(out[0].norm(dim=-1).median()))
        )
    for task in tasks.from_file(registry.FIXTURES / "evaluate.jsonl")[:20]:
        lengths.clear()
        chat = [{"role": "user", "content": task.content}]
        with torch.no_grad():
            model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True))
        first, *after = lengths
        assert len(after) == model.config.num_hidden_layers
        assert all(0.3 < length / first < 30 for length in after), lengths
        assert after == sorted(after), "it grows from layer to layer"
