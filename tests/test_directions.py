"""A demo refuses directions of another model."""

from __future__ import annotations

import pytest
import torch

from stllms.app.bench import bench
from stllms.config import RunConfig
from stllms.vectors.directions import SteeringVectors


def test_directions_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    one, overall = torch.ones(1, 2, 8), torch.ones(2, 8)
    SteeringVectors(("adding-knowledge",), one, one, overall, torch.tensor([10])).save(path)
    with pytest.raises(ValueError, match="of another model than tiny-thinker"):
        bench(RunConfig(device="cpu"), path)
