"""The real commands on the real simulator, from an empty folder to an evaluated policy."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtrl import Policy
from mtrl import train as train_in_python
from mtrl.analysis.conflicts import conflict_fraction
from mtrl.analysis.cosines import read_cosines
from mtrl.cli.eval import main as eval_main
from mtrl.cli.export import main as export_main
from mtrl.cli.plot import main as plot
from mtrl.cli.train import main as train_main
from mtrl.config.train import TrainConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.evaluation.protocol import evaluate
from mtrl.folder import newest_checkpoint, write_atomically, write_text
from mtrl.policy.export import card
from mtrl.sac.agent import MTSAC
from mtrl.training.checkpoint import load_checkpoint
from mtrl.training.pace import STAGES

TASKS = ("drawer-close-v3", "reach-v3")
SETTINGS = (
    "--config plain --surgery rotograd --rotation-lr 0.1 "
    "--trunk residual --hidden-sizes 16 16 --layer-norm true "
    "--task-embedding 4 --normalize-observations true --critic-bins 21 --return-scale 5 "
    "--return-memory 3 --weight-decay 0.01 --total-timesteps 1200 --learning-starts 300 "
    "--horizon 30 --batch-size 16 --eval-every 500 --eval-episodes 2 "
    "--checkpoint-every 400 --log-every 200 --diagnose-every 400"
).split()


def command(name: str, *arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name(name)), *map(str, arguments)]


def run(main: Callable[[Sequence[str]], int], *arguments: object) -> str:
    """Run a command in this process, which has imported what a new one would import again."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main(list(map(str, arguments))) == 0
    return printed.getvalue()


def flags(run_dir: Path, seed: int) -> list[object]:
    return ["--tasks", *TASKS, *SETTINGS, "--seed", seed, "--run-dir", run_dir]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in a process of its own, and its output."""
    run_dir = tmp_path_factory.mktemp("runs") / "a"
    started = command("mtrl-train", *flags(run_dir, 1))
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


def policy(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policy_final.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_run_folder(finished):
    run_dir, printed = finished
    names = {path.name for path in run_dir.glob("[!.]*") if "tfevents" not in path.name}
    assert names == {
        "benchmark.json",
        "config.yaml",
        "run.json",
        "progress.csv",
        "progress.json",
        "cosines.jsonl",
        "checkpoints",
        "policy_final.safetensors",
        "eval.csv",
        "eval.json",
    }
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == ["step_000000000800.safetensors", "step_000000001200.safetensors"]
    config = TrainConfig.from_yaml(run_dir / "config.yaml")
    assert config.tasks == TASKS and config.learner.surgery == "rotograd" and config.seed == 1
    (process,) = json.loads((run_dir / "run.json").read_text())
    assert "--surgery" in process["command"] and process["versions"]["metaworld"]
    simulators = process["simulators"]
    assert tuple(simulators) == TASKS and {"metaworld", "envpool"} >= set(simulators.values())
    native = list(simulators.values()).count("envpool")
    assert (f"{native} of {len(TASKS)} tasks on EnvPool" in printed) == (native > 0)
    assert "1,200/1,200 steps" in printed and "mean" in printed
    modes = {path.stat().st_mode for path in run_dir.glob("[cp]*.*")}
    assert len(modes) == 1  # a policy has the permissions of the configuration


def test_tensorboard_has_every_documented_tag(finished):
    run_dir, _ = finished
    events = EventAccumulator(str(run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    for task in TASKS:
        for tag in (
            "eval/success_rate",
            "rollout/success_rate",
            "rollout/ep_rew_mean",
            "train/critic_loss",
            "train/actor_loss",
            "train/alpha",
            "train/critic_weight",
            "train/actor_weight",
        ):
            assert f"{tag}/{task}" in tags
    for network in ("actor", "critic1", "critic2"):
        for measure in (
            "conflict_fraction",
            "cosine_mean",
            "magnitude_similarity",
            "scale_spread",
            "effective_rank",
            "curvature",
            "conflict_after_surgery",
            "conflict_after_step",
        ):
            seen = events.Scalars(f"surgery/{network}/{measure}")
            assert [event.step for event in seen] == [400, 800, 1200]
        pictures = events.Images(f"surgery/{network}/cosines")
        assert [event.step for event in pictures] == [400, 800, 1200]
        assert f"surgery/{network}/conflicts/text_summary" in events.Tags()["tensors"]
    assert {"eval/success_rate/mean", "eval/success_rate/worst", "time/fps"} <= tags
    assert "time/updates_per_second" in tags
    shares = [events.Scalars(f"time/share/{stage}") for stage in STAGES]
    for parts in zip(*shares, strict=True):
        assert sum(part.value for part in parts) == pytest.approx(1)
    steps = [event.step for event in events.Scalars("eval/success_rate/mean")]
    assert steps == [500, 1000, 1200]  # environment steps over all tasks
    assert [event.step for event in events.Scalars("time/fps")] == list(range(200, 1201, 200))
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_runs_can_be_plotted_from_their_files(finished, tmp_path, capsys):
    run_dir, _ = finished
    assert (
        plot([str(run_dir), "--cosine", str(run_dir), "--x", "updates", "-o", str(tmp_path)]) == 0
    )
    stored = json.loads((run_dir / "eval.json").read_text())
    with (tmp_path / "table.csv").open() as file:
        table = {row["quantity"]: row for row in csv.DictReader(file)}
    assert float(table["mean"]["value"]) == pytest.approx(stored["mean_success_rate"])
    assert float(table["updates"]["value"]) == stored["updates"] == (1200 - 300) / 2
    for row in stored["tasks"]:
        assert float(table[row["task"]]["high"]) == pytest.approx(row["wilson_high"])
    assert "| rotograd |" in capsys.readouterr().out
    steps, cosines, tasks = read_cosines(run_dir)
    assert tasks == TASKS
    events = EventAccumulator(str(run_dir)).Reload()
    for network in ("actor", "critic1", "critic2"):
        assert (tmp_path / f"cosines_{network}.pdf").exists()
        logged = events.Scalars(f"surgery/{network}/conflict_fraction")
        assert [event.step for event in logged] == steps.tolist()
        fractions = conflict_fraction(cosines[network])
        assert fractions.tolist() == pytest.approx([event.value for event in logged])


def test_the_rotations_have_changed_and_are_in_the_policy(finished):
    run_dir, _ = finished
    agent = MTSAC.load(run_dir / "policy_final.safetensors")
    for rotation in (*agent.actor.rotations(), *agent.critics.rotations()):
        eye = torch.eye(16)
        assert (rotation - eye).abs().amax((1, 2)).min() > 1e-3
        torch.testing.assert_close(rotation.mT @ rotation, eye.expand(2, 16, 16))


def test_csv_and_json_agree(finished):
    run_dir, _ = finished
    rows = [json.loads(line) for line in (run_dir / "progress.json").read_text().splitlines()]
    with (run_dir / "progress.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["time/total_timesteps"]) for row in table] == [
        row["time/total_timesteps"] for row in rows
    ]
    for line, row in zip(table, rows, strict=True):
        assert {k: float(v) for k, v in line.items() if v} == pytest.approx(row)
    assert rows[-1]["time/total_timesteps"] == 1200
    updates = [row["time/updates"] for row in rows if "time/updates" in row]
    assert updates[-1] == (1200 - 300) / 2  # one per vector step after learning_starts


def test_final_evaluation_agrees_with_mtrl_eval_and_python(finished, tmp_path):
    run_dir, _ = finished
    stored = json.loads((run_dir / "eval.json").read_text())
    assert [row["episodes"] for row in stored["tasks"]] == [50, 50]
    printed = run(eval_main, run_dir, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["tasks"] == stored["tasks"] and "worst fifth" in printed
    agent = MTSAC.load(run_dir / "policy_final.safetensors")
    result = evaluate(
        agent, get_benchmark("", TASKS[1:]), seed=1, episodes=50, horizon=30, workers=1
    )
    assert result.rows() == stored["tasks"][1:]
    other = run(eval_main, newest_checkpoint(run_dir), "--tasks", TASKS[0], "--episodes", 3)
    assert TASKS[0] in other and TASKS[1] not in other


def test_an_exported_policy_has_the_evaluation_of_the_run(finished, tmp_path):
    run_dir, _ = finished
    shared = tmp_path / "shared.safetensors"
    assert export_main([str(run_dir), "-o", str(shared)]) == 0
    rows = []
    for source in (run_dir, shared):
        file = str(tmp_path / "result.json")
        assert eval_main([str(source), "--episodes", "4", "--json", file]) == 0
        rows.append(json.loads(Path(file).read_text())["tasks"])
    assert rows[0] == rows[1]
    _, header = Policy.load_with_header(shared)
    stored = json.loads((run_dir / "eval.json").read_text())
    assert header.evaluation is not None and header.versions["torch"] == version("torch")
    means = [row.return_mean for row in header.evaluation.tasks]
    assert means == [row["return_mean"] for row in stored["tasks"]]
    agent = MTSAC.load(run_dir / "policy_final.safetensors")
    observations = np.random.default_rng(0).normal(size=(2, 39))
    actions = [x.predict(observations, deterministic=True)[0] for x in (agent, Policy.load(shared))]
    np.testing.assert_allclose(*actions, atol=1e-6)  # the rotations are folded in

    assert f"| {TASKS[0]} | 50 |" in card(shared)
    earlier = newest_checkpoint(run_dir)
    assert "| task |" not in card(earlier)  # results are those of the final policy


def test_equal_seeds_are_bitwise_equal_and_others_differ(finished, tmp_path):
    run_dir, _ = finished
    run(train_main, *flags(tmp_path / "b", 1), "--workers", 1, "--log-every", 300)
    run(train_main, *flags(tmp_path / "c", 2))
    assert same(policy(run_dir), policy(tmp_path / "b"))
    assert not same(policy(run_dir), policy(tmp_path / "c"))
    a, b = (json.loads((d / "eval.json").read_text()) for d in (run_dir, tmp_path / "b"))
    assert a["tasks"] == b["tasks"]


def curve(run_dir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir)).Reload()
    return [(e.step, e.value) for e in events.Scalars(f"train/critic_loss/{TASKS[0]}")]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGKILL,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, number):
    """Weights, logs and evaluation of both are equal."""
    run_dir, _ = finished
    stopped = tmp_path / "stopped"
    with subprocess.Popen(
        command("mtrl-train", *flags(stopped, 1)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("800/"):
                break
        while number == signal.SIGKILL and not list(
            stopped.glob("checkpoints/step_*800.safetensors")
        ):
            time.sleep(0.01)
        # As from a terminal or scheduler: to the whole group, including simulators.
        os.killpg(process.pid, number)
        rest = process.stdout.read()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not (stopped / "policy_final.safetensors").exists()
    steps = load_checkpoint(newest_checkpoint(stopped))[0]["steps"]
    if number == signal.SIGKILL:
        assert steps == 800
    else:
        assert f"--resume {stopped}" in rest and 800 <= steps < 1200
    assert "Traceback" not in rest

    run(train_main, "--resume", stopped)
    assert same(policy(run_dir), policy(stopped))
    assert (stopped / "eval.csv").read_text() == (run_dir / "eval.csv").read_text()
    assert curve(stopped) == curve(run_dir)
    assert (stopped / "cosines.jsonl").read_text() == (run_dir / "cosines.jsonl").read_text()
    rows = [json.loads(line) for line in (stopped / "progress.json").read_text().splitlines()]
    logged = [row["time/total_timesteps"] for row in rows if "time/fps" in row]
    assert logged == list(range(200, 1201, 200))
    assert len(json.loads((stopped / "run.json").read_text())) == 2


def test_a_complete_run_is_only_extended(finished, capsys):
    run_dir, _ = finished
    assert train_main(["--resume", str(run_dir)]) == 2
    said = capsys.readouterr().err
    assert "is complete with 1200 steps" in said and said.count("\n") == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_single_task_and_a_single_head_train(tmp_path):
    for tasks, heads in ((("mt1:reach-v3", None), "multi"), (("mt10", TASKS), "single")):
        config = TrainConfig.model_validate(
            {
                "benchmark": tasks[0],
                "tasks": tasks[1],
                "total_timesteps": 200,
                "learning_starts": 100,
                "run_dir": tmp_path / heads,
                "agent": {"heads": heads, "hidden_sizes": [8]},
                "learner": {"batch_size": 8, "surgery": "pcgrad"},
                "diagnose_every": 100,
                "environment": {"horizon": 10},
            }
        )
        outcome = train_in_python(config)
        assert outcome.evaluation is not None and outcome.evaluation.success.shape[1] == 50
