"""What several tests of surgery start from."""

import pytest
import torch


@pytest.fixture
def float64():
    """Numbers are of float64, and drawn from one seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
