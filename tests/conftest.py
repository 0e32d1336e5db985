"""Options and fixtures of the whole suite. Fixtures named ``tiny_<family>`` are a
:class:`stllms.models.Model` with random weights and a byte-level tokenizer (:mod:`tiny`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="also run tests that take minutes or a browser"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model():
    """``tiny_model(kind)``: the wrapped random model of a family, built once a session."""
    built = {}

    def get(kind: str):
        if kind not in built:
            built[kind] = tiny.model(kind)
        return built[kind]

    return get


@pytest.fixture(scope="session")
def tiny_llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="session")
def tiny_mistral(tiny_model):
    return tiny_model("mistral")


@pytest.fixture(scope="session")
def tiny_gemma2(tiny_model):
    return tiny_model("gemma2")


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_model):
    return tiny_model("gemma3")


@pytest.fixture(scope="session")
def save_tiny_model():
    """``save_tiny_model(folder, kind)`` writes a tiny random model as a folder."""
    return tiny.save_tiny_model


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the authors' released files; the test is skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "published"
    folder = Path(os.environ.get("STLLMS_PUBLISHED", default))
    if not folder.is_dir():
        pytest.skip(f"no released files at {folder} (set STLLMS_PUBLISHED)")
    return folder
