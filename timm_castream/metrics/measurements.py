"""What is measured of saliency maps, each quantity once for all metrics that read it.

A measurement is a function of a `MapGroup`, under its own name in `MEASUREMENTS`; a reference image is a function of
`References`, in `REFERENCES`. A new metric is a row of `table.METRICS`. If it needs something new, that is one function
here, or in a module that `table` imports:

    @measurement
    def top_half_prob(maps: MapGroup) -> Tensor:
        changed = lambda index: maps.mask(index, maps.rank[index] < maps.rank[0].numel() // 2)
        return maps.predict_each(changed)

    @reference
    def black(references: References) -> Tensor: ...  # an end of a new curve: `perturbed(maps, 'black', 'image')`

The row then names it, `needs=frozenset({'top_half_prob'})`, and reads it: `lambda m: average_drop(m.prob,
m.top_half_prob)`. The protocol, the files and the report know no measurement by name.

Letters: B images, C channels, H x W pixels; T maps, each of an image and a class explained; Q poolings; N images of one
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..inference.predictor import Predictor
from .curves import CurveSetting, blur, perturbation_curves, saliency_rank

MEASUREMENTS: dict[str, Callable[[MapGroup], Tensor]] = {}
REFERENCES: dict[str, Callable[[References], Tensor]] = {}
_OF_ONE_POOLING: set[str] = set()
READ_SEED: set[str] = set()
"""Measurements that depend on the seed of the evaluation."""
EXPLAIN_AGAIN: set[str] = set()
"""Measurements that run the methods on other images or weights, which saved maps cannot."""

FunctionT = TypeVar('FunctionT', bound=Callable[[Any], Tensor])


def measurement(function: FunctionT) -> FunctionT:
    """Adds a function to `MEASUREMENTS`, by its name.

    It gets a group of T maps under Q poolings and returns (T, ..., Q). Maps that are equal under both poolings come in
    one group of two poolings, so that `MapGroup.predict` forwards their images once.
    """
    MEASUREMENTS[function.__name__] = function
    return function


def measurement_of_one_pooling(function: FunctionT) -> FunctionT:
    """As `measurement`, for a function that gets groups of one pooling alone and returns (T, ...)."""
    _OF_ONE_POOLING.add(function.__name__)
    return measurement(function)


def reads_seed(function: FunctionT) -> FunctionT:
    """Adds the name of a measurement to `READ_SEED`."""
    READ_SEED.add(function.__name__)
    return function


def explains_again(function: FunctionT) -> FunctionT:
    """A measurement of one pooling that calls `MapGroup.explain`; its name is in `EXPLAIN_AGAIN` too."""
    EXPLAIN_AGAIN.add(function.__name__)
    return measurement_of_one_pooling(function)


def reference(function: FunctionT) -> FunctionT:
    """Adds a function to `REFERENCES`, by its name: images that depend on no map, (B, C, H, W).

    An image that is the same for all is (1, C, H, W).
    """
    REFERENCES[function.__name__] = function
    return function


class References:
    """Images that depend on no map, such as the ends of the curves, and the probabilities of all classes on them.

    Each is made and forwarded once for all maps, under all poolings.

    Args:
        predictor: The network, in evaluation mode.
        x: (B, C, H, W) normalised images.
        probabilities: {pooling: (B, classes)} of x.
        setting: Of the curves.
        value: A number, or one per channel, in [0, 1]: the colour of `flat`.
        constants: Probabilities of the images that are the same for all, kept from batch to batch.
        indices: (B,) positions of the images in their data set. None: 0 to B - 1.
        seed: Of `noise`.
    """

    def __init__(
        self,
        predictor: Predictor,
        x: Tensor,
        probabilities: dict[str, Tensor],
        setting: CurveSetting,
        constants: dict[Any, dict[str, Tensor]],
        indices: Tensor | None = None,
        seed: int = 0,
        value: Sequence[float] = (0.5,),
    ) -> None:
        self.predictor = predictor
        self.x = x
        self.setting = setting
        self.indices = torch.arange(len(x)) if indices is None else indices.cpu()
        self.seed = seed
        self.value = value
        self._constants = constants
        self._images: dict[str, Tensor] = {'image': x}
        self._probabilities: dict[str, dict[str, Tensor]] = {'image': probabilities}

    def images(self, name: str) -> Tensor:
        """(B, C, H, W)."""
        if name not in self._images:
            self._images[name] = REFERENCES[name](self)
        return self._images[name].expand_as(self.x)

    def probabilities(self, name: str) -> dict[str, Tensor]:
        """{pooling: (B, classes)}."""
        images = self.images(name)
        if name not in self._probabilities:
            if len(self._images[name]) < len(images):
                key = name, images.shape[1:]
                if key not in self._constants:  # a batch of one would be rounded in another way than the others
                    self._constants[key] = {p: value[:1] for p, value in self._predict(images).items()}
                self._probabilities[name] = {
                    pooling: value.expand(len(images), -1) for pooling, value in self._constants[key].items()
                }
            else:
                self._probabilities[name] = self._predict(images)
        return self._probabilities[name]

    def noise(self, number: int = 0) -> Tensor:
        """(B, C, H, W) standard normal: it depends on the seed, the position of an image and the number alone."""
        rows = [
            np.random.default_rng((self.seed, index, number)).standard_normal(self.x.shape[1:], dtype=np.float32)
            for index in self.indices.tolist()
        ]
        return torch.from_numpy(np.stack(rows)).to(self.x)

    def _predict(self, images: Tensor) -> dict[str, Tensor]:
        parts = self.predictor.batches(images)(self.predictor.logits, images)
        return {
            pooling: self.predictor.probabilities(torch.cat([part[pooling] for part in parts]), pooling)
            for pooling in parts[0]
        }


@dataclass(frozen=True)
class MapGroup:
    """T maps that are measured together, under Q poolings.

    Attributes:
        references: Images that depend on no map.
        poolings: Q names.
        image: (T,) the image of each map, in 0 .. B - 1.
        classes: (T, Q) the class that each map explains under each pooling.
        saliency: (T, H, W) in [0, 1].
        find_boxes: From (P,) images and (P,) classes to (P, J, 4) boxes. None where no metric reads boxes.
        explain: From (N, C, H, W) images and the (N,) maps that they belong to, to (N, H, W): maps of these images by
            the methods and for the classes of those maps. Groups of one pooling have it.
    """

    references: References
    poolings: tuple[str, ...]
    image: Tensor
    classes: Tensor
    saliency: Tensor
    find_boxes: Callable[[Tensor, Tensor], Tensor] | None = None
    explain: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def predictor(self) -> Predictor:
        """The network, in evaluation mode."""
        return self.references.predictor

    @cached_property
    def rank(self) -> Tensor:
        """(T, H, W) rank of each pixel in its map: 0 for the most salient, ties in reading order."""
        return saliency_rank(self.saliency)

    def chosen(self, index: Tensor, poolings: dict[str, Tensor]) -> MapGroup:
        """The group of some of the maps under given poolings, {pooling: (T,) classes}."""
        if len(index) == len(self.saliency) and tuple(poolings) == self.poolings:
            return self
        classes = torch.stack(list(poolings.values()), dim=1)[index]
        return MapGroup(self.references, tuple(poolings), self.image[index], classes, self.saliency[index])

    def predict(self, images: Tensor, index: Tensor) -> Tensor:
        """(N, Q) probabilities on (N, C, H, W) images of one forward, of the classes of (N,) maps."""
        logits = self.predictor.logits(images, self.poolings)
        return self._of_classes({name: self.predictor.probabilities(logits[name], name) for name in logits}, index)

    def predict_each(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """(T, Q) probabilities on one image a map; `make` gives (N, C, H, W) images of (N,) maps.

        Threads of an engine call `make` side by side.
        """
        every = torch.arange(len(self.saliency), device=self.saliency.device)
        batches = self.predictor.batches(self.references.x)
        return torch.cat(list(batches(lambda index: self.predict(make(index), index), every)))

    def reference_prob(self, name: str) -> Tensor:
        """(T, Q) probabilities on a reference image."""
        of_image = {pooling: value[self.image] for pooling, value in self.references.probabilities(name).items()}
        return self._of_classes(of_image, torch.arange(len(self.image), device=self.image.device))

    def mask(self, index: Tensor, masks: Tensor) -> Tensor:
        """(N, C, H, W): the images of (N,) maps, multiplied by (N, H, W) masks before normalisation."""
        return self.predictor.mask(self.references.x[self.image[index]], masks)

    def explain_each(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """(T, H, W): the maps of one image a map; `make` gives (N, C, H, W) images of (N,) maps."""
        assert self.explain is not None  # a measurement of one pooling asks
        every = torch.arange(len(self.saliency), device=self.saliency.device)
        return torch.cat([self.explain(make(index), index) for index in every.split(len(self.references.x))])

    def _of_classes(self, probabilities: dict[str, Tensor], index: Tensor) -> Tensor:
        classes = self.classes[index].unbind(1)
        return torch.stack(
            [probabilities[name].gather(1, c[:, None])[:, 0] for name, c in zip(self.poolings, classes, strict=True)], 1
        )


@reference
def blurred(references: References) -> Tensor:
    """The start of Insertion."""
    return blur(references.x, references.setting.kernel_size, references.setting.sigma)


@reference
def zeros(references: References) -> Tensor:
    """The end of Deletion: the mean colour of the data that the network was trained on."""
    return torch.zeros_like(references.x[:1])


@reference
def black(references: References) -> Tensor:
    """Pixels of value 0 before normalisation."""
    return _of_colour(references, (0.0,))


@reference
def flat(references: References) -> Tensor:
    """Pixels of the value that the evaluation gives."""
    return _of_colour(references, references.value)


def _of_colour(references: References, colour: Sequence[float]) -> Tensor:
    """(1, C, H, W) normalised."""
    mean, std = references.predictor.normalisation(references.x)
    pixels = torch.tensor(colour).to(mean).view(1, -1, 1, 1)
    return ((pixels - mean) / std).expand(1, *references.x.shape[1:])


@measurement
def masked_prob(maps: MapGroup) -> Tensor:
    """(T, Q) probability of the class on the image masked by the map."""
    return maps.predict_each(lambda index: maps.mask(index, maps.saliency[index]))


@measurement_of_one_pooling
def pixel_shares(maps: MapGroup) -> Tensor:
    """(T, n + 1) the share of the pixels that has changed at each point of a curve."""
    num_pixels = maps.saliency[0].numel()
    step = maps.references.setting.rows * maps.saliency.shape[2]
    changed = torch.arange(-(-num_pixels // step) + 1, device=maps.saliency.device) * step
    return (changed.clamp(max=num_pixels) / num_pixels).expand(len(maps.saliency), -1)


@measurement
def top_half_prob(maps: MapGroup) -> Tensor:
    """(T, Q) probability of the class on the image masked by the map, of which the top half of the pixels is kept.

    Score-CAM's authors (arXiv 1910.01279, section 4.2) mute the other half. Of equal pixels the first ones are kept.
    """

    rank = maps.rank

    def changed(index: Tensor) -> Tensor:
        kept = rank[index] < rank[0].numel() // 2
        return maps.mask(index, maps.saliency[index] * kept)

    return maps.predict_each(changed)


@measurement_of_one_pooling
def boxes(maps: MapGroup) -> Tensor:
    """(T, J, 4) boxes of the class in pixels of the input, NaN where an image has fewer than J."""
    assert maps.find_boxes is not None  # evaluate refuses metrics of boxes for a data set without boxes
    pairs, inverse = torch.stack([maps.image, maps.classes[:, 0]], 1).unique(dim=0, return_inverse=True)
    return maps.find_boxes(*pairs.unbind(1))[inverse]


@measurement_of_one_pooling
def saliency(maps: MapGroup) -> Tensor:
    """(T, H, W) the maps themselves."""
    return maps.saliency


def perturbed(maps: MapGroup, start: str, finish: str) -> Tensor:
    """(T, n + 1, Q) probabilities while pixels of one reference, most salient first, become those of another."""
    return perturbation_curves(
        maps.predict,
        maps.references.images(start),
        maps.references.images(finish),
        maps.rank,
        maps.references.setting.rows * maps.saliency.shape[2],
        maps.predictor.batches(maps.references.x),
        image=maps.image,
        ends=(maps.reference_prob(start), maps.reference_prob(finish)),
    )


# Curves, (T, n + 1, Q), by their first and last image.
for _name, _start, _finish in (
    ('insertion_curve', 'blurred', 'image'),
    ('deletion_curve', 'image', 'zeros'),
    ('insertion_black_curve', 'black', 'image'),
    ('insertion_mean_curve', 'zeros', 'image'),
    ('deletion_black_curve', 'image', 'black'),
    ('deletion_blur_curve', 'image', 'blurred'),
    ('insertion_value_curve', 'flat', 'image'),
    ('deletion_value_curve', 'image', 'flat'),
):
    MEASUREMENTS[_name] = partial(perturbed, start=_start, finish=_finish)


def measure(names: Collection[str], groups: Mapping[str, MapGroup]) -> dict[str, dict[str, Tensor]]:
    """Measures maps under one or two poolings.

    Args:
        names: Of `MEASUREMENTS`.
        groups: {pooling: the T maps under it}, of the same images in the same order.

    Returns:
        {pooling: {name: (T, ...)}}.
    """
    measured: dict[str, dict[str, Tensor]] = {pooling: {} for pooling in groups}
    parts = _parts(groups)
    for name in names:
        function = MEASUREMENTS[name]
        if name in _OF_ONE_POOLING:
            for pooling, group in groups.items():
                measured[pooling][name] = function(group)
            continue
        for index, part in parts:
            for pooling, values in zip(part.poolings, function(part).unbind(-1), strict=True):
                if name not in measured[pooling]:
                    measured[pooling][name] = values.new_empty(len(groups[pooling].image), *values.shape[1:])
                measured[pooling][name][index] = values
    return measured


def _parts(groups: Mapping[str, MapGroup]) -> list[tuple[Tensor, MapGroup]]:
    """Maps that are equal under all poolings in one group, and the others of each pooling: (positions, group)."""
    first, *others = groups.values()
    equal = torch.full(first.image.shape, bool(others), device=first.image.device)
    for other in others:
        equal &= (other.saliency == first.saliency).flatten(1).all(1)
    shared, own = equal.nonzero()[:, 0], (~equal).nonzero()[:, 0]
    parts = [(own, group.chosen(own, {name: group.classes[:, 0]})) for name, group in groups.items() if len(own)]
    if len(shared):
        parts.append((shared, first.chosen(shared, {name: group.classes[:, 0] for name, group in groups.items()})))
    return parts
