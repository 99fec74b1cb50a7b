"""Evaluation protocol: deterministic policy, every goal once, success at any step counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.processes import expect_main_guard, n_cores
from mtrl.envs.vector import TaskVectorEnv
from mtrl.errors import UsageError, expect_kind, expect_whole
from mtrl.evaluation.play import Play, act, played
from mtrl.evaluation.scores import Evaluation
from mtrl.policy.policy import Policy
from mtrl.policy.unseen import in_tasks
from mtrl.progress import shown

Watch = Callable[[Iterator[Play], int, str], Iterator[Play]]
"""Yields episodes as they end and shows progress, given their number and unit."""


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
    """Evaluate a policy in new environments, on the first `episodes` of the 50 goals of `seed`.

    The results of a task depend only on the policy, the seed, the horizon and `stochastic`.

    Args:
        policy: Any `Policy`, including an `MTSAC`.
        benchmark: Tasks the policy was trained for, or other tasks with descriptions (see
            `mtrl.policy.unseen`).
        seed: Seed of the goals and of sampled actions.
        episodes: Episodes per task; at most 50 on Meta-World, one per goal.
        horizon: Steps after which an episode is truncated. Default: 500 for Meta-World, no limit
            for custom environments.
        workers: Number of simulator processes; default: one per core.
        stochastic: Sample actions instead of taking the mode.
        progress: Show progress on standard error; see `mtrl.progress.shown`.

    Raises:
        UsageError: If an argument is invalid, or the policy was not trained for one of the tasks
            and cannot act in it.

    Example:
        >>> from mtrl import AgentConfig, Policy, evaluate, get_benchmark
        >>> policy = Policy(("reach-v3", "push-v3"), AgentConfig(), 39, 4)
        >>> result = evaluate(policy, get_benchmark("mt1:reach-v3"), seed=0, episodes=2, horizon=5)
        >>> result.success_rates, result.actions.shape
        (array([0.]), (1, 2, 5, 4))
    """
    expect_kind("policy", policy, Policy, "Policy.load(path)")
    expect_kind("benchmark", benchmark, Benchmark, "get_benchmark('mt10')")
    expect_whole("seed", seed, least=0)
    expect_whole("episodes", episodes)
    if not benchmark.custom and episodes > N_GOALS:
        raise UsageError(
            f"episodes: expected at most {N_GOALS}, one per goal, got {episodes}: goals repeat"
        )
    policy = in_tasks(policy, benchmark.tasks, benchmark.descriptions)
    expect_main_guard()
    envs = make_evaluation_env(benchmark, [episodes], horizon, workers, max_restarts=10)
    try:
        expect_sizes(policy, envs)
        watch = partial(shown, progress=progress)
        return evaluate_in(policy, envs, seed, episodes, stochastic=stochastic, watch=watch)
    finally:
        envs.close()


def make_evaluation_env(
    benchmark: Benchmark,
    episodes: Sequence[int],
    horizon: int | None,
    workers: int | None = None,
    max_restarts: int = 0,
) -> TaskVectorEnv:
    """Create environments on the reference simulator with goals in order, for `evaluate_in`.

    Args:
        episodes: Episodes per task of each evaluation to come; they determine how many copies of a
            task run in parallel.
        benchmark, horizon, workers, max_restarts: See `make_vector_env`.
    """
    return make_vector_env(
        benchmark,
        horizon,
        workers=workers,
        shuffle_goals=False,
        envs_per_task=_copies(len(benchmark.tasks), episodes, workers or n_cores()),
        max_restarts=max_restarts,
    )


def expect_sizes(policy: Policy, envs: TaskVectorEnv) -> None:
    """Check that environments have the observation and action sizes of a policy.

    Raises:
        UsageError: If they differ.
    """
    for name, expected, got in (
        ("observations", policy.observation_size, envs.observation_size),
        ("actions", policy.action_size, envs.action_size),
    ):
        if expected != got:
            raise UsageError(
                f"benchmark: expected {name} of length {expected}, as in the policy's training, "
                f"got {got}"
            )


def _copies(n_tasks: int, episodes: Sequence[int], workers: int) -> int:
    """Return the number of copies per task that minimises the evaluation's time.

    It divides all numbers of episodes, so that all copies end together. The cost is measured in
    steps of one simulator: computing the actions of all rows takes about two steps. Creating an
    environment is counted as four episodes, because it also needs memory.
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
    watch: Watch | None = None,
) -> Evaluation:
    """Evaluate like `evaluate`, in environments from `make_evaluation_env`, which can be reused.

    Args:
        tick: Callback after each vector step, with its number of environment steps.
        watch: Shows progress: `shown` or `lines` of `mtrl.progress`, with their last argument.
    """
    names, copies = envs.names, envs.envs_per_task
    tasks = np.repeat([policy.tasks.index(name) for name in names], copies)

    def choose(observations: np.ndarray, plays: Sequence[Play]) -> np.ndarray:
        size = envs.action_size
        noise = np.stack([play.noise(size) for play in plays]) if stochastic else None
        return act(policy, observations, tasks, noise)

    counts = [episodes] * len(names)
    ended = played(envs, seed, counts, choose, begin=Play, tick=tick)
    if watch is not None:
        ended = watch(ended, sum(counts), "episodes")
    found = {(names.index(play.name), play.episode): play for play in ended}
    longest = max(len(play.actions) for play in found.values())
    first_success = np.zeros((len(names), episodes), int)
    returns = np.zeros((len(names), episodes))
    actions = np.full((len(names), episodes, longest, envs.action_size), np.nan, np.float32)
    for place, play in found.items():
        first_success[place], returns[place] = play.first_success, play.total_reward
        actions[place][: len(play.actions)] = play.actions
    return Evaluation(names, seed, first_success, returns, actions, envs.tells_success.copy())
