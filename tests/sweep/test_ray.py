"""Sweeps on a Ray cluster of several nodes, all on this machine."""

import re
import subprocess

import pytest
from small_sweeps import HERE, command, has_started, never_interrupted, same_policy, wait_for

from mtrl.sweep.folder import SweepFolder, read_state

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def cluster(monkeypatch):
    """Ray cluster: a head without room for runs, and two nodes with one core each."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's default gives its workers low priority
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_runs_of_a_lost_node_continue_elsewhere_to_the_same_weights(cluster, tmp_path):
    out, flags = tmp_path / "sweep", ["--backend", "ray", "--address", cluster.address]
    sweep = command(out, "--surgery", "none", "pcgrad", *flags)
    with subprocess.Popen(sweep, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        wait_for(has_started(out, "none"), process)
        wait_for(has_started(out, "pcgrad"), process)  # one on each node
        cluster.remove_node(cluster.workers[0], allow_graceful=False)
        printed, _ = process.communicate(timeout=1000)
    assert process.returncode == 0, printed
    lost = re.findall(r"(\S+) was lost with its machine and continues from step_\d+", printed)
    assert len(lost) == 1 and "2 runs: 2 finished" in printed
    for method in ("none", "pcgrad"):
        (run,) = out.glob(f"runs/*_{method}_*")
        assert same_policy(run, never_interrupted(tmp_path / method, "--surgery", method))
        state = read_state(SweepFolder(out).state(run.name))
        assert len(state.attempts) == 1 + (run.name in lost)


def test_an_address_where_nothing_listens_is_told_at_once(tmp_path):
    from mtrl.errors import UsageError
    from mtrl.sweep.on_ray import RayBackend

    with pytest.raises(UsageError, match=r"address: cannot reach 127\.0\.0\.1:1: .*refused"):
        RayBackend(SweepFolder(tmp_path), "127.0.0.1:1", cpus=1)


def test_a_folder_unseen_by_a_node_and_a_run_too_large_are_rejected(cluster, tmp_path, monkeypatch):
    """Reject before anything starts. All nodes are one machine, so remove the token instead."""
    from mtrl.errors import UsageError
    from mtrl.sweep.on_ray import RayBackend

    folder = SweepFolder(tmp_path / "sweep")
    folder.make()
    with pytest.raises(UsageError, match="cpus_per_run: expected a run to fit on a node, got 4"):
        RayBackend(folder, cluster.address, cpus=4)
    with pytest.raises(UsageError, match=r"gpus_per_run: .* on a node, got 0\.5"):
        RayBackend(folder, cluster.address, cpus=1, gpus=0.5)
    monkeypatch.setattr("pathlib.Path.touch", lambda *_, **__: None)
    with pytest.raises(UsageError, match="out: expected a folder that all nodes share, got"):
        RayBackend(folder, cluster.address, cpus=1)
