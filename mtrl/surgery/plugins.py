"""Methods from outside: TorchJD's weightings, and any function from a Gramian to weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import UsageError, one_line, unknown
from mtrl.surgery.base import GramianSurgery, SurgeryTarget

_EXAMPLES = {"alpha": 1.0, "c": 0.5, "n_byzantine": 1, "weights": [0.7, 0.3]}
"""Values to show for options of TorchJD's that have no default."""


class PerNetwork(GramianSurgery):
    """A function from one Gramian `[T, T]` to weights `[T]`, called for each network."""

    capturable = False  # it may do anything

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def prepare(self, networks: SurgeryTarget) -> None:
        """Try the function on orthogonal gradients, before the run collects anything."""
        device = next(networks.parameters()).device
        if device.type == "meta":  # a function need not work without numbers
            device = torch.device("cpu")
        try:
            identity = torch.eye(networks.n_tasks, device=device)
            self.weights(identity[None], torch.Generator())
        except UsageError:
            raise
        except ValueError as error:
            message = f"surgery: expected a method for {networks.n_tasks} tasks, got {self.name}"
            raise UsageError(f"{message}: {one_line(error)}") from None

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        found = [self.function(one) for one in gramian]
        for weights in found:
            shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            if shape != (gramian.shape[-1],):
                raise UsageError(
                    f"surgery: expected weights of shape {(gramian.shape[-1],)} for a Gramian of "
                    f"shape {tuple(gramian.shape[1:])}, got {shape} from {self.name}"
                )
        return torch.stack(found).to(gramian)


class TorchJDWeighting(PerNetwork):
    """One of TorchJD's weightings, on the CPU, where most of them compute in any case.

    Its randomness is TorchJD's global generator's, which is seeded from ours for the call and put
    back afterwards. On CUDA the host waits twice for the device: for that seed and for the Gramian.
    """

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(int(seed)).get_state())
            return super().weights(gramian.cpu(), generator).to(gramian.device)


def callable_weighting(function: Callable[[Tensor], Tensor]) -> GramianSurgery:
    """Make a method of any function from one Gramian `[T, T]` to weights `[T]`.

    It is given each network's Gramian in turn, on the device, and should draw no random numbers:
    a resumed run could not repeat them.
    """
    original = getattr(function, "func", function)  # of a functools.partial
    return PerNetwork(getattr(original, "__name__", type(original).__name__), function)


def torchjd_weighting(name: str, /, **options: Any) -> GramianSurgery:
    """Make a method of `torchjd.aggregation.<name>Weighting`.

    Args:
        name: Without the `Weighting`, such as `UPGrad`.
        options: What its constructor takes; a list stands for a tensor.

    Raises:
        UsageError: if TorchJD or what it needs is not installed, if it has no such weighting, if
            the weighting needs more than one Gramian, or if it does not take these options.
    """
    given = ", ".join(f"{option}={value!r}" for option, value in options.items())
    spec = f"torchjd:{name}({given})" if options else f"torchjd:{name}"
    make = _find(name)
    signature = inspect.signature(make)
    try:
        signature.bind(**options)
        weighting = make(**{option: _tensor(value) for option, value in options.items()})
    except ImportError as error:
        raise UsageError(
            f"surgery: expected what TorchJD needs for {spec}, got: {one_line(error)}"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:  # the last of a number for a list
        shown = ", ".join(
            f"{p.name}={_EXAMPLES.get(p.name, '…') if p.default is p.empty else p.default!r}"
            for p in signature.parameters.values()
        )
        raise UsageError(
            f"surgery: expected options as in torchjd:{name}({shown}), got {spec}: "
            f"{one_line(error)}"
        ) from None
    return TorchJDWeighting(f"torchjd:{name}", weighting)


def _tensor(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    return value


def _find(name: str) -> Callable[..., Any]:
    """The class of a weighting that needs one Gramian, and nothing of the steps before."""
    try:
        from torchjd import Stateful, aggregation
    except ImportError:
        raise UsageError(
            f"surgery: expected TorchJD for 'torchjd:{name}', got no such package; "
            'install it with: pip install "mtrl-surgery[torchjd]"'
        ) from None
    names = aggregation.__all__
    weightings = {n.removesuffix("Weighting"): n for n in names if n.endswith("Weighting")}
    weightings.pop("")  # the base class
    classes = {short: getattr(aggregation, n) for short, n in sorted(weightings.items())}
    usable = [n for n, weighting in classes.items() if not issubclass(weighting, Stateful)]
    if name in usable:
        return classes[name]
    if name in classes:
        reason = "keeps a state from step to step, which no checkpoint would hold"
    elif name in names and not name.endswith("Aggregator"):
        reason = "needs the gradients themselves"
    else:
        raise UsageError(unknown("surgery", f"torchjd:{name}", [f"torchjd:{n}" for n in usable]))
    raise UsageError(
        f"surgery: expected a method that needs the Gramian alone, got 'torchjd:{name}', "
        f"which {reason}"
    )
