"""Acting on a GPU in parallel to updates, instead of after them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mtrl.policy.policy import Policy
from mtrl.sac.capture import Captured
from mtrl.training.noise import ExplorationNoise


class ActorSnapshot:
    """Samples actions from a snapshot of the policy.

    On a GPU, the actor can only be evaluated after its pending updates. The snapshot is copied
    before they are launched, and is evaluated on a separate stream while they run. The acting
    policy therefore lacks the updates of the previous vector step. A call launches a copy from
    pinned memory, one graph, and a copy back.

    Args:
        policy: Policy that is trained.
        tasks: Task index of each row, `[n]`, on the policy's device.
        noise: Noise of the samples.
    """

    def __init__(self, policy: Policy, tasks: Tensor, noise: ExplorationNoise) -> None:
        device, n = policy.device, len(tasks)
        self._tasks, self._noise = tasks, noise
        self._policy = policy.snapshot(device)
        mine, theirs = self._policy.state_dict(), policy.state_dict()
        # By dtype: torch copies many tensors in one launch if they have the same one.
        self._pairs = [
            ([mine[name] for name in names], [theirs[name] for name in names])
            for dtype in {tensor.dtype for tensor in mine.values()}
            for names in [[name for name, tensor in mine.items() if tensor.dtype == dtype]]
        ]
        self._observations = torch.zeros(n, policy.observation_size, device=device)
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._given = torch.empty(self._observations.shape, pin_memory=True)
            self._chosen = torch.empty(n, policy.action_size, pin_memory=True)
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._taken, self._done = torch.cuda.Event(), torch.cuda.Event()
            self._sampled = Captured(self._sample, [noise.generator], priority=-1, device=device)
        self.take()

    def take(self) -> None:
        """Copy the policy, after all work launched on it so far."""
        for mine, theirs in self._pairs:
            torch._foreach_copy_(mine, theirs)
        if self._on_cuda:
            self._taken.record(torch.cuda.current_stream(self._tasks.device))

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Compute actions `[n, A]` for observations `[n, d]`; waits only for these."""
        if not self._on_cuda:
            self._observations.copy_(torch.from_numpy(observations))
            return self._sample().numpy()
        self._given.copy_(torch.from_numpy(observations))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken)
            self._observations.copy_(self._given, non_blocking=True)
            self._chosen.copy_(self._sampled(), non_blocking=True)
            self._done.record()
        self._done.synchronize()
        return self._chosen.numpy().copy()

    def _sample(self) -> Tensor:
        return self._policy.act(self._observations, self._tasks, self._noise())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for `load_state_dict`."""
        return dict(self._policy.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        self._policy.load_state_dict(state)
        if self._on_cuda:
            self._taken.record(torch.cuda.current_stream(self._tasks.device))
