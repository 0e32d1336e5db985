"""Old address of names that moved; deleted at the end."""

from stllms.annotation.annotators import Grammar as Annotator  # noqa: F401
from stllms.fixtures.grammar import (HINTED, UNHINTED, Chain, chain, plain, part_of, tasks, label_of, well_formed, read_answer)  # noqa: F401
