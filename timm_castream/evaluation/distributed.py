"""Agreement between the processes of an evaluation under torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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


class Gathered(Metric):
    """The records of all processes, gathered by torchmetrics.

    Args:
        **widths: Number of columns of each table of a record.
    """

    full_state_update = False

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.widths = widths
        for name in widths:
            self.add_state(name, [], dist_reduce_fx='cat')
        self.update(**{name: [] for name in widths})  # a process without images takes part with empty tables

    def drop(self, name: str) -> None:
        """Leaves a table out."""
        self.widths = {key: width for key, width in self.widths.items() if key != name}

    def update(self, **tables: list[list[float]]) -> None:
        """Adds a batch: tables of rows that begin with the index of an image."""
        for name in self.widths:
            table = torch.tensor(tables[name], dtype=torch.float64, device=self.device)
            getattr(self, name).append(table.reshape(-1, self.widths[name]))

    def compute(self) -> dict[str, np.ndarray]:
        """The tables of all batches, in the order of the images."""
        tables = {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self.widths}
        return {name: table[np.argsort(table[:, 0], kind='stable')] for name, table in tables.items()}
