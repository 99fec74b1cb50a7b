"""Tasks' gradients parameter by parameter: dense or sparse, real or complex, and not all there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtrl.surgery.gradients import at_least_float32, combine, gramian
from mtrl.surgery.graph import added

Row = dict[Tensor, Tensor]
"""A task's gradient on the shared parameters it depends on."""


def rows_gramian(rows: Sequence[Row]) -> Tensor:
    """⟨g_s, g_t⟩, `[1, T, T]`; of complex numbers the real part."""
    found = torch.zeros(1, len(rows), len(rows))
    for found_rows, sparse in _by_parameter(rows).values():
        if sparse:
            products = [[(a * b).coalesce().values().sum() for b in found_rows] for a in found_rows]
            part = torch.stack([torch.stack(row) for row in products])[None]
        else:
            stacked = torch.stack(
                [torch.view_as_real(r) if r.is_complex() else r for r in found_rows]
            )
            part = gramian({"": stacked[None]})
        found = found.to(part.device) + part
    return found


def combined(rows: Sequence[Row], weights: Tensor) -> Row:
    """Σ_t w_t g_t; weights are `[T]`."""
    found = {}
    for parameter, (found_rows, sparse) in _by_parameter(rows).items():
        if sparse:
            value = added([(w * r).coalesce() for w, r in zip(weights, found_rows, strict=True)])
        else:
            real = [torch.view_as_real(r) if r.is_complex() else r for r in found_rows]
            stacked = at_least_float32(torch.stack(real))[None]
            value = combine(weights[None].to(stacked.dtype), {"": stacked})[""][0]
            value = torch.view_as_complex(value) if found_rows[0].is_complex() else value
        assert value is not None
        found[parameter] = value.to(found_rows[0].dtype)
    return found


def _by_parameter(rows: Sequence[Row]) -> dict[Tensor, tuple[list[Tensor], bool]]:
    """Each parameter's gradients by all tasks, zeros where one does without; whether sparse."""
    parameters = dict.fromkeys(parameter for row in rows for parameter in row)
    found = {}
    for parameter in parameters:
        here = [row.get(parameter) for row in rows]
        sparse = all(r is None or r.is_sparse for r in here)
        like = next(r for r in here if r is not None)
        zero = torch.zeros_like(like if sparse else like.to_dense() if like.is_sparse else like)
        dense = [
            zero if r is None else r if sparse or not r.is_sparse else r.to_dense() for r in here
        ]
        found[parameter] = (dense, sparse)
    return found


def rows_added(rows: Sequence[Row]) -> Row:
    """Their sum."""
    found: Row = {}
    for row in rows:
        for parameter, gradient in row.items():
            found[parameter] = found[parameter] + gradient if parameter in found else gradient
    return found
