"""What a judge would cost for the chains of notebooks 02 and 04, by the judge's own estimate.

    python benchmarks/judge_cost.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B

Nothing is sent and no model is loaded. The chains are made up, all as long as the profile's
limit, which is the most that they can have; their number is that of the conditions which
notebook 04 would write, once with the controls on all tasks and once on ``n_control``.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace

import torch

from stllms import steering, tasks
from stllms.annotate.judge import Judge
from stllms.config import PROFILES, RunConfig
from stllms.records import STEERED, Response
from stllms.vectors import Controls, SteeringVectors

#: Characters of a token of English, as the judge's estimate takes it.
CHARACTERS = 4


def chains(n: int, tokens: int) -> list[Response]:
    """Different texts of ``tokens`` tokens."""
    texts = (f"{i:08d}" + "word " * (CHARACTERS * tokens // 5) for i in range(n))
    return [
        Response(str(i), "", "", (), (), text, text, 0, "", True, True)
        for i, text in enumerate(texts)
    ]


def numbers(setup: RunConfig) -> dict[str, int]:
    """Chains to be judged: to build from, of the conditions, of the controls."""
    layers = setup.entry.steering_layers or dict.fromkeys(STEERED, 0)
    ones = torch.ones(len(STEERED), 1 + max(layers.values()), 1)
    made = SteeringVectors(STEERED, ones, ones, ones[0], torch.ones(len(STEERED)))
    settings = setup.settings
    names = tuple(f"shuffled:{i}" for i in range(settings.random_directions))
    null = Controls(names, ones[:1].expand(len(names), -1, -1))
    asked = tasks.for_run(setup, "evaluate")
    some = tasks.for_controls(setup, asked)
    conditions = steering.arms(made, layers, settings.coefficients)
    controls = steering.control_arms(null, layers, settings.coefficients)
    return {
        "build": settings.n_build,
        "conditions": len(asked) * len(conditions),
        "controls": len(some) * len(controls),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    options.add_argument("--profile", default="paper", choices=list(PROFILES))
    options.add_argument("--judge", default="gpt-4.1")
    given = options.parse_args()
    setup = RunConfig(model=given.model, profile=given.profile, judge=f"openai:{given.judge}")
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(given.judge, folder=folder)
        everything = replace(setup, n_control=setup.settings.n_evaluate)
        for words, one in (("controls on all tasks", everything), ("as it is", setup)):
            found = numbers(one)
            n = sum(found.values())
            parts = ", ".join(f"{name} {count}" for name, count in found.items())
            estimate = judge.estimate(chains(n, one.settings.max_tokens))
            print(f"{words}: {n} chains ({parts}): {estimate}")


if __name__ == "__main__":
    main()
