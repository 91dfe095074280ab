"""The interpretability protocol on one batch of images: accuracy, saliency by every method, and the chosen metrics.

GAP and CA share every forward that does not depend on a map of their own: that of the images, of the ends of the curves
and, in Score-CAM, of the masked images. A quantity that no chosen metric needs is not measured.

Letters: B images, C classes, M methods, H x W pixels; R pairs of an image and a class explained.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._utils.checks import check_class_indices
from ..attribution.methods import Batch
from ..attribution.saliency import explain
from ..datasets.folders import NO_TARGET
from ..inference.images import resize_saliency
from ..inference.predictor import Predictor
from ..metrics.localization import has_box
from ..metrics.measurements import MapGroup, References, measure
from ..metrics.table import Measurements
from .plan import Plan
from .values import ImageValues

# (P,) positions in the batch and (P,) classes -> (P, J, 4) boxes in pixels of the input
FindBoxes = Callable[[Tensor, Tensor], Tensor]


class Protocol:
    """Measures batches of images.

    Args:
        predictor: The network.
        plan: What to measure.
        num_classes: C.
        is_multilabel: Whether labels are (B, C): 1, 0, or negative where a class does not count.
        keep_curves: Whether the values hold the curves of Insertion and Deletion.
    """

    def __init__(
        self,
        predictor: Predictor,
        plan: Plan,
        *,
        num_classes: int,
        is_multilabel: bool = False,
        keep_curves: bool = False,
    ) -> None:
        self.predictor = predictor
        self.plan = plan
        self.num_classes = num_classes
        self.is_multilabel = is_multilabel
        self._kept = plan.curves if keep_curves else ()
        self._constants: dict[Any, dict[str, Tensor]] = {}

    def measure(
        self, indices: Sequence[int], x: Tensor, labels: Tensor, find_boxes: FindBoxes | None = None
    ) -> ImageValues:
        """Measures a batch.

        Args:
            indices: B positions of the images in the data set.
            x: (B, channels, H, W).
            labels: (B,) or (B, C).
            find_boxes: None where no metric needs boxes.

        Raises:
            ValueError: If the labels do not fit.
        """
        self._check_labels(labels, len(x))
        predictor, methods = self.predictor, self.plan.methods
        position = torch.tensor(list(indices), device=x.device)
        x = predictor.to_mask(x)
        batch = Batch(predictor, x, methods, position, self.plan.seed)
        prob = {p: predictor.probabilities(batch.logits[p], p) for p in predictor.poolings}
        if predictor.score is not None:
            _check_values(prob)
        images = {'image': position, **self._outcome(labels, prob)}
        classes, valid = self._explained(labels, prob)
        image = valid.nonzero()[:, 0]
        pairs = {'image': position[image]}
        if len(image):
            references = References(
                predictor, x, prob, self.plan.curve_setting, self._constants, position, self.plan.seed, self.plan.value
            )
            maps = explain(batch, classes)
            groups = {}
            for p in predictor.poolings:
                of_pooling = [maps[p, method.name][valid] for method in methods]
                for method, given in zip(methods, of_pooling, strict=True):
                    pairs[f'{p}/{method.name}/constant'] = given.eq(0).flatten(1).all(1)
                    pairs[f'{p}/{method.name}/not_finite'] = _is_nan(given)
                saliency = [resize_saliency(given.nan_to_num(0), x.shape[2:]) for given in of_pooling]
                groups[p] = MapGroup(
                    references,
                    (p,),
                    image.repeat(len(methods)),
                    classes[p][valid].repeat(len(methods))[:, None],
                    torch.cat(saliency),
                    find_boxes,
                    functools.partial(self._explain_others, p, position[image], classes[p][valid]),
                )
            measured = measure(self.plan.needs, groups)
            for p, group in groups.items():
                not_finite = torch.cat([pairs[f'{p}/{method.name}/not_finite'] for method in methods])
                pairs |= self._values(p, group, measured[p], len(image), not_finite)
        return ImageValues(*({name: _array(value) for name, value in table.items()} for table in (images, pairs)))

    def _values(
        self, pooling: str, group: MapGroup, measured: Mapping[str, Tensor], num_pairs: int, not_finite: Tensor
    ) -> dict[str, Tensor]:
        """The values of R pairs under a pooling, by the names of `ImageValues.pairs`.

        Those of maps with NaN, (M R,) `not_finite`, and of maps for which the network gives NaN, are NaN.
        """
        prob = group.reference_prob('image')[:, 0]
        values = {f'{pooling}/class': group.classes[:num_pairs, 0], f'{pooling}/prob': prob[:num_pairs]}
        if 'boxes' in measured:
            values[f'{pooling}/has_box'] = has_box(measured['boxes'][:num_pairs])
        lost = _is_nan(prob)  # the network gives NaN: no number is measured of such a map
        for name in measured.keys() - {'boxes'}:
            lost |= _is_nan(measured[name])
        known = {name: value if name == 'boxes' else value.nan_to_num(0) for name, value in measured.items()}
        quantities = Measurements(prob=prob.nan_to_num(0), **known)
        of_metric = {
            row.name: _without(row.values(quantities), lost | not_finite).split(num_pairs)
            for row in self.plan.metric_rows
        }
        for position, method in enumerate(self.plan.methods):
            values[f'{pooling}/{method.name}/unmeasured'] = lost.split(num_pairs)[position]
        kept = {name: _without(measured[name], not_finite).split(num_pairs) for name in self._kept}
        for position, method in enumerate(self.plan.methods):
            for name, parts in (of_metric | kept).items():
                values[f'{pooling}/{method.name}/{name}'] = parts[position]
        return values

    def _explain_others(self, pooling: str, position: Tensor, classes: Tensor, images: Tensor, index: Tensor) -> Tensor:
        """(N, H, W): maps of other images by the methods and for the classes of (N,) maps, of R pairs a method.

        Args:
            pooling: The pooling.
            position: (R,) positions of the images of the pairs in the data set.
            classes: (R,) classes of the pairs.
            images: (N, channels, H, W).
            index: (N,) the maps that the images belong to.
        """
        predictor = self.predictor.accelerated(None)  # other weights may be in the network than in the engine
        predictor.poolings = (pooling,)
        maps = images.new_empty(len(images), *images.shape[2:])
        method, pair = index // len(position), index % len(position)
        for number in method.unique().tolist():
            row, chosen = self.plan.methods[number], (method == number).nonzero()[:, 0]
            pairs = pair[chosen]
            batch = Batch(predictor, images[chosen], (row,), position[pairs], self.plan.seed)
            saliency = explain(batch, {pooling: classes[pairs]})[pooling, row.name][:, 0]
            maps[chosen] = resize_saliency(saliency, images.shape[2:]).to(maps)
        return maps

    def _outcome(self, labels: Tensor, prob: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whether the predictions are right, in percent; of multi-label data the labels and the probabilities."""
        if self.is_multilabel:
            return {'label': labels, **{f'{p}/score': value for p, value in prob.items()}}
        right = {f'{p}/accuracy': 100.0 * (value.argmax(1) == labels) for p, value in prob.items()}
        return {
            name: value.masked_fill((labels < 0) | (self.predictor.score is not None), math.nan)
            for name, value in right.items()
        }

    def _explained(self, labels: Tensor, prob: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The classes to explain: (B, K) under each pooling, and which of them count, (B, K)."""
        if self.plan.target == 'predicted' or self.predictor.score is not None:
            classes = {p: value.argmax(1, keepdim=True) for p, value in prob.items()}
            return classes, torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        if not self.is_multilabel:
            return dict.fromkeys(prob, labels[:, None]), torch.ones_like(labels[:, None], dtype=torch.bool)
        counts = (labels > 0).sum(1)
        # Positive labels come first. Other classes fill up the pairs; `valid` leaves them out.
        order = (labels > 0).sort(dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
        valid = torch.arange(order.shape[1], device=labels.device) < counts[:, None]
        return dict.fromkeys(prob, order), valid

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        if self.is_multilabel:
            if labels.shape != (batch, self.num_classes):
                raise ValueError(
                    f'The targets of {batch} images have shape {tuple(labels.shape)}, the model has '
                    f'{self.num_classes} classes.'
                )
            shares = labels[labels != labels.round()]
            if len(shares):
                raise ValueError(
                    f'The target of an image has {shares[0].item():g} for a class: a vector has 1 for classes that are '
                    'there, 0 for others and -1 for those that do not count; for one class an image give its index.'
                )
            return
        if labels.shape != (batch,):
            raise ValueError(
                f'The targets of {batch} images must be class indices, got {tuple(labels.shape)} of {labels.dtype}.'
            )
        if self.predictor.score is not None:
            return
        if self.plan.target == 'predicted':  # images without a class have no accuracy, and are explained all the same
            labels = labels[labels != NO_TARGET]
        if len(labels):
            check_class_indices('The target of the data set', labels, self.num_classes)


def _without(values: Tensor, lost: Tensor) -> Tensor:
    """Values of T maps, NaN where a map is lost; yes and no stay, which `ImageValues.is_measured` leaves out."""
    if not values.is_floating_point():
        return values
    return values.masked_fill(lost.view(-1, *[1] * (values.ndim - 1)), math.nan)


def _is_nan(values: Tensor) -> Tensor:
    """(T,) whether a number of each map is NaN."""
    return values.isnan().reshape(len(values), -1).any(1)


def _check_values(values: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the values of a target of the user are finite and in [0, 1], as the metrics take them."""
    for value in values.values():
        outside = value[(value < 0) | (value > 1)]
        if len(outside):
            raise ValueError(
                f'target as a function gave {outside[0].item():g}, and the metrics take values in [0, 1]: end it with '
                'sigmoid(), or scale it.'
            )


def _array(value: Tensor) -> np.ndarray:
    """On the CPU; floating point numbers in float64."""
    return (value.detach().cpu().double() if value.is_floating_point() else value.cpu()).numpy()
