"""Draw a run's evaluation curves: each task, and the mean.

python scripts/plot_run.py RUN_DIR OUT.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

TAG = "eval/success_rate/"


def main(run_dir: Path, out: Path) -> None:
    """Read progress.csv and write one picture."""
    with (run_dir / "progress.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(f"{TAG}mean")]
    steps = [int(float(row["time/total_timesteps"])) for row in rows]
    summaries = (f"{TAG}mean", f"{TAG}worst")
    tasks = sorted(key for key in rows[0] if key.startswith(TAG) and key not in summaries)

    columns = 4
    lines = -(-(len(tasks) + 1) // columns)
    size = (2.3 * columns, 1.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True)
    for axis, key in zip(axes.flat, [f"{TAG}mean", *tasks], strict=False):
        mean = key == f"{TAG}mean"
        values = [float(row[key]) for row in rows]
        axis.plot(steps, values, "o-", markersize=3, color="#0072b2" if mean else "#555555")
        axis.set_title("mean over tasks" if mean else key.removeprefix(TAG), fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(tasks) + 1 :]:
        axis.axis("off")
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M"))
    figure.supxlabel("environment steps over all tasks", fontsize=9)
    figure.supylabel("evaluation success rate", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
