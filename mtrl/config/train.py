"""Configuration of a run: one frozen, validated tree, read from YAML and flags.

    TrainConfig
    ├── agent: AgentConfig              networks
    ├── learner: LearnerConfig          losses, optimisers, replay, surgery
    ├── environment: EnvironmentConfig  simulator
    └── transfer: TransferConfig        initial policy and stages of tasks

Every leaf has a unique name, so a field has the same name everywhere: `learner.batch_size` in YAML
is `--batch-size` on the command line (`imports` is `--import`). *Timesteps* are environment steps
summed over all tasks and copies: one vector step of MT10 counts as ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config import yaml12
from mtrl.config.agent import AgentConfig
from mtrl.config.base import read_tree
from mtrl.config.environment import EnvironmentConfig
from mtrl.config.fields import Device, Processes, Seed, UserPath
from mtrl.config.learner import LearnerConfig
from mtrl.config.rates import Steps, StepsOrNever
from mtrl.config.schedule import Schedule
from mtrl.config.section import Section, validate
from mtrl.config.transfer import TransferConfig


class TrainConfig(Section):
    """Configuration of a training run.

    Every field has a unique name, so fields of a section may be given without the section.

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
        "package.module:attribute, a mtrl.Benchmark with custom tasks.",
    )
    tasks: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Meta-World tasks to train on instead of the benchmark's, in this order; with "
        "a custom benchmark, a subset of its tasks.",
    )
    total_timesteps: Steps | None = Field(
        default=None,
        description="Length of the run [environment steps over all tasks, or N/task] (default: "
        "2,000,000/task). The step counts below have the same units.",
    )
    learning_starts: Steps | None = Field(
        default=None,
        description="Steps with uniformly random actions before the first update [environment "
        "steps over all tasks] (default: 4,000/task).",
    )
    eval_every: Steps | None = Field(
        default=None,
        description="Interval between evaluations [environment steps over all tasks] (default: "
        "50,000/task).",
    )
    eval_episodes: int = Field(
        default=10,
        gt=0,
        le=50,
        description="Episodes of each evaluation during training [episodes per task], each on a "
        "different goal. The final evaluation always uses all 50.",
    )
    eval_video: bool = Field(
        default=False,
        description="Show each task's first evaluation episode in TensorBoard; each video takes "
        "seconds to render and 0.1 to 0.2 MB.",
    )
    checkpoint_every: Steps | None = Field(
        default=None,
        description="Interval between checkpoints [environment steps over all tasks] (default: "
        "50,000/task).",
    )
    log_every: Steps | None = Field(
        default=None,
        description="Interval between rows of the logs [environment steps over all tasks] "
        "(default: 2,000/task).",
    )
    diagnose_every: StepsOrNever | None = Field(
        default=None,
        description="Interval between measurements of gradient conflicts [environment steps over "
        "all tasks] (default: 20,000/task); 0: never.",
    )
    max_runtime: float | None = Field(
        default=None,
        gt=0,
        description="Time limit after which the run writes a checkpoint and stops [hours]; it "
        "starts again when a run is resumed.",
    )
    seed: Seed = Field(
        default=0,
        description="Random seed of goals, weights, exploration, replay and surgery.",
    )
    device: Device = Field(
        default="auto",
        description="Device of networks and replay; 'auto': CUDA if available, else the CPU.",
    )
    threads: Processes | None = Field(
        default=None,
        description="Number of CPU threads of PyTorch (default: chosen in the first updates by "
        "timing whole steps, simulators included). Rounding depends on it: set it to reproduce "
        "another run exactly.",
    )
    run_dir: UserPath | None = Field(
        default=None,
        description="Folder of the run, which must not exist (default: "
        "runs/<benchmark>_<surgery>_seed<k>_<time>).",
    )
    imports: tuple[str, ...] = Field(
        default=(),
        description="Modules to import first, because they register surgery methods or trunks; "
        "the working directory is also searched.",
    )
    callbacks: tuple[str, ...] = Field(
        default=(),
        description="Callbacks: mtrl.Callback classes as 'package.module:Name', with options in "
        "parentheses: 'package.module:Name(every=1000)'.",
    )
    demonstrations: tuple[str, ...] = Field(
        default=(),
        description="Demonstrations to learn from, as [TASK=]SOURCE. A source is a file of "
        "mtrl-collect, or expert:N for N episodes of Meta-World's scripted policies. A source "
        "without a task applies to all tasks that no other source names.",
    )
    agent: AgentConfig = Field(default_factory=AgentConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    transfer: TransferConfig = Field(default_factory=TransferConfig)

    @model_validator(mode="before")
    @classmethod
    def _into_sections(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        found = dict(tree)
        for section, model in cls._sections():
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

    @classmethod
    def _sections(cls) -> Iterator[tuple[str, type[Section]]]:
        for name, field in cls.model_fields.items():
            model = field.annotation
            # On Python 3.10 `tuple[str, ...]` is an instance of `type`, too.
            if not get_origin(model) and isinstance(model, type) and issubclass(model, Section):
                yield name, model

    def schedule(self, n_tasks: int) -> Schedule:
        """Return the step counts for `n_tasks` tasks.

        Raises:
            UsageError: If the run could never learn from the transitions it collects.
        """
        return Schedule.of(
            {name: getattr(self, name) for name in Schedule.PER_TASK},
            n_tasks,
            envs_per_task=self.environment.envs_per_task,
            buffer_size=self.learner.buffer_size,
            batch_size=self.learner.batch_size,
        )

    @classmethod
    def from_yaml(cls, path: Path | str) -> TrainConfig:
        """Read a configuration file; missing keys keep their defaults.

        Raises:
            UsageError: If the file cannot be read, is not YAML, or holds an unknown key or an
                invalid value.
        """
        sections = {name for name, _ in cls._sections()}
        return validate(cls, read_tree(Path(path), sections), source=f"{path}: ")

    def flat(self) -> dict[str, Any]:
        """Return every leaf by its name, without the sections."""
        leaves: dict[str, Any] = {}
        for name, value in self:
            leaves |= dict(value) if isinstance(value, Section) else {name: value}
        return leaves

    def to_yaml(self) -> str:
        """Return the whole tree as YAML, which `from_yaml` reads."""
        return yaml12.dump(self.model_dump(mode="json"))


def shown(value: Any) -> str:
    """Format a value of the configuration as on the command line."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "default" if value is None else str(value)
