"""Agreement between the processes of an evaluation under torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import distributed


@dataclass(frozen=True)
class Processes:
    """This process among all of them.

    Attributes:
        rank: Rank of this process.
        count: Number of processes.
    """

    rank: int
    count: int

    @classmethod
    def current(cls) -> Processes:
        """The processes of torch.distributed, or one process."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls(0, 1)

    def on_main(self, ask: Callable[[], Any]) -> Any:
        """The result of `ask` in the first process, or its error, in all processes.

        Args:
            ask: Is called in the first process alone. Its result or its error must be picklable.

        Raises:
            Exception: The error of `ask`, in all processes.
        """
        answer: list[Any] = [None]
        if self.rank == 0:
            try:
                answer = [ask()]
            except Exception as error:  # the other processes wait for an answer
                answer = [error]
        if self.count > 1:
            distributed.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def check_same_weights(self, weights: str) -> None:
        """Raises in all processes unless they have equal models: a process without its checkpoint has other weights."""
        if len(set(self.all_gather(weights))) > 1:
            raise ValueError('The processes have models of different weights: load one checkpoint in all of them.')
