"""What attributions, metrics and pictures know alike about a batch of normalised images.

Letters: B images of C channels and H x W pixels.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def normalisation(model_or_cfg: nn.Module | Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std with which images were normalised, on x's device.

    Args:
        model_or_cfg: A timm model, whose `pretrained_cfg` says them, or a mapping with `mean` and `std`.
        x: (B, C, H, W) normalised images.

    Returns:
        Two (C, 1, 1) or (1, 1, 1) tensors.

    Raises:
        ValueError: If mean or std are missing or not those of C channels.
    """
    cfg = model_or_cfg if isinstance(model_or_cfg, Mapping) else getattr(model_or_cfg, 'pretrained_cfg', None) or {}
    values = []
    for name in ('mean', 'std'):
        if cfg.get(name) is None:
            raise ValueError(
                f'{type(model_or_cfg).__name__} does not say the {name} of its images: set it in pretrained_cfg.')
        value = torch.as_tensor(cfg[name], dtype=x.dtype, device=x.device).view(-1, 1, 1)
        if len(value) not in (1, x.shape[1]):
            raise ValueError(f'pretrained_cfg gives {name} for {len(value)} channels, the images have {x.shape[1]}.')
        values.append(value)
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
    return x * mask + (mask - 1) * (mean / std)


def fast_memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which to forward images made from x: x's own, or channels_last on a CPU.

    Convolutions on a CPU take 0.6 to 0.9 of the time in it, whatever the format of their weights.
    """
    nhwc = x.device.type == 'cpu' or x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def default_batch_size(x: Tensor) -> int:
    """How many images of x's size to forward at once.

    As many pixels as 16 of 224 x 224 on a CPU, where larger batches are slower, and as 128 of them elsewhere.
    """
    pixels = (16 if x.device.type == 'cpu' else 128) * 224 * 224
    return max(1, pixels // (x.shape[-2] * x.shape[-1]))
