"""`castream fit`: a stream beside a frozen network from a folder of images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .names import names
from .options import (
    add_model_options,
    add_normalisation_options,
    add_size_options,
    count,
    count_or_none,
    device_of,
    open_from,
)

EXAMPLE = 'castream fit --model tf_efficientnet_lite0 --pretrained --images FOLDER --output fitted'


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    data = parser.add_argument_group('images')
    data.add_argument('--images', nargs='+', required=True, metavar='DIR', help='folders; every image below them')
    data.add_argument(
        '--labels',
        choices=names('fitting/settings', 'LABELS'),
        default='predicted',
        help="the network's own predictions, or the names of the class folders (default: %(default)s)",
    )
    data.add_argument('--num-images', type=count, metavar='N', help='use so many of them, drawn by --seed')
    data.add_argument(
        '-j', '--workers', type=count_or_none, default=2, help='processes that read images (default: %(default)s)'
    )
    add_size_options(data)
    add_normalisation_options(data)
    cache = parser.add_argument_group('feature maps on disk')
    cache.add_argument(
        '--cache-size', type=float, default=20.0, metavar='GB', help='at most; 0 keeps none (default: %(default)g)'
    )
    cache.add_argument(
        '--cache', metavar='DIR', help='keep them here for other fits (default: in the output until the end)'
    )
    training = parser.add_argument_group('training; several values are tried, and one is chosen on images held out')
    training.add_argument('--epochs', type=int, nargs='+', metavar='N', help='(default: tries two)')
    training.add_argument('--lr', type=float, nargs='+', metavar='X', help='learning rate (default: tries two)')
    training.add_argument(
        '--stream-start', type=int, nargs='+', metavar='L', help='l of the placement S_l - S_L (default: tries 0 and L)'
    )
    training.add_argument('-b', '--batch-size', type=count, default=64, help='(default: %(default)s)')
    training.add_argument('--weight-decay', type=float, default=0.0, metavar='X', help='(default: %(default)g)')
    training.add_argument(
        '--distill',
        type=float,
        nargs='?',
        const=1.0,
        default=0.0,
        metavar='X',
        help="share of the target that is the network's probabilities in place of its prediction (default: %(default)g)",
    )
    training.add_argument(
        '--true-share',
        type=float,
        default=0.0,
        metavar='X',
        help='share of the images whose label is the class of the model that their folder names (default: %(default)g)',
    )
    training.add_argument('--augment', action='store_true', help='random crops, flips and colours; keeps no maps')
    training.add_argument('--seed', type=count_or_none, default=0, help='(default: %(default)s)')
    parser.add_argument(
        '--output',
        default='fitted',
        metavar='DIR',
        help='results, and the state of an unfinished fit (default: %(default)s)',
    )


def run(args: argparse.Namespace) -> int:
    from ..fitting.run import UNFINISHED

    try:
        return _run(args)
    except KeyboardInterrupt:
        if Path(args.output, UNFINISHED).is_dir():
            print(f'The same command resumes the fit in {args.output}.', file=sys.stderr)
        raise


def _run(args: argparse.Namespace) -> int:
    from ..fit import fit
    from ..hub.load import BACKBONE_WEIGHTS

    local = args.model.startswith('local-dir:')
    if not (args.pretrained or args.checkpoint or any(args.model_kwargs.get(key) for key in BACKBONE_WEIGHTS)):
        raise ValueError(
            f'{args.model} has no trained weights so far: add {"" if local else "--checkpoint FILE or "}--pretrained.'
        )
    model = open_from(args).to(device_of(args))
    fitted = fit(
        model,
        args.images,
        args.labels,
        args.output,
        epochs=args.epochs,
        lr=args.lr,
        stream_start=args.stream_start,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        weight_decay=args.weight_decay,
        distill=args.distill,
        true_share=args.true_share,
        augment=args.augment,
        cache_size=args.cache_size,
        cache=args.cache,
        workers=args.workers,
    )
    print(f'\n{fitted.report}\n\n{fitted.sentence}\n')
    print(f'Written to {args.output}: report.md, stream.safetensors, model, evaluation, pictures, fit.json')
    return 0
