"""The interpretability protocol on one batch of images: accuracy, saliency by every method, and the five metrics.

What GAP and CA share is computed once: the forwards of the images, of the blurred images where Insertion starts, of the
zeros where Deletion ends and, in Score-CAM, of the masked images.

Letters: B images, C classes, M methods; R rows, one for each image and class explained.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import metrics
from .attach import POOLINGS, forward_both, pooling
from .attribution import METHODS, attribute_all, check_names
from .cam import probabilities
from .curves import blur, curve_setting, perturbation_curves
from .images import check_count, default_batch_size, fast_memory_format, mask_image
from .mixin import CAStreamMixin
from .report import METRICS

TARGETS = ('truth', 'predicted')


@dataclass
class Protocol:
    """What is measured of images, and how. The arguments are those of `evaluate.evaluate`.

    Args:
        multilabel: Whether labels are (B, C): 1, 0, or negative where a class does not count.

    Raises:
        ValueError: If an argument is unknown.
    """

    model: CAStreamMixin
    methods: Sequence[str]
    poolings: Sequence[str]
    target: str = 'truth'
    setting: str = 'paper'
    layer: str | None = None
    batch_size: int | None = None
    channels_last: bool = False
    torchcompile: bool = False
    multilabel: bool = False

    def __post_init__(self) -> None:
        check_names('method', self.methods, METHODS)
        check_names('pooling', self.poolings, POOLINGS)
        check_names('target', (self.target,), TARGETS)
        if self.batch_size is not None:
            check_count('batch_size', self.batch_size)
        self._curve = curve_setting(self.setting)
        self._activation = 'sigmoid' if self.multilabel else 'softmax'
        self._forward_both: Callable[..., dict[str, Tensor]] = forward_both
        self._network: Callable[[Tensor], Tensor] = self.model
        if self.torchcompile:
            self._forward_both, self._network = torch.compile(forward_both), torch.compile(self.model)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names of the columns of rows, see `report.ImageValues`."""
        columns = ('class', 'prob', *(f'{method}/{metric}' for method in self.methods for metric in METRICS))
        return ('image', *(f'{p}/{column}' for p in self.poolings for column in columns))

    @property
    def image_names(self) -> tuple[str, ...]:
        """Names of the columns of images, see `report.ImageValues`."""
        if not self.multilabel:
            return ('image', *(f'{p}/accuracy' for p in self.poolings))
        kinds = ('label', *(f'{p}/score' for p in self.poolings))
        return ('image', *(f'{kind}/{c}' for kind in kinds for c in range(self.model.num_classes)))

    def measure(self, numbers: Tensor, x: Tensor, labels: Tensor) -> dict[str, list[list[float]]]:
        """The `rows` and `images` of a batch as `ImageValues` has them.

        Args:
            numbers: (B,) places of the images in the data set.
            x: (B, 3, H, W).
            labels: (B,) or (B, C).
        """
        self._check_labels(labels, len(x))
        x = x.contiguous(memory_format=self._memory_format(x))
        zeros = torch.zeros_like(x)
        blurred = blur(x, self._curve.kernel_size, self._curve.sigma)
        prob = self._probabilities(torch.cat([x, blurred, zeros[:1]]))
        sizes = [len(x), len(x), 1]
        clean, of_blurred, of_zeros = ({p: prob[p].split(sizes)[i] for p in self.poolings} for i in range(3))
        if self.multilabel:
            outcome = [labels, *(clean[p] for p in self.poolings)]
        else:
            outcome = [100 * (clean[p].argmax(1) == labels)[:, None] for p in self.poolings]

        classes, valid = self._explained(labels, clean)
        place = valid.nonzero()[:, 0]  # of the image of each row
        columns = [numbers[place]]
        if len(place):
            maps = attribute_all(
                self.model, x, self.methods, classes, self.poolings, self.layer, self.batch_size,
                activation=self._activation, forward=lambda images: self._logits(images, self.poolings))
            for p in self.poolings:
                explained = classes[p][valid]
                ends = [
                    of.expand(len(valid), -1)[place].gather(1, explained[:, None])[:, 0]
                    for of in (clean[p], of_blurred[p], of_zeros[p])
                ]
                saliency = torch.stack([maps[p, m][valid] for m in self.methods])
                values = self._faithfulness(p, explained, saliency, x[place], blurred[place], zeros[place], ends)
                columns += [explained, ends[0], *values]
        return {
            'rows': torch.stack([column.cpu().double() for column in columns], 1).tolist(),
            'images': torch.cat([value.cpu().double() for value in (numbers[:, None], *outcome)], dim=1).tolist(),
        }

    def _faithfulness(
            self,
            p: str,
            classes: Tensor,
            saliency: Tensor,
            x: Tensor,
            blurred: Tensor,
            zeros: Tensor,
            ends: Sequence[Tensor],
    ) -> list[Tensor]:
        """The five metrics of every method under pooling p, (R,) each.

        Args:
            p: A pooling.
            classes: (R,).
            saliency: (M, R, h, w) in [0, 1].
            x, blurred, zeros: (R, 3, H, W) images, and what Insertion starts and Deletion ends with.
            ends: (R,) probabilities of `classes` on these three.
        """
        def predict(images: Tensor, index: Tensor) -> Tensor:
            logits = self._logits(images, (p,))[p]
            return probabilities(logits, self._activation).gather(1, classes[index, None])[:, 0]

        prob, of_blurred, of_zeros = ends
        size, step = self._batch_size(x), self._curve.rows * x.shape[3]
        masked = mask_image(self.model, x.repeat(len(saliency), 1, 1, 1), saliency.flatten(0, 1))
        place = torch.arange(len(x), device=x.device).repeat(len(saliency))
        masked_prob = torch.cat([
            predict(*part) for part in zip(masked.split(size), place.split(size), strict=True)
        ]).unflatten(0, saliency.shape[:2])
        insertion = perturbation_curves(predict, blurred, x, saliency, step, size, (of_blurred, prob))
        deletion = perturbation_curves(predict, x, zeros, saliency, step, size, (prob, of_zeros))
        return [
            value
            for of_masked, inserted, deleted in zip(masked_prob, insertion, deletion, strict=True)
            for value in (
                metrics.average_drop(prob, of_masked),
                metrics.average_gain(prob, of_masked),
                metrics.average_increase(prob, of_masked),
                metrics.area_under_curve(inserted),
                metrics.area_under_curve(deleted),
            )
        ]

    def _explained(self, labels: Tensor, prob: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The classes to explain: (B, K) under each pooling, and which of them count, (B, K)."""
        if self.target == 'predicted':
            classes = {p: prob[p].argmax(1, keepdim=True) for p in self.poolings}
            return classes, torch.ones_like(classes[self.poolings[0]], dtype=torch.bool)
        if not self.multilabel:
            return dict.fromkeys(self.poolings, labels[:, None]), torch.ones_like(labels[:, None], dtype=torch.bool)
        counts = (labels > 0).sum(1)
        # Positive labels in front; behind them others fill up the rows.
        order = (labels > 0).sort(dim=1, descending=True, stable=True).indices[:, :int(counts.max())]
        valid = torch.arange(order.shape[1], device=labels.device) < counts[:, None]
        return dict.fromkeys(self.poolings, order), valid

    def _probabilities(self, images: Tensor) -> dict[str, Tensor]:
        parts = [self._logits(part, self.poolings) for part in images.split(self._batch_size(images))]
        return {p: probabilities(torch.cat([part[p] for part in parts]), self._activation) for p in self.poolings}

    def _logits(self, images: Tensor, poolings: Sequence[str]) -> dict[str, Tensor]:
        """Logits under each of the poolings, from one pass over the backbone."""
        count = len(images)
        if self.torchcompile:  # another number of images or another memory format would compile another graph
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self._batch_size(images) - count))
        images = images.contiguous(memory_format=self._memory_format(images))
        if len(poolings) > 1:
            logits = self._forward_both(self.model, images)
        else:
            with pooling(self.model, poolings[0]):
                logits = {poolings[0]: self._network(images)}
        return {p: logits[p][:count] for p in poolings}

    def _memory_format(self, images: Tensor) -> torch.memory_format:
        return torch.channels_last if self.channels_last else fast_memory_format(images)

    def _batch_size(self, images: Tensor) -> int:
        return self.batch_size or default_batch_size(images)

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        classes = self.model.num_classes
        if self.multilabel:
            if labels.shape != (batch, classes):
                raise ValueError(f'The targets of {batch} images have shape {tuple(labels.shape)}, the model has '
                                 f'{classes} classes.')
        elif labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(f'The targets of {batch} images must be class indices, got {tuple(labels.shape)} of '
                             f'{labels.dtype}.')
        elif not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f'The data set has labels from {int(labels.min())} to {int(labels.max())}, the model has '
                             f'classes 0 to {classes - 1}.')
