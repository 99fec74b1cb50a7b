"""Tasks' gradients parameter by parameter: dense or sparse, real or complex, and not all there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mtrl.surgery.gradients import gramian
from mtrl.surgery.graph import added
from mtrl.surgery.layers import Layer, weighted_sum

Row = dict[int, Tensor]
"""A task's gradient on the shared parameters it depends on, by their `id`."""


def rows_added(rows: Sequence[Row]) -> Row:
    """Their sum."""
    found: Row = {}
    for row in rows:
        for key, gradient in row.items():
            found[key] = found[key] + gradient if key in found else gradient
    return found


class TaskRows:
    """T rows; where a task does without a parameter, its gradient is zero.

    Dense gradients of one dtype are copied into one matrix `[T, P]`: one product then makes the
    Gramian and one their combination, however many parameters there are.

    Args:
        rows: As far as they are formed by autograd.
        layers: Those that hold what is not in the rows.
    """

    def __init__(self, rows: Sequence[Row], layers: Sequence[Layer] = ()) -> None:
        self._rows, self._layers = rows, layers
        like: Row = {}
        for row in rows:
            for key, gradient in row.items():
                if key not in like or like[key].is_sparse:
                    like[key] = gradient
        self._like = like
        self._sparse = [key for key in like if like[key].is_sparse]

    def gramian(self) -> Tensor:
        """⟨g_s, g_t⟩, `[1, T, T]`; of complex numbers the real part."""
        n_tasks = len(self._rows)
        parts = [gramian({"": matrix[None]}) for matrix in self._matrices.values()]
        parts += [layer.gramian()[None] for layer in self._layers]
        for rows in map(self._sparse_rows, self._sparse):
            products = [(a * b).coalesce().values().sum() for a in rows for b in rows]
            parts.append(torch.stack(products).view(1, n_tasks, n_tasks))
        found = torch.zeros(1, n_tasks, n_tasks)
        for part in parts:
            found = found.to(part.device) + part
        return found

    def combined(self, weights: Tensor) -> Row:
        """Σ_t w_t g_t; weights are `[T]`."""
        found: Row = {}
        for group, matrix in self._matrices.items():
            vector = weighted_sum(weights.to(matrix.device), matrix)
            keys = self._groups[group]
            sizes = [_flat(self._like[key]).numel() for key in keys]
            for key, part in zip(keys, vector.split(sizes), strict=True):
                like = self._like[key]
                found[key] = (
                    torch.view_as_complex(part.view(*like.shape, 2))
                    if like.is_complex()
                    else part.view(like.shape)
                )
        for key in self._sparse:
            pairs = zip(weights, self._sparse_rows(key), strict=True)
            total = added((weight * row).to(row.dtype) for weight, row in pairs)
            assert total is not None
            found[key] = total.coalesce()
        for layer in self._layers:
            parts = layer.combined(weights.to(layer.parameters[0].device))
            found |= {id(p): part for p, part in zip(layer.parameters, parts, strict=True)}
        return found

    def each(self) -> list[Row]:
        """The rows one by one, all formed."""
        return [self.combined(weights) for weights in torch.eye(len(self._rows))]

    @cached_property
    def _groups(self) -> dict[tuple[torch.dtype, torch.device], list[int]]:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for key, like in self._like.items():
            if not like.is_sparse:
                groups.setdefault((_flat(like).dtype, like.device), []).append(key)
        return groups

    @cached_property
    def _matrices(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        found = {}
        for group, keys in self._groups.items():
            size = sum(_flat(self._like[key]).numel() for key in keys)
            matrix = torch.empty(len(self._rows), size, dtype=group[0], device=group[1])
            for row, out in zip(self._rows, matrix, strict=True):
                torch.cat([_flat(self._of(row, key)) for key in keys], out=out)
            found[group] = matrix
        return found

    def _of(self, row: Row, key: int) -> Tensor:
        if key not in row:
            return torch.zeros_like(self._like[key])
        return row[key].to_dense() if row[key].is_sparse else row[key]

    def _sparse_rows(self, key: int) -> list[Tensor]:
        return [row.get(key, torch.zeros_like(self._like[key])) for row in self._rows]


def _flat(gradient: Tensor) -> Tensor:
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).flatten()
