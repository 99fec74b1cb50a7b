"""Time one full SAC update: ours, the published way to do PCGrad, and the matrix products alone.

    python scripts/bench_update.py [--quick] [--json FILE] [--device cuda]

All variants take turns within one loop, so that a machine that slows down slows all of them; what
counts are the ratios of the medians. An update is: next action, target, two critics forward and
backward, actor forward and backward through both critics, three optimisers, target networks. The
batch is drawn before, for all alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from mtrl.agent import MTSAC
from mtrl.config import AgentConfig, LearnerConfig
from mtrl.learner import Learner
from mtrl.replay import Batch, ReplayBuffer

OBSERVATION, ACTION, WIDTH, DEPTH, BATCH = 39, 4, 400, 3, 128


def random_batch(n_tasks: int, device: str) -> tuple[Batch, Tensor]:
    """A batch of noise: the time of an update does not depend on the numbers."""
    lead = (n_tasks, BATCH)
    batch = Batch(
        torch.randn(*lead, OBSERVATION, device=device),
        torch.rand(*lead, ACTION, device=device) * 2 - 1,
        torch.rand(*lead, device=device),
        torch.zeros(*lead, device=device),
        torch.randn(*lead, OBSERVATION, device=device),
    )
    return batch, torch.randn(2, *lead, ACTION, device=device)


def make_learner(n_tasks: int, surgery: str, device: str) -> Learner:
    """Our learner at the published sizes."""
    config = AgentConfig(hidden_sizes=(WIDTH,) * DEPTH)
    tasks = tuple(f"task-{t}" for t in range(n_tasks))
    agent = MTSAC(tasks, config, OBSERVATION, ACTION).to(device)
    return Learner(agent, LearnerConfig(surgery=surgery))


def matrix_products(n_tasks: int, device: str) -> Callable[[], None]:
    """The products an update without surgery cannot avoid, into preallocated memory.

    Per layer and network: next action 1, target critics 2, critics 2 forward, 2 for weights and 2
    for inputs, actor 1 forward, 1 for weights and 1 for inputs, the actor's critics 2 forward and
    2 for inputs. A first layer passes nothing on to its inputs, except, for the actor's sake, to
    the actions.
    """
    rows = n_tasks * BATCH
    layers = [(OBSERVATION + ACTION, WIDTH)] + [(WIDTH, WIDTH)] * (DEPTH - 1)
    work = []
    for i, (fan_in, width) in enumerate(layers):
        x = torch.randn(rows, fan_in, device=device)
        y = torch.randn(rows, width, device=device)
        w = torch.randn(fan_in, width, device=device)
        out_y, out_x, out_w = torch.empty_like(y), torch.empty_like(x), torch.empty_like(w)
        inputs = 5 if i else 2
        work.append((x, y, w, out_y, out_x, out_w, 8, inputs, 3))

    def run() -> None:
        for x, y, w, out_y, out_x, out_w, forwards, inputs, weights in work:
            for _ in range(forwards):
                torch.mm(x, w, out=out_y)
            for _ in range(inputs):
                torch.mm(y, w.mT, out=out_x)
            for _ in range(weights):
                torch.mm(x.mT, y, out=out_w)

    return run


class Published:
    """PCGrad as published PyTorch code has it: written for the comparison, by us.

    One joint forward on [inputs, one-hot]; one `retain_graph` backward per task over all
    parameters; a sequential projection of flat vectors, task by task, in random order.
    """

    def __init__(self, n_tasks: int, device: str) -> None:
        self.n_tasks = n_tasks

        def mlp(inputs: int, outputs: int) -> nn.Sequential:
            sizes = [inputs + n_tasks, *[WIDTH] * DEPTH]
            layers: list[nn.Module] = []
            for fan_in, width in pairwise(sizes):
                layers += [nn.Linear(fan_in, width), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(WIDTH, outputs * n_tasks)).to(device)

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
        """Every head is computed, and each row keeps its task's."""
        every = network(torch.cat([inputs, self.one_hot], -1)).view(-1, self.n_tasks, outputs)
        return (every * self.one_hot[..., None]).sum(1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Action and log-probability."""
        mean, log_std = self.head(self.actor, observations, 2 * ACTION).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        action = u.tanh()
        return action, (normal.log_prob(u) - torch.log(1 - action.square() + 1e-6)).sum(-1)

    def step(self, network: list[nn.Parameter], losses: Tensor, optimizer: int) -> None:
        """Backward per task, projection, optimiser."""
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
        """One update."""
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


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, device: str) -> dict:
    """Median milliseconds of each, taking turns; two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, run in variants.items():
            start = perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(perf_counter() - start)
    return {name: median(values[2:]) * 1e3 for name, values in times.items()}


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    device = arguments.device

    ms: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for n_tasks, rounds in (
        (10, 12 if arguments.quick else 60),
        (50, 3 if arguments.quick else 15),
    ):
        name = f"mt{n_tasks}"
        batch, noise = random_batch(n_tasks, device)
        ours = {s: make_learner(n_tasks, s, device) for s in ("none", "pcgrad")}
        variants: dict[str, Callable[[], object]] = {
            "matmul": matrix_products(n_tasks, device),
            "none": partial(ours["none"].update, batch, noise),
            "pcgrad": partial(ours["pcgrad"].update, batch, noise),
        }
        medians = interleaved(variants, rounds, device)
        if n_tasks == 10:
            # In a loop of its own, ours beside it: ten times slower, it would stretch the first.
            pair: dict[str, Callable[[], object]] = {
                "pcgrad": variants["pcgrad"],
                "published": partial(Published(n_tasks, device).update, batch),
            }
            slow = interleaved(pair, 3 if arguments.quick else 10, device)
            medians["published"] = slow["published"]
            ratios[f"{name}/published/pcgrad"] = slow["published"] / slow["pcgrad"]
        ratios[f"{name}/pcgrad/none"] = medians["pcgrad"] / medians["none"]
        ratios[f"{name}/none/matmul"] = medians["none"] / medians["matmul"]
        ms |= {f"{name}/{variant}": value for variant, value in medians.items()}

        replay = ReplayBuffer(100_000, n_tasks, OBSERVATION, ACTION)
        actor, critics = ours["pcgrad"].agent.actor, ours["pcgrad"].agent.critics
        jacobian = sum(p.nbytes for net in (actor, critics) for p in net.shared.values()) * n_tasks
        print(f"{name}: replay of 100,000 per task {replay.nbytes / 2**20:,.0f} MiB, ", end="")
        print(f"per-task trunk gradients {jacobian / 2**20:,.0f} MiB")

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    for key, value in ms.items():
        print(f"{key:24} {value:9.1f} ms")
    for key, value in sorted(ratios.items()):
        print(f"{key:24} {value:9.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ms": ms, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
