"""The command ``stllms`` and all that composes whole stages; nothing but notebooks imports it.

``cli``: the command line, its options and exit status.
``runner``: notebooks 01 to 05 through papermill, one model after the other.
``stages``: what each notebook needs and leaves, when it is done, its first and last call.
``preflight``: what would stop a run later, and what it will write and cost.
``bench``: one question, as the baseline and steered; ``demo`` shows that with widgets.
``compare``: the members of notebook 05.
``report``: one page of a run's notebooks and tables.
``colab``: the notebooks as Colab opens them.
"""
