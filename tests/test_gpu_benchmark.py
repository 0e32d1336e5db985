"""``benchmarks/gpu.sh``: its tiny shapes, on whatever this machine has."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stllms import models

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_the_small_run_writes_every_part(tmp_path):
    out = tmp_path / "gpu.json"
    command = [FOLDER / "gpu.sh", "--small", "--out", out]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["packages"]["torch"] == torch.__version__
    assert found["conformance"]["chains_equal"] == found["conformance"]["of"] == 12
    assert sorted(found["models"]) == ["random-llama-8b", "random-qwen2-1.5b"]
    bandwidth = found["limits"]["copy_bytes_per_second"]
    for parts in found["models"].values():
        shape = parts["build"]
        # 4 bytes a weight; the embedding, 512 x 64, is untied and not read as a whole
        assert shape["weight_bytes_read_a_step"] == 4 * (shape["parameters"] - 512 * 64)
        assert list(parts["transformers"]) == ["1 rows", "8 rows"]
        for row in parts["transformers"].values():
            assert min(row["steered_tokens_per_second"], row["plain_tokens_per_second"]) > 0
            limit = row["weight_read_limit_tokens_per_second"] / row["batch"]
            assert limit == pytest.approx(bandwidth / shape["weight_bytes_read_a_step"])
        assert parts["activations"]["relative_difference"] < 1e-5
        assert parts["layer effects"]["published"]["relative_difference"] < 1e-3
        assert parts["layer effects"]["kl"]["largest_difference_nats"] < 1e-4


def test_what_the_time_does_not_suffice_for_is_left_out_by_name(gpu, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--minutes", "0", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    left = {"left out": "the time was up"}
    assert found["limits"] == found["conformance"] == left
    assert found["models"]["random-llama-8b"] == {"build": left}


def test_a_part_that_fails_is_named_and_the_others_go_on(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "applied", lambda hf, items: gpu.torch.no_grad())  # unsteered
    out = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--models", "random-qwen2-1.5b", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert "of 12 chains equal" in found["conformance"]["failed"]
    assert found["models"]["random-qwen2-1.5b"]["activations"]["seconds"] > 0


def test_another_engine_is_measured_on_the_same_weights(gpu, tmp_path, monkeypatch, capsys):
    """vLLM is played by our own loop."""
    loaded, asked = [], []

    def load(folder, **options):
        asked.append(options["engine"])
        loaded.append(models.load(folder, device="cpu"))
        return loaded[-1]

    there = SimpleNamespace(util=SimpleNamespace(find_spec=str))
    monkeypatch.setattr(gpu, "importlib", there)
    monkeypatch.setattr(gpu, "models", SimpleNamespace(load=load))
    out = tmp_path / "gpu.json"
    options = ["--small", "--models", "random-llama-8b", "--batches", "3", "--out", str(out)]
    assert gpu.main(options) == 0
    parts = json.loads(out.read_text())["models"]["random-llama-8b"]
    assert asked == ["vllm"]
    assert list(parts["vllm"]) == ["start", "3 rows", "close"]
    assert parts["vllm"]["3 rows"]["steered_tokens_per_second"] > 0
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, loaded[0].identity["dtype"])
    again = gpu.drawn("again", gpu.SHAPES["random-llama-8b"][0], gpu.SMALL, place, dtype)
    assert loaded[0].identity["weights"] == again.identity["weights"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_full_run_is_refused(gpu, capsys):
    assert gpu.main([]) == 2
    assert "no CUDA card here" in capsys.readouterr().err
