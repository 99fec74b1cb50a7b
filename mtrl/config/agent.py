"""Configuration section for the networks. Every field states its unit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.registry import TRUNKS
from mtrl.config.section import Section


class AgentConfig(Section):
    """Configuration of the networks: a shared trunk and parameters of each task."""

    heads: Literal["multi", "single"] = Field(
        default="multi",
        description="'multi': one linear head per task; 'single': one head for all tasks, which "
        "the trunk distinguishes by its task input.",
    )
    trunk: str = Field(
        default="mlp",
        description="Architecture of the trunk: 'mlp', 'residual', 'film', 'soft-modules', "
        "'moore', 'care', 'paco'; a name that a module of 'imports' or an installed package's "
        "entry point registers; or 'package.module:name', a torch.nn.Module from observations to "
        "features. Options follow in parentheses: 'moore(experts=4)'. In Python also a class, a "
        "function or a Trunk.",
    )
    actor_trunk: str | None = Field(
        default=None, description="Architecture of the actor's trunk (default: trunk)."
    )
    critic_trunk: str | None = Field(
        default=None, description="Architecture of the critics' trunks (default: trunk)."
    )
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        default=(400, 400, 400),
        min_length=1,
        description="Widths of the trunk's layers [units]; for a residual trunk, of its first "
        "layer and each block.",
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
        description="Vector that identifies the task to the trunk: 'one-hot'; 'embedding', which "
        "is learned; 'description', the fixed embedding of a sentence, with which a policy with "
        "one head can act in tasks it was not trained on (default: 'description' for care, "
        "'embedding' for film, none for a custom module, else 'one-hot').",
    )
    task_embedding: int | None = Field(
        default=None,
        gt=0,
        le=2**16,
        description="Length of a learned task embedding; implies task_input 'embedding' (default: "
        "50).",
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
        description="Largest value that a categorical critic can represent; its bins cover "
        "-value_limit to value_limit [scaled return].",
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
                    "widths", f"{name}: expected equal widths for a residual trunk"
                )
        return self

    @property
    def trunks(self) -> list[str]:
        """Descriptions of the trunks that are set."""
        specs = self.trunk, self.actor_trunk, self.critic_trunk
        return [spec for spec in specs if spec is not None]
