"""Takes the query of a stream through the stages while the backbone runs: a `StreamPass` a forward, a hook a stage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..stream import CAStream
from .layout import ImageSize, Stage


class StreamPass:
    """The state of one call of `forward_features`; gone when the call returns.

    Args:
        stream: The stream to run.
        query: q_0 of the batch, or None where the stages wait for `start`.
        image_size: Height and width of the images.
        attention: A list that receives the attention of each stage, or None.
    """

    def __init__(
        self, stream: CAStream, query: Tensor | None, image_size: ImageSize, attention: list[Tensor] | None = None
    ) -> None:
        self.stream = stream
        self.query = query
        # Only attention maps have to be in image order.
        self.image_size = None if attention is None else image_size
        self.attention = attention
        self.visited = 0
        # The tensors, not views of them: inside a checkpointed region a view has no graph yet.
        self.waiting: list[tuple[Stage, Tensor]] = []

    def visit(self, stage: Stage, output: Any) -> None:
        """Takes the query through the block of the stage whose module has just returned `output`."""
        if self.query is None:
            self.waiting.append((stage, stage.tensor(output)))
        else:
            self._step(self.query, stage, stage.tensor(output))

    def start(self, query: Tensor) -> None:
        """Runs the stages that have waited for q_0."""
        self.query = query
        waiting, self.waiting = self.waiting, []
        for stage, features in waiting:
            self._step(self.query, stage, features)

    def _step(self, query: Tensor, stage: Stage, features: Tensor) -> None:
        view = stage.to_nchw(features, self.image_size)
        self.query = self.stream.step(self.visited, query, view, self.attention)
        self.visited += 1


class _OpenFrame(threading.local):
    """The pass of this thread. At module level: a module that holds it could be neither copied nor pickled."""

    def __init__(self) -> None:
        # Set here and not as a class default, which torch.compile's guards fail on.
        self.stream_pass: StreamPass | None = None


_open = _OpenFrame()


def run_with(stream_pass: StreamPass | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `forward` with this pass open, or with none open even where a model calls another one half way."""
    outer, _open.stream_pass = _open.stream_pass, stream_pass
    try:
        return forward(*args, **kwargs)
    finally:
        _open.stream_pass = outer


class StageHook:
    """Forward hook of a stage. It holds no tensor and no model: copies, replicas and pickles share it safely."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        stream_pass = _open.stream_pass
        if stream_pass is not None:
            stream_pass.visit(self.stage, output)
