"""The evaluation protocol: deterministic policy, every goal once, success seen at any step."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from mtrl.agent import MTSAC
from mtrl.benchmarks import N_GOALS, Benchmark, get_benchmark
from mtrl.checkpoint import newest_checkpoint
from mtrl.envs.vector import TaskVectorEnv, make_vector_env
from mtrl.policy import resolve_device
from mtrl.validation import UsageError, unknown


@dataclass(frozen=True)
class Evaluation:
    """What E episodes of every task showed.

    Attributes:
        tasks: Task names, T of them.
        success: Whether the success flag was set at any step of the episode, bool `[T, E]`.
        returns: Undiscounted sums of raw rewards over the whole episode, `[T, E]`.
    """

    tasks: tuple[str, ...]
    success: np.ndarray
    returns: np.ndarray

    @property
    def success_rates(self) -> np.ndarray:
        """Fraction of successful episodes, `[T]`."""
        return self.success.mean(1)

    @property
    def mean(self) -> float:
        """Mean success rate over the tasks."""
        return float(self.success_rates.mean())

    @property
    def worst(self) -> float:
        """Mean success rate of the worst fifth of the tasks (rounded up)."""
        return float(np.sort(self.success_rates)[: math.ceil(len(self.tasks) / 5)].mean())

    def intervals(self) -> list[tuple[float, float]]:
        """Wilson's 95% interval of each task's success rate."""
        tests = [binomtest(int(row.sum()), len(row)) for row in self.success]
        proportions = [test.proportion_ci(0.95, method="wilson") for test in tests]
        return [(float(p.low), float(p.high)) for p in proportions]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per task."""
        return [
            {
                "task": task,
                "episodes": self.success.shape[1],
                "successes": int(self.success[t].sum()),
                "success_rate": float(self.success_rates[t]),
                "wilson_low": low,
                "wilson_high": high,
                "return_mean": float(self.returns[t].mean()),
            }
            for t, (task, (low, high)) in enumerate(zip(self.tasks, self.intervals(), strict=True))
        ]

    def table(self) -> str:
        """For people."""
        width = max(len(task) for task in (*self.tasks, "worst fifth"))
        lines = [f"{'task':<{width}}  success  95% interval   return"]
        for row in self.rows():
            interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
            lines.append(
                f"{row['task']:<{width}}  {row['success_rate']:7.2f}  {interval:>12}  "
                f"{row['return_mean']:7.0f}"
            )
        lines.append(f"{'mean':<{width}}  {self.mean:7.3f}")
        lines.append(f"{'worst fifth':<{width}}  {self.worst:7.3f}")
        return "\n".join(lines)

    def to_csv(self) -> str:
        """One line per task."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows()[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def to_json(self, **context: Any) -> str:
        """Everything, with what the caller knows of where it comes from."""
        summary = {"mean_success_rate": self.mean, "worst_fifth_success_rate": self.worst}
        return json.dumps(context | summary | {"tasks": self.rows()}, indent=2) + "\n"


def evaluate(
    agent: MTSAC,
    benchmark: Benchmark,
    seed: int,
    episodes: int = N_GOALS,
    horizon: int = 500,
    workers: int | None = None,
) -> Evaluation:
    """Judge a policy in environments of its own, on the first `episodes` of the 50 goals of `seed`.

    The result depends on the policy, the seed and the horizon alone.

    Raises:
        UsageError: if the agent was not trained for one of the tasks.
    """
    for task in benchmark.tasks:
        if task not in agent.tasks:
            raise UsageError(
                unknown("tasks", task, agent.tasks) + " (what the policy was trained for)"
            )
    envs = make_vector_env(benchmark, horizon, workers, shuffle_goals=False)
    try:
        return evaluate_in(agent, envs, seed, episodes)
    finally:
        envs.close()


def evaluate_in(agent: MTSAC, envs: TaskVectorEnv, seed: int, episodes: int) -> Evaluation:
    """As `evaluate`, in environments that take their goals in order and can be used again."""
    tasks = torch.tensor([agent.tasks.index(name) for name in envs.names], device=agent.device)
    success: list[list[bool]] = [[] for _ in envs.names]
    returns: list[list[float]] = [[] for _ in envs.names]
    observations, _ = envs.reset(seed=seed)
    while min(map(len, success)) < episodes:
        inputs = torch.from_numpy(observations).to(agent.device)
        observations, _, _, _, infos = envs.step(agent.act(inputs, tasks).cpu().numpy())
        if "final_info" in infos:
            episode = infos["final_info"]["episode"]
            for row in np.flatnonzero(infos["_final_info"]):
                success[row].append(bool(episode["s"][row]))
                returns[row].append(float(episode["r"][row]))
    return Evaluation(
        envs.names,
        np.array([row[:episodes] for row in success]),
        np.array([row[:episodes] for row in returns]),
    )


def evaluate_file(
    policy: Path,
    episodes: int = N_GOALS,
    tasks: tuple[str, ...] | None = None,
    seed: int | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> tuple[Evaluation, dict[str, Any]]:
    """Judge a run folder's final policy (or its newest checkpoint), a checkpoint, or a policy file.

    Args:
        tasks: Some of the policy's tasks; default: all.
        seed: Of the goals; default: the training run's.

    Returns:
        The evaluation, and what it was made of, as plain values.

    Raises:
        UsageError: if there is no policy, or it was not trained for one of the tasks.
    """
    path = policy
    if policy.is_dir():
        final = policy / "policy_final.safetensors"
        path = final if final.exists() else newest_checkpoint(policy)
    agent, header = MTSAC.load_with_header(path, resolve_device(device))
    benchmark = get_benchmark("", tasks or agent.tasks)
    seed = int(header.get("seed", 0)) if seed is None else seed
    horizon = int(header.get("horizon", 500))
    result = evaluate(agent, benchmark, seed, episodes, horizon, workers)
    return result, {"policy": str(path), "seed": seed, "horizon": horizon}
