"""The mathematics of class activation maps: Grad-CAM, Grad-CAM++ and Score-CAM of feature maps, whatever the model.

Each is max(0, sum_k w_k A_k) of a layer's feature maps A_k. They differ in the weights:

* Grad-CAM    (arXiv 1610.02391): mean over the locations of g = dy / dA_k, y the logit of the class;
* Grad-CAM++  (arXiv 1710.11063): sum of alpha max(0, g), alpha = g^2 / (2 g^2 + g^3 sum(A_k)), its eq. (19);
* Score-CAM   (arXiv 1910.01279): probability of the class on the image masked by A_k, as in the CA-Stream paper.

Letters: B images, K targets an image, C classes, D channels and h x w locations of the layer, H x W pixels.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .images import default_batch_size, fast_memory_format, mask_normalised


def class_activation_map(maps: Tensor, weights: Tensor) -> Tensor:
    """max(0, sum_k w_k A_k), scaled to [0, 1].

    Args:
        maps: A, (B, D, h, w).
        weights: w, (B, K, D).

    Returns:
        (B, K, h, w).
    """
    # Products and sums, no matrix product: autocast would take that in half precision.
    cam = (weights[..., None, None] * maps[:, None]).sum(2).clamp(min=0)
    return scale_maps(cam * varies(maps).any(1)[:, None, None, None])


def grad_cam_weights(gradients: Tensor) -> Tensor:
    """Grad-CAM's w, (B, K, D), from the gradients of the logits, (B, K, D, h, w)."""
    return gradients.mean((3, 4))


def grad_cam_pp_weights(maps: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++'s w, (B, K, D), from A, (B, D, h, w), and the gradients of the logits, (B, K, D, h, w)."""
    # g^2 cancels in alpha: an epsilon beside g^2 would show, and g^3 underflows where g is small.
    denominator = 2 + gradients * maps.sum((2, 3))[:, None, :, None, None]
    alpha = torch.where(denominator == 0, 0., 1 / denominator)
    return (alpha * gradients.clamp(min=0)).sum((3, 4))


def score_cam_weights(
        forward: Callable[[Tensor], Mapping[str, Tensor]],
        x: Tensor,
        maps: Tensor,
        targets: Mapping[str, Tensor],
        mean: Tensor,
        std: Tensor,
        batch_size: int | None = None,
        activation: str = 'softmax',
) -> dict[str, Tensor]:
    """Score-CAM's w: the probability of a class on the image masked by each channel, resized and scaled to [0, 1].

    The image is masked before its normalisation. A channel that is constant on an image is no mask: it gets no
    forward and weight 0, as in Score-CAM's own code.

    Args:
        forward: {pooling: (N, C) logits} of (N, 3, H, W) images.
        x: (B, 3, H, W) normalised images.
        maps: A, (B, D, h, w).
        targets: {pooling: (B, K) class indices}.
        mean: (3, 1, 1), with which x was normalised.
        std: (3, 1, 1).
        batch_size: Masked images forwarded at once, by default `default_batch_size(x)`.
        activation: `'softmax'` or `'sigmoid'`.

    Returns:
        {pooling: (B, K, D)} in [0, 1].
    """
    batch_size = batch_size or default_batch_size(x)
    memory_format = fast_memory_format(x)
    weights = {pooling: maps.new_zeros(*maps.shape[:2], t.shape[1]) for pooling, t in targets.items()}
    images, channels = varies(maps).nonzero(as_tuple=True)
    for start in range(0, len(images), batch_size):
        image, channel = images[start:start + batch_size], channels[start:start + batch_size]
        # The authors resize with align_corners=True and scale afterwards; other orders give other maps.
        masks = F.interpolate(maps[image, channel][:, None], x.shape[2:], mode='bilinear', align_corners=True)
        masked = mask_normalised(x[image], scale_maps(masks).to(x.dtype), mean, std)
        logits = forward(masked.contiguous(memory_format=memory_format))
        for pooling, indices in targets.items():
            scores = probabilities(logits[pooling], activation).gather(1, indices[image])
            weights[pooling][image, channel] = scores.to(maps.dtype)
    return {pooling: value.transpose(1, 2) for pooling, value in weights.items()}


def probabilities(logits: Tensor, activation: str = 'softmax') -> Tensor:
    """Probabilities of (..., C) logits in float32 or wider: a softmax in half precision rounds those near 1 to 1.

    Args:
        logits: (..., C).
        activation: `'softmax'` or `'sigmoid'`.
    """
    logits = at_least_float32(logits)
    return logits.softmax(-1) if activation == 'softmax' else logits.sigmoid()


def scale_maps(maps: Tensor) -> Tensor:
    """(..., h, w) scaled to [0, 1] by each map's own minimum and maximum, zeros where it is constant."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high == low, 0., (maps - low) / (high - low))


def varies(maps: Tensor) -> Tensor:
    """(B, D) whether a channel of (B, D, h, w) is not constant.

    Where none varies, what is summed over the channels is constant on paper, but not always after rounding.
    """
    return maps.amax((2, 3)) > maps.amin((2, 3))


def at_least_float32(value: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
