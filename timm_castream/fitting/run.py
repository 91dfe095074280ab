"""One fit from the images to the answer, in steps that resume after a kill.

`fit.json` of the output folder holds the settings and what is known so far. An unfinished fit keeps its feature maps
and the streams in training in `.unfinished`.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .._utils.files import make_folder, write_whole
from ..attach import attach, detach
from ..backbones.image_settings import image_settings, set_image_settings
from ..backbones.mixin import CAStreamMixin
from ..datasets.image_files import image_mode
from ..evaluate import evaluate
from ..evaluation.report import Report
from ..hub import load_stream, save_stream
from ..hub.label_names import known_names
from ..hub.repository import write_repository
from ..hub.stream_file import backbone_name, fingerprint, weights_hash, write_safetensors
from ..version import __version__
from ..visualize import explain
from .answer import MEASURED, METHODS, Answer, answer, report_text
from .choice import MARGINS, MAX_SCORED, Tried, accurate, recipes, take
from .classifier import check_trained, choose_classifier, classifier_state, load_classifier, replace_classifier
from .features import CachedFeatures, Features, LiveFeatures, bytes_per_image, write_features
from .images import (
    AugmentedImages,
    ImageFile,
    ListedImages,
    Split,
    check_folders,
    files_hash,
    find_files,
    folder_classes,
    split_images,
)
from .network import FrozenNetwork
from .settings import Settings
from .training import Candidate, Recipe, Targets, accuracy, pooled_logits, stream_logits, train_streams

UNFINISHED = '.unfinished'
"""Folder of the state of an unfinished fit, in the output folder."""
NUM_PICTURES = 6
EVALUATION_BATCH = 16

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Attributes:
        model: The model, with the fitted stream, in evaluation mode.
        report: The protocol on images that the fit did not train on.
        helps: Whether the stream helps here, by the rule of `fit.fit`.
        sentence: The same in a sentence with the values.
        facts: The contents of `fit.json`: settings, numbers of images, the recipes tried and the one taken.
        folder: The output folder.
    """

    model: nn.Module
    report: Report
    helps: bool
    sentence: str
    facts: dict[str, Any]
    folder: Path


def run(
    model: nn.Module,
    images: str | Path | Sequence[str | Path],
    output: Path,
    settings: Settings,
    cache_size: float,
    cache: str | Path | None,
    workers: int,
    progress: bool,
) -> Fitted:
    """See `fit.fit`."""
    if not cache_size >= 0:
        raise ValueError(f'cache_size must be at least 0 gigabytes, got {cache_size!r}.')
    if getattr(model, 'num_classes', None) == 1 and settings.labels == 'predicted':
        raise ValueError(
            f'This {type(model).__name__} answers by one number (num_classes is 1), and a fit needs the scores of two '
            "classes or more: fit a classifier with labels='folders'."
        )
    if getattr(model, 'num_classes', None) == 0 and settings.labels == 'predicted':
        raise ValueError(
            f'This {type(model).__name__} has no classifier (num_classes is 0), so it predicts no labels: name trained '
            "weights with one, or fit one with labels='folders'."
        )
    check_folders(images, output)
    files = find_files(images, settings.num_images, settings.seed)
    job = _Fit(model, files, output, settings, workers, progress)
    with _locked(output):
        job.resume()
        if 'taken' not in job.facts:
            job.train(cache_size, cache)
        report, reached = job.answer()
    shutil.rmtree(job.unfinished, ignore_errors=True)
    return Fitted(model, report, reached.helps, reached.sentence, job.facts, output)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps other runs out of the output folder."""
    make_folder(output)
    lock = FileLock(output / '.lock', timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise ValueError(f'Another fit is writing to {output}: wait for its end, or name another folder.') from None


class _Fit:
    """The steps of one fit. The arguments are those of `run`.

    Attributes:
        facts: The contents of `fit.json`.
        work: A copy of the model, which gets the classifier and the stream. The model itself changes at the very end.
    """

    def __init__(
        self, model: nn.Module, files: list[ImageFile], output: Path, settings: Settings, workers: int, progress: bool
    ) -> None:
        self.model: Any = model
        self.files = files
        self.output = output
        self.unfinished = output / UNFINISHED
        self.settings = settings
        self.workers = workers
        self.progress = progress
        self.work: Any = copy.deepcopy(model).eval()
        self.starts = settings.stream_start
        self.stream_args: dict[str, Any] = {}
        if isinstance(self.work, CAStreamMixin):
            self.stream_args = self.work.castream_config
            self.starts = self.starts or (self.stream_args['stream_start'],)
            detach(self.work)
        self.network = FrozenNetwork(self.work, self.stream_args.get('stream_stages'))
        if not self.stream_args:
            self.stream_args = {'stream_init': 'gap' if self.network.pooled_by == 'avg' else 'paper'}
        self.last = len(self.network.stages) - 1
        if max(self.starts, default=0) > self.last:
            raise ValueError(
                f'stream_start {max(self.starts)} is no stage: {type(self.work).__name__} has the stages 0 to '
                f'{self.last}.'
            )
        self._set_image_settings(self.work)
        self.data_config = image_settings(self.work)
        self.transform = create_transform(**self.data_config, is_training=False)
        self.mode = image_mode(self.data_config['input_size'][0])
        self.classes: list[str] = []
        names = known_names(self.work, sorted({file.folder for file in files})) or []
        self.known = {name: i for i, name in enumerate(names)}
        if settings.labels == 'folders':
            self.classes = folder_classes(files)
        index = {name: i for i, name in enumerate(self.classes)} or self.known
        self.truth = torch.tensor([index.get(file.folder, -1) for file in files])  # -1: the folder names no class
        if settings.true_share and not (self.truth >= 0).any():
            raise ValueError(
                f'true_share {settings.true_share} needs images in folders that are named as classes of the model, and '
                'no folder is.'
            )
        self.facts: dict[str, Any] = {
            'settings': {
                'network': backbone_name(self.work),
                'weights': weights_hash(self.work),
                'stream_args': self.stream_args,
                'placements': list(self.starts),
                'files': files_hash(files),
                'transform': repr(self.transform),
                **{key: value for key, value in asdict(settings).items() if key != 'image_settings'},
                **settings.image_settings,
            },
            'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'timm_castream': __version__},
        }
        self.facts = json.loads(json.dumps(self.facts))

    def resume(self) -> None:
        """Takes over `fit.json` of a fit with the same settings.

        Raises:
            ValueError: If the output folder holds a fit with other settings.
        """
        path = self.output / 'fit.json'
        if not path.is_file():
            return
        found = json.loads(path.read_text(encoding='utf-8'))
        theirs, ours = found['settings'], self.facts['settings']
        wrong = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        if wrong:
            raise ValueError(
                f'{self.output} holds a fit with other settings ({", ".join(wrong)} differ): name another folder.'
            )
        self.facts = found

    def train(self, cache_size: float, cache: str | Path | None) -> None:
        """Everything up to the chosen stream, which is left in `work` and in `stream.safetensors`."""
        self.unfinished.mkdir(exist_ok=True)
        folder = self.unfinished / 'features' if cache is None else Path(cache)
        keeps = self._plan(folder, cache_size)
        kept = write_features(
            self.network,
            self._dataset(self.truth),
            folder,
            min(self.starts, default=0) if keeps else self.last + 1,
            workers=self.workers,
            progress=self.progress,
            facts={
                'network': self.facts['settings']['network'],
                'fingerprint': fingerprint(self.work),
                'files': self.facts['settings']['files'],
                'transform': repr(self.transform),
            },
        )
        split = split_images(kept.readable, self.settings.seed)
        self.facts['parts'] = {name: len(getattr(split, name)) for name in ('train', 'selection', 'test')}
        if not all(self.facts['parts'].values()):
            raise ValueError(f'{int(kept.readable.sum())} of the images can be read, which are too few.')
        labels, targets = self._labels(kept, split)
        features: Features = kept
        if not keeps:
            features = LiveFeatures(self.network, lambda epoch: self._dataset(self.truth), self.workers)
        recipe, candidate = self._choose(features, kept.pooled, split, labels, targets)
        attach(self.work, **self._attach_args(recipe))
        self.work.castream.load_state_dict(candidate.stream.state_dict())
        save_stream(self.work, self.output / 'stream.safetensors')
        has_labels = bool((self.truth[split.test] >= 0).all())
        self.facts |= {
            'taken': asdict(recipe),
            'stream_args': self.work.castream_config,
            'test': split.test.tolist(),
            'test_labels': (self.truth if has_labels else labels)[split.test].tolist(),
            'labels_of_test': 'folders' if has_labels else "GAP's prediction",
        }
        self._write_facts()

    def answer(self) -> tuple[Report, Answer]:
        """Measures the chosen stream, writes the results and gives the model its stream."""
        if not isinstance(self.work, CAStreamMixin):  # the stream was chosen by a run that was killed, or finished
            if self.classes:
                self._replace_classifier(self.work)
            attach(self.work, **self.facts['stream_args'])
            load_stream(self.work, self.output / 'stream.safetensors')
        report = self._evaluate(
            torch.tensor(self.facts['test']),
            torch.tensor(self.facts['test_labels']),
            ('gap', 'ca'),
            self.output / 'evaluation',
            images_labelled_by=self.facts['labels_of_test'],
        )
        reached = answer(report, self.facts['labels_of_test'] == 'folders')
        name = f'{self.facts["settings"]["network"]}_castream'
        if timm.is_model(name):
            write_repository(
                self.work, self.output / 'model', f'your-name/{name}', metrics=report.to_dict(), dataset='your-images'
            )
        else:
            _logger.info('%s is no registered model, so there is no model folder: load the stream alone.', name)
        test = self.facts['test']
        paths = [self.files[i].path for i in test[:: -(-len(test) // NUM_PICTURES)]]
        explain(self.work, paths, ('attention', 'grad_cam'), self.output / 'pictures')
        with write_whole(self.output / 'report.md') as file:
            file.write(report_text(report, reached, self.facts))
        self.facts |= {'helps': reached.helps, 'sentence': reached.sentence}
        self._write_facts()
        self._give_stream()
        return report, reached

    def _give_stream(self) -> None:
        """Gives the caller's model what `work` has got."""
        model = self.model
        if isinstance(model, CAStreamMixin):
            detach(model)
        self._set_image_settings(model)
        if self.classes:
            self._replace_classifier(model)
        attach(model, **self.facts['stream_args'])
        model.load_state_dict(self.work.state_dict())
        model.eval()

    def _set_image_settings(self, model: Any) -> None:
        if any(value is not None for value in self.settings.image_settings.values()):
            set_image_settings(model, **self.settings.image_settings)

    def _write_facts(self) -> None:
        with write_whole(self.output / 'fit.json') as file:
            json.dump(self.facts, file, indent=1)
            file.write('\n')

    def _attach_args(self, recipe: Recipe) -> dict[str, Any]:
        return {**self.stream_args, 'stream_start': recipe.stream_start}

    def _dataset(self, labels: Tensor) -> ListedImages:
        return ListedImages(self.files, labels, self.transform, self.mode)

    def _plan(self, folder: Path, cache_size: float) -> bool:
        """Whether the maps are kept. The log says so before the work begins. A resumed fit keeps its first decision."""
        if self.settings.augment:
            _logger.info('Augmented images have other maps in every epoch: no cache, each epoch runs the network.')
            return False
        start = min(self.starts, default=0)
        x = torch.zeros(1, *self.data_config['input_size'])
        size, least = (bytes_per_image(self.network, x, i) * len(self.files) / 1e9 for i in (start, self.last))
        free = shutil.disk_usage(folder if folder.is_dir() else self.output).free / 1e9
        there = sum(path.stat().st_size for path in folder.glob('*.npy')) / 1e9  # of an earlier fit
        self.facts.setdefault('keeps_maps', bool(size <= min(cache_size, free + there - 1)))
        self._write_facts()
        what = f'the maps of {len(self.files):,} images at S_{start} to S_{self.last} take {size:.2f} GB'
        if self.facts['keeps_maps']:
            _logger.info('Cache: %s, in %s; %.0f GB are free there.', what, folder, free)
        else:
            _logger.info(
                'No cache: %s, the cache may take %g GB, %.0f GB are free. Each epoch runs the network. With '
                'stream_start %d the maps take %.2f GB.',
                what,
                cache_size,
                free,
                self.last,
                least,
            )
        return self.facts['keeps_maps']

    def _labels(self, kept: CachedFeatures, split: Split) -> tuple[Tensor, Targets]:
        """Labels of all images, and the targets of training. The classifier is fitted where folders are classes."""
        settings = self.settings
        if settings.labels == 'folders':
            self._fit_classifier(kept, split)
            return self.truth, Targets(self.truth)
        logits = pooled_logits(self.network, kept.pooled)
        check_trained(logits[kept.readable], type(self.work).__name__)
        labels = logits.argmax(1)
        fixed = torch.full_like(labels, -1) if settings.augment or settings.distill else labels.clone()
        if settings.true_share:
            known = split.train[self.truth[split.train] >= 0]
            order = torch.randperm(len(known), generator=torch.Generator().manual_seed(settings.seed))
            drawn = known[order[: round(settings.true_share * len(known))]]
            fixed[drawn] = self.truth[drawn]
        return labels, Targets(fixed, settings.distill)

    def _fit_classifier(self, kept: CachedFeatures, split: Split) -> None:
        path = self.output / 'classifier.safetensors'
        if 'classifier' not in self.facts or not path.is_file():
            replace_classifier(self.work, self.classes, self.known, self.settings.seed)
            train, selection = ((kept.pooled[part], self.truth[part]) for part in (split.train, split.selection))
            tries = choose_classifier(self.network, train, selection, self.settings.seed)
            write_safetensors(path, classifier_state(self.work), {'format': 'pt'})
            self.facts['classifier'] = [entry._asdict() for entry in tries]
            self._write_facts()
        else:
            self._replace_classifier(self.work)

    def _replace_classifier(self, model: Any) -> None:
        replace_classifier(model, self.classes, {}, 0)
        load_classifier(model, load_file(self.output / 'classifier.safetensors'))

    def _choose(
        self, features: Features, pooled: Tensor, split: Split, labels: Tensor, targets: Targets
    ) -> tuple[Recipe, Candidate]:
        """Trains a stream by every recipe, and takes one by the rule of `choice.take`."""
        settings = self.settings
        tried = recipes(
            self.last, self.stream_args['stream_init'], settings.epochs, settings.lr, self.starts, settings.weight_decay
        )
        _logger.info(
            'Images: %d to train on, %d to choose on, %d for the answer. Recipes tried: %d.',
            *self.facts['parts'].values(),
            len(tried),
        )
        candidates = [Candidate(self.network, r, self._attach_args(r), settings.seed) for r in tried]
        train_streams(
            self.network,
            self._augmented() if settings.augment else features,
            split.train,
            targets,
            candidates,
            batch_size=settings.batch_size,
            seed=settings.seed,
            state_path=self.unfinished / 'training.safetensors',
            progress=self.progress,
        )
        if len(tried) == 1:
            return tried[0], candidates[0]
        own = labels[split.selection]
        logits = stream_logits(self.network, features, split.selection, candidates)
        measured = [Tried(recipe, accuracy(part, own)) for recipe, part in zip(tried, logits, strict=True)]
        gap = accuracy(pooled_logits(self.network, pooled[split.selection]), own)
        least = gap - MARGINS[settings.labels]
        fair = accurate(measured, least)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(settings.seed))
        scored = split.selection[order[:MAX_SCORED].sort().values]
        for i, entry in enumerate(measured):
            if entry in fair and len(fair) > 1:
                measured[i] = self._score(entry, candidates[i], scored, labels, f'choice{i}')
        taken = take(measured, least)
        self.facts['tried'] = [
            {
                **asdict(entry.recipe),
                'accuracy': entry.accuracy,
                'AG': entry.average_gain,
                'AI': entry.average_increase,
                'taken': entry is taken,
            }
            for entry in measured
        ]
        for entry in measured:
            _logger.info('%s%s', entry, ' (taken)' if entry is taken else '')
        return taken.recipe, candidates[measured.index(taken)]

    def _augmented(self) -> LiveFeatures:
        transform = create_transform(**self.data_config, is_training=True)

        def dataset_of(epoch: int) -> AugmentedImages:
            return AugmentedImages(self.files, self.truth, transform, self.mode, seed=self.settings.seed, epoch=epoch)

        return LiveFeatures(self.network, dataset_of, self.workers)

    def _score(self, entry: Tried, candidate: Candidate, indices: Tensor, labels: Tensor, name: str) -> Tried:
        """AG and AI of Grad-CAM minus those of random maps."""
        attach(self.work, **self._attach_args(entry.recipe))
        try:
            self.work.castream.load_state_dict(candidate.stream.state_dict())
            report = self._evaluate(indices, labels[indices], ('ca',), self.unfinished / name)
        finally:
            detach(self.work)
        gain, increase = (
            report['ca', 'grad_cam', metric].value - report['ca', 'random', metric].value
            for metric in ('average_gain', 'average_increase')
        )
        return Tried(entry.recipe, entry.accuracy, gain, increase)

    def _evaluate(
        self, indices: Tensor, labels: Tensor, poolings: Sequence[str], folder: Path, **arguments: Any
    ) -> Report:
        """The protocol with the stream of `work` on some of the images."""
        all_labels = torch.zeros(len(self.files), dtype=torch.long)
        all_labels[indices] = labels
        dataset = Subset(self._dataset(all_labels), indices.tolist())
        loader = DataLoader(dataset, batch_size=EVALUATION_BATCH, num_workers=self.workers)
        return evaluate(
            self.work,
            loader,
            METHODS,
            poolings,
            metrics=MEASURED,
            seed=self.settings.seed,
            output_dir=folder,
            arguments={'labels': self.settings.labels, **arguments},
            progress=self.progress,
        )
