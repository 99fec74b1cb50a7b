"""PCGrad in multi-task SAC as in published PyTorch code, as a baseline."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from mtrl.sac.replay import Batch

OBSERVATION, ACTION, WIDTH, DEPTH, BATCH = 39, 4, 400, 3, 128


class Published:
    """PCGrad as in published PyTorch code, written by us for the comparison.

    It makes one joint forward on [inputs, one-hot], one `retain_graph` backward per task over all
    parameters, and sequential projections of flat vectors, task by task, in random order.
    """

    def __init__(self, n_tasks: int, device: str, width: int = WIDTH) -> None:
        self.n_tasks = n_tasks

        def mlp(inputs: int, outputs: int) -> nn.Sequential:
            sizes = [inputs + n_tasks, *[width] * DEPTH]
            layers: list[nn.Module] = []
            for fan_in, fan_out in pairwise(sizes):
                layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(width, outputs * n_tasks)).to(device)

        self.actor = mlp(OBSERVATION, 2 * ACTION)
        self.critics = [mlp(OBSERVATION + ACTION, 1) for _ in range(2)]
        self.targets = [mlp(OBSERVATION + ACTION, 1) for _ in range(2)]
        self.log_alpha = torch.zeros(n_tasks, device=device, requires_grad=True)
        critic_parameters = [p for critic in self.critics for p in critic.parameters()]
        self.optimizers = [
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (critic_parameters, self.actor.parameters(), [self.log_alpha])
        ]
        one_hot = torch.eye(n_tasks, device=device)
        self.one_hot = one_hot.repeat_interleave(BATCH, 0)

    def head(self, network: nn.Module, inputs: Tensor, outputs: int) -> Tensor:
        """Compute all heads, and keep the output of each row's task."""
        every = network(torch.cat([inputs, self.one_hot], -1)).view(-1, self.n_tasks, outputs)
        return (every * self.one_hot[..., None]).sum(1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Sample action and log-probability."""
        mean, log_std = self.head(self.actor, observations, 2 * ACTION).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        action = u.tanh()
        return action, (normal.log_prob(u) - torch.log(1 - action.square() + 1e-6)).sum(-1)

    def step(self, network: list[nn.Parameter], losses: Tensor, optimizer: int) -> None:
        """Make a backward per task, project, and step the optimiser."""
        rows = []
        for t in range(self.n_tasks):
            grads = torch.autograd.grad(losses[t], network, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
        projected = [row.clone() for row in rows]
        for i, row in enumerate(projected):
            for j in torch.randperm(self.n_tasks).tolist():
                dot = row @ rows[j]
                if j != i and dot < 0:
                    row -= dot / rows[j].square().sum() * rows[j]
        combined = torch.stack(projected).mean(0)
        for p, part in zip(network, combined.split([p.numel() for p in network]), strict=True):
            p.grad = part.view_as(p)
        nn.utils.clip_grad_norm_(network, 1.0)
        self.optimizers[optimizer].step()

    def update(self, batch: Batch) -> None:
        """Make one update."""
        obs, act, nxt = (
            x.flatten(0, 1) for x in (batch.observations, batch.actions, batch.next_observations)
        )
        alpha = (self.log_alpha.detach().exp() * self.one_hot).sum(-1)
        with torch.no_grad():
            action, log_prob = self.sample(nxt)
            inputs = torch.cat([nxt, action], -1)
            q = torch.stack([self.head(c, inputs, 1) for c in self.targets]).amin(0).squeeze(-1)
            y = batch.rewards.flatten() + 0.99 * (q - alpha * log_prob)
        inputs = torch.cat([obs, act], -1)
        squares = [(self.head(c, inputs, 1).squeeze(-1) - y).square() for c in self.critics]
        losses = torch.stack(squares).sum(0).view(self.n_tasks, BATCH).mean(1)
        self.step([p for c in self.critics for p in c.parameters()], losses, 0)
        action, log_prob = self.sample(obs)
        inputs = torch.cat([obs, action], -1)
        q = torch.stack([self.head(c, inputs, 1) for c in self.critics]).amin(0).squeeze(-1)
        losses = (alpha * log_prob - q).view(self.n_tasks, BATCH).mean(1)
        self.step(list(self.actor.parameters()), losses, 1)
        entropy = log_prob.detach().view(self.n_tasks, BATCH).mean(1) - ACTION
        self.optimizers[2].zero_grad()
        (-(self.log_alpha * entropy).mean()).backward()
        self.optimizers[2].step()
        with torch.no_grad():
            for critic, target in zip(self.critics, self.targets, strict=True):
                for p, q in zip(critic.parameters(), target.parameters(), strict=True):
                    q.lerp_(p, 0.005)
