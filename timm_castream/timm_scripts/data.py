"""Compare the data sets of timm's scripts with the model and the options, before the first batch.

Classes are compared by name: those of the training images become the model's, its checkpoints keep them, and every other
split is read with their indices.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from timm.utils import world_info_from_env

from ..datasets import align_classes, count_classes, image_mode, label_names_of, present_classes
from ..datasets.folders import FolderReader
from ..hub.label_names import known_names, label_names, label_texts, set_label_names
from ..hub.read import checkpoint_label_names


class DataChecks:
    """Wraps `create_model`, `create_dataset` and `create_loader` of a script.

    Args:
        args: The options of the script.
    """

    def __init__(self, args: Namespace) -> None:
        self.set_args(args)
        self.model: Any = None
        self.label_names: list[str] | None = None

    def set_args(self, args: Namespace) -> None:
        """Takes the options of the script, once they are read."""
        self.args = args
        self.mixes = any(getattr(args, name, None) for name in ('mixup', 'cutmix', 'cutmix_minmax'))

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the model."""
        return getattr(self.model, 'num_classes', None)

    def create_model(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `create_model`: keeps the model, which the data sets are compared with."""

        @functools.wraps(create)
        def create_model(*args: Any, **kwargs: Any) -> Any:
            if self.model is not None:  # the teacher of a distillation, which train.py creates after the model
                return create(*args, **kwargs)
            self.model = create(*args, **kwargs)
            return self.model

        return create_model

    def create_saver(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `CheckpointSaver`: the options that checkpoints keep get the names of the classes."""

        @functools.wraps(create)
        def create_saver(*args: Any, **kwargs: Any) -> Any:
            if self.label_names and kwargs.get('args') is not None:
                kwargs['args'].label_names = list(self.label_names)
            return create(*args, **kwargs)

        return create_saver

    def create_dataset(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `create_dataset`: refuses more classes than the model has, and multi-label data that are mixed.

        timm ends in an index error of torch, on a GPU in one that does not name the labels.
        """

        @functools.wraps(create)
        def create_dataset(*args: Any, **kwargs: Any) -> Any:
            channels = getattr(self.model, 'in_chans', 3)
            if channels not in (1, 3) and not getattr(self.args, 'input_img_mode', None):
                kwargs['input_img_mode'] = image_mode(channels)  # the scripts know grey and RGB alone
            dataset = create(*args, **kwargs)
            if not kwargs.get('class_map'):
                self._compare(dataset, bool(kwargs.get('is_training')))
            classes = count_classes(dataset)
            if classes and self.num_classes and classes > self.num_classes:
                raise ValueError(
                    f'The data set has {classes} classes, the model has {self.num_classes}: pass '
                    f'--num-classes {classes}.'
                )
            if self.mixes and np.ndim(getattr(getattr(dataset, 'reader', None), 'targets', ())) > 1:
                raise ValueError(
                    '--mixup and --cutmix mix one class of each image, and this data set has several '
                    'labels for each image: leave them out.'
                )
            return dataset

        return create_dataset

    def _compare(self, dataset: Any, is_training: bool) -> None:
        """Gives the targets of a data set the indices of the model's classes, and the model the names of the training."""
        classes = present_classes(dataset)
        if classes is None:
            if isinstance(getattr(dataset, 'reader', None), FolderReader):
                raise ValueError(
                    f'{dataset.reader.root} holds images without folders of classes: train and validate need a folder '
                    'for each class. castream fit needs none, and castream evaluate --target predicted neither.'
                )
            return
        if self.model is None or not hasattr(self.model, 'pretrained_cfg'):
            return
        names = self.label_names or self._names_of_weights(classes)
        new_task = is_training and not getattr(self.args, 'resume', None)  # on weights that may have other classes
        if names and not (new_task and set(classes) - set(names)):
            align_classes(dataset, names, 'The data set', label_texts(self.model))
        elif is_training:
            names = label_names_of(dataset) or classes
        if is_training and names and len(names) <= (self.num_classes or 0):
            set_label_names(self.model, names)
            self.label_names = label_names(self.model)

    def _names_of_weights(self, classes: list[str]) -> list[str] | None:
        """Names of the classes of the weights that the script loads, where they are known."""
        path = getattr(self.args, 'checkpoint', None) or getattr(self.args, 'resume', None)
        if path:
            set_label_names(self.model, checkpoint_label_names(path) or ())
        return known_names(self.model, classes)

    def create_loader(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `create_loader`: refuses training images that fill no batch.

        timm leaves the last batch out when it is not full. Without a batch it ends in a failed assertion.
        """

        @functools.wraps(create)
        def create_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
            loader = create(dataset, *args, **kwargs)
            if kwargs.get('is_training') and not len(loader):
                _, _, count = world_info_from_env()
                batch = f'{self.args.batch_size}' + (f' in each of {count} processes' if count > 1 else '')
                raise ValueError(
                    f'The {len(dataset)} training images fill no batch of {batch}: pass a smaller '
                    '--batch-size, or more images.'
                )
            return loader

        return create_loader
