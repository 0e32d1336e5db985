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
import math
import os
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
#: Ends the parts.
_END = object()


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
        cards: the most CUDA cards that a worker can use; 0 runs it on the CPU.
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

        self._start()
        try:
            job = ray.put((make, registry.own(), model.identity))
            free, busy = deque(self._actors), dict[Any, Any]()
            while True:
                while part is not _END and free and len(waiting) < AHEAD * len(self._actors):
                    actor = free.popleft()
                    waiting.append(actor.run.remote(job, part))
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
        for actor in actors:
            ray.kill(actor)
        if self._ours:
            ray.shutdown()
        self._ours, Pool._running = False, None

    def _start(self) -> None:
        """Sees to it that the actors of this pool are there, and no others."""
        if self._actors:
            return
        if Pool._running is not None:
            Pool._running.close()
        import ray

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            if self.address is None:
                quiet |= {
                    "num_cpus": (self.count or 1) * self.threads,
                    "include_dashboard": False,
                }
            ray.init(self.address or "local", **quiet)
            self._ours = True
        Pool._running = self
        there = ray.cluster_resources()
        count, gpus, share = plan(
            self.count, self.threads, self.cards, there.get("CPU", 0), there.get("GPU", 0)
        )
        options = {
            "num_cpus": self.threads,
            "num_gpus": gpus,
            "max_restarts": -1,
            "max_task_retries": RETRIES,
        }
        made = ray.remote(**options)(_Worker)
        self._actors = [made.remote(self.load, self.threads, share) for _ in range(count)]


def plan(
    count: int | None, threads: int, cards: float, cpus: float, gpus: float
) -> tuple[int, float, float]:
    """How many workers, the CUDA cards of each, and its share of the memory of its device.

    ``count`` workers (``None``: one a card, or one for every ``threads`` CPUs) of ``threads``
    threads, each with at most ``cards`` cards, on ``cpus`` and ``gpus``. Several workers share
    a card in equal whole parts, so that all find a place. Raises ``ValueError`` for a cluster
    that is too small.
    """
    if cards and not gpus:
        raise ValueError("workers: the cluster has no CUDA card: take --device cpu")
    if count is None:
        count = int(gpus // min(cards, gpus) if cards else cpus // threads)
    if not count or count * threads > cpus:
        raise ValueError(
            f"workers: {count or 'any'} of {threads} threads do not fit into the {cpus:g} CPUs "
            "of the cluster: take fewer, or set OMP_NUM_THREADS"
        )
    if not cards:
        return count, 0, 1 / count
    if gpus >= count:
        return count, min(cards, gpus // count), 1.0
    if cards > 1:
        raise ValueError(
            f"workers: {count} of several cards do not fit into the {gpus:g} of the cluster"
        )
    on_a_card = math.ceil(count / gpus)
    return count, 1 / on_a_card, 1 / on_a_card


class _Worker:
    """What runs in a process of its own."""

    def __init__(self, load: Callable[[], Any], threads: int, share: float) -> None:
        self.load, self.threads, self.share = load, threads, share
        self.model: Any = None
        self.identity: dict[str, Any] = {}

    def run(
        self, job: tuple[Make, dict[str, dict[str, Any]], dict[str, Any]], part: Any
    ) -> tuple[Any, tuple[int, int], int, list[str]]:
        """The result of a part, what it ticked, :attr:`Model.fits` and the warnings."""
        make, own, identity = job
        registry.add(own)
        if self.model is None:
            import torch

            torch.set_num_threads(self.threads)
            self.model = self.load()
            self.model.share, self.identity = self.share, self.model.identity
        if other := [name for name, value in identity.items() if self.identity[name] != value]:
            raise ValueError(
                f"{self.model.name}: a worker has another {', '.join(other)} than the run: the "
                "same files and packages should be on every machine, and a model that was "
                "changed in memory cannot have workers"
            )
        done = [0, 0]

        def tick(tokens: int, rows: int) -> None:
            done[:] = done[0] + tokens, done[1] + rows

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                found = make(self.model, part, tick)
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
    except ray.exceptions.RayActorError as error:
        cause = RuntimeError(
            f"a worker died {RETRIES + 1} times of one part, most often for want of memory: "
            f"take fewer workers, or a smaller batch size ({str(error).splitlines()[0]})"
        )
    raise cause
