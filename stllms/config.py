"""What a run is: the profiles and the frozen ``RunConfig`` (and, handed on, the registry).

Nothing here imports torch: the runner reads a configuration and says "nothing to do"
within a second. Every option of METHOD, section 11, has a name in :data:`CHOICES`; the models
are in :mod:`stllms.registry`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stllms import checks, gym, registry
from stllms.registry import MODELS, PACKAGE, ModelEntry, UnknownModel, repository, resolve, slug

__all__ = [
    "CHOICES", "MODELS", "PACKAGE", "PARAMETERS", "PROFILES", "ModelEntry", "Profile",
    "RunConfig", "UnknownModel", "repository", "resolve", "slug",
]  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """The one dial: how much a run does.

    Numbers of tasks to build directions from, to evaluate steering on and to compare models
    on; limits in new tokens; ``temperature`` 0 is greedy; ``coefficients`` of steering (0 is
    the plain chain); ``random_directions`` is how many control directions are the null;
    ``n_sweep`` tasks are also steered at every layer of an embedded model (others sweep only
    when told to). Exact layer effects are measured at ``n_positions`` positions a behaviour;
    with a judge, control directions are added on ``n_control`` of the tasks (``None``: on all).
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


_THREE = (-1.0, 0.0, 1.0)

# ``n_positions``: over positions, exact effects scatter about as much as their mean (sd / mean
# 1.05 for deduction and .67 for adding-knowledge, median over the layers of smollm2), so that a
# mean over 64, 200 or 400 of them has a standard error of about 13, 7 or 5 %.

PROFILES: dict[str, Profile] = {
    "smoke": Profile(16, 8, 8, 96, 96, 0.65, _THREE, 2, 0, 64),
    "default": Profile(200, 60, 60, 256, 256, 0.65, _THREE, 10, 20, 200),
    "full": Profile(1000, 400, 400, 256, 256, 0.65, (-2.0, -1.0, 0.0, 1.0, 2.0), 20, 60, 400),
    "paper": Profile(500, 50, 100, 1000, 2000, 0.0, _THREE, 10, 0, 400, 10),
}

#: METHOD, section 11: option -> (the default, the published procedure). The published reader
#: also keeps unknown labels as they are, where the default one rejects and counts them.
CHOICES: dict[str, tuple[str, str]] = {
    "reader": ("tolerant", "published"),
    "prompts": ("sound", "published"),
    "objective": ("kl", "published"),
    "positions": ("own", "published"),
    "retokenise": ("generated", "published"),
    "empty_chains": ("apart", "published"),
}

#: Kinds of control directions; ``matched`` is shuffled and covariance in turn.
CONTROLS = ("matched", "shuffled", "covariance", "isotropic")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = (None, "8bit", "4bit")
ANNOTATORS = ("auto", "grammar", "lexical", "offline", "openai:MODEL", "replay:FOLDER")

#: The literals of every notebook's ``parameters`` cell, in order.
PARAMETERS = (
    "model", "profile", "judge", "results", "seed", "n_samples", "max_tokens", "options",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """One run of the five notebooks on one model, validated when it is made.

    A value of ``None`` takes the profile's (:attr:`settings` holds the resolved ones).
    ``model`` is normalised to its entry's name. ``n_samples`` is the number of tasks the
    directions are built from. ``tasks`` is ``None`` (the grammar for an embedded model, else
    ``messages``), one of these two names, ``gym:NAME`` for a dataset of reasoning-gym, or the
    path of a JSONL file. ``compare`` names the other models of notebook 05, ``folders`` the
    folders of runs whose chains it takes as they are. ``max_cost`` bounds each folder of
    replies: what a model's judge costs, and what an API model costs. Raises ``ValueError`` that
    says which field is wrong, what it was and what is expected; :class:`UnknownModel` for a
    model.
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
    controls: str = "matched"
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    tasks: str | None = None
    base_url: str | None = None
    max_cost: float | None = None
    published: str | None = None
    revision: str | None = None
    compare: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    reader: str = "tolerant"
    prompts: str = "sound"
    objective: str = "kl"
    positions: str = "own"
    retokenise: str = "generated"
    empty_chains: str = "apart"

    def __post_init__(self) -> None:
        self._set("model", resolve(self.model).name)
        checks.one_of("profile", self.profile, tuple(PROFILES))
        checks.whole("seed", -1 if self.seed is None else self.seed, least=0)
        for name in ("random_directions", "n_sweep"):
            checks.whole(name, getattr(self, name), least=0)
        for name in (
            "n_samples",
            "n_evaluate",
            "n_compare",
            "max_tokens",
            "max_tokens_compare",
            "n_positions",
            "n_control",
            "batch_size",
        ):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("temperature", "max_cost"):
            self._set(name, checks.real(name, getattr(self, name), least=0.0))
        self._set("coefficients", checks.coefficients(self.coefficients))
        checks.one_of("controls", self.controls, CONTROLS)
        checks.one_of("dtype", self.dtype, DTYPES)
        checks.one_of("quantization", self.quantization, QUANTIZATIONS)
        for name, values in CHOICES.items():
            checks.one_of(name, getattr(self, name), values)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(self.device)):
            raise ValueError(f"device: {self.device!r}, expected auto, cpu, mps, cuda[:N]")
        self._check_judge()
        self._check_texts()
        self._set("compare", self._compare())
        self._set("folders", checks.run_folders(self.folders))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_judge(self) -> None:
        plain = ANNOTATORS[:4]
        if self.judge not in plain and not re.fullmatch(r"(openai|replay):.+", str(self.judge)):
            raise ValueError(f"judge: {self.judge!r}, expected one of {', '.join(ANNOTATORS)}")
        if self.judge == "grammar" and not self.embedded:
            raise ValueError(
                f"judge: 'grammar' knows the chains of the embedded models only, not those of "
                f"{self.model}; expected lexical, offline, openai:MODEL or replay:FOLDER"
            )

    def _check_texts(self) -> None:
        for name in ("results", "base_url", "published", "revision", "tasks"):
            value = getattr(self, name)
            if isinstance(value, Path):
                self._set(name, str(value))
            elif value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"{name}: {value!r}, expected a text that is not empty")
        checks.task_file(self.task_set)
        if self.task_set.startswith(checks.GYM):
            gym.check(self.task_set)

    def _compare(self) -> tuple[str, ...]:
        """The other models by entry name, each once; an embedded model's default: its pair."""
        if isinstance(self.compare, str):
            raise ValueError(f"compare: {self.compare!r}, expected a list of models")
        names = dict.fromkeys(resolve(name).name for name in self.compare)
        return tuple(name for name in names if name != self.model)

    @cached_property
    def entry(self) -> ModelEntry:
        """The registry entry of ``model``."""
        return resolve(self.model)

    @property
    def embedded(self) -> bool:
        """Whether the model is one of the package's own fixtures."""
        return resolve(self.model).source == "embedded"

    @property
    def annotator(self) -> str:
        """The judge; ``auto`` is ``grammar`` for embedded models, ``offline`` for others."""
        if self.judge != "auto":
            return self.judge
        return self.preview

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
    def preview(self) -> str:
        """The annotator that colours chains where no judge should be paid."""
        return "grammar" if self.embedded else "offline"

    @property
    def task_set(self) -> str:
        """``tasks`` with ``None`` resolved: ``grammar`` or ``messages``."""
        return self.tasks or ("grammar" if self.embedded else "messages")

    @property
    def models(self) -> tuple[str, ...]:
        """The models of notebook 05: this one, then ``compare``.

        Without ``compare``, an embedded model is compared with its pair, and with ``smollm2``
        where its extra is installed and the judge can label its chains for nothing.
        """
        if self.compare or not self.embedded:
            return (self.model, *self.compare)
        free = self.judge in ("auto", "lexical", "offline")
        real = free and not registry.missing_packages("smollm2")
        return (self.model, self.entry.pair, *(("smollm2",) if real else ()))

    @cached_property
    def settings(self) -> Profile:
        """The profile with this configuration's own values put in.

        A profile asks for no more tasks than ``messages/`` has. ``max_tokens`` alone also
        limits the comparison. Only embedded models sweep their layers without being told.
        """
        own = {item.name: getattr(self, item.name, None) for item in fields(Profile)}
        own["n_build"] = self.n_samples
        own["max_tokens_compare"] = self.max_tokens_compare or self.max_tokens
        own["n_sweep"] = 0 if self.n_sweep is None and not self.embedded else self.n_sweep
        given = {name: value for name, value in own.items() if value is not None}
        profile, sizes = PROFILES[self.profile], checks.SIZES.get(self.task_set, {})
        there = {name: min(n, getattr(profile, name)) for name, n in sizes.items()}
        return replace(profile, **(there | given))

    @property
    def results_folder(self) -> Path:
        """``results``, else ``STLLMS_RESULTS``, else the checkout's or ``./results``."""
        chosen = self.results or os.environ.get("STLLMS_RESULTS")
        if chosen:
            return Path(chosen).expanduser().resolve()
        root = repository()
        return (root or Path.cwd()) / "results"

    @property
    def folder(self) -> Path:
        """The run's folder, ``results/<slug>``."""
        return self.results_folder / slug(self.model)

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run (DESIGN, artefacts), as plain JSON values.

        Another value of any of these needs a folder of its own or ``--fresh``. Device,
        batch size and commit are recorded, not compared; the dtype is known once the model is
        loaded (:meth:`stllms.artifacts.Folder.made_with`). Coefficients, control directions,
        objective, positions and the compared models are part of the row keys or of the stage
        (:meth:`stage_options`), so that they can be added to later.
        """
        content = registry.content_of(self.entry)
        return {
            "model": self.model,
            **content,
            "revision": self.revision or content["revision"],
            "quantization": self.quantization,
            "tasks": checks.task_identity(self.task_set),
            "seed": self.seed,
            "n_build": self.settings.n_build,
            "n_evaluate": self.settings.n_evaluate,
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
            "annotator": checks.judge_identity(self.annotator),
            "prompts": self.prompts,
            "reader": self.reader,
            "retokenise": self.retokenise,
        }

    def comparison_identity(self) -> dict[str, Any]:
        """:meth:`identity` of this model's rows under ``results/comparison/``."""
        own = ("n_build", "n_evaluate", "max_tokens", "retokenise")
        shared = {name: value for name, value in self.identity().items() if name not in own}
        return {
            **shared,
            "n_compare": self.settings.n_compare,
            "max_tokens_compare": self.settings.max_tokens_compare,
        }

    def for_model(self, name: str) -> RunConfig:
        """The same run on another model (notebook 05); ``self`` for this one."""
        entry = resolve(name)
        if entry.name == self.model:
            return self
        return replace(self, model=entry.name, compare=(), revision=None)

    def stage_options(self, stage: str) -> dict[str, Any]:
        """What changes the artefacts of a stage (``"03_…"``) beyond :meth:`identity`."""
        controls = {
            "controls": self.controls,
            "random_directions": self.settings.random_directions,
        }
        options: dict[str, dict[str, Any]] = {
            "02": controls,
            "03": {
                **controls,
                "n_positions": self.settings.n_positions,
                "objective": self.objective,
                "positions": self.positions,
                "published": checks.content_identity(self.published, "*.pt"),
            },
            "04": {
                "coefficients": list(self.settings.coefficients),
                **controls,
                "n_control": self.settings.n_control if self.judged else None,
                "n_sweep": self.settings.n_sweep,
                "empty_chains": self.empty_chains,
            },
            "05": {
                "models": list(self.models),
                "folders": [checks.content_identity(one, "*.jsonl") for one in self.folders],
                "n_compare": self.settings.n_compare,
                "max_tokens_compare": self.settings.max_tokens_compare,
                "empty_chains": self.empty_chains,
                "published": checks.content_identity(self.published, "*.json"),
            },
        }
        return options.get(stage[:2], {})

    # Temporary: the owner of `runs` writes these; take that version at the merge.
    @property
    def loading(self) -> dict[str, Any]:
        names = ("device", "dtype", "quantization", "revision")
        return {name: getattr(self, name) for name in names}

    @property
    def decoding(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.settings.max_tokens,
            "batch_size": self.batch_size,
            "temperature": self.settings.temperature,
            "seed": self.seed,
            "style": self.prompts,
        }

    @property
    def annotating(self) -> dict[str, Any]:
        reader = {"reader": self.reader}
        if self.annotator.startswith("openai:"):
            paid = {"base_url": self.base_url, "max_cost": self.max_cost}
            return {**paid, "folder": self.folder / "judge", **reader}
        return reader if self.annotator.startswith("replay:") else {}

    def tasks_of(self, part: str) -> dict[str, Any]:
        n = {
            "build": self.settings.n_build,
            "evaluate": self.settings.n_evaluate,
            "compare": self.settings.n_compare,
        }
        if part not in n:
            raise ValueError(f"unknown part {part!r} of a run: choose one of {', '.join(n)}")
        skip = self.settings.n_build if part == "evaluate" else 0
        return {"source": self.task_set, "n": n[part], "skip": skip, "seed": self.seed}

    @property
    def n_control_tasks(self) -> int | None:
        return self.settings.n_control if self.judged else None

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def to_json(self) -> str:
        """Every field as JSON text; :meth:`from_json` is the inverse."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """A configuration from field names and values; unknown names are refused."""
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=3) or known
                raise ValueError(f"unknown option {name!r}; expected: {', '.join(close)}")
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The inverse of :meth:`to_json`; ``ValueError`` for text that is no configuration."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a configuration is a JSON object, not {type(values).__name__}")
        return cls.from_dict(values)

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
        """The inverse of :meth:`from_parameters`; paths are made absolute."""
        values = {name: checks.absolute(name, value) for name, value in self.to_dict().items()}
        values["results"] = str(self.results_folder)
        cell = {name: values.pop(name) for name in PARAMETERS if name != "options"}
        defaults = RunConfig().to_dict()
        cell["options"] = {
            name: value for name, value in values.items() if value != defaults[name]
        }
        return cell

from stllms.checks import (  # noqa: E402, F401
    GYM, SIZES, TASK_SETS, absolute, coefficients, content_identity, hardware, has_name, judge_identity, one_of, real, run_folders, task_file, task_identity, whole,
)
