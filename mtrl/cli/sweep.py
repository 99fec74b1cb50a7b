"""`mtrl-sweep`: run many trainings on this machine or a cluster, with status and report."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrl.cli.flags import Parser, run
from mtrl.cli.sweep_options import Sweep, parse
from mtrl.errors import UsageError, one_line
from mtrl.folder import write_text
from mtrl.sweep.attempt import Job, command_line
from mtrl.sweep.drive import Backend, Summary, drive
from mtrl.sweep.folder import Entry, SweepFolder
from mtrl.sweep.grid import Point, points, with_copies
from mtrl.sweep.jobs import Known, Planned, job_of, placed
from mtrl.sweep.local import Local, shares
from mtrl.sweep.rules import expect_tag
from mtrl.sweep.search import Search, best_points, corners
from mtrl.sweep.status import Live, read, summary, table
from mtrl.training.check import check, check_elsewhere
from mtrl.training.console import say
from mtrl.training.place import quoted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["status"]:
        return run("mtrl-sweep status", _status, given[1:])
    if given[:1] == ["report"]:
        return run("mtrl-sweep report", _report, given[1:])
    return run("mtrl-sweep", _sweep, given)


def _status(arguments: Sequence[str] | None) -> int:
    print(table(read(_folder("status", "Show the progress of a sweep.", arguments))))
    return 0


def _report(arguments: Sequence[str] | None) -> int:
    from mtrl.sweep.report import write_report

    what = "Write figures, a table and report.html of a sweep."
    path = write_report(_folder("report", what, arguments))
    if path is None:
        raise UsageError("sweep: expected a run with an evaluation, got none")
    print(path)
    return 0


def _folder(command: str, what: str, arguments: Sequence[str] | None) -> SweepFolder:
    parser = Parser(prog=f"mtrl-sweep {command}", description=what)
    parser.add_argument("sweep", metavar="DIR", help="Folder of the sweep.")
    return SweepFolder(Path(parser.parse(arguments)["sweep"]).expanduser().absolute())


def _sweep(arguments: Sequence[str] | None) -> int:
    sweep = parse(arguments)
    known: dict[str, Known] = {}
    if sweep.options.search is None:
        planned, copies = _planned(sweep, known)
    else:
        planned, copies = [], {}
        for drawn in corners(sweep.plan):
            _planned(sweep, known, drawn)
    sweep.rules.expect_steps(max(each.total for each in known.values()))
    if sweep.options.dry_run:
        return _show(sweep, planned, copies)
    with sweep.folder.alone():
        if sweep.options.search is None:
            _write(sweep, [plan.entry for plan in planned], copies)
            jobs = _waiting(sweep, planned)
            done = sum(plan.is_done for plan in planned)
            say(f"{len(planned)} runs in {sweep.folder.path}, {done} of them already done")
        else:
            jobs = _drawn(sweep, known)
        say(f"watch: tensorboard --logdir {quoted(sweep.folder.path / 'runs')}")
        if sweep.options.backend == "slurm":
            return _submit(sweep, [job.name for job in jobs])
        live = Live(sweep.folder)
        found = drive(jobs, _backend(sweep), sweep.options.retries, live, live.tell)
        live.clear()
        return _end(sweep, found)


def _planned(
    sweep: Sweep,
    known: dict[str, Known],
    drawn: Mapping[str, Any] | None = None,
    trial: int | None = None,
) -> tuple[list[Planned], dict[Path, str]]:
    """Return the checked points, and the copies of files that they start from."""
    found = points(sweep.plan, sweep.device, drawn)
    for point in found:
        if point.method not in known:
            known[point.method] = _checked(point, sweep, len(found) * (sweep.options.search or 1))
    found, copies = with_copies(found, sweep.folder.path / "configs")
    placement = placed(
        sweep.folder, found, sweep.cores, known=known, rules=sweep.rules, trial=trial
    )
    return placement, copies


def _checked(point: Point, sweep: Sweep, n_runs: int) -> Known:
    """Check a method of `n_runs` as `mtrl-train` would, before anything starts."""
    try:
        if sweep.options.backend == "local":
            benchmark = check(point.config, runs=min(sweep.at_a_time or 1, n_runs))[0]
        else:
            benchmark = check_elsewhere(point.config)
        sweep.rules.expect_tags(benchmark.tasks)
        if sweep.options.search is not None:
            expect_tag("goal", sweep.options.goal, benchmark.tasks)
    except UsageError as error:
        where = f" (of {point.label})" if point.label else ""
        raise UsageError(f"{error}{where}") from None
    return Known(point.config.schedule(len(benchmark.tasks)).total_timesteps, benchmark.tasks)


def _show(sweep: Sweep, planned: Sequence[Planned], copies: Mapping[Path, str]) -> int:
    if sweep.options.search is not None:
        raise UsageError("dry_run: expected a grid, because a search chooses its points later")
    for path in copies:
        print(f"# the sweep writes {quoted(path)}, a copy of the values that runs start from")
    for plan in planned:
        note = "# done: " if plan.is_done else ""
        print(note + command_line(plan.entry.arguments))
    return 0


def _write(sweep: Sweep, entries: Sequence[Entry], copies: Mapping[Path, str]) -> None:
    for path, text in copies.items():
        write_text(path, text)
    goal = None if sweep.options.search is None else sweep.options.goal
    sweep.folder.record(entries, sweep.rules, goal)


def _waiting(sweep: Sweep, planned: Sequence[Planned]) -> Iterator[Job]:
    for plan in planned:
        if not plan.is_done:
            yield job_of(sweep.folder, plan.entry, sweep.rules, Path.cwd())


def _drawn(sweep: Sweep, known: dict[str, Known]) -> Iterator[Job]:
    """Yield the runs of a search; a point is drawn when there is room for its first run."""
    search = Search(sweep.folder, sweep.plan, sweep.options.goal)
    entries: list[Entry] = []
    for number in range(sweep.options.search or 0):
        drawn = search.drawn(number)
        try:
            planned, copies = _planned(sweep, known, drawn, number)
        except UsageError as error:
            say(f"point {number} is invalid: {error}")
            search.failed(number)
            continue
        entries += [plan.entry for plan in planned]
        _write(sweep, entries, copies)
        yield from _waiting(sweep, planned)


def _backend(sweep: Sweep) -> Backend:
    options = sweep.options
    if options.backend == "ray":
        from mtrl.sweep.on_ray import RayBackend

        if 0 < options.gpus_per_run < 1:
            several = int(1 / options.gpus_per_run)
            say(f"{several} runs share a GPU; its memory is not divided between them")
        return RayBackend(
            sweep.folder,
            options.address,
            cpus=sweep.cores,
            gpus=options.gpus_per_run,
            at_a_time=sweep.at_a_time,
        )
    return Local(shares(sweep.at_a_time or 1, sweep.cores))


def _submit(sweep: Sweep, names: Sequence[str]) -> int:
    """Submit runs to Slurm, except those that are still queued from an earlier array."""
    from mtrl.sweep.on_slurm import submit, waiting

    entries = [entry for entry in sweep.folder.contents().runs if entry.name in set(names)]
    queued = waiting(sweep.folder, entries)
    entries = [entry for entry in entries if entry.name not in queued]
    if queued:
        say(f"{len(queued)} runs are already in the queue")
    if not entries:
        say("nothing to submit")
        return 0
    job = submit(
        sweep.folder,
        entries,
        sweep.batch,
        cpus=sweep.cores,
        at_a_time=sweep.at_a_time,
        retries=sweep.options.retries,
    )
    say(f"submitted {len(entries)} runs as job {job}; cancel them with: scancel {job}")
    say(f"progress: mtrl-sweep status {quoted(sweep.folder.path)}")
    say(f"results: mtrl-sweep report {quoted(sweep.folder.path)}")
    return 0


def _end(sweep: Sweep, found: Summary) -> int:
    """Print a summary, and write the report."""
    from mtrl.sweep.report import fields, write_report

    for number, score, drawn in best_points(sweep.folder, 3):
        say(f"point {number}: {score:.3f} with {fields(drawn)}")
    try:
        if (page := write_report(sweep.folder)) is not None:
            say(f"report: {page}")
    except OSError as error:  # such as a full disk
        say(f"no report: {one_line(error)}")
    rows = read(sweep.folder)
    say(summary(rows))
    if found.signal is not None or any(row.what == "stopped" for row in rows):
        say("to continue, run the same command again")
    if found.signal is not None:
        return 128 + found.signal
    return 1 if any(row.what == "failed" for row in rows) or found.having("lost") else 0


if __name__ == "__main__":
    sys.exit(main())
