"""Train the embedded models from nothing, measure them, write their cards.

``python training/fixtures.py train thinker`` (or ``instruct``),
``python training/fixtures.py card`` (``README.md`` and ``card.json`` of both), and
``python training/fixtures.py questions`` (those of a run, and the words of the grammar).

What a model sees is a function of the seed alone: chunk ``k`` of the data is drawn from the
grammar with its own generator, so that a run which was stopped continues where it was. The
questions of the held-out parts (:func:`training.chains.part_of`) are never drawn.

The recipe: Muon (Jordan et al., 2024, as in ``torch.optim``) for the matrices of the layers,
AdamW for the rest, linear warm-up and decay with a warm restart, loss on output tokens only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stllms.annotation.annotators import Grammar
from stllms.fixtures import grammar
from stllms.generation.chains import responses
from stllms.generation.prompts import prompt
from stllms.labels import PAPER
from stllms.models.loading import load
from stllms.records import Response, Task, to_row
from stllms.registry import FIXTURES
from stllms.steering.measures import segment_counts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training import chains, families

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% else %}" + ASSISTANT + "{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "OPENING{% endif %}"
)
#: Chains in one chunk of the data: drawn together, sorted by length, cut into batches.
CHUNK_BATCHES = 32
IGNORED = -100
KINDS = {"thinker": "thinking", "instruct": "instruct"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    style: str
    cycles: tuple[int, ...]
    batch: int = 64
    seed: int = 0
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    vocabulary: int = 1024
    context: int = 1024
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    warmup: int = 50
    weight_decay: float = 0.1
    embedding: float = 1.0

    @property
    def steps(self) -> int:
        """Optimiser steps in all: the end of the last cycle."""
        return self.cycles[-1]


#: The recipes of the shipped weights.
RECIPES = {
    "thinker": Recipe("thinker", cycles=(1000,)),
    "instruct": Recipe("instruct", cycles=(600, 1000), batch=48),
}


def sample(rng: Random, style: str) -> chains.Chain:
    """A chain of ``style`` on a question of the training part."""
    make = chains.chain if style == "thinker" else chains.plain
    while True:
        puzzle = families.draw(rng)
        if chains.part_of(puzzle.question) == "train":
            return make(rng, puzzle)


def build_tokenizer(style: str, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and R1-style special tokens, trained on both styles."""
    rng = Random(f"tokenizer/{recipe.seed}")
    texts = []
    for kind in ("thinker", "instruct") * 10_000:
        chain = sample(rng, kind)
        asked = prompt(chain.puzzle.question, KINDS[kind])
        texts.append(f"{asked}\n{chain.thinking}\n{chain.final}")
    core = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - 2,
        special_tokens=[BEGIN, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    opening = "<think>\n" if style == "thinker" else ""
    tokenizer.chat_template = _TEMPLATE.replace("OPENING", opening)
    return tokenizer


def encode(chain: chains.Chain, style: str, tokenizer) -> tuple[list[int], list[int]]:
    """(prompt ids, output ids) of a chain, as the package would see them."""
    messages = [{"role": "user", "content": prompt(chain.puzzle.question, KINDS[style])}]
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if style == "thinker":
        written = f"{chain.thinking}\n</think>\n\n{chain.final}{END}"
    else:
        written = f"{chain.thinking} {chain.final}{END}"
    ids = tokenizer([opened, written], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1]


def batches(recipe: Recipe, tokenizer, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """The batches ``(ids, targets) [B, T]`` of a chunk, right-padded, of like length."""
    rng = Random(f"{recipe.style}/{recipe.seed}/{chunk}")
    rows = []
    for _ in range(CHUNK_BATCHES * recipe.batch):
        opened, written = encode(sample(rng, recipe.style), recipe.style, tokenizer)
        targets = [IGNORED] * (len(opened) - 1) + written + [IGNORED]
        rows.append((torch.tensor(opened + written), torch.tensor(targets)))
    rows.sort(key=lambda row: len(row[0]))
    cut = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
    rng.shuffle(cut)
    padding = (tokenizer.pad_token_id, IGNORED)
    return [
        tuple(
            torch.nn.utils.rnn.pad_sequence(one, batch_first=True, padding_value=value)
            for one, value in zip(zip(*rows, strict=True), padding, strict=True)
        )
        for rows in cut
    ]


def stream(recipe: Recipe, tokenizer, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches from step ``start`` on."""
    for step in range(start, recipe.steps):
        if step == start or step % CHUNK_BATCHES == 0:
            drawn = batches(recipe, tokenizer, step // CHUNK_BATCHES)
        yield drawn[step % CHUNK_BATCHES]


def build_model(recipe: Recipe, tokenizer) -> Qwen2ForCausalLM:
    """A random model of the recipe's shape; embeddings untied (method, section 10)."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=recipe.embedding)
    return model


def optimisers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=recipe.muon_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(recipe: Recipe, step: int) -> float:
    """The share of the peak rate at ``step``.

    Linear warm-up; the first cycle is flat to its half and falls linearly to zero; each
    further one starts again at a half and falls linearly to zero (warm restarts, Loshchilov
    and Hutter 2017, arXiv 1608.03983).
    """
    begin, end = 0, recipe.cycles[0]
    for following in recipe.cycles[1:]:
        if step >= end:
            begin, end = end, following
    if begin:
        return 0.5 * (end - step) / (end - begin)
    return min(1.0, (step + 1) / recipe.warmup, (end - step) / (0.5 * end))


def train(recipe: Recipe, out: Path, *, device: str = "cpu", save_every: int = 100) -> Path:
    """Train, or go on training, and leave a model folder at ``out``.

    ``out/checkpoint.pt`` holds the state while it runs, ``out/loss.csv`` the loss of every
    tenth step.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").is_file():
        build_tokenizer(recipe.style, recipe).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = build_model(recipe, tokenizer).to(device).train()  # type: ignore[arg-type]
    steppers = optimisers(model, recipe)
    step, seen, seconds = _resume(out, model, steppers, recipe)
    bar = tqdm(total=recipe.steps, initial=step, desc=f"tiny-{recipe.style}", unit="step")
    began = time.perf_counter() - seconds
    for ids, targets in stream(recipe, tokenizer, step):
        loss = _step(model, steppers, recipe, step, ids.to(device), targets.to(device))
        seen, step = seen + int((targets != IGNORED).sum()), step + 1
        bar.update()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
            with (out / "loss.csv").open("a") as log:
                log.write(f"{step},{loss:.4f},{seen},{time.perf_counter() - began:.1f}\n")
        if step % save_every == 0 or step == recipe.steps:
            _checkpoint(out, model, steppers, recipe, step, seen, time.perf_counter() - began)
    _export(model, tokenizer, out, recipe, seen, time.perf_counter() - began, device)
    return out


def _step(model, steppers, recipe: Recipe, step: int, ids: Tensor, targets: Tensor) -> float:
    for stepper, peak in zip(steppers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        stepper.param_groups[0]["lr"] = peak * rate(recipe, step)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = targets != IGNORED
    loss = functional.cross_entropy(model.lm_head(hidden[wanted]).float(), targets[wanted])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def _checkpoint(out: Path, model, steppers, recipe: Recipe, step, seen, seconds) -> None:
    state = {
        "recipe": asdict(recipe),
        "model": model.state_dict(),
        "steppers": [stepper.state_dict() for stepper in steppers],
        "step": step,
        "seen": seen,
        "seconds": seconds,
    }
    torch.save(state, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")


def _resume(out: Path, model, steppers, recipe: Recipe) -> tuple[int, int, float]:
    path = out / "checkpoint.pt"
    if not path.is_file():
        (out / "loss.csv").write_text("step,loss,output_tokens,seconds\n")
        return 0, 0, 0.0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        changed = [k for k, v in asdict(recipe).items() if state["recipe"].get(k) != v]
        raise ValueError(f"{path} was made with another recipe ({', '.join(changed)} differ)")
    # Steps after the checkpoint are made again: their lines too.
    log = pd.read_csv(out / "loss.csv", dtype={"loss": str, "seconds": str})
    log[log["step"] <= state["step"]].to_csv(out / "loss.csv", index=False)
    model.load_state_dict(state["model"])
    for stepper, saved in zip(steppers, state["steppers"], strict=True):
        stepper.load_state_dict(saved)
    return state["step"], state["seen"], state["seconds"]


def _export(model, tokenizer, out: Path, recipe: Recipe, seen, seconds, device) -> None:
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = {
        k: v.detach().cpu().to(torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    facts = asdict(recipe) | {
        "steps": recipe.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "output_tokens": seen,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


# --- the cards ---------------------------------------------------------------------------

TEMPERATURE, TOKENS, QUESTIONS = 0.65, 256, 400

_CARD = """\
# {name}

A `Qwen2ForCausalLM` of {millions:.2f} M parameters ({layers} layers, width {hidden}), trained
from nothing on chains of the grammar in `training/chains.py`. It ships with the package so that
every notebook runs without a model hub.

**It is a fixture. Its steerability was designed in**: behaviours are persistent states of
stretches of its training chains (`training/chains.py`). What it shows is that the pipeline
works and what its instruments measure; it says nothing about whether the claims of the paper
hold for real models.

## Measured on {questions} held-out questions

| | greedy | temperature {temperature} |
|---|---|---|
| well-formed | {greedy[well_formed]:.3f} | {sampled[well_formed]:.3f} |
| answer correct | {greedy[accuracy]:.3f} | {sampled[accuracy]:.3f} |
| finished within {tokens} tokens | {greedy[finished]:.3f} | {sampled[finished]:.3f} |
| mean output tokens | {greedy[tokens]:.1f} | {sampled[tokens]:.1f} |

Share of the segments, in %:

| behaviour | greedy | temperature {temperature} |
|---|---|---|
{shares}

"Well-formed" means that every sentence is a wording of the grammar with known words in its slot
(their order is not checked), that the thinking is closed (thinker) and that the turn ended. The
text of the questions was never seen in training; their families were. Greedy decoding is a poor
read-out of the behaviours: by the design of the wordings each but the deductions is spread over
many first words, none of which is the likeliest.

## Training

Data: chains drawn on the fly from the grammar (`Random("{style}/{seed}/chunk")`), the questions
whose hash falls into the held-out fifth left out. {steps} steps of {batch} chains,
{output_tokens:,} output tokens, {minutes:.0f} minutes of wall time on {device} ({threads}
thread(s) of a machine with other work, torch {torch}), mean loss of the last hundred steps
{loss:.4f} nats a token. Made again by `python training/fixtures.py train {style}`; `loss.csv`
is the log.

Written by `python training/fixtures.py card`. Licence: MIT, as the package.
"""


def measure(made: list[Response], tasks: list[Task], style: str) -> dict[str, Any]:
    """Shares of well-formed, correct and finished responses, lengths, shares of segments."""
    thinker = style == "thinker"
    annotations = Grammar().annotate(made)
    counts = segment_counts(annotations).sum(0)
    answers = [grammar.read_answer(item.answer if thinker else item.text) for item in made]
    right = [a == task.answer for a, task in zip(answers, tasks, strict=True)]
    return {
        "well_formed": np.mean([grammar.well_formed(r, thinker=thinker) for r in made]),
        "accuracy": np.mean(right),
        "finished": np.mean([item.finished for item in made]),
        "tokens": np.mean([len(item.output_ids) for item in made]),
        "shares": dict(zip(PAPER.names, (counts / counts.sum()).tolist(), strict=True)),
    }


def card(folder: Path, style: str, questions: int = QUESTIONS) -> dict[str, Any]:
    """Measure the model in ``folder`` and write its card there; returns the numbers."""
    model = load(folder.name if folder.parent == FIXTURES else str(folder), device="cpu")
    tasks = chains.tasks("evaluate", questions)
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        made = responses(model, tasks, max_new_tokens=TOKENS, temperature=temperature, seed=0)
        found[name] = measure(made, tasks, style)
    training = json.loads((folder / "training.json").read_text())
    numbers = {"questions": questions, "temperature": TEMPERATURE, "tokens": TOKENS} | found
    loss = pd.read_csv(folder / "loss.csv")["loss"].tail(10).mean()
    greedy, sampled = found["greedy"]["shares"], found["sampled"]["shares"]
    shares = "\n".join(
        f"| {b} | {100 * greedy[b]:.1f} | {100 * sampled[b]:.1f} |" for b in PAPER.names
    )
    text = _CARD.format(
        **training,
        **numbers,
        name=f"tiny-{style}",
        shares=shares,
        loss=loss,
        millions=training["parameters"] / 1e6,
        minutes=training["seconds"] / 60,
    )
    (folder / "README.md").write_text(text)
    (folder / "card.json").write_text(json.dumps(numbers, indent=1, default=float) + "\n")
    return numbers


# --- the questions -----------------------------------------------------------------------

#: Questions of each held-out part that ship: those of the largest profile.
PARTS = {"build": 1000, "evaluate": 400}


def questions(folder: Path) -> None:
    """Write the questions of each part to ``folder``, and print what the slots can hold."""
    for part, count in PARTS.items():
        rows = (json.dumps(_without_chat(task)) for task in chains.tasks(part, count))
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("vocabulary, for lexicon.toml:", *sorted(chains.vocabulary()))


def _without_chat(task: Task) -> dict[str, Any]:
    """The row of a task that is its ``content`` alone."""
    return {name: value for name, value in to_row(task).items() if name != "messages"}


# --- the command -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one of the two models")
    one.add_argument("style", choices=sorted(RECIPES))
    one.add_argument("--out", type=Path, help="folder (default training-runs/tiny-STYLE)")
    one.add_argument("--steps", type=int, help="optimiser steps (default: the shipped recipe)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two = commands.add_parser("card", help="measure both models and write their cards")
    two.add_argument("--folder", type=Path, default=FIXTURES, help="where their folders are")
    two.add_argument("--questions", type=int, default=QUESTIONS)
    three = commands.add_parser("questions", help="write the questions that ship")
    three.add_argument("--folder", type=Path, default=FIXTURES, help="where they go")
    given = parser.parse_args(argv)
    if given.command == "questions":
        return questions(given.folder)
    if given.command == "train":
        shipped = RECIPES[given.style]
        cycles = (given.steps,) if given.steps else shipped.cycles
        recipe = replace(shipped, cycles=cycles, seed=given.seed)
        out = given.out or Path("training-runs") / f"tiny-{given.style}"
        print(f"wrote {train(recipe, out, device=given.device)}")
        return None
    for style in RECIPES:
        numbers = card(given.folder / f"tiny-{style}", style, given.questions)
        print(f"tiny-{style}", json.dumps(numbers, default=lambda x: round(float(x), 3)))


if __name__ == "__main__":
    main()
