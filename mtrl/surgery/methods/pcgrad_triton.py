"""PCGrad's T − 1 dependent projections as one kernel, for CUDA; needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def projected(gramian: Tensor, inverse: Tensor, orders: Tensor) -> Tensor:
    """Coefficients of all tasks' projected gradients; see `PCGrad`.

    Args:
        gramian: G, `[N, T, T]`.
        inverse: 1/‖g_t‖², or 0 of a zero gradient, `[N, T]`.
        orders: Whom task i of network n meets, one after the other, `[N, T, T - 1]`.

    Returns:
        C, `[N, T, T]`: task i's gradient has become Σ_t C_it g_t.
    """
    n_networks, n_tasks, _ = gramian.shape
    coefficients = torch.empty_like(gramian)
    _project[(n_networks * n_tasks,)](
        gramian.contiguous(),
        inverse.contiguous(),
        orders.contiguous(),
        coefficients,
        n_tasks,
        triton.next_power_of_2(n_tasks),
        num_warps=1,
    )
    return coefficients


@triton.jit
def _project(gramian, inverse, orders, coefficients, n_tasks: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per network and task i: its row of C stays in registers for all T − 1 steps."""
    row = tl.program_id(0)
    network, i = row // n_tasks, row % n_tasks
    t = tl.arange(0, block)
    c = tl.where(t == i, 1.0, 0.0).to(gramian.dtype.element_ty)
    for step in range(n_tasks - 1):
        j = tl.load(orders + row * (n_tasks - 1) + step)
        other = network * n_tasks + j
        g = tl.load(gramian + other * n_tasks + t, mask=t < n_tasks, other=0.0)
        conflict = tl.minimum(tl.sum(c * g, 0), 0.0)
        c = tl.where(t == j, c - conflict * tl.load(inverse + other), c)
    tl.store(coefficients + row * n_tasks + t, c, mask=t < n_tasks)
