"""Multi-label data in timm's scripts: dense targets from the loader, and the mean average precision of a validation.

The scripts that timm 1.0.28 and older releases came with know one label an image. They are changed in four places, and
only where targets are dense, (B, C): the loader's collation, the loss and the accuracy of a validation, and the
function `validate`, whose results get an entry `map`. The training loss is timm's own, `--bce-loss`.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.loader import fast_collate
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional

from timm_castream.datasets import VOC_IGNORE

if TYPE_CHECKING:
    from torchmetrics.classification import MultilabelPrecisionRecallCurve


def collate(batch: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """timm's `fast_collate` that keeps dense targets as float32; before timm 1.0.30 it makes integers of them."""
    if not np.ndim(batch[0][1]):
        return fast_collate(batch)
    images, _ = fast_collate([(image, 0) for image, _ in batch])
    targets = torch.stack([torch.as_tensor(target, dtype=torch.float32) for _, target in batch])
    return images, targets.repeat(len(images) // len(batch), 1)


def leave_out_ignored(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets whose binary cross entropy is zero, gradient included, for the labels that are to be ignored.

    Args:
        output: Logits, (B, C).
        target: Dense targets, (B, C), `VOC_IGNORE` where a label is unknown; or class indices, (B,), left as they are.
    """
    if target.ndim == 1:
        return output, target
    ignored = target == VOC_IGNORE
    # log(1 + exp(-1e4)) is exactly 0, and half precision holds 1e4.
    return output.masked_fill(ignored, -1e4), target.masked_fill(ignored, 0.)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch's, with which both scripts validate; the mean binary cross entropy where targets are dense."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if target.ndim == 1:
            return super().forward(output, target)
        return functional.binary_cross_entropy_with_logits(*leave_out_ignored(output, target))


def mean_average_precision(precision: Sequence[Tensor], recall: Sequence[Tensor]) -> float:
    """The devkit's mean average precision, in percent.

    As the devkit has it since 2010: the area under the curve of each class after precision was made to fall with
    recall (to each recall belongs the best precision at that recall or more), averaged over the classes that occur.

    Args:
        precision: Of each class, (T + 1,), at rising thresholds, as torchmetrics gives it.
        recall: Of each class, (T + 1,), from 1 down to 0.
    """
    areas = [
        (-recall_c.diff() * precision_c.cummax(0).values[:-1]).sum()
        for precision_c, recall_c in zip(precision, recall, strict=True)
        if precision_c[:-1].any()  # without a positive it is 0 throughout
    ]
    return 100 * float(torch.stack(areas).mean()) if areas else float('nan')


class MultiLabelScore:
    """Collects what a validation predicts for dense targets and scores all of it at the end, over all processes."""

    def __init__(self) -> None:
        self._curve: MultilabelPrecisionRecallCurve | None = None

    def accuracy(self, output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
        """timm's accuracy; with dense targets, the share of images with a label of theirs among the k best, in percent.

        Args:
            output: Logits, (B, C).
            target: Class indices, (B,), or dense targets, (B, C).
            topk: The values of k.
        """
        if target.ndim == 1:
            return accuracy(output, target, topk)
        self._update(output, target)
        best = output.topk(min(max(topk), output.shape[1])).indices
        hits = target.gather(1, best) > 0
        return [100 * hits[:, :k].any(1).float().mean() for k in topk]

    def _update(self, output: Tensor, target: Tensor) -> None:
        if self._curve is None:
            try:
                from torchmetrics.classification import MultilabelPrecisionRecallCurve
            except ImportError as error:
                raise ImportError("Multi-label data needs torchmetrics: pip install 'timm_castream[eval]'.") from error
            self._curve = MultilabelPrecisionRecallCurve(
                output.shape[1], ignore_index=int(VOC_IGNORE), validate_args=False).to(output.device)
        # torchmetrics takes scores in [0, 1]. Unlike the sigmoid the arctangent keeps the order of large logits.
        self._curve.update(output.double().atan() / math.pi + 0.5, target.long())

    def scored(self, validate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """The script's `validate` with `map` in its results where targets are dense."""
        @functools.wraps(validate)
        def scored_validate(*args: Any, **kwargs: Any) -> dict[str, Any]:
            self._curve = None
            results = validate(*args, **kwargs)
            if self._curve is not None:
                precision, recall, _ = self._curve.compute()
                results['map'] = round(mean_average_precision(precision, recall), 4)
            return results
        return scored_validate
