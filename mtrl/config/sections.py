"""The sections of a configuration: networks, learner, simulator. Every field says its unit.

Imports neither torch nor mujoco, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.section import Section


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
        "twice as fast on one with AVX512-BF16 or AMX, and gives way to fp32 on others.",
    )
    capture: bool = Field(
        default=True,
        description="On CUDA, launch updates as one captured graph wherever the method allows it; "
        "without effect on a CPU.",
    )
    compile: bool = Field(
        default=False,
        description="On CUDA, fuse an update's small operations by torch.compile, which takes a "
        "minute at the start; without effect on a CPU, where updates took a quarter longer.",
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
    min_temperature: float = Field(
        default=0.0,
        ge=0,
        description="Floor under each task's entropy temperature; 0 is none.",
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
    return_memory: int | None = Field(
        default=None,
        gt=0,
        description="With return_scale, what becomes that is instead the mean of the largest "
        "discounted returns of its last episodes [episodes per task].",
    )

    @model_validator(mode="after")
    def _memory_has_a_scale(self) -> LearnerConfig:
        if self.return_memory is not None and self.return_scale is None:
            raise PydanticCustomError("memory", "return_memory: expected return_scale with it")
        return self


class EnvironmentConfig(Section):
    """The simulator."""

    horizon: int | None = Field(
        default=None,
        gt=0,
        description="Steps after which an episode is truncated [environment steps]; default: "
        "Meta-World's 500, its most; custom environments end their episodes themselves.",
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
        description="Simulator processes that may die, hang or return NaN, and are replaced, "
        "before the run stops.",
    )
