"""The arguments of a stream: what `attach` takes, what a model records, and what a file stores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_TRAINING = {'training': True}


@dataclass(frozen=True)
class StreamConfig:
    """The `stream_*` arguments of `attach`, which has their meaning. Plain data.

    Those marked as of training change how a stream is drawn and trained, and nothing in inference.
    """

    stream_start: int = 0
    stream_stages: Sequence[str] | None = None
    stream_block: str = 'ca'
    stream_class_specific: bool = False
    stream_heads: int = 1
    stream_drop: float = field(default=0.0, metadata=_TRAINING)
    stream_bias: bool = True
    stream_init: str = field(default='paper', metadata=_TRAINING)

    def __post_init__(self) -> None:
        if isinstance(self.stream_stages, list):  # the caller may change the list
            object.__setattr__(self, 'stream_stages', tuple(self.stream_stages))

    def to_dict(self) -> dict[str, Any]:
        """The arguments by name, as plain data."""
        arguments = asdict(self)
        if self.stream_stages is not None:
            arguments['stream_stages'] = list(self.stream_stages)
        return arguments


def inference_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a stream that its results depend on, without those of training. Missing ones have defaults."""
    complete = {**StreamConfig().to_dict(), **arguments}
    training = {item.name for item in fields(StreamConfig) if item.metadata.get('training')}
    return {name: value for name, value in complete.items() if name not in training}


def with_stream_arguments(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function with the arguments of a stream in the place of its `**stream`."""
    signature = inspect.signature(function)
    stream = inspect.signature(StreamConfig).parameters.values()
    *own, _ = signature.parameters.values()
    position, *others = own
    arguments = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in stream]
    return signature.replace(parameters=[position, *arguments, *others])
