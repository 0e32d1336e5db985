"""What runs inside vLLM's workers: our choice of a token, and what came of it.

vLLM loads this by name, in every process of its own. :class:`Choose` sees the logits of a step,
takes each row's token as our own loop does (:mod:`stllms.models.engines.sampling`) and leaves
vLLM's greedy sampler no other. :class:`Extension` is vllm-lens' worker with two more calls.
"""

from __future__ import annotations

import logging
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm_lens._worker_ext import HiddenStatesExtension

from stllms.models.engines import sampling

#: The entry of ``SamplingParams.extra_args`` that is ours.
OURS = "stllms"


@dataclass
class Seen:
    """What was seen of one row: what the audit needs of each of its tokens, and the logits
    ``[V]`` behind its prompt if it is a probe."""

    measured: list[list[float]] = field(default_factory=list)
    logits: Tensor | None = None


#: What was seen, by row; of this process, since the last :meth:`Extension.start_rows`.
_seen: dict[int, Seen] = {}


class Choose(LogitsProcessor):
    """Takes the next token of every row and rules out all others.

    The step is the number of tokens that the row has, so a row that is recomputed (preempted,
    or its prompt read in pieces) meets the same noise again, and what was measured of a step
    is what was measured last.
    """

    def __init__(self, _config: Any, _device: torch.device, _pinned: bool) -> None:
        self.rows: dict[int, tuple[dict[str, Any], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """It is not: vLLM would leave it out where all rows are greedy."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the rows to their places in the batch."""
        process_dict_updates(
            self.rows,
            batch_update,
            lambda params, _prompt, written: (params.extra_args[OURS], written),
        )

    def apply(self, logits: Tensor) -> Tensor:
        """``logits [B, V]``, of which each row keeps one."""
        if not self.rows:
            return logits
        rows = [self.rows[i] for i in range(len(logits))]
        (temperature,) = {row["temperature"] for row, _ in rows}
        numbers = [(row["key"], len(written)) for row, written in rows]
        key, step = torch.tensor(numbers, device=logits.device).unbind(-1)
        token = sampling.choose(logits, key, step, temperature)
        measured = sampling.measure(logits, token, temperature).tolist()
        for (row, written), values, own in zip(rows, measured, logits, strict=True):
            seen = _seen.setdefault(row["row"], Seen())
            seen.measured[len(written) :] = [values]
            if row["probe"]:
                seen.logits = own.to("cpu", torch.float32, copy=True)
        return logits.fill_(-math.inf).scatter_(-1, token[:, None], 0.0)


class Extension(HiddenStatesExtension):
    """vllm-lens' worker, that also says what was seen."""

    def start_rows(self) -> None:
        """Forgets what was seen, and installs what steers."""
        _seen.clear()
        _skipped.messages.clear()
        self.install_hooks()

    def seen_rows(self, rows: list[int]) -> bytes:
        """What was seen of some rows, which is forgotten, and what vllm-lens skipped: pickled
        ``{row: Seen}`` and messages."""
        found = {row: _seen.pop(row) for row in rows if row in _seen}
        return pickle.dumps((found, _skipped.messages))


class _Skipped(logging.Handler):
    """vllm-lens logs an error inside its hooks and leaves the rows of that step unsteered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


_skipped = _Skipped()
logging.getLogger("vllm_lens._worker_ext").addHandler(_skipped)
