"""`castream list-images`: the images of a data set or a folder in the order in which every command reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = 'castream list-images --data-dir /data/imagenet --split validation'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f'{parser.description} Saved maps (--maps of evaluate and explain) have this order, or these names.'
    )
    parser.add_argument('--images', metavar='DIR', help='the images below a folder, as castream explain reads them')
    parser.add_argument('--data-dir', metavar='DIR', help='an image folder, or the folder of the data set')
    parser.add_argument('--dataset', default='', help='name of a data set (default: an image folder)')
    parser.add_argument('--split', default='validation', help='(default: %(default)s)')
    parser.add_argument('--class-map', default='', metavar='FILE', help="timm's class to index file")


def run(args: argparse.Namespace) -> int:
    from .._utils.files import printable
    from ..datasets import create_dataset, find_images, image_name

    if args.images:
        names = [path.relative_to(args.images).as_posix() for path in find_images(Path(args.images))]
    else:
        dataset = create_dataset(args.dataset, args.data_dir, split=args.split, class_map=args.class_map)
        names = [image_name(dataset, index) for index in range(len(dataset))]  # type: ignore[arg-type]
    for name in names:
        print(printable(name))
    return 0
