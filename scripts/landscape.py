r"""Draw the effect of surgery on two losses of two coordinates, and PCGrad's theorem 1.

    python scripts/landscape.py [--quick] [-o DIR]

The losses are in closed form; the methods are the package's own code.

**The tragic triad** (Yu et al. 2020, figure 1; the formula is our own). With
r₁,₂ = y − sin x ± (x − 2)/4 and |r|_ε = √(r² + ε²) − ε, ε = 1/20,

    L₁ = 10 |r₁|_ε,    L₂ = |r₂|_ε.

Each loss is zero on a curve, and the curves meet at the only minimum of the sum, x = 2. Between
them, the gradients *conflict*; their *magnitudes* differ by a factor of ten; and the sum is a bent
valley with steep walls, a *curvature* of 10/ε = 200 across its bottom, and a gentle slope along it.
All methods use the same Adam, learning rate and number of steps. The figure shows a learning rate
with which some starts arrive and others do not; the second table has other learning rates.

**Theorem 1**: see theorem1.py. The bound is asserted at every step, so the script fails if it does
not hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from descent import ARRIVED, COLORS, MARKS, METHODS, Run, descend, finish, table
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from theorem1 import CASES, check_theorem, draw_theorem, theorem_table
from torch import Tensor, nn

STARTS = [(-2.5, 2.0), (-2.5, -2.5), (0.0, 2.0), (2.8, -1.5)]
RATES = [0.003, 0.01, 0.03, 0.1]
DRAWN = 0.01


class Valley(nn.Module):
    """One of the triad's losses: `scale` |y − sin x + `slope` (x − 2)|_ε."""

    def __init__(self, scale: float, slope: float, epsilon: float = 0.05) -> None:
        super().__init__()
        self.scale, self.slope, self.epsilon = scale, slope, epsilon

    def forward(self, theta: Tensor) -> Tensor:
        """Compute the loss, `[…, 2]` to `[…]`."""
        x, y = theta.unbind(-1)
        r = y - x.sin() + self.slope * (x - 2)
        return self.scale * ((r.square() + self.epsilon**2).sqrt() - self.epsilon)


TRIAD = {"L₁": Valley(10, 0.25), "L₂": Valley(1, -0.25)}
DASHES: dict[str, Any] = {"L₁": "--", "L₂": ":"}
LOWEST = torch.tensor([2.0, np.sin(2.0)])


def triad_tables(paths: dict[float, dict[str, list[Run]]]) -> str:
    """Return tables of every start at the drawn learning rate, and of all learning rates."""
    rows = [
        (start, METHODS[name], f"{runs[i].losses[-1]:.3f}", runs[i].arrival or "–")
        for i, start in enumerate(STARTS)
        for name, runs in paths[DRAWN].items()
    ]
    first = table(f"start|method|final sum of losses|steps until below {ARRIVED}", rows)
    short = []
    for lr, methods in paths.items():
        for name, runs in methods.items():
            arrivals = [run.arrival for run in runs if run.arrival]
            slowest = max(arrivals) if len(arrivals) == len(runs) else "–"
            mean = sum(run.losses[-1].item() for run in runs) / len(runs)
            arrived = f"{len(arrivals)} of {len(runs)}"
            short.append((lr, METHODS[name], arrived, slowest, f"{mean:.3f}"))
    head = "learning rate|method|starts that arrived|slowest, steps|mean final sum of losses"
    n_steps = len(next(iter(paths[DRAWN].values()))[0].losses) - 1
    return (
        f"Learning rate {DRAWN}, {n_steps} steps\n\n{first}\n\n"
        f"All learning rates, {n_steps} steps\n\n{table(head, short)}"
    )


def draw_triad(paths: dict[str, list[Run]], file: Path) -> None:
    """Draw the losses, their sum over the steps, and the trajectory of each method."""
    figure = Figure(figsize=(6.75, 4.7), dpi=150, layout="constrained")
    top, bottom = axes = figure.subplots(2, 3)
    xs, ys = torch.linspace(-3.6, 3.9, 240), torch.linspace(-3.0, 2.5, 240)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    fields = {name: head(grid) for name, head in TRIAD.items()}
    levels = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]

    def landscape(axis: Axes, field: Tensor) -> ContourSet:
        clipped = field.clamp(min=levels[0])
        filled = axis.contourf(
            xs, ys, clipped, levels, cmap="bone", norm=LogNorm(0.002, 50), extend="max"
        )
        for name, loss in TRIAD.items():
            zero = xs.sin() - loss.slope * (xs - 2)
            axis.plot(xs, zero, linestyle=DASHES[name], color="black", linewidth=0.8)
        axis.set(xlim=(xs[0], xs[-1]), ylim=(ys[0], ys[-1]), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        axis.plot(*LOWEST, **MARKS["minimum of the sum"])
        return filled

    for axis, (name, field) in zip(top, fields.items(), strict=False):
        landscape(axis, field)
        axis.set_title(name)
    for axis, (name, runs) in zip(bottom, paths.items(), strict=True):
        filled = landscape(axis, sum(fields.values(), torch.zeros(())))
        for run in runs:
            axis.plot(*run.thetas.T, color="white", linewidth=2.2)
            axis.plot(*run.thetas.T, color=COLORS[name], linewidth=1.3)
            axis.plot(*run.thetas[0], **MARKS["start"])
            axis.plot(*run.thetas[-1], **MARKS["end"])
            top[2].plot(run.losses, color=COLORS[name], linewidth=1)
        axis.set_title(METHODS[name], color=COLORS[name], fontweight="bold")
    top[2].axhline(ARRIVED, color="black", linewidth=0.8, linestyle=":")
    top[2].set(yscale="log", ylim=(0.02, 60), title="L₁ + L₂ from every start", xlabel="step")
    top[2].text(0, 0.8 * ARRIVED, "reached", fontsize=7, va="top")
    top[2].grid(alpha=0.3)
    for axis in bottom:
        axis.set_xlabel("x")
    for axis in axes[:, 0]:
        axis.set_ylabel("y")
    bar = figure.colorbar(filled, ax=bottom, aspect=15, pad=0.01, ticks=[0.1, 1, 10])
    bar.ax.set_yticklabels(["0.1", "1", "10"])
    bar.minorticks_off()
    handles = [Line2D([], [], label=text, **mark) for text, mark in MARKS.items()]
    handles += [
        Line2D([], [], color="black", linestyle=dashes, linewidth=0.8, label=f"{name} = 0")
        for name, dashes in DASHES.items()
    ]
    finish(figure, handles, file)


def main() -> None:
    """Write two figures and the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("results/landscape"))
    parser.add_argument("--quick", action="store_true", help="few steps, as a smoke test")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # two numbers at a time

    found = {name: check_theorem(name) for name in CASES}
    draw_theorem(found, arguments.output / "theorem1.png")
    steps, rates = (30, [DRAWN]) if arguments.quick else (1000, RATES)
    paths = {
        lr: {
            name: [
                descend(TRIAD, start, name, torch.optim.Adam, lr=lr, steps=steps)
                for start in STARTS
            ]
            for name in METHODS
        }
        for lr in rates
    }
    draw_triad(paths[DRAWN], arguments.output / "triad.png")
    text = f"{triad_tables(paths)}\n\n{theorem_table(found)}\n"
    (arguments.output / "landscape.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
