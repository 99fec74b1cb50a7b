"""Gradient surgery: what is done about conflicts between the tasks' gradients."""

from mtrl.surgery.aligned_mtl import AlignedMTL
from mtrl.surgery.base import FeatureSurgery, GramianSurgery, Surgery
from mtrl.surgery.cagrad import CAGrad
from mtrl.surgery.fairgrad import FairGrad
from mtrl.surgery.famo import FAMO
from mtrl.surgery.gradients import (
    FeatureGradients,
    Gradients,
    Jacobian,
    Problem,
    TaskGradients,
    combine,
    gramian,
)
from mtrl.surgery.gradnorm import GradNorm
from mtrl.surgery.imtl_g import IMTLG
from mtrl.surgery.mgda import MGDA
from mtrl.surgery.model import MultiTaskModel
from mtrl.surgery.network import Network
from mtrl.surgery.none import NoSurgery
from mtrl.surgery.pcgrad import PCGrad
from mtrl.surgery.registry import available, get_surgery, register
from mtrl.surgery.rotograd import RotoGrad, RotoRotate, RotoScale

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
    "Network",
    "NoSurgery",
    "PCGrad",
    "Problem",
    "RotoGrad",
    "RotoRotate",
    "RotoScale",
    "Surgery",
    "TaskGradients",
    "available",
    "combine",
    "get_surgery",
    "gramian",
    "register",
]
