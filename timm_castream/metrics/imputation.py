"""Noisy linear imputation, which ROAD removes pixels with (Rong et al., arXiv 2202.00449, section 4).

A removed pixel becomes the mean of its eight neighbours: weight 1/6 for those beside, above and below it, 1/12 for the
diagonal ones, divided by the sum of the weights inside the image. For all removed pixels together this is a linear
system, like a heat equation with the kept pixels as its boundary. Noise is added afterwards.

The system is symmetric and positive definite on the removed pixels. Conjugate gradients solve it for a batch at once,
with the multilevel preconditioner of Bramble, Pasciak and Xu (Math. Comp. 55, 1990).

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['linear_imputation']

_TOLERANCE = 1e-4  # largest residual of an equation, in units of the largest absolute value of the image
_MAX_STEPS = 500


@torch.no_grad()
def linear_imputation(x: Tensor, removed: Tensor, noise: Tensor | None = None) -> Tensor:
    """Replaces removed pixels by the linear imputation of their neighbours, plus noise.

    Args:
        x: (B, C, H, W) images.
        removed: (B, H, W) bool, True for the pixels to replace. Where an image has no other pixel, zeros replace all.
        noise: (B, C, H, W) or (C, H, W), added to the removed pixels. None: no noise.

    Returns:
        (B, C, H, W): kept pixels as in x. The equations of an image hold to 1e-4 of its largest absolute value.

    Raises:
        ValueError: If a shape or a type does not fit.
    """
    if x.ndim != 4 or removed.shape != (x.shape[0], *x.shape[2:]) or removed.dtype != torch.bool:
        raise ValueError(
            f'removed must be bool of shape ({x.shape[0]}, {", ".join(map(str, x.shape[2:]))}), got {removed.dtype} of '
            f'{tuple(removed.shape)}.'
        )
    work = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        solved = _solve(work, removed[:, None].to(work.dtype))
    if noise is not None:
        solved = solved + noise.to(solved)
    return torch.where(removed[:, None], solved.to(x.dtype), x)


def _solve(x: Tensor, removed: Tensor) -> Tensor:
    """The solution on the removed pixels, (B, C, H, W); other pixels hold no meaning. `removed` is (B, 1, H, W)."""
    height, width = x.shape[2:]
    levels = max(0, (min(height, width) - 1).bit_length() - 3)  # 5 for 224 pixels, which then need no padding
    padding = (0, -width % 2**levels, 0, -height % 2**levels)
    # The sum of the weights inside the image: 1 away from the borders.
    diagonal = F.pad(_neighbours(x.new_ones(1, 1, height, width)), padding)
    kept = removed.flatten(1).amin(1) == 0  # images with a pixel that is not removed: the others have no equation
    x, removed = F.pad(x, padding), F.pad(removed * kept[:, None, None, None], padding)
    known = x * (1 - removed)
    # A coarse correction may change a location if all pixels below it are removed.
    masks = [removed]
    for _ in range(levels):
        masks.append((F.avg_pool2d(masks[-1], 2) == 1).to(x.dtype))

    def operator(values: Tensor) -> Tensor:
        return (diagonal * values).sub_(_neighbours(values)).mul_(removed)

    def precondition(residual: Tensor) -> Tensor:
        residuals = [residual]
        for mask in masks[1:]:
            residuals.append(_restrict(residuals[-1]).mul_(mask))
        correction = residuals.pop()
        for mask in reversed(masks[:-1]):
            correction = _prolong(correction).add_(residuals.pop()).mul_(mask)
        return correction

    # Each image stops by itself, so that it does not depend on the others of its batch.
    tolerance = _TOLERANCE * x.abs().amax((1, 2, 3), keepdim=True)
    solution = torch.zeros_like(x)
    residual = _neighbours(known) * removed
    corrected = precondition(residual)
    direction = corrected.clone()
    energy = _dot(residual, corrected)
    for _ in range(_MAX_STEPS):
        unsolved = residual.abs().amax((1, 2, 3), keepdim=True) > tolerance
        if not unsolved.any():
            break
        image = operator(direction)
        step = unsolved * energy / _positive(_dot(direction, image))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        corrected = precondition(residual)
        previous, energy = energy, _dot(residual, corrected)
        direction.mul_(energy / _positive(previous)).add_(corrected)
    return solution[..., :height, :width]


# Slices are added in place: on a CPU convolutions of one channel take two to three times as long.


def _neighbours(values: Tensor) -> Tensor:
    """The weighted sum of the eight neighbours of each pixel; there is nothing outside the image."""
    rows = 2 * values
    rows[..., 1:] += values[..., :-1]
    rows[..., :-1] += values[..., 1:]
    sums = 2 * rows
    sums[..., 1:, :] += rows[..., :-1, :]
    sums[..., :-1, :] += rows[..., 1:, :]
    return sums.sub_(values, alpha=4).div_(12)


def _prolong(values: Tensor) -> Tensor:
    """Twice the height and width, bilinearly: weights 3/4 and 1/4 along each axis, and 0 outside."""
    columns = torch.stack([3 * values] * 2, -1)
    columns[..., 1:, 0] += values[..., :-1]
    columns[..., :-1, 1] += values[..., 1:]
    wide = columns.flatten(-2)
    rows = torch.stack([3 * wide] * 2, -2)
    rows[..., 1:, 0, :] += wide[..., :-1, :]
    rows[..., :-1, 1, :] += wide[..., 1:, :]
    return rows.flatten(-3, -2).div_(16)


def _restrict(values: Tensor) -> Tensor:
    """The transpose of `_prolong`, half the height and width, which are even."""
    even, odd = values[..., ::2, :], values[..., 1::2, :]
    low = (even + odd).mul_(3)
    low[..., 1:, :] += odd[..., :-1, :]
    low[..., :-1, :] += even[..., 1:, :]
    even, odd = low[..., ::2], low[..., 1::2]
    small = (even + odd).mul_(3)
    small[..., 1:] += odd[..., :-1]
    small[..., :-1] += even[..., 1:]
    return small.div_(16)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(B, C, 1, 1)."""
    return (one * other).sum((2, 3), keepdim=True)


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(value.dtype).tiny)
