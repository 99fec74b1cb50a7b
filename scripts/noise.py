"""Measure how seeds and machines change the final success, and whether surgery changes it more.

    python scripts/noise.py [-o results/noise] [--jobs 2] [--only easy/pcgrad …] [--table]

Runs everything in `PLAN` that is missing, in order, at most --jobs at a time, each with its own
cores. `--only` selects runs by a part of their name; `--table` only writes table.md. The script can
be stopped at any time and continues when restarted. With equal seeds, two methods start from the
same weights and see the same goals and noise: differences are paired, with the run as their unit.
All runs of a seed should therefore come from one version; other seeds may come from another.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noise_report import conflicts, differences
from trials import Trial, add_arguments, read, short, train_all

from mtrl.folder import write_text

Fields = dict[str, Any]
BASE = "none"
"""Agent that all others of a set are compared with."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks, and the length of a run on them.

    Attributes:
        preset: Preset of all agents.
        total_timesteps: Environment steps over all tasks.
        change: Fields that differ from the preset.
    """

    preset: str
    total_timesteps: int
    change: Fields = field(default_factory=dict)


HARD = "push-v3", "drawer-open-v3", "peg-insert-side-v3", "reach-v3", "window-open-v3"

SETS = {
    "easy": TaskSet("quickstart", 120_000),
    # The same number of steps per task and of updates as mt10_cpu. EnvPool supports all five.
    "hard": TaskSet("mt10_cpu", 1_400_000, {"benchmark": "mt10", "tasks": HARD}),
}

VARIANTS: dict[str, Fields] = {
    BASE: {},
    "pcgrad": {"surgery": "pcgrad"},
    # Other CPU instructions round differently, like the same program on another machine.
    "none, AVX2": {},
    "none, reference simulator": {"simulator": "metaworld"},
    "rotograd": {"surgery": "rotograd"},
    "rotograd-scale": {"surgery": "rotograd-scale"},
    "pcgrad on the actor, fairgrad on the critics": {
        "actor_surgery": "pcgrad",
        "critic_surgery": "fairgrad",
    },
    "one update per vector step": {"gradient_steps": 1},
    "white noise": {"exploration_noise": "white"},
    "fp32": {"precision": "fp32"},
    "twice the steps": {},
    "temperatures of at least 0.003": {"min_temperature": 0.003},
    "initial temperature 0.1": {"initial_temperature": 0.1},
    "target entropy -1": {"target_entropy": -1.0},
    "discount 0.99": {"gamma": 0.99},
}
VARIABLES = {"none, AVX2": {"ATEN_CPU_CAPABILITY": "avx2"}}
TIMES = {"twice the steps": 2}

PLAN: tuple[tuple[str, tuple[str, ...], range], ...] = (
    ("easy", (BASE, "pcgrad"), range(10)),
    ("hard", (BASE, "pcgrad"), range(3)),
    ("easy", ("none, AVX2",), range(10)),
    ("hard", ("one update per vector step", "white noise", "fp32", "twice the steps"), range(3)),
    ("hard", ("temperatures of at least 0.003",), range(3)),
    ("hard", (BASE, "pcgrad"), range(3, 10)),
    ("hard", ("none, reference simulator",), range(5)),
    ("easy", ("rotograd", "rotograd-scale"), range(10)),
    ("easy", ("pcgrad on the actor, fairgrad on the critics",), range(10)),
    ("hard", ("rotograd", "rotograd-scale"), range(5)),
    ("hard", ("initial temperature 0.1", "target entropy -1", "discount 0.99"), range(3)),
)
"""Sets, agents and seeds, the most important first."""


def trials(set_name: str, variants: tuple[str, ...], seeds: range) -> list[Trial]:
    """Return the trials seed by seed, so that pairs are complete early."""
    tasks, found = SETS[set_name], []
    for seed in seeds:
        for name in variants:
            steps = TIMES.get(name, 1) * tasks.total_timesteps
            # Diagnoses use a separate random stream, so a run is the same without them.
            change = {**tasks.change, "diagnose_every": steps // 10, **VARIANTS[name]}
            config = short(tasks.preset, steps, seed, change)
            found.append(Trial(f"{set_name} {name}", config, VARIABLES.get(name, {})))
    return found


def report(output: Path) -> str:
    """Report the results of the runs in a folder, as Markdown."""
    parts = []
    for set_name in SETS:
        agents = {
            name.removeprefix(f"{set_name} "): agent
            for name, agent in read([f"{set_name} {name}" for name in VARIANTS], output).items()
        }
        if agents:
            tasks = ", ".join(next(iter(agents.values())).tasks)
            parts += [f"## {set_name}: {tasks}", differences(agents, BASE)]
            if table := conflicts(agents):
                parts.append(table)
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run missing runs, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "noise")
    parser.add_argument(
        "--only", nargs="+", metavar="SET/AGENT", help="only runs whose name contains this"
    )
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    wanted = [
        trial
        for step in PLAN
        for trial in trials(*step)
        if not arguments.only
        or any(part in trial.name.replace(" ", "/", 1) for part in arguments.only)
    ]
    try:
        if not arguments.table:
            train_all(wanted, arguments.output, arguments.runs, arguments.jobs)
    finally:
        text = report(arguments.output)
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / "table.md", text)
        print(text)


if __name__ == "__main__":
    main()
