"""Capture of work on a GPU as a CUDA graph: a single launch instead of a thousand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch

WARM_UP = 3
"""Eager calls before the capture, in which libraries and optimisers initialise themselves."""

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """Calls a function eagerly a few times, then captures one call and replays it from then on.

    Every call does the work once and returns the function's result. Replays return the same
    tensors each time, with new values. Calls of the function may differ only in the contents of
    its tensors, which must stay in place, and must not synchronise with the device.

    Args:
        function: The work, without arguments.
        generators: All generators it draws from; a replay advances them like a call.
        priority: Priority of its kernels over others; -1 runs first.
        device: Device of the work; default: the current one.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        generators: Sequence[torch.Generator],
        priority: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._priority, self._device = priority, device
        self._function, self._generators = function, generators
        self._calls = 0
        # Warm-up and capture share a stream that no other graph uses: cuBLAS keeps a workspace per
        # stream, and graphs that run concurrently must not write into the same one.
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        """Do the work on the device's current stream."""
        with torch.cuda.device(self._device):  # else streams and graphs are on the current one
            return self._call()

    def _call(self) -> Result:
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
        return cast(Result, self._result)  # which may be None
