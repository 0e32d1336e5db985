"""A whole run with labels of a person's own: five made-up names go through all notebooks, and
no label of the paper is left anywhere in what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from stllms.app import cli
from stllms.config import RunConfig
from stllms.labels import PAPER
from stllms.vectors.directions import SteeringVectors

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
#: Words of tiny-thinker's chains. ``humming`` never occurs.
LABELS = {
    "labels": {
        "taking-in": {"cues": ["okay", "let me", "alright", "the question", "the task"]},
        "concluding": {"cues": ["so", "therefore", "thus"]},
        "unfolding": {"cues": ["that means", "it follows", "then", "from this", "this gives"]},
        "remembering": {"cues": ["i recall", "remember", "from school", "in general", "fact"]},
        "humming": {"cues": ["tralala"]},
    },
    "targets": ["unfolding", "concluding", "humming"],
}
OPTIONS = "--judge lexical --n-samples 60 --n-evaluate 5 --max-tokens 96 --quiet"
MORE = {
    "n_compare": 6, "n_sweep": 2, "random_directions": 2, "n_positions": 16,
    "compare": "tiny-instruct",
}  # fmt: skip
#: Figures that say in words that there is nothing to draw: nobody else labels these chains.
BARE = {"agreement"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    place = tmp_path_factory.mktemp("own")
    (place / "mine.yaml").write_text(yaml.safe_dump(LABELS, sort_keys=False))
    own = {"labels": str(place / "mine.yaml"), "results": str(place / "results")}
    words = [*OPTIONS.split(), *(f"--{name}={value}" for name, value in own.items())]
    words += [f"--option={name}={value}" for name, value in MORE.items()]
    assert cli.main(["run", *words]) == 0
    return RunConfig(**own)


def texts(results: Path) -> dict[str, str]:
    """All that a run wrote as text, and the outputs of its notebooks, by file."""
    found = {}
    for path in results.rglob("*"):
        if path.suffix in (".csv", ".json", ".jsonl"):
            found[str(path)] = path.read_text(encoding="utf-8")
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            found[str(path)] = content[8 : 8 + size].decode()
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            shown = [one for cell in cells for one in cell.get("outputs", ())]
            found[str(path)] = re.sub(r'"image/png": "[^"]*"', "", json.dumps(shown))
    return found


@pytest.mark.slow
def test_labels_of_ones_own_go_through_all_notebooks_and_no_other_is_left(run):
    written = texts(run.results_folder)
    paper = re.compile("|".join(map(re.escape, PAPER.names)), re.IGNORECASE)
    found = {name: set(paper.findall(text)) for name, text in written.items()}
    assert {name: words for name, words in found.items() if words} == {}
    whole = "\n".join(written.values())
    assert all(name in whole for name in run.label_set.names)
    vectors = SteeringVectors.load(run.folder / "vectors.safetensors")
    assert set(vectors.behaviours) >= {"taking-in", "concluding", "unfolding"}
    assert min(vectors.counts) >= 10
    assert vectors.unavailable["humming"] == 0
    record = json.loads((run.folder / "run.json").read_text())
    assert record["identity"]["labels"] == run.label_identity


@pytest.mark.slow
def test_every_figure_is_drawn(run):
    sources = [path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("0[1-5]_*.ipynb")]
    wanted = {name for text in sources for name in re.findall(r'save_figure\(\\"(\w+)', text)}
    assert len(wanted) > 20
    folder = run.results_folder
    for suffix in (".png", ".pdf", ".csv"):
        assert {one.stem for one in folder.rglob(f"figures/*{suffix}")} == wanted
    rows = {one.stem: len(pd.read_csv(one)) for one in folder.rglob("figures/*.csv")}
    assert {name for name, n in rows.items() if not n} == BARE


@pytest.mark.slow
def test_a_label_that_never_occurs_is_missing_and_not_zero(run):
    steering = pd.read_csv(run.folder / "steering.csv")
    never = steering[steering["behaviour"] == "humming"]
    assert never["value"].isna().all()
    assert steering.loc[steering["behaviour"] == "concluding", "value"].notna().all()
    shown = texts(run.results_folder)
    said = re.compile(r"labels that never occurred: [\w, -]*humming")
    told = [text for name, text in shown.items() if name.endswith(".ipynb")]
    assert sum(bool(said.search(text)) for text in told) == 2
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "this run has labels of its own" in report
