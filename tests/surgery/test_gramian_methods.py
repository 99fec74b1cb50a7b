"""Gramian methods against TorchJD, optimality conditions, closed forms and invariants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch._subclasses.fake_tensor import FakeTensorMode

from mtrl.errors import UsageError
from mtrl.surgery import GramianSurgery, available, get_surgery
from mtrl.surgery.methods.aligned_mtl import AlignedMTL
from mtrl.surgery.methods.cagrad import CAGrad
from mtrl.surgery.methods.fairgrad import FairGrad
from mtrl.surgery.methods.imtl_g import IMTLG
from mtrl.surgery.methods.mgda import MGDA
from mtrl.surgery.methods.simplex import minimise
from mtrl.surgery.plugins import torchjd_weighting

METHODS = [name for name in available() if isinstance(get_surgery(name), GramianSurgery)]
DRAWING = ["pcgrad"]  # random orders, tested separately
STEADY = [name for name in METHODS if name not in DRAWING]
SIZES = [2, 3, 5, 10, 50]
assert {"aligned-mtl", "cagrad", "fairgrad", "imtl-g", "mgda", "pcgrad"} <= set(METHODS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def weigh(method: GramianSurgery, gradients: torch.Tensor) -> torch.Tensor:
    """Return weights `[T]` for `[T, P]`, or `[N, T]` for `[N, T, P]`."""
    batch = gradients if gradients.dim() == 3 else gradients[None]
    weights = method.weights(batch @ batch.mT, generator(0))
    return weights if gradients.dim() == 3 else weights[0]


def weigh_all(
    method: GramianSurgery, cases: dict[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, gradients `[T, P]` and weights `[T]` of each case."""
    gramians = torch.stack([gradients @ gradients.T for gradients in cases.values()])
    weights = method.weights(gramians, generator(0))
    return list(zip(cases, cases.values(), weights, strict=True))


def hard_cases(n_tasks: int, seed: int) -> dict[str, torch.Tensor]:
    """Yield gradients `[T, P]` whose Gramians are singular or span eight orders of magnitude."""
    plain = normal(n_tasks, 3 * n_tasks, seed=seed)
    scales = torch.logspace(-2, 2, n_tasks, dtype=torch.float64)[:, None]
    cases = {
        "plain": plain,
        "agreeing": plain.abs(),
        "spread": plain * scales,
        "square": plain[:, :n_tasks],
        "dependent": plain[:, : max(1, n_tasks // 2)],
        "dependent and spread": (plain * scales)[:, : max(1, n_tasks // 2)],
        "nearly parallel": plain[:1] + 1e-6 * plain,
    }
    for name, last in {"twin": plain[0], "opposite": -plain[0], "zero": 0 * plain[0]}.items():
        cases[name] = torch.cat([plain[:-1], last[None]])
    return cases


# Against TorchJD.


@pytest.mark.parametrize("n_tasks", SIZES)
@pytest.mark.parametrize(
    ("ours", "theirs", "rtol"),
    [
        (IMTLG(), {"name": "IMTLG"}, 1e-9),
        (AlignedMTL(), {"name": "AlignedMTL"}, 1e-9),
        (FairGrad(), {"name": "FairGrad", "alpha": 1.0}, 1e-4),  # SciPy's default tolerances
        (FairGrad(2.0), {"name": "FairGrad", "alpha": 2.0}, 1e-4),
        (CAGrad(), {"name": "CAGrad", "c": 0.5}, 1e-3),  # Clarabel stops early
        (CAGrad(0.9), {"name": "CAGrad", "c": 0.9}, 1e-3),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_equals_torchjd(ours, theirs, rtol, n_tasks):
    name, options = theirs["name"], {k: v for k, v in theirs.items() if k != "name"}
    gradients = normal(2, n_tasks, 3 * n_tasks, seed=n_tasks) + 0.1
    expected = weigh(torchjd_weighting(name, **options), gradients)
    torch.testing.assert_close(weigh(ours, gradients), expected, rtol=rtol, atol=rtol / n_tasks)


@pytest.mark.parametrize("n_tasks", SIZES)
def test_mgda_is_at_least_as_short_as_torchjd(n_tasks):
    """Frank-Wolfe stops before the optimum, by at most ‖y − y*‖² ≤ ‖y‖² − ‖y*‖²."""
    gradients = normal(n_tasks, 2 * n_tasks, seed=n_tasks)
    theirs = torchjd_weighting("MGDA", epsilon=1e-9, max_iters=1_000)
    found, other = weigh(MGDA(), gradients) @ gradients, weigh(theirs, gradients) @ gradients
    surplus = other.square().sum() - found.square().sum()
    assert -1e-12 < surplus < 0.1 * gradients.square().sum(1).mean()
    assert (found - other).square().sum() <= surplus + 1e-12


# Optimality conditions.


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n_tasks", SIZES)
def test_mgda_is_optimal(n_tasks, seed):
    """‖g_w‖² − min_i ⟨g_i, g_w⟩ bounds half the distance of ‖g_w‖² from the optimum."""
    for name, gradients, weights in weigh_all(MGDA(), hard_cases(n_tasks, seed)):
        found = weights @ gradients
        lengths = gradients.square().sum(1)
        shortest = lengths[lengths > 0].min()
        gap = found.square().sum() - (gradients @ found).min()
        assert gap <= 1e-8 * shortest, name
        assert (weights >= 0).all() and abs(weights.sum() - 1) < 1e-12, name


@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("n_tasks", SIZES)
def test_cagrad_is_optimal(n_tasks, c):
    """No step in the ball has a larger gain for the worst task than the dual's value at any w."""
    average = torch.full((1, n_tasks), 1 / n_tasks, dtype=torch.float64)
    for name, gradients, weights in weigh_all(CAGrad(c), hard_cases(n_tasks, seed=n_tasks)):
        g_0 = gradients.mean(0)
        radius = c * g_0.norm()
        step = weights @ gradients
        w, _ = minimise((gradients @ gradients.T)[None], average, radius.view(1, 1))
        g_w = w[0] @ gradients
        bound = g_w @ g_0 + radius * g_w.norm()
        unit = g_0.norm() * gradients.square().sum(1).mean().sqrt()
        tolerance = 5e-8 if name in ("dependent", "dependent and spread", "opposite") else 1e-8
        assert (step - g_0).norm() <= radius + 1e-8 * g_0.norm(), name
        assert (gradients @ step).min() >= bound - tolerance * unit, name


@pytest.mark.parametrize("n_tasks", [2, 3, 5, 10])
def test_cagrad_equals_the_authors_solver(n_tasks):
    """SciPy's SLSQP on the dual, as in the authors' code."""
    gradients = normal(n_tasks, 3 * n_tasks, seed=n_tasks)
    gramian = (gradients @ gradients.T).numpy()
    b = np.full(n_tasks, 1 / n_tasks)
    radius = 0.5 * np.sqrt(b @ gramian @ b)
    w = minimize(
        lambda w: b @ gramian @ w + radius * np.sqrt(w @ gramian @ w + 1e-12),
        b,
        bounds=[(0, 1)] * n_tasks,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    expected = torch.from_numpy(b + radius / np.sqrt(w @ gramian @ w) * w)
    torch.testing.assert_close(weigh(CAGrad(), gradients), expected, rtol=0, atol=1e-4 / n_tasks)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("n_tasks", SIZES)
def test_fairgrad_solves_its_equation(n_tasks, alpha):
    solvable = ("plain", "agreeing", "spread", "square", "nearly parallel", "twin")
    cases = {name: hard_cases(n_tasks, seed=3)[name] for name in solvable}
    for name, gradients, w in weigh_all(FairGrad(alpha), cases):
        gains = gradients @ (w @ gradients)
        assert (w > 0).all(), name
        assert (gains * w ** (1 / alpha) - 1).abs().max() < 1e-8, name


# Closed forms.


@settings(max_examples=100, deadline=None)
@given(angle=st.floats(0.01, 3.13), log_ratio=st.floats(-4, 4), log_scale=st.integers(-12, 12))
def test_two_task_mgda_in_closed_form(angle, log_ratio, log_scale):
    a = torch.tensor([1.0, 0.0]).double()
    b = 10**log_ratio * torch.tensor([np.cos(angle), np.sin(angle)])
    expected = (((b - a) @ b) / (a - b).square().sum()).clamp(0, 1)
    weights = weigh(MGDA(), 10.0**log_scale * torch.stack([a, b]))
    distance = (weights[0] - expected) * (a - b).norm()
    assert distance.abs() < 1e-4 * min(1, b.norm()), (weights, expected)


@pytest.mark.parametrize("n_tasks", SIZES)
def test_orthogonal_gradients(n_tasks):
    norms = torch.linspace(1, 3, n_tasks).double()
    gradients = torch.diag(norms)

    def close(method, expected):
        torch.testing.assert_close(weigh(method, gradients), expected, rtol=1e-7, atol=1e-9)

    close(MGDA(), norms**-2 / (norms**-2).sum())
    close(IMTLG(), 1 / norms / (1 / norms).sum())
    close(AlignedMTL(), norms.min() / norms / n_tasks)
    for alpha in (0.5, 1.0, 3.0):
        close(FairGrad(alpha), norms ** (-2 * alpha / (1 + alpha)))
    equal = torch.eye(n_tasks).double()
    torch.testing.assert_close(weigh(CAGrad(0.3), equal).sum().item(), 1.3)


@pytest.mark.parametrize("n_tasks", SIZES)
def test_imtl_g_projects_equally_on_all(n_tasks):
    cases = hard_cases(n_tasks, seed=5)
    for name in ("plain", "spread", "twin"):
        gradients = cases[name]
        weights = weigh(IMTLG(), gradients)
        projections = (gradients @ (weights @ gradients)) / gradients.norm(dim=1)
        assert (projections / projections.mean() - 1).abs().max() < 1e-8, name
        assert abs(weights.sum() - 1) < 1e-12, name
    # Also in float32, where rounding loses a squared norm next to one that is 1e8 times larger.
    expected = weigh(IMTLG(), cases["spread"])
    found = weigh(IMTLG(), cases["spread"].float()).double()
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("n_tasks", SIZES)
def test_aligned_mtl_combines_an_orthogonal_system(n_tasks):
    """d is the mean of the columns of U σ Vᵀ for gradients U Σ Vᵀ, with σ the smallest."""
    gradients = normal(n_tasks, 3 * n_tasks, seed=6)
    u, singular, vt = torch.linalg.svd(gradients, full_matrices=False)
    expected = (singular[-1] * u @ vt).mean(0)
    torch.testing.assert_close(weigh(AlignedMTL(), gradients) @ gradients, expected)
    twice = torch.cat([gradients, gradients[:1]])  # the rank is now one below T
    u, singular, vt = torch.linalg.svd(twice, full_matrices=False)
    expected = (singular[-2] * u[:, :-1] @ vt[:-1]).mean(0)
    torch.testing.assert_close(weigh(AlignedMTL(), twice) @ twice, expected)


def test_cagrad_between_the_average_and_mgda():
    gradients = normal(6, 20, seed=7) + 0.2
    torch.testing.assert_close(weigh(CAGrad(0), gradients), torch.full((6,), 1 / 6).double())
    far, shortest = (weigh(m, gradients) @ gradients for m in (CAGrad(1e5), MGDA()))
    assert torch.cosine_similarity(far, shortest, dim=0) > 1 - 1e-6


# Properties of all methods.


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("n_tasks", [2, 7, 50])
def test_weights_do_not_depend_on_the_order_or_other_networks(name, n_tasks):
    method = get_surgery(name)
    gradients = normal(3, n_tasks, 2 * n_tasks, seed=8)
    weights = weigh(method, gradients)
    order = torch.randperm(n_tasks, generator=generator(9))
    torch.testing.assert_close(weigh(method, gradients[:, order]), weights[:, order])
    for alone, together in zip(gradients, weights, strict=True):
        torch.testing.assert_close(weigh(method, alone), together)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_for_any_gramian(name, dtype):
    for n_tasks in (1, 2, 10, 50):
        cases = {
            f"{case} × {scale}": (scale * gradients).to(dtype)
            for case, gradients in hard_cases(n_tasks, seed=10).items()
            for scale in (0, 1e-12, 1, 1e12)
        }
        for case, _, weights in weigh_all(get_surgery(name), cases):
            assert weights.dtype == dtype and weights.shape == (n_tasks,), case
            assert weights.isfinite().all(), case


@pytest.mark.parametrize("n_tasks", [2, 3, 10, 50])
def test_a_gramian_made_indefinite_by_rounding(n_tasks):
    """Steps stay bounded if the equations no longer have a solution."""
    for name, gradients in hard_cases(n_tasks, seed=14).items():
        norms = gradients.norm(dim=1)
        error = 1e-4 * norms[:, None] * norms * normal(n_tasks, n_tasks, seed=15)
        gramian = (gradients @ gradients.T + error).float()[None]
        for method in STEADY:
            weights = get_surgery(method).weights(gramian, generator(0))
            assert weights.isfinite().all(), (name, method)
        g_0 = gradients.mean(0)
        step = CAGrad().weights(gramian, generator(0))[0].double() @ gradients
        assert (step - g_0).norm() < 0.6 * g_0.norm() + 0.2 * norms.max(), name


def test_a_zero_gradient_does_not_change_the_other_weights():
    gradients = normal(5, 12, seed=16)
    more = torch.cat([gradients, torch.zeros(1, 12).double()])
    for method, factor in (
        (IMTLG(), 1),
        (FairGrad(), 1),
        (FairGrad(2.0), 1),
        (AlignedMTL(), 5 / 6),
    ):
        torch.testing.assert_close(weigh(method, more)[:5], factor * weigh(method, gradients))
    torch.testing.assert_close(weigh(MGDA(), more)[5].item(), 1.0)


@pytest.mark.parametrize("name", ["aligned-mtl", "cagrad", "imtl-g", "mgda", "pcgrad"])
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_scaling_all_gradients_does_not_change_the_weights(name, scale):
    gradients = normal(9, 20, seed=11)
    expected = weigh(get_surgery(name), gradients)
    torch.testing.assert_close(weigh(get_surgery(name), scale * gradients), expected)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_depends_on_values_on_the_host(name):
    """With fake tensors, `item`, `if` on a tensor or a shape from values would raise."""
    with FakeTensorMode():
        weights = get_surgery(name).weights(torch.empty(3, 6, 6), torch.Generator())
    assert weights.shape == (3, 6)


@pytest.mark.parametrize("name", STEADY)
def test_no_constant_lives_on_the_cpu(name):
    gramian = torch.empty(3, 6, 6, device="meta")
    assert get_surgery(name).weights(gramian, generator(0)).device.type == "meta"


@pytest.mark.parametrize(
    "spec",
    [
        "cagrad(c=-0.1)",
        "cagrad(c='much')",
        "fairgrad(alpha=0)",
        "fairgrad(alpha=1e999)",
        "gradnorm(alpha=-1)",
        "gradnorm(lr=0)",
        "famo(gamma=-1)",
        "rotograd(rotation_lr=-1)",
        "rotograd(rotation_decay=1.1)",
        "rotograd(rotation_size=1)",
        "rotograd(rotation_step='cayley')",
        "rotograd-scale(reset_every=0)",
        "pcgrad(c=1)",
        "pcgrad(1)",
        "pcgrad(",
    ],
)
def test_invalid_options_give_a_one_line_error(spec):
    with pytest.raises(UsageError, match=r"^surgery: ") as error:
        get_surgery(spec)
    assert "\n" not in str(error.value)
