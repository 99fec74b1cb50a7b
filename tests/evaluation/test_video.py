"""Videos show the evaluated episodes, upright, and do not change results."""

import dataclasses
import io
import json

import imageio_ffmpeg
import numpy as np
import pytest
from metaworld.policies import ENV_POLICY_MAP
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtrl import train
from mtrl.cli.eval import main as eval_main
from mtrl.cli.train import main as train_main
from mtrl.config.train import TrainConfig
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.errors import UsageError
from mtrl.evaluation.scores import Evaluation
from mtrl.evaluation.video import animations, film, find_backend

TASK, STEPS, SEED = "handle-press-side-v3", 72, 4


def can_draw() -> bool:
    try:
        return bool(find_backend())
    except UsageError:
        return False


draws = pytest.mark.skipif(not can_draw(), reason="needs EGL or OSMesa")


@pytest.fixture(scope="module")
def judged() -> Evaluation:
    """First episode of an expert, which succeeds."""
    env = MetaWorldTask(TASK, STEPS, shuffle_goals=False)
    observation, _ = env.reset(seed=SEED)
    expert, actions, total, first = ENV_POLICY_MAP[TASK](), [], 0.0, 0
    for step in range(1, STEPS + 1):
        chosen = np.clip(expert.get_action(observation.astype(float)), -1, 1)
        actions.append(chosen.astype(np.float32))
        observation, reward, _, _, info = env.step(actions[-1])
        total += reward
        first = first or (step if info["success"] else 0)
    assert 2 < first < STEPS - 2
    values = np.array([[first]]), np.array([[total]]), np.array(actions)[None, None]
    return Evaluation((TASK,), SEED, *values)


def read(path) -> tuple[dict, np.ndarray]:
    frames = imageio_ffmpeg.read_frames(path)
    about = next(frames)
    shape = (*about["size"][::-1], 3)
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(shape) for frame in frames])


@draws
def test_a_video(judged, tmp_path):
    (path,) = film(judged, tmp_path / "new", "corner2")
    assert path == tmp_path / "new" / f"{TASK}.mp4" and [path] == list(path.parent.iterdir())
    about, frames = read(path)
    assert about["codec"] == "h264" and about["size"] == (480, 480) and about["fps"] == 40
    assert len(frames) == 1 + STEPS // 2  # the start, then every other step: real time at 80 Hz
    # The caption turns green in the first frame at or after the first success.
    band = frames[:, :78].astype(int)
    is_green = (band[..., 1] - band[..., 0] > 100).sum((1, 2)) > 100
    first = judged.first_success[0, 0]
    assert is_green.tolist() == [2 * k >= first for k in range(len(frames))]
    # Nothing is above the horizon, although this camera is upside down.
    above, below = frames[0, 90:110].std((0, 1)), frames[0, -20:].std((0, 1))
    assert above.max() < 3 and below.min() > 20
    moved = np.abs(frames[-1, 90:].astype(int) - frames[0, 90:]).mean()
    assert moved > 1


@draws
def test_small_animations(judged):
    gif = Image.open(io.BytesIO(animations(judged)[TASK]))
    assert gif.size == (160, 160) and gif.is_animated and gif.info["loop"] == 0
    assert gif.n_frames == 2 + STEPS // 16  # including the first and the last frame
    assert gif.info["duration"] == 100  # 16 steps of 1/80 s at twice the speed


@draws
def test_a_replay_that_differs_from_the_evaluation_is_rejected(judged, tmp_path):
    other = dataclasses.replace(judged, returns=np.nextafter(judged.returns, np.inf))
    with pytest.raises(ChildProcessError, match=f"video of {TASK}: RuntimeError: expected episode"):
        film(other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_renderer_is_reported_before_anything_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MUJOCO_GL", "crayons")
    with pytest.raises(UsageError, match="video: expected MUJOCO_GL=crayons for rendering"):
        find_backend()
    monkeypatch.chdir(tmp_path)
    commands = (
        (eval_main, ["no-policy", "--video", "films"]),
        (train_main, ["--eval-video", "true", "--benchmark", "mt1:reach-v3"]),
    )
    for main, arguments in commands:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "expected MUJOCO_GL=crayons" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@draws
def test_results_are_the_same_with_videos(policy, tmp_path, capsys):
    arguments = [str(policy), "--episodes", "2", "--stochastic", "--tasks", "push-v3"]
    assert eval_main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    assert (
        eval_main(
            [*arguments, "--json", str(tmp_path / "b.json"), "--csv", str(tmp_path / "b.csv")]
            + ["--video", str(tmp_path / "v"), "--video-episodes", "2", "--camera", "topview"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a == b and b["stochastic"] is True
    header, row = (tmp_path / "b.csv").read_text().splitlines()
    assert row.split(",")[header.split(",").index("return_mean")] == str(
        b["tasks"][0]["return_mean"]
    )
    assert f"videos: {tmp_path / 'v'}" in printed
    _, frames = read(tmp_path / "v" / "push-v3.mp4")
    assert len(frames) == 2 * (1 + 20 // 2)


@draws
def test_videos_in_tensorboard_and_a_failed_one_is_ignored(monkeypatch, tmp_path, capsys):
    calls = []

    def first_fails(evaluation: Evaluation) -> dict[str, bytes]:
        calls.append(evaluation)
        if len(calls) == 1:
            raise ChildProcessError("video of reach-v3: no paint left")
        return animations(evaluation)

    monkeypatch.setattr("mtrl.evaluation.video.animations", first_fails)
    config = {
        "benchmark": "mt1:reach-v3",
        "total_timesteps": 200,
        "learning_starts": 100,
        "eval_every": 100,
        "eval_episodes": 1,
        "eval_video": True,
        "run_dir": tmp_path / "run",
        "agent": {"hidden_sizes": [8]},
        "learner": {"batch_size": 8},
        "environment": {"horizon": 10},
    }
    assert train(TrainConfig.model_validate(config)).evaluation is not None
    assert (
        "no videos of this evaluation: video of reach-v3: no paint left" in capsys.readouterr().out
    )
    (shown,) = EventAccumulator(str(tmp_path / "run")).Reload().Images("eval/video/reach-v3")
    gif = Image.open(io.BytesIO(shown.encoded_image_string))
    assert shown.step == 200 and gif.format == "GIF" and gif.n_frames == 2
