"""Matrix products that an update of multi-task SAC cannot avoid: a lower bound of its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.precision import trunks_in
from mtrl.sac.agent import MTSAC

Run = Callable[[], object]


def matrix_products(agent: MTSAC, rows: int, device: str, precision: str) -> Run:
    """Return the products of an update without surgery, with preallocated outputs.

    Per layer of the actor: 2 forward (next and current action), 1 for weights and 1 for inputs. Per
    layer of the two critics together: 3 forward (targets, critics, actor loss), 1 for weights and 2
    for inputs. A first layer has no gradient w.r.t. its inputs, except w.r.t. the actions for the
    actor loss.

    Operands have the types of the update: the forward of heads is in float32. Each product uses the
    fastest of several equivalent formulations on this machine, which is determined first.

    Args:
        agent: Agent whose networks define the products.
        rows: Transitions per task in a batch.
        device: `cpu` or `cuda`.
        precision: Precision of the trunks.
    """
    half = precision == "bf16"
    work = _of_networks(agent.actor, rows, half, (2, 1, 1), 0)
    work += _of_networks(agent.critics, rows, half, (3, 1, 2), agent.action_size)
    outside = partial(trunks_in, "fp32" if half else precision, torch.device(device))
    with outside():
        chosen = [(count, fastest(each, device)) for count, each in work]

    def run() -> None:
        with outside():
            for count, product in chosen:
                for _ in range(count):
                    product()

    return run


def _of_networks(
    networks: MultiTaskNetworks, rows: int, half: bool, counts: tuple[int, int, int], passed_on: int
) -> list[tuple[int, list[Run]]]:
    """Return the count of each product, and its equivalent formulations.

    Args:
        networks: N networks.
        rows: Transitions per task in a batch.
        half: Whether products are in bf16.
        counts: Number of forward products, of those for weights, and of those for inputs.
        passed_on: Number of columns of the first layer's inputs that need a gradient.
    """
    forward, at_weight, at_inputs = counts
    work: list[tuple[int, list[Run]]] = []
    dtype = torch.bfloat16 if half else torch.float32

    def noise(like: Tensor, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=like.device, dtype=dtype)

    for name, weight in networks.named_parameters():
        owner, name = name.split(".")
        if "weight" not in name or name == "task_weight":
            continue
        many = weight.flatten(0, -3)  # [N, in, out], of heads [N T, in, out]
        count, fan_in, fan_out = many.shape
        n_rows = rows if owner == "per_task" else rows * networks.n_tasks
        x, w = noise(many, count, n_rows, fan_in), noise(many, count, fan_in, fan_out)
        y = noise(many, count, n_rows, fan_out)
        inputs, matrix = (x, w) if name != "head_weight" else (x.float(), w.float())
        work += [(forward, ways(inputs, matrix)), (at_weight, ways(x.mT, y))]
        if name != "weight0":
            work.append((at_inputs, ways(y, w.mT)))
        elif passed_on:
            # A few columns are less work than all, but not necessarily faster.
            work.append((1, ways(y, w[:, -passed_on:].mT) + ways(y, w.mT)))
    return work


def ways(a: Tensor, b: Tensor) -> list[Run]:
    """Return ways to compute A B, `[N, m, k]` by `[N, k, n]`: batched, looped or transposed."""
    found: list[Run] = []
    for left, right in ((a, b), (b.mT, a.mT)):
        out = left.new_empty(*left.shape[:2], right.shape[2])
        found += [
            partial(torch.bmm, left, right, out=out),
            partial(_one_by_one, list(zip(left, right, out, strict=True))),
        ]
    return found


def _one_by_one(parts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for left, right, out in parts:
        torch.mm(left, right, out=out)


def fastest(alternatives: list[Run], device: str) -> Run:
    """Return the fastest alternative, by the minimum of a few times."""
    times: list[float] = [torch.inf] * len(alternatives)
    for attempt in range(8):
        for i, run in enumerate(alternatives):
            start = perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if attempt > 1:
                times[i] = min(times[i], perf_counter() - start)
    return alternatives[times.index(min(times))]
