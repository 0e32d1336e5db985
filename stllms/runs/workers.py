"""The parts of a stage, here or on other processes and machines, by Ray.

A stage says what it does with a part of its work as a function of ``(model, part, tick)`` that
can be pickled, and :func:`over` gives the results in the order of the parts: made here, one
after the other, or by the workers of the model, each of which has a model of its own. The code
of a part is the same, and only this process writes files. Ray starts a worker that dies again
and gives it the part that it had; a part depends on the model and on what it holds alone, so
the result is that of a run in which none died.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import pickle
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from stllms import registry

#: Told of (tokens, rows) that are done.
Tick = Callable[[int, int], object]
#: What a stage does with a part: ``(model, part, tick)`` -> the result of the part.
Make = Callable[[Any, Any, Tick], Any]

#: Parts under way or waiting to be written, for each worker: what bounds the memory.
AHEAD = 2
#: How often a part is given to a worker again that died of it.
RETRIES = 3
#: Read when Ray is imported: it counts its users and tells of its inner life otherwise.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
#: Ends the parts.
_END = object()
#: Of the jobs of this process.
_numbers = itertools.count()


def over(model: Any, make: Make, parts: Iterable[Any], tick: Tick) -> Iterator[Any]:
    """What ``make`` gives for every part, in order; by ``model.workers``, where there are any.

    Of parts made elsewhere ``tick`` hears when they are there. What ``make`` raises is raised
    here, wherever it was.
    """
    pool: Pool | None = getattr(model, "workers", None)
    if pool is not None:
        yield from pool.map(model, make, parts, tick)
        return
    for part in parts:
        yield make(model, part, tick)


def installed() -> None:
    """Raises ``ValueError`` that says what to do where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "workers: more than one process needs the package ray: pip install 'stllms[ray]'"
        )


class Pool:
    """Ray actors, each with a model of its own; they start with the first part.

    Only one pool of a process has actors: one that starts ends those of another, so that
    the weights of one model are loaded at a time.

    Args:
        load: gives a worker its model; pickled.
        count: of workers; ``None`` takes what the cluster at ``address`` has.
        address: of a running Ray cluster; ``None`` starts one on this machine and ends it.
        cards: CUDA cards of a worker, all of one machine: 0 for the CPU, 1 (of which it gets a
            part where there are fewer than workers), more, or ``math.inf`` for as many as
            there are.
    """

    _running: ClassVar[Pool | None] = None

    def __init__(
        self,
        load: Callable[[], Any],
        count: int | None,
        address: str | None = None,
        *,
        cards: float = 0,
    ) -> None:
        installed()
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self.load, self.count, self.address, self.cards = load, count, address, cards
        #: Of a worker, whatever their number: sums in another number of threads have other
        #: last digits.
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
        self._actors: list[Any] = []
        self._ours = False

    def map(self, model: Any, make: Make, parts: Iterable[Any], tick: Tick) -> Iterator[Any]:
        """:func:`over` by the workers; ``model`` is this process's own, which theirs must
        equal. Whatever ends it early ends the workers, Ctrl-C too."""
        rest, waiting = iter(parts), deque[Any]()
        if (part := next(rest, _END)) is _END:
            return  # without starting anything
        import ray

        pickled = _pickled(make, registry.own(), model.identity)
        try:
            self._start()
            job, number = ray.put(pickled), next(_numbers)
            free, busy = deque(self._actors), dict[Any, Any]()
            while True:
                while part is not _END and free and len(waiting) < AHEAD * len(self._actors):
                    actor = free.popleft()
                    waiting.append(actor.run.remote(number, job, part))
                    busy[waiting[-1]] = actor
                    part = next(rest, _END)
                if not waiting:
                    return
                if waiting[0] in busy:
                    for ref in ray.wait([*busy])[0]:
                        free.append(busy.pop(ref))
                    continue
                found, ticked, fits, said = _result(waiting.popleft())
                model.fits = min(model.fits, fits)
                for one in said:
                    warnings.warn(f"a worker: {one}", stacklevel=2)
                tick(*ticked)
                yield found
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started for them; :meth:`map` starts them
        again."""
        import ray

        actors, self._actors = self._actors, []
        ours, self._ours = self._ours, False
        if ours:  # without a word; for a worker that is killed Ray has several
            ray.shutdown()
            return
        for actor in actors:
            ray.kill(actor)

    def _start(self) -> None:
        """Sees to it that the actors of this pool are there, and no others."""
        if self._actors:
            return
        if Pool._running is not None:
            Pool._running.close()
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not ray.is_initialized() and self.address is not None:
            try:
                ray.init(self.address, **quiet)
            except ConnectionError as error:
                raise ValueError(
                    f"workers: no Ray cluster answers at {self.address} ({error}); if it asks "
                    "for a token, RAY_AUTH_MODE=token should be in the environment"
                ) from None
        elif not ray.is_initialized():
            _start_ray((self.count or 1) * self.threads, **quiet)
            self._ours = True
        Pool._running = self
        nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        count, gpus, share = plan(
            self.count,
            self.threads,
            self.cards,
            [int(one.get("CPU", 0)) for one in nodes],
            [int(one.get("GPU", 0)) for one in nodes],
        )
        options: dict[str, Any] = {
            "num_cpus": self.threads,
            "num_gpus": gpus,
            "max_restarts": -1,
            "max_task_retries": RETRIES,
        }
        made = ray.remote(**options)(_Worker)
        self._actors = [made.remote(self.load, self.threads, share) for _ in range(count)]


def _start_ray(cpus: int, **options: Any) -> None:
    """Starts Ray on this machine, for which it gives itself half a minute: too little on one
    that has other work, so it is tried three times."""
    import ray

    for left in (2, 1, 0):
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, **options)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


def plan(
    count: int | None, threads: int, cards: float, cpus: Sequence[int], gpus: Sequence[int]
) -> tuple[int, float, float]:
    """How many workers, the CUDA cards of each, and its share of the memory of its device.

    ``count`` workers (``None``: as many as fit) of ``threads`` threads, each with ``cards``
    cards (:class:`Pool`), on machines with ``cpus`` and ``gpus``. Workers of one card that are
    more than the cards share them in equal parts. Raises ``ValueError`` where there is no room.
    """
    room = sum(n // threads for n in cpus)
    if not cards:
        count = room if count is None else count
        each, share = 0.0, 1 / max(1, min(count, max(cpus) // threads))
    else:
        sizes: list[float] = [*range(max(gpus), 1, -1)] if cards == math.inf else []
        sizes += [cards] if 1 < cards < math.inf else [1, *(1 / n for n in range(2, 9))]
        places = {size: sum(int(n / size + 1e-9) for n in gpus) for size in sizes}
        count = min(room, places[sizes[0]]) if count is None else count
        each = next((size for size in sizes if places[size] >= count), 0.0)
        share, room = min(1.0, each), room if each else 0
    if not 0 < count <= room:
        card = f"{cards:g} CUDA cards and " if 1 < cards < math.inf else "a CUDA card and "
        raise ValueError(
            f"workers: {count or 1} of {card if cards else ''}{threads} threads do not fit "
            f"into {sum(cpus)} CPUs and {sum(gpus)} cards: take fewer (or --device cpu)"
        )
    return count, each, share


def _pickled(make: Make, own: dict[tuple[str, str], Any], identity: dict[str, Any]) -> bytes:
    """A job, with the code of a person's own modules, which a worker cannot import.

    Raises ``ValueError`` naming what of a person's own cannot be sent.
    """
    from ray import cloudpickle

    found = {getattr(thing, "__module__", None) for thing in own.values()} - {"__main__"}
    modules = [sys.modules[name] for name in found if name in sys.modules]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        for (kind, name), thing in own.items():
            try:
                cloudpickle.dumps(thing)
            except Exception as error:
                raise ValueError(
                    f"{kind} {name!r} cannot be sent to workers: {error}"
                ) from error
        return cloudpickle.dumps((make, own, identity))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


class _Worker:
    """What runs in a process of its own."""

    def __init__(self, load: Callable[[], Any], threads: int, share: float) -> None:
        self.load, self.threads, self.share = load, threads, share
        self.model: Any = None
        self.identity: dict[str, Any] = {}
        self.number = -1
        self.make: Any = None

    def _take(self, number: int, job: bytes) -> None:
        """Makes ready for the parts of a job."""
        make, own, identity = pickle.loads(job)
        registry.add(own)
        if self.model is None:
            import torch

            torch.set_num_threads(self.threads)
            self.model = self.load()
            self.model.portion, self.identity = self.share, self.model.identity
        if other := [name for name, value in identity.items() if self.identity[name] != value]:
            raise ValueError(
                f"{self.model.name}: a worker has another {', '.join(other)} than the run: the "
                "same files and packages should be on every machine, and a model that was "
                "changed in memory cannot have workers"
            )
        if self.model.engine is not None:
            self.model.engine.close()  # the weights may be with it, and this job may want them
        self.number, self.make = number, make

    def run(
        self, number: int, job: bytes, part: Any
    ) -> tuple[Any, tuple[int, int], int, list[str]]:
        """The result of a part, what it ticked, :attr:`Model.fits` and the warnings."""
        if self.number != number:
            self._take(number, job)
        done = [0, 0]

        def tick(tokens: int, rows: int) -> None:
            done[:] = done[0] + tokens, done[1] + rows

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                found = self.make(self.model, part, tick)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                error.add_note(f"(in a worker, {last.filename}, line {last.lineno})")
                raise
        heard = [str(one.message) for one in said if one.category is UserWarning]
        return found, (done[0], done[1]), self.model.fits, heard


def _result(ref: Any) -> tuple[Any, tuple[int, int], int, list[str]]:
    """What a worker gave, or raises what it raised."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
    except ray.exceptions.RayError as error:
        cause = RuntimeError(
            f"a worker died {RETRIES + 1} times of one part, most often for want of memory: "
            f"take fewer workers, or a smaller batch size ({str(error).splitlines()[0]})"
        )
    raise cause
