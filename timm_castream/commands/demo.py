"""`castream demo`: a CA-Stream trained on real pixels, in minutes."""

from __future__ import annotations

import argparse

EXAMPLE = 'castream demo --output demo_output'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', default='demo_output', metavar='DIR', help='(default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument('--quick', action='store_true', help='under a minute: shows that it runs, not what it can do')


def run(args: argparse.Namespace) -> int:
    from .. import demo

    if args.seed < 0:
        raise ValueError(f'--seed must be at least 0, got {args.seed}.')
    report = demo.run(args.output, args.seed, demo.QUICK if args.quick else None)
    print(f'\n{report}\n\n{report.summary()}\n')
    print(f'Written to {args.output}: report.md, figure.png, metrics.json, images.csv and the weights')
    return 0
