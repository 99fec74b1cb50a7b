"""Choosing actions on a GPU beside the updates, instead of behind them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mtrl.policy.policy import Policy
from mtrl.sac.capture import Captured


class ActorSnapshot:
    """Samples actions from the policy as it was when it was last taken.

    On a GPU, an actor that is being updated could only be asked once its updates are done. The
    snapshot is copied before they are launched, and is asked on a stream of its own while they run:
    the policy that acts in a vector step lacks the updates of the step before. What is launched is
    a copy from pinned memory, one graph and a copy back.

    Args:
        policy: What is trained.
        tasks: Each row's task index, `[n]`, on the policy's device.
        generator: Of the samples' noise.
    """

    def __init__(self, policy: Policy, tasks: Tensor, generator: torch.Generator) -> None:
        device, n = policy.device, len(tasks)
        self._tasks, self._generator = tasks, generator
        self._policy = policy.snapshot(device)
        mine, theirs = self._policy.state_dict(), policy.state_dict()
        # By type: torch copies many tensors in one launch if they are of one.
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
            self._stream = torch.cuda.Stream(priority=-1)
            self._taken, self._done = torch.cuda.Event(), torch.cuda.Event()
            self._sampled = Captured(self._sample, [generator], priority=-1)
        self.take()

    def take(self) -> None:
        """Copy the policy, after all that has been launched on it so far."""
        for mine, theirs in self._pairs:
            torch._foreach_copy_(mine, theirs)
        if self._on_cuda:
            self._taken.record()

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Actions `[n, A]` for observations `[n, d]`; waits for these alone."""
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
        shape = (len(self._tasks), self._policy.action_size)
        noise = torch.randn(shape, generator=self._generator, device=self._tasks.device)
        return self._policy.act(self._observations, self._tasks, noise)

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on exactly."""
        return dict(self._policy.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._policy.load_state_dict(state)
        if self._on_cuda:
            self._taken.record()
