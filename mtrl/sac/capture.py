"""A piece of work on a GPU as one CUDA graph: a thousand launches become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

WARM_UP = 3
"""Calls that run as they are before the capture: libraries and optimisers set themselves up."""

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """Calls a function as it is a few times, then captures one call and replays it for ever.

    Every call does the work once and returns what the function does; of a replay these are the same
    tensors each time, written anew. The function must do the same in every call but for what is in
    its tensors, which stay where they are, and must not wait for the device.

    Args:
        function: The work, without arguments.
        generators: All it draws random numbers from; a replay advances them as a call does.
    """

    def __init__(
        self, function: Callable[[], Result], generators: Sequence[torch.Generator]
    ) -> None:
        self._function, self._generators = function, generators
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        """Do the work."""
        self._calls += 1
        if self._calls <= WARM_UP:
            # On a stream of its own, as the capture will be: memory is kept apart by stream.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self._function()
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            for generator in self._generators:
                self._graph.register_generator_state(generator)
            with torch.cuda.graph(self._graph):
                self._result = self._function()
        self._graph.replay()
        assert self._result is not None
        return self._result
