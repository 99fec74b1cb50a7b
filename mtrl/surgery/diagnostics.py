"""How much the tasks' gradients disagree: conditions of Yu et al. 2020, from the Gramian alone."""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(gramian: Tensor) -> Tensor:
    """Cos φ_ij between the tasks' gradients, `[…, T, T]` to `[…, T, T]`; 0 with a zero gradient."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gramian / products, 0)


def magnitude_similarities(gramian: Tensor) -> Tensor:
    """Definition 2: 2 ‖g_i‖ ‖g_j‖ / (‖g_i‖² + ‖g_j‖²), in [0, 1], 1 for equal norms.

    A copy of the paper in circulation prints a product in the denominator; the sum is right.
    """
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    norms = squares.sqrt()
    sums = squares[..., :, None] + squares[..., None, :]
    return torch.where(sums > 0, 2 * norms[..., :, None] * norms[..., None, :] / sums, 1)


def diagnose(gramian: Tensor) -> dict[str, Tensor]:
    """Means over the pairs of different tasks, and over networks; empty for a single task.

    Args:
        gramian: `[N, T, T]`.

    Returns:
        `conflict_fraction` (pairs with cos φ < 0: definition 1), `cosine_mean` and
        `magnitude_similarity`, each a scalar tensor.
    """
    n_tasks = gramian.shape[-1]
    if n_tasks == 1:
        return {}
    first, second = torch.triu_indices(n_tasks, n_tasks, 1, device=gramian.device)
    pairs = cosines(gramian)[..., first, second]
    return {
        "conflict_fraction": (pairs < 0).float().mean(),
        "cosine_mean": pairs.mean(),
        "magnitude_similarity": magnitude_similarities(gramian)[..., first, second].mean(),
    }
