"""Train the embedded models from nothing: ``python -m stllms.organism.train thinker``.

What a model sees is a function of the seed alone: chunk ``k`` of the data is drawn from the
grammar with its own generator, so a run that was stopped continues where it was and the
repository is enough to make the weights again. The questions of the held-out parts
(:func:`stllms.organism.grammar.part_of`) are never drawn.

The recipe, from DESIGN.md's study: Muon (Jordan et al., 2024, as in ``torch.optim``) for the
matrices of the layers, AdamW for the rest, linear warm-up and decay with a warm restart, loss
on the output tokens only. For the steps of ``noise_steps``, half of the rows get a random
vector added to the residual stream of one layer, the same at every position and up to a fifth
longer than the stream itself: it makes the text sturdy against directions that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stllms.organism import families, grammar
from stllms.prompts import prompt

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
    noise_steps: tuple[int, int] = (0, 0)
    noise_share: float = 0.5
    noise_scale: float = 1.2

    @property
    def steps(self) -> int:
        """Optimiser steps in all: the end of the last cycle."""
        return self.cycles[-1]


#: The recipes of the shipped weights.
RECIPES = {
    "thinker": Recipe("thinker", cycles=(1500, 2700), batch=40, noise_steps=(500, 2000)),
    "instruct": Recipe("instruct", cycles=(800, 1500), batch=32, noise_steps=(300, 800)),
}


def sample(rng: Random, style: str) -> grammar.Chain:
    """A chain of ``style`` on a question of the training part."""
    make = grammar.chain if style == "thinker" else grammar.plain
    while True:
        puzzle = families.draw(rng)
        if grammar.part_of(puzzle.question) == "train":
            return make(rng, puzzle)


def build_tokenizer(style: str, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and R1-style special tokens, trained on both styles."""
    rng = Random(f"tokenizer/{recipe.seed}")
    texts = []
    for kind in ("thinker", "instruct") * 10_000:
        chain = sample(rng, kind)
        texts.append(f"{prompt(chain.content, KINDS[kind])}\n{chain.thinking}\n{chain.final}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
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
    tokenizer.chat_template = _TEMPLATE.replace(
        "OPENING", "<think>\n" if style == "thinker" else ""
    )
    return tokenizer


def encode(chain: grammar.Chain, style: str, tokenizer) -> tuple[list[int], list[int]]:
    """(prompt ids, output ids) of a chain, as :mod:`stllms.generate` would see them."""
    messages = [{"role": "user", "content": prompt(chain.content, KINDS[style])}]
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
    rows = [
        encode(sample(rng, recipe.style), recipe.style, tokenizer)
        for _ in range(CHUNK_BATCHES * recipe.batch)
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    cut = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
    rng.shuffle(cut)
    return [_pad(rows, tokenizer.pad_token_id) for rows in cut]


def _pad(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(p) + len(o) for p, o in rows)
    ids = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), IGNORED)
    for row, (opened, written) in enumerate(rows):
        stop = len(opened) + len(written)
        ids[row, :stop] = torch.tensor(opened + written)
        targets[row, len(opened) - 1 : stop - 1] = torch.tensor(written)
    return ids, targets


def stream(recipe: Recipe, tokenizer, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches from step ``start`` on."""
    for step in range(start, recipe.steps):
        if step == start or step % CHUNK_BATCHES == 0:
            drawn = batches(recipe, tokenizer, step // CHUNK_BATCHES)
        yield drawn[step % CHUNK_BATCHES]


def build_model(recipe: Recipe, tokenizer) -> Qwen2ForCausalLM:
    """A random model of the recipe's shape; embeddings untied (METHOD, section 10, 5)."""
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
    return Qwen2ForCausalLM(config)


@contextmanager
def noise(model: Qwen2ForCausalLM, layer: int, vectors: Tensor) -> Iterator[None]:
    """Add ``vectors [B, 1, D]``, in units of the stream's mean norm, after ``layer``."""

    def add(_module, _inputs, output):
        return output + vectors.to(output.dtype) * output.detach().norm(dim=-1).mean()

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def random_vectors(rows: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """``[B, 1, D]``: for a share of the rows a random direction of norm up to the scale."""
    vectors = functional.normalize(
        torch.randn(rows, 1, recipe.hidden, generator=generator), dim=-1
    )
    length = torch.rand(rows, 1, 1, generator=generator) * recipe.noise_scale
    chosen = torch.rand(rows, 1, 1, generator=generator) < recipe.noise_share
    return vectors * length * chosen


def optimisers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=recipe.muon_rate, weight_decay=0.0, momentum=0.95),
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
    tokenizer = _tokenizer(recipe, out)
    model = build_model(recipe, tokenizer).to(device).train()
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
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    layer = int(torch.randint(recipe.layers, (), generator=generator))
    vectors = random_vectors(len(ids), recipe, generator).to(ids.device)
    if not recipe.noise_steps[0] <= step < recipe.noise_steps[1]:
        vectors = torch.zeros_like(vectors)
    with noise(model, layer, vectors):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = targets != IGNORED
    loss = functional.cross_entropy(model.lm_head(hidden[wanted]).float(), targets[wanted])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def _tokenizer(recipe: Recipe, out: Path):
    if not (out / "tokenizer.json").is_file():
        build_tokenizer(recipe.style, recipe).save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


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
    head, *log = (out / "loss.csv").read_text().splitlines(keepends=True)
    kept = [line for line in log if int(line.split(",")[0]) <= state["step"]]
    (out / "loss.csv").write_text("".join([head, *kept]))
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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.organism.train", description=__doc__
    )
    parser.add_argument("style", choices=sorted(RECIPES), help="which of the two models")
    parser.add_argument("--out", type=Path, help="folder (default training-runs/tiny-STYLE)")
    parser.add_argument(
        "--steps", type=int, help="optimiser steps (default: the shipped recipe)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    shipped = RECIPES[options.style]
    cycles = (options.steps,) if options.steps else shipped.cycles
    recipe = replace(shipped, cycles=cycles, seed=options.seed)
    out = options.out or Path("training-runs") / f"tiny-{options.style}"
    print(f"wrote {train(recipe, out, device=options.device)}")


if __name__ == "__main__":
    main()
