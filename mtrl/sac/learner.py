"""SAC update of all tasks, independent of the method of surgery."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.config.learner import LearnerConfig
from mtrl.devices import restore
from mtrl.errors import expect_whole
from mtrl.nets.precision import resolve_precision
from mtrl.sac.agent import MTSAC
from mtrl.sac.capture import Captured
from mtrl.sac.descend import Frozen, descend, follow_, stand_still
from mtrl.sac.losses import temperature_gradient
from mtrl.sac.optimizers import load_moments_, make_optimizer, moments, set_learning_rate
from mtrl.sac.problems import Compiled, actor_problem, as_it_is, critic_problem, normalized
from mtrl.sac.replay import Batch, ReplayBuffer
from mtrl.sac.threads import ThreadChoice
from mtrl.sac.watch import LossWatch
from mtrl.surgery import Gradients, get_surgery
from mtrl.surgery.base import MAINTAIN_EVERY
from mtrl.surgery.stacked import StackedProblem

_SURGERY_STREAM = 1
"""Separates the surgery's random stream from that of the noise, which has the same seed."""


class Learner:
    """Optimisers, surgery and random generators of the SAC update.

    Deviations from Haarnoja et al. 2018, as in the authors' later code: twin critics trained on
    ½ (Q − y)² each, no state value network, and a learned temperature, one per task. Deviation from
    Meta-World's published agents: gradients are clipped per network, not for both critics together.

    Args:
        agent: Agent, updated in place.
        config: See its fields.
        seed: Seed of the update's noise and of the surgery's random orders. The latter use a
            separate stream, so that methods see the same noise under equal seeds.

    Attributes:
        generator: Generator of the update's noise.
        surgery_generator: Generator of the surgery's random orders.
        diagnosis_generator: Generator of `diagnose`.
        captures: Whether `step` is launched as a CUDA graph.
        precision: Precision of the trunks' products: fp32, tf32 or bf16.
        updates: Number of updates made by `step`.
        watch: Records losses that are not finite.
        threads: If set, chooses the number of CPU threads of `step`.
        last_batch: Batch of the last update, with observations as the networks see them.
        frozen: Parts that are not trained.
    """

    def __init__(self, agent: MTSAC, config: LearnerConfig, seed: int = 0) -> None:
        self.agent, self.config = agent, config
        self.surgeries = {
            "actor": get_surgery(config.actor_surgery or config.surgery, config),
            "critics": get_surgery(config.critic_surgery or config.surgery, config),
        }
        for name, networks in agent.networks().items():
            self.surgeries[name].prepare(networks)
        self.generator = torch.Generator(agent.device).manual_seed(seed)
        self.diagnosis_generator = torch.Generator(agent.device).manual_seed(seed)
        apart = int(np.random.SeedSequence([seed, _SURGERY_STREAM]).generate_state(1)[0])
        self.surgery_generator = torch.Generator(agent.device).manual_seed(apart)
        self.precision = resolve_precision(config.precision, agent.device)
        capturable = all(surgery.capturable for surgery in self.surgeries.values())
        self.captures = config.capture and agent.device.type == "cuda" and capturable
        self.updates = 0
        self.watch = LossWatch(("critic_loss", "actor_loss"), len(agent.tasks), agent.device)
        self.threads: ThreadChoice | None = None
        self.last_batch: Batch | None = None
        self.frozen = Frozen()
        self._graph: tuple[ReplayBuffer, int, Captured[dict[str, Tensor]]] | None = None
        # Not dynamic, because torch 2.11 cannot differentiate a second method's symbolic sizes.
        compiled = cache(partial(torch.compile, dynamic=False))
        self._compiled: Compiled = compiled if config.compile else as_it_is
        self.target_entropy = config.entropy_of(agent.action_size)
        self.optimizers = {
            name: make_optimizer(*networks.by_decay(), config)
            for name, networks in agent.networks().items()
        }
        self.optimizers["temperature"] = make_optimizer([], [agent.log_alpha], config)

    def anneal(self, progress: float) -> None:
        """Decay the learning rates linearly towards `final_learning_rate`.

        Args:
            progress: Completed fraction of the run, 0 to 1.
        """
        first, last = self.config.learning_rate, self.config.final_learning_rate
        if last is None:
            return
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, first + (last - first) * progress)

    def step(self, replay: ReplayBuffer, updates: int = 1) -> dict[str, Tensor]:
        """Sample batches and update on them; on CUDA, launched as one graph.

        Args:
            replay: Replay buffer on the agent's device; if captured, the same one in every call.
            updates: Number of updates; likewise.

        Returns:
            The result of the last `update`; the next call may overwrite it.

        Raises:
            ValueError: If the replay lacks transitions of a task; or if updates are captured and an
                argument differs from the first call's.
        """
        expect_whole("updates", updates)
        if self.threads is not None:
            self.threads.begin()
        if self.captures:
            metrics = self._graph_of(replay, updates)()
        else:
            metrics = self._steps(replay, updates)
        self.updates += updates
        if self.updates % MAINTAIN_EVERY < updates:
            for name, networks in self.agent.networks().items():
                if not self.frozen.trunk(name):
                    self.surgeries[name].maintain(networks)
        return metrics

    def _graph_of(self, replay: ReplayBuffer, updates: int) -> Captured[dict[str, Tensor]]:
        if self._graph is None:
            drawn_from = [*{self.generator, self.surgery_generator, replay.generator}]
            run, device = partial(self._steps, replay, updates), self.agent.device
            captured = Captured(run, drawn_from, device=device)
            self._graph = replay, updates, captured
        before, count, captured = self._graph
        if before is not replay or count != updates:
            got = "another replay" if before is not replay else f"{updates} updates"
            raise ValueError(
                f"step: expected the replay and the {count} updates that were captured, got {got}"
            )
        return captured

    def _steps(self, replay: ReplayBuffer, updates: int) -> dict[str, Tensor]:
        for _ in range(updates):
            batch = replay.sample(self.config.batch_size)
            metrics = self.update(batch, self.noise(batch))
        return metrics

    @torch.no_grad()  # surgery records its own graph
    def update(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """Update critics, actor, temperatures and target critics once, in this order.

        Args:
            batch: B transitions of each task.
            noise: Standard normal noise of the next and the current actions, `[2, T, B, A]`.

        Returns:
            `critic_loss`, `actor_loss`, `alpha`, `critic_weight` and `actor_weight`, each `[T]`, on
            the device.
        """
        agent, config = self.agent, self.config
        batch, alpha, frozen = normalized(agent, batch), agent.log_alpha.exp(), self.frozen
        how: Any = {"alpha": alpha, "precision": self.precision, "compiled": self._compiled}
        how["frozen"] = frozen
        problem = critic_problem(agent, config, batch, noise=noise[0], **how)
        critics = self.descend("critics", problem)
        # Rotations cannot be averaged, but heads with their rotation folded in can.
        folded = agent.critics.folded()
        problem = actor_problem(agent, config, batch, noise=noise[1], critics=folded, **how)
        actor = self.descend("actor", problem)

        if not frozen.whole("actor"):  # else no temperature could bring its entropy to the target
            log_prob = actor.auxiliary["log_prob"][0]
            agent.log_alpha.grad = temperature_gradient(log_prob, self.target_entropy)
            self.optimizers["temperature"].step()
            if config.min_temperature > 0:
                agent.log_alpha.clamp_(min=math.log(config.min_temperature))
        if not frozen.whole("critics"):
            follow_(agent.target_critics.folded(), folded, config.tau)
        critic_loss, actor_loss, n_tasks = critics.losses.mean(0), actor.losses[0], len(alpha)
        self.watch.note(critic_loss, actor_loss)
        self.last_batch = batch
        return {
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "alpha": alpha,
            "critic_weight": n_tasks * critics.weights.mean(0),
            "actor_weight": n_tasks * actor.weights[0],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return states of optimisers, generators and surgery; the agent is saved separately."""
        state = {
            "optimizers": {name: moments(found) for name, found in self.optimizers.items()},
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "diagnosis_generator": self.diagnosis_generator.get_state(),
            "surgeries": {name: dict(s.state_dict()) for name, s in self.surgeries.items()},
        }
        if (threads := self.threads) is not None and threads.chosen is not None:
            state["threads"] = threads.chosen
        if self.surgery_generator is not self.generator:
            state["surgery_generator"] = self.surgery_generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`; settings such as learning rates follow the config."""
        for name, optimizer in self.optimizers.items():
            load_moments_(optimizer, state.get("optimizers", {}).get(name, {}))
        for name, surgery in self.surgeries.items():
            surgery.load_state_dict(state.get("surgeries", {}).get(name, {}))
        if self.threads is not None:
            self.threads.chosen = state.get("threads", self.threads.chosen)
        self.updates = state["updates"]
        restore(self.generator, state["generator"])
        restore(self.diagnosis_generator, state["diagnosis_generator"])
        if "surgery_generator" in state:
            restore(self.surgery_generator, state["surgery_generator"])
        else:  # an older run drew orders from the noise's stream: continue it bit by bit
            self.surgery_generator, self._graph = self.generator, None

    def noise(self, batch: Batch) -> Tensor:
        """Draw the noise that `update` needs for a batch, `[2, T, B, A]`."""
        return batch.actions.new_empty(2, *batch.actions.shape).normal_(generator=self.generator)

    def descend(self, name: str, problem: StackedProblem) -> Gradients:
        """Step `actor` or `critics`; see `mtrl.sac.descend`."""
        if self.frozen.whole(name):
            return stand_still(problem)
        return descend(
            self.agent.networks()[name],
            problem,
            self.surgeries[name],
            self.optimizers[name],
            generator=self.surgery_generator,
            max_grad_norm=self.config.max_grad_norm,
        )

    def freeze(self, parts: frozenset[str]) -> None:
        """Stop training these parts and train all others from now on; see `Frozen`."""
        if parts != self.frozen.parts:
            self._graph = None  # it captured other work
        self.frozen = Frozen(parts)
        if self.agent.normalizer is not None:
            self.agent.normalizer.frozen = self.frozen.normalizer
