"""Helpers for normalised images and saliency maps: masking, resizing, input checks.

Letters: B images of C channels and H x W pixels, h x w the size of a saliency map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._utils.checks import ChannelNumbers, channel_numbers, check_unit_range

# (function of (n, ...) rows, (N, ...) rows) -> what it gives for parts of the rows, in their order
Batches = Callable[[Callable[[Tensor], Any], Tensor], Sequence[Any]]


def mask_image(model_or_cfg: nn.Module | Mapping[str, Any], x: Tensor, saliency: Tensor) -> Tensor:
    """The image with every pixel, before normalisation, multiplied by the saliency: black where it is 0.

    Args:
        model_or_cfg: A timm model with the normalisation in its `pretrained_cfg`, or a mapping with `mean` and `std`.
        x: (B, C, H, W) normalised images.
        saliency: (B, h, w) in [0, 1], resized by `resize_saliency`.

    Returns:
        (B, C, H, W) masked images, normalised as x. Where the saliency is 1 they are x to the last bit.

    Raises:
        ValueError: If mean or std are missing or have another number of channels, or on a bad shape or value.
    """
    check_images(x)
    check_saliency(saliency, x)
    mean, std = normalisation(model_or_cfg, x)
    return mask_normalised(x, resize_saliency(saliency.to(x.device), x.shape[2:])[:, None].to(x.dtype), mean, std)


def resize_saliency(saliency: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) maps as (B, H, W) ones in float32, bilinearly with align_corners=False.

    Args:
        saliency: (B, h, w).
        size: (H, W).
    """
    # Interpolated in float64 and then rounded, values that tie on paper (the resize repeats the outermost ones) tie
    # in float32 too, in whatever order a device or a batch adds them up. MPS has no float64.
    exact = saliency.float() if saliency.device.type == 'mps' else saliency.double()
    return F.interpolate(exact[:, None], tuple(size), mode='bilinear', align_corners=False)[:, 0].float()


def normalisation(
    model_or_cfg: nn.Module | Mapping[str, Any],
    x: Tensor,
    mean: ChannelNumbers | None = None,
    std: ChannelNumbers | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and std with which images were normalised, on the device of x.

    Args:
        model_or_cfg: A timm model with a `pretrained_cfg`, or a mapping with `mean` and `std`.
        x: (B, C, H, W) normalised images.
        mean, std: Used in place of those of `model_or_cfg`.

    Returns:
        Two (C, 1, 1) or (1, 1, 1) tensors.

    Raises:
        ValueError: If mean or std are missing, are not finite, have another number of channels than the images, or a
            std is not positive.
    """
    cfg = model_or_cfg if isinstance(model_or_cfg, Mapping) else getattr(model_or_cfg, 'pretrained_cfg', None) or {}
    values = []
    for name, given in (('mean', mean), ('std', std)):
        own = given is None
        given = cfg.get(name) if own else given
        if given is None:
            raise ValueError(
                f'{type(model_or_cfg).__name__} has no {name} for its images: pass {name}=, or set it in '
                'pretrained_cfg.'
            )
        try:
            numbers = channel_numbers(name, given, x.shape[1])
        except ValueError as error:
            if not own:
                raise
            raise ValueError(
                f"{str(error).removesuffix('.')}: set model.pretrained_cfg['mean'] and ['std'] to one number or one per "
                'channel, or pass mean= and std= where the function has them.'
            ) from None
        values.append(torch.tensor(numbers, dtype=x.dtype, device=x.device).view(-1, 1, 1))
    return values[0], values[1]


def mask_normalised(x: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images whose pixels, before normalisation, were multiplied by a mask: black where it is 0.

    Args:
        x: (B, C, H, W) normalised images.
        mask: (B, 1, H, W).
        mean: (C, 1, 1), as `normalisation` gives it.
        std: (C, 1, 1).

    Returns:
        (B, C, H, W), where the mask is 1 equal to x to the last bit.
    """
    # ((x * std + mean) * mask - mean) / std, without a round trip through the unnormalised image
    return torch.addcmul(x * mask, mask - 1, mean / std)


def fast_memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which to forward images like x: that of x, or channels_last on a CPU.

    Convolutions on a CPU take 0.6 to 0.9 of the time in it, whatever the format of their weights.
    """
    nhwc = x.device.type == 'cpu' or x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def in_batches(size: int) -> Batches:
    """Calls a function with parts of at most `size` rows, one after the other."""
    return lambda function, rows: [function(part) for part in rows.split(size)]


def default_batch_size(x: Tensor) -> int:
    """How many images of x's size to forward at once.

    As many pixels as 16 of 224 x 224 on a CPU, where larger batches are slower, and as 128 of them elsewhere.
    """
    pixels = (16 if x.device.type == 'cpu' else 128) * 224 * 224
    return max(1, pixels // (x.shape[-2] * x.shape[-1]))


def check_images(x: Tensor) -> None:
    """Raises ValueError unless x holds images, (B, C, H, W) of finite floating point numbers."""
    if not isinstance(x, Tensor):
        raise ValueError(f'x must be a tensor of normalised images, (B, C, H, W), got {type(x).__name__}.')
    if x.ndim != 4 or not x.numel() or not x.is_floating_point():
        raise ValueError(f'x must hold normalised images of shape (B, C, H, W), got {tuple(x.shape)} of {x.dtype}.')
    if not x.isfinite().all():
        raise ValueError('x must be finite, got NaN or infinity.')


def check_saliency(saliency: Tensor, x: Tensor) -> None:
    """Raises ValueError unless there is a map for each image, (B, h, w) in [0, 1]."""
    if not isinstance(saliency, Tensor) or saliency.ndim != 3 or len(saliency) != len(x):
        given = tuple(saliency.shape) if isinstance(saliency, Tensor) else type(saliency).__name__
        raise ValueError(f'saliency must have shape ({len(x)}, h, w), one map an image, got {given}.')
    check_unit_range('saliency', saliency)
