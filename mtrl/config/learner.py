"""Configuration section for the learner. Every field states its unit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.rates import Nats, total
from mtrl.config.registry import METHODS
from mtrl.config.section import Section

NoiseColor = Literal["white", "pink"]
"""Noise by its spectrum: white is flat, pink falls with the frequency f as 1/f."""


class LearnerConfig(Section):
    """Configuration of the SAC update."""

    surgery: str = Field(
        default="none",
        description="Method that combines the tasks' gradients on the trunk: 'none' (their mean), "
        "'pcgrad', 'rotograd', 'rotograd-scale', 'rotograd-rotate', 'cagrad', 'mgda', 'imtl-g', "
        "'aligned-mtl', 'fairgrad', 'gradnorm', 'famo'; a name that a module in 'imports' or the "
        "entry point of an installed package registers; 'torchjd:NAME'; or 'package.module:name', "
        "a Surgery class or a function from Gramian to weights. Options follow in "
        "parentheses: 'cagrad(c=0.4)'.",
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
        "rotations converge before the networks.",
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
        description="How to compute the Gramian: 'jacobian' forms every task's gradient; "
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
        description="On CUDA, fuse small operations of an update with torch.compile, which takes a "
        "minute at the start; no effect on a CPU, where it made updates a quarter slower.",
    )
    batch_size: int = Field(
        default=128, gt=0, description="Batch size of an update [transitions per task]."
    )
    buffer_size: int = Field(
        default=100_000,
        gt=0,
        description="Capacity of the replay buffer [transitions per task].",
    )
    demonstration_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of each batch that is sampled from demonstrations, for tasks that have "
        "any [fraction].",
    )
    gradient_steps: int = Field(
        default=1,
        gt=0,
        description="Updates per vector step, which is one step of every environment.",
    )
    learning_rate: float = Field(
        default=3e-4, gt=0, description="Adam's learning rate for actor, critics and temperatures."
    )
    final_learning_rate: float | None = Field(
        default=None,
        ge=0,
        description="Learning rate at the end of the run, reached by linear decay (default: no "
        "decay).",
    )
    adam_epsilon: float = Field(default=1e-5, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Weight decay of AdamW; an update multiplies the layers' matrices (not biases, "
        "norms and embeddings) by 1 - learning_rate * weight_decay.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Maximum norm of each network's gradient, clipped after surgery; 0: no "
        "clipping.",
    )
    gamma: float = Field(
        default=0.99, ge=0, le=1, description="Discount factor [per environment step]."
    )
    tau: float = Field(
        default=0.005, gt=0, le=1, description="Polyak coefficient of target critics [per update]."
    )
    target_entropy: Nats | None = Field(
        default=None,
        description="Target entropy of each task's temperature [nats, or X/action for each action "
        "dimension] (default: -1/action).",
    )
    exploration_noise: NoiseColor = Field(
        default="white",
        description="Noise of the actions that the policy samples in training: 'white' is "
        "independent at each step; 'pink' is correlated over steps, which explores further. "
        "Updates and evaluations do not change.",
    )
    min_temperature: float = Field(
        default=0.0,
        ge=0,
        description="Lower bound of each task's entropy temperature; 0: none.",
    )
    reward_scale: float = Field(
        default=1.0,
        gt=0,
        description="Factor on the rewards used for learning; logs show raw rewards.",
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
        description="With return_scale, scale by the mean over this many last episodes of their "
        "largest discounted return, instead of the largest so far [episodes per task].",
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

    def entropy_of(self, n_actions: int) -> float:
        """Return the target entropy for a number of action dimensions [nats]."""
        if self.target_entropy is None:
            return -float(n_actions)
        return float(total(self.target_entropy, n_actions, float))
