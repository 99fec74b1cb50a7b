"""Playing the episodes that become demonstrations: a policy's, an expert's, any function's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from tqdm import tqdm

from mtrl.demonstrations.data import Demonstrations
from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.processes import expect_main_guard, n_cores
from mtrl.errors import UsageError, one_line, unknown
from mtrl.evaluation.play import Play, Step, act, played
from mtrl.evaluation.protocol import expect_sizes
from mtrl.policy.policy import Policy

Actor = Callable[[np.ndarray], np.ndarray]
"""From an observation `[d]` to an action `[A]`; it is clipped to [-1, 1]."""


def experts(tasks: Sequence[str]) -> dict[str, Actor]:
    """Meta-World's own scripted policies (`metaworld.policies`) for these of its tasks."""
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
    """Play episodes of training on the reference simulator, and keep every transition.

    What comes out for a task depends on the actor, the seed, the horizon and `stochastic` alone.

    Args:
        actor: A policy that was trained for the tasks, or a function for each task, such as those
            of `experts`.
        benchmark: The tasks.
        episodes: Of each task, from its first on; one number stands for all.
        seed: Of the goals, which are those of a run with this seed, and of the samples.
        horizon: Steps after which an episode is truncated; default: Meta-World's 500, or as long as
            a custom environment goes on.
        workers: Simulator processes; default: one per core.
        stochastic: Sample a policy's actions instead of taking the mode.
        progress: Show a bar on a terminal.

    Raises:
        UsageError: if there is nobody to act in a task, if more episodes of a Meta-World task are
            asked for than differ, or if a function fails or returns no action.
    """
    names = benchmark.tasks
    counts = [episodes] * len(names) if isinstance(episodes, int) else list(episodes)
    known = actor.tasks if isinstance(actor, Policy) else tuple(actor)
    for task, count in zip(names, counts, strict=True):
        if task not in known:
            raise UsageError(unknown("tasks", task, known) + " (what there is a policy for)")
        if count < 1:
            raise UsageError(f"episodes: expected at least 1 of {task}, got {count}")
        if not benchmark.custom and not stochastic and count > N_GOALS:
            raise UsageError(
                f"episodes: expected at most {N_GOALS} of {task}, one for each goal, got {count}: "
                "without chance they repeat"
            )
    expect_main_guard()
    copies = min(max(counts), max(1, n_cores() // len(names)))
    envs = make_vector_env(benchmark, horizon, workers=workers, envs_per_task=copies)
    try:
        if isinstance(actor, Policy):
            expect_sizes(actor, envs)
        choose = _chooser(actor, names, envs.action_size, stochastic)
        ended: list[_Recorded] = []
        bar = tqdm(
            played(envs, seed, counts, choose, begin=_Recorded),
            total=sum(counts),
            unit=" episodes",
            disable=None if progress else True,  # None: unless it is a terminal
        )
        with bar:
            ended.extend(bar)
    finally:
        envs.close()
    # In the order of tasks and episodes, not that in which they happened to end.
    return _joined(names, sorted(ended, key=lambda play: (names.index(play.name), play.episode)))


class _Recorded(Play):
    """An episode of which everything is kept."""

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
        with warnings.catch_warnings():  # Meta-World's, of actions that are clipped
            warnings.simplefilter("ignore", UserWarning)
            found = np.asarray(act(observation.copy()), np.float32)
    except Exception as error:
        kind = type(error).__name__
        raise UsageError(f"actor: that of {task} failed: {kind}: {one_line(error)}") from error
    if found.shape != (size,) or not np.isfinite(found).all():
        raise UsageError(
            f"actor: expected {size} finite numbers as an action in {task}, got {found.tolist()}"
        )
    return found.clip(-1, 1)
