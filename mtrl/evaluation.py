"""The evaluation protocol: deterministic policy, every goal once, success seen at any step."""

from __future__ import annotations

import csv
import io
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from mtrl.benchmarks import N_GOALS, Benchmark, get_benchmark
from mtrl.checkpoint import find_policy
from mtrl.envs.make import make_vector_env
from mtrl.envs.processes import n_cores
from mtrl.envs.vector import TaskVectorEnv
from mtrl.policy import Policy, resolve_device
from mtrl.validation import UsageError, unknown

ROWS = 10
"""Rows whose actions are computed together, always so many.

A product of matrices rounds otherwise with another number of rows, and an episode soon follows the
last digit. With a fixed number, what a policy does in a task does not depend on the other tasks.
"""


@dataclass(frozen=True)
class Evaluation:
    """What E episodes of every task showed.

    Attributes:
        tasks: Task names, T of them.
        seed: Of the goals; episode e is on goal e.
        first_success: The step that first set the success flag, counted from 1; 0 if none did.
            int `[T, E]`.
        returns: Undiscounted sums of raw rewards over the whole episode, `[T, E]`.
        actions: What was done in H steps, float32 `[T, E, H, A]`; enough to play it again.
    """

    tasks: tuple[str, ...]
    seed: int
    first_success: np.ndarray
    returns: np.ndarray
    actions: np.ndarray

    @property
    def success(self) -> np.ndarray:
        """Whether the success flag was set at any step of the episode, bool `[T, E]`."""
        return self.first_success > 0

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
                "steps_to_success_mean": self._steps_to_success(t),
            }
            for t, (task, (low, high)) in enumerate(zip(self.tasks, self.intervals(), strict=True))
        ]

    def _steps_to_success(self, t: int) -> float | None:
        """Mean over task t's successful episodes, None if there are none."""
        steps = self.first_success[t][self.success[t]]
        return float(steps.mean()) if len(steps) else None

    def table(self) -> str:
        """For people."""
        width = max(len(task) for task in (*self.tasks, "worst fifth"))
        lines = [f"{'task':<{width}}  success  95% interval   return  steps to success"]
        for row in self.rows():
            interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
            steps = row["steps_to_success_mean"]
            lines.append(
                f"{row['task']:<{width}}  {row['success_rate']:7.2f}  {interval:>12}  "
                f"{row['return_mean']:7.0f}  {'–' if steps is None else f'{steps:.0f}':>16}"
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
    policy: Policy,
    benchmark: Benchmark,
    seed: int,
    episodes: int = N_GOALS,
    horizon: int = 500,
    workers: int | None = None,
    stochastic: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Judge a policy in environments of its own, on the first `episodes` of the 50 goals of `seed`.

    What comes out for a task depends on the policy, the seed, the horizon and `stochastic` alone.

    Args:
        policy: Any `Policy`, or an `MTSAC`.
        benchmark: Tasks it was trained for.
        seed: Of the goals, and of the samples.
        episodes: Of each task, at most 50.
        horizon: Steps of an episode.
        workers: Simulator processes; default: one per core.
        stochastic: Sample actions instead of taking the mode.
        progress: Show a bar on a terminal.

    Raises:
        UsageError: if the policy was not trained for one of the tasks.

    Example:
        >>> from mtrl import AgentConfig, Policy, evaluate, get_benchmark
        >>> policy = Policy(("reach-v3", "push-v3"), AgentConfig(), 39, 4)
        >>> result = evaluate(policy, get_benchmark("mt1:reach-v3"), seed=0, episodes=2, horizon=5)
        >>> result.success_rates, result.actions.shape
        (array([0.]), (1, 2, 5, 4))
    """
    for task in benchmark.tasks:
        if task not in policy.tasks:
            raise UsageError(
                unknown("tasks", task, policy.tasks) + " (what the policy was trained for)"
            )
    n_tasks = len(benchmark.tasks)
    copies = _copies(n_tasks, episodes, workers or n_cores())
    envs = make_vector_env(benchmark, horizon, workers, shuffle_goals=False, envs_per_task=copies)
    try:
        with tqdm(
            total=n_tasks * episodes * horizon,
            unit=" steps",
            unit_scale=True,
            disable=None if progress else True,  # None: unless it is a terminal
        ) as bar:
            return evaluate_in(policy, envs, seed, episodes, stochastic, bar.update)
    finally:
        envs.close()


def _copies(n_tasks: int, episodes: int, workers: int) -> int:
    """How many environments of a task are soonest done, so that all of them end together.

    Making an environment takes about as long as an episode in it.
    """
    divisors = [e for e in range(1, episodes + 1) if episodes % e == 0]
    return min(divisors, key=lambda e: math.ceil(n_tasks * e / workers) * (episodes // e + 1))


def evaluate_in(
    policy: Policy,
    envs: TaskVectorEnv,
    seed: int,
    episodes: int,
    stochastic: bool = False,
    tick: Callable[[int], object] = int,
) -> Evaluation:
    """As `evaluate`, in environments that take their goals in order and can be used again.

    Args:
        tick: Told after each vector step of how many environment steps it was.
    """
    names, copies = envs.names, envs.envs_per_task
    tasks = np.repeat([policy.tasks.index(name) for name in names], copies)
    returns, flags, actions = [], [], []
    observations, _ = envs.reset(seed=seed)
    for first in range(0, episodes, copies):  # no task terminates: all episodes end together
        dice = [
            np.random.default_rng([seed, zlib.crc32(name.encode()), first + copy])
            for name in names
            for copy in range(copies)
        ]
        done = np.array(False)
        while not done.any():
            noise = None
            if stochastic:
                noise = np.stack(
                    [die.standard_normal(policy.action_size, np.float32) for die in dice]
                )
            actions.append(_act(policy, observations, tasks, noise))
            observations, _, terminated, truncated, infos = envs.step(actions[-1])
            flags.append(infos["success"])
            done = terminated | truncated
            tick(len(done))
        returns.append(infos["final_info"]["episode"]["r"])

    def by_task(values: list[np.ndarray]) -> np.ndarray:
        """Rounds of (steps of) T copies, `[R (H), T C, …]`, as `[T, E, (H), …]`."""
        split = np.stack(values).reshape(len(returns), -1, len(names), copies, *values[0].shape[1:])
        ordered = np.moveaxis(split, (2, 0, 3), (0, 1, 2))
        return ordered.reshape(len(names), -1, *ordered.shape[3:])[:, :episodes]

    flagged = by_task(flags)
    first_success = np.where(flagged.any(2), flagged.argmax(2) + 1, 0)
    return Evaluation(names, seed, first_success, by_task(returns)[:, :, 0], by_task(actions))


def _act(
    policy: Policy, observations: np.ndarray, tasks: np.ndarray, noise: np.ndarray | None
) -> np.ndarray:
    """Actions `[n, A]` for rows of any tasks, `ROWS` at a time."""

    def blocks(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        missing = np.zeros((-len(rows) % ROWS, *rows.shape[1:]), rows.dtype)
        return torch.from_numpy(np.concatenate([rows, missing])).to(policy.device).split(ROWS)

    noises = repeat(None) if noise is None else blocks(noise)
    inputs = zip(blocks(observations), blocks(tasks), noises, strict=False)
    return torch.cat([policy.act(*block) for block in inputs])[: len(tasks)].cpu().numpy()


def evaluate_file(
    policy: Path,
    episodes: int = N_GOALS,
    tasks: tuple[str, ...] | None = None,
    seed: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    stochastic: bool = False,
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
    path = find_policy(policy)
    loaded, header = Policy.load_with_header(path, resolve_device(device))
    benchmark = get_benchmark("", tasks or loaded.tasks)
    seed = header.seed if seed is None else seed
    result = evaluate(
        loaded, benchmark, seed, episodes, header.horizon, workers, stochastic, progress=True
    )
    return result, {
        "policy": str(path),
        "seed": seed,
        "horizon": header.horizon,
        "stochastic": stochastic,
    }
