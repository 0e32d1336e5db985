"""What is labelled: a set of labels with definitions, colours and roles.

:data:`PAPER` is the set of the paper (method, section 4). A person's own is read from a YAML
file (:meth:`LabelSet.load`) and goes the same way through every stage.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: Kinds of control directions (method, section 13): a direction is called ``"shuffled:0"``.
CONTROLS: tuple[str, ...] = ("shuffled", "covariance", "isotropic")
#: What no label may be called: the mean over everything, and the unsteered chain.
RESERVED: tuple[str, ...] = (
    *("overall", "plain", "all", "none"),
    *("section", "endsection", "sectionend", "endofsection"),  # of a judge's markup
    *CONTROLS,
)
#: Colours of labels that name none, distinct for colour-blind readers (Okabe and Ito; Tol).
PALETTE: tuple[str, ...] = (
    *("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999"),
    *("#882255", "#44AA99", "#332288", "#DDCC77", "#117733"),
)
#: The colour of a label outside the set (the published reader keeps unknown ones).
OTHER = "#555555"


@dataclass(frozen=True)
class Label:
    """One label: its name, what it means in one line, its colour (``#rrggbb``), and ``cues``,
    words by which the annotator ``lexical`` knows it."""

    name: str
    definition: str = ""
    colour: str = OTHER
    cues: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelSet:
    """Labels in their order, and which of them are ``targets``: steered and measured.

    ``heatmap`` are the rows of the figure of cosines, all labels where it is empty; ``example``
    are labelled texts that a judge is shown.

    Raises:
        ValueError: no label or no target, a name that is empty, twice there (case, spaces and
            hyphens aside), reserved, or of characters that markup needs; a target that is none
            of the labels; a colour that is none.
    """

    name: str
    labels: tuple[Label, ...]
    targets: tuple[str, ...]
    heatmap: tuple[str, ...] = ()
    example: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        where = f"labels {self.name!r}"
        if not self.labels:
            raise ValueError(f"{where}: there is no label")
        for one in self.labels:
            if not re.fullmatch(r"\w(?:[\w /-]*\w)?", one.name):
                raise ValueError(
                    f"{where}: {one.name!r} is no name for a label: letters and digits, with "
                    "hyphens, spaces or slashes between them"
                )
            if _letters(one.name) in RESERVED:
                raise ValueError(f"{where}: {one.name!r} is reserved; choose another name")
            if not re.fullmatch("#[0-9A-Fa-f]{6}", one.colour):
                raise ValueError(f"{where}: {one.name}: {one.colour!r} is no colour #rrggbb")
        for letters, n in Counter(map(_letters, self.names)).items():
            if n > 1:
                same = [name for name in self.names if _letters(name) == letters]
                raise ValueError(f"{where}: {' and '.join(same)} are the same name: drop one")
        if not self.targets:
            raise ValueError(f"{where}: no target; name at least one label in 'targets'")
        shown = (label for label, _ in self.example)
        for role, names in (
            ("targets", self.targets),
            ("heatmap", self.heatmap),
            ("example", shown),
        ):
            for name in names:
                if name not in self.names:
                    listed = ", ".join(self.names)
                    raise ValueError(f"{where}: {role}: {name!r} is not among {listed}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"{where}: a target is named twice: {', '.join(self.targets)}")

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in their order."""
        return tuple(one.name for one in self.labels)

    @property
    def rest(self) -> tuple[str, ...]:
        """The labels that are no targets."""
        return tuple(name for name in self.names if name not in self.targets)

    @property
    def compared(self) -> tuple[str, ...]:
        """The rows of the figure of cosines."""
        return self.heatmap or self.names

    def colour(self, name: str) -> str:
        """The colour of a label, :data:`OTHER` for one outside the set."""
        return next((one.colour for one in self.labels if one.name == name), OTHER)

    def find(self, text: str) -> str | None:
        """The label that a text names, case, spaces, underscores and hyphens aside."""
        wanted = _letters(text)
        return next((name for name in self.names if _letters(name) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in the form of :meth:`from_dict`."""
        return {
            "name": self.name,
            "labels": {
                one.name: {
                    "definition": one.definition,
                    "colour": one.colour,
                    "cues": list(one.cues),
                }
                for one in self.labels
            },
            "targets": list(self.targets),
            "heatmap": list(self.heatmap),
            "example": [list(pair) for pair in self.example],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "own") -> LabelSet:
        """A set from ``{"labels": {name: definition}, "targets": [name, ...]}``.

        For a definition there may be ``{definition, colour, cues}``. Without ``targets`` all
        labels are. ``name``, ``heatmap`` and ``example`` are those of the class.

        Raises:
            ValueError: another form (naming what is expected), or a set that the class refuses.
        """
        name = str(values.get("name", name)) if isinstance(values, Mapping) else name
        where = f"labels {name!r}"
        known = ("name", "labels", "targets", "heatmap", "example")
        if not isinstance(values, Mapping) or not isinstance(values.get("labels"), Mapping):
            raise ValueError(f"{where}: expected labels: {{name: definition, ...}}")
        for field in values:
            if field not in known:
                raise ValueError(f"{where}: unknown field {field!r}: {', '.join(known)}")
        labels = tuple(
            _label(where, str(key), value, PALETTE[place % len(PALETTE)])
            for place, (key, value) in enumerate(values["labels"].items())
        )
        targets = _names(where, values, "targets", [one.name for one in labels])
        example = values.get("example") or ()
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in example):
            raise ValueError(f"{where}: example: expected a list of [label, text]")
        return cls(
            name,
            labels,
            targets,
            _names(where, values, "heatmap", ()),
            tuple((str(label), str(text)) for label, text in example),
        )

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """A set from a YAML file in the form of :meth:`from_dict`, called as the file.

        Raises:
            ValueError: no such file, no YAML, a name twice, or what :meth:`from_dict` refuses.
        """
        path = Path(path).expanduser()
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Strict)
        except OSError as error:
            raise ValueError(f"labels: cannot read {path} ({error.strerror})") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"labels: {path} is no YAML file of labels: {said}") from None
        return cls.from_dict(values, path.stem)


class _Strict(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML keeps the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, n in Counter(map(str, keys)).items():
            if n > 1:
                raise yaml.YAMLError(f"{key!r} is given {n} times")
        return super().construct_mapping(node, deep)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _label(where: str, name: str, value: Any, colour: str) -> Label:
    given = {"definition": value or ""} if isinstance(value, str | None) else value
    if not isinstance(given, Mapping) or not {*given} <= {"definition", "colour", "cues"}:
        raise ValueError(
            f"{where}: {name}: expected a definition, or definition, colour and cues"
        )
    cues = _names(where, given, "cues", ())
    return Label(name, str(given.get("definition", "")), str(given.get("colour", colour)), cues)


def _names(
    where: str, values: Mapping[str, Any], field: str, default: Sequence[str]
) -> tuple[str, ...]:
    found = values.get(field)
    found = default if found is None else found
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"{where}: {field}: expected a list of names")
    return tuple(map(str, found))


def is_control(direction: str) -> bool:
    """Whether the name of a direction is that of a control."""
    kind, colon, number = direction.partition(":")
    return kind in CONTROLS and bool(colon) and number.isdigit()


#: The paper's six labels in the order used everywhere, its four targets in the order of its
#: figures, the rows of its figure of cosines.
PAPER = LabelSet(
    name="paper",
    labels=(
        Label(
            "initializing",
            "takes in the task: restates it, says what is asked, voices first thoughts",
            "#999999",
        ),
        Label(
            "deduction",
            "draws a conclusion from what it assumes or has already found, on its current path",
            "#0072B2",
        ),
        Label(
            "adding-knowledge",
            "brings in a fact, rule or definition that the task did not give",
            "#009E73",
        ),
        Label(
            "example-testing",
            "tries a concrete example, number or case to check its current path",
            "#E69F00",
        ),
        Label(
            "uncertainty-estimation",
            "says how sure or unsure it is, voices doubt or confidence",
            "#CC79A7",
        ),
        Label(
            "backtracking",
            "gives up or corrects its current path and turns to another one",
            "#D55E00",
        ),
    ),
    targets=(
        "backtracking",
        "uncertainty-estimation",
        "example-testing",
        "adding-knowledge",
    ),
    heatmap=(
        "initializing",
        "backtracking",
        "uncertainty-estimation",
        "adding-knowledge",
        "deduction",
    ),
    example=(
        ("initializing", "So I need the area of the field."),
        ("adding-knowledge", "A square's area is its side squared."),
    ),
)
