"""Descent on two losses of two coordinates, and plots of it, for landscape.py and theorem1.py.

It uses the package's own code: a trunk whose parameters are the coordinates θ, and two heads
without parameters, which are the losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from mtrl.surgery import MultiTaskModel

METHODS = {"none": "Adam", "pcgrad": "PCGrad + Adam", "rotograd-scale": "RotoScale + Adam"}
COLORS = dict(zip(METHODS, ["#d55e00", "#0072b2", "#009e73"], strict=True))
ARRIVED = 0.1
"""Sum of losses below which the minimum counts as reached."""

BLACK = {"color": "black", "linestyle": "none"}
MARKS: dict[str, dict[str, Any]] = {
    "start": BLACK | {"marker": "o", "markersize": 3.5, "markerfacecolor": "white"},
    "end": BLACK | {"marker": "s", "markersize": 3},
    "minimum of the sum": BLACK
    | {"marker": "*", "markersize": 10, "markerfacecolor": "#f0e442", "zorder": 5},
}


class Point(nn.Module):
    """A trunk whose only parameters are its features, `[1, 2]`."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, inputs: None) -> Tensor:
        """Return the coordinates; there is no input."""
        return self.theta


class Run(NamedTuple):
    """Trajectory of a run."""

    thetas: Tensor  # [steps + 1, 2]
    losses: Tensor  # of the sum, [steps + 1]

    @property
    def arrival(self) -> int | None:
        """First step at which the sum is below `ARRIVED`."""
        found = (self.losses < ARRIVED).nonzero()
        return int(found[0]) if len(found) else None


def descend(
    heads: dict[str, Any],
    start: Sequence[float],
    surgery: str,
    optimizer: type[torch.optim.Optimizer],
    *,
    lr: float,
    steps: int,
) -> Run:
    """Minimise with the package's surgery and any optimiser."""
    model = MultiTaskModel(Point(start), heads, surgery)
    theta = next(model.trunk.parameters())
    stepper = optimizer(model.parameters(), lr=lr)  # type: ignore[call-arg]
    thetas, sums = [], []
    for step in range(steps + 1):
        losses = {task: loss.squeeze() for task, loss in model(None).items()}
        thetas.append(theta.detach().clone()[0])
        sums.append(sum(loss.item() for loss in losses.values()))
        if step < steps:
            model.backward(losses)
            stepper.step()
            stepper.zero_grad()
    return Run(torch.stack(thetas), torch.tensor(sums, dtype=torch.float64))


def total(heads: dict[str, Any], theta: Tensor) -> Tensor:
    """Compute the sum of the losses, `[…, 2]` to `[…]`."""
    return torch.stack([head(theta) for head in heads.values()]).sum(0)


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; cells of `head` are separated by bars."""
    columns = head.split("|")
    lines = [head, "|".join("---" for _ in columns), *("|".join(map(str, row)) for row in rows)]
    return "\n".join(f"|{line}|" for line in lines)


def finish(figure: Figure, handles: list[Line2D], file: Path) -> None:
    """Add one legend below in small type, and save the figure."""
    columns = 5 if len(handles) <= 5 else 3
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )
    for axis in figure.axes:
        axis.title.set_fontsize(8)
        axis.xaxis.label.set_fontsize(7)
        axis.yaxis.label.set_fontsize(7)
        axis.tick_params(labelsize=7)
    figure.savefig(file)
