"""Task-major replay buffer on the learner's device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.devices import restore, upload
from mtrl.sac.demonstrated import Demonstrated
from mtrl.sac.reward_scale import RewardScale


@dataclass(frozen=True)
class Batch:
    """B transitions of each task; row t belongs to task t."""

    observations: Tensor  # [T, B, observation]
    actions: Tensor  # [T, B, action]
    rewards: Tensor  # [T, B], scaled
    terminated: Tensor  # [T, B], 1 if the episode terminated; 0 for a time limit
    next_observations: Tensor  # [T, B, observation], never an observation after a reset


class ReplayBuffer:
    """Ring buffer of vector steps, each row `[T·E, observation | action | reward | terminated]`.

    Observations are stored once: s′ is the observation of the next row. The last step of an episode
    is followed by a row with only the final observation, where no sample may start. A list of the
    rows where samples may start makes sampling uniform over transitions, without rejection.

    No method synchronises with the device, and `sample` uses no changing number from the host, so
    it can be captured in a CUDA graph once and replayed while the buffer fills. It takes six
    kernels on a GPU, and one more if rewards are scaled. To avoid further kernels that wrap
    indices, the list of starts is stored twice in a row, and the ring has a row beyond its end.

    Args:
        capacity: Transitions kept per task; rounded down to whole vector steps of E copies.
        n_tasks: Number T of tasks.
        seed: Seed of the buffer's generator.
        envs_per_task: Number E of copies per task; added row t·E + e is copy e of task t.
        scale: Scale of sampled rewards; default: unscaled.
        demonstrations: Source of a share of every batch; default: none.

    Attributes:
        generator: Generator of `sample`, to be registered when capturing it.

    Note:
        If only some of the episodes end in a step, the other environments store their observation
        twice. If that happens often, fewer than `capacity` transitions fit.
    """

    def __init__(
        self,
        capacity: int,
        n_tasks: int,
        observation_size: int,
        action_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        envs_per_task: int = 1,
        scale: RewardScale | None = None,
        demonstrations: Demonstrated | None = None,
    ) -> None:
        self.scale = scale or RewardScale(n_tasks, envs_per_task, device=device)
        self.demonstrations = demonstrations
        if demonstrations is not None:
            demonstrations.tell(self.scale)
        self.n_tasks, self.envs_per_task = n_tasks, envs_per_task
        self._n_starts = capacity // envs_per_task
        self._split = (observation_size, action_size, 1, 1)
        # One extra row per episode of at least 100 steps, and two that are being written.
        self._n_rows = n_rows = self._n_starts + self._n_starts // 100 + 2
        n_envs = n_tasks * envs_per_task
        self._rows = torch.zeros(n_rows + 1, n_envs, sum(self._split), device=device)
        # Index of task 0's copies in `_rows.flatten(0, 1)` for each row where samples may start.
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self._starts = torch.zeros((2, self._n_starts, envs_per_task), **whole)
        self._stored: deque[int] = deque()  # the same rows on the host, oldest first
        self._next_row = self._next_start = 0
        # Number of these that each task has; fewer if it joined later than others.
        self._held = np.zeros(n_tasks, np.int64)
        # For `sample`: position of the oldest start, and number of starts, counting copies.
        self._window = torch.zeros((2, n_tasks, 1), **whole)
        # Offsets from there to each task, and to its successor: [2, T, 1].
        tasks = torch.arange(0, n_envs, envs_per_task, device=device)[:, None]
        self._away = torch.stack([tasks, tasks + n_envs])
        self._copies = torch.arange(envs_per_task, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of transitions stored per task, for the task with the most."""
        return len(self._stored) * self.envs_per_task

    @property
    def nbytes(self) -> int:
        """Device memory of the buffer [bytes]."""
        return self._rows.nbytes + self._starts.nbytes

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        next_observations: np.ndarray,
        *,
        done: np.ndarray,
    ) -> Tensor:
        """Store one vector step: `[T·E, observation]`, `[T·E, action]`, `[T·E]`, `[T·E]`.

        Args:
            next_observations: The true s′, before any reset, `[T·E, observation]`.
            done: Whether the episode ended, `[T·E]`. If none ended, the next call's `observations`
                must equal these `next_observations`.

        Returns:
            The observations on the device.

        Raises:
            FloatingPointError: If a number is not finite in float32; nothing is stored then.
            ValueError: If there are more or fewer than T·E rows.
        """
        two_rows = np.zeros((2, *self._rows.shape[1:]), np.float32)
        found = np.hstack([observations, actions, rewards[:, None], terminated[:, None]])
        if (lengths := {len(found), len(next_observations), len(done)}) != {len(two_rows[0])}:
            raise ValueError(f"replay: expected {len(two_rows[0])} environments, got {lengths}")
        two_rows[0], two_rows[1, :, : self._split[0]] = found, next_observations
        if not np.isfinite(two_rows).all():
            raise FloatingPointError("replay: expected finite numbers, got infinite ones or NaN")
        self.scale.observe(rewards, done)
        row, following = self._next_row, (self._next_row + 1) % self._n_rows
        while self._stored and (
            len(self._stored) == self._n_starts or self._stored[0] in (row, following)
        ):
            self._stored.popleft()
        self._stored.append(row)
        self._held = np.minimum(self._held + 1, len(self._stored))
        self._rows[row : row + 2] = stored = upload(two_rows, self._rows.device)
        # Numbers are passed with the kernel launches; no host memory is read later.
        place = row * self._rows.shape[1]
        for starts in self._starts:
            torch.add(self._copies, place, out=starts[self._next_start])
        self._next_start = (self._next_start + 1) % self._n_starts
        self._next_row = (row + 1 + bool(done.any())) % self._n_rows
        self._show_window()
        return stored[0, :, : self._split[0]]

    def skip(self, lost: np.ndarray) -> None:
        """Skip a vector step in which the episodes of rows `lost`, bool `[T·E]`, were abandoned.

        The next step that is added need not continue from the last one.
        """
        self.scale.forget(lost)
        if self._stored and self._stored[-1] == (self._next_row - 1) % self._n_rows:
            self._next_row = (self._next_row + 1) % self._n_rows

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """Sample uniformly with replacement for each task, in one gather: `[T, B, …]`.

        Args:
            generator: Generator to use instead of the buffer's own.

        Raises:
            ValueError: If a task has no transitions.
        """
        if not self._held.all():
            raise ValueError("replay: expected transitions of every task, got none of some")
        (oldest, stored), generator = self._window, generator or self.generator
        shape = self.n_tasks, batch_size
        draw = torch.randint(2**63 - 1, shape, generator=generator, device=self._rows.device)
        # The remainder of 63 random bits is uniform up to one part in 10¹².
        places = self._starts.flatten()[draw.remainder_(stored).add_(oldest)]
        here, there = self._rows.flatten(0, 1)[places + self._away]
        next_observations = there[..., : self._split[0]]
        if self.demonstrations is not None:
            rows = torch.cat([here, next_observations], -1)
            rows = self.demonstrations.fill(rows, generator)
            here, next_observations = rows.split([sum(self._split), self._split[0]], -1)
        observations, actions, rewards, terminated = here.split(self._split, -1)
        if self.scale.changes:
            rewards = rewards * self.scale.factors[:, None, None]
        return Batch(observations, actions, rewards[..., 0], terminated[..., 0], next_observations)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, including the generator."""
        in_order = not self._stored or self._stored[0] <= self._stored[-1] < self._next_row
        used = self._next_row + 1 if in_order else self._n_rows + 1
        return {
            "rows": self._rows[:used],
            "starts": torch.tensor(self._stored, dtype=torch.int64),
            "next_row": torch.tensor(self._next_row),
            "held": torch.from_numpy(self._held),
            "generator": self.generator.get_state(),
            "scale": self.scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict` of a buffer with the same sizes."""
        rows, starts = state["rows"], state["starts"].tolist()
        self._rows[: len(rows)] = rows
        if len(rows) == self._n_rows:  # an older state, in which the last row's successor is row 0
            self._rows[-1] = rows[0]
        everything = torch.full((self.n_tasks,), len(starts))  # for older states
        self._held = state.get("held", everything).numpy().copy()
        self._place(starts, int(state["next_row"]))
        restore(self.generator, state["generator"])
        self.scale.load_state_dict(state["scale"])

    def take_over(self, other: ReplayBuffer, tasks: Sequence[tuple[int, int]]) -> None:
        """Copy some tasks' transitions from a buffer of the same capacity; other tasks get none.

        Args:
            other: Buffer to copy from.
            tasks: Index of each task in this buffer and in the other one.
        """
        by_task = (-1, self.envs_per_task)
        mine, theirs = (buffer._rows.unflatten(1, by_task) for buffer in (self, other))
        self._held[:] = 0
        for here, there in tasks:
            mine[:, here] = theirs[:, there]
            self._held[here] = other._held[there]
        # The next step does not have to continue from the last one.
        apart = bool(other._stored) and other._stored[-1] == (other._next_row - 1) % self._n_rows
        self._place(other._stored, (other._next_row + apart) % self._n_rows)
        self.scale.take_over(other.scale, tasks)
        self.scale.forget(np.ones(self._rows.shape[1], bool))

    def _place(self, stored: Sequence[int], next_row: int) -> None:
        self._stored = deque(stored)
        starts = torch.tensor(stored, dtype=torch.int64, device=self._starts.device)[:, None]
        self._starts[:, : len(stored)] = starts * self._rows.shape[1] + self._copies
        self._next_start, self._next_row = len(stored) % self._n_starts, next_row
        self._show_window()

    def _show_window(self) -> None:
        oldest = (self._next_start - self._held) % self._n_starts
        window = np.stack([oldest, self._held]) * self.envs_per_task
        if (self._held == self._held[0]).all():  # avoids a copy from the host
            self._window[0].fill_(int(window[0, 0]))
            self._window[1].fill_(int(window[1, 0]))
        else:
            self._window.copy_(upload(window[..., None], self._window.device))
