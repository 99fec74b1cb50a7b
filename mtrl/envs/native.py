"""Tasks on EnvPool, a port of Meta-World in C++: several times as fast as the reference.

It is used where `scripts/parity.py` has found it to agree with the reference (`parity.py`). Its
goals come from the task's continuous range, another one for every episode, where the reference
has 50 of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtrl.envs import worker
from mtrl.envs.processes import WorkerError, n_cores

EPISODES_PER_POOL = 50
"""Episodes after which a pool is replaced by one with another seed.

EnvPool cannot be put into a state, but its random stream advances in resets alone. To be where a
run was, a pool is made again and reset as often as it had been, at 6 ms a reset; this bounds how
often that is. Making a pool takes some 0.1 s, 1% of what 50 episodes take.
"""


class NativePools:
    """Some tasks of a vector environment on EnvPool, one pool of E environments for each.

    Every episode lasts exactly `horizon` steps (no task of Meta-World's terminates), so all rows
    begin their episodes together. A trajectory depends on (seed, task, copy, episode, actions).

    Args:
        tasks: Meta-World names.
        first_rows: The row of each task's first environment; its copies follow.
        envs_per_task: The number E of environments per task.
        horizon: Steps after which an episode is truncated.
    """

    def __init__(
        self, tasks: Sequence[str], first_rows: Sequence[int], envs_per_task: int, horizon: int
    ) -> None:
        self._tasks, self._copies, self._horizon = tasks, envs_per_task, horizon
        self._rows = [slice(row, row + envs_per_task) for row in first_rows]
        self._seed, self._block, self._begun, self._episode = 0, -1, 0, -1
        self._stepping = False
        self._pools: list[Any] = []

    def open(self, memory: worker.Memory) -> None:
        """Work on `memory`."""
        self._arrays = worker.view(memory)

    def close(self) -> None:
        """End the pools' threads."""
        self._pools = []

    def start(
        self, seed: int | None, episodes: np.ndarray, actions: Sequence[np.ndarray] | None
    ) -> None:
        """Begin every row's episode, and play what `actions` there are in it."""
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
        """Begin a step with the actions in memory."""
        for pool, rows in zip(self._pools, self._rows, strict=True):
            pool.send(self._arrays.actions[rows])
        self._stepping = True

    def wait(self) -> None:
        """Until a step that was begun is done, and so is the reset that may follow it.

        EnvPool would take the next action for the request to reset, and give no transition for it.
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
        """Start this episode of every environment, the number counted in each by itself."""
        self._episode = episode
        block, position = divmod(episode, EPISODES_PER_POOL)
        if block != self._block or position < self._begun:
            self._pools = [self._make(task, block) for task in self._tasks]
            self._block, self._begun = block, 0
        while self._begun <= position:
            for pool in self._pools:
                pool.async_reset()
            for pool, rows in zip(self._pools, self._rows, strict=True):
                self._arrays.observations[rows] = pool.recv(reset=True)[0]
            self._begun += 1
        for task, rows in zip(self._tasks, self._rows, strict=True):
            _expect_finite(task, self._arrays.observations[rows])

    def _make(self, task: str, block: int) -> Any:
        import envpool  # takes half a second
        from envpool.mujoco.metaworld.registration import metaworld_task_id

        name = zlib.crc32(task.encode())
        seeds = [
            # EnvPool's seeds have 31 bits.
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
