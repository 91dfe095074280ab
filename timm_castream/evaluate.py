"""The interpretability protocol over a data set, on one device or many, with what is finished kept on disk.

The unit of work is a batch: the same images in whatever process and after whatever interruption, so that neither shows
in the figures. Its record, the values of every image, is what is written, gathered and averaged.
"""
from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from tqdm import tqdm

from .attach import POOLINGS
from .backbone import eval_mode
from .files import write_whole
from .mixin import castream_model
from .protocol import Protocol
from .report import ImageValues, Report
from .version import __version__
from .weights import backbone_name, weights_hash

METHODS = ('grad_cam', 'grad_cam_pp', 'score_cam')
_logger = logging.getLogger(__name__)


def evaluate(
        model: nn.Module,
        loader: Any,
        methods: Sequence[str] = METHODS,
        poolings: Sequence[str] = POOLINGS,
        target: str = 'truth',
        *,
        setting: str = 'paper',
        layer: str | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        amp_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        torchcompile: bool = False,
        output_dir: str | Path | None = None,
        arguments: Mapping[str, Any] | None = None,
        progress: bool = False,
) -> Report:
    """Evaluates the saliency of a model with a stream, as the paper's tables do.

    Under torch.distributed every process evaluates a part of the images and gets the whole report. Targets of the data
    set that are (C,) vectors make it multi-label: sigmoid in softmax's place, one evaluation a positive label, mean
    average precision in accuracy's place. Negative entries of such a vector do not count.

    Args:
        model: A model with a stream, on the device to run on.
        loader: A `DataLoader` or one of timm's `create_loader`, of images normalised as the model's `pretrained_cfg`
            says. Its data set is read by index and in order; its sampler plays no part.
        methods: Methods of `attribution.attribute`.
        poolings: `'gap'`, `'ca'` or both.
        target: The class explained: `'truth'`, the label, or `'predicted'`, under each pooling its own prediction.
        setting: Insertion and Deletion as in `metrics.CURVE_SETTINGS`: `'paper'` or `'rise'`.
        layer: Another module than the pooled stage for the CAM methods.
        num_samples: Evaluate so many images of the data set, drawn by `seed`.
        seed: Of the subset and of the intervals' resamples.
        batch_size: Images of one forward. It never shows in the result. None: as many as suit the device.
        amp_dtype: Run the network under autocast to this type; probabilities are always float32.
        channels_last: Run the network in this memory format.
        torchcompile: Compile the network.
        output_dir: Where finished batches are kept, and in the end `table.csv`, `evaluation.json` and `images.csv`. An
            evaluation that was interrupted goes on from there.
        arguments: More to keep in `evaluation.json`, plain data such as the data set's name; an interrupted evaluation
            goes on with equal ones only.
        progress: Show a progress bar.

    Returns:
        The report; `print` it, or read `report['ca', 'score_cam', 'average_drop']`.

    Raises:
        ValueError: If an argument or a label does not fit, `output_dir` holds another evaluation, or the processes have
            different weights.
    """
    model = castream_model(model)
    batches = _batches(loader, num_samples, seed)
    settings = {
        **(arguments or {}),
        'weights': weights_hash(model),
        'stream': model.castream_config,
        'images_in_data_set': len(loader.dataset),
        'methods': methods,
        'poolings': poolings,
        'target': target,
        'setting': setting,
        'layer': layer,
        'num_samples': num_samples,
        'seed': seed,
        'amp_dtype': str(amp_dtype).removeprefix('torch.') if amp_dtype else None,
    }
    protocol = Protocol(
        model, methods, poolings, target, setting, layer, batch_size, channels_last, torchcompile,
        multilabel=np.ndim(loader.dataset[batches[0][0]][1]) > 0)

    is_distributed = distributed.is_available() and distributed.is_initialized()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if is_distributed else (0, 1)
    device = next(model.parameters()).device
    if is_distributed:
        _check_same_weights(settings['weights'], world_size)
    gathered = _Gathered(rows=len(protocol.row_names), images=len(protocol.image_names))
    gathered.to(device if is_distributed else 'cpu')
    journal = None if output_dir is None else _Journal(Path(output_dir), rank)
    finished = _agree(rank, is_distributed, lambda: journal.resume(settings) if journal else [])
    done = {int(row[0]) for record in finished for row in record['images']}
    if rank == 0:
        for record in finished:
            gathered.update(**record)
        if done:
            _logger.info('%d images were finished before, their values are in %s.', len(done), output_dir)
    remaining = [rest for batch in batches if (rest := [i for i in batch if i not in done])][rank::world_size]

    bar = tqdm(
        desc='evaluate' if world_size == 1 else f'evaluate, process 1 of {world_size}',
        total=sum(map(len, remaining)), unit='image', disable=not progress or rank > 0)
    with bar, eval_mode(model), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        for numbers, (x, labels) in zip(remaining, _read(loader, remaining), strict=True):
            record = protocol.measure(torch.tensor(numbers, device=device), x.to(device), labels.to(device))
            if journal:
                journal.append(record)
            gathered.update(**record)
            bar.update(len(numbers))

    values = ImageValues(protocol.row_names, protocol.image_names, **gathered.compute())
    if not len(values.rows):
        raise ValueError('No image has a positive label, so there is no class to explain.')
    report = Report.from_values(
        network=f'{backbone_name(model)}_castream',
        poolings=poolings,
        methods=methods,
        values=values,
        seed=seed,
        settings=settings | {'versions': {
            'torch': torch.__version__, 'timm': timm.__version__, 'timm_castream': __version__}},
    )
    if output_dir is not None and rank == 0:
        report.save(output_dir)
    return report


class _Gathered(Metric):
    """The records of all processes, gathered by torchmetrics.

    Args:
        **widths: Number of columns of each table of a record.
    """

    full_state_update = False

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.widths = widths
        for name in widths:
            self.add_state(name, [], dist_reduce_fx='cat')
        self.update(**{name: [] for name in widths})  # a process without images takes part with empty tables

    def update(self, **tables: list[list[float]]) -> None:
        """Adds a batch: tables of rows that begin with the number of an image."""
        for name, rows in tables.items():
            table = torch.tensor(rows, dtype=torch.float64, device=self.device)
            getattr(self, name).append(table.reshape(-1, self.widths[name]))

    def compute(self) -> dict[str, np.ndarray]:
        """The tables of all batches, in the order of the images."""
        tables = {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self.widths}
        return {name: table[np.argsort(table[:, 0], kind='stable')] for name, table in tables.items()}


class _Journal:
    """The records of finished batches in a folder: a line of JSON each, a file a process.

    A line that a kill cut off is no JSON and does not count.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / f'finished.{rank}.jsonl'

    def resume(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is finished, under equal settings.

        Raises:
            ValueError: If the folder holds an evaluation with other settings.
        """
        records: list[dict[str, Any]] = []
        for journal in sorted(self.folder.glob('finished.*.jsonl')):
            for line in journal.read_bytes().splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
        path = self.folder / 'settings.json'
        if not records:
            with write_whole(path) as file:
                json.dump(settings, file, indent=2)
        found, wanted = json.loads(path.read_text(encoding='utf-8')), json.loads(json.dumps(settings))
        wrong = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
        if wrong:
            theirs, ours = (', '.join(f'{k}={side.get(k)!r}' for k in wrong) for side in (found, wanted))
            raise ValueError(
                f'{self.folder} holds an evaluation with {theirs}, this one has {ours}: name another folder.')
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a finished batch."""
        # The line break in front ends a line that a kill cut off.
        with open(self.path, 'ab') as file:
            file.write(b'\n' + json.dumps(record).encode() + b'\n')


def _batches(loader: Any, num_samples: int | None, seed: int) -> list[list[int]]:
    """The places in the data set of the images of every batch."""
    try:
        # timm's PrefetchLoader is around a DataLoader.
        num_images, size = len(loader.dataset), getattr(loader, 'loader', loader).batch_size
    except (AttributeError, TypeError):
        raise ValueError(f'{type(loader).__name__} is no DataLoader over a data set with a length.') from None
    if not num_images:
        raise ValueError('The data set has no images.')
    if not size:
        raise ValueError('The loader has no batch_size: make it with one, not with a batch sampler.')
    numbers = torch.arange(num_images)
    if num_samples is not None:
        if not 1 <= num_samples <= num_images:
            raise ValueError(f'num_samples {num_samples} is out of range, the data set has {num_images} images.')
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randperm(num_images, generator=generator)[:num_samples].sort().values
    return [batch.tolist() for batch in numbers.split(size)]


def _read(loader: Any, batches: list[list[int]]) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches, read as `loader` reads its own."""
    if not batches:  # timm's PrefetchLoader fails without one, in 1.0.28 for instance
        return ()
    inner = getattr(loader, 'loader', loader)  # timm's PrefetchLoader is around a DataLoader
    reader = DataLoader(
        inner.dataset,
        batch_sampler=batches,
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        multiprocessing_context=inner.multiprocessing_context,
    )
    if inner is loader:
        return reader
    around = copy.copy(loader)
    around.loader = reader
    return around


def _check_same_weights(weights: str, world_size: int) -> None:
    """Refuses processes with different models, all of them: one without its checkpoint has weights of its own."""
    everywhere: list[Any] = [None] * world_size
    distributed.all_gather_object(everywhere, weights)
    if len(set(everywhere)) > 1:
        raise ValueError('The processes have models of different weights: load one checkpoint in all of them.')


def _agree(rank: int, is_distributed: bool, ask: Callable[[], Any]) -> Any:
    """What `ask` gives in the first process, or raises there, in all processes."""
    answer: list[Any] = [None]
    if rank == 0:
        try:
            answer = [ask()]
        except (OSError, ValueError) as error:
            answer = [error]
    if is_distributed:
        distributed.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
