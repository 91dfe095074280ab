"""Images, networks, streams and facts that every step of the experiments shares."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Subset

import timm_castream
from timm_castream import attach, load_stream, save_stream
from timm_castream._utils.files import write_whole
from timm_castream.datasets import create_dataset, image_name, label_names_of
from timm_castream.fitting.classifier import choose_classifier, replace_classifier
from timm_castream.fitting.features import CachedFeatures, write_features
from timm_castream.fitting.network import FrozenNetwork
from timm_castream.fitting.training import (
    Candidate,
    Recipe,
    Targets,
    accuracy,
    pooled_logits,
    stream_logits,
    train_streams,
)
from timm_castream.hub.label_names import known_names


@dataclass
class Setup:
    """One run of the program.

    Args:
        settings: The plain file of settings.
        data_dir: Tiny ImageNet's folder, or one with `train/CLASS` and `val/CLASS`; None for a data set that is made.
        work_dir: Gets feature maps, weights and unfinished evaluations; not committed.
        results_dir: Gets the JSON and CSV that the page is made from; committed.
        backbone_checkpoint: Weights of the network with ImageNet's classes. None: timm downloads its own.
        command: The command line, for the results.
    """

    settings: dict[str, Any]
    data_dir: Path | None
    work_dir: Path
    results_dir: Path
    backbone_checkpoint: str | None = None
    command: str = ''

    @cached_property
    def datasets(self) -> dict[str, Any]:
        """The data sets `train` and `val`."""
        name = self.settings.get('dataset') or (
            'tiny_imagenet' if self.data_dir and (self.data_dir / 'wnids.txt').is_file() else ''
        )
        return {split: create_dataset(name, self.data_dir, split=split) for split in ('train', 'val')}

    @cached_property
    def classes(self) -> list[str]:
        return label_names_of(self.datasets['train']) or []

    @property
    def half_of_classes(self) -> range:
        """The classes that a stream of `train_on: half` is trained on; `unseen` are the images of the others."""
        return range(0, len(self.classes), 2)

    def targets(self, split: str) -> Tensor:
        """(N,) class indices of all images of a data set, `train` or `val`."""
        dataset = self.datasets[split]
        reader = getattr(dataset, 'reader', None)
        if hasattr(reader, 'samples'):
            return torch.tensor([target for _, target in reader.samples])
        return torch.tensor(dataset.labels if reader is None else reader.targets)

    def indices(self, split: str) -> Tensor:
        """The images of a part of a data set: `train` or `selection`, the first and the next ones of each class of its
        training images; `val`, the first ones of its validation images; or `unseen`, see `half_of_classes`."""
        if split == 'val':
            return torch.arange(len(self.targets('val')))[: self.settings['val_images']]
        if split == 'unseen':
            return (~torch.isin(self.targets('val'), torch.tensor(self.half_of_classes))).nonzero()[:, 0]
        ranks, first = ranks_in_class(self.targets('train')), self.settings['train_per_class']
        start, count = (0, first) if split == 'train' else (first, self.settings['select_per_class'])
        return ((ranks >= start) & (ranks < start + count)).nonzero()[:, 0]

    def images(self, split: str) -> Subset:
        """The normalised images of a part, resized without a crop."""
        dataset = self.datasets['train' if split in ('train', 'selection') else 'val']
        cfg = {name: self.unfitted.pretrained_cfg[name] for name in ('mean', 'std', 'interpolation')}
        size = (3, *2 * [self.settings['image_size']])
        dataset.transform = create_transform(size, crop_pct=1.0, crop_mode='squash', **cfg)
        return Subset(dataset, self.indices(split).tolist())

    def labels(self, split: str) -> Tensor:
        """(N,) class indices of a part."""
        return self.targets('val' if split == 'val' else 'train')[self.indices(split)]

    def maps(self, split: str) -> CachedFeatures:
        """The kept maps of a part, made at the first call."""
        images = self.images(split)
        facts = {name: self.settings[name] for name in ('network', 'image_size')}
        facts['files'] = ' '.join(Path(image_name(images, i)).name for i in range(len(images)))
        facts['weights'] = self.backbone_checkpoint and Path(self.backbone_checkpoint).name
        network = FrozenNetwork(self.unfitted)
        return write_features(network, images, self.work_dir / 'maps' / split, facts=facts, progress=True)

    @cached_property
    def unfitted(self) -> Any:
        """The network with the rows of its classifier that are the data's classes."""
        pretrained = self.settings.get('pretrained', True) and self.backbone_checkpoint is None
        torch.manual_seed(0)
        model: Any = timm.create_model(self.settings['network'], pretrained=pretrained)
        if self.backbone_checkpoint:
            timm.models.load_checkpoint(model, self.backbone_checkpoint)
        known = {name: i for i, name in enumerate(known_names(model, self.classes) or [])}
        replace_classifier(model, self.classes, known, seed=0)
        return model.eval().requires_grad_(False)

    def fit_gap(self) -> None:
        """Fits the classifier under GAP, once, and writes the settings tried, their accuracies and the one taken."""
        path, weights = self.results_dir / 'classifier.json', self.work_dir / 'gap.safetensors'
        if path.is_file() and weights.is_file():
            return
        train, selection = ((self.maps(split).pooled, self.labels(split)) for split in ('train', 'selection'))
        settings = [(candidate['epochs'], candidate['lr']) for candidate in self.settings['classifier']['tried']]
        before, *tried = choose_classifier(FrozenNetwork(self.unfitted), train, selection, 0, settings)
        best = max(tried, key=lambda entry: entry.accuracy)
        save_file({k: v.contiguous() for k, v in self.unfitted.state_dict().items()}, weights)
        facts = {
            'selection_accuracy_before': before.accuracy,
            'tried': [{'epochs': e.epochs, 'lr': e.lr, 'selection_accuracy': e.accuracy} for e in tried],
            'taken': {'epochs': best.epochs, 'lr': best.lr},
        }
        self.write(path, facts)

    def gap_model(self) -> Any:
        """The network with the fitted classifier, without a stream."""
        model = copy.deepcopy(self.unfitted)
        timm.models.load_checkpoint(model, str(self.work_dir / 'gap.safetensors'))
        return model

    def stream(
        self,
        kind: str,
        seed: int,
        recipe: Mapping[str, Any],
        name: str,
        per_class: int | None = None,
        classes: range | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The network with a trained stream, trained at the first call.

        Args:
            kind: Of `streams` in the settings.
            seed: Of the stream's first weights and of the order of training.
            recipe: Training settings.
            name: Name of the stream's files.
            per_class: Train on so many images of each class. None: on all.
            classes: Train on these classes only. None: on all.

        Returns:
            The model, and the facts of its training.
        """
        arguments = {k: v for k, v in self.settings['streams'][kind].items() if k != 'like'}
        model = attach(self.gap_model(), **arguments, stream_drop=recipe.get('stream_drop', 0.0)).eval()
        weights = self.work_dir / 'streams' / f'{name}.safetensors'
        path = self.results_dir / 'streams' / f'{name}.json'
        facts: dict[str, Any] = {
            'kind': kind,
            'seed': seed,
            'recipe': dict(recipe),
            'per_class': per_class,
            'classes': None if classes is None else [classes.start, classes.stop, classes.step],
        }
        if weights.is_file() and path.is_file() and facts.items() <= read_json(path).items():
            load_stream(model, weights)
            return model, read_json(path)
        start = time.monotonic()
        history = self._train(model, seed, recipe, self.training_indices(per_class, classes))
        facts |= {
            'history': history,
            'val_images': len(self.labels('val')),
            'val_accuracy': accuracy(self.logits(model, 'val'), self.labels('val')),
            'parameters': sum(p.numel() for p in model.castream.parameters()),
            'seconds': round(time.monotonic() - start, 1),
        }
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_stream(model, weights)
        self.write(path, facts)
        return model, facts

    def _train(self, model: Any, seed: int, recipe: Mapping[str, Any], indices: Tensor) -> list[dict[str, float]]:
        """Trains the stream of a model, in place; returns its accuracy on the selection images after each epoch."""
        network, maps, selection = FrozenNetwork(self.gap_model()), self.maps('train'), self.maps('selection')
        args = {name: value for name, value in model.castream_config.items() if name != 'stream_stages'}
        options = {k: v for k, v in recipe.items() if k in ('epochs', 'lr', 'weight_decay', 'label_smoothing')}
        candidate = Candidate(network, Recipe(args.pop('stream_start'), **options), args, seed)
        history = []

        def after_epoch(epoch: int) -> None:
            (logits,) = stream_logits(network, selection, torch.arange(len(selection)), [candidate])
            history.append({'epoch': epoch, 'accuracy': accuracy(logits, self.labels('selection'))})
            candidate.stream.train()

        targets = Targets(self.labels('train'))
        options = {'batch_size': self.settings['batch_size'], 'seed': seed, 'progress': True}
        train_streams(network, maps, indices, targets, [candidate], after_epoch=after_epoch, **options)
        model.castream.load_state_dict(candidate.stream.state_dict())
        return history

    def logits(self, model: Any, split: str) -> Tensor:
        """(N, C) logits of a part: of the stream, or of the network's own pooling where the model has none."""
        network, maps = FrozenNetwork(self.gap_model()), self.maps(split)
        if not hasattr(model, 'castream'):
            return pooled_logits(network, maps.pooled)
        trained: Any = SimpleNamespace(
            stream=model.castream, recipe=Recipe(model.castream_config['stream_start'], 1, 1.0)
        )
        return stream_logits(network, maps, torch.arange(len(maps)), [trained])[0]

    def training_indices(self, per_class: int | None, classes: range | None) -> Tensor:
        """Indices into the training images: the first `per_class` of each of these classes."""
        labels = self.labels('train')
        keep = torch.isin(labels, torch.tensor(classes or range(len(self.classes))))
        return (keep & (ranks_in_class(labels) < (per_class or len(labels)))).nonzero()[:, 0]

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Writes JSON with the command, the machine kind and the versions that made it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        made_by = {
            'command': self.command,
            'machine': f'{torch.get_num_threads()} of {os.cpu_count()} {platform.machine()} CPU cores',
            'torch': torch.__version__,
            'timm': timm.__version__,
            'timm_castream': timm_castream.__version__,
        }
        with write_whole(path) as file:
            json.dump({**facts, 'made_by': made_by}, file, indent=1)
            file.write('\n')


def ranks_in_class(labels: Tensor) -> Tensor:
    """(N,) number of each image in its class."""
    ranks = torch.empty_like(labels)
    ranks[labels.argsort(stable=True)] = torch.cat([torch.arange(count) for count in labels.bincount().tolist()])
    return ranks


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))
