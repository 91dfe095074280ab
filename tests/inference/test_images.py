"""Masked images, resized maps and normalisation against loops over pixels; sizes and formats of batches; bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_backbone
from references import resized_bilinearly
from torch import Tensor, nn

from timm_castream.inference.images import (
    default_batch_size,
    fast_memory_format,
    mask_image,
    normalisation,
    resize_saliency,
)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 24, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saliency() -> Tensor:
    return torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(('mean', 'std'), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,), (0.25,))])
def test_a_mask_multiplies_pixels_before_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(2, 3, 10, 14, generator=generator).double().numpy()
    saliency = torch.rand(2, 4, 5, generator=generator)
    shift, scale = (np.broadcast_to(np.array(value)[:, None, None], (3, 1, 1)) for value in (mean, std))
    masked = mask_image({'mean': mean, 'std': std}, torch.from_numpy((pixels - shift) / scale).float(), saliency)
    for b in range(2):
        mask = resized_bilinearly(saliency[b].double().numpy(), 10, 14)
        np.testing.assert_allclose(masked[b].numpy(), (pixels[b] * mask - shift) / scale, atol=2e-6)


def test_a_masks_normalisation_is_that_of_the_timm_model(images: Tensor, saliency: Tensor) -> None:
    cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}  # of test_resnet
    assert torch.equal(mask_image(make_backbone('test_resnet'), images, saliency), mask_image(cfg, images, saliency))


def test_a_saliency_of_1_leaves_the_image_to_the_bit_and_of_0_leaves_black(images: Tensor, saliency: Tensor) -> None:
    cfg = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
    assert torch.equal(mask_image(cfg, images, torch.ones_like(saliency)), images)
    black = torch.tensor([-m / s for m, s in zip(cfg['mean'], cfg['std'], strict=True)]).view(3, 1, 1)
    torch.testing.assert_close(mask_image(cfg, images, torch.zeros_like(saliency)), black.expand_as(images))


@pytest.mark.parametrize('size', [(24, 32), (5, 13), (3, 4)])
def test_maps_are_resized_bilinearly_with_half_pixel_centres(saliency: Tensor, size: tuple[int, int]) -> None:
    resized = resize_saliency(saliency.bfloat16(), size)
    assert resized.dtype == torch.float32
    for one, result in zip(saliency.bfloat16().double().numpy(), resized, strict=True):
        np.testing.assert_allclose(result.numpy(), resized_bilinearly(one, *size), atol=1e-7)


def test_normalisation_is_that_of_the_cfg() -> None:
    mean, std = normalisation({'mean': (0.1, 0.2, 0.3), 'std': (0.5,)}, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    assert mean.flatten().tolist() == [0.1, 0.2, 0.3] and std.flatten().tolist() == [0.5]


@pytest.mark.parametrize(
    ('model_or_cfg', 'message'),
    [
        (nn.Linear(1, 1), 'Linear has no mean for its images: pass mean='),
        ({'mean': (0.5,)}, 'dict has no std for its images: pass std='),
        (
            {'mean': (0.5, 0.5), 'std': (0.5, 0.5)},
            'mean must hold one number or one per channel, got 2 for images of 3 channels',
        ),
        (
            {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5)},
            'std must hold one number or one per channel, got 2 for images of 3 channels',
        ),
        ({'mean': (0.5,), 'std': (0, 0, 0)}, r'std must hold positive numbers, got \(0\.0, 0\.0, 0\.0\)'),
        ({'mean': (math.nan,), 'std': (0.5,)}, r'mean must hold finite numbers, got \(nan,\)'),
    ],
)
def test_masking_asks_for_mean_and_std_of_the_channels(
    model_or_cfg: Any, message: str, images: Tensor, saliency: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        mask_image(model_or_cfg, images, saliency)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'x': torch.rand(3, 24, 32)}, r'x must hold normalised images of shape \(B, C, H, W\), got \(3, 24, 32\)'),
        ({'x': torch.zeros(3, 3, 24, 32, dtype=torch.uint8)}, 'of torch.uint8'),
        ({'x': torch.full((3, 3, 24, 32), math.nan)}, 'x must be finite'),
        ({'x': np.zeros((3, 3, 24, 32))}, 'x must be a tensor of normalised images, .* got ndarray'),
        ({'saliency': np.zeros((3, 6, 8))}, 'saliency must have shape .* got ndarray'),
        ({'saliency': torch.rand(2, 6, 8)}, r'saliency must have shape \(3, h, w\), one map an image, got \(2, 6, 8\)'),
        ({'saliency': torch.rand(3, 1, 6, 8)}, r'got \(3, 1, 6, 8\)'),
        ({'saliency': torch.full((3, 6, 8), 1.5)}, r'saliency must lie in \[0, 1\], got 1.5'),
        ({'saliency': torch.full((3, 6, 8), math.nan)}, r'saliency must lie in \[0, 1\], got nan'),
    ],
)
def test_bad_images_and_maps_are_refused(
    change: dict[str, Tensor], message: str, images: Tensor, saliency: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        mask_image({'mean': (0.5,), 'std': (0.5,)}, **{'x': images, 'saliency': saliency, **change})


def test_the_default_batch_holds_the_pixels_of_16_images_of_224_on_a_cpu_and_of_128_elsewhere() -> None:
    assert default_batch_size(torch.empty(1, 3, 224, 224)) == 16
    assert default_batch_size(torch.empty(1, 3, 64, 64)) == 196
    assert default_batch_size(torch.empty(1, 1, 2000, 2000)) == 1
    assert default_batch_size(torch.empty(1, 3, 224, 224, device='meta')) == 128


def test_images_are_forwarded_in_channels_last_on_a_cpu_and_in_their_own_format_elsewhere() -> None:
    assert fast_memory_format(torch.empty(2, 3, 8, 8)) == torch.channels_last
    elsewhere = torch.empty(2, 3, 8, 8, device='meta')
    assert fast_memory_format(elsewhere) == torch.contiguous_format
    assert fast_memory_format(elsewhere.contiguous(memory_format=torch.channels_last)) == torch.channels_last
