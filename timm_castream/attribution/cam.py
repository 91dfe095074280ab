"""The mathematics of class activation maps (CAM): functions of feature maps and gradients, for any model.

Most are max(0, sum_k w_k A_k) of the feature maps A_k of a layer, scaled to [0, 1]. They differ in the weights:

* Grad-CAM    (arXiv 1610.02391): mean over the locations of g = dy / dA_k, y the logit of the class;
* Grad-CAM++  (arXiv 1710.11063): sum of alpha max(0, g), alpha = g^2 / (2 g^2 + g^3 sum(A_k)), its eq. (19);
* XGrad-CAM   (arXiv 2008.02312): sum of g A_k over the locations, divided by the sum of A_k;
* Score-CAM   (arXiv 1910.01279): probability of the class on the image masked by A_k, as in the CA-Stream paper.

Two weigh each location on its own, so that their map is max(0, sum_k w_k A_k) with w_k of the size of A_k:

* HiResCAM    (arXiv 2011.08891): g;
* Layer-CAM   (doi 10.1109/TIP.2021.3089943): max(0, g).

Letters: B images, K targets an image, C classes, D channels and h x w locations of the layer, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..inference.images import Batches, mask_normalised

# A map that varies by at most so many roundings of its level is constant: 2e-6 of it in float32. The sums over channels
# that are zero on paper came to a seventh of it, maps that show something to 300 times as much.
ROUNDINGS = 16


def class_activation_map(maps: Tensor, weights: Tensor) -> Tensor:
    """max(0, sum_k w_k A_k), scaled to [0, 1].

    Args:
        maps: A, (B, D, h, w).
        weights: w, (B, K, D) or (B, K, D, h, w).

    Returns:
        (B, K, h, w).
    """
    if weights.ndim == 3:
        weights = weights[..., None, None]
    # Products and sums instead of a matrix product: autocast would compute that in half precision.
    terms = weights * maps[:, None]
    cam = terms.sum(2).clamp(min=0)
    # The sum may be zero on paper: its rounding follows the terms and not what is left of them.
    level = terms.abs_().sum(2).amax((-2, -1), keepdim=True)
    return scale_maps(cam * is_not_constant(maps).any(1)[:, None, None, None], level)


def grad_cam_weights(gradients: Tensor) -> Tensor:
    """Grad-CAM's w, (B, K, D), from the gradients of the logits, (B, K, D, h, w)."""
    return gradients.mean((3, 4))


def grad_cam_pp_weights(maps: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++'s w, (B, K, D), from A, (B, D, h, w), and the gradients of the logits, (B, K, D, h, w)."""
    # g^2 cancels in alpha: an epsilon beside g^2 would show, and g^3 underflows where g is small.
    denominator = 2 + gradients * maps.sum((2, 3))[:, None, :, None, None]
    alpha = torch.where(denominator == 0, 0.0, 1 / denominator)
    return (alpha * gradients.clamp(min=0)).sum((3, 4))


def xgrad_cam_weights(maps: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM's w, (B, K, D), from A, (B, D, h, w), and the gradients of the logits, (B, K, D, h, w).

    A channel of sum 0 gets weight 0.
    """
    total = maps.sum((2, 3))[:, None]
    weighted = (gradients * maps[:, None]).sum((3, 4))
    return torch.where(total == 0, 0.0, weighted / total)


def score_cam_weights(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    x: Tensor,
    maps: Tensor,
    targets: Mapping[str, Tensor],
    mean: Tensor,
    std: Tensor,
    batches: Batches,
) -> dict[str, Tensor]:
    """Score-CAM's w: the probability of a class on the image masked by each channel, resized and scaled to [0, 1].

    The image is masked before its normalisation. A channel that is constant on an image gives no mask. It gets no
    forward and weight 0, as in Score-CAM's own code. Channels of an image that are equal after scaling give one mask,
    which is forwarded once: all channels with a single location above 0 that is the same, for instance.

    Args:
        predict: {pooling: (N, C) probabilities} of (N, 3, H, W) images.
        x: (B, 3, H, W) normalised images.
        maps: A, (B, D, h, w).
        targets: {pooling: (B, K) class indices}.
        mean: (3, 1, 1), of the normalisation of x.
        std: (3, 1, 1).
        batches: Calls a function with as many masks as `predict` gets images at once.

    Returns:
        {pooling: (B, K, D)} in [0, 1].
    """
    weights = {pooling: maps.new_zeros(*maps.shape[:2], t.shape[1]) for pooling, t in targets.items()}
    images, channels = is_not_constant(maps).nonzero(as_tuple=True)
    if not len(images):
        return {pooling: value.transpose(1, 2) for pooling, value in weights.items()}
    first, same = _first_of_equal(scale_maps(maps[images, channels]), images)

    def scores(part: Tensor) -> dict[str, Tensor]:
        image, channel = images[part], channels[part]
        # The authors resize with align_corners=True and scale afterwards; other orders give other maps.
        masks = F.interpolate(maps[image, channel][:, None], x.shape[2:], mode='bilinear', align_corners=True)
        masked = mask_normalised(x[image], scale_maps(masks).to(x.dtype), mean, std)
        prob = predict(masked)
        return {pooling: prob[pooling].gather(1, indices[image]).to(maps.dtype) for pooling, indices in targets.items()}

    parts = batches(scores, first)
    for pooling, value in weights.items():
        value[images[first], channels[first]] = torch.cat([part[pooling] for part in parts])
        value[images, channels] = value[images[same], channels[same]]
    return {pooling: value.transpose(1, 2) for pooling, value in weights.items()}


def _first_of_equal(masks: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Which of n masks are equal.

    Args:
        masks: (n, h, w).
        images: (n,) the image of each mask. Masks of two images are never equal.

    Returns:
        The positions of the masks that no earlier one equals, ascending, and (n,) that of the first equal one of each.
    """
    rows = torch.cat([images[:, None].to(masks.dtype), masks.flatten(1)], dim=1)
    if rows.device.type == 'mps':  # it finds no unique rows
        rows = rows.cpu()
    _, group = rows.unique(dim=0, return_inverse=True)
    group = group.to(masks.device)
    position = torch.arange(len(group), device=group.device)
    first = torch.full_like(group, len(group)).scatter_reduce(0, group, position, 'amin')
    same = first[group]
    return (same == position).nonzero()[:, 0], same


def scale_maps(maps: Tensor, level: Tensor | None = None) -> Tensor:
    """(..., h, w) scaled to [0, 1] by each map's own minimum and maximum.

    A constant map gives zeros: one whose maximum and minimum differ by at most `ROUNDINGS` roundings of its level. A
    map with NaN or infinity gives NaN everywhere.

    Args:
        maps: (..., h, w).
        level: (..., 1, 1), the size of the numbers that were added up to each map. None: its largest absolute value.
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    level = torch.maximum(low.abs(), high.abs()) if level is None else level
    spread = high - low
    scaled = torch.where(spread <= _rounding(level), 0.0, (maps - low) / spread)
    return torch.where(spread.isfinite(), scaled, math.nan)


def is_not_constant(maps: Tensor) -> Tensor:
    """(B, D) whether a channel of (B, D, h, w) varies by more than its rounding, see `scale_maps`.

    Where none varies, the sum over the channels is constant on paper, but not always after rounding.
    """
    low, high = maps.amin((2, 3)), maps.amax((2, 3))
    return high - low > _rounding(torch.maximum(low.abs(), high.abs()))


def _rounding(level: Tensor) -> Tensor:
    return ROUNDINGS * torch.finfo(level.dtype).eps * level
