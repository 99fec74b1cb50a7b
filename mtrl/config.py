"""The configuration: one frozen, validated tree, read from YAML and from flags.

    TrainConfig
    ├── agent: AgentConfig              the networks
    ├── learner: LearnerConfig          losses, optimisers, replay, surgery
    └── environment: EnvironmentConfig  the simulator

Every leaf has a name of its own, so a field is the same word everywhere: `learner.batch_size` in
YAML, `--batch-size` on the command line. Counts called *timesteps* are environment steps over all
tasks and copies together: one vector step of MT10 is ten of them.

This module imports neither torch nor mujoco, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from mtrl.validation import Section, UsageError, one_line, validate

Camera = Literal[
    "corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV"
]
"""Meta-World's cameras."""


class AgentConfig(Section):
    """The networks: a trunk the tasks share, and what each task owns."""

    heads: Literal["multi", "single"] = Field(
        default="multi",
        description="'multi': one linear head per task; 'single': one head for all, which tells "
        "tasks apart by the task one-hot alone.",
    )
    trunk: Literal["mlp", "residual"] = Field(
        default="mlp",
        description="'mlp': ReLU layers in a row; 'residual': a layer, then blocks of two layers "
        "that are added to what they are given.",
    )
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        default=(400, 400, 400),
        min_length=1,
        description="Widths of the trunk's layers, of a residual trunk's first layer and blocks "
        "[units].",
    )
    actor_hidden_sizes: tuple[PositiveInt, ...] | None = Field(
        default=None, min_length=1, description="Others for the actor; default: 'hidden_sizes'."
    )
    critic_hidden_sizes: tuple[PositiveInt, ...] | None = Field(
        default=None, min_length=1, description="Others for the critics; default: 'hidden_sizes'."
    )
    layer_norm: bool = Field(
        default=False, description="Whether the trunks' layers are normalised before ReLU."
    )
    task_embedding: int | None = Field(
        default=None,
        gt=0,
        description="Tell tasks apart by learned vectors of unit norm and so many numbers; "
        "default: by one-hots.",
    )
    normalize_observations: bool = Field(
        default=False,
        description="Whether networks see observations less their running mean, over their "
        "deviation.",
    )
    critic_bins: int | None = Field(
        default=None,
        gt=1,
        description="Critics give a histogram of the value with so many bins and are trained by "
        "cross-entropy; default: a number, by squared error.",
    )
    value_limit: float = Field(
        default=10.0,
        gt=0,
        description="That histogram goes from minus this to this [scaled return].",
    )
    initial_temperature: float = Field(
        default=1.0,
        gt=0,
        description="Entropy temperature alpha each task starts with [scaled reward per nat].",
    )

    @model_validator(mode="after")
    def _blocks_add_up(self) -> AgentConfig:
        for name in ("hidden_sizes", "actor_hidden_sizes", "critic_hidden_sizes"):
            if self.trunk == "residual" and len(set(getattr(self, name) or (1,))) > 1:
                raise PydanticCustomError(
                    "widths", f"{name}: expected one width throughout a residual trunk"
                )
        return self


class LearnerConfig(Section):
    """One SAC update."""

    surgery: str = Field(
        default="none",
        description="How the tasks' gradients on the trunk are combined: 'none' (their mean), "
        "'pcgrad', 'rotograd' or another method of the README's table, one registered with "
        "mtrl.surgery.register, 'torchjd:NAME', or 'package.module:name', a function from Gramian "
        "to weights. Options of a method follow in brackets: 'cagrad(c=0.4)'.",
    )
    actor_surgery: str | None = Field(
        default=None, description="Another method for the actor; default: that of 'surgery'."
    )
    critic_surgery: str | None = Field(
        default=None, description="Another method for the critics; default: that of 'surgery'."
    )
    rotation_lr: float = Field(
        default=1e-3,
        ge=0,
        description="RotoGrad: step of a rotation at the start [radians per update, at most].",
    )
    rotation_decay: float = Field(
        default=0.99999,
        gt=0,
        le=1,
        description="RotoGrad: factor on that step after each update; below 1, rotations settle "
        "before the networks do.",
    )
    rotation_size: int | None = Field(
        default=None,
        gt=1,
        description="RotoGrad: rotate the first so many features alone; default: all.",
    )
    rotation_step: Literal["geodesic", "matrix_exp"] = Field(
        default="geodesic",
        description="RotoGrad: 'geodesic' costs O(d^2) per task, the paper's 'matrix_exp' O(d^3).",
    )
    gradient_engine: Literal["auto", "jacobian", "factored"] = Field(
        default="auto",
        description="How a method on the Gramian gets it: 'jacobian' forms every task's gradient; "
        "'factored' forms none and needs less memory for wide trunks; 'auto': by width.",
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        default="auto",
        description="Numbers of the trunks' matrix products during updates; parameters, heads, "
        "losses and Gramians are float32. 'auto': tf32 on CUDA, fp32 on a CPU; 'bf16' is nearly "
        "twice as fast on one with AVX512-BF16.",
    )
    capture: bool = Field(
        default=True,
        description="On CUDA, launch updates as one captured graph wherever the method allows it; "
        "without effect on a CPU.",
    )
    compile: bool = Field(
        default=False,
        description="Fuse an update's small operations by torch.compile: takes a minute at the "
        "start, and a C++ compiler on a CPU.",
    )
    batch_size: int = Field(
        default=128, gt=0, description="Replay samples in one update [transitions per task]."
    )
    buffer_size: int = Field(
        default=100_000, gt=0, description="Replay capacity [transitions per task]."
    )
    gradient_steps: int = Field(
        default=1,
        gt=0,
        description="Updates during each vector step, that is one step of every environment.",
    )
    learning_rate: float = Field(
        default=3e-4, gt=0, description="Adam's step size: actor, critics, temperatures."
    )
    final_learning_rate: float | None = Field(
        default=None,
        ge=0,
        description="Lower that step size in a straight line to this at the run's end; default: "
        "not.",
    )
    adam_epsilon: float = Field(default=1e-5, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="AdamW's: fraction of each weight that a step of size 1 would take away.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Each network's gradient is clipped to this norm after surgery; 0 is no clip.",
    )
    gamma: float = Field(
        default=0.99, ge=0, le=1, description="Discount factor per environment step."
    )
    tau: float = Field(
        default=0.005,
        gt=0,
        le=1,
        description="Fraction by which targets follow the critics per update.",
    )
    target_entropy: float | None = Field(
        default=None,
        description="Entropy each task's temperature aims at [nats]; default: minus the number of "
        "action dimensions.",
    )
    reward_scale: float = Field(
        default=1.0,
        gt=0,
        description="Factor on every reward the learner sees; logs show raw rewards.",
    )
    return_scale: float | None = Field(
        default=None,
        gt=0,
        description="Scale each task's rewards by a running factor, such that its largest "
        "discounted return so far becomes this; default: not.",
    )


class EnvironmentConfig(Section):
    """The simulator."""

    horizon: int = Field(
        default=500,
        gt=0,
        le=500,
        description="Steps after which an episode is truncated [environment steps].",
    )
    simulator: Literal["auto", "metaworld", "envpool"] = Field(
        default="auto",
        description="What training steps: 'metaworld', the reference; 'envpool', a faster port, "
        "for tasks that were found to agree with the reference; 'auto': EnvPool where it is "
        "installed and a task agrees, else the reference. Evaluation is always on the reference.",
    )
    native_tasks: tuple[str, ...] = Field(
        default=(),
        description="Tasks to run on EnvPool although they were not found to agree with the "
        "reference.",
    )
    envs_per_task: int = Field(
        default=1,
        gt=0,
        description="Copies of each task that are stepped at once [environments]. They share the "
        "task's episodes.",
    )
    workers: int | None = Field(
        default=None,
        gt=0,
        description="Simulator processes; default: one per processor core, at most one per "
        "environment. "
        "The trajectory does not depend on it.",
    )
    max_restarts: int = Field(
        default=10,
        ge=0,
        description="Simulator processes that may die, hang or give what is no number, and are "
        "replaced, before the run stops.",
    )


@dataclass(frozen=True)
class Schedule:
    """When a run does what [environment steps over all tasks]; see `TrainConfig`'s fields."""

    PER_TASK: ClassVar = {
        "total_timesteps": 2_000_000,
        "learning_starts": 4_000,
        "eval_every": 50_000,
        "checkpoint_every": 50_000,
        "log_every": 2_000,
        "diagnose_every": 20_000,
    }
    """The defaults, per task."""

    total_timesteps: int
    learning_starts: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    diagnose_every: int


class TrainConfig(Section):
    """Everything that decides what a training run does.

    A section's fields may be given without it, for every field has a name of its own.

    Example:
        >>> TrainConfig(benchmark="mt10", surgery="pcgrad").learner.surgery
        'pcgrad'
    """

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None:
            """Fields by name."""

    benchmark: str = Field(
        default="mt10",
        description="Task set: mt10, mt25, mt50, mt1:<task> such as mt1:reach-v3, or "
        "package.module:attribute, a mtrl.Benchmark of one's own.",
    )
    tasks: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Meta-World task names that replace the benchmark's, in this order; of a "
        "benchmark of one's own, some of its tasks.",
    )
    total_timesteps: int | None = Field(
        default=None,
        gt=0,
        description="Length of the run [environment steps over all tasks]; default: 2,000,000 per "
        "task.",
    )
    learning_starts: int | None = Field(
        default=None,
        gt=0,
        description="Uniformly random steps before the first update [environment steps over all "
        "tasks]; default: 4,000 per task.",
    )
    eval_every: int | None = Field(
        default=None,
        gt=0,
        description="Evaluate after every so many [environment steps over all tasks]; default: "
        "50,000 per task.",
    )
    eval_episodes: int = Field(
        default=10,
        gt=0,
        le=50,
        description="Evaluation episodes during training [episodes per task, each another goal]. "
        "The final evaluation always takes all 50.",
    )
    eval_video: bool = Field(
        default=False,
        description="Show each task's first evaluation episode in TensorBoard; takes some seconds "
        "per task, and 0.1 to 0.2 MB of its files each time.",
    )
    checkpoint_every: int | None = Field(
        default=None,
        gt=0,
        description="Write a checkpoint after every so many [environment steps over all tasks]; "
        "default: 50,000 per task.",
    )
    log_every: int | None = Field(
        default=None,
        gt=0,
        description="Write the logs after every so many [environment steps over all tasks]; "
        "default: 2,000 per task.",
    )
    diagnose_every: int | None = Field(
        default=None,
        ge=0,
        description="Measure how the tasks' gradients conflict after every so many [environment "
        "steps over all tasks]; default: 20,000 per task; 0: never.",
    )
    max_runtime: float | None = Field(
        default=None,
        gt=0,
        description="Write a checkpoint and stop in good order after so long [hours]; --resume "
        "goes on, for as long again.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of goals, weights, exploration, replay and surgery.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where networks and replay live; 'auto' is cuda where there is one.",
    )
    threads: int | None = Field(
        default=None,
        gt=0,
        description="CPU threads of torch's; default: its own choice, one per core. With small "
        "networks one is best: simulators then have the other cores.",
    )
    run_dir: Path | None = Field(
        default=None,
        description="Folder of the run, which must not exist; default: "
        "runs/<benchmark>_<surgery>_seed<k>_<time>.",
    )
    agent: AgentConfig = Field(default_factory=AgentConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)

    @model_validator(mode="before")
    @classmethod
    def _into_sections(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        found = dict(tree)
        for section, field in cls.model_fields.items():
            model = field.annotation
            if not (isinstance(model, type) and issubclass(model, Section)):
                continue
            given = {name: found.pop(name) for name in model.model_fields if name in found}
            inside = found.get(section, {})
            if isinstance(inside, Section):
                inside = inside.model_dump(exclude_unset=True)
            if given and isinstance(inside, dict):
                twice = sorted(given.keys() & inside.keys())
                if twice:
                    raise PydanticCustomError("twice", f"{twice[0]} is given twice")
                found[section] = inside | given
        return found

    def schedule(self, n_tasks: int) -> Schedule:
        """The step counts for `n_tasks` tasks, checked against each other.

        Raises:
            UsageError: if the run could never learn from what it collects.
        """
        filled = {
            name: n_tasks * per_task if getattr(self, name) is None else getattr(self, name)
            for name, per_task in Schedule.PER_TASK.items()
        }
        schedule = Schedule(**filled)
        if schedule.learning_starts >= schedule.total_timesteps:
            raise UsageError(
                "learning_starts: expected less than total_timesteps "
                f"({schedule.total_timesteps}), got {schedule.learning_starts}"
            )
        copies = self.environment.envs_per_task
        capacity = self.learner.buffer_size // copies * copies  # whole vector steps
        stored = min(schedule.learning_starts // n_tasks, capacity)
        if self.learner.batch_size > stored:
            raise UsageError(
                f"batch_size: expected at most the {stored} transitions per task that "
                f"learning_starts ({schedule.learning_starts} steps over {n_tasks} tasks) and "
                f"buffer_size ({self.learner.buffer_size}) leave in the replay, got "
                f"{self.learner.batch_size}"
            )
        return schedule

    @classmethod
    def from_yaml(cls, path: Path | str) -> TrainConfig:
        """Read a configuration file; keys it leaves out keep their defaults.

        Raises:
            UsageError: if the file cannot be read, is not YAML, or holds an unknown or bad value.
        """
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # a hostile text makes the parser raise anything
            raise UsageError(f"config: cannot read {path}: {one_line(error)}") from None
        return validate(cls, {} if tree is None else tree, source=f"{path}: ")

    def flat(self) -> dict[str, Any]:
        """Every leaf by its name, without the sections."""
        leaves: dict[str, Any] = {}
        for name, value in self:
            leaves |= dict(value) if isinstance(value, Section) else {name: value}
        return leaves

    def to_yaml(self) -> str:
        """The whole tree as YAML, such that `from_yaml` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shown(value: Any) -> str:
    """A leaf of the configuration as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "default" if value is None else str(value)
