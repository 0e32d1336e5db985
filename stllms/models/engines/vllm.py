"""The engine vLLM: continuous batching, with vllm-lens to steer each request by itself.

What it writes is comparable with what our loop writes, token by token in float32: the next
token is taken inside vLLM by our own :mod:`~stllms.models.engines.sampling` (``vllm_worker.py``
beside this file), so the noise is that of (seed, key, step), plain and steered rows share it,
and every chain has its audit. docs/engines.md says how to install it.

The weights are in memory once: they leave the ``transformers`` model when vLLM starts, and come
back when it is closed, which the stages do at their end.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from stllms import registry
from stllms.models.engines import sampling
from stllms.models.engines.engine import Can, Row, Written
from stllms.models.engines.interventions import fingerprint
from stllms.models.engines.probes import Items, Probed, active, different
from stllms.models.engines.transformers import SHARE, cache_bytes, free_bytes
from stllms.models.model import Model, ModelError, quiet
from stllms.runs import audit

#: Where the worker's parts are, for vLLM, which loads them by name.
WORKER = f"{__package__}.vllm_worker"
#: Rows at a time where nothing else is asked for; vLLM has fewer where memory is short.
ROWS = 256
#: The shortest context that is asked of vLLM, and tokens of a block of its cache on a CPU.
CONTEXT, BLOCK = 512, 32
#: How vLLM is to run: our process is its engine, and its older runner, which vllm-lens reads.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_F32_DEFAULT": "ieee",
}


class Vllm(Probed):
    """The engine vLLM, steered through vllm-lens: adds directions at all positions.

    Args:
        source: hub id or folder that the weights were loaded from, where that is what vLLM can
            load, too; otherwise they are saved in a temporary folder first.
        revision: of a model of the hub.
        tensor_parallel, pipeline_parallel: cards that a layer, and the layers, are spread over.

    Raises:
        ModelError: where vLLM or vllm-lens is missing, and for a model that vLLM cannot take
            over, saying what to do.
    """

    name = "vllm"
    can = Can(operators=("add",), where=("all",), watch=False)

    def __init__(
        self,
        model: Model,
        *,
        source: str | None = None,
        revision: str | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
    ) -> None:
        super().__init__(model)
        state, line = registry.vllm_here()
        if state == "missing":
            raise ModelError(f"engine vllm: {line}")
        if state == "untested":
            warnings.warn(f"engine vllm: {line}", stacklevel=2)
        if len({parameter.device for parameter in model.hf.parameters()}) > 1:
            raise ModelError(
                f"{model.name}: engine vllm spreads a model by itself: leave out device_map, "
                "and ask for tensor_parallel or pipeline_parallel"
            )
        if not all(parameter.is_floating_point() for parameter in model.hf.parameters()):
            raise ModelError(
                f"{model.name}: engine vllm takes no quantized weights: leave out quantization"
            )
        self._source, self._revision = source, revision
        self._weights = model.identity["weights"]
        self._parallel = {
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
        }
        self._saved: tempfile.TemporaryDirectory[str] | None = None
        self._llm: Any = None
        self._limits = (0, 0)

    # -- one at a time: vLLM, or the weights of the model ------------------------------------

    def _start(self, rows: int, context: int) -> None:
        """Starts vLLM with room for ``rows`` at a time and at least ``context`` tokens."""
        if self._llm is not None and self._limits[0] == rows and self._limits[1] >= context:
            return
        self.close()
        context = min(self.model.max_context, max(CONTEXT, 1 << (context - 1).bit_length()))
        source = self._from()
        memory = self._memory(rows, context)
        _release(self.model)
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        try:
            with _undisturbed():
                self._llm = vllm.LLM(
                    source,
                    revision=self._revision if source == self._source else None,
                    dtype=str(self.model.dtype).removeprefix("torch."),
                    max_num_seqs=rows,
                    max_model_len=context,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    enforce_eager=True,
                    enable_prefix_caching=True,
                    async_scheduling=False,
                    logits_processors=[f"{WORKER}:Choose"],
                    worker_extension_cls=f"{WORKER}.Extension",
                    use_tqdm_on_load=False,
                    **memory,
                    **self._parallel,
                )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"vLLM does not load {self.model.name}: {error}") from error
        finally:
            if self._llm is None:
                self._reload()
        self._limits = rows, context

    def close(self) -> None:
        """Ends vLLM, frees its memory and reads the weights of the model again."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        self._reload()

    def _from(self) -> str:
        """What vLLM loads: where the weights came from, if they are still those; else a
        temporary folder that holds them as they are now."""
        now = self.model.identity["weights"]
        if self._source is not None and now == self._weights:
            return self._source
        if self._saved is None or now != self._weights:
            self._saved = tempfile.TemporaryDirectory(prefix="stllms-vllm-")
            _save(self.model, Path(self._saved.name))
            self._weights = now
        return self._saved.name

    def _reload(self) -> None:
        """Puts the weights back into the modules that they were taken from."""
        model, source = self.model, self._source
        options: dict[str, Any] = {"local_files_only": True}
        if self._saved is not None:
            source = self._saved.name
        elif self._revision is not None or not Path(str(source)).is_dir():
            options = {"revision": self._revision}
        with quiet():
            fresh = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=model.dtype, trust_remote_code=False, **options
            )
        read = dict(fresh.named_parameters())
        for name, parameter in model.hf.named_parameters():
            parameter.data = read[name].data.to(parameter.device)
        if (now := model.identity["weights"]) != self._weights:
            raise ModelError(
                f"{model.name}: the weights at {source} are not those that were loaded "
                f"({now}, not {self._weights}): they were changed meanwhile; start again"
            )

    def _memory(self, rows: int, context: int) -> dict[str, Any]:
        """How much vLLM may take: on a card a share of what is free, else what ``rows`` of
        ``context`` tokens need, as far as it is free."""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            free += sum(p.numel() * p.element_size() for p in self.model.hf.parameters())
            return {"gpu_memory_utilization": round(SHARE * min(free, total) / total, 3)}
        row = cache_bytes(self.model.text_config, self.model.dtype, context + BLOCK)
        most = int(SHARE * free_bytes(torch.device("cpu"))) // row
        return {"kv_cache_memory_bytes": row * max(1, min(rows, most)), "block_size": BLOCK}

    # -- writing ------------------------------------------------------------------------------

    def write(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        batch_size: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int, int], Any] | None = None,
        watch: Callable[[Sequence[Sequence[int]]], Any] | None = None,
    ) -> list[Written]:
        """What is written for every row: :func:`stllms.models.engines.generate`.

        The cache of prompts is emptied first, so that what is written does not depend on
        earlier calls. Rows that are steered alike share a salt in it: keys and values behind a
        steered layer are not those of the plain model.
        """
        longest = max((len(row.prompt_ids) for row in rows), default=0)
        self._start(batch_size or ROWS, longest + max_new_tokens)
        self._llm.reset_prefix_cache()
        self._llm.collective_rpc("start_rows")
        with self._steering(different(row.interventions for row in rows)):
            return self._run(rows, max_new_tokens, temperature, seed, progress)

    @contextlib.contextmanager
    def _steering(self, sets: dict[str, Items]) -> Iterator[None]:
        """Sets of interventions, known to the workers by their names."""
        from vllm_lens import SteeringVector

        for name, items in sets.items():
            vectors = [
                SteeringVector(
                    activations=(one.coefficient * one.direction.float())[None],
                    layer_indices=[one.layer],
                )
                for one in items
            ]
            self._llm.collective_rpc("set_steering_data", args=(name, pickle.dumps(vectors)))
        try:
            yield
        finally:
            for name in sets:
                self._llm.collective_rpc("clear_steering_data", args=(name,))

    def _run(
        self,
        rows: Sequence[Row],
        limit: int,
        temperature: float,
        seed: int,
        progress: Callable[[int, int], Any] | None,
    ) -> list[Written]:
        engine = self._llm.llm_engine
        written: list[list[int]] = [[] for _ in rows]
        results: dict[int, Written] = {}
        try:
            for i, row in enumerate(rows):
                engine.add_request(str(i), *self._request(i, row, limit, temperature, seed))
            while engine.has_unfinished_requests():
                tokens, ended = 0, []
                for output in engine.step():
                    i = int(output.request_id)
                    new = output.outputs[0].token_ids
                    written[i] += new
                    if not rows[i].probe:
                        tokens += len(new)
                    if output.finished:
                        ended.append(i)
                self._collect(rows, written, ended, temperature, results)
                if progress is not None:
                    progress(tokens, sum(not rows[i].probe for i in ended))
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request([str(i) for i in range(len(rows)) if i not in results])
        return [results[i] for i in range(len(rows))]

    def _request(
        self, i: int, row: Row, limit: int, temperature: float, seed: int
    ) -> tuple[dict[str, Any], Any]:
        """What is asked for a row; vLLM samples nothing, ``Choose`` takes the token."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        prompt: dict[str, Any] = {"prompt_token_ids": list(row.prompt_ids)}
        ours = {
            "row": i,
            "key": sampling.hash_key(seed, row.key),
            "temperature": temperature,
            "probe": row.probe,
        }
        extra: dict[str, Any] = {"stllms": ours}
        if items := active(row.interventions):
            extra["_steering_id"] = prompt["cache_salt"] = fingerprint(items)
        size = self.model.text_config.vocab_size
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=1 if row.probe else limit,
            stop_token_ids=[end for end in self.model.eos_ids if end < size],
            ignore_eos=True,  # vLLM's own idea of it
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )
        return prompt, params

    def _collect(
        self,
        rows: Sequence[Row],
        written: Sequence[Sequence[int]],
        ended: list[int],
        temperature: float,
        results: dict[int, Written],
    ) -> None:
        """What the workers saw of the rows that ended."""
        if not ended:
            return
        found: dict[int, Any] = {}
        for answer in self._llm.collective_rpc("seen_rows", args=(ended,)):
            seen, skipped = pickle.loads(answer)
            if skipped:
                raise ModelError(f"vllm-lens left rows unsteered: {skipped[0]}")
            found |= seen
        for i in ended:
            its, ids = found[i], written[i]
            if len(its.measured) != len(ids):
                raise ModelError(
                    f"{rows[i].key}: vLLM wrote {len(ids)} tokens, of which "
                    f"{len(its.measured)} were chosen by us"
                )
            sums = [sum(column) for column in zip(*its.measured, strict=True)]
            if any(map(math.isnan, sums)):
                bad = [any(map(math.isnan, step)) for step in its.measured].index(True)
                raise audit.SamplingError(
                    f"{rows[i].key}: the logits after {bad} new tokens are not finite, so no "
                    "token can be drawn: use a smaller coefficient, or dtype float32"
                )
            entry = audit.entry(len(ids), temperature, sums)
            results[i] = Written(tuple(ids), entry, its.logits)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Behind it what vLLM changes in a process as it starts is as it was: the states of the
    global generators, which it seeds, and ``torch.set_num_threads``, which it replaces."""
    threads = torch.set_num_threads
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = threads
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _save(model: Model, folder: Path) -> None:
    """The weights as they are and their configuration. ``save_pretrained`` refuses those that
    were read from a GGUF file, which are ordinary numbers by now."""
    config = copy.deepcopy(model.hf.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model.hf).__name__]
    config.save_pretrained(folder)
    # Of tied weights the first name only, which vLLM looks for.
    once, every = (
        {name for name, _ in model.hf.named_parameters(remove_duplicate=alone)}
        for alone in (True, False)
    )
    kept = {
        name: tensor.contiguous()
        for name, tensor in model.hf.state_dict().items()
        if name in once or name not in every
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _release(model: Model) -> None:
    """Takes the weights out of the modules, which keep their places."""
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
