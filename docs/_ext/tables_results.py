"""Tables of final scores, from what the runs left in `results/`."""

from __future__ import annotations

import json
from typing import Any

from md import table
from tables_speed import RESULTS

from mtrl.analysis.logs import read_log
from mtrl.envs.parity import verdicts
from mtrl.folder import STEP


def runs(*folders: str) -> str:
    """Final success of each task with its Wilson interval, a column for each run."""
    finals = [_read(folder, "eval.json") for folder in folders]
    rows = []
    for task in [row["task"] for row in finals[0]["tasks"]]:
        found = [next(r for r in final["tasks"] if r["task"] == task) for final in finals]
        cells = [
            f"{r['success_rate']:.2f} [{r['wilson_low']:.2f}, {r['wilson_high']:.2f}]"
            for r in found
        ]
        rows.append([task, *cells])
    means = [final["mean_success_rate"] for final in finals]
    rows.append(["**mean**", *(f"**{mean:.3f}**" for mean in means)])
    logs = [_last(folder) for folder in folders]
    rows.append(["environment steps", *(f"{log[STEP]:,.0f}" for log in logs)])
    rows.append(["updates", *(f"{log['time/updates']:,.0f}" for log in logs)])
    rows.append(["minutes", *(f"{log['time/elapsed'] / 60:.1f}" for log in logs)])
    return table(["Task", *(f"`{folder}`" for folder in folders)], rows)


def origin(*folders: str) -> str:
    """What made each run: simulators, cores, versions."""
    rows = []
    for folder in folders:
        process = _read(folder, "run.json")[0]
        versions = process["versions"]
        rows.append(
            [
                f"`{folder}`",
                _simulators(folder),
                str(process["machine"]["cores"]),
                f"torch {versions['torch']}, Meta-World {versions['metaworld']}",
                process["started"][:10],
            ]
        )
    return table(["Run", "Trained on", "Cores", "Versions", "Date"], rows)


def simulators(folder: str) -> dict[str, str]:
    """Which simulator trained each task.

    Runs of today write it into run.json. Earlier ones have the setting alone: `metaworld`, or
    `auto`, which is EnvPool for tasks that agree with the reference if it was installed. The
    earliest have no such setting and no EnvPool.
    """
    process = _read(folder, "run.json")[0]
    if "simulators" in process:
        return process["simulators"]
    tasks = [row["task"] for row in _read(folder, "eval.json")["tasks"]]
    config = (RESULTS / folder / "config.yaml").read_text(encoding="utf-8")
    may = "simulator: auto" in config and "envpool" in process["versions"]
    agree = {task for task, verdict in verdicts()["tasks"].items() if verdict["passed"]}
    return {task: "envpool" if may and task in agree else "metaworld" for task in tasks}


def _simulators(folder: str) -> str:
    found = simulators(folder)
    native = [task.removesuffix("-v3") for task, name in found.items() if name == "envpool"]
    if not native:
        return "the reference simulator"
    rest = "the reference simulator for the others"
    return f"EnvPool for {', '.join(native)}; {rest}"


def _read(folder: str, name: str) -> Any:
    return json.loads((RESULTS / folder / name).read_text(encoding="utf-8"))


def _last(folder: str) -> dict[str, Any]:
    """The newest value of each number that the run logged."""
    _, rows = read_log(RESULTS / folder)
    return {key: value for row in rows for key, value in row.items() if value is not None}
