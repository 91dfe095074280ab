"""Insertion and Deletion curves (RISE, arXiv 1806.07421): a probability while pixels change, most salient first.

Letters: B images of C channels and H x W pixels, normalised for the model; saliency maps of any size h x w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.checks import check_class_indices, check_count, check_names
from ..inference.images import Batches, check_images, check_saliency, default_batch_size, in_batches, resize_saliency
from ..inference.predictor import Predictor


class CurveSetting(NamedTuple):
    """Rows of pixels changed per step of a curve, and the side and sigma, in pixels, of Insertion's blur."""

    rows: int
    kernel_size: int
    sigma: float


CURVE_SETTINGS = {
    'paper': CurveSetting(rows=8, kernel_size=5, sigma=5.0),
    'rise': CurveSetting(rows=1, kernel_size=11, sigma=5.0),
}

# (images (N, C, H, W), index (N,) of the map that each was made by) -> probabilities (N, ...)
Predict = Callable[[Tensor, Tensor], Tensor]


def insertion_curve(
    model: nn.Module,
    x: Tensor,
    saliency: Tensor,
    target: Tensor,
    step: int | None = None,
    kernel_size: int | None = None,
    sigma: float | None = None,
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
        target: (B,) class indices. Of several labels an image, give one row of x, saliency and target for each.
        step: Pixels put in per step; the last step has the rest. None: 8 rows, 8 * W.
        kernel_size: Side of the blur kernel in pixels, odd. None: 5.
        sigma: Standard deviation of the blur in pixels. None: 5.
        batch_size: Images forwarded at once; it never shows in the result. By default `images.default_batch_size(x)`.
        setting: A published setting by name, in place of step, kernel_size and sigma: `'paper'`, the defaults, or
            `'rise'` (1 row a step, 11 x 11 kernel, sigma 5).
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.

    Returns:
        (B, n + 1) probabilities with n = ceil(H * W / step), taken from the logits in float32 even if these are half.

    Raises:
        ValueError: On a bad shape, value, class, setting or activation, or a setting beside an argument that it gives.
    """
    check_images(x)
    chosen, step = _chosen_setting(x, setting, step, kernel_size, sigma)
    blurred = blur(x, chosen.kernel_size, chosen.sigma)
    predictor = Predictor(model, activation=activation, batch_size=batch_size)
    return _target_curve(predictor, blurred, x, saliency, target, step)


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
    _, step = _chosen_setting(x, setting, step)
    zeros = torch.zeros_like(x)
    predictor = Predictor(model, activation=activation, batch_size=batch_size)
    return _target_curve(predictor, x, zeros, saliency, target, step)


@torch.no_grad()
def perturbation_curves(
    predict: Predict,
    start: Tensor,
    finish: Tensor,
    rank: Tensor,
    step: int,
    batches: Batches | None = None,
    *,
    image: Tensor | None = None,
    ends: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Probabilities while pixels of `start`, most salient first, become those of `finish`, for T maps at once.

    Insertion goes from the blurred image to the image, Deletion from the image to zeros.

    Args:
        predict: Called with (N, C, H, W) images and the (N,) indices, in 0 .. T - 1, of the maps they were made by;
            returns (N, ...) probabilities, for instance one column a pooling.
        start: (B, C, H, W) images before the first step.
        finish: (B, C, H, W) images after the last.
        rank: (T, H, W) of the maps, as `saliency_rank` gives it.
        step: Pixels changed per step.
        batches: Calls a function with as many pairs of a map and a point as `predict` gets images at once, by default
            `images.default_batch_size(start)`.
        image: (T,) the image of each map, in 0 .. B - 1. None: one map an image.
        ends: `predict` of the start and of the finish of each map, (T, ...) each, where known: several maps share them.

    Returns:
        (T, n + 1, ...) probabilities with n = ceil(H * W / step).

    Raises:
        ValueError: On a bad shape or value.
    """
    image = torch.arange(len(start), device=start.device) if image is None else image
    if rank.shape != (len(image), *start.shape[2:]):
        raise ValueError(f'rank must have shape {(len(image), *start.shape[2:])}, got {tuple(rank.shape)}.')
    check_count('step', step)
    batches = in_batches(default_batch_size(start)) if batches is None else batches

    num_steps = -(-rank[0].numel() // step)
    points = torch.arange(num_steps + 1, device=start.device)
    if ends is not None:
        points = points[1:-1]

    def probabilities_at(pairs: Tensor) -> Tensor:
        maps, points = pairs.unbind(1)
        changed = rank[maps] < (points * step)[:, None, None]
        # Images that are one image again and again are not copied.
        after, before = (
            images[:1] if len(images) == 1 or images.stride(0) == 0 else images[image[maps]]
            for images in (finish, start)
        )
        return predict(torch.where(changed[:, None], after, before), maps)

    pairs = torch.cartesian_prod(torch.arange(len(rank), device=start.device), points)
    inner = torch.cat(list(batches(probabilities_at, pairs))).unflatten(0, (len(rank), len(points)))
    return inner if ends is None else torch.cat([ends[0][:, None], inner, ends[1][:, None]], dim=1)


def curve_setting(name: str) -> CurveSetting:
    """The published setting of Insertion and Deletion of that name, of `CURVE_SETTINGS`.

    Raises:
        ValueError: If there is no setting of that name.
    """
    check_names('setting', (name,), tuple(CURVE_SETTINGS))
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


def blur(x: Tensor, kernel_size: int = 5, sigma: float = 5.0) -> Tensor:
    """Images filtered by `blur_kernel`, with zeros after normalisation around the image.

    Args:
        x: (B, C, H, W) normalised images.
        kernel_size: Side of the kernel in pixels, odd.
        sigma: Standard deviation in pixels, positive and finite.

    Returns:
        (B, C, H, W), normalised as x.

    Raises:
        ValueError: As `blur_kernel`.
    """
    kernel = blur_kernel(kernel_size, sigma).to(x).expand(x.shape[1], 1, -1, -1)
    with torch.autocast(x.device.type, enabled=False):
        # Contiguous input keeps CUDA on its float32 depthwise kernel; cuDNN's would round to TF32.
        return F.conv2d(x.contiguous(), kernel, padding=kernel_size // 2, groups=x.shape[1])


def saliency_rank(saliency: Tensor) -> Tensor:
    """(T, H, W) rank of each pixel in its map: 0 for the most salient, ties in reading order."""
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand(order.shape)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, rank).view(saliency.shape)


def _chosen_setting(
    x: Tensor, setting: str | None, step: int | None, kernel_size: int | None = None, sigma: float | None = None
) -> tuple[CurveSetting, int]:
    """The setting with the arguments in it, and the pixels per step.

    Raises:
        ValueError: If a setting and one of its arguments are both given.
    """
    arguments = {'step': step, 'kernel_size': kernel_size, 'sigma': sigma}
    given = [name for name, value in arguments.items() if value is not None]
    if setting is not None and given:
        raise ValueError(f'setting={setting!r} gives {", ".join(given)} already: pass the one or the other.')
    chosen = curve_setting(setting or 'paper')
    if kernel_size is not None:
        chosen = chosen._replace(kernel_size=kernel_size)
    if sigma is not None:
        chosen = chosen._replace(sigma=sigma)
    return chosen, chosen.rows * x.shape[3] if step is None else step


def _target_curve(
    predictor: Predictor, start: Tensor, finish: Tensor, saliency: Tensor, target: Tensor, step: int
) -> Tensor:
    """The curve of one map and one target an image, (B, n + 1)."""
    predictor.check_channels(start)
    check_saliency(saliency, start)
    if not isinstance(target, Tensor) or target.shape != start.shape[:1]:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f'target must be a tensor of shape ({len(start)},), one class an image, got {given}.')
    check_class_indices('target', target)
    target = target.to(start.device, torch.int64)

    def predict(images: Tensor, index: Tensor) -> Tensor:
        logits = predictor.forward(images)
        check_class_indices('target', target, logits.shape[1])
        probabilities = predictor.probabilities(logits).to(torch.promote_types(logits.dtype, torch.float32))
        return probabilities.gather(1, target[index, None])[:, 0]

    with predictor.evaluating():
        rank = saliency_rank(resize_saliency(saliency.to(start.device), start.shape[2:]))
        return perturbation_curves(predict, start, finish, rank, step, predictor.batches(start))
