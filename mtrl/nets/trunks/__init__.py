"""Trunks, with one file per architecture, and their registry."""

from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.care import CARE
from mtrl.nets.trunks.film import FiLM
from mtrl.nets.trunks.mlp import MLP
from mtrl.nets.trunks.moore import MOORE
from mtrl.nets.trunks.paco import PaCo
from mtrl.nets.trunks.registry import (
    available_trunks,
    get_trunk,
    import_trunks,
    load_trunk,
    register_trunk,
    trunk_of,
    with_sizes,
)
from mtrl.nets.trunks.residual import Residual
from mtrl.nets.trunks.soft_modules import SoftModules

__all__ = [
    "CARE",
    "MLP",
    "MOORE",
    "FiLM",
    "PaCo",
    "Residual",
    "SoftModules",
    "Trunk",
    "available_trunks",
    "get_trunk",
    "import_trunks",
    "load_trunk",
    "register_trunk",
    "trunk_of",
    "with_sizes",
]
