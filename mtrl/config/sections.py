"""The sections of a configuration that learn: networks and learner. Every field states its unit.

Imports neither torch nor MuJoCo, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.registry import METHODS, TRUNKS
from mtrl.config.section import Section


class AgentConfig(Section):
    """The networks: a trunk the tasks share, and parameters of each task."""

    heads: Literal["multi", "single"] = Field(
        default="multi",
        description="'multi': one linear head per task; 'single': one head for all tasks, which "
        "the task one-hot in the input tells apart.",
    )
    trunk: str = Field(
        default="mlp",
        description="Architecture of the trunk: 'mlp', 'residual', 'film', 'soft-modules', "
        "'moore', 'care', 'paco'; a name that a module of 'imports' or an installed package's "
        "entry point registers; or 'package.module:name', a torch.nn.Module from observations to "
        "features. Options follow in brackets: 'moore(experts=4)'. In Python also a class, a "
        "function or a Trunk.",
    )
    actor_trunk: str | None = Field(default=None, description="The actor's (default: trunk).")
    critic_trunk: str | None = Field(default=None, description="The critics' (default: trunk).")
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        default=(400, 400, 400),
        min_length=1,
        description="Widths of the trunk's layers; of a residual trunk, of its first layer and its "
        "blocks [units].",
    )
    actor_hidden_sizes: tuple[PositiveInt, ...] | None = Field(
        default=None,
        min_length=1,
        description="Widths of the actor's trunk (default: hidden_sizes).",
    )
    critic_hidden_sizes: tuple[PositiveInt, ...] | None = Field(
        default=None,
        min_length=1,
        description="Widths of the critics' trunks (default: hidden_sizes).",
    )
    layer_norm: bool = Field(
        default=False, description="Apply LayerNorm before each ReLU of the trunks."
    )
    task_input: Literal["one-hot", "embedding", "description"] | None = Field(
        default=None,
        description="How the trunk is told the task: 'one-hot'; 'embedding', a vector that is "
        "learned; 'description', a sentence's embedding that is fixed, with which a policy with "
        "one head acts in tasks it was not trained on (default: 'description' for care, "
        "'embedding' for film, nothing for a module of your own, else 'one-hot').",
    )
    task_embedding: int | None = Field(
        default=None,
        gt=0,
        le=2**16,
        description="Length of a learned task embedding; means task_input 'embedding' (default: "
        "50 there).",
    )
    normalize_observations: bool = Field(
        default=False,
        description="Normalise observations by their running mean and standard deviation.",
    )
    critic_bins: int | None = Field(
        default=None,
        gt=1,
        description="Bins of a categorical critic, trained by cross-entropy (default: a scalar "
        "critic, trained by squared error).",
    )
    value_limit: float = Field(
        default=10.0,
        gt=0,
        description="Largest value a categorical critic represents; its bins cover -value_limit to "
        "value_limit [scaled return].",
    )
    initial_temperature: float = Field(
        default=1.0,
        gt=0,
        description="Initial entropy temperature alpha of each task [scaled reward per nat].",
    )

    @field_validator("trunk", "actor_trunk", "critic_trunk", mode="before")
    @classmethod
    def _name_trunk(cls, value: Any) -> Any:
        return TRUNKS.spec_of(value)

    @model_validator(mode="after")
    def _one_task_input(self) -> AgentConfig:
        if self.task_embedding is not None and self.task_input not in (None, "embedding"):
            raise PydanticCustomError(
                "task", "task_embedding: expected task_input 'embedding' or none beside it"
            )
        return self

    @model_validator(mode="after")
    def _blocks_add_up(self) -> AgentConfig:
        for name in ("hidden_sizes", "actor_hidden_sizes", "critic_hidden_sizes"):
            trunk = getattr(self, name.replace("hidden_sizes", "trunk")) or self.trunk
            if trunk == "residual" and len(set(getattr(self, name) or (1,))) > 1:
                raise PydanticCustomError(
                    "widths", f"{name}: expected one width throughout a residual trunk"
                )
        return self


class LearnerConfig(Section):
    """One SAC update."""

    surgery: str = Field(
        default="none",
        description="Method that combines the tasks' gradients on the trunk: 'none' (their mean), "
        "'pcgrad', 'rotograd' or another of the README's table; a name that a module of 'imports' "
        "or an installed package's entry point registers; 'torchjd:NAME'; or "
        "'package.module:name', a Surgery class or a function from Gramian to weights. Options "
        "follow in brackets: 'cagrad(c=0.4)'.",
    )
    actor_surgery: str | None = Field(
        default=None, description="Method for the actor (default: surgery)."
    )
    critic_surgery: str | None = Field(
        default=None, description="Method for the critics (default: surgery)."
    )
    rotation_lr: float = Field(
        default=1e-3,
        ge=0,
        description="RotoGrad: initial learning rate of rotations [radians per update, at most].",
    )
    rotation_decay: float = Field(
        default=0.99999,
        gt=0,
        le=1,
        description="RotoGrad: decay of the rotations' learning rate [factor per update]; below 1, "
        "rotations settle before the networks do.",
    )
    rotation_size: int | None = Field(
        default=None, gt=1, description="RotoGrad: number of features to rotate (default: all)."
    )
    rotation_step: Literal["geodesic", "matrix_exp"] = Field(
        default="geodesic",
        description="RotoGrad: how a rotation is updated; 'geodesic' costs O(d^2) per task, the "
        "paper's 'matrix_exp' O(d^3).",
    )
    gradient_engine: Literal["auto", "jacobian", "factored"] = Field(
        default="auto",
        description="How the Gramian is computed: 'jacobian' forms every task's gradient; "
        "'factored' forms none and needs less memory for wide trunks; 'auto' chooses by width.",
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        default="auto",
        description="Precision of the trunks' matrix products during updates; parameters, heads, "
        "losses and Gramians are float32. 'auto': tf32 on CUDA, fp32 on a CPU. 'bf16' is nearly "
        "twice as fast on a CPU with AVX512-BF16 or AMX; other CPUs use fp32 instead.",
    )
    capture: bool = Field(
        default=True,
        description="On CUDA, launch updates as one captured graph if the method allows it; no "
        "effect on a CPU.",
    )
    compile: bool = Field(
        default=False,
        description="On CUDA, fuse an update's small operations by torch.compile, which takes a "
        "minute at the start; without effect on a CPU, where updates took a quarter longer.",
    )
    batch_size: int = Field(
        default=128, gt=0, description="Batch size of an update [transitions per task]."
    )
    buffer_size: int = Field(
        default=100_000,
        gt=0,
        description="Capacity of the replay buffer [transitions per task].",
    )
    gradient_steps: int = Field(
        default=1,
        gt=0,
        description="Updates per vector step; one vector step is one step of every environment.",
    )
    learning_rate: float = Field(
        default=3e-4, gt=0, description="Adam's learning rate for actor, critics and temperatures."
    )
    final_learning_rate: float | None = Field(
        default=None,
        ge=0,
        description="Learning rate at the run's end, reached by linear decay (default: no decay).",
    )
    adam_epsilon: float = Field(default=1e-5, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="AdamW's weight decay; an update multiplies each weight by "
        "1 - learning_rate * weight_decay.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Largest norm of a network's gradient, clipped after surgery; 0: no clipping.",
    )
    gamma: float = Field(
        default=0.99, ge=0, le=1, description="Discount factor [per environment step]."
    )
    tau: float = Field(
        default=0.005, gt=0, le=1, description="Polyak coefficient of target critics [per update]."
    )
    target_entropy: float | None = Field(
        default=None,
        description="Target entropy of each task's temperature [nats] (default: minus the number "
        "of action dimensions).",
    )
    min_temperature: float = Field(
        default=0.0,
        ge=0,
        description="Floor under each task's entropy temperature; 0 is none.",
    )
    reward_scale: float = Field(
        default=1.0,
        gt=0,
        description="Factor on the rewards of the learner; logs show raw rewards.",
    )
    return_scale: float | None = Field(
        default=None,
        gt=0,
        description="Scale each task's rewards by a running factor so that its largest discounted "
        "return so far equals this (default: no scaling).",
    )
    return_memory: int | None = Field(
        default=None,
        gt=0,
        description="With return_scale, scale by the mean of the largest discounted returns of the "
        "last episodes instead of the largest so far [episodes per task].",
    )

    @field_validator("surgery", "actor_surgery", "critic_surgery", mode="before")
    @classmethod
    def _name_method(cls, value: Any) -> Any:
        return METHODS.spec_of(value)

    @model_validator(mode="after")
    def _memory_has_a_scale(self) -> LearnerConfig:
        if self.return_memory is not None and self.return_scale is None:
            raise PydanticCustomError("memory", "return_memory: expected return_scale with it")
        return self
