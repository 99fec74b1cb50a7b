"""Measures of conflict between task gradients: the three conditions of Yu et al. 2020, and more.

All measures are computed from the Gramian, except the curvature, whether conflicts repeat on
another batch, and which tasks a step opposes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtrl.nets.params import Parameters
from mtrl.surgery.gradients import TaskGradients
from mtrl.surgery.stacked import StackedProblem


@dataclass(frozen=True)
class Step:
    """A step of the shared parameters of N networks, each `[N, …]`.

    Attributes:
        gradient: Combined gradient from surgery.
        taken: Step θ − θ′ of the optimiser, with Adam's scales, momentum and weight decay.
    """

    gradient: Parameters
    taken: Parameters

    def only(self, n: int) -> Step:
        """Return the step of only the n-th network."""
        trees = self.gradient, self.taken
        return Step(*({k: value[n : n + 1] for k, value in tree.items()} for tree in trees))


@dataclass(frozen=True)
class Diagnosis:
    """Measures and cosines of one network."""

    measures: dict[str, Tensor]  # see `of`; scalars
    cosines: Tensor  # [T, T]

    @classmethod
    def of(
        cls, problem: StackedProblem, again: StackedProblem, step: Step, rate: float
    ) -> Diagnosis:
        """Diagnose the problem of one network, preferably in float64.

        Args:
            problem: Problem on a batch.
            again: Problem on another, independent batch.
            step: Step made with the first batch.
            rate: Length of a plain gradient step, for `multi_task_curvature`.

        Returns:
            The measures of `diagnose`, `conflict_repeats` and `conflict_after`, `self_cosine` and
            `curvature`; and the cosines on the first batch.
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
    """Compute cos φ_ij of task gradients, `[…, T, T]` to `[…, T, T]`; 0 for zero gradients."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gramian / products, 0)


def magnitude_similarities(gramian: Tensor) -> Tensor:
    """Compute definition 2: 2 ‖g_i‖ ‖g_j‖ / (‖g_i‖² + ‖g_j‖²), in [0, 1], 1 for equal norms.

    Some copies of the paper have a product in the denominator; the sum is correct.
    """
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    norms = squares.sqrt()
    sums = squares[..., :, None] + squares[..., None, :]
    return torch.where(sums > 0, 2 * norms[..., :, None] * norms[..., None, :] / sums, 1)


def scale_spread(gramian: Tensor) -> Tensor:
    """Return the ratio of the largest to the smallest squared norm, `[T, T]` to a scalar ≥ 1.

    Zero gradients are left out: infinity cannot be charted, and would hide the spread of the other
    tasks.
    """
    squares = gramian.diagonal()
    smallest = torch.where(squares > 0, squares, torch.inf).amin()
    return (squares.amax() / smallest).clamp(min=1)  # 0 / inf if all are zero


def effective_rank(gramian: Tensor) -> Tensor:
    """Return the effective rank: exp of the entropy of G's normalised eigenvalues.

    This is the measure of Roy & Vetterli 2007, of G instead of J: 1 if all gradients are parallel
    or one dwarfs the rest; T if they are orthogonal with equal norms. Ill-conditioned critic
    Gramians have been linked to tasks that never start to learn (with PPO: arXiv 2605.11473).

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
    """Compute the measures of one network's Gramian; empty for a single task.

    Args:
        gramian: `[T, T]`.

    Returns:
        Means over pairs of different tasks: `conflict_fraction` (pairs with cos φ < 0: definition
        1), `cosine_mean` and `magnitude_similarity`. Over all tasks: `scale_spread` and
        `effective_rank`. Each is a float64 scalar.
    """
    n_tasks = len(gramian)
    if n_tasks == 1:
        return {}
    gramian = gramian.double()  # ratios of squared norms can exceed float32's range
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
    """Measure whether conflicts are properties of the tasks or noise of the batch.

    Of n pairs, a conflict on one batch, b on another independent batch, and c on both. The fraction
    of conflicts that repeat is 2 c / (a + b) (Dice's coefficient). If the conflicts of each batch
    were randomly distributed over pairs, c would be a b / n on average, the level of chance.

    Args:
        first: Cosines on one batch, `[T, T]`; see `cosines`.
        second: Cosines on the other batch.

    Returns:
        `conflict_repeats`, and `conflict_repeats_by_chance` to compare it with, both in [0, 1].
        Conflicts due to the noise of the batch repeat about as often as by chance; with few pairs,
        the mean over a run is more informative than one diagnosis. Empty if no pair conflicts on
        either batch.
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
    """Return the fraction of tasks that a step d opposes: ⟨g_t, d⟩ < 0, so their loss increases.

    Surgery determines a direction. The optimiser then scales each of its components, adds momentum
    and decays weights. A direction that did not oppose a task may therefore do so afterwards.

    Args:
        gradients: Task gradients on the batch of the step.
        step: Step of the same network.

    Returns:
        Fractions of the T tasks: `conflict_after_surgery`, opposed by the combined gradient, and
        `conflict_after_step`, opposed by the optimiser's step. Empty for a single task.
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
    """Compute definition 3, H = ∫₀¹ ∇L(θ)ᵀ ∇²L(θ + a(θ′ − θ)) ∇L(θ) da, with θ′ = θ − step ∇L(θ).

    Along this step, ∇²L ∇L(θ) is the derivative of −∇L/step, so the integral is exactly

        H = ∇L(θ)ᵀ (∇L(θ) − ∇L(θ′)) / step.

    This takes one more gradient. Quadrature would take a Hessian-vector product per point, and
    would miss the jumps of the gradient between points, which dominate the curvature of a ReLU
    network.

    Args:
        gradient: Function ∇L from parameters to their gradients. It must be the same in each call,
            so noise is drawn before; in float64, because the two gradients nearly cancel.
        parameters: Shared parameters θ.
        step: Length of the gradient step in units of the gradient, i.e. a learning rate.

    Example:
        >>> gradient = lambda parameters: {"x": 2 * parameters["x"]}  # of Σ x², whose Hessian is 2
        >>> multi_task_curvature(gradient, {"x": torch.tensor([1.0, 2.0]).double()}, step=0.1)
        tensor(40.0000, dtype=torch.float64)
    """
    here = gradient(parameters)
    there = gradient({name: value - step * here[name] for name, value in parameters.items()})
    lost = [(here[name] * (here[name] - there[name])).sum() for name in parameters]
    return torch.stack(lost).sum() / step
