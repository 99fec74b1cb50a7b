"""Measure whether gradient conflicts are real, for several batch sizes, on a run's checkpoint.

    python scripts/conflicts.py RUN [RUN …] [-o results/conflicts] [--sizes 64 256] [--batches 20]

A conflict on one batch may be noise of that batch. This script draws many pairs of independent
batches from the replay buffer of the run's latest checkpoint, without changing the network. It asks
whether a conflict repeats on the other batch, how similar the two gradients of a task are, and for
which pairs of tasks the mean cosine is negative, by a t-test over batches at 95%. If gradients were
unrelated, one pair in forty would be called negative and one in forty positive. Writes table.md and
conflicts.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t

from mtrl.config.train import TrainConfig
from mtrl.folder import newest_checkpoint, write_text
from mtrl.sac.diagnose import diagnose
from mtrl.training.check import check
from mtrl.training.checkpoint import load_checkpoint
from mtrl.training.state import RunState

COLUMNS = {
    "cosine_mean": "cosine",
    "self_cosine": "with itself",
    "conflict_fraction": "conflict",
    "conflict_repeats": "repeats",
    "conflict_repeats_by_chance": "by chance",
    "negative": "negative",
    "positive": "positive",
    "conflict_after_surgery": "after surgery",
    "conflict_after_step": "after the step",
}
"""Measures; `negative` and `positive` are the fractions of pairs by the t-test."""


@dataclass(frozen=True)
class Row:
    """Means over batches for one network and batch size."""

    run: str
    steps: int
    updates: int
    network: str
    batch_size: int
    batches: int
    measures: dict[str, float]


def look(run_dir: Path, sizes: Sequence[int], batches: int) -> list[Row]:
    """Measure all networks of a run at all batch sizes [transitions per task]."""
    benchmark, _, config = check(TrainConfig.from_yaml(run_dir / "config.yaml"))
    state, _ = load_checkpoint(newest_checkpoint(run_dir))
    run = RunState(config, benchmark, torch.device("cpu"), state)
    rows = []
    try:
        for size in sizes:
            learner = run.learner
            learner.config = learner.config.model_copy(update={"batch_size": size})
            found = [diagnose(learner, run.replay) for _ in range(batches)]
            for network in found[0]:
                diagnoses = [each[network] for each in found]
                names = set().union(*(each.measures for each in diagnoses))
                measures = {
                    name: float(
                        np.mean([d.measures[name].item() for d in diagnoses if name in d.measures])
                    )
                    for name in names & COLUMNS.keys()
                }
                cosines = torch.stack([each.cosines for each in diagnoses]).numpy()
                measures |= signs(cosines)
                place = run_dir.name, run.steps, learner.updates
                rows.append(Row(*place, network, size, batches, measures))
    finally:
        run.close()
    return rows


def signs(cosines: np.ndarray) -> dict[str, float]:
    """Return the fractions of pairs with negative or positive mean cosine by a two-sided t-test.

    Args:
        cosines: Cosines on B independent batches, `[B, T, T]`.
    """
    n_batches, n_tasks, _ = cosines.shape
    first, second = np.triu_indices(n_tasks, 1)
    pairs = cosines[:, first, second]
    error = pairs.std(0, ddof=1) / np.sqrt(n_batches)
    bound = student_t.ppf(0.975, n_batches - 1) * error
    middle = pairs.mean(0)
    return {
        "negative": float((middle < -bound).mean()),
        "positive": float((middle > bound).mean()),
    }


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = " | ".join(COLUMNS.values())
    lines = [
        f"| run | updates | network | transitions per task | {head} |",
        "|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = [f"{row.measures[name]:.2f}" if name in row.measures else "–" for name in COLUMNS]
        lines.append(
            f"| {row.run} | {row.updates:,} | {row.network} | {row.batch_size:,} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the runs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batches", type=int, default=20, help="pairs of batches of each size")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/conflicts"))
    arguments = parser.parse_args()
    if arguments.batches < 2:
        parser.error(f"--batches: expected at least 2, got {arguments.batches}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for run_dir in arguments.runs:
        rows += look(run_dir, arguments.sizes, arguments.batches)
        write_text(arguments.output / "table.md", table(rows) + "\n")
        found = json.dumps([vars(row) for row in rows], indent=1)
        write_text(arguments.output / "conflicts.json", found + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
