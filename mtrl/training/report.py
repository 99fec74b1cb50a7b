"""Results of a run: logged values with their tags, and the outcome that `train` returns."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.errors import UsageError
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import FINAL, write_text
from mtrl.sac.watch import diverging
from mtrl.surgery.diagnostics import Diagnosis
from mtrl.training.logger import RunLogger


@dataclass(frozen=True)
class Outcome:
    """Outcome of `train`.

    Attributes:
        run_dir: Folder of the run.
        evaluation: Evaluation of the final policy on all 50 goals; None if the run was interrupted
            or stopped.
        signal: Signal that interrupted the run, or None.
        stopped_by: Callback hook that returned False, such as `Patience.on_eval`, or None.
    """

    run_dir: Path
    evaluation: Evaluation | None
    signal: int | None = None
    stopped_by: str | None = None

    def __str__(self) -> str:
        """Return the evaluation's table and the folder, for `print`."""
        table = "" if self.evaluation is None else f"{self.evaluation}\n"
        return f"{table}{self.run_dir}"

    def _repr_html_(self) -> str:
        """Return the folder and the evaluation's table as HTML, for notebooks."""
        table = "" if self.evaluation is None else self.evaluation._repr_html_()
        return f"<code>{html.escape(str(self.run_dir))}</code>{table}"


def training(
    logger: RunLogger,
    steps: int,
    tasks: Sequence[str],
    values: dict[str, float],
    *,
    metrics: Mapping[str, Tensor],
) -> None:
    """Log training metrics, and warn if a critic diverges.

    Args:
        values: Values by tag, including `time/fps`.
        metrics: Metrics of updates, `[T]` by name; copied from the device here.
    """
    for name, measured in metrics.items():
        by_task = dict(zip(tasks, measured.tolist(), strict=True))
        values |= {f"train/{name}/{task}": value for task, value in by_task.items()}
        if name == "critic_loss" and (warning := diverging(by_task)) is not None:
            logger.say(warning)
    logger.write(steps, values)


def scores(rollout: Mapping[str, float], evaluated: str) -> str:
    """Summarise the policy's scores: success if any task reports it, else return.

    Args:
        rollout: Values of `rollout/` tags.
        evaluated: Summary of the last evaluation; empty before the first.
    """
    training = "–"
    for kind, tag, digits in (("return", "ep_rew_mean", 1), ("success", "success_rate", 2)):
        found = [value for name, value in rollout.items() if name.startswith(f"rollout/{tag}/")]
        training = f"{kind} {np.mean(found):.{digits}f}" if found else training
    return f"training: {training}  evaluation: {evaluated or '–'}"


def diagnosis(
    logger: RunLogger, steps: int, tasks: Sequence[str], networks: Mapping[str, Diagnosis]
) -> None:
    """Log conflicts between task gradients by network, if any trunk is trained."""
    if not networks:
        return
    from mtrl.analysis.conflicts import cosine_figure  # imports matplotlib, only needed here

    values: dict[str, float] = {}
    matrices: dict[str, np.ndarray] = {}
    for network, found in networks.items():
        tag = f"surgery/{network}"
        values |= {f"{tag}/{name}": value.item() for name, value in found.measures.items()}
        if len(tasks) > 1:
            matrices[network] = cosines = found.cosines.cpu().numpy()
            figure = cosine_figure(cosines, tasks, f"{network}, {steps:,} steps")
            logger.figure(steps, f"{tag}/cosines", figure)
            logger.text(steps, f"{tag}/conflicts", worst_pairs(found.cosines, tasks))
    logger.write(steps, values)
    if matrices:
        logger.cosines(steps, matrices)


def evaluation(logger: RunLogger, steps: int, result: Evaluation, video: bool) -> None:
    """Log an evaluation, with videos if `video`."""
    returns = dict(zip(result.tasks, result.returns.mean(1).tolist(), strict=True))
    values = {f"eval/return/{task}": value for task, value in returns.items()}
    values["eval/return/mean"] = float(result.returns.mean())
    if len(result.with_success):
        rates = result.success_rates
        values |= {
            f"eval/success_rate/{result.tasks[t]}": float(rates[t]) for t in result.with_success
        }
        values |= {"eval/success_rate/mean": result.mean, "eval/success_rate/worst": result.worst}
    logger.write(steps, values)
    if not video:
        return
    from mtrl.evaluation.video import animations  # imports the renderer

    try:
        for task, gif in animations(result).items():
            logger.animation(steps, f"eval/video/{task}", gif)
    except (OSError, UsageError) as error:  # do not stop the run because of a video
        logger.say(f"no videos of this evaluation: {error}")


def final(run_dir: Path, result: Evaluation, **context: Any) -> None:
    """Write the evaluation of the final policy as CSV and, with its context, as JSON."""
    write_text(run_dir / "eval.csv", result.to_csv())
    write_text(run_dir / "eval.json", result.to_json(policy=FINAL, **context))


def worst_pairs(cosines: Tensor, tasks: Sequence[str], n: int = 5) -> str:
    """Return the pairs of tasks with the strongest conflicts as a Markdown table.

    Args:
        cosines: `[T, T]`; see `cosines`.
        tasks: Task names.
        n: Maximum number of pairs.

    Example:
        >>> print(worst_pairs(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), ["reach-v3", "push-v3"]))
        | task | task | cosine |
        |---|---|---:|
        | reach-v3 | push-v3 | -0.500 |
    """
    first, second = torch.triu_indices(len(tasks), len(tasks), 1).tolist()
    pairs = zip(cosines.cpu()[first, second].tolist(), first, second, strict=True)
    worst = sorted(pair for pair in pairs if pair[0] < 0)[:n]
    if not worst:
        return "No two tasks' gradients conflict."
    rows = [f"| {tasks[i]} | {tasks[j]} | {value:.3f} |" for value, i, j in worst]
    return "\n".join(["| task | task | cosine |", "|---|---|---:|", *rows])
