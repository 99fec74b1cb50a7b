"""Training from demonstrations: contents of batches, reward scale, and resumed runs."""

import json

import numpy as np
import pytest
import torch
from own_tasks import REACHERS
from safetensors.torch import load_file
from small_runs import HORIZON, TASKS, small_config

from mtrl import Demonstrations, collect, experts, get_benchmark, resume, train
from mtrl.cli.train import main as train_main
from mtrl.demonstrations.sources import sources
from mtrl.errors import UsageError
from mtrl.sac.demonstrated import Demonstrated
from mtrl.sac.replay import ReplayBuffer
from mtrl.sac.reward_scale import RewardScale


def numbered(tasks, lengths) -> Demonstrations:
    """Return rows with observation, reward and successor 1000 + i; last rows are terminal."""
    n = sum(lengths)
    count = 1000.0 + np.arange(n)
    ends = np.zeros(n, bool)
    ends[np.cumsum(lengths) - 1] = True
    return Demonstrations(
        tuple(tasks),
        np.repeat(np.arange(len(tasks)), lengths),
        count[:, None],
        np.zeros((n, 1)),
        count,
        count[:, None] + 0.5,
        ends,
        np.zeros(n, bool),
    )


def test_a_batch_has_its_share_with_uniformly_sampled_rows():
    """Tasks "a" and "c" have 3 and 5 transitions, "b" none; "other" is not in the run."""
    shown = numbered(("other", "c", "a"), (4, 5, 3))
    tasks = ("a", "b", "c")
    kept = Demonstrated(shown, tasks, 0.25, "cpu")
    replay = ReplayBuffer(20, 3, 1, 1, demonstrations=kept, seed=3)
    for step in range(30):  # the ring is overwritten; demonstrations stay
        own = np.full((3, 1), float(step))
        done = np.zeros(3, bool)
        replay.add(own, np.ones((3, 1)), own[:, 0], done, own + 1, done=done)
    batch = replay.sample(8_000)
    assert batch.observations.shape == (3, 8_000, 1)
    theirs = batch.observations[..., 0] >= 1000
    assert theirs.sum(1).tolist() == [2_000, 0, 2_000]
    rewards, observations = batch.rewards, batch.observations[..., 0]
    torch.testing.assert_close(rewards, observations)
    after = torch.where(theirs, 0.5, 1.0)  # in the ring, the value of the next row
    torch.testing.assert_close(batch.next_observations[..., 0], observations + after)
    torch.testing.assert_close(batch.actions[..., 0], (~theirs).float())
    for task, rows in ((0, range(1009, 1012)), (2, range(1004, 1009))):
        found, counts = observations[task][theirs[task]].unique(return_counts=True)
        assert found.tolist() == list(rows)
        expected = 2_000 / len(rows)
        assert ((counts - expected).abs() < 5 * expected**0.5).all()
        last = observations[task] == rows[-1]
        torch.testing.assert_close(batch.terminated[task], last.float())


def test_without_demonstrations_a_batch_is_unchanged():
    """The ring is sampled first, so its rows are the same."""
    shown = numbered(("a",), (4,))
    batches = []
    for kept in (None, Demonstrated(shown, ("a",), 0.5, "cpu")):
        replay = ReplayBuffer(20, 1, 1, 1, demonstrations=kept, seed=3)
        for step in range(9):
            own, done = np.full((1, 1), float(step)), np.zeros(1, bool)
            replay.add(own, own, own[:, 0], done, own, done=done)
        batches.append(replay.sample(10).observations[0, :, 0])
    torch.testing.assert_close(batches[0][5:], batches[1][5:])
    assert (batches[1][:5] >= 1000).all()


@pytest.mark.parametrize("memory", [None, 3])
def test_the_return_scale_includes_demonstrations(memory):
    gamma, share, magnitude = 0.9, 0.25, 2.0
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=11), (4, 7)

    def peak(values) -> float:
        return max(
            abs(sum(gamma ** (t - k) * values[k] for k in range(t + 1))) for t in range(len(values))
        )

    shown = numbered(("a", "b"), (11, 1)).select(["a"])
    shown = Demonstrations(**vars(shown) | {"rewards": rewards, "truncated": np.arange(11) == 3})
    scale = RewardScale(2, gamma=gamma, magnitude=magnitude, memory=memory)
    kept = Demonstrated(shown, ("a", "b"), share, "cpu")
    ReplayBuffer(9, 2, 1, 1, scale=scale, demonstrations=kept)
    theirs = [peak(shown.rewards[:4]), peak(shown.rewards[4:])]
    assert len(shown.episodes("a")) == len(lengths)
    own = []
    for _ in range(5):  # episodes of three steps
        episode = rng.normal(size=(3, 2))
        own.append([peak(episode[:, t]) for t in range(2)])
        for step, row in enumerate(episode):
            scale.observe(row, np.full(2, step == 2))
    own = np.array(own)
    if memory is None:
        expected = [max(*theirs, own[:, 0].max()), own[:, 1].max()]
    else:
        mean = own[-memory:].mean(0)
        expected = [share * np.mean(theirs) + (1 - share) * mean[0], mean[1]]
    np.testing.assert_allclose(scale.factors, magnitude / np.array(expected), rtol=1e-5)


SMALL = {
    "demonstrations": ("reach-v3=expert:2",),
    "normalize_observations": True,
    "return_scale": 2.0,
    "return_memory": 5,
    "seed": 3,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("demonstrations") / "a"
    train(small_config(run_dir, **SMALL))
    return run_dir


def test_a_run_stores_its_demonstrations_and_learns_from_them(finished):
    """The normaliser has seen them in addition to the 240 steps of the run."""
    kept = Demonstrations.load(finished / "demonstrations.npz")
    again = collect(experts(["reach-v3"]), get_benchmark("mt1:reach-v3"), 2, 3, HORIZON, workers=1)
    assert kept.digest() == again.digest() and len(kept) == 2 * HORIZON
    policy = load_file(finished / "policy_final.safetensors")
    assert policy["agent/normalizer.count"] == len(kept) + 240
    checkpoint = load_file(max((finished / "checkpoints").iterdir()))
    assert checkpoint["agent/normalizer.count"] == len(kept) + 240
    rows = checkpoint["replay/rows"]
    assert not any(
        (rows[..., :39] == row).all(-1).any() for row in torch.from_numpy(kept.observations[1:3])
    )  # they are not part of the ring


def test_a_stopped_run_resumes_bitwise_equal_from_any_source(finished, tmp_path):
    """Use a file this time, which is deleted before the run resumes."""
    file, stopped = tmp_path / "own.npz", tmp_path / "stopped"
    Demonstrations.load(finished / "demonstrations.npz").save(file)
    settings = {**SMALL, "demonstrations": (str(file),), "total_timesteps": 130}
    train(small_config(stopped, **settings))
    file.unlink()
    resume(stopped, total_timesteps=240)
    ours, theirs = (load_file(d / "policy_final.safetensors") for d in (finished, stopped))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (stopped / "config.yaml").read_text().count(str(file)) == 1


def test_other_demonstrations_are_rejected_on_resume(tmp_path):
    run_dir = tmp_path / "run"
    train(small_config(run_dir, **SMALL, total_timesteps=130))
    path = run_dir / "demonstrations.npz"
    kept = Demonstrations.load(path)
    Demonstrations(**vars(kept) | {"rewards": kept.rewards + 1}).save(path)
    with pytest.raises(UsageError, match=r"expected the demonstrations\.npz of the run's start"):
        resume(run_dir, total_timesteps=240)
    path.unlink()
    with pytest.raises(UsageError, match=r"cannot read .*demonstrations\.npz"):
        resume(run_dir, total_timesteps=240)


def test_entries_with_a_task_take_precedence(tmp_path):
    benchmark = get_benchmark("", ("reach-v3", "push-v3", "drawer-close-v3"))
    file = tmp_path / "a=b.npz"  # without a task prefix
    made = numbered(("push-v3", "drawer-close-v3", "soccer-v3"), (2, 3, 4))
    wide = {"observations": np.zeros((9, 39)), "next_observations": np.zeros((9, 39))}
    Demonstrations(**vars(made) | wide | {"actions": np.zeros((9, 4))}).save(file)
    found = sources([str(file), "expert:3", "push-v3=expert:7"], benchmark)
    assert found.experts == {"push-v3": 7, "reach-v3": 3, "drawer-close-v3": 3}
    assert [part.tasks for part in found.files] == [("drawer-close-v3",)]
    assert sources([f"push-v3={file}"], benchmark).files[0].tasks == ("push-v3",)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("expert", "expert:N with N from 1 to 50, at most one episode per goal, got 'expert'"),
        ("expert:51", "got 'expert:51'"),
        ("expert:ten", "got 'expert:ten'"),
        ("reach=expert:3", "demonstrations: task: unknown 'reach'; did you mean 'reach-v3'?"),
        ("expert:3 expert:4", "one number of expert episodes for reach-v3, got 3 and 4"),
        ("none.npz", "demonstrations: cannot read none.npz"),
        ("{}/push.npz", "expected some of the tasks reach-v3, drawer-close-v3, got push-v3"),
        ("{}/short.npz", "expected observations of length 39, got 1"),
    ],
)
def test_invalid_sources_are_reported_before_anything_starts(entries, expected, tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    numbered(("push-v3",), (3,)).save(files / "push.npz")
    numbered(("reach-v3",), (3,)).save(files / "short.npz")
    named = entries.replace("{}", str(files)).split()
    ask = ["--tasks", *TASKS, "--run-dir", str(tmp_path / "run"), "--demonstrations", *named]
    assert train_main(ask) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_custom_tasks_have_no_expert_but_may_have_files(tmp_path):
    small = {"tasks": None, "horizon": None, "total_timesteps": 100, "learning_starts": 60}
    ask = small_config(tmp_path / "a", **small, demonstrations=("expert:2",))
    with pytest.raises(UsageError, match="a file for 'gravity0', because Meta-World has no expert"):
        train(ask, REACHERS)
    assert not (tmp_path / "a").exists()
    still = dict.fromkeys(REACHERS.tasks, lambda seen: [0.0, 0.0])
    collect(still, REACHERS, 1, workers=1).save(tmp_path / "still.npz")
    ask = small_config(tmp_path / "a", **small, demonstrations=(str(tmp_path / "still.npz"),))
    outcome = train(ask, REACHERS)
    assert len(Demonstrations.load(outcome.run_dir / "demonstrations.npz")) == 2 * 50
    assert json.loads((outcome.run_dir / "eval.json").read_text())["total_timesteps"] == 100
