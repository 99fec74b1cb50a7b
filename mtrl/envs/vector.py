"""All tasks as one `gymnasium.vector.VectorEnv`, whatever simulates them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import AlreadyPendingCallError, NoAsyncCallError
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from mtrl.benchmarks import Benchmark
from mtrl.envs import worker
from mtrl.envs.custom import CustomTask, spaces_of
from mtrl.envs.metaworld import ACTION_SPACE, OBSERVATION_SPACE, MetaWorldTask
from mtrl.envs.native import NativePools
from mtrl.envs.parity import expect_same_simulators
from mtrl.envs.processes import WorkerProcesses


class TaskVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """E environments per task; row t E + e of every array belongs to copy e of task t.

    `step` is `step_async`, after which the caller may do other work while simulators step, and
    `step_wait`. Below, N = T E rows.

    Episodes end in the same step they are followed by the next (`AutoresetMode.SAME_STEP`): where
    `terminated | truncated`, `infos["final_obs"]` holds the true last observation, and
    `infos["final_info"]["episode"]` return `r`, length `l` and whether it ever saw success `s`.
    `infos["success"]` is each step's flag.

    Args:
        names: The T tasks' names.
        simulators: For each task what simulates it, `"metaworld"`, `"envpool"` or `"own"`.
        parts: The rows' simulators, which together have every row once. Copy e of a task plays
            its episodes e, e + E, e + 2E, …
        observation_space: Of every task, a `Box` of one dimension.
        action_space: Likewise.
        envs_per_task: The number E of copies of each task.

    Raises:
        WorkerError: from any method, if a process is lost.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        names: Sequence[str],
        simulators: Sequence[str],
        parts: Sequence[WorkerProcesses | NativePools],
        observation_space: Box,
        action_space: Box,
        envs_per_task: int = 1,
    ) -> None:
        self.names, self.simulators = tuple(names), tuple(simulators)
        self.n_tasks, self.envs_per_task = len(names), envs_per_task
        self.num_envs = n = self.n_tasks * envs_per_task
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, n)
        self.action_space = batch_space(action_space, n)
        (self.observation_size,), (self.action_size,) = observation_space.shape, action_space.shape

        memory = worker.allocate(n, self.observation_size, self.action_size)
        self._shared = worker.view(memory)
        self._parts = parts
        for part in parts:
            part.open(memory)
        self._wait()

        self._pending = False
        self._returns = np.zeros(n)
        self._success = np.zeros(n, bool)
        self._first = np.tile(np.arange(envs_per_task), self.n_tasks)
        self._episodes = self._first - envs_per_task
        self._history: list[list[np.ndarray]] = [[] for _ in range(n)]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every row's next episode, or its first one of `seed`. Observations [N, d]."""
        self._expect_no_step("reset")
        following = self._episodes + self.envs_per_task
        self._episodes = self._first.copy() if seed is not None else following
        self._start(seed, None)
        return self._shared.observations.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row once with actions [N, a] in [-1, 1]; returns [N, d], [N], [N], [N]."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Have every row step with actions [N, a], and return before they have.

        Raises:
            AlreadyPendingCallError: (Gymnasium's) if the last step has not been waited for.
        """
        self._expect_no_step("step_async")
        shared = self._shared
        shared.actions[:] = actions
        for part in self._parts:
            part.step()
        for history, action in zip(self._history, shared.actions.copy(), strict=True):
            history.append(action)
        self._pending = True

    def step_wait(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """What came of `step_async`, as `step` returns it.

        Raises:
            NoAsyncCallError: (Gymnasium's) if there was none.
        """
        if not self._pending:
            raise NoAsyncCallError("step_wait: expected a step_async before it", "step")
        self._pending = False
        self._wait()

        shared = self._shared
        terminated, truncated = shared.terminated.astype(bool), shared.truncated.astype(bool)
        success = shared.success.astype(bool)
        self._returns += shared.rewards
        self._success |= success
        infos: dict[str, Any] = {"success": success}
        done = terminated | truncated
        if done.any():
            lengths = np.array([len(history) for history in self._history])
            episode = {"r": self._returns.copy(), "l": lengths, "s": self._success.copy()}
            infos |= {
                "final_obs": shared.final_observations.copy(),
                "_final_obs": done,
                "final_info": {"episode": episode, "_episode": done},
                "_final_info": done,
            }
            self._begin(done)
            self._episodes[done] += self.envs_per_task
        return shared.observations.copy(), shared.rewards.copy(), terminated, truncated, infos

    def state(self) -> dict[str, Any]:
        """Where every row is: its episode's number, and what was done and seen in it so far."""
        self._expect_no_step("state")
        actions = {str(row): np.array(a, np.float32) for row, a in enumerate(self._history)}
        return {
            "simulators": list(self.simulators),
            "episodes": self._episodes.tolist(),
            "returns": self._returns.tolist(),
            "success": self._success.tolist(),
            "actions": actions,
        }

    def restore(self, state: dict[str, Any], *, seed: int) -> np.ndarray:
        """Go back to a `state` under `seed` by playing its actions again. Observations [N, d].

        The simulators are deterministic, so this is exact, and needs nothing of their inside.

        Raises:
            UsageError: if other simulators made the state.
        """
        self._expect_no_step("restore")
        expect_same_simulators(self.names, state["simulators"], self.simulators)
        self._episodes = np.array(state["episodes"])
        actions = [np.asarray(state["actions"][str(row)]) for row in range(self.num_envs)]
        self._start(seed, actions)
        self._history = [list(rows) for rows in actions]
        self._returns, self._success = np.array(state["returns"]), np.array(state["success"])
        return self._shared.observations.copy()

    def _start(self, seed: int | None, actions: list[np.ndarray] | None) -> None:
        """Start the episodes of `self._episodes`, and play `actions` in them."""
        for part in self._parts:
            part.start(seed, self._episodes, actions)
        self._wait()
        self._begin(np.ones(self.num_envs, bool))

    def _wait(self) -> None:
        # Pools first: what they reset, they reset while workers still work.
        for part in reversed(self._parts):
            part.wait()

    def _begin(self, started: np.ndarray) -> None:
        self._returns[started] = 0.0
        self._success[started] = False
        for row in np.flatnonzero(started):
            self._history[row] = []

    def _expect_no_step(self, call: str) -> None:
        if self._pending:
            raise AlreadyPendingCallError(f"{call}: expected step_wait after step_async", "step")

    def close_extras(self, **kwargs: Any) -> None:
        """End processes and threads."""
        for part in self._parts:
            part.close()


def make_vector_env(
    benchmark: Benchmark,
    horizon: int = 500,
    workers: int | None = None,
    shuffle_goals: bool = True,
    envs_per_task: int = 1,
    simulators: Sequence[str] | None = None,
) -> TaskVectorEnv:
    """The benchmark's tasks, ready to be reset.

    Args:
        benchmark: The tasks.
        horizon: Steps after which an episode is truncated, at most 500.
        workers: Processes for the tasks on the reference simulator; default: one per core.
        shuffle_goals: Whether the 50 goals of the reference simulator come in random order, as in
            training; of one's own environments, whether episodes are those of training.
        envs_per_task: Copies of each task.
        simulators: For each of Meta-World's tasks `"metaworld"` (the reference) or `"envpool"`, as
            `choose_simulators` has it; default: all on the reference.

    Raises:
        UsageError: if spaces of the benchmark's own environments do not fit.
    """
    spaces: tuple[Box, Box] = OBSERVATION_SPACE, ACTION_SPACE
    if benchmark.own:
        spaces, simulators = spaces_of(benchmark), ("own",) * len(benchmark.tasks)
    simulators = simulators or ("metaworld",) * len(benchmark.tasks)
    first_rows = {task: t * envs_per_task for t, task in enumerate(benchmark.tasks)}
    chosen = dict(zip(benchmark.tasks, simulators, strict=True))
    native = [task for task in benchmark.tasks if chosen[task] == "envpool"]
    parts: list[WorkerProcesses | NativePools] = []
    if len(native) < len(benchmark.tasks):
        tasks = [task for task in benchmark.tasks if task not in native]
        rows = [first_rows[task] + copy for task in tasks for copy in range(envs_per_task)]
        factory = partial(_factory, benchmark, horizon, shuffle_goals, envs_per_task)
        of_rows = [task for task in tasks for _ in range(envs_per_task)]
        parts.append(WorkerProcesses(rows, list(map(factory, of_rows)), of_rows, workers))
    if native:
        first = [first_rows[task] for task in native]
        parts.append(NativePools(native, first, envs_per_task, horizon))
    return TaskVectorEnv(benchmark.tasks, simulators, parts, *spaces, envs_per_task)


def _factory(
    benchmark: Benchmark, horizon: int, shuffle_goals: bool, stride: int, task: str
) -> worker.EnvFactory:
    """A picklable callable that makes the task's environment."""
    if task not in benchmark.own:
        return partial(MetaWorldTask, task, horizon, shuffle_goals, stride)
    make, key = CloudpickleWrapper(benchmark.own[task]), benchmark.success_key
    return partial(CustomTask, task, make, key, horizon, shuffle_goals, stride)
