"""The matrix products that an update of multi-task SAC cannot avoid: a floor for its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from published import ACTION, BATCH, DEPTH, OBSERVATION, WIDTH
from torch import Tensor

from mtrl.nets.precision import trunks_in

Run = Callable[[], object]


def matrix_products(n_tasks: int, device: str, precision: str, width: int = WIDTH) -> Run:
    """The trunks' products in an update without surgery, into preallocated memory.

    Per layer: of the actor 2 forward (next and current action), 1 for its weights and 1 for its
    inputs; of the two critics, together, 3 forward (targets, critics, for the actor), 1 for weights
    and 2 for inputs. A first layer passes nothing on to its inputs, except, for the actor's sake,
    to the actions. Heads are left out.

    Operands are of the numbers that the update multiplies. Each product is computed in whichever
    way of writing it is fastest here: that is found out first, by trying.
    """
    half = precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    rows = n_tasks * BATCH
    work: list[tuple[int, list[Run]]] = []
    for n_networks, fan_in, forwards in ((1, OBSERVATION, 2), (2, OBSERVATION + ACTION, 3)):
        for layer, inputs in enumerate([fan_in, *[width] * (DEPTH - 1)]):
            x = noise(n_networks, rows, inputs)
            y = noise(n_networks, rows, width)
            w = noise(n_networks, inputs, width)
            work += [(forwards, ways(x, w)), (1, ways(x.mT, y))]
            if layer:
                work.append((n_networks, ways(y, w.mT)))
            elif n_networks == 2:
                # Four columns are less work than all, which need not mean less time.
                work.append((1, ways(y, w[:, -ACTION:].mT) + ways(y, w.mT)))
    outside = partial(trunks_in, "fp32" if half else precision, torch.device(device))
    with outside():
        chosen = [(count, fastest(each, device)) for count, each in work]

    def run() -> None:
        with outside():
            for count, product in chosen:
                for _ in range(count):
                    product()

    return run


def ways(a: Tensor, b: Tensor) -> list[Run]:
    """Ways to compute A B, `[N, m, k]` and `[N, k, n]`: at once or one by one, or as (Bᵀ Aᵀ)ᵀ."""
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
    """The one with the smallest of a few times."""
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
