"""The evaluation protocol: deterministic policy, every goal once, success seen at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.make import make_vector_env, steps_of_an_episode
from mtrl.envs.processes import expect_main_guard, n_cores
from mtrl.envs.vector import TaskVectorEnv
from mtrl.errors import UsageError
from mtrl.evaluation.play import Play, act
from mtrl.evaluation.scores import Evaluation
from mtrl.policy.policy import Policy
from mtrl.policy.unseen import in_tasks


def evaluate(
    policy: Policy,
    benchmark: Benchmark,
    seed: int,
    episodes: int = N_GOALS,
    horizon: int | None = None,
    *,
    workers: int | None = None,
    stochastic: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Judge a policy in environments of its own, on the first `episodes` of the 50 goals of `seed`.

    What comes out for a task depends on the policy, the seed, the horizon and `stochastic` alone.

    Args:
        policy: Any `Policy`, or an `MTSAC`.
        benchmark: Tasks it was trained for, or of which it is told descriptions; see
            `mtrl.policy.unseen`.
        seed: Of the goals, and of the samples.
        episodes: Of each task, at most 50.
        horizon: Steps after which an episode is truncated; default: Meta-World's 500, or as long as
            a custom environment goes on.
        workers: Simulator processes; default: one per core.
        stochastic: Sample actions instead of taking the mode.
        progress: Show a bar on a terminal.

    Raises:
        UsageError: if the policy was not trained for one of the tasks, and cannot act elsewhere.

    Example:
        >>> from mtrl import AgentConfig, Policy, evaluate, get_benchmark
        >>> policy = Policy(("reach-v3", "push-v3"), AgentConfig(), 39, 4)
        >>> result = evaluate(policy, get_benchmark("mt1:reach-v3"), seed=0, episodes=2, horizon=5)
        >>> result.success_rates, result.actions.shape
        (array([0.]), (1, 2, 5, 4))
    """
    if any(task not in policy.tasks for task in benchmark.tasks):
        policy = in_tasks(policy, benchmark.tasks, benchmark.descriptions)
    expect_main_guard()
    envs = make_evaluation_env(benchmark, [episodes], horizon, workers, max_restarts=10)
    try:
        _expect_sizes(policy, envs)
        steps = steps_of_an_episode(benchmark, horizon)
        with tqdm(
            total=steps and len(benchmark.tasks) * episodes * steps,
            unit=" steps",
            unit_scale=True,
            disable=None if progress else True,  # None: unless it is a terminal
        ) as bar:
            return evaluate_in(policy, envs, seed, episodes, stochastic=stochastic, tick=bar.update)
    finally:
        envs.close()


def make_evaluation_env(
    benchmark: Benchmark,
    episodes: Sequence[int],
    horizon: int | None,
    workers: int | None = None,
    max_restarts: int = 0,
) -> TaskVectorEnv:
    """Environments on the reference simulator that take their goals in order, for `evaluate_in`.

    Args:
        episodes: Of each task, in the evaluations to come; they decide how many copies of a task
            play side by side.
        benchmark, horizon, workers, max_restarts: As `make_vector_env`.
    """
    return make_vector_env(
        benchmark,
        horizon,
        workers=workers,
        shuffle_goals=False,
        envs_per_task=_copies(len(benchmark.tasks), episodes, workers or n_cores()),
        max_restarts=max_restarts,
    )


def _expect_sizes(policy: Policy, envs: TaskVectorEnv) -> None:
    for name, expected, got in (
        ("observations", policy.observation_size, envs.observation_size),
        ("actions", policy.action_size, envs.action_size),
    ):
        if expected != got:
            raise UsageError(
                f"benchmark: expected {name} of length {expected}, as the policy was trained on, "
                f"got {got}"
            )


def _copies(n_tasks: int, episodes: Sequence[int], workers: int) -> int:
    """How many environments of a task are soonest done, so that all of them end together.

    Counted in steps of one simulator: a policy's answer for all rows takes about as long as two,
    and making an environment as four episodes, because it needs memory too.
    """

    def cost(copies: int) -> float:
        each = math.ceil(n_tasks * copies / workers)
        return (2 + each) * max(episodes) / copies + 4 * each

    return min((e for e in range(1, max(episodes) + 1) if math.gcd(*episodes) % e == 0), key=cost)


def evaluate_in(
    policy: Policy,
    envs: TaskVectorEnv,
    seed: int,
    episodes: int,
    *,
    stochastic: bool = False,
    tick: Callable[[int], object] = int,
) -> Evaluation:
    """As `evaluate`, in environments that take their goals in order and can be used again.

    Args:
        tick: Told after each vector step of how many environment steps it was.
    """
    names, copies = envs.names, envs.envs_per_task
    tasks = np.repeat([policy.tasks.index(name) for name in names], copies)
    plays = [Play(name, seed, copy, envs.action_size) for name in names for copy in range(copies)]
    found: dict[tuple[int, int], tuple[int, float, np.ndarray]] = {}
    observations, _ = envs.reset(seed=seed)
    while any(play.episode < episodes for play in plays):
        noise = np.stack([play.noise() for play in plays]) if stochastic else None
        actions = act(policy, observations, tasks, noise)
        observations, _, _, _, infos = envs.step(actions)
        for play, action, success in zip(plays, actions, infos["success"], strict=True):
            play.note(action, success)
        for row in np.flatnonzero(infos.get("restarted", ())).tolist():
            plays[row].begin(plays[row].episode)
        for row in np.flatnonzero(infos.get("_final_info", ())).tolist():
            play, episode = plays[row], infos["final_info"]["episode"]
            found[row // copies, play.episode] = (
                play.first_success,
                episode["r"][row],
                np.array(play.actions),
            )
            play.begin(play.episode + copies)
        tick(len(plays))
    numbers = [[found[t, e] for e in range(episodes)] for t in range(len(names))]
    first_success, returns = (
        np.array([[episode[i] for episode in row] for row in numbers]) for i in (0, 1)
    )
    longest = max(len(played) for (_, e), (*_, played) in found.items() if e < episodes)
    played = np.full((*returns.shape, longest, envs.action_size), np.nan, np.float32)
    for (t, e), (*_, done) in found.items():
        if e < episodes:
            played[t, e, : len(done)] = done
    return Evaluation(names, seed, first_success, returns, played, envs.tells_success.copy())
