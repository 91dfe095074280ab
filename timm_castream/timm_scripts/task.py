"""timm's classification task, for models with a CA-Stream and for multi-label data."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from timm.loss import LabelSmoothingCrossEntropy
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..attach import class_labels
from ..stream import CAStream
from .multilabel import leave_out_ignored


class CAStreamTask(ClassificationTask):
    """Replaces `timm.task.ClassificationTask` in timm's train.py.

    The task gives the labels to a class specific stream (timm's task calls the model with the images alone), leaves
    ignored labels of multi-label data out of the loss, and runs under DistributedDataParallel on CPUs too.
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch.

        Args:
            input: Images, (B, 3, H, W).
            target: Class indices, (B,), or dense targets, (B, C): multi-label, or mixed by Mixup.

        Returns:
            `loss`, a scalar, and `output`, (B, C) logits.

        Raises:
            ValueError: Dense targets with a loss for one label an image, or with a class specific stream.
        """
        if target.ndim > 1 and isinstance(self.criterion, (nn.CrossEntropyLoss, LabelSmoothingCrossEntropy)):
            raise ValueError(
                'A multi-label data set needs binary cross entropy: --bce-loss and --smoothing 0.1, as in voc2012.yaml '
                '(without smoothing timm ignores --bce-loss; multi-label targets are never smoothed).'
            )
        has_stream = any(isinstance(module, CAStream) for module in self.trainable_module.modules())
        with class_labels(self.trainable_module, target) if has_stream else nullcontext():
            output = self.trainable_module(input)
        return {'loss': self.criterion(*leave_out_ignored(output, target)), 'output': output}

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> ClassificationTask:
        """Wraps the model in DistributedDataParallel, which refuses `device_ids` for modules on the CPU."""
        return super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)
