"""Sweeps by Slurm: submitted scripts, and real runs where its daemons are installed."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from small_sweeps import HERE, command, has_started, never_interrupted, same_policy, wait_for

from mtrl.errors import UsageError
from mtrl.sweep import on_slurm
from mtrl.sweep.folder import SweepFolder, read_state

BATCH = """#!/bin/bash
#SBATCH --time=00:02:00
#SBATCH --cpus-per-task=1
#SBATCH --signal=B:USR1@60
exec {command}
"""


def test_the_script_is_the_template_with_the_command(tmp_path):
    folder = SweepFolder(tmp_path / "a sweep")
    text = on_slurm.script(folder, tmp_path / "names.txt", BATCH, retries=2)
    *head, last = text.splitlines()
    assert head == BATCH.splitlines()[:-1]
    assert last == (
        f"exec {sys.executable} -m mtrl.sweep.element '{folder.path}' {tmp_path}/names.txt 2"
    )


def test_sbatch_flags_do_not_override_the_template():
    found = on_slurm.flags(BATCH, count=12, cpus=3, at_a_time=5)
    assert "--array=0-11%5" in found and "--requeue" in found and "--cpus-per-task=3" in found
    assert not any(flag.startswith("--signal") for flag in found)
    bare = on_slurm.flags("#!/bin/bash\n{command}\n", count=1, cpus=1, at_a_time=None)
    assert "--array=0-0" in bare and f"--signal=B:USR1@{on_slurm.LEAD}" in bare


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "template: expected a batch script for --backend slurm, got none"),
        (["--template", "no.sbatch"], "template: cannot read no.sbatch"),
        (["--template", "empty.sbatch"], "template: expected {command} once"),
        (["--template", "good.sbatch", "--address", "auto"], "address: expected --backend ray"),
    ],
)
def test_an_invalid_template_is_rejected(tmp_path, monkeypatch, arguments, message):
    from mtrl.cli.sweep_options import parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.sbatch").write_text("#!/bin/bash\n")
    (tmp_path / "good.sbatch").write_text(BATCH)
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(["-o", "out", "--backend", "slurm", *arguments])
    (tmp_path / "gpu.sbatch").write_text(BATCH.replace("exec", "#SBATCH --gres=gpu:1\nexec"))
    sweep = parse(["-o", "out", "--backend", "slurm", "--template", "gpu.sbatch"])
    assert (sweep.device, sweep.cores) == ("cuda", 1)


def test_a_queued_run_that_has_left_the_grid_is_not_started(tmp_path):
    folder, names = SweepFolder(tmp_path / "sweep"), tmp_path / "names.txt"
    folder.make()
    names.write_text("gone_seed0\n")
    element = [sys.executable, "-m", "mtrl.sweep.element", str(folder.path), str(names), "1"]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(element, env=environment, capture_output=True, text=True, check=False)
    expected = "error: sweep: gone_seed0 is not started, because the sweep no longer has it"
    assert done.returncode == 1 and done.stderr == f"mtrl.sweep.element: {expected}\n"


@pytest.fixture
def slurm(tmp_path, request, monkeypatch):
    """Slurm with one node, for the duration of the test."""
    if shutil.which("slurmctld") is None or os.getuid() != 0:
        pytest.skip("needs root, and Debian's slurm-wlm and munge")
    script, where = request.config.rootpath / "scripts/slurm_one_node.sh", tmp_path / "slurm"
    subprocess.run([script, "start", where, "2"], check=True)
    monkeypatch.setenv("SLURM_CONF", str(where / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    yield where
    subprocess.run(["scancel", "--me"], check=False)
    subprocess.run([script, "stop", where], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("slurm")
def test_an_array_is_requeued_until_every_run_is_complete(tmp_path):
    """Stop both runs by the signal of the time limit, and on a slow machine by --max-runtime."""
    out, template = tmp_path / "sweep", tmp_path / "cluster.sbatch"
    template.write_text(BATCH.replace("00:02:00", "00:30:00"))
    flags = ["--backend", "slurm", "--template", str(template), "--max-parallel", "1"]
    sweep = command(out, "--surgery", "none", "pcgrad", "--max-runtime", "0.008", *flags)
    first, again = (
        subprocess.run(sweep, cwd=HERE, capture_output=True, text=True, check=True) for _ in "12"
    )
    (job,) = re.findall(r"submitted 2 runs as job (\d+);", first.stdout)
    assert "2 runs are already in the queue" in again.stdout
    folder = SweepFolder(out)
    names = [entry.name for entry in folder.contents().runs]

    def states():
        return [read_state(folder.state(name)) for name in names]

    for index, method in enumerate(("none", "pcgrad")):
        wait_for(has_started(out, method))
        subprocess.run(["scancel", "--signal=USR1", "--batch", f"{job}_{index}"], check=False)
    deadline = time.monotonic() + 2500
    while {state.what for state in states()} != {"finished"}:
        assert time.monotonic() < deadline and "failed" not in {s.what for s in states()}
        time.sleep(1)
    for name, method in zip(names, ("none", "pcgrad"), strict=True):
        assert len(read_state(folder.state(name)).attempts) > 1
        alone = never_interrupted(tmp_path / method, "--surgery", method)
        assert same_policy(folder.run_dir(name), alone)
    told = "".join(path.read_text() for path in out.glob("slurm/*_*.txt"))
    assert "is requeued as" in told
