"""`castream explain`: saliency maps over images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from . import SKIPPED
from .names import names
from .options import (
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

EXAMPLE = 'castream explain photo.jpg'

_NUM_SHOWN = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f'{parser.description} Without --model: tf_efficientnet_lite0_castream with its published weights.'
    )
    parser.add_argument('paths', nargs='*', metavar='IMAGE', help='an image, or a folder: every image below it')
    parser.add_argument('--images', metavar='DIR', help='explain every image below this folder')
    add_model_options(parser, required=False)
    add_method_options(parser, ('attention', 'grad_cam'))
    add_size_options(parser)
    add_normalisation_options(parser)
    classes = parser.add_argument_group('classes').add_mutually_exclusive_group()
    classes.add_argument(
        '--target', nargs='+', metavar='CLASS', help='names or indices of the classes to explain (default: predicted)'
    )
    classes.add_argument('--top-k', type=count, metavar='K', help='explain the K most probable classes of each image')
    pictures = parser.add_argument_group('pictures')
    pictures.add_argument(
        '--save-maps',
        action='store_true',
        help='write each map as .npy and over the whole photograph too, with the classes as JSON',
    )
    pictures.add_argument(
        '--colours',
        type=one_of('colours', names('pictures', 'COLOURS')),
        default='viridis',
        metavar='NAME',
        help='viridis, inferno or jet (default: %(default)s)',
    )
    pictures.add_argument(
        '--opacity', type=float, default=0.8, metavar='X', help='of the most salient pixels (default: %(default)s)'
    )
    parser.add_argument('--identity', action='store_true', help='draw both sides of eq. (5) too, and their difference')
    parser.add_argument(
        '--multilabel', action='store_true', help='probabilities by sigmoid; every class of at least 0.5 is explained'
    )
    parser.add_argument(
        '--mask-batch-size', type=count, metavar='N', help='masked images at a time (default: by device)'
    )
    parser.add_argument(
        '--seed', type=count_or_none, default=0, help='of methods that draw random numbers (default: %(default)s)'
    )
    parser.add_argument('--output', default='explained', metavar='DIR', help='(default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    from .._utils.files import printable
    from ..visualize import explain

    if not args.images and len(args.paths) == 1 and os.path.isdir(args.paths[0]):
        args.images = args.paths.pop()
    found = _images_below(args.images, args.output) if args.images else []
    named: list[str] = []
    for path in args.paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f'There is no file {path}.')
        named += map(str, _images_below(path, args.output)) if os.path.isdir(path) else [path]
    paths = [*map(Path, named), *found]
    if not paths:
        raise ValueError('Name images, or a folder of them.')
    root = args.images if not named else _root(named)
    image_names = [os.path.relpath(path, args.images).replace(os.sep, '/') for path in found]
    model = open_from(args).to(device_of(args)).eval()
    done = explain(
        model,
        paths,
        methods_from(args, model, [*named, *image_names]),
        args.output,
        args.poolings,
        args.layer,
        args.mask_batch_size,
        identity=args.identity,
        activation='sigmoid' if args.multilabel else 'softmax',
        colours=args.colours,
        opacity=args.opacity,
        save_maps=args.save_maps,
        target=args.target,
        top_k=args.top_k,
        root=root,
        seed=args.seed,
    )
    for image, classes in done.classes.items():
        for pooling, top in classes.items():
            shown = ', '.join(f'{name} {probability:.3f}' for name, probability in top[: args.top_k or _NUM_SHOWN])
            print(f'{printable(image)}: {pooling}: {shown}')
    for path in [*done.pictures, *done.maps, *done.grids]:
        print(printable(path))
    return SKIPPED if done.unreadable else 0


def _images_below(folder: str, output: str) -> list[Path]:
    """The images below a folder, without the pictures of an earlier call.

    Raises:
        ValueError: There are none.
    """
    from ..pictures import is_picture
    from ..visualize import find_images

    root, pictures = Path(folder).resolve(), Path(output).resolve()
    is_below = root in pictures.parents  # all that lies in the output folder are pictures, and files of the user's
    found = [
        path
        for path in find_images(folder)
        if not (is_below and pictures in path.resolve().parents) and not is_picture(path)
    ]
    if not found:
        raise ValueError(f'{folder!r} has no images but pictures that castream explain wrote.')
    return found


def _root(paths: Sequence[str]) -> str | None:
    """The folder below which the folders of the images are kept: this one, if all images are named relative to it."""
    is_below = all(not os.path.isabs(path) and '..' not in Path(path).parts for path in paths)
    return os.curdir if is_below else None
