"""`castream explain`: saliency maps over images."""

from __future__ import annotations

import argparse
import os

from . import SKIPPED
from .options import add_method_options, add_model_options, add_size_options, device_of, methods_from, open_from

EXAMPLE = 'castream explain photo.jpg'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f'{parser.description} Without --model: tf_efficientnet_lite0_castream with its published weights.'
    )
    parser.add_argument('paths', nargs='*', metavar='IMAGE')
    parser.add_argument('--images', metavar='DIR', help='explain every image below this folder')
    add_model_options(parser, required=False)
    add_method_options(parser, ('attention', 'grad_cam'))
    add_size_options(parser)
    pictures = parser.add_argument_group('pictures')
    pictures.add_argument(
        '--save-maps',
        action='store_true',
        help='write each map as .npy and over the whole photograph too, with the classes as JSON',
    )
    pictures.add_argument(
        '--colours', default='viridis', metavar='NAME', help='viridis, inferno or jet (default: %(default)s)'
    )
    pictures.add_argument(
        '--opacity', type=float, default=0.8, metavar='X', help='of the most salient pixels (default: %(default)s)'
    )
    parser.add_argument('--identity', action='store_true', help='draw both sides of eq. (5) too, and their difference')
    parser.add_argument('--multilabel', action='store_true', help='probabilities by sigmoid')
    parser.add_argument('--output', default='explained', metavar='DIR', help='(default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    from ..visualize import explain, find_images, printable

    paths = [*args.paths, *(find_images(args.images) if args.images else ())]
    if not paths:
        raise ValueError('Name images, or a folder of them with --images.')
    for path in args.paths:
        if os.path.isdir(path):
            raise ValueError(f'{path} is a folder: name it with --images.')
    model = open_from(args).to(device_of(args)).eval()
    done = explain(
        model,
        paths,
        methods_from(args, model),
        args.output,
        args.poolings,
        args.layer,
        identity=args.identity,
        activation='sigmoid' if args.multilabel else 'softmax',
        colours=args.colours,
        opacity=args.opacity,
        save_maps=args.save_maps,
    )
    for path in [*done.pictures, *done.maps, *done.grids]:
        print(printable(path))
    return SKIPPED if done.unreadable else 0
