"""``docs/scale.md``: its arithmetic is that of ``benchmarks/plan.py``, and what
``benchmarks/scale.py`` did not measure says so."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
GIB = 2**30


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.slow
def test_the_table_of_limits_is_what_the_script_prints(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan.py"])
    benchmark("plan").main()
    printed = capsys.readouterr().out
    shapes = re.findall(r"^\| ((?:Qwen|Llama) [\d.]+B) \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(shapes) == 5
    for name, cells in shapes:
        part = printed.split(name.replace(" ", "-") + ":")[1].split("GB a chain")[1]
        speeds = dict(re.findall(r"(\w+ +batch +\d+): +(\d+) tokens", part))
        every = re.sub(r"[^\d. ]", "", cells).split()
        assert every[3] == speeds["tensor  batch   256"], name
        assert every[4] == speeds["map     batch    64"], name
        assert re.search(rf"room for {every[2]} whole", printed), name


def test_a_limit_is_the_slower_of_reading_and_computing(benchmark):
    plan = benchmark("plan")
    given = SimpleNamespace(bandwidth=100.0, flops=1000.0)
    # 200 bytes of weights and 4 rows with 25 bytes each at half of their length: 3 seconds
    assert plan.limits(200, 50, 4, given, 1) == pytest.approx(4 / 3)
    # two cards: half of it; 100 numbers, twice, for 40 rows: 4 seconds on two cards
    assert plan.limits(200, 50, 4, given, 2) == pytest.approx(8 / 3)
    assert plan.limits(200, 0, 40, given, 2) == pytest.approx(40 / 4)


def test_what_would_take_too_long_is_extrapolated_by_the_growth_so_far(
    benchmark, monkeypatch, capsys
):
    scale = benchmark("scale")

    def run(command, **_):
        rows = int(command[command.index("--rows") + 1])
        took = {"seconds": rows**2 / 1e4, "cpu_seconds": rows**2 / 1e4}
        line = {"rows": rows, **took, "peak_bytes": 50 + 2 * rows, "measured": True}
        return SimpleNamespace(stdout=json.dumps(line).encode())

    monkeypatch.setattr(scale.subprocess, "run", run)
    sizes = [10, 100, 1000, 10_000]
    found = scale.grown("append", sizes, 60, dict.fromkeys(sizes, ROOT))
    assert [one["measured"] for one in found] == [True, True, False, False]
    assert [one["seconds"] for one in found] == pytest.approx([0.01, 1, 100, 10_000])
    assert [one["peak_bytes"] for one in found] == [50 + 2 * rows for rows in sizes]
    assert scale.grown("load", [10, 100], 0.005, {10: ROOT, 100: ROOT})[1]["peak_bytes"] is None
    assert scale.exponent(found) == pytest.approx(2)
    assert capsys.readouterr().out.count("extrapolated") == 3


@pytest.mark.slow
def test_a_stage_of_every_kind_is_measured(benchmark, tmp_path, capsys):
    out = tmp_path / "scale.json"
    stages = ["append", "rewrite", "load", "resume"]
    benchmark("scale").main(["--rows", "29", "58", "--stages", *stages, "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["stages"]) == stages
    for stage in found["stages"].values():
        assert [(one["rows"], one["measured"]) for one in stage["sizes"]] == [
            (29, True), (58, True),
        ]  # fmt: skip
        assert all(0 <= one["peak_bytes"] < GIB for one in stage["sizes"])
    assert found["bytes"]["jsonl"]["58"] > 1.5 * found["bytes"]["jsonl"]["29"] > 30_000
