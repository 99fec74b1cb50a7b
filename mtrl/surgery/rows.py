"""Task gradients by parameter: dense or sparse, real or complex, and possibly missing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mtrl.surgery.gradients import at_least_float32, gramian
from mtrl.surgery.graph import added
from mtrl.surgery.layers import Layer, weighted_sum

Row = dict[int, Tensor]
"""A task's gradient on the shared parameters it depends on, by their `id`."""

LARGE = 2**15
"""Size of a gradient above which a separate call costs less than a copy."""


def world_size() -> int:
    """Return the number of processes, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_of_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / world_size()


def in_any_rank(tasks: list[int], n_tasks: int, device: torch.device) -> list[int]:
    """Return the tasks that are present in any process."""
    if world_size() == 1:
        return tasks
    here = torch.zeros(n_tasks, dtype=torch.int32, device=device)
    here[tasks] = 1
    dist.all_reduce(here)
    return here.nonzero().flatten().tolist()


def rows_added(rows: Sequence[Row]) -> Row:
    """Add rows by parameter."""
    found: Row = {}
    for row in rows:
        for key, gradient in row.items():
            found[key] = found[key] + gradient if key in found else gradient
    return found


class TaskRows:
    """Gradients of T tasks; the gradient of a parameter that a task does not use is zero.

    Small dense gradients of one dtype are copied into one matrix `[T, P]`. The Gramian and the
    combination then take one product each, however many parameters there are.

    Args:
        rows: Gradients computed by autograd.
        layers: Factored layers with the remaining gradients.
        shared: Shared parameters, in the same order in all processes: the Gramian is then that of
            the mean over processes. None: of this process's rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        layers: Sequence[Layer] = (),
        shared: Sequence[Tensor] | None = None,
    ) -> None:
        self._rows, self._layers = rows, layers
        like: Row = {}
        for row in reversed(rows):
            like |= row
        for key in [key for key, gradient in like.items() if gradient.is_sparse]:
            found = [row[key] for row in rows if key in row]
            like[key] = next((g for g in found if not g.is_sparse), like[key])
        self._averaged = shared is not None and world_size() > 1
        self._own = set(like)
        if shared is not None and self._averaged:
            like = _in_any_rank(shared, like)
        self._like = like
        self._sparse, self._large = list[int](), list[int]()
        self._groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for key, gradient in like.items():
            if gradient.is_sparse:
                self._sparse.append(key)
            elif gradient.numel() >= LARGE and not self._averaged:
                self._large.append(key)
            else:
                self._groups.setdefault((gradient.dtype, gradient.device), []).append(key)

    def gramian(self) -> Tensor:
        """Compute ⟨g_s, g_t⟩, `[1, T, T]`; for complex numbers, the real part."""
        n_tasks = len(self._rows)
        matrices = list(self._matrices.values())
        if self._averaged:
            matrices = [mean_of_ranks(matrix) for matrix in matrices]
        parts = [gramian({"": matrix[None]}) for matrix in matrices]
        parts += [layer.gramian()[None] for layer in self._layers]
        for key in self._large:
            rows = [_flat(self._of(row, key)) for row in self._rows]
            size = 2**15 if rows[0].device.type == "cpu" else 2**22
            pieces = zip(*(row.split(size) for row in rows), strict=True)
            parts += [gramian({"": torch.stack(piece)[None]}) for piece in pieces]
        for rows in map(self._sparse_rows, self._sparse):
            products = [(a * b).coalesce().values().sum() for a in rows for b in rows]
            parts.append(torch.stack(products).view(1, n_tasks, n_tasks))
        found = torch.zeros(1, n_tasks, n_tasks)
        for part in parts:
            found = found.to(part.device) + part
        return found

    def combined(self, weights: Tensor) -> Row:
        """Compute Σ_t w_t g_t of this process; weights are `[T]`."""
        found: Row = {}
        for group, matrix in self._matrices.items():
            vector = weighted_sum(weights.to(matrix.device), matrix)
            if group[0].is_complex:
                vector = torch.view_as_complex(vector.view(-1, 2))
            keys = self._groups[group]
            parts = _unflatten_dense_tensors(vector, [self._like[key] for key in keys])
            found |= {k: part for k, part in zip(keys, parts, strict=True) if k in self._own}
        for key in self._large:
            found[key] = self._sum(key, weights.to(self._like[key].device))
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
        """Return all rows, with the gradients of factored layers."""
        return [self.combined(weights) for weights in torch.eye(len(self._rows))]

    @cached_property
    def _matrices(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        found = {}
        for group, keys in self._groups.items():
            parts = [self._of(row, key) for row in self._rows for key in keys]
            matrix = _flatten_dense_tensors(parts).view(len(self._rows), -1)
            found[group] = _real(matrix).flatten(1)
        return found

    def _sum(self, key: int, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        for weight, row in zip(weights, self._rows, strict=True):
            if key in row:
                gradient = at_least_float32(_flat(self._of(row, key)))
                weight = weight.to(gradient.dtype)
                total = gradient * weight if total is None else total.addcmul_(gradient, weight)
        assert total is not None
        return _shaped(total.to(_flat(self._like[key]).dtype), self._like[key])

    def _of(self, row: Row, key: int) -> Tensor:
        if key not in row:
            return torch.zeros_like(self._like[key])
        return row[key].to_dense() if row[key].is_sparse else row[key]

    def _sparse_rows(self, key: int) -> list[Tensor]:
        return [row.get(key, torch.zeros_like(self._like[key])) for row in self._rows]


def _in_any_rank(shared: Sequence[Tensor], like: Row) -> Row:
    """Return the parameters in the rows of any process, in one order, as dense tensors."""
    here = [i for i, parameter in enumerate(shared) if id(parameter) in like]
    there = in_any_rank(here, len(shared), shared[0].device)
    return {id(shared[i]): shared[i].detach() for i in there}


def _real(gradient: Tensor) -> Tensor:
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _flat(gradient: Tensor) -> Tensor:
    return _real(gradient).flatten()


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(flat.view(*like.shape, 2))
    return flat.view(like.shape)
