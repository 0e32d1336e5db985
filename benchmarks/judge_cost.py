"""What a judge would cost for the chains of notebooks 02 and 04, by the runner's own estimate.

    python benchmarks/judge_cost.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B

Nothing is sent and no model is loaded. Every chain is as long as the profile's limit, the most
that it can be (:mod:`stllms.app.preflight`); once with the controls on all tasks and once on
``n_control``, by both protocols.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace

from stllms.app import preflight
from stllms.config import PROFILES, RunConfig


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    options.add_argument("--profile", default="paper", choices=list(PROFILES))
    options.add_argument("--judge", default="gpt-4.1")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as results:
        setup = RunConfig(model=given.model, profile=given.profile, results=results)
        for judge in (given.judge, f"{given.judge}#indexed"):
            own = replace(setup, judge=f"openai:{judge}")
            everything = replace(own, n_control=own.settings.n_evaluate)
            for words, one in (("controls on all tasks", everything), ("as it is", own)):
                print(f"{judge}, {words}:")
                jobs = [(stage, one) for stage in ("02_train_vectors", "04_steer")]
                print(preflight.table(preflight.works(jobs)))


if __name__ == "__main__":
    main()
