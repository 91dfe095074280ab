"""What happens to a map if the network, the image or the mask changes: sanity checks, stability and coherency.

* Randomisation (Adebayo et al., arXiv 1810.03292): the weights are drawn anew from the classifier down, a quarter of the
  layers at a time. The metric compares the map with that of each randomised network: Spearman's rank correlation, or
  SSIM, averaged over the four networks. A map that explains the network changes, so lower is better.
* Stability (Agarwal et al., arXiv 2203.06877): the largest relative change of the map under small noise on the image,
  over the relative change of the image, max_k (|S_k - S| / |S|) / (|x_k - x| / |x|) with Euclidean norms, in percent.
  Lower is better. The paper divides each value by itself; saliency maps have zeros, so whole maps are compared here.
* Coherency, complexity and ADCC (Poppi et al., arXiv 2104.10252): with S the map, S' the map of the image masked by S,
  coherency = (1 + correlation of S and S') / 2, complexity = mean of S, and ADCC is the harmonic mean of coherency,
  1 - complexity and 1 - average drop.

Letters: T maps; H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .measurements import MapGroup, explains_again, reads_seed

__all__ = ['adcc', 'coherency', 'complexity', 'rank_correlation', 'stability', 'structural_similarity']

NOISE = 0.02
"""Standard deviation of the noise on the image, where black is 0 and white is 1."""
NUM_NOISY = 5
NUM_RANDOMISED = 4


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation of the pixels of two maps, in percent; 0 where a map is constant.

    Args:
        one, other: (T, H, W).

    Returns:
        (T,) in [-100, 100].
    """
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(maps.detach().flatten(1).cpu().numpy(), axis=1)) for maps in (one, other)]
    return (100 * _correlation(*ranks)).to(one)


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """SSIM of two maps in [0, 1], with a Gaussian window of sigma 1.5, in percent.

    Args:
        one, other: (T, H, W).

    Returns:
        (T,).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (maps.double()[:, None] for maps in (one, other))
    values: Any = structural_similarity_index_measure(first, second, data_range=1.0, reduction='none')
    return 100 * values.to(one)


def stability(saliency: Tensor, others: Tensor, x: Tensor, noisy: Tensor) -> Tensor:
    """The largest relative change of a map over the relative change of its image, in percent.

    Args:
        saliency: (T, H, W) maps.
        others: (K, T, H, W) maps of K noisy images.
        x: (T, C, H, W) images, black is 0.
        noisy: (K, T, C, H, W).

    Returns:
        (T,) at least 0. The relative change of a map of zeros is 1 if another map is none, else 0.
    """
    changed = (others - saliency).flatten(2).norm(dim=2)
    norm = saliency.flatten(1).norm(dim=1)
    of_map = torch.where(norm > 0, changed / norm, (changed > 0).to(changed))
    of_image = (noisy - x).flatten(2).norm(dim=2) / x.flatten(1).norm(dim=1)
    return 100 * (of_map / of_image).amax(0)


def coherency(saliency: Tensor, of_masked: Tensor) -> Tensor:
    """(1 + Pearson's correlation of a map and the map of the image masked by it) / 2, in percent.

    Args:
        saliency, of_masked: (T, H, W). A correlation with a constant map is 0.

    Returns:
        (T,) in [0, 100].
    """
    return 50 * (1 + _correlation(saliency.flatten(1).double(), of_masked.flatten(1).double())).to(saliency)


def complexity(saliency: Tensor) -> Tensor:
    """The mean of each (T, H, W) map in [0, 1], in percent: (T,)."""
    return 100 * saliency.flatten(1).mean(1)


def adcc(coherency: Tensor, complexity: Tensor, average_drop: Tensor) -> Tensor:
    """The harmonic mean of coherency, 100 - complexity and 100 - average drop, all (T,) in percent; 0 where one is 0."""
    parts = torch.stack([coherency, 100 - complexity, 100 - average_drop]).clamp(min=0)
    return 3 / (1 / parts).sum(0)


@explains_again
def map_of_masked(maps: MapGroup) -> Tensor:
    """(T, H, W) maps of the images masked by the maps."""
    return maps.explain_each(lambda index: maps.mask(index, maps.saliency[index]))


@reads_seed
@explains_again
def map_stability(maps: MapGroup) -> Tensor:
    """(T,) see `stability`."""
    references = maps.references
    mean, std = references.predictor.normalisation(references.x)
    pixels = references.x * std + mean
    noisy, others = [], []
    for number in range(1, NUM_NOISY + 1):  # number 0 is ROAD's
        changed = references.x + NOISE / std * references.noise(number)
        noisy.append((changed * std + mean)[maps.image])
        others.append(maps.explain_each(_images_of(maps, changed)))
    return stability(maps.saliency, torch.stack(others), pixels[maps.image], torch.stack(noisy))


@reads_seed
@explains_again
def maps_of_randomised(maps: MapGroup) -> Tensor:
    """(T, K, H, W) maps of the same images by K networks, each with more of its layers randomised."""
    others = []
    for number in range(1, NUM_RANDOMISED + 1):
        with randomised(maps.predictor.model, number / NUM_RANDOMISED, maps.references.seed):
            others.append(maps.explain_each(_images_of(maps, maps.references.x)))
    return torch.stack(others, 1)


@contextmanager
def randomised(model: nn.Module, share: float, seed: int) -> Iterator[None]:
    """Draws the weights of the last layers of a model anew inside, and puts the old values back afterwards.

    Layers are the modules with parameters of their own, in the order of `model.modules()`. A layer draws its weights by
    its own `reset_parameters`, or from a normal distribution of standard deviation 0.02.

    Args:
        model: The model; it is changed in place, so that methods of the user see it too.
        share: Of the layers, in (0, 1].
        seed: Of the weights.
    """
    layers = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
    chosen = layers[len(layers) - round(share * len(layers)) :]
    tensors = [tensor for layer in chosen for tensor in (*layer.parameters(False), *layer.buffers(False))]
    before = [tensor.detach().clone() for tensor in tensors]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            for layer in chosen:
                reset = getattr(layer, 'reset_parameters', None)
                if callable(reset):
                    reset()
                else:
                    for parameter in layer.parameters(recurse=False):
                        parameter.normal_(std=0.02)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


def _images_of(maps: MapGroup, images: Tensor) -> Callable[[Tensor], Tensor]:
    """From (N,) maps to the (N, C, H, W) images that they belong to, of (B, C, H, W)."""
    return lambda index: images[maps.image[index]]


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """(T,) Pearson's correlation of the rows of two (T, n) tensors; 0 where a row is constant."""
    one, other = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    norm = one.norm(dim=1) * other.norm(dim=1)
    return ((one * other).sum(1) / norm).where(norm > 0, 0.0)
