"""PCGrad's T − 1 dependent projections as one kernel, for CUDA; needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def projected(gramian: Tensor, keys: Tensor) -> Tensor:
    """Coefficients of all tasks' projected gradients; see `PCGrad`.

    Args:
        gramian: G, `[N, T, T]`.
        keys: Random numbers in [0, 1), `[N, T, T]`: task i of network n meets the others in
            ascending order of its row, which the kernel sorts on the way.

    Returns:
        C, `[N, T, T]`: task i's gradient has become Σ_t C_it g_t.
    """
    n_networks, n_tasks, _ = gramian.shape
    coefficients = torch.empty_like(gramian, memory_format=torch.contiguous_format)
    _project[(n_networks * n_tasks,)](
        gramian.contiguous(),
        keys,
        coefficients,
        n_tasks,
        triton.next_power_of_2(n_tasks),
        torch.finfo(gramian.dtype).tiny,
        num_warps=1,
    )
    return coefficients


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    gramian, keys, coefficients, n_tasks: tl.constexpr, block: tl.constexpr, tiny: tl.constexpr
):  # fmt: skip
    """One program per network and task i: its row of C stays in registers for all T − 1 steps."""
    row = tl.program_id(0)
    network, i = row // n_tasks, row % n_tasks
    t = tl.arange(0, block)
    key = tl.load(keys + row * n_tasks + t, mask=t < n_tasks, other=3.0)
    key = tl.where(t == i, 2.0, key)  # a task does not meet itself
    c = tl.where(t == i, 1.0, 0.0).to(gramian.dtype.element_ty)
    for _ in range(n_tasks - 1):
        j = tl.argmin(key, 0)
        key = tl.where(t == j, 4.0, key)
        other = network * n_tasks + j
        g = tl.load(gramian + other * n_tasks + t, mask=t < n_tasks, other=0.0)
        squared_norm = tl.load(gramian + other * n_tasks + j)
        conflict = tl.minimum(tl.sum(c * g, 0), 0.0)
        known = squared_norm > tiny  # a zero gradient conflicts with none
        step = tl.where(known, conflict / tl.where(known, squared_norm, 1.0), 0.0)
        c = tl.where(t == j, c - step, c)
    tl.store(coefficients + row * n_tasks + t, c, mask=t < n_tasks)
