"""mtrl: one policy for many Meta-World tasks, with gradient surgery.

    >>> from mtrl import TrainConfig
    >>> TrainConfig(benchmark="mt10").learner.batch_size
    128

Names are imported on first use, so that the command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtrl.analysis.comparison import plot as plot
    from mtrl.config.agent import AgentConfig as AgentConfig
    from mtrl.config.environment import EnvironmentConfig as EnvironmentConfig
    from mtrl.config.learner import LearnerConfig as LearnerConfig
    from mtrl.config.presets import preset as preset
    from mtrl.config.train import TrainConfig as TrainConfig
    from mtrl.demonstrations.collect import collect as collect
    from mtrl.demonstrations.collect import experts as experts
    from mtrl.demonstrations.data import Demonstrations as Demonstrations
    from mtrl.envs.benchmarks import Benchmark as Benchmark
    from mtrl.envs.benchmarks import get_benchmark as get_benchmark
    from mtrl.envs.make import make_vector_env as make_vector_env
    from mtrl.evaluation.protocol import evaluate as evaluate
    from mtrl.evaluation.scores import Evaluation as Evaluation
    from mtrl.evaluation.video import film as film
    from mtrl.policy.export import export_policy as export_policy
    from mtrl.policy.policy import Policy as Policy
    from mtrl.sac.agent import MTSAC as MTSAC
    from mtrl.sac.learner import Learner as Learner
    from mtrl.sac.replay import ReplayBuffer as ReplayBuffer
    from mtrl.training.callbacks import Callback as Callback
    from mtrl.training.rollout import Collector as Collector
    from mtrl.training.run import resume as resume
    from mtrl.training.run import train as train

_HOMES = {
    "MTSAC": "sac.agent",
    "Callback": "training.callbacks",
    "Demonstrations": "demonstrations.data",
    "collect": "demonstrations.collect",
    "experts": "demonstrations.collect",
    "Benchmark": "envs.benchmarks",
    "get_benchmark": "envs.benchmarks",
    "AgentConfig": "config.agent",
    "EnvironmentConfig": "config.environment",
    "LearnerConfig": "config.learner",
    "TrainConfig": "config.train",
    "Evaluation": "evaluation.scores",
    "make_vector_env": "envs.make",
    "Learner": "sac.learner",
    "ReplayBuffer": "sac.replay",
    "Collector": "training.rollout",
    "evaluate": "evaluation.protocol",
    "export_policy": "policy.export",
    "film": "evaluation.video",
    "Policy": "policy.policy",
    "plot": "analysis.comparison",
    "preset": "config.presets",
    "resume": "training.run",
    "train": "training.run",
}
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    """Return the names above, for completion in notebooks and editors."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("mtrl.folder").installed_versions().get("mtrl", "unknown")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
