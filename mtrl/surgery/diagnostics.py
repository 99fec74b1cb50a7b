"""How much the tasks' gradients disagree: the three conditions of Yu et al. 2020, and more.

From the Gramian alone come all but the curvature, whether conflicts repeat on another batch, and
whom a step opposes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtrl.surgery.gradients import Parameters, TaskGradients
from mtrl.surgery.stacked import StackedProblem


@dataclass(frozen=True)
class Step:
    """What one step subtracts from N networks' shared parameters, each `[N, …]`.

    Attributes:
        gradient: The gradient that surgery gave.
        taken: What the optimiser made of it, θ − θ′, with Adam's scales, momentum and decay.
    """

    gradient: Parameters
    taken: Parameters

    def only(self, n: int) -> Step:
        """Of the n-th network alone."""
        trees = self.gradient, self.taken
        return Step(*({k: value[n : n + 1] for k, value in tree.items()} for tree in trees))


@dataclass(frozen=True)
class Diagnosis:
    """What there is to say about one network."""

    measures: dict[str, Tensor]  # see `of`; scalars
    cosines: Tensor  # [T, T]

    @classmethod
    def of(
        cls, problem: StackedProblem, again: StackedProblem, step: Step, rate: float
    ) -> Diagnosis:
        """Look at one network's problem, best in float64.

        Args:
            problem: On a batch.
            again: On another, independent batch.
            step: The one taken with the first batch.
            rate: Length of a plain gradient step, for `multi_task_curvature`.

        Returns:
            With the measures of `diagnose`, `conflict_repeats` and `conflict_after`, `self_cosine`
            and `curvature`; and the first batch's cosines.
        """

        def gradient(parameters: Parameters) -> Parameters:
            return replace(problem, shared=parameters).features().mean().shared

        gradients, others = problem.task_gradients(), again.task_gradients()
        (gramian,), (other,) = gradients.gramian(), others.gramian()
        found = cosines(gramian)
        norms = (gramian.diagonal() * other.diagonal()).sqrt()
        with_itself = torch.where(norms > 0, gradients.products(others)[0] / norms, 0)
        measures = (
            diagnose(gramian)
            | conflict_repeats(found, cosines(other))
            | conflict_after(gradients, step)
            | {"self_cosine": with_itself.mean()}
            | {"curvature": multi_task_curvature(gradient, problem.shared, rate)}
        )
        return cls(measures, found)


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


def scale_spread(gramian: Tensor) -> Tensor:
    """Largest over smallest squared norm of a task's gradient, `[T, T]` to a scalar, at least 1.

    A zero gradient is left out: infinity would have no place on a chart, and the spread of the
    other tasks would not be seen.
    """
    squares = gramian.diagonal()
    smallest = torch.where(squares > 0, squares, torch.inf).amin()
    return (squares.amax() / smallest).clamp(min=1)  # 0 / inf where all are zero


def effective_rank(gramian: Tensor) -> Tensor:
    """How many directions the gradients fill: exp of the entropy of G's normalised eigenvalues.

    The measure is that of Roy & Vetterli 2007, of G rather than of J: 1 if all gradients are
    parallel, or one dwarfs the rest; T if they are orthogonal and of one norm. Ill-conditioned
    critic Gramians have been linked to tasks that never start (with PPO: arXiv 2605.11473).

    Args:
        gramian: `[T, T]`.

    Returns:
        A scalar in [1, T], computed in float64; 1 if all gradients are zero, NaN if one is not
        finite.
    """
    if not gramian.isfinite().all():  # eigvalsh would raise, and end the run that is looked at
        return torch.tensor(torch.nan, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(gramian.double()).clamp(min=0)  # rounding leaves some < 0
    total = eigenvalues.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(eigenvalues / total).sum().exp()


def diagnose(gramian: Tensor) -> dict[str, Tensor]:
    """What one network's Gramian tells about its tasks; empty for a single task.

    Args:
        gramian: `[T, T]`.

    Returns:
        Means over the pairs of different tasks: `conflict_fraction` (pairs with cos φ < 0:
        definition 1), `cosine_mean` and `magnitude_similarity`. Of all tasks together:
        `scale_spread` and `effective_rank`. Each a float64 scalar.
    """
    n_tasks = len(gramian)
    if n_tasks == 1:
        return {}
    gramian = gramian.double()  # ratios of squared norms can leave float32's range
    first, second = torch.triu_indices(n_tasks, n_tasks, 1, device=gramian.device)
    pairs = cosines(gramian)[first, second]
    return {
        "conflict_fraction": (pairs < 0).double().mean(),
        "cosine_mean": pairs.mean(),
        "magnitude_similarity": magnitude_similarities(gramian)[first, second].mean(),
        "scale_spread": scale_spread(gramian),
        "effective_rank": effective_rank(gramian),
    }


def conflict_repeats(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Do conflicts belong to the tasks, or to the batch?

    Of n pairs let a conflict on one batch, b on an independent other one, and c on both. A conflict
    repeats in 2 c / (a + b) of cases (Dice's coefficient). Were each batch's conflicts strewn over
    the pairs at random, c would be a b / n on average: that is the level of chance.

    Args:
        first: Cosines on one batch, `[T, T]`; see `cosines`.
        second: On another.

    Returns:
        `conflict_repeats`, and `conflict_repeats_by_chance` to hold it against, both in [0, 1].
        Conflicts that only the batch's noise makes repeat as often as by chance, give or take:
        with few pairs one diagnosis says little, the mean over a run more. Empty if no pair
        conflicts on either batch.
    """
    n_tasks = len(first)
    above = torch.triu_indices(n_tasks, n_tasks, 1, device=first.device).unbind()
    one, other = first[above] < 0, second[above] < 0
    a, b, both = (pairs.double().sum() for pairs in (one, other, one & other))
    if a + b == 0:
        return {}
    return {
        "conflict_repeats": 2 * both / (a + b),
        "conflict_repeats_by_chance": 2 * a * b / (len(one) * (a + b)),
    }


def conflict_after(gradients: TaskGradients, step: Step) -> dict[str, Tensor]:
    """Whom one network's step d opposes: tasks with ⟨g_t, d⟩ < 0, whose loss it first makes larger.

    Surgery decides on a direction; the optimiser then divides every parameter's part of it by a
    scale of its own, adds what it remembers, and lets weights decay. What did not oppose a task
    before may do so after.

    Args:
        gradients: The tasks' own, of the batch that the step was made from.
        step: Of the same network.

    Returns:
        Fractions of the T tasks: `conflict_after_surgery`, opposed by the combined gradient, and
        `conflict_after_step`, by the step that is taken. Empty for a single task.
    """
    if gradients.losses.shape[-1] == 1:
        return {}
    directions = {"surgery": step.gradient, "step": step.taken}
    return {
        f"conflict_after_{what}": (gradients.along(direction) < 0).double().mean()
        for what, direction in directions.items()
    }


def multi_task_curvature(
    gradient: Callable[[Parameters], Parameters], parameters: Parameters, step: float
) -> Tensor:
    """Definition 3: H = ∫₀¹ ∇L(θ)ᵀ ∇²L(θ + a(θ′ − θ)) ∇L(θ) da, where θ′ = θ − step ∇L(θ).

    Along that step ∇²L ∇L(θ) is the derivative of −∇L/step, so that the integral is exactly

        H = ∇L(θ)ᵀ (∇L(θ) − ∇L(θ′)) / step:

    one more gradient, where quadrature takes a Hessian-vector product per point, and misses what a
    ReLU network's curvature mostly is, the jumps of the gradient between the points.

    Args:
        gradient: ∇L, from parameters to a gradient for each. The same function in each call, so
            noise is drawn before; in float64, for the two gradients nearly cancel.
        parameters: θ, the shared ones.
        step: Length of the gradient step, in units of the gradient: a learning rate.

    Example:
        >>> gradient = lambda parameters: {"x": 2 * parameters["x"]}  # of Σ x², whose Hessian is 2
        >>> multi_task_curvature(gradient, {"x": torch.tensor([1.0, 2.0]).double()}, step=0.1)
        tensor(40.0000, dtype=torch.float64)
    """
    here = gradient(parameters)
    there = gradient({name: value - step * here[name] for name, value in parameters.items()})
    lost = [(here[name] * (here[name] - there[name])).sum() for name in parameters]
    return torch.stack(lost).sum() / step
