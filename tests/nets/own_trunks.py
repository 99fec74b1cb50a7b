"""Modules as users might write them."""

import torch
from torch import nn


class Attentive(nn.Module):
    """Attention over tokens of the observation, a skip connection, affine LayerNorm and GELU."""

    def __init__(self, n_inputs: int, width: int = 6) -> None:
        super().__init__()
        self.token = nn.Linear(1, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Sequential(nn.Linear(n_inputs * width, 2 * width), nn.GELU())
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.token(x[..., None])
        attention = (self.query(tokens) @ self.key(tokens).mT * self.scale).softmax(-1)
        tokens = self.norm(tokens + attention @ tokens)
        return self.out(tokens.flatten(-2))


class Waits(nn.Module):
    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_inputs, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.layer.weight.abs().max().item()


class Branches(Waits):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


class Averages(nn.Sequential):
    def __init__(self, n_inputs: int) -> None:
        super().__init__(nn.Linear(n_inputs, 4), nn.BatchNorm1d(4))


class Flat(Waits):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sum(-1)


class Mixes(Waits):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) - self.layer(x).mean(0)


class Idle(Waits):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.layer.bias.sum()


class Refuses(nn.Linear):
    def __init__(self, n_inputs: int, width: int = 3) -> None:
        if width != 3:
            raise ValueError(f"width {width}")
        super().__init__(n_inputs, width)


class Empty(nn.Module):
    def __init__(self, n_inputs: int) -> None:
        super().__init__()


class Fourier(Waits):
    """Random frequencies that are no parameters: a loaded policy would have others."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__(n_inputs)
        self.frequencies = [torch.randn(n_inputs)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer((x * self.frequencies[0]).sin())


class Shuffles(Waits):
    """A random order of the inputs, drawn when the module is created."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__(n_inputs)
        self.order = torch.randperm(n_inputs, device="cpu").tolist()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, self.order])


class Remembers(Waits):
    """Keeps its last features, like a recurrent state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(x)
        return self.last


class Counts(Waits):
    """Depends on the number of calls, like an annealed noise."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) / self.calls


class Pretrained(nn.Sequential):
    """A frozen encoder and a layer on it."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__(nn.Linear(n_inputs, 4).requires_grad_(False), nn.Linear(4, 4))


class Lazy(nn.Sequential):
    def __init__(self, n_inputs: int) -> None:
        super().__init__(nn.LazyLinear(4))


class Tied(Waits):
    """Two layers with the same weight, and a list of parameters that belong to the module."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__(n_inputs)
        self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.listed = [self.second.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.layer(x)).tanh())


class Repeated(Waits):
    """One layer twice, under three names, as in a transformer whose blocks are shared."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__(n_inputs)
        self.block = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.block] * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        for block in self.blocks:
            z = block(z).tanh()
        return z


class Drops(nn.Sequential):
    def __init__(self, n_inputs: int) -> None:
        super().__init__(nn.Linear(n_inputs, 4), nn.Dropout(0.1))


class Roots(Waits):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sqrt()


class Nothing(nn.Linear):
    def __init__(self, n_inputs: int) -> None:
        super().__init__(n_inputs, 0)
