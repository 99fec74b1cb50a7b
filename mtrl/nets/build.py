"""Declaration and initialisation of a trunk's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mtrl.errors import UsageError


@dataclass(frozen=True)
class Layer:
    """Layer declared by `Build.linear`.

    Attributes:
        weight: Name of the matrix in a file.
        bias: Name of the bias, or None.
        experts: Number K of parallel matrices, or None for a single one.
        composed: Whether a task's matrix is Σ_k w_tk φ_k.
    """

    weight: str
    bias: str | None
    experts: int | None = None
    composed: bool = False


class Build:
    """Collects the parameters that a trunk declares.

    Attributes:
        layers: Layers by the name that the trunk gives them.
        shared: Shared parameters, `[N, …]`, subject to surgery.
        own: Per-task parameters, `[N, T, …]`.
        fixed: Fixed inputs of each task, `[N, T, …]`, which nothing trains.
        decaying: Names of the parameters with weight decay: matrices of layers.

    Args:
        descriptions: Returns the tasks' descriptions as vectors, `[T, e]`, or None.
    """

    def __init__(
        self,
        n_networks: int,
        n_tasks: int,
        generator: torch.Generator,
        descriptions: Callable[[], np.ndarray | None] = lambda: None,
    ) -> None:
        self.n_networks, self.n_tasks, self._generator = n_networks, n_tasks, generator
        self._descriptions = descriptions
        self.fixed: dict[str, Tensor] = {}
        self.layers: dict[str, Layer] = {}
        self.shared: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self.decaying: set[str] = set()

    def linear(
        self,
        name: str,
        n_inputs: int,
        n_outputs: int,
        *,
        experts: int | None = None,
        composed: bool = False,
        bias: str | None = "shared",
        bound: float | None = None,
    ) -> None:
        """Declare a shared linear layer with He-uniform weights and zero bias.

        Its parameters are named `name_weight` and `name_bias`; for a numbered layer, `weight0` and
        `bias0`.

        Args:
            experts: Number of parallel layers, all on the same inputs or each on its own.
            composed: Whether a task's layer is a weighted sum of the experts' parameters.
            bias: "shared"; "task" for one bias per task, uniform like the weights, which is
                equivalent to a layer on the inputs with the task's one-hot; or None.
            bound: Weights are uniform in ± this; default: √(6 / n_inputs) (He et al. 2015).
        """
        weight, offset = f"{name}_weight", f"{name}_bias"
        if name.isdigit():
            weight, offset = f"weight{name}", f"bias{name}"
        self.layers[name] = Layer(weight, offset if bias else None, experts, composed)
        bound = math.sqrt(6 / n_inputs) if bound is None else bound
        lead = () if experts is None else (experts,)
        self.shared[weight] = self.uniform(bound, *lead, n_inputs, n_outputs)
        self.decaying.add(weight)
        if bias == "task":
            self.own[offset] = self.uniform(bound, self.n_tasks, *lead, n_outputs)
        elif bias == "shared":
            self.shared[offset] = torch.zeros(self.n_networks, *lead, n_outputs)

    def layers_in_a_row(self, name: str, *widths: int, **how: Any) -> None:
        """Declare layers `name0`, `name1`, … from each width to the next; see `linear`."""
        for number, (n_inputs, n_outputs) in enumerate(pairwise(widths)):
            self.linear(f"{name}{number}", n_inputs, n_outputs, **how)

    def table(self, name: str, *shape: int, unit: bool = False) -> None:
        """Declare per-task numbers, `[N, T, *shape]`: normal, or random unit vectors."""
        drawn = torch.empty(self.n_networks, self.n_tasks, *shape)
        drawn.normal_(generator=self._generator)
        self.own[name] = normalize(drawn, dim=-1) if unit else drawn

    def descriptions(self) -> np.ndarray:
        """Return the tasks' descriptions as vectors, `[T, e]`.

        Raises:
            UsageError: If the tasks have no descriptions.
        """
        known = self._descriptions()
        if known is None:
            raise UsageError(
                "trunk: expected tasks with descriptions: Meta-World's, or a Benchmark's with "
                "vectors of its own, mtrl.Benchmark(descriptions=...); got tasks without; "
                "--task-input embedding learns a vector for each in their place"
            )
        return known

    def fix(self, name: str, values: np.ndarray) -> None:
        """Declare fixed inputs of each task, `[T, …]`, which nothing trains."""
        self.fixed[name] = torch.from_numpy(values).repeat(self.n_networks, 1, 1)

    def seed(self) -> int:
        """Draw a seed for another generator."""
        drawn = torch.randint(2**62, (), generator=self._generator, device="cpu")
        return int(drawn)

    def uniform(self, bound: float, *shape: int) -> Tensor:
        """Draw `[N, *shape]`, uniform in ± bound."""
        return torch.empty(self.n_networks, *shape).uniform_(
            -bound, bound, generator=self._generator
        )
