"""`castream evaluate`: the interpretability protocol over a data set."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import SKIPPED
from .names import names, rows
from .options import (
    add_engine,
    add_format,
    add_method_options,
    add_model_options,
    add_normalisation_options,
    add_size_options,
    count,
    count_or_none,
    device_of,
    methods_from,
    one_of,
    open_from,
)

# Messages of `evaluate` in the words of the command: Python's would name what was not typed.
PHRASES = {
    'set dataset.boxes with timm_castream.datasets.read_boxes': 'name them with --boxes',
    'give the targets its indices by timm_castream.datasets.align_classes': 'give the folders its indices with --class-map',
    "give the index of its class or a vector of all classes, or explain the predicted classes with target='predicted'": (
        'explain the predicted classes with --target predicted'
    ),
    "give pairs (image, label), or explain the predicted classes with target='predicted'": (
        'explain the predicted classes with --target predicted'
    ),
    "engine 'onnxruntime' takes": '--engine onnxruntime takes',
    ": choose 'torch'": ': choose --engine torch',
    'and amp_dtype is ': 'and --amp runs it in ',
    'and torchcompile is on': 'and --torchcompile is on',
}
EXAMPLE = 'castream evaluate --model resnet50_castream --checkpoint last.pth.tar --data-dir /data/imagenet'

_logger = logging.getLogger(__name__)

_MANY_MINUTES = 5

# Options that say which network and which images; evaluate itself records the others that change values.
_RECORDED = (
    'model',
    'pretrained',
    'checkpoint',
    'use_ema',
    'num_classes',
    'class_names',
    'model_kwargs',
    'data_dir',
    'dataset',
    'split',
    'class_map',
    'boxes',
    'img_size',
    'input_size',
    'crop_pct',
    'crop_mode',
)


def add_options(parser: argparse.ArgumentParser) -> None:
    metrics = rows('metrics/table', 'MetricRow')
    add_model_options(parser)
    # Those of the paper's tables, and the baselines that a method must beat.
    add_method_options(parser, ('grad_cam', 'grad_cam_pp', 'score_cam', 'random', 'centre'))
    data = parser.add_argument_group('data')
    data.add_argument('--data-dir', metavar='DIR', help='an image folder, or the folder of the data set')
    data.add_argument(
        '--dataset',
        default='',
        help=f"{', '.join(names('datasets/__init__', '_ARCHIVES'))}, digits or timm's name (default: an image folder)",
    )
    data.add_argument('--split', default='validation', help='(default: %(default)s)')
    data.add_argument('--class-map', default='', metavar='FILE', help="timm's class to index file")
    data.add_argument(
        '--boxes',
        metavar='PATH',
        help="boxes for the localisation metrics: localization.txt, or a folder of ImageNet's XML files",
    )
    add_size_options(data)
    add_normalisation_options(data)
    data.add_argument('--num-samples', type=count, metavar='N', help='evaluate a subset, drawn by --seed')
    data.add_argument('-b', '--batch-size', type=count, default=16, help='images at a time (default: %(default)s)')
    data.add_argument(
        '-j', '--workers', type=count_or_none, default=2, help='processes that read images (default: %(default)s)'
    )
    protocol = parser.add_argument_group('protocol')
    protocol.add_argument(
        '--metrics',
        nargs='+',
        type=one_of('metric', metrics),
        metavar='METRIC',
        help=f'of {", ".join(metrics)} (default: the five of the paper)',
    )
    protocol.add_argument(
        '--target',
        choices=names('evaluation/plan', 'TARGETS'),
        default='truth',
        help='the class explained (default: %(default)s)',
    )
    protocol.add_argument(
        '--setting',
        choices=names('metrics/curves', 'CURVE_SETTINGS'),
        default='paper',
        help='of insertion and deletion (default: %(default)s)',
    )
    protocol.add_argument(
        '--curve-value',
        nargs='+',
        type=float,
        default=[0.5],
        metavar='V',
        help='colour, 0 to 1, from which insertion_value starts and in which deletion_value ends (default: 0.5)',
    )
    protocol.add_argument(
        '--temperature',
        choices=('fit',),
        help='fit one temperature a pooling to images outside the subset, and measure with it',
    )
    protocol.add_argument(
        '--seed',
        type=int,
        default=0,
        help='of the subset, random methods and metrics, and the intervals (default: %(default)s)',
    )
    speed = parser.add_argument_group('speed')
    speed.add_argument(
        '--mask-batch-size', type=count, metavar='N', help='masked images at a time (default: by device)'
    )
    speed.add_argument('--amp', action='store_true', help='run the network under autocast')
    speed.add_argument(
        '--amp-dtype', choices=('bfloat16', 'float16'), help='of --amp, which it implies (default: bfloat16)'
    )
    add_engine(speed)
    speed.add_argument('--channels-last', action='store_true', help='use this memory format')
    speed.add_argument('--torchcompile', action='store_true', help='compile the network')
    add_format(parser)
    parser.add_argument('--plot', action='store_true', help='draw the mean curves and the differences too')
    parser.add_argument(
        '--output',
        default='evaluation',
        metavar='DIR',
        help='figures, per-image values, and the state of an unfinished run (default: %(default)s)',
    )


def run(args: argparse.Namespace) -> int:
    import torch
    from timm.utils.distributed import init_distributed_device_so

    from ..backbones.image_settings import image_loader, image_settings
    from ..datasets import create_dataset, image_mode, image_name, read_boxes
    from ..evaluate import evaluate
    from ..metrics.table import DEFAULT_METRICS, METRICS

    if args.seed < 0:
        raise ValueError(f'--seed must be at least 0, got {args.seed}.')
    place = init_distributed_device_so(device=device_of(args))
    device = torch.device(place['device'])
    try:
        model = open_from(args).to(device).eval()
        mode = image_mode(image_settings(model)['input_size'][0])
        dataset: Any = create_dataset(
            args.dataset, args.data_dir, split=args.split, class_map=args.class_map, input_img_mode=mode
        )
        methods = methods_from(args, model, [image_name(dataset, index) for index in range(len(dataset))])
        if not args.class_map:
            _compare_classes(dataset, model, args.target)
        if args.boxes:
            dataset.boxes = read_boxes(args.boxes, dataset)
        loader = image_loader(model, dataset, args.batch_size, num_workers=args.workers)
        metrics = args.metrics or list(DEFAULT_METRICS)
        has_curves = any(METRICS[name].curve for name in metrics)
        alone = device.type == 'cpu' and not place['distributed']
        report = evaluate(
            model,
            loader,
            methods,
            args.poolings,
            args.target,
            metrics=metrics,
            setting=args.setting,
            curve_value=args.curve_value,
            layer=args.layer,
            num_samples=args.num_samples,
            seed=args.seed,
            batch_size=args.mask_batch_size,
            amp_dtype=_amp_dtype(args, device),
            channels_last=args.channels_last,
            torchcompile=args.torchcompile,
            engine=args.engine,
            temperature=args.temperature,
            keep_curves=args.plot and has_curves,
            output_dir=args.output,
            arguments={name: _plain_path(getattr(args, name)) for name in _RECORDED},
            progress=True,
            on_batch=CoresHint(min(args.num_samples or len(dataset), len(dataset))) if alone else None,
        )
        if place['global_rank'] == 0:
            written = ['table.csv', 'evaluation.json', 'images.csv', 'values.npz']
            written += plot(report, args.output) if args.plot else []
            print(file=sys.stderr)
            print_report(report, args.format)
            print_files(args.output, written, args.format)
    finally:
        if place['distributed']:
            torch.distributed.destroy_process_group()
    return SKIPPED if report.unreadable or report.not_finite else 0


class CoresHint:
    """Logs once how to run one process per core, where there are several cores and the evaluation is long.

    It is called after each batch; the second one tells the time of an image.

    Args:
        num_images: Of the evaluation.
    """

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self._first: tuple[float, int] | None = None
        self._is_over = False

    def __call__(self, done: int, means: Mapping[str, float]) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        elif not self._is_over:
            self._is_over = True
            start, before = self._first
            minutes = (now - start) / (done - before) * (self._num_images - done) / 60
            num_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            if num_cores > 1 and minutes >= _MANY_MINUTES:
                _logger.info(
                    'About %.0f minutes are left with one process on %d cores. The threads of a small network wait for '
                    'one another. One process per core: torchrun --standalone --nproc-per-node %d -m timm_castream.cli '
                    'evaluate ... with the same options, which resumes here.',
                    minutes,
                    num_cores,
                    num_cores,
                )


def _compare_classes(dataset: Any, model: Any, target: str) -> None:
    """Gives the targets of a data set the indices of the model's classes, by name.

    Raises:
        ValueError: If the labels are to be explained and are not the model's.
    """
    from ..datasets import align_classes, present_classes
    from ..hub.label_names import known_names, label_texts

    classes = present_classes(dataset)
    names = known_names(model, classes) if classes else None
    if names:
        try:
            align_classes(dataset, names, 'The data set', label_texts(model))
        except ValueError:
            if target == 'truth':
                raise
    elif classes and len(classes) < (model.num_classes or 0) and target == 'truth':
        raise ValueError(
            f'The data set has {len(classes)} classes, the model has {model.num_classes}, and its weights name none: name '
            'them with --class-names, give the folders their indices with --class-map, or explain the predicted classes '
            'with --target predicted.'
        )


def _amp_dtype(args: argparse.Namespace, device: Any) -> Any:
    """The type of mixed precision, or None."""
    import torch

    if not args.amp and args.amp_dtype is None:
        return None
    if device.type == 'cpu':
        _logger.warning('Mixed precision on a CPU was 6 times as slow as float32 where it was tried.')
    return getattr(torch, args.amp_dtype or 'bfloat16')


def _plain_path(value: Any) -> Any:
    """The value of an option, a path without detours: `a/../b` and `./b` are `b`."""
    return os.path.normpath(value) if isinstance(value, str) and os.path.exists(value) else value


def print_report(report: Any, kind: str) -> None:
    """Prints the table as `--format` asks for it. What a file of LaTeX or Markdown has no place for goes to stderr."""
    from ..evaluation.tables import to_notes

    if kind == 'text':
        print(report)
    else:
        print(report.to_latex() if kind == 'latex' else report.to_markdown())
        print(f'\n{to_notes(report)}', file=sys.stderr)


def print_files(folder: str, names: Sequence[str], kind: str) -> None:
    """Says which files were written, as `print_report`."""
    if names:
        print(f'\nWritten to {folder}: {", ".join(names)}', file=sys.stdout if kind == 'text' else sys.stderr)


def plot(report: Any, folder: str) -> list[str]:
    """Draws what the report has, as PNG, PDF and SVG, and gives the names of the files."""
    from ..evaluation.plots import draw_curves, draw_differences
    from ..visualize import save

    figures = {}
    if report.curves:
        figures['curves'] = draw_curves(report)
    if report.differences:
        figures['differences'] = draw_differences(report)
    if not figures:
        _logger.warning(
            'There is nothing to draw: curves are kept by castream evaluate --plot with insertion or deletion, and '
            'differences need both poolings.'
        )
    names = [f'{name}.{ending}' for name in figures for ending in ('png', 'pdf', 'svg')]
    for name in names:
        save(figures[name.partition('.')[0]], f'{folder}/{name}')
    return names
