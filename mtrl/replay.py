"""Task-major replay that lives on the learner's device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B transitions of each task; row t belongs to task t."""

    observations: Tensor  # [T, B, observation]
    actions: Tensor  # [T, B, action]
    rewards: Tensor  # [T, B]
    terminated: Tensor  # [T, B], 1 where the episode truly ended; a time limit is 0
    next_observations: Tensor  # [T, B, observation], never an observation after a reset


class ReplayBuffer:
    """A ring of vector steps, each row `[T, observation | action | reward | terminated]`.

    Observations are stored once: s′ is the next row's. After an episode's last step comes a row
    with the final observation alone, which no sample starts from; a list of the rows that samples
    may start from makes the draw uniform over the stored transitions, without rejection.

    Args:
        capacity: Transitions kept per task.
        n_tasks: T.
        seed: Of the buffer's own generator.

    Note:
        When only some tasks' episodes end, the others store their observation twice. Where that
        happens often, fewer than `capacity` transitions fit.
    """

    def __init__(
        self,
        capacity: int,
        n_tasks: int,
        observation_size: int,
        action_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.capacity, self.n_tasks = capacity, n_tasks
        self._split = (observation_size, action_size, 1, 1)
        # A row more for each episode of 100 steps or longer, and two that are being written.
        n_rows = capacity + capacity // 100 + 2
        self._rows = torch.zeros(n_rows, n_tasks, sum(self._split), device=device)
        self._starts = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._stored: deque[int] = deque()  # the same rows on the host, oldest first
        self._next_row = self._next_start = 0
        self._tasks = torch.arange(n_tasks, device=device)[:, None]
        self._generator = torch.Generator(device).manual_seed(seed)

    def __len__(self) -> int:
        """Transitions stored per task."""
        return len(self._stored)

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
        done: bool,
    ) -> None:
        """Store one vector step: `[T, observation]`, `[T, action]`, `[T]`, `[T]`.

        Args:
            next_observations: The true s′, before any reset, `[T, observation]`.
            done: Whether any task's episode ended. If not, the next call's `observations` must be
                these `next_observations`.
        """
        two_rows = np.zeros((2, self.n_tasks, sum(self._split)), np.float32)
        two_rows[0] = np.hstack([observations, actions, rewards[:, None], terminated[:, None]])
        two_rows[1, :, : self._split[0]] = next_observations
        n_rows = len(self._rows)
        row = self._next_row
        written = [row, (row + 1) % n_rows]
        while self._stored and (len(self) == self.capacity or self._stored[0] in written):
            self._stored.popleft()
        self._rows[written] = torch.from_numpy(two_rows).to(self._rows.device)
        self._starts[self._next_start] = row
        self._stored.append(row)
        self._next_start = (self._next_start + 1) % self.capacity
        self._next_row = (row + 1 + done) % n_rows

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """Draw uniformly, with replacement, for each task on its own: one gather, `[T, B, …]`.

        Args:
            generator: Random numbers for a look aside; default: the buffer's own.
        """
        size, shape = len(self), (self.n_tasks, batch_size)
        generator = generator or self._generator
        age = torch.randint(size, shape, generator=generator, device=self._rows.device)
        start = self._starts[(self._next_start - size + age) % self.capacity]
        rows = torch.stack([start, (start + 1) % len(self._rows)])
        here, there = self._rows.flatten(0, 1)[rows * self.n_tasks + self._tasks]
        observations, actions, rewards, terminated = here.split(self._split, -1)
        next_observations = there[..., : self._split[0]]
        return Batch(observations, actions, rewards[..., 0], terminated[..., 0], next_observations)

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on exactly, the generator included."""
        in_order = not self._stored or self._stored[0] <= self._stored[-1] < self._next_row
        used = self._next_row + 1 if in_order else len(self._rows)
        return {
            "rows": self._rows[:used],
            "starts": torch.tensor(self._stored, dtype=torch.int64),
            "next_row": torch.tensor(self._next_row),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, from a buffer of the same sizes."""
        self._rows[: len(state["rows"])] = state["rows"].to(self._rows.device)
        self._stored = deque(state["starts"].tolist())
        self._starts[: len(self)] = state["starts"].to(self._starts.device)
        self._next_start = len(self) % self.capacity
        self._next_row = int(state["next_row"])
        self._generator.set_state(state["generator"].cpu())
