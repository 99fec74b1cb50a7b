"""Triton kernel for PCGrad's T − 1 dependent projections, for CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def projected(gramian: Tensor, keys: Tensor) -> Tensor:
    """Compute the coefficients of all projected gradients; see `PCGrad`.

    Args:
        gramian: G, `[N, T, T]`.
        keys: Random numbers in [0, 1), `[N, T, T]`. Task i of network n visits the others in
            ascending order of its row, which the kernel sorts as it proceeds.

    Returns:
        C, `[N, T, T]`: the projected gradient of task i is Σ_t C_it g_t.
    """
    n_networks, n_tasks, _ = gramian.shape
    coefficients = torch.empty_like(gramian, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(gramian):  # Triton launches on the current device
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
    """Run one program per network and task i, with its row of C in registers for all steps."""
    row = tl.program_id(0)
    network, i = row // n_tasks, row % n_tasks
    t = tl.arange(0, block)
    key = tl.load(keys + row * n_tasks + t, mask=t < n_tasks, other=3.0)
    key = tl.where(t == i, 2.0, key)  # a task does not visit itself
    c = tl.where(t == i, 1.0, 0.0).to(gramian.dtype.element_ty)
    for _ in range(n_tasks - 1):
        j = tl.argmin(key, 0)
        key = tl.where(t == j, 4.0, key)
        other = network * n_tasks + j
        g = tl.load(gramian + other * n_tasks + t, mask=t < n_tasks, other=0.0)
        squared_norm = tl.load(gramian + other * n_tasks + j)
        conflict = tl.minimum(tl.sum(c * g, 0), 0.0)
        known = squared_norm > tiny  # a zero gradient has no conflicts
        step = tl.where(known, conflict / tl.where(known, squared_norm, 1.0), 0.0)
        c = tl.where(t == j, c - step, c)
    tl.store(coefficients + row * n_tasks + t, c, mask=t < n_tasks)
