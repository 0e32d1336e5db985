"""Annotation with a person's own labels: judges, cue words, functions, a classifier, noise."""

from __future__ import annotations

import hashlib
import json
import math
import re
import socket
import sys
from functools import partial

import numpy as np
import pytest
from tiny import response

from stllms import annotation, registry
from stllms.annotation import agreement, annotators, judge, markup, placing, sentences
from stllms.labels import PAPER, LabelSet
from stllms.models.api import FILE, Reply
from stllms.records import Annotation, PlacedSegment, Segment
from stllms.runs.files import StaleArtefact
from stllms.runs.store import Rows

OWN = LabelSet.from_dict(
    {
        "name": "trip",
        "labels": {
            "step 2": "says what it will do\n  next",
            "Looking back": {"definition": "says what it has done", "cues": ["so far", "did"]},
            "other": "",
        },
        "targets": ["step 2"],
    }
)
#: Names that no label of the paper looks like, all of which a judge must be able to write.
AWKWARD = LabelSet.from_dict(
    {
        "labels": dict.fromkeys(
            [
                *(
                    "2nd-thought",
                    "i",
                    "i 2",
                    "12",
                    "计划",
                    "plan/goal",
                    "a_b",
                    "Ärger",
                    "plan B",
                ),
                *("end plan", "plan", "overcomplicatedly-internationalisation-minded"),
            ],
            "",
        )
    }
)
CHAINS = ("I will go. So far I went. Hm.", "So far so good. I will stay.", "I will rest. Hm.")
both = pytest.mark.parametrize("protocol", ["rewrite", "indexed"])


def chains(*texts):
    return [response(text, f"task {i}") for i, text in enumerate(texts or CHAINS)]


def said(annotation_):
    return [(one.label, one.text) for one in annotation_.segments]


# --- judges ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "sha256"),
    [
        ("rewrite", "9908642d636562795bdaae0d55be9bb3812f6097061a3479aa0201db357f872b"),
        ("indexed", "fd5a7329a5d0913decc556eb126c480e01aacd154e22b0f7739bd26b09fc3ab9"),
    ],
)
def test_the_prompts_of_the_paper_are_to_the_byte_those_of_the_stored_replies(protocol, sha256):
    one = judge.protocol_of(protocol)
    assert hashlib.sha256(one.system.encode()).hexdigest() == sha256
    assert "labels" not in one.identity


@both
def test_a_prompt_is_made_of_the_labels(protocol):
    one = judge.protocol_of(protocol, labels=OWN)
    assert "- step 2: says what it will do next\n" in one.system
    assert "\n- other\n\nUse these three names only." in one.system
    assert not any(name in one.system for name in PAPER.names)
    example = (
        '["step 2"]The words of the first part.["end-section"] ["Looking back"]The words'
        if protocol == "rewrite"
        else '["1-2 step 2", "3 Looking back", "4-6 step 2"]'
    )
    assert example in one.system
    many = LabelSet.from_dict({"labels": {f"l{i}x": "" for i in range(13)}})
    assert "Use these 13 names only" in judge.protocol_of(protocol, labels=many).system
    shown = LabelSet.from_dict(OWN.to_dict() | {"example": [["other", "Quite so."]]})
    prompt = judge.protocol_of("rewrite", labels=shown).system
    assert 'Example: ["other"]Quite so.["end-section"]\n' in prompt
    with pytest.raises(ValueError, match="plan alone says nothing to a judge"):
        judge.protocol_of(protocol, labels=LabelSet.from_dict({"labels": {"plan": ""}}))


@both
def test_other_definitions_are_another_prompt_and_other_colours_are_not(protocol):
    def identity(**changed):
        values = OWN.to_dict()
        values["labels"]["other"] |= changed
        return judge.protocol_of(protocol, labels=LabelSet.from_dict(values)).identity

    assert identity(colour="#000000", cues=["x"]) == identity()
    assert identity(definition="the rest")["labels"] != identity()["labels"]
    recoloured = PAPER.to_dict()
    recoloured["labels"][PAPER.names[0]]["colour"] = "#000000"
    same = judge.protocol_of(protocol, labels=LabelSet.from_dict(recoloured))
    assert same.identity == judge.protocol_of(protocol).identity


def own_label(sentence, _first=False):
    """What the server answers: a label by a word of the sentence."""
    return next(
        (n for n, w in zip(OWN.names, ("will", "far"), strict=False) if w in sentence), "other"
    )


def ask(server, folder, protocol="rewrite", labels=OWN):
    quick = {"retries": 1, "timeout": 5.0, "progress": False, "base_url": server.url}
    name = f"openai:test#{protocol}"
    return annotation.annotator(name, labels=labels, folder=folder, **quick)


@both
def test_a_judge_gives_a_persons_own_labels_and_a_replay_gives_them_again(
    server, tmp_path, monkeypatch, protocol
):
    monkeypatch.setattr("server.label", own_label)
    made = ask(server, tmp_path, protocol).annotate(chains())
    assert [label for label, _ in said(made[0])] == ["step 2", "Looking back", "other"]
    assert placing.summarise(made).coverage == 1.0
    monkeypatch.setattr(socket.socket, "connect", None)
    replayed = annotation.annotator(f"replay:{tmp_path}", labels=OWN)
    assert [one.segments for one in replayed.annotate(chains())] == [o.segments for o in made]
    changed = OWN.to_dict()
    changed["labels"]["other"]["definition"] = "anything else"
    for other in (PAPER, LabelSet.from_dict(changed)):
        with pytest.raises(ValueError, match="holds replies of no judge"):
            annotation.annotator(f"replay:{tmp_path}", labels=other)


@both
def test_a_label_that_the_set_does_not_have_is_counted_as_unknown(server, tmp_path, protocol):
    made = ask(server, tmp_path, protocol).annotate(chains("Hm, maybe. I recall it. Wait."))
    assert made[0].segments == (), "the server names the paper's labels"
    assert made[0].failed.startswith("the judge labelled nothing")
    replies = {
        "rewrite": '["other"]A b.["end-section"] ["backtracking"]C d.["end-section"]',
        "indexed": '{"labels": ["1 other", "2 backtracking"]}',
    }
    body = {"choices": [{"message": {"content": replies[protocol]}, "finish_reason": "stop"}]}
    reply = Reply({"about": {"pieces": 2}, "body": body})
    one = judge.protocol_of(protocol, labels=OWN).annotation(
        response("A b. C d."), [reply], "j"
    )
    assert said(one) == [("other", "A b.")]
    assert one.ledger["reasons"] == {markup.UNKNOWN: 1}


@pytest.mark.parametrize("name", AWKWARD.names)
def test_every_name_that_a_set_may_have_can_be_written_by_a_judge(name):
    loose = name.replace("-", " ").replace("_", "-").upper()
    for written in (f'["{name}"]', f"[1. {name}]", f'["{loose}"]', f"['3) {name}']"):
        text = f'{written} A b. [end-section] ["plan B"]C d.["end-section"]'
        found = [(one.label, one.text) for one in markup.parse(text, AWKWARD)]
        assert found == [(name, "A b."), ("plan B", "C d.")], written
    for content in (f'{{"labels": ["1-2 {name}", "3 plan B"]}}', f"1-2: {loose}\n3. plan B\n"):
        found, rejected = judge.place(content, 3, labels=AWKWARD)
        assert found == [(1, 2, name), (3, 3, "plan B")], content
        assert not rejected
    schema = judge.protocol_of("indexed", labels=AWKWARD).optional["response_format"]
    pattern = schema["json_schema"]["schema"]["properties"]["labels"]["items"]["pattern"]
    assert re.fullmatch(pattern, f"1-2 {name}")
    for reader in ("published", "published-counts"):
        found = markup.read(f'["{name}"]A.["end-section"]', reader=reader, labels=AWKWARD)
        assert found.segments == (Segment(name, "A."),)


@pytest.mark.parametrize("name", ["section", "End-Section", "end of section", "section_end"])
def test_the_closing_tag_of_the_markup_is_no_name_for_a_label(name):
    with pytest.raises(ValueError, match="is reserved"):
        LabelSet.from_dict({"labels": {name: ""}})


def test_brackets_of_a_chain_are_no_tags_of_labels_that_are_called_so():
    text = '["plan"]take a[i] of [12] and x[1]["end-section"]'
    assert markup.parse(text, AWKWARD) == [Segment("plan", "take a[i] of [12] and x[1]")]


# --- label noise -------------------------------------------------------------------------


def test_a_twentieth_of_the_chains_is_asked_twice_three_at_least_and_always_the_same():
    made = [response("Hm.", f"t{i}") for i in range(200)]
    assert [agreement.n_twice(n) for n in (0, 2, 3, 60, 61, 100, 500)] == [0, 2, 3, 3, 3, 5, 25]
    drawn = agreement.twice(made)
    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=made.index)
    assert agreement.twice(made[::-1]) == drawn[::-1]
    fewer = {one.task_id for one in agreement.twice(made[:100])}
    assert len(fewer) == 5
    kept = {one.task_id for one in drawn if one in made[:100]}
    assert kept <= fewer or fewer <= kept, "more chains draw the same ones again"
    by_name = sorted(made, key=lambda one: one.task_id)
    assert len({by_name.index(one) // 20 for one in drawn}) > 3, "from all over"
    empty = [response("", "e"), response(" ", "f"), *made[:2]]
    assert agreement.twice(empty) == made[:2]


def test_a_judge_asked_twice_is_compared_with_itself_label_by_label(
    server, tmp_path, monkeypatch
):
    metrics = pytest.importorskip("sklearn.metrics")
    texts = [f"I will go {i}. So far {i}." for i in range(4)]
    asked = chains(*texts)
    monkeypatch.setattr("server.label", own_label)
    who = ask(server, tmp_path)
    first = who.annotate(asked)
    calls = server.total
    drawn = agreement.twice(asked)
    assert len(drawn) == 3
    assert who.estimate(drawn, again=True).calls == 3
    monkeypatch.setattr(
        "server.label", second_thoughts := lambda s, f: own_label(s) if "0" in s else "step 2"
    )
    table = agreement.repeated(who, asked, first, labels=OWN)
    assert server.total == calls + 3
    assert who.estimate(drawn, again=True).calls == 0
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["identity"].get("again") for row in rows] == [None] * 4 + [1] * 3
    before, after = [], []
    for chain in drawn:
        for sentence in re.findall(r"[^.]+\.", chain.thinking):
            size = len("".join(sentence.split()))
            before += [own_label(sentence)] * size
            after += [second_thoughts(sentence, False)] * size
    table = table.set_index("label")
    assert table.index.tolist() == ["all", *OWN.names]
    assert table.loc["all", "kappa"] == pytest.approx(metrics.cohen_kappa_score(before, after))
    for name in OWN.names[:2]:
        pair = [[one == name for one in labels] for labels in (before, after)]
        assert table.loc[name, "kappa"] == pytest.approx(metrics.cohen_kappa_score(*pair))
        assert table.loc[name, "characters"] == sum(a or b for a, b in zip(*pair, strict=True))
    assert table["n"].to_dict() == {"all": 3, "step 2": 3, "Looking back": 3, "other": 0}
    assert table.loc["other", ["kappa", "low", "high"]].isna().all(), "never is not zero"
    assert who.annotate(asked) == first, "the second reply did not take the place of the first"
    replay = annotation.annotator(f"replay:{tmp_path}", labels=OWN)
    assert [one.segments for one in replay.annotate(asked)] == [one.segments for one in first]
    again = agreement.repeated(replay, asked, first, labels=OWN).set_index("label")
    assert again.equals(table)


def test_nobody_else_is_asked_twice(server, tmp_path, monkeypatch):
    monkeypatch.setattr("server.label", own_label)
    cues = annotation.annotator("lexical", labels=OWN)
    first = ask(server, tmp_path).annotate(chains())
    for who in (cues, annotation.annotator(f"replay:{tmp_path}", labels=OWN)):
        table = agreement.repeated(who, chains(), first, labels=OWN)
        assert table.empty
        assert table.columns.tolist() == ["label", "kappa", "low", "high", "n", "characters"]
    failed = [placing.failed(one.thinking, one.task_id, "j", "no reply") for one in chains()]
    calls = server.total
    assert agreement.repeated(ask(server, tmp_path), chains(), failed, labels=OWN).empty
    assert server.total == calls, "a chain that failed is not asked about"


# --- agreement, and labels that never occur ----------------------------------------------


def marked(task_id, *labels):
    """A chain of one sentence a label, with them."""
    text, placed = "", []
    for i, label in enumerate(labels):
        part = f"S{i}. "
        if label:
            placed.append(PlacedSegment(label, part.strip(), len(text), len(text) + 3))
        text += part
    return placing.annotation(placing.place(placed, text), task_id, "x"), response(
        text, task_id
    )


def test_agreement_is_of_the_labels_of_the_set_and_a_label_that_never_occurs_is_none():
    one, chain = marked("a", "step 2", "step 2", "Looking back", "deduction")
    two, _ = marked("a", "step 2", "Looking back", "Looking back", "step 2")
    found = agreement.compare([one], [two], [chain], rng=np.random.default_rng(0), labels=OWN)
    values = {name: value for name, (value, _, _) in found.quantities.items()}
    assert values["compared"] == pytest.approx(3 / 4), "a label of another set is none"
    assert values["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert values["step 2, kappa"] == values["Looking back, kappa"] == values["kappa"]
    assert values["step 2, difference"] == pytest.approx(-1 / 3)
    assert math.isnan(values["other, difference"])
    assert math.isnan(values["other, kappa"])
    table = agreement.confusions([found], labels=OWN)
    assert table.columns.tolist() == ["annotator", "label", *OWN.names]


def test_kappa_of_a_label_is_that_of_the_label_against_all_others():
    metrics = pytest.importorskip("sklearn.metrics")
    drawn = np.random.default_rng(3).integers(3, size=(2, 40))
    drawn[1, :25] = drawn[0, :25]
    a, b = ([OWN.names[i] for i in row] for row in drawn)
    (one, chain), (two, _) = marked("a", *a), marked("a", *b)
    found = agreement.compare([one], [two], [chain], rng=np.random.default_rng(0), labels=OWN)
    for name in OWN.names:
        want = metrics.cohen_kappa_score([x == name for x in a], [x == name for x in b])
        assert found.quantities[f"{name}, kappa"][0] == pytest.approx(want)


def test_who_can_be_compared_is_who_knows_the_labels():
    assert agreement.annotators("openai:m", embedded=True, labels=OWN) == (
        "openai:m",
        "lexical",
    )
    assert agreement.annotators("lexical", embedded=False, labels=OWN) == ("lexical",)
    assert agreement.annotators("mine", embedded=True, labels=AWKWARD) == ("mine",)


def test_labels_that_never_occur_are_named():
    one, _ = marked("a", "other", "deduction")
    assert annotators.never([one], OWN) == ("step 2", "Looking back")
    assert annotators.never([one, Annotation("b", "x")], PAPER) == tuple(
        name for name in PAPER.names if name != "deduction"
    )
    assert annotators.never([], OWN) == OWN.names


# --- cue words ---------------------------------------------------------------------------


def cued(rest=True, **cues):
    labels = {name: {"cues": words} for name, words in cues.items()}
    return LabelSet.from_dict({"labels": labels | ({"rest": ""} if rest else {})})


@pytest.mark.parametrize(
    ("sentence", "want"),
    [
        ("I will plan it.", "a"),
        ("Planned, planning, airplan.", "rest"),
        ("PLAN!", "a"),
        ("So  far\tso good: a plan.", "a"),
        ("So  far\tso good.", "b"),
        ("I don’t know.", "b"),
        ("Really?!", "b"),
        ("我想去。", "b"),
        ("It is [a]*.", "c"),
    ],
)
def test_cues_are_whole_words_in_any_case_and_the_first_label_wins(sentence, want):
    own = cued(a=["plan"], b=["so far", "don't", "?!", "想"], c=["[a]*"])
    (one,) = annotation.annotator("lexical", labels=own).annotate([response(sentence)])
    assert said(one) == [(want, sentence)]


def test_a_sentence_without_a_cue_and_a_label_for_the_rest_is_counted():
    own = cued(rest=False, a=["plan"], b=["no"])
    text = "A plan. Hm. The plan is it. Oh no."
    (one,) = annotation.annotator("lexical", labels=own).annotate([response(text)])
    assert said(one) == [("a", "A plan."), ("a", "The plan is it."), ("b", "Oh no.")]
    assert one.ledger["characters"] == {"labelled": 23, annotators.NO_CUE: 3}


def test_labels_without_cues_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"no label of 'own' has cues: add them .*cues: \["):
        annotation.annotator("lexical", labels=AWKWARD)
    recoloured = PAPER.to_dict() | {"name": "mine", "targets": [PAPER.names[0]]}
    again = annotation.annotator("lexical", labels=LabelSet.from_dict(recoloured))
    assert again.annotate(chains()) == annotation.annotator("lexical").annotate(chains())


@pytest.mark.parametrize("name", ["grammar", "offline"])
def test_who_knows_the_labels_of_the_paper_only_refuses_others_by_name(name):
    with pytest.raises(
        ValueError, match=r"'trip' \(step 2, Looking back, other\): "
    ) as refused:
        annotation.annotator(name, labels=OWN)
    assert "\n" not in str(refused.value)


# --- functions ---------------------------------------------------------------------------


def by_comma(text):
    """Everything up to the first comma is one label, the rest another."""
    cut = text.index(",")
    return [("other", cut + 1, len(text)), ("step 2", 0, cut)]


def as_segments(text):
    return [Segment("other", part) for part in text.split(",")]


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (by_comma, [("step 2", "Go on"), ("other", " then stop")]),
        (as_segments, [("other", "Go on"), ("other", "then stop")]),
        (lambda text: (PlacedSegment("other", text[:2], 0, 2) for _ in "a"), [("other", "Go")]),
        (lambda text: [("other", np.int64(0), np.int64(2))], [("other", "Go")]),
        (lambda text: [["other", 0, 2]], [("other", "Go")]),
        (lambda text: [], []),
    ],
)
def test_a_function_of_a_text_is_an_annotator(function, want):
    made = annotation.annotator(function, labels=OWN)
    assert isinstance(made, annotation.Annotator)
    assert made.name == function.__name__.strip("<>")
    (one,) = made.annotate([response("Go on, then stop")])
    assert said(one) == want
    assert one.annotator == made.name
    assert sum(one.ledger["characters"].values()) == 13


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([("others", 0, 2)], r"label 'others' of 'Go' is not among step 2, .*mean other"),
        ([Segment("deduction", "Go")], "label 'deduction' of 'Go' is not among step 2"),
        ([("other", 0, 99)], r"'other' at \[0, 99\) is empty or outside the 6 characters"),
        ([("other", -1, 2)], "outside the 6 characters"),
        ([("other", 2, 2)], "is empty or outside"),
        ([("other", 0, 4), ("step 2", 3, 6)], r"other \[0, 4\) and step 2 \[3, 6\) overlap"),
        ([("other", 0.0, 2)], "cannot be interpreted as an integer"),
        ([("other", 0)], r"gave \('other', 0\), expected \(label, start, end\)"),
        ([PlacedSegment("other", "on", 0, 2)], r"'on' is not what is at \[0, 2\)"),
        ([Segment("other", "Go"), ("other", 0, 2)], "with and without places: give one kind"),
        (None, "gave None, expected a list of segments"),
        ("other", "gave 'other', expected a list"),
        ({"other": [0, 2]}, "expected a list"),
    ],
)
def test_what_a_function_gives_is_checked_by_name(given, why):
    def mine(_text):
        return given

    with pytest.raises(ValueError, match=rf"annotator 'mine', task 't': .*{why}") as refused:
        annotation.annotator(mine, labels=OWN).annotate([response("Go on.")])
    assert "\n" not in str(refused.value)


def test_an_error_of_the_function_itself_is_its_own():
    with pytest.raises(ValueError, match="substring not found") as raised:
        annotation.annotator(by_comma, labels=OWN).annotate([response("Go on.")])
    assert raised.traceback[-1].name == "by_comma"


@pytest.mark.parametrize("thing", [None, 3, placing.Alignment])
def test_what_is_neither_a_name_nor_a_function_is_refused(thing):
    with pytest.raises(ValueError, match="expected a name, or a function of a text"):
        annotation.annotator(thing)


def test_the_fingerprint_of_a_function_is_that_of_what_it_does():
    def compiled(source):
        return eval(source, {})  # there is no source of it to be had

    def fingerprint(function):
        return annotation.annotator(function).fingerprint

    a, b = "lambda t: [('other', 0, 1)]", "lambda t: [('other', 0, 2)]"
    assert fingerprint(compiled(a)) == fingerprint(compiled(a)) != fingerprint(compiled(b))
    assert fingerprint(by_comma) == fingerprint(by_comma) != fingerprint(as_segments)
    assert fingerprint(partial(max, 1)) != fingerprint(partial(max, 2))


@pytest.fixture
def registered():
    known = dict(registry.annotator)
    yield registry.annotator
    registry.annotator._known.clear()
    registry.annotator._known.update(known)


def test_a_registered_function_is_found_by_its_name(registered):
    registered("mine")(by_comma)
    made = annotation.annotator("mine", labels=OWN)
    assert made.name == "mine", "as the run calls it"
    assert made.fingerprint == annotation.annotator(by_comma, labels=OWN).fingerprint
    assert said(made.annotate([response("Go, on")])[0])[0] == ("step 2", "Go")
    with pytest.raises(ValueError, match="mine takes nothing behind a colon"):
        annotation.annotator("mine:x", labels=OWN)
    with pytest.raises(ValueError, match=r"no annotator 'mime' \(did you mean mine"):
        annotation.annotator("mime")


def test_a_registered_factory_makes_an_annotator_of_what_is_behind_the_colon(registered):
    class Constant:
        def __init__(self, label, *, labels, shout=False):
            self.name, self.label, self.labels = f"constant:{label}", label, labels
            self.shout = shout

        def annotate(self, responses):
            return [Annotation(one.task_id, self.name) for one in responses]

    registered("constant")(Constant)
    made = annotation.annotator("constant:other", labels=OWN, shout=True)
    assert (made.label, made.labels, made.shout) == ("other", OWN, True)
    with pytest.raises(ValueError, match="LABEL is missing; expected constant:LABEL"):
        annotation.annotator("constant", labels=OWN)
    registered("both")(lambda text, labels=None: [])
    with pytest.raises(ValueError, match=r"'both'.* takes labels.* a function of a text takes"):
        annotation.annotator("both:some text")


def test_labels_of_another_set_are_not_taken_for_these(tmp_path):
    """The same annotator over the same chains: the store says that the set changed."""
    store = Rows(tmp_path / "annotations.jsonl", annotators.KEY)
    narrow = LabelSet.from_dict({"labels": {"step 2": "", "other": {"cues": ["hm"]}}})
    made = [annotation.annotator("lexical", labels=labels) for labels in (OWN, narrow)]
    first = annotators.annotations(made[0], chains(), store=store)
    assert annotators.annotations(made[0], chains(), store=store) == first
    with pytest.raises(StaleArtefact, match="annotator lexical changed"):
        annotators.annotations(made[1], chains(), store=store)


# --- a classifier of one's own -----------------------------------------------------------


WORDS = {
    "step 2": "Next I will pack the {}.",
    "Looking back": "So far the {} was packed.",
    "other": "The {} is blue.",
}


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(registry.PACKAGE.parent))
    from training import offline

    return offline


def labelled_file(path, names, n=15, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        labels = [*names, *rng.choice(names, size=6)]
        parts = [
            {"label": x, "text": WORDS[x].format(f"bag{rng.integers(99)}")} for x in labels
        ]
        rows.append(json.dumps({"task_id": f"t{i}", "question": f"q{i}", "segments": parts}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("n_labels", [2, 3])
def test_a_classifier_is_trained_on_a_persons_own_labels(script, tmp_path, n_labels):
    names = list(WORDS)[:n_labels]
    own = LabelSet.from_dict({"name": "own", "labels": dict.fromkeys(names, "")})
    data, folder = labelled_file(tmp_path / "mine.jsonl", names), tmp_path / "weights"
    labels = tmp_path / "own.yaml"
    labels.write_text(json.dumps(own.to_dict()))
    script.main(["--data", str(data), "--labels", str(labels), "--out", str(folder)])
    numbers = json.loads((folder / "offline_card.json").read_text())
    assert numbers["labels"] == names
    assert numbers["rules"] is None, "the cue words are those of the paper"
    assert numbers["kappa"] > 0.8
    assert "other chains of the same source" in (folder / "offline_card.md").read_text()
    made = annotation.annotator(f"offline:{folder}", labels=own)
    assert made.name == f"offline:{folder}", "as the run calls it"
    text = " ".join(WORDS[name].format("tent") for name in names)
    (one,) = made.annotate([response(text)])
    assert [label for label, _ in said(one)] == names
    assert set(one.ledger["expected"]) == set(names)
    same_size = LabelSet.from_dict({"labels": {f"l{i}": "" for i in range(n_labels)}})
    for other in (PAPER, same_size):
        with pytest.raises(ValueError, match=r"offline\.npz know step 2, .*not the labels"):
            annotation.annotator(f"offline:{folder}", labels=other)


def test_labelled_chains_are_read_as_their_segments(script, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {
        "task_id": "a",
        "segments": [{"label": "step 2", "text": "I go. "}, {"label": "other", "text": "Hm."}],
    }
    path.write_text(json.dumps(row) + "\n")
    (one,) = script.read_chains(path, OWN)
    assert (one.text, one.question, one.source) == ("I go. Hm.", "a", "mine")
    assert [OWN.names[i] for i in one.truth] == ["step 2", "other"]
    ((text, made),) = script._written(path, OWN)
    assert [text[s.start : s.end] for s in made.segments] == ["I go.", "Hm."]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "expected a chain with question"),
        ("[]", "expected a chain with question"),
        ('{"question": "q"}', "expected a chain with question"),
        ('{"question": "q", "segments": [{"label": "other"}]}', "expected a chain"),
        (
            '{"question": "q", "segments": [{"label": "plan", "text": "x"}]}',
            "label 'plan' of 'x'",
        ),
    ],
)
def test_a_line_that_is_no_labelled_chain_is_named(script, tmp_path, line, why):
    path = labelled_file(tmp_path / "mine.jsonl", list(WORDS), n=1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"mine\.jsonl: line 2: {why}"):
        script.train([path], tmp_path / "out", OWN)
    assert not (tmp_path / "out").exists()


def test_a_set_that_cannot_be_trained_is_refused(script, tmp_path):
    path = labelled_file(tmp_path / "mine.jsonl", ["step 2", "other"])
    with pytest.raises(ValueError, match="no sentence of Looking back to train on"):
        script.train([path], tmp_path / "out", OWN)
    with pytest.raises(ValueError, match="at least two labels"):
        script.train([path], tmp_path / "out", LabelSet.from_dict({"labels": {"other": ""}}))
    path.write_text("")
    with pytest.raises(ValueError, match=r"mine\.jsonl: no labelled chain to train on"):
        script.train([path], tmp_path / "out", OWN)


def test_the_rules_of_the_paper_are_not_asked_about_other_labels():
    assert sentences.heard(PAPER) is sentences.label
    assert sentences.heard(OWN)("So far so good.", 0) == "Looking back"
