"""A Meta-World task as a Gymnasium environment with reproducible episodes."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from metaworld import Task
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from mtrl.envs.benchmarks import N_GOALS
from mtrl.envs.tasks import ACTION_SPACE, OBSERVATION_SPACE

_DRAW_GOAL, _ORDER_GOALS = 0, 1


class MetaWorldTask(gym.Env[np.ndarray, np.ndarray]):
    """A Meta-World V3 task with V2 rewards and an observable goal.

    `SawyerXYZEnv.reset` ignores its seed. The goal is therefore sampled here, by the task's own
    rejection rule, from a generator seeded only with (seed, task, goal number). Episode e uses
    goal e mod 50, in an order that is reshuffled every 50 episodes; evaluation takes goals in
    order (`shuffle_goals=False`). A trajectory depends only on (seed, task, episode, actions).

    Args:
        task: Meta-World task name, e.g. `"reach-v3"`.
        horizon: Steps after which the episode is truncated, at most 500.
        shuffle_goals: Whether the 50 goals come in random order.
        stride: Number of episodes by which `reset()` advances. E copies of a task with stride E
            that start at episodes 0, …, E − 1 share the task's episodes.
        kwargs: Passed to Meta-World, e.g. `render_mode="rgb_array"`.

    Example:
        >>> env = MetaWorldTask("reach-v3")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape, info
        ((39,), {'episode': 0, 'goal': 41})
        >>> env.reset(options={"episode": 7})[1]["episode"]
        7
    """

    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE

    def __init__(
        self,
        task: str,
        horizon: int = 500,
        shuffle_goals: bool = True,
        stride: int = 1,
        **kwargs: Any,
    ) -> None:
        self.task = task
        self.horizon = horizon
        self.shuffle_goals = shuffle_goals
        self.stride = stride
        self.simulator: SawyerXYZEnv = ALL_V3_ENVIRONMENTS[task](**kwargs)
        touching = partial(_touching_object, self.simulator)
        self.simulator.touching_object = touching  # type: ignore[method-assign]
        self.render_mode = self.simulator.render_mode
        self.metadata = self.simulator.metadata
        self._seed, self._episode, self._elapsed = 0, -stride, 0
        self._random_vectors: dict[int, np.ndarray] = {}

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the next episode, episode 0 if a `seed` is given, or `options["episode"]`."""
        super().reset(seed=seed)  # Gymnasium's convention; nothing here uses np_random
        if seed is not None:
            self._seed, self._episode = seed, -self.stride
            self._random_vectors.clear()
        self._episode = (options or {}).get("episode", self._episode + self.stride)
        self._elapsed = 0
        cycle, goal = divmod(self._episode, N_GOALS)
        if self.shuffle_goals:
            goal = int(self._generator(_ORDER_GOALS, cycle).permutation(N_GOALS)[goal])
        self._set_goal(goal)
        observation, _ = self.simulator.reset()
        return observation.astype(np.float32), {"episode": self._episode, "goal": goal}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Step 1/80 s; `info["success"]` is the flag of this step, `terminated` is never true."""
        observation, reward, terminated, _, info = self.simulator.step(action)
        self._elapsed += 1
        truncated = self._elapsed >= self.horizon
        success = {"success": bool(info["success"])}
        return observation.astype(np.float32), float(reward), terminated, truncated, success

    def render(self) -> Any:
        """Return an image of the scene, [height, width, 3], if `render_mode="rgb_array"`."""
        return self.simulator.render()

    def close(self) -> None:
        """Free the renderer."""
        self.simulator.close()

    def _generator(self, purpose: int, number: int) -> np.random.Generator:
        name = zlib.crc32(self.task.encode())
        return np.random.default_rng([self._seed, name, purpose, number])

    def _set_goal(self, goal: int) -> None:
        """Freeze the simulator's random vector (positions of goal and object) to that of `goal`."""
        if goal not in self._random_vectors:
            # The task's reset samples by its own rule, with rejection. The accepted vector is then
            # frozen, as in Meta-World's benchmarks.
            self._set_random_vector(np.zeros(0))
            self.simulator.np_random = self._generator(_DRAW_GOAL, goal)
            self.simulator.seeded_rand_vec, self.simulator._freeze_rand_vec = True, False
            self.simulator.reset()
            assert self.simulator._last_rand_vec is not None
            self._random_vectors[goal] = self.simulator._last_rand_vec.copy()
        self._set_random_vector(self._random_vectors[goal])

    def _set_random_vector(self, vector: np.ndarray) -> None:
        settings = {
            "env_cls": type(self.simulator),
            "rand_vec": vector,
            "partially_observable": False,
        }
        self.simulator.set_task(Task(self.task, pickle.dumps(settings)))


def _touching_object(simulator: SawyerXYZEnv, geom: int) -> bool:
    """Return whether both pads of the gripper press on the geometry.

    Equal to Meta-World's method of this name, but without its Python loop over contacts, which
    took a third of a step of push-v3.
    """
    data = simulator.data
    contacts, forces = data.contact.geom, []
    with_object = (contacts == geom).any(1)
    for pad in ("leftpad_geom", "rightpad_geom"):
        between = with_object & (contacts == data.geom(pad).id).any(1)
        forces.append(sum(data.efc_force[data.contact.efc_address[between]]))
    return bool(forces[0] > 0 and forces[1] > 0)
