"""What of a run is written down, under which tags, and what `train` returns of it."""

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
    """How `train` ended.

    Attributes:
        run_dir: Folder of the run.
        evaluation: Of the final policy, all 50 goals; None if the run was interrupted or stopped.
        signal: What interrupted it, or None.
        stopped_by: The callback's hook that returned False, such as `Patience.on_eval`, or None.
    """

    run_dir: Path
    evaluation: Evaluation | None
    signal: int | None = None
    stopped_by: str | None = None

    def __str__(self) -> str:
        """The evaluation's table and the folder, for `print`."""
        table = "" if self.evaluation is None else f"{self.evaluation}\n"
        return f"{table}{self.run_dir}"

    def _repr_html_(self) -> str:
        """For notebooks: the folder and the evaluation's table."""
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
    """How training goes, and a word if a critic diverges.

    Args:
        values: Tags and numbers, `time/fps` among them.
        metrics: What a task's updates gave and had, `[T]` by name; read off the device here.
    """
    for name, measured in metrics.items():
        by_task = dict(zip(tasks, measured.tolist(), strict=True))
        values |= {f"train/{name}/{task}": value for task, value in by_task.items()}
        if name == "critic_loss" and (warning := diverging(by_task)) is not None:
            logger.say(warning)
    logger.write(steps, values)


def scores(rollout: Mapping[str, float], evaluated: str) -> str:
    """How good the policy is, in a few words: success if a task tells it, else return.

    Args:
        rollout: `rollout/` tags and values.
        evaluated: The last evaluation, in words; empty before the first.
    """
    training = "–"
    for kind, tag, digits in (("return", "ep_rew_mean", 1), ("success", "success_rate", 2)):
        found = [value for name, value in rollout.items() if name.startswith(f"rollout/{tag}/")]
        training = f"{kind} {np.mean(found):.{digits}f}" if found else training
    return f"training: {training}  evaluation: {evaluated or '–'}"


def diagnosis(
    logger: RunLogger, steps: int, tasks: Sequence[str], networks: Mapping[str, Diagnosis]
) -> None:
    """How the tasks' gradients disagree, by network, if any has a trunk that is trained."""
    if not networks:
        return
    from mtrl.analysis.conflicts import cosine_figure  # brings matplotlib, which nothing else needs

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
    """What a policy can do; with `video`, seen too."""
    returns = dict(zip(result.tasks, result.returns.mean(1).tolist(), strict=True))
    values = {f"eval/return/{task}": value for task, value in returns.items()}
    values["eval/return/mean"] = float(result.returns.mean())
    if len(result.told):
        rates = result.success_rates
        values |= {f"eval/success_rate/{result.tasks[t]}": float(rates[t]) for t in result.told}
        values |= {"eval/success_rate/mean": result.mean, "eval/success_rate/worst": result.worst}
    logger.write(steps, values)
    if not video:
        return
    from mtrl.evaluation.video import animations  # brings what draws and writes pictures

    try:
        for task, gif in animations(result).items():
            logger.animation(steps, f"eval/video/{task}", gif)
    except (OSError, UsageError) as error:  # no picture is worth a run
        logger.say(f"no videos of this evaluation: {error}")


def final(run_dir: Path, result: Evaluation, **context: Any) -> None:
    """Write the final policy's evaluation next to it, as CSV and, with its context, as JSON."""
    write_text(run_dir / "eval.csv", result.to_csv())
    write_text(run_dir / "eval.json", result.to_json(policy=FINAL, **context))


def worst_pairs(cosines: Tensor, tasks: Sequence[str], n: int = 5) -> str:
    """The pairs of tasks that conflict most, as a Markdown table; a sentence if none conflicts.

    Args:
        cosines: `[T, T]`; see `cosines`.
        tasks: Names.
        n: At most so many pairs.

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
