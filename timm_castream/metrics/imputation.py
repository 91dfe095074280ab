"""Noisy linear imputation, which ROAD removes pixels with (Rong et al., arXiv 2202.00449, section 4).

A removed pixel becomes the mean of its eight neighbours: weight 1/6 for those beside, above and below it, 1/12 for the
diagonal ones, divided by the sum of the weights inside the image. For all removed pixels together this is a linear
system, like a heat equation with the kept pixels as its boundary. Noise is added afterwards.

The system is symmetric and positive definite on the removed pixels. Conjugate gradients solve it for a batch at once; a
multigrid cycle with Jacobi's smoother is their preconditioner (Tatebe, 1993). All equations are multiplied by 12: then
the weights are those of `_box`, without its centre.

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['linear_imputation']

_TOLERANCE = 5e-5  # largest residual of an equation, in units of the largest absolute value of the image
_MAX_STEPS = 200
_IMAGES_OF_CPU = 4  # solved at once: their arrays stay in the cache


@torch.no_grad()
def linear_imputation(x: Tensor, removed: Tensor, noise: Tensor | None = None) -> Tensor:
    """Replaces removed pixels by the linear imputation of their neighbours, plus noise.

    Args:
        x: (B, C, H, W) images.
        removed: (B, H, W) bool, True for the pixels to replace. Where an image has no other pixel, zeros replace all.
        noise: (B, C, H, W) or (C, H, W), added to the removed pixels. None: no noise.

    Returns:
        (B, C, H, W): kept pixels as in x. The equations of an image hold to 5e-5 of its largest absolute value.

    Raises:
        ValueError: If a shape or a type does not fit.
    """
    if x.ndim != 4 or removed.shape != (x.shape[0], *x.shape[2:]) or removed.dtype != torch.bool:
        raise ValueError(
            f'removed must be bool of shape ({x.shape[0]}, {", ".join(map(str, x.shape[2:]))}), got {removed.dtype} of '
            f'{tuple(removed.shape)}.'
        )
    work = x if x.dtype == torch.float64 else x.float()
    masks = removed[:, None].to(work.dtype)
    size = _IMAGES_OF_CPU if x.device.type == 'cpu' else max(1, len(x))
    with torch.autocast(x.device.type, enabled=False):
        solved = torch.cat([_solve(*part) for part in zip(work.split(size), masks.split(size), strict=True)])
    if noise is not None:
        solved = solved + noise.to(solved)
    return torch.where(removed[:, None], solved.to(x.dtype), x)


class _Grid:
    """The equations on one level: `centre * v - _box(v)` at each removed location.

    Args:
        removed: (B, 1, h, w), 1 at the unknowns.
        inside: (1, 1, h, w), 1 inside the image, 0 in what pads it.
    """

    def __init__(self, removed: Tensor, inside: Tensor) -> None:
        self.removed = removed
        self.centre = _box(inside)
        self.step = removed / (self.centre - 4 * inside).clamp(min=1)  # Jacobi's: 1 over the sum of the weights
        self._inside = inside

    def coarser(self) -> _Grid:
        """Half the height and width. A location is an unknown, or inside, if all four below it are."""
        removed, inside = ((_sum_of_four(values) == 4).to(values.dtype) for values in (self.removed, self._inside))
        return _Grid(removed, inside)

    def minus_operator(self, values: Tensor) -> Tensor:
        """The negative left side of the equations, at all locations; `values` are 0 where nothing is unknown."""
        return _box(values).addcmul_(self.centre, values, value=-1)


def _solve(x: Tensor, removed: Tensor) -> Tensor:
    """The solution on the removed pixels, (B, C, H, W); other pixels hold no meaning. `removed` is (B, 1, H, W)."""
    height, width = x.shape[2:]
    levels = max(0, (min(height, width) - 1).bit_length() - 3)  # 5 for 224 pixels, which then need no padding
    padding = (0, -width % 2**levels, 0, -height % 2**levels)
    kept = removed.flatten(1).amin(1) == 0  # images with a pixel that is not removed: the others have no equation
    inside = F.pad(x.new_ones(1, 1, height, width), padding)
    x, removed = F.pad(x, padding), F.pad(removed * kept[:, None, None, None], padding)
    grids = [_Grid(removed, inside)]
    for _ in range(levels):
        grids.append(grids[-1].coarser())

    # Each image stops by itself, so that it does not depend on the others of its batch.
    tolerance = 12 * _TOLERANCE * x.abs().amax((1, 2, 3), keepdim=True)
    solution, direction = torch.zeros_like(x), torch.zeros_like(x)
    residual = _box(x * (1 - removed)).mul_(removed)
    energy = torch.ones_like(x[..., :1, :1])
    for _ in range(_MAX_STEPS):
        unsolved = residual.abs().amax((1, 2, 3), keepdim=True) > tolerance
        if not unsolved.any():
            break
        corrected = _cycle(grids, residual)
        previous, energy = energy, _dot(residual, corrected)
        direction.mul_(energy / _positive(previous)).add_(corrected)
        image = grids[0].minus_operator(direction).mul_(removed)
        step = unsolved * energy / _positive(-_dot(direction, image))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image)
    return solution[..., :height, :width]


def _cycle(grids: list[_Grid], residual: Tensor) -> Tensor:
    """An approximate solution for a right side: a symmetric V-cycle with one sweep of Jacobi's before and after."""
    grid, *coarser = grids
    solution = residual * grid.step
    if coarser:
        left = grid.minus_operator(solution).add_(residual).mul_(grid.removed)
        # Bilinear interpolation is a box over repeated values, and restriction its transpose: weights 3/4 and 1/4.
        low = _sum_of_four(_box(left)).mul_(coarser[0].removed / 16)
        repeated = F.interpolate(_cycle(coarser, low), scale_factor=2, mode='nearest')
        solution.addcmul_(grid.removed / 16, _box(repeated))
    for _ in range(1 if coarser else 4):
        solution.addcmul_(grid.step, grid.minus_operator(solution).add_(residual))
    return solution


# Slices are added in place: on a CPU convolutions of one channel take two to three times as long.


def _box(values: Tensor) -> Tensor:
    """The sum of each location and its neighbours, with weights 1, 2, 1 along each axis and nothing outside."""
    rows = 2 * values
    rows[..., 1:] += values[..., :-1]
    rows[..., :-1] += values[..., 1:]
    sums = 2 * rows
    sums[..., 1:, :] += rows[..., :-1, :]
    sums[..., :-1, :] += rows[..., 1:, :]
    return sums


def _sum_of_four(values: Tensor) -> Tensor:
    """Sums over 2 x 2 locations: half the height and width, which are even."""
    rows = values[..., ::2, :] + values[..., 1::2, :]
    return rows[..., ::2] + rows[..., 1::2]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(B, C, 1, 1)."""
    return (one * other).sum((2, 3), keepdim=True)


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(value.dtype).tiny)
