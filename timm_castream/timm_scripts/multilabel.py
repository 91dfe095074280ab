"""Multi-label data in timm's scripts: the loss and the mean average precision of a validation with dense targets.

The scripts of timm 1.0.28 and older releases support one label for each image. Three parts are replaced, for dense
targets (B, C) alone: the loss and the accuracy of a validation, and the function `validate`, which adds `map` to its
results. The training loss is timm's own, `--bce-loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ..datasets import VOC_IGNORE
from ..metrics.average_precision import mean_average_precision

if TYPE_CHECKING:
    from torchmetrics import Metric


def leave_out_ignored(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits and targets of ignored labels, so that their binary cross entropy and its gradient are zero.

    Args:
        output: Logits, (B, C).
        target: Dense targets, (B, C), `VOC_IGNORE` where a label is unknown. Class indices, (B,), are not changed.
    """
    if target.ndim == 1:
        return output, target
    ignored = target == VOC_IGNORE
    # log(1 + exp(-1e4)) is exactly 0, and half precision holds 1e4.
    return output.masked_fill(ignored, -1e4), target.masked_fill(ignored, 0.0)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """The loss of a validation: torch's for class indices, mean binary cross entropy for dense targets."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if target.ndim == 1:
            return super().forward(output, target)
        return functional.binary_cross_entropy_with_logits(*leave_out_ignored(output, target))


class MultiLabelScore:
    """Collects the predictions of a validation with dense targets and scores them at its end, over all processes."""

    def __init__(self) -> None:
        self._predictions: Metric | None = None

    def accuracy(self, output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
        """timm's accuracy. For dense targets, the share of images with a positive label among the k best, in percent.

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
        if self._predictions is None:
            try:
                self._predictions = _collector().to(output.device)
            except ImportError as error:
                raise ImportError("Multi-label data needs torchmetrics: pip install 'timm_castream[eval]'.") from error
        self._predictions.update(output, target)

    def scored(self, validate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Wraps the script's `validate`: its results get `map` where targets are dense."""

        @functools.wraps(validate)
        def scored_validate(*args: Any, **kwargs: Any) -> dict[str, Any]:
            self._predictions = None
            results = validate(*args, **kwargs)
            if self._predictions is not None:
                labels, scores = (_in_order(rows, _num_images(args)) for rows in self._predictions.compute())
                results['map'] = round(float(mean_average_precision(labels, scores)[0]), 4)
            return results

        return scored_validate


def _num_images(args: Sequence[Any]) -> int | None:
    """Number of images of a validation, by the loader among the arguments of the script's `validate`, or None.

    timm's train.py gives its loader. Its validate.py gives its options instead, in which `dataset` is a name.
    """
    datasets = (getattr(arg, 'dataset', None) for arg in args)
    return next((len(dataset) for dataset in datasets if isinstance(dataset, Dataset)), None)  # type: ignore[arg-type]


def _in_order(rows: np.ndarray, num_images: int | None) -> np.ndarray:
    """The rows of all processes, without the images that fill up the shares of the last ones.

    timm's sampler gives process r the images r, r + P, r + 2 P, ... of P processes, and the first ones again at the
    end, so that all have equally many.

    Args:
        rows: (P * n, C), those of the first process first.
        num_images: Images of the data set, or None where they are unknown.
    """
    count = dist.get_world_size() if dist.is_initialized() else 1
    rows = rows.reshape(count, -1, rows.shape[1]).swapaxes(0, 1).reshape(len(rows), -1)
    return rows[:num_images]


def _collector() -> Metric:
    """A metric that gathers targets and logits over all batches and processes, as two (N, C) arrays."""
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat

    class Predictions(Metric):
        full_state_update = False
        labels: list[Tensor]
        scores: list[Tensor]

        def __init__(self) -> None:
            super().__init__()
            self.add_state('labels', [], dist_reduce_fx='cat')
            self.add_state('scores', [], dist_reduce_fx='cat')

        def update(self, output: Tensor, target: Tensor) -> None:
            self.labels.append(target.float())
            self.scores.append(output.float())

        def compute(self) -> tuple[np.ndarray, np.ndarray]:
            return dim_zero_cat(self.labels).cpu().numpy(), dim_zero_cat(self.scores).cpu().numpy()

    return Predictions()
