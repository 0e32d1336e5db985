"""Stub: the names of this module still live at their old addresses."""

from stllms.steering import (CHUNK, SWEPT_CONTROLS, generate, Arm, arms, by_arm, plain, sweep_arms, control_arms, grid, check)  # noqa: F401
from stllms.steering import sweep_arms as sweep_conditions  # noqa: F401 - until this moves
