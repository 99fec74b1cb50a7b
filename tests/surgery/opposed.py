"""Two conflicting tasks, and their training by several processes.

Processes import this module, which is why the frameworks under test are imported elsewhere.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mtrl.surgery import MultiTaskModel

D = 16


def make(surgery="pcgrad", **more):
    """Two conflicting tasks: the targets of one are the negated targets of the other."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, D), nn.Tanh())
    heads = {task: nn.Linear(D, 1) for task in "ab"}
    heads["b"].load_state_dict(heads["a"].state_dict())
    return MultiTaskModel(trunk, heads, surgery, n_features=D, **more)


def data(rows=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return x, x[:, :1] * x[:, 1:2] + 0.5


def losses(outputs, y):
    return {"a": (outputs["a"] - y).square().mean(), "b": (outputs["b"] + y).square().mean()}


def trained_plainly(surgery, steps, lr=0.05, batches=None):
    """The same training by hand, for comparison."""
    model = make(surgery)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for x, y in batches or [data()] * steps:
        optimizer.zero_grad()
        sum(losses(model(x), y).values()).backward()
        optimizer.step()
    return model


def same_weights(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), msg=name, **tolerance)


RANKS = 2
METHODS = ["none", "pcgrad", "cagrad", "aligned-mtl", "rotograd", "gradnorm", "famo"]
# torch 2.6 cannot shard on a CPU.
SHARDED = [] if torch.__version__.startswith("2.6.") else ["none", "pcgrad", "rotograd-scale"]


def train_rank(rank, port, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    for method in METHODS:
        model = make(method)
        parallel = DistributedDataParallel(model, find_unused_parameters=method == "none")
        for step in range(3):
            x, y = (part.chunk(RANKS)[rank] for part in data(seed=step))
            one_step(method, model, parallel, x, y)
        torch.save(model.state_dict(), f"{folder}/{method}{rank}.pt")
    for method in SHARDED:
        model = make(method)
        fully_shard(model.trunk, mesh=(mesh := init_device_mesh("cpu", (RANKS,))))
        fully_shard(model, mesh=mesh)
        for step in range(3):
            one_step(method, model, model, *(part.chunk(RANKS)[rank] for part in data(seed=step)))
        whole = {name: getattr(value, "full_tensor", lambda value=value: value)()
                 for name, value in model.state_dict().items()}  # fmt: skip
        torch.save(whole, f"{folder}/{method} sharded{rank}.pt")
    _without_a_task(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def one_step(method, model, called, x, y):
    model.zero_grad()
    found = losses(called(x), y)
    (sum(found.values()) if method == "none" else model.total(found)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad
    model.after_step(lambda: losses(model(x), y))


def _without_a_task(rank, folder):
    """The first rank has no loss of b; on the second, no loss of a reaches the first layer."""
    model = skipping()
    x, y = (part.chunk(RANKS)[rank] for part in data())
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    found = losses(parallel(x, skip=rank == 1), y)
    (found["a"] if rank == 0 else found["a"] + found["b"]).backward()
    torch.save([p.grad for p in model.trunk.parameters()], f"{folder}/skipping{rank}.pt")


class Skipping(nn.Module):
    """A trunk with a layer that a batch may skip."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, D)

    def forward(self, x, skip=False):
        return self.second(x if skip else self.first(x).tanh())


def skipping():
    model = make("pcgrad")
    torch.manual_seed(1)
    model.trunk = Skipping()
    return model
