"""The command ``stllms`` and all that composes whole stages.

``cli`` the command; ``runner`` notebooks through papermill; ``stages`` the five notebooks, what
each needs and leaves; ``preflight`` what a run needs and will do, before it begins; ``report``,
``demo``, ``bench``, ``compare`` and ``colab`` what is made from runs. Nothing imports ``app``
but notebooks.
"""
