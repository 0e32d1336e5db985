"""Shim: these names live at another address; deleted at the end."""

from stllms.attribution.collecting import (CONTROL_SHARE, Sample, fingerprint, ledger_of, measurable, sample)  # noqa: E501, F401
from stllms.attribution.effects import (LEAST, PAIRED, SETS, BestLayer, LayerEffects, agreement, beside_nulls, best_layer, best_layers, chosen_layers, curve, how_many, null_key, rank, rank_correlation, reasons, relative, summary, summary as said, table)  # noqa: E501, F401
