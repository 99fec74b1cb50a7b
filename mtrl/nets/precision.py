"""Precision of the trunks' matrix products.

Everything else stays in float32: parameters, optimisers, heads, losses and Gramians.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtrl.errors import UsageError

_setting = "highest"  # see `float32_setting`


def resolve_precision(name: str, device: torch.device) -> str:
    """Resolve `auto` to tf32 on CUDA and fp32 elsewhere, and check other names for the device.

    bf16 becomes fp32, with a warning, on a CPU that would have to emulate it, so that a
    configuration runs well on other machines, too.

    Raises:
        UsageError: For tf32 on a CPU, which does not support it.
    """
    if name == "tf32" and device.type == "cpu":
        raise UsageError("precision: expected 'fp32' or 'bf16' on a CPU, got 'tf32'")
    if name == "bf16" and device.type == "cpu" and not multiplies_bf16():
        warnings.warn(
            "precision: using fp32 instead of bf16, which this CPU would emulate at a fraction of "
            "the speed (it has neither AVX512-BF16 nor AMX)",
            stacklevel=2,
        )
        return "fp32"
    if name != "auto":
        return name
    return "tf32" if device.type == "cuda" else "fp32"


def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bf16 products.

    A CPU restricted to AVX512 took 2.7 times as long for bf16 as for fp32; restricted to AVX2, 50
    times.
    """
    # These functions of torch are private, and older versions lack some.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


@contextmanager
def trunks_in(precision: str, device: torch.device) -> Iterator[None]:
    """Return a context in which trunks of float32 networks compute products in this precision.

    Args:
        precision: fp32, tf32 or bf16.
        device: Device of the networks.
    """
    bf16 = precision == "bf16"
    # No weight cache: no weight is cast twice, and a CUDA graph must not hold cached casts.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    with float32_products("high" if precision == "tf32" else "highest"), autocast:
        yield


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Return a context with full float32 products: no TF32 and no autocast."""
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device.type):
        with float32_products("highest"):  # entering autocast costs as much as a small product
            yield
        return
    with float32_products("highest"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def float32_products(setting: str) -> Iterator[None]:
    """Return a context with this value of `torch.set_float32_matmul_precision`."""
    global _setting
    _setting = before = float32_setting()
    if before == setting:  # a change would break the graph of torch.compile
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
    """Return the current value of `torch.set_float32_matmul_precision`."""
    # torch.compile cannot trace torch's own getter. Compiled code runs only inside `trunks_in`.
    return _setting if torch.compiler.is_compiling() else torch.get_float32_matmul_precision()
