"""Sets of labels: what is read, what is refused, and that the paper's is what the paper has."""

from __future__ import annotations

import pytest
import yaml

from stllms.labels import OTHER, PAPER, LabelSet, is_control

OWN = """
name: travel
labels:
  planning: says what it will do next
  Looking back:
    definition: says what it has done
    colour: "#123456"
    cues: [so far, until now]
  other:
targets: [planning, Looking back]
"""


def write(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_names_roles_colours_and_cues(tmp_path):
    found = LabelSet.load(write(tmp_path, OWN))
    assert found.name == "travel"
    assert found.names == ("planning", "Looking back", "other")
    assert found.targets == ("planning", "Looking back")
    assert found.rest == ("other",)
    assert found.compared == found.names
    assert found.labels[1].cues == ("so far", "until now")
    assert found.labels[0].definition == "says what it will do next"
    assert found.colour("Looking back") == "#123456"
    assert found.colour("unheard of") == OTHER
    assert found.find("looking-back") == found.find("LOOKING_BACK") == "Looking back"
    assert found.find("look") is None


def test_all_labels_are_targets_and_have_distinct_colours_where_nothing_else_is_said(tmp_path):
    found = LabelSet.load(write(tmp_path, "labels: {a: '', b: '', c: ''}"))
    assert found.name == "own"
    assert found.targets == ("a", "b", "c")
    assert len({one.colour for one in found.labels}) == 3


def test_a_set_survives_yaml(tmp_path):
    text = yaml.safe_dump(PAPER.to_dict(), sort_keys=False)
    assert LabelSet.load(write(tmp_path, text)) == PAPER


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("labels: {a: x, a: y}", "'a' is given 2 times"),
        ("labels: {Plan: x, plan: y}", "Plan and plan are the same name"),
        ("labels: {a b: x, a-b: y}", "a b and a-b are the same name"),
        ("labels: {}", "there is no label"),
        ("labels: [a, b]", "expected labels: {name: definition"),
        ("- a", "expected labels: {name: definition"),
        ("labels: {a: x}\ntargets: []", "no target"),
        ("labels: {a: x}\ntargets: [b]", "'b' is not among a"),
        ("labels: {a: x}\ntargets: a", "expected a list of names"),
        ("labels: {a: x}\ntargets: [a, a]", "named twice"),
        ("labels: {a: x}\ntarget: [a]", "unknown field 'target'"),
        ("labels: {a: {means: x}}", "expected a definition, or definition, colour and cues"),
        ("labels: {a: {colour: red}}", "'red' is no colour"),
        ("labels: {'[a]': x}", "is no name for a label"),
        ("labels: {'': x}", "is no name for a label"),
        ("labels: {Overall: x}", "reserved"),
        ("labels: {a: x}\nexample: [a]", r"expected a list of \[label, text\]"),
        ("labels: {a: x}\nexample: [[b, text]]", "'b' is not among a"),
        ("labels: {a", "no YAML file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as refused:
        LabelSet.load(write(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.yaml"):
        LabelSet.load(tmp_path / "none.yaml")


def test_controls_are_told_from_labels():
    assert is_control("shuffled:0")
    assert not any(map(is_control, (*PAPER.names, "shuffled", "shuffled:", "other:1")))
