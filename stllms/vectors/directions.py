"""Stub: the names of this module still live at their old addresses."""

from stllms.vectors import (ESTIMATORS, CONTRASTS, SteeringVectors, difference_of_means, estimate, differences, rescale, load_published, cosines, heatmap_layers, steering_layers, default_layer, max_cosine)  # noqa: F401
from stllms.probes import (PENALTY, ITERATIONS, TOLERANCE, logistic_directions, fit)  # noqa: F401
from stllms.organism.directions import (file, shipped, load, weights)  # noqa: F401
from stllms.organism.directions import load as load_shipped  # noqa: F401
