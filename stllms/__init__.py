"""stllms: steering vectors for the reasoning behaviours of thinking language models.

The package reproduces, stage by stage, *Understanding Reasoning in Thinking Language
Models via Steering Vectors* (arXiv 2506.18167). The notebooks hold the story, the package
holds the work: one folder a stage, one file an idea.

Dimension letters, used in every docstring:

====  =====================================================================
``B``  rows of a batch
``T``  tokens of a row (prompt and output together)
``L``  decoder layers, 0-based; ``h[l, t]`` is the *output* of layer ``l``
``D``  width of the residual stream
``V``  vocabulary
``P``  positions (span starts)
``N``  behaviours
====  =====================================================================

Tensors are float32 on the CPU unless a docstring says otherwise.

Where to change what:

=============================  ====================================================
the sampling noise             ``generation/sampling.py``: ``gumbel``, ``choose``
a model family's layers        ``models/model.py``: ``LAYER_PATHS``
an annotator of one's own      ``annotation/annotators.py``: ``annotator``
tokens that a span averages    ``vectors/activations.py``: ``_job``
exact and published effects    ``attribution/patching.py``
the choice of the layer        ``attribution/effects.py``: ``best_layer``
null intervals of steering     ``steering/measures.py``: ``_null``
who writes an artefact         the notebooks; its name is in ``runs/files.py``
what makes one stale           ``runs/files.py``: ``Record``; ``app/stages.py``
=============================  ====================================================
"""

__version__ = "0.1.0"
