"""Stage 4: steered generation, and what it did.

Takes steering vectors, their layers and tasks; gives steered responses, and from their
annotations the rows of ``steering.csv``.

* :mod:`~stllms.steering.conditions`: the conditions, and every task under every condition
* :mod:`~stllms.steering.measures`: fractions, side effects, differences from the baseline
* :mod:`~stllms.steering.dose`: dose and response, and which coefficients keep the text whole
"""

from stllms.generation.decode import Intervention
from stllms.steering.conditions import generate

__all__ = ["Intervention", "generate"]

# --- old addresses, deleted at the end
from stllms.generation import decode  # noqa: E402, F401
from stllms.records import STEERED_KEY  # noqa: E402, F401
from stllms.steering.conditions import (  # noqa: E402, F401
    CHUNK, SWEPT_CONTROLS, check, grid, plain,
    Condition as Arm, by_condition as by_arm, conditions as arms,
    control_conditions as control_arms, sweep_conditions as sweep_arms,
)  # fmt: skip
