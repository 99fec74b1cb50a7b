"""Custom modules as trunks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from mtrl.errors import UsageError, one_line
from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import Trunk

PREFIX = "module:"
"""Prefix of the names of the module's parameters, in which dots become colons."""

_INSTEAD = " (forward can compute constants)"


@dataclass(frozen=True)
class OwnModule(Trunk):
    """A custom `torch.nn.Module` that maps observations `[B, in]` to features `[B, d]`.

    For per-task gradients, it is called for each network and task with views of the parameters
    (`torch.func.functional_call` under two `vmap`), so that one ordinary backward gives the
    gradient of each task. By default it does not receive the task, and heads distinguish tasks.
    With `task_input`, the task vector is appended to the observation, and `in` counts both.

    Args:
        module: Class, or function that returns a module; called as `module(n_inputs, **options)`.
        name: Registered name.
        options: Options from `--trunk "name(option=value)"`.
    """

    module: Callable[..., nn.Module] = nn.Identity
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    usual: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Check only `task_input`: a module's options are not sizes of a trunk."""
        self._check_task_input()

    @property
    def n_features(self) -> int:
        """Length d of z, known once the module is built."""
        size: int = self.__dict__["_n_features"]
        return size

    def build(self, make: Build, n_inputs: int) -> None:
        """Create N modules, and declare their stacked parameters.

        Raises:
            UsageError: If the module cannot be created, depends on more than its observations and
                its parameters, freezes some of these, or uses an operation that cannot be
                vectorised over networks and tasks.
        """
        n_own = n_inputs
        if self.told is not None:
            n_own += self.n_told(make)
            self.tell(make, unit=True)
        seed = make.seed()
        modules = self._make(seed, make.n_networks, n_own)
        first = modules[0]
        self._expect_parameters(first)
        for name, value in first.named_parameters():
            values = [module.get_parameter(name).detach() for module in modules]
            # A single number is stored as a vector of one.
            make.shared[_stored(name)] = torch.stack(values).view(len(values), *_shape(value))
            if value.ndim > 1:  # as is common: biases and the vectors of LayerNorm do not decay
                make.decaying.add(_stored(name))
        object.__setattr__(self, "_template", first.requires_grad_(False))
        object.__setattr__(self, "_names", _names(first))
        object.__setattr__(self, "_n_features", self._try(make, n_inputs))
        self._expect_parameters(first, trained=False)  # again: a call may leave tensors behind
        self._expect_a_function(first, self._make(seed + 1, 1, n_own)[0], n_own)

    def _make(self, seed: int, count: int, n_inputs: int) -> list[nn.Module]:
        """Create modules whose initial weights depend only on the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return [self.module(n_inputs, **self.options) for _ in range(count)]
            except Exception as error:
                raise UsageError(
                    f"trunk: cannot create {self.name}({n_inputs}, …): {one_line(error)}"
                ) from None

    def _expect_parameters(self, module: nn.Module, trained: bool = True) -> None:
        """Check that all tensors are parameters: others are neither saved nor moved to a device."""
        among = f"a module with parameters only, got {self.name!r} with the"
        if buffers := [name for name, _ in module.named_buffers()]:
            raise UsageError(f"trunk: expected {among} buffer {buffers[0]!r}{_INSTEAD}")
        known = {id(value) for value in module.parameters()}
        for path, part in module.named_modules():
            for name, value in vars(part).items():
                if any(torch.is_tensor(x) and id(x) not in known for x in tree_leaves(value)):
                    whole = f"{path}.{name}" if path else name
                    raise UsageError(f"trunk: expected {among} tensor {whole!r}{_INSTEAD}")
        if not list(module.parameters()):
            raise UsageError(f"trunk: expected a module with parameters, got {self.name!r}")
        for name, value in module.named_parameters():
            if is_lazy(value):
                raise UsageError(
                    f"trunk: expected parameters of known shape, got {self.name!r} with the lazy "
                    f"{name!r}"
                )
            if trained and not value.requires_grad:
                raise UsageError(
                    f"trunk: expected parameters that are all trained, got {self.name!r} with "
                    f"requires_grad=False for {name!r}"
                )

    def _expect_a_function(self, module: nn.Module, other: nn.Module, n_inputs: int) -> None:
        """Check that features are the same at each call, and with a module created again.

        Otherwise a policy would differ from the one that was saved.
        """
        rows = torch.linspace(-1, 1, 2 * n_inputs)
        parameters: dict[str, Tensor] = dict(module.named_parameters())
        if rows.is_meta:
            return
        with torch.no_grad():
            found, *others = (
                functional_call(each, parameters, (rows.view(2, -1),))
                for each in (module, module, other)
            )
        if not all(torch.allclose(found, each, equal_nan=True) for each in others):
            raise UsageError(
                f"trunk: expected features that depend on parameters and observations only, got "
                f"{self.name!r}, whose features differ from call to call or from module to module"
            )

    def _try(self, make: Build, n_inputs: int) -> int:
        """Return the length of the features, by one call for all networks and tasks."""
        rows = 2
        inputs = torch.linspace(-1, 1, make.n_tasks * rows * n_inputs)
        inputs = inputs.view(1, make.n_tasks, rows, n_inputs).requires_grad_()
        views = {
            name: value[:, None].expand(-1, make.n_tasks, *value.shape[1:]).requires_grad_()
            for name, value in make.shared.items()
        }
        try:
            with torch.enable_grad():
                found = self(Params({}, views, make.own | make.fixed), inputs)
                first = found[:, :, 0].sum()
                wanted = [inputs, *views.values()]
                by_inputs, *used = torch.autograd.grad(first, wanted, allow_unused=True)
        except Exception as error:
            reason = one_line(error)
            if "called random operation" in reason:  # under vmap
                reason = "expected no random numbers, such as those of dropout"
            raise UsageError(
                f"trunk: {self.name!r} cannot be vectorised over networks and tasks: "
                f"{reason}{_where(error)}"
            ) from None
        shape = tuple(found.shape)
        if len(shape) != 4 or shape[2] != rows or not shape[3]:
            raise UsageError(
                f"trunk: expected features of shape ({rows}, d) from {self.name!r} for {rows} "
                f"observations, got {shape[2:]}"
            )
        if not (found.is_meta or found.isfinite().all()):
            raise UsageError(
                f"trunk: expected finite features from {self.name!r}, got some NaN or ∞"
            )
        if by_inputs is not None and not by_inputs.is_meta and by_inputs[:, :, 1].any():
            raise UsageError(
                f"trunk: expected features that depend on one observation from {self.name!r}, got "
                "some that depend on others in the batch"
            )
        for name, gradient in zip(views, used, strict=True):
            if gradient is None:
                unused = name.removeprefix(PREFIX).replace(":", ".")
                raise UsageError(
                    f"trunk: expected features that depend on every parameter of {self.name!r}, "
                    f"got features that do not depend on {unused!r}"
                )
        return shape[-1]

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        template: nn.Module = self.__dict__["_template"]
        if self.told is not None:
            n_networks = max(len(inputs), len(told := self.task(p)))
            rows = inputs.expand(n_networks, -1, -1, -1)
            inputs = torch.cat([rows, told.to(rows).expand(*rows.shape[:3], -1)], -1)
        parameters = {}  # [N, T or 1, …]
        for name, value in template.named_parameters():
            found = p.shared(_stored(name), len(_shape(value)))
            parameters[name] = found if value.ndim else found.squeeze(-1)
        n_networks, n_views = next(iter(parameters.values())).shape[:2]
        if n_views == 1:  # the same function for all tasks: a single batch
            n_tasks, n_rows = inputs.shape[1:3]
            batches = inputs.flatten(1, 2)
            features = [
                self._call({k: v[n, 0] for k, v in parameters.items()}, batches[n % len(batches)])
                for n in range(n_networks)
            ]
            return torch.stack(features).unflatten(1, (n_tasks, n_rows))
        several = len(inputs) > 1
        of_networks = vmap(vmap(self._call), in_dims=(0, 0 if several else None))
        result: Tensor = of_networks(parameters, inputs if several else inputs[0])
        return result

    def _call(self, parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        template, names = self.__dict__["_template"], self.__dict__["_names"]
        given = {place: parameters[name] for place, name in names.items()}
        found: Tensor = functional_call(template, given, (rows,), tie_weights=False)
        return found


def _names(module: nn.Module) -> dict[str, str]:
    """Return the name of the parameter in each place of the module, where it may be tied.

    torch can find the places itself, but leaves the other parameters in a part that has two names.
    """
    names = {id(value): name for name, value in module.named_parameters()}
    return {
        f"{path}.{name}" if path else name: names[id(value)]
        for path, part in module.named_modules()
        for name, value in part.named_parameters(recurse=False, remove_duplicate=False)
    }


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape) or (1,)


def _stored(name: str) -> str:
    return PREFIX + name.replace(".", ":")


def _where(error: Exception) -> str:
    """Return the innermost line of the traceback outside PyTorch and this file."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    if not theirs:
        return ""
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno}: {theirs[-1].line})"
