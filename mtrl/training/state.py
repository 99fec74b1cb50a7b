"""State of a run that is saved and restored by checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtrl.config.train import TrainConfig
from mtrl.demonstrations.data import Demonstrations
from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.parity import choose_simulators
from mtrl.errors import RunError, UsageError, one_line
from mtrl.evaluation.protocol import make_evaluation_env
from mtrl.folder import DEMONSTRATIONS
from mtrl.sac.agent import MTSAC
from mtrl.sac.demonstrated import Demonstrated
from mtrl.sac.learner import Learner
from mtrl.sac.replay import ReplayBuffer
from mtrl.sac.reward_scale import RewardScale
from mtrl.sac.threads import ThreadChoice
from mtrl.sac.transfer import read_source, transfer
from mtrl.sac.watch import expect_finite
from mtrl.training.checkpoint import keep_batch
from mtrl.training.rollout import Collector


class RunState:
    """Components of a run and its progress.

    Args:
        config: Resolved configuration.
        saved: Result of `state_dict`, to resume a run. Default: start a new run.
        demonstrations: Demonstrations of all stages' tasks; they stay the same throughout the run.
        agent: Agent to train, with the configuration's networks, or the class of a new one.
        stage: Index of the stage in the curriculum.

    Attributes:
        steps: Environment steps so far, over all tasks.
        elapsed: Training time so far [s].
        score: Summary of the last evaluation; empty before the first.
        evaluation_pending: Whether an evaluation was started but not finished.
        known: Tasks that the policy knew before the stage. It acts in these from the start, without
            random actions.
        learns_at: Environment steps after which updates start.
        metrics: Metrics of the last update; empty before the first update of the stage.

    Raises:
        UsageError: If `saved` is not from a run with this configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        device: torch.device,
        saved: dict[str, Any] | None = None,
        *,
        demonstrations: Demonstrations | None = None,
        agent: MTSAC | type[MTSAC] = MTSAC,
        stage: int = 0,
    ) -> None:
        self.config, self.benchmark, self.stage = config, benchmark, stage
        self._digest = None if demonstrations is None else demonstrations.digest()
        # Independent random streams, all derived from the seed.
        entropy = [config.seed, stage] if stage else config.seed
        weights, learner, replay, exploration = (
            int(sequence.generate_state(1)[0])
            for sequence in np.random.SeedSequence(entropy).spawn(4)
        )
        environment = config.environment
        self.simulators = choose_simulators(benchmark, environment)
        self.envs = make_vector_env(
            benchmark,
            environment.horizon,
            workers=environment.workers,
            envs_per_task=environment.envs_per_task,
            simulators=self.simulators.by_task,
            max_restarts=environment.max_restarts,
        )
        if isinstance(agent, type):
            envs, told = self.envs, benchmark.descriptions
            sizes = envs.observation_size, envs.action_size
            agent = agent(benchmark.tasks, config.agent, *sizes, weights, descriptions=told)
        self.agent = agent.to(device)
        self.learner = Learner(self.agent, config.learner, learner)
        if config.threads is None and device.type == "cpu":
            self.learner.threads = ThreadChoice()
        self.replay = _make_replay(config, self.agent, demonstrations, replay)
        noise = config.learner.exploration_noise
        self.collector = Collector(self.envs, self.agent, exploration, noise=noise)
        self.eval_envs = make_evaluation_env(
            benchmark,
            [config.eval_episodes, N_GOALS],
            environment.horizon,
            workers=environment.workers,
            max_restarts=environment.max_restarts,
        )
        # Shared, because a report of success in either counts for both.
        self.eval_envs.tells_success = self.envs.tells_success
        self.known: tuple[str, ...] = ()
        self.metrics: dict[str, torch.Tensor] = {}
        self.steps = self.learns_at = 0
        self.elapsed, self.score, self.evaluation_pending = 0.0, "", False
        if saved is not None:
            try:
                self._load(saved)
            except UsageError:
                raise
            except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise UsageError(
                    "resume: expected the state of a run with this configuration, got another: "
                    f"{one_line(error)}"
                ) from None

    def begin(self, learns_at: int) -> None:
        """Start a run, from the policy of `init_from` if it is set."""
        if (path := self.config.transfer.init_from) is not None:
            self.known = transfer(self.agent, read_source(path))
        self.learner.freeze(self.config.transfer.frozen_at(0))
        if self.replay.demonstrations is not None:
            self.replay.demonstrations.show(self.agent.normalizer, self.benchmark.tasks)
        self.learns_at = learns_at
        self.collector.reset(self.config.seed)

    def take_over(self, before: RunState) -> None:
        """Continue from the previous stage, whose simulators may still be running."""
        ours, theirs = self.benchmark.tasks, before.benchmark.tasks
        self.known = transfer(self.agent, before.agent)
        tasks = [(ours.index(task), theirs.index(task)) for task in self.known]
        self.replay.take_over(before.replay, tasks)
        self.collector.take_over(before.collector, tasks, self.config.seed)
        self.learner.updates, self.learner.threads = before.learner.updates, before.learner.threads
        self.steps, self.elapsed, self.score = before.steps, before.elapsed, before.score
        self.learns_at = before.learns_at
        self.learner.freeze(self.config.transfer.frozen_at(self.steps))
        if self.replay.demonstrations is not None:
            new = [task for task in ours if task not in self.known]
            self.replay.demonstrations.show(self.agent.normalizer, new)

    def close(self) -> None:
        """Stop the simulators."""
        self.envs.close()
        self.eval_envs.close()

    def unknown(self) -> np.ndarray:
        """Return a mask `[T]` of tasks that the policy did not know before the run."""
        return np.array([task not in self.known for task in self.benchmark.tasks])

    def due(self, every: int) -> bool:
        """Return whether the last vector step reached a multiple of `every` steps; never if 0."""
        return every > 0 and self.steps // every > (self.steps - self.envs.num_envs) // every

    def expect_numbers(self, run_dir: Path) -> None:
        """Check that no NaN or infinity enters a checkpoint or log.

        Raises:
            RunError: Naming what is not finite; the last batch is saved in `run_dir`.
        """
        try:
            self.learner.watch.expect_finite(self.benchmark.tasks, self.learner.updates)
            expect_finite(self.agent.state_dict().items())
        except RunError as error:
            kept = keep_batch(run_dir, self.steps, self.learner.last_batch)
            raise RunError(f"{error}, noticed after {self.steps:,} steps{kept}") from None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as nested dictionaries of tensors, arrays and plain values."""
        return {
            "demonstrations": self._digest,
            "agent": self.agent.state_dict(),
            "agent_type": _kind(self.agent),
            "learner": self.learner.state_dict(),
            "replay": self.replay.state_dict(),
            **self.collector.state_dict(),
            "steps": self.steps,
            "elapsed": self.elapsed,
            "score": self.score,
            "evaluation_pending": self.evaluation_pending,
            "known": list(self.known),
            "stage": self.stage,
            "learns_at": self.learns_at,
        }

    def description(self) -> dict[str, Any]:
        """Return the origin of the policy for the header of its file; see `PolicyHeader`."""
        return {
            "benchmark": self.benchmark.name,
            "environments": "custom" if self.benchmark.custom else "metaworld",
            "surgery": self.config.learner.surgery,
            "seed": self.config.seed,
            "horizon": self.config.environment.horizon,
            "total_timesteps": self.steps,
        }

    def _load(self, state: dict[str, Any]) -> None:
        if state.get("demonstrations") != self._digest:
            raise UsageError(
                f"resume: expected the {DEMONSTRATIONS} of the run's start, got another"
            )
        if state["agent_type"] != _kind(self.agent):
            raise UsageError(
                f"resume: expected an agent of the run's type {state['agent_type']} (agent=...), "
                f"got {_kind(self.agent)}"
            )
        self.agent.load_state_dict(state["agent"])
        self.learner.load_state_dict(state["learner"])
        self.replay.load_state_dict(state["replay"])
        self.collector.load_state_dict(state, self.config.seed)
        self.steps, self.elapsed = state["steps"], state["elapsed"]
        self.score, self.evaluation_pending = state["score"], state["evaluation_pending"]
        self.known, self.learns_at = tuple(state["known"]), state["learns_at"]


def _make_replay(
    config: TrainConfig, agent: MTSAC, demonstrations: Demonstrations | None, seed: int
) -> ReplayBuffer:
    """Create an empty replay buffer, with the demonstrations of the agent's tasks."""
    learner, copies = config.learner, config.environment.envs_per_task
    n_tasks, device, episodes = len(agent.tasks), agent.device, None
    if demonstrations is not None and set(demonstrations.tasks) & set(agent.tasks):
        episodes = Demonstrated(demonstrations, agent.tasks, learner.demonstration_share, device)
    scale = RewardScale(
        n_tasks,
        copies,
        gamma=learner.gamma,
        magnitude=learner.return_scale,
        constant=learner.reward_scale,
        memory=learner.return_memory,
        device=device,
    )
    return ReplayBuffer(
        learner.buffer_size,
        n_tasks,
        agent.observation_size,
        agent.action_size,
        device=device,
        seed=seed,
        envs_per_task=copies,
        scale=scale,
        demonstrations=episodes,
    )


def _kind(agent: MTSAC) -> str:
    return f"{type(agent).__module__}:{type(agent).__qualname__}"
