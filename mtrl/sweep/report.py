"""Report of a sweep: figures, tables and a self-contained page."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrl.analysis.logs import custom_name
from mtrl.config.train import shown
from mtrl.errors import UsageError
from mtrl.folder import write_text
from mtrl.sweep.attempt import command_line
from mtrl.sweep.folder import SweepFolder, read_state
from mtrl.sweep.search import best_points
from mtrl.sweep.status import Row, read, summary
from mtrl.training.place import file_name

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .25em .6em; text-align: left; vertical-align: top }
code, pre { font: 12px/1.4 ui-monospace, monospace; white-space: pre-wrap }
pre, .long { overflow-wrap: anywhere }
.long { min-width: 11em }
.note { background: #fff4d6; padding: .6em 1em }
img { max-width: 100% }
"""

BIAS = (
    "Some runs were ended early by a rule. The table shows only the runs that survived, so a "
    "method that lost its bad seeds looks better than it is. Use these numbers to search, not to "
    "compare."
)


@dataclass(frozen=True)
class Section:
    """A heading and the HTML under it."""

    title: str
    body: str


def write_report(folder: SweepFolder) -> Path | None:
    """Write figures, tables and report.html; return its path, or None without an evaluated run."""
    rows = read(folder)
    out = folder.path / "report"
    groups = _comparable(folder, rows)
    if not groups:
        return None
    sections = [Section("", f"<p>{html.escape(summary(rows))}</p>")]
    if any(row.what == "ended early" for row in rows):
        sections.append(Section("", f'<p class="note">{BIAS}</p>'))
    best = best_points(folder, 8)
    if best:
        cells = [(str(n), f"{score:.3f}", fields(drawn)) for n, score, drawn in best]
        sections.append(Section("Best points", _table(("point", "score", "drawn"), cells)))
    for name, members in groups.items():
        where = out if len(groups) == 1 else out / name
        sections.append(_comparison(folder, members, name, where, [n for n, *_ in best]))
    failed = [row for row in rows if row.what == "failed"]
    for row in failed:
        state = read_state(folder.state(row.entry.name))
        lines = "\n".join(state.lines if state is not None else ())
        title = f"{row.entry.name} failed"
        sections.append(Section(title, f"<pre>{html.escape(lines)}</pre>"))
    sections += _provenance(folder, rows)
    path = out / "report.html"
    out.mkdir(exist_ok=True)
    write_text(path, _page(folder.path.name, sections))
    return path


def _comparable(folder: SweepFolder, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group evaluated runs by benchmark and tasks: only runs with equal ones can be compared."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        run_dir = folder.run_dir(row.entry.name)
        if (run_dir / "progress.json").exists() and row.success is not None:
            key = (custom_name(run_dir) or "Meta-World", *sorted(row.entry.tasks))
            found.setdefault(key, []).append(row)
    return {
        f"{file_name(benchmark)}-{len(tasks)}-tasks-{i}": members
        for i, ((benchmark, *tasks), members) in enumerate(found.items())
    }


def _comparison(
    folder: SweepFolder, rows: Sequence[Row], name: str, out: Path, best: Sequence[int]
) -> Section:
    """Compare runs with the same tasks like `mtrl-plot`; for a search, only the best points."""
    from mtrl.analysis.comparison import plot  # imports matplotlib
    from mtrl.analysis.style import COLORS

    benchmark = custom_name(folder.run_dir(rows[0].entry.name)) or "Meta-World"
    title = f"{len(rows[0].entry.tasks)} tasks of {benchmark}"
    methods = dict.fromkeys(row.entry.method for row in rows)
    if len(methods) > len(COLORS) and best:
        chosen = best[: len(COLORS)]
        rows = [row for row in rows if row.entry.trial in chosen]
        title += f", the best {len(chosen)} points"
    runs = [folder.run_dir(row.entry.name) for row in rows]
    firsts = {row.entry.method: row.entry for row in reversed(rows)}.values()
    labels = {str(folder.run_dir(first.name)): first.label for first in firsts if first.label}
    if len(set(labels.values())) < len(labels):  # of an earlier grid, which varied other fields
        labels = {}
    words = ["mtrl-plot", *(str(run) for run in runs), "-o", str(out)]
    if labels:
        words += ["--labels", *(f"{run}={label}" for run, label in labels.items())]
    command = f"<details><summary>command</summary><pre>{html.escape(shlex.join(words))}</pre>"
    try:
        comparison = plot(runs, labels=labels)
        comparison.save(out)
    except UsageError as error:  # such as too many methods: still write the rest of the page
        note = f'<p class="note">no comparison: {html.escape(str(error))}</p>'
        return Section(title, note + command + "</details>")
    skipped = "".join(f"<p>{html.escape(line)}</p>" for line in comparison.skipped)
    return Section(title, comparison._repr_html_() + skipped + command + "</details>")


def _provenance(folder: SweepFolder, rows: Sequence[Row]) -> list[Section]:
    """Return sections with the command, commit, packages and machine of every run."""
    versions: dict[str, str] = {}
    cells = []
    for row in rows:
        state = read_state(folder.state(row.entry.name))
        attempts = state.attempts if state is not None else ()
        processes = _processes(folder.run_dir(row.entry.name))
        machines = dict.fromkeys(_machine(process) for process in processes)
        packages = dict.fromkeys(fields(process.get("versions", {})) for process in processes)
        used = [versions.setdefault(text, f"V{len(versions) + 1}") for text in packages]
        commits = dict.fromkeys(attempt.commit or "–" for attempt in attempts)
        hosts = dict.fromkeys(attempt.host for attempt in attempts)
        score = "–" if row.success is None else f"{row.success:.3f}"
        cells.append(
            (
                row.entry.label or row.entry.method,
                str(row.entry.seed),
                row.what + (f": {row.why}" if row.why else ""),
                score,
                f"{row.seconds / 3600:.2f}",
                str(len(processes)),
                "\n".join(hosts),
                "\n".join(machines),
                "\n".join(commits),
                " ".join(used),
                command_line(row.entry.arguments),
            )
        )
    head = ("method", "seed", "state", "score", "hours", "processes", "host", "machine", "commit")
    runs = _table((*head, "packages", "command"), cells)
    names = _table(("", "packages"), [(name, text) for text, name in versions.items()])
    return [Section("Runs", runs), Section("Packages", names)]


def _processes(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((run_dir / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _machine(process: Mapping[str, Any]) -> str:
    machine = process.get("machine", {})
    parts = [machine.get("platform"), machine.get("instructions"), machine.get("gpu")]
    parts.append(f"{machine.get('cores')} cores")
    return ", ".join(str(part) for part in parts if part)


def fields(values: Mapping[str, Any]) -> str:
    """Return names with their values, as on a command line."""
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(text)}</th>" for text in head)]
    lines += ["".join(map(_cell, row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > 24 else ""  # only these break within words
    return f"<td{kind}><code>{html.escape(text)}</code></td>"


def _page(title: str, sections: Sequence[Section]) -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(
        (f"<h2>{html.escape(section.title)}</h2>" if section.title else "") + section.body
        for section in sections
    )
    heading = f"<h1>{html.escape(title)}</h1>"
    return f"<!doctype html><html><head>{head}</head><body>{heading}\n{body}</body></html>\n"
