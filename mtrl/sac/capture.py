"""A piece of work on a GPU as one CUDA graph: a thousand launches become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

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
        priority: Of its kernels beside those of others; -1 goes first.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        generators: Sequence[torch.Generator],
        priority: int = 0,
    ) -> None:
        self._priority = priority
        self._function, self._generators = function, generators
        self._calls = 0
        # Warm-up and capture share one stream, and no other graph has it: cuBLAS keeps a workspace
        # per stream, and graphs that run side by side must not write into the same one.
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        """Do the work, on the current stream."""
        self._calls += 1
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=self._priority)
        if self._calls <= WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._function()
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            for generator in self._generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function()
            self._graph = graph
        self._graph.replay()
        return cast(Result, self._result)  # None is a result too
