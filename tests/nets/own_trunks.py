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
