"""Table and figure of the ablation's results."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from mtrl.analysis.methods import Method
from mtrl.analysis.style import COLORS, TEXT

BASES = ("recipe", "plain")
"""Base agents; the first word of an agent's name."""

NOTHING = 0.1
"""A seed with a mean final success rate below this has learned nothing."""


def table(agents: dict[str, Method]) -> str:
    """Return mean final success rates and differences from the base agent, as Markdown."""
    lines = [
        "| agent | mean | each seed | difference [95%] | learned nothing | minutes |",
        "|---|---|---|---|---|---|",
    ]
    spreads = {base: spread(agents, base) for base in BASES}
    for name, agent in agents.items():
        means, base = by_seed(agent), base_of(name)
        difference = "–"
        if name != base and base in agents and means.keys() <= by_seed(agents[base]).keys():
            middle = np.mean([means[seed] - by_seed(agents[base])[seed] for seed in means])
            difference, half = f"{middle:+.2f}", spreads[base]
            if half is not None and means.keys() == by_seed(agents[base]).keys():
                difference += f" [{middle - half:+.2f}, {middle + half:+.2f}]"
        found = np.array(list(means.values()))
        each = ", ".join(f"{mean:.2f}" for mean in found)
        nothing = f"{(found < NOTHING).sum()} of {len(found)}"
        minutes = 60 * np.mean([run.clock[2, -1] for run in agent.finished])
        lines.append(
            f"| {name} | {found.mean():.2f} | {each} | {difference} | {nothing} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def base_of(name: str) -> str:
    """Return the name of an agent's base."""
    return name.split()[0]


def by_seed(agent: Method) -> dict[int, float]:
    """Return the mean final success rate over tasks, by seed."""
    seeds = [run.config.seed for run in agent.finished]
    return dict(zip(seeds, agent.scores.mean(0).tolist(), strict=True))


def spread(agents: dict[str, Method], base: str) -> float | None:
    """Return the half width of the 95% interval of a difference between two variants of `base`.

    Agents and seeds form a randomised block design, because a seed means the same goals for all
    agents. After subtracting the means of agents and seeds, one pooled variance remains.

    Returns:
        None if there are fewer than two agents with all seeds, or fewer than two seeds.
    """
    family = [by_seed(agent) for name, agent in agents.items() if base_of(name) == base]
    seeds = set().union(*family)
    scores = np.array([[m[seed] for seed in seeds] for m in family if m.keys() == seeds])
    if len(scores) < 2 or len(seeds) < 2:
        return None
    freedom = (len(scores) - 1) * (len(seeds) - 1)
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    deviation = np.sqrt(2 * (rest**2).sum() / freedom / len(seeds))
    return float(student_t.ppf(0.975, freedom) * deviation)


def draw(agents: dict[str, Method]) -> Figure:
    """Draw a row per agent, and a line at the base agent.

    An agent differs from its base if its bar, the interval of the difference, does not cross the
    line.
    """
    figure = Figure(figsize=(TEXT, 0.6 + 0.17 * len(agents)), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(BASES, COLORS, strict=False))
    for base, color in colors.items():
        family = {name: by_seed(agent) for name, agent in agents.items() if base_of(name) == base}
        seeds, half = set().union(*family.values()), spread(agents, base)
        for name, scores in family.items():
            y, means = list(agents).index(name), list(scores.values())
            middle = np.mean(means)
            axes.plot(means, [y] * len(means), "o", color=color, ms=2.5)
            axes.plot(middle, y, "|", color=color, ms=9, mew=2)
            if half is not None and name != base and scores.keys() == seeds:
                ends = [middle - half, middle + half]
                axes.plot(ends, [y, y], color=color, lw=5, alpha=0.3, solid_capstyle="butt")
        if base in agents:
            axes.axvline(agents[base].scores.mean(), color=color, lw=0.8, ls=(0, (4, 2)))
    axes.set_yticks(range(len(agents)), list(agents))
    axes.set(xlim=(-0.02, 1.02), ylim=(len(agents) - 0.5, -0.5))
    axes.set_xlabel("mean final success rate (dots: seeds; stroke: their mean)")
    axes.grid(True)
    return figure
