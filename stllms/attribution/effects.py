"""Stub: the names of this module still live at their old addresses."""

from stllms.effects import (SETS, PAIRED, CONTROL_SHARE, LEAST, Sample, LayerEffects, null_key, fingerprint, sample, measurable, ledger_of, said, curve, table, beside_nulls, relative, controls_of, BestLayer, best_layer, rank, rank_correlation, how_many, agreement, best_layers, chosen_layers, reasons)  # noqa: F401
