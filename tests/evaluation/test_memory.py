"""Memory stays flat over many batches."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from timm_castream.evaluate import evaluate


class Images(Dataset):
    """Random images of 64 x 64 pixels, made when they are read; notes the live tensors at some of them."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.live: dict[int, int] = {}

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index % 100 == 50:
            gc.collect()
            # The type: isinstance asks proxies of other libraries, some of which warn.
            tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
            self.live[index] = sum(value.numel() for value in tensors)
        return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)), index % 10

    def __len__(self) -> int:
        return self.num_images


@pytest.mark.slow
def test_the_tensors_alive_do_not_grow_over_200_batches(make_model) -> None:
    def gradient(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()
        return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]

    model = make_model('test_resnet', side=64)
    images = Images(400)
    evaluate(
        model,
        DataLoader(images, 2),
        {'grad_cam': 'grad_cam', 'gradient': gradient},
        metrics=('average_drop',),
        batch_size=8,
    )
    counts = [images.live[index] for index in (50, 150, 250, 350)]
    records = 400 * 2 * 6  # the values of all images
    read_ahead = 2 * 2 * 3 * 64 * 64  # two batches of two images
    assert max(counts) - min(counts) < 4 * records + read_ahead, counts
