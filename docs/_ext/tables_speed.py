"""Tables of times and memory, from the JSON files that the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from md import milliseconds, table

RESULTS = Path(__file__).parents[2] / "results"

UPDATES = {
    "matmul": "matrix products of an update alone",
    "none": "one full update, `none`",
    "pcgrad": "one full update, `pcgrad`",
    "rotograd": "one full update, `rotograd`",
    "rotograd, matrix_exp": "one full update, `rotograd` with `--rotation-step matrix_exp`",
    "torchjd-autogram": "PCGrad by TorchJD's `autogram`, the tasks as its batch",
    "torchjd": "PCGrad by TorchJD's `mtl_backward`",
    "published": "PCGrad as published: a backward per task, projections one by one",
    "diagnosis": "one diagnosis of the conflicts, in float64",
}


def read(name: str) -> dict[str, Any]:
    """One of `results/bench_*.json`."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def updates(file: str, *benchmarks: str) -> str:
    """Medians of an update's time; a benchmark that lacks a case has a dash."""
    ms = read(file)["ms"]
    rows = [
        [text, *(_time(ms.get(f"{benchmark}/{case}")) for benchmark in benchmarks)]
        for case, text in UPDATES.items()
        if any(f"{benchmark}/{case}" in ms for benchmark in benchmarks)
    ]
    return table(["", *(b.upper() for b in benchmarks)], rows)


def preset_updates() -> str:
    """Updates of the preset `mt10_cpu`, with one thread and with two."""
    ms = read("bench_update_mt10_cpu.json")["ms"]
    rows = [
        [
            UPDATES[case],
            *(milliseconds(ms[f"mt10_cpu/threads={threads}/{case}"]) for threads in (1, 2)),
        ]
        for case in ("matmul", "none", "pcgrad", "rotograd")
    ]
    return table(["", "one thread", "two threads"], rows)


def trunk_updates() -> str:
    """Updates of each trunk without surgery and with PCGrad, and the memory of its gradients."""
    found = read("bench_update_trunks.json")
    rows = []
    for case in [key.removesuffix("/none") for key in found["ms"] if key.endswith("/none")]:
        name = case.split("/")[1]
        rows.append(
            [
                "`mlp` as a user's module" if name == "cases:UserMLP" else f"`{name}`",
                *(_time(found["ms"][f"{case}/{method}"]) for method in ("none", "pcgrad")),
                f"{found['ratios'][f'{case}/pcgrad/none']:.2f}",
                _memory(found["MiB"][f"{case}/pcgrad"]),
            ]
        )
    return table(["Trunk", "`none`", "`pcgrad`", "ratio", "memory"], rows)


def engines() -> str:
    """One step of PCGrad on both critics: time and memory of the two engines by width."""
    found = read("bench_engines.json")
    rows = []
    for case in [key.removesuffix("/jacobian") for key in found["ms"] if "jacobian" in key]:
        benchmark, width = case.split("/w")
        cells = [f"{benchmark.upper()}, {width}"]
        for kind, show in (("ms", _time), ("MiB", _memory)):
            values = [found[kind].get(f"{case}/{engine}") for engine in ("jacobian", "factored")]
            cells += [show(value) for value in values]
        rows.append(cells)
    header = ["Tasks, width", "`jacobian`", "`factored`"]
    return table([*header, "memory, `jacobian`", "memory, `factored`"], rows)


def environments() -> str:
    """Environment steps per second of the simulators."""
    ms = read("bench_envs.json")["ms"]
    cases = {
        "ours": "our workers on the reference simulator, 2 processes",
        "auto": "`--simulator auto`",
        "native": "all tasks on EnvPool",
        "async": "Gymnasium's `AsyncVectorEnv`",
        "sync": "Gymnasium's `SyncVectorEnv`",
    }
    rows = [
        [text, *(f"{1e3 * n / ms[f'{b}/{case}']:,.0f}" for b, n in (("mt1", 1), ("mt10", 10)))]
        for case, text in cases.items()
    ]
    starts = [
        f"{ms[f'{b}/ours/start'] / 1e3:.1f} s, {ms[f'{b}/async/start'] / 1e3:.1f} s"
        for b in ("mt1", "mt10")
    ]
    rows.append(["time to the first observation: ours, `AsyncVectorEnv`", *starts])
    return table(["Environment steps per second", "MT1 (reach)", "MT10"], rows)


def _time(value: float | None) -> str:
    return "–" if value is None else milliseconds(value)


def _memory(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} MiB"
