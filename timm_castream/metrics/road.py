"""ROAD, "remove and debias" (Rong et al., arXiv 2202.00449): probabilities as pixels are removed by imputation.

A share of the pixels, the most or the least relevant of the map, is replaced by `imputation.linear_imputation` plus
noise, and the probability of the class is measured. The metric is the mean of the probability over the shares 20, 30,
..., 90 %, in percent. Removing the most relevant pixels first should make it low, the least relevant ones high.

Letters: B images, C channels, H x W pixels; T maps; S shares; Q poolings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._utils.checks import check_class_indices
from ..inference.images import check_images, check_saliency, resize_saliency
from ..inference.predictor import Predictor
from .curves import CURVE_SETTINGS
from .imputation import linear_imputation
from .measurements import MapGroup, References, measurement, reads_seed

__all__ = ['ROAD_SHARES', 'road_curve']

ROAD_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NOISE = 0.01
"""Standard deviation of the noise, in units of the normalised image, as in the authors' code."""


def road_curve(
    model: nn.Module,
    x: Tensor,
    saliency: Tensor,
    target: Tensor,
    most_relevant_first: bool = True,
    shares: Sequence[float] = ROAD_SHARES,
    batch_size: int | None = None,
    *,
    seed: int = 0,
    activation: str = 'softmax',
) -> Tensor:
    """Probability of the target class after the removal of each share of the pixels.

    Args:
        model: Any module that maps (N, C, H, W) to (N, classes) logits; it runs in eval mode and without gradients.
        x: (B, C, H, W) normalised images.
        saliency: (B, h, w) in [0, 1], resized bilinearly to H x W. Pixels of equal saliency follow in reading order.
        target: (B,) class indices.
        most_relevant_first: Whether the most or the least salient pixels are removed.
        shares: S shares of the pixels, each in (0, 1); `round(share * H * W)` pixels are removed.
        batch_size: Images forwarded at once; it never shows in the result.
        seed: Seed of the noise.
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.

    Returns:
        (B, S) probabilities.

    Raises:
        ValueError: On a bad shape, value, class or share.
    """
    check_images(x)
    check_saliency(saliency, x)
    check_class_indices('target', target)
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or not len(shares):
        raise ValueError(f'shares must lie between 0 and 1, got {wrong[0] if wrong else shares!r}.')
    predictor = Predictor(model, activation=activation, batch_size=batch_size)
    predictor.poolings = predictor.poolings[-1:]
    with predictor.evaluating():
        references = References(predictor, x, {}, CURVE_SETTINGS['paper'], {}, seed=seed)
        every = torch.arange(len(x), device=x.device)
        maps = resize_saliency(saliency.to(x.device), x.shape[2:])
        classes = target.to(x.device, torch.int64)[:, None]
        group = MapGroup(references, predictor.poolings, every, classes, maps)
        return removed_prob(group, most_relevant_first, shares)[..., 0]


@reads_seed
@measurement
def road_morf_prob(maps: MapGroup) -> Tensor:
    """(T, S, Q) probabilities without the most relevant pixels."""
    return removed_prob(maps, True)


@reads_seed
@measurement
def road_lerf_prob(maps: MapGroup) -> Tensor:
    """(T, S, Q) probabilities without the least relevant pixels."""
    return removed_prob(maps, False)


def removed_prob(maps: MapGroup, most_relevant_first: bool, shares: Sequence[float] = ROAD_SHARES) -> Tensor:
    """(T, S, Q) probabilities after the removal of each share of the pixels. The noise of an image is always the same."""
    num_pixels = maps.rank[0].numel()
    rank = maps.rank if most_relevant_first else num_pixels - 1 - maps.rank
    counts = torch.tensor([round(share * num_pixels) for share in shares], device=rank.device)
    noise = NOISE * maps.references.noise()
    pairs = torch.cartesian_prod(
        torch.arange(len(rank), device=rank.device), torch.arange(len(counts), device=rank.device)
    ).view(-1, 2)

    def predict(pairs: Tensor) -> Tensor:
        index, position = pairs.unbind(1)
        image = maps.image[index]
        removed = rank[index] < counts[position, None, None]
        return maps.predict(linear_imputation(maps.references.x[image], removed, noise[image]), index)

    parts = maps.predictor.batches(maps.references.x)(predict, pairs)
    return torch.cat(list(parts)).unflatten(0, (len(rank), len(counts)))
