"""Run folders as left by training, written by the real logger without training."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtrl.config.train import TrainConfig
from mtrl.envs.benchmarks import Benchmark, get_benchmark
from mtrl.envs.record import record_of
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import write_benchmark
from mtrl.training import report
from mtrl.training.logger import RunLogger

NETWORKS = ("critic1", "critic2", "actor")


def write_run(
    folder: Path,
    config: TrainConfig,
    stop_at: int | None = None,
    hours: float = 10.0,
    benchmark: Benchmark | None = None,
    tells_success: bool | Sequence[bool] = True,
) -> Path:
    """Write a run, killed at `stop_at` if given, before its last evaluation."""
    benchmark = benchmark or get_benchmark(config.benchmark, config.tasks)
    tasks, n_tasks = benchmark.tasks, len(benchmark.tasks)
    schedule = config.schedule(n_tasks)
    config = config.model_copy(update=dataclasses.asdict(schedule))
    total = schedule.total_timesteps
    surgery = config.learner.surgery
    rng = np.random.default_rng([config.seed, zlib.crc32(surgery.encode())])
    easy = np.random.default_rng(7).uniform(size=n_tasks)
    quality = {"none": 0.0, "pcgrad": 0.12, "rotograd": 0.22}.get(surgery, 0.05)
    plateau = np.clip(easy * 1.3 - 0.15 + quality + rng.normal(0, 0.08, n_tasks), 0, 1)
    half = np.clip(rng.lognormal(-1.2 - 2 * quality, 0.5, n_tasks) * (1.6 - easy), 0.03, 2)

    def rates(steps: int) -> np.ndarray:
        wobble = rng.normal(0, 0.05, n_tasks)
        return np.clip(plateau / (1 + np.exp(-6 * (steps / total / half - 1))) + wobble, 0, 1)

    def evaluate(steps: int, episodes: int) -> Evaluation:
        success = rng.random((n_tasks, episodes)) < rates(steps)[:, None]
        returns = 100.0 * success * (1 + np.arange(n_tasks))[:, None]  # each task has its own scale
        actions = np.zeros((*success.shape, 0, 4))
        found = Evaluation(tasks, 0, success.astype(int), returns, actions, told)
        report.evaluation(logger, steps, found, video=False)
        return found

    def diagnose(steps: int) -> None:
        matrices = {}
        for n, network in enumerate(NETWORKS):
            groups = np.random.default_rng(n).normal(size=(n_tasks, 6))
            gradients = (1 + 2 * steps / total) * groups @ rng.normal(size=(6, 60)) / 6
            gradients += rng.normal(size=(n_tasks, 60)) + 0.3
            gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
            matrices[network] = gradients @ gradients.T
        logger.cosines(steps, matrices)

    told = np.broadcast_to(tells_success, n_tasks)
    folder.mkdir(parents=True)
    write_benchmark(folder, record_of(benchmark, told.tolist()))
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    logger = RunLogger(folder, total, config, tasks)
    every = (schedule.log_every, schedule.diagnose_every, schedule.eval_every)
    marks = sorted({step for each in every if each for step in range(each, total + 1, each)})
    updates = 0
    for steps in marks:
        if stop_at is not None and steps > stop_at:
            break
        updates = max(0, steps - schedule.learning_starts) // n_tasks
        if steps % schedule.log_every == 0:
            clock = {
                "time/fps": 100.0,
                "time/updates": float(updates),
                "time/elapsed": 3600 * hours * steps / total,
            }
            episodes = zip(tasks, rates(steps).tolist(), strict=True)
            logger.write(
                steps, clock | {f"rollout/success_rate/{task}": rate for task, rate in episodes}
            )
        if schedule.diagnose_every and steps % schedule.diagnose_every == 0:
            diagnose(steps)
        if steps % schedule.eval_every == 0 and steps < total:
            evaluate(steps, config.eval_episodes)
    if stop_at is None:
        result = evaluate(total, 50)
        (folder / "eval.csv").write_text(result.to_csv(), encoding="utf-8")
        context = {"total_timesteps": total, "updates": updates, "seconds": 3600 * hours}
        (folder / "eval.json").write_text(result.to_json(**context), encoding="utf-8")
        logger.finish()
    logger.close()
    return folder
