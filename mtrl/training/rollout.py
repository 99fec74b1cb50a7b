"""Data collection: act in the environments and store transitions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.config.learner import NoiseColor
from mtrl.devices import restore, upload
from mtrl.envs.vector import TaskVectorEnv
from mtrl.sac.agent import MTSAC
from mtrl.sac.capture import Captured
from mtrl.sac.replay import ReplayBuffer
from mtrl.training.acting import ActorSnapshot
from mtrl.training.episodes import EpisodeStatistics, episodes_of
from mtrl.training.noise import ExplorationNoise


class Collector:
    """Runs one policy in T·E environments; `act`, `wait` and `store` form one vector step.

    The simulators step between `act` and `wait`, while the caller may do other work. No other
    method may be called in between.

    Args:
        envs: E copies of each of the agent's tasks.
        agent: The policy, which may be updated between `act` and `wait`.
        seed: Seed of the exploration noise.
        snapshot: Whether to act with the policy as it was at the last `act`; see `ActorSnapshot`.
            Default: only on a GPU.
        noise: Colour of the exploration noise; see `ExplorationNoise`.
    """

    def __init__(
        self,
        envs: TaskVectorEnv,
        agent: MTSAC,
        seed: int,
        snapshot: bool | None = None,
        *,
        noise: NoiseColor = "white",
    ) -> None:
        self.envs, self.agent = envs, agent
        self.statistics = EpisodeStatistics(agent.tasks)
        self._generator = torch.Generator(agent.device).manual_seed(seed)
        self._tasks = torch.arange(len(agent.tasks), device=agent.device)
        self._tasks = self._tasks.repeat_interleave(envs.envs_per_task)
        self._noise = ExplorationNoise(
            noise, (len(self._tasks), agent.action_size), self._generator
        )
        self._observations = self._actions = np.empty(0)
        self._observed: tuple[Tensor, Captured[None]] | None = None
        self._snapshot: ActorSnapshot | None = None
        if snapshot or (snapshot is None and agent.device.type == "cuda"):
            self._snapshot = ActorSnapshot(agent, self._tasks, self._noise)

    def reset(self, seed: int) -> None:
        """Start the first episodes of `seed`."""
        self._observations, _ = self.envs.reset(seed=seed)
        self._follow()

    def act(self, uniform: bool | np.ndarray) -> None:
        """Send actions to the simulators: samples from the policy, or uniformly random ones.

        Args:
            uniform: Whether actions are random, for all tasks or for each task `[T]`.

        Raises:
            FloatingPointError: If the policy's actions are infinite or NaN.
        """
        random = np.broadcast_to(uniform, len(self.agent.tasks))
        if random.all():
            self._actions = self._uniform()
        elif random.any():
            rows = np.repeat(random, self.envs.envs_per_task)[:, None]
            self._actions = np.where(rows, self._uniform(), self._sampled())
        else:
            self._actions = self._sampled()
        if not np.isfinite(self._actions).all():  # otherwise simulators would be blamed
            raise FloatingPointError("the policy's actions are infinite or NaN")
        self.envs.step_async(self._actions)
        self._follow()

    def _uniform(self) -> np.ndarray:
        shape = (len(self._tasks), self.agent.action_size)
        draw = torch.rand(shape, generator=self._generator, device=self.agent.device)
        return (2 * draw - 1).cpu().numpy()

    def _sampled(self) -> np.ndarray:
        if self._snapshot is not None:
            return self._snapshot.act(self._observations)
        observations = upload(self._observations, self.agent.device)
        actions = self.agent.act(observations, self._tasks, self._noise())
        return actions.cpu().numpy()

    def wait(self) -> tuple[Any, ...]:
        """Wait for all simulators and return their step, for `store`."""
        return self.envs.step_wait()

    def store(self, answer: tuple[Any, ...], replay: ReplayBuffer) -> None:
        """Add the vector step to the replay buffer, and finished episodes to the statistics."""
        observations, rewards, terminated, truncated, infos = answer
        if "restarted" in infos:  # some rows are missing, so the whole step is dropped
            replay.skip(infos["restarted"])
            self._observations = observations
            return
        done = terminated | truncated
        following = observations
        if done.any():
            following = np.where(done[:, None], infos["final_obs"], observations)
            self.statistics.add(episodes_of(self.agent.tasks, infos))
        # First, because it checks the numbers.
        stored = replay.add(
            self._observations, self._actions, rewards, terminated, following, done=done
        )
        if self.agent.normalizer is not None and not self.agent.normalizer.frozen:
            self._observe(stored)
        self._observations = observations

    def _observe(self, observations: Tensor) -> None:
        """Update the normaliser, whose twenty small operations are one graph on a GPU."""
        normalizer = self.agent.normalizer
        assert normalizer is not None
        if observations.device.type != "cuda":
            normalizer.observe(observations)
            return
        if self._observed is None:
            place = torch.empty_like(observations)
            captured = Captured(lambda: normalizer.observe(place), [], device=place.device)
            self._observed = place, captured
        place, observe = self._observed
        place.copy_(observations)
        observe()

    def take_over(self, other: Collector, tasks: Sequence[tuple[int, int]], seed: int) -> None:
        """Start new episodes in every task, numbered after those of another collector.

        Args:
            other: Collector of the previous tasks.
            tasks: Indices of each common task, here and there; its statistics continue.
            seed: Seed of the run.
        """
        copies = self.envs.envs_per_task
        state, before = self.envs.state(), other.envs.state()
        number = max(before["episodes"]) // copies + 1
        # The same number for all tasks, because EnvPool steps their episodes together.
        state["episodes"] = [copies * number + row % copies for row in range(self.envs.num_envs)]
        for here, there in tasks:
            state["tells_success"][here] = before["tells_success"][there]
        self._observations = self.envs.restore(state, seed=seed)
        self.statistics.take_over(other.statistics, tasks)
        self._follow()

    def _follow(self) -> None:
        """Act with the current policy, which may be another one than in the constructor."""
        if self._snapshot is not None:
            self._snapshot.take()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`."""
        acting = {} if self._snapshot is None else {"acting": self._snapshot.state_dict()}
        return (
            acting
            | self._noise.state_dict()
            | {
                "envs": self.envs.state(),
                "observations": self._observations,
                "exploration_generator": self._generator.get_state(),
                "statistics": self.statistics.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any], seed: int) -> None:
        """Restore a `state_dict` of a run with this seed."""
        self._observations = self.envs.restore(state["envs"], seed=seed)
        before = np.asarray(state["observations"])
        for row in np.flatnonzero((before != self._observations).any(1))[:1]:
            warnings.warn(
                f"task {self.agent.tasks[row // self.envs.envs_per_task]!r}: the same seed and "
                "actions led to another state, so the run differs from an uninterrupted one",
                stacklevel=2,
            )
        restore(self._generator, state["exploration_generator"])
        self._noise.load_state_dict(state)
        self.statistics.load_state_dict(state["statistics"])
        self._follow()
        if self._snapshot is not None and "acting" in state:  # missing without a snapshot so far
            self._snapshot.load_state_dict(state["acting"])
