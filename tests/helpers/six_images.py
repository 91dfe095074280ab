"""A data set of six images of random pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Six(Dataset):
    """Six images of random pixels, without names of files."""

    def __init__(self, left_out: int | None = None) -> None:
        images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(5))
        self.kept = [i for i in range(6) if i != left_out]
        self.images = images[self.kept]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.kept[index]
