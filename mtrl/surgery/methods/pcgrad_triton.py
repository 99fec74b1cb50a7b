"""Triton kernel of PCGrad for CUDA: from the Gramian to the weights in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def weights(gramian: Tensor, keys: Tensor) -> Tensor:
    """Compute the weights of all tasks; see `PCGrad`.

    Args:
        gramian: G, `[N, T, T]`.
        keys: Random numbers in [0, 1), `[N, T, T]`. Task i of network n visits the others in
            ascending order of its row, which the kernel sorts as it proceeds.

    Returns:
        The mean over i of the coefficients C, `[N, T]`, where the projected gradient of task i is
        Σ_t C_it g_t; NaN for a network whose Gramian is not finite.
    """
    n_networks, n_tasks, _ = gramian.shape
    found = gramian.new_empty(n_networks, n_tasks)
    block = triton.next_power_of_2(n_tasks)
    with torch.cuda.device_of(gramian):  # Triton launches on the current device
        _weights[(n_networks,)](
            gramian.contiguous(),
            keys.contiguous(),
            found,
            n_tasks,
            block,
            torch.finfo(gramian.dtype).tiny,
            num_warps=max(1, block * block // 512),
        )
    return found


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    gramian, keys, found, n_tasks: tl.constexpr, block: tl.constexpr, tiny: tl.constexpr
):  # fmt: skip
    """Run one program per network, with C in registers for all steps; row i of C is task i's."""
    t = tl.arange(0, block)
    real = t < n_tasks
    both = real[:, None] & real[None, :]
    own = t[:, None] == t[None, :]
    first = tl.program_id(0) * n_tasks  # the network's first row of G and of the keys
    place = (first + t[:, None]) * n_tasks + t[None, :]
    whole = tl.load(gramian + place, mask=both, other=0.0)
    zero = tl.sum(tl.sum(0.0 * whole, 1), 0)  # or NaN, as 0 · ∞ is
    key = tl.load(keys + place, mask=both, other=3.0)
    key = tl.where(own, 2.0, key)  # a task does not visit itself
    c = tl.where(own & both, 1.0, 0.0).to(gramian.dtype.element_ty)
    for _ in range(n_tasks - 1):
        j = tl.argmin(key, 1)  # the next task that each task visits
        visited = t[None, :] == j[:, None]
        key = tl.where(visited, 4.0, key)
        row = (first + j) * n_tasks
        g = tl.load(gramian + row[:, None] + t[None, :], mask=both, other=0.0)
        squared_norm = tl.load(gramian + row + j, mask=real, other=0.0)
        conflict = tl.minimum(tl.sum(c * g, 1), 0.0)
        known = squared_norm > tiny  # a zero gradient has no conflicts
        step = tl.where(known, conflict / tl.where(known, squared_norm, 1.0), 0.0)
        c = tl.where(visited, c - step[:, None], c)
    tl.store(found + first + t, tl.sum(c, 0) / n_tasks + zero, mask=real)
