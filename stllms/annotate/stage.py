"""Old address of names that moved; deleted at the end."""

from stllms.annotation.annotators import (KEY, annotations, annotator, steered, labelled, load, table)  # noqa: F401


def for_run(setup):
    if setup.annotator.startswith("openai:"):
        return annotator(
            setup.annotator,
            base_url=setup.base_url,
            max_cost=setup.max_cost,
            folder=setup.folder / "judge",
            reader=setup.reader,
        )
    if setup.annotator.startswith("replay:"):
        return annotator(setup.annotator, reader=setup.reader)
    return annotator(setup.annotator)
