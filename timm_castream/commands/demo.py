"""`castream demo`: photographs explained by a trained network, or a small network trained on digits."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = 'castream demo --output demo_output'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', default='demo_output', metavar='DIR', help='(default: %(default)s)')
    digits = parser.add_argument_group('training')
    digits.add_argument(
        '--train', action='store_true', help='train a small network and its stream on digits instead, in ten minutes'
    )
    digits.add_argument('--seed', type=int, default=0, help='of the training (default: %(default)s)')
    digits.add_argument(
        '--quick', action='store_true', help='train for under a minute: shows that it runs, not what it can do'
    )


def run(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise ValueError(f'--seed must be at least 0, got {args.seed}.')
    if args.quick and not args.train:
        raise ValueError('--quick is for --train.')
    output = Path(args.output)
    if args.train:
        from .. import demo

        report = demo.run(output, args.seed, demo.QUICK if args.quick else None)
        print(f'\n{report}\n\n{report.summary()}\n')
        print(f'Written to {output}: report.md, figure.png, metrics.json, images.csv and the weights')
        return 0
    print('Explaining photographs with a trained network: about a minute on 2 CPU cores.', flush=True)
    from ..demo.photographs import explain_photographs, summary

    print(f'\n{summary(explain_photographs(output))}\n')
    print(f'Read {output / "report.md"}, look at {output / "pictures" / "grid.png"}.')
    print('Next: castream explain photo.jpg, or castream app for the browser.')
    return 0
