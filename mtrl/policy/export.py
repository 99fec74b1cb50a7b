"""Export of policies to share: one file with all that acting needs, and a model card."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtrl.config import yaml12
from mtrl.config.section import validate
from mtrl.errors import UsageError, one_line
from mtrl.folder import EXPORT_FORMAT, FINAL, find_policy, write_atomically
from mtrl.nets.trunks import trunk_of
from mtrl.nets.trunks.own import OwnModule
from mtrl.policy.file import Figures, PolicyHeader, digest, short_number
from mtrl.policy.policy import Policy

SUFFIXES = (".safetensors", ".pt2")
"""Suffixes of exported files: for mtrl, and for PyTorch without mtrl."""


def export_policy(source: Path | str, target: Path | str) -> None:
    """Export the policy of a run folder, a checkpoint or a policy file to a file.

    A `.safetensors` file is for `Policy.load` and `mtrl-eval`. A `.pt2` file is a program for
    `torch.export.load` that maps observations with their one-hot, `[n, observation + T]` in
    float32, to the mode's actions, `[n, A]`. It needs PyTorch 2.7 or newer but not mtrl. An older
    PyTorch may be unable to read a program written by a newer one.

    Raises:
        UsageError: If there is no policy, or the file cannot be written.
    """
    path, target = find_policy(Path(source)), Path(target)
    if target.suffix not in SUFFIXES:
        raise UsageError(
            f"output: expected a name that ends in {' or '.join(SUFFIXES)}, got {target}"
        )
    if target.resolve() == path.resolve():
        raise UsageError(f"output: expected a file other than the policy's, got {target}")
    if target.suffix == ".pt2" and torch.__version__ < "2.7":  # cannot save exported programs
        raise UsageError(f"output: expected PyTorch 2.7 for a .pt2 file, got {torch.__version__}")
    policy, header = _read(path)
    _fold(policy)
    config = yaml12.dump(header.model_dump(mode="json", exclude_none=True))
    metadata = {"format": EXPORT_FORMAT, "config": config, "card": _card(header)}
    if target.suffix == ".pt2":
        program = io.BytesIO()
        torch.export.save(_program(policy), program, extra_files=metadata)
        write_atomically(target, lambda temporary: temporary.write_bytes(program.getbuffer()))
    else:
        tensors = policy.tensors()
        metadata["sha256"] = digest(metadata, sorted(tensors.items()))
        write_atomically(target, lambda temporary: save_file(tensors, temporary, metadata))


def card(source: Path | str) -> str:
    """Return the model card as Markdown, which `export_policy` also stores in the file's header.

    Raises:
        UsageError: If there is no policy.
    """
    return _card(_read(find_policy(Path(source)))[1])


def _read(path: Path) -> tuple[Policy, PolicyHeader]:
    """Read a policy, and all that its file and its run folder say about it."""
    policy, header = Policy.load_with_header(path)
    known: dict[str, Any] = {}
    is_final, is_checkpoint = path.name == FINAL, path.parent.name == "checkpoints"
    run_dir = path.parent.parent if is_checkpoint else path.parent
    if (is_final or is_checkpoint) and (processes := _json(run_dir / "run.json")):
        known["versions"] = processes[-1]["versions"]
    if is_final and (found := _json(run_dir / "eval.json")):
        figures = validate(Figures, found, source=f"{run_dir / 'eval.json'}: ")
        if figures.total_timesteps == header.total_timesteps:  # else of an earlier policy
            known["evaluation"] = figures
    return policy, header.model_copy(update=known)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UsageError(f"policy: cannot read {path}: {one_line(error)}") from None


def _fold(policy: Policy) -> None:
    """Fold the rotations into the heads: the same function without T matrices of d × d."""
    actor = policy.actor
    if actor.rotation is not None:
        folded = actor.folded().per_task["head_weight"].contiguous()
        actor.per_task["head_weight"] = nn.Parameter(folded, requires_grad=False)
        actor.rotation = None


class _Program(nn.Module):
    """Module from observations with their one-hot to the mode's actions."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> Tensor:
        sizes = [self.policy.observation_size, len(self.policy.tasks)]
        rows, one_hot = observations.split(sizes, 1)
        return self.policy.act(rows, one_hot.argmax(-1))


def _program(policy: Policy) -> torch.export.ExportedProgram:
    example = torch.zeros(2, policy.observation_size + len(policy.tasks))
    rows = {"observations": {0: torch.export.Dim("rows", max=2**31)}}
    return torch.export.export(_Program(policy), (example,), dynamic_shapes=rows, strict=False)


def _card(header: PolicyHeader) -> str:
    tasks, agent, versions = header.tasks, header.agent, header.versions
    origin = [
        f"surgery `{header.surgery}`" if header.surgery else "",
        f"seed {header.seed}",
        f"{header.total_timesteps:,} environment steps over all tasks"
        if header.total_timesteps
        else "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    normalized = " The policy normalises them itself." if agent.normalize_observations else ""
    trunk = trunk_of(agent, "actor")
    sizes = "" if isinstance(trunk, OwnModule) else f" of {' × '.join(map(str, trunk.widths))}"
    # Training scaled them; a user's own loop has to do the same.
    scaled = ", for an environment in `gymnasium.wrappers.RescaleAction(env, -1, 1)`"
    scaled = scaled if header.environments == "custom" else ""
    heads = "a head per task" if agent.heads == "multi" else "one head"
    lines = [
        f"# A policy for {len(tasks)} task{'s' * (len(tasks) > 1)}"
        + (f" ({header.benchmark})" if header.benchmark else ""),
        "",
        "The actor of a multi-task SAC agent, trained with mtrl.",
        "",
        f"- Training: {'; '.join(part for part in origin if part)}.",
        f"- Observation: {header.observation_size} float32 numbers as returned by the simulator "
        f"(Meta-World: with the goal observable), followed by the one-hot of {len(tasks)} tasks "
        f"unless the task is given by name.{normalized}",
        f"- Action: {header.action_size} numbers in [-1, 1]{scaled}.",
        "- Episode: "
        + (f"{header.horizon} steps." if header.horizon else "until the environment ends it."),
        f"- Networks: trunk `{agent.actor_trunk or agent.trunk}`{sizes}, {heads}.",
        f"- Tasks in the order of the one-hot: {', '.join(tasks)}.",
        "",
    ]
    if header.evaluation:
        lines += [*_table(header.evaluation), ""]
    # A file only names custom tasks: the user has to say where they are defined.
    benchmark = " --benchmark MODULE:NAME" if header.environments == "custom" else ""
    return "\n".join([*lines, _USE.format(task=tasks[0], benchmark=benchmark)])


def _table(figures: Figures) -> list[str]:
    lines = [
        f"Scores of the deterministic policy on episodes of seed {figures.seed}. An episode counts "
        "as solved if the success flag was set at any step:",
        "",
        "| task | episodes | success | 95% interval | return | steps to success |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures.tasks:
        rate, interval, steps = "–", "–", row.steps_to_success_mean
        if row.success_rate is not None:
            rate, interval = (
                f"{row.success_rate:.2f}",
                f"[{row.wilson_low:.2f}, {row.wilson_high:.2f}]",
            )
        cells = (
            row.task,
            str(row.episodes),
            rate,
            interval,
            short_number(row.return_mean),
            "–" if steps is None else f"{steps:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    total, mean = figures.mean_success_rate, figures.mean_return
    lines.append(
        f"| **mean** | | {'–' if total is None else f'{total:.3f}'} | "
        f"| {'' if mean is None else short_number(mean)} | |"
    )
    if any(row.success_rate is None for row in figures.tasks):
        lines += ["", "–: the task does not report success; its score is the return."]
    return lines


_USE = """\
Use it in Python, or evaluate it again (replace FILE by the name of the file):

    from mtrl import Policy

    policy = Policy.load("FILE")
    action, _ = policy.predict(observation, deterministic=True, task="{task}")

    mtrl-eval FILE{benchmark}
"""
