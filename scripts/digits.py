"""Compare methods of surgery on pairs of handwritten digits: two classifications, one regression.

    python scripts/digits.py [--surgery NAME …] [--seeds N] [--steps N] [--quick] [-o DIR]

Data: scikit-learn's 1797 digits of 8 × 8 pixels. They are first split into training, validation and
test digits and then paired, as in MultiMNIST: one digit on the left and one on the right of a
canvas of 8 × 12, with the brighter pixel where they overlap. Tasks: classify the *left* digit,
classify the *right* digit (cross-entropy), and predict the *number* from 0 to 99 that they form
(mean squared error, which is at first a thousand times as large as the other losses, and ten times
as sensitive to the left digit as to the right).

All methods use the same trunk, heads, Adam, learning rate (with linear decay to zero) and, for each
seed, the same initial weights and batches; the seed also determines the test pairs. The learning
rate is the best one of `none` on pairs of validation digits, see `--validate`. RotoGrad's rotations
learn ten times as fast as by default: the default is for a million updates and would have hardly
any effect in a training this short. Two baselines: the regression loss divided by the variance of
its target, by hand and without surgery; and a separate network of the same size for each task.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import LinearLR

from mtrl.surgery import MultiTaskModel

WIDTH, HIDDEN = 12, 64
BATCH, EVALUATED = 128, 4000
LEARNING_RATE = 0.03
RATES = [0.003, 0.01, 0.03, 0.1]
VARIANCE = (100**2 - 1) / 12
"""Variance of a uniform number in 0, …, 99."""

SURGERY = [
    "none",
    "pcgrad",
    "rotograd(rotation_lr=0.01)",
    "rotograd-rotate(rotation_lr=0.01)",
    "rotograd-scale",
]
BY_HAND, ALONE = "none, MSE ÷ variance", "each task alone"
OUTPUTS = {"left": 10, "right": 10, "number": 1}
SCORES = {"left": "left digit, accuracy", "right": "right digit, accuracy", "number": "number, R²"}


class Pairs(NamedTuple):
    """Images of two digits with their labels."""

    pictures: Tensor  # [B, 8, WIDTH]
    left: Tensor  # [B]
    right: Tensor  # [B]

    @property
    def number(self) -> Tensor:
        """Number from 0 to 99, `[B]`."""
        return (10 * self.left + self.right).float()


class Digits(NamedTuple):
    """Single digits."""

    pictures: Tensor  # [D, 8, 8], from 0 to 1
    labels: Tensor  # [D]

    def pairs(self, n: int, generator: torch.Generator) -> Pairs:
        """Draw n pairs with replacement."""
        left, right = torch.randint(len(self.labels), (2, n), generator=generator)
        canvas = torch.zeros(2, n, 8, WIDTH)
        canvas[0, :, :, :8] = self.pictures[left]
        canvas[1, :, :, -8:] = self.pictures[right]
        return Pairs(canvas.amax(0), self.labels[left], self.labels[right])


def load() -> dict[str, Digits]:
    """Load the digits in a fixed 3 : 1 : 1 split into `train`, `validation` and `test`."""
    pictures, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=labels[rest], random_state=0
    )
    parts = {"train": train, "validation": validation, "test": test}
    pictures = pictures.reshape(-1, 8, 8) / 16
    return {
        name: Digits(torch.tensor(pictures[part]).float(), torch.tensor(labels[part]))
        for name, part in parts.items()
    }


def losses_of(outputs: dict[str, Tensor], pairs: Pairs, by_hand: bool) -> dict[str, Tensor]:
    """Compute the losses of the tasks that have outputs."""
    losses = {}
    for task, output in outputs.items():
        if task == "number":
            loss = mse_loss(output[:, 0], pairs.number)
            losses[task] = loss / VARIANCE if by_hand else loss
        else:
            losses[task] = cross_entropy(output, getattr(pairs, task))
    return losses


class Job(NamedTuple):
    """One training run."""

    method: str
    seed: int
    steps: int
    lr: float = LEARNING_RATE
    evaluate_on: str = "test"


def scores(job: Job) -> dict[str, float]:
    """Train, and score each task on pairs of held-out digits."""
    torch.set_num_threads(1)  # the networks are small
    digits = load()
    if job.method == ALONE:
        return {task: v for t in OUTPUTS for task, v in train(job, digits, "none", [t]).items()}
    surgery = "none" if job.method == BY_HAND else job.method
    return train(job, digits, surgery, list(OUTPUTS))


def train(
    job: Job, digits: dict[str, Digits], surgery: str, tasks: Sequence[str]
) -> dict[str, float]:
    """Train one network on these tasks, and score them."""
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    trunk = nn.Sequential(
        nn.Flatten(),
        nn.Linear(8 * WIDTH, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
    )
    heads = {task: nn.Linear(HIDDEN, size) for task, size in OUTPUTS.items()}
    heads = {task: heads[task] for task in tasks}  # all are initialised: weights depend on the seed
    model = MultiTaskModel(trunk, heads, surgery, n_features=HIDDEN, seed=job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.lr, fused=True)
    schedule = LinearLR(optimizer, 1, 0, job.steps)
    by_hand = job.method == BY_HAND
    test = digits[job.evaluate_on].pairs(EVALUATED, generator)

    def losses(batch: Pairs) -> dict[str, Tensor]:
        return losses_of(model(batch.pictures), batch, by_hand)

    for _ in range(job.steps):
        batch = digits["train"].pairs(BATCH, generator)
        model.backward(losses(batch))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.after_step(partial(losses, batch))
    with torch.no_grad():
        outputs = model(test.pictures)
    found = {}
    for task, output in outputs.items():
        if task == "number":
            error = mse_loss(output[:, 0], test.number) / test.number.var(correction=0)
            found[task] = 1 - error.item()
        else:
            found[task] = (output.argmax(1) == getattr(test, task)).float().mean().item()
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and half width of the 95% t-interval, NaN for a single value."""
    if len(values) == 1:
        return values.item(), float("nan")
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def table(head: Sequence[str], rows: dict[str, np.ndarray], sign: str = "") -> str:
    """Return means with 95% intervals as a Markdown table.

    Args:
        head: Header of each column.
        rows: Values by name of the row, `[seeds, tasks]`.
        sign: `+` to show the sign of positive means, too.
    """
    lines = ["|".join(head), "|".join(["---"] + ["---:"] * (len(head) - 1))]
    for name, values in rows.items():
        cells = [f"{m:{sign}.3f} ± {h:.3f}" for m, h in map(interval, values.T)]
        lines.append("|".join([name, *cells]))
    return "\n".join(f"|{line}|" for line in lines)


def draw(found: dict[str, np.ndarray], file: Path) -> None:
    """Draw some pairs and each method's errors; the dotted line is the mean of `ALONE`."""
    heights = [0.85, 0.45 + 0.29 * len(found)]
    figure = Figure(figsize=(6.75, sum(heights)), dpi=150, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = halves
    examples = load()["train"].pairs(8, torch.Generator().manual_seed(1))
    for i, axis in enumerate(above.subplots(1, 8)):
        axis.imshow(examples.pictures[i], cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(f"{examples.left[i]}, {examples.right[i]}", fontsize=7, pad=2)
        axis.set(xticks=[], yticks=[])
    errors = {name: 1 - values.T for name, values in found.items()}
    titles = ["left digit: 1 − accuracy", "right digit: 1 − accuracy", "number: 1 − R²"]
    for i, axis in enumerate(below.subplots(1, 3, sharex=True, sharey=True)):
        axis.axvline(errors[ALONE][i].mean(), color="#555555", linewidth=0.8, linestyle=":")
        for y, (name, rows) in enumerate(errors.items()):
            mean, half = interval(rows[i])
            color = "#555555" if name in (BY_HAND, ALONE) else "#0072b2"
            axis.plot(rows[i], [y + 0.28] * len(rows[i]), "|", color="#777777", markersize=3)
            axis.errorbar(mean, y, xerr=half, fmt="o", color=color, markersize=3.5, capsize=2)
        axis.set_xscale("log")
        axis.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_yticks(range(len(found)), [name.replace("(", "\n(") for name in found])
        axis.set_title(titles[i], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    axis.set_ylim(len(found) - 0.4, -0.5)
    figure.savefig(file)


def validate(seeds: int, steps: int) -> str:
    """Return scores of `none` for several learning rates, on pairs of validation digits."""
    rows = {}
    for lr in RATES:
        jobs = [Job("none", seed, steps, lr, "validation") for seed in range(seeds)]
        values = np.array([list(scores(job).values()) for job in jobs])
        rows[str(lr)] = np.column_stack([values, values.mean(1)])
    return table(["learning rate", *SCORES.values(), "mean"], rows)


def main() -> None:
    """Write a table, the scores of every seed, and a figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("results/digits"))
    parser.add_argument("--surgery", nargs="+", default=SURGERY, metavar="NAME")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: 5)")
    parser.add_argument("--steps", type=int, metavar="N", help="updates [1000]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes [2]")
    parser.add_argument("--validate", action="store_true", help="only choose the learning rate")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 20 steps, one process")
    arguments = parser.parse_args()
    quick = arguments.quick
    seeds = arguments.seeds or (2 if quick else 5)
    steps = arguments.steps or (20 if quick else 1000)
    if arguments.validate:
        print(validate(seeds, steps))
        return

    methods = list(dict.fromkeys([*arguments.surgery, BY_HAND, ALONE]))
    jobs = [Job(method, seed, steps) for method in methods for seed in range(seeds)]
    if quick or arguments.jobs == 1:
        results = list(map(scores, jobs))
    else:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            results = list(pool.map(scores, jobs))
    values = np.array([list(result.values()) for result in results])
    found = dict(zip(methods, values.reshape(len(methods), seeds, -1), strict=True))

    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "digits.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", *SCORES.values()])
        for job, row in zip(jobs, values, strict=True):
            writer.writerow([job.method, job.seed, *(f"{value:.6f}" for value in row)])
    text = f"Test pairs, mean and 95% t-interval of {seeds} seeds, {steps} updates\n\n"
    text += table(["surgery", *SCORES.values()], found) + "\n"
    if "none" in found:
        rows = {name: row - found["none"] for name, row in found.items() if name != "none"}
        text += "\nDifference from `none`, seed by seed\n\n"
        text += table(["surgery", *SCORES.values()], rows, "+") + "\n"
    (arguments.output / "digits.md").write_text(text, encoding="utf-8")
    draw(found, arguments.output / "digits.png")
    print(text, end="")


if __name__ == "__main__":
    main()
