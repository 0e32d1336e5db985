"""What writes the chains: the seam between the stages and an engine.

* :mod:`~stllms.models.engines.engine`: what an engine is asked for, what it says that it can
* :mod:`~stllms.models.engines.transformers`: our own loop, the reference of every other engine
* :mod:`~stllms.models.engines.vllm`: vLLM, steered through vllm-lens
* :mod:`~stllms.models.engines.probes`: was it steered? asked of every batch of another engine
* :mod:`~stllms.models.engines.conformance`: does an engine write what ours writes?
* :mod:`~stllms.models.engines.interventions`: what is done to the residual stream
* :mod:`~stllms.models.engines.sharing`: reading a prompt once for the rows that share it
* :mod:`~stllms.models.engines.sampling`: the noise, the choice of a token, its audit

Stages call :func:`generate`; activations, layer effects and likelihoods take the
``transformers`` model itself.
"""

from stllms.models.engines.engine import Engine, Row, Written, generate, writing

__all__ = ["Engine", "Row", "Written", "generate", "writing"]
