"""Triton kernels for the Newton iterations of CAGrad, MGDA and FairGrad, for CUDA.

As torch operations, these are 30 iterations of fifty to a hundred launches on numbers that fit into
the registers of one processor; in addition, torch's `cholesky_solve` synchronises. Here one program
holds the whole problem of a network, including its T × T matrix, in float64. It solves the linear
system of an iteration by elimination without pivoting, which is safe for positive definite
matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def interior_point(
    directions: Tensor, slopes: Tensor, radius: Tensor, inverse_norms: Tensor, start: Tensor,
    *, iterations: int, reduction: float, complementarity: float, to_boundary: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the iterations of `simplex.minimise`, in its notation and in float64.

    Args:
        directions: C, `[N, T, T]`.
        slopes: m, `[N, T]`.
        radius: r, `[N, 1]`.
        inverse_norms: a, `[N, T]`.
        start: Initial x, `[N, T]`.
        iterations, reduction, complementarity, to_boundary: See `simplex`.

    Returns:
        x and c, `[N, T]`.
    """
    x, c = torch.empty_like(start), torch.empty_like(start)
    n_networks, n_tasks = start.shape
    given = (directions, slopes, radius, inverse_norms, start)
    with torch.cuda.device_of(start):  # Triton launches on the current device
        _interior_point[(n_networks,)](
            *(tensor.contiguous() for tensor in given),
            x,
            c,
            n_tasks,
            triton.next_power_of_2(n_tasks),
            iterations,
            reduction,
            complementarity,
            to_boundary,
            num_warps=4 if n_tasks > 16 else 1,
        )
    return x, c


def fair_newton(
    directions: Tensor, h: Tensor, start: Tensor,
    *, alpha: float, iterations: int, steps: int, to_boundary: float, converged: float,
) -> Tensor:  # fmt: skip
    """Run the iterations of `FairGrad`, in its notation and in float64.

    Args:
        directions: C, `[N, T, T]`.
        h: `[N, T]`.
        start: Initial v, `[N, T]`.
        alpha, iterations, steps, to_boundary, converged: See `fairgrad`.

    Returns:
        v, `[N, T]`.
    """
    v = torch.empty_like(start)
    n_networks, n_tasks = start.shape
    with torch.cuda.device_of(start):  # Triton launches on the current device
        _fair_newton[(n_networks,)](
            *(tensor.contiguous() for tensor in (directions, h, start)),
            v,
            n_tasks,
            triton.next_power_of_2(n_tasks),
            alpha,
            iterations,
            steps,
            to_boundary,
            converged,
            num_warps=4 if n_tasks > 16 else 1,
        )
    return v


@triton.jit
def _of_network(directions, n_tasks: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tasks' numbers, which of them there are, where their rows begin, and the cosines."""
    network = tl.program_id(0)
    t = tl.arange(0, block)
    real = t < n_tasks
    both = real[:, None] & real[None, :]
    row = network * n_tasks + t
    cosines = tl.load(directions + row[:, None] * n_tasks + t[None, :], mask=both, other=0.0)
    return t, real, row, cosines


@triton.jit
def _apply(matrix, vector):  # type: ignore[no-untyped-def]
    return tl.sum(matrix * vector[None, :], 1)


@triton.jit
def _solve(matrix, b0, b1, b2, t, n_tasks: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Return three Gauss–Jordan solutions and the smallest pivot, which is ≤ 0 on failure."""
    smallest = tl.sum(0.0 * b0, 0) + float("inf")
    for k in range(n_tasks):
        is_k = t == k
        row = tl.sum(tl.where(is_k[:, None], matrix, 0.0), 0)
        column = tl.sum(tl.where(is_k[None, :], matrix, 0.0), 1)
        pivot = tl.sum(tl.where(is_k, row, 0.0), 0)
        smallest = tl.where(pivot > 0, tl.minimum(smallest, pivot), -1.0)
        factor = tl.where(is_k, 0.0, column / pivot)
        matrix = matrix - factor[:, None] * row[None, :]
        b0 = b0 - factor * tl.sum(tl.where(is_k, b0, 0.0), 0)
        b1 = b1 - factor * tl.sum(tl.where(is_k, b1, 0.0), 0)
        b2 = b2 - factor * tl.sum(tl.where(is_k, b2, 0.0), 0)
    diagonal = tl.sum(tl.where(t[:, None] == t[None, :], matrix, 0.0), 1)
    return b0 / diagonal, b1 / diagonal, b2 / diagonal, smallest


@triton.jit
def _room(value, change):  # type: ignore[no-untyped-def]
    """Return the step length at which the value vanishes."""
    return tl.where(change < 0, -value / change, float("inf"))


@triton.jit
def _interior_point(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    directions, slopes, radius, inverse_norms, start, x_out, c_out,
                    n_tasks: tl.constexpr, block: tl.constexpr, iterations: tl.constexpr,
                    reduction: tl.constexpr, complementarity: tl.constexpr,
                    to_boundary: tl.constexpr):  # fmt: skip
    t, real, row, cosines = _of_network(directions, n_tasks, block)
    m = tl.load(slopes + row, mask=real, other=0.0)
    a = tl.load(inverse_norms + row, mask=real, other=0.0)
    r = tl.load(radius + tl.program_id(0))
    # Beyond T: x = z = 1, on which nothing depends, and zeros.
    x = tl.load(start + row, mask=real, other=1.0)
    z = 0.0 * x + 1.0
    c = 0.0 * x
    theta = 0.0 * r + 1.0
    s = 0.0 * r + 0.5
    tau = 0.0 * r
    diagonal = t[:, None] == t[None, :]
    for _ in range(iterations):
        mu = reduction * (tl.sum(tl.where(real, x * z, 0.0), 0) + theta * s) / (n_tasks + 1)
        mu = tl.maximum(mu, complementarity)
        y = _apply(cosines, c)
        slack = m + r * y - tau * a - z
        ball = (1 - tl.sum(c * y, 0)) / 2 - s
        stationary = tl.where(real, r * x - theta * c, 0.0)
        weight = r / theta
        system = (r * weight) * cosines + tl.where(diagonal, (z / x)[:, None], 0.0)
        right = mu / x - z - slack - weight * _apply(cosines, stationary)
        right = tl.where(real, right, 0.0)
        free, by_theta, by_tau, pivot = _solve(system, right, weight * y, a, t, n_tasks)
        ee = tl.sum(a * by_theta, 0)
        et = tl.sum(a * by_tau, 0)
        e0 = 1 - tl.sum(a * x, 0) - tl.sum(a * free, 0)
        be = s + tl.sum(y * c, 0) - r * tl.sum(y * by_theta, 0)
        bt = -r * tl.sum(y * by_tau, 0)
        b0 = mu - theta * (s + ball) + tl.sum(y * stationary, 0) + r * tl.sum(y * free, 0)
        determinant = ee * bt - et * be
        d_theta = (e0 * bt - et * b0) / determinant
        d_tau = (ee * b0 - e0 * be) / determinant
        dx = free + by_theta * d_theta + by_tau * d_tau
        dz = tl.where(real, (mu - z * dx) / x - z, 0.0)
        dc = tl.where(real, (r * dx + stationary - c * d_theta) / theta, 0.0)
        ds = ball - tl.sum(y * dc, 0)
        room = tl.minimum(tl.min(_room(x, dx), 0), tl.min(_room(z, dz), 0))
        room = tl.minimum(room, tl.minimum(_room(theta, d_theta), _room(s, ds)))
        length = tl.minimum(to_boundary * room, 1.0)
        # The sum is finite only if all terms are.
        total = tl.sum(dx + dz + dc, 0) + d_theta + ds + d_tau
        sound = (pivot > 0) & (total - total == 0) & (length - length == 0)
        length = tl.where(sound, length, 0.0)
        x = x + length * tl.where(sound, dx, 0.0)
        z = z + length * tl.where(sound, dz, 0.0)
        c = c + length * tl.where(sound, dc, 0.0)
        theta = theta + length * tl.where(sound, d_theta, 0.0)
        s = s + length * tl.where(sound, ds, 0.0)
        tau = tau + length * tl.where(sound, d_tau, 0.0)
    tl.store(x_out + row, x, mask=real)
    tl.store(c_out + row, c, mask=real)


@triton.jit
def _power(v, exponent: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.exp(exponent * tl.log(v))


@triton.jit
def _fair_newton(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    directions, h_in, start, v_out, n_tasks: tl.constexpr, block: tl.constexpr,
                 alpha: tl.constexpr, iterations: tl.constexpr, steps: tl.constexpr,
                 to_boundary: tl.constexpr, converged: tl.constexpr):  # fmt: skip
    t, real, row, cosines = _of_network(directions, n_tasks, block)
    h = tl.load(h_in + row, mask=real, other=0.0)
    v = tl.load(start + row, mask=real, other=1.0)
    diagonal = t[:, None] == t[None, :]
    zero = 0.0 * v
    for _ in range(iterations):
        gain = h * _power(v, -1 / alpha)
        downhill = tl.where(real, gain - _apply(cosines, tl.where(real, v, 0.0)), 0.0)
        curvature = tl.where(real, gain / (alpha * v), 1.0)
        system = cosines + tl.where(diagonal, curvature[:, None], 0.0)
        change, _1, _2, pivot = _solve(system, downhill, zero, zero, t, n_tasks)
        room = to_boundary * tl.min(_room(v, change), 0)
        best = tl.minimum(8.0, room)
        tried_length = tl.sum(zero, 0) + 8.0
        lowest = tried_length + float("inf")
        for _step in range(steps):
            length = tl.minimum(tried_length, room)
            tried = v + length * change
            if alpha == 1.0:
                integral = tl.log(tried)
            else:
                integral = _power(tried, 1 - 1 / alpha) / (1 - 1 / alpha)
            inside = tl.where(real, tried, 0.0)
            square = tl.sum(_apply(cosines, inside) * inside, 0)
            potential = square / 2 - tl.sum(tl.where(real, h * integral, 0.0), 0)
            best = tl.where(potential < lowest, length, best)
            lowest = tl.minimum(lowest, potential)
            tried_length = tried_length / 2
        close = tl.sum(downhill * change, 0) < converged
        length = tl.where(close, tl.minimum(room, 1.0), best)
        new = v + length * change
        total = tl.sum(new, 0)
        sound = (pivot > 0) & (total - total == 0)
        v = tl.where(sound, new, v)
    tl.store(v_out + row, v, mask=real)
