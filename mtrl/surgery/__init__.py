"""Gradient surgery: methods that resolve conflicts between task gradients."""

from typing import TYPE_CHECKING, Any

from mtrl.surgery.base import FeatureSurgery, GramianSurgery, Surgery
from mtrl.surgery.gradients import (
    FeatureGradients,
    Gradients,
    Jacobian,
    Problem,
    TaskGradients,
    combine,
    gramian,
)
from mtrl.surgery.methods.aligned_mtl import AlignedMTL
from mtrl.surgery.methods.cagrad import CAGrad
from mtrl.surgery.methods.fairgrad import FairGrad
from mtrl.surgery.methods.famo import FAMO
from mtrl.surgery.methods.gradnorm import GradNorm
from mtrl.surgery.methods.imtl_g import IMTLG
from mtrl.surgery.methods.mgda import MGDA
from mtrl.surgery.methods.none import NoSurgery
from mtrl.surgery.methods.pcgrad import PCGrad
from mtrl.surgery.methods.rotograd import RotoGrad, RotoRotate, RotoScale
from mtrl.surgery.registry import available, get_surgery, register
from mtrl.surgery.stacked import StackedProblem

if TYPE_CHECKING:
    from mtrl.surgery.model import MultiTaskModel as MultiTaskModel

__all__ = [
    "FAMO",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "FairGrad",
    "FeatureGradients",
    "FeatureSurgery",
    "GradNorm",
    "Gradients",
    "GramianSurgery",
    "Jacobian",
    "MultiTaskModel",
    "NoSurgery",
    "PCGrad",
    "Problem",
    "RotoGrad",
    "RotoRotate",
    "RotoScale",
    "StackedProblem",
    "Surgery",
    "TaskGradients",
    "available",
    "combine",
    "get_surgery",
    "gramian",
    "register",
]


def __getattr__(name: str) -> Any:
    """`MultiTaskModel`, once it is used: it brings torch.compile, as slow to import as torch."""
    if name != "MultiTaskModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtrl.surgery.model import MultiTaskModel

    return MultiTaskModel
