"""Tasks on EnvPool, a C++ port of Meta-World that is several times as fast as the reference.

It is used for tasks on which `scripts/parity.py` found it to agree with the reference (see
`parity.py`). It samples a new goal from the task's continuous range for every episode, whereas the
reference has 50 goals per task.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtrl.envs import shared, worker
from mtrl.envs.processes import WorkerError, n_cores

EPISODES_PER_POOL = 50
"""Episodes after which a pool is replaced by one with another seed.

EnvPool cannot restore a state, but its random stream advances only in resets. To resume a run, a
pool is recreated and reset as often as before, at 6 ms per reset; this constant bounds the number
of resets. Creating a pool takes about 0.1 s, 1% of the time of 50 episodes.
"""


class NativePools:
    """Tasks of a vector environment that run on EnvPool, with a pool of E environments per task.

    Every episode lasts exactly `horizon` steps (no Meta-World task terminates), so all rows start
    their episodes together. A trajectory depends on (seed, task, copy, episode, actions).

    Args:
        tasks: Meta-World task names.
        first_rows: Row of each task's first environment; its copies follow.
        envs_per_task: Number E of environments per task.
        horizon: Steps after which an episode is truncated.
    """

    def __init__(
        self, tasks: Sequence[str], first_rows: Sequence[int], envs_per_task: int, horizon: int
    ) -> None:
        self._tasks, self._copies, self._horizon = tasks, envs_per_task, horizon
        self._rows = [slice(row, row + envs_per_task) for row in first_rows]
        self._seed, self._block, self._next, self._episode = 0, -1, 0, -1
        self._stepping = False
        self._pools: list[Any] = []

    def open(self, memory: shared.Memory) -> None:
        """Attach to the shared memory."""
        self._arrays = shared.view(memory)

    def close(self) -> None:
        """Stop the threads of the pools."""
        self._pools = []

    def start(
        self, seed: int | None, episodes: np.ndarray, actions: Sequence[np.ndarray] | None
    ) -> None:
        """Start every row's episode, and replay `actions` in it if given."""
        if seed is not None:
            self._seed, self._block = seed, -1
        self._begin(int(episodes[self._rows[0].start]) // self._copies)
        if actions is not None:
            for step in range(len(actions[self._rows[0].start])):
                for rows in self._rows:
                    self._arrays.actions[rows] = [played[step] for played in actions[rows]]
                self.step()
                self.wait()

    def step(self) -> None:
        """Start a step with the actions in memory."""
        for pool, rows in zip(self._pools, self._rows, strict=True):
            pool.send(self._arrays.actions[rows])
        self._stepping = True

    def wait(self) -> None:
        """Wait for a step that was started, and reset if episodes ended.

        EnvPool itself would treat the next action as a request to reset, without a transition.
        """
        if not self._stepping:
            return
        self._stepping = False
        arrays = self._arrays
        for task, pool, rows in zip(self._tasks, self._pools, self._rows, strict=True):
            observations, rewards, terminated, truncated, info = pool.recv()
            _expect_finite(task, observations, rewards)
            arrays.observations[rows] = observations
            arrays.rewards[rows] = rewards
            arrays.terminated[rows], arrays.truncated[rows] = terminated, truncated
            arrays.success[rows] = info["success"]
        if arrays.truncated[self._rows[0]].any():
            for rows in self._rows:
                arrays.final_observations[rows] = arrays.observations[rows]
            self._begin(self._episode + 1)

    def _begin(self, episode: int) -> None:
        """Start episode number `episode` of every environment, counted per environment."""
        self._episode = episode
        block, position = divmod(episode, EPISODES_PER_POOL)
        if block != self._block or position < self._next:
            self._pools = [self._make(task, block) for task in self._tasks]
            self._block, self._next = block, 0
        while self._next <= position:
            for pool in self._pools:
                pool.async_reset()
            for pool, rows in zip(self._pools, self._rows, strict=True):
                self._arrays.observations[rows] = pool.recv(reset=True)[0]
            self._next += 1
        for task, rows in zip(self._tasks, self._rows, strict=True):
            _expect_finite(task, self._arrays.observations[rows])

    def _make(self, task: str, block: int) -> Any:
        import envpool  # here, because it takes half a second
        from envpool.mujoco.metaworld.registration import metaworld_task_id

        name = zlib.crc32(task.encode())
        seeds = [
            # EnvPool seeds have 31 bits.
            int(np.random.SeedSequence([self._seed, name, copy, block]).generate_state(1)[0] >> 1)
            for copy in range(self._copies)
        ]
        return envpool.make_gymnasium(
            metaworld_task_id(task),
            num_envs=self._copies,
            env_seed=seeds,
            max_episode_steps=self._horizon,
            partially_observable=False,
            num_threads=max(1, min(self._copies, n_cores() // len(self._tasks))),
        )


def _expect_finite(task: str, *arrays: np.ndarray) -> None:
    try:
        for array in arrays:
            worker.expect_finite("what EnvPool returned", array)
    except worker.NotFinite as error:
        raise WorkerError(f"task {task!r}: {error}") from None
