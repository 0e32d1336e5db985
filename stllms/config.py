"""What a run is: the profiles, and the frozen ``RunConfig`` that is checked when it is made.

Every choice of method, section 11, has a name in :data:`CHOICES`; the models are in
:mod:`stllms.registry`. Nothing here imports torch: the runner reads a configuration and says
"nothing to do" within a second.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from stllms import registry
from stllms.hashes import digest, file_hash, remembered_hash
from stllms.labels import CONTROLS, PAPER, LabelSet
from stllms.registry import ModelEntry, did_you_mean, resolve, slug


@dataclass(frozen=True)
class Profile:
    """The one dial: how much a run does.

    ``n_build``, ``n_evaluate``, ``n_compare``: tasks to build directions from, to evaluate
    steering on and to compare models on. ``max_tokens``: the limit of new tokens.
    ``temperature`` 0 is greedy. ``coefficients`` of steering; 0 is the baseline.
    ``random_directions``: control directions of the null. ``n_sweep``: tasks that are also
    steered at every layer (by default on embedded models only). ``n_positions``: positions per
    behaviour at which exact layer effects are measured. ``n_control``: tasks on which control
    directions are added, and ``control_coefficients`` how (``None``: all tasks, all of
    ``coefficients``).
    """

    n_build: int
    n_evaluate: int
    n_compare: int
    max_tokens: int
    max_tokens_compare: int
    temperature: float
    coefficients: tuple[float, ...]
    random_directions: int
    n_sweep: int
    n_positions: int
    n_control: int | None = None
    control_coefficients: tuple[float, ...] | None = None


_THREE = (-1.0, 0.0, 1.0)
_NINE = (-0.5, -0.35, -0.25, -0.15, 0.0, 0.15, 0.25, 0.35, 0.5)

# Exact effects scatter over positions about as much as their mean (sd / mean 1.05 for deduction
# and .67 for adding-knowledge, median over the layers of smollm2): the mean over 64, 200 or 400
# positions has a standard error of about 13, 7 or 5 %.
PROFILES: dict[str, Profile] = {
    "smoke": Profile(16, 8, 8, 96, 96, 0.65, _THREE, 2, 0, 64),
    "default": Profile(200, 60, 60, 256, 256, 0.65, _THREE, 10, 20, 200),
    "laptop": Profile(500, 50, 50, 400, 400, 0.6, _NINE, 10, 0, 200, 10, (-0.25, 0.25)),
    "full": Profile(1000, 400, 400, 256, 256, 0.65, (-2.0, -1.0, 0.0, 1.0, 2.0), 20, 60, 400),
    "paper": Profile(500, 50, 100, 1000, 2000, 0.0, _THREE, 10, 0, 400, 10),
}

#: Method, section 11: option -> (the default, the published procedure). The published reader
#: also keeps unknown labels as they are, where the default one rejects and counts them.
CHOICES: dict[str, tuple[str, str]] = {
    "reader": ("tolerant", "published"),
    "prompts": ("sound", "published"),
    "objective": ("kl", "published"),
    "positions": ("own", "published"),
    "retokenise": ("generated", "published"),
    "empty_chains": ("apart", "published"),
}

#: What a judge may be, besides what is registered (:data:`stllms.registry.annotator`); behind
#: a colon stands a model, or a folder: of a classifier trained on labels of one's own, or of
#: stored replies.
ANNOTATORS = (
    "auto", "grammar", "lexical", "offline", "offline:FOLDER", "openai:MODEL", "replay:FOLDER",
)  # fmt: skip
#: Begins a judge that is a folder of stored replies, or a classifier in a folder.
REPLAY, TRAINED = "replay:", "offline:"

#: Styles of prompts by name (:func:`stllms.generation.prompts.opening`); a text with
#: :data:`QUESTION` in it is one, too.
STYLES = ("sound", "published", "bare", "raw")
QUESTION = "{question}"

#: Sets of tasks that have a name; anything else is a file. ``checkable`` is ``messages``, but
#: evaluated on tasks that have exact answers.
TASK_SETS = ("grammar", "messages", "checkable")
#: Begins a set of tasks from the reasoning-gym package; a dataset's name follows.
GYM = "gym:"
#: How many tasks the sets of ``messages/`` have for a part of a run, by the profile's number.
SIZES = {
    "messages": {"n_build": 500, "n_evaluate": 50},
    "checkable": {"n_build": 500, "n_evaluate": 100},
}

#: The literals of every notebook's ``parameters`` cell, in order.
PARAMETERS = (
    "model", "profile", "judge", "results", "seed", "n_samples", "max_tokens", "options",
)  # fmt: skip

#: What may write chains (:mod:`stllms.models.engines`); the first is the default.
ENGINES = ("transformers", "vllm")

#: Field -> its values.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "profile": tuple(PROFILES),
    "controls": ("matched", *CONTROLS),  # matched: shuffled and covariance in turn
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": (None, "8bit", "4bit"),
    "engine": ENGINES,
    "device_map": (None, "auto"),
    **CHOICES,
}


@dataclass(frozen=True)
class RunConfig:
    """One run of the five notebooks on one model, checked when it is made.

    ``None`` takes the profile's value (:attr:`settings` holds the resolved ones). ``model`` is
    normalised to its entry's name. ``n_samples`` is the number of tasks the directions are
    built from. ``tasks`` is ``None`` (the grammar for an embedded model, else ``messages``), a
    name of :data:`TASK_SETS`, ``gym:NAME`` for a dataset of reasoning-gym, or the path of a
    JSONL file. ``labels`` is a YAML file of labels of one's own (``None``: the paper's;
    :attr:`label_set` has them). ``prompts`` is a style of :data:`STYLES` or a template with
    ``{question}`` in it, ``system`` a system message before it. ``compare`` names the other
    models of notebook 05, ``folders`` the folders of finished runs whose chains it takes.
    ``max_cost`` bounds each folder of replies: what a model's judge costs, and what an API
    model costs. Raises ``ValueError`` that names the field, its value and what is expected;
    :class:`~stllms.registry.UnknownModel` for a model.
    """

    model: str = "tiny-thinker"
    profile: str = "default"
    judge: str = "auto"
    results: str | None = None
    seed: int = 0
    n_samples: int | None = None
    max_tokens: int | None = None
    n_evaluate: int | None = None
    n_compare: int | None = None
    max_tokens_compare: int | None = None
    temperature: float | None = None
    coefficients: tuple[float, ...] | None = None
    random_directions: int | None = None
    n_sweep: int | None = None
    n_positions: int | None = None
    n_control: int | None = None
    control_coefficients: tuple[float, ...] | None = None
    controls: str = "matched"
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    engine: str = "transformers"
    device_map: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    workers: int | None = None
    ray: str | None = None
    tasks: str | None = None
    labels: str | None = None
    base_url: str | None = None
    max_cost: float | None = None
    published: str | None = None
    revision: str | None = None
    compare: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    reader: str = "tolerant"
    prompts: str = "sound"
    system: str | None = None
    objective: str = "kl"
    positions: str = "own"
    retokenise: str = "generated"
    empty_chains: str = "apart"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        others = tuple(name for name in self.compare if name != self.model)
        object.__setattr__(self, "compare", others)
        if self.system is not None and self.prompts == "raw":
            raise refusal(
                "system", self.system, "none: prompts='raw' has no place for a system message"
            )
        self._check_labels()
        if self.judge == "grammar" and not self.embedded:
            raise refusal(
                "judge",
                self.judge,
                "lexical, offline, openai:MODEL or replay:FOLDER: the grammar knows the chains "
                f"of the embedded models only, not those of {self.model}",
            )

    def _check_labels(self) -> None:
        """Refuses what is of the paper's labels alone: the released files and two annotators;
        and the annotator ``lexical`` without cue words."""
        if not self.own_labels:
            return
        if self.published is not None:
            raise refusal(
                "published",
                self.published,
                "nothing with labels of one's own: the released files have the paper's",
            )
        if self.annotator in ("grammar", "offline"):
            raise refusal(
                "judge",
                self.judge,
                f"lexical, offline:FOLDER, openai:MODEL or replay:FOLDER: {self.annotator} "
                f"knows the labels of the paper only, not those of {self.labels}",
            )
        if self.annotator == "lexical" and not any(one.cues for one in self.label_set.labels):
            raise ValueError(
                f"labels: {self.labels} has no cues, by which the annotator lexical knows a "
                "label: add them, or name another judge (openai:MODEL)"
            )

    @cached_property
    def entry(self) -> ModelEntry:
        """The registry entry of ``model``."""
        return resolve(self.model)

    @property
    def embedded(self) -> bool:
        """Whether the model is one of the package's own fixtures."""
        return self.entry.source == "embedded"

    @cached_property
    def label_set(self) -> LabelSet:
        """What the chains are labelled with: those of the file ``labels``, else the paper's."""
        return PAPER if self.labels is None else LabelSet.load(self.labels)

    @property
    def own_labels(self) -> bool:
        """Whether the labels are others than the paper's."""
        return self.label_set != PAPER

    @property
    def label_identity(self) -> str | None:
        """The name of labels of one's own and a hash of their content; ``None`` for the
        paper's."""
        if not self.own_labels:
            return None
        return f"{self.label_set.name}:{digest(self.label_set.to_dict())[:12]}"

    @property
    def preview(self) -> str:
        """The annotator that costs nothing: ``lexical`` for labels of one's own, ``grammar``
        for embedded models, else ``offline``."""
        if self.own_labels:
            return "lexical"
        return "grammar" if self.embedded else "offline"

    @property
    def annotator(self) -> str:
        """The judge; ``auto`` is :attr:`preview`."""
        return self.preview if self.judge == "auto" else self.judge

    @property
    def judged(self) -> bool:
        """Whether a language model labels the chains, each for money, or its stored replies."""
        return self.annotator.startswith(("openai:", "replay:"))

    @property
    def who(self) -> str:
        """The model for captions; an embedded one never without the warning."""
        name = self.entry.display
        return f"{name} (a fixture, built to be steerable)" if self.embedded else name

    @property
    def effects_key(self) -> str:
        """Whose layer effects choose the steering layer: ``<objective>/<own or others>``."""
        return f"{self.objective}/{'own' if self.positions == 'own' else 'others'}"

    @property
    def task_set(self) -> str:
        """``tasks`` with ``None`` resolved: ``grammar`` or ``messages``."""
        return self.tasks or ("grammar" if self.embedded else "messages")

    @property
    def models(self) -> tuple[str, ...]:
        """The models of notebook 05: this one, then ``compare``.

        Without ``compare``, a model that ships is compared with its pair where that can be
        loaded here, and an embedded one with ``smollm2`` too, where its extra is installed and
        the judge can label its chains for nothing.
        """
        if self.compare or self.entry.source not in ("embedded", "gguf"):
            return (self.model, *self.compare)
        free = self.judge in ("auto", "lexical", "offline")
        others = (self.entry.pair, *(("smollm2",) if self.embedded and free else ()))
        here = [name for name in others if name and not registry.missing_packages(name)]
        return (self.model, *here)

    @cached_property
    def settings(self) -> Profile:
        """The profile with this configuration's own values put in.

        A profile asks for no more tasks than ``messages/`` has. ``max_tokens`` alone also
        limits the comparison. Only embedded models sweep their layers without being told.
        """
        profile = PROFILES[self.profile]
        values = asdict(profile)
        for name, n in SIZES.get(self.task_set, {}).items():
            values[name] = min(n, values[name])
        if not self.embedded:
            values["n_sweep"] = 0
        own = {name: getattr(self, name, None) for name in values}
        own["n_build"] = self.n_samples
        own["max_tokens_compare"] = self.max_tokens_compare or self.max_tokens
        return replace(profile, **values | {k: v for k, v in own.items() if v is not None})

    # -- what the stages take ------------------------------------------------------------

    @property
    def loading(self) -> dict[str, Any]:
        """Options of :func:`stllms.models.load`."""
        return self._values(
            "device", "dtype", "quantization", "revision", "device_map",
            "engine", "tensor_parallel", "pipeline_parallel", "workers", "ray",
        )  # fmt: skip

    @property
    def decoding(self) -> dict[str, Any]:
        """Options of :func:`stllms.generation.chains.responses` and
        :func:`stllms.steering.conditions.grid`."""
        own = self._values("system", "batch_size", "temperature", "seed")
        return {"max_new_tokens": self.settings.max_tokens, "style": self.prompts, **own}

    @property
    def annotating(self) -> dict[str, Any]:
        """Options of ``annotator(config.annotator, ...)``. A judge stores its replies in
        ``results/<slug>/judge``, where ``replay:`` finds them."""
        own: dict[str, Any] = {"labels": self.label_set} if self.own_labels else {}
        if self.annotator.startswith("openai:"):
            own |= {
                "base_url": self.base_url,
                "max_cost": self.max_cost,
                "folder": self.folder / "judge",
            }
        return own | ({"reader": self.reader} if self.judged else {})

    def tasks_of(self, part: str) -> dict[str, Any]:
        """Options of :func:`stllms.tasks.select` for a ``part`` of the run: ``build``,
        ``evaluate`` or ``compare``. The first tasks of a person's file build, those after
        them evaluate, and all of them serve the comparison."""
        one_of("part of a run", part, ("build", "evaluate", "compare"))
        named = has_name(self.task_set)
        return {
            "source": self.task_set if named else str(Path(self.task_set).expanduser()),
            "n": getattr(self.settings, f"n_{part}"),
            "skip": self.settings.n_build if part == "evaluate" and not named else 0,
            "seed": self.seed,
        }

    # -- where its files are -------------------------------------------------------------

    @property
    def results_folder(self) -> Path:
        """``results``, else ``STLLMS_RESULTS``, else the checkout's or ``./results``."""
        chosen = self.results or os.environ.get("STLLMS_RESULTS")
        if chosen:
            return Path(chosen).expanduser().resolve()
        return (registry.repository() or Path.cwd()) / "results"

    @property
    def folder(self) -> Path:
        """The run's folder, ``results/<slug>``."""
        return self.results_folder / slug(self.model)

    # -- what makes it the same run ------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run, as plain JSON values.

        Another value of any of these needs another folder or ``--fresh``. Device, batch size
        and commit are recorded, not compared; the dtype is known once the model is loaded
        (:meth:`stllms.runs.artifacts.Folder.made_with`). Coefficients, control directions,
        objective, positions and the compared models are part of the row keys or of the stage
        (:meth:`stage_options`), so that they can be added to later.
        """
        content = registry.content_of(self.entry)
        own = {"system": self.system, "labels": self.label_identity}
        return {
            **content,
            **self._values("model", "quantization", "seed", "prompts", "reader", "retokenise"),
            **self._values("n_build", "n_evaluate", "max_tokens", "temperature"),
            "revision": self.revision or content["revision"],
            "tasks": _task_identity(self.task_set),
            "annotator": _judge_identity(self.annotator),
            **{name: value for name, value in own.items() if value is not None},
        }

    def comparison_identity(self) -> dict[str, Any]:
        """:meth:`identity` of this model's rows under ``results/comparison/``."""
        own = ("n_build", "n_evaluate", "max_tokens", "retokenise")
        shared = {name: value for name, value in self.identity().items() if name not in own}
        return shared | self._values("n_compare", "max_tokens_compare")

    def for_model(self, name: str) -> RunConfig:
        """The same run on another model (notebook 05); ``self`` for this one."""
        entry = resolve(name)
        if entry.name == self.model:
            return self
        same = entry.hub_id == self.entry.hub_id  # the same weights, another template option
        revision = self.revision if same else None
        return replace(self, model=entry.name, compare=(), revision=revision)

    def stage_options(self, stage: str) -> dict[str, Any]:
        """What changes the artefacts of a stage (``"03_…"``) beyond :meth:`identity`."""
        controls = ("controls", "random_directions")
        options: dict[str, dict[str, Any]] = {
            "02": self._values(*controls),
            "03": {
                **self._values(*controls, "n_positions", "objective", "positions"),
                "published": _content_identity(self.published, "*.pt"),
            },
            "04": {
                **self._values(*controls, "coefficients", "n_sweep", "empty_chains"),
                **self._values("n_control", "control_coefficients"),
            },
            "05": {
                **self._values("models", "n_compare", "max_tokens_compare", "empty_chains"),
                "folders": [_content_identity(one, "*.jsonl") for one in self.folders],
                "published": _content_identity(self.published, "*.json"),
            },
        }
        return options.get(stage[:2], {})

    def _values(self, *names: str) -> dict[str, Any]:
        """Some values by name, those of a profile as :attr:`settings` has them."""
        resolved = vars(self.settings)
        return {n: resolved[n] if n in resolved else getattr(self, n) for n in names}

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value."""
        values = asdict(self).items()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """A configuration from field names and values; unknown names are refused."""
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"unknown option {name!r}{did_you_mean(name, known)}; expected one of "
                    f"{', '.join(known)}"
                )
        return cls(**values)

    @classmethod
    def from_parameters(
        cls,
        model: str,
        profile: str = "default",
        judge: str = "auto",
        results: str | None = None,
        seed: int = 0,
        n_samples: int | None = None,
        max_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """The configuration of a notebook's ``parameters`` cell.

        ``options`` holds any other field by name; a field of the cell is refused there.
        """
        values = (model, profile, judge, results, seed, n_samples, max_tokens)
        cell = dict(zip(PARAMETERS[:-1], values, strict=True))
        twice = sorted(set(cell) & set(options or {}))
        if twice:
            raise ValueError(f"options: {', '.join(twice)} has a parameter of its own")
        return cls.from_dict({**cell, **(options or {})})

    def parameters(self) -> dict[str, Any]:
        """The inverse of :meth:`from_parameters`. Paths are made absolute: a kernel has a
        working folder of its own."""
        values = self.to_dict() | {
            "results": str(self.results_folder),
            "folders": [_absolute(one) for one in self.folders],
        }
        for name in ("published", "labels"):
            if values[name] is not None:
                values[name] = _absolute(values[name])
        if not has_name(self.task_set):
            values["tasks"] = _absolute(self.task_set)
        for kind in (REPLAY, TRAINED):
            if self.judge.startswith(kind):
                values["judge"] = kind + _absolute(self.judge.removeprefix(kind))
        cell = {name: values.pop(name) for name in PARAMETERS if name != "options"}
        defaults = RunConfig().to_dict()
        return cell | {"options": {k: v for k, v in values.items() if v != defaults[k]}}


# -- single values -------------------------------------------------------------------------


def refusal(name: str, value: Any, expected: str) -> ValueError:
    """The error that says which field is wrong, what it is and what is expected."""
    return ValueError(f"{name}: {value!r}, expected {expected}")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """The value; refuses one that is not among ``allowed``."""
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise refusal(name, value, f"one of {listed}{did_you_mean(value, allowed)}")
    return value


def whole(name: str, value: Any, *, least: int, optional: bool = True) -> int | None:
    """A whole number of at least ``least``; ``None`` (use the default) if ``optional``."""
    if (value is None and optional) or (type(value) is int and value >= least):
        return value
    raise refusal(name, value, f"a whole number of at least {least}")


def real(name: str, value: Any, *, least: float = -math.inf) -> float | None:
    """A finite number of at least ``least``; ``None`` is let through."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        bound = f" of at least {least:g}" if math.isfinite(least) else ""
        raise refusal(name, value, f"a number{bound}")
    return float(value)


def hardware(device: str, quantization: str | None) -> None:
    """Refuses CUDA, and quantization, where this machine or environment does not have it."""
    if quantization is None and not device.startswith("cuda"):
        return
    import torch  # not before it is needed

    found = torch.cuda.is_available()
    if device.startswith("cuda") and not found:
        raise refusal("device", device, "cpu: torch finds no CUDA device")
    if quantization and (not found or device in ("cpu", "mps")):
        where = f"device is {device!r}" if found else "torch finds none"
        raise ValueError(
            f"quantization: {quantization!r} needs a CUDA device and {where}; leave it out"
        )
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization: {quantization!r} needs bitsandbytes: pip install bitsandbytes"
        )


def has_name(task_set: str) -> bool:
    """Whether a set of tasks has the form of a name, and is not a file. That reasoning-gym has
    such a dataset is not checked here."""
    return task_set in TASK_SETS or bool(re.fullmatch(rf"{GYM}\w+", task_set))


def _text(name: str, value: Any) -> str | None:
    if isinstance(value, Path):
        return str(value)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise refusal(name, value, "a text that is not empty")


def _list(name: str, value: Any, of: str) -> list[Any]:
    if isinstance(value, str | Path) or not isinstance(value, Iterable):
        raise refusal(name, value, f"a list of {of}")
    return list(value)


def _tasks(name: str, value: Any) -> str | None:
    task_set = _text(name, value)
    if task_set and not has_name(task_set) and not Path(task_set).expanduser().is_file():
        raise ValueError(
            f"tasks: {task_set!r} is not a file; expected {', '.join(TASK_SETS)}, {GYM}NAME "
            f"(a dataset of reasoning-gym) or a JSONL file{did_you_mean(task_set, TASK_SETS)}"
        )
    return task_set


def check_style(style: str) -> str:
    """``style``, if it is one of :data:`STYLES` or a template; ``ValueError`` otherwise."""
    if style not in STYLES and not (isinstance(style, str) and QUESTION in style):
        raise ValueError(
            f"prompts: {style!r}, expected one of {', '.join(STYLES)} or a template with "
            f"{QUESTION} in it{did_you_mean(style, STYLES)}"
        )
    return style


def _judge(name: str, value: Any) -> str:
    kind, colon, rest = str(value).partition(":")
    if (kind in ("openai", "replay", "offline") and rest) or value in ANNOTATORS:
        return value
    registry.load_entry_points()  # one of a person's own, which may take something, too
    own = kind in registry.annotator and (rest or not colon)
    known = tuple(dict.fromkeys([*ANNOTATORS, *registry.annotator]))
    return value if own else one_of(name, value, known)


def _device(name: str, value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value)):
        raise refusal(name, value, "auto, cpu, mps, cuda[:N]")
    return value


def _coefficients(name: str, value: Any) -> tuple[float, ...] | None:
    """Sorted and distinct."""
    if value is None:
        return None
    numbers = sorted({real(name, one) or 0.0 for one in _list(name, value, "numbers")})
    if not any(numbers):
        raise refusal(name, numbers, "at least one that is not 0")
    return tuple(numbers)


def _compare(name: str, value: Any) -> tuple[str, ...]:
    """Models by the names of their entries, each once."""
    return tuple(dict.fromkeys(resolve(one).name for one in _list(name, value, "models")))


def _folders(name: str, value: Any) -> tuple[str, ...]:
    """Folders of runs; each must hold what a run leaves."""
    found = tuple(map(str, _list(name, value, "folders")))
    for folder, needed in product(found, ("run.json", "annotations.jsonl")):
        if not (Path(folder).expanduser() / needed).is_file():
            raise ValueError(
                f"folders: {folder} has no {needed}: expected the folder of a run that got as "
                "far as notebook 02"
            )
    return found


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


#: Field -> the check of its value, which also brings it into its one form.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": lambda _, value: resolve(value).name,
    "judge": _judge,
    "seed": partial(whole, least=0, optional=False),
    **dict.fromkeys(("coefficients", "control_coefficients"), _coefficients),
    "device": _device,
    "tasks": _tasks,
    "compare": _compare,
    "folders": _folders,
    **dict.fromkeys(("results", "labels", "base_url", "published", "revision", "ray"), _text),
    **dict.fromkeys(("random_directions", "n_sweep"), partial(whole, least=0)),
    **dict.fromkeys(
        (
            "n_samples", "n_evaluate", "n_compare", "max_tokens", "max_tokens_compare",
            "n_positions", "n_control", "batch_size", "workers",
        ),
        partial(whole, least=1),
    ),
    **dict.fromkeys(
        ("tensor_parallel", "pipeline_parallel"), partial(whole, least=1, optional=False)
    ),
    **dict.fromkeys(("temperature", "max_cost"), partial(real, least=0.0)),
    **{name: partial(one_of, allowed=values) for name, values in _ALLOWED.items()},
    "prompts": lambda _, value: check_style(value),
    "system": _text,
}  # fmt: skip


# -- what a value is by content ------------------------------------------------------------


def _task_identity(task_set: str) -> str:
    """The name of a set of tasks, with the version of the package that makes it; the name of a
    file and the hash of its content."""
    if not has_name(task_set):
        path = Path(task_set).expanduser()
        return f"{path.name}:{file_hash(path)[:12]}"
    if not task_set.startswith(GYM):
        return task_set
    try:
        return f"{task_set} (reasoning-gym {importlib.metadata.version('reasoning-gym')})"
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"tasks: {task_set} needs the package reasoning-gym: pip install 'stllms[gym]' "
            "(or: pip install reasoning-gym)"
        ) from None


def _judge_identity(judge: str) -> str:
    """The annotator of a run; one in a folder with the hash of what is stored there."""
    for kind, pattern in ((REPLAY, "*.jsonl"), (TRAINED, "*")):
        if judge.startswith(kind):
            return f"{kind}{_content_identity(judge.removeprefix(kind), pattern)}"
    return judge


def _content_identity(folder: str | None, pattern: str) -> str | None:
    """The name of a folder, or a file, and a hash of the names and contents of its files."""
    if folder is None:
        return None
    path = Path(folder).expanduser()
    found = [path] if path.is_file() else sorted(path.glob(pattern))
    found = [one for one in found if one.is_file()]
    files = [f"{one.name} {remembered_hash(one)}" for one in found]
    return f"{path.name}:{digest(files)[:12]}"
