"""One SAC update of all tasks. Which surgery it uses, it does not know."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.config.sections import LearnerConfig
from mtrl.nets.precision import resolve_precision
from mtrl.sac.agent import MTSAC
from mtrl.sac.capture import Captured
from mtrl.sac.losses import temperature_gradient
from mtrl.sac.optimizers import (
    clip_by_network_,
    load_moments_,
    make_optimizer,
    moments,
    set_learning_rate,
)
from mtrl.sac.problems import Compiled, actor_problem, as_it_is, critic_problem
from mtrl.sac.replay import Batch, ReplayBuffer
from mtrl.sac.threads import ThreadChoice
from mtrl.sac.watch import LossWatch
from mtrl.surgery import Gradients, get_surgery
from mtrl.surgery.base import MAINTAIN_EVERY
from mtrl.surgery.stacked import StackedProblem

_SURGERY_STREAM = 1
"""Sets the surgery's stream of random numbers apart from the noise's, which has the same seed."""


class Learner:
    """Optimisers, surgery, and the random numbers of an update.

    Deviations from Haarnoja et al. 2018: twin critics trained on ½ (Q − y)² each, no state value
    network, and a temperature learned per task: as in the authors' later code. From Meta-World's
    published agents: a gradient is clipped network by network, not for both critics together.

    Args:
        agent: Updated in place.
        config: See its fields.
        seed: Of the update's noise, and of the surgery's random orders, which are a stream of their
            own: with equal seeds, methods differ in what they do with the noise, not in the noise.

    Attributes:
        generator: Of the update's noise.
        surgery_generator: Of the surgery's random orders.
        diagnosis_generator: Of what `diagnose` draws.
        captures: Whether `step` is launched as a CUDA graph.
        precision: Of the trunks' products: fp32, tf32 or bf16.
        updates: Made so far by `step`.
        watch: When losses went wrong.
        threads: Where set, chooses how many CPU threads `step` computes with.
        last_batch: What the last update was fed, observations as the networks see them.
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
        self._graph: tuple[ReplayBuffer, int, Captured[dict[str, Tensor]]] | None = None
        # Not dynamic: torch 2.11 cannot differentiate the symbolic sizes of a second method.
        compiled = cache(partial(torch.compile, dynamic=False))
        self._compiled: Compiled = compiled if config.compile else as_it_is
        usual = -float(agent.action_size)
        self.target_entropy = usual if config.target_entropy is None else config.target_entropy
        self.optimizers = {
            name: make_optimizer(dict(module.named_parameters()), config)
            for name, module in agent.networks().items()
        }
        self.optimizers["temperature"] = make_optimizer({"log_alpha": agent.log_alpha}, config)

    def anneal(self, progress: float) -> None:
        """Lower the step sizes as `final_learning_rate` asks.

        Args:
            progress: How much of the run is over, 0 to 1.
        """
        first, last = self.config.learning_rate, self.config.final_learning_rate
        if last is None:
            return
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, first + (last - first) * progress)

    def step(self, replay: ReplayBuffer, updates: int = 1) -> dict[str, Tensor]:
        """Sample batches and update on them; on CUDA all launched as one graph.

        Args:
            replay: Of the agent's tasks, on its device; captured, the same one in every call.
            updates: How many; likewise.

        Returns:
            What the last `update` does; the next call may overwrite it.

        Raises:
            ValueError: if updates are captured and an argument is another one than before.
        """
        if self.threads is not None:
            self.threads.begin()
        if self.captures:
            metrics = self._graph_of(replay, updates)()
        else:
            metrics = self._steps(replay, updates)
        self.updates += updates
        if self.updates % MAINTAIN_EVERY < updates:
            for name, networks in self.agent.networks().items():
                self.surgeries[name].maintain(networks)
        return metrics

    def _graph_of(self, replay: ReplayBuffer, updates: int) -> Captured[dict[str, Tensor]]:
        if self._graph is None:
            drawn_from = {self.generator, self.surgery_generator, replay.generator}
            captured = Captured(partial(self._steps, replay, updates), list(drawn_from))
            self._graph = replay, updates, captured
        before, count, captured = self._graph
        if before is not replay or count != updates:
            raise ValueError(
                f"step: expected the replay and the {count} updates that were captured, got "
                f"{'another replay' if before is not replay else f'{updates} updates'}"
            )
        return captured

    def _steps(self, replay: ReplayBuffer, updates: int) -> dict[str, Tensor]:
        for _ in range(updates):
            batch = replay.sample(self.config.batch_size)
            metrics = self.update(batch, self.noise(batch))
        return metrics

    @torch.no_grad()  # but for the backward inside, there is nothing to record
    def update(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """One update of critics, actor, temperatures and target critics, in this order.

        Args:
            batch: B transitions of each task.
            noise: Standard normal numbers of the next and the current actions, `[2, T, B, A]`.

        Returns:
            `critic_loss`, `actor_loss`, `alpha`, `critic_weight` and `actor_weight`, each `[T]`.
        """
        agent, config = self.agent, self.config
        batch, alpha = self.normalized(batch), agent.log_alpha.exp()
        how: Any = {"alpha": alpha, "precision": self.precision, "compiled": self._compiled}
        problem = critic_problem(agent, config, batch, noise=noise[0], **how)
        critics = self.descend("critics", problem)
        # Rotations do not average, but what a head and its rotation do together does.
        folded = agent.critics.folded()
        problem = actor_problem(agent, config, batch, noise=noise[1], critics=folded, **how)
        actor = self.descend("actor", problem)

        log_prob = actor.auxiliary["log_prob"][0]
        agent.log_alpha.grad = temperature_gradient(log_prob, self.target_entropy)
        self.optimizers["temperature"].step()
        if config.min_temperature > 0:
            agent.log_alpha.clamp_(min=math.log(config.min_temperature))
        targets, sources = (
            [*found.shared.values(), *found.per_task.values()]
            for found in (agent.target_critics.folded(), folded)
        )
        torch._foreach_lerp_(targets, sources, config.tau)
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
        """Moments of the optimisers, and generators; the agent is saved on its own."""
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
        """Take over what `state_dict` gave; step sizes and the like stay those of the config."""
        for name, optimizer in self.optimizers.items():
            load_moments_(optimizer, state.get("optimizers", {}).get(name, {}))
        for name, surgery in self.surgeries.items():
            surgery.load_state_dict(state.get("surgeries", {}).get(name, {}))
        if self.threads is not None:
            self.threads.chosen = state.get("threads", self.threads.chosen)
        self.updates = state["updates"]
        self.generator.set_state(state["generator"].cpu())
        self.diagnosis_generator.set_state(state["diagnosis_generator"].cpu())
        if "surgery_generator" in state:
            self.surgery_generator.set_state(state["surgery_generator"].cpu())
        else:  # an older run, whose orders came from the noise's stream: it goes on to the bit
            self.surgery_generator = self.generator

    def normalized(self, batch: Batch) -> Batch:
        """Observations as the networks see them."""
        return replace(
            batch,
            observations=self.agent.normalized(batch.observations),
            next_observations=self.agent.normalized(batch.next_observations),
        )

    def noise(self, batch: Batch) -> Tensor:
        """What `update` needs for a batch, drawn anew."""
        return batch.actions.new_empty(2, *batch.actions.shape).normal_(generator=self.generator)

    def descend(self, name: str, problem: StackedProblem) -> Gradients:
        """Surgery, clipping of each network's gradient, and a step of the optimiser."""
        networks, surgery = self.agent.networks()[name], self.surgeries[name]
        gradients = surgery(problem, self.surgery_generator)
        # Contiguous: torch's fused Adam takes a gradient's memory for laid out as its parameter's.
        tree = {**gradients.shared, **gradients.per_task}
        found = {key: value.contiguous() for key, value in tree.items()}
        if self.config.max_grad_norm > 0:
            clip_by_network_(list(found.values()), self.config.max_grad_norm)
        for part in networks.named():
            for key, parameter in part.items():
                parameter.grad = found[key]
        self.optimizers[name].step()
        networks.after_step(gradients.losses, self.surgery_generator)
        surgery.after_step(problem.losses)
        return gradients
