"""Tests that need a GPU: captured updates and kernels; skipped without one."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import small_learner
import torch
from small_learner import ACTION, OBSERVATION

from mtrl.config.agent import AgentConfig
from mtrl.sac.capture import WARM_UP
from mtrl.sac.learner import Learner
from mtrl.sac.replay import ReplayBuffer
from mtrl.surgery import available, get_surgery

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

T, BATCH = 5, 16
FUSED = ["cagrad", "fairgrad", "mgda"]  # where there is Triton
CAPTURED = [*(name for name in available() if get_surgery(name).capturable), *FUSED]


def filled_replay(device: str) -> ReplayBuffer:
    return small_learner.filled_replay(T, 40, device, ends=True)


def make_learner(device: str, **settings) -> Learner:
    agent = AgentConfig(hidden_sizes=(64, 64))
    return small_learner.make_learner(
        T, agent=agent, device=device, seed=3, **{"batch_size": BATCH} | settings
    )


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.agent.state_dict().items()}


@needs_cuda
@pytest.mark.parametrize("surgery", CAPTURED)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_captured_updates_equal_eager_ones(surgery, precision):
    """Same seeds: same batches, noise, orders, and the same networks after 20 updates."""
    learners = [
        make_learner("cuda", surgery=surgery, precision=precision, capture=capture)
        for capture in (True, False)
    ]
    assert learners[0].captures and not learners[1].captures
    replays = [filled_replay("cuda") for _ in learners]
    for i in range(20):
        metrics = [
            learner.step(*pair)
            for learner, pair in zip(learners, zip(replays, strict=True), strict=True)
        ]
        for name in metrics[0]:
            torch.testing.assert_close(metrics[0][name], metrics[1][name], msg=f"{name}, {i}")
        for replay in replays:  # the graph samples what is added after its capture
            draw = np.random.default_rng(i)
            x, zeros = draw.normal(size=(T, OBSERVATION)), np.zeros(T)
            replay.add(x, draw.uniform(-1, 1, (T, ACTION)), zeros + i, zeros, x, done=zeros == 0)
    found, expected = map(parameters, learners)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


@needs_cuda
def test_several_updates_in_one_graph():
    one, four = make_learner("cuda", surgery="pcgrad"), make_learner("cuda", surgery="pcgrad")
    replays = filled_replay("cuda"), filled_replay("cuda")
    for _ in range(4 * (WARM_UP + 3)):
        one.step(replays[0])
    for _ in range(WARM_UP + 3):
        four.step(replays[1], 4)
    assert one.updates == four.updates
    found, expected = parameters(four), parameters(one)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


@needs_cuda
def test_a_captured_run_resumes_exactly():
    through, first = (
        make_learner("cuda", surgery="rotograd"),
        make_learner("cuda", surgery="rotograd"),
    )
    replays = filled_replay("cuda"), filled_replay("cuda")
    for _ in range(12):
        through.step(replays[0])
    for _ in range(6):
        first.step(replays[1])
    second = make_learner("cuda", surgery="rotograd")
    second.agent.load_state_dict(first.agent.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    replay = filled_replay("cuda")
    replay.load_state_dict(replays[1].state_dict())
    for _ in range(6):
        second.step(replay)
    found, expected = parameters(second), parameters(through)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


@needs_cuda
def test_an_update_on_cuda_equals_that_on_the_cpu():
    batch = filled_replay("cpu").sample(BATCH)
    noise = torch.randn(2, T, BATCH, ACTION)
    learners = [make_learner(device, precision="fp32") for device in ("cpu", "cuda")]
    for learner in learners:
        on_device = {k: v.to(learner.agent.device) for k, v in vars(batch).items()}
        learner.update(type(batch)(**on_device), noise.to(learner.agent.device))
    for name, value in parameters(learners[0]).items():
        torch.testing.assert_close(parameters(learners[1])[name].cpu(), value, atol=1e-5, rtol=1e-4)


@needs_cuda
def test_methods_that_synchronise_are_not_captured():
    assert not make_learner("cuda", surgery="imtl-g").captures
    assert not make_learner("cuda", surgery="rotograd", rotation_step="matrix_exp").captures


KERNEL = """
import torch
from mtrl.surgery.methods import pcgrad

INFINITE = torch.nan, torch.inf, -torch.inf
for n_tasks in (1, 2, 3, 10, 50):
    generator, last = torch.Generator().manual_seed(n_tasks), n_tasks - 1
    rows = torch.randn(3, n_tasks, 20, generator=generator, dtype=torch.float64)
    rows[0, n_tasks // 2 :: 7] = 0  # tasks without a gradient
    rows[1] = 0
    rows[2, 1::5] = rows[2, 0]  # tied, and opposed
    rows[2, last] = -2 * rows[2, 0]
    gramian = rows @ rows.mT
    places = {(0, 0), (0, last), (last, 0), (last // 2, last // 2)} if n_tasks < 20 else ()
    broken = [(value, *place) for value in INFINITE for place in places]
    gramian = torch.cat([gramian, gramian[2:].expand(len(broken), -1, -1)])
    for n, (value, s, t) in enumerate(broken, 3):
        gramian[n, s, t] = value
    method = pcgrad.PCGrad()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        pcgrad.is_fused = lambda *sizes: False
        exact = method.weights_or_nan(gramian, generator.manual_seed(1))
        assert exact[:3].isfinite().all() and exact[3:].isnan().all()
        pcgrad.is_fused = lambda *sizes: True
        draw = pcgrad.random_keys  # on the CPU, with the same numbers
        pcgrad.random_keys = lambda *given: draw(*given).to(DEVICE)
        found = method.weights_or_nan(gramian.to(DEVICE, dtype), generator.manual_seed(1))
        pcgrad.random_keys = draw
        assert found.dtype == dtype
        # Opposed gradients lose digits.
        torch.testing.assert_close(
            found.double().cpu(), exact, atol=tolerance, rtol=tolerance, equal_nan=True
        )
"""


def test_the_projection_kernel_equals_the_loop():
    """Compiled on a GPU; elsewhere in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    script = KERNEL.replace("DEVICE", repr(device))
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


NEWTON = """
from mtrl.surgery.methods import fairgrad, simplex
from mtrl.surgery.methods.cagrad import CAGrad
from mtrl.surgery.methods.fairgrad import FairGrad
from mtrl.surgery.methods.mgda import MGDA
import torch

for n_tasks in SIZES:
    generator = torch.Generator().manual_seed(n_tasks)
    lengths = torch.logspace(-2, 1, n_tasks)[:, None]
    rows = torch.randn(2, n_tasks, 60, generator=generator) * lengths
    rows[1, 0] = -rows[1, 1]  # a convex combination is zero
    gramian = (rows @ rows.mT).to(DEVICE)
    for method in METHODS:
        found = []
        for fused in (False, True):
            simplex.is_fused = fairgrad.is_fused = lambda *sizes: fused
            found.append(method.weights(gramian, None))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
"""


def test_newton_kernels_equal_the_iterations():
    """Likewise; few cases, because the interpreter takes seconds for each."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")
    on_gpu = torch.cuda.is_available()
    every = "CAGrad(), CAGrad(c=2.0), MGDA(), FairGrad(), FairGrad(alpha=2.0), FairGrad(alpha=0.5)"
    case = {
        "DEVICE": repr("cuda" if on_gpu else "cpu"),
        "SIZES": "(2, 3, 10, 17, 50)" if on_gpu else "(3,)",
        "METHODS": f"({every})" if on_gpu else "(CAGrad(), MGDA(), FairGrad())",
    }
    script = NEWTON
    for name, value in case.items():
        script = script.replace(name, value)
    environment = os.environ | ({} if on_gpu else {"TRITON_INTERPRET": "1"})
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
@pytest.mark.parametrize("surgery", ["pcgrad", "mgda", "fairgrad"])
def test_a_learner_on_the_second_device(surgery):
    """Kernels, streams and graphs are on the tensors' device, not on the current one."""
    learners = [make_learner(device, surgery=surgery) for device in ("cuda:0", "cuda:1")]
    for learner in learners:
        replay = filled_replay(str(learner.agent.device))
        for _ in range(WARM_UP + 3):
            learner.step(replay)
    found, expected = (parameters(learner) for learner in reversed(learners))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to("cuda:0"), value, atol=1e-6, rtol=1e-5, msg=name)
