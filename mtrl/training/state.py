"""Everything of a run that goes on where it stopped."""

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
from mtrl.training.checkpoint import keep_batch, what_is_left
from mtrl.training.rollout import Collector


class RunState:
    """The parts of a run, and where it is.

    Args:
        config: All of it resolved.
        benchmark: The tasks.
        device: Of networks and replay.
        saved: What `state_dict` gave; default: a new run.
        demonstrations: Of the run's tasks; the same ones in all of the run.
        agent: What is trained, of the configuration's shape; default: a new one.

    Attributes:
        steps: Environment steps so far, over all tasks.
        elapsed: Time so far [s].
        score: Of the last evaluation, in words; empty before the first.
        evaluation_pending: Whether one was begun and not ended.
        known: Tasks that the policy knew before the run, and so acts in from the start.

    Raises:
        UsageError: if `saved` is not of a run with this configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        device: torch.device,
        saved: dict[str, Any] | None = None,
        *,
        demonstrations: Demonstrations | None = None,
        agent: MTSAC | None = None,
    ) -> None:
        self.config, self.benchmark = config, benchmark
        self.demonstrations = demonstrations
        n_tasks = len(benchmark.tasks)
        # Independent streams for everything random, all from the one seed.
        weights, learner, replay, exploration = (
            int(sequence.generate_state(1)[0])
            for sequence in np.random.SeedSequence(config.seed).spawn(4)
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
        observation, action = self.envs.observation_size, self.envs.action_size
        if agent is None:
            agent = MTSAC(
                benchmark.tasks,
                config.agent,
                observation,
                action,
                seed=weights,
                descriptions=benchmark.descriptions,
            )
        self.agent = agent.to(device)
        self.learner = Learner(self.agent, config.learner, learner)
        if config.threads is None and device.type == "cpu":
            self.learner.threads = ThreadChoice()
        shown = None
        if demonstrations is not None:
            share = config.learner.demonstration_share
            shown = Demonstrated(demonstrations, benchmark.tasks, share, device)
        self.replay = ReplayBuffer(
            config.learner.buffer_size,
            n_tasks,
            observation,
            action,
            device=device,
            seed=replay,
            envs_per_task=environment.envs_per_task,
            scale=RewardScale(
                n_tasks,
                environment.envs_per_task,
                gamma=config.learner.gamma,
                magnitude=config.learner.return_scale,
                constant=config.learner.reward_scale,
                memory=config.learner.return_memory,
                device=device,
            ),
            demonstrations=shown,
        )
        self.collector = Collector(self.envs, self.agent, exploration)
        self.eval_envs = make_evaluation_env(
            benchmark,
            [config.eval_episodes, N_GOALS],
            environment.horizon,
            workers=environment.workers,
            max_restarts=environment.max_restarts,
        )
        # What steps of one say of success, both know.
        self.eval_envs.tells_success = self.envs.tells_success
        self.known: tuple[str, ...] = ()
        if saved is None and config.transfer.init_from is not None:
            self.known = transfer(self.agent, read_source(config.transfer.init_from))
        self.steps = 0
        self.elapsed = 0.0
        self.score = ""
        self.evaluation_pending = False
        if saved is None:
            self.learner.freeze(config.transfer.frozen_at(0))
            normalizer = self.agent.normalizer
            if shown is not None and normalizer is not None and not normalizer.frozen:
                normalizer.observe(shown.observations)
            self.collector.reset(config.seed)
        else:
            try:
                self._load(saved)
            except UsageError:
                raise
            except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise UsageError(
                    "resume: expected the state of a run with this configuration, got another: "
                    f"{one_line(error)}"
                ) from None

    def close(self) -> None:
        """End the simulators."""
        self.envs.close()
        self.eval_envs.close()

    def unknown(self) -> np.ndarray:
        """Tasks in which the policy has nothing to act by yet, `[T]`."""
        return np.array([task not in self.known for task in self.benchmark.tasks])

    def due(self, every: int) -> bool:
        """Whether the last vector step reached a multiple of so many steps; never if 0."""
        return every > 0 and self.steps // every > (self.steps - self.envs.num_envs) // every

    def expect_numbers(self, run_dir: Path) -> None:
        """Stop before a checkpoint or a log holds NaN or infinity.

        Raises:
            RunError: naming what is not finite; the batch it came from is kept in `run_dir`.
        """
        try:
            self.learner.watch.expect_finite(self.benchmark.tasks, self.learner.updates)
            expect_finite(self.agent.state_dict().items())
        except RunError as error:
            kept = keep_batch(run_dir, self.steps, self.learner.last_batch)
            raise RunError(
                f"{error}, noticed after {self.steps:,} steps{kept}. {what_is_left(run_dir)}"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Nested dictionaries of tensors, arrays and plain values."""
        shown = self.demonstrations
        return {
            **({} if shown is None else {"demonstrations": shown.digest()}),
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
        }

    def description(self) -> dict[str, Any]:
        """Where the policy comes from, for the header of its file; see `PolicyHeader`."""
        return {
            "benchmark": self.benchmark.name,
            "environments": "custom" if self.benchmark.custom else "metaworld",
            "surgery": self.config.learner.surgery,
            "seed": self.config.seed,
            "horizon": self.config.environment.horizon,
            "total_timesteps": self.steps,
        }

    def _load(self, state: dict[str, Any]) -> None:
        digest = None if self.demonstrations is None else self.demonstrations.digest()
        if state.get("demonstrations") != digest:
            raise UsageError(
                f"resume: expected the {DEMONSTRATIONS} that the run began with, got another"
            )
        kind = state.get("agent_type", _kind(self.agent))  # not kept in older checkpoints
        if kind != _kind(self.agent):
            raise UsageError(
                f"resume: expected an agent of type {kind} (agent=...), as the run began with, got "
                f"{_kind(self.agent)}"
            )
        self.agent.load_state_dict(state["agent"])
        self.learner.load_state_dict(state["learner"])
        self.replay.load_state_dict(state["replay"])
        self.collector.load_state_dict(state, self.config.seed)
        self.steps = state["steps"]
        self.elapsed = state["elapsed"]
        self.score = state.get("score", "")  # not in checkpoints from before it was kept
        self.evaluation_pending = state["evaluation_pending"]
        self.known = tuple(state.get("known", ()))


def _kind(agent: MTSAC) -> str:
    return f"{type(agent).__module__}:{type(agent).__qualname__}"
