"""Multi-task SAC with TorchJD's PCGrad and our sizes, as an alternative to compare with.

It is optimised carefully: fused Adam, no unnecessary products, and the faster mode of TorchJD.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from published import ACTION, BATCH, DEPTH, OBSERVATION, WIDTH
from torch import Tensor, nn
from torchjd.aggregation import PCGrad, PCGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

from mtrl.sac.replay import Batch

RATE, GAMMA, TAU, MAX_NORM = 3e-4, 0.99, 0.005, 1.0
ADAM: dict[str, Any] = {"eps": 1e-5, "fused": True}
EVERY = slice(None)


class TaskNetwork(nn.Module):
    """Trunk on [inputs, one-hot], `[T, B, in + T]`, and a linear head per task."""

    def __init__(self, n_tasks: int, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([inputs + n_tasks, *[width] * DEPTH]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, outputs) for _ in range(n_tasks))

    def outputs(self, features: Tensor, t: int | slice) -> Tensor:
        """Apply each task's head to its own rows, for one task or all."""
        if isinstance(t, int):
            return self.heads[t](features)
        return torch.stack([head(z) for head, z in zip(self.heads, features, strict=True)])

    def forward(self, inputs: Tensor, t: int | slice = EVERY) -> Tensor:
        """Apply trunk and heads."""
        return self.outputs(self.trunk(inputs), t)

    def frozen(self) -> TaskNetwork:
        """Return a view with the same memory that is not trained."""
        twin = copy.deepcopy(self).requires_grad_(False)
        for own, other in zip(twin.parameters(), self.parameters(), strict=True):
            own.data = other.data
        return twin


def sample(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Sample action and log-probability of a tanh-Gaussian."""
    mean, log_std = outputs.chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    u = normal.rsample()
    action = u.tanh()
    return action, (normal.log_prob(u) - torch.log(1 - action.square() + 1e-6)).sum(-1)


def tensors(networks: Iterable[nn.Module]) -> list[Tensor]:
    """Return all parameters of the networks."""
    return [parameter for network in networks for parameter in network.parameters()]


Loss = Callable[[Tensor, Any], Tensor]
"""Maps a network's outputs for task t, or for all tasks, to the loss of each."""


class TorchJD:
    """Multi-task SAC of modules whose gradients are combined by TorchJD's PCGrad.

    The losses are divided by the number of tasks, so that TorchJD's sum equals our mean.

    Args:
        n_tasks: Number T of tasks.
        device: Device of the networks.
        width: Width of the trunks' layers.
        engine: `autojac` uses `mtl_backward`, TorchJD's function for several tasks, which forms the
            gradient of each task; `autogram` computes only their Gramian, with the tasks as the
            batch, followed by a backward with PCGrad's weights.
    """

    def __init__(
        self, n_tasks: int, device: str, width: int = WIDTH, engine: str = "autojac"
    ) -> None:
        self.n_tasks = n_tasks
        # Backward one task at a time if arithmetic dominates, all at once if launches do.
        self.chunk = 1 if device == "cpu" else None

        def make(inputs: int, outputs: int) -> TaskNetwork:
            return TaskNetwork(n_tasks, inputs, outputs, width).to(device)

        self.actor = make(OBSERVATION, 2 * ACTION)
        self.critics = [make(OBSERVATION + ACTION, 1) for _ in range(2)]
        self.targets = [copy.deepcopy(critic).requires_grad_(False) for critic in self.critics]
        self.frozen = [critic.frozen() for critic in self.critics]
        self.log_alpha = torch.zeros(n_tasks, device=device, requires_grad=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], RATE, **ADAM)
        networks = [self.actor, *self.critics]
        self.optimizers = {n: torch.optim.Adam(n.parameters(), RATE, **ADAM) for n in networks}
        self.engines: dict[TaskNetwork, Engine] = {}
        if engine == "autogram":
            self.engines = {n: Engine(n.trunk, batch_dim=0) for n in networks}
        self.one_hot = torch.eye(n_tasks, device=device)[:, None].expand(-1, BATCH, -1)

    def update(self, batch: Batch) -> None:
        """Make one update."""
        alpha = self.log_alpha.detach().exp()[:, None]
        here, there, hot = batch.observations, batch.next_observations, self.one_hot
        with torch.no_grad():
            action, log_prob = sample(self.actor(torch.cat([there, hot], -1)))
            inputs = torch.cat([there, action, hot], -1)
            value = torch.stack([target(inputs) for target in self.targets]).amin(0).squeeze(-1)
            y = batch.rewards + GAMMA * (1 - batch.terminated) * (value - alpha * log_prob)

        def critic_loss(outputs: Tensor, t: Any) -> Tensor:
            return 0.5 * (outputs.squeeze(-1) - y[t]).square().mean(-1)

        inputs = torch.cat([here, batch.actions, hot], -1)
        for critic in self.critics:
            self.descend(critic, inputs, critic_loss)
        entropy = torch.zeros_like(self.log_alpha)

        def actor_loss(outputs: Tensor, t: Any) -> Tensor:
            action, log_prob = sample(outputs)
            entropy[t] = -log_prob.detach().mean(-1)
            inputs = torch.cat([here[t], action, hot[t]], -1)
            value = torch.stack([critic(inputs, t) for critic in self.frozen]).amin(0).squeeze(-1)
            return (alpha[t] * log_prob - value).mean(-1)

        self.descend(self.actor, torch.cat([here, hot], -1), actor_loss)
        self.log_alpha.grad = entropy + ACTION  # minus the target entropy
        self.alpha_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(tensors(self.targets), tensors(self.critics), TAU)

    def descend(self, network: TaskNetwork, inputs: Tensor, loss: Loss) -> None:
        """Compute task gradients, apply PCGrad, clip, and step Adam."""
        self.optimizers[network].zero_grad()
        features = network.trunk(inputs)
        if engine := self.engines.get(network):
            together = loss(network.outputs(features, EVERY), EVERY) / self.n_tasks
            together.backward(PCGradWeighting()(engine.compute_gramian(together)))
        else:  # a separate graph per task above the features
            tasks = range(self.n_tasks)
            losses = [loss(network.outputs(features[t], t), t) / self.n_tasks for t in tasks]
            mtl_backward(losses, features=features, parallel_chunk_size=self.chunk)
            trunk = network.trunk.parameters()
            jac_to_grad(trunk, PCGrad(), optimize_gramian_computation=True)
        nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        self.optimizers[network].step()
