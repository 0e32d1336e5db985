"""The embedded models: a grammar of tasks and chains, the training script, the weights.

``tiny-thinker`` and ``tiny-instruct`` are *fixtures*. Their steerability was designed into
the grammar they were trained on: they show that the pipeline works and measure its
instruments, and never that a claim of the paper holds.
"""
