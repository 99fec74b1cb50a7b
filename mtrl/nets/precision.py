"""In which numbers the trunks' matrix products are computed.

Everything else stays in float32: parameters, optimisers, heads, losses, Gramians.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtrl.errors import UsageError

_setting = "highest"  # see `float32_setting`


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` to tf32 on CUDA, and to fp32 elsewhere; other names are checked against the device.

    bf16 becomes fp32, with a warning, on a CPU that would have to emulate it: a configuration made
    on one computer is to run well on another.

    Raises:
        UsageError: for tf32 on a CPU, which has no such unit.
    """
    if name == "tf32" and device.type == "cpu":
        raise UsageError("precision: expected 'fp32' or 'bf16' on a CPU, got 'tf32'")
    if name == "bf16" and device.type == "cpu" and not multiplies_bf16():
        warnings.warn(
            "precision: fp32 in place of bf16, which this CPU would emulate at a fraction of the "
            "speed (it has neither AVX512-BF16 nor AMX)",
            stacklevel=2,
        )
        return "fp32"
    if name != "auto":
        return name
    return "tf32" if device.type == "cuda" else "fp32"


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16.

    Held to AVX512 alone, one took 2.7 times as long for them as for fp32; held to AVX2, 50 times.
    """
    # Of the names torch has for these, its older versions lack some, and none is public.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


@contextmanager
def trunks_in(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, trunks of float32 networks compute their products in this precision.

    Args:
        precision: fp32, tf32 or bf16.
        device: Where.
    """
    bf16 = precision == "bf16"
    # No cache of cast weights: nothing here casts a weight twice, and a graph may not hold one.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    with float32_products("high" if precision == "tf32" else "highest"), autocast:
        yield


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 are of float32, whatever surrounds it: no TF32, no autocast."""
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device.type):
        with float32_products("highest"):  # a context of autocast costs as much as a small product
            yield
        return
    with float32_products("highest"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def float32_products(setting: str) -> Iterator[None]:
    """Inside, products of float32 are computed as `torch.set_float32_matmul_precision` says."""
    global _setting
    _setting = before = float32_setting()
    if before == setting:  # torch.compile would break its graph at a change
        yield
        return
    torch.set_float32_matmul_precision(setting)
    _setting = setting
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _setting = before


def float32_setting() -> str:
    """What `torch.set_float32_matmul_precision` was last told."""
    # torch.compile cannot trace torch's own function; it runs inside of `trunks_in` alone.
    return _setting if torch.compiler.is_compiling() else torch.get_float32_matmul_precision()
