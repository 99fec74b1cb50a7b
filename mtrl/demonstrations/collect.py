"""Collecting demonstrations from policies, experts and other functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from mtrl.demonstrations.data import Demonstrations
from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.processes import expect_main_guard, n_cores
from mtrl.errors import UsageError, expect_kind, one_line, unknown
from mtrl.evaluation.play import Play, Step, act, played
from mtrl.evaluation.protocol import expect_sizes
from mtrl.policy.policy import Policy
from mtrl.progress import shown

Actor = Callable[[np.ndarray], np.ndarray]
"""Function from an observation `[d]` to an action `[A]`, which is clipped to [-1, 1]."""


def experts(tasks: Sequence[str]) -> dict[str, Actor]:
    """Return Meta-World's scripted policies (`metaworld.policies`) for these tasks."""
    known: dict[str, Any] = ENV_POLICY_MAP
    return {task: known[task]().get_action for task in tasks}


def collect(
    actor: Policy | Mapping[str, Actor],
    benchmark: Benchmark,
    episodes: int | Sequence[int],
    seed: int = 0,
    horizon: int | None = None,
    *,
    workers: int | None = None,
    stochastic: bool = False,
    progress: bool = False,
) -> Demonstrations:
    """Collect episodes on the reference simulator.

    The episodes of a task depend only on the actor, the seed, the horizon and `stochastic`.

    Args:
        actor: Policy trained for the tasks, or a function for each task, such as those of
            `experts`.
        benchmark: The tasks.
        episodes: Episodes per task; one number for all tasks, or one for each.
        seed: Seed of the goals, which are the training goals of this seed, and of sampled actions.
        horizon: Steps after which an episode is truncated; default: 500 for Meta-World, unlimited
            for custom environments.
        workers: Number of simulator processes; default: one per core.
        stochastic: Whether to sample a policy's actions instead of taking the mode.
        progress: Show progress on standard error; see `mtrl.progress.shown`.

    Raises:
        UsageError: If a task has no actor, if there are more episodes than goals and so episodes
            would repeat, or if a function fails or returns anything but an action.
    """
    expect_kind("benchmark", benchmark, Benchmark, "get_benchmark('mt10')")
    names = benchmark.tasks
    counts = [episodes] * len(names) if isinstance(episodes, int) else list(episodes)
    known = actor.tasks if isinstance(actor, Policy) else tuple(actor)
    for task, count in zip(names, counts, strict=True):
        if task not in known:
            raise UsageError(unknown("tasks", task, known) + " (tasks of the policy)")
        if count < 1:
            raise UsageError(f"episodes: expected at least 1 for {task}, got {count}")
        if not benchmark.custom and not stochastic and count > N_GOALS:
            raise UsageError(
                f"episodes: expected at most {N_GOALS} for {task}, one per goal, got {count}: "
                "deterministic episodes would repeat"
            )
    expect_main_guard()
    copies = min(max(counts), max(1, n_cores() // len(names)))
    envs = make_vector_env(benchmark, horizon, workers=workers, envs_per_task=copies)
    try:
        if isinstance(actor, Policy):
            expect_sizes(actor, envs)
        choose = _chooser(actor, names, envs.action_size, stochastic)
        plays = played(envs, seed, counts, choose, begin=_Recorded)
        ended = list(shown(plays, sum(counts), "episodes", progress))
    finally:
        envs.close()
    # Sort by task and episode, because episodes end in any order.
    return _joined(names, sorted(ended, key=lambda play: (names.index(play.name), play.episode)))


class _Recorded(Play):
    """An episode that records every step."""

    def __init__(self, name: str, seed: int, episode: int) -> None:
        super().__init__(name, seed, episode)
        self.steps: list[Step] = []

    def note(self, step: Step) -> None:
        super().note(step)
        self.steps.append(step)


def _joined(names: Sequence[str], plays: Sequence[_Recorded]) -> Demonstrations:
    steps = [step for play in plays for step in play.steps]
    columns = dict(zip(Step._fields, map(np.array, zip(*steps, strict=True)), strict=True))
    lengths = [len(play.steps) for play in plays]
    return Demonstrations(
        tuple(names),
        np.repeat([names.index(play.name) for play in plays], lengths),
        columns["observation"],
        columns["action"],
        columns["reward"],
        columns["following"],
        columns["terminated"],
        columns["truncated"],
        columns["success"],
    )


def _chooser(
    actor: Policy | Mapping[str, Actor], names: Sequence[str], size: int, stochastic: bool
) -> Callable[[np.ndarray, Sequence[Play]], np.ndarray]:
    def by_policy(observations: np.ndarray, plays: Sequence[Play]) -> np.ndarray:
        assert isinstance(actor, Policy)
        tasks = np.array([actor.tasks.index(play.name) for play in plays])
        noise = np.stack([play.noise(size) for play in plays]) if stochastic else None
        return act(actor, observations, tasks, noise)

    def by_function(observations: np.ndarray, plays: Sequence[Play]) -> np.ndarray:
        assert not isinstance(actor, Policy)
        rows = [
            _action(actor[play.name], play.name, observation, size)
            for play, observation in zip(plays, observations, strict=True)
        ]
        return np.stack(rows)

    return by_policy if isinstance(actor, Policy) else by_function


def _action(act: Actor, task: str, observation: np.ndarray, size: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():  # Meta-World warns about clipped actions
            warnings.simplefilter("ignore", UserWarning)
            found = np.asarray(act(observation.copy()), np.float32)
    except Exception as error:
        kind = type(error).__name__
        raise UsageError(
            f"actor: the function of {task} failed: {kind}: {one_line(error)}"
        ) from error
    if found.shape != (size,) or not np.isfinite(found).all():
        raise UsageError(
            f"actor: expected {size} finite numbers as an action in {task}, got {found.tolist()}"
        )
    return found.clip(-1, 1)
