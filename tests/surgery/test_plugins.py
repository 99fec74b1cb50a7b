"""TorchJD's weightings and plain functions as methods, and errors for unsupported ones."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torchjd import aggregation

from mtrl.errors import UsageError
from mtrl.surgery import get_surgery
from mtrl.surgery.plugins import callable_weighting, torchjd_weighting


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(n_tasks: int) -> SimpleNamespace:
    return SimpleNamespace(n_tasks=n_tasks, parameters=lambda: iter([torch.empty(0)]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AlignedMTL", {"pref_vector": [1, 2, 3, 4]}),
        ("AlignedMTL", {"scale_mode": "rmse"}),
        ("Constant", {"weights": [0.1, 0.2, 0.3, 0.4]}),
        ("DualProj", {}),
        ("IMTLG", {}),
        ("Krum", {"n_byzantine": 1, "n_selected": 2}),
        ("MGDA", {"max_iters": 5}),
        ("Mean", {}),
        ("PCGrad", {}),
        ("Random", {}),
        ("Sum", {}),
        ("UPGrad", {}),
        ("UPGrad", {"pref_vector": [1.0, 2.0, 3.0, 4.0]}),
    ],
)
def test_torchjd_weightings_by_name(name, options):
    gramian = torch.randn(3, 4, 9, generator=generator(12))
    gramian = gramian @ gramian.mT
    method = torchjd_weighting(name, **options)
    method.prepare(networks(4))
    before = torch.get_rng_state()
    found = method.weights(gramian, generator(13))
    assert torch.equal(torch.get_rng_state(), before)

    tensors = {k: torch.tensor(v).float() if isinstance(v, list) else v for k, v in options.items()}
    weighting = getattr(aggregation, f"{name}Weighting")(**tensors)
    seed = torch.randint(2**62, (), generator=generator(13))
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        assert torch.equal(found, torch.stack([weighting(one) for one in gramian]))


def test_torchjd_uses_only_our_generator():
    method, gramian = torchjd_weighting("Random"), torch.eye(5)[None]
    first = method.weights(gramian, generator(0))
    torch.rand(3)
    assert torch.equal(method.weights(gramian, generator(0)), first)
    assert not torch.equal(method.weights(gramian, generator(1)), first)
    ours = generator(0)
    assert not torch.equal(method.weights(gramian, ours), method.weights(gramian, ours))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UPgrad", {}, "unknown 'torchjd:UPgrad'; did you mean 'torchjd:UPGrad'"),
        ("", {}, r"unknown 'torchjd:'; .*expected one of"),
        ("Aggregator", {}, "unknown 'torchjd:Aggregator'"),
        ("ConFIG", {}, "got 'torchjd:ConFIG', which needs the gradients themselves"),
        ("GradDrop", {}, "needs the gradients themselves"),
        ("NashMTL", {"n_tasks": 3}, "needs the gradients themselves"),
        ("TrimmedMean", {}, "needs the gradients themselves"),
        ("GradVac", {}, "keeps a state between steps"),
        ("PCD", {}, "keeps a state"),
        ("MoDo", {}, "keeps a state"),
        ("CAGrad", {}, r"as in torchjd:CAGrad\(c=0.5, .*, got torchjd:CAGrad: .*argument: 'c'"),
        ("UPGrad", {"c": 1}, r"got torchjd:UPGrad\(c=1\): got an unexpected .*'c'"),
        ("Krum", {"n_byzantine": -1}, r"got torchjd:Krum\(n_byzantine=-1\): .*non-negative"),
        ("Constant", {"weights": 3}, r"as in torchjd:Constant\(weights=\[0.7, 0.3\]\), got"),
    ],
)
def test_torchjd_errors(name, options, message):
    with pytest.raises(UsageError, match=message) as error:
        torchjd_weighting(name, **options)
    assert str(error.value).startswith("surgery: ") and "\n" not in str(error.value)


def test_missing_torchjd(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UsageError, match=r'expected TorchJD .*"mtrl-surgery\[torchjd\]"'):
        torchjd_weighting("UPGrad")


def test_missing_solver_of_torchjd(monkeypatch):
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "torchjd\[quadprog_projector\]"'):
        torchjd_weighting("UPGrad")


def test_unsupported_weightings_are_rejected_before_the_run():
    for method in (
        torchjd_weighting("Krum", n_byzantine=3),
        torchjd_weighting("Constant", weights=[1]),
    ):
        with pytest.raises(UsageError, match="expected a method for 4 tasks, got torchjd:"):
            method.prepare(networks(4))


def test_a_function_is_a_method():
    def inverse_norms(gramian):
        return gramian.diagonal().rsqrt()

    method = callable_weighting(inverse_norms)
    gramian = torch.diag_embed(torch.tensor([[1.0, 4.0], [16.0, 25.0]]))
    found = method.weights(gramian, generator(0))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [0.25, 0.2]]))
    assert callable_weighting(lambda g: g.double()[0]).weights(gramian, generator(0)).dtype == (
        torch.float32
    )
    for bad, shown in ((lambda g: g, r"\(2, 2\)"), (lambda g: [1, 1], "list")):
        with pytest.raises(UsageError, match=rf"weights of shape \(2,\) .* got {shown} from"):
            callable_weighting(bad).prepare(networks(2))


def test_a_function_that_fails_is_reported_before_the_run():
    def broken(gramian):
        return gramian.eigenvectors

    with pytest.raises(
        UsageError, match=r"broken failed on .*AttributeError: .*test_plugins.py, l"
    ):
        callable_weighting(broken).prepare(networks(2))


def inverse_squares(gramian, power=1.0):
    return gramian.diagonal() ** -power


def test_names_with_a_colon_are_looked_up():
    gramian = torch.diag_embed(torch.tensor([[1.0, 4.0]]))
    found = get_surgery(f"{__name__}:inverse_squares(power=0.5)").weights(gramian, generator(0))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5]]))
    krum = get_surgery("torchjd:Krum(n_byzantine=1, n_selected=2)")
    assert krum.weights(torch.eye(5)[None], generator(0)).sum().item() == pytest.approx(1)
    with pytest.raises(UsageError, match="cannot import"):
        get_surgery(f"{__name__}:nothing")
