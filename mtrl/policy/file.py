"""Safe reading of files with a policy: nothing is executed, and all sizes are bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, Field, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtrl.config import yaml12
from mtrl.config.agent import AgentConfig
from mtrl.config.fields import Seed
from mtrl.config.registry import TRUNKS
from mtrl.config.section import validate
from mtrl.errors import UsageError, one_line
from mtrl.folder import EXPORT_FORMAT

PREFIX = "agent/"
"""Prefix of the agent's tensors in a policy file or checkpoint."""


MAX_HEADER, MAX_CONFIG = 16 * 2**20, 64 * 2**10
"""Maximum size of a file's header, and of the configuration in it [bytes]."""


def _printable(text: str) -> str:
    if not text.isprintable():  # it will be printed
        raise ValueError("expected printable characters")
    return text


Name = Annotated[str, AfterValidator(_printable)]


class TaskFigures(BaseModel):
    """Row of an evaluation, see `Evaluation.rows`; no success rate if it is scored by return."""

    task: Name
    episodes: PositiveInt
    success_rate: float | None = None
    wilson_low: float | None = None
    wilson_high: float | None = None
    return_mean: float
    steps_to_success_mean: float | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> TaskFigures:
        success = (self.success_rate, self.wilson_low, self.wilson_high)
        if len({value is None for value in success}) > 1:
            raise ValueError("expected success_rate with wilson_low and wilson_high, or none")
        return self


def short_number(value: float) -> str:
    """Format a return with one decimal from 10 on, and with three significant digits below."""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


class Figures(BaseModel):
    """Results of a final policy, as in `eval.json`."""

    seed: int
    total_timesteps: int
    mean_success_rate: float | None = None
    mean_return: float | None = None
    tasks: tuple[TaskFigures, ...] = Field(min_length=1)


class PolicyHeader(BaseModel):
    """Header of a policy file: the policy's inputs and outputs, and its origin.

    Attributes:
        tasks: Task names in the order of the one-hot.
        observation_size: Length of an observation, without the one-hot.
        action_size: Length of an action.
        agent: Architecture of the networks.
        benchmark: Name of the benchmark.
        environments: Whether the tasks are Meta-World's or custom; None in older files, which lack
            this entry.
        surgery: Method of surgery used in training.
        seed: Seed of the training run and of its goals.
        horizon: Steps after which an episode is truncated; None: the environments end it.
        total_timesteps: Environment steps over all tasks.
        evaluation: Results of this very policy.
        versions: Versions of the packages used in training, by name.
    """

    tasks: tuple[Name, ...] = Field(min_length=1)
    observation_size: PositiveInt
    action_size: PositiveInt
    agent: AgentConfig
    benchmark: Name | None = None
    environments: Literal["metaworld", "custom"] | None = None
    surgery: Name | None = None
    seed: Seed = 0
    horizon: PositiveInt | None = 500
    total_timesteps: int | None = None
    evaluation: Figures | None = None
    versions: dict[Name, Name] = {}


@contextmanager
def open_policy(path: Path | str) -> Iterator[tuple[Any, PolicyHeader]]:
    """Open a safetensors file written by mtrl, and yield it with its header.

    Errors raised in the context count as the file's, too.

    Raises:
        UsageError: In one line that names the file.
    """
    try:
        with Path(path).open("rb") as start:
            first = start.read(8)
            if first.startswith(b"PK"):
                raise UsageError(
                    f"policy: expected a .safetensors file, got {path}, an archive such as the "
                    "programs (.pt2) that mtrl-export writes for torch.export.load; export to a "
                    "name that ends in .safetensors instead"
                )
            if int.from_bytes(first, "little") > MAX_HEADER:
                raise UsageError(
                    f"policy: expected a .safetensors file, got {path}, which is not one or has a "
                    f"header of more than {MAX_HEADER} bytes"
                )
        with safe_open(path, "pt") as file:
            yield file, _read_header(file, str(path))
    except UsageError as error:
        if str(error).startswith("policy: "):
            raise
        raise UsageError(f"policy: {path}: {error}") from None  # e.g. about its trunk
    except (OSError, SafetensorError) as error:
        raise UsageError(f"policy: cannot read {path}: {one_line(error)}") from None
    except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError) as error:
        reason = f"the tensors of {path} do not match its header: {one_line(error)}"
        raise UsageError(f"policy: {reason}") from None


def digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of a file's header and tensors, as hexadecimal digits.

    Args:
        metadata: Entries of the header; `sha256` itself is left out.
        tensors: Names and tensors, sorted by name.
    """
    found = hashlib.sha256()
    for key in sorted(metadata.keys() - {"sha256"}):
        found.update(repr((key, metadata[key])).encode())
    for name, tensor in tensors:
        found.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        flat = tensor.contiguous().reshape(-1)
        if len(flat) < 2:  # its stride is arbitrary, and `view` rejects some
            flat = flat.as_strided(flat.shape, (1,))
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Loader(yaml12.Loader):
    """YAML loader without aliases: a kilobyte of them can expand to a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected no aliases")
        return super().compose_node(parent, index)


def _read_header(file: Any, path: str) -> PolicyHeader:
    """Read the configuration in the header of an open file.

    Raises:
        UsageError: If it is missing or invalid, or the checksum does not match.
    """
    metadata = file.metadata() or {}
    kind, text = metadata.get("format", ""), metadata.get("config", "")
    if not kind.startswith("mtrl-"):
        raise UsageError(f"policy: expected a file written by mtrl, got {path}")
    if kind == EXPORT_FORMAT or "sha256" in metadata:
        tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
        if digest(metadata, tensors) != metadata.get("sha256"):
            raise UsageError(f"policy: {path} is damaged: its checksum does not match")
    if len(text) > MAX_CONFIG:
        raise UsageError(
            f"policy: cannot read {path}: expected a configuration of at most "
            f"{MAX_CONFIG} characters"
        )
    try:
        header = yaml12.load(text, _Loader)
    except Exception as error:  # a malicious text can make the parser raise anything
        raise UsageError(f"policy: cannot read {path}: {one_line(error)}") from None
    found = validate(PolicyHeader, header, source=f"policy: {path}: ")
    for spec in found.agent.trunks:
        TRUNKS.expect_known(spec)
    return found
