"""Insertion and Deletion curves, of RISE, arXiv 1806.07421: a probability as the pixels change, most salient first.

Letters: B images of C channels and H x W pixels, normalised for the model; saliency maps of any size h x w.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import eval_mode
from .cam import probabilities
from .images import (
    check_count,
    check_images,
    check_saliency,
    check_unit_range,
    default_batch_size,
    fast_memory_format,
    resize_saliency,
)


class CurveSetting(NamedTuple):
    """Rows of pixels changed per step of a curve, and the side and sigma, in pixels, of Insertion's blur."""

    rows: int
    kernel_size: int
    sigma: float


CURVE_SETTINGS = {
    'paper': CurveSetting(rows=8, kernel_size=5, sigma=5.),
    'rise': CurveSetting(rows=1, kernel_size=11, sigma=5.),
}

# (images (N, C, H, W), index (N,) of the image that each was made from) -> probabilities (N, ...)
Predict = Callable[[Tensor, Tensor], Tensor]


def insertion_curve(
        model: nn.Module,
        x: Tensor,
        saliency: Tensor,
        target: Tensor,
        step: int | None = None,
        kernel_size: int = 5,
        sigma: float = 5.,
        batch_size: int | None = None,
        *,
        setting: str | None = None,
        activation: str = 'softmax',
) -> Tensor:
    """Probability of the target class as pixels, most salient first, are put into the blurred image.

    The curve starts at `blur(x)` and ends at x. Pixels of equal saliency follow in reading order, so that a curve is
    the same alone as in a batch and on any device; RISE's code leaves that order to the sort of numpy.

    Args:
        model: Any module that maps (N, C, H, W) to (N, classes) logits; it runs in eval mode and without gradients.
        x: (B, C, H, W) normalised images.
        saliency: (B, h, w) in [0, 1], resized bilinearly (align_corners=False) to H x W.
        target: (B,) class numbers. Of several labels an image, give one row of x, saliency and target for each.
        step: Pixels put in per step, the last step takes what is left; by default 8 rows, 8 * W.
        kernel_size: Side of the blur kernel in pixels, odd.
        sigma: Standard deviation of the blur in pixels.
        batch_size: Images forwarded at once; it never shows in the result. By default `images.default_batch_size(x)`.
        setting: A published setting by name, which goes before step, kernel_size and sigma: `'paper'`, the defaults,
            or `'rise'` (1 row a step, 11 x 11 kernel, sigma 5).
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.

    Returns:
        (B, n + 1) probabilities with n = ceil(H * W / step), taken from the logits in float32 even if these are half.

    Raises:
        ValueError: On a bad shape, value, class, setting or activation.
    """
    check_images(x)
    if setting is not None:
        _, kernel_size, sigma = curve_setting(setting)
    blurred = blur(x, kernel_size, sigma)
    return _target_curve(model, blurred, x, saliency, target, _step(x, step, setting), batch_size, activation)


def deletion_curve(
        model: nn.Module,
        x: Tensor,
        saliency: Tensor,
        target: Tensor,
        step: int | None = None,
        batch_size: int | None = None,
        *,
        setting: str | None = None,
        activation: str = 'softmax',
) -> Tensor:
    """Probability of the target class as pixels, most salient first, are taken out of the image.

    The curve starts at x and ends at zeros after normalisation, the mean colour. Ties as in `insertion_curve`.

    Args, Returns, Raises: as `insertion_curve`; nothing is blurred.
    """
    check_images(x)
    zeros = torch.zeros_like(x)
    return _target_curve(model, x, zeros, saliency, target, _step(x, step, setting), batch_size, activation)


@torch.no_grad()
def perturbation_curves(
        predict: Predict,
        start: Tensor,
        finish: Tensor,
        saliency: Tensor,
        step: int,
        batch_size: int | None = None,
        ends: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Probabilities as pixels of `start`, most salient first, become those of `finish`, for M maps an image at once.

    Insertion goes from the blurred image to the image, Deletion from the image to zeros.

    Args:
        predict: Called with (N, C, H, W) images and the (N,) numbers, in 0 .. B - 1, of the images they were made
            from; returns (N, ...) probabilities, for instance one column a pooling.
        start: (B, C, H, W) images before the first step.
        finish: (B, C, H, W) images after the last.
        saliency: (M, B, h, w) in [0, 1], M maps for every image.
        step: Pixels changed per step.
        batch_size: Images that `predict` gets at once, by default `images.default_batch_size(start)`.
        ends: `predict` of `start` and of `finish`, (B, ...) each, where known: they depend on no map.

    Returns:
        (M, B, n + 1, ...) probabilities with n = ceil(H * W / step).

    Raises:
        ValueError: On a bad shape or value.
    """
    num_images, device = len(start), start.device
    if saliency.ndim != 4 or saliency.shape[1] != num_images:
        raise ValueError(f'saliency must have shape (M, {num_images}, h, w), got {tuple(saliency.shape)}.')
    check_unit_range('saliency', saliency)
    check_count('step', step)
    batch_size = default_batch_size(start) if batch_size is None else batch_size
    check_count('batch_size', batch_size)

    rank = _saliency_rank(resize_saliency(saliency.flatten(0, 1), start.shape[2:]))
    num_steps = -(-rank[0].numel() // step)
    points = torch.arange(num_steps + 1, device=device)
    if ends is not None:
        points = points[1:-1]
    memory_format = fast_memory_format(start)

    def probabilities_at(maps: Tensor, points: Tensor) -> Tensor:
        index = maps % num_images
        changed = rank[maps] < (points * step)[:, None, None]
        images = torch.where(changed[:, None], finish[index], start[index])
        return predict(images.contiguous(memory_format=memory_format), index)

    pairs = torch.cartesian_prod(torch.arange(len(rank), device=device), points)
    batches = [probabilities_at(*batch.unbind(1)) for batch in pairs.split(batch_size)]
    inner = torch.cat(batches).unflatten(0, (len(saliency), num_images, len(points)))
    if ends is None:
        return inner
    first, last = (end.expand(len(saliency), *end.shape)[:, :, None] for end in ends)
    return torch.cat([first, inner, last], dim=2)


def curve_setting(name: str) -> CurveSetting:
    """The published setting of Insertion and Deletion of that name, of `CURVE_SETTINGS`.

    Raises:
        ValueError: If there is no setting of that name.
    """
    if name not in CURVE_SETTINGS:
        raise ValueError(f'setting {name!r} is unknown, valid ones: {", ".join(map(repr, CURVE_SETTINGS))}.')
    return CURVE_SETTINGS[name]


def blur_kernel(kernel_size: int, sigma: float) -> Tensor:
    """The blur kernel of the paper's and of RISE's code, (kernel_size, kernel_size) in float64, of sum 1.

    It is an impulse in an array of that size, filtered by a Gaussian (cut at 4 sigma) with mirrored edges: all weight
    beyond the edges is folded back. So 5 x 5 of sigma 5 is a mean filter to 3e-6, and RISE's 11 x 11 of sigma 5 lies
    between a box and a sampled Gaussian.

    Raises:
        ValueError: If `kernel_size` is not a positive odd int or `sigma` not positive and finite.
    """
    check_count('kernel_size', kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd, got {kernel_size}.')
    if not 0 < sigma < float('inf'):
        raise ValueError(f'sigma must be positive and finite, got {sigma}.')
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    # a mirrored line (a b c | c b a | a b c) repeats after twice its length
    position = (kernel_size // 2 + offset) % (2 * kernel_size)
    position = torch.minimum(position, 2 * kernel_size - 1 - position)
    line = torch.zeros(kernel_size, dtype=torch.float64).index_add_(0, position, weight / weight.sum())
    return torch.outer(line, line)


def blur(x: Tensor, kernel_size: int = 5, sigma: float = 5.) -> Tensor:
    """Normalised images (B, C, H, W) filtered by `blur_kernel`, with zeros after normalisation around the image."""
    kernel = blur_kernel(kernel_size, sigma).to(x).expand(x.shape[1], 1, -1, -1)
    with torch.autocast(x.device.type, enabled=False):
        # Contiguous input keeps CUDA on its float32 depthwise kernel; cuDNN's would round to TF32.
        return F.conv2d(x.contiguous(), kernel, padding=kernel_size // 2, groups=x.shape[1])


def _saliency_rank(saliency: Tensor) -> Tensor:
    """(R, H, W) rank of each pixel in its map, 0 for the most salient, ties in reading order."""
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand(order.shape)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, rank).view(saliency.shape)


def _step(x: Tensor, step: int | None, setting: str | None) -> int:
    """Pixels per step: those of a setting, else those asked for, else those of the paper."""
    if step is None or setting is not None:
        return curve_setting(setting or 'paper').rows * x.shape[3]
    return step


def _target_curve(
        model: nn.Module,
        start: Tensor,
        finish: Tensor,
        saliency: Tensor,
        target: Tensor,
        step: int,
        batch_size: int | None,
        activation: str,
) -> Tensor:
    """The curve of one map and one target an image, (B, n + 1)."""
    check_saliency(saliency, start)
    predict = _target_probability(model, target, start, activation)
    with eval_mode(model):
        return perturbation_curves(predict, start, finish, saliency[None], step, batch_size)[0]


def _target_probability(model: nn.Module, target: Tensor, x: Tensor, activation: str) -> Predict:
    """`model` as what `perturbation_curves` calls: the probability of each image's own target."""
    if activation not in ('softmax', 'sigmoid'):
        raise ValueError(f"activation {activation!r} is unknown, valid ones: 'softmax', 'sigmoid'.")
    if target.shape != x.shape[:1]:
        raise ValueError(f'target must have shape ({len(x)},), one class an image, got {tuple(target.shape)}.')
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f'target must hold class numbers, got {target.dtype}.')
    if (target < 0).any():
        raise ValueError(f'target must hold class numbers from 0, got {target.min().item()}.')
    target = target.to(x.device, torch.int64)
    highest = int(target.max())

    def predict(images: Tensor, index: Tensor) -> Tensor:
        logits = model(images)
        if highest >= logits.shape[1]:
            raise ValueError(f'target has class {highest}, the model has classes 0 to {logits.shape[1] - 1}.')
        return probabilities(logits, activation).gather(1, target[index, None])[:, 0]

    return predict
