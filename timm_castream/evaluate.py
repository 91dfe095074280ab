"""The interpretability protocol over a data set, on one device or many, with finished batches kept on disk.

Work is split into fixed batches. Results therefore do not depend on the number of processes or on interruptions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ._utils.checks import check_count
from ._utils.files import write_whole
from .attach import POOLINGS
from .attribution.method_hash import architecture
from .attribution.methods import TABLE_METHODS
from .attribution.user_methods import UserMethod, check_maps, resolve_methods
from .datasets import Unreadable, boxes_for, count_classes, has_boxes, image_name, read_batches, without_substitutes
from .datasets.unreadable import innermost
from .evaluation.bootstrap import ImageValues
from .evaluation.calibration import fit_temperature
from .evaluation.distributed import Gathered, Processes
from .evaluation.loaders import normalisation_of, transform_text, warn_of_another_normalisation
from .evaluation.protocol import Protocol
from .evaluation.report import Report
from .evaluation.resume import Journal
from .hub.stream_file import backbone_name, weights_hash
from .inference.predictor import Predictor
from .metrics.table import DEFAULT_METRICS, METRICS
from .version import __version__

_MAX_CALIBRATION_IMAGES = 2000
_logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    loader: Any,
    methods: Sequence[str] | Mapping[str, UserMethod] = TABLE_METHODS,
    poolings: Sequence[str] | None = None,
    target: str = 'truth',
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    setting: str = 'paper',
    layer: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    torchcompile: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    temperature: str | Mapping[str, float] | None = None,
    keep_curves: bool = False,
    output_dir: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Report:
    """Evaluates the saliency of a network, as the paper's tables do.

    Under torch.distributed every process evaluates a part of the images and gets the whole report. Targets of the data
    set that are (C,) vectors make it multi-label: sigmoid in softmax's place, one evaluation a positive label, mean
    average precision in accuracy's place. Negative entries of such a vector do not count.

    An image that cannot be read is in no figure; the report names it.

    Args:
        model: A model with a stream, any timm model, or any module that gives (B, C) logits, on the device to run on.
        loader: A `DataLoader` or one of timm's `create_loader`, of images normalised as the model's `pretrained_cfg`
            says; another normalisation is warned about where the loader shows it. Its data set is read by index and in
            order; its sampler plays no part.
        methods: Names of `methods.METHODS`, or a mapping from a label to a name, a callable or an array. A callable
            gets (x, target), (B, 3, H, W) images and (B,) class indices, and returns (B, h, w), (B, 1, h, w) or
            (B, C, H, W), whose channels are summed. It runs with gradients, once under each pooling, with the model
            switched to it. An array has the maps of all images in the order of the data set, (N, h, w);
            `{pooling: array}` gives each pooling its own. Maps are clamped at 0 and scaled by their own minimum and
            maximum.
        poolings: `'gap'`, `'ca'` or both. None: both for a model with a stream, `'gap'` for others: their own forward.
        target: The class explained: `'truth'`, the label, or `'predicted'`, under each pooling its own prediction. The
            metrics of boxes then count the images whose predictions have a box under both poolings.
        metrics: Names of `metrics.METRICS`. Only what they need is computed. Those of localisation need a data set
            with boxes.
        setting: Insertion and Deletion as in `metrics.CURVE_SETTINGS`: `'paper'` or `'rise'`.
        layer: Another module than the pooled stage for the CAM methods.
        num_samples: Evaluate so many images of the data set, drawn by `seed`.
        seed: Seed of the subset, of the method `random` and of the resamples behind the intervals.
        batch_size: Images of one forward. It never shows in the result. None: as many as suit the device.
        amp_dtype: Run the network under autocast to this type; probabilities are always float32.
        channels_last: Run the network in this memory format.
        torchcompile: Compile the network.
        mean, std: Normalisation of the images, for a model without `pretrained_cfg`.
        temperature: `'fit'` fits one temperature a pooling to images outside the sample (arXiv 1706.04599) and
            measures with it; `{pooling: temperature}` gives them. None: 1.
        keep_curves: Keep the curves of Insertion and Deletion for pictures.
        output_dir: Folder for finished batches, and in the end for `table.csv`, `evaluation.json` and `images.csv`. An
            interrupted evaluation goes on from there.
        arguments: More to keep in `evaluation.json`, plain data such as the data set's name; an interrupted evaluation
            goes on with equal ones only.
        progress: Show a progress bar.

    Returns:
        The report; `print` it, or read `report['ca', 'score_cam', 'average_drop']`.

    Raises:
        ValueError: If an argument or a label does not fit, `output_dir` holds another evaluation or another run writes
            to it, or the processes have different weights.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f'seed must be an int of at least 0, got {seed!r}.')
    rows = resolve_methods(methods)
    batches, rest = _batches(loader, num_samples, seed)
    dataset = loader.dataset
    first_image, first_label = _first_item(dataset, batches)
    multilabel = np.ndim(first_label) > 0
    network = Predictor(
        model,
        poolings,
        layer=layer,
        activation='sigmoid' if multilabel else 'softmax',
        batch_size=batch_size,
        channels_last=channels_last,
        torchcompile=torchcompile,
        mean=mean,
        std=std,
    )
    if network.num_classes == 0:
        raise ValueError(f'{network.name} gives no class scores: its num_classes is 0.')
    num_classes = network.num_classes or _count_classes(network, loader, batches)
    protocol = Protocol(
        network,
        rows,
        metrics,
        target,
        setting,
        num_classes=num_classes,
        seed=seed,
        multilabel=multilabel,
        keep_curves=keep_curves,
    )
    check_maps(rows, len(dataset), network.poolings)
    temperature = _checked_temperature(temperature, network.poolings)
    boxed = [name for name in metrics if 'boxes' in METRICS[name].needs]
    if boxed and not has_boxes(dataset):
        raise ValueError(
            f'metric {boxed[0]!r} needs boxes, which the data set lacks: set dataset.boxes with '
            'timm_castream.datasets.read_boxes.'
        )
    if temperature == 'fit' and not rest:
        raise ValueError(f"temperature 'fit' needs images outside the sample: choose num_samples below {len(dataset)}.")
    _check_classes(dataset, num_classes)

    processes = Processes.current()
    device = network.device
    blank = torch.zeros(1, *np.shape(first_image)[-3:], device=device)
    network.check_needs(rows, blank)
    mean, std = ([round(value, 6) for value in values.flatten().tolist()] for values in network.normalisation(blank))
    warn_of_another_normalisation(loader, mean, std)
    settings = {
        **(arguments or {}),
        'weights': weights_hash(model),
        'architecture': architecture(network.backbone),
        'stream': _stream_config(network),
        'images_in_data_set': len(dataset),
        'images': _images_hash(dataset, batches),
        'input_size': list(blank.shape[1:]),
        'transform': transform_text(loader),
        'loader_normalisation': normalisation_of(loader),
        'mean': mean,
        'std': std,
        'methods': [method.name for method in rows],
        'user_methods': {method.name: method.identity for method in rows if method.identity},
        'metrics': list(metrics),
        'poolings': list(network.poolings),
        'target': target,
        'setting': setting,
        'layer': layer,
        'num_samples': num_samples,
        # Without a subset and without random maps the seed changes the intervals alone.
        'seed': seed if num_samples or any('seed' in method.needs for method in rows) else None,
        'amp_dtype': str(amp_dtype).removeprefix('torch.') if amp_dtype else None,
        'temperature': temperature,
    }
    processes.check_same_weights(settings['weights'])
    widths = {'rows': len(protocol.row_columns), 'images': len(protocol.image_columns)}
    if keep_curves:
        widths['curves'] = protocol.curve_width(*np.shape(first_image)[-2:])
    gathered = Gathered(**widths).to(device if processes.count > 1 else 'cpu')
    journal = None if output_dir is None else Journal(Path(output_dir), processes.rank)
    try:
        if journal:
            processes.on_main(journal.lock)
        finished = processes.on_main(lambda: journal.resume(settings, widths) if journal else [])
        if keep_curves and not all('curves' in record for record in finished):
            _logger.warning('The curves of the finished images were not kept: evaluate in another folder for them.')
            keep_curves = protocol.keep_curves = False
            gathered.drop('curves')
        done = {int(row[0]) for record in finished for row in record['images']}
        if processes.rank == 0:
            for record in finished:
                gathered.update(**record)
            if done:
                _logger.info('%d images were finished before, their values are in %s.', len(done), output_dir)
        autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
        if temperature is not None:
            with autocast:
                network.temperatures = processes.on_main(
                    lambda: _temperatures(temperature, network, loader, rest, seed, journal)
                )
        remaining = [left for batch in batches if (left := [i for i in batch if i not in done])]
        remaining = remaining[processes.rank :: processes.count]

        bar = tqdm(
            desc='evaluate' if processes.count == 1 else f'evaluate, process 1 of {processes.count}',
            total=sum(map(len, remaining)),
            unit='image',
            disable=not progress or processes.rank > 0,
        )
        unreadable: dict[str, str] = {}
        with bar, network.evaluating(), autocast:
            for indices, x, labels, lost in read_batches(loader, remaining):
                unreadable |= {item.name: item.reason for item in lost}
                bar.update(len(indices) + len(lost))
                if not indices:
                    continue
                record = protocol.measure(
                    torch.tensor(indices, device=device),
                    x.to(device),
                    labels.to(device),
                    functools.partial(_boxes, dataset, indices),
                )
                if journal:
                    journal.append(record)
                gathered.update(**record)

        tables = gathered.compute()
        values = ImageValues(protocol.row_columns, protocol.image_columns, tables['rows'], tables['images'])
        if not len(values.rows):
            raise ValueError('No image has a positive label, so there is no class to explain.')
        if boxed and not values.has_box.any():
            both = ' under both poolings' if len(network.poolings) > 1 else ''
            raise ValueError(
                f'metric {boxed[0]!r} has no value: no image has a box of its class inside the input{both}.'
            )
        if network.temperatures:
            settings['temperatures'] = network.temperatures
        versions = {'torch': torch.__version__, 'timm': timm.__version__, 'timm_castream': __version__}
        report = Report.from_values(
            network=f'{backbone_name(model)}_castream' if network.has_stream else backbone_name(model),
            poolings=network.poolings,
            methods=[method.name for method in rows],
            metrics=metrics,
            values=values,
            seed=seed,
            settings=settings | {'seed': seed, 'versions': versions},
            unreadable=dict(sorted(pair for one in processes.all_gather(unreadable) for pair in one.items())),
            curves=protocol.named_curves(tables['curves']) if keep_curves else None,
        )
        if output_dir is not None and processes.rank == 0:
            report.save(output_dir)
    finally:
        if journal is not None:
            journal.close()
    return report


def _count_classes(network: Predictor, loader: Any, batches: list[list[int]]) -> int:
    """C of a model without `num_classes`, from the logits of one image."""
    _, x, _, _ = next(item for item in read_batches(loader, [batch[:1] for batch in batches]) if item[0])
    with network.evaluating():
        logits = network.forward(x.to(network.device))
    if logits.ndim != 2:
        raise ValueError(
            f'{network.name} gives {tuple(logits.shape)} for one image, an evaluation needs (1, C) logits.'
        )
    return logits.shape[1]


def _first_item(dataset: Any, batches: list[list[int]]) -> tuple[Any, Any]:
    """The first image that can be read, and its label: they give the size of the input and the kind of the labels."""
    items = without_substitutes(dataset)
    unreadable: list[Unreadable] = []
    for index in (index for batch in batches for index in batch):
        item = items[index]
        if not isinstance(item, Unreadable):
            return item
        unreadable.append(item)
    first = unreadable[0]
    raise ValueError(f'None of the images can be read. The first is {first.name}: {first.reason}')


def _stream_config(network: Predictor) -> dict[str, Any] | None:
    """Arguments of the stream that its figures depend on. Initialisation and dropout play no part in evaluation."""
    if not network.has_stream:
        return None
    return {k: v for k, v in network.backbone.castream_config.items() if k not in ('stream_init', 'stream_drop')}


def _check_classes(dataset: Any, num_classes: int) -> None:
    """Compares the number of classes of the data set, where it is known, with that of the model."""
    classes = count_classes(dataset)
    if not classes or classes == num_classes:
        return
    message = f'The data set has {classes} classes, the model has {num_classes}'
    if classes > num_classes:
        raise ValueError(f'{message}: name the model of this data set, or its --num-classes.')
    _logger.warning('%s. The labels 0 to %d are explained.', message, classes - 1)


def _images_hash(dataset: Any, batches: list[list[int]]) -> str:
    """SHA-256 of the names, sizes and times of the image files, of the classes and of the boxes."""
    digest = hashlib.sha256()
    source, _ = innermost(dataset, 0)
    digest.update(repr(getattr(getattr(source, 'reader', None), 'class_to_idx', None)).encode('utf-8', 'replace'))
    boxes = getattr(source, 'boxes', None)
    for index in (index for batch in batches for index in batch):
        try:
            status: Any = os.stat(image_name(dataset, index, absolute=True))
        except OSError:  # an image that is no file
            status = os.stat_result((0,) * 10)
        line = f'{image_name(dataset, index)} {status.st_size} {status.st_mtime_ns}\n'
        digest.update(line.encode('utf-8', 'surrogateescape'))
        if boxes is not None:
            digest.update(np.ascontiguousarray(boxes[innermost(dataset, index)[1]], dtype=np.float64).tobytes())
    return digest.hexdigest()


def _batches(loader: Any, num_samples: int | None, seed: int) -> tuple[list[list[int]], list[int]]:
    """The indices of the images of every batch, and those of the images outside the sample."""
    try:
        # timm's PrefetchLoader wraps a DataLoader.
        num_images, size = len(loader.dataset), getattr(loader, 'loader', loader).batch_size
    except (AttributeError, TypeError):
        raise ValueError(f'{type(loader).__name__} is no DataLoader over a data set with a length.') from None
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(f'{type(loader.dataset).__name__} is iterable: an evaluation reads images by their index.')
    if not num_images:
        raise ValueError('The data set has no images.')
    if not size:
        raise ValueError('The loader has no batch_size: make it with one, not with a batch sampler.')
    indices, rest = torch.arange(num_images), torch.arange(0)
    if num_samples is not None:
        check_count('num_samples', num_samples)
        if num_samples > num_images:
            raise ValueError(f'num_samples {num_samples} is out of range, the data set has {num_images} images.')
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        indices, rest = order[:num_samples].sort().values, order[num_samples:].sort().values
    return [batch.tolist() for batch in indices.split(size)], rest.tolist()


def _boxes(dataset: Any, indices: list[int], image_of_row: Tensor, classes: Tensor) -> Tensor:
    """(R, J, 4) boxes of rows, in pixels of the input, on the device of the classes."""
    images = [indices[i] for i in image_of_row.tolist()]
    return boxes_for(dataset, images, classes.tolist()).to(classes.device)


def _checked_temperature(temperature: Any, poolings: Sequence[str]) -> str | dict[str, float] | None:
    """None, `'fit'`, or a temperature for each of the poolings, in plain numbers."""
    if temperature is None or (isinstance(temperature, str) and temperature == 'fit'):
        return temperature
    if not isinstance(temperature, Mapping):
        raise ValueError(
            f"temperature {temperature!r} is unknown, valid ones: 'fit', or a number for each pooling, as "
            "in {'gap': 1.2, 'ca': 1.5}."
        )
    for name in temperature:
        if name not in POOLINGS:
            raise ValueError(
                f'temperature has a number for pooling {name!r}, which is unknown, valid ones: '
                f'{", ".join(map(repr, POOLINGS))}.'
            )
    for name in poolings:
        number = temperature.get(name)
        if not isinstance(number, Real) or not 0 < float(number) < math.inf:
            raise ValueError(
                f'temperature must give pooling {name!r} a positive number below infinity, got {dict(temperature)}.'
            )
    return {name: float(temperature[name]) for name in poolings}


def _temperatures(
    temperature: str | dict[str, float],
    network: Predictor,
    loader: Any,
    rest: list[int],
    seed: int,
    journal: Journal | None,
) -> dict[str, float]:
    """One temperature a pooling: given, read from the folder of an interrupted evaluation, or fitted."""
    if not isinstance(temperature, str):
        return temperature
    path = None if journal is None else journal.temperatures_path
    if path is not None and path.is_file():
        try:
            return {name: float(json.loads(path.read_text(encoding='utf-8'))[name]) for name in network.poolings}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f'{path} is damaged: delete it, or name another folder.') from None
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = sorted(rest[i] for i in order[:_MAX_CALIBRATION_IMAGES])
    logits: dict[str, list[Tensor]] = {name: [] for name in network.poolings}
    labels: list[Tensor] = []
    with network.evaluating():
        for indices, x, target, _ in read_batches(loader, [chosen[i : i + 64] for i in range(0, len(chosen), 64)]):
            if not indices:
                continue
            labels.append(target.cpu())
            for name, value in network.all_logits(x.to(network.device)).items():
                logits[name].append(value.cpu())
    if not labels:
        raise ValueError('None of the images outside the sample can be read, so no temperature can be fitted.')
    fitted = {name: fit_temperature(torch.cat(value), torch.cat(labels)) for name, value in logits.items()}
    if path is not None:
        with write_whole(path) as file:
            json.dump(fitted, file)
    return fitted
