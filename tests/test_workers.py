"""More than one process: the same bytes from any number of workers, killed ones included, and
their errors as the stage's own."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch

from stllms import annotation, attribution, generation, models, registry, tasks, vectors
from stllms.annotation import annotators
from stllms.config import RunConfig
from stllms.generation import chains, likelihood
from stllms.models.loading import ModelError
from stllms.records import STEERED_KEY
from stllms.runs import workers
from stllms.runs.audit import SamplingError
from stllms.runs.files import save_tensors
from stllms.runs.store import Rows
from stllms.steering import Intervention, conditions
from stllms.vectors import activations

OPTIONS = {"max_new_tokens": 32, "temperature": 0.65, "seed": 1, "progress": False}
TASKS = tasks.select("build", source="grammar", n=14, seed=0)


@pytest.fixture
def chunks(monkeypatch):
    """Small chunks, of which the last is not full."""
    monkeypatch.setattr(chains, "CHUNK", 3)
    monkeypatch.setattr(annotators, "CHUNK", 4)
    monkeypatch.setattr(conditions, "CHUNK", 2)
    monkeypatch.setattr(likelihood, "CHUNK", 7)


@pytest.fixture(scope="module")
def cluster():
    """Ray, started once for all pools; a pool that finds none starts one
    (:func:`test_an_interrupt_ends_the_workers_too`)."""
    ray = pytest.importorskip("ray")
    workers._start_ray(4, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster):
    """The embedded model with two workers, which start with the first test that asks them."""
    return models.load("tiny-thinker", workers=2)


def stages(model, folder: Path) -> dict[str, bytes]:
    """Small stages 01 to 04 with all that workers share; the bytes of their files."""
    folder.mkdir()
    responses = generation.responses(model, TASKS, store=Rows(folder / "01.jsonl"), **OPTIONS)
    labelled = annotators.annotations(
        annotation.annotator("offline"),
        responses,
        model=model,
        store=Rows(folder / "02.jsonl", annotators.KEY),
    )
    spans = [one.spans for one in labelled]
    means = activations.collect(
        model, responses, spans, batch_size=3, keep=[2], controls=2, progress=False
    )
    save_tensors(folder / "02.safetensors", means.tensors, {})
    found = vectors.difference_of_means(means, min_spans=1)
    path = folder / "03.safetensors"
    few = {"n_positions": 2, "path": path, "progress": False}
    attribution.collect(model, responses[:6], labelled[:6], found, **few)
    name = found.behaviours[0]
    every = conditions.conditions(found, {name: 3}, [-1, 1])
    store = Rows(folder / "04.jsonl", STEERED_KEY)
    steered = conditions.grid(model, TASKS[:5], every, store=store, **OPTIONS)
    store = Rows(folder / "04_likelihood.jsonl", STEERED_KEY)
    acting = conditions.by_condition(every)
    likelihood.scores(model, steered, acting, store=store, progress=False)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] == "0"}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What this process writes without workers, in one thread as they have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        chunks.__wrapped__(patch)
        yield stages(models.load("tiny-thinker"), tmp_path_factory.mktemp("local") / "run")
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_workers_writes_the_bytes_of_none(
    cluster, chunks, local, tmp_path, count
):
    model = models.load("tiny-thinker", workers=count)
    made = stages(model, tmp_path / "run")
    assert len(model.workers._actors) == count == len(processes())
    assert len(made) == 6
    assert {name: made[name] == local[name] for name in local} == dict.fromkeys(local, True)


# --- killed ----------------------------------------------------------------------------------


def processes(busy: bool = False) -> set[int]:
    """The processes of workers below this one."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::_Worker.run" if busy else "ray::_Worker"):
                found.add(process.pid)
    return found


@pytest.mark.slow
def test_killed_workers_lose_no_row_and_make_none_twice(pair, local, chunks, tmp_path):
    """Two in the middle of a part, once the first rows are there: one that works then, and the
    next that does, which has its part or makes its own."""
    killed, begun = [], threading.Event()

    class Told(Rows):
        def append(self, rows):
            super().append(rows)
            begun.set()

    def kill():
        begun.wait()
        while len(killed) < 2:
            for pid in processes(busy=True) - {*killed}:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    store = Told(tmp_path / "01.jsonl")
    generation.responses(pair, TASKS, store=store, **OPTIONS)
    killer.join(timeout=1)
    assert len(killed) == 2
    assert not processes() & {*killed}
    assert store.path.read_bytes() == local["01.jsonl"]


@pytest.mark.slow
def test_a_half_finished_store_is_completed_by_workers(pair, local, chunks, tmp_path):
    whole = Rows(tmp_path / "01.jsonl")
    generation.responses(pair, TASKS, store=whole, **OPTIONS)
    assert whole.path.read_bytes() == local["01.jsonl"]
    left = tiny.killed(
        whole, "left.jsonl", local["01.jsonl"][: len(local["01.jsonl"]) * 2 // 5]
    )
    generation.responses(pair, TASKS, store=left, **OPTIONS)
    assert left.path.read_bytes() == local["01.jsonl"]


INTERRUPTED = """
    import sys
    from pathlib import Path
    from stllms import generation, models, tasks
    from stllms.generation import chains
    from stllms.runs.store import Rows

    chains.CHUNK = 2
    many = tasks.select("build", source="grammar", n=400, seed=0)
    model = models.load("tiny-thinker", workers=2)
    store = Rows(Path(sys.argv[1]))
    generation.responses(model, many, max_new_tokens=96, store=store, progress=False)
"""


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_too(tmp_path):
    """Sent to all processes of the terminal, as Ctrl-C does."""
    pytest.importorskip("ray")
    path = tmp_path / "rows.jsonl"
    code = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(path)]
    running = subprocess.Popen(code, stderr=subprocess.PIPE, text=True, process_group=0)
    while not path.is_file() or not path.read_bytes():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    others = psutil.Process(running.pid).children(recursive=True)
    assert len([one for one in others if "ray::_Worker" in " ".join(one.cmdline())]) == 2
    for _ in range(3):  # one was not heard once, with all cores busy
        os.killpg(running.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(timeout=30)
            break
    said = running.communicate(timeout=30)[1]
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    assert not psutil.wait_procs(others, timeout=10)[1]
    assert 0 < len(Rows(path).load()) < 400


# --- errors ----------------------------------------------------------------------------------


def of_this_test(hidden, vector, coefficient):
    return (coefficient * vector).expand_as(hidden)


@pytest.mark.slow
def test_workers_know_what_a_person_registered(pair, chunks, monkeypatch):
    """Workers cannot import this file."""
    monkeypatch.setattr(registry.operator, "_known", dict(registry.operator))
    registry.operator("of this test")(of_this_test)
    push = {"direction": torch.full([pair.d_model], 0.5), "layer": 3, "coefficient": 1.0}
    asked = [
        conditions.Condition(name, 3, 1.0, Intervention(**push, operation=name), name)
        for name in ("add", "of this test")
    ]
    made = conditions.grid(pair, TASKS[:2], asked, **OPTIONS)
    ids = [one.response.output_ids for one in made]
    assert ids[0::2] == ids[1::2]
    lock = threading.Lock()
    registry.operator("locked")(lambda *_: lock)
    with pytest.raises(
        ValueError, match=r"operator 'locked' cannot be sent to workers: .*lock"
    ):
        conditions.grid(pair, TASKS[:2], asked, **OPTIONS)


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_error_of_the_stage(pair, chunks):
    push = Intervention(torch.full([pair.d_model], 3e38), 3, 10.0)
    asked = [conditions.Condition("mine", 3, 10.0, push)]
    words = "logits after 0 new tokens are not finite"
    with pytest.raises(SamplingError, match=words) as caught:
        conditions.grid(pair, TASKS, asked, **OPTIONS)
    assert type(caught.value) is SamplingError
    assert "transformers.py, line" in caught.value.__notes__[0]


@pytest.mark.slow
def test_a_model_that_was_changed_in_memory_has_no_workers(pair, chunks):
    weight = pair.hf.lm_head.weight
    weight.data[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="tiny-thinker: a worker has another weights than"):
            generation.responses(pair, TASKS, **OPTIONS)
    finally:
        weight.data[0, 0] -= 1
    with pytest.raises(TypeError, match="none is pickled"):
        pickle.dumps(pair)


def test_what_workers_need_is_said_before_anything_starts(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(workers.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ValueError, match=r"needs the package ray: pip install 'stllms\[ray\]'"
        ):
            models.load("tiny-thinker", workers=2)
    pytest.importorskip("ray")
    with pytest.raises(ModelError, match="quantization and workers exclude each other"):
        models.load("tiny-thinker", workers=2, quantization="8bit")
    model = models.load("tiny-thinker", **RunConfig(workers=3).loading)
    assert (model.workers.count, model.workers.address) == (3, None)
    assert generation.responses(model, [], **OPTIONS) == []
    assert not model.workers._actors


# --- where they run --------------------------------------------------------------------------


INF = float("inf")  # as many cards as there are: device_map


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "planned"),  # asked: how many, threads, cards
    [
        ((4, 1, 0), [4], [0], (4, 0, 1 / 4)),
        ((None, 2, 0), [9, 5], [8, 8], (6, 0, 1 / 4)),
        ((2, 1, 1), [8], [2], (2, 1, 1)),
        ((2, 1, 1), [8], [8], (2, 1, 1)),
        ((3, 1, 1), [8], [2], (3, 1 / 2, 1 / 2)),  # not 2/3: one card has no room for two
        ((None, 1, 1), [16, 16], [8, 4], (12, 1, 1)),
        ((None, 1, 1), [2, 2], [8, 4], (4, 1, 1)),
        ((None, 1, 4), [16, 16], [8, 6], (3, 4, 1)),
        ((2, 1, INF), [16], [8], (2, 4, 1)),
        ((3, 1, INF), [16, 16], [8, 4], (3, 4, 1)),
        ((None, 1, INF), [16, 16], [8, 8], (2, 8, 1)),
    ],
)
def test_all_workers_find_a_place(asked, cpus, gpus, planned):
    assert workers.plan(*asked, cpus, gpus) == planned


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "words"),
    [
        ((4, 2, 0), [4, 3], [0, 0], "4 of 2 threads do not fit into 7 CPUs"),
        ((None, 8, 0), [4], [0], "1 of 8 threads do not fit"),
        (
            (2, 1, 1),
            [4],
            [0],
            "2 of a CUDA card and 1 threads do not fit into 4 CPUs and 0 cards",
        ),
        ((3, 1, 4), [16, 16], [8, 2], "3 of 4 CUDA cards and 1 threads do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(asked, cpus, gpus, words):
    with pytest.raises(ValueError, match=words):
        workers.plan(*asked, cpus, gpus)
