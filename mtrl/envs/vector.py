"""All tasks as one `gymnasium.vector.VectorEnv`, independent of their simulators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import AlreadyPendingCallError, NoAsyncCallError
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from mtrl.envs.native import NativePools
from mtrl.envs.parity import expect_same_simulators
from mtrl.envs.processes import WorkerError, WorkerProcesses
from mtrl.envs.restarts import Restarts
from mtrl.envs.shared import allocate, view


class TaskVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """E environments per task; row t E + e of every array belongs to copy e of task t.

    `step` calls `step_async`, after which the caller may do other work while simulators step, and
    then `step_wait`. Below, N = T E is the number of rows.

    An environment resets in the step that ends its episode (`AutoresetMode.SAME_STEP`). Where
    `terminated | truncated`, `infos["final_obs"]` holds the true last observation, and
    `infos["final_info"]["episode"]` holds the return `r`, the length `l` and whether any step was
    successful, `s`. `infos["success"]` is the success flag of each step.

    Args:
        names: Names of the T tasks.
        simulators: Simulator of each task, `"metaworld"`, `"envpool"` or `"own"`.
        parts: Simulators, which together cover every row once. Copy e of a task plays its
            episodes e, e + E, e + 2E, …
        observation_space: Space of every task, a `Box` of one dimension.
        action_space: Likewise.
        envs_per_task: Number E of copies of each task.
        max_restarts: Maximum number of processes to replace.
        tells_success: Which tasks are known to report success; a single bool applies to all.
        endless: Length at which episodes are truncated only because nothing else ends them; the
            first such episode gives a warning.

    A lost simulator process is replaced with a warning, and its current episodes start again:
    `infos["restarted"]` is true in their rows, whose rewards are then meaningless. The row at
    fault starts an episode from another seed if it is a custom task, because a deterministic
    environment would fail again under the same seed.

    Raises:
        WorkerError: From any method, if a process is lost and may not be replaced.

    Attributes:
        tells_success: Whether a step of each task has ever reported success or failure, `[T]`.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        names: Sequence[str],
        simulators: Sequence[str],
        parts: Sequence[WorkerProcesses | NativePools],
        observation_space: Box,
        action_space: Box,
        *,
        envs_per_task: int = 1,
        max_restarts: int = 0,
        tells_success: bool | Sequence[bool] = True,
        endless: int | None = None,
    ) -> None:
        self.tells_success, self._endless = np.full(len(names), tells_success), endless
        self.names, self.simulators = tuple(names), tuple(simulators)
        self.n_tasks, self.envs_per_task = len(names), envs_per_task
        self.num_envs = n = self.n_tasks * envs_per_task
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, n)
        self.action_space = batch_space(action_space, n)
        (self.observation_size,), (self.action_size,) = observation_space.shape, action_space.shape

        memory = allocate(n, self.observation_size, self.action_size)
        self._shared = view(memory)
        self._parts = parts
        for part in parts:
            part.open(memory)
        for part in reversed(parts):
            part.wait()
        rows = np.repeat(names, envs_per_task).tolist()
        self._restarts = Restarts(parts, self._shared, rows, max_restarts)
        self._pending, self._seed = False, 0
        self._returns, self._success = np.zeros(n), np.zeros(n, bool)
        self._first = np.tile(np.arange(envs_per_task), self.n_tasks)
        self._episodes = self._first - envs_per_task
        self._history: list[list[np.ndarray]] = [[] for _ in range(n)]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every row's next episode, or its first one under `seed`; observations [N, d]."""
        self._expect_no_step("reset")
        if seed is None:
            self._episodes = self._episodes + self.envs_per_task
        else:
            self._shared.generations[:] = 0
            self._episodes = self._first.copy()
        self._start(seed, None)
        return self._shared.observations.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row once with actions [N, a] in [-1, 1]; returns [N, d], [N], [N], [N]."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Start a step of every row with actions [N, a], without waiting for it.

        Raises:
            AlreadyPendingCallError: From Gymnasium, if the last step has not been waited for.
        """
        self._expect_no_step("step_async")
        self._shared.actions[:] = actions
        self._restarts.prepare()
        for part in self._parts:
            part.step()
        for history, action in zip(self._history, self._shared.actions.copy(), strict=True):
            history.append(action)
        self._pending = True

    def step_wait(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for `step_async` and return its results like `step`.

        Raises:
            NoAsyncCallError: From Gymnasium, if no step was started.
        """
        if not self._pending:
            raise NoAsyncCallError("step_wait: expected a step_async before it", "step")
        self._pending = False
        shared = self._shared
        try:
            restarted = self._restarts.wait(self._seed, self._episodes)
        except WorkerError:  # undo the step, so that `state` is the one before it
            for history in self._history:
                history.pop()
            raise

        self._update_tells_success()
        terminated, truncated = shared.terminated.astype(bool), shared.truncated.astype(bool)
        success = shared.success.astype(bool)
        self._returns += shared.rewards
        self._success |= success
        infos: dict[str, Any] = {"success": success}
        done = terminated | truncated
        if restarted.any():
            infos["restarted"] = restarted
            done &= ~restarted
            self._clear(restarted)
        if done.any():
            lengths = np.array([len(history) for history in self._history])
            self._warn_if_endless(done & truncated & (lengths == self._endless))
            episode = {"r": self._returns.copy(), "l": lengths, "s": self._success.copy()}
            infos |= {
                "final_obs": shared.final_observations.copy(),
                "_final_obs": done,
                "final_info": {"episode": episode, "_episode": done},
                "_final_info": done,
            }
            self._clear(done)
            self._episodes[done] += self.envs_per_task
        return shared.observations.copy(), shared.rewards.copy(), terminated, truncated, infos

    @property
    def restarts(self) -> int:
        """Number of processes replaced so far."""
        return self._restarts.count

    def state(self) -> dict[str, Any]:
        """Return the state of every row: its episode's number and the actions taken in it."""
        self._expect_no_step("state")
        actions = {str(row): np.array(a, np.float32) for row, a in enumerate(self._history)}
        return {
            "simulators": list(self.simulators),
            "episodes": self._episodes.tolist(),
            "returns": self._returns.tolist(),
            "success": self._success.tolist(),
            "tells_success": self.tells_success.tolist(),
            "generations": self._shared.generations.tolist(),
            "actions": actions,
        }

    def restore(self, state: dict[str, Any], *, seed: int) -> np.ndarray:
        """Restore a `state` under `seed` by replaying its actions; observations [N, d].

        The simulators are deterministic, so this is exact without access to their internal state.

        Raises:
            UsageError: If the state comes from other simulators.
        """
        self._expect_no_step("restore")
        expect_same_simulators(self.names, state["simulators"], self.simulators)
        self._episodes = np.array(state["episodes"])
        actions = [np.asarray(state["actions"][str(row)]) for row in range(self.num_envs)]
        self._shared.generations[:] = state["generations"]
        self.tells_success |= np.array(state["tells_success"])
        self._start(seed, actions)
        self._history = [list(rows) for rows in actions]
        self._returns, self._success = np.array(state["returns"]), np.array(state["success"])
        return self._shared.observations.copy()

    def _start(self, seed: int | None, actions: list[np.ndarray] | None) -> None:
        """Start the episodes of `self._episodes`, and replay `actions` in them if given."""
        self._seed = self._seed if seed is None else seed
        self._restarts.prepare()
        for part in self._parts:
            part.start(seed, self._episodes, actions)
        # A replay must reach its end; only a new episode may be started again.
        self._restarts.wait(self._seed, self._episodes, replace=actions is None)
        self._clear(np.ones(self.num_envs, bool))
        self._update_tells_success()

    def _update_tells_success(self) -> None:
        rows = self._shared.tells_success.astype(bool)
        self.tells_success |= rows.reshape(self.n_tasks, -1).any(1)

    def _warn_if_endless(self, rows: np.ndarray) -> None:
        for row in np.flatnonzero(rows)[:1]:
            text = f"an episode had not ended after {self._endless:,} steps and was truncated"
            task = self.names[row // self.envs_per_task]
            warnings.warn(f"task {task!r}: {text}; set horizon for another limit", stacklevel=3)
            self._endless = None  # once is enough

    def _clear(self, started: np.ndarray) -> None:
        self._returns[started] = 0.0
        self._success[started] = False
        for row in np.flatnonzero(started):
            self._history[row] = []

    def _expect_no_step(self, call: str) -> None:
        if self._pending:
            raise AlreadyPendingCallError(f"{call}: expected step_wait after step_async", "step")

    def close_extras(self, **kwargs: Any) -> None:
        """Stop processes and threads."""
        for part in self._parts:
            part.close()
