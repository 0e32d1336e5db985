"""Stage 04: steered generation, and what it did.

Takes steering vectors, their layers and tasks; gives steered responses, and from their
annotations the rows of ``steering.csv``, which notebook 04 saves.

* :mod:`~stllms.steering.conditions`: the conditions, and every task under every condition
* :mod:`~stllms.steering.measures`: fractions, side effects, differences from the baseline, null
  intervals
* :mod:`~stllms.steering.dose`: dose and response, and which coefficients keep the text whole
"""

from stllms.models.engines.interventions import Intervention
from stllms.steering.conditions import generate

__all__ = ["Intervention", "generate"]
