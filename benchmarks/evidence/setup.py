"""Places, settings, networks and image sets that every step of the experiments shares."""

from __future__ import annotations

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
import yaml
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor

import timm_castream
from timm_castream import attach, load_stream, save_stream
from timm_castream._utils.files import write_whole
from timm_castream.fitting.classifier import choose_classifier
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

from .images import Images, ImageSet, Sample, read_images


@dataclass
class Setup:
    """One run of the program.

    Args:
        settings: The plain file of settings.
        data_dir: Folder of the images.
        work_dir: Gets feature maps, weights and unfinished evaluations; not committed.
        results_dir: Gets the JSON and CSV that the page is made from; committed.
        backbone_checkpoint: Weights of the network with ImageNet's classes. None: timm downloads its own.
        command: The command line, for the results.
    """

    settings: dict[str, Any]
    data_dir: Path
    work_dir: Path
    results_dir: Path
    backbone_checkpoint: str | None = None
    command: str = ''

    @cached_property
    def image_set(self) -> ImageSet:
        return read_images(self.data_dir)

    @property
    def num_classes(self) -> int:
        return len(self.image_set.classes)

    @property
    def gap_weights(self) -> Path:
        """Weights of the network with the fitted classifier."""
        return self.work_dir / 'gap.safetensors'

    @cached_property
    def unfitted(self) -> Any:
        """The network with the rows of its classifier that are the data's classes."""
        torch.manual_seed(0)  # of rows that the weights do not have
        kwargs = {'pretrained': self.settings.get('pretrained', True) and self.backbone_checkpoint is None}
        model: Any = timm.create_model(self.settings['network'], **kwargs)
        if self.backbone_checkpoint:
            timm.models.load_checkpoint(model, self.backbone_checkpoint)
        classifier = model.get_classifier()
        weight, bias = classifier.weight.detach(), classifier.bias.detach()
        model.reset_classifier(self.num_classes)
        wordnet_ids = ImageNetInfo().label_names()
        if len(weight) == len(wordnet_ids) and set(self.image_set.classes) <= set(wordnet_ids):
            rows = [wordnet_ids.index(name) for name in self.image_set.classes]
            classifier = model.get_classifier()
            classifier.weight.data, classifier.bias.data = weight[rows].clone(), bias[rows].clone()
        return model.eval().requires_grad_(False)

    def samples(self, split: str) -> list[Sample]:
        """The images of a split: `train`, `selection` (held out of the training images) or `val`."""
        per_class = self.settings['train_per_class']
        if split == 'train':
            return self.image_set.training(0, per_class)
        if split == 'selection':
            return self.image_set.training(per_class, self.settings['select_per_class'])
        return list(self.image_set.val[: self.settings['val_images']])

    def images(self, split: str) -> Images:
        """The normalised images of a split."""
        return Images(self.samples(split), self.unfitted, self.settings['image_size'])

    def maps(self, split: str) -> CachedFeatures:
        """The kept maps of a split, made at the first call."""
        names = ' '.join(sample.path.name for sample in self.samples(split))
        facts = {name: self.settings[name] for name in ('network', 'image_size')} | {'files': names}
        facts['weights'] = self.backbone_checkpoint and Path(self.backbone_checkpoint).name
        network = FrozenNetwork(self.unfitted)
        return write_features(network, self.images(split), self.work_dir / 'maps' / split, facts=facts, progress=True)

    def labels(self, split: str) -> Tensor:
        """(N,) class indices of a split."""
        return torch.tensor([sample.label for sample in self.samples(split)])

    def gap_model(self) -> Any:
        """The network with the fitted classifier, without a stream."""
        model = timm.create_model(self.settings['network'], num_classes=self.num_classes)
        timm.models.load_checkpoint(model, str(self.gap_weights))
        return model.eval()

    def stream_model(self, kind: str, seed: int, **more: Any) -> Any:
        """The network with a fresh stream of this kind."""
        arguments = {k: v for k, v in self.settings['streams'][kind].items() if k != 'like'} | more
        model = timm.create_model(self.settings['network'], num_classes=self.num_classes)
        torch.manual_seed(seed)
        attach(model, **arguments, backbone_checkpoint=str(self.gap_weights))
        return model.eval()

    def fit_gap(self) -> dict[str, Any]:
        """Fits the classifier under GAP, once; returns the settings tried, their accuracies and the one taken."""
        path = self.results_dir / 'classifier.json'
        if path.is_file() and self.gap_weights.is_file():
            return read_json(path)
        train, selection = ((self.maps(split).pooled, self.labels(split)) for split in ('train', 'selection'))
        settings = [(candidate['epochs'], candidate['lr']) for candidate in self.settings['classifier']['tried']]
        before, *tried = choose_classifier(FrozenNetwork(self.unfitted), train, selection, 0, settings)
        best = max(tried, key=lambda entry: entry.accuracy)
        self.gap_weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.unfitted.state_dict().items()}, self.gap_weights)
        facts = {
            'selection_accuracy_before': before.accuracy,
            'tried': [{'epochs': e.epochs, 'lr': e.lr, 'selection_accuracy': e.accuracy} for e in tried],
            'taken': {'epochs': best.epochs, 'lr': best.lr},
        }
        self.write(path, facts)
        return facts

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
        model = self.stream_model(kind, seed, stream_drop=recipe.get('stream_drop', 0.0))
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
        candidate, history = self._train(model, seed, recipe, self.training_indices(per_class, classes))
        model.castream.load_state_dict(candidate.stream.state_dict())
        facts |= {
            'history': history,
            'val_images': len(self.samples('val')),
            'val_accuracy': accuracy(self.logits(model, 'val'), self.labels('val')),
            'parameters': sum(p.numel() for p in model.castream.parameters()),
            'seconds': round(time.monotonic() - start, 1),
        }
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_stream(model, weights)
        self.write(path, facts)
        return model, facts

    def _train(
        self, model: Any, seed: int, recipe: Mapping[str, Any], indices: Tensor
    ) -> tuple[Candidate, list[dict[str, float]]]:
        """A stream like that of the model, trained, and its accuracy on the selection images after each epoch."""
        network, maps, selection = FrozenNetwork(self.gap_model()), self.maps('train'), self.maps('selection')
        args = {name: value for name, value in model.castream_config.items() if name != 'stream_stages'}
        options = {k: v for k, v in recipe.items() if k in ('epochs', 'lr', 'weight_decay', 'label_smoothing')}
        candidate = Candidate(network, Recipe(args.pop('stream_start'), **options), args, seed)
        history = []

        def after_epoch(epoch: int) -> None:
            (logits,) = stream_logits(network, selection, torch.arange(len(selection)), [candidate])
            history.append({'epoch': epoch, 'accuracy': accuracy(logits, self.labels('selection'))})
            candidate.stream.train()

        train_streams(
            network,
            maps,
            indices,
            Targets(self.labels('train')),
            [candidate],
            batch_size=self.settings['batch_size'],
            seed=seed,
            after_epoch=after_epoch,
            progress=True,
        )
        return candidate, history

    def logits(self, model: Any, split: str) -> Tensor:
        """(N, C) logits of a split: of the stream, or of the network's own pooling where the model has none."""
        network, maps = FrozenNetwork(self.gap_model()), self.maps(split)
        if not hasattr(model, 'castream'):
            return pooled_logits(network, maps.pooled)
        trained = SimpleNamespace(stream=model.castream, recipe=Recipe(model.castream_config['stream_start'], 1, 1.0))
        return stream_logits(network, maps, torch.arange(len(maps)), [trained])[0]

    def training_indices(self, per_class: int | None, classes: range | None) -> Tensor:
        """Indices into the training images: the first `per_class` of each of these classes."""
        labels = self.labels('train')
        keep = torch.ones(len(labels), dtype=torch.bool)
        if classes is not None:
            keep &= torch.isin(labels, torch.tensor(list(classes)))
        if per_class is not None:
            # The images lie class by class.
            ranks = torch.cat([torch.arange(count) for count in labels.unique_consecutive(return_counts=True)[1]])
            keep &= ranks < per_class
        return keep.nonzero()[:, 0]

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Writes JSON with the command, the machine kind and the versions that made it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as file:
            json.dump({**facts, 'made_by': self.made_by()}, file, indent=1)
            file.write('\n')

    def made_by(self) -> dict[str, str | int]:
        return {
            'command': self.command,
            'machine': f'{torch.get_num_threads()} of {os.cpu_count()} {platform.machine()} CPU cores',
            'torch': torch.__version__,
            'timm': timm.__version__,
            'timm_castream': timm_castream.__version__,
        }


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the plain file of settings."""
    return yaml.safe_load(path.read_text(encoding='utf-8'))
