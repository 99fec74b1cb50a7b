"""Compare the time of a `MultiTaskModel` step with a plain step, naive PCGrad and TorchJD.

    python scripts/bench_model.py [--quick] [--json FILE] [--only NAME …] [--threads N] [--clock C]

A step is forward, backward and surgery on one batch, without an optimiser. Each time is a median
over one run in which all variants alternate. `plain` is autograd on the sum of the losses: the same
network without surgery. `naive` is the usual implementation: a backward per task, flat vectors of
all trunk parameters, and pairwise projections. `torchjd` is TorchJD's `mtl_backward` and
`jac_to_grad` with its PCGrad, in the faster of its two modes: all tasks at once, or one by one.

The lower bound, if tasks share inputs, is T passes of gradients w.r.t. the layers' outputs, half a
backward each, because no method is known that separates T gradients without them, plus the forward
and one weight gradient. For the MLP with ten tasks that is 3.9 plain steps of multiplications, and
4.9 with the dot products of our method. The ConvNet and the Transformer have many rows per weight,
so forming T weight gradients is cheapest there: (1 + 2 T) / 3 plain steps, 1.7 and 2.3, for `naive`
and our method alike.

`--clock cpu` measures the CPU time of this process, which other processes on the same cores disturb
less.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import CLOCKS, Found, interleaved, show
from torch import Tensor, nn
from torchjd.aggregation import PCGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from mtrl.surgery import MultiTaskModel


class Transformer(nn.Module):
    """Encoder whose outputs are averaged over tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(1000, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map `[B, S]` to `[B, width]`."""
        return self.encoder(self.embed(ids)).mean(1)


def convolutions() -> nn.Module:
    """Return three convolutions on images of 32 × 32."""
    sizes, layers = [3, 32, 64, 64], []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU())


def layers(width: int = 400) -> nn.Module:
    """Return three fully connected layers."""
    found: list[nn.Module] = []
    for inputs in (39, width, width):
        found += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*found)


class Case(NamedTuple):
    """A trunk and its inputs."""

    trunk: Callable[[], nn.Module]
    n_tasks: int
    width: int
    inputs: Callable[[], Any]
    own: bool = False


CASES = {
    "convnet, 2 tasks": Case(convolutions, 2, 128, lambda: torch.randn(64, 3, 32, 32)),
    "transformer, 3 tasks": Case(Transformer, 3, 64, lambda: torch.randint(1000, (32, 32))),
    "MLP, 10 tasks": Case(layers, 10, 400, lambda: torch.randn(128, 39)),
    "MLP, 10 tasks, inputs of their own": Case(
        layers, 10, 400, lambda: torch.randn(128, 39), own=True
    ),
    "convnet, 2 tasks, inputs of their own": Case(
        convolutions, 2, 128, lambda: torch.randn(64, 3, 32, 32), own=True
    ),
}


def losses_of(outputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return one loss per task; they conflict."""
    return [(output - (-1) ** i).square().mean() for i, output in enumerate(outputs.values())]


def naive(rows: list[Tensor]) -> Tensor:
    """Apply PCGrad to flat vectors."""
    projected = torch.stack(rows)
    for i, g in enumerate(projected):
        for j in torch.randperm(len(rows)).tolist():
            if j != i and (dot := g @ rows[j]) < 0:
                g -= dot / rows[j].square().sum() * rows[j]
    return projected.sum(0)


def ways(case: Case) -> tuple[dict[str, Callable[[], None]], dict[str, MultiTaskModel]]:
    """Return a step of each variant, and its network."""
    torch.manual_seed(0)
    names = [f"task{i}" for i in range(case.n_tasks)]
    head = nn.Linear(case.width, 1)
    heads = {name: copy.deepcopy(head) for name in names}  # equal: their losses pull against it
    model = MultiTaskModel(case.trunk(), heads, "pcgrad")
    x = {name: case.inputs() for name in names} if case.own else case.inputs()

    def features(of: MultiTaskModel) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return outputs and features without surgery."""
        zs = [of.trunk(own) for own in x.values()] if case.own else [of.trunk(x)] * len(names)
        pairs = zip(names, zs, strict=True)
        return {name: of.heads[name](z) for name, z in pairs}, zs if case.own else zs[:1]

    def plain() -> None:
        twin.zero_grad()
        torch.stack(losses_of(features(twin)[0])).sum().backward()

    def ours(of: MultiTaskModel) -> Callable[[], None]:
        def step() -> None:
            of.zero_grad()
            torch.stack(losses_of(of(x))).sum().backward()

        return step

    def by_hand() -> None:
        losses = losses_of(features(twin)[0])
        rows = []
        for i, loss in enumerate(losses):
            twin.trunk.zero_grad()
            loss.backward(retain_graph=not case.own and i < len(losses) - 1)
            rows.append(torch.cat([p.grad.flatten() for p in trunk if p.grad is not None]))
        parts = naive(rows).split([p.numel() for p in trunk])
        for parameter, part in zip(trunk, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def torchjd(chunk: int | None) -> Callable[[], None]:
        def step() -> None:
            twin.zero_grad()
            outputs, zs = features(twin)
            mtl_backward(losses_of(outputs), features=zs, parallel_chunk_size=chunk)
            jac_to_grad(trunk, PCGrad(), optimize_gramian_computation=True)

        return step

    twin = copy.deepcopy(model)
    trunk = list(twin.trunk.parameters())
    none = MultiTaskModel(copy.deepcopy(model.trunk), copy.deepcopy(dict(model.heads.items())))
    steps = {
        "plain": plain,
        "none": ours(none),
        "pcgrad": ours(model),
        "naive": by_hand,
        "torchjd, at once": torchjd(None),
        "torchjd, one by one": torchjd(1),
    }
    return steps, dict.fromkeys(steps, twin) | {"none": none, "pcgrad": model}


def main() -> None:
    """Time all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="NAME")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: all)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall-clock or CPU time")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found: Found = {}
    for name in arguments.only:
        rounds = 2 if arguments.quick else arguments.rounds
        times = interleaved(ways(CASES[name])[0], rounds, "cpu", arguments.clock)
        times["torchjd"] = min(times.pop(way) for way in list(times) if way.startswith("torchjd"))
        ratios = {f"{way} / plain": value / times["plain"] for way, value in times.items()}
        del ratios["plain / plain"]
        found[f"{name}: ms"] = times | ratios
    show(found, "cpu", "fp32", arguments.json)


if __name__ == "__main__":
    main()
