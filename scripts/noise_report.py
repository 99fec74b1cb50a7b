"""Report of scripts/noise.py: paired differences and gradient conflicts, as Markdown."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from mtrl.analysis.methods import Method
from mtrl.evaluation.intervals import CONFIDENCE

WANTED = 0.06
"""Half width of an interval that is narrow enough to be useful."""

MEASURES = {
    "cosine_mean": "cosine",
    "conflict_fraction": "conflict",
    "self_cosine": "with itself",
    "conflict_repeats": "repeats",
    "conflict_repeats_by_chance": "by chance",
    "conflict_after_surgery": "after surgery",
    "conflict_after_step": "after the step",
}


def by_seed(agent: Method) -> dict[int, float]:
    """Return the mean final success rate over tasks, by seed."""
    seeds = [run.config.seed for run in agent.finished]
    return dict(zip(seeds, agent.scores.mean(0).tolist(), strict=True))


def half_width(values: np.ndarray) -> float:
    """Return the half width of Student's 95% interval of the mean of N values; NaN for one."""
    if len(values) < 2:
        return np.nan
    quantile = student_t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def seeds_for(values: np.ndarray, half: float = WANTED) -> int | None:
    """Return the number of values for an interval of at most ± `half`, at the same variance."""
    if len(values) < 3 or (deviation := values.std(ddof=1)) == 0:
        return None
    n = 2
    while student_t.ppf(0.5 + CONFIDENCE / 2, n - 1) * deviation / np.sqrt(n) > half:
        n += 1
    return n


def differences(agents: dict[str, Method], base: str) -> str:
    """Return the final success by seed, and its difference from the base's at the same seeds.

    Intervals are Student's, with the run as the unit.
    """
    lines = [
        "| agent | runs | mean [95%] | deviation over seeds | each seed | "
        f"difference from {base}, in pairs [95%] | pairs for ± {WANTED} |",
        "|---|---|---|---|---|---|---|",
    ]
    of_base = by_seed(agents[base]) if base in agents else {}
    disturbed = False
    for name, agent in agents.items():
        scores, replaced = by_seed(agent), _seeds_with_restarts(agent)
        disturbed |= bool(replaced)
        values = np.array(list(scores.values()))
        marks = {seed: "*" if seed in replaced else "" for seed in scores}
        each = ", ".join(f"{seed}: {score:.2f}{marks[seed]}" for seed, score in scores.items())
        common = [seed for seed in scores if seed in of_base]
        shown = needed = "–"
        if name != base and common:
            pairs = np.array([scores[seed] - of_base[seed] for seed in common])
            shown = f"{_with_interval(pairs, '+')}, {len(common)} pairs"
            needed = str(seeds_for(pairs) or "–")
        deviation = f"{values.std(ddof=1):.2f}" if len(values) > 1 else "–"
        lines.append(
            f"| {name} | {len(values)} | {_with_interval(values)} | {deviation} | {each} "
            f"| {shown} | {needed} |"
        )
    if disturbed:
        lines += ["", "\\* A simulator that timed out was replaced: the run is not reproducible."]
    return "\n".join(lines)


def conflicts(agents: dict[str, Method]) -> str:
    """Return means over all diagnoses of all runs, by network; "" if there are none."""
    head = " | ".join(MEASURES.values())
    lines = [f"| agent | network | {head} |", "|---|---|" + "---|" * len(MEASURES)]
    for name, agent in agents.items():
        for network in ("actor", "critic1", "critic2"):
            tags = [f"surgery/{network}/{measure}" for measure in MEASURES]
            found = np.array([_over_run(run.path, tags) for run in agent.finished])
            if np.isfinite(found[:, 1]).any():
                cells = " | ".join(f"{value:.2f}" for value in np.nanmean(found, 0))
                lines.append(f"| {name} | {network} | {cells} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _seeds_with_restarts(agent: Method) -> set[int]:
    """Return seeds whose runs lost episodes with a simulator, which depends on the load."""
    return {run.config.seed for run in agent.finished if any(_logged(run.path, "time/restarts"))}


def _over_run(path: Path, tags: list[str]) -> list[float]:
    """Return the mean of each tag over a run's log; NaN if it was not logged."""
    values = [_logged(path, tag) for tag in tags]
    return [float(np.mean(each)) if each else np.nan for each in values]


def _logged(path: Path, tag: str) -> list[float]:
    with (path / "progress.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[tag]) for row in csv.DictReader(file) if row.get(tag)]


def _with_interval(values: np.ndarray, sign: str = "") -> str:
    middle, half = values.mean(), half_width(values)
    if np.isnan(half):
        return f"{middle:{sign}.2f}"
    return f"{middle:{sign}.2f} [{middle - half:{sign}.2f}, {middle + half:{sign}.2f}]"
