"""mtrl: one policy for many Meta-World tasks, with gradient surgery.

    >>> from mtrl import TrainConfig
    >>> TrainConfig(benchmark="mt10").learner.batch_size
    128

Names are imported when they are first used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtrl.agent import MTSAC as MTSAC
    from mtrl.benchmarks import Benchmark as Benchmark
    from mtrl.benchmarks import get_benchmark as get_benchmark
    from mtrl.config import AgentConfig as AgentConfig
    from mtrl.config import EnvironmentConfig as EnvironmentConfig
    from mtrl.config import LearnerConfig as LearnerConfig
    from mtrl.config import TrainConfig as TrainConfig
    from mtrl.evaluation import evaluate as evaluate
    from mtrl.export import export_policy as export_policy
    from mtrl.policy import Policy as Policy
    from mtrl.presets import preset as preset
    from mtrl.run import resume as resume
    from mtrl.run import train as train
    from mtrl.scores import Evaluation as Evaluation
    from mtrl.video import film as film

_HOMES = {
    "MTSAC": "agent",
    "Benchmark": "benchmarks",
    "get_benchmark": "benchmarks",
    "AgentConfig": "config",
    "EnvironmentConfig": "config",
    "LearnerConfig": "config",
    "TrainConfig": "config",
    "Evaluation": "scores",
    "evaluate": "evaluation",
    "export_policy": "export",
    "film": "video",
    "Policy": "policy",
    "preset": "presets",
    "resume": "run",
    "train": "run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
