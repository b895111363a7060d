"""What several test files share: tests read small and run on two cores."""
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def golden():
    """golden(name): the arrays of tests/golden/<name>.npz as tensors."""
    def arrays(name: str) -> dict[str, torch.Tensor]:
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}
    return arrays
