"""External methods: TorchJD's weightings, and any function from a Gramian to weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import UsageError, is_out_of_memory, one_line, unknown, with_line
from mtrl.surgery.base import GramianSurgery, SurgeryTarget, expect_weights

_EXAMPLES = {"alpha": 1.0, "c": 0.5, "n_byzantine": 1, "weights": [0.7, 0.3]}
"""Example values of TorchJD's options without a default, for error messages."""


class PerNetwork(GramianSurgery):
    """A function from a Gramian `[T, T]` to weights `[T]`, called for each network."""

    capturable = False  # the function may do anything

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def prepare(self, networks: SurgeryTarget) -> None:
        """Try the function on orthogonal gradients before the run starts."""
        device = next(networks.parameters()).device
        if device.type == "meta":  # the function may need values
            device = torch.device("cpu")
        try:
            identity = torch.eye(networks.n_tasks, device=device)
            self.weights(identity[None], torch.Generator())
        except UsageError:
            raise
        except ValueError as error:
            message = f"surgery: expected a method for {networks.n_tasks} tasks, got {self.name}"
            raise UsageError(f"{message}: {one_line(error)}") from None
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"failed on the identity as Gramian: {with_line(error)}"
            raise UsageError(f"surgery: {self.name} {reason}") from error

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        found = [self.function(one) for one in gramian]
        for weights in found:
            expect_weights(weights, gramian[0], self.name)
        return torch.stack(found).to(gramian)


class TorchJDWeighting(PerNetwork):
    """A weighting of TorchJD, on the CPU, where most of them compute anyway.

    It draws from torch's global generator, which is seeded from ours for the call and restored
    afterwards. On CUDA, a call synchronises twice: for that seed and for the Gramian.
    """

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(int(seed)).get_state())
            return super().weights(gramian.cpu(), generator).to(gramian.device)


def callable_weighting(function: Callable[[Tensor], Tensor]) -> GramianSurgery:
    """Create a method from any function that maps a Gramian `[T, T]` to weights `[T]`.

    It is called for each network with the Gramian on the device. It should not draw random numbers,
    because a resumed run could not reproduce them.
    """
    original = getattr(function, "func", function)  # unwrap a functools.partial
    return PerNetwork(getattr(original, "__name__", type(original).__name__), function)


def torchjd_weighting(name: str, /, **options: Any) -> GramianSurgery:
    """Create a method from `torchjd.aggregation.<name>Weighting`.

    Args:
        name: Name without `Weighting`, such as `UPGrad`.
        options: Arguments of its constructor; lists become tensors.

    Raises:
        UsageError: If TorchJD or one of its dependencies is not installed, there is no such
            weighting, the weighting needs more than one Gramian, or it does not have these options.
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
            f"surgery: expected the dependencies of TorchJD for {spec}, got: {one_line(error)}"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:  # the last for a number as a list
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
    """Return the class of a weighting that needs one Gramian and keeps no state."""
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
        reason = "keeps a state between steps, which checkpoints would not contain"
    elif name in names and not name.endswith("Aggregator"):
        reason = "needs the gradients themselves"
    else:
        raise UsageError(unknown("surgery", f"torchjd:{name}", [f"torchjd:{n}" for n in usable]))
    raise UsageError(
        f"surgery: expected a method that needs only the Gramian, got 'torchjd:{name}', "
        f"which {reason}"
    )
