"""Stage 03: at which layer a direction matters to the next token.

Takes responses, their annotations and steering vectors with their control directions; gives
:class:`~.effects.LayerEffects`, and from these curves and the layer to steer at.

* :mod:`.patching` measures one response, in one pass, exactly or as published
* :mod:`.collecting` chooses positions in many responses and resumes
* :mod:`.effects` is the file of the effects, their curves, the choice of the layer
"""

from stllms.attribution.collecting import collect
from stllms.attribution.patching import layer_effects

__all__ = ["collect", "layer_effects"]
