"""Gradient surgery: what is done about conflicts between the tasks' gradients."""

from mtrl.surgery.gradients import (
    Gradients,
    TaskGradients,
    combine,
    gramian,
    mean_gradient,
    task_gradients,
)
from mtrl.surgery.none import NoSurgery
from mtrl.surgery.pcgrad import PCGrad
from mtrl.surgery.registry import GramianSurgery, Surgery, available, get_surgery, register

__all__ = [
    "Gradients",
    "GramianSurgery",
    "NoSurgery",
    "PCGrad",
    "Surgery",
    "TaskGradients",
    "available",
    "combine",
    "get_surgery",
    "gramian",
    "mean_gradient",
    "register",
    "task_gradients",
]
