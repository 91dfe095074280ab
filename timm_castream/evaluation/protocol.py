"""The interpretability protocol on one batch of images: accuracy, saliency by every method, and the chosen metrics.

GAP and CA share the forwards of the images, of the blurred images at the start of Insertion, of the zeros at the end of
Deletion and, in Score-CAM, of the masked images. A quantity that no chosen metric needs is not computed.

Letters: B images, C classes, M methods, H x W pixels; R rows, one for each image and class explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._utils.checks import check_class_indices, check_names
from ..attribution.methods import Method
from ..attribution.saliency import saliency_maps
from ..inference.images import resize_saliency
from ..inference.predictor import Predictor
from ..metrics.curves import blur, curve_setting, perturbation_curves
from ..metrics.table import METRICS, Measurements

TARGETS = ('truth', 'predicted')

# (pooling, 'class'), (pooling, 'prob'), (pooling, method, metric) or (pooling, method, metric, position)
Column = tuple[str, ...]


class Protocol:
    """Measures batches of images. The arguments are those of `evaluate.evaluate`.

    Args:
        network: The network.
        methods: Rows of the table of methods.
        metrics: Names of `METRICS`.
        target: `'truth'` or `'predicted'`.
        setting: Name of the setting of Insertion and Deletion.
        seed: Seed of the method `random`.
        num_classes: C.
        multilabel: Whether labels are (B, C): 1, 0, or negative where a class does not count.
        keep_curves: Whether records hold the curves of Insertion and Deletion.

    Raises:
        ValueError: If a name is unknown.
    """

    def __init__(
        self,
        network: Predictor,
        methods: Sequence[Method],
        metrics: Sequence[str],
        target: str = 'truth',
        setting: str = 'paper',
        *,
        num_classes: int,
        seed: int = 0,
        multilabel: bool = False,
        keep_curves: bool = False,
    ) -> None:
        check_names('metric', metrics, tuple(METRICS))
        check_names('target', (target,), TARGETS)
        self.network = network
        self.methods = tuple(methods)
        self.metrics = tuple(METRICS[name] for name in metrics)
        self.target = target
        self.seed = seed
        self.num_classes = num_classes
        self.multilabel = multilabel
        self._setting = curve_setting(setting)
        self._needs = frozenset().union(*(metric.needs for metric in self.metrics))
        self.keep_curves = keep_curves

    @property
    def row_columns(self) -> tuple[Column, ...]:
        """Names of the columns of rows, see `report.ImageValues`."""
        return (
            ('image',),
            *(
                column
                for p in self.network.poolings
                for column in ((p, 'class'), (p, 'prob'), *self._metric_columns(p))
            ),
        )

    @property
    def image_columns(self) -> tuple[Column, ...]:
        """Names of the columns of images, see `report.ImageValues`."""
        poolings = self.network.poolings
        if not self.multilabel:
            return (('image',), *((p, 'accuracy') for p in poolings))
        kinds = (('label',), *((p, 'score') for p in poolings))
        return (('image',), *((*kind, str(c)) for kind in kinds for c in range(self.num_classes)))

    @property
    def _curves(self) -> list[tuple[str, str, str]]:
        """(pooling, method, metric) of every curve, in the order of a record."""
        kinds = [row.name for row in self.metrics if f'{row.name}_curve' in row.needs]
        return [(p, m.name, kind) for p in self.network.poolings for kind in kinds for m in self.methods]

    def curve_width(self, height: int, width: int) -> int:
        """Columns of the table of curves: the index of the image, then n + 1 points a curve."""
        return 1 + len(self._curves) * (-(-height // self._setting.rows) + 1)

    def named_curves(self, table: np.ndarray) -> dict[tuple[str, str, str], np.ndarray]:
        """The table of curves by (pooling, method, metric), (R, n + 1) each."""
        return dict(zip(self._curves, np.split(table[:, 1:], len(self._curves), axis=1), strict=True))

    def _metric_columns(self, pooling: str) -> list[Column]:
        return [
            (pooling, method.name, metric.name, *(() if metric.columns == 1 else (str(i),)))
            for method in self.methods
            for metric in self.metrics
            for i in range(metric.columns)
        ]

    def measure(self, indices: Tensor, x: Tensor, labels: Tensor, boxes: Any = None) -> dict[str, list[list[float]]]:
        """The `rows` and `images` of a batch as `ImageValues` has them.

        Args:
            indices: (B,) positions of the images in the data set.
            x: (B, 3, H, W).
            labels: (B,) or (B, C).
            boxes: Function from (R,) positions in the batch and (R,) classes to (R, J, 4) boxes in pixels of the
                input. None where no metric needs boxes.
        """
        self._check_labels(labels, len(x))
        poolings = self.network.poolings
        x = x.contiguous(memory_format=self.network.memory_format(x))
        parts = {'image': x}
        if 'insertion_curve' in self._needs:
            parts['blurred'] = blur(x, self._setting.kernel_size, self._setting.sigma)
        if 'deletion_curve' in self._needs:
            parts['zeros'] = torch.zeros_like(x)
        prob = self._probabilities(torch.cat([x, *(v[:1] if k == 'zeros' else v for k, v in list(parts.items())[1:])]))
        sizes = [1 if name == 'zeros' else len(x) for name in parts]
        of_part = {p: dict(zip(parts, prob[p].split(sizes), strict=True)) for p in poolings}
        clean = {p: of_part[p]['image'] for p in poolings}
        if self.multilabel:
            outcome = [labels, *(clean[p] for p in poolings)]
        else:
            outcome = [100 * (clean[p].argmax(1) == labels)[:, None] for p in poolings]

        classes, valid = self._explained(labels, clean)
        image_of_row = valid.nonzero()[:, 0]
        columns, curves = [indices[image_of_row][:, None]], [indices[image_of_row][:, None]]
        if len(image_of_row):
            maps = saliency_maps(self.network, x, self.methods, classes, indices, self.seed)
            images = {name: images[image_of_row] for name, images in parts.items()}
            for p in poolings:
                explained = classes[p][valid]
                ends = {
                    name: value.expand(len(valid), -1)[image_of_row].gather(1, explained[:, None])[:, 0]
                    for name, value in of_part[p].items()
                }
                saliency = torch.stack([resize_saliency(maps[p, m.name][valid], x.shape[2:]) for m in self.methods])
                of_class = boxes(image_of_row, explained) if 'boxes' in self._needs else None
                measured = self._measured(p, explained, saliency, images, ends, of_class)
                columns += [explained[:, None], ends['image'][:, None], self._values(measured, len(explained))]
                if self.keep_curves:  # the maps of the first method come first
                    kinds = dict.fromkeys(kind for _, _, kind in self._curves)
                    curves += [
                        part for kind in kinds for part in getattr(measured, f'{kind}_curve').split(len(explained))
                    ]
        record = {
            'rows': torch.cat([column.cpu().double() for column in columns], 1).tolist(),
            'images': torch.cat([value.cpu().double() for value in (indices[:, None], *outcome)], dim=1).tolist(),
        }
        if self.keep_curves:
            record['curves'] = torch.cat([part.cpu().double() for part in curves], 1).tolist()
        return record

    def _measured(
        self,
        pooling: str,
        classes: Tensor,
        saliency: Tensor,
        images: dict[str, Tensor],
        ends: dict[str, Tensor],
        boxes: Tensor | None,
    ) -> Measurements:
        """Measurements of the maps of every method under a pooling, M * R maps, those of the first method first.

        Args:
            pooling: A pooling.
            classes: (R,).
            saliency: (M, R, H, W) in [0, 1].
            images: (R, 3, H, W) images, blurred images and zeros, as far as they are needed.
            ends: (R,) probabilities of `classes` on these.
            boxes: (R, J, 4) or None.
        """

        def predict(changed: Tensor, index: Tensor) -> Tensor:
            logits = self.network.logits(changed, (pooling,))[pooling]
            return self.network.probabilities(logits, pooling).gather(1, classes[index, None])[:, 0]

        x, prob, maps = images['image'], ends['image'], saliency.flatten(0, 1)
        num_methods, size = len(saliency), self.network.batch_size(images['image'])
        measured: dict[str, Any] = {'prob': prob.repeat(num_methods), 'saliency': maps}
        if 'masked_prob' in self._needs:
            masked = self.network.mask(x.repeat(num_methods, 1, 1, 1), maps)
            index = torch.arange(len(x), device=x.device).repeat(num_methods)
            measured['masked_prob'] = torch.cat(
                [predict(*part) for part in zip(masked.split(size), index.split(size), strict=True)]
            )
        step = self._setting.rows * x.shape[3]
        for name, start, finish in (('insertion_curve', 'blurred', 'image'), ('deletion_curve', 'image', 'zeros')):
            if name in self._needs:
                curves = perturbation_curves(
                    predict, images[start], images[finish], saliency, step, size, (ends[start], ends[finish])
                )
                measured[name] = curves.flatten(0, 1)
        if boxes is not None:
            measured['boxes'] = boxes.repeat(num_methods, 1, 1)
        return Measurements(**measured)

    def _values(self, measured: Measurements, num_rows: int) -> Tensor:
        """Values of every metric of every method, (R, columns), in the order of the columns."""
        values = [metric.values(measured).reshape(len(self.methods), num_rows, -1).double() for metric in self.metrics]
        return torch.cat(values, 2).transpose(0, 1).flatten(1)

    def _explained(self, labels: Tensor, prob: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The classes to explain: (B, K) under each pooling, and which of them count, (B, K)."""
        poolings = self.network.poolings
        if self.target == 'predicted':
            classes = {p: prob[p].argmax(1, keepdim=True) for p in poolings}
            return classes, torch.ones_like(classes[poolings[0]], dtype=torch.bool)
        if not self.multilabel:
            return dict.fromkeys(poolings, labels[:, None]), torch.ones_like(labels[:, None], dtype=torch.bool)
        counts = (labels > 0).sum(1)
        # Positive labels come first. Other classes fill up the rows; `valid` leaves them out.
        order = (labels > 0).sort(dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
        valid = torch.arange(order.shape[1], device=labels.device) < counts[:, None]
        return dict.fromkeys(poolings, order), valid

    def _probabilities(self, images: Tensor) -> dict[str, Tensor]:
        return {p: self.network.probabilities(logits, p) for p, logits in self.network.all_logits(images).items()}

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        if self.multilabel:
            if labels.shape != (batch, self.num_classes):
                raise ValueError(
                    f'The targets of {batch} images have shape {tuple(labels.shape)}, the model has '
                    f'{self.num_classes} classes.'
                )
            return
        if labels.shape != (batch,):
            raise ValueError(
                f'The targets of {batch} images must be class indices, got {tuple(labels.shape)} of {labels.dtype}.'
            )
        check_class_indices('The target of the data set', labels, self.num_classes)
